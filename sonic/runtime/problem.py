"""What a grouped GEMM computes (:class:`Problem`) and how (:class:`TileConfig`). No GPU."""

from __future__ import annotations

import functools
from dataclasses import astuple, dataclass
from enum import Enum
from typing import Any

from sonic.enums import ActivationType


class Arch(str, Enum):
    """Kernel package that serves a compute capability."""

    SM90 = "sm90"
    SM100 = "sm100"
    SM120 = "sm120"


class Ragged(str, Enum):
    """The axis whose extent differs by expert."""

    ROWS = "rows"  # M: D[rows of e] = A[rows of e] @ W[e] (activations and their gradients)
    REDUCTION = "reduction"  # K: D[e] = A[rows of e].T @ B[rows of e] (weight gradients)


class Operand(str, Enum):
    A = "a"
    B = "b"


class EpilogueKind(str, Enum):
    """Functions of ``sonic.device.epilogue``, by what they write."""

    LINEAR = "linear"  # D = acc (+ bias)
    ACTIVATION = "activation"  # D = acc (+ bias), the pre-activation; Aux = act(D)
    ACTIVATION_GRAD = "activation_grad"  # D = dh, Aux = score * act(h), RowSum = <acc, act(h)>
    ACCUMULATE = "accumulate"  # D += acc, D in float32


class _HashedOnce:
    """A frozen dataclass whose fields are hashed when first asked for: every launch looks it up."""

    @functools.cached_property
    def _hash(self) -> int:
        return hash(astuple(self))  # type: ignore[call-overload]

    def hash_once(self) -> int:
        return self._hash

    def __getstate__(self) -> dict[str, Any]:
        # Another process hashes strings differently.
        return {name: value for name, value in vars(self).items() if name != "_hash"}


@dataclass(frozen=True)
class Problem(_HashedOnce):
    """One grouped GEMM, shape-free: a compiled kernel serves every size.

    ``Ragged.ROWS``: ``A (R or T, K)``, weight ``W (E, N, K)`` or, with ``transposed_weight``,
    ``W (E, K, N)``; output ``D (R, N)``. ``Ragged.REDUCTION``: ``A (R or T, M)``, ``B (R or T,
    N)``, output ``D (E, M, N)``. ``gather`` names the operand whose rows are picked by index out of
    ``T`` tokens; the other one holds the ``R`` rows grouped by expert.

    ``gated_rows``: the weight's second axis interleaves gate and up rows (``2 I`` of them). The
    kernel sees it as blocks of eight gate rows and eight up rows whatever the parameter's own order
    is.
    """

    ragged: Ragged
    dtype: str  # "bfloat16" | "float16"
    epilogue: EpilogueKind
    gather: Operand | None = None
    transposed_weight: bool = False
    gated_rows: bool = False
    activation: ActivationType | None = None
    has_bias: bool = False
    store_preact: bool = False

    __hash__ = _HashedOnce.hash_once

    @property
    def is_forward(self) -> bool:
        """An up- or a down-projection."""
        return self.ragged is Ragged.ROWS and not self.transposed_weight

    @property
    def is_of_inference(self) -> bool:
        """A projection of a layer without gradients: nothing is stored for a backward pass. One
        with gradients has the same down-projection."""
        return self.is_forward and not self.store_preact

    @property
    def name(self) -> str:
        """Stable name: kernels appear in traces as ``sonic_<name>_<arch>``, followed by types."""
        parts = [self.ragged.value, self.epilogue.value]
        if self.activation is not None:
            parts.append(self.activation.value)
        if self.gather is not None:
            parts.append(f"gather_{self.gather.value}")
        for flag in ("transposed_weight", "gated_rows", "has_bias", "store_preact"):
            if getattr(self, flag):
                parts.append(flag)
        parts.append({"bfloat16": "bf16", "float16": "fp16"}.get(self.dtype, self.dtype))
        return "_".join(parts)


class Schedule(str, Enum):
    """How the math warpgroups of a CTA share the work."""

    COOPERATIVE = "cooperative"  # both take half of one tile
    PINGPONG = "pingpong"  # each takes a whole tile, in turns
    OVERLAPPED = "overlapped"  # cooperative, and a tile is stored during the next one's main loop


@dataclass(frozen=True)
class TileConfig(_HashedOnce):
    """Tile and cluster extents of one kernel instance (elements, CTAs)."""

    tile_m: int
    tile_n: int
    cluster_m: int = 1
    cluster_n: int = 1
    schedule: Schedule = Schedule.COOPERATIVE
    epilogue_stages: int = 2
    raster_along_m: bool = True
    dynamic: bool = False  # CTAs take tiles from a counter instead of with a fixed stride
    split: bool = False  # reductions over the rows of an expert that has many are split
    swap_ab: bool = False  # tiles have up to tile_m rows, as many as fit the expert

    __hash__ = _HashedOnce.hash_once

    @property
    def cluster_size(self) -> int:
        return self.cluster_m * self.cluster_n

    @property
    def row_sum_columns(self) -> int:
        """Columns whose sum is one partial row sum: with ``swap_ab`` those of a warpgroup."""
        return 128 if self.swap_ab else self.tile_n

    @property
    def name(self) -> str:
        return (
            f"{self.tile_m}x{self.tile_n}_{self.cluster_m}x{self.cluster_n}_{self.schedule.value}"
            f"_e{self.epilogue_stages}{'' if self.raster_along_m else '_n'}"
            f"{'_dynamic' if self.dynamic else ''}{'_split' if self.split else ''}"
            f"{'_swap' if self.swap_ab else ''}"
        )


@dataclass(frozen=True)
class Unsupported:
    """Why a backend refuses a problem, and what the caller can do."""

    reason: str
    remedy: str


# The grouped GEMMs of the layer. ``sonic.stages`` launches exactly these.


def up_problem(
    activation: ActivationType, dtype: str, has_bias: bool, store_preact: bool
) -> Problem:
    """``h = x[token] w1^T + b1``, ``a = act(h)``."""
    return Problem(
        Ragged.ROWS,
        dtype,
        EpilogueKind.ACTIVATION,
        gather=Operand.A,
        gated_rows=activation.is_gated,
        activation=activation,
        has_bias=has_bias,
        store_preact=store_preact,
    )


def down_problem(dtype: str, has_bias: bool) -> Problem:
    """``y = a w2^T + b2``."""
    return Problem(Ragged.ROWS, dtype, EpilogueKind.LINEAR, has_bias=has_bias)


def down_backward_act_problem(activation: ActivationType, dtype: str) -> Problem:
    """``dh``, ``a'`` and the score gradient from ``dout[token] w2``."""
    return Problem(
        Ragged.ROWS,
        dtype,
        EpilogueKind.ACTIVATION_GRAD,
        gather=Operand.A,
        transposed_weight=True,
        activation=activation,
    )


def up_backward_act_problem(dtype: str, gated: bool) -> Problem:
    """``dx = dh w1``."""
    return Problem(
        Ragged.ROWS, dtype, EpilogueKind.LINEAR, transposed_weight=True, gated_rows=gated
    )


def weight_grad_problem(
    dtype: str, gather: Operand | None, gated: bool, accumulate: bool
) -> Problem:
    """``dw = a^T b`` over the rows of each expert."""
    return Problem(
        Ragged.REDUCTION,
        dtype,
        EpilogueKind.ACCUMULATE if accumulate else EpilogueKind.LINEAR,
        gather=gather,
        gated_rows=gated,
    )


def layer_problems(
    activation: ActivationType, dtype: str, has_bias: bool, accumulate: bool = False
) -> list[Problem]:
    """Every grouped GEMM of one layer: inference and training, forward and backward."""
    gated = activation.is_gated
    return [
        up_problem(activation, dtype, has_bias, store_preact=True),
        up_problem(activation, dtype, has_bias, store_preact=False),
        down_problem(dtype, has_bias),
        down_backward_act_problem(activation, dtype),
        up_backward_act_problem(dtype, gated),
        weight_grad_problem(dtype, Operand.A, False, accumulate),
        weight_grad_problem(dtype, Operand.B, gated, accumulate),
    ]
