"""The end of a split reduction: adding what later parts of an expert's rows sum to.

A weight gradient is a sum over the rows of an expert. Where one expert has a good share of all
rows, its few tiles would outlast all others, so a GEMM with ``TileConfig.split`` takes at most
``rows_per_part`` rows at a time: with ``b`` the expert's first row, part ``p`` are those from ``b +
p rows_per_part`` on. Part 0 is stored to the output, and part ``p > 0`` to ``partial[i - 1]`` with
``i = (b + p rows_per_part) // rows_per_part``. No two parts share a place, because two that are not
their experts' first ones begin at least ``rows_per_part`` rows apart.
"""

import functools

import torch
import triton
import triton.language as tl

from sonic.triton.common import cdiv, check_contiguous, check_shape, power_of_2
from sonic.triton.launch import Fixed, Launcher, wait_for_earlier_launches

_BLOCK = 2048
_NONE = tl.constexpr(2**31 - 1)


def rows_per_part(rows: int, parts: int) -> int:
    """The most rows of a part where ``rows`` rows of all experts have ``parts`` later parts.

    ``GroupedGemmSm90.__call__``, which sees both numbers as extents only, divides likewise: the two
    have to agree on where parts begin.
    """
    return max(cdiv(rows, parts + 1), 1)


@triton.jit(do_not_specialize=["num_experts", "size", "rows_per_part"])
def _add_parts_kernel(
    out,
    partial,
    offset_by_expert,
    num_experts,
    size,
    rows_per_part,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of the outputs of all experts that have more than one part."""
    wait_for_earlier_launches()
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    expert = tl.arange(0, BLOCK_E)
    is_expert = expert < num_experts
    low = tl.load(offset_by_expert + expert, mask=is_expert, other=0)
    high = tl.load(offset_by_expert + expert + 1, mask=is_expert, other=0)
    split = high - low > rows_per_part
    split_expert = tl.min(tl.where(split, expert, _NONE), axis=0)
    while split_expert < num_experts:
        row = tl.load(offset_by_expert + split_expert) + rows_per_part
        end = tl.load(offset_by_expert + split_expert + 1)
        target = out + split_expert.to(tl.int64) * size + index
        total = tl.load(target, mask=inside, other=0.0).to(tl.float32)
        while row < end:
            place = (row // rows_per_part - 1).to(tl.int64) * size
            total += tl.load(partial + place + index, mask=inside, other=0.0).to(tl.float32)
            row += rows_per_part
        tl.store(target, total.to(out.dtype.element_ty), mask=inside)
        split_expert = tl.min(tl.where(split & (expert > split_expert), expert, _NONE), axis=0)


_add_parts = Launcher(_add_parts_kernel, overlapping=True)


@functools.lru_cache(maxsize=4096)
def _launch(num_experts: int, size: int, part_rows: int) -> Fixed:
    kernel = _add_parts.bind(BLOCK_E=power_of_2(num_experts), BLOCK=_BLOCK, num_warps=8)
    return kernel.fix(cdiv(size, _BLOCK), num_experts, size, part_rows)


def add_parts(
    out: torch.Tensor, partial: torch.Tensor, offset_by_expert: torch.Tensor, rows: int
) -> None:
    """Adds the later parts of each expert, as they were rounded, to its output: in order, in fp32,
    and with one more rounding.

    Args:
        out: (E, M, N) bf16 or fp16, contiguous, E at most 4096; in it the sums over first parts.
        partial: (P, M, N) of the same dtype, contiguous; those over later parts, where there are
            any.
        offset_by_expert: (E+1,) int32. rows: R, of all experts.
    """
    check_contiguous("add_parts", out=out, partial=partial, offset_by_expert=offset_by_expert)
    check_shape("add_parts", "partial", partial, (partial.shape[0], *out.shape[1:]))
    size = out.shape[1] * out.shape[2]
    part_rows = rows_per_part(rows, partial.shape[0])
    _launch(out.shape[0], size, part_rows)(out, partial, offset_by_expert)
