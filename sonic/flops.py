"""Floating-point operations of the operators, for ``torch.utils.flop_counter.FlopCounterMode``.

Symbols: T tokens, H hidden size, I intermediate size, E experts, R routed rows. Rows that are
dropped are counted, since how many there are is not known on the host. Gather, activation,
reduction and bias are not counted.

The formulas are known to counters that are made after a :class:`sonic.MoE` or
:class:`sonic.Experts`, or after :func:`register`.
"""

import functools
import sys
from typing import Any

_Shape = tuple[int, ...]


def _count(shape: Any) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def experts_forward_flops(x: _Shape, w1: _Shape, b1: Any, w2: _Shape, *rest: Any, **_: Any) -> int:
    """``2 R (2I H + H I)`` gated, ``2 R (I H + H I)`` otherwise."""
    rows = rest[3][0]  # token_by_row, behind b2, scores and offset_by_expert
    return 2 * rows * (_count(w1[1:]) + _count(w2[1:]))


def experts_backward_flops(
    dout: _Shape, x: Any, w1: _Shape, w2: _Shape, b2: Any, *rest: Any, **_: Any
) -> int:
    """``dout @ w2`` whenever anything but ``db2`` is asked for, and a GEMM for each other need."""
    rows = rest[3][0]  # token_by_row, behind h, scores and offset_by_expert
    needs_x, needs_w1, needs_b1, needs_w2, _needs_b2, needs_scores = rest[12]
    up, down = 2 * rows * _count(w1[1:]), 2 * rows * _count(w2[1:])
    total = up * (needs_x + needs_w1) + down * needs_w2
    if needs_x or needs_w1 or needs_b1 or needs_w2 or needs_scores:
        total += down
    return int(total)


def grouped_mm_flops(rows: _Shape, weight: _Shape, *_: Any, **__: Any) -> int:
    return 2 * rows[0] * _count(weight[1:])


def grouped_mm_backward_flops(
    dout: _Shape, rows: Any, weight: _Shape, offsets: Any, impl: str, needs: Any, **_: Any
) -> int:
    return 2 * dout[0] * _count(weight[1:]) * (needs[0] + needs[1])


def register_if_counting() -> None:
    """:func:`register` if the counter has been imported. Importing it would import triton."""
    if "torch.utils.flop_counter" in sys.modules:
        register()


@functools.cache
def register() -> None:
    """Make the formulas known to counters that are made from now on."""
    import torch
    from torch.utils.flop_counter import register_flop_formula

    import sonic.autograd  # noqa: F401  (defines the operators)

    for name, formula in (
        ("experts_forward", experts_forward_flops),
        ("experts_backward", experts_backward_flops),
        ("experts_backward_accumulate", experts_backward_flops),
        ("grouped_mm", grouped_mm_flops),
        ("grouped_mm_backward", grouped_mm_backward_flops),
    ):
        register_flop_formula(getattr(torch.ops.sonic, name))(formula)
