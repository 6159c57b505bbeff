"""One small layer for the GPU tests: its tensors, and calls of it through the public functions."""

import torch

import sonic
from sonic.enums import ActivationType, GateUpLayout
from sonic.reference import moe_reference, topk_scores
from sonic.testing import LayerInputs, LayerProblem, Routing, make_inputs

DEVICE = "cuda"
IMPL = "cute"
LEAVES = ("hidden_states", "topk_weights", "w1", "w2", "b1", "b2")

# No size is a multiple of a tile; expert ids include dropped ones.
PROBLEM = LayerProblem(
    seed=11,
    num_tokens=201,
    hidden_size=136,
    intermediate_size=72,
    num_experts=7,
    top_k=3,
    activation=ActivationType.SWIGLU,
    layout=GateUpLayout.INTERLEAVED,
    has_bias=True,
    dtype=torch.bfloat16,
    ids_dtype=torch.int64,
    routing=Routing.UNIFORM,
    drop_fraction=0.2,
    contiguous=True,
)


def inputs_of(problem: LayerProblem) -> LayerInputs:
    return make_inputs(problem, DEVICE)


def leaves_of(problem: LayerProblem) -> tuple[dict[str, torch.Tensor], LayerInputs]:
    """The differentiable tensors by name, requiring gradients, and all inputs."""
    inputs = inputs_of(problem)
    leaves = {
        name: getattr(inputs, name).requires_grad_()
        for name in LEAVES
        if getattr(inputs, name) is not None
    }
    return leaves, inputs


def experts(x, ids, weights, w1, w2, b1, b2, activation, layout):
    """The kernels, in the signature that :func:`sonic.testing.run_layer` calls."""
    options = {"activation": activation, "layout": layout, "impl": IMPL}
    return sonic.experts(x, ids, weights, w1, w2, b1=b1, b2=b2, **options)


def call(leaves: dict[str, torch.Tensor], ids: torch.Tensor, **options) -> torch.Tensor:
    return sonic.experts(topk_ids=ids, **leaves, **{"impl": IMPL} | options)


def gradients(out: torch.Tensor, leaves: dict[str, torch.Tensor], dout: torch.Tensor):
    return torch.autograd.grad(out, list(leaves.values()), dout)


def step(leaves: dict[str, torch.Tensor], ids: torch.Tensor, dout: torch.Tensor, **options):
    """Output and every gradient of one call."""
    out = call(leaves, ids, **options)
    return out.detach(), *gradients(out, leaves, dout)


def module_references(layer: sonic.MoE, x: torch.Tensor):
    """Outputs (T, H) of a gated layer with biases, and the gradients of their sum for each of its
    parameters: in float64, and in the layer's dtype with the kernels' rounding points."""
    flat = x.detach().flatten(0, -2)
    _, ids = topk_scores(layer.router(flat), layer.top_k, layer.score_order)
    options = {"top_k": layer.top_k, "score_order": layer.score_order, "topk_ids": ids}
    results = []
    for dtype, low_precision in ((torch.float64, False), (x.dtype, True)):
        leaves = {n: p.detach().to(dtype).requires_grad_() for n, p in layer.named_parameters()}
        weights = (leaves[f"{name}.weight"] for name in ("router", "c_fc", "c_proj"))
        biases = {"b1": leaves["c_fc.bias"], "b2": leaves["c_proj.bias"]}
        out, *_ = moe_reference(
            flat.to(dtype), *weights, **biases, **options, low_precision=low_precision
        )
        results.append((out.detach(), *gradients(out, leaves, torch.ones_like(out))))
    return results


def assert_same_bits(first, second) -> None:
    """Equal bit for bit, and not because nothing was computed."""
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"tensor {index} differs"
        assert a.isfinite().all() and a.any(), f"tensor {index} is empty of signal"
