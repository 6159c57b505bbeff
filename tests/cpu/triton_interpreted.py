"""The Triton kernels run by Triton's interpreter on CPU tensors.

Not collected on its own: ``test_triton_interpreter.py`` runs it in a process of its own with
``TRITON_INTERPRET=1``, which must be set before triton is first imported.
"""

import pytest
import torch
import triton
import triton.language as tl

import sonic.triton.bias_grad as bias_grad_module
import sonic.triton.plan as plan_module
import sonic.triton.topk as topk_module
from sonic.enums import ScoreOrder
from sonic.plan import build_plan, build_plan_flat
from sonic.reference import plan_oracle, plan_oracle_flat
from tests import routing_checks as checks

every_order = pytest.mark.parametrize("order", ScoreOrder, ids=lambda o: o.value)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:]
)
every_id_dtype = pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
CPU = torch.device("cpu")


@triton.jit
def _count_kernel(out, limit):
    total = 0
    for step in range(0, limit, 2):
        total += step
    tl.store(out, total)


def _interpreter_works() -> bool:
    out = torch.zeros(1, dtype=torch.int32)
    try:
        _count_kernel[(1,)](out, 5)
    except triton.runtime.errors.InterpreterError:
        return False
    return out.item() == 6


if not _interpreter_works():
    # Triton 3.6 and earlier turn one-element arrays into integers, which NumPy 2.4 refuses.
    pytest.skip("this Triton's interpreter does not run on this NumPy", allow_module_level=True)


@pytest.fixture(params=["direct", "tiled"])
def method(request, monkeypatch):
    if request.param == "tiled":
        monkeypatch.setattr(plan_module, "_DIRECT_MAX_SLOTS", 0)
    return request.param


PLANS = [
    (0, 2, 4, "uniform"),
    (1, 1, 1, "uniform"),
    (5, 3, 7, "uniform"),
    (300, 8, 16, "uniform"),
    (300, 8, 16, "hot"),
    (100, 2, 5, "dropped"),
    (70, 4, 300, "uniform"),
]


@every_id_dtype
@pytest.mark.parametrize("case", PLANS, ids=str)
def test_plan(case, id_dtype, method, guarded):
    tokens, top_k, experts, kind = case
    ids = checks.expert_ids((tokens, top_k), experts, kind, CPU, id_dtype)
    if tokens:
        assert plan_module.method_for(ids.numel(), experts) == method
    actual = build_plan(guarded.copy_of(ids), experts, impl="triton")
    checks.assert_same_plan(actual, plan_oracle(ids, experts))


@every_id_dtype
@pytest.mark.parametrize("case", PLANS, ids=str)
def test_flat_plan(case, id_dtype, method, guarded):
    tokens, top_k, experts, kind = case
    slots = tokens * top_k
    ids = checks.expert_ids((slots,), experts, kind, CPU, id_dtype)
    owners = torch.randint(-1, tokens + 1, (slots,), dtype=id_dtype)
    actual = build_plan_flat(
        guarded.copy_of(owners), guarded.copy_of(ids), tokens, experts, impl="triton"
    )
    checks.assert_same_plan(actual, plan_oracle_flat(owners, ids, tokens, experts))


def test_every_tile_size(monkeypatch):
    ids = checks.expert_ids((400, 4), 6, "uniform", CPU)
    expected = plan_oracle(ids, 6)
    monkeypatch.setattr(plan_module, "_DIRECT_MAX_SLOTS", 0)
    for tile in plan_module._TILES:
        monkeypatch.setattr(plan_module, "_TILES", (tile,))
        checks.assert_same_plan(build_plan(ids, 6, impl="triton"), expected)


def test_too_many_counters_sort_instead():
    assert plan_module.method_for(2**26, 65536) == "sorted"
    assert plan_module.method_for(2**31 - 1, 65536) == "sorted"
    assert plan_module.method_for(32768 * 8, 128) == "tiled"
    assert plan_module.method_for(163840, 512) == "tiled"
    ids = checks.expert_ids((40, 4), 20, "uniform", CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "_DIRECT_MAX_SLOTS", 0)
        patch.setattr(plan_module, "_COUNTER_BYTES_PER_TILE_SLOT", 0)
        assert plan_module.method_for(160, 20) == "sorted"
        checks.assert_same_plan(build_plan(ids, 20, impl="triton"), plan_oracle(ids, 20))


def _logits(shape, dtype, guarded):
    return guarded.copy_of((3 * torch.randn(shape)).to(dtype))


@every_order
@every_dtype
@pytest.mark.parametrize(
    "case", [(7, 8, 2), (5, 60, 4), (3, 128, 8), (4, 5, 5), (2, 1, 1), (3, 100, 64), (2, 1500, 7)]
)
def test_topk(case, dtype, order, guarded):
    tokens, experts, top_k = case
    checks.check_topk(_logits((tokens, experts), dtype, guarded), top_k, order)


@every_order
@pytest.mark.parametrize("case", [(3, 65, 10), (2, 200, 64), (2, 128, 3)])
def test_topk_in_chunks(case, order, guarded, monkeypatch):
    tokens, experts, top_k = case
    monkeypatch.setattr(topk_module, "_MAX_BLOCK_E", 32)
    checks.check_topk(_logits((tokens, experts), torch.bfloat16, guarded), top_k, order)
    # A chunk of nothing but -inf has no part in the sum.
    logits = _logits((tokens, experts), torch.float32, guarded)
    logits[:, 32:64] = -torch.inf
    checks.check_topk(logits, top_k if experts >= 96 else 3, order)


@every_order
def test_topk_of_strided_logits(order):
    wide = torch.randn(6, 24)
    checks.check_topk(wide[::2, 4:20], 3, order)
    checks.check_topk(wide.t()[:, 1:5], 3, order)


@pytest.mark.parametrize("chunk", [4096, 4], ids=["whole", "chunks"])
def test_topk_ties_zeros_and_extremes(chunk, monkeypatch):
    monkeypatch.setattr(topk_module, "_MAX_BLOCK_E", chunk)
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [
            [0.0, 0, 0, 0, 0, 0, 0, 0, 0],
            [-0.0, 0, -0.0, 0, -1, -1, 1, 1, -0.0],
            [1, nan, 2, -nan, inf, 3, -inf, nan, 0],
            [-inf, -inf, 5, -inf, -inf, -inf, -inf, -inf, -inf],
            [nan] * 9,
            [-inf] * 9,
            [3e38, -3e38, 3e38, 1e-45, -1e-45, 1e38, 0, -1, 1],
        ]
    )
    expected = torch.tensor(
        [
            [0, 1, 2, 3],
            [6, 7, 0, 1],
            [1, 3, 7, 4],
            [2, 0, 1, 3],
            [0, 1, 2, 3],
            [0, 1, 2, 3],
            [0, 2, 5, 8],
        ],
        dtype=torch.int32,
    )
    for order in ScoreOrder:
        scores, ids = topk_module.topk_scores(logits, 4, order)
        torch.testing.assert_close(ids, expected)
        assert scores[[2, 4, 5]].isnan().all()
        assert scores[3].tolist() == [1, 0, 0, 0]
        assert scores[6].tolist() == [0.5, 0.5, 0, 0]
        dlogits = topk_module.topk_scores_grad(torch.ones_like(scores), logits, scores, ids, order)
        assert dlogits[[0, 1, 3, 6]].isfinite().all()


def _special_rows(experts):
    """Rows whose winners only ties, signs, NaN or the row's end decide."""
    logits = torch.randn(8, experts)
    logits[1] = logits[1].round()
    logits[2] = 0.0
    logits[3] = -logits[3].abs() - 1
    logits[4, 5], logits[4, experts - 2], logits[4, ::9] = torch.nan, -torch.nan, torch.inf
    logits[5, :-1] = -torch.inf
    logits[6] = -torch.inf
    logits[7, ::2], logits[7, 1::2] = -0.0, torch.where(torch.arange(experts // 2) > 9, 0.0, -1.0)
    return logits.bfloat16()


@pytest.mark.parametrize(
    ("experts", "top_k", "width"), [(130, 3, 8), (64, 2, 8), (300, 11, 8), (128, 8, 4), (96, 5, 4)]
)
def test_topk_in_groups_of_columns(experts, top_k, width):
    assert topk_module.group_width(topk_module.power_of_2(experts), top_k) == width
    logits = _special_rows(experts)
    _, ids = topk_module.topk_scores(logits, top_k, ScoreOrder.SOFTMAX_OVER_TOPK)
    ranked = torch.where(logits.isnan(), torch.inf, logits.clamp(max=3e38)).float()
    wanted = torch.sort(ranked, dim=1, descending=True, stable=True).indices[:, :top_k]
    assert torch.equal(ids.long(), wanted)


@triton.jit
def _lesser(value, other):
    return tl.minimum(value, other)


@triton.jit
def _greater_number(value, other):
    return tl.maximum(value, other)


@triton.jit
def _packed_from_above(key, index, BITS: tl.constexpr):
    return (key & ~((1 << BITS) - 1)) + index


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("_greater", _lesser), ("_greater", _greater_number), ("_packed", _packed_from_above)],
)
def test_wrong_groups_are_noticed(name, wrong, monkeypatch):
    monkeypatch.setattr(topk_module, name, wrong)
    with pytest.raises(AssertionError):
        test_topk_in_groups_of_columns(130, 3, 8)


@pytest.mark.parametrize("with_scores", [True, False], ids=["scores", "plain"])
@every_dtype
@pytest.mark.parametrize("case", [(9, 2, 5, 40), (4, 8, 3, 300), (3, 21, 30, 8), (5, 1, 2, 1)])
def test_combine(case, dtype, with_scores, guarded):
    tokens, top_k, experts, hidden = case
    plan = checks.topk_plan(tokens, top_k, experts, CPU)
    checks.check_combine(plan, hidden, dtype, with_scores)


@pytest.mark.parametrize("with_scores", [True, False], ids=["scores", "plain"])
@every_dtype
@pytest.mark.parametrize("case", [(9, 20, 5, 40), (3, 30, 4, 264), (12, 10, 2, 3)])
def test_combine_of_general_routing(case, dtype, with_scores, guarded):
    tokens, slots, experts, hidden = case
    plan = checks.flat_plan(tokens, slots, experts, CPU)
    checks.check_combine(plan, hidden, dtype, with_scores)


def test_combine_in_blocks_without_empty_columns(guarded):
    """520 columns of float32: three blocks of 256 hold fewer empty ones than two of 512."""
    from sonic.triton.combine import _block_size

    checks.check_combine(checks.topk_plan(4, 3, 5, CPU), 520, torch.float32, True)
    checks.check_combine(checks.flat_plan(5, 12, 5, CPU), 520, torch.float32, True)
    assert _block_size(520, 4) == 256
    assert [_block_size(hidden, 8) for hidden in (8, 1536, 2880, 4096)] == [8, 512, 1024, 1024]


@pytest.mark.parametrize("with_scores", [True, False], ids=["scores", "plain"])
def test_combine_of_several_blocks_a_program(with_scores, guarded):
    from sonic.triton.combine import _chunks

    checks.check_combine(checks.topk_plan(4, 2, 5, CPU), 1536, torch.float16, with_scores)
    checks.check_combine(checks.flat_plan(6, 14, 5, CPU), 1536, torch.float16, with_scores)
    # Ten blocks of 512 by four programs of three: the last one has two empty ones.
    checks.check_combine(checks.flat_plan(4, 8, 5, CPU), 5000, torch.float32, with_scores)
    assert [_chunks(blocks, 2) for blocks in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 3, 2, 3, 3, 3]
    assert [_chunks(10, unroll) for unroll in (1, 2, 3, 4, 5, 8, 16)] == [3, 3, 2, 2, 1, 1, 1]


def test_combine_of_one_token_with_nearly_all_slots(guarded):
    """Many rounds of it, while the others, with two slots on average, have one or none."""
    tokens = torch.where(torch.rand(90) < 0.8, 7, torch.randint(0, 40, (90,)))
    plan = build_plan_flat(tokens, torch.randint(0, 5, (90,)), 40, 5, impl="torch")
    checks.check_combine(plan, 24, torch.float32, True)
    checks.check_combine(plan, 24, torch.float32, False)


def test_combine_without_slots(poisoned):
    rows = torch.empty(0, 16)
    plan = build_plan_flat(
        torch.empty(0, dtype=torch.int32), torch.empty(0, dtype=torch.int32), 3, 2, impl="triton"
    )
    from sonic.triton.combine import combine

    out = combine(rows, plan.row_by_slot, None, plan.offset_by_token, plan.slot_by_position, 3, 0)
    assert out.shape == (3, 16) and not out.any()
    assert combine(rows, plan.row_by_slot, None, None, None, 0, 4).shape == (0, 16)


def test_gather_scores(guarded):
    checks.check_gather_scores(checks.flat_plan(9, 700, 5, CPU))


@pytest.mark.parametrize("hidden", [0, 8, 600], ids="H{}".format)
@pytest.mark.parametrize("experts", [1, 2, 7, 40])
def test_score_grad(experts, hidden, guarded):
    plan = checks.topk_plan(30, 2, experts, CPU)
    checks.check_score_grad(plan, 3, hidden, torch.bfloat16)
    checks.check_score_grad(checks.flat_plan(9, 50, experts, CPU), 1, hidden, torch.float32)


@pytest.mark.parametrize("counts", [[0, 90, 3, 200, 0, 41], [7], [0, 0], [1, 300]], ids=str)
@pytest.mark.parametrize("num_parts", [1, 5])
def test_add_parts(num_parts, counts, guarded):
    # Not bfloat16: the interpreter cuts it off.
    checks.check_add_parts(counts, num_parts, (24, 104), torch.float16, CPU)


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["same", "float32"])
@every_dtype
def test_bias_grads(dtype, out_dtype, shares, guarded, monkeypatch):
    monkeypatch.setattr(bias_grad_module, "_shares_for", lambda *sizes: shares)
    for experts, width in ((4, 24), (30, 5), (1, 300)):
        plan = checks.topk_plan(40, 2, experts, CPU)
        checks.check_bias_grads(plan, width, dtype, out_dtype)
