"""Token rounding from router logits as one operator: weights and plan, and the logits' gradient.

What :func:`sonic.routing.token_rounding_plan` makes of :func:`sonic.routing.rounding_scores`,
without a second (T, E) table in memory: on a GPU three launches forward, four with 257 to 512
experts in 16 bits from 8161 tokens on, five for ``balance-f``, and one backward.

Symbols: T tokens, E experts, S slots.
"""

from typing import Any

import torch
from torch import Tensor

from sonic import checks
from sonic.enums import ScoreOrder
from sonic.plan import RoutingPlan
from sonic.routing.token_rounding import (
    check_generator,
    check_rounding,
    draw_uniform,
    flat_plan,
    most_pairs,
    resolve_tile,
    round_winners,
    triton_kernels,
    warn_of_few_rows,
    weight_dtype,
    winners_of,
)
from sonic.runtime.derivatives import (
    call_eagerly,
    differentiable_function,
    gradient_eagerly,
    register_gradient,
)
from sonic.runtime.eager import remembered

_OP = "rounded_routing"


def rounded_routing(
    logits: Tensor,
    top_k: int,
    tile: int | str,
    rule: str = "nr",
    generator: torch.Generator | None = None,
    *,
    order: ScoreOrder | str = ScoreOrder.SOFTMAX_OVER_TOPK,
) -> tuple[Tensor, RoutingPlan]:
    """Weights and plan of token rounding.

    The pairs are those of :func:`sonic.token_rounding` for the scores of
    :func:`sonic.routing.rounding_scores`, which are the weights.

    Args:
        logits: (T, E) bf16, fp16 or fp32 on any device, any strides, E up to 65,536; T may be 0.
            fp64, and more than 4096 experts, run in torch, which sorts: about 60 bytes for each of
            T E while it does.
        top_k, tile, rule, generator: as in :func:`sonic.token_rounding`. A token chooses the
            experts of its ``top_k`` largest logits, as :func:`sonic.topk_routing` does.
        order: a :class:`~sonic.enums.ScoreOrder` or its value: the scores are those of
            :func:`sonic.routing.rounding_scores`.

    Returns:
        ``weights`` (S,) fp32 (fp64 for fp64 logits), differentiable in the logits, with S as
        :func:`sonic.routing.max_pairs` has it, and the plan of the kept pairs.

    Raises:
        ShapeError: ``logits`` is not a matrix, E is out of range, or S exceeds 2^31 - 1.
        DTypeError: ``logits`` is of another dtype.
        ArgumentError: ``top_k``, ``tile``, ``rule``, ``generator`` or ``order`` is none of these.
        DeviceError: ``generator`` is of another kind of device than ``logits``.
        MissingPackageError: CUDA logits without triton installed.

    Numerics:
        Scores are fp32. The logits' gradient is rounded once. Deterministic for given random
        numbers; nothing waits for the device.

    Memory:
        Backward keeps ``weights``, the pairs' experts, T + 1 offsets (8 S + 4 T bytes), scores and
        ids of the winners and a logsumexp (8 T top_k + 4 T bytes), and the logits, which are the
        caller's, for ``topk_over_softmax``. Of fp64 logits weights, scores and logsumexp take twice
        as much.

    Example:
        >>> logits = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
        >>> weights, plan = rounded_routing(logits, 1, 2, rule="up")
        >>> plan.offset_by_expert.tolist()
        [0, 4, 6]

    Source: SonicMoE (arXiv 2512.14080), section 5, algorithms 4 and 6.
    """
    return rounded_choices(logits, top_k, tile, rule, generator, order=order)[:2]


def rounded_choices(
    logits: Tensor,
    top_k: int,
    tile: int | str,
    rule: str = "nr",
    generator: torch.Generator | None = None,
    *,
    order: ScoreOrder | str = ScoreOrder.SOFTMAX_OVER_TOPK,
) -> tuple[Tensor, RoutingPlan, Tensor]:
    """:func:`rounded_routing`, and ``load`` (E,) int32: tokens that chose each expert, before any
    rounding."""
    tile, full = _checked(logits, top_k, tile, rule, order)
    check_generator(_OP, "logits", logits, generator)
    uniform = draw_uniform(logits, rule, generator)
    inputs = (logits, uniform, top_k, tile, rule, full)
    results = call_eagerly(_ROUNDED_ROUTING, _Function, _forward, inputs)
    weights, _, *plan = results[:7]
    return weights, flat_plan(plan, logits.shape[0]), results[7]


@remembered
def _checked(
    logits: Tensor, top_k: int, tile: int | str, rule: str, order: ScoreOrder | str
) -> tuple[int, bool]:
    """Rows of a tile, and whether scores are over all experts, if the arguments are right."""
    rows = resolve_tile(_OP, tile)
    check_rounding(_OP, "logits", logits, top_k, rows, rule)
    warn_of_few_rows(logits, top_k, rows, rule)
    order = checks.choice(_OP, "order", order, ScoreOrder)
    return rows, order is ScoreOrder.TOPK_OVER_SOFTMAX


# ------------------------------------------------------------------------------ in torch


def _forward_torch(
    logits: Tensor, uniform: Tensor | None, top_k: int, tile: int, rule: str, full: bool
) -> tuple[Tensor, ...]:
    value = logits.to(weight_dtype(logits.dtype))
    winners = winners_of(value, top_k)
    best = value.gather(1, winners)
    lse = (value if full else best).logsumexp(dim=1)
    scores = torch.exp(value - lse[:, None])
    weights, _, expert_ids, *plan = round_winners(scores, winners, uniform, tile, rule)
    load = torch.zeros(logits.shape[1], dtype=torch.int32, device=logits.device)
    flat = winners.flatten()
    load.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    return weights, expert_ids, *plan, load, scores.gather(1, winners), winners.int(), lse


def _backward_torch(
    dweights: Tensor,
    weights: Tensor,
    expert_ids: Tensor,
    offset_by_token: Tensor,
    winner_scores: Tensor,
    winner_ids: Tensor,
    lse: Tensor,
    logits: Tensor | None,
    num_experts: int,
    dtype: torch.dtype,
) -> Tensor:
    num_tokens, num_slots = winner_ids.shape[0], weights.shape[0]
    slots = torch.arange(num_slots, device=weights.device)
    tokens = torch.searchsorted(offset_by_token.long(), slots, right=True) - 1
    # What lies behind the last pair lands in a row behind the last token.
    tokens = torch.where(slots < offset_by_token[-1], tokens, num_tokens)
    products = weights.new_zeros(num_tokens + 1, num_experts)
    experts = torch.where(slots < offset_by_token[-1], expert_ids.long(), 0)
    products = products.index_put((tokens, experts), weights * dweights)[:num_tokens]
    projection = products.sum(dim=1, keepdim=True)
    if logits is None:
        taken = torch.zeros_like(products).scatter(1, winner_ids.long(), winner_scores)
    else:
        taken = torch.exp(logits.to(lse.dtype) - lse[:, None])
    return (products - taken * projection).to(dtype)


# ---------------------------------------------------------------------------- operators


def _forward_cuda(
    logits: Tensor, uniform: Tensor | None, top_k: int, tile: int, rule: str, full: bool
) -> tuple[Tensor, ...]:
    winners, kernels = triton_kernels(_OP, logits.device)
    num_tokens, num_experts = logits.shape
    if logits.dtype == torch.float64 or num_tokens == 0 or num_experts > winners.MAX_EXPERTS:
        return _forward_torch(logits, uniform, top_k, tile, rule, full)
    num_slots = most_pairs(num_tokens, num_experts, top_k, tile, rule)
    rounded, *rest = kernels.round_logits(logits, uniform, top_k, tile, rule, num_slots, full)
    weights, _, expert_ids, *plan = rounded
    return weights, expert_ids, *plan, *rest


def _forward(logits: Tensor, *options: Any) -> tuple[Tensor, ...]:
    return (_forward_cuda if logits.is_cuda else _forward_torch)(logits, *options)


def _backward(dweights: Tensor, *saved: Any) -> Tensor:
    dtype = saved[-1]
    if not dweights.is_cuda or dtype == torch.float64:
        return _backward_torch(dweights, *saved)
    _, kernels = triton_kernels(_OP, dweights.device)
    dlogits: Tensor = kernels.round_logits_grad(dweights, *saved)
    return dlogits


def _forward_fake(
    logits: Tensor, uniform: Tensor | None, top_k: int, tile: int, rule: str, full: bool
) -> tuple[Tensor, ...]:
    num_tokens, num_experts = logits.shape
    num_slots = most_pairs(num_tokens, num_experts, top_k, tile, rule)
    sizes = [num_slots, num_experts + 1, *[num_slots] * 3, num_tokens + 1]
    weights = logits.new_empty(num_slots, dtype=weight_dtype(logits.dtype))
    integers = [logits.new_empty(size, dtype=torch.int32) for size in sizes]
    winner_scores = weights.new_empty(num_tokens, top_k)
    winner_ids = logits.new_empty((num_tokens, top_k), dtype=torch.int32)
    load = logits.new_empty(num_experts, dtype=torch.int32)
    return weights, *integers, load, winner_scores, winner_ids, weights.new_empty(num_tokens)


def _backward_fake(dweights: Tensor, *saved: Any) -> Tensor:
    winner_ids, num_experts, dtype = saved[4], saved[7], saved[8]
    return dweights.new_empty((winner_ids.shape[0], num_experts), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, *_, full = inputs
    weights, expert_ids, *plan, _, winner_scores, winner_ids, lse = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    offset_by_token = plan[4]
    ctx.save_for_backward(
        weights, expert_ids, offset_by_token, winner_scores, winner_ids, lse,
        logits if full else None,
    )  # fmt: skip
    ctx.num_experts, ctx.dtype = logits.shape[1], logits.dtype


def _autograd(ctx: Any, dweights: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    dlogits = None
    if dweights is not None:
        op = torch.ops.sonic.rounded_routing_backward
        tensors = (dweights, *ctx.saved_tensors)
        dlogits = gradient_eagerly(op, _backward, tensors, ctx.num_experts, ctx.dtype)
    return dlogits, None, None, None, None, None


_LIBRARY = torch.library.Library("sonic", "FRAGMENT")
_LIBRARY.define(
    "rounded_routing(Tensor logits, Tensor? uniform, int top_k, int tile, str rule, bool full)"
    f" -> ({', '.join(['Tensor'] * 11)})",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "rounded_routing_backward(Tensor dweights, Tensor weights, Tensor expert_ids,"
    " Tensor offset_by_token, Tensor winner_scores, Tensor winner_ids, Tensor lse,"
    " Tensor? logits, SymInt num_experts, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("rounded_routing", _forward, "CPU")
_LIBRARY.impl("rounded_routing", _forward, "CUDA")
_LIBRARY.impl("rounded_routing_backward", _backward, "CPU")
_LIBRARY.impl("rounded_routing_backward", _backward, "CUDA")
torch.library.register_fake("sonic::rounded_routing", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("sonic::rounded_routing_backward", _backward_fake, lib=_LIBRARY)
_ROUNDED_ROUTING = torch.ops.sonic.rounded_routing.default
_Function = differentiable_function(_ROUNDED_ROUTING, _autograd, _setup_context, _forward)
register_gradient(
    _LIBRARY,
    _ROUNDED_ROUTING,
    _Function,
    "sonic.routing.rounding_scores and a gather of the weights, in torch",
)
