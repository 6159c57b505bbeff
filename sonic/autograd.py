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
``slot_by_position`` int32        4R              dx gather-sum; flat routing only, not rounding
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

An eager backward pass that does not keep its graph writes ``dh`` over ``h``, if nobody else can
hold ``h``: :func:`experts_forward` below made it, and no hooks saw it being saved. Compiled graphs,
checkpointed or offloaded layers, ``retain_graph=True``, and a pass that a CUDA graph captures (a
graph of the backward pass alone may be replayed twice) get memory of its own for ``dh``. Saved
tensors that were taken out of a graph by hand (``out.grad_fn.saved_tensors``) are not found out:
after such a pass they hold ``dh``.

``sonic.memory`` states the sum of the first table as a function; a test counts the saved tensors.
Gradients of gradients, forward mode and the transforms of ``torch.func`` are not implemented and
raise :class:`UnsupportedError`.

Source: SonicMoE (arXiv 2512.14080), section 3.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sonic import ops
from sonic.ops import LIBRARY
from sonic.runtime.derivatives import below_autograd, register_gradient
from sonic.runtime.eager import (
    graph_is_kept,
    is_being_captured,
    needs_dispatcher,
    saved_tensors_are_hooked,
)
from sonic.runtime.errors import ArgumentError, UnsupportedError

# Inputs of sonic::experts_forward.
_NUM_DIFFERENTIABLE = 6  # x, w1, b1, w2, b2, scores: the first ones
_STORE_PREACT = 16


def experts_forward(*inputs: Any) -> Tensor:
    """``torch.ops.sonic.experts_forward(*inputs)[0]``, past the dispatcher where that is the
    same."""
    if needs_dispatcher(inputs):
        out: Tensor = torch.ops.sonic.experts_forward(*inputs)[0]
        return out
    return experts_direct(*inputs)


def experts_direct(*inputs: Any) -> Tensor:
    """:func:`experts_forward` where that needs no dispatcher.

    A pre-activation is stored where a gradient is wanted, and nowhere else.
    """
    if inputs[_STORE_PREACT]:
        # One argument for all that has no gradient: autograd takes time for each.
        out: Tensor = _Experts.apply(*inputs[:_NUM_DIFFERENTIABLE], inputs[_NUM_DIFFERENTIABLE:])
        return out
    return ops.experts_output(*inputs)[0]


def grouped_mm(*inputs: Any) -> Tensor:
    """``torch.ops.sonic.grouped_mm(*inputs)``, likewise."""
    run: Callable[..., Any] = ops.grouped_mm
    if needs_dispatcher(inputs):
        run = torch.ops.sonic.grouped_mm
    elif torch.is_grad_enabled() and any_requires_grad(inputs[:3]):
        run = _GroupedMM.apply
    out: Tensor = run(*inputs)
    return out


def any_requires_grad(inputs: tuple[Any, ...]) -> bool:
    """Whether one of some tensors, or None, requires a gradient."""
    for value in inputs:  # a loop: a generator takes as long again
        if value is not None and value.requires_grad:
            return True
    return False


def _below_autograd(op: Any, function: Any, inputs: tuple[Any, ...]) -> Any:
    """What ``function``, the implementation of ``op``, computes; by ``op`` if anyone is looking."""
    return below_autograd(op, inputs) if needs_dispatcher(inputs) else function(*inputs)


class _Experts(torch.autograd.Function):
    """The output alone, of plain tensors at which nobody looks.

    Inputs are those of ``sonic::experts_forward``, of which a tuple has all but the differentiable.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        inputs = (*inputs[:-1], *inputs[-1])
        out, h = ops.experts_output(*inputs)
        _keep(ctx, inputs, h, owns_h=not saved_tensors_are_hooked())
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
        return _gradients(ctx, dout)


class _ExpertsForward(torch.autograd.Function):
    """``sonic::experts_forward``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        op = torch.ops.sonic.experts_forward.default
        out, h = _below_autograd(op, ops.experts_forward, inputs)
        ctx.mark_non_differentiable(h)
        _keep(ctx, inputs, h, owns_h=False)
        return out, h

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        return _gradients(ctx, dout)


def _keep(ctx: Any, inputs: tuple[Any, ...], h: Tensor | None, owns_h: bool) -> None:
    """Leave to a backward pass what it reads; it may overwrite ``h`` with ``owns_h``."""
    x, w1, _, w2, b2, scores, *plan = inputs[:12]
    top_k, activation, layout, impl, store_preact, w1_main_grad, w2_main_grad = inputs[12:]
    ctx.set_materialize_grads(False)
    ctx.needs = list(ctx.needs_input_grad[:_NUM_DIFFERENTIABLE])
    ctx.options = (top_k, activation, layout, impl)
    ctx.has_preact = store_preact
    ctx.owns_h, ctx.h_is_used_up = owns_h, False
    # Plain attributes: a backward pass in between changes them, which a saved tensor refuses.
    ctx.main_grads = (w1_main_grad, w2_main_grad)
    ctx.save_for_backward(x if ctx.needs[1] else None, w1, w2, b2, h, scores, *plan)


def _gradients(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
    """What ``backward`` of a function returns that called :func:`_keep`."""
    rest = (None,) * (len(ctx.needs_input_grad) - _NUM_DIFFERENTIABLE)
    if dout is None:
        return (None,) * len(ctx.needs_input_grad)
    if not ctx.has_preact:
        raise ArgumentError(
            "experts_forward: a gradient was asked for, but the call had store_preact=False. "
            "Allowed: store_preact=True where a gradient is needed. Call it so, or through "
            "sonic.experts, which decides this itself."
        )
    saved = ctx.saved_tensors  # where a pass succeeded before, torch's own error
    if ctx.h_is_used_up:
        raise ArgumentError(
            "experts: backward came to a graph on which it failed before, after the saved "
            "pre-activation was overwritten. Allowed: one attempt without retain_graph. Run "
            "the forward pass again, or pass retain_graph=True to the first attempt."
        )
    arguments = (dout, *saved, *ctx.options, ctx.needs)
    w1_main_grad, w2_main_grad = ctx.main_grads
    if not torch.is_grad_enabled() and not needs_dispatcher(arguments):
        nobody_reads_h = ctx.owns_h and not graph_is_kept()
        ctx.h_is_used_up = nobody_reads_h and not is_being_captured()
        # A capture launches what the same pass did before it: no slices either.
        how = ctx.h_is_used_up, nobody_reads_h
        return ops.experts_gradients(*arguments, w1_main_grad, w2_main_grad, *how) + rest
    if w1_main_grad is None and w2_main_grad is None:
        gradients = torch.ops.sonic.experts_backward(*arguments)
    else:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "experts: create_graph=True came together with main_grads, which the backward "
                "pass writes into. Allowed: create_graph=False. Drop create_graph, or call "
                "without main_grads."
            )
        gradients = torch.ops.sonic.experts_backward_accumulate(
            *arguments, w1_main_grad, w2_main_grad
        )
    wanted = list(ctx.needs)
    wanted[1] = wanted[1] and w1_main_grad is None
    wanted[3] = wanted[3] and w2_main_grad is None
    return _only(gradients, wanted) + rest


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        rows, weight, _, offset_by_expert, impl = inputs
        ctx.needs = list(ctx.needs_input_grad[:3])
        ctx.impl = impl
        ctx.save_for_backward(rows if ctx.needs[1] else None, weight, offset_by_expert)
        op = torch.ops.sonic.grouped_mm.default
        out: Tensor = _below_autograd(op, ops.grouped_mm, inputs)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        rows, weight, offset_by_expert = ctx.saved_tensors
        gradients = torch.ops.sonic.grouped_mm_backward(
            dout, rows, weight, offset_by_expert, ctx.impl, ctx.needs
        )
        return (*_only(gradients, ctx.needs), None, None)


def _only(gradients: tuple[Tensor, ...], wanted: list[bool]) -> tuple[Tensor | None, ...]:
    return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))


for _name, _function, _reference in (
    ("experts_forward", _ExpertsForward, "sonic.reference.experts_reference"),
    ("grouped_mm", _GroupedMM, "sonic.reference.grouped_mm_reference"),
):
    register_gradient(LIBRARY, getattr(torch.ops.sonic, _name).default, _function, _reference)
