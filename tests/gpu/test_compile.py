"""torch.compile(fullgraph=True): the same bits as eager, without recompiling for other tokens."""

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

import sonic
from sonic.enums import KernelBackendMoE
from sonic.testing import assert_close
from tests.layers import (
    DEVICE,
    IMPL,
    PROBLEM,
    assert_same_bits,
    call,
    gradients,
    leaves_of,
    module_references,
    step,
)

pytestmark = pytest.mark.gpu

BACKEND = KernelBackendMoE.sonicmoe if IMPL == "cute" else KernelBackendMoE.torch
backends = pytest.mark.parametrize("backend", ["aot_eager", "inductor"])


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@backends
def test_experts(backend):
    leaves, inputs = leaves_of(PROBLEM)
    run = torch.compile(call, backend=backend, fullgraph=True)
    out = run(leaves, inputs.topk_ids)
    actual = (out.detach(), *gradients(out, leaves, inputs.dout))
    assert_same_bits(actual, step(leaves, inputs.topk_ids, inputs.dout))
    with torch.no_grad():
        assert_same_bits([run(leaves, inputs.topk_ids)], [call(leaves, inputs.topk_ids)])


@backends
def test_module(backend):
    layer = sonic.MoE(8, 2, 64, 64, "swiglu", True, 0.1, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(2, 50, 64, device=DEVICE, dtype=torch.bfloat16)

    def run(function):
        out, loss = function(x, BACKEND)
        grads = torch.autograd.grad(out.float().sum(), list(layer.parameters()))
        return out.detach(), loss.detach(), grads

    out, loss, grads = run(torch.compile(layer, backend=backend, fullgraph=True))
    expected, expected_loss, _ = run(layer)
    assert_same_bits([out], [expected])
    torch.testing.assert_close(loss, expected_loss)
    # Not the same bits: what is fused rounds elsewhere.
    (_, *exact), (_, *low) = module_references(layer, x)
    for (name, _), *three in zip(layer.named_parameters(), grads, exact, low, strict=True):
        assert_close(*three, name=name)


def test_reduce_overhead_replays_other_tokens():
    leaves, inputs = leaves_of(PROBLEM)
    run = torch.compile(call, mode="reduce-overhead", fullgraph=True)
    for repeat in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        ids = inputs.topk_ids.roll(repeat, 0)
        out = run(leaves, ids)
        actual = [out.detach().clone(), *(g.clone() for g in gradients(out, leaves, inputs.dout))]
        assert_same_bits(actual, step(leaves, ids, inputs.dout))


def test_checkpoint_inside():
    leaves, inputs = leaves_of(PROBLEM)
    run = torch.compile(
        lambda leaves, ids: checkpoint(call, leaves, ids, use_reentrant=False),
        backend="inductor",
        fullgraph=True,
    )
    actual = gradients(run(leaves, inputs.topk_ids), leaves, inputs.dout)
    assert_same_bits(actual, gradients(call(leaves, inputs.topk_ids), leaves, inputs.dout))


def test_autocast_inside():
    leaves, inputs = leaves_of(PROBLEM)
    single = {name: leaf.detach().float().requires_grad_() for name, leaf in leaves.items()}

    def run(tensors, ids):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return call(tensors, ids)

    compiled = torch.compile(run, backend="inductor", fullgraph=True)
    results = [
        gradients(function(single, inputs.topk_ids), single, inputs.dout)
        for function in (compiled, run)
    ]
    assert_same_bits(*results)


def test_main_grads():
    leaves, inputs = leaves_of(PROBLEM)
    run = torch.compile(
        lambda leaves, ids, main: call(leaves, ids, main_grads=main),
        backend="inductor",
        fullgraph=True,
    )
    pairs = [
        tuple(torch.zeros(leaves[name].shape, device=DEVICE) for name in ("w1", "w2"))
        for _ in range(2)
    ]
    for _ in range(2):
        run(leaves, inputs.topk_ids, pairs[0]).backward(inputs.dout)
        call(leaves, inputs.topk_ids, main_grads=pairs[1]).backward(inputs.dout)
    assert_same_bits(*pairs)


def test_number_of_tokens_does_not_recompile():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for tokens in (201, 64, 65, 1000):
        leaves, inputs = leaves_of(PROBLEM.with_changes(num_tokens=tokens))
        out = run(leaves, inputs.topk_ids)
        actual = (out.detach(), *gradients(out, leaves, inputs.dout))
        assert_same_bits(actual, step(leaves, inputs.topk_ids, inputs.dout))
    assert counter.frame_count == 1
