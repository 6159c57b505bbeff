"""The search for the fastest tiles of a grouped GEMM on the GPU at hand.

Nothing that a layer runs comes here: its tiles follow from its sizes. ``sonic tune`` and
``benchmarks/tiles.py`` do.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from sonic.runtime.launch import grouped_gemm
from sonic.runtime.problem import EpilogueKind, Operand, Problem, Ragged, TileConfig

_FINAL_ROUNDS = 2
_FINALISTS = 12
_WITHIN = 1.15  # of the fastest of the screening, for a finalist
_HOPELESS = 1.4  # times the fastest of the first round: not timed again
_BURST_SECONDS = 0.02  # of one tiling in the finals: its own load decides its clocks
_LOAD_SECONDS = 0.1
# Of a launch: of a shorter one, the host would be timed, which takes 0.02, now and then 0.1.
_SHORT_MILLISECONDS = 0.5
_CAPTURED = 20  # of them, in one CUDA graph, of at most _GRAPH_MILLISECONDS but for the last one
_GRAPH_MILLISECONDS = 2.0
_COLD_BYTES = 100e6  # of weights in turns: twice an L2 cache, so that none is still there
_LEAST_TILE = 64
_COPY = 2.0**-11  # unit roundoff of half precision, in which a schedule may keep an accumulator

Measure = Callable[[TileConfig, float], float]
AddParts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], None]


@dataclass(frozen=True)
class Results:
    """What a GEMM computes with these tiles, by name."""

    config: TileConfig
    tensors: dict[str, torch.Tensor]


class TimedGemm:
    """One grouped GEMM on random operands, with uniform routing.

    Args:
        token_by_row, offset_by_expert: of a routing plan; R rows of T tokens and E experts.
        num_tokens: T.
        n, k: columns of the output, and the weight's other axis, as for ``default_config``.
        add_parts: what a layer launches behind a split reduction, as
            :func:`sonic.triton.parts.add_parts`; left out, the GEMM alone is timed.

    ``kernels`` may be given some that were compiled elsewhere; others are loaded or compiled.
    """

    def __init__(
        self,
        problem: Problem,
        token_by_row: torch.Tensor,
        offset_by_expert: torch.Tensor,
        num_tokens: int,
        n: int,
        k: int,
        add_parts: AddParts | None = None,
    ):
        self._add_parts = add_parts
        self.problem, self.rows = problem, token_by_row.shape[0]
        self.kernels: dict[TileConfig, Any] = {}
        self._device = token_by_row.device
        self._weights: list[torch.Tensor] = []  # equal ones, where rows are ragged
        dtype, experts = getattr(torch, problem.dtype), offset_by_expert.shape[0] - 1

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(size, device=self._device, dtype=dtype)

        self._sizes: dict[str, Any] = {"rows": self.rows, "experts": experts, "m": k, "n": n}
        operands: dict[str, Any] = {"offset_by_expert": offset_by_expert}
        if problem.gather is not None:
            operands["gather"] = token_by_row
        a_rows = num_tokens if problem.gather is Operand.A else self.rows
        operands["a"] = normal(a_rows, k)
        if problem.ragged is Ragged.ROWS:
            shape = (experts, k, n) if problem.transposed_weight else (experts, n, k)
            weight = operands["b"] = normal(*shape) / k**0.5
            touched = min(experts, self.rows) * n * k * weight.element_size()
            copies = min(math.ceil(_COLD_BYTES / max(touched, 1)), _CAPTURED)
            self._weights = [weight, *(weight.clone() for _ in range(copies - 1))]
            operands |= self._epilogue_operands(normal, experts, n)
        else:
            operands["b"] = normal(num_tokens if problem.gather is Operand.B else self.rows, n)
            accumulates = problem.epilogue is EpilogueKind.ACCUMULATE
            weight = operands["d"] = torch.zeros(
                (experts, k, n), device=self._device, dtype=torch.float32 if accumulates else dtype
            )
        if problem.gated_rows:  # interleaved
            self._sizes["strides"] = weight.stride(1), 2 * weight.stride(1)
        self._operands = operands
        # Of the narrowest tile; a launch takes as many rows as its tiles have partial sums.
        self._columns = n
        sums = self.rows if problem.epilogue is EpilogueKind.ACTIVATION_GRAD else 0
        self._row_sums = torch.empty((-(-n // _LEAST_TILE), sums), device=self._device)

    def _epilogue_operands(
        self, normal: Callable[..., torch.Tensor], experts: int, n: int
    ) -> dict[str, Any]:
        problem, rows = self.problem, self.rows
        gated = problem.activation is not None and problem.activation.is_gated
        found: dict[str, Any] = {"bias": normal(experts, n)} if problem.has_bias else {}
        if problem.epilogue is EpilogueKind.LINEAR:
            found["d"] = normal(rows, n)
        elif problem.epilogue is EpilogueKind.ACTIVATION:
            found["aux"] = normal(rows, n // 2 if gated else n)
            if problem.store_preact:
                found["d"] = normal(rows, n)
        else:
            width = 2 * n if gated else n
            found |= {"c": normal(rows, width), "d": normal(rows, width), "aux": normal(rows, n)}
            found["score"] = torch.rand(rows, device=self._device)
        return found

    def run(self, config: TileConfig, turn: int = 0) -> None:
        """Launches it once, on the weights whose ``turn`` it is."""
        operands = self._operands
        if self._weights:
            operands = operands | {"b": self._weights[turn % len(self._weights)]}
        if self.problem.epilogue is EpilogueKind.ACTIVATION_GRAD:
            parts = -(-self._columns // config.row_sum_columns)
            operands = operands | {"row_sum": self._row_sums[:parts]}
        kernel = self.kernels.get(config)
        gemm = grouped_gemm(self.problem, config, self._device, **self._sizes, kernel=kernel)
        if not config.split:
            gemm(**operands)
            return
        d = operands["d"]
        partial = d.new_empty(gemm.parts, *d.shape[1:])  # written where an expert has a second part
        gemm(**operands, aux=partial)
        if self._add_parts is not None:
            self._add_parts(d, partial, operands["offset_by_expert"], self.rows)

    def difference(self, expected: Results, config: TileConfig) -> str | None:
        """Which result of ``config`` is not the ``expected`` one, or ``None`` if all are."""
        found, same_order = self.results(config), expected.config.swap_ab == config.swap_ab
        for name, right in expected.tensors.items():
            if not self._agree(name, found.tensors[name], right, same_order):
                return f"{name} differs from that of {expected.config.name}"
        return None

    def results(self, config: TileConfig) -> Results:
        """What one launch writes, of memory that held NaN before; a copy, which stays."""
        names = [name for name in self._operands if name in ("d", "aux")]
        outputs = {name: self._operands[name] for name in names}
        accumulates = self.problem.epilogue is EpilogueKind.ACCUMULATE
        for tensor in (*outputs.values(), self._row_sums):
            tensor.fill_(0.0 if accumulates else float("nan"))
        self.run(config)
        tensors = {name: tensor.clone() for name, tensor in outputs.items()}
        if self.problem.epilogue is EpilogueKind.ACTIVATION_GRAD:
            parts = -(-self._columns // config.row_sum_columns)
            tensors["row_sum"] = self._row_sums[:parts].sum(0)
        return Results(config, tensors)

    def _agree(
        self, name: str, found: torch.Tensor, expected: torch.Tensor, same_order: bool
    ) -> bool:
        """Bit for bit where an accumulator is only stored or added, and summed in the same order.
        An activation may see it rounded to half precision, or not: ``_COPY`` of a value, which its
        derivative passes on."""
        stored = self.problem.epilogue in (EpilogueKind.LINEAR, EpilogueKind.ACCUMULATE)
        if stored and same_order:
            return torch.equal(found, expected)
        largest = expected.abs().amax().float() if expected.numel() else 0.0
        if name == "row_sum":
            # Of n products of either sign, whose magnitudes sum to sqrt(n) times as much.
            each = _COPY + self._columns * torch.finfo(torch.float32).eps
            bound = each * self._columns**0.5 * largest
        else:
            # Two factors of a product at most, of which either may be the larger one.
            rounding = 2 * torch.finfo(expected.dtype).eps
            bound = rounding * expected.abs().float() + 4 * _COPY * largest
        return bool(((found.float() - expected.float()).abs() <= bound).all())

    def milliseconds(self, config: TileConfig, seconds: float = 0.0) -> float:
        """Of one launch behind another one, which hides what the host does; or the mean of as many
        as take about ``seconds``, behind half as many. Short ones run in a CUDA graph of several,
        each on weights that it must read from memory."""
        launch: Callable[[], None] = functools.partial(self.run, config)
        launches = 1
        launch()
        once = self._timed(launch, 1)
        if once < _SHORT_MILLISECONDS:
            launches = min(_CAPTURED, math.ceil(_GRAPH_MILLISECONDS / once))
            launch = self._captured(config, launches)
            launch()
            once = self._timed(launch, 1)
        calls = math.ceil(1000 * seconds / once)
        if calls > 1:
            for _ in range(calls // 2):
                launch()
            once = self._timed(launch, calls)
        return once / launches

    def _captured(self, config: TileConfig, launches: int) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for turn in range(launches):
                self.run(config, turn)
        return graph.replay

    def _timed(self, launch: Callable[[], None], calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            launch()
        end.record()
        torch.cuda.synchronize(self._device)
        return start.elapsed_time(end) / calls

    def warm_up(self, config: TileConfig) -> None:
        """Keeps the GPU busy until its clocks have settled."""
        until = time.perf_counter() + _LOAD_SECONDS
        while time.perf_counter() < until:
            self.run(config)
            torch.cuda.synchronize(self._device)


def search(
    default: TileConfig, space: Iterable[TileConfig], measure: Measure
) -> dict[TileConfig, float]:
    """Milliseconds of ``default`` and of every other tiling, by :meth:`TimedGemm.milliseconds`.

    A GPU that is limited by power runs a tiling at the clocks that the load of the last
    milliseconds left it: by a single launch each, neighbours differed by up to 14% that run equally
    long. So the first three rounds only say which tilings may be among the fastest; a first one,
    for the clocks to settle, drops the slowest, and the others run in either order. Then the
    default and the fastest run in bursts that are long enough for clocks of their own.
    """
    configs = list(dict.fromkeys((default, *space)))
    first = {config: measure(config, 0.0) for config in configs}
    limit = _HOPELESS * min(first.values())
    configs = [config for config in configs if first[config] <= limit or config == default]
    backward = {config: measure(config, 0.0) for config in reversed(configs)}
    screened = {config: (measure(config, 0.0) + backward[config]) / 2 for config in configs}
    ranked = sorted(configs, key=screened.__getitem__)
    limit = _WITHIN * screened[ranked[0]]
    leaders = [config for config in ranked[:_FINALISTS] if screened[config] <= limit]
    finals: dict[TileConfig, list[float]] = {
        config: [] for config in dict.fromkeys((default, *leaders))
    }
    for _ in range(_FINAL_ROUNDS):
        for config, samples in finals.items():
            samples.append(measure(config, _BURST_SECONDS))
    final = {config: statistics.median(samples) for config, samples in finals.items()}
    # The clocks of the first rounds were others.
    drift = statistics.median(t / screened[config] for config, t in final.items())
    return first | {config: drift * t for config, t in screened.items()} | final
