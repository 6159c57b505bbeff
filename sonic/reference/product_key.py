"""Product-key routing in torch: experts are pairs of keys, one from each half of the logits.

Expert ``i * n + j`` has the logit ``a_i + b_j`` of the halves ``a`` and ``b`` (n keys each). The
``top_k`` best pairs are made of the ``top_k`` best keys of either half.

Source: Lample et al. (arXiv 1907.05242); PEER (arXiv 2407.04153).
"""

import torch
from torch import Tensor

from sonic.reference.numerics import accumulator_dtype


def _best(values: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    ranked = torch.sort(values, dim=-1, descending=True, stable=True)
    return ranked.values[..., :top_k], ranked.indices[..., :top_k]


def product_key_reference(
    logits: Tensor, top_k: int, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Winners among the n^2 pairs; differentiable by autograd.

    Args:
        logits: (T, 2, n) floating point. top_k: at most n.
        renormalize: weights are the softmax over the winners, else over all pairs.

    Returns:
        ``scores`` (T, top_k) fp32 (fp64 for fp64 logits), ``ids`` (T, top_k) int32, and ``lse``
        (T, 2), the logsumexp of either half. Equal sums go to the lower pair.
    """
    values = logits.to(accumulator_dtype(logits.dtype))
    size = logits.shape[2]
    best, keys = _best(values, top_k)
    sums = (best[:, 0, :, None] + best[:, 1, None, :]).flatten(1)
    pairs = (keys[:, 0, :, None] * size + keys[:, 1, None, :]).flatten(1)
    # By pair first: the stable sort by sum then leaves equal sums in that order.
    pairs, order = torch.sort(pairs, dim=1)
    chosen, place = _best(sums.gather(1, order), top_k)
    ids = pairs.gather(1, place).to(torch.int32)
    lse = torch.logsumexp(values, dim=2)
    if renormalize:
        return torch.softmax(chosen, dim=1), ids, lse
    return torch.exp(chosen - lse.sum(dim=1, keepdim=True)), ids, lse


def product_key_grad_reference(
    dscores: Tensor, logits: Tensor, scores: Tensor, ids: Tensor, renormalize: bool
) -> Tensor:
    """Gradient of the scores with respect to the logits: (T, 2, n) in their dtype."""
    values = logits.to(accumulator_dtype(logits.dtype))
    size = logits.shape[2]
    mean = (dscores * scores).sum(dim=1, keepdim=True)
    direct = scores * (dscores - mean) if renormalize else scores * dscores
    keys = torch.stack([ids // size, ids % size], dim=1).long()
    both = direct.to(values.dtype)[:, None].expand(-1, 2, -1)
    gradient = torch.zeros_like(values).scatter_add(2, keys, both)
    if not renormalize:
        gradient = gradient - mean[..., None].to(values.dtype) * torch.softmax(values, dim=2)
    return gradient.to(logits.dtype)
