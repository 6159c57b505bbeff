"""Activations and their written-out derivatives; orders of gate and up."""

import pytest
import torch
import torch.nn.functional as F

from sonic.enums import ActivationType, GateUpLayout
from sonic.reference import (
    activation_grad,
    activation_value,
    gate_up_rows,
    merge_gate_up_rows,
    pack_gate_up,
    packed_to_rows,
    rows_to_packed,
    split_gate_up,
)

TORCH_FORMULAS = {
    ActivationType.SWIGLU: lambda g, u: u * F.silu(g),
    ActivationType.SWIGLU_OAI: lambda g, u: (
        (u.clamp(-7, 7) + 1) * g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7))
    ),
    ActivationType.GEGLU: lambda g, u: u * F.gelu(g),
    ActivationType.GEGLU_TANH: lambda g, u: u * F.gelu(g, approximate="tanh"),
    ActivationType.REGLU: lambda g, u: u * F.relu(g),
    ActivationType.RELU_SQ: lambda x: F.relu(x).square(),
    ActivationType.RELU: F.relu,
    ActivationType.SILU: F.silu,
    ActivationType.GELU: F.gelu,
    ActivationType.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}

every_activation = pytest.mark.parametrize("activation", ActivationType, ids=lambda a: a.value)
every_layout = pytest.mark.parametrize("layout", GateUpLayout, ids=lambda a: a.value)


def preactivations(activation):
    """A grid over both halves that includes the kinks (0 and the clamps at 7) and far tails."""
    axis = torch.cat([torch.linspace(-12, 12, 97), torch.tensor([-40.0, 40.0])]).double()
    if not activation.is_gated:
        return [axis]
    grid = torch.cartesian_prod(axis, axis)
    return [grid[:, 0].contiguous(), grid[:, 1].contiguous()]


@every_activation
def test_value_is_torchs(activation):
    inputs = preactivations(activation)
    expected = TORCH_FORMULAS[activation](*inputs)
    assert expected.abs().max() > 1.0
    torch.testing.assert_close(
        activation_value(activation, *inputs), expected, rtol=1e-12, atol=1e-12
    )


@every_activation
def test_derivative_is_autograds(activation):
    inputs = [x.requires_grad_() for x in preactivations(activation)]
    da = torch.randn(inputs[0].shape, dtype=torch.float64)
    expected = torch.autograd.grad(TORCH_FORMULAS[activation](*inputs), inputs, da)
    got = activation_grad(activation, da, *inputs)
    assert len([g for g in got if g is not None]) == len(inputs)
    for computed, wanted in zip(got, expected, strict=False):
        assert wanted.abs().max() > 0.1
        torch.testing.assert_close(computed, wanted, rtol=1e-11, atol=1e-12)


@every_activation
def test_derivative_matches_finite_differences(activation):
    generator = torch.Generator().manual_seed(0)
    count = 2 if activation.is_gated else 1
    inputs = [
        (3 * torch.randn(64, generator=generator, dtype=torch.float64)).requires_grad_()
        for _ in range(count)
    ]

    class FromPair(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *args):
            ctx.save_for_backward(*args)
            return activation_value(activation, *args)

        @staticmethod
        def backward(ctx, da):
            return activation_grad(activation, da, *ctx.saved_tensors)[:count]

    assert torch.autograd.gradcheck(FromPair.apply, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_activation
def test_nan_spreads_and_dtype_is_kept(activation, dtype):
    inputs = [torch.tensor([1.0, float("nan")], dtype=dtype)] * (2 if activation.is_gated else 1)
    value = activation_value(activation, *inputs)
    assert value.dtype == dtype
    assert value.isnan().tolist() == [False, True]


def test_gated_activation_refuses_a_single_input():
    with pytest.raises(TypeError, match="swiglu is gated"):
        activation_value(ActivationType.SWIGLU, torch.ones(1))
    with pytest.raises(TypeError, match="swiglu_oai is gated"):
        activation_grad(ActivationType.SWIGLU_OAI, torch.ones(1), torch.ones(1))


def test_packed_columns_follow_the_formula():
    gate, up = torch.arange(24.0), torch.arange(24.0) + 100
    h = pack_gate_up(gate[None], up[None])[0]
    for block in range(3):
        for i in range(8):
            assert h[16 * block + i] == gate[8 * block + i]
            assert h[16 * block + 8 + i] == up[8 * block + i]


@pytest.mark.parametrize("intermediate", [0, 3, 8, 11, 16, 40])
def test_split_undoes_pack(intermediate):
    gate, up = torch.randn(2, 5, intermediate).unbind()
    h = pack_gate_up(gate, up)
    assert h.shape == (5, 2 * intermediate)
    for got, wanted in zip(split_gate_up(h), (gate, up), strict=True):
        assert torch.equal(got, wanted)


def test_short_last_block():
    gate, up = torch.arange(11.0), torch.arange(11.0) + 100
    tail = pack_gate_up(gate, up)[16:]
    assert tail.tolist() == [8, 9, 10, 108, 109, 110]


def test_gate_and_up_rows_of_each_layout():
    w1 = torch.arange(2 * 6 * 3.0).view(2, 6, 3)
    gate, up = gate_up_rows(w1, GateUpLayout.INTERLEAVED)
    assert torch.equal(gate, w1[:, [0, 2, 4]]) and torch.equal(up, w1[:, [1, 3, 5]])
    gate, up = gate_up_rows(w1, GateUpLayout.CONCATENATED)
    assert torch.equal(gate, w1[:, :3]) and torch.equal(up, w1[:, 3:])


@pytest.mark.parametrize("shape", [(2, 48, 3), (2, 48), (2, 22, 3)], ids=str)
@every_layout
def test_row_orders_round_trip(layout, shape):
    weight = torch.randn(shape)
    assert torch.equal(merge_gate_up_rows(*gate_up_rows(weight, layout), layout), weight)
    packed = rows_to_packed(weight, layout)
    assert packed.shape == weight.shape
    assert torch.equal(packed_to_rows(packed, layout), weight)
    gate, up = split_gate_up(packed.movedim(1, -1))
    wanted = gate_up_rows(weight, layout)
    assert torch.equal(gate.movedim(-1, 1), wanted[0])
    assert torch.equal(up.movedim(-1, 1), wanted[1])
