"""Router scores, their gradient and the load-balancing loss in plain torch.

Sizes: T tokens, E experts, ``top_k`` winners per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic.enums import ScoreOrder
from sonic.reference.numerics import accumulator_dtype


def topk_scores(logits: Tensor, top_k: int, order: ScoreOrder) -> tuple[Tensor, Tensor]:
    """Winners of each token and their scores; differentiable in ``logits`` through autograd.

    The winners are the ``top_k`` largest logits for every ``order``, ties going to the lower
    expert, listed from the largest down.

    Args:
        logits: (T, E) floating point, no NaN.
        top_k: winners per token, at most E.
        order: ``softmax_over_topk``: softmax of the winners' logits. ``topk_over_softmax``: softmax
            over all experts, of which the winners' probabilities are kept.
            ``topk_over_softmax_norm``: those, divided by their sum.

    Returns:
        ``scores`` (T, top_k) float32 (float64 for float64 logits) and ``ids`` (T, top_k) int32.
    """
    values = logits.to(accumulator_dtype(logits.dtype))
    # torch.topk leaves the order of equal values open; a stable sort does not.
    ranking = torch.sort(values, dim=-1, descending=True, stable=True).indices
    ids = ranking[:, :top_k].to(torch.int32)
    return scores_of(logits, ids, order), ids


def scores_of(logits: Tensor, ids: Tensor, order: ScoreOrder) -> Tensor:
    """Scores of given winners: the second half of :func:`topk_scores`.

    Args:
        logits: (T, E); ids: (T, top_k) integers, distinct within a token; order: as above.

    Returns:
        (T, top_k) float32 (float64 for float64 logits), differentiable in ``logits``.
    """
    order = ScoreOrder(order)
    values, index = logits.to(accumulator_dtype(logits.dtype)), ids.to(torch.int64)
    if order is ScoreOrder.SOFTMAX_OVER_TOPK:
        return torch.softmax(values.gather(1, index), dim=-1)
    scores = torch.softmax(values, dim=-1).gather(1, index)
    if order is ScoreOrder.TOPK_OVER_SOFTMAX_NORM:
        scores = scores / scores.sum(dim=-1, keepdim=True)
    return scores


def topk_scores_grad(
    dscores: Tensor, logits: Tensor, scores: Tensor, ids: Tensor, order: ScoreOrder
) -> Tensor:
    """Gradient of the logits, given the gradient of :func:`topk_scores`' scores.

    With ``g = dscores`` and ``s = scores``: where the winners' scores sum to one, each winner gets
    ``s (g - <g, s>)`` and every other logit zero. That covers ``topk_over_softmax_norm`` too, since
    a softmax restricted to the winners and renormalised is the softmax of the winners. For
    ``topk_over_softmax`` every logit moves: ``p (dp - <g, s>)`` with ``p`` the full softmax and
    ``dp`` equal to ``g`` at the winners and zero elsewhere.

    Args:
        dscores: (T, top_k).
        logits: (T, E), as given to the forward.
        scores, ids: (T, top_k), as returned by the forward.
        order: as given to the forward.

    Returns:
        (T, E) in ``logits``' dtype, rounded once.
    """
    values = logits.to(accumulator_dtype(logits.dtype))
    g, s = dscores.to(values.dtype), scores.to(values.dtype)
    index = ids.to(torch.int64)
    projection = (g * s).sum(dim=-1, keepdim=True)
    if ScoreOrder(order) is ScoreOrder.TOPK_OVER_SOFTMAX:
        dp = torch.zeros_like(values).scatter(1, index, g)
        dlogits = torch.softmax(values, dim=-1) * (dp - projection)
    else:
        dlogits = torch.zeros_like(values).scatter(1, index, s * (g - projection))
    return dlogits.to(logits.dtype)


def load_balancing_loss(logits: Tensor, expert_frequency: Tensor) -> Tensor:
    """``E * sum_e P_e f_e``: mean router probability times share of the routed rows, per expert.

    Both ``P`` (softmax probabilities summed over tokens) and ``f`` are scaled to sum to one; a
    vector of zeros (no tokens) stays zero. One is the value of a perfectly even load.

    Args:
        logits: (T, E) floating point.
        expert_frequency: (E,) rows routed to each expert, any dtype; no gradient flows into it.

    Returns:
        A scalar in float32 (float64 for float64 logits), differentiable in ``logits``.
    """
    values = logits.to(accumulator_dtype(logits.dtype))
    probability = F.normalize(torch.softmax(values, dim=-1).sum(dim=0), p=1.0, dim=0)
    frequency = F.normalize(expert_frequency.to(values.dtype), p=1.0, dim=0)
    return logits.shape[1] * (probability * frequency).sum()
