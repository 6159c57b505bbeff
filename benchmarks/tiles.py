"""Times the six grouped GEMMs with every candidate tiling, and says what the default choice costs.

    python benchmarks/tiles.py --shapes A B C E F --json benchmarks/results/<date>-tiles.json

All tilings of one GEMM are timed in turns, round after round, after 0.3 s of load, so that a drift
of the clocks reaches all of them. A row is one (GEMM, tiling); ``<gemm>/default`` is the time of
the choice of ``default_config`` over the best one's.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.measure import environment
from benchmarks.options import output_file
from benchmarks.report import Result
from benchmarks.shapes import Shape, named_shape
from sonic import stages
from sonic.enums import ActivationType, GateUpLayout
from sonic.plan import build_plan
from sonic.runtime.backend import backend_for
from sonic.runtime.errors import UnsupportedError
from sonic.runtime.problem import Problem, Ragged, Schedule, TileConfig

ROUNDS = 6
LOAD_SECONDS = 0.3


@dataclass(frozen=True)
class Gemm:
    name: str
    flops: float
    run: Callable[[], object]


def search_space(problem: Problem) -> list[TileConfig]:
    """Every tiling that the kernel might take; the backend refuses those that do not fit."""
    rows = problem.ragged is Ragged.ROWS
    return [
        TileConfig(m, n, *cluster, schedule, epilogue_stages, raster_along_m, dynamic=dynamic)
        for schedule in Schedule
        for m, n in ((128, 256), (256, 128), (128, 192), (256, 192), (128, 128))
        for cluster in ((1, 1), (2, 1), (1, 2))
        for epilogue_stages in (1, 2, 4)
        for raster_along_m in (True, False)
        for dynamic in ((False, True) if rows else (False,))
    ]


def gemms(shape: Shape) -> list[Gemm]:
    """The stages at ``shape``, on random operands and uniform routing."""
    tokens, hidden, width, experts, top_k = shape.T, shape.H, shape.I, shape.E, shape.top_k
    device, dtype = torch.device("cuda"), torch.bfloat16

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    ids = torch.rand(tokens, experts, device=device).topk(top_k).indices.int()
    plan = build_plan(ids, experts)
    token, offset, rows = plan.token_by_row, plan.offset_by_expert, tokens * top_k
    x, dout = normal(tokens, hidden), normal(tokens, hidden)
    w1 = normal(experts, 2 * width, hidden) / hidden**0.5
    w2 = normal(experts, hidden, width) / width**0.5
    h, a, score = normal(rows, 2 * width), normal(rows, width), torch.rand(rows, device=device)
    act, layout = ActivationType.SWIGLU, GateUpLayout.INTERLEAVED
    one = 2.0 * rows * width * hidden
    return [
        Gemm("up", 2 * one, lambda: stages.up_forward(
            x, w1, None, token, offset, activation=act, layout=layout, store_preact=True)),
        Gemm("down", one, lambda: stages.down_forward(a, w2, None, offset)),
        Gemm("dh", one, lambda: stages.down_backward_act(
            dout, w2, h, score, token, offset, activation=act)),
        Gemm("dw2", one, lambda: stages.down_backward_weight(dout, a, token, offset)),
        Gemm("dx", 2 * one, lambda: stages.up_backward_act(
            h, w1, offset, layout=layout, gated=True)),
        Gemm("dw1", 2 * one, lambda: stages.up_backward_weight(
            x, h, token, offset, layout=layout, gated=True)),
    ]  # fmt: skip


def candidates(problem: Problem) -> list[TileConfig]:
    """What the backend chooses from, whatever the size."""
    backend = backend_for(torch.device("cuda"))
    found = {
        config: None
        for rows in (320, 2048)
        for k in (512, 2048)
        for config in backend.candidates(problem, rows, k)
    }
    return list(found)


class Choice:
    """Stands in for the stages' own choice of tiles, and remembers what they would have chosen."""

    def __init__(self) -> None:
        self.default_choice = stages.config_for
        self.forced: TileConfig | None = None
        self.problem: Problem | None = None
        self.default: TileConfig | None = None
        stages.config_for = self  # type: ignore[assignment]

    def __call__(self, problem: Problem, *size: object) -> TileConfig:
        self.problem = problem
        self.default = self.default_choice(problem, *size)  # type: ignore[arg-type]
        return self.forced or self.default


def milliseconds(run: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def time_tilings(gemm: Gemm, choice: Choice, everything: bool) -> dict[TileConfig, float]:
    """Median milliseconds by tiling; the default one comes first."""
    choice.forced = None
    gemm.run()
    problem, default = choice.problem, choice.default
    if problem is None or default is None:
        raise RuntimeError(f"{gemm.name} asked for no tiles")
    times: dict[TileConfig, list[float]] = {default: []}
    for config in search_space(problem) if everything else candidates(problem):
        choice.forced = config
        try:
            gemm.run()
        except UnsupportedError:
            continue
        times.setdefault(config, [])
    choice.forced = None
    until = time.perf_counter() + LOAD_SECONDS
    while time.perf_counter() < until:
        gemm.run()
        torch.cuda.synchronize()
    for _ in range(ROUNDS):
        for config, samples in times.items():
            choice.forced = config
            samples.append(milliseconds(gemm.run))
    return {config: statistics.median(samples) for config, samples in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["A", "B", "C", "E", "F"])
    parser.add_argument("--gemms", nargs="+", help="some of: up down dh dw2 dx dw1")
    parser.add_argument("--all", action="store_true", help="the whole search space, not candidates")
    parser.add_argument("--json", type=output_file)
    arguments = parser.parse_args()
    backend_for(torch.device("cuda"))
    result = Result(environment(torch.device("cuda")))
    choice = Choice()
    for name in arguments.shapes:
        shape = named_shape(name).shape
        problem = [shape.T, shape.H, shape.I, shape.E, shape.top_k]
        for gemm in gemms(shape):
            if arguments.gemms and gemm.name not in arguments.gemms:
                continue
            times = time_tilings(gemm, choice, arguments.all)
            best = min(times, key=times.__getitem__)
            default = next(iter(times))
            for config, value in sorted(times.items(), key=lambda item: item[1]):
                raster = "m" if config.raster_along_m else "n"
                rate = gemm.flops / value / 1e9
                result.add(f"{gemm.name}/{config.name}_{raster}", rate, "TFLOPS", problem)
            loss = times[default] / times[best]
            result.add(f"{gemm.name}/default", loss, "times the best", problem)
            print(
                f"{name} {gemm.name:5} best {best.name} "
                f"{gemm.flops / times[best] / 1e9:.0f} TFLOPS, "
                f"default {default.name} {loss:.3f} times its time, {len(times)} tilings",
                flush=True,
            )
        torch.cuda.empty_cache()
    if arguments.json:
        result.write(arguments.json)


if __name__ == "__main__":
    main()
