"""Activations and their derivatives on float32 registers: one forward and one gradient each.

Everything that needs a sigmoid takes ``precise``. Without it, for bfloat16, the sigmoid is
``(1 + tanh(x / 2)) / 2`` with ``tanh.approx``: one transcendental instruction instead of two, and
an absolute error up to 2**-12. That is below bfloat16 rounding for ``x > -8``; further out the
sigmoid itself is smaller than 2**-11 and loses its relative accuracy, until it is zero near -17.

The forward takes ``(gate, up)`` or ``(x,)`` and returns the post-activation. The gradient takes the
incoming gradient and the same inputs, and returns ``(post-activation, gradients of the inputs)``:
the backward epilogue needs both, and they share the transcendental. ``sonic.reference.activations``
is the specification.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32

from sonic.device.ptx import (
    exp2_approx,
    maximum,
    minimum,
    reciprocal_approx,
    tanh_approx,
)
from sonic.enums import ActivationType

_LOG2_E = 1.4426950408889634
_SQRT_HALF = 0.7071067811865476
_INV_SQRT_2PI = 0.3989422804014327
_GELU_TANH_SCALE = 0.7978845608028654  # sqrt(2 / pi)
_GELU_TANH_CUBIC = 0.044715
_OAI_ALPHA = 1.702
_OAI_LIMIT = 7.0
# Abramowitz & Stegun 7.1.26, absolute error below 1.5e-7.
_ERF_P = 0.3275911
_ERF_COEFFICIENTS = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


@cute.jit
def sigmoid(x: Float32, precise: cutlass.Constexpr) -> Float32:
    if cutlass.const_expr(precise):
        result = reciprocal_approx(1.0 + exp2_approx(x * -_LOG2_E))
    else:
        result = 0.5 + 0.5 * tanh_approx(0.5 * x)
    return result


@cute.jit
def _normal_cdf(x: Float32, density: Float32) -> Float32:
    """Phi(x); ``density`` is exp(-x*x/2), which the caller also needs."""
    t = reciprocal_approx(1.0 + _ERF_P * _SQRT_HALF * maximum(x, -x))
    poly = _ERF_COEFFICIENTS[0] * t + _ERF_COEFFICIENTS[1]
    for coefficient in _ERF_COEFFICIENTS[2:]:
        poly = poly * t + coefficient
    half_tail = 0.5 * poly * t * density
    return 1.0 - half_tail if x >= 0.0 else half_tail


@cute.jit
def _silu(x: Float32, precise: cutlass.Constexpr) -> Float32:
    return x * sigmoid(x, precise)


@cute.jit
def _silu_grad(x: Float32, precise: cutlass.Constexpr):
    s = sigmoid(x, precise)
    value = x * s
    return value, s + value * (1.0 - s)


@cute.jit
def _gelu(x: Float32, precise: cutlass.Constexpr) -> Float32:
    return x * _normal_cdf(x, exp2_approx(x * x * (-0.5 * _LOG2_E)))


@cute.jit
def _gelu_grad(x: Float32, precise: cutlass.Constexpr):
    density = exp2_approx(x * x * (-0.5 * _LOG2_E))
    cdf = _normal_cdf(x, density)
    return x * cdf, cdf + x * density * _INV_SQRT_2PI


@cute.jit
def _gelu_tanh(x: Float32, precise: cutlass.Constexpr) -> Float32:
    # (1 + tanh(z)) / 2 = sigmoid(2 z)
    return x * sigmoid(2.0 * _GELU_TANH_SCALE * (x + _GELU_TANH_CUBIC * x * x * x), precise)


@cute.jit
def _gelu_tanh_grad(x: Float32, precise: cutlass.Constexpr):
    s = sigmoid(2.0 * _GELU_TANH_SCALE * (x + _GELU_TANH_CUBIC * x * x * x), precise)
    slope = 2.0 * _GELU_TANH_SCALE * (1.0 + 3.0 * _GELU_TANH_CUBIC * x * x)
    return x * s, s + x * s * (1.0 - s) * slope


@cute.jit
def _relu(x: Float32, precise: cutlass.Constexpr) -> Float32:
    return maximum(x, Float32(0.0))


@cute.jit
def _relu_grad(x: Float32, precise: cutlass.Constexpr):
    # Written so that a NaN keeps the incoming gradient, as torch does.
    return maximum(x, Float32(0.0)), Float32(0.0) if x <= 0.0 else Float32(1.0)


@cute.jit
def _relu_sq(x: Float32, precise: cutlass.Constexpr) -> Float32:
    r = maximum(x, Float32(0.0))
    return r * r


@cute.jit
def _relu_sq_grad(x: Float32, precise: cutlass.Constexpr):
    r = maximum(x, Float32(0.0))
    return r * r, 2.0 * r


@cute.jit
def _swiglu_oai(gate: Float32, up: Float32, precise: cutlass.Constexpr) -> Float32:
    g = minimum(gate, Float32(_OAI_LIMIT))
    u = maximum(minimum(up, Float32(_OAI_LIMIT)), Float32(-_OAI_LIMIT))
    return (u + 1.0) * g * sigmoid(_OAI_ALPHA * g, precise)


@cute.jit
def _swiglu_oai_grad(da: Float32, gate: Float32, up: Float32, precise: cutlass.Constexpr):
    g = minimum(gate, Float32(_OAI_LIMIT))
    u = maximum(minimum(up, Float32(_OAI_LIMIT)), Float32(-_OAI_LIMIT))
    s = sigmoid(_OAI_ALPHA * g, precise)
    value = g * s
    dgate = da * (u + 1.0) * (s + _OAI_ALPHA * value * (1.0 - s))
    dup = da * value
    # Written so that a NaN gate or up reaches the gradients.
    dgate = Float32(0.0) if gate > _OAI_LIMIT else dgate
    dup = Float32(0.0) if maximum(up, -up) > _OAI_LIMIT else dup
    return (u + 1.0) * value, dgate, dup


_VALUE = {
    ActivationType.SWIGLU: _silu,
    ActivationType.SILU: _silu,
    ActivationType.GEGLU: _gelu,
    ActivationType.GELU: _gelu,
    ActivationType.GEGLU_TANH: _gelu_tanh,
    ActivationType.GELU_TANH: _gelu_tanh,
    ActivationType.REGLU: _relu,
    ActivationType.RELU: _relu,
    ActivationType.RELU_SQ: _relu_sq,
}
_VALUE_AND_SLOPE = {
    ActivationType.SWIGLU: _silu_grad,
    ActivationType.SILU: _silu_grad,
    ActivationType.GEGLU: _gelu_grad,
    ActivationType.GELU: _gelu_grad,
    ActivationType.GEGLU_TANH: _gelu_tanh_grad,
    ActivationType.GELU_TANH: _gelu_tanh_grad,
    ActivationType.REGLU: _relu_grad,
    ActivationType.RELU: _relu_grad,
    ActivationType.RELU_SQ: _relu_sq_grad,
}


def activate(activation: ActivationType, precise: bool, *inputs):
    """Post-activation of ``(gate, up)`` or ``(x,)``."""
    if activation is ActivationType.SWIGLU_OAI:
        return _swiglu_oai(*inputs, precise)
    value = _VALUE[activation](inputs[0], precise)
    return value * inputs[1] if activation.is_gated else value


def activate_grad(activation: ActivationType, precise: bool, grad, *inputs):
    """``(post-activation, (gradient of each input))`` for the incoming gradient ``grad``."""
    if activation is ActivationType.SWIGLU_OAI:
        value, dgate, dup = _swiglu_oai_grad(grad, *inputs, precise)
        return value, (dgate, dup)
    value, slope = _VALUE_AND_SLOPE[activation](inputs[0], precise)
    if not activation.is_gated:
        return value, (grad * slope,)
    return value * inputs[1], (grad * inputs[1] * slope, grad * value)
