"""One small layer for the GPU tests: its tensors, and calls of it through the public functions."""

import torch

import sonic
from sonic.enums import ActivationType, GateUpLayout
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


def assert_same_bits(first, second) -> None:
    """Equal bit for bit, and not because nothing was computed."""
    for index, (a, b) in enumerate(zip(first, second, strict=True)):
        assert a.dtype == b.dtype and torch.equal(a, b), f"tensor {index} differs"
        assert a.isfinite().all() and a.any(), f"tensor {index} is empty of signal"
