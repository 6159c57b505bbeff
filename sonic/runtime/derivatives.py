"""Reverse-mode gradients of the operators, and a clear refusal of every other kind.

torch lets an operator that knows reverse mode only pass forward-mode tangents through as zeros, and
answers ``torch.func`` with a sentence about its own interfaces; both are refused here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sonic.runtime.eager import needs_dispatcher
from sonic.runtime.errors import UnsupportedError


def below_autograd(op: Any, inputs: tuple[Any, ...]) -> Any:
    """What ``op`` computes, not recorded for differentiation."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*inputs)


def differentiable_function(
    op: Any,
    backward: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    implementation: Callable[..., Any] | None = None,
) -> type[torch.autograd.Function]:
    """``op`` as an autograd function, from the pair that ``register_autograd`` would take.

    ``implementation`` is what ``op`` runs, called past the dispatcher where that is the same.
    """

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            if implementation is None or needs_dispatcher(inputs):
                output = below_autograd(op, inputs)
            else:
                output = implementation(*inputs)
            if setup_context is not None:
                setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    return Differentiable


def call_eagerly(
    op: Any,
    function: type[torch.autograd.Function],
    implementation: Callable[..., Any],
    inputs: tuple[Any, ...],
) -> Any:
    """``op(*inputs)``, past the dispatcher where that is the same; ``function`` differentiates it
    in its first input, the only one."""
    if needs_dispatcher(inputs):
        return op(*inputs)
    if torch.is_grad_enabled() and inputs[0].requires_grad:
        return function.apply(*inputs)
    return implementation(*inputs)


def gradient_eagerly(
    op: Any, implementation: Callable[..., Any], tensors: tuple[Tensor | None, ...], *options: Any
) -> Any:
    """``op(*tensors, *options)`` in a backward pass, likewise. The operator is also called where a
    second derivative may be wanted, which it refuses."""
    through = torch.is_grad_enabled() or needs_dispatcher(tensors)
    return (op if through else implementation)(*tensors, *options)


def register_gradient(
    library: torch.library.Library,
    op: Any,
    function: type[torch.autograd.Function],
    reference: str,
) -> None:
    """Differentiate ``op`` by ``function``; ``reference`` is what errors name in its place.

    The operator of the gradient, ``<name>_backward`` for ``<name>`` or ``<name>_forward``, is
    refused a gradient of its own. It must be defined before.

    Not by ``torch.library.register_autograd``: for an operator of 19 arguments its bookkeeping
    took most of the host time of a forward call whose stages did nothing (torch 2.13, 2026-11).
    """
    name = op._schema.name.removeprefix("sonic::").removesuffix("_forward")
    _register(library, op, function, name, reference)
    backward = getattr(torch.ops.sonic, f"{name}_backward").default
    once = differentiable_function(backward, _no_second_derivative(name, reference))
    _register(library, backward, once, f"{name}_backward", reference)


def _register(
    library: torch.library.Library,
    op: Any,
    function: type[torch.autograd.Function],
    name: str,
    reference: str,
) -> None:

    def kernel(*inputs: Any) -> Any:
        if getattr(forward_ad, "_current_level", 0) >= 0:  # a torch without that name is asked
            _refuse_tangents(name, reference, inputs)
        if torch.is_grad_enabled() and any(
            isinstance(value, Tensor) and value.requires_grad for value in inputs
        ):
            if getattr(torch._C, "_are_functorch_transforms_active", bool)():
                raise UnsupportedError(
                    f"{name}: a torch.func transform (grad, vjp, jacrev, hessian) came over one of "
                    "its inputs. Allowed: backward() and torch.autograd.grad. Use one of these, or "
                    f"transform {reference}, which is made of plain torch operations."
                )
            return function.apply(*inputs)
        return below_autograd(op, inputs)

    library.impl(op, kernel, "Autograd")


def _no_second_derivative(name: str, reference: str) -> Callable[..., Any]:
    def refuse(ctx: Any, *_: Any) -> Any:
        raise UnsupportedError(
            f"{name}: a second derivative was asked for (backward through a backward), got a graph "
            "made with create_graph=True. Allowed: first derivatives. Differentiate once, or "
            f"differentiate {reference}, which is made of plain torch operations, twice."
        )

    return refuse


def _refuse_tangents(name: str, reference: str, inputs: tuple[Any, ...]) -> None:
    for value in inputs:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise UnsupportedError(
                f"{name}: forward-mode differentiation was asked for (torch.func.jvp, jacfwd, "
                "torch.autograd.forward_ad). Allowed: reverse mode, by backward() or "
                f"torch.autograd.grad. Use reverse mode, or differentiate {reference}, which is "
                "made of plain torch operations."
            )
