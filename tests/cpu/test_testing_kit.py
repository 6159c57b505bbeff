"""The test kit must itself be trustworthy: it accepts rounding and rejects mistakes."""

import re
from dataclasses import replace

import pytest
import torch

from sonic.enums import ActivationType, GateUpLayout
from sonic.reference import experts_low_precision, plan_oracle, stages
from sonic.testing import (
    GuardedAllocator,
    Routing,
    assert_close,
    assert_layer_close,
    assert_mutations_fail,
    drop_last_row,
    layer_references,
    make_inputs,
    omit_scores,
    output_mutations,
    poison_dead_rows_,
    poison_like,
    poison_value,
    poisoned_empty,
    random_problem,
    relative_error,
    run_layer,
    shift_offsets,
    swap_experts,
)
from tests import layers

PROBLEM = layers.PROBLEM.with_changes(
    seed=3,
    num_tokens=150,
    hidden_size=72,
    intermediate_size=40,
    num_experts=6,
    top_k=2,
    drop_fraction=0.0,
)


def gaussian(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- assert_close ---


def test_rounding_is_accepted_and_reported():
    ref64 = gaussian(300, 16)
    low = ref64.bfloat16()
    report = assert_close(low.clone(), ref64, low, name="y")
    assert report.name == "y" and 0.0 < report.worst.excess <= 0.5
    # Truncation instead of rounding to nearest: twice the error, inside the policy.
    truncated = (ref64.float().view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
    assert not torch.equal(truncated, low)
    assert assert_close(truncated, ref64, low).whole.excess > 0.4


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_wrong_row_is_rejected_at_any_scale(scale):
    ref64 = scale * gaussian(300, 16)
    low = ref64.bfloat16()
    wrong = low.clone()
    wrong[217] = wrong[218]
    with pytest.raises(AssertionError, match=r"block 1 \[rows 128:256\]"):
        assert_close(wrong, ref64, low)


def test_a_small_expert_is_judged_by_its_own_scale():
    offsets = torch.tensor([0, 100, 100, 200, 260], dtype=torch.int32)
    ref64 = gaussian(300, 16)
    ref64[100:200] *= 1e-4
    low = ref64.bfloat16()
    wrong = low.clone()
    wrong[150] = 0
    assert relative_error(wrong, ref64) < 0.01
    with pytest.raises(
        AssertionError, match=re.escape("worst: expert 2 [rows 100:200]")
    ) as failure:
        assert_close(wrong, ref64, low, per_expert_rows=offsets, name="y")
    text = str(failure.value)
    assert "its largest error is at [150, " in text and "1 of 3 blocks fail" in text
    poison_dead_rows_(low, offsets)
    assert_close(low, ref64, low, per_expert_rows=offsets)


def test_an_error_everywhere_but_below_the_maximum_is_caught_by_the_rms():
    ref64 = gaussian(128, 64)
    low = ref64.bfloat16()
    bound = 2 * (low - ref64).abs().max() + 2**-7 * ref64.abs().max()
    noisy = (ref64 + 0.5 * bound * gaussian(128, 64, seed=1).sign()).bfloat16()
    assert (noisy - ref64).abs().max() < bound
    with pytest.raises(AssertionError, match="1 of 1 blocks fail"):
        assert_close(noisy, ref64, low)


def test_a_single_wrong_element_below_the_rms_is_caught_by_the_maximum():
    ref64 = gaussian(128, 64)
    low = ref64.bfloat16()
    wrong = low.clone()
    wrong[77, 7] += 0.2
    assert relative_error(wrong, ref64) < 2 * relative_error(low, ref64)
    with pytest.raises(AssertionError, match=r"largest error is at \[77, 7\]"):
        assert_close(wrong, ref64, low)


def test_weights_are_compared_expert_by_expert():
    ref64 = gaussian(5, 24, 16)
    ref64[3] *= 1e-5
    low = ref64.bfloat16()
    wrong = low.clone()
    wrong[3] *= -1
    with pytest.raises(AssertionError, match="worst: expert 3"):
        assert_close(wrong, ref64, low)


def test_an_empty_experts_gradient_must_be_exactly_zero():
    ref64 = gaussian(3, 8, 8)
    ref64[1] = 0
    low = ref64.bfloat16()
    assert_close(low, ref64, low)
    wrong = low.clone()
    wrong[1, 0, 0] = 1e-30
    with pytest.raises(AssertionError, match="worst: expert 1"):
        assert_close(wrong, ref64, low)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite_where_the_reference_is(bad):
    ref64 = gaussian(200, 8)
    low = ref64.bfloat16()
    wrong = low.clone()
    wrong[130, 5] = bad
    with pytest.raises(AssertionError, match=r"not finite .* first at \[130, 5\]"):
        assert_close(wrong, ref64, low)
    with pytest.raises(AssertionError, match="low-precision reference itself"):
        assert_close(low, ref64, wrong)


def test_non_finite_references_are_matched_in_kind():
    ref64 = gaussian(4, 8)
    ref64[1, 2], ref64[3, 0] = float("inf"), float("nan")
    low = ref64.bfloat16()
    assert_close(low.clone(), ref64, low)
    for value in (1.0, -float("inf"), float("nan")):
        wrong = low.clone()
        wrong[1, 2] = value
        with pytest.raises(AssertionError, match="not the same infinity or NaN"):
            assert_close(wrong, ref64, low)


def test_a_zero_reference_is_refused():
    zero = torch.zeros(4, 4, dtype=torch.float64)
    with pytest.raises(AssertionError, match="zero everywhere"):
        assert_close(zero.float(), zero, zero.float())
    assert_close(zero.float(), zero, zero.float(), allow_zero_reference=True)
    with pytest.raises(AssertionError):
        assert_close(zero.float() + 1e-9, zero, zero.float(), allow_zero_reference=True)


def test_shapes_and_dtypes_must_agree():
    ref64 = gaussian(4, 4)
    with pytest.raises(AssertionError, match="shapes differ"):
        assert_close(ref64[:3].float(), ref64, ref64.float())
    with pytest.raises(AssertionError, match="low-precision reference torch.bfloat16"):
        assert_close(ref64.float(), ref64, ref64.bfloat16())
    with pytest.raises(AssertionError, match="must be float64"):
        assert_close(ref64.float(), ref64.float(), ref64.float())


@pytest.mark.parametrize("shape", [(0,), (0, 8), (3, 0, 4)], ids=str)
def test_nothing_to_compare(shape):
    empty = torch.empty(shape, dtype=torch.float64)
    assert assert_close(empty.bfloat16(), empty, empty.bfloat16()).worst.excess == 0.0


def test_scalars_and_vectors():
    for ref64 in (gaussian(), gaussian(5000)):
        low = ref64.bfloat16()
        assert_close(low, ref64, low)
        with pytest.raises(AssertionError):
            assert_close(low + 0.1, ref64, low)


def test_cancelling_sums_need_their_magnitude():
    ref64 = torch.tensor([1e-3], dtype=torch.float64)
    low, got = ref64.float(), ref64.float() + 2e-3
    with pytest.raises(AssertionError):
        assert_close(got, ref64, low, band_dtype=torch.bfloat16)
    assert_close(got, ref64, low, band_dtype=torch.bfloat16, magnitude=1.0)


def test_relative_error():
    ref = torch.tensor([3.0, 4.0])
    assert relative_error(ref * 1.5, ref) == pytest.approx(0.5)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_error(torch.ones(3), torch.zeros(3)) == float("inf")


# --- mutations ---


@pytest.fixture(scope="module")
def layer():
    inputs = make_inputs(PROBLEM)
    return inputs, *layer_references(PROBLEM, inputs)


def test_every_field_of_the_layer_rejects_output_mutations(layer):
    inputs, ref64, ref_low = layer
    assert_layer_close(ref_low, ref64, ref_low, PROBLEM)
    for name, tensor in vars(ref_low).items():
        for mutation, wrong in output_mutations(tensor).items():
            with pytest.raises(AssertionError, match=f"^{name} of "):
                assert_layer_close(replace(ref_low, **{name: wrong}), ref64, ref_low, PROBLEM)
            assert mutation in ("zero_output", "swap_experts")


def test_forgotten_scores_are_rejected(layer):
    inputs, ref64, ref_low = layer

    def forgetful(x, ids, weights, *rest):
        return experts_low_precision(x, ids, omit_scores(weights) + 0 * weights, *rest)

    wrong = run_layer(forgetful, PROBLEM, inputs)
    for name in ("out", "dhidden_states", "dw1", "dw2", "db1", "db2", "dtopk_weights"):
        with pytest.raises(AssertionError, match=f"^{name} of "):
            assert_layer_close(
                replace(ref_low, **{name: getattr(wrong, name)}), ref64, ref_low, PROBLEM
            )


def stage_results(inputs, offsets, plan, lose=None):
    """(R, ...) and (E, ...) results of four stages; ``lose`` spoils operands of the gradients."""
    lose = lose or (lambda rows: rows)
    h, a = stages.up_forward(
        inputs.hidden_states,
        inputs.w1,
        inputs.b1,
        plan.token_by_row,
        offsets,
        activation=PROBLEM.activation,
        layout=PROBLEM.layout,
        store_preact=True,
    )
    y = stages.down_forward(a, inputs.w2, inputs.b2, offsets)
    dw2 = stages.down_backward_weight(
        inputs.dout, lose(a), plan.token_by_row, offsets, accumulate_into=None
    )
    dw1 = stages.up_backward_weight(
        inputs.hidden_states,
        lose(h),
        plan.token_by_row,
        offsets,
        layout=PROBLEM.layout,
        gated=True,
        accumulate_into=None,
    )
    return {"h": h, "a": a, "y": y, "dw1": dw1, "dw2": dw2}


def test_ragged_mistakes_in_stages_are_rejected(layer):
    inputs = layer[0]
    plan = plan_oracle(inputs.topk_ids, PROBLEM.num_experts)
    offsets = plan.offset_by_expert
    ref64 = stage_results(inputs.to(torch.float64), offsets, plan)
    ref_low = stage_results(inputs, offsets, plan)
    shifted = stage_results(inputs, shift_offsets(offsets), plan)
    lossy = stage_results(inputs, offsets, plan, lambda rows: drop_last_row(rows, offsets, 4))
    for name, low in ref_low.items():
        rows = offsets if low.shape[0] == PROBLEM.num_rows else None

        def check(tensor, name=name, low=low, rows=rows):
            assert_close(tensor, ref64[name], low, per_expert_rows=rows, name=name)

        expected = ("zero_output", "swap_experts") + (() if rows is None else ("drop_last_row",))
        assert_mutations_fail(check, low, rows, expected=expected)
        with pytest.raises(AssertionError, match=name):
            check(shifted[name])
        if rows is None:
            with pytest.raises(AssertionError, match="worst: expert 4"):
                check(lossy[name])


def test_mutation_guard_reports_a_loose_check():
    tensor = gaussian(6, 4)
    with pytest.raises(AssertionError, match="accepts a wrong result: zero_output"):
        assert_mutations_fail(lambda wrong: None, tensor)
    with pytest.raises(AssertionError, match="without effect"):
        assert_mutations_fail(lambda wrong: None, torch.zeros(6, 4))


def test_what_the_mutations_change():
    offsets = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    rows = torch.arange(6.0)[:, None]
    assert swap_experts(rows, 0, 2, offsets).flatten().tolist() == [2, 3, 0, 1, 4, 5]
    assert swap_experts(rows, 0, 2).flatten().tolist() == [2, 1, 0, 3, 4, 5]
    assert drop_last_row(rows, offsets, 0).flatten().tolist() == [0, 0, 2, 3, 4, 5]
    assert shift_offsets(offsets).tolist() == [0, 3, 3, 5]
    assert shift_offsets(offsets, -3).tolist() == [0, 0, 0, 5]
    with pytest.raises(ValueError, match="expert 1 has no row"):
        drop_last_row(rows, offsets, 1)
    assert rows.flatten().tolist() == [0, 1, 2, 3, 4, 5]


# --- poison ---


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64],
    ids=str,
)
def test_floats_are_poisoned_with_nan(dtype):
    assert poison_like(torch.zeros(3, dtype=dtype)).isnan().all()


@pytest.mark.parametrize(
    "dtype, value",
    [(torch.int32, -(2**30)), (torch.int64, -(2**62)), (torch.uint8, 189), (torch.bool, True)],
    ids=str,
)
def test_other_dtypes_are_poisoned_with_absurd_values(dtype, value):
    assert poison_value(dtype) == value
    assert (poison_like(torch.zeros(3, dtype=dtype)) == value).all()


def test_poisoned_empty_covers_the_factories_and_undoes_itself():
    originals = [vars(torch)[name] for name in ("empty", "empty_like", "empty_strided")]
    base = torch.zeros(2, 3)
    with poisoned_empty():
        made = [
            torch.empty(2, 3),
            torch.empty((2, 3), dtype=torch.bfloat16),
            torch.empty_like(base),
            torch.empty_strided((2, 3), (1, 2)),
            torch.empty_permuted((2, 3), (1, 0)),
            base.new_empty((2, 3)),
            base.new_empty_strided((2, 3), (3, 1)),
        ]
        assert (torch.empty(4, dtype=torch.int32) == -(2**30)).all()
        assert not torch.zeros_like(base).any() and not base.new_zeros(3).any()
    assert all(t.isnan().all() and t.shape == (2, 3) for t in made)
    assert made[3].stride() == (1, 2)
    assert [vars(torch)[name] for name in ("empty", "empty_like", "empty_strided")] == originals
    assert "new_empty" not in vars(torch.Tensor)
    assert base.new_empty((2, 3)).shape == (2, 3)


def test_poisoned_empty_undoes_itself_after_an_error():
    original = torch.empty
    with pytest.raises(RuntimeError, match="on purpose"):
        with poisoned_empty():
            raise RuntimeError("on purpose")
    assert torch.empty is original and "new_empty" not in vars(torch.Tensor)


def test_poisoned_empty_on_fake_memory():
    with poisoned_empty():
        assert torch.empty(3, device="meta").shape == (3,)


# --- guard bands ---


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float32, torch.int32, torch.uint8], ids=str
)
@pytest.mark.parametrize("distance", [1, 5])
@pytest.mark.parametrize("side", ["before", "after"])
def test_guard_band_finds_a_stray_write(dtype, distance, side):
    guards = GuardedAllocator(guard_bytes=1024)
    tensor = guards.empty((3, 5), dtype=dtype, name="victim")
    assert tensor.data_ptr() % 64 == 0 and tensor.is_contiguous()
    assert (tensor == poison_value(dtype)).all() or tensor.isnan().all()
    tensor.fill_(1)
    guards.check()
    position = tensor.storage_offset() + (-distance if side == "before" else 14 + distance)
    tensor.as_strided((1,), (1,), position).fill_(1)
    with pytest.raises(AssertionError, match=f"victim: 1 .*{side}.*nearest {distance} element"):
        guards.check()


def test_guarded_copy_surrounds_an_input_with_nan():
    guards = GuardedAllocator(guard_bytes=256)
    source = gaussian(4, 6).t()
    copy = guards.copy_of(source)
    assert torch.equal(copy, source) and copy.is_contiguous()
    wider = copy.as_strided((26,), (1,), copy.storage_offset() - 1)
    assert wider[0].isnan() and wider[-1].isnan()
    guards.check()


def test_guarded_allocations_replace_the_factories():
    guards = GuardedAllocator(guard_bytes=256)
    with guards.allocations():
        flat, strided = torch.empty(10), torch.empty_strided((2, 3), (1, 2))
        like, empty = torch.empty_like(flat), torch.empty(0, 4)
        assert torch.empty(3, device="meta").device.type == "meta"
    assert strided.stride() == (1, 2) and empty.shape == (0, 4)
    for tensor in (flat, strided, like):
        assert tensor.isnan().all()
        tensor.zero_()
    guards.check()
    strided.as_strided((7,), (1,), strided.storage_offset()).fill_(0)
    with pytest.raises(AssertionError, match="after the tensor"):
        guards.check()


def test_the_layer_runs_inside_guard_bands():
    guards = GuardedAllocator(guard_bytes=256)
    inputs = make_inputs(PROBLEM)
    expected = run_layer(experts_low_precision, PROBLEM, inputs)
    with guards.allocations():
        got = run_layer(experts_low_precision, PROBLEM, inputs)
    guards.check()
    assert torch.equal(got.out, expected.out) and torch.equal(got.dw1, expected.dw1)


@pytest.mark.parametrize("guard_bytes", [0, -256, 100])
def test_guard_band_sizes(guard_bytes):
    with pytest.raises(ValueError, match="multiple of 256"):
        GuardedAllocator(guard_bytes)


# --- problems ---


def test_problems_depend_on_the_seed_alone():
    assert random_problem(5) == random_problem(5)
    one, two = (make_inputs(random_problem(5)) for _ in range(2))
    for name, value in vars(one).items():
        assert (value is None) == (getattr(two, name) is None)
        assert value is None or torch.equal(value.nan_to_num(), getattr(two, name).nan_to_num())
    assert len({random_problem(seed).id for seed in range(100)}) == 100


def test_problems_cover_what_they_promise():
    problems = [random_problem(seed) for seed in range(300)]
    assert {p.activation for p in problems} == set(ActivationType)
    assert {p.layout for p in problems} == set(GateUpLayout)
    assert {p.routing for p in problems} == set(Routing)
    assert {p.dtype for p in problems} == {torch.bfloat16, torch.float16}
    assert {0, 1, 63, 65} <= {p.num_tokens for p in problems}
    assert {1, 24} <= {p.num_experts for p in problems}
    for flag in ("has_bias", "contiguous"):
        assert {getattr(p, flag) for p in problems} == {False, True}
    for size in ("hidden_size", "intermediate_size"):
        values = [getattr(p, size) for p in problems]
        assert all(v % 8 == 0 and v > 0 for v in values)
        assert sum(v % 64 != 0 for v in values) > 150 and any(v % 64 == 0 for v in values)
    assert all(1 <= p.top_k <= p.num_experts for p in problems)
    assert any(p.drop_fraction for p in problems)


@pytest.mark.parametrize("seed", range(25))
def test_inputs_fit_their_problem(seed):
    problem = random_problem(seed, max_tokens=70, max_hidden_size=64, max_intermediate_size=64)
    assert problem.num_tokens <= 70 and max(problem.hidden_size, problem.intermediate_size) <= 64
    inputs = make_inputs(problem)
    experts, hidden, width = problem.num_experts, problem.hidden_size, problem.intermediate_size
    preact = 2 * width if problem.activation.is_gated else width
    assert inputs.hidden_states.shape == inputs.dout.shape == (problem.num_tokens, hidden)
    assert inputs.topk_ids.shape == inputs.topk_weights.shape
    assert inputs.topk_ids.shape == (problem.num_tokens, problem.top_k)
    assert inputs.w1.shape == (experts, preact, hidden)
    assert inputs.w2.shape == (experts, hidden, width)
    assert (inputs.b1 is None) == (inputs.b2 is None) == (not problem.has_bias)
    assert inputs.topk_ids.dtype == problem.ids_dtype
    assert inputs.topk_weights.dtype == torch.float32
    assert all(t.isfinite().all() for t in vars(inputs).values() if t is not None and t.numel() > 0)
    assert inputs.w1.stride(0) == preact * hidden * (1 if problem.contiguous else 2)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "strided"])
def test_strides_do_not_change_the_values(contiguous, top_k):
    """With top_k=1 a transposed matrix would be contiguous again."""
    problem = PROBLEM.with_changes(top_k=top_k)
    plain, other = (
        make_inputs(problem.with_changes(contiguous=flag)) for flag in (True, contiguous)
    )
    for name, value in vars(plain).items():
        assert torch.equal(value, getattr(other, name)), name
        assert getattr(other, name).is_contiguous() == contiguous


@pytest.mark.parametrize(
    "routing, drop_fraction",
    [(r, d) for r in Routing for d in (0.0, 0.5)],
    ids=lambda v: v.value if isinstance(v, Routing) else str(v),
)
def test_routing_kinds(routing, drop_fraction):
    problem = PROBLEM.with_changes(
        num_experts=12, top_k=3, routing=routing, drop_fraction=drop_fraction
    )
    ids = make_inputs(problem).topk_ids
    outside = (ids < 0) | (ids >= 12)
    assert outside.float().mean().item() == pytest.approx(drop_fraction, abs=0.1)
    if drop_fraction:
        assert set(ids[outside].tolist()) == {-1, 12, 17}
        return
    counts = torch.bincount(ids.flatten(), minlength=12)
    distinct = [len(set(row)) for row in ids.tolist()]
    assert set(distinct) == ({1} if routing is Routing.REPEATED else {3})
    assert (counts.max() == problem.num_tokens) == (routing is Routing.HOT)
    assert int((counts == 0).sum()) == (6 if routing is Routing.SPARSE else 0)


def test_signals_are_of_order_one():
    inputs = make_inputs(PROBLEM)
    ref64, _ = layer_references(PROBLEM, inputs)
    assert 0.9 < inputs.hidden_states.float().std() < 1.1
    assert 0.1 < ref64.out.std() < 2.0 and 0.1 < ref64.dhidden_states.std() < 2.0
