"""What the backward pass keeps and what it recomputes. One table, one file.

For one call of the experts (T tokens, R routed rows, dtype of 2 bytes, gated activation):

================================  ==============  ==================================================
kept between forward/backward     bytes           read by
================================  ==============  ==================================================
``x (T, H)``                      2TH             dw1; not kept if ``w1`` is frozen
``h (R, 2I)`` pre-activation      4RI             act(h), act'(h); not gated: (R, I), 2RI
``scores (R,)`` fp32              4R              a' = score * act(h); dh
``token_by_row`` int32            4R              gathers of x and dout
``slot_by_row`` int32             4R              gather of the scores
``row_by_slot`` int32             4R              dx gather-sum, dscores
``offset_by_expert`` int32        4(E + 1)        row range of each expert
``offset_by_token`` int32         4(T + 1)        dx gather-sum; flat routing only
``slot_by_position`` int32        4R              dx gather-sum; flat routing only
``w1``, ``w2``, ``b2``            by reference    dx; dout @ w2; the bias term of dscores
================================  ==============  ==================================================

===============================  ===================================================================
never kept                       instead
===============================  ===================================================================
gathered ``x``, gathered dout    gathered inside the kernels that need them
``a = act(h)``                   recomputed from ``h`` in the epilogue of ``dout @ w2``
``y`` (R, H), expert outputs     not needed: dscores = <dout @ w2, act(h)>, plus <dout, b2>
router logits                    belong to the router's own operator
===============================  ===================================================================

``sonic.memory`` states the sum of the first table as a function; a test counts the saved tensors.
Gradients of gradients are not implemented and raise :class:`UnsupportedError`.

Source: SonicMoE (arXiv 2512.14080), section 3.
"""

from typing import Any

import torch
from torch import Tensor

from sonic.ops import LIBRARY
from sonic.runtime.errors import ArgumentError, UnsupportedError

_NUM_FORWARD_INPUTS = 19  # of sonic::experts_forward
_DIFFERENTIABLE = slice(0, 6)  # x, w1, b1, w2, b2, scores


def _experts_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w1, _, w2, b2, scores, *plan = inputs[:12]
    top_k, activation, layout, impl, store_preact, w1_main_grad, w2_main_grad = inputs[12:]
    h = output[1]
    needs = list(ctx.needs_input_grad[_DIFFERENTIABLE])
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.needs = needs
    ctx.options = (top_k, activation, layout, impl)
    ctx.has_preact = store_preact
    # Plain attributes: every backward in between changes them, which a saved tensor would refuse.
    ctx.main_grads = (w1_main_grad, w2_main_grad)
    ctx.save_for_backward(x if needs[1] else None, w1, w2, b2, h, scores, *plan)


def _experts_backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    rest = (None,) * (_NUM_FORWARD_INPUTS - 6)
    if dout is None:
        return (None,) * 6 + rest
    if not ctx.has_preact:
        raise ArgumentError(
            "experts_forward: backward was asked for, but the call had store_preact=False, got no "
            "saved pre-activation. Allowed: store_preact=True where a gradient is needed. Call it "
            "with store_preact=True, or through sonic.experts, which decides this itself."
        )
    arguments = (dout, *ctx.saved_tensors, *ctx.options, ctx.needs)
    if ctx.main_grads == (None, None):
        gradients = torch.ops.sonic.experts_backward(*arguments)
    else:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "experts: create_graph=True was asked for together with main_grads, got a backward "
                "that writes into main gradients. Allowed: create_graph=False. Drop create_graph, "
                "or call without main_grads."
            )
        gradients = torch.ops.sonic.experts_backward_accumulate(*arguments, *ctx.main_grads)
    wanted = list(ctx.needs)
    wanted[1] = wanted[1] and ctx.main_grads[0] is None
    wanted[3] = wanted[3] and ctx.main_grads[1] is None
    results = tuple(
        gradient if want else None for gradient, want in zip(gradients, wanted, strict=True)
    )
    return results + rest


def _grouped_mm_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, _, offset_by_expert, impl = inputs
    ctx.needs = list(ctx.needs_input_grad[:3])
    ctx.impl = impl
    ctx.save_for_backward(rows if ctx.needs[1] else None, weight, offset_by_expert)


def _grouped_mm_backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    rows, weight, offset_by_expert = ctx.saved_tensors
    gradients = torch.ops.sonic.grouped_mm_backward(
        dout, rows, weight, offset_by_expert, ctx.impl, ctx.needs
    )
    results = tuple(
        gradient if want else None for gradient, want in zip(gradients, ctx.needs, strict=True)
    )
    return (*results, None, None)


def _no_double_backward(ctx: Any, *_: Any) -> Any:
    raise UnsupportedError(
        "sonic: a second derivative was asked for (backward through a backward), got a graph made "
        "with create_graph=True. Allowed: first derivatives. Differentiate once, or run the layer "
        "as plain torch operations, for instance sonic.reference.layer, for second derivatives."
    )


for _name, _backward, _setup in (
    ("experts_forward", _experts_backward, _experts_setup),
    ("experts_backward", _no_double_backward, None),
    ("grouped_mm", _grouped_mm_backward, _grouped_mm_setup),
    ("grouped_mm_backward", _no_double_backward, None),
):
    torch.library.register_autograd(f"sonic::{_name}", _backward, setup_context=_setup, lib=LIBRARY)
