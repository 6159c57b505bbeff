"""Times the six grouped GEMMs with every tiling of the search space, and says what the choice by
sizes alone costs.

    python benchmarks/tiles.py --random 20 --json benchmarks/results/<date>-tiles.json

The shapes of the bars and others drawn at random, so that one of the smaller GEMMs takes 0.1 to
2.5 ms. All kernels are compiled first. The result file has, for each shape and GEMM, the time of
the choice over that of the best tiling; ``<json>.times.gz`` beside it has the time of every tiling,
from which ``kernels_sm90.tiles`` is fitted.
"""

import argparse
import gzip
import json
import statistics
import sys
import time
from dataclasses import astuple
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.measure import environment
from benchmarks.options import not_negative, output_file, positive
from benchmarks.problems import random_shapes
from benchmarks.report import Result
from benchmarks.shapes import BARS, Shape
from sonic.cli import LayerSize, compile_kernels, layer_launches
from sonic.enums import ActivationType
from sonic.plan import build_plan
from sonic.runtime.backend import Backend, backend_for
from sonic.runtime.problem import Problem, TileConfig
from sonic.runtime.tuning import TimedGemm, search

GEMMS = ("up", "down", "dh", "dx", "dw2", "dw1")
SEED = 20261127
_FLOPS, _BYTES = 5.5e14, 4e12  # a second, about
_LEAST_SECONDS, _MOST_SECONDS = 1e-4, 2.5e-3


def seconds(shape: Shape) -> float:
    """About what the down-projection of ``shape`` takes."""
    elements = shape.E * shape.H * shape.I + shape.rows * (shape.H + shape.I)
    return max(2 * shape.rows * shape.H * shape.I / _FLOPS, 2 * elements / _BYTES)


def drawn_shapes(count: int, seed: int) -> list[Shape]:
    """Random shapes whose GEMMs are long enough to be timed, and not longer."""
    drawn = random_shapes(20 * count, seed)
    fitting = [s for s in drawn if _LEAST_SECONDS <= seconds(s) <= _MOST_SECONDS]
    return fitting[:count]


def launches(shape: Shape) -> dict[str, tuple[Problem, int, int]]:
    """The training GEMMs of ``shape`` in bf16 with SwiGLU: problem, ``n``, ``k``."""
    size = LayerSize(shape.T, shape.H, shape.I, shape.E, shape.top_k)
    every = layer_launches(size, ActivationType.SWIGLU, "bfloat16", False)
    up, _, down, dh, dx, dw2, dw1, _, _ = every
    return dict(zip(GEMMS, (up, down, dh, dx, dw2, dw1), strict=True))


def tilings(backend: Backend, problem: Problem) -> list[TileConfig]:
    """The search space, and whatever the choice by sizes may choose."""
    own = [
        config
        for rows in (64, 320, 2048)
        for k in (256, 512, 2048)
        for config in backend.candidates(problem, rows, k)
    ]
    return list(dict.fromkeys((*backend.search_space(problem), *own)))


class Sweep:
    """Times and choices of the shapes so far."""

    def __init__(self, backend: Backend, spaces: dict[str, list[TileConfig]]):
        self.backend, self.spaces = backend, spaces
        self.shapes: list[Shape] = []
        self.times: dict[str, list[dict[TileConfig, float]]] = {gemm: [] for gemm in spaces}
        self.chosen: dict[str, list[TileConfig]] = {gemm: [] for gemm in spaces}

    def add(self, shape: Shape) -> None:
        self.shapes.append(shape)
        device = torch.device("cuda")
        ids = torch.rand(shape.T, shape.E, device=device).topk(shape.top_k).indices.int()
        plan = build_plan(ids, shape.E)
        routing = plan.token_by_row, plan.offset_by_expert, shape.T
        for gemm, (problem, n, k) in launches(shape).items():
            if gemm not in self.spaces:
                continue
            chosen = self.backend.default_config(problem, shape.rows // shape.E, n, k)
            timed = TimedGemm(problem, *routing, n, k)
            timed.warm_up(chosen)
            times = search(chosen, self.spaces[gemm], timed.milliseconds)
            self.times[gemm].append(times)
            self.chosen[gemm].append(chosen)
            best = min(times, key=times.__getitem__)
            print(
                f"{shape.problem} {gemm:4} chosen {_name(chosen):34} {times[chosen]:7.3f} ms, "
                f"best {_name(best):34} {times[best]:7.3f} ms, {times[chosen] / times[best]:.3f}",
                flush=True,
            )
            del timed
        torch.cuda.empty_cache()

    def ratios(self, gemm: str) -> list[float]:
        pairs = zip(self.times[gemm], self.chosen[gemm], strict=True)
        return [times[chosen] / min(times.values()) for times, chosen in pairs]

    def result(self) -> Result:
        result = Result(environment(torch.device("cuda")))
        for gemm in self.spaces:
            for shape, ratio, times in zip(
                self.shapes, self.ratios(gemm), self.times[gemm], strict=True
            ):
                result.add(f"tiles/{gemm}", ratio, "times the best", shape.problem)
                result.add(f"tiles/{gemm}/best", min(times.values()), "ms", shape.problem)
        return result

    def raw(self) -> dict[str, object]:
        """Everything that was timed, by position: shapes, tilings of each GEMM, milliseconds."""
        return {
            "shapes": [shape.problem for shape in self.shapes],
            "tilings": {g: [_fields(c) for c in space] for g, space in self.spaces.items()},
            "milliseconds": {
                g: [[round(times.get(c, 0.0), 5) for c in self.spaces[g]] for times in rows]
                for g, rows in self.times.items()
            },
        }

    def write(self, path: Path) -> None:
        self.result().write(path)
        times = Path(f"{path}.times.gz")
        times.write_bytes(gzip.compress(json.dumps(self.raw()).encode(), mtime=0))


def _fields(config: TileConfig) -> list[object]:
    return [getattr(value, "value", value) for value in astuple(config)]


def _name(config: TileConfig) -> str:
    return f"{config.name}_{'m' if config.raster_along_m else 'n'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=list(BARS), choices=list(BARS))
    parser.add_argument("--gemms", nargs="+", default=list(GEMMS), choices=GEMMS)
    parser.add_argument("--random", type=not_negative, default=0, help="so many drawn shapes more")
    parser.add_argument("--seed", type=not_negative, default=SEED)
    parser.add_argument("--jobs", type=positive, default=8, help="kernels compiled at once")
    parser.add_argument("--seconds", type=positive, default=3600, help="start no shape after these")
    parser.add_argument("--json", type=output_file)
    arguments = parser.parse_args()
    start = time.monotonic()
    backend = backend_for(torch.device("cuda"))
    shapes = [BARS[name] for name in arguments.shapes]
    shapes += drawn_shapes(arguments.random, arguments.seed)
    problems = {g: launches(shapes[0])[g][0] for g in arguments.gemms}
    spaces = {gemm: tilings(backend, problem) for gemm, problem in problems.items()}
    kernels = [(problems[gemm], config) for gemm, space in spaces.items() for config in space]
    if compile_kernels(backend.arch, kernels, arguments.jobs):
        sys.exit("a kernel did not compile")
    sweep = Sweep(backend, spaces)
    for shape in shapes:
        if time.monotonic() - start > arguments.seconds:
            print(f"{len(shapes) - len(sweep.shapes)} shapes left out: the time is over")
            break
        sweep.add(shape)
        if arguments.json:
            sweep.write(arguments.json)
    for gemm in spaces:
        ratios = sweep.ratios(gemm)
        print(
            f"{gemm:4} chosen over best of {len(spaces[gemm])} tilings on {len(ratios)} shapes: "
            f"mean {statistics.mean(ratios):.3f}, worst {max(ratios):.3f}"
        )


if __name__ == "__main__":
    main()
