"""Combine: the score-weighted sum of a token's rows.

    out[t] = sum over the slots s of token t, ascending, of scores[s] * rows[row_by_slot[s]]

Rows of an expert lie together, so this is a gather; it reads every live row once and is bound by
memory bandwidth. Section 4 of the SonicMoE paper (arXiv 2512.14080) weighs it against a scatter in
the down projection's epilogue.
"""

import functools

import torch
import triton
import triton.language as tl

from sonic.runtime.errors import DTypeError
from sonic.triton.common import (
    FLOAT_DTYPES,
    cdiv,
    check_contiguous,
    check_float,
    check_shape,
    power_of_2,
    row_major,
)
from sonic.triton.launch import Fixed, Launcher, wait_for_earlier_launches

# Rows of a token whose loads are in flight together.
_MAX_UNROLL = 16
_RAGGED_UNROLL = 2, 8  # with up to about four slots a token on average, and with more


@triton.jit
def _load_row(rows, row, column, hidden_size, stride):
    """One block of a row in fp32, zeros for row -1."""
    limit = tl.where(row >= 0, hidden_size, 0)
    address = rows + row.to(tl.int64) * stride + column
    # Every row is read once: keep the cache for what is read again.
    value = tl.load(address, mask=column < limit, other=0.0, eviction_policy="evict_first")
    return value.to(tl.float32)


@triton.jit
def _combine_kernel(
    rows,
    row_by_slot,
    scores,
    out,
    hidden_size,
    stride,
    out_stride,
    TOP_K: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    wait_for_earlier_launches()
    blocks = tl.cdiv(hidden_size, BLOCK_H)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], tl.float32)
    for start in range(0, TOP_K, UNROLL):
        for step in tl.static_range(UNROLL):
            slot = token * TOP_K + start + step
            row = tl.load(row_by_slot + slot)
            value = _load_row(rows, row, column, hidden_size, stride)
            if HAS_SCORES:
                value = value * tl.load(scores + slot, mask=row >= 0, other=0.0)
            total += value
    tl.store(
        out + token * out_stride + column,
        total.to(out.dtype.element_ty),
        mask=column < hidden_size,
    )


@triton.jit
def _combine_ragged_kernel(
    rows,
    row_by_slot,
    scores,
    offset_by_token,
    slot_by_position,
    out,
    hidden_size,
    stride,
    out_stride,
    UNROLL: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    wait_for_earlier_launches()
    blocks = tl.cdiv(hidden_size, BLOCK_H)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], tl.float32)
    first = tl.load(offset_by_token + token)
    # Counted from zero: position + UNROLL could leave int32 near 2^31 slots.
    count = tl.load(offset_by_token + token + 1) - first
    for start in range(0, count, UNROLL):
        for step in tl.static_range(UNROLL):
            inside = start + step < count
            position = first.to(tl.int64) + start + step
            slot = position
            if slot_by_position is not None:
                slot = tl.load(slot_by_position + position, mask=inside, other=0)
            row = tl.load(row_by_slot + slot, mask=inside, other=-1)
            value = _load_row(rows, row, column, hidden_size, stride)
            if HAS_SCORES:
                value = value * tl.load(scores + slot, mask=inside & (row >= 0), other=0.0)
            total += value
    tl.store(
        out + token * out_stride + column,
        total.to(out.dtype.element_ty),
        mask=column < hidden_size,
    )


_combine = Launcher(_combine_kernel, overlapping=True)
_combine_ragged = Launcher(_combine_ragged_kernel, overlapping=True)


@functools.lru_cache(maxsize=4096)
def _launch(
    num_tokens: int,
    hidden_size: int,
    element_size: int,
    strides: tuple[int, int],
    has_scores: bool,
    top_k: int,
    ragged_unroll: int,
) -> Fixed:
    """The kernel, of fixed top-k unless that is 0, and its grid."""
    vector = 16 // element_size
    block_h = _block_size(hidden_size, vector)
    num_warps = max(1, block_h // (32 * vector))  # one 16-byte load per thread and row
    options = {"HAS_SCORES": has_scores, "BLOCK_H": block_h, "num_warps": num_warps}
    if top_k == 0:
        kernel = _combine_ragged.bind(UNROLL=ragged_unroll, **options)
    else:
        unroll = next(n for n in range(_MAX_UNROLL, 0, -1) if top_k % n == 0)
        kernel = _combine.bind(TOP_K=top_k, UNROLL=unroll, **options)
    return kernel.fix(num_tokens * cdiv(hidden_size, block_h), hidden_size, *strides)


def _block_size(hidden_size: int, vector: int) -> int:
    """Columns of a program: four warps' loads, or half as many where that leaves out empty ones."""
    wide = min(power_of_2(hidden_size), 128 * vector)
    narrow = max(wide // 2, min(wide, 32 * vector))
    return min(wide, narrow, key=lambda block: (cdiv(hidden_size, block) * block, -block))


def _ragged_unroll(num_slots: int, num_tokens: int) -> int:
    few, many = _RAGGED_UNROLL
    return few if num_slots <= 5 * num_tokens else many


def combine(
    rows: torch.Tensor,
    row_by_slot: torch.Tensor,
    scores: torch.Tensor | None,
    offset_by_token: torch.Tensor | None,
    slot_by_position: torch.Tensor | None,
    num_tokens: int,
    top_k: int,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum the rows of each token in ascending slot order, in fp32, without atomics.

    Args:
        rows: (R, H) bf16, fp16 or fp32. Rows of no slot are never read.
        row_by_slot: (S,) int32, -1 where the slot is dropped.
        scores: S fp32 weights of the slots, in any shape, or None: all one.
        offset_by_token: (T+1,) int32 of general routing, or None for fixed top-k.
        slot_by_position: (S,) int32 of general routing, or None: every position is its slot.
        num_tokens: T.
        top_k: slots per token; not read in general routing.
        out: (T, H) of ``rows.dtype`` to write into, with rows of any stride; None for a new one.

    Returns:
        (T, H) of ``rows.dtype``, rounded once; exact zeros for a token without live slots.
    """
    if rows.dtype not in FLOAT_DTYPES:
        check_float("combine", rows=rows)
    if scores is not None and scores.dtype is not torch.float32:
        raise DTypeError(f"combine: scores has dtype {scores.dtype}, expected float32.")
    if not row_by_slot.is_contiguous() or (scores is not None and not scores.is_contiguous()):
        check_contiguous("combine", row_by_slot=row_by_slot, scores=scores)
    hidden_size, stride = rows.shape[1], rows.stride()
    if out is None:
        out = rows.new_empty(num_tokens, hidden_size)
    else:
        check_shape("combine", "out", out, (num_tokens, hidden_size))
    if num_tokens == 0 or hidden_size == 0:
        return out
    if stride[1] != 1:
        rows = row_major(rows)
    by_token: tuple[torch.Tensor | None, ...] = ()
    unrolled = top_k, 0
    if offset_by_token is not None:
        by_token = offset_by_token, slot_by_position
        unrolled = 0, _ragged_unroll(row_by_slot.shape[0], num_tokens)
        check_contiguous(
            "combine", offset_by_token=offset_by_token, slot_by_position=slot_by_position
        )
        check_shape("combine", "offset_by_token", offset_by_token, (num_tokens + 1,))
    elif row_by_slot.shape != (num_tokens * top_k,):
        check_shape("combine", "row_by_slot", row_by_slot, (num_tokens * top_k,))
    strides = rows.stride(0), out.stride(0)
    _launch(num_tokens, hidden_size, rows.itemsize, strides, scores is not None, *unrolled)(
        rows, row_by_slot, scores, *by_token, out
    )
    return out
