"""Every activation as an explicit pair: its value and its derivative.

The derivatives are written out and not left to autograd, because the backward kernels evaluate
exactly these expressions. Kinks follow PyTorch: ``relu'(0) = 0`` and a clamp passes its gradient
at the limits themselves.

The constants of ``swiglu_oai`` are those of gpt-oss.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from sonic.enums import ActivationType

SWIGLU_OAI_ALPHA = 1.702
SWIGLU_OAI_LIMIT = 7.0

_GELU_TANH_SCALE = math.sqrt(2.0 / math.pi)
_GELU_TANH_CUBIC = 0.044715


class ScalarFunction(NamedTuple):
    """An elementwise function of one tensor and its derivative."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _silu_derivative(x: Tensor) -> Tensor:
    sigma = torch.sigmoid(x)
    return sigma * (1.0 + x * (1.0 - sigma))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-x * math.sqrt(0.5))


def _gelu(x: Tensor) -> Tensor:
    return x * _normal_cdf(x)


def _gelu_derivative(x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return _normal_cdf(x) + x * density


def _gelu_tanh_inner(x: Tensor) -> Tensor:
    return torch.tanh(_GELU_TANH_SCALE * (x + _GELU_TANH_CUBIC * x * x * x))


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + _gelu_tanh_inner(x))


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    t = _gelu_tanh_inner(x)
    inner_slope = _GELU_TANH_SCALE * (1.0 + 3.0 * _GELU_TANH_CUBIC * x * x)
    return 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * inner_slope


def _relu(x: Tensor) -> Tensor:
    return x.clamp(min=0.0)


def _relu_derivative(x: Tensor) -> Tensor:
    return (x > 0).to(x.dtype)


def _relu_sq(x: Tensor) -> Tensor:
    return _relu(x) ** 2


def _relu_sq_derivative(x: Tensor) -> Tensor:
    return 2.0 * _relu(x)


SILU = ScalarFunction(_silu, _silu_derivative)
GELU = ScalarFunction(_gelu, _gelu_derivative)
GELU_TANH = ScalarFunction(_gelu_tanh, _gelu_tanh_derivative)
RELU = ScalarFunction(_relu, _relu_derivative)
RELU_SQ = ScalarFunction(_relu_sq, _relu_sq_derivative)

# Of a gated activation this is the function of the gate in ``a = u * f(g)``. ``swiglu_oai`` is
# absent: it clamps both halves, so it has its own pair below.
_SCALAR_FUNCTIONS = {
    ActivationType.SWIGLU: SILU,
    ActivationType.GEGLU: GELU,
    ActivationType.GEGLU_TANH: GELU_TANH,
    ActivationType.REGLU: RELU,
    ActivationType.RELU_SQ: RELU_SQ,
    ActivationType.RELU: RELU,
    ActivationType.SILU: SILU,
    ActivationType.GELU: GELU,
    ActivationType.GELU_TANH: GELU_TANH,
}


def _swiglu_oai(gate: Tensor, up: Tensor) -> Tensor:
    g = gate.clamp(max=SWIGLU_OAI_LIMIT)
    u = up.clamp(min=-SWIGLU_OAI_LIMIT, max=SWIGLU_OAI_LIMIT)
    return (u + 1.0) * g * torch.sigmoid(SWIGLU_OAI_ALPHA * g)


def _swiglu_oai_grad(da: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    g = gate.clamp(max=SWIGLU_OAI_LIMIT)
    u = up.clamp(min=-SWIGLU_OAI_LIMIT, max=SWIGLU_OAI_LIMIT)
    sigma = torch.sigmoid(SWIGLU_OAI_ALPHA * g)
    slope = sigma * (1.0 + SWIGLU_OAI_ALPHA * g * (1.0 - sigma))
    dgate = da * (u + 1.0) * slope * (gate <= SWIGLU_OAI_LIMIT)
    dup = da * g * sigma * (up.abs() <= SWIGLU_OAI_LIMIT)
    return dgate, dup


def activation_value(activation: ActivationType, gate: Tensor, up: Tensor | None = None) -> Tensor:
    """Post-activation ``a``.

    Args:
        activation: which function; its formula stands in :class:`sonic.enums.ActivationType`.
        gate: the gate ``g``, or the only pre-activation if the activation is not gated.
        up: the up half ``u``, same shape; ``None`` exactly if the activation is not gated.

    Returns:
        A tensor of ``gate``'s shape and dtype; nothing is rounded beyond that dtype.
    """
    activation = ActivationType(activation)
    if activation is ActivationType.SWIGLU_OAI:
        return _swiglu_oai(gate, _required(up, activation))
    function = _SCALAR_FUNCTIONS[activation]
    if activation.is_gated:
        return _required(up, activation) * function.value(gate)
    return function.value(gate)


def activation_grad(
    activation: ActivationType, da: Tensor, gate: Tensor, up: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the pre-activations, given the gradient ``da`` of :func:`activation_value`.

    Returns:
        ``(dgate, dup)``, each of ``gate``'s shape; ``dup`` is ``None`` if not gated.
    """
    activation = ActivationType(activation)
    if activation is ActivationType.SWIGLU_OAI:
        return _swiglu_oai_grad(da, gate, _required(up, activation))
    function = _SCALAR_FUNCTIONS[activation]
    if activation.is_gated:
        u = _required(up, activation)
        return da * u * function.derivative(gate), da * function.value(gate)
    return da * function.derivative(gate), None


def _required(up: Tensor | None, activation: ActivationType) -> Tensor:
    if up is None:
        raise TypeError(f"{activation.value} is gated and needs the up half; got None")
    return up
