"""Check and time the layer with token rounding, with top-k and other roundings beside it.

    python benchmarks/moe-token-rounding.py --thiekq 16384,4096,1024,256,8,128 --routing nr top_k
    python benchmarks/moe-token-rounding.py --sweep 1 2 3 4 --json benchmarks/results/rounding.json

The timed region is the whole layer: router GEMM, scores, selection, plan and experts; all routings
of a size, and at the sizes ``benchmarks.rounding.BAR_SIZES`` SonicMoE's top-k layer if it can be
imported, take turns in one process. On a GPU the routings take turns once more as CUDA graphs: with
small layers an eager call may be the host's time, a replay is the device's. What lies between
router GEMM and experts is timed besides, also as a graph and as a share of the graphs' times, and
its launches are counted. ``--module`` times ``sonic.MoE`` in training mode beside it, whose
balancing loss is then part of its routing. FLOPs are those of the pairs that are routed. Output and
every gradient are compared first, SonicMoE's too, and what a graph leaves with what the eager call
returns; there is none of rules that draw random numbers, as its replays would draw others. What
failed is not timed, and the exit status is 1. Without a supported GPU, and with no size asked for,
a small layer runs through the reference.
"""

import argparse
import functools
import math
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import sonic
from benchmarks.check import Finding, findings_table, record_findings
from benchmarks.figures import Result, provider_of, text_table
from benchmarks.launches import launches_of
from benchmarks.layer import Layer, LayerOptions, make_layer
from benchmarks.measure import environment
from benchmarks.options import THIEK, THIEK_HELP, EachOnce, output_file
from benchmarks.options import device as device_option
from benchmarks.peers import PEER, obstacle, shorten_tuning, versions
from benchmarks.rounding import (
    BAR_SIZES,
    MODULE,
    RANDOM,
    ROUTINGS,
    SWEEPS,
    Load,
    RoundedShape,
    Rounding,
    Way,
    WayGraphs,
    check_graphs,
    check_peer,
    check_rounded_layer,
    function_way,
    load_of,
    peer_forward,
    race_graphs,
    race_layers,
    routing_functions,
    routing_times,
    ways_of,
)
from benchmarks.shapes import CPU_FLOPS, Shape
from sonic.enums import GateUpLayout

DEFAULT_SIZE = RoundedShape(Shape(16384, 4096, 1024, 256, 8), 128)
SMALL_SIZE = RoundedShape(Shape(256, 128, 64, 8, 2), 16)
DTYPES = {"BFloat16": torch.bfloat16, "Float16": torch.float16}
PASSES = ("forward", "forward + backward", "backward")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ",".join(map(str, (*DEFAULT_SIZE.shape.problem, DEFAULT_SIZE.tile)))
    parser.add_argument(
        "--thiekq",
        type=_size,
        nargs="+",
        action=EachOnce,
        metavar=f"{THIEK},Q",
        help=f"{THIEK_HELP}; and Q, the tile to round to; one or several (default {default} on a "
        "supported GPU)",
    )
    parser.add_argument(
        "--sweep",
        type=int,
        nargs="+",
        action=EachOnce,
        choices=range(1, len(SWEEPS) + 1),
        metavar="N",
        help="the paper's sweeps over the number of experts, by number; --thiekq adds to them",
    )
    parser.add_argument(
        "--routing",
        choices=ROUTINGS,
        nargs="+",
        action=EachOnce,
        help="default nr, and top_k with --sweep",
    )
    parser.add_argument(
        "--module",
        action="store_true",
        help="also time sonic.MoE in training mode, with its balancing loss",
    )
    parser.add_argument("--no_peer", action="store_true", help="do not time SonicMoE's layer")
    parser.add_argument(
        "--rep",
        type=_milliseconds,
        default=400,
        metavar="MS",
        help="milliseconds to time for each figure",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="BFloat16")
    parser.add_argument(
        "--skip_test",
        action="store_true",
        help="print times without checking first; not with --json",
    )
    parser.add_argument("--add_bias", action="store_true")
    parser.add_argument(
        "--concat_layout", action="store_true", help="w1 has all gate rows before all up rows"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write a result file")
    parser.add_argument("--device", type=device_option, help="cuda or cpu")
    parser.add_argument(
        "--impl", choices=["auto", "cute", "reference"], default="auto", help="implementation"
    )
    arguments = parser.parse_args(argv)
    if arguments.sweep:
        sizes = [size for number in arguments.sweep for size in SWEEPS[number - 1]]
        arguments.thiekq = sizes + [s for s in arguments.thiekq or [] if s not in sizes]
    arguments.routing = arguments.routing or (["nr", "top_k"] if arguments.sweep else ["nr"])
    if arguments.skip_test and arguments.json:
        parser.error("--json records what was checked; leave out --skip_test or --json")
    return arguments


def _size(text: str) -> RoundedShape:
    try:
        return RoundedShape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        message = f"expected a positive number of milliseconds, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return value


def choose(arguments: argparse.Namespace) -> tuple[list[RoundedShape], torch.device, str]:
    """Sizes, device and implementation to run, saying so when it is not what was hoped for."""
    device, impl = arguments.device, arguments.impl
    available = sonic.is_available(device)
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if impl != "reference" and available.ok:
        return arguments.thiekq or [DEFAULT_SIZE], device, impl
    if impl == "cute":
        raise SystemExit(f"No kernels for this machine: {available.reason}")
    sizes = arguments.thiekq or [SMALL_SIZE]
    for size in sizes:
        if device.type == "cpu" and size.shape.forward_flops(gated=True) > CPU_FLOPS:
            raise SystemExit(
                f"No kernels for this machine: {available.reason}\n{size.shape.problem} is too "
                f"large for the reference implementation on a CPU, which takes {CPU_FLOPS:.0e} "
                "FLOPs of a forward pass, 6 T top_k H I. Pass a smaller --thiekq, or run it on a "
                "GPU with kernels."
            )
    print("Running the plain-torch reference implementation, not the kernels: the times below say")
    print("nothing about the kernels.\n")
    return sizes, device, "reference"


def peer_takes_part(arguments: argparse.Namespace, size: RoundedShape, impl: str) -> bool:
    """Whether SonicMoE's layer can be timed at this size, and is wanted there."""
    plain = arguments.dtype == "BFloat16" and not (arguments.add_bias or arguments.concat_layout)
    if arguments.no_peer or impl == "reference" or not plain or size not in BAR_SIZES:
        return False
    reason = obstacle(PEER)
    print(f"{PEER} does not take part: {reason}" if reason else f"beside it: {versions(PEER)}")
    if reason is None:
        shorten_tuning(good_tiles_only=True)
    return reason is None


def passed(
    result: Result, size: RoundedShape, name: str, findings: list[Finding], provider: str = ""
) -> bool:
    """Print and record what was compared; whether it passed."""
    what = "token rounding/top_k" if provider else f"{name}/q{size.tile}"
    record_findings(result, size.shape.problem, what, findings, provider)
    print(f"{name}\n{findings_table(findings)}\n")
    if not all(finding.passed for finding in findings):
        print("FAILED: this is wrong, so it was not timed.\n")
        return False
    return True


def pass_flops(shape: Shape, load: Load, name: str) -> float:
    """6, 18 and 12 FLOPs per routed pair, hidden and intermediate unit."""
    factor = {"forward": 6, "forward + backward": 18, "backward": 12}[name]
    return float(factor * load.routed * shape.H * shape.I)


class Report:
    """Figures of one size, printed as a table and added to a result."""

    header = ("routing", "pass", "ms", "TFLOPS", "as graph ms", "of which routing ms", "%")

    def __init__(self, result: Result, size: RoundedShape) -> None:
        self.result, self.size = result, size
        self.rows: list[tuple[str, ...]] = []

    def add(self, metric: str, value: float, unit: str, provider: str = "") -> None:
        self.result.add(metric, value, unit, self.size.shape.problem, provider)

    def layer(
        self,
        routing: str,
        load: Load,
        times: dict[str, float],
        replayed: dict[str, float] | None,
        own: dict[str, float],
    ) -> None:
        """``times`` and those as a graph, and what of them is ``own``, the routing's."""
        metric = f"token rounding/{routing}/q{self.size.tile}"
        for name in PASSES:
            ms = times[name]
            device_ms = replayed[name] if replayed else ms
            tflops = pass_flops(self.size.shape, load, name) / ms * 1e-9
            share = 100 * own[name] / device_ms
            graph = f"{device_ms:.3f}" if replayed else ""
            figures = f"{ms:.3f}", f"{tflops:.4g}", graph, f"{own[name]:.4f}", f"{share:.1f}"
            self.rows.append((routing, name, *figures))
            self.add(f"{metric}/{name}", ms, "ms")
            self.add(f"{metric}/{name}", tflops, "TFLOPS")
            if replayed:
                self.add(f"{metric}/{name}/graph", device_ms, "ms")
            self.add(f"{metric}/{name}/routing", own[name], "ms")
            self.add(f"{metric}/{name}/routing", share, "% of the pass")
        self.add(f"{metric}/routed pairs", load.routed, "count")
        self.add(f"{metric}/hardware tokens", load.hardware, "count")
        self.add(f"{metric}/waste", load.waste, "%")

    def peer(self, times: dict[str, float]) -> None:
        load = Load(self.size.shape.rows, self.size.shape.rows)
        for name in PASSES:
            tflops = pass_flops(self.size.shape, load, name) / times[name] * 1e-9
            self.rows.append((PEER, name, f"{times[name]:.3f}", f"{tflops:.4g}", "", "", ""))
            self.add(f"token rounding/top_k/{name}", times[name], "ms", PEER)
            self.add(f"token rounding/top_k/{name}", tflops, "TFLOPS", PEER)

    def launches(self, layer: Layer, rounding: Rounding, in_module: bool) -> None:
        """Launches of the routing alone, and each kernel's microseconds."""
        routing = rounding.name + MODULE * in_module
        for name, function in routing_functions(layer, rounding, in_module).items():
            found = launches_of(function)
            metric = f"token rounding/{routing}/q{self.size.tile}/{name}/routing"
            self.add(f"{metric}/launches", found.total, "count")
            print(f"{routing}, routing {name}: {found.total:g} launches")
            for kernel, us in found.microseconds.items():
                short = kernel[:60]
                print(f"  {us:8.1f} us  {found.count[kernel]:g} x {short}")
                self.add(f"{metric}/{short}", us, "us")

    def print(self, loads: dict[str, Load]) -> None:
        print(text_table(self.header, self.rows))
        shape, tile = self.size.shape, self.size.tile
        for routing, load in loads.items():
            print(
                f"\n{routing}: routed pairs {load.routed:,} (top-k {shape.rows:,}), in tiles of "
                f"{tile} rows {load.hardware:,} hardware tokens, waste {load.waste:.2f} %"
            )
        print(flush=True)


def has_pairs(size: RoundedShape, rounding: Rounding, loads: dict[str, Load]) -> bool:
    """Whether anything is left to compute, saying so if not."""
    if loads[rounding.name].routed:
        return True
    print(
        f"REFUSED: {rounding.name} to whole tiles of {size.tile} leaves no pair of token and "
        f"expert; an expert has {size.shape.rows / size.shape.E:.4g} tokens on average. Take a "
        "smaller tile (Q) or more tokens (T)."
    )
    return False


def sound_graphs(
    result: Result,
    size: RoundedShape,
    options: LayerOptions,
    ways: Mapping[str, Way],
    without: Collection[str],
) -> tuple[dict[str, WayGraphs], list[str]]:
    """CUDA graphs of the ways, but for those ``without``, and the names of those that leave other
    results than the eager calls."""
    graphs, failed = {}, []
    for name, way in ways.items():
        if name in without:
            continue
        own = WayGraphs.of(way)
        findings = check_graphs(own, way, options.dtype)
        if passed(result, size, f"{options.layout.value}/{name}", findings):
            graphs[name] = own
        else:
            failed.append(name)
    return graphs, failed


def run_size(
    arguments: argparse.Namespace, size: RoundedShape, options: LayerOptions, result: Result
) -> bool:
    """Check and time one size; whether every check passed."""
    shape, device = size.shape, options.device
    print(f"\nT={shape.T} H={shape.H} I={shape.I} E={shape.E} top_k={shape.top_k} q={size.tile}")
    layer = make_layer(shape, options)
    asked = [Rounding.make(name, size.tile, device) for name in arguments.routing]
    loads = {rounding.name: load_of(layer, rounding) for rounding in asked}
    roundings = [rounding for rounding in asked if has_pairs(size, rounding, loads)]
    right, layout = roundings, options.layout.value
    with_peer = peer_takes_part(arguments, size, options.impl)
    if with_peer:
        result.head["tuning"] = f"{PEER}: good"
    sound = len(roundings) == len(asked)
    if not arguments.skip_test:
        right = []
        for rounding in roundings:
            findings = check_rounded_layer(layer, rounding, arguments.module)
            if passed(result, size, f"{layout}/{rounding.name}", findings):
                right.append(rounding)
        sound &= len(right) == len(roundings)
        if with_peer:
            with_peer = passed(result, size, PEER, check_peer(layer), PEER)
            sound &= with_peer
    if not right:
        return False
    seconds = arguments.rep / 1e3
    ways = ways_of(layer, right, arguments.module)
    graphs: dict[str, WayGraphs] = {}
    if device.type == "cuda":
        drawing = tuple(name for name in ways if name.removesuffix(MODULE) in RANDOM)
        graphs, failed = sound_graphs(result, size, options, ways, drawing)
        sound &= not failed
    if with_peer:
        ways[PEER] = function_way(layer, functools.partial(peer_forward, layer))
    times = race_layers(ways, device, seconds)
    replayed = race_graphs(graphs, device, seconds)
    report = Report(result, size)
    forms = [(r, in_module) for in_module in (False, True)[: 1 + arguments.module] for r in right]
    for rounding, in_module in forms:
        own = routing_times(layer, rounding, in_module, seconds)
        name = rounding.name + MODULE * in_module
        report.layer(name, loads[rounding.name], times[name], replayed.get(name), own)
    if with_peer:
        report.peer(times[PEER])
    report.print({rounding.name: loads[rounding.name] for rounding in right})
    if device.type == "cuda":
        for rounding, in_module in forms:
            report.launches(layer, rounding, in_module)
    return sound


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    sizes, device, impl = choose(arguments)
    options = LayerOptions(
        dtype=DTYPES[arguments.dtype],
        device=device,
        layout=(GateUpLayout.CONCATENATED if arguments.concat_layout else GateUpLayout.INTERLEAVED),
        add_bias=arguments.add_bias,
        impl=impl,
    )
    head = environment(device)
    result = Result(head, provider=provider_of(impl))
    print(f"{head['device']}, driver {head['driver']}, {arguments.dtype}, impl={impl}")
    passed = True
    for size in sizes:
        passed &= run_size(arguments, size, options, result)
        if arguments.json:
            result.write(arguments.json)
    print("ms: medians on a loaded device, routings in turns, router GEMM and routing (scores,")
    print("selection, plan) included; TFLOPS: 6, 18 and 12 H I per routed pair.")
    if arguments.json:
        print(f"wrote {arguments.json}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
