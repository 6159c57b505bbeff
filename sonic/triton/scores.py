"""Score functions of a router and their slopes, shared by its forward and backward kernels."""

import torch
import triton
import triton.language as tl

from sonic.runtime.route import ScoreFunction
from sonic.triton.common import row_major

EPSILON = tl.constexpr(1e-20)
SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)

SCORES = {ScoreFunction.SOFTMAX: 0, ScoreFunction.SIGMOID: 1, ScoreFunction.SQRT_SOFTPLUS: 2}


@triton.jit
def _softplus(value):
    # 1 + e rounds; dividing by what is left of e afterwards takes the rounding back.
    e = tl.exp(-tl.abs(value))
    rounded = 1.0 + e
    tiny = rounded == 1.0
    correction = e / tl.where(tiny, 1.0, rounded - 1.0)
    return tl.maximum(value, 0.0) + tl.where(tiny, e, tl.log(rounded) * correction)


@triton.jit
def _pointwise_score(value, SCORE: tl.constexpr):
    if SCORE == SIGMOID:
        return 1.0 / (1.0 + tl.exp(-value))
    else:
        return tl.sqrt(_softplus(value))


@triton.jit
def _slope(value, score, SCORE: tl.constexpr):
    """ds/dv of a pointwise score."""
    if SCORE == SIGMOID:
        return score * (1.0 - score)
    else:
        positive = score > 0.0
        sigmoid = 1.0 / (1.0 + tl.exp(-value))
        return tl.where(positive, sigmoid / (2.0 * tl.where(positive, score, 1.0)), 0.0)


@triton.jit
def _load_values(logits, mask, row, column, inside, stride, mask_stride):
    """fp32 logits plus mask at (row, column), broadcast against each other; -inf outside."""
    row = row.to(tl.int64)
    value = tl.load(logits + row * stride + column, mask=inside, other=float("-inf"))
    value = value.to(tl.float32)
    if mask is not None:
        value += tl.load(mask + row * mask_stride + column, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit
def _probabilities(value, inside, row, is_row, lse_by_row, norm_by_row, SCORE: tl.constexpr):
    """p from a row's stored logsumexp or sum of scores; zero for a token that may go nowhere."""
    if SCORE == SOFTMAX:
        lse = tl.load(lse_by_row + row, mask=is_row, other=0.0)
        return tl.exp(value - tl.where(lse == float("-inf"), 0.0, lse)[:, None])
    else:
        norm = tl.load(norm_by_row + row, mask=is_row, other=1.0)
        score = tl.where(inside, _pointwise_score(value, SCORE), 0.0)
        return score / tl.where(norm == 0.0, 1.0, norm)[:, None]


def row_major_mask(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, int]:
    """The mask with a dense last axis, and the elements from one token's row to the next: 0 if one
    row serves all."""
    if mask is None:
        return None, 0
    mask = row_major(mask)
    return mask, 0 if mask.shape[0] == 1 else mask.stride(0)
