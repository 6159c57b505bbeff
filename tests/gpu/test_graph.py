"""CUDA graphs: captured once, replayed with other tokens and another routing."""

import pytest
import torch

import sonic
from tests.graphs import capture
from tests.layers import DEVICE, IMPL, PROBLEM, assert_same_bits, call, gradients, leaves_of, step

pytestmark = pytest.mark.gpu


def routings():
    """Ids unlike those of the capture: other, one hot expert, half dropped, all dropped."""
    shape = (PROBLEM.num_tokens, PROBLEM.top_k)
    generator = torch.Generator().manual_seed(9)
    other = torch.randint(0, PROBLEM.num_experts, shape, generator=generator)
    half = torch.where(torch.rand(shape, generator=generator) < 0.5, -1, other)
    hot = torch.full(shape, 4)
    return [ids.to(DEVICE) for ids in (other, hot, half, other)]


def refresh(*tensors):
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))


def test_forward_and_backward_replay_with_another_routing():
    leaves, inputs = leaves_of(PROBLEM.with_changes(contiguous=True))
    ids, dout = inputs.topk_ids, inputs.dout
    graph, results = capture(lambda: step(leaves, ids, dout))
    for routing in routings():
        ids.copy_(routing)
        refresh(leaves["hidden_states"], dout)
        graph.replay()
        replayed = [t.clone() for t in results]
        assert_same_bits(replayed, step(leaves, ids, dout))


def test_the_backward_pass_of_a_graphed_layer_runs_twice():
    """It is captured without ``retain_graph``, and yet replayed for a graph that is kept."""
    leaves, inputs = leaves_of(PROBLEM)
    names, tensors = list(leaves), tuple(leaves.values())
    expected = step(leaves, inputs.topk_ids, inputs.dout)

    def run(*tensors):
        return call(dict(zip(names, tensors, strict=True)), inputs.topk_ids)

    out = torch.cuda.make_graphed_callables(run, tensors)(*tensors)
    for keeps in (True, False):
        replayed = torch.autograd.grad(out, tensors, inputs.dout, retain_graph=keeps)
        assert_same_bits([out.detach(), *replayed], expected)


def test_replay_with_every_slot_dropped_writes_zeros():
    leaves, inputs = leaves_of(PROBLEM)
    graph, results = capture(lambda: step(leaves, inputs.topk_ids, inputs.dout))
    graph.replay()
    assert all(t.any() for t in results)
    inputs.topk_ids.fill_(-1)
    graph.replay()
    assert not any(t.any() for t in results)


def test_inference_replay():
    leaves, inputs = leaves_of(PROBLEM)
    with torch.no_grad():
        graph, (out,) = capture(lambda: (call(leaves, inputs.topk_ids),))
        for routing in routings():
            inputs.topk_ids.copy_(routing)
            graph.replay()
            assert_same_bits([out.clone()], [call(leaves, inputs.topk_ids)])


def test_whole_layer_replay_with_other_tokens():
    """The routing follows from the tokens inside of the graph."""
    leaves, inputs = leaves_of(PROBLEM)
    del leaves["topk_weights"]
    leaves["router_weight"] = torch.randn(7, 136, device=DEVICE).bfloat16().requires_grad_()

    def run():
        out, logits, frequency = sonic.moe(**leaves, top_k=3, impl=IMPL)
        grads = gradients(out, leaves, inputs.dout)
        return out.detach(), logits.detach(), frequency, *grads

    graph, results = capture(run)
    seen = []
    for _ in range(3):
        refresh(leaves["hidden_states"], inputs.dout)
        graph.replay()
        replayed = [t.clone() for t in results]
        assert_same_bits(replayed, run())
        seen.append(replayed[2].tolist())
    assert seen[0] != seen[1] != seen[2]


def test_flat_routing_and_grouped_mm_replay():
    leaves, inputs = leaves_of(PROBLEM)
    x, w1 = leaves["hidden_states"], leaves["w1"]
    parameters = {name: leaves[name] for name in ("w1", "w2", "b1", "b2")}
    token_ids = torch.randint(0, PROBLEM.num_tokens, (400,), device=DEVICE)
    expert_ids = torch.randint(-1, PROBLEM.num_experts, (400,), device=DEVICE)
    weights = torch.rand(400, device=DEVICE)
    offset = torch.tensor([0, 9, 9, 30, 31, 77, 120, 190], dtype=torch.int32, device=DEVICE)

    def run():
        flat = sonic.experts_flat(x, token_ids, expert_ids, weights, **parameters, impl=IMPL)
        rows = sonic.grouped_mm(x, w1, offset, impl=IMPL)
        (dx,) = torch.autograd.grad(flat.sum() + rows.sum(), x)
        return flat.detach(), rows.detach(), dx

    graph, results = capture(run)
    for shift in (1, 5):
        token_ids.copy_((token_ids + shift) % PROBLEM.num_tokens)
        expert_ids.copy_((expert_ids + shift) % PROBLEM.num_experts)
        offset[1:].sub_(shift)
        graph.replay()
        assert_same_bits([t.clone() for t in results], run())
