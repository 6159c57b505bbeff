"""Modules: :class:`MoE` (router and experts), :class:`Experts` (no router), :class:`ExpertLinear`.

Building one touches no GPU and captures no stream; ``device="meta"`` gives shapes without memory.

Symbols: T tokens, H hidden size, I intermediate size, E experts.
"""

import inspect
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sonic import checks
from sonic.enums import ActivationType, GateUpLayout, KernelBackendMoE, ScoreOrder
from sonic.flops import register_if_counting
from sonic.functional import experts, experts_planned, grouped_mm
from sonic.plan import RoutingPlan
from sonic.routing.logits import router_logits
from sonic.routing.rounded_routing import rounded_choices
from sonic.routing.route import plan_of, route
from sonic.routing.switch_loss import switch_loss
from sonic.routing.token_rounding import RULES as ROUNDING_RULES
from sonic.routing.token_rounding import resolve_tile
from sonic.runtime.errors import (
    ArgumentError,
    DeviceError,
    ShapeError,
    SonicError,
    UnsupportedError,
)

# What a layer and its caller call the arguments of the functions below.
_PARAMETER_NAMES = {
    r"\bw1\b": "c_fc.weight",
    r"\bw2\b": "c_proj.weight",
    r"\bb1\b": "c_fc.bias",
    r"\bb2\b": "c_proj.bias",
    r"\brouter_weight\b": "router.weight",
}
_LAYER_NAMES = _PARAMETER_NAMES | {
    'impl="cute"': 'kernel_backend_moe="sonicmoe"',
    'impl="reference"': 'kernel_backend_moe="torch"',
}


class ExpertLinear(nn.Module):
    """One linear map per expert: ``weight (E, out_features, in_features)``, ``bias`` or None.

    Called on rows that are grouped by expert, it is :func:`sonic.grouped_mm`. In :class:`MoE` and
    :class:`Experts` it only holds parameters.

    Args:
        num_experts, in_features, out_features: sizes, at least 1.
        add_bias: whether there is a ``bias (E, out_features)``.
        std: standard deviation of the normal initialisation of ``weight``; ``bias`` starts at zero.
        device, dtype: of the parameters.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        in_features: int,
        out_features: int,
        add_bias: bool,
        std: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        checks.check_num_experts(op, "num_experts", num_experts)
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            checks.check_int(op, name, size, 1, 2**31 - 1, "a size")
        checks.check_bool(op, "add_bias", add_bias)
        checks.check_parameters(op, std, device, dtype)
        self.std = std
        shape = (num_experts, out_features, in_features)
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        if add_bias:
            self.bias = nn.Parameter(torch.empty(shape[:2], device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, std) weight, zero bias; also what to call after ``to_empty`` on a meta module."""
        nn.init.normal_(self.weight, std=self.std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, rows: Tensor, offset_by_expert: Tensor, impl: str = "auto") -> Tensor:
        """``rows (R, in_features)`` to ``(R, out_features)``; see :func:`sonic.grouped_mm`."""
        return grouped_mm(rows, self.weight, offset_by_expert, bias=self.bias, impl=impl)

    def extra_repr(self) -> str:
        num_experts, out_features, in_features = self.weight.shape
        return (
            f"num_experts={num_experts}, in_features={in_features}, out_features={out_features}, "
            f"bias={self.bias is not None}"
        )


class NormalLinear(nn.Linear):
    """``nn.Linear`` without bias whose ``reset_parameters`` gives N(0, std)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        std: float,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.std = std  # ahead of nn.Linear's constructor, which resets the parameters
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)


class _ExpertsBase(nn.Module):
    """Parameters and options that :class:`Experts` and :class:`MoE` share."""

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation_function: str | ActivationType,
        add_bias: bool,
        std: float,
        *,
        layout: str | GateUpLayout = GateUpLayout.INTERLEAVED,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        checks.check_num_experts(op, "num_experts", num_experts)
        for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            checks.check_int(op, name, size, 1, 2**31 - 1, "a size")
        checks.check_bool(op, "add_bias", add_bias)
        checks.check_parameters(op, std, device, dtype)
        register_if_counting()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.activation_function = checks.choice(
            op, "activation_function", activation_function, ActivationType
        )
        self.layout = checks.choice(op, "layout", layout, GateUpLayout)
        gated = self.activation_function.is_gated
        if gated:
            most, why = (2**31 - 1) // 2, "gate and up rows have one index"
            checks.check_int(op, "intermediate_size", intermediate_size, 1, most, why)
        width = intermediate_size * (2 if gated else 1)
        self.c_fc = ExpertLinear(
            num_experts, hidden_size, width, add_bias, std, device=device, dtype=dtype
        )
        self.c_proj = ExpertLinear(
            num_experts, intermediate_size, hidden_size, add_bias, std, device=device, dtype=dtype
        )

    def reset_parameters(self) -> None:
        """Initialise every part anew; what to call after ``to_empty`` on a meta module.

        Raises:
            ArgumentError: a module of the caller's has parameters and no ``reset_parameters``.
        """
        for name, part in self.named_children():
            _reset(name, part)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, "
            f"activation_function={self.activation_function.value!r}, layout={self.layout.value!r}"
        )

    def _parameters_and_options(self, impl: str) -> dict[str, Any]:
        """What every call of the experts takes besides tokens and routing."""
        return {
            "w1": self.c_fc.weight,
            "w2": self.c_proj.weight,
            "b1": self.c_fc.bias,
            "b2": self.c_proj.bias,
            "activation": self.activation_function,
            "layout": self.layout,
            "impl": impl,
        }


class Experts(_ExpertsBase):
    """The experts without a router: ``c_proj(act(c_fc(x)))``, weighted and summed per token.

    Args:
        num_experts: E. hidden_size: H. intermediate_size: I.
        activation_function: a value of :class:`sonic.ActivationType`.
        add_bias: biases in ``c_fc`` and ``c_proj``.
        std: standard deviation of the normal initialisation of the weights; biases start at zero.
        layout: order of the gate and up rows of ``c_fc``; ``"concatenated"`` for Hugging Face
            checkpoints. Not read if the activation is not gated.
        device, dtype: of the parameters.

    Parameters: ``c_fc.weight`` (E, 2I, H) gated or (E, I, H), ``c_fc.bias``, ``c_proj.weight``
    (E, H, I), ``c_proj.bias``.
    """

    def forward(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, impl: str = "auto"
    ) -> Tensor:
        """``hidden_states (T, H)``, ids and weights ``(T, top_k)``: see :func:`sonic.experts`."""
        try:
            return experts(
                hidden_states,
                topk_ids,
                topk_weights,
                **self._parameters_and_options(impl),
            )
        except SonicError as error:
            raise of_layer(error, type(self).__name__, _PARAMETER_NAMES) from error


class MoE(_ExpertsBase):
    """Router and experts, with the signature and parameter names of the ``sonicmoe`` package.

    Args:
        num_experts: E. num_experts_per_tok: experts per token, 1 to min(64, E).
        hidden_size: H. intermediate_size: I; multiples of 8 for the kernels.
        activation_function: a value of :class:`sonic.ActivationType`.
        add_bias: biases in the experts; the router has none.
        std: standard deviation of the normal initialisation of all weights; biases start at zero.
        layout: order of the gate and up rows of ``c_fc``; ``"concatenated"`` for Hugging Face
            checkpoints. Not read if the activation is not gated.
        score_order: a value of :class:`sonic.ScoreOrder`; the Qwen3 family is
            ``"topk_over_softmax_norm"``.
        routing: ``"top_k"``, or ``"token_rounding"``: in training every expert's number of tokens
            becomes a multiple of the kernels' tile. In eval mode, and with ``is_inference_mode``,
            routing is top-k. The balancing loss takes one more look at the logits then.
        rounding: the rule of :func:`sonic.token_rounding`; used with token rounding only. With
            ``"nr"`` an expert of less than half a tile of rows loses them all: in a training step
            whose T ``num_experts_per_tok`` / E is below that, the output is mostly zero, and the
            package's logger warns once. Choose a smaller tile, more tokens or ``"up"``.
        tile: the number of rows to round to, ``"auto"`` for 128, the kernels' own; used likewise.
        router: a module of :mod:`sonic.nn.routers`, or None for a linear map without bias that
            ``score_order`` and ``routing`` apply to; they are not read with a router.
        shared_experts: a module from (..., H) to (..., H) whose result is added, such as
            :class:`sonic.nn.routers.SharedExperts`, or None.
        device, dtype: of the parameters.

    Parameters: those of :class:`Experts`, ``router.weight`` (E, H) or the router's own, and those
    of ``shared_experts``.

    Raises:
        ArgumentError: a size, a name or a flag is none of the above, or a router does not fit the
            layer.
        ShapeError: shared experts of another hidden size.
        DTypeError, DeviceError: ``dtype`` or ``device`` is none that parameters can have.

    Numerics:
        The router's product has the wider dtype of its operands, scores and loss are fp32 (fp64 of
        fp64), and the experts are those of :func:`sonic.experts`. Deterministic for given random
        numbers, which two rules of rounding draw from the device's default generator. Nothing waits
        for the device, and forward and backward pass can be captured in a CUDA graph.

    Memory:
        Backward keeps :func:`sonic.saved_bytes` for the experts, and of the built-in router the
        logits, T E in their dtype, and 4 T top_k + 4 T + 4 E + 4 bytes; with token rounding in
        training 4 S + 16 T top_k + 8 T + 4 E + 4, with S of :func:`sonic.routing.max_pairs`.

    Example:
        >>> layer = MoE(8, 2, 32, 16, "swiglu", False, 0.02, routing="token_rounding", tile=16)
        >>> out, loss = layer(torch.randn(4, 64, 32), KernelBackendMoE.torch)
        >>> out.shape, loss.shape
        (torch.Size([4, 64, 32]), torch.Size([]))

    Source: SonicMoE (arXiv 2512.14080), section 3 for the layer, section 5, algorithms 4 and 6, for
    token rounding.
    """

    def __init__(
        self,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        intermediate_size: int,
        activation_function: str | ActivationType,
        add_bias: bool,
        std: float,
        *,
        layout: str | GateUpLayout = GateUpLayout.INTERLEAVED,
        score_order: str | ScoreOrder = ScoreOrder.SOFTMAX_OVER_TOPK,
        routing: str = "top_k",
        rounding: str = "nr",
        tile: int | str = "auto",
        router: nn.Module | None = None,
        shared_experts: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_experts,
            hidden_size,
            intermediate_size,
            activation_function,
            add_bias,
            std,
            layout=layout,
            device=device,
            dtype=dtype,
        )
        if router is None:
            limit, why = min(checks.MAX_TOP_K, num_experts), "at most 64 and at most E"
        else:
            # Identity and null experts may make it more than E.
            limit, why = checks.MAX_TOP_K, "at most 64"
        checks.check_int("MoE", "num_experts_per_tok", num_experts_per_tok, 1, limit, why)
        self.top_k = num_experts_per_tok
        self.score_order = checks.choice("MoE", "score_order", score_order, ScoreOrder)
        _check_routing(routing, rounding, tile)
        self.routing = routing
        self.rounding = rounding
        self.tile = tile
        self.has_own_router = router is not None
        self.router: nn.Module
        self._router_inputs: tuple[str, ...] | None = ()
        self._needed_inputs: tuple[str, ...] = ()
        if router is None:
            self.router = NormalLinear(hidden_size, num_experts, std, device=device, dtype=dtype)
        else:
            _check_router_module(router, hidden_size, num_experts, num_experts_per_tok, routing)
            self.router = router
            self._router_inputs, self._needed_inputs = _input_names(router)
        _check_shared_experts(shared_experts, hidden_size)
        self.shared_experts = shared_experts

    def forward(
        self,
        hidden_states: Tensor,
        kernel_backend_moe: str | KernelBackendMoE = KernelBackendMoE.sonicmoe,
        is_inference_mode: bool = False,
        router_inputs: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Route each token and run its experts.

        Args:
            hidden_states: (..., H), floating point.
            kernel_backend_moe: ``sonicmoe`` for the kernels (CUDA), ``torch`` for the reference.
            is_inference_mode: if True, nothing is kept for a backward pass, no loss is computed and
                nothing is rounded. A module given as ``router`` goes by its own ``training``, with
                its noise and its capacity: call ``eval()`` for theirs of inference.
            router_inputs: keyword arguments for the module given as ``router``, such as ``mask``
                (added to the logits: -inf bars an expert).

        Returns:
            The output, shaped like ``hidden_states``, and the load-balancing loss, a float32 scalar
            that is 1 for an even load (over the tokens of this process), or None in inference mode.
            The load is that of the tokens' choices, before any rounding, which would hide from the
            loss what is below half a tile. With a ``router``, the loss is its ``aux_loss``.

        Raises:
            ArgumentError: ``kernel_backend_moe`` or ``is_inference_mode`` is none of the above, or
                ``router_inputs`` are not those of the router.
            ShapeError, DTypeError: ``hidden_states`` is not (..., H), or of another dtype than the
                weights.
            DeviceError: ``sonicmoe`` with a tensor that is not on a CUDA device, or tensors on
                several devices.
            UnsupportedError: ``scattermoe``, which is not part of this package, or no kernels for
                this GPU.
            MissingPackageError: triton or cutlass is missing.
        """
        impl = self._impl(hidden_states, kernel_backend_moe)
        checks.check_bool("MoE", "is_inference_mode", is_inference_mode)
        if router_inputs is not None or self._needed_inputs:
            self._check_router_inputs({} if router_inputs is None else router_inputs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_inference_mode):
            if self.has_own_router:
                balance = not is_inference_mode
                out, aux_loss = self._by_own_router(hidden_states, impl, balance, router_inputs)
            else:
                out, aux_loss = self._by_linear_router(hidden_states, impl, is_inference_mode)
            out = out.view(hidden_states.shape)
            if self.shared_experts is not None:
                # Experts that take tokens alone: SharedExperts, by its kernels.
                options = {"impl": impl} if isinstance(self.shared_experts, Experts) else {}
                shared = self.shared_experts(hidden_states, **options)
                _check_shared_output(shared, out)
                out = out + shared
        return out, aux_loss

    def _by_linear_router(
        self, hidden_states: Tensor, impl: str, is_inference_mode: bool
    ) -> tuple[Tensor, Tensor | None]:
        tokens = hidden_states.reshape(-1, self.hidden_size)
        weight = cast(Tensor, self.router.weight)
        rounds = self.routing == "token_rounding" and self.training and not is_inference_mode
        self._check_own_linear()
        try:
            checks.check_router("MoE", tokens, weight, self.num_experts, self.top_k, impl)
        except SonicError as error:
            raise of_layer(error) from error
        logits = router_logits(tokens, weight)
        if rounds:
            scores, plan, load = rounded_choices(
                logits, self.top_k, self.tile, self.rounding, order=self.score_order
            )
            # The loss counts what the tokens choose.
            loss = switch_loss(logits, load, self.top_k)
            return self._experts(tokens, scores, plan, impl), loss
        # The loss comes from the kernels that route, not from a softmax of its own.
        routed = route(
            logits,
            self.top_k,
            renormalize=self.score_order is not ScoreOrder.TOPK_OVER_SOFTMAX,
            num_experts=self.num_experts,
            balance=not is_inference_mode,
        )
        plan = cast(RoutingPlan, plan_of(routed))
        out = self._experts(tokens, routed.scores, plan, impl)
        return out, None if is_inference_mode else routed.switch

    def _experts(self, tokens: Tensor, scores: Tensor, plan: RoutingPlan, impl: str) -> Tensor:
        try:
            return experts_planned(
                tokens,
                scores,
                plan,
                **self._parameters_and_options(impl),
            )
        except SonicError as error:
            raise of_layer(error) from error

    def _by_own_router(
        self,
        hidden_states: Tensor,
        impl: str,
        balance: bool,
        router_inputs: Mapping[str, Tensor] | None,
    ) -> tuple[Tensor, Tensor | None]:
        routed = self.router(hidden_states, balance=balance, **(router_inputs or {}))
        _check_routed(self.router, routed)
        tokens = hidden_states.reshape(-1, self.hidden_size)
        out = self._experts(tokens, routed.topk_weights, routed.plan, impl)
        if routed.identity_weight is not None:
            # The float32 weight makes the sum float32, which is then rounded once.
            out = torch.addcmul(out, routed.identity_weight[:, None], tokens).to(out.dtype)
        return out, routed.aux_loss if balance else None

    def _check_own_linear(self) -> None:
        """What the built-in router does is done with its weight alone."""
        router = self.router
        if isinstance(router, nn.Linear) and router.bias is None:
            return
        came = type(router).__name__ + (" with a bias" if isinstance(router, nn.Linear) else "")
        raise ArgumentError(
            checks.message(
                "MoE",
                f"the layer's router was replaced by a {came}",
                "a torch.nn.Linear without bias there",
                "Build the layer with router=, for instance a router of sonic.nn.routers.",
            )
        )

    def _check_router_inputs(self, router_inputs: Any) -> None:
        known = self._router_inputs
        if not self.has_own_router:
            allowed = "router_inputs with a module given as router"
            todo = "Leave them out, or build the layer with a router of sonic.nn.routers."
        elif not isinstance(router_inputs, Mapping):
            allowed = "a mapping of keyword arguments for the router"
            todo = 'Pass for instance router_inputs={"mask": mask}.'
        elif known is not None and any(name not in known for name in router_inputs):
            allowed = f"the inputs of {type(self.router).__name__}: {', '.join(known) or 'none'}"
            todo = "Rename them, or leave them out."
        elif any(name not in router_inputs for name in self._needed_inputs):
            allowed = f"{' and '.join(self._needed_inputs)}, which this router needs"
            todo = f'Pass router_inputs={{"{self._needed_inputs[0]}": ..., ...}} to the layer.'
        else:
            return
        came = type(router_inputs).__name__
        if isinstance(router_inputs, Mapping):
            came = ", ".join(str(name) for name in router_inputs) or "no input"
        raise ArgumentError(checks.message("MoE", f"router_inputs came with {came}", allowed, todo))

    def _impl(self, hidden_states: Tensor, kernel_backend_moe: str | KernelBackendMoE) -> str:
        backend = checks.choice("MoE", "kernel_backend_moe", kernel_backend_moe, KernelBackendMoE)
        if backend is KernelBackendMoE.scattermoe:
            raise UnsupportedError(
                checks.message(
                    "MoE",
                    "KernelBackendMoE.scattermoe was asked for, which is not part of this package",
                    "KernelBackendMoE.sonicmoe (CUDA), KernelBackendMoE.torch (any device)",
                    "Pass kernel_backend_moe=KernelBackendMoE.sonicmoe.",
                )
            )
        checks.check_hidden_size(
            "MoE",
            hidden_states,
            self.hidden_size,
            "Project to the layer's hidden_size, or build the layer with this one.",
        )
        if backend is KernelBackendMoE.torch:
            return "reference"
        if hidden_states.device.type == "cpu":
            raise DeviceError(
                checks.message(
                    "MoE",
                    "KernelBackendMoE.sonicmoe was asked for a tensor on cpu",
                    "CUDA tensors",
                    "Move module and input to a CUDA device, or pass "
                    "kernel_backend_moe=KernelBackendMoE.torch.",
                )
            )
        return "cute"

    def extra_repr(self) -> str:
        text = (
            f"{super().extra_repr()}, num_experts_per_tok={self.top_k}, "
            f"score_order={self.score_order.value!r}"
        )
        if self.routing == "token_rounding":
            text += f", routing='token_rounding', rounding={self.rounding!r}, tile={self.tile!r}"
        return text


def of_layer(
    error: SonicError, layer: str = "MoE", names: Mapping[str, str] = _LAYER_NAMES
) -> SonicError:
    """``error`` of a function, by the names that a layer and its caller have for arguments:
    ``names``, by regular expression."""
    text = re.sub(r"^\w+: ", "", str(error))
    for name, theirs in names.items():
        text = re.sub(name, theirs, text)
    if "on meta" in text:
        text += " A layer on meta gets memory from to_empty(device=...), then reset_parameters()."
    return type(error)(f"{layer}: {text}")


def _reset(name: str, part: nn.Module) -> None:
    """Initialise ``part``, of this name in the layer, and what it holds."""
    if callable(reset := getattr(part, "reset_parameters", None)):
        reset()
        return
    if any(True for _ in part.parameters(recurse=False)):
        raise ArgumentError(
            checks.message(
                "reset_parameters",
                f"{name} is a {type(part).__name__} with parameters of its own",
                "modules with a reset_parameters",
                "Give it one.",
            )
        )
    for child, inner in part.named_children():
        _reset(f"{name}.{child}", inner)


def _check_router_module(
    router: Any, hidden_size: int, num_experts: int, top_k: int, routing: str
) -> None:
    wanted = {"hidden_size": hidden_size, "num_experts": num_experts, "top_k": top_k}
    if not isinstance(router, nn.Module) or not all(hasattr(router, name) for name in wanted):
        raise ArgumentError(
            checks.message(
                "MoE",
                f"router is of type {type(router).__name__}",
                "a module of sonic.nn.routers, or one that has its hidden_size, num_experts and "
                "top_k and returns a RouterOutput",
                "Wrap your network in a subclass of sonic.nn.routers.Router, or pass its ids and "
                "weights to a PrecomputedRouter.",
            )
        )
    taken = inspect.signature(router.forward).parameters
    if "balance" not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        raise ArgumentError(
            checks.message(
                "MoE",
                f"{type(router).__name__}.forward takes {', '.join(taken) or 'nothing'}",
                "forward(hidden_states, *, balance=True, ...) -> RouterOutput; balance=False asks "
                "for no loss and no counts",
                "Add the keyword to forward.",
            )
        )
    if routing != "top_k":
        raise ArgumentError(
            checks.message(
                "MoE",
                f"routing={routing!r} came with a router",
                "routing='top_k' with a router",
                "Leave the router out: rounding works on the built-in one.",
            )
        )
    for name, value in wanted.items():
        found = getattr(router, name)
        if found != value:
            raise ArgumentError(
                checks.message(
                    "MoE",
                    f"router.{name}={found!r} came to a layer with {value}",
                    f"a router with {name}={value}",
                    "Build both with the same sizes; identity and null experts do not count as "
                    "experts.",
                )
            )


def _input_names(router: nn.Module) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """What ``router_inputs`` may name, None for anything, and what it must name."""
    first, *others = inspect.signature(router.forward).parameters.values()
    inputs = [p for p in others if p.name != "balance"]
    needed = tuple(p.name for p in inputs if p.kind is p.KEYWORD_ONLY and p.default is p.empty)
    if any(p.kind is p.VAR_KEYWORD for p in (first, *others)):
        return None, needed
    return tuple(p.name for p in inputs), needed


def _check_routed(router: nn.Module, routed: Any) -> None:
    if not isinstance(getattr(routed, "plan", None), RoutingPlan):
        raise ArgumentError(
            checks.message(
                "MoE",
                f"{type(router).__name__} returned a {type(routed).__name__}",
                "a sonic.nn.routers.RouterOutput with a plan",
                "Return what a router of sonic.nn.routers does, a PrecomputedRouter for instance.",
            )
        )


def _check_shared_output(shared: Any, out: Tensor) -> None:
    name = "the output of shared_experts"
    checks.check_is_tensor("MoE", name, shared)
    if shared.shape != out.shape:
        raise ShapeError(
            checks.message(
                "MoE",
                f"{name} has shape {tuple(shared.shape)}",
                f"that of hidden_states, {tuple(out.shape)}",
                "Let it map (..., H) to (..., H).",
            )
        )
    checks.check_same_device("MoE", "the layer's output", out, **{name: shared})
    checks.check_same_dtype("MoE", "the layer's output", out, **{name: shared})


def _check_shared_experts(shared: Any, hidden_size: int) -> None:
    routed = isinstance(shared, _ExpertsBase) and type(shared).forward in (
        Experts.forward,
        MoE.forward,
    )
    if shared is not None and (routed or not isinstance(shared, nn.Module)):
        raise ArgumentError(
            checks.message(
                "MoE",
                f"shared_experts is of type {type(shared).__name__}",
                "a module from (..., H) to (..., H), or None",
                "Pass a sonic.nn.routers.SharedExperts, for instance, which routes nothing.",
            )
        )
    for part, name in _sizes_of_ends(shared):
        if (size := getattr(part, name)) != hidden_size:
            raise ShapeError(
                checks.message(
                    "MoE",
                    f"{name}={size} of shared_experts came to a layer of hidden_size={hidden_size}",
                    f"shared experts with {name}={hidden_size}",
                    "Build both with the same hidden size.",
                )
            )


def _sizes_of_ends(shared: nn.Module | None) -> list[tuple[nn.Module, str]]:
    """Modules at the ends of ``shared``, and which of their attributes is H, as far as known."""
    if isinstance(shared, _ExpertsBase):
        return [(shared, "hidden_size")]
    ends = (
        (shared[0], shared[-1]) if isinstance(shared, nn.Sequential) and shared else (shared,) * 2
    )
    named = zip(ends, ("in_features", "out_features"), strict=True)
    # A lazy one has none yet.
    return [
        (part, name) for part, name in named if isinstance(part, nn.Linear) and part.in_features
    ]


def _check_routing(routing: str, rounding: str, tile: int | str) -> None:
    checks.check_known("MoE", "routing", routing, ("top_k", "token_rounding"))
    checks.check_known("MoE", "rounding", rounding, ROUNDING_RULES)
    resolve_tile("MoE", tile)
