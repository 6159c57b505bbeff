"""Compiles a share of the layer's kernels and prints what the assembler says of each."""

import sys

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

_USUAL = (2048, 1024, 1024)  # rows per expert, n, k
_FEW_ROWS = (64, 1024, 1024)
# Extents that 128, 192 and 256 cover best, on either side of every threshold of the choice.
_SIZES = [
    (rows, n, k)
    for rows in (320, 2048)
    for n in (128, 192, 1024, 2880)
    for k in (128, 192, 4096, 2880)
]


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
            for size in _SIZES:
                pairs[problem, backend.default_config(problem, *size)] = None
    return list(pairs)


def main() -> None:
    first, step = int(sys.argv[1]), int(sys.argv[2])
    backend = load_backend(Arch.SM90)
    for problem, config in kernels(Arch.SM90)[first::step]:
        print(f"KERNEL {problem.name} {config.name}", flush=True)
        backend.compile(problem, config)
        sys.stderr.flush()


if __name__ == "__main__":
    main()
