"""One layer with its inputs, and the two ways in which the benchmarks run it.

Values have unit scale (weights ``N(0, 1/fan_in)``, everything else ``N(0, 1)``), so that an error
is visible against the signal and the GPU draws realistic power; zeros would run at higher clocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.shapes import Shape
from sonic.enums import ActivationType, GateUpLayout, ScoreOrder

BIAS_SCALE = 0.1


@dataclass(frozen=True)
class LayerOptions:
    """Everything that selects a variant of the layer besides its size."""

    dtype: torch.dtype = torch.bfloat16
    device: torch.device = torch.device("cuda")
    activation: ActivationType = ActivationType.SWIGLU
    layout: GateUpLayout = GateUpLayout.INTERLEAVED
    score_order: ScoreOrder = ScoreOrder.SOFTMAX_OVER_TOPK
    add_bias: bool = False
    impl: str = "auto"
    seed: int = 1111

    @property
    def gated(self) -> bool:
        return self.activation.is_gated


@dataclass(frozen=True)
class Layer:
    """Leaf tensors of one layer.

    ``x`` (T,H), ``router_weight`` (E,H), ``w1`` (E,2I|I,H), ``w2`` (E,H,I), ``b1``, ``b2`` or None,
    ``dout`` (T,H): the gradient that backward starts from. ``topk_ids`` (T,top_k) int32 and
    ``topk_weights`` (T,top_k) fp32: what the package's own router makes of ``x``.
    """

    shape: Shape
    options: LayerOptions
    x: torch.Tensor
    router_weight: torch.Tensor
    w1: torch.Tensor
    w2: torch.Tensor
    b1: torch.Tensor | None
    b2: torch.Tensor | None
    dout: torch.Tensor
    logits: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor


@dataclass(frozen=True)
class Run:
    """What one forward and backward of the layer under test returned, by tensor name.

    ``allowance`` multiplies the errors that it may have: 1 of our layer, whose rounding points are
    those of the yardstick; more of one that rounds more often.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    with_router: bool
    allowance: float = 1.0


def make_layer(shape: Shape, options: LayerOptions) -> Layer:
    """Seeded inputs of ``shape``, with the routing of the package's own router."""
    from sonic.routing.topk import topk_routing

    generator = torch.Generator(device=options.device).manual_seed(options.seed)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.empty(size, dtype=options.dtype, device=options.device)
        # One slice of the leading axis at a time: fp32 noise for all experts would not fit.
        for part in values if len(size) == 3 else (values,):
            noise = torch.randn(part.shape, generator=generator, device=options.device)
            part.copy_(noise.mul_(scale))
        return values.requires_grad_()

    T, H, I, E = shape.T, shape.H, shape.I, shape.E  # noqa: E741
    up_rows = 2 * I if options.gated else I
    x = normal(T, H)
    router_weight = normal(E, H, scale=H**-0.5)
    with torch.no_grad():
        logits = torch.nn.functional.linear(x, router_weight)
        topk_weights, topk_ids = topk_routing(logits, shape.top_k, order=options.score_order)
    return Layer(
        shape=shape,
        options=options,
        x=x,
        router_weight=router_weight,
        w1=normal(E, up_rows, H, scale=H**-0.5),
        w2=normal(E, H, I, scale=I**-0.5),
        b1=normal(E, up_rows, scale=BIAS_SCALE) if options.add_bias else None,
        b2=normal(E, H, scale=BIAS_SCALE) if options.add_bias else None,
        dout=normal(T, H).detach(),
        logits=logits,
        topk_ids=topk_ids,
        topk_weights=topk_weights.detach().requires_grad_(),
    )


def experts_forward(layer: Layer) -> torch.Tensor:
    """Output (T,H) from given ids and weights: the region that other packages are timed on."""
    import sonic

    return sonic.experts(
        layer.x,
        layer.topk_ids,
        layer.topk_weights,
        layer.w1,
        layer.w2,
        b1=layer.b1,
        b2=layer.b2,
        activation=layer.options.activation,
        layout=layer.options.layout,
        impl=layer.options.impl,
    )


def moe_forward(layer: Layer) -> torch.Tensor:
    """Output (T,H) with the router included."""
    return call_moe(layer)[0]


def call_moe(layer: Layer, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``sonic.moe`` on ``layer``, ``options`` passed through: output, logits, rows by expert."""
    import sonic

    return sonic.moe(
        layer.x,
        layer.router_weight,
        layer.w1,
        layer.w2,
        top_k=layer.shape.top_k,
        score_order=layer.options.score_order,
        b1=layer.b1,
        b2=layer.b2,
        activation=layer.options.activation,
        layout=layer.options.layout,
        impl=layer.options.impl,
        **options,
    )


def gradient_inputs(layer: Layer, with_router: bool) -> dict[str, torch.Tensor]:
    """Leaves that get a gradient, by the name of that gradient."""
    inputs = {"dx": layer.x, "dw1": layer.w1, "dw2": layer.w2}
    if layer.b1 is not None and layer.b2 is not None:
        inputs |= {"db1": layer.b1, "db2": layer.b2}
    return inputs | (
        {"drouter_w": layer.router_weight} if with_router else {"dtopk_weights": layer.topk_weights}
    )


def forward_backward(
    layer: Layer, forward: Callable[[Layer], torch.Tensor], with_router: bool
) -> tuple[torch.Tensor, ...]:
    """One forward and backward; gradients are returned, never accumulated into ``.grad``."""
    leaves = tuple(gradient_inputs(layer, with_router).values())
    return torch.autograd.grad(forward(layer), leaves, layer.dout)


def run_experts(layer: Layer) -> Run:
    """Output and gradients from given ids and weights."""
    out = experts_forward(layer)
    leaves = gradient_inputs(layer, with_router=False)
    gradients = torch.autograd.grad(out, tuple(leaves.values()), layer.dout)
    named = dict(zip(leaves, gradients, strict=True))
    return Run("experts", {"out": out.detach()} | named, with_router=False)


def run_moe(layer: Layer) -> Run:
    """Output, router logits, expert frequency and gradients, with the router included."""
    out, logits, frequency = call_moe(layer)
    leaves = gradient_inputs(layer, with_router=True)
    gradients = torch.autograd.grad(out, tuple(leaves.values()), layer.dout)
    named = dict(zip(leaves, gradients, strict=True))
    facts = {"out": out.detach(), "logits": logits.detach(), "frequency": frequency}
    return Run("moe", facts | named, with_router=True)


def run_inference(layer: Layer) -> list[Run]:
    """Output of both regions without gradients, for which other kernels run."""
    with torch.no_grad():
        experts, moe = experts_forward(layer), moe_forward(layer)
    return [
        Run("experts inference", {"out": experts}, with_router=False),
        Run("moe inference", {"out": moe}, with_router=True),
    ]
