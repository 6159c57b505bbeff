"""What a contender's results are held to: small mistakes in a large result are found."""

from dataclasses import replace

import pytest
import torch

from benchmarks import agreement, compare, launches, peers, small
from benchmarks.agreement import check_contenders, findings_of, inference_run, sound, training_run
from benchmarks.check import _block_counts, _block_sums, _worst_block
from benchmarks.layer import Layer, LayerOptions, make_layer
from benchmarks.problems import with_skew
from benchmarks.shapes import Shape

CPU = torch.device("cpu")
TINY = Shape(48, 64, 32, 8, 2)


def _layer(shape: Shape = TINY) -> Layer:
    return make_layer(shape, LayerOptions(device=CPU, impl="reference"))


@pytest.fixture(scope="module")
def trained():
    """A layer with several blocks each way, and what ours and torch's compute of it."""
    layer = _layer(Shape(640, 192, 128, 4, 2))
    contenders = {name: peers.CONTENDERS[name](layer) for name in ("sonic", "torch")}
    return layer, {name: training_run(name, c) for name, c in contenders.items()}


def _lost_tile(tensor: torch.Tensor) -> torch.Tensor:
    """One tile of 128 by 128 that was never stored, of the last expert where there are several."""
    wrong = tensor.clone()
    (wrong if wrong.dim() == 2 else wrong[-1])[-128:, -128:] = 0
    return wrong


def _lost_expert(tensor: torch.Tensor) -> torch.Tensor:
    wrong = tensor.clone()
    wrong[1] = 0  # of tokens: a row
    return wrong


def _swapped_rows(tensor: torch.Tensor) -> torch.Tensor:
    wrong = tensor.clone()
    rows = wrong if wrong.dim() == 2 else wrong[-1]
    rows[[3, 70]] = rows[[70, 3]].clone()
    return wrong


def _coarse_block(tensor: torch.Tensor) -> torch.Tensor:
    """A block in which four bits are left."""
    wrong = tensor.clone()
    block = (wrong if wrong.dim() == 2 else wrong[-1])[:64, :64]
    mantissa, exponent = torch.frexp(block.float())
    block.copy_(torch.ldexp((mantissa * 16).round() / 16, exponent))
    return wrong


@pytest.mark.parametrize("mistake", [_lost_tile, _lost_expert, _swapped_rows, _coarse_block])
@pytest.mark.parametrize("name", ["sonic", "torch"])
def test_a_mistake_in_a_part_of_any_result_is_found(trained, name, mistake) -> None:
    layer, runs = trained
    right = runs[name]
    for tensor in ("out", "dx", "dw1", "dw2", "dtopk_weights"):
        if tensor == "dtopk_weights" and mistake is _coarse_block:
            continue  # it has two columns
        wrong = replace(right, tensors=right.tensors | {tensor: mistake(right.tensors[tensor])})
        found = findings_of({name: [wrong]}, layer)
        failed = [finding.tensor for finding in found[name] if not finding.passed]
        assert failed == [tensor] and not sound(found)
    assert sound(findings_of({name: [right]}, layer)) == [name]


def test_blocks_are_counted_and_summed() -> None:
    for size in ((130, 200), (64, 64), (5000,), (1, 3)):
        ones = torch.ones(size)
        assert torch.equal(_block_counts(ones), _block_sums(ones).double())
        assert _block_sums(ones).sum() == ones.numel()
    assert _block_counts(torch.ones(130, 200)).shape == (3, 4)


def test_results_may_lie_transposed(trained) -> None:
    layer, runs = trained
    right = runs["sonic"]
    tensors = {name: t.mT.contiguous().mT for name, t in right.tensors.items()}
    assert not any(t.is_contiguous() for t in tensors.values())
    experts_last = right.tensors["dw2"].permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for laid in (tensors, right.tensors | {"dw2": experts_last}):
        assert sound(findings_of({"sonic": [replace(right, tensors=laid)]}, layer)) == ["sonic"]


def test_a_block_without_error_allows_none() -> None:
    narrow = 0.01 * torch.randn(128, 128)
    narrow[:64, :64] = 0
    same = narrow.clone()
    assert _worst_block(same, narrow) < 0.6
    same[0, 0] = 1e-9
    assert _worst_block(same, narrow) == float("inf")
    same[0, 0] = float("nan")
    assert _worst_block(same, narrow) == float("inf")


@pytest.mark.parametrize("skew", ["none", "zipf", "hot"])
def test_right_contenders_are_sound_alone_and_together(skew: str) -> None:
    layer = with_skew(_layer(), skew)
    contenders = {name: peers.CONTENDERS[name](layer) for name in ("sonic", "torch", "bound")}
    found, failures = check_contenders(contenders, layer)
    assert sound(found) == ["sonic", "torch"] and not failures
    runs = {(f.run, f.tensor) for own in found.values() for f in own}
    for name in ("sonic", "torch"):
        assert (f"{name}/inference", "out") in runs
        for tensor in ("out", *agreement.GRADIENTS):
            assert (f"{name}/training", tensor) in runs
    alone, _ = check_contenders({"sonic": contenders["sonic"]}, layer)
    assert sound(alone) == ["sonic"]
    inference, _ = check_contenders(contenders, layer, train=False)
    assert {f.tensor for own in inference.values() for f in own} == {"out"}


@pytest.mark.parametrize("wrong", ["inference", "forward", "backward"])
@pytest.mark.parametrize("name", ["sonic", "torch"])
def test_each_pass_is_checked(name: str, wrong: str, capsys) -> None:
    layer = _layer()
    contenders = {name: peers.CONTENDERS[name](layer) for name in ("sonic", "torch", "bound")}
    contender = contenders[name]
    right = getattr(contender, wrong)

    def mistaken(*arguments):
        result = right(*arguments)
        if wrong != "backward":
            return 1.05 * result
        return (*result[:2], 1.05 * result[2], result[3])

    if wrong == "forward":  # which inference of these two calls
        contender.inference = contender.inference.__func__.__get__(_Copy(contender, right))
    setattr(contender, wrong, mistaken)
    kept, found = compare.checked(contenders, layer)
    failed = {f.run.split("/")[1] for f in found[name] if not f.passed}
    assert failed == {"inference" if wrong == "inference" else "training"}
    assert set(kept) == (set() if name == "sonic" else {"sonic", "bound"})
    assert f"{name} is WRONG" in capsys.readouterr().out


class _Copy:
    def __init__(self, contender, forward):
        self.layer, self.forward = contender.layer, forward


def test_a_peer_that_cannot_be_checked_is_left_out(capsys) -> None:
    layer = _layer()
    contenders = {name: peers.CONTENDERS[name](layer) for name in ("sonic", "torch")}

    def full(_):
        raise torch.OutOfMemoryError("no room\nat all")

    contenders["torch"].backward = full
    kept, _ = compare.checked(contenders, layer)
    assert set(kept) == {"sonic"}
    assert "torch left out: it could not be checked: OutOfMemoryError: no room" in (
        capsys.readouterr().out
    )


def test_the_layer_of_triton_kernels_is_checked_as_its_own_function() -> None:
    layer = peers.with_routing_logits(_layer())
    weights, ids = layer.logits.topk(TINY.top_k, dim=1)
    by_id = layer.topk_ids.argsort(dim=1), ids.argsort(dim=1)
    assert torch.equal(layer.topk_ids.gather(1, by_id[0]).long(), ids.gather(1, by_id[1]))
    softmax = weights.softmax(1).gather(1, by_id[1])
    assert torch.allclose(softmax, layer.topk_weights.gather(1, by_id[0]), atol=1e-6)

    x, w1, w2 = (t.detach().float() for t in (layer.x, layer.w1, layer.w2))
    out = torch.zeros_like(x)
    for slot in range(TINY.top_k):
        chosen = layer.topk_ids[:, slot].long()
        h = torch.einsum("th,tih->ti", x, w1[chosen])
        a = torch.nn.functional.silu(h[:, 0::2]) * (h[:, 1::2] + 1)
        y = torch.einsum("ti,thi->th", a, w2[chosen])
        out += layer.topk_weights.detach()[:, slot, None] * y
    name = "triton_kernels"
    runs = {name: [inference_run(name, out.bfloat16())]}
    assert sound(findings_of(runs, layer)) == [name]
    assert not sound(findings_of({"sonic": [inference_run("sonic", out.bfloat16())]}, layer))


def test_what_a_graph_left_is_checked_of_every_routing(monkeypatch) -> None:
    monkeypatch.setattr(launches, "captured", lambda function: function)
    layer = _layer()
    layers = small.rotations(layer)
    contenders = {name: peers.CONTENDERS[name](layer) for name in ("sonic", "torch")}
    graphs, failures = small.capture_graphs(contenders, layers, CPU)
    assert set(graphs) == {"sonic", "torch"} and not failures
    assert sound(compare.check_graphs(graphs, layers)) == ["sonic", "torch"]
    outputs = graphs["torch"].outputs
    outputs[5] = outputs[4]  # a graph that took one routing twice
    assert sound(compare.check_graphs(graphs, layers)) == ["sonic"]
