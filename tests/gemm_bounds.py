"""Where an output may lie: float64 results of a grouped GEMM, and how far float32 may be from them.

A kernel's result is one rounding of a float32 value ``x``. If ``|x - v| <= delta`` for the float64
value ``v``, the stored number lies between the roundings of ``v - delta`` and ``v + delta``,
because rounding is monotonic. ``delta`` is zero where all sums are exact, so that one rule asks
equality there and agreement elsewhere, and asks it of the GPU and of the emulator alike.

``delta`` of a sum of K products is ``K 2^-23 sum |a b|``: any order of summation, with results cut
off instead of rounded, as tensor cores may (Higham, Accuracy and Stability, section 4.2). That of a
transcendental is the largest error in the PTX ISA (9.7.3: ex2.approx.ftz.f32 2 ulp,
rcp.approx.ftz.f32 1 ulp, tanh.approx.f32 2^-11 relative) carried through the formula.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sonic.enums import ActivationType
from sonic.reference import stages as reference
from sonic.runtime.layout import pack_gate_up, split_gate_up
from sonic.runtime.problem import Schedule, TileConfig
from tests.grouped_gemms import DOWN_ACT, EXACT, UP, UP_INFERENCE, GroupedGemm, cast

_ULP32 = 2.0**-23
_INTEGERS = 2.0**24  # below it float32 holds every integer
_HALF_BITS = 2.0**11  # half precision holds every integer up to it
_TANH_ERROR = 2.0**-11  # of tanh.approx.f32, relative
# Of 1 / (1 + ex2(c x)): rounding of the argument aside, ex2 2 ulp, sum half, reciprocal 1.
_SIGMOID_ERROR = 4 * _ULP32
# Abramowitz and Stegun 7.1.26 is 1.5e-7 from erf; its exponential and its reciprocal add ulps.
_NORMAL_CDF_ERROR = 2.0**-20
_ROUNDINGS = 8  # operations of the longest activation formula, each within an ulp
_GELU_SCALE = 2.0 * math.sqrt(2.0 / math.pi)
_GELU_CUBIC = 0.044715
_OAI_ALPHA, _OAI_LIMIT = 1.702, 7.0
_RELUS = (ActivationType.RELU, ActivationType.RELU_SQ, ActivationType.REGLU)
_GELUS = (ActivationType.GELU, ActivationType.GEGLU)
_TANH_GELUS = (ActivationType.GELU_TANH, ActivationType.GEGLU_TANH)


def rounded_to_half(x: Tensor) -> Tensor:
    """To eleven bits, ties to even: ``x`` in half precision with a scale of its own."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.round(mantissa * _HALF_BITS), exponent) / _HALF_BITS


@dataclass(frozen=True)
class Band:
    """A float64 value and the largest distance of the float32 value before the last rounding.

    ``halved``: the float32 value goes through half precision first.
    """

    value: Tensor
    delta: Tensor
    halved: bool = False

    def ends(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The least and the largest number of ``dtype`` that may be stored.

        float64 is rounded by way of float32, which changes nothing: what was stored came from a
        float32 value, and both roundings are monotonic.
        """
        low, high = self.value - self.delta, self.value + self.delta
        if self.halved:
            low, high = rounded_to_half(low), rounded_to_half(high)
        return low.float().to(dtype), high.float().to(dtype)

    def outside(self, stored: Tensor) -> int:
        """How many elements of a result cannot have come from inside the band; NaN never can.

        Partial sums that were added up in float64 are held to float32.
        """
        dtype = torch.float32 if stored.dtype is torch.float64 else stored.dtype
        low, high = self.ends(dtype)
        value = stored.to(dtype)
        return int((~((low <= value) & (value <= high))).sum())


def bands(
    gemm: GroupedGemm, inputs: dict[str, Any], kind: str, config: TileConfig
) -> dict[str, Band]:
    """The band of each output of ``gemm``, by name, run with the tiles ``config``."""
    wide = cast(inputs, dtype=torch.float64)
    exact = kind == EXACT
    # Such a schedule copies accumulators, in half precision unless they are what is stored.
    halved = config.schedule is Schedule.OVERLAPPED
    if gemm.stage in (UP, UP_INFERENCE):
        result = _up(gemm, wide, exact, halved)
    elif gemm.stage is DOWN_ACT:
        result = _down_act(gemm, wide, exact, halved)
    else:
        result = _linear(gemm, wide, exact)
    return {name: result[name] for name in gemm.stage.outputs}


def _copied(band: Band, exact: bool) -> Band:
    """An accumulator that was copied in half precision, as the epilogue gets it."""
    if exact:
        return Band(rounded_to_half(band.value), band.delta)
    size = band.value.abs() + band.delta
    # The second term: of values far below the largest of their row, which share its scale.
    step = size / _HALF_BITS + 2.0**-38 * size.amax(1, keepdim=True)
    return Band(band.value, band.delta + step)


def _order(size: Tensor, terms: int, exact: bool) -> Tensor:
    """Largest error of a float32 sum of ``terms`` products of which the sizes add up to ``size``.

    :raises ValueError: the inputs were meant to be exact, and a sum may need more than 24 bits.
    """
    if exact:
        if float(size.max()) >= _INTEGERS:
            raise ValueError(f"sums up to {float(size.max()):.3g} are not exact in float32")
        return torch.zeros_like(size)
    return terms * _ULP32 * size


def _absolute(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.abs() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def _terms(gemm: GroupedGemm, inputs: dict[str, Any]) -> int:
    """Terms of the longest sum of a linear stage, with the bias or the old value."""
    if gemm.stage.by_row:
        rows = next(inputs[name] for name in ("a", "dh") if name in inputs)
        return rows.shape[1] + 1
    return max(gemm.sizes.counts) + 1


def _linear(gemm: GroupedGemm, inputs: dict[str, Any], exact: bool) -> dict[str, Band]:
    (name,) = gemm.stage.outputs
    value = gemm.run(reference, inputs)[name]
    size = gemm.run(reference, _absolute(inputs))[name]
    return {name: Band(value, _order(size, _terms(gemm, inputs), exact))}


def _up(gemm: GroupedGemm, inputs: dict[str, Any], exact: bool, halved: bool) -> dict[str, Band]:
    """``h`` is a sum; ``a`` is the activation of the sum before it is rounded."""
    stored = {**inputs, "store_preact": True}
    live = gemm.sizes.live
    h = reference.up_forward(**stored)[0][:live]
    absolute = {**_absolute(stored), "activation": gemm.problem.activation}
    size = reference.up_forward(**absolute)[0][:live]
    sums = Band(h, _order(size, inputs["x"].shape[1] + 1, exact), halved)
    preact = _copied(sums, exact) if halved else sums
    halves = [split_gate_up(t) if gemm.gated else (t, None) for t in (preact.value, preact.delta)]
    (gate, up), (gate_delta, up_delta) = halves
    formula = _Formula(gemm.problem.activation, gemm.problem.dtype != "bfloat16", exact)
    return {"h": sums, "a": formula.forward(gate, up, gate_delta, up_delta)}


def _down_act(
    gemm: GroupedGemm, inputs: dict[str, Any], exact: bool, halved: bool
) -> dict[str, Band]:
    """``P = dout w2``, then the formula of the backward epilogue."""
    live = gemm.sizes.live
    token = inputs["token_by_row"].clamp(min=0)

    def product(dout: Tensor, weight: Tensor) -> Tensor:
        args = dout[token], weight, inputs["offset_by_expert"]
        return reference.up_backward_act(*args, layout=gemm.layout, gated=False)[:live]

    size = product(inputs["dout"].abs(), inputs["w2"].abs())
    delta = _order(size, inputs["dout"].shape[1], exact)
    grad = Band(product(inputs["dout"], inputs["w2"]), delta)
    grad = _copied(grad, exact) if halved else grad
    p, p_delta = grad.value, grad.delta
    h = inputs["h"][:live]
    gate, up = split_gate_up(h) if gemm.gated else (h, None)
    formula = _Formula(gemm.problem.activation, gemm.problem.dtype != "bfloat16", exact)
    score = inputs["score_by_row"][:live, None]
    value, dgate, dup = formula.backward(grad, score, gate, up)
    dh = dgate
    if dup is not None:
        pack = [pack_gate_up(getattr(dgate, n), getattr(dup, n)) for n in ("value", "delta")]
        dh = Band(*pack)
    terms = (p * value.value).abs().sum(1)
    ds_delta = (value.value.abs() * p_delta + (p.abs() + p_delta) * value.delta).sum(1)
    ds_delta = ds_delta + _order(terms, p.shape[1], exact and formula.is_exact)
    return {
        "dh": dh,
        "a_scaled": Band(score * value.value, _widened(score * value.value, score * value.delta)),
        "ds": Band((p * value.value).sum(1), ds_delta),
    }


def _widened(value: Tensor, delta: Tensor) -> Tensor:
    """``delta`` and a rounding of the value, unless both sides are exact."""
    return torch.where(delta > 0, delta + _ULP32 * value.abs(), delta)


@dataclass(frozen=True)
class _Formula:
    """An activation as ``sonic.device.activation`` evaluates it, and what can be off.

    ``t`` below is the sigmoid or the normal distribution that an activation contains.
    """

    activation: ActivationType
    precise: bool
    exact: bool  # inputs are exact integers

    @property
    def is_exact(self) -> bool:
        """Whether the activation is made of exact operations."""
        return self.activation in _RELUS

    def _argument(self, x: Tensor) -> Tensor:
        """What the sigmoid is taken of."""
        if self.activation in _TANH_GELUS:
            return _GELU_SCALE * (x + _GELU_CUBIC * x**3)
        return _OAI_ALPHA * x if self.activation is ActivationType.SWIGLU_OAI else x

    def _transcendental(self, x: Tensor) -> Band:
        if self.is_exact:
            return Band(torch.zeros_like(x), torch.zeros_like(x))
        if self.activation in _GELUS:
            t = 0.5 * torch.erfc(-x * math.sqrt(0.5))
            return Band(t, torch.full_like(x, _NORMAL_CDF_ERROR))
        z = self._argument(x)
        t = torch.sigmoid(z)
        slope = t * (1 - t)
        delta = 4 * _ULP32 * z.abs() * slope + _ULP32
        if self.precise:
            return Band(t, delta + _SIGMOID_ERROR * t)
        return Band(t, delta + 0.5 * _TANH_ERROR * torch.tanh(z / 2).abs())

    def _value(self, x: Tensor, t: Tensor) -> Tensor:
        if self.activation in (ActivationType.RELU, ActivationType.REGLU):
            return x.clamp(min=0)
        if self.activation is ActivationType.RELU_SQ:
            return x.clamp(min=0) ** 2
        return x * t

    def _slope(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The derivative of :meth:`_value` as two terms, which may cancel."""
        zero = torch.zeros_like(x)
        if self.activation in (ActivationType.RELU, ActivationType.REGLU):
            return (x > 0).to(x.dtype), zero
        if self.activation is ActivationType.RELU_SQ:
            return 2 * x.clamp(min=0), zero
        if self.activation in _GELUS:
            return t, x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
        inner: float | Tensor = 1.0
        if self.activation in _TANH_GELUS:
            inner = _GELU_SCALE * (1 + 3 * _GELU_CUBIC * x * x)
        elif self.activation is ActivationType.SWIGLU_OAI:
            inner = _OAI_ALPHA
        return t, x * t * (1 - t) * inner

    def _clamped(self, gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gate, and what the function of it is multiplied with."""
        if self.activation is ActivationType.SWIGLU_OAI:
            assert up is not None
            return gate.clamp(max=_OAI_LIMIT), up.clamp(-_OAI_LIMIT, _OAI_LIMIT) + 1
        return gate, torch.ones_like(gate) if up is None else up

    def forward(
        self, gate: Tensor, up: Tensor | None, gate_delta: Tensor, up_delta: Tensor | None
    ) -> Band:
        """``a = act(gate, up)`` of float32 values that are off by up to the deltas."""
        zero = torch.zeros_like(gate)

        def value(gate: Tensor, up: Tensor, off: Tensor) -> Tensor:
            x, factor = self._clamped(gate, None if up_delta is None else up)
            transcendental = self._transcendental(x)
            return factor * self._value(x, transcendental.value + off * transcendental.delta)

        if up is None or up_delta is None:
            at, deltas = (gate, zero, zero), (gate_delta, zero, zero + 1)
        else:
            at, deltas = (gate, up, zero), (gate_delta, up_delta, zero + 1)
        x, factor = self._clamped(gate, up)
        return self._band(value, at, deltas, factor * self._value(x.abs(), torch.ones_like(x)))

    def backward(
        self, p: Band, score: Tensor, gate: Tensor, up: Tensor | None
    ) -> tuple[Band, Band, Band | None]:
        """``act``, and the gradients of gate and up, of exact pre-activations."""
        x, factor = self._clamped(gate, up)
        transcendental = self._transcendental(x)
        one, zero = torch.ones_like(gate), torch.zeros_like(gate)
        gate_open, up_open = one, one
        if self.activation is ActivationType.SWIGLU_OAI:
            assert up is not None
            gate_open = (gate <= _OAI_LIMIT).to(gate.dtype)
            up_open = (up.abs() <= _OAI_LIMIT).to(gate.dtype)

        def t(off: Tensor) -> Tensor:
            return transcendental.value + off * transcendental.delta

        def value(p: Tensor, off: Tensor) -> Tensor:
            return factor * self._value(x, t(off))

        def dgate(p: Tensor, off: Tensor) -> Tensor:
            return score * p * factor * sum(self._slope(x, t(off))) * gate_open

        def dup(p: Tensor, off: Tensor) -> Tensor:
            return score * p * self._value(x, t(off)) * up_open

        at, deltas = (p.value, zero), (p.delta, one)
        largest = self._value(x.abs(), one)
        terms = self._slope(x, t(zero))
        slope = terms[0].abs() + terms[1].abs()
        grad = score * p.value
        return (
            self._band(value, at, deltas, factor * largest),
            self._band(dgate, at, deltas, grad * factor * slope),
            None if up is None else self._band(dup, at, deltas, grad * largest),
        )

    def _band(
        self,
        f: Callable[..., Tensor],
        at: tuple[Tensor, ...],
        deltas: tuple[Tensor, ...],
        size: Tensor,
    ) -> Band:
        """``f`` there, how far it moves when each argument does, and its own roundings.

        ``f`` is nearly linear over such distances; a hundredth more covers the rest. ``size`` is
        that of the largest intermediate result.
        """
        value = f(*at)
        if self.exact and self.is_exact:
            if float(value.abs().max()) >= _INTEGERS:
                raise ValueError(f"values up to {float(value.abs().max()):.3g} are not exact")
            return Band(value, torch.zeros_like(value))
        delta = _ROUNDINGS * _ULP32 * size.abs()
        for i, distance in enumerate(deltas):
            moved = [
                (f(*(x + sign * distance if i == j else x for j, x in enumerate(at))) - value).abs()
                for sign in (1, -1)
            ]
            delta = delta + 1.01 * torch.maximum(*moved)
        return Band(value, delta)
