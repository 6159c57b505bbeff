"""topk_routing as an operator: values through the reference, gradients, memory, errors."""

import pytest
import torch

from sonic.enums import ScoreOrder
from sonic.reference import topk_scores
from sonic.routing.topk import topk_routing
from sonic.runtime.errors import ArgumentError, DTypeError, ShapeError

every_order = pytest.mark.parametrize("order", ScoreOrder, ids=lambda o: o.value)


@every_order
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_values_and_gradient(order, dtype):
    logits = (3 * torch.randn(9, 12)).to(dtype).requires_grad_()
    scores, ids = topk_routing(logits, 4, order=order.value)
    expected, expected_ids = topk_scores(logits, 4, order)
    assert ids.dtype == torch.int32 and torch.equal(ids, expected_ids)
    torch.testing.assert_close(scores, expected)
    weights = torch.randn_like(scores)
    (gradient,) = torch.autograd.grad((scores * weights).sum(), logits)
    (by_autograd,) = torch.autograd.grad((expected * weights).sum(), logits)
    assert gradient.dtype == dtype and gradient.abs().sum() > 0
    torch.testing.assert_close(gradient, by_autograd)
    assert not ids.requires_grad


@every_order
def test_gradcheck(order):
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: topk_routing(v, 3, order=order)[0], (logits,))


@every_order
def test_large_logits_stay_finite(order):
    logits = torch.tensor([[3e38, -3e38, 1e38, 0.0], [-3e38, -3e38, -3.1e38, -3e38]])
    logits.requires_grad_()
    scores, ids = topk_routing(logits, 2, order=order)
    assert ids.tolist() == [[0, 2], [0, 1]] and scores[0].tolist() == [1, 0]
    scores.backward(torch.ones_like(scores))
    assert scores.isfinite().all() and logits.grad.isfinite().all()


def test_nan_logits_rank_first_and_ids_stay_in_range():
    logits = torch.tensor([[0.0, torch.nan, 1, torch.nan], [torch.nan] * 4])
    scores, ids = topk_routing(logits, 3)
    assert ids.tolist() == [[1, 3, 2], [0, 1, 2]]
    assert scores.isnan().all()


@every_order
def test_saved_for_backward(order):
    """The logits are kept only where their values are needed."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    logits = torch.randn(8, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores, ids = topk_routing(logits, 2, order=order)
    kept = sum(tensor.nbytes for tensor in saved)
    expected = scores.nbytes + ids.nbytes
    if order is ScoreOrder.TOPK_OVER_SOFTMAX:
        expected += logits.nbytes
    assert kept == expected


@every_order
def test_opcheck(order):
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(5, 7).to(dtype).requires_grad_()
        torch.library.opcheck(torch.ops.sonic.topk_routing.default, (logits, 3, order.value))
    logits = logits.detach()
    scores, ids = topk_routing(logits, 3, order=order)
    needed = logits if order is ScoreOrder.TOPK_OVER_SOFTMAX else None
    torch.library.opcheck(
        torch.ops.sonic.topk_routing_backward.default,
        (scores, needed, scores, ids, 7, logits.dtype, order.value),
    )


def test_under_compile():
    compiled = torch.compile(topk_routing, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 5, 8):
        logits = torch.randn(tokens, 6, requires_grad=True)
        scores, ids = compiled(logits, 2, order="topk_over_softmax")
        expected, expected_ids = topk_routing(logits, 2, order="topk_over_softmax")
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(scores, expected)
        weights = torch.randn_like(scores)
        actual = torch.autograd.grad((scores * weights).sum(), logits)
        torch.testing.assert_close(actual, torch.autograd.grad((expected * weights).sum(), logits))


def test_no_tokens():
    logits = torch.empty(0, 6, requires_grad=True)
    scores, ids = topk_routing(logits, 2)
    assert scores.shape == ids.shape == (0, 2)
    scores.sum().backward()
    assert logits.grad.shape == (0, 6)


def test_any_strides_of_logits_and_gradient():
    base = torch.randn(20, 10)
    view = base.t()[2:7, ::2].requires_grad_()
    scores, ids = topk_routing(view, 3)
    dense = view.detach().clone().contiguous().requires_grad_()
    expected, _ = topk_routing(dense, 3)
    torch.testing.assert_close(scores, expected)
    expanded = torch.tensor([1.0, 2.0, 4.0]).expand(5, 3)
    scores.backward(expanded)
    expected.backward(expanded.contiguous())
    torch.testing.assert_close(view.grad, dense.grad)


LOGITS = torch.zeros(4, 6)
WIDE = torch.empty(1, 65537, device="meta")


@pytest.mark.parametrize(
    "error, text, call",
    [
        (ShapeError, r"\(6,\).*\(T, E\)", lambda: topk_routing(LOGITS[0], 1)),
        (ShapeError, "0 experts", lambda: topk_routing(LOGITS[:, :0], 1)),
        (ShapeError, "65537 experts", lambda: topk_routing(WIDE, 1)),
        (DTypeError, "int64", lambda: topk_routing(LOGITS.long(), 1)),
        (DTypeError, "float8", lambda: topk_routing(LOGITS.to(torch.float8_e4m3fn), 1)),
        (ArgumentError, "top_k=0 .*1 to 6", lambda: topk_routing(LOGITS, 0)),
        (ArgumentError, "top_k=7 .*6 experts", lambda: topk_routing(LOGITS, 7)),
        (ArgumentError, "top_k=65 .*1 to 64", lambda: topk_routing(torch.zeros(1, 100), 65)),
        (ArgumentError, "order='sigmoid'", lambda: topk_routing(LOGITS, 1, order="sigmoid")),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_errors(error, text, call):
    with pytest.raises(error, match=text):
        call()
