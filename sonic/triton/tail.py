"""Clearing the rows that no expert owns, in place."""

import torch
import triton
import triton.language as tl

from sonic.triton.common import cdiv, check_contiguous, device_of, power_of_2
from sonic.triton.launch import Launcher, wait_for_earlier_launches

_ROWS = 64
_MAX_BLOCK = 256


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def _zero_tail_kernel(
    rows,
    offset_by_expert,
    num_rows,
    num_experts,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_earlier_launches()
    live = tl.load(offset_by_expert + num_experts)
    first = tl.program_id(0) * ROWS
    # Nearly every program leaves here: without a tail the whole launch is a few microseconds.
    if first + ROWS > live:
        row = first + tl.arange(0, ROWS)
        dead = (row >= live) & (row < num_rows)
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            address = rows + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
            zero = tl.zeros([ROWS, BLOCK], rows.dtype.element_ty)
            tl.store(address, zero, mask=dead[:, None] & (column[None, :] < WIDTH))


_zero_tail = Launcher(_zero_tail_kernel, overlapping=True)


def zero_tail(rows: torch.Tensor, offset_by_expert: torch.Tensor) -> torch.Tensor:
    """Set the rows from ``offset_by_expert[-1]`` on to zero, in place.

    Args:
        rows: (R, N) contiguous. offset_by_expert: (E + 1,) int32.

    Returns:
        ``rows``.
    """
    check_contiguous("zero_tail", rows=rows, offset_by_expert=offset_by_expert)
    num_rows, width = rows.shape
    if rows.numel() == 0:
        return rows
    block = min(_MAX_BLOCK, power_of_2(width))
    with device_of(rows):
        _zero_tail(
            cdiv(num_rows, _ROWS),
            rows,
            offset_by_expert,
            num_rows,
            offset_by_expert.shape[0] - 1,
            WIDTH=width,
            ROWS=_ROWS,
            BLOCK=block,
        )
    return rows
