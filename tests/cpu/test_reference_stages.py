"""The stages: chained in float64 they are the layer oracle, and they round where they say."""

import inspect

import pytest
import torch

from sonic.enums import ActivationType, GateUpLayout
from sonic.reference import (
    activation_grad,
    activation_value,
    experts_flat_low_precision,
    experts_flat_reference,
    experts_low_precision,
    experts_reference,
    packed_to_rows,
    plan_oracle,
    rows_to_packed,
    stages,
)
from sonic.testing import (
    LayerProblem,
    LayerResult,
    Routing,
    assert_layer_close,
    layer_references,
    make_inputs,
    poison_dead_rows_,
    poisoned_empty,
    random_problem,
    run_layer,
)

CASES = [
    pytest.param(activation, layout, bias, id=f"{activation.value}-{layout.value}-bias{bias:d}")
    for activation in ActivationType
    for layout in (GateUpLayout if activation.is_gated else [GateUpLayout.INTERLEAVED])
    for bias in (False, True)
]


def small_problem(**changes):
    values = {
        "seed": 11,
        "num_tokens": 13,
        "hidden_size": 24,
        "intermediate_size": 16,
        "num_experts": 5,
        "top_k": 3,
        "activation": ActivationType.SWIGLU,
        "layout": GateUpLayout.INTERLEAVED,
        "has_bias": False,
        "dtype": torch.bfloat16,
        "ids_dtype": torch.int32,
        "routing": Routing.SPARSE,
        "drop_fraction": 0.2,
        "contiguous": True,
    }
    return LayerProblem(**(values | changes))


def run_stages(problem, inputs):
    """Forward and backward stage by stage, every dead row poisoned before the next stage."""
    plan = plan_oracle(inputs.topk_ids, problem.num_experts)
    offsets, token_by_row = plan.offset_by_expert, plan.token_by_row
    gated = problem.activation.is_gated
    scores, dout = inputs.topk_weights.flatten(), inputs.dout

    def clean(rows):
        return poison_dead_rows_(rows, offsets)

    def combine(rows, scores):
        return stages.combine(
            clean(rows), plan.row_by_slot, scores, None, None, problem.num_tokens, problem.top_k
        )

    h, a = stages.up_forward(
        inputs.hidden_states,
        inputs.w1,
        inputs.b1,
        token_by_row,
        offsets,
        activation=problem.activation,
        layout=problem.layout,
        store_preact=True,
    )
    y = stages.down_forward(clean(a), inputs.w2, inputs.b2, offsets)
    out = combine(y, scores)
    score_by_row = stages.gather_scores(scores, plan.slot_by_row)
    dh, a_scaled, ds_partial = stages.down_backward_act(
        dout,
        inputs.w2,
        clean(h),
        clean(score_by_row),
        token_by_row,
        offsets,
        activation=problem.activation,
    )
    clean(dh), clean(a_scaled), clean(ds_partial[0])
    bias_terms = (dout, inputs.b2, token_by_row, offsets) if problem.has_bias else ()
    dscores = stages.score_grad(ds_partial, plan.row_by_slot, *bias_terms)
    dw2 = stages.down_backward_weight(dout, a_scaled, token_by_row, offsets, accumulate_into=None)
    dw1 = stages.up_backward_weight(
        inputs.hidden_states,
        dh,
        token_by_row,
        offsets,
        layout=problem.layout,
        gated=gated,
        accumulate_into=None,
    )
    dx_rows = stages.up_backward_act(dh, inputs.w1, offsets, layout=problem.layout, gated=gated)
    dx = combine(dx_rows, None)
    db1 = db2 = None
    if problem.has_bias:
        db1 = stages.bias_grad_rows(dh, offsets)
        db1 = packed_to_rows(db1, problem.layout) if gated else db1
        db2 = stages.bias_grad_gathered(dout, token_by_row, score_by_row, offsets)
    return LayerResult(out, dx, dscores.view_as(inputs.topk_weights), dw1, dw2, db1, db2)


def assert_same_result(got, expected, tolerance=1e-10, expect_signal=True):
    for name, wanted in vars(expected).items():
        computed = getattr(got, name)
        if wanted is None:
            assert computed is None
            continue
        if expect_signal:
            assert wanted.abs().max() > 1e-3, name
        torch.testing.assert_close(
            computed,
            wanted,
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, name=name: f"{name}: {m}",
        )


@pytest.mark.parametrize("activation, layout, bias", CASES)
def test_chained_stages_are_the_oracle(activation, layout, bias):
    problem = small_problem(activation=activation, layout=layout, has_bias=bias)
    inputs = make_inputs(problem).to(torch.float64)
    counts = plan_oracle(inputs.topk_ids, 5).offset_by_expert.diff()
    assert (counts == 0).any() and 0 < counts.sum() < problem.num_rows
    expected = run_layer(experts_reference, problem, inputs)
    assert_same_result(run_stages(problem, inputs), expected)
    assert_same_result(run_layer(experts_low_precision, problem, inputs), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_tokens": 0},
        {"drop_fraction": 1.0},
        {"num_tokens": 1, "top_k": 1, "num_experts": 1, "drop_fraction": 0.0},
        {"routing": Routing.HOT, "drop_fraction": 0.0},
        {"routing": Routing.REPEATED},
        {"contiguous": False},
        {"hidden_size": 5, "intermediate_size": 11},
        {"intermediate_size": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "activation", [ActivationType.SWIGLU_OAI, ActivationType.SILU], ids=lambda a: a.value
)
def test_awkward_sizes(activation, changes):
    problem = small_problem(activation=activation, has_bias=True, **changes)
    inputs = make_inputs(problem).to(torch.float64)
    expected = run_layer(experts_reference, problem, inputs)
    live = problem.num_tokens > 0 and problem.drop_fraction < 1.0
    assert bool(expected.out.any()) == live
    assert_same_result(run_stages(problem, inputs), expected, expect_signal=live)
    assert_same_result(
        run_layer(experts_low_precision, problem, inputs), expected, expect_signal=live
    )


@pytest.mark.parametrize("seed", range(30))
def test_random_problems(seed):
    problem = random_problem(
        seed, max_tokens=40, max_hidden_size=48, max_intermediate_size=40, max_experts=9
    )
    inputs = make_inputs(problem)
    with poisoned_empty():
        ref64, ref_low = layer_references(problem, inputs)
        exact = run_layer(experts_low_precision, problem, inputs.to(torch.float64))
    assert_same_result(exact, ref64, expect_signal=False)
    reports = assert_layer_close(ref_low, ref64, ref_low, problem)
    assert reports["out"].whole.max_error < 0.2


def test_low_precision_is_as_good_as_its_dtype():
    problem = small_problem(num_tokens=200, hidden_size=64, intermediate_size=64, has_bias=True)
    ref64, ref_low = layer_references(problem, make_inputs(problem))
    for name, wanted in vars(ref64).items():
        got = getattr(ref_low, name)
        assert got.dtype == (torch.float32 if name == "dtopk_weights" else torch.bfloat16)
        error = (got.double() - wanted).norm() / wanted.norm()
        assert 1e-4 < error < 1e-2, (name, error)


def test_flat_pairs_with_gradients():
    generator = torch.Generator().manual_seed(0)
    tokens, experts, pairs = 6, 4, 40
    token_ids = torch.randint(-1, tokens, (pairs,), generator=generator)
    token_ids[token_ids == 3] = tokens  # token 3 has no pair
    expert_ids = torch.randint(-1, experts + 1, (pairs,), generator=generator)
    leaves = [
        torch.randn(size, generator=generator).double().requires_grad_()
        for size in [
            (tokens, 8),
            (pairs,),
            (experts, 48, 8),
            (experts, 8, 24),
            (experts, 48),
            (experts, 8),
        ]
    ]
    dout = torch.randn((tokens, 8), generator=generator).double()
    results = []
    for layer in (experts_flat_reference, experts_flat_low_precision):
        x, weights, w1, w2, b1, b2 = leaves
        out = layer(x, token_ids, expert_ids, weights, w1, w2, b1, b2, "geglu", "concatenated")
        assert not out[3].any() and out[[0, 1, 2, 4, 5]].abs().min() > 1e-6
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    for expected, got in zip(*results, strict=True):
        assert expected.any()
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_combine_of_flat_pairs_skips_dead_slots():
    rows = torch.tensor([[1.0], [10.0], [100.0], [float("nan")]], dtype=torch.float64)
    row_by_slot = torch.tensor([2, -1, 0, 1], dtype=torch.int32)
    scores = torch.tensor([2.0, float("nan"), 3.0, 5.0], dtype=torch.float64)
    offset_by_token = torch.tensor([0, 0, 3, 4], dtype=torch.int32)
    slot_by_position = torch.tensor([0, 1, 3, 2], dtype=torch.int32)
    tail = (offset_by_token, slot_by_position, 3, 0)
    out = stages.combine(rows, row_by_slot, scores, *tail)
    assert out.flatten().tolist() == [0.0, 250.0, 3.0]
    assert stages.combine(rows, row_by_slot, None, *tail).flatten().tolist() == [0.0, 110.0, 1.0]


def test_combine_without_slots():
    empty = torch.empty(0, dtype=torch.int32)
    offsets = torch.zeros(4, dtype=torch.int32)
    out = stages.combine(torch.empty(0, 5), empty, torch.empty(0), offsets, empty, 3, 0)
    assert out.shape == (3, 5) and not out.any()


def test_combine_adds_in_float32():
    # In bfloat16 steps, 256 + 1 + 1 would stay 256.
    rows = torch.tensor([[256.0], [1.0], [1.0]]).bfloat16()
    slots = torch.arange(3, dtype=torch.int32)
    assert stages.combine(rows, slots, None, None, None, 1, 3).item() == 258.0


def test_score_grad_needs_the_bias_operands():
    with pytest.raises(TypeError, match="b2 needs"):
        stages.score_grad(torch.ones(1, 2), torch.arange(2), b2=torch.ones(1, 2))


def test_score_grad_adds_partial_sums():
    partial = torch.tensor([[1.0, 2.0, float("nan")], [10.0, 20.0, float("nan")]])
    row_by_slot = torch.tensor([1, -1, 0], dtype=torch.int32)
    assert stages.score_grad(partial, row_by_slot).tolist() == [22.0, 0.0, 11.0]


@pytest.fixture
def up_down():
    """Operands of one problem in bfloat16, and its plan."""
    problem = small_problem(has_bias=True, drop_fraction=0.0)
    inputs = make_inputs(problem)
    return problem, inputs, plan_oracle(inputs.topk_ids, problem.num_experts)


def test_forward_rounding_points(up_down):
    problem, inputs, plan = up_down
    h, a = stages.up_forward(
        inputs.hidden_states,
        inputs.w1,
        inputs.b1,
        plan.token_by_row,
        plan.offset_by_expert,
        activation=problem.activation,
        layout=problem.layout,
        store_preact=True,
    )
    wide = inputs.to(torch.float64)
    counts = plan.offset_by_expert.diff()
    expert_by_row = torch.repeat_interleave(torch.arange(problem.num_experts), counts)
    x = wide.hidden_states[plan.token_by_row]
    preact = torch.einsum("rh,rnh->rn", x, wide.w1[expert_by_row]) + wide.b1[expert_by_row]
    gate, up = preact[:, 0::2], preact[:, 1::2]
    packed = rows_to_packed(preact, problem.layout)
    # Float64 and float32 sums round to the same bfloat16 but for near ties.
    assert (h != packed.bfloat16()).float().mean() < 0.01
    value = activation_value(problem.activation, gate, up).bfloat16()
    assert (a != value).float().mean() < 0.01
    rounded = [half.bfloat16().double() for half in (gate, up)]
    assert (a != activation_value(problem.activation, *rounded).bfloat16()).float().mean() > 0.1
    none, same = stages.up_forward(
        inputs.hidden_states,
        inputs.w1,
        inputs.b1,
        plan.token_by_row,
        plan.offset_by_expert,
        activation=problem.activation,
        layout=problem.layout,
        store_preact=False,
    )
    assert none is None and torch.equal(same, a)


def test_backward_rounding_points(up_down):
    problem, inputs, plan = up_down
    generator = torch.Generator().manual_seed(0)
    h = torch.randn((problem.num_rows, 32), generator=generator).bfloat16()
    scores = torch.rand(problem.num_rows, generator=generator)
    dh, a_scaled, ds_partial = stages.down_backward_act(
        inputs.dout,
        inputs.w2,
        h,
        scores,
        plan.token_by_row,
        plan.offset_by_expert,
        activation=problem.activation,
    )
    assert (dh.dtype, a_scaled.dtype, ds_partial.dtype) == (torch.bfloat16,) * 2 + (torch.float32,)
    counts = plan.offset_by_expert.diff()
    expert_by_row = torch.repeat_interleave(torch.arange(problem.num_experts), counts)
    wide = inputs.to(torch.float64)
    p = torch.einsum("rh,rhi->ri", wide.dout[plan.token_by_row], wide.w2[expert_by_row])
    blocks = h.double().view(-1, 2, 2, 8)
    gate, up = blocks[:, :, 0].flatten(1), blocks[:, :, 1].flatten(1)
    value = activation_value(problem.activation, gate, up)
    score = scores.double()[:, None]
    dgate, dup = activation_grad(problem.activation, score * p, gate, up)
    packed = torch.stack([dgate.view(-1, 2, 8), dup.view(-1, 2, 8)], dim=2).flatten(1)
    assert (dh != packed.bfloat16()).float().mean() < 0.01
    assert (a_scaled != (score * value).bfloat16()).float().mean() < 0.01
    torch.testing.assert_close(ds_partial.sum(0).double(), (p * value).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", ["w1", "w2"])
def test_accumulation_is_not_rounded(up_down, weight):
    problem, inputs, plan = up_down
    generator = torch.Generator().manual_seed(0)
    rows = problem.num_rows
    shared = (plan.token_by_row, plan.offset_by_expert)
    if weight == "w1":
        dh = torch.randn((rows, 32), generator=generator).bfloat16()

        def gradient(into, dtype=torch.bfloat16):
            return stages.up_backward_weight(
                inputs.hidden_states.to(dtype),
                dh.to(dtype),
                *shared,
                layout=problem.layout,
                gated=True,
                accumulate_into=into,
            )
    else:
        a_scaled = torch.randn((rows, 16), generator=generator).bfloat16()

        def gradient(into, dtype=torch.bfloat16):
            return stages.down_backward_weight(
                inputs.dout.to(dtype), a_scaled.to(dtype), *shared, accumulate_into=into
            )

    exact = gradient(None, torch.float64)
    start = torch.randn(exact.shape, generator=generator)
    total = start.clone()
    assert gradient(total) is total
    torch.testing.assert_close((total - start).double(), exact, rtol=1e-4, atol=1e-5)
    rounded = gradient(None)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.double() - exact).abs().max() > 1e-3
    assert (rounded != exact.bfloat16()).float().mean() < 0.01


def test_weight_gradient_of_ungathered_rows():
    generator = torch.Generator().manual_seed(0)
    rows, drows = (torch.randn((6, n), generator=generator).double() for n in (3, 4))
    offsets = torch.tensor([0, 4, 5], dtype=torch.int32)
    dw = stages.up_backward_weight(
        rows, drows, None, offsets, layout="concatenated", gated=False, accumulate_into=None
    )
    expected = torch.stack([drows[:4].T @ rows[:4], drows[4:5].T @ rows[4:5]])
    torch.testing.assert_close(dw, expected)
    torch.testing.assert_close(stages.down_backward_weight(drows, rows, None, offsets), expected)


def test_bias_gradients_take_a_dtype():
    dh = torch.full((300, 2), 1.0).bfloat16()
    offsets = torch.tensor([0, 0, 257, 300], dtype=torch.int32)
    wide = stages.bias_grad_rows(dh, offsets, dtype=torch.float32)
    assert wide.dtype == torch.float32 and wide[:, 0].tolist() == [0.0, 257.0, 43.0]
    assert stages.bias_grad_rows(dh, offsets).dtype == torch.bfloat16
    token_by_row = torch.arange(300, dtype=torch.int32) % 7
    dout = torch.arange(7.0)[:, None].expand(7, 3).bfloat16()
    scores = torch.full((300,), 0.5)
    got = stages.bias_grad_gathered(dout, token_by_row, scores, offsets, dtype=torch.float32)
    expected = [
        0.0,
        0.5 * sum(r % 7 for r in range(257)),
        0.5 * sum(r % 7 for r in range(257, 300)),
    ]
    assert got[:, 2].tolist() == expected


def test_kernel_stages_have_the_same_signatures():
    pytest.importorskip("triton")
    pytest.importorskip("cutlass")
    kernels = pytest.importorskip("sonic.stages")
    names = [
        name
        for name, value in vars(stages).items()
        if inspect.isfunction(value)
        and value.__module__ == stages.__name__
        and not name.startswith("_")
    ]
    assert len(names) == 11
    for name in names:
        parameters = [
            [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]
            for function in (getattr(stages, name), getattr(kernels, name))
        ]
        assert parameters[0] == parameters[1], name
