"""Gradient of the routing pass with respect to the logits: one kernel."""

import torch
import triton
import triton.language as tl

from sonic.runtime.route import Route, ScoreFunction
from sonic.triton.common import cdiv, check_float, device_of, power_of_2, row_major
from sonic.triton.launch import Launcher, wait_for_earlier_launches
from sonic.triton.scores import (
    EPSILON,
    SCORES,
    SOFTMAX,
    _load_values,
    _pointwise_score,
    _slope,
    row_major_mask,
)


@triton.jit
def _winner_grads(
    dscores,
    logits,
    mask,
    scores,
    ids,
    row,
    is_row,
    stride,
    mask_stride,
    num_working,
    scale,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
):
    """What the weights' gradient gives the winners' own logits (ROWS, K_PAD), the winners, and
    <dscores, scores> (ROWS,)."""
    lane = tl.arange(0, K_PAD)
    slot = row.to(tl.int64)[:, None] * TOP_K + lane[None, :]
    is_slot = is_row[:, None] & (lane < TOP_K)[None, :]
    grad = tl.load(dscores + slot, mask=is_slot, other=0.0)
    weight = tl.load(scores + slot, mask=is_slot, other=0.0)
    winner = tl.load(ids + slot, mask=is_slot, other=-1)
    working = (winner >= 0) & (winner < num_working)
    winner = tl.where(working, winner, -1)
    mean = tl.sum(grad * weight, axis=1)
    if SCORE == SOFTMAX:
        if RENORMALIZE:
            result = weight * (grad - (mean / scale)[:, None])
        else:
            result = weight * grad
    else:
        safe = tl.where(working, winner, 0)
        value = _load_values(logits, mask, row[:, None], safe, working, stride, mask_stride)
        score = _pointwise_score(value, SCORE)
        result = scale * grad
        if RENORMALIZE:
            total = tl.sum(tl.where(working, score, 0.0), axis=1) + EPSILON
            result = (result - mean[:, None]) / total[:, None]
        result = tl.where(working, result * _slope(value, score, SCORE), 0.0)
    return result, winner, mean


@triton.jit
def _row_projection(
    logits,
    mask,
    weight,
    row,
    is_row,
    lse,
    sequence,
    num_columns,
    stride,
    mask_stride,
    SCORE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """<weight, p> and the sum of scores of each row."""
    total = tl.zeros([ROWS], tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = is_row[:, None] & (column < num_columns)
        value = _load_values(logits, mask, row[:, None], column, inside, stride, mask_stride)
        coefficient = tl.load(weight + sequence * num_columns + column, mask=inside, other=0.0)
        if SCORE == SOFTMAX:
            score = tl.exp(value - lse[:, None])
        else:
            score = tl.where(inside, _pointwise_score(value, SCORE), 0.0)
            norm += tl.sum(score, axis=1)
        total += tl.sum(score * coefficient, axis=1)
    if SCORE == SOFTMAX:
        return total, norm
    else:
        norm = tl.where(norm == 0.0, 1.0, norm)
        return total / norm, norm


@triton.jit(do_not_specialize=["num_rows", "rows_per_sequence"])
def _route_grad_kernel(
    logits,
    dscores,
    weight,
    dz_sum,
    mask,
    scores,
    ids,
    lse_by_row,
    dlogits,
    num_rows,
    num_columns,
    rows_per_sequence,
    stride,
    mask_stride,
    num_working,
    scale,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    wait_for_earlier_launches()
    FULL: tl.constexpr = (SCORE == SOFTMAX) and (not RENORMALIZE)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    lse = tl.load(lse_by_row + row, mask=is_row, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    sequence = (row // rows_per_sequence).to(tl.int64)[:, None]
    mean = tl.zeros([ROWS], tl.float32)
    if dscores is not None:
        direct, winner, mean = _winner_grads(
            dscores,
            logits,
            mask,
            scores,
            ids,
            row,
            is_row,
            stride,
            mask_stride,
            num_working,
            scale,
            SCORE,
            RENORMALIZE,
            TOP_K,
            K_PAD,
        )
    if weight is not None:
        projection, norm = _row_projection(
            logits,
            mask,
            weight,
            row,
            is_row,
            lse,
            sequence,
            num_columns,
            stride,
            mask_stride,
            SCORE,
            ROWS,
            BLOCK,
        )
    lane = tl.arange(0, K_PAD)[None, :]
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = is_row[:, None] & (column < num_columns)
        result = tl.zeros([ROWS, BLOCK], tl.float32)
        if dscores is not None:
            for rank in range(TOP_K):
                target = tl.sum(tl.where(lane == rank, winner, 0), axis=1)
                value = tl.sum(tl.where(lane == rank, direct, 0.0), axis=1)
                result += tl.where(column == target[:, None], value[:, None], 0.0)
        if (weight is not None) or (dz_sum is not None) or (FULL and dscores is not None):
            value = _load_values(logits, mask, row[:, None], column, inside, stride, mask_stride)
            factor = tl.zeros([ROWS, BLOCK], tl.float32)
            if FULL and dscores is not None:
                factor -= mean[:, None]
            if dz_sum is not None:
                factor += 2.0 * tl.load(dz_sum) * lse[:, None]
            if weight is not None:
                address = weight + sequence * num_columns + column
                dprob = tl.load(address, mask=inside, other=0.0) - projection[:, None]
                if SCORE == SOFTMAX:
                    factor += dprob
                else:
                    score = _pointwise_score(value, SCORE)
                    result += dprob / norm[:, None] * _slope(value, score, SCORE)
            if (SCORE == SOFTMAX) or (dz_sum is not None):
                result += tl.exp(value - lse[:, None]) * factor
        offset = row.to(tl.int64)[:, None] * num_columns + column
        tl.store(dlogits + offset, result.to(dlogits.dtype.element_ty), mask=inside)


_route_grad = Launcher(_route_grad_kernel, overlapping=True)


def route_grad(
    dscores: torch.Tensor | None,
    weight: torch.Tensor | None,
    dz_sum: torch.Tensor | None,
    logits: torch.Tensor,
    mask: torch.Tensor | None,
    scores: torch.Tensor,
    ids: torch.Tensor,
    lse: torch.Tensor,
    route: Route,
) -> torch.Tensor:
    """Gradient of the routing pass with respect to its logits.

    Args:
        dscores: (T, top_k) fp32 or None. weight: (S, E) fp32, gradient of ``prob_sum``, or None.
        dz_sum: () fp32, gradient of the sum of squared logsumexp, or None.
        logits: (T, E). mask: as in the forward. scores, ids: (T, top_k). lse: (T,).

    Returns:
        (T, E) of the logits' dtype, rounded once; T > 0.
    """
    check_float("route_grad", logits=logits)
    logits = row_major(logits)
    mask, mask_stride = row_major_mask(mask)
    num_rows, num_columns = logits.shape
    dlogits = torch.empty(num_rows, num_columns, dtype=logits.dtype, device=logits.device)
    block = min(power_of_2(num_columns), 2048)
    rows = max(1, 2048 // block)
    with device_of(logits):
        _route_grad(
            cdiv(num_rows, rows),
            logits,
            None if dscores is None else dscores.contiguous(),
            weight,
            dz_sum,
            mask,
            scores,
            ids,
            lse,
            dlogits,
            num_rows,
            num_columns,
            num_rows // route.num_sequences,
            logits.stride(0),
            mask_stride,
            route.num_working,
            float(route.scale),
            SCORE=SCORES[ScoreFunction(route.score)],
            RENORMALIZE=route.renormalize,
            TOP_K=route.top_k,
            K_PAD=power_of_2(route.top_k),
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
        )
    return dlogits
