"""Product-key routing as an operator: winners among n^2 experts from 2n logits per token."""

from typing import Any

import torch
from torch import Tensor

from sonic import checks
from sonic.runtime.derivatives import differentiable_function, register_gradient
from sonic.runtime.errors import MissingPackageError, ShapeError
from sonic.runtime.limits import MAX_EXPERTS, message


def product_key_routing(
    logits: Tensor, top_k: int, *, renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Choose the ``top_k`` best of n^2 experts, whose logits are sums over two halves.

    Expert ``i * n + j`` has the logit ``logits[t, 0, i] + logits[t, 1, j]``. Its weight is the
    softmax over the winners, or over all n^2 experts without ``renormalize``.

    Args:
        logits: (T, 2, n) bf16, fp16 or fp32, n up to 256; fp64 runs in torch.
        top_k: 1 to min(64, n).
        renormalize: see above.

    Returns:
        ``scores`` (T, top_k) fp32 (fp64 for fp64 logits), descending and differentiable in the
        logits, and ``ids`` (T, top_k) int32, distinct within a token. Equal sums go to the lower
        id among the pairs of either half's winners.

    Raises:
        ShapeError: ``logits`` is not (T, 2, n), or n is 0 or above 256.
        DTypeError: ``logits`` is of another dtype.
        ArgumentError: ``logits`` is no tensor, ``top_k`` no int from 1 to min(64, n), or
            ``renormalize`` no bool.
        MissingPackageError: CUDA logits without triton.

    Memory:
        Backward keeps the logits, ``scores``, ``ids`` and 8T bytes.
    """
    _check(logits, top_k, renormalize)
    scores, ids, _ = torch.ops.sonic.product_key_routing(logits, top_k, renormalize)
    return scores, ids


def _check(logits: Tensor, top_k: int, renormalize: bool) -> None:
    op = "product_key_routing"
    todo = "Give the logits of the two halves: logits.view(T, 2, n)."
    checks.check_tensor(op, "logits", logits, ("T", "2", "n"), todo)
    if logits.shape[1] != 2 or not 1 <= logits.shape[2] ** 2 <= MAX_EXPERTS:
        came = f"logits has shape {tuple(logits.shape)}"
        raise ShapeError(message(op, came, "(T, 2, n) with n from 1 to 256", todo))
    checks.check_float(op, "logits", logits)
    checks.check_top_k(op, top_k, logits.shape[2], "keys per half", "n")
    checks.check_bool(op, "renormalize", renormalize)


def _forward_torch(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    from sonic.reference.product_key import product_key_reference

    return product_key_reference(logits, top_k, renormalize)


def _forward_cuda(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    if logits.dtype == torch.float64 or logits.shape[0] == 0:
        return _forward_torch(logits, top_k, renormalize)
    try:
        from sonic.triton.product_key import product_key
    except ImportError as error:
        raise MissingPackageError(
            f"product_key_routing: logits on {logits.device} need triton, which cannot be "
            f"imported ({error}). Install or repair it, or route on the CPU."
        ) from error
    return product_key(logits, top_k, renormalize)


def _forward_fake(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    shape = (logits.shape[0], top_k)
    return (
        logits.new_empty(shape, dtype=dtype),
        logits.new_empty(shape, dtype=torch.int32),
        logits.new_empty((logits.shape[0], 2), dtype=dtype),
    )


def _backward(
    dscores: Tensor, logits: Tensor, scores: Tensor, ids: Tensor, lse: Tensor, renormalize: bool
) -> Tensor:
    if not logits.is_cuda or logits.dtype == torch.float64 or logits.shape[0] == 0:
        from sonic.reference.product_key import product_key_grad_reference

        gradient = product_key_grad_reference(dscores, logits, scores, ids, renormalize)
        return gradient.contiguous()
    from sonic.triton.product_key import product_key_grad

    return product_key_grad(dscores, logits, scores, ids, lse, renormalize)


def _backward_fake(
    dscores: Tensor, logits: Tensor, scores: Tensor, ids: Tensor, lse: Tensor, renormalize: bool
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, renormalize = inputs
    scores, ids, lse = output
    ctx.mark_non_differentiable(ids, lse)
    ctx.save_for_backward(logits, scores, ids, lse)
    ctx.renormalize = renormalize


def _autograd(ctx: Any, dscores: Tensor, *_: Any) -> tuple[Tensor, None, None]:
    gradient = torch.ops.sonic.product_key_routing_backward(
        dscores, *ctx.saved_tensors, ctx.renormalize
    )
    return gradient, None, None


_LIBRARY = torch.library.Library("sonic", "FRAGMENT")
_LIBRARY.define(
    "product_key_routing(Tensor logits, int top_k, bool renormalize) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "product_key_routing_backward(Tensor dscores, Tensor logits, Tensor scores, Tensor ids,"
    " Tensor lse, bool renormalize) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("product_key_routing", _forward_torch, "CPU")
_LIBRARY.impl("product_key_routing", _forward_cuda, "CUDA")
_LIBRARY.impl("product_key_routing_backward", _backward, "CPU")
_LIBRARY.impl("product_key_routing_backward", _backward, "CUDA")
torch.library.register_fake("sonic::product_key_routing", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("sonic::product_key_routing_backward", _backward_fake, lib=_LIBRARY)
_PRODUCT_KEY_ROUTING = torch.ops.sonic.product_key_routing.default
register_gradient(
    _LIBRARY,
    _PRODUCT_KEY_ROUTING,
    differentiable_function(_PRODUCT_KEY_ROUTING, _autograd, _setup_context),
    "sonic.reference.product_key.product_key_reference",
)
