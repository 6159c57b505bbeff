"""Scores in row order, and their gradient in slot order.

    ds[s] = sum_n ds_partial[n, row(s)]  (+ <dout[token], b2[expert]>)

The partial sums are those of the down projection's backward kernel, <dout W2, act(h)> over a tile
of I each (SonicMoE, arXiv 2512.14080: the inner product runs over I and needs no saved expert
output). That product leaves out the output bias, which is added here.
"""

import functools

import torch
import triton
import triton.language as tl

from sonic.runtime.errors import ArgumentError, DTypeError
from sonic.triton.common import (
    cdiv,
    check_contiguous,
    check_float,
    check_shape,
    row_major,
)
from sonic.triton.launch import Fixed, Launcher, wait_for_earlier_launches


@triton.jit
def _expert_of_row(offset_by_expert, row, num_experts, STEPS: tl.constexpr):
    """The least e with offset[e + 1] > row, by bisection; empty experts are passed over."""
    low = tl.zeros_like(row)
    high = low + (num_experts - 1)
    for _ in range(STEPS):
        middle = (low + high) // 2
        beyond = tl.load(offset_by_expert + middle + 1) <= row
        low = tl.where(beyond & (low < high), middle + 1, low)
        high = tl.where(beyond, high, middle)
    return low


@triton.jit(do_not_specialize=["num_slots", "num_partials", "num_rows"])
def _score_grad_kernel(
    ds_partial,
    row_by_slot,
    dout,
    b2,
    token_by_row,
    offset_by_expert,
    dscores,
    num_slots,
    num_partials,
    num_rows,
    num_experts,
    hidden_size,
    stride_dout,
    stride_b2,
    HAS_BIAS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    wait_for_earlier_launches()
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(row_by_slot + slot, mask=slot < num_slots, other=-1)
    live = row >= 0
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(0, num_partials):
        total += tl.load(ds_partial + num_rows.to(tl.int64) * part + row, mask=live, other=0.0)
    if HAS_BIAS:
        token = tl.load(token_by_row + row, mask=live, other=0).to(tl.int64)
        expert = _expert_of_row(offset_by_expert, row, num_experts, STEPS).to(tl.int64)
        product = tl.zeros([BLOCK, BLOCK_H], tl.float32)
        for start in range(0, hidden_size, BLOCK_H):
            column = start + tl.arange(0, BLOCK_H)[None, :]
            mask = live[:, None] & (column < hidden_size)
            left = tl.load(dout + token[:, None] * stride_dout + column, mask=mask, other=0.0)
            right = tl.load(b2 + expert[:, None] * stride_b2 + column, mask=mask, other=0.0)
            product += left.to(tl.float32) * right.to(tl.float32)
        total += tl.sum(product, axis=1)
    tl.store(dscores + slot, total, mask=slot < num_slots)


@triton.jit(do_not_specialize=["num_rows"])
def _gather_scores_kernel(scores, slot_by_row, score_by_row, num_rows, BLOCK: tl.constexpr):
    wait_for_earlier_launches()
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_by_row + row, mask=row < num_rows, other=-1)
    score = tl.load(scores + slot, mask=slot >= 0, other=0.0)
    tl.store(score_by_row + row, score, mask=row < num_rows)


_score_grad = Launcher(_score_grad_kernel, overlapping=True)
_gather_scores = Launcher(_gather_scores_kernel, overlapping=True)


@functools.lru_cache(maxsize=4096)
def _gather_launch(num_rows: int) -> Fixed:
    block = 512
    return _gather_scores.bind(BLOCK=block, num_warps=4).fix(cdiv(num_rows, block), num_rows)


@functools.lru_cache(maxsize=4096)
def _grad_launch(
    num_slots: int,
    partials_shape: tuple[int, int],
    num_experts: int,
    hidden_size: int,
    strides: tuple[int, int],
) -> Fixed:
    """With the term of an output bias, unless ``hidden_size`` is 0."""
    has_bias = hidden_size > 0
    block = 8 if has_bias else 256
    kernel = _score_grad.bind(
        HAS_BIAS=has_bias,
        STEPS=(num_experts - 1).bit_length(),
        BLOCK=block,
        BLOCK_H=512,
        num_warps=4,
    )
    integers = num_slots, *partials_shape, num_experts, hidden_size, *strides
    return kernel.fix(cdiv(num_slots, block), *integers)


def gather_scores(scores: torch.Tensor, slot_by_row: torch.Tensor) -> torch.Tensor:
    """Scores in row order.

    Args:
        scores: S in fp32, by slot, in any shape.
        slot_by_row: (R,) int32.

    Returns:
        (R,) fp32; 0 where the row has no slot.
    """
    if scores.dtype is not torch.float32:
        raise DTypeError(f"gather_scores: scores has dtype {scores.dtype}, expected float32.")
    if not (scores.is_contiguous() and slot_by_row.is_contiguous()):
        check_contiguous("gather_scores", scores=scores, slot_by_row=slot_by_row)
    num_rows = slot_by_row.numel()
    score_by_row = scores.new_empty(num_rows)
    if num_rows:
        _gather_launch(num_rows)(scores, slot_by_row, score_by_row)
    return score_by_row


def score_grad(
    ds_partial: torch.Tensor,
    row_by_slot: torch.Tensor,
    dout: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    token_by_row: torch.Tensor | None = None,
    offset_by_expert: torch.Tensor | None = None,
) -> torch.Tensor:
    """Finish the score gradient: sum the partials of each slot's row, add the bias term if there is
    one.

    Args:
        ds_partial: (n, R) fp32. Columns of no slot are never read.
        row_by_slot: (S,) int32, -1 where the slot is dropped.
        dout: (T, H) bf16, fp16 or fp32; read with ``b2`` only.
        b2: (E, H) output bias, or None.
        token_by_row: (R,) int32, with ``b2``.
        offset_by_expert: (E+1,) int32, with ``b2``.

    Returns:
        (S,) fp32 in slot order, 0 for dropped slots. Sums in ascending order of n and a fixed order
        over H.
    """
    if ds_partial.dtype is not torch.float32:
        raise DTypeError(f"score_grad: ds_partial has dtype {ds_partial.dtype}, expected float32.")
    num_experts, hidden_size, strides = 1, 0, (0, 0)
    if b2 is None:
        dout = token_by_row = offset_by_expert = None
    else:
        if dout is None or token_by_row is None or offset_by_expert is None:
            raise ArgumentError("score_grad: b2 needs dout, token_by_row and offset_by_expert.")
        check_float("score_grad", dout=dout, b2=b2)
        num_experts, hidden_size = b2.shape
        check_shape("score_grad", "dout", dout, (dout.shape[0], hidden_size))
        check_shape("score_grad", "offset_by_expert", offset_by_expert, (num_experts + 1,))
        dout, b2 = row_major(dout), row_major(b2)
        strides = dout.stride(0), b2.stride(0)
        check_contiguous("score_grad", token_by_row=token_by_row, offset_by_expert=offset_by_expert)
    if not (ds_partial.is_contiguous() and row_by_slot.is_contiguous()):
        check_contiguous("score_grad", ds_partial=ds_partial, row_by_slot=row_by_slot)
    num_slots = row_by_slot.numel()
    dscores = ds_partial.new_empty(num_slots)
    if num_slots:
        _grad_launch(num_slots, ds_partial.shape, num_experts, hidden_size, strides)(
            ds_partial, row_by_slot, dout, b2, token_by_row, offset_by_expert, dscores
        )
    return dscores
