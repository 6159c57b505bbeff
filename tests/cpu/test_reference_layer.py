"""The layer oracle: its equations, spelled out again per slot, and its gradients in float64."""

import pytest
import torch

from sonic.enums import ActivationType, GateUpLayout, ScoreOrder
from sonic.reference import (
    activation_value,
    experts_flat_reference,
    experts_reference,
    grouped_mm_reference,
    moe_reference,
    topk_scores,
)

CASES = [
    pytest.param(activation, layout, bias, id=f"{activation.value}-{layout.value}-bias{bias:d}")
    for activation in ActivationType
    for layout in (GateUpLayout if activation.is_gated else [GateUpLayout.INTERLEAVED])
    for bias in (False, True)
]


def make_layer(activation, bias, tokens=4, hidden=2, width=3, experts=4, scale=1.0):
    """Float64 leaves: x, w1, w2, b1, b2. Expert 3 is never routed to by `IDS`."""
    generator = torch.Generator().manual_seed(7)
    rows = 2 * width if activation.is_gated else width

    def normal(*size):
        return (scale * torch.randn(size, generator=generator).double()).requires_grad_()

    x, w1, w2 = (
        normal(tokens, hidden),
        normal(experts, rows, hidden),
        normal(experts, hidden, width),
    )
    return (
        x,
        w1,
        w2,
        normal(experts, rows) if bias else None,
        normal(experts, hidden) if bias else None,
    )


# Token 0 normal, token 1 has one dropped slot, token 2 both, token 3 names one expert twice.
IDS = torch.tensor([[0, 1], [2, 4], [-1, 99], [1, 1]])


def weights_for(ids):
    generator = torch.Generator().manual_seed(3)
    return (0.2 + torch.rand(ids.shape, generator=generator).double()).requires_grad_()


def one_slot_at_a_time(x, ids, weights, w1, w2, b1, b2, activation, layout):
    outs = []
    for token in range(x.shape[0]):
        out = torch.zeros(w2.shape[1], dtype=x.dtype)
        for k in range(ids.shape[1]):
            expert = int(ids[token, k])
            if not 0 <= expert < w1.shape[0]:
                continue
            h = [
                w1[expert, row].dot(x[token]) + (b1[expert, row] if b1 is not None else 0.0)
                for row in range(w1.shape[1])
            ]
            if not activation.is_gated:
                a = [activation_value(activation, value) for value in h]
            else:
                half = len(h) // 2
                interleaved = layout is GateUpLayout.INTERLEAVED
                pairs = (
                    [(h[2 * i], h[2 * i + 1]) for i in range(half)]
                    if interleaved
                    else [(h[i], h[half + i]) for i in range(half)]
                )
                a = [activation_value(activation, gate, up) for gate, up in pairs]
            y = w2[expert] @ torch.stack(a)
            if b2 is not None:
                y = y + b2[expert]
            out = out + weights[token, k] * y
        outs.append(out)
    return torch.stack(outs)


@pytest.mark.parametrize("activation, layout, bias", CASES)
def test_oracle_follows_the_equations(activation, layout, bias):
    x, w1, w2, b1, b2 = make_layer(activation, bias, hidden=5, width=8, scale=2.0)
    weights = weights_for(IDS)
    args = (x, IDS, weights, w1, w2, b1, b2, activation, layout)
    expected = one_slot_at_a_time(*args)
    assert expected[[0, 1, 3]].abs().min() > 1e-4 and not expected[2].any()
    torch.testing.assert_close(experts_reference(*args), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation, layout, bias", CASES)
def test_experts_gradcheck(activation, layout, bias):
    x, w1, w2, b1, b2 = make_layer(activation, bias)
    biases = [b1, b2] if bias else []
    weights = weights_for(IDS)

    def layer(x, weights, w1, w2, b1=None, b2=None):
        return experts_reference(x, IDS, weights, w1, w2, b1, b2, activation, layout)

    leaves = [x, weights, w1, w2, *biases]
    assert layer(*leaves).abs().max() > 0.05
    assert torch.autograd.gradcheck(layer, leaves)
    gradients = torch.autograd.grad(layer(*leaves).sum(), leaves)
    assert all(g.any() for g in gradients)
    assert not any(g[3].any() for g in gradients[2:]), "expert 3 has no rows"
    assert not gradients[0][2].any() and not gradients[1][2].any(), "token 2 is dropped"


@pytest.mark.parametrize("order", ScoreOrder, ids=lambda o: o.value)
@pytest.mark.parametrize(
    "activation", [ActivationType.SWIGLU, ActivationType.RELU_SQ], ids=lambda a: a.value
)
def test_moe_gradcheck(order, activation):
    x, w1, w2, b1, b2 = make_layer(activation, bias=True, tokens=5)
    generator = torch.Generator().manual_seed(5)
    router = (2 * torch.randn(4, 2, generator=generator).double()).requires_grad_()

    def layer(x, router, w1, w2, b1, b2):
        out, logits, _ = moe_reference(
            x, router, w1, w2, top_k=2, score_order=order, b1=b1, b2=b2, activation=activation
        )
        return out, logits

    assert torch.autograd.gradcheck(layer, [x, router, w1, w2, b1, b2])


def test_moe_is_router_and_experts():
    x, w1, w2, _, _ = make_layer(ActivationType.SWIGLU, bias=False, tokens=6)
    router = torch.randn(4, 2, dtype=torch.float64)
    out, logits, frequency = moe_reference(x, router, w1, w2, top_k=2)
    scores, ids = topk_scores(x @ router.T, 2, ScoreOrder.SOFTMAX_OVER_TOPK)
    assert torch.equal(logits, x @ router.T)
    assert torch.equal(out, experts_reference(x, ids, scores, w1, w2))
    assert frequency.dtype == torch.int32
    assert frequency.tolist() == [int((ids == e).sum()) for e in range(4)]
    forced = torch.tensor([[3, 1]] * 6)
    other, _, frequency = moe_reference(x, router, w1, w2, top_k=2, topk_ids=forced)
    assert frequency.tolist() == [0, 6, 0, 6] and not torch.allclose(other, out)
    low, _, _ = moe_reference(x, router, w1, w2, top_k=2, low_precision=True)
    torch.testing.assert_close(low, out, rtol=1e-12, atol=1e-12)


def test_flat_lists_in_any_order():
    x, w1, w2, b1, b2 = make_layer(ActivationType.GEGLU, bias=True)
    weights = weights_for(IDS)
    token_ids = torch.arange(4).repeat_interleave(2)
    shuffle = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    nowhere = torch.tensor([-1, 4]), torch.tensor([0, 1]), torch.ones(2).double()
    flat = [
        torch.cat([values[shuffle], extra])
        for values, extra in zip(
            (token_ids, IDS.flatten(), weights.flatten()), nowhere, strict=True
        )
    ]
    out = experts_flat_reference(x, *flat, w1, w2, b1, b2, ActivationType.GEGLU)
    expected = experts_reference(x, IDS, weights, w1, w2, b1, b2, ActivationType.GEGLU)
    assert expected.any()
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


def test_a_dropped_token_cannot_spread_nan():
    x, w1, w2, _, _ = make_layer(ActivationType.SWIGLU, bias=False)
    x = x.detach().clone()
    x[2] = float("nan")
    out = experts_reference(x, IDS, weights_for(IDS), w1, w2)
    assert out.isfinite().all() and out.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_tokens(dtype):
    _, w1, w2, _, _ = (
        None if t is None else t.to(dtype) for t in make_layer(ActivationType.SILU, False)
    )
    x = torch.empty(0, 2, dtype=dtype)
    out = experts_reference(
        x, torch.empty(0, 2, dtype=torch.int32), torch.empty(0, 2), w1, w2, activation="silu"
    )
    assert out.shape == (0, 2) and out.dtype == dtype


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_grouped_mm(bias):
    generator = torch.Generator().manual_seed(2)
    rows, weight, shift = (
        torch.randn(size, generator=generator).double().requires_grad_()
        for size in [(7, 3), (3, 4, 3), (3, 4)]
    )
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    args = (rows, weight, offsets, shift if bias else None)
    out = grouped_mm_reference(*args)
    for row, expert in enumerate([0, 0, 2, 2, 2]):
        expected = weight[expert] @ rows[row] + (shift[expert] if bias else 0.0)
        torch.testing.assert_close(out[row], expected)
    assert out.shape == (7, 4) and not out[5:].any()
    assert torch.autograd.gradcheck(
        lambda r, w, b: grouped_mm_reference(r, w, offsets, b if bias else None),
        [rows, weight, shift],
    )
