"""Check one layer against a reference, then time it.

    python benchmarks/moe-cute.py --thiek 32768,4096,1024,128,8

Output and every gradient are compared first; after a failed check nothing is timed and the exit
status is 1. On a machine without a supported GPU, and with no size asked for, a small layer runs
through the reference implementation instead, which says that it is not the kernels being timed.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import sonic
from benchmarks.check import check_layer, findings_table, record_findings
from benchmarks.figures import Result, provider_of, text_table
from benchmarks.layer import Layer, LayerOptions, make_layer
from benchmarks.measure import (
    PassFigures,
    SavedBytes,
    environment,
    record_saved,
    record_speed,
    saved_bytes,
    speed_table,
)
from benchmarks.options import THIEK, THIEK_HELP, output_file
from benchmarks.options import device as device_option
from benchmarks.options import shape as shape_option
from benchmarks.shapes import CPU_FLOPS, DEFAULT_SHAPE, SMALL_SHAPE, Shape
from sonic.enums import ActivationType, GateUpLayout, ScoreOrder

DTYPES = {"BFloat16": torch.bfloat16, "Float16": torch.float16}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--thiek",
        type=shape_option,
        metavar=THIEK,
        help=f"{THIEK_HELP} (default {','.join(map(str, DEFAULT_SHAPE.problem))} on a "
        "supported GPU)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="BFloat16")
    parser.add_argument(
        "--skip_test",
        action="store_true",
        help="print times without checking first; not with --json",
    )
    parser.add_argument("--activation", choices=[a.value for a in ActivationType], default="swiglu")
    parser.add_argument("--add_bias", action="store_true")
    parser.add_argument(
        "--topk_over_softmax", action="store_true", help="softmax over all experts, then top-k"
    )
    parser.add_argument(
        "--norm_topk_probs",
        action="store_true",
        help="with --topk_over_softmax: weights of a token sum to one (otherwise they always do)",
    )
    parser.add_argument(
        "--concat_layout", action="store_true", help="w1 has all gate rows before all up rows"
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="also write a result file")
    parser.add_argument("--device", type=device_option, help="cuda or cpu")
    parser.add_argument(
        "--impl", choices=["auto", "cute", "reference"], default="auto", help="implementation"
    )
    arguments = parser.parse_args(argv)
    if arguments.skip_test and arguments.json:
        parser.error("--json records what was checked; leave out --skip_test or --json")
    return arguments


def choose(arguments: argparse.Namespace) -> tuple[Shape, torch.device, str]:
    """Size, device and implementation to run, saying so when it is not what was hoped for."""
    device, impl = arguments.device, arguments.impl
    available = sonic.is_available(device)
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if impl != "reference" and available.ok:
        return arguments.thiek or DEFAULT_SHAPE, device, impl
    if impl == "cute":
        raise SystemExit(f"No kernels for this machine: {available.reason}")
    shape = arguments.thiek or SMALL_SHAPE
    if device.type == "cpu" and shape.forward_flops(gated=True) > CPU_FLOPS:
        raise SystemExit(
            f"No kernels for this machine: {available.reason}\n"
            f"{','.join(map(str, shape.problem))} is too large for the reference implementation on "
            f"a CPU; --thiek {','.join(map(str, SMALL_SHAPE.problem))} is not."
        )
    if impl == "auto":
        print(f"No kernels for this machine: {available.reason}")
    print("Running the plain-torch reference implementation, not the kernels: the times below say")
    print("nothing about the kernels.\n")
    return shape, device, "reference"


def score_order(arguments: argparse.Namespace) -> ScoreOrder:
    if not arguments.topk_over_softmax:
        return ScoreOrder.SOFTMAX_OVER_TOPK
    if arguments.norm_topk_probs:
        return ScoreOrder.TOPK_OVER_SOFTMAX_NORM
    return ScoreOrder.TOPK_OVER_SOFTMAX


def print_times(layer: Layer, figures: list[PassFigures], gemm_ms: dict[str, float]) -> None:
    labels = {"experts": "experts (ids and weights given)", "moe": "layer (router included)"}
    rows = [
        (labels[line.region], line.name)
        + (
            ("-", "-", "-")
            if math.isnan(line.ms)
            else (f"{line.ms:.3f}", f"{line.tflops:.4g}", f"{line.percent:.1f}")
        )
        for line in figures
    ]
    print(text_table(("timed region", "pass", "ms", "TFLOPS", "% of bmm"), rows))
    if any(math.isnan(line.ms) for line in figures):
        print("-: forward + backward measured no longer than forward alone, so there is no figure")
    flops = "6" if layer.options.gated else "4"
    parts = ", ".join(f"{name} {ms:.3f}" for name, ms in gemm_ms.items())
    print(f"\nforward FLOPs {flops} T top_k H I; backward is the difference of two rows. bmm: the")
    print("six GEMMs as torch.bmm with balanced experts, measured in this run:")
    print(f"{parts}; together {sum(gemm_ms.values()):.3f} ms")


def print_saved(layer: Layer, saved: SavedBytes) -> None:
    formula = "2TH + 4RI" if layer.options.gated else "2TH + 2RI"
    print(f"\nsaved for backward: {saved.total:,} bytes; {formula} = {saved.formula:,};")
    tensors = [f"{dtype}{list(size)}" for size, dtype, _ in saved.tensors]
    print(f"metadata {saved.metadata:,}; tensors {', '.join(tensors)}")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    shape, device, impl = choose(arguments)
    options = LayerOptions(
        dtype=DTYPES[arguments.dtype],
        device=device,
        activation=ActivationType(arguments.activation),
        layout=(GateUpLayout.CONCATENATED if arguments.concat_layout else GateUpLayout.INTERLEAVED),
        score_order=score_order(arguments),
        add_bias=arguments.add_bias,
        impl=impl,
    )
    head = environment(device)
    size = f"T={shape.T} H={shape.H} I={shape.I} E={shape.E} top_k={shape.top_k}"
    variant = [arguments.dtype, options.activation.value, options.layout.value]
    variant += [options.score_order.value, *(["bias"] if options.add_bias else []), f"impl={impl}"]
    print(f"{size}\n{', '.join(variant)}\n{head['device']}, driver {head['driver']}\n")
    layer = make_layer(shape, options)
    result = Result(head, provider=provider_of(impl))

    if not arguments.skip_test:
        findings = check_layer(layer)
        print(findings_table(findings))
        record_findings(result, shape.problem, options.layout.value, findings)
        passed = all(finding.passed for finding in findings)
        if passed:
            print("\nEvery error is within twice that of torch with the same rounding points.\n")
        if arguments.json:
            result.write(arguments.json)
        if not passed:
            print("\nFAILED: the layer is wrong, so nothing was timed.")
            return 1

    figures, gemm_ms = speed_table(layer)
    print_times(layer, figures, gemm_ms)
    record_speed(result, shape.problem, figures, gemm_ms)
    saved = saved_bytes(layer)
    print_saved(layer, saved)
    record_saved(result, shape.problem, saved)
    if arguments.json:
        result.write(arguments.json)
        print(f"\nwrote {arguments.json}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
