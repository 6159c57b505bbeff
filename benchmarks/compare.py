"""Our layer beside other packages', in one process and in turns.

    python benchmarks/compare.py --shapes A,B,C --json compare.json --plot compare.svg
    python benchmarks/compare.py --small --host
    python benchmarks/compare.py --plot-from compare.json --plot compare.svg

A peer that cannot be imported, does not get ready in ``--limit`` seconds or fails is named with the
reason and left out. Results are written after every size. Timed is the region from given ids and
weights to the output, and to all gradients; ratios are to ours: above 1, ours is faster.

SonicMoE tunes itself at each size. At A to F, and for ``--small`` and ``--host``, it chooses among
six tile shapes and a few gather kernels, those that a search over all found near the best at A to F
(``--tuning good``); which of its others is better elsewhere nobody has looked at, so with
``--random`` or ``--thiek`` it chooses among all (``--tuning full``), which takes minutes a size:
``--limit`` may have to be longer. The result file says which.

Before a size is timed, output and gradients of every pass of every contender are held to a wide
reference (:mod:`benchmarks.agreement`); so are skewed routing, CUDA graphs and the calls whose host
time is taken. One that is wrong is neither timed nor recorded, of a size where ours is wrong
nothing is, and the exit status is then 1.
"""

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import small
from benchmarks.agreement import (
    Findings,
    check_contenders,
    findings_of,
    inference_run,
    print_findings,
    record_agreement,
    sound,
)
from benchmarks.contest import (
    PASSES,
    Memory,
    OutOfTime,
    Times,
    memory_of,
    race,
    time_limit,
)
from benchmarks.figures import Result, text_table
from benchmarks.layer import Layer, LayerOptions, make_layer
from benchmarks.measure import environment
from benchmarks.options import (
    THIEK,
    THIEK_HELP,
    missing_gpu,
    not_negative,
    output_file,
    positive,
    repetition,
    seconds,
)
from benchmarks.options import device as device_option
from benchmarks.options import shape as shape_option
from benchmarks.peers import (
    BOUND,
    CONTENDERS,
    FORWARD_ONLY,
    NEEDS_LOGITS,
    OURS,
    PEER,
    TUNINGS,
    Contender,
    obstacle,
    shorten_tuning,
    versions,
)
from benchmarks.problems import SKEWS, random_shapes, with_skew
from benchmarks.shapes import BARS, CPU_FLOPS, DECODE_TOKENS, Shape

MIB = 2**20
_PICTURES = (".svg", ".png", ".pdf")
UNIFORM = "uniform"  # ours with uniform routing, in turns with a skewed one


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = parser.add_argument_group("what to compare")
    sizes.add_argument("--shapes", type=_letters, default=[], metavar="A,B,...", help="the bars")
    sizes.add_argument(
        "--thiek",
        type=shape_option,
        action="append",
        default=[],
        metavar=THIEK,
        help=f"{THIEK_HELP}; may be repeated",
    )
    sizes.add_argument("--random", type=not_negative, default=0, metavar="N", help="random sizes")
    sizes.add_argument("--seed", type=not_negative, default=0, help="of the random sizes")
    sizes.add_argument("--skew", choices=SKEWS, default="none", help="routing of the sizes above")
    sizes.add_argument("--small", action="store_true", help="few tokens under a CUDA graph")
    sizes.add_argument("--host", action="store_true", help="host time of a call")
    sizes.add_argument("--profile", action="store_true", help="with --host: where ours goes")
    parser.add_argument("--peers", type=_peers, default=list(CONTENDERS), metavar="NAME,...")
    parser.add_argument(
        "--tuning",
        choices=TUNINGS,
        help="what sonicmoe may choose from at each size: all its tiles (the default with --random "
        "or --thiek), or those that were near the best for A to F",
    )
    parser.add_argument(
        "--seconds", type=seconds, default=0.7, help="timed, per contender and race"
    )
    parser.add_argument("--limit", type=positive, default=150, help="seconds per size and peer")
    parser.add_argument("--total", type=positive, default=3600, help="no size starts after that")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    parser.add_argument("--plot", type=_picture, metavar="FILE", help="needs matplotlib")
    parser.add_argument("--plot-from", type=Path, metavar="FILE", help="of this result; no run")
    parser.add_argument("--device", type=device_option, default=torch.device("cuda"))
    arguments = parser.parse_args(argv)
    if arguments.tuning is None:
        arguments.tuning = "full" if arguments.random or arguments.thiek else "good"
    refused = _contradiction(arguments)
    if refused is not None:
        parser.error(refused)
    return arguments


def _contradiction(arguments: argparse.Namespace) -> str | None:
    """Why these options do not go together."""
    sizes = arguments.shapes or arguments.thiek or arguments.random
    work = sizes or arguments.small or arguments.host or arguments.profile
    if arguments.plot_from:
        if not arguments.plot:
            return "--plot-from needs --plot FILE, the picture to write"
        if work or arguments.json:
            return "--plot-from draws a result that is there; leave out sizes and --json"
        return None
    asked = [BARS[letter] for letter in arguments.shapes] + arguments.thiek
    repeated = repetition(asked)
    if repeated is not None:
        return f"of the sizes that --shapes and --thiek give, {repeated}"
    if arguments.profile and not arguments.host:
        return "--profile is of the calls that --host times; give both"
    if not work:
        return "Nothing to compare: give --shapes, --thiek, --random, --small or --host."
    if arguments.skew != "none" and not sizes:
        return "--skew is of the sizes that --shapes, --thiek or --random give; there are none"
    if arguments.plot and not sizes:
        return "--plot draws the sizes that --shapes, --thiek or --random give; there are none"
    if arguments.plot and arguments.skew != "none":
        return "--plot draws uniform routing; leave out --plot or --skew"
    if arguments.device.type == "cpu":
        for shape in asked + random_shapes(arguments.random, arguments.seed):
            if shape.forward_flops(gated=True) > CPU_FLOPS:
                size = ",".join(map(str, shape.problem))
                return f"{size} is too large for the reference implementation on --device cpu"
    if arguments.small and arguments.device.type != "cuda":
        return f"--small takes CUDA graphs, which --device {arguments.device} has not"
    missing = missing_gpu(arguments.device)  # the default is no option whose type was looked at
    return missing and f"--device: {missing}"


def _picture(text: str) -> Path:
    path = output_file(text)
    if path.suffix not in _PICTURES:
        raise argparse.ArgumentTypeError(f"{text} does not end with {', '.join(_PICTURES)}")
    return path


def _letters(text: str) -> list[str]:
    letters = text.split(",")
    unknown = [letter for letter in letters if letter not in BARS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no shape {unknown[0]!r}; there are {', '.join(BARS)}")
    return letters


def _peers(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        known = ", ".join(CONTENDERS)
        raise argparse.ArgumentTypeError(f"no contender {unknown[0]!r}; there are {known}")
    repeated = repetition(names)
    if repeated is not None:
        raise argparse.ArgumentTypeError(repeated)
    return [OURS, *(name for name in names if name != OURS)]


# ------------------------------------------------------------------------------ preparation


def participants(wanted: list[str], tuning: str) -> list[str]:
    """Those of ``wanted`` that can run here; says why the others cannot."""
    found = []
    for name in wanted:
        reason = obstacle(name)
        if reason is not None:
            print(f"{name} does not take part: {reason}")
            continue
        found.append(name)
        if versions(name):
            print(f"{name}: {versions(name)}")
    if PEER in found:
        shorten_tuning(good_tiles_only=tuning == "good")
    return found


def prepare(
    names: list[str], layer: Layer, limit: float, passes: Callable[[str, Contender], None]
) -> dict[str, Contender]:
    """The contenders that get through ``passes``, each compiled and tuned, in time."""
    ready: dict[str, Contender] = {}
    for name in names:
        start = time.perf_counter()
        try:
            with time_limit(limit):
                contender = CONTENDERS[name](layer)
                passes(name, contender)
            ready[name] = contender
            print(f"  {name} ready after {time.perf_counter() - start:.1f} s", flush=True)
        except OutOfTime as error:
            print(f"  {name} left out: {error}", flush=True)
        except Exception as error:
            if name == OURS:
                raise
            line = (str(error).splitlines() or [""])[0]
            print(f"  {name} left out: {type(error).__name__}: {line}", flush=True)
        _release()
    return ready


def _train_once(name: str, contender: Contender) -> None:
    contender.inference()
    if name not in FORWARD_ONLY:
        contender.backward(contender.forward())
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _infer_once(name: str, contender: Contender) -> None:
    contender.inference()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _release() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------ comparisons


def checked(
    contenders: dict[str, Contender], layer: Layer, train: bool = True
) -> tuple[dict[str, Contender], Findings]:
    """The contenders that may be timed, after a check of every pass that will be; none if ours is
    wrong. The bound computes no layer, so that there is nothing to check."""
    found, failures = check_contenders(contenders, layer, train)
    print_findings(found)
    for name, reason in failures.items():
        print(f"  {name} left out: it could not be checked: {reason}")
    _release()
    right = sound(found)
    return {
        name: contender
        for name, contender in contenders.items()
        if OURS in right and (name in right or name == BOUND)
    }, found


def compare_layers(
    shapes: Mapping[str, Shape], names: list[str], arguments: argparse.Namespace, result: Result
) -> bool:
    """Check, race and memory at each size. False if a contender's results were wrong, or ours are
    missing."""
    passed, end = True, time.perf_counter() + arguments.total
    for label, shape in shapes.items():
        if time.perf_counter() > end:
            print(f"\n{label} was not started: --total {arguments.total} s are over")
            continue
        print(f"\n{label}: T,H,I,E,top_k = {','.join(map(str, shape.problem))}", flush=True)
        uniform = make_layer(shape, _options(arguments))
        layer = with_skew(uniform, arguments.skew)
        taking_part = [n for n in names if arguments.skew == "none" or n not in NEEDS_LOGITS]
        contenders = prepare(taking_part, layer, arguments.limit, _train_once)
        contenders, found = checked(contenders, layer)
        passed &= len(sound(found)) == len(found) and OURS in contenders
        racers = dict(contenders)
        if arguments.skew != "none" and contenders:
            plain = {OURS: CONTENDERS[OURS](uniform)}
            right, of_uniform = checked(plain, uniform)
            passed &= bool(right)
            racers = {**contenders, UNIFORM: plain[OURS]} if right else {}
            del plain, right
        if racers:
            memory = _memory(contenders, arguments.device)
            times = race(racers, arguments.device, arguments.seconds)
            print_times(times, memory)
            prefix = f"compare/{arguments.skew}"
            record(result, shape, prefix, times, memory)
            record_agreement(result, prefix, shape.problem, found, times)
            if UNIFORM in racers:
                record_agreement(result, f"{prefix}/{UNIFORM}", shape.problem, of_uniform, [OURS])
        _write(result, arguments)
        del uniform, layer, contenders, racers
        _release()
    return passed


def _memory(contenders: Mapping[str, Contender], device: torch.device) -> dict[str, Memory]:
    if device.type != "cuda":
        return {}
    trained = [name for name in contenders if name not in (*FORWARD_ONLY, BOUND)]
    return {name: memory_of(contenders[name], device) for name in trained}


def _options(arguments: argparse.Namespace) -> LayerOptions:
    return LayerOptions(device=arguments.device)


def print_times(times: Times, memory: Mapping[str, Memory]) -> None:
    ours = times.get(OURS, {})
    header = ["contender", ""]
    for name in PASSES:
        header += [f"{name} ms", "x ours"]
    header += ["saved MiB", "peak MiB", "above saved MiB"]
    rows = []
    for name, by_pass in times.items():
        row = [name, ""]
        for p in PASSES:
            ms = by_pass.get(p)
            row += ["-", "-"] if ms is None else [f"{ms:.3f}", _ratio(ms, ours.get(p))]
        used = memory.get(name)
        row += (
            ["-"] * 3
            if used is None
            else [f"{size / MIB:.0f}" for size in (used.saved, used.peak, used.above_saved)]
        )
        rows.append(row)
    print(text_table(header, rows), flush=True)


def _ratio(ms: float, ours: float | None) -> str:
    return "-" if ours is None else f"{ms / ours:.3f}"


def record(
    result: Result, shape: Shape, prefix: str, times: Times, memory: Mapping[str, Memory]
) -> None:
    """Rows ``<prefix>/<what>``; ratios to ours, and of ours to uniform routing, are of the same
    run."""
    for p, ms in times.get(UNIFORM, {}).items():
        ratio = times[OURS][p] / ms
        result.add(f"{prefix}/{p}", ratio, "x uniform", shape.problem, OURS)
    for name, by_pass in times.items():
        if name == UNIFORM:
            continue
        for p, ms in by_pass.items():
            result.add(f"{prefix}/{p}", ms, "ms", shape.problem, name)
            if p in times.get(OURS, {}):
                ratio = ms / times[OURS][p]
                result.add(f"{prefix}/{p}", ratio, "x ours", shape.problem, name)
    for name, used in memory.items():
        for what in ("saved", "peak", "gradients", "above_saved"):
            result.add(f"{prefix}/{what}", getattr(used, what), "B", shape.problem, name)


def compare_small(names: list[str], arguments: argparse.Namespace, result: Result) -> bool:
    """Inference of few tokens: device time under a CUDA graph, and host time of an eager call.
    False if a contender's results were wrong."""
    rows, passed = [], True
    for tokens in DECODE_TOKENS:
        shape = small.decode_shape(tokens)
        print(f"\nsmall: T,H,I,E,top_k = {','.join(map(str, shape.problem))}", flush=True)
        layer = make_layer(shape, _options(arguments))
        layers = small.rotations(layer)
        wanted = [name for name in names if name != BOUND]
        contenders = prepare(wanted, layer, arguments.limit, _infer_once)
        contenders, eager = checked(contenders, layer, train=False)
        graphs, failures = small.capture_graphs(contenders, layers, arguments.device)
        replayed = check_graphs(graphs, layers)
        print_findings(replayed)
        right = sound(replayed)
        passed &= len(sound(eager)) == len(eager) and len(right) == len(graphs)
        if OURS in right:
            contenders = {n: c for n, c in contenders.items() if n in right or n in failures}
            medians = small.graph_ms({name: graphs[name] for name in right}, arguments.device)
            floor = 1e6 * small.read_seconds(small.touched_bytes(layers), arguments.device)
            result.add("small/floor", floor, "us", shape.problem, BOUND)
            rows.append([str(tokens), "weights read once", f"{floor:.1f}", "-", "-", "-"])
            for name, contender in contenders.items():
                host = small.host_microseconds(contender.inference, arguments.device)
                result.add("small/host", host.median, "us", shape.problem, name)
                result.add("small/host, fastest tenth", host.fast, "us", shape.problem, name)
                graph, cells = medians.get(name), ["-", "-"]
                if graph is not None:
                    result.add("small/graph", 1e3 * graph, "us", shape.problem, name)
                    cells = [f"{1e3 * graph:.1f}", _ratio(graph, medians[OURS])]
                rows.append([str(tokens), name, *cells, f"{host.median:.0f}", f"{host.fast:.0f}"])
            record_agreement(result, "small/eager", shape.problem, eager, contenders)
            record_agreement(result, "small/graph", shape.problem, replayed, contenders)
        for name, reason in failures.items():
            print(f"  {name} has no graph: {reason}")
        _write(result, arguments)
        del layer, layers, contenders, graphs
        _release()
    header = ("T", "contender", "graph us", "x ours", "host us", "fastest tenth")
    print(text_table(header, rows), flush=True)
    return passed


def check_graphs(graphs: Mapping[str, small.Graph], layers: Sequence[Layer]) -> Findings:
    """What the last replay of each graph left, of every routing."""
    found: Findings = {name: [] for name in graphs}
    for index, layer in enumerate(layers):
        runs = {name: [inference_run(name, g.outputs[index])] for name, g in graphs.items()}
        for name, own in findings_of(runs, layer).items():
            found[name] += own
    return found


def compare_host(names: list[str], arguments: argparse.Namespace, result: Result) -> bool:
    """Host microseconds where the device is faster than the host. False if results were wrong."""
    shape = small.HOST_SHAPE
    print(f"\nhost: T,H,I,E,top_k = {','.join(map(str, shape.problem))}", flush=True)
    layer = make_layer(shape, _options(arguments))
    contenders = prepare(
        [name for name in names if name != BOUND], layer, arguments.limit, _train_once
    )
    contenders, found = checked(contenders, layer)
    rows = []
    for name, by_pass in small.host_times(contenders, arguments.device).items():
        for p, host in by_pass.items():
            result.add(f"host/{p}", host.median, "us", shape.problem, name)
            result.add(f"host/{p}, fastest tenth", host.fast, "us", shape.problem, name)
            rows.append([name, p, f"{host.median:.0f}", f"{host.fast:.0f}"])
    record_agreement(result, "host", shape.problem, found, contenders)
    print(text_table(("contender", "call", "host us", "fastest tenth"), rows), flush=True)
    _write(result, arguments)
    if arguments.profile and OURS in contenders:
        small.print_profile(contenders[OURS].inference, arguments.device)
    return len(sound(found)) == len(found)


def _write(result: Result, arguments: argparse.Namespace) -> None:
    if arguments.json:
        result.write(arguments.json)


def _plot(path: Path, result: Result) -> bool:
    """Whether there is a picture now."""
    from benchmarks.plot import plot_comparison

    try:
        plot_comparison(result, path)
    except ImportError as error:
        print(f"no plot: {error}; install matplotlib, or draw it elsewhere with --plot-from")
        return False
    print(f"wrote {path}")
    return True


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.plot_from:
        try:
            return 0 if _plot(arguments.plot, Result.read(arguments.plot_from)) else 1
        except (OSError, ValueError) as error:
            print(
                f"--plot-from {arguments.plot_from}: {error}\n"
                "It takes a result file that --json wrote here, with at least one size.",
                file=sys.stderr,
            )
            return 2
    shapes = {letter: BARS[letter] for letter in arguments.shapes}
    shapes |= {f"given {number}": shape for number, shape in enumerate(arguments.thiek, 1)}
    drawn = random_shapes(arguments.random, arguments.seed)
    shapes |= {f"random {number}": shape for number, shape in enumerate(drawn, 1)}
    # Read when the peers are imported: keep what they tune, and compile on every core.
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    os.environ.setdefault("QUACK_COMPILE_WORKERS", str(os.cpu_count() or 8))
    names = participants(arguments.peers, arguments.tuning)
    head = environment(arguments.device)
    if PEER in names:
        head["tuning"] = f"{PEER}: {arguments.tuning}"
    result = Result(head)
    passed = compare_layers(shapes, names, arguments, result)
    if arguments.host:
        passed &= compare_host(names, arguments, result)
    if arguments.small:
        passed &= compare_small(names, arguments, result)
    if arguments.plot and (passed or result.rows):
        _plot(arguments.plot, result)
    if not passed:
        print("\nFAILED: results were wrong, or ours are missing; neither was timed or recorded.")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
