"""The whole layer from its equations: the oracle that everything else is compared with.

Written for reading and for autograd in float64, one expert at a time, with PyTorch's own
activations; it shares no code with the stages or their derivatives.

For token t and each of its pairs (expert e, weight s), with f the activation:
``h = w1[e] x[t] + b1[e]``, ``y = w2[e] f(h) + b2[e]``, ``out[t] += s y``.

Sizes: T tokens, H hidden, I intermediate, E experts, S pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic.enums import ActivationType, GateUpLayout, ScoreOrder
from sonic.reference.low_precision import experts_low_precision
from sonic.reference.routing import scores_of, topk_scores


def experts_flat_reference(
    x: Tensor,
    token_ids: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: ActivationType = ActivationType.SWIGLU,
    layout: GateUpLayout = GateUpLayout.INTERLEAVED,
) -> Tensor:
    """Experts over any list of (token, expert, weight) pairs.

    Args:
        x: (T, H), the dtype that everything is computed in.
        token_ids, expert_ids: (S,) integers in any order; a pair with either id out of range is
            ignored.
        weights: (S,) floating point.
        w1: (E, 2I, H) if the activation is gated, else (E, I, H); b1: (E, 2I | I) or ``None``.
        w2: (E, H, I); b2: (E, H) or ``None``.
        activation: a member or value of :class:`~sonic.enums.ActivationType`.
        layout: order of gate and up rows in ``w1`` and ``b1``; ignored if not gated.

    Returns:
        (T, H); zero for a token without a valid pair. Differentiable in every floating argument.
    """
    activation = ActivationType(activation)
    num_tokens, num_experts = x.shape[0], w1.shape[0]
    out = x.new_zeros((num_tokens, w2.shape[1]))
    valid_token = (token_ids >= 0) & (token_ids < num_tokens)
    for expert in range(num_experts):
        (pair,) = torch.where(valid_token & (expert_ids == expert))
        token = token_ids[pair].long()
        h = x[token] @ w1[expert].T
        if b1 is not None:
            h = h + b1[expert]
        y = _activate(h, activation, layout) @ w2[expert].T
        if b2 is not None:
            y = y + b2[expert]
        out = out.index_add(0, token, weights[pair, None].to(y.dtype) * y)
    return out


def experts_reference(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: ActivationType = ActivationType.SWIGLU,
    layout: GateUpLayout = GateUpLayout.INTERLEAVED,
) -> Tensor:
    """Experts over a (T, top_k) table of ids and weights; see :func:`experts_flat_reference`.

    Ids outside ``[0, E)`` are ignored.
    """
    token_ids = torch.arange(x.shape[0], device=x.device).repeat_interleave(topk_ids.shape[1])
    return experts_flat_reference(
        x,
        token_ids,
        topk_ids.flatten(),
        topk_weights.flatten(),
        w1,
        w2,
        b1,
        b2,
        activation,
        layout,
    )


def moe_reference(
    x: Tensor,
    router_weight: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    top_k: int,
    score_order: ScoreOrder = ScoreOrder.SOFTMAX_OVER_TOPK,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: ActivationType = ActivationType.SWIGLU,
    layout: GateUpLayout = GateUpLayout.INTERLEAVED,
    topk_ids: Tensor | None = None,
    low_precision: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Router and experts: ``logits = x router_weight^T``, top-k scores, experts.

    Args:
        x: (T, H); router_weight: (E, H); w1, w2, b1, b2, activation, layout: as in
            :func:`experts_flat_reference`.
        top_k: experts per token.
        score_order: see :func:`~sonic.reference.routing.topk_scores`.
        topk_ids: (T, top_k) winners to use in place of the router's own choice, so that a run in
            another dtype, whose near ties may fall differently, stays comparable.
        low_precision: run the experts with the rounding points of the kernels.

    Returns:
        ``out`` (T, H), ``logits`` (T, E) in the dtype of ``x`` and ``expert_frequency`` (E,) int32.
    """
    logits = x @ router_weight.T
    if topk_ids is None:
        scores, ids = topk_scores(logits, top_k, score_order)
    else:
        scores, ids = scores_of(logits, topk_ids, score_order), topk_ids
    experts = experts_low_precision if low_precision else experts_reference
    out = experts(x, ids, scores, w1, w2, b1, b2, activation, layout)
    frequency = torch.bincount(ids.flatten(), minlength=w1.shape[0]).to(torch.int32)
    return out, logits, frequency


def grouped_mm_reference(
    rows: Tensor, weight: Tensor, offset_by_expert: Tensor, bias: Tensor | None = None
) -> Tensor:
    """``out[r] = weight[e] rows[r] + bias[e]`` for the rows r of every expert e.

    Args:
        rows: (R, K); weight: (E, N, K); bias: (E, N) or ``None``.
        offset_by_expert: (E + 1,) integers from 0, not decreasing, at most R.

    Returns:
        (R, N), zero in rows past the last expert. Differentiable in every floating argument.
    """
    bounds = offset_by_expert.tolist()
    blocks = []
    for expert, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        block = rows[start:stop] @ weight[expert].T
        blocks.append(block if bias is None else block + bias[expert])
    blocks.append(rows.new_zeros((rows.shape[0] - bounds[-1], weight.shape[1])))
    return torch.cat(blocks)


def _activate(h: Tensor, activation: ActivationType, layout: GateUpLayout) -> Tensor:
    if not activation.is_gated:
        match activation:
            case ActivationType.RELU_SQ:
                return F.relu(h) ** 2
            case ActivationType.RELU:
                return F.relu(h)
            case ActivationType.SILU:
                return F.silu(h)
            case ActivationType.GELU:
                return F.gelu(h)
            case ActivationType.GELU_TANH:
                return F.gelu(h, approximate="tanh")
    half = h.shape[1] // 2
    if GateUpLayout(layout) is GateUpLayout.INTERLEAVED:
        gate, up = h[:, 0::2], h[:, 1::2]
    else:
        gate, up = h[:, :half], h[:, half:]
    match activation:
        case ActivationType.SWIGLU:
            return up * F.silu(gate)
        case ActivationType.SWIGLU_OAI:
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            return (up + 1.0) * gate * torch.sigmoid(1.702 * gate)
        case ActivationType.GEGLU:
            return up * F.gelu(gate)
        case ActivationType.GEGLU_TANH:
            return up * F.gelu(gate, approximate="tanh")
        case ActivationType.REGLU:
            return up * F.relu(gate)
    raise NotImplementedError(f"no formula for activation {activation.value}")
