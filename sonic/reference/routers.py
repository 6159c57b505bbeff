"""What the router kernels compute, in torch: winners, weights, balance sums and their gradients.

With ``v = logits + mask`` in fp32 (fp64 for fp64 logits) and ``s`` the score of each column::

    choice  = v, or s + bias if there is a bias or groups are ranked by a sum; -inf where v is
              -inf and outside of the best groups
    ids     = the top_k largest choices, equal ones in ascending column order
    weights = scale * s[ids], divided by their sum if renormalised

A winner whose choice is -inf has id -1 (nothing was left to choose), and it and every null expert
has weight 0 and no part in the sum. ``p`` is ``s`` scaled to sum to one over the columns. The
bias enters the choice only.

Sizes: T tokens, E columns of the logits, S sequences of T / S tokens, ``top_k`` winners.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic.reference.numerics import accumulator_dtype
from sonic.runtime.route import Route, ScoreFunction

EPSILON = 1e-20  # under a renormalising sum, as in the published DeepSeek-V3 router


class Routed(NamedTuple):
    """Results of :func:`route`, floats in fp32 (fp64 for fp64 logits), integers in int32.

    Attributes:
        scores, ids: (T, top_k) weights of the winners and their columns.
        lse: (T,) logsumexp of ``v``; -inf for a token that may go nowhere.
        prob_sum: (S, E) sum of ``p`` over a sequence's tokens.
        load: (S, E) winners of each column; null experts have theirs.
        live: (S,) tokens with a finite ``v``.
        z_sum: () sum of ``lse ** 2`` over them.
        entropy_sum: () sum of ``-sum_e p log p`` over them; no gradient.
    """

    scores: Tensor
    ids: Tensor
    lse: Tensor
    prob_sum: Tensor
    load: Tensor
    live: Tensor
    z_sum: Tensor
    entropy_sum: Tensor


class Losses(NamedTuple):
    """Scalars of :func:`balance_losses`."""

    switch: Tensor
    sequence: Tensor
    z: Tensor
    entropy: Tensor


def masked_logits(logits: Tensor, mask: Tensor | None) -> Tensor:
    values = logits.to(accumulator_dtype(logits.dtype))
    return values if mask is None else values + mask.to(values.dtype)


def _live(values: Tensor) -> Tensor:
    """(..., E) to (...,): tokens that may go somewhere."""
    return ~(values == -torch.inf).all(dim=-1)


def score_of(values: Tensor, score: str) -> Tensor:
    """Scores of logits (..., E); a row of nothing but -inf scores zero."""
    if score == ScoreFunction.SOFTMAX:
        live = _live(values)[..., None]
        return torch.softmax(torch.where(live, values, 0.0), dim=-1) * live
    if score == ScoreFunction.SIGMOID:
        return torch.sigmoid(values)
    # The root has no finite slope at zero, which is where -inf leads.
    barred = values == -torch.inf
    root = F.softplus(torch.where(barred, 0.0, values)).sqrt()
    return torch.where(barred, 0.0, root)


def choice_of(values: Tensor, bias: Tensor | None, route: Route) -> Tensor:
    """(T, E): what winners are picked by; no gradient."""
    values = values.detach()
    choice = values
    if bias is not None or (route.num_groups > 1 and route.group_best > 1):
        choice = score_of(values, route.score)
        if bias is not None:
            choice = choice + bias.to(choice.dtype)
        choice = choice.masked_fill(values == -torch.inf, -torch.inf)
    if route.num_groups == 1:
        return choice
    num_tokens, num_columns = choice.shape
    by_group = choice.reshape(num_tokens, route.num_groups, num_columns // route.num_groups)
    best = by_group.sort(dim=-1, descending=True).values[..., : route.group_best]
    rank = torch.where(best == -torch.inf, 0.0, best).sum(dim=-1)
    rank = rank.masked_fill(best[..., 0] == -torch.inf, -torch.inf)
    chosen = rank.sort(dim=-1, descending=True, stable=True).indices[:, : route.topk_groups]
    open_group = torch.zeros_like(rank, dtype=torch.bool).scatter(1, chosen, True)
    return by_group.masked_fill(~open_group[..., None], -torch.inf).reshape(choice.shape)


def winners(choice: Tensor, top_k: int) -> Tensor:
    """(T, top_k) int32; -1 where only -inf was left."""
    ranked = torch.sort(choice, dim=-1, descending=True, stable=True)
    ids = ranked.indices[:, :top_k]
    return torch.where(ranked.values[:, :top_k] == -torch.inf, -1, ids).to(torch.int32)


def _working(ids: Tensor, route: Route) -> Tensor:
    return (ids >= 0) & (ids < route.num_working)


def weights_of(values: Tensor, ids: Tensor, route: Route) -> Tensor:
    """(T, top_k): weights of given winners, differentiable in ``values``."""
    working = _working(ids, route)
    index = torch.where(working, ids, 0).to(torch.int64)
    if route.score == ScoreFunction.SOFTMAX and route.renormalize:
        chosen = values.gather(1, index).masked_fill(~working, -torch.inf)
        return route.scale * score_of(chosen, route.score)
    weights = score_of(values, route.score).gather(1, index)
    weights = torch.where(working, weights, 0.0)
    if route.renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + EPSILON)
    return route.scale * weights


def probabilities(values: Tensor, score: str) -> Tensor:
    """(T, E): scores scaled to sum to one, a row of zeros where there are none."""
    scores = score_of(values, score)
    if score == ScoreFunction.SOFTMAX:
        return scores
    total = scores.sum(dim=-1, keepdim=True)
    return scores / torch.where(total == 0, 1.0, total)


def count_winners(ids: Tensor, num_columns: int, num_sequences: int) -> Tensor:
    """(S, E) int32: winners of each column in each sequence; ids out of range are not counted."""
    by_sequence = ids.reshape(num_sequences, -1).to(torch.int64)
    inside = (by_sequence >= 0) & (by_sequence < num_columns)
    shape = (num_sequences, num_columns + 1)
    count = torch.zeros(shape, dtype=torch.int32, device=ids.device)
    ones = torch.ones((), dtype=torch.int32, device=ids.device).expand(by_sequence.shape)
    count = count.scatter_add(1, torch.where(inside, by_sequence, num_columns), ones)
    return count[:, :num_columns].contiguous()


def route_reference(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, ids: Tensor | None, route: Route
) -> Routed:
    """One routing pass, differentiable in ``logits`` by autograd.

    Args:
        logits: (T, E) floating point.
        bias: (E,) added to the scores for the choice only, or None.
        mask: (T, E) or (1, E) added to the logits, -inf to bar a column, or None.
        ids: (T, top_k) winners decided elsewhere, or None.
        route: the options. ``num_experts`` and ``balance`` are not read.
    """
    values = masked_logits(logits, mask)
    if ids is None:
        ids = winners(choice_of(values, bias, route), route.top_k)
    scores = weights_of(values, ids, route)
    live = _live(values)
    lse = torch.logsumexp(torch.where(live[:, None], values, 0.0), dim=-1)
    prob = probabilities(values, route.score)
    num_columns, num_sequences = logits.shape[1], route.num_sequences
    prob_sum = prob.reshape(num_sequences, -1, num_columns).sum(dim=1)
    squares = torch.where(live, lse, 0.0) ** 2
    with torch.no_grad():
        entropy = -torch.special.xlogy(prob, prob).sum()
        live_count = live.reshape(num_sequences, -1).sum(dim=1).to(torch.int32)
    count = count_winners(ids, num_columns, num_sequences)
    return Routed(
        scores,
        ids.to(torch.int32),
        torch.where(live, lse, -torch.inf),
        prob_sum,
        count,
        live_count,
        squares.sum(),
        entropy,
    )


# ----------------------------------------------------------------------------------- losses


def load_shares(count: Tensor, num_working: int, dtype: torch.dtype) -> Tensor:
    """(..., E): the counts, each null expert's replaced by their mean.

    Null experts are one another's equals, so a loss must not ask them to be used evenly.
    """
    load = count.to(dtype)
    if num_working == load.shape[-1]:
        return load
    null = load[..., num_working:]
    return torch.cat([load[..., :num_working], null.mean(-1, keepdim=True).expand_as(null)], -1)


def loss_weights(
    count: Tensor, live: Tensor, route: Route, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Coefficients (S, E) of ``prob_sum`` in the switch and in the sequence-wise loss."""
    num_sequences, num_columns = count.shape
    load = load_shares(count, route.num_working, dtype)
    tokens = live.sum().to(dtype).clamp(min=1)
    switch = (load.sum(dim=0) * (num_columns / (route.top_k * tokens**2))).expand_as(load)
    length = live.to(dtype).clamp(min=1)[:, None]
    sequence = load * (num_columns / (route.top_k * num_sequences * length**2))
    return switch, sequence


def balance_losses(
    prob_sum: Tensor,
    count: Tensor,
    live: Tensor,
    z_sum: Tensor,
    entropy_sum: Tensor,
    route: Route,
) -> Losses:
    """Losses of the sums that :func:`route_reference` returns; one is an even load.

    ``switch``: ``E / (top_k T^2) * sum_e count_e prob_e``; ``sequence``: the same within each
    sequence, averaged; ``z``: mean squared logsumexp. ``entropy``: mean entropy of ``p``.
    """
    switch, sequence = loss_weights(count, live, route, prob_sum.dtype)
    tokens = live.sum().to(prob_sum.dtype).clamp(min=1)
    return Losses(
        (switch * prob_sum).sum(),
        (sequence * prob_sum).sum(),
        z_sum / tokens,
        entropy_sum / tokens,
    )


# -------------------------------------------------------------------------------- gradients


def _slope(values: Tensor, scores: Tensor, score: str) -> Tensor:
    """ds/dv of a pointwise score."""
    if score == ScoreFunction.SIGMOID:
        return scores * (1 - scores)
    safe = torch.where(scores > 0, scores, 1.0)
    return torch.where(scores > 0, torch.sigmoid(values) / (2 * safe), 0.0)


def _weights_grad(
    dscores: Tensor, values: Tensor, scores: Tensor, ids: Tensor, route: Route
) -> Tensor:
    """Gradient of :func:`weights_of` with respect to ``values`` (T, E)."""
    working = _working(ids, route)
    index = torch.where(working, ids, 0).to(torch.int64)
    mean = (dscores * scores).sum(dim=-1, keepdim=True)
    full = torch.zeros_like(values)
    if route.score == ScoreFunction.SOFTMAX:
        if not route.renormalize:
            return full.scatter_add(1, index, scores * dscores) - mean * score_of(values, "softmax")
        return full.scatter_add(1, index, scores * (dscores - mean / route.scale))
    winner = values.gather(1, index)
    s = score_of(winner, route.score)
    ds = route.scale * dscores
    if route.renormalize:
        total = torch.where(working, s, 0.0).sum(dim=-1, keepdim=True) + EPSILON
        ds = (ds - mean) / total
    ds = torch.where(working, ds * _slope(winner, s, route.score), 0.0)
    return full.scatter_add(1, index, ds)


def route_grad_reference(
    dscores: Tensor | None,
    weight: Tensor | None,
    dz_sum: Tensor | None,
    logits: Tensor,
    mask: Tensor | None,
    scores: Tensor,
    ids: Tensor,
    route: Route,
) -> Tensor:
    """Gradient of :func:`route_reference` with respect to the logits, (T, E) in their dtype.

    Args:
        dscores: (T, top_k), gradient of the weights, or None.
        weight: (S, E), gradient of ``prob_sum``, or None.
        dz_sum: (), gradient of ``z_sum``, or None.
        logits, mask: as given to the forward.
        scores, ids: (T, top_k), as returned by it.
    """
    values = masked_logits(logits, mask)
    dlogits = torch.zeros_like(values)
    if dscores is not None:
        dlogits = _weights_grad(dscores.to(values.dtype), values, scores, ids, route)
    if weight is not None:
        prob = probabilities(values, route.score)
        length = logits.shape[0] // route.num_sequences
        dprob = weight.to(values.dtype).repeat_interleave(length, dim=0)
        dprob = dprob - (dprob * prob).sum(dim=-1, keepdim=True)
        if route.score == ScoreFunction.SOFTMAX:
            dlogits = dlogits + prob * dprob
        else:
            s = score_of(values, route.score)
            total = s.sum(dim=-1, keepdim=True)
            total = torch.where(total == 0, 1.0, total)
            dlogits = dlogits + dprob / total * _slope(values, s, route.score)
    if dz_sum is not None:
        lse = torch.logsumexp(values, dim=-1, keepdim=True)
        lse = torch.where(lse == -torch.inf, 0.0, lse)
        dlogits = dlogits + 2 * dz_sum * lse * score_of(values, "softmax")
    return dlogits.to(logits.dtype)
