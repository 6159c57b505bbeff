"""Top-k routing: scores and experts of each token from its router logits, as one operator.

Sizes: T tokens, E experts, ``top_k`` winners per token.
"""

from typing import Any

import torch
from torch import Tensor

from sonic import checks
from sonic.enums import ScoreOrder
from sonic.runtime.derivatives import (
    call_eagerly,
    differentiable_function,
    gradient_eagerly,
    register_gradient,
)
from sonic.runtime.eager import remembered
from sonic.runtime.errors import MissingPackageError
from sonic.runtime.limits import message


def topk_routing(
    logits: Tensor, top_k: int, *, order: ScoreOrder | str = ScoreOrder.SOFTMAX_OVER_TOPK
) -> tuple[Tensor, Tensor]:
    """Choose the ``top_k`` largest logits of each token and turn them into scores.

    With ``v`` the logits of a token and ``w`` its winners, score ``j`` is

    * ``softmax_over_topk``: ``exp(v[w_j]) / sum_i exp(v[w_i])``;
    * ``topk_over_softmax``: ``exp(v[w_j]) / sum_e exp(v[e])``;
    * ``topk_over_softmax_norm``: the latter divided by its sum over the winners, which is the
      first one again.

    Args:
        logits: (T, E) bf16, fp16 or fp32 on any device, any strides, E up to 65,536; T may be 0.
            fp64 runs in torch.
        top_k: 1 to min(64, E).
        order: a :class:`~sonic.enums.ScoreOrder` or its value.

    Returns:
        ``scores`` (T, top_k) fp32 (fp64 for fp64 logits), differentiable in the logits and in
        descending order, and ``ids`` (T, top_k) int32, distinct within a token. Equal logits go to
        the lower expert; -0 equals +0. NaN ranks above every number, as in ``torch.topk``: ids are
        in range whatever the logits, and a token with NaN or +inf among its winners, or with -inf
        for all of them, has NaN scores. A winner of -inf next to finite ones scores 0.

    Raises:
        ShapeError: ``logits`` is not a matrix, or E is 0 or above 65,536.
        DTypeError: ``logits`` is of another dtype.
        ArgumentError: ``top_k`` is outside 1 to min(64, E), or ``order`` is unknown.
        MissingPackageError: CUDA logits without triton installed.

    Numerics:
        Selection compares the logits exactly; the softmax is fp32 with the maximum subtracted, so
        it stays finite for any finite logits. Deterministic. The logits' gradient is rounded once.

    Memory:
        Backward keeps ``scores`` and ``ids`` (8 * T * top_k bytes), and the logits for
        ``topk_over_softmax`` only.

    Example:
        >>> scores, ids = topk_routing(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), 2)
        >>> scores.tolist(), ids.tolist()
        ([[0.5, 0.5]], [[1, 2]])
    """
    inputs = logits, top_k, _checked(logits, top_k, order)
    scores, ids = call_eagerly(_TOPK_ROUTING, _Function, _forward, inputs)
    return scores, ids


@remembered
def _checked(logits: Tensor, top_k: int, order: ScoreOrder | str) -> str:
    """The order's value, if the arguments are right."""
    op = "topk_routing"
    checks.check_table(op, "logits", logits, top_k)
    chosen: ScoreOrder = checks.choice(op, "order", order, ScoreOrder)
    return chosen.value


def _score_dtype(logits_dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if logits_dtype == torch.float64 else torch.float32


def _forward_torch(logits: Tensor, top_k: int, order: str) -> tuple[Tensor, Tensor]:
    from sonic.reference.routing import topk_scores

    return topk_scores(logits, top_k, ScoreOrder(order))


def _forward_cuda(logits: Tensor, top_k: int, order: str) -> tuple[Tensor, Tensor]:
    if logits.dtype == torch.float64:
        return _forward_torch(logits, top_k, order)
    try:
        from sonic.triton.topk import topk_scores
    except ImportError as error:
        raise MissingPackageError(
            message(
                "topk_routing",
                f"logits on {logits.device} need triton, which cannot be imported ({error})",
                "CPU logits without triton",
                "Install or repair triton, or route on the CPU.",
            )
        ) from error
    return topk_scores(logits, top_k, ScoreOrder(order))


def _forward(logits: Tensor, top_k: int, order: str) -> tuple[Tensor, Tensor]:
    return (_forward_cuda if logits.is_cuda else _forward_torch)(logits, top_k, order)


def _forward_fake(logits: Tensor, top_k: int, order: str) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    scores = logits.new_empty(shape, dtype=_score_dtype(logits.dtype))
    return scores, logits.new_empty(shape, dtype=torch.int32)


def _or_shape(
    logits: Tensor | None, scores: Tensor, num_experts: int, dtype: torch.dtype
) -> Tensor:
    """The logits, or where their values are not needed a (T, E) tensor of no memory."""
    if logits is not None:
        return logits
    return torch.zeros((), dtype=dtype, device=scores.device).expand(scores.shape[0], num_experts)


def _backward_kernel(
    dscores: Tensor,
    logits: Tensor | None,
    scores: Tensor,
    ids: Tensor,
    num_experts: int,
    dtype: torch.dtype,
    order: str,
) -> Tensor:
    if scores.is_cuda and dtype != torch.float64:
        from sonic.triton.topk import topk_scores_grad
    else:
        from sonic.reference.routing import topk_scores_grad
    logits = _or_shape(logits, scores, num_experts, dtype)
    return topk_scores_grad(dscores, logits, scores, ids, ScoreOrder(order)).contiguous()


def _backward_fake(
    dscores: Tensor,
    logits: Tensor | None,
    scores: Tensor,
    ids: Tensor,
    num_experts: int,
    dtype: torch.dtype,
    order: str,
) -> Tensor:
    return scores.new_empty((scores.shape[0], num_experts), dtype=dtype)


def _setup_context(
    ctx: Any,
    inputs: tuple[Tensor, int, str],
    output: tuple[Tensor, Tensor],
) -> None:
    logits, _, order = inputs
    scores, ids = output
    needs_logits = ScoreOrder(order) is ScoreOrder.TOPK_OVER_SOFTMAX
    ctx.save_for_backward(logits if needs_logits else None, scores, ids)
    ctx.num_experts, ctx.dtype, ctx.order = logits.shape[1], logits.dtype, order


def _backward(ctx: Any, dscores: Tensor, dids: Tensor | None) -> tuple[Tensor, None, None]:
    op, tensors = torch.ops.sonic.topk_routing_backward, (dscores, *ctx.saved_tensors)
    options = ctx.num_experts, ctx.dtype, ctx.order
    return gradient_eagerly(op, _backward_kernel, tensors, *options), None, None


_LIBRARY = torch.library.Library("sonic", "FRAGMENT")
_LIBRARY.define(
    "topk_routing(Tensor logits, int top_k, str order) -> (Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "topk_routing_backward(Tensor dscores, Tensor? logits, Tensor scores, Tensor ids,"
    " SymInt num_experts, ScalarType dtype, str order) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("topk_routing", _forward_torch, "CPU")
_LIBRARY.impl("topk_routing", _forward_cuda, "CUDA")
_LIBRARY.impl("topk_routing_backward", _backward_kernel, "CPU")
_LIBRARY.impl("topk_routing_backward", _backward_kernel, "CUDA")
torch.library.register_fake("sonic::topk_routing", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("sonic::topk_routing_backward", _backward_fake, lib=_LIBRARY)
_TOPK_ROUTING = torch.ops.sonic.topk_routing.default
_Function = differentiable_function(_TOPK_ROUTING, _backward, _setup_context, _forward)
register_gradient(_LIBRARY, _TOPK_ROUTING, _Function, "sonic.reference.topk_scores")
