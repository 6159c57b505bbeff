"""Compiles a share of the layer's kernels and prints what the assembler says of each, and what is
wrong with its wait for earlier launches."""

import sys
import tempfile
from dataclasses import replace

from kernels_sm90.compile import compile_kernel
from kernels_sm90.search import swapped_space
from sonic.enums import ActivationType
from sonic.runtime.backend import load_backend
from sonic.runtime.problem import (
    Arch,
    Operand,
    Problem,
    TileConfig,
    layer_problems,
    weight_grad_problem,
)
from tests.emulator.compiled import ptx_of
from tests.waits import fault_of_wait

_USUAL = (2048, 1024, 1024, 128)  # rows per expert, n, k, experts
_FEW_ROWS = (16, 1024, 1024, 128)


def _one_order_of_each(configs: list[TileConfig]) -> list[TileConfig]:
    """Tiles in one order only, which hardly changes what the math warps need: from a counter, or
    the last one there is.
    """
    by_shape = {replace(c, raster_along_m=False, dynamic=False): c for c in configs}
    return list(by_shape.values())


def kernels(arch: Arch) -> list[tuple[Problem, TileConfig]]:
    """Every problem of the layer with its usual tiles, and every tiling of one layer.

    Two layers, in fact: the gated and the ungated activation that need the most registers.
    """
    backend = load_backend(arch)
    pairs: dict[tuple[Problem, TileConfig], None] = {}
    for dtype in ("bfloat16", "float16"):
        for activation in ActivationType:
            for has_bias in (False, True):
                for problem in layer_problems(activation, dtype, has_bias):
                    pairs[problem, backend.default_config(problem, *_USUAL)] = None
                    if activation is ActivationType.SWIGLU:
                        pairs[problem, backend.default_config(problem, *_FEW_ROWS)] = None
        for gated in (False, True):
            for accumulate in (False, True):
                for gather in (None, Operand.A, Operand.B):
                    if gated and gather is Operand.A:
                        continue  # the down-projection's weight gradient has no gate and up rows
                    problem = weight_grad_problem(dtype, gather, gated, accumulate)
                    pairs[problem, backend.default_config(problem, *_USUAL)] = None
    for activation in (ActivationType.SWIGLU_OAI, ActivationType.GELU):
        for problem in layer_problems(activation, "bfloat16", has_bias=True):
            for config in _one_order_of_each(backend.candidates(problem)):
                pairs[problem, config] = None
    for problem in layer_problems(ActivationType.SWIGLU_OAI, "bfloat16", has_bias=True):
        # The highest one of each schedule.
        by_schedule = {config.schedule: config for config in swapped_space(problem)}
        pairs |= {(problem, config): None for config in by_schedule.values()}
    return list(pairs)


def main() -> None:
    first, step = int(sys.argv[1]), int(sys.argv[2])
    for problem, config in kernels(Arch.SM90)[first::step]:
        print(f"KERNEL {problem.name} {config.name}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            compiled = compile_kernel(problem, config, f"--keep-ptx --dump-dir {folder}")
        sys.stderr.flush()
        print(f"WAIT {fault_of_wait(ptx_of(compiled)) or 'first'};", flush=True)


if __name__ == "__main__":
    main()
