"""Small grouped GEMMs for any `Problem`: seeded inputs, and the stage that launches it.

Inputs come from numpy alone, so that two machines make the same ones. Sizes: T tokens, H hidden, I
intermediate, E experts, R rows, of which the last few belong to no expert and hold NaN.
"""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from sonic.enums import GateUpLayout
from sonic.runtime.problem import EpilogueKind, Operand, Problem, Ragged, TileConfig
from sonic.testing import poison_dead_rows_

EXACT = "exact"  # small integers and powers of two: every sum is exact in float32, in any order
NORMAL = "normal"


@dataclass(frozen=True)
class Sizes:
    """Extents of one small layer; `counts` are the rows of each expert."""

    tokens: int
    hidden: int
    width: int
    counts: tuple[int, ...]
    dead_rows: int = 3

    @property
    def live(self) -> int:
        return sum(self.counts)

    @property
    def rows(self) -> int:
        return self.live + self.dead_rows


# No extent is a multiple of a tile; an expert has two row tiles, one nothing, one less than a tile.
SMALL = Sizes(70, 104, 72, (130, 0, 7))


@dataclass(frozen=True)
class Stage:
    """A function of `sonic.stages` (and of the reference), and its outputs' names.

    `by_row`: outputs have a row for each routed row, hence undefined ones at the end.
    """

    function: str
    outputs: tuple[str, ...]
    by_row: bool = True


UP = Stage("up_forward", ("h", "a"))
UP_INFERENCE = Stage("up_forward", ("a",))
DOWN = Stage("down_forward", ("y",))
DOWN_ACT = Stage("down_backward_act", ("dh", "a_scaled", "ds"))
DOWN_WEIGHT = Stage("down_backward_weight", ("dw2",), by_row=False)
UP_ACT = Stage("up_backward_act", ("dx",))
UP_WEIGHT = Stage("up_backward_weight", ("dw1",), by_row=False)


def stage_of(problem: Problem) -> Stage:
    """The stage that launches a problem. Raises ValueError if none does."""
    if problem.ragged is Ragged.REDUCTION:
        if problem.gather is Operand.B or problem.gated_rows:
            return UP_WEIGHT
        return DOWN_WEIGHT
    if problem.epilogue is EpilogueKind.ACTIVATION:
        return UP if problem.store_preact else UP_INFERENCE
    if problem.epilogue is EpilogueKind.ACTIVATION_GRAD:
        return DOWN_ACT
    if problem.gather is not None:
        raise ValueError(
            f"{problem.name}: no stage launches a linear GEMM of gathered rows. Problems of "
            "sonic.runtime.problem.layer_problems have stages; choose one of these."
        )
    return UP_ACT if problem.transposed_weight else DOWN


@dataclass(frozen=True)
class GroupedGemm:
    """One problem at one size. `layout` is that of gated weights."""

    problem: Problem
    sizes: Sizes = SMALL
    layout: GateUpLayout = GateUpLayout.INTERLEAVED

    @property
    def stage(self) -> Stage:
        return stage_of(self.problem)

    @property
    def gated(self) -> bool:
        activation = self.problem.activation
        return self.problem.gated_rows or (activation is not None and activation.is_gated)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.problem.dtype)

    def inputs(self, seed: int, kind: str = NORMAL) -> dict[str, Any]:
        """Tensors and options of the stage, by parameter; the same for one seed everywhere.

        kind: EXACT or NORMAL; normal weights are scaled so that outputs are of order one.
        """
        return _Inputs(self, seed, kind).of_stage()

    def run(self, stages: ModuleType, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Outputs by name, without the rows that belong to no expert, from either implementation.

        Partial sums of `ds` are added in float64.
        """
        # The sum is made in place, and the inputs may be used again.
        own = {k: v.clone() if k == "accumulate_into" and v is not None else v
               for k, v in inputs.items()}  # fmt: skip
        result = getattr(stages, self.stage.function)(**own)
        result = result if isinstance(result, tuple) else (result,)
        if self.stage is UP_INFERENCE:
            result = result[1:]
        named = dict(zip(self.stage.outputs, result, strict=True))
        if "ds" in named:
            named["ds"] = named["ds"].double().sum(0)
        if self.stage.by_row:
            named = {name: t[: self.sizes.live] for name, t in named.items()}
        return named


class _Inputs:
    """The random tensors of one GroupedGemm, drawn in a fixed order."""

    def __init__(self, gemm: GroupedGemm, seed: int, kind: str):
        if kind not in (EXACT, NORMAL):
            raise ValueError(f"kind={kind!r}: choose {EXACT!r} or {NORMAL!r}")
        self.gemm, self.kind = gemm, kind
        self.limit = self._limit(gemm.problem)
        self.rng = np.random.default_rng(seed)
        counts = torch.tensor(gemm.sizes.counts)
        self.offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).int()

    @staticmethod
    def _limit(problem: Problem) -> int:
        """Largest exact integer: sums have more bits than the dtype and stay in its range."""
        if problem.dtype == "bfloat16":
            return 8
        return 16 if problem.activation is None else 3

    def tensor(self, *shape: int, fan_in: int = 1) -> Tensor:
        if self.kind == EXACT:
            values = self.rng.integers(-self.limit, self.limit + 1, shape).astype(np.float64)
        else:
            values = self.rng.standard_normal(shape) / fan_in**0.5
        return torch.from_numpy(values).to(self.gemm.dtype)

    def rows(self, columns: int) -> Tensor:
        """(R, columns), NaN where no expert may read."""
        return poison_dead_rows_(self.tensor(self.gemm.sizes.rows, columns), self.offsets)

    def token_by_row(self) -> Tensor:
        sizes = self.gemm.sizes
        tokens = torch.from_numpy(self.rng.integers(0, sizes.tokens, sizes.rows)).int()
        tokens[sizes.live :] = -1
        return tokens

    def scores(self) -> Tensor:
        sizes = self.gemm.sizes
        values = self.rng.random(sizes.rows)
        if self.kind == EXACT:
            values = 2.0 ** -np.ceil(4 * values)
        return poison_dead_rows_(torch.from_numpy(values).float(), self.offsets)

    def of_stage(self) -> dict[str, Any]:
        stage = self.gemm.stage
        make = {
            "up_forward": self.up_forward,
            "down_forward": self.down_forward,
            "down_backward_act": self.down_backward_act,
            "down_backward_weight": self.down_backward_weight,
            "up_backward_act": self.up_backward_act,
            "up_backward_weight": self.up_backward_weight,
        }
        return {**make[stage.function](), "offset_by_expert": self.offsets}

    @property
    def preact(self) -> int:
        return self.gemm.sizes.width * (2 if self.gemm.gated else 1)

    def weight(self, rows: int, columns: int, fan_in: int) -> Tensor:
        return self.tensor(len(self.gemm.sizes.counts), rows, columns, fan_in=fan_in)

    def bias(self, columns: int) -> Tensor | None:
        has_bias = self.gemm.problem.has_bias
        return self.tensor(len(self.gemm.sizes.counts), columns) if has_bias else None

    def up_forward(self) -> dict[str, Any]:
        sizes, problem = self.gemm.sizes, self.gemm.problem
        return {
            "x": self.tensor(sizes.tokens, sizes.hidden),
            "w1": self.weight(self.preact, sizes.hidden, sizes.hidden),
            "b1": self.bias(self.preact),
            "token_by_row": self.token_by_row(),
            "activation": problem.activation,
            "layout": self.gemm.layout,
            "store_preact": problem.store_preact,
        }

    def down_forward(self) -> dict[str, Any]:
        sizes = self.gemm.sizes
        return {
            "a": self.rows(sizes.width),
            "w2": self.weight(sizes.hidden, sizes.width, sizes.width),
            "b2": self.bias(sizes.hidden),
        }

    def down_backward_act(self) -> dict[str, Any]:
        sizes = self.gemm.sizes
        return {
            "dout": self.tensor(sizes.tokens, sizes.hidden),
            "w2": self.weight(sizes.hidden, sizes.width, sizes.hidden),
            "h": self.rows(self.preact),
            "score_by_row": self.scores(),
            "token_by_row": self.token_by_row(),
            "activation": self.gemm.problem.activation,
        }

    def up_backward_act(self) -> dict[str, Any]:
        sizes = self.gemm.sizes
        return {
            "dh": self.rows(self.preact),
            "w1": self.weight(self.preact, sizes.hidden, self.preact),
            "layout": self.gemm.layout,
            "gated": self.gemm.gated,
        }

    def gathered(self, columns: int) -> dict[str, Any]:
        """The operand that is gathered if the problem gathers, and its index."""
        if self.gemm.problem.gather is None:
            return {"rows": self.rows(columns), "token_by_row": None}
        source = self.tensor(self.gemm.sizes.tokens, columns)
        return {"rows": source, "token_by_row": self.token_by_row()}

    def target(self, rows: int, columns: int) -> Tensor | None:
        """Small integers that a weight gradient is added to, or None."""
        if self.gemm.problem.epilogue is not EpilogueKind.ACCUMULATE:
            return None
        shape = (len(self.gemm.sizes.counts), rows, columns)
        return torch.from_numpy(self.rng.integers(-8, 9, shape)).float()

    def down_backward_weight(self) -> dict[str, Any]:
        sizes = self.gemm.sizes
        source = self.gathered(sizes.hidden)
        return {
            "dout": source["rows"],
            "a_scaled": self.rows(sizes.width),
            "token_by_row": source["token_by_row"],
            "accumulate_into": self.target(sizes.hidden, sizes.width),
        }

    def up_backward_weight(self) -> dict[str, Any]:
        sizes = self.gemm.sizes
        source = self.gathered(sizes.hidden)
        return {
            "x": source["rows"],
            "dh": self.rows(self.preact),
            "token_by_row": source["token_by_row"],
            "layout": self.gemm.layout,
            "gated": self.gemm.gated,
            "accumulate_into": self.target(self.preact, sizes.hidden),
        }


def cast(inputs: dict[str, Any], *, dtype: torch.dtype | None = None, device: str = "cpu") -> dict:
    """Inputs on a device, every floating tensor in `dtype` if it is given."""

    def converted(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.to(device)
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    return {name: converted(value) for name, value in inputs.items()}


def digest(inputs: dict[str, Any]) -> int:
    """A checksum of all tensors: equal on two machines that made the same inputs."""
    total = 0
    for name in sorted(inputs):
        if isinstance(inputs[name], Tensor):
            total = zlib.crc32(inputs[name].contiguous().view(torch.uint8).numpy(), total)
    return total


@contextmanager
def tiles(config: TileConfig, sms: int) -> Iterator[None]:
    """Inside the block, stages on a GPU use `config` and at most `sms` CTAs."""
    from sonic import stages
    from sonic.runtime import launch

    with (
        mock.patch.object(stages, "config_for", lambda *_: config),
        mock.patch.object(stages, "compile_ahead", lambda *_: None),
        mock.patch.object(stages, "fill_cache", lambda *_, **__: None),
        mock.patch.object(stages, "prepared", launch.prepared.__wrapped__),
        mock.patch.object(launch, "_multiprocessors", lambda _: sms),
    ):
        yield
