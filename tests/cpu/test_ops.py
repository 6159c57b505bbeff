"""The operators: torch's own checks of schema, fakes and gradients, and what may be skipped."""

import contextlib

import pytest
import torch

import sonic.functional  # noqa: F401  (defines the operators)
from sonic import ops
from sonic.plan import build_plan, build_plan_flat
from sonic.reference import experts_reference, grouped_mm_reference
from sonic.reference import stages as reference_stages
from sonic.runtime.errors import ArgumentError, LayoutError
from sonic.testing import poison_dead_rows_

T, H, I, E, K = 6, 8, 16, 3, 2  # noqa: E741 (the names of sizes throughout)
INT = torch.int32


def normal(*size, requires_grad=False, dtype=torch.float32):
    return torch.randn(size, dtype=dtype).requires_grad_(requires_grad)


@pytest.fixture(autouse=True)
def _numbers():
    torch.manual_seed(5)


def plan_arguments(flat=False):
    ids = torch.tensor([[0, 1], [1, 2], [0, 9], [2, 2], [-1, 1], [0, 2]], dtype=INT)
    if flat:
        tokens = torch.tensor([5, 0, 0, 3, 3, 3, 1, 7, 2, 4, 4, 5], dtype=INT)
        plan = build_plan_flat(tokens, ids.flatten(), T, E)
    else:
        plan = build_plan(ids, E)
    return (
        plan.offset_by_expert,
        plan.token_by_row,
        plan.slot_by_row,
        plan.row_by_slot,
        plan.offset_by_token,
        plan.slot_by_position,
        plan.top_k,
    )


def forward_arguments(flat=False, bias=True, requires_grad=True, store_preact=True, gated=True):
    width = 2 * I if gated else I
    return (
        normal(T, H, requires_grad=requires_grad),
        normal(E, width, H, requires_grad=requires_grad),
        normal(E, width, requires_grad=requires_grad) if bias else None,
        normal(E, H, I, requires_grad=requires_grad),
        normal(E, H, requires_grad=requires_grad) if bias else None,
        torch.rand(T * K).requires_grad_(requires_grad),
        *plan_arguments(flat),
        "swiglu" if gated else "relu_sq",
        "interleaved",
        "reference",
        store_preact,
        None,
        None,
    )


def backward_arguments(needs=(True,) * 6, flat=False):
    forward = forward_arguments(flat, requires_grad=False)
    _, h = torch.ops.sonic.experts_forward(*forward)
    x, w1, _, w2, b2, scores, *rest = forward[:-3]
    return (normal(T, H), x, w1, w2, b2, h, scores, *rest, list(needs))


# ------------------------------------------------------------------- torch's own checks


@pytest.mark.parametrize("flat", [False, True], ids=["topk", "flat"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_opcheck_forward(flat, bias):
    torch.library.opcheck(torch.ops.sonic.experts_forward, forward_arguments(flat, bias))


def test_opcheck_forward_without_gradients():
    arguments = forward_arguments(requires_grad=False, store_preact=False, gated=False)
    torch.library.opcheck(torch.ops.sonic.experts_forward, arguments)


@pytest.mark.parametrize("needs", [(True,) * 6, (True, False, False, False, False, True)])
def test_opcheck_backward(needs):
    torch.library.opcheck(torch.ops.sonic.experts_backward, backward_arguments(needs))


def test_opcheck_backward_accumulate():
    arguments = (*backward_arguments(), torch.zeros(E, 2 * I, H), torch.zeros(E, H, I))
    torch.library.opcheck(torch.ops.sonic.experts_backward_accumulate, arguments)


def test_opcheck_grouped_mm():
    offset = torch.tensor([0, 4, 4, 7], dtype=INT)
    rows, weight, bias = (normal(*size, requires_grad=True) for size in [(9, H), (E, I, H), (E, I)])
    torch.library.opcheck(torch.ops.sonic.grouped_mm, (rows, weight, bias, offset, "reference"))
    torch.library.opcheck(
        torch.ops.sonic.grouped_mm_backward,
        (normal(9, I), rows.detach(), weight.detach(), offset, "reference", [True] * 3),
    )


def test_accumulate_declares_what_it_mutates():
    schema = torch.ops.sonic.experts_backward_accumulate.default._schema
    written = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    assert written == ["w1_main_grad", "w2_main_grad"]
    assert not torch.ops.sonic.experts_backward.default._schema.is_mutable


# ------------------------------------------------------------------------------- fakes


def facts(tensors):
    return [(t.shape, t.dtype, t.stride()) for t in tensors]


def on_meta(arguments):
    return [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]


@pytest.mark.parametrize("flat", [False, True], ids=["topk", "flat"])
def test_fakes_agree_with_the_real_results(flat):
    forward = forward_arguments(flat, requires_grad=False)
    backward = backward_arguments(flat=flat)
    mm = (normal(9, H), normal(E, I, H), None, torch.tensor([0, 4, 4, 7], dtype=INT), "reference")
    mm_backward = (normal(9, I), mm[0], mm[1], mm[3], "reference", [True, False, True])
    for op, arguments in (
        (torch.ops.sonic.experts_forward, forward),
        (torch.ops.sonic.experts_backward, backward),
        (torch.ops.sonic.grouped_mm_backward, mm_backward),
    ):
        assert facts(op(*on_meta(arguments))) == facts(op(*arguments)), op
    out = torch.ops.sonic.grouped_mm(*mm)
    assert facts([torch.ops.sonic.grouped_mm(*on_meta(mm))]) == facts([out])


@pytest.mark.parametrize("single", range(6))
def test_needs_mask_returns_only_what_is_asked_for(single):
    """Each gradient alone equals the one among all, and the other five have no memory."""
    torch.manual_seed(5)
    everything = torch.ops.sonic.experts_backward(*backward_arguments())
    torch.manual_seed(5)
    needs = [index == single for index in range(6)]
    alone = torch.ops.sonic.experts_backward(*backward_arguments(needs))
    for index in range(6):
        if index == single:
            assert torch.equal(alone[index], everything[index]) and alone[index].any()
        else:
            assert alone[index].numel() == 0


def test_needs_mask_skips_the_stages(monkeypatch):
    called = []

    class Recorder:
        def __getattr__(self, name):
            def stage(*args, **kwargs):
                called.append(name)
                return getattr(reference_stages, name)(*args, **kwargs)

            return stage

    monkeypatch.setattr(ops, "_load_stages", lambda impl, device: Recorder())
    arguments = backward_arguments((True, False, False, False, False, False))
    called.clear()
    torch.ops.sonic.experts_backward(*arguments)
    assert called == ["gather_scores", "down_backward_act", "up_backward_act", "combine"]


def test_input_is_not_needed_for_frozen_weights():
    arguments = list(backward_arguments((True, False, True, True, True, True)))
    expected = torch.ops.sonic.experts_backward(*arguments)
    arguments[1] = None
    for a, b in zip(torch.ops.sonic.experts_backward(*arguments), expected, strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------- stages, poisoned


class PoisonedStages:
    """The reference whose row outputs hold NaN wherever no expert owns the row."""

    def __getattr__(self, name):
        stage = getattr(reference_stages, name)

        def poisoned(*args, **kwargs):
            result = stage(*args, **kwargs)
            if not name.endswith(("_forward", "_act")):
                return result
            offset = next(a for a in args if isinstance(a, torch.Tensor) and a.shape == (E + 1,))
            for rows in result if isinstance(result, tuple) else (result,):
                rows = rows.t() if rows.shape[0] == 1 else rows
                poison_dead_rows_(rows, offset)
            return result

        return poisoned


@pytest.mark.parametrize("flat", [False, True], ids=["topk", "flat"])
def test_rows_without_an_expert_are_never_read(monkeypatch, flat):
    def run():
        torch.manual_seed(5)
        arguments = forward_arguments(flat)
        out, _ = torch.ops.sonic.experts_forward(*arguments)
        gradients = torch.autograd.grad(out, arguments[:6], torch.ones_like(out))
        return out.detach(), *gradients

    expected = run()
    monkeypatch.setattr(ops, "_load_stages", lambda impl, device: PoisonedStages())
    for a, b in zip(run(), expected, strict=True):
        assert torch.equal(a, b) and a.any()


def test_grouped_mm_clears_the_rows_without_an_expert(monkeypatch):
    monkeypatch.setattr(ops, "_load_stages", lambda impl, device: PoisonedStages())
    offset = torch.tensor([0, 4, 4, 7], dtype=INT)
    rows, weight = normal(9, H, requires_grad=True), normal(E, I, H, requires_grad=True)
    out = torch.ops.sonic.grouped_mm(rows, weight, None, offset, "reference")
    expected = grouped_mm_reference(rows, weight, offset)
    torch.testing.assert_close(out, expected)
    assert not out[7:].any()
    drows, _ = torch.autograd.grad(out.sum(), (rows, weight))
    assert not drows[7:].any() and drows[:7].any()


# ---------------------------------------------------------------------------- refusals


def test_backward_without_preactivation_is_refused():
    arguments = forward_arguments(store_preact=False)
    out, h = torch.ops.sonic.experts_forward(*arguments)
    assert h.numel() == 0
    with pytest.raises(ArgumentError, match="store_preact=True"):
        out.sum().backward()


def test_misaligned_weight_is_refused_by_the_kernels_only():
    buffer = torch.zeros(65, dtype=torch.bfloat16)
    ops.require_aligned("reference", w1=buffer[1:])
    ops.require_aligned("cute", w1=buffer[:64], b1=None)
    with pytest.raises(LayoutError, match="w1 starts 2 bytes past.*multiples of 16.*clone"):
        ops.require_aligned("cute", w1=buffer[1:])


def test_misaligned_bias_is_read_as_it_lies(monkeypatch):
    """The kernels read biases element by element; the stages here stand in for theirs."""
    monkeypatch.setattr(ops, "_load_stages", lambda impl, device: reference_stages)
    monkeypatch.setattr(ops, "_region", lambda x, impl: contextlib.nullcontext())
    monkeypatch.setattr(ops, "_zero_tail", lambda rows, offset_by_expert, impl: rows)

    def misaligned(bias):
        buffer = torch.zeros(bias.numel() + 1, dtype=bias.dtype)
        moved = buffer[1:].view(bias.shape).copy_(bias.detach())
        assert moved.data_ptr() % 16 != 0
        return moved

    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in forward_arguments()]
    expected, _ = torch.ops.sonic.experts_forward(*arguments)
    arguments[2], arguments[4] = misaligned(arguments[2]), misaligned(arguments[4])
    arguments[-4] = "cute"
    actual, _ = torch.ops.sonic.experts_forward(*arguments)
    assert torch.equal(actual, expected) and actual.any()
    rows, weight, bias = torch.randn(6, 8), torch.randn(2, 4, 8), torch.randn(2, 4)
    offset = torch.tensor([0, 2, 6], dtype=torch.int32)
    actual, expected = (
        torch.ops.sonic.grouped_mm(rows, weight, b, offset, "cute")
        for b in (misaligned(bias), bias)
    )
    assert torch.equal(actual, expected) and actual.any()


def test_operator_equals_the_oracle():
    """What the other tests here compare with is itself right, and not zero."""
    arguments = forward_arguments()
    ids = torch.tensor([[0, 1], [1, 2], [0, 9], [2, 2], [-1, 1], [0, 2]])
    x, w1, b1, w2, b2, scores = arguments[:6]
    out, _ = torch.ops.sonic.experts_forward(*arguments)
    expected = experts_reference(x, ids, scores.view(T, K), w1, w2, b1, b2)
    torch.testing.assert_close(out, expected)
    assert expected.any(dim=1).all()
