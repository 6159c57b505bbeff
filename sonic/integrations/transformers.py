"""Runs the experts of Hugging Face transformers models through :func:`sonic.experts`.

::

    from sonic.integrations.transformers import register

    register()
    model = AutoModelForCausalLM.from_config(config, experts_implementation="sonic")

The same name works in ``from_pretrained(..., experts_implementation="sonic")`` and in
``model.set_experts_implementation("sonic")``. transformers keeps the parameters, their layout and
their gradients: gate and up rows are read concatenated or interleaved as the model stores them.

What an experts module computes is established by what it does, not by what its config says: configs
name the activation in several ways (``hidden_act``, ``hidden_activation``, ``mlp_hidden_act``) and
models bring gates of their own. Its gate is evaluated once on a grid of float64 values and compared
with each activation that sonic has. A module that no activation reproduces, or that holds a
parameter that sonic would not use, is refused; it never gives other numbers than the model's own.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import itertools
import weakref
from typing import Any

import torch

from sonic.enums import ActivationType, GateUpLayout
from sonic.reference.activations import SWIGLU_OAI_ALPHA, SWIGLU_OAI_LIMIT, activation_value
from sonic.runtime.errors import ArgumentError, MissingPackageError, ShapeError, UnsupportedError
from sonic.runtime.layout import merge_gate_up_rows

__all__ = ["experts_forward", "register"]

NAME = "sonic"

# The first version whose experts modules state `is_concatenated`, without which the order of the
# gate and up rows of a weight is a guess.
_OLDEST_TRANSFORMERS = "5.7"

_KNOWN_TRAITS = frozenset({"has_gate", "has_bias"})
_OTHER_IMPLEMENTATION = 'Use experts_implementation="grouped_mm" for this model.'


def register(impl: str = "auto") -> None:
    """Makes ``experts_implementation="sonic"`` known to transformers, for every model.

    Calling it again is harmless; the latest ``impl`` counts, for existing models too.

    Args:
        impl: as in :func:`sonic.experts`. ``"auto"`` runs the kernels on CUDA tensors and the
            reference on CPU tensors, and raises on a GPU that no kernel serves.

    Raises:
        ArgumentError: ``impl`` is none of ``"auto"``, ``"cute"``, ``"reference"``.
        MissingPackageError: transformers is missing, broken, or too old to have the interface.
    """
    if impl not in ("auto", "cute", "reference"):
        raise ArgumentError(
            f"register: impl={impl!r} is not known. Allowed are 'auto', 'cute' and 'reference'."
        )
    _experts_interface().register(NAME, functools.partial(experts_forward, impl=impl))


def _experts_interface() -> Any:
    """transformers' ``ALL_EXPERTS_FUNCTIONS``, or MissingPackageError saying what to install."""
    remedy = f'Install it with: pip install "transformers>={_OLDEST_TRANSFORMERS}"'
    wanted = (
        f'register: experts_implementation="{NAME}" needs transformers >= {_OLDEST_TRANSFORMERS}'
    )
    try:
        installed = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise MissingPackageError(f"{wanted}, which is not installed. {remedy}") from None
    try:
        from transformers.integrations.moe import (
            ALL_EXPERTS_FUNCTIONS,
            use_experts_implementation,
        )
    except ImportError as error:
        raise MissingPackageError(
            f"{wanted}, but its experts interface cannot be imported from the installed "
            f"{installed}: {error}. {remedy}"
        ) from error
    if "is_concatenated" not in inspect.signature(use_experts_implementation).parameters:
        raise MissingPackageError(
            f"{wanted}: the installed {installed} does not say in which order its models store "
            f"gate and up rows. {remedy}"
        )
    return ALL_EXPERTS_FUNCTIONS


def experts_forward(
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """One experts module of a transformers model: the weighted sum of every token's experts.

    Under autocast tokens and weights are cast to autocast's dtype, as by a linear layer; otherwise
    the tokens are cast to the weights' dtype.

    Args:
        experts: a module made by transformers' ``use_experts_implementation``, with E experts.
            Transposed weights (gpt-oss stores ``(E, H, 2I)`` and ``(E, I, H)``) are copied into
            the order that sonic reads, at every call: in bf16 6 * E * I * H bytes are read and
            written, and as many held until the backward pass, which copies the gradients back.
            Gradient checkpointing holds the copies of one layer at a time.
        hidden_states: (T, H) float.
        top_k_index: (T, k) integer. Ids >= E mark experts of another rank; they contribute nothing.
        top_k_weights: (T, k) float in the order of ``top_k_index``, or (T, E) by expert id.
        impl: as in :func:`sonic.experts`.

    Returns:
        (T, H), in the dtype of ``hidden_states``.

    Raises:
        UnsupportedError: the module computes something that sonic has no kernel for.
        ShapeError: ``top_k_weights`` is neither (T, k) nor (T, E).
        SonicError: whatever :func:`sonic.experts` refuses.
    """
    from sonic.functional import experts as run_experts

    activation = _activation_of(experts)
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    w1, w2 = getattr(experts, up_name), experts.down_proj
    b1 = getattr(experts, up_name + "_bias") if experts.has_bias else None
    b2 = experts.down_proj_bias if experts.has_bias else None
    if experts.is_transposed:
        w1, w2 = w1.transpose(1, 2).contiguous(), w2.transpose(1, 2).contiguous()

    # Norms in float32 hand over float32 tokens. Under autocast sonic.experts casts everything.
    kind = hidden_states.device.type
    autocast = kind in ("cuda", "cpu") and torch.is_autocast_enabled(kind)
    output = run_experts(
        hidden_states if autocast else hidden_states.to(w1.dtype),
        top_k_index,
        _slot_weights(top_k_index, top_k_weights, w1.shape[0]),
        w1,
        w2,
        b1=b1,
        b2=b2,
        activation=activation,
        layout=_layout_of(experts),
        impl=impl,
    )
    return output.to(hidden_states.dtype)


def _slot_weights(
    top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Router weights in the order of the slots, (T, k), from (T, k) or from (T, E)."""
    if top_k_weights.shape == top_k_index.shape:
        return top_k_weights
    if top_k_weights.shape != (top_k_index.shape[0], num_experts):
        raise ShapeError(
            f"experts: top_k_weights has shape {tuple(top_k_weights.shape)} with {num_experts} "
            f"experts. Allowed is one weight per slot, {tuple(top_k_index.shape)} like "
            f"top_k_index, or one per expert, {(top_k_index.shape[0], num_experts)}. "
            "Pass what the model's router returns."
        )
    # A slot whose id is out of range is dropped later; the clamp only keeps this read in bounds.
    return top_k_weights.gather(1, top_k_index.long().clamp(0, num_experts - 1))


def _layout_of(experts: Any) -> GateUpLayout:
    return GateUpLayout.CONCATENATED if experts.is_concatenated else GateUpLayout.INTERLEAVED


# Module -> (what the answer depends on, the answer).
_ACTIVATION_BY_MODULE: weakref.WeakKeyDictionary[Any, tuple[Any, str]] = weakref.WeakKeyDictionary()


@torch.compiler.assume_constant_result
def _activation_of(experts: Any) -> str:
    """The activation that ``experts`` applies. Cached until its gate or a constant of it changes.

    torch.compile evaluates this while tracing, so the comparison is never part of a graph. The
    answer is a plain string, since Dynamo of torch 2.13 takes a member of an enum for an opaque
    object here.
    """
    facts = (
        getattr(experts, "act_fn", None),
        # The function, not the bound method: that would keep the module alive.
        getattr(experts._apply_gate, "__func__", experts._apply_gate),
        tuple(experts._parameters),
        tuple(experts._buffers),
        _constants(experts),
    )
    cached = _ACTIVATION_BY_MODULE.get(experts)
    if cached is not None and cached[0] == facts:
        return cached[1]
    _refuse_unknown_parts(experts)
    activation = _recognise(experts).value
    _ACTIVATION_BY_MODULE[experts] = (facts, activation)
    return activation


def _constants(experts: Any) -> tuple[tuple[str, Any], ...]:
    """The numbers and flags that the module's own code can depend on."""
    return tuple(
        (name, value)
        for name, value in vars(experts).items()
        if isinstance(value, (bool, int, float, str)) and name != "training"
    )


def _refuse_unknown_parts(experts: Any) -> None:
    """Raises if the module declares a step, or holds a tensor, that the layer would leave out."""
    traits = [
        name
        for name, value in _constants(experts)
        if name.startswith("has_") and value and name not in _KNOWN_TRAITS
    ]
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    used = {up_name, "down_proj"}
    if experts.has_bias:
        used |= {up_name + "_bias", "down_proj_bias"}
    # act_fn is judged by its values, and a parametrization appears as the weight it computes.
    tensors = [
        name
        for name, _ in itertools.chain(experts.named_parameters(), experts.named_buffers())
        if name not in used and name.split(".")[0] not in ("act_fn", "parametrizations")
    ]
    if traits or tensors:
        raise UnsupportedError(
            f'experts_implementation="{NAME}": {type(experts).__name__} has '
            f"{', '.join(sorted(traits + tensors))}, which sonic would leave out. It takes "
            f"{', '.join(sorted(used))} and nothing else. {_OTHER_IMPLEMENTATION}"
        )


def _recognise(experts: Any) -> ActivationType:
    """The activation whose values on a grid equal those of the module's own gate or ``act_fn``.

    Raises:
        UnsupportedError: none does, or the gate does not evaluate on float64 CPU tensors.
    """
    gated = bool(experts.has_gate)
    gate, up = _grid(gated)
    candidates = [activation for activation in ActivationType if activation.is_gated == gated]
    described = f"{_gate_name(experts)} of {type(experts).__name__}"
    try:
        with torch.no_grad():
            if up is None:
                actual = experts.act_fn(gate)
            else:
                rows = merge_gate_up_rows(gate, up, _layout_of(experts))
                actual = experts._apply_gate(rows)
            for activation in candidates:
                expected = activation_value(activation, gate, up)
                if torch.allclose(actual, expected, rtol=1e-6, atol=1e-7):
                    return activation
    except Exception as error:
        raise UnsupportedError(
            f'experts_implementation="{NAME}": {described} could not be compared with sonic\'s '
            f"activations on float64 CPU tensors: {error}. If this is an export, run the model "
            f"once before it. {_OTHER_IMPLEMENTATION}"
        ) from error
    constants = {name: v for name, v in _constants(experts) if isinstance(v, float)}
    raise UnsupportedError(
        f'experts_implementation="{NAME}": {described} {f"with {constants} " if constants else ""}'
        f"equals none of sonic's {'gated' if gated else 'ungated'} activations: "
        f"{', '.join(activation.value for activation in candidates)} (swiglu_oai has alpha="
        f"{SWIGLU_OAI_ALPHA}, limit={SWIGLU_OAI_LIMIT}). {_OTHER_IMPLEMENTATION}"
    )


def _gate_name(experts: Any) -> str:
    act_fn = getattr(experts, "act_fn", None)
    if experts.has_gate:
        own = getattr(experts._apply_gate, "__qualname__", repr(experts._apply_gate))
        return own if act_fn is None else f"{own} (act_fn {act_fn})"
    return f"act_fn {act_fn}"


def _grid(gated: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gate and up values, (1, N) float64 on CPU, that tell every activation from its neighbours.

    Dense where activations bend, with points close to both sides of gpt-oss's limit, and sparse far
    outside, where a module with another limit would differ.
    """
    options: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    near = torch.linspace(-12.0, 12.0, 97, **options)
    limits = torch.tensor([-7.001, -6.999, 6.999, 7.001], **options)
    far = torch.tensor([-1e30, -1e4, -100.0, -20.0, 20.0, 100.0, 1e4, 1e30], **options)
    if not gated:
        return torch.cat([near, limits, far])[None], None
    near = torch.cat([near[::4], limits])
    few = torch.tensor([-2.5, 0.75, 3.0], **options)
    pairs = torch.cat(
        [
            torch.cartesian_prod(near, near),
            torch.cartesian_prod(far, few),
            torch.cartesian_prod(few, far),
        ]
    )
    return pairs[:, 0][None], pairs[:, 1][None]
