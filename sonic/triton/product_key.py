"""Product-key routing: winners among the n^2 pairs of keys, and the gradient.

The operation is that of :mod:`sonic.reference.product_key`. One program takes a few tokens: the
best ``top_k`` keys of either half, their ``top_k^2`` sums, and the best of those.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from sonic.triton.common import check_float, device_of
from sonic.triton.topk import HIGHEST, LOWEST, _select, _sortable, _value_of


@triton.jit
def _best_keys(
    logits,
    row,
    num_rows,
    half,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keys and logits of one half's winners, and the half's logsumexp."""
    column = tl.arange(0, BLOCK)
    inside = (row < num_rows)[:, None] & (column < SIZE)[None, :]
    address = logits + (row.to(tl.int64)[:, None] * 2 + half) * SIZE + column[None, :]
    value = tl.load(address, mask=inside, other=float("-inf")).to(tl.float32)
    key = tl.where((column < SIZE)[None, :], _sortable(value), LOWEST)
    index = tl.broadcast_to(column[None, :], [ROWS, BLOCK])
    best, winner, _ = _select(key, index, TOP_K, K_PAD, ROWS)
    top = tl.max(value, axis=1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    lse = shift + tl.log(tl.sum(tl.exp(value - shift[:, None]), axis=1))
    return best, winner, lse


@triton.jit(do_not_specialize=["num_rows"])
def _product_key_kernel(
    logits,
    scores,
    ids,
    lse_by_row,
    num_rows,
    RENORMALIZE: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    best_a, key_a, lse_a = _best_keys(logits, row, num_rows, 0, SIZE, TOP_K, K_PAD, ROWS, BLOCK)
    best_b, key_b, lse_b = _best_keys(logits, row, num_rows, 1, SIZE, TOP_K, K_PAD, ROWS, BLOCK)
    lane = tl.arange(0, K_PAD)
    is_pair = (lane < TOP_K)[:, None] & (lane < TOP_K)[None, :]
    sums = _value_of(best_a)[:, :, None] + _value_of(best_b)[:, None, :]
    key = tl.where(is_pair[None, :, :], _sortable(sums), LOWEST)
    pair = tl.where(is_pair[None, :, :], key_a[:, :, None] * SIZE + key_b[:, None, :], HIGHEST)
    key = tl.reshape(key, [ROWS, K_PAD * K_PAD])
    pair = tl.reshape(pair, [ROWS, K_PAD * K_PAD])
    best, winner, _ = _select(key, pair, TOP_K, K_PAD, ROWS)

    is_slot = (row < num_rows)[:, None] & (lane < TOP_K)[None, :]
    chosen = tl.where((lane < TOP_K)[None, :], _value_of(best), float("-inf"))
    if RENORMALIZE:
        score = tl.exp(chosen - tl.max(chosen, axis=1)[:, None])
        score = score / tl.sum(score, axis=1)[:, None]
    else:
        score = tl.exp(chosen - (lse_a + lse_b)[:, None])
    slot = row.to(tl.int64)[:, None] * TOP_K + lane[None, :]
    tl.store(scores + slot, score, mask=is_slot)
    tl.store(ids + slot, winner, mask=is_slot)
    tl.store(lse_by_row + row * 2, lse_a, mask=row < num_rows)
    tl.store(lse_by_row + row * 2 + 1, lse_b, mask=row < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _product_key_grad_kernel(
    dscores,
    logits,
    scores,
    ids,
    lse_by_row,
    dlogits,
    num_rows,
    RENORMALIZE: tl.constexpr,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The second grid axis is the half."""
    half = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, K_PAD)[None, :]
    is_slot = (row < num_rows)[:, None] & (lane < TOP_K)
    slot = row.to(tl.int64)[:, None] * TOP_K + lane
    grad = tl.load(dscores + slot, mask=is_slot, other=0.0)
    score = tl.load(scores + slot, mask=is_slot, other=0.0)
    winner = tl.load(ids + slot, mask=is_slot, other=0)
    key = tl.where(half == 0, winner // SIZE, winner % SIZE)
    mean = tl.sum(grad * score, axis=1)
    direct = score * grad
    if RENORMALIZE:
        direct = score * (grad - mean[:, None])

    column = tl.arange(0, BLOCK)[None, :]
    result = tl.zeros([ROWS, BLOCK], tl.float32)
    for rank in range(TOP_K):
        target = tl.sum(tl.where(lane == rank, key, 0), axis=1)
        value = tl.sum(tl.where(lane == rank, direct, 0.0), axis=1)
        result += tl.where(column == target[:, None], value[:, None], 0.0)
    inside = (row < num_rows)[:, None] & (column < SIZE)
    offset = (row.to(tl.int64)[:, None] * 2 + half) * SIZE + column
    if not RENORMALIZE:
        value = tl.load(logits + offset, mask=inside, other=float("-inf")).to(tl.float32)
        lse = tl.load(lse_by_row + row * 2 + half, mask=row < num_rows, other=0.0)
        result -= mean[:, None] * tl.exp(value - lse[:, None])
    tl.store(dlogits + offset, result.to(dlogits.dtype.element_ty), mask=inside)


def _block(size: int, top_k: int) -> dict[str, int]:
    k_pad, block = triton.next_power_of_2(top_k), triton.next_power_of_2(size)
    rows = max(1, 512 // max(block, k_pad * k_pad))
    return {
        "SIZE": size,
        "TOP_K": top_k,
        "K_PAD": k_pad,
        "ROWS": rows,
        "BLOCK": block,
        "num_warps": max(1, min(8, rows * max(block, k_pad * k_pad) // 512)),
    }


def product_key(
    logits: torch.Tensor, top_k: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``scores (T, top_k)``, ``ids (T, top_k)`` and ``lse (T, 2)`` of logits (T, 2, n); T > 0."""
    check_float("product_key", logits=logits)
    logits = logits.contiguous()
    num_rows, _, size = logits.shape
    options: dict[str, Any] = {"dtype": torch.float32, "device": logits.device}
    scores = torch.empty(num_rows, top_k, **options)
    ids = torch.empty(num_rows, top_k, dtype=torch.int32, device=logits.device)
    lse = torch.empty(num_rows, 2, **options)
    block = _block(size, top_k)
    with device_of(logits):
        _product_key_kernel[(triton.cdiv(num_rows, block["ROWS"]),)](
            logits, scores, ids, lse, num_rows, RENORMALIZE=renormalize, **block
        )
    return scores, ids, lse


def product_key_grad(
    dscores: torch.Tensor,
    logits: torch.Tensor,
    scores: torch.Tensor,
    ids: torch.Tensor,
    lse: torch.Tensor,
    renormalize: bool,
) -> torch.Tensor:
    """Gradient of the scores with respect to the logits, (T, 2, n) of their dtype; T > 0."""
    check_float("product_key_grad", logits=logits)
    logits = logits.contiguous()
    num_rows, _, size = logits.shape
    dlogits = torch.empty_like(logits)
    block = _block(size, scores.shape[1])
    with device_of(logits):
        _product_key_grad_kernel[(triton.cdiv(num_rows, block["ROWS"]), 2)](
            dscores.contiguous(),
            logits,
            scores,
            ids,
            lse,
            dlogits,
            num_rows,
            RENORMALIZE=renormalize,
            **block,
        )
    return dlogits
