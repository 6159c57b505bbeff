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

_MAX_UNROLL = 16  # slots of a token in one round, of which all loads are under way together
_RAGGED_UNROLL = 2, 8  # the same with up to about four slots a token on average, and with more
_IN_FLIGHT = 8  # loads of 16 bytes that a thread may have under way: slots times blocks of columns
# Blocks of columns of one program of a general plan, which looks up its slots once for all of them;
# with fixed top-k, and with four blocks, single ones were as fast or faster.
_MAX_CHUNKS = 3


@triton.jit
def _load_slots(row_by_slot, slot_by_position, first, start, count, UNROLL: tl.constexpr):
    """The next slots of a token and their rows, -1 behind its last slot."""
    slots: tl.tuple = ()
    for step in tl.static_range(UNROLL):
        slot = first.to(tl.int64) + start + step
        if slot_by_position is not None:
            slot = tl.load(slot_by_position + slot, mask=start + step < count, other=0)
        slots = slots + (slot,)
    row_ids: tl.tuple = ()
    for step in tl.static_range(UNROLL):
        inside = start + step < count
        row_ids = row_ids + (tl.load(row_by_slot + slots[step], mask=inside, other=-1),)
    return slots, row_ids


@triton.jit
def _load_rows(
    rows,
    row_ids,
    column,
    hidden_size,
    stride,
    UNROLL: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Blocks of rows as they are stored, slot by slot, zeros for row -1."""
    values: tl.tuple = ()
    for step in tl.static_range(UNROLL):
        limit = tl.where(row_ids[step] >= 0, hidden_size, 0)
        address = rows + row_ids[step].to(tl.int64) * stride + column
        for chunk in tl.static_range(CHUNKS):
            mask = column + chunk * BLOCK_H < limit
            # Every row is read once: keep the cache for what is read again.
            value = tl.load(
                address + chunk * BLOCK_H, mask=mask, other=0.0, eviction_policy="evict_first"
            )
            values = values + (value,)
    return values


@triton.jit
def _load_weights(
    row_by_slot, scores, slots, row_ids, UNROLL: tl.constexpr, HAS_SCORES: tl.constexpr
):
    """What rows are multiplied by, loaded behind the rows.

    Left alone, ptxas may put the sum of one row ahead of the load of the next, which then waits for
    it. No load passes a barrier, and no sum goes ahead of the load of what it multiplies by.
    """
    tl.debug_barrier()
    weights: tl.tuple = ()
    if HAS_SCORES:
        for step in tl.static_range(UNROLL):
            weight = tl.load(scores + slots[step], mask=row_ids[step] >= 0, other=0.0)
            weights = weights + (weight,)
    else:
        # One, which the compiler does not know.
        mask = row_ids[0] >= 0
        one = tl.where(tl.load(row_by_slot + slots[0], mask=mask, other=0) >= 0, 1.0, 0.0)
        for _ in tl.static_range(UNROLL):
            weights = weights + (one,)
    return weights


@triton.jit
def _add_rows(totals, values, weights, UNROLL: tl.constexpr, CHUNKS: tl.constexpr):
    """Add slots one after another, in fp32."""
    sums: tl.tuple = ()
    for chunk in tl.static_range(CHUNKS):
        total = totals[chunk]
        for step in tl.static_range(UNROLL):
            total += values[step * CHUNKS + chunk].to(tl.float32) * weights[step]
        sums = sums + (total,)
    return sums


@triton.jit
def _zeros(CHUNKS: tl.constexpr, BLOCK_H: tl.constexpr):
    totals: tl.tuple = ()
    for _ in tl.static_range(CHUNKS):
        totals = totals + (tl.zeros([BLOCK_H], tl.float32),)
    return totals


@triton.jit
def _place(PROGRAMS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_H: tl.constexpr):
    """The token of a program, one of ``PROGRAMS`` of it, and the columns of its first block."""
    token = (tl.program_id(0) // PROGRAMS).to(tl.int64)
    column = (tl.program_id(0) % PROGRAMS) * (CHUNKS * BLOCK_H) + tl.arange(0, BLOCK_H)
    return token, column


@triton.jit
def _store(out, totals, column, hidden_size, CHUNKS: tl.constexpr, BLOCK_H: tl.constexpr):
    for chunk in tl.static_range(CHUNKS):
        mask = column + chunk * BLOCK_H < hidden_size
        value = totals[chunk].to(out.dtype.element_ty)
        tl.store(out + column + chunk * BLOCK_H, value, mask=mask)


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
    PROGRAMS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    wait_for_earlier_launches()
    token, column = _place(PROGRAMS, CHUNKS, BLOCK_H)
    totals = _zeros(CHUNKS, BLOCK_H)
    for start in range(0, TOP_K, UNROLL):
        slots, row_ids = _load_slots(row_by_slot, None, token * TOP_K, start, TOP_K, UNROLL)
        values = _load_rows(rows, row_ids, column, hidden_size, stride, UNROLL, CHUNKS, BLOCK_H)
        weights = _load_weights(row_by_slot, scores, slots, row_ids, UNROLL, HAS_SCORES)
        totals = _add_rows(totals, values, weights, UNROLL, CHUNKS)
    _store(out + token * out_stride, totals, column, hidden_size, CHUNKS, BLOCK_H)


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
    PROGRAMS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    wait_for_earlier_launches()
    token, column = _place(PROGRAMS, CHUNKS, BLOCK_H)
    totals = _zeros(CHUNKS, BLOCK_H)
    first = tl.load(offset_by_token + token)
    # Counted from zero: position + UNROLL could leave int32 near 2^31 slots.
    count = tl.load(offset_by_token + token + 1) - first
    slots, row_ids = _load_slots(row_by_slot, slot_by_position, first, 0, count, UNROLL)
    for start in range(0, count, UNROLL):
        values = _load_rows(rows, row_ids, column, hidden_size, stride, UNROLL, CHUNKS, BLOCK_H)
        # Ahead of the barrier, so that the next rows wait for no slots.
        next_slots, next_row_ids = _load_slots(
            row_by_slot, slot_by_position, first, start + UNROLL, count, UNROLL
        )
        weights = _load_weights(row_by_slot, scores, slots, row_ids, UNROLL, HAS_SCORES)
        totals = _add_rows(totals, values, weights, UNROLL, CHUNKS)
        slots, row_ids = next_slots, next_row_ids
    _store(out + token * out_stride, totals, column, hidden_size, CHUNKS, BLOCK_H)


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
    blocks = cdiv(hidden_size, block_h)
    unroll = ragged_unroll or next(n for n in range(_MAX_UNROLL, 0, -1) if top_k % n == 0)
    chunks = 1 if top_k else _chunks(blocks, unroll)
    options = {
        "UNROLL": unroll,
        "HAS_SCORES": has_scores,
        "PROGRAMS": cdiv(blocks, chunks),
        "CHUNKS": chunks,
        "BLOCK_H": block_h,
        "num_warps": max(1, block_h // (32 * vector)),  # one 16-byte load per thread and block
    }
    kernel = _combine.bind(TOP_K=top_k, **options) if top_k else _combine_ragged.bind(**options)
    return kernel.fix(num_tokens * cdiv(blocks, chunks), hidden_size, *strides)


def _chunks(blocks: int, unroll: int) -> int:
    """Blocks of columns of a program, of ``blocks`` of a row, if ``unroll`` slots are loaded at
    once: as many as a thread may have loads under way, spread evenly over programs."""
    most = max(1, min(_MAX_CHUNKS, _IN_FLIGHT // unroll))
    return cdiv(blocks, cdiv(blocks, most))


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
