"""Bias gradients: sums over the rows of each expert.

    db1[e] = sum_r dh[r]                              r in the rows of expert e
    db2[e] = sum_r score_by_row[r] * dout[token_by_row[r]]

An expert's rows are split into equal shares, one program per share and block of columns, and the
shares are added in order by a second kernel. A single long expert then still fills the GPU, and the
result does not depend on timing.
"""

import functools

import torch
import triton
import triton.language as tl

from sonic.runtime.errors import DTypeError
from sonic.triton.common import (
    cdiv,
    check_contiguous,
    check_float,
    check_shape,
    row_major,
)
from sonic.triton.launch import Fixed, Launcher, wait_for_earlier_launches

_BLOCK_N = 256
_BLOCK_R = 16
# Few choices: every one is a kernel to compile while the number of rows varies.
_SHARES = (16, 4)
_ROWS_PER_SHARE = 512
_MAX_PARTIAL_BYTES = 64 * 2**20
# Enough programs for two on each multiprocessor of the largest GPU when one expert has all rows.
_WANTED_PROGRAMS = 320


@triton.jit(do_not_specialize=["num_experts"])
def _segment_sum_kernel(
    source,
    token_by_row,
    score_by_row,
    offset_by_expert,
    out,
    num_experts,
    width,
    stride,
    SHARES: tl.constexpr,
    GATHER: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    wait_for_earlier_launches()
    blocks = tl.cdiv(width, BLOCK_N)
    column = (tl.program_id(0) % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    share = (tl.program_id(0) // blocks) % SHARES
    expert = tl.program_id(0) // (blocks * SHARES)
    first = tl.load(offset_by_expert + expert)
    stop = tl.load(offset_by_expert + expert + 1)
    length = (stop - first + SHARES - 1) // SHARES
    count = tl.minimum(length, stop - first - share * length)
    first = first.to(tl.int64) + share * length
    total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_R):
        local = start + tl.arange(0, BLOCK_R)
        row = first + local
        mask = (local[:, None] < count) & (column[None, :] < width)
        if GATHER:
            token = tl.load(token_by_row + row, mask=local < count, other=0).to(tl.int64)
            score = tl.load(score_by_row + row, mask=local < count, other=0.0)
            value = tl.load(
                source + token[:, None] * stride + column[None, :], mask=mask, other=0.0
            )
            total += value.to(tl.float32) * score[:, None]
        else:
            value = tl.load(source + row[:, None] * stride + column[None, :], mask=mask, other=0.0)
            total += value.to(tl.float32)
    target = (share.to(tl.int64) * num_experts + expert) * width + column
    tl.store(out + target, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=column < width)


@triton.jit(do_not_specialize=["size"])
def _add_shares_kernel(partial, out, size, SHARES: tl.constexpr, BLOCK: tl.constexpr):
    wait_for_earlier_launches()
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = tl.zeros([BLOCK], tl.float32)
    for share in tl.static_range(SHARES):
        total += tl.load(partial + index + share * size.to(tl.int64), mask=mask, other=0.0)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=mask)


_sum_segments = Launcher(_segment_sum_kernel, overlapping=True)
_add_shares = Launcher(_add_shares_kernel, overlapping=True)


def _shares_for(num_rows: int, num_experts: int, width: int) -> int:
    """Shares per expert: a function of shapes, so that equal shapes sum in the same order."""
    wanted = cdiv(_WANTED_PROGRAMS, cdiv(width, _BLOCK_N))
    useful = cdiv(num_rows, _ROWS_PER_SHARE)
    affordable = _MAX_PARTIAL_BYTES // (4 * num_experts * width)
    limit = min(wanted, useful, affordable)
    return next((shares for shares in _SHARES if shares <= limit), 1)


@functools.lru_cache(maxsize=4096)
def _launches(
    num_experts: int, width: int, stride: int, shares: int, gather: bool
) -> tuple[Fixed, Fixed]:
    """The sums, and that of the shares, which one share does not need."""
    sums = _sum_segments.bind(
        SHARES=shares, GATHER=gather, BLOCK_R=_BLOCK_R, BLOCK_N=_BLOCK_N, num_warps=4
    )
    block, size = 1024, num_experts * width
    add = _add_shares.bind(SHARES=shares, BLOCK=block, num_warps=4)
    programs = num_experts * shares * cdiv(width, _BLOCK_N)
    return sums.fix(programs, num_experts, width, stride), add.fix(cdiv(size, block), size)


def _segment_sum(
    source: torch.Tensor,
    token_by_row: torch.Tensor | None,
    score_by_row: torch.Tensor | None,
    offset_by_expert: torch.Tensor,
    num_rows: int,
    dtype: torch.dtype | None,
) -> torch.Tensor:
    num_experts, width = offset_by_expert.numel() - 1, source.shape[1]
    out = torch.empty(num_experts, width, dtype=dtype or source.dtype, device=source.device)
    if out.numel() == 0:
        return out
    source = row_major(source)
    shares = _shares_for(num_rows, num_experts, width)
    partial = out
    if shares > 1:
        partial = torch.empty(shares, num_experts, width, dtype=torch.float32, device=source.device)
    gather = token_by_row is not None
    sum_segments, add_shares = _launches(num_experts, width, source.stride(0), shares, gather)
    sum_segments(source, token_by_row, score_by_row, offset_by_expert, partial)
    if shares > 1:
        add_shares(partial, out)
    return out


def bias_grad_rows(
    dh: torch.Tensor, offset_by_expert: torch.Tensor, *, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Sum of each expert's rows.

    Args:
        dh: (R, N) bf16, fp16 or fp32. Rows past the last live one are never read.
        offset_by_expert: (E+1,) int32.
        dtype: of the result, ``dh.dtype`` if None.

    Returns:
        (E, N), accumulated in fp32 and rounded once; zeros for an expert without rows.
    """
    check_float("bias_grad_rows", dh=dh)
    check_contiguous("bias_grad_rows", offset_by_expert=offset_by_expert)
    return _segment_sum(dh, None, None, offset_by_expert, dh.shape[0], dtype)


def bias_grad_gathered(
    dout: torch.Tensor,
    token_by_row: torch.Tensor,
    score_by_row: torch.Tensor,
    offset_by_expert: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Score-weighted sum of the output gradients of each expert's tokens.

    Args:
        dout: (T, H) bf16, fp16 or fp32.
        token_by_row: (R,) int32.
        score_by_row: (R,) fp32.
        offset_by_expert: (E+1,) int32.
        dtype: of the result, ``dout.dtype`` if None.

    Returns:
        (E, H), accumulated in fp32 and rounded once; zeros for an expert without rows.
    """
    check_float("bias_grad_gathered", dout=dout)
    if score_by_row.dtype is not torch.float32:
        raise DTypeError(
            f"bias_grad_gathered: score_by_row has dtype {score_by_row.dtype}, expected float32."
        )
    check_contiguous(
        "bias_grad_gathered",
        token_by_row=token_by_row,
        score_by_row=score_by_row,
        offset_by_expert=offset_by_expert,
    )
    check_shape("bias_grad_gathered", "score_by_row", score_by_row, tuple(token_by_row.shape))
    return _segment_sum(
        dout, token_by_row, score_by_row, offset_by_expert, token_by_row.numel(), dtype
    )
