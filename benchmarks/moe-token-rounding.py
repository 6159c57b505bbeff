"""Check and time the layer with token rounding, or with top-k beside it.

    python benchmarks/moe-token-rounding.py --thiekq 16384,4096,1024,256,8,128 --routing nr

The timed region is the whole layer: router GEMM, scores, selection, plan and experts; the share of
selection and plan is timed on its own besides. FLOPs are those of the pairs that are routed. Output
and every gradient are compared first; after a failed check nothing is timed and the exit status is
1. Without a supported GPU, and with no size asked for, a small layer runs through the reference.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import sonic
from benchmarks.check import findings_table, record_findings
from benchmarks.layer import Layer, LayerOptions, make_layer
from benchmarks.measure import environment, sustained_ms
from benchmarks.report import Result, provider_of, text_table
from benchmarks.rounding import (
    ROUTINGS,
    Load,
    RoundedShape,
    Rounding,
    check_rounded_layer,
    load_of,
    timed_functions,
)
from benchmarks.shapes import Shape
from sonic.enums import GateUpLayout

DEFAULT_SIZE = RoundedShape(Shape(16384, 4096, 1024, 256, 8), 128)
SMALL_SIZE = RoundedShape(Shape(256, 128, 64, 8, 2), 16)
CPU_FLOPS = 2e11  # of the forward pass; more would take minutes
DTYPES = {"BFloat16": torch.bfloat16, "Float16": torch.float16}
PASSES = ("forward", "forward + backward", "backward")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ",".join(map(str, (*DEFAULT_SIZE.shape.problem, DEFAULT_SIZE.tile)))
    parser.add_argument(
        "--thiekq",
        type=_size,
        nargs="+",
        metavar="T,H,I,E,K,Q",
        help="tokens, hidden size, expert intermediate size, experts, experts per token, tile to "
        f"round to; one or several (default {default} on a supported GPU)",
    )
    parser.add_argument("--routing", choices=ROUTINGS, nargs="+", default=["nr"])
    parser.add_argument(
        "--rep", type=float, default=200, metavar="MS", help="milliseconds to time for each figure"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="BFloat16")
    parser.add_argument("--skip_test", action="store_true", help="time without checking first")
    parser.add_argument("--add_bias", action="store_true")
    parser.add_argument(
        "--concat_layout", action="store_true", help="w1 has all gate rows before all up rows"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write a result file")
    parser.add_argument("--device", type=torch.device, help="cuda or cpu")
    parser.add_argument(
        "--impl", choices=["auto", "cute", "reference"], default="auto", help="implementation"
    )
    return parser.parse_args(argv)


def _size(text: str) -> RoundedShape:
    try:
        return RoundedShape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
                "large for the reference implementation on a CPU."
            )
    print("Running the plain-torch reference implementation, not the kernels: the times below say")
    print("nothing about the kernels.\n")
    return sizes, device, "reference"


def measure(layer: Layer, rounding: Rounding, rep: float) -> dict[str, float]:
    """Milliseconds of the layer's and the routing's passes."""
    device = layer.options.device
    times = {
        name: sustained_ms(function, device, timed_seconds=rep / 1e3)
        for name, function in timed_functions(layer, rounding).items()
    }
    for prefix in ("", "routing "):
        difference = times[f"{prefix}forward + backward"] - times[f"{prefix}forward"]
        # On a machine that others use, noise can exceed the difference: then there is no figure.
        times[f"{prefix}backward"] = difference if difference > 0 else math.nan
    return times


def pass_flops(shape: Shape, load: Load, name: str) -> float:
    """6, 18 and 12 FLOPs per routed pair, hidden and intermediate unit."""
    factor = {"forward": 6, "forward + backward": 18, "backward": 12}[name]
    return float(factor * load.routed * shape.H * shape.I)


def report(
    result: Result, size: RoundedShape, routing: str, load: Load, times: dict[str, float]
) -> None:
    """Print one measurement and add it to the result."""
    shape = size.shape
    metric = f"token rounding/{routing}/q{size.tile}"
    rows = []
    for name in PASSES:
        ms, own = times[name], times[f"routing {name}"]
        tflops = pass_flops(shape, load, name) / ms * 1e-9
        share = 100 * own / ms
        rows.append((routing, name, f"{ms:.3f}", f"{tflops:.4g}", f"{own:.3f}", f"{share:.1f}"))
        result.add(f"{metric}/{name}", ms, "ms", shape.problem)
        result.add(f"{metric}/{name}", tflops, "TFLOPS", shape.problem)
        result.add(f"{metric}/{name}/routing", own, "ms", shape.problem)
        result.add(f"{metric}/{name}/routing", share, "% of the pass", shape.problem)
    result.add(f"{metric}/routed pairs", load.routed, "count", shape.problem)
    result.add(f"{metric}/hardware tokens", load.hardware, "count", shape.problem)
    result.add(f"{metric}/waste", load.waste, "%", shape.problem)
    header = ("routing", "pass", "ms", "TFLOPS", "of which routing ms", "%")
    print(text_table(header, rows))
    print(f"\nrouted pairs {load.routed:,} (top-k {shape.rows:,}), in tiles of {size.tile} rows")
    print(f"{load.hardware:,} hardware tokens, waste {load.waste:.2f} %\n")


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
        shape = size.shape
        print(
            f"\nT={shape.T} H={shape.H} I={shape.I} E={shape.E} top_k={shape.top_k} q={size.tile}"
        )
        layer = make_layer(shape, options)
        for routing in arguments.routing:
            rounding = Rounding.make(routing, size.tile, device)
            if not arguments.skip_test:
                findings = check_rounded_layer(layer, rounding)
                print(f"{routing}\n{findings_table(findings)}\n")
                label = f"{options.layout.value}/{routing}/q{size.tile}"
                record_findings(result, shape.problem, label, findings)
                if not all(finding.passed for finding in findings):
                    print("FAILED: the layer is wrong, so nothing was timed.\n")
                    passed = False
                    continue
            load = load_of(layer, rounding)
            report(result, size, routing, load, measure(layer, rounding, arguments.rep))
        del layer
    print("ms: medians on a loaded device, routing (scores, selection, plan) and router GEMM")
    print("included; TFLOPS: 6, 18 and 12 H I per routed pair; backward is the difference.")
    if arguments.json:
        result.write(arguments.json)
        print(f"wrote {arguments.json}")
    return 0 if passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
