"""Kinds of differentiation that the operators lack are refused, never answered with zeros."""

import re

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import sonic
import sonic.reference
from sonic.reference import (
    experts_reference,
    grouped_mm_reference,
    moe_reference,
    topk_scores,
)
from sonic.runtime.errors import UnsupportedError

T, H, I, E = 6, 8, 8, 3  # noqa: E741 (the names of sizes throughout)
torch.manual_seed(0)
W1, W2, ROUTER = torch.randn(E, 2 * I, H), torch.randn(E, H, I), torch.randn(E, H)
IDS, WEIGHTS = torch.randint(0, E, (T, 2)), torch.rand(T, 2)
OFFSETS = torch.tensor([0, 1, 2, T], dtype=torch.int32)
X = torch.randn(T, H)
LAYER = sonic.MoE(E, 2, H, I, "swiglu", True, 0.3)

OURS = {
    "experts": lambda x: sonic.experts(x, IDS, WEIGHTS, W1, W2),
    "experts_flat": lambda x: sonic.experts_flat(
        x, torch.arange(T), IDS[:, 0], WEIGHTS[:, 0], W1, W2
    ),
    "moe": lambda x: sonic.moe(x, ROUTER, W1, W2, top_k=2)[0],
    "MoE": lambda x: LAYER(x, "torch")[0],
    "grouped_mm": lambda x: sonic.grouped_mm(x, W1, OFFSETS),
    "topk_routing": lambda x: sonic.topk_routing(x, 2)[0],
    "token_rounding": lambda x: sonic.token_rounding(x.softmax(-1), 2, 4)[2],
}


def dual(function, requires_grad=False):
    with forward_ad.dual_level():
        x = X.clone().requires_grad_(requires_grad)
        return function(forward_ad.make_dual(x, X))


FORWARD = {
    "jvp": lambda f: jvp(f, (X,), (X,)),
    "jacfwd": lambda f: jacfwd(f)(X),
    "dual": dual,
    "dual of a leaf": lambda f: dual(f, requires_grad=True),
}
REVERSE = {
    "grad": lambda f: grad(lambda x: f(x).sin().sum())(X),
    "vjp": lambda f: vjp(f, X)[1](f(X).sin()),
    "jacrev": lambda f: jacrev(f)(X),
    "grad of each": lambda f: vmap(grad(lambda x: f(x).sum()))(X[None]),
}


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", FORWARD)
def test_forward_mode_is_refused(name, kind):
    with pytest.raises(
        UnsupportedError, match="forward-mode.*Allowed: reverse mode.*differentiate"
    ):
        FORWARD[kind](OURS[name])


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("kind", REVERSE)
def test_transforms_of_torch_func_are_refused(name, kind):
    with pytest.raises(
        UnsupportedError, match="torch.func transform.*Allowed: backward.*transform"
    ):
        REVERSE[kind](OURS[name])


@pytest.mark.parametrize("kind", ["jvp", "jacfwd", "grad", "vjp", "jacrev"])
@pytest.mark.parametrize(
    ("reference", "name"),
    [
        (lambda x: experts_reference(x, IDS, WEIGHTS, W1, W2), "experts"),
        (lambda x: moe_reference(x, ROUTER, W1, W2, top_k=2)[0], "moe"),
        (lambda x: grouped_mm_reference(x, W1, OFFSETS), "grouped_mm"),
        (lambda x: topk_scores(x, 2, sonic.ScoreOrder.SOFTMAX_OVER_TOPK)[0], "topk_routing"),
    ],
    ids=["experts", "moe", "grouped_mm", "topk_routing"],
)
def test_the_references_named_in_the_errors_have_them(reference, name, kind):
    torch.testing.assert_close(reference(X), OURS[name](X))
    result = {**FORWARD, **REVERSE}[kind](reference)
    assert (result[1] if kind == "jvp" else result[0]).any()
    with pytest.raises(UnsupportedError) as caught:
        {**FORWARD, **REVERSE}[kind](OURS[name])
    named = re.search(r"sonic\.reference\.(\w+)", str(caught.value))
    assert named and hasattr(sonic.reference, named.group(1))


def test_a_dual_gradient_is_refused_too():
    """Forward over reverse: the tangent first appears in the backward pass."""
    x = X.clone().requires_grad_()
    out = sonic.grouped_mm(x, W1, OFFSETS)
    with forward_ad.dual_level(), pytest.raises(UnsupportedError, match="forward-mode"):
        gradient = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        torch.autograd.grad(out, x, gradient)


@pytest.mark.parametrize("name", OURS)
def test_a_second_derivative_is_refused(name):
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(OURS[name](x).sin().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative.*Allowed: first.*differentiate"):
        dx.sin().sum().backward()


@pytest.mark.parametrize("name", ["experts", "grouped_mm", "topk_routing"])
def test_a_second_derivative_of_one_operator_names_its_reference(name):
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(OURS[name](x).sin().sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match=rf"^{name}: a second.*sonic\.reference\.\w+,"):
        dx.sin().sum().backward()


def test_vmap_without_a_gradient_is_a_loop():
    batch = torch.stack([X, 2 * X])
    expected = torch.stack([OURS["experts"](x) for x in batch])
    assert torch.equal(vmap(OURS["experts"])(batch), expected)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("weights_too", [False, True])
def test_vmap_with_a_gradient_is_a_loop_too(name, weights_too, monkeypatch):
    """Under vmap a batched tensor does not say that it requires a gradient."""
    batch = torch.stack([X, 2 * X]).requires_grad_()
    leaves = [batch]
    if weights_too:
        weight = W1.clone().requires_grad_()
        monkeypatch.setitem(globals(), "W1", weight)
        leaves.append(weight)
    dout = torch.randn(2, *OURS[name](X).shape, dtype=X.dtype)
    actual, expected = (
        torch.autograd.grad(out, leaves, dout, allow_unused=True)
        for out in (vmap(OURS[name])(batch), torch.stack([OURS[name](x) for x in batch]))
    )
    assert expected[0].any()
    for ours, loop in zip(actual, expected, strict=True):
        assert (ours is None) == (loop is None)
        if loop is not None:
            torch.testing.assert_close(ours, loop, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OURS)
def test_a_batch_of_gradients_is_a_loop(name):
    x = X.clone().requires_grad_()
    out = OURS[name](x)
    dout = torch.randn(3, *out.shape, dtype=out.dtype)
    expected = [torch.autograd.grad(out, x, one, retain_graph=True)[0] for one in dout]
    (actual,) = torch.autograd.grad(out, x, dout, is_grads_batched=True)
    assert actual.any()
    torch.testing.assert_close(actual, torch.stack(expected))
