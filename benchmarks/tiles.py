"""Times the six grouped GEMMs with every tiling, and says what the choice by sizes alone costs.

    python benchmarks/tiles.py --random 20 --json benchmarks/results/<date>-tiles.json

The shapes of the bars and others drawn at random, so that one of the smaller GEMMs takes 0.1 to
2.5 ms. All kernels are compiled first. Only tilings whose results are those of the choice are
timed; of others the sweep says so, and fails at its end. The choice is timed as a layer launches
it: where it splits a weight gradient, with the kernel that adds the parts, though uniform routing
has none to add; no other tiling is split. The result file has, for each shape and GEMM, the time of
the choice over that of the best tiling; ``<json>.times.gz`` beside it has the time of every tiling,
from which ``kernels_sm90.choice`` is fitted: after a change of the choice, without a GPU,

    python benchmarks/tiles.py --review benchmarks/results/<date>-tiles.json.times.gz

which with ``--json`` also brings the ratios of the result file up to date: its head stays that of
the sweep. ``--again`` times the fastest tilings of such a file once more, for the same layers. In
files that have no split tiling, of earlier versions of this script, the choice counts unsplit.

Other layers, other tilings:

    python benchmarks/tiles.py --thiek 512,2048,768,16,1 --space small --gemms up_inference down
"""

import argparse
import gzip
import json
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import astuple, fields, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.figures import TILED_GEMMS, Result
from benchmarks.measure import environment
from benchmarks.options import THIEK, THIEK_HELP, EachOnce, not_negative, output_file, positive
from benchmarks.options import shape as shape_option
from benchmarks.problems import random_shapes
from benchmarks.shapes import BARS, Shape
from sonic.cli import LayerSize, compile_kernels, layer_launches
from sonic.enums import ActivationType
from sonic.plan import RoutingPlan, build_plan
from sonic.runtime.backend import Backend, backend_for, load_backend
from sonic.runtime.problem import Arch, Problem, Schedule, TileConfig
from sonic.runtime.tuning import TimedGemm, search

SEED = 20261127
GEMMS = (*TILED_GEMMS, "up_inference")  # the last one stores no pre-activation
_FLOPS, _BYTES = 5.5e14, 4e12  # a second, about
_LEAST_SECONDS, _MOST_SECONDS = 1e-4, 2.5e-3
_AGAIN = 10  # tilings of a GEMM at most, within _AGAIN_WITHIN times the fastest
_AGAIN_WITHIN = 1.2
_HALVES: tuple[dict[str, Any], ...] = ({"tile_n": 64}, {"tile_m": 64})


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
    """The ``GEMMS`` of ``shape`` in bf16 with SwiGLU: problem, ``n``, ``k``."""
    size = LayerSize(shape.T, shape.H, shape.I, shape.E, shape.top_k)
    every = layer_launches(size, ActivationType.SWIGLU, "bfloat16", False)
    up, up_inference, down, dh, dx, dw2, dw1, _, _ = every
    return dict(zip(GEMMS, (up, down, dh, dx, dw2, dw1, up_inference), strict=True))


def tilings(backend: Backend, problem: Problem) -> list[TileConfig]:
    """The search space, and whatever the choice by sizes may choose; reductions that are not split,
    because no expert of a uniform routing has the rows that this is for."""
    every = (*backend.search_space(problem), *backend.candidates(problem))
    return list(dict.fromkeys(config for config in every if not config.split))


def small_tilings(backend: Backend, problem: Problem) -> list[TileConfig]:
    """For layers that leave SMs idle: at most 128 rows, halves of the least tiles of the search
    space too; single CTAs, a fixed order, since there is hardly a second tile."""
    single = [
        config
        for config in tilings(backend, problem)
        if config.tile_m <= 128
        and config.cluster_size == 1
        and not config.dynamic
        and not config.raster_along_m
    ]
    least = [config for config in single if (config.tile_m, config.tile_n) == (128, 128)]
    halves = [replace(config, **half) for config in least for half in _HALVES]
    legal = [config for config in halves if backend.supports_config(problem, config) is None]
    return list(dict.fromkeys(single + legal))


def swapped_tilings(backend: Backend, problem: Problem) -> list[TileConfig]:
    """Tiles that fit their expert, beside what the choice by sizes may choose."""
    fitted = [config for config in tilings(backend, problem) if config.swap_ab]
    return list(dict.fromkeys(fitted + SPACES["choice"](backend, problem)))


SPACES: dict[str, Callable[[Backend, Problem], list[TileConfig]]] = {
    "all": tilings,
    "choice": lambda backend, problem: [c for c in backend.candidates(problem) if not c.split],
    "small": small_tilings,
    "swapped": swapped_tilings,
}


def chosen_tiling(backend: Backend, gemm: str, shape: Shape) -> TileConfig:
    """What the sizes of ``shape`` alone choose, and a layer launches."""
    problem, n, k = launches(shape)[gemm]
    return backend.default_config(problem, shape.rows // shape.E, n, k, shape.E)


def uniform_plan(shape: Shape, device: torch.device) -> RoutingPlan:
    """Of a routing that is random and the same for all experts."""
    ids = torch.rand(shape.T, shape.E, device=device).topk(shape.top_k).indices.int()
    return build_plan(ids, shape.E)


def timed_gemm(shape: Shape, gemm: str, plan: RoutingPlan) -> TimedGemm:
    """One of the ``GEMMS`` of ``shape`` on random operands, with what follows if it is split."""
    from sonic.triton.parts import add_parts

    problem, n, k = launches(shape)[gemm]
    routing = plan.token_by_row, plan.offset_by_expert
    return TimedGemm(problem, *routing, shape.T, n, k, add_parts)


class Sweep:
    """Milliseconds by tiling of each GEMM on each shape, and what the choice by sizes makes of
    them."""

    def __init__(
        self,
        backend: Backend,
        spaces: dict[str, list[TileConfig]],
        device: str = "cuda",
    ):
        self.backend, self.spaces, self.device = backend, spaces, torch.device(device)
        self.shapes: list[Shape] = []
        self.times: dict[str, list[dict[TileConfig, float]]] = {gemm: [] for gemm in spaces}

    def add(self, shape: Shape, earlier: dict[str, dict[TileConfig, float]] | None = None) -> None:
        """Time every tiling on ``shape``, or those that were fast in an ``earlier`` sweep, whose
        times the others keep."""
        plan = uniform_plan(shape, self.device)
        self.shapes.append(shape)
        for gemm, space in self.spaces.items():
            timed = timed_gemm(shape, gemm, plan)
            chosen = self.chosen(gemm, shape)
            known = {} if earlier is None else earlier[gemm]
            asked = fastest(known) if known else space
            wrong = differences(timed, chosen, asked)
            for config, difference in wrong.items():
                print(f"{shape.problem} {gemm:4} refused {config.name}: {difference}", flush=True)
            right = [config for config in asked if config not in wrong]
            timed.warm_up(chosen)
            times = completed(search(chosen, right, timed.milliseconds), known)
            self.times[gemm].append({c: ms for c, ms in times.items() if c not in wrong})
            print(self.line(gemm, -1), flush=True)
            del timed
        torch.cuda.empty_cache()

    def of_shape(self, index: int) -> dict[str, dict[TileConfig, float]]:
        return {gemm: times[index] for gemm, times in self.times.items()}

    def kernels(
        self, shapes: list[Shape], earlier: "Sweep | None"
    ) -> list[tuple[Problem, TileConfig]]:
        """What :meth:`add` launches."""
        found: dict[tuple[Problem, TileConfig], None] = {}
        for index, shape in enumerate(shapes):
            for gemm, space in self.spaces.items():
                problem = launches(shape)[gemm][0]
                if earlier is not None:
                    space = [*fastest(earlier.times[gemm][index]), self.chosen(gemm, shape)]
                found |= {(problem, config): None for config in space}
        return list(found)

    def chosen(self, gemm: str, shape: Shape) -> TileConfig:
        """The choice; not split in a sweep that knows no split tilings, of an earlier version."""
        chosen = chosen_tiling(self.backend, gemm, shape)
        if chosen.split and not any(config.split for config in self.spaces[gemm]):
            return replace(chosen, split=False)
        return chosen

    def ratio(self, gemm: str, index: int) -> float:
        """Time of the choice over that of the best tiling, on the shape ``index``.

        :raises ValueError: the choice was not among the tilings of the sweep.
        """
        times, chosen = self.times[gemm][index], self.chosen(gemm, self.shapes[index])
        if chosen not in times:
            raise ValueError(
                f"{gemm} with {chosen.name} was not timed; sweep over all tilings anew"
            )
        return times[chosen] / min(times.values())

    def is_timed(self, gemm: str, index: int) -> bool:
        """Whether the choice for the shape ``index`` was among the tilings of the sweep."""
        return self.chosen(gemm, self.shapes[index]) in self.times[gemm][index]

    def refused(self, gemm: str, index: int) -> list[TileConfig]:
        """The tilings without a time on the shape ``index``, because their results were others."""
        times = self.times[gemm][index]
        return [config for config in self.spaces[gemm] if config not in times]

    def all_refused(self) -> list[str]:
        return [
            f"{shape.problem} {gemm} {config.name}"
            for gemm in self.spaces
            for index, shape in enumerate(self.shapes)
            for config in self.refused(gemm, index)
        ]

    def line(self, gemm: str, index: int, others: int = 1) -> str:
        """The choice for one shape, and the fastest tilings."""
        shape, times = self.shapes[index], self.times[gemm][index]
        chosen = self.chosen(gemm, shape)
        best = sorted(times, key=times.__getitem__)[:others]
        fastest = ", ".join(f"{config.name} {times[config]:.3f}" for config in best)
        return (
            f"{shape.problem} {gemm:4} {self.ratio(gemm, index):.3f} times the best: "
            f"{chosen.name} {times[chosen]:.3f} ms; best {fastest}"
        )

    def summary(self) -> str:
        lines = []
        for gemm, space in self.spaces.items():
            timed = [index for index in range(len(self.shapes)) if self.is_timed(gemm, index)]
            ratios = [self.ratio(gemm, index) for index in timed]
            if ratios:
                lines.append(
                    f"{gemm:4} choice over best of {len(space)} tilings on {len(ratios)} shapes: "
                    f"mean {statistics.mean(ratios):.3f}, worst {max(ratios):.3f}"
                )
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """The ratios as a result file, and every time beside it."""
        result = Result(environment(self.device))
        self.add_ratios(result)
        result.write(path)
        self.write_times(times_beside(path))

    def add_ratios(self, result: Result) -> None:
        for gemm in self.spaces:
            for index, shape in enumerate(self.shapes):
                ratio, best = self.ratio(gemm, index), min(self.times[gemm][index].values())
                result.add(f"tiles/{gemm}", ratio, "times the best", shape.problem)
                result.add(f"tiles/{gemm}/best", best, "ms", shape.problem)
                if refused := self.refused(gemm, index):
                    result.add(f"tiles/{gemm}/refused", len(refused), "tilings", shape.problem)

    def write_times(self, path: Path) -> None:
        """Of a tiling that was refused the time is null."""

        def rounded(ms: float | None) -> float | None:
            return None if ms is None else round(ms, 5)

        content = {
            "shapes": [shape.problem for shape in self.shapes],
            "fields": [field.name for field in fields(TileConfig)],
            "tilings": {gemm: [_values(c) for c in space] for gemm, space in self.spaces.items()},
            "milliseconds": {
                gemm: [[rounded(times.get(c)) for c in self.spaces[gemm]] for times in rows]
                for gemm, rows in self.times.items()
            },
        }
        path.write_bytes(gzip.compress(json.dumps(content).encode(), mtime=0))

    @classmethod
    def read_times(cls, path: Path, backend: Backend) -> "Sweep":
        """What :meth:`write_times` wrote; choices are those of ``backend`` now.

        :raises ValueError: the file is none of those, or cannot be read.
        """
        content = _content(path)

        def tiling(values: list[Any]) -> TileConfig:
            named = dict(zip(content["fields"], values, strict=True))
            return TileConfig(**{**named, "schedule": Schedule(named["schedule"])})

        spaces = {g: [tiling(v) for v in space] for g, space in content["tilings"].items()}
        sweep = cls(backend, spaces)
        sweep.shapes = [Shape(*problem) for problem in content["shapes"]]
        for gemm, rows in content["milliseconds"].items():
            timed = [zip(spaces[gemm], row, strict=True) for row in rows]
            sweep.times[gemm] = [{c: ms for c, ms in row if ms is not None} for row in timed]
        return sweep


def _content(path: Path) -> dict[str, Any]:
    """What is in a file of :meth:`Sweep.write_times`."""
    try:
        content = json.loads(gzip.decompress(path.read_bytes()))
    except FileNotFoundError:
        raise ValueError(f"there is no {path}") from None
    except (OSError, EOFError, zlib.error, ValueError):
        content = None
    known = {"shapes", "fields", "tilings", "milliseconds"}
    if not isinstance(content, dict) or not known <= content.keys():
        text = "does not hold the times of a sweep; those of X.json are in X.json.times.gz"
        raise ValueError(f"{path} {text}")
    return content


def differences(
    timed: TimedGemm, chosen: TileConfig, others: list[TileConfig]
) -> dict[TileConfig, str]:
    """Which result of a tiling is not that of the choice, for those of which one is."""
    expected = timed.results(chosen)
    found = {config: timed.difference(expected, config) for config in others if config != chosen}
    return {config: difference for config, difference in found.items() if difference is not None}


def fastest(times: dict[TileConfig, float]) -> list[TileConfig]:
    """The tilings that are worth to be timed again."""
    limit = _AGAIN_WITHIN * min(times.values())
    ranked = sorted(times, key=times.__getitem__)
    return [config for config in ranked[:_AGAIN] if times[config] <= limit]


def completed(
    times: dict[TileConfig, float], earlier: dict[TileConfig, float]
) -> dict[TileConfig, float]:
    """``times``, and for what is not among them that of the ``earlier`` sweep at these clocks."""
    ratios = [times[config] / earlier[config] for config in times if config in earlier]
    drift = statistics.median(ratios) if ratios else 1.0
    return {config: drift * ms for config, ms in earlier.items()} | times


def times_beside(path: Path) -> Path:
    """Where the times of the result file ``path`` are."""
    return Path(f"{path}.times.gz")


def gpu_of(path: Path) -> str:
    """The GPU of the times in ``path``, which the result file beside it names.

    :raises ValueError: that file is missing, or is none.
    """
    beside = Path(str(path).removesuffix(".times.gz"))
    if beside == path or not path.is_file():
        return ""  # no file of times, which reading it says
    if not beside.is_file():
        raise ValueError(f"the GPU of {path} is named in {beside}, which is missing; bring it too")
    return str(Result.read(beside).head["device"])


def _values(config: TileConfig) -> list[object]:
    return [getattr(value, "value", value) for value in astuple(config)]


def review(path: Path, json_file: Path | None) -> None:
    """Print what the choice by sizes, as it is now, costs by the times of an earlier sweep, and put
    that into the sweep's result file if it is given.

    :raises ValueError: one of the files is not what it has to be, or has to get a ratio of tiles
        that were not timed.
    """
    if json_file is not None and not json_file.is_file():
        raise ValueError(f"there is no {json_file}, whose ratios --json would bring up to date")
    sweep = Sweep.read_times(path, load_backend(Arch.SM90).for_gpu(gpu_of(path)))
    head = None if json_file is None else Result.read(json_file).head
    for gemm in sweep.spaces:
        for index in range(len(sweep.shapes)):
            if json_file is not None or sweep.is_timed(gemm, index):
                print(sweep.line(gemm, index, others=4))
            else:
                chosen = sweep.chosen(gemm, sweep.shapes[index]).name
                print(f"{sweep.shapes[index].problem} {gemm:4} not timed: {chosen}")
    print(f"choice for {sweep.backend.gpu}:")
    print(sweep.summary())
    if json_file is not None and head is not None:
        result = Result(head)
        sweep.add_ratios(result)
        result.write(json_file)


def asked_shapes(arguments: argparse.Namespace) -> list[Shape]:
    """The layers of a sweep, each once."""
    named = arguments.shapes
    if named is None:
        named = [] if arguments.thiek else list(BARS)
    seed = SEED if arguments.seed is None else arguments.seed
    shapes = [BARS[name] for name in named] + (arguments.thiek or [])
    return list(dict.fromkeys(shapes + drawn_shapes(arguments.random or 0, seed)))


def asked_spaces(
    arguments: argparse.Namespace, backend: Backend, shapes: list[Shape]
) -> dict[str, list[TileConfig]]:
    """The tilings of a sweep, and in any case those that the choice by sizes has for ``shapes``."""
    spaces = {}
    for gemm in arguments.gemms or TILED_GEMMS:
        space = SPACES[arguments.space or "all"](backend, launches(BARS["A"])[gemm][0])
        chosen = [chosen_tiling(backend, gemm, shape) for shape in shapes]
        spaces[gemm] = list(dict.fromkeys(space + chosen))
    return spaces


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shapes",
        nargs="*",
        action=EachOnce,
        choices=list(BARS),
        help="default: all, or none beside --thiek",
    )
    parser.add_argument(
        "--thiek",
        nargs="+",
        action=EachOnce,
        type=shape_option,
        metavar=THIEK,
        help=f"other layers, each: {THIEK_HELP}",
    )
    parser.add_argument(
        "--gemms",
        nargs="+",
        action=EachOnce,
        choices=GEMMS,
        help="default: all but the last, those of training",
    )
    parser.add_argument(
        "--space",
        choices=list(SPACES),
        help="tilings: all (the default), only what the choice by sizes may choose, that and those "
        "that fit their expert, or small ones, for layers that leave SMs idle",
    )
    parser.add_argument("--random", type=not_negative, help="so many drawn shapes more")
    parser.add_argument("--seed", type=not_negative, help=f"of these; default {SEED}")
    parser.add_argument("--jobs", type=positive, help="kernels compiled at once; default 8")
    parser.add_argument("--seconds", type=positive, help="start no shape after these; default 3600")
    parser.add_argument("--json", type=output_file)
    parser.add_argument(
        "--review", type=Path, metavar="FILE", help="no sweep: the choice by these times of one"
    )
    parser.add_argument(
        "--again", type=Path, metavar="FILE", help="the fastest by these times of an earlier sweep"
    )
    arguments = parser.parse_args(argv)
    what = "shapes", "thiek", "gemms", "space", "random", "seed"
    earlier = arguments.review or arguments.again
    if earlier is not None and any(getattr(arguments, name) is not None for name in what):
        parser.error("--review and --again take layers and tilings from their file; leave them out")
    if arguments.review is not None and arguments.again is not None:
        parser.error("--review looks at times, --again takes them; give one of the two")
    if arguments.review and arguments.json and times_beside(arguments.json) != arguments.review:
        parser.error(f"--json has to be the result file of {arguments.review}")
    if arguments.review is not None:
        if arguments.jobs is not None or arguments.seconds is not None:
            parser.error("--review neither compiles nor times; leave out --jobs and --seconds")
        try:
            review(arguments.review, arguments.json)
        except ValueError as error:
            parser.error(str(error))
        return
    if not torch.cuda.is_available():
        print("Needs a CUDA GPU: tiles are timed there. --review needs none.", file=sys.stderr)
        sys.exit(2)
    start = time.monotonic()
    backend = backend_for(torch.device("cuda"))
    if arguments.again is not None:
        try:
            old = Sweep.read_times(arguments.again, backend)
        except ValueError as error:
            parser.error(str(error))
        shapes = old.shapes
        sweep = Sweep(backend, old.spaces)
        for gemm, space in old.spaces.items():
            for shape in shapes:
                if sweep.chosen(gemm, shape) not in space:
                    sys.exit(f"{sweep.chosen(gemm, shape).name} is new; sweep all tilings anew")
    else:
        old, shapes = None, asked_shapes(arguments)
        sweep = Sweep(backend, asked_spaces(arguments, backend, shapes))
    if compile_kernels(backend.arch, sweep.kernels(shapes, old), arguments.jobs or 8):
        sys.exit("a kernel did not compile")
    for index, shape in enumerate(shapes):
        if time.monotonic() - start > (arguments.seconds or 3600):
            print(f"{len(shapes) - len(sweep.shapes)} shapes left out: the time is over")
            break
        sweep.add(shape, None if old is None else old.of_shape(index))
        if arguments.json:
            sweep.write(arguments.json)
    print(sweep.summary())
    if refused := sweep.all_refused():
        sys.exit("refused, with other results than the choice:\n" + "\n".join(refused))


if __name__ == "__main__":
    main()
