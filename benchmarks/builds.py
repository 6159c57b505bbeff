"""Times grouped GEMMs of several checkouts in one process, on the same operands.

In two processes the same kernel was up to 6 % faster or slower, presumably as their memory lies,
which is more than most changes are worth. So each checkout compiles what its choice of tiles calls
for, which needs no GPU,

    python benchmarks/builds.py compile --to before --shapes C A --gemms dh up

and one of them runs all, in turns, and says what the others take over the first:

    python benchmarks/builds.py race before after before --shapes C A --gemms dh up

Timed is what a layer launches, with the kernel behind a split weight gradient that adds its parts.
A build that is named twice says how much of a difference is none. Results that are not those of the
first build, by the bounds of ``sonic tune``, are reported, and fail the run.
"""

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.options import EachOnce, positive
from benchmarks.shapes import BARS
from benchmarks.tiles import GEMMS, chosen_tiling, launches, timed_gemm, uniform_plan
from sonic.runtime.backend import Backend, backend_for, load_backend
from sonic.runtime.objects import load_object, write_object
from sonic.runtime.problem import Arch, Problem, Schedule, TileConfig
from sonic.runtime.tuning import TimedGemm

SECONDS = 0.04  # of one build's turn: its own load decides its clocks
_SYMBOL = "kernel"
_INDEX = "index.json"


class Built(NamedTuple):
    """A kernel of one build, and the tiles that it was compiled with."""

    kernel: Any
    config: TileConfig


def compile_build(backend: Backend, folder: Path, shapes: list[str], gemms: list[str]) -> None:
    """Compile what ``shapes`` need into ``folder``, kernels that they share once."""
    index: dict[str, dict[str, Any]] = {}
    files: dict[tuple[Problem, TileConfig], str] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for letter in shapes:
        for gemm in gemms:
            problem, _, _ = launches(BARS[letter])[gemm]
            config = chosen_tiling(backend, gemm, BARS[letter])
            if (problem, config) not in files:
                place = folder / f"{gemm}_{config.name}"
                place.mkdir(exist_ok=True)
                path = write_object(backend.compile(problem, config), place, _SYMBOL)
                files[problem, config] = path.relative_to(folder).as_posix()
                print(f"{gemm} {config.name}", flush=True)
            index[f"{letter} {gemm}"] = {"file": files[problem, config], "config": asdict(config)}
    (folder / _INDEX).write_text(json.dumps(index, indent=1))


def load_build(folder: Path, letter: str, gemm: str) -> Built:
    """A kernel that :func:`compile_build` left in ``folder``.

    :raises ValueError: it is not there.
    """
    path = folder / _INDEX
    index = json.loads(path.read_text()) if path.is_file() else {}
    found = index.get(f"{letter} {gemm}")
    if found is None:
        known = ", ".join(index) or "nothing"
        raise ValueError(f"{folder} has no {gemm} of {letter}; it has {known}: compile it there")
    config = found["config"] | {"schedule": Schedule(found["config"]["schedule"])}
    return Built(load_object(folder / found["file"], _SYMBOL), TileConfig(**config))


def differences(timed: TimedGemm, builds: list[Built]) -> dict[int, str]:
    """Of the builds whose results are not those of the first one: which."""
    first, *others = builds
    timed.kernels[first.config] = first.kernel
    expected = timed.results(first.config)
    found = {}
    for index, build in enumerate(others, 1):
        timed.kernels[build.config] = build.kernel
        difference = timed.difference(expected, build.config)
        if difference is not None:
            found[index] = difference
    return found


def race(timed: TimedGemm, builds: list[Built], rounds: int) -> list[list[float]]:
    """Milliseconds of each build in each round, behind one that does not count. Rounds go forward
    and back, and each begins with another build."""
    times: list[list[float]] = [[] for _ in builds]
    for turn in range(rounds + 1):
        order = list(range(len(builds)))[:: 1 if turn % 2 else -1]
        first = turn % len(builds)
        for index in order[first:] + order[:first]:
            build = builds[index]
            timed.kernels[build.config] = build.kernel
            ms = timed.milliseconds(build.config, SECONDS)
            if turn:
                times[index].append(ms)
    return times


def line(letter: str, gemm: str, times: list[list[float]], folders: list[Path]) -> str:
    """The first build's time, and the median over the rounds of what the others take over it."""
    ratios = []
    for folder, own in zip(folders[1:], times[1:], strict=True):
        ratio = statistics.median(a / b for a, b in zip(own, times[0], strict=True))
        ratios.append(f"{folder} {ratio:.3f}")
    return (
        f"{letter} {gemm:4} {folders[0]} {statistics.median(times[0]):.4f} ms; {', '.join(ratios)}"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser("compile", help="the kernels of this checkout; needs no GPU")
    compiling.add_argument("--to", type=Path, required=True, metavar="FOLDER")
    compiling.add_argument("--gpu", default="H200", help="whose tiles; default H200")
    racing = commands.add_parser("race", help="kernels of several checkouts, in turns, on the GPU")
    racing.add_argument("builds", nargs="+", type=Path, metavar="FOLDER")
    racing.add_argument("--rounds", type=positive, default=6)
    for command in (compiling, racing):
        command.add_argument(
            "--shapes", nargs="+", action=EachOnce, choices=list(BARS), default=list(BARS)
        )
        command.add_argument(
            "--gemms", nargs="+", action=EachOnce, choices=GEMMS, default=list(GEMMS)
        )
    arguments = parser.parse_args(argv)
    if arguments.command == "compile":
        backend = load_backend(Arch.SM90, None).for_gpu(arguments.gpu)
        compile_build(backend, arguments.to, arguments.shapes, arguments.gemms)
        return 0
    if len(arguments.builds) < 2:
        parser.error("a race takes two builds or more; name one twice to see the noise")
    pairs = [(letter, gemm) for letter in arguments.shapes for gemm in arguments.gemms]
    try:
        loaded = {p: [load_build(folder, *p) for folder in arguments.builds] for p in pairs}
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        print("Needs a CUDA GPU: kernels are timed there. compile needs none.", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    backend_for(device)  # a GPU without kernels says so here
    passed = True
    for (letter, gemm), builds in loaded.items():
        torch.manual_seed(0)
        timed = timed_gemm(BARS[letter], gemm, uniform_plan(BARS[letter], device))
        for index, difference in differences(timed, builds).items():
            print(f"{letter} {gemm}: {arguments.builds[index]}: {difference}")
            passed = False
        print(
            line(letter, gemm, race(timed, builds, arguments.rounds), arguments.builds), flush=True
        )
        del timed
        torch.cuda.empty_cache()
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
