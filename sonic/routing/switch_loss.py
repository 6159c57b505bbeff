"""The Switch loss of given choices as one operator: how even the experts' load is.

For whoever knows the load already. :func:`sonic.routing.route.route` chooses and has the loss too.

Symbols: T tokens, E experts.
"""

from typing import Any

import torch
from torch import Tensor

from sonic.routing.token_rounding import triton_kernels, weight_dtype
from sonic.runtime.derivatives import (
    call_eagerly,
    differentiable_function,
    gradient_eagerly,
    register_gradient,
)

_OP = "switch_loss"


def switch_loss(logits: Tensor, load: Tensor, top_k: int) -> Tensor:
    """``E / (top_k T^2) * sum_e load_e prob_e``, with ``prob`` the softmax summed over tokens.

    Args:
        logits: (T, E) bf16, fp16 or fp32, any strides; fp64 runs in torch.
        load: (E,) int32, tokens that chose each expert; no gradient leads there.
        top_k: choices of a token.

    Returns:
        () fp32 (fp64 for fp64 logits), one for an even load, zero without tokens; differentiable in
        ``logits``.

    Numerics:
        fp32 throughout, the logits' gradient is rounded once. Deterministic.

    Memory:
        Backward keeps the logits, which are the caller's, ``load`` and two numbers of each token.
    """
    inputs = (logits, load, top_k)
    loss: Tensor = call_eagerly(_SWITCH_LOSS, _Function, _forward, inputs)[0]
    return loss


def _scale(logits: Tensor, top_k: int) -> float:
    num_tokens, num_experts = logits.shape
    return num_experts / (top_k * max(1, num_tokens) ** 2)


# ------------------------------------------------------------------------------ in torch


def _probabilities(value: Tensor, lse: Tensor) -> Tensor:
    """Softmax of the rows; zero where all of a row is -inf."""
    return torch.exp(value - torch.where(lse == -torch.inf, 0.0, lse)[:, None])


def _forward_torch(logits: Tensor, load: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    value = logits.to(weight_dtype(logits.dtype))
    lse = value.logsumexp(dim=1)
    mean = _probabilities(value, lse) @ load.to(value.dtype)
    return mean.sum() * _scale(logits, top_k), lse, mean


def _backward_torch(
    dloss: Tensor, logits: Tensor, load: Tensor, lse: Tensor, mean: Tensor, top_k: int
) -> Tensor:
    prob = _probabilities(logits.to(lse.dtype), lse)
    weight = dloss * _scale(logits, top_k)
    return (weight * prob * (load.to(lse.dtype) - mean[:, None])).to(logits.dtype)


# ---------------------------------------------------------------------------- operators


def _in_torch(logits: Tensor) -> bool:
    return not logits.is_cuda or logits.dtype == torch.float64 or logits.shape[0] == 0


def _forward(logits: Tensor, load: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    if _in_torch(logits):
        return _forward_torch(logits, load, top_k)
    triton_kernels(_OP, logits.device)  # says so if there is no Triton
    from sonic.triton.switch_loss import switch_loss as kernels

    return kernels(logits, load, _scale(logits, top_k))


def _backward(
    dloss: Tensor, logits: Tensor, load: Tensor, lse: Tensor, mean: Tensor, top_k: int
) -> Tensor:
    if _in_torch(logits):
        return _backward_torch(dloss, logits, load, lse, mean, top_k)
    from sonic.triton.switch_loss import switch_loss_grad

    return switch_loss_grad(dloss, logits, load, lse, mean, _scale(logits, top_k))


def _forward_fake(logits: Tensor, load: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = weight_dtype(logits.dtype)
    lse, mean = (logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(2))
    return logits.new_empty((), dtype=dtype), lse, mean


def _backward_fake(dloss: Tensor, logits: Tensor, *saved: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, load, ctx.top_k = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, load, *output[1:])


def _autograd(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    dlogits = None
    if dloss is not None:
        op = torch.ops.sonic.switch_loss_backward
        dlogits = gradient_eagerly(op, _backward, (dloss, *ctx.saved_tensors), ctx.top_k)
    return dlogits, None, None


_LIBRARY = torch.library.Library("sonic", "FRAGMENT")
_LIBRARY.define(
    "switch_loss(Tensor logits, Tensor load, int top_k) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "switch_loss_backward(Tensor dloss, Tensor logits, Tensor load, Tensor lse, Tensor mean,"
    " int top_k) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("switch_loss", _forward, _device)
    _LIBRARY.impl("switch_loss_backward", _backward, _device)
torch.library.register_fake("sonic::switch_loss", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("sonic::switch_loss_backward", _backward_fake, lib=_LIBRARY)
_SWITCH_LOSS = torch.ops.sonic.switch_loss.default
_Function = differentiable_function(_SWITCH_LOSS, _autograd, _setup_context, _forward)
register_gradient(_LIBRARY, _SWITCH_LOSS, _Function, "sonic.reference.routing.load_balancing_loss")
