"""Layers of one process on several GPUs, whichever is current."""

import pytest
import torch

import sonic
from sonic.enums import ActivationType
from sonic.testing import make_inputs
from tests.layers import LEAVES, PROBLEM, assert_same_bits, step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

OPTIONS = {"activation": PROBLEM.activation, "layout": PROBLEM.layout}


def _step_on(device: str):
    inputs = make_inputs(PROBLEM, device)
    leaves = {name: getattr(inputs, name).requires_grad_() for name in LEAVES}
    return step(leaves, inputs.topk_ids, inputs.dout, **OPTIONS)


def test_experts_on_a_device_that_is_not_current():
    """The same kernels, loaded once, on both GPUs in turns: the same bits."""
    assert torch.cuda.current_device() == 0
    first = _step_on("cuda:0")
    other = _step_on("cuda:1")
    again = _step_on("cuda:0")
    assert torch.cuda.current_device() == 0
    assert all(tensor.device.index == 1 and tensor.any() for tensor in other)
    assert_same_bits(first, [tensor.to("cuda:0") for tensor in other])
    assert_same_bits(first, again)


@pytest.mark.parametrize("options", [{}, {"routing": "token_rounding", "tile": 16}], ids=str)
def test_layer_on_a_device_that_is_not_current(options):
    """Routing, plan, experts and balancing loss."""
    torch.manual_seed(0)
    layer = sonic.MoE(
        8, 2, 64, 48, ActivationType.SWIGLU, False, 0.02, dtype=torch.bfloat16, **options
    )
    x = torch.randn(200, 64, dtype=torch.bfloat16)
    results = []
    for device in ("cuda:0", "cuda:1"):
        on_device = layer.to(device)
        tokens = x.to(device).requires_grad_()
        out, loss = on_device(tokens, sonic.KernelBackendMoE.sonicmoe)
        parameters = [tokens, *on_device.parameters()]
        found = torch.autograd.grad(out.float().square().sum() + loss, parameters)
        results.append([tensor.detach().to("cuda:0") for tensor in (out, loss, *found)])
    assert all(tensor.isfinite().all() and tensor.any() for tensor in results[0])
    assert_same_bits(*results)
