"""The Triton routing kernels on a GPU against their torch twins."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
pytest.importorskip("triton")

from sonic.enums import ScoreOrder
from sonic.plan import build_plan, build_plan_flat
from sonic.routing.topk import topk_routing
from sonic.triton import plan as plan_module
from sonic.triton.bias_grad import bias_grad_gathered, bias_grad_rows
from sonic.triton.combine import combine
from sonic.triton.score_grad import gather_scores, score_grad
from sonic.triton.topk import topk_scores
from tests import routing_checks as checks
from tests.graphs import capture, no_synchronization

CUDA = torch.device("cuda")
every_order = pytest.mark.parametrize("order", ScoreOrder, ids=lambda o: o.value)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:]
)
every_id_dtype = pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)


PLANS = [
    # tokens, top_k, experts, kind, method
    (0, 8, 128, "uniform", "empty"),
    (1, 1, 1, "uniform", "direct"),
    (1, 8, 65536, "uniform", "direct"),
    (63, 6, 64, "uniform", "direct"),
    (512, 8, 128, "hot", "direct"),
    (513, 8, 1, "uniform", "tiled"),
    (1000, 8, 128, "dropped", "tiled"),
    (4097, 4, 60, "uniform", "tiled"),
    (32768, 8, 128, "uniform", "tiled"),
    (32768, 8, 128, "hot", "tiled"),
    (16384, 10, 512, "uniform", "tiled"),
    (1000, 7, 65536, "uniform", "tiled"),
    (131072, 8, 2048, "uniform", "tiled"),
    (65536, 8, 65536, "uniform", "sorted"),
]


@every_id_dtype
@pytest.mark.parametrize("case", PLANS, ids=lambda c: "-".join(map(str, c)))
def test_plan(case, id_dtype, guarded):
    tokens, top_k, experts, kind, method = case
    ids = checks.expert_ids((tokens, top_k), experts, kind, CUDA, id_dtype)
    assert plan_module.method_for(ids.numel(), experts) == method
    given = guarded.copy_of(ids)
    with no_synchronization():
        actual = build_plan(given, experts, impl="triton")
    checks.assert_same_plan(actual, build_plan(ids, experts, impl="torch"))


@every_id_dtype
@pytest.mark.parametrize("case", PLANS, ids=lambda c: "-".join(map(str, c)))
def test_flat_plan(case, id_dtype, guarded):
    tokens, top_k, experts, kind, _ = case
    ids = checks.expert_ids((tokens * top_k,), experts, kind, CUDA, id_dtype)
    owners = torch.randint(-1, tokens + 1, ids.shape, device=CUDA, dtype=id_dtype)
    given = guarded.copy_of(owners), guarded.copy_of(ids)
    with no_synchronization():
        actual = build_plan_flat(*given, tokens, experts, impl="triton")
    checks.assert_same_plan(actual, build_plan_flat(owners, ids, tokens, experts, impl="torch"))


def test_random_plans(poisoned):
    generator = torch.Generator().manual_seed(0)

    def draw(limit):
        return int(torch.randint(1, limit, (1,), generator=generator))

    for _ in range(60):
        tokens, top_k, experts = draw(3000), draw(12), draw(700)
        ids = checks.expert_ids((tokens, top_k), experts, "uniform", CUDA)
        expected = build_plan(ids, experts, impl="torch")
        checks.assert_same_plan(build_plan(ids, experts), expected)


TOPK = [
    # tokens, experts, top_k
    (1, 8, 2),
    (1000, 60, 4),
    (257, 64, 64),
    (4096, 128, 8),
    (300, 257, 9),
    (1000, 512, 10),
    (65, 4096, 33),
    (33, 5000, 8),
    (20, 65536, 64),
    (7, 1, 1),
]


@every_order
@every_dtype
@pytest.mark.parametrize("case", TOPK, ids=str)
def test_topk(case, dtype, order, guarded):
    tokens, experts, top_k = case
    logits = guarded.copy_of((3 * torch.randn(tokens, experts, device=CUDA)).to(dtype))
    checks.check_topk(logits, top_k, order)


@every_order
@pytest.mark.parametrize("experts", [16, 1000, 9000])
def test_topk_ties_and_specials(experts, order, poisoned):
    """Few distinct values, so that most winners are ties, NaN and infinities among them."""
    values = torch.tensor([0.0, -0.0, 1.0, 1.0, -torch.inf, torch.inf, torch.nan], device=CUDA)
    for chosen in (values[:4], values[:5], values):
        logits = chosen[torch.randint(len(chosen), (200, experts), device=CUDA)]
        scores, ids = topk_scores(logits, 8, order)
        ranking = torch.sort(logits.cpu(), dim=1, descending=True, stable=True).indices
        torch.testing.assert_close(ids.cpu(), ranking[:, :8].to(torch.int32), rtol=0, atol=0)
        if len(chosen) == 4:
            assert scores.isfinite().all() and (scores > 0).all()


@every_order
def test_topk_routing_runs_the_kernels(order):
    logits = torch.randn(300, 128, device=CUDA).bfloat16().requires_grad_()
    with no_synchronization():
        scores, ids = topk_routing(logits, 8, order=order)
        scores.backward(torch.ones_like(scores) * torch.arange(8, device=CUDA))
    on_cpu = logits.detach().cpu().requires_grad_()
    expected, expected_ids = topk_routing(on_cpu, 8, order=order)
    expected.backward(torch.arange(8.0).expand(300, 8))
    assert torch.equal(ids.cpu(), expected_ids)
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(logits.grad.cpu(), on_cpu.grad, rtol=1e-2, atol=1e-5)


@every_order
def test_topk_routing_under_compile(order):
    compiled = torch.compile(topk_routing, fullgraph=True)
    logits = torch.randn(64, 32, device=CUDA)
    actual = compiled(logits, 4, order=order.value)
    expected = topk_routing(logits, 4, order=order)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("with_scores", [True, False], ids=["scores", "plain"])
@every_dtype
@pytest.mark.parametrize(
    "case",
    [
        (1, 1, 1, 8),
        (1000, 8, 64, 2880),
        (4097, 2, 7, 1024),
        (900, 2, 9, 1536),
        (700, 1, 9, 10_000),
        (63, 33, 40, 100),
        (5, 64, 64, 4099),
    ],
    ids=str,
)
def test_combine(case, dtype, with_scores, guarded):
    tokens, top_k, experts, hidden = case
    plan = checks.topk_plan(tokens, top_k, experts, CUDA)
    if case[0] == 1:
        plan = build_plan(torch.zeros(1, 1, dtype=torch.int32, device=CUDA), 1)
    checks.check_combine(plan, hidden, dtype, with_scores)


@pytest.mark.parametrize("with_scores", [True, False], ids=["scores", "plain"])
@every_dtype
@pytest.mark.parametrize(
    "case",
    [(1000, 5000, 64, 2048), (300, 200, 5, 77), (2000, 4000, 9, 1536), (400, 4000, 9, 2880)],
    ids=str,
)
def test_combine_of_general_routing(case, dtype, with_scores, guarded):
    tokens, slots, experts, hidden = case
    plan = checks.flat_plan(tokens, slots, experts, CUDA)
    checks.check_combine(plan, hidden, dtype, with_scores)


@pytest.mark.parametrize("hidden", [0, 2048, 100], ids="H{}".format)
@pytest.mark.parametrize("experts", [1, 60, 3000])
def test_score_grad(experts, hidden, guarded):
    plan = checks.topk_plan(1000, 8, experts, CUDA)
    for dtype in (torch.bfloat16, torch.float32):
        checks.check_score_grad(plan, 4, hidden, dtype)
    flat = checks.flat_plan(700, 5000, experts, CUDA)
    checks.check_score_grad(flat, 1, hidden, torch.bfloat16)
    checks.check_gather_scores(flat)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_parts", [1, 5, 23])
@pytest.mark.parametrize("counts", [[0, 90, 3, 2000, 0, 41], [7], [9] * 500 + [4000]], ids=len)
def test_add_parts(counts, num_parts, dtype, guarded):
    checks.check_add_parts(counts, num_parts, (72, 136), dtype, CUDA)


@every_dtype
@pytest.mark.parametrize("out_dtype", [None, torch.float32], ids=["same", "float32"])
@pytest.mark.parametrize("case", [(60, 1536), (1, 768), (3000, 100)], ids=str)
def test_bias_grads(case, out_dtype, dtype, guarded):
    experts, width = case
    plan = checks.topk_plan(2000, 8, experts, CUDA)
    checks.check_bias_grads(plan, width, dtype, out_dtype)


def _everything(logits, hidden, top_k=4):
    """All kernels in a row, from logits; a list of their results."""
    experts = logits.shape[1]
    tokens = logits.shape[0]
    scores, ids = topk_routing(logits, top_k, order="topk_over_softmax")
    dlogits = torch.ops.sonic.topk_routing_backward(
        scores * scores, logits, scores, ids, experts, logits.dtype, "topk_over_softmax"
    )
    plan = build_plan(ids, experts)
    flat_tokens = torch.div(
        torch.arange(ids.numel(), device=CUDA), top_k, rounding_mode="floor"
    ).flip(0)
    flat = build_plan_flat(flat_tokens, ids.view(-1), tokens, experts)
    rows = hidden[plan.token_by_row.clamp(min=0)] * 2
    flat_scores = scores.view(-1)
    out = combine(rows, plan.row_by_slot, flat_scores, None, None, tokens, top_k)
    by_token = flat.offset_by_token, flat.slot_by_position
    ragged = combine(rows, flat.row_by_slot, flat_scores, *by_token, tokens, 0)
    score_by_row = gather_scores(flat_scores, plan.slot_by_row)
    b2 = hidden[:experts]
    ds = score_grad(
        score_by_row[None], plan.row_by_slot, hidden, b2, plan.token_by_row, plan.offset_by_expert
    )
    db1 = bias_grad_rows(rows, plan.offset_by_expert)
    db2 = bias_grad_gathered(hidden, plan.token_by_row, score_by_row, plan.offset_by_expert)
    plans = [getattr(flat, name) for name in checks.PLAN_TENSORS]
    plans += [plan.token_by_row, plan.slot_by_row, plan.row_by_slot]
    return [scores, ids, dlogits, out, ragged, score_by_row, ds, db1, db2, *plans]


def _inputs(tokens=3000, experts=64, hidden=512):
    logits = torch.randn(tokens, experts, device=CUDA).bfloat16()
    return logits, torch.randn(tokens, hidden, device=CUDA).bfloat16()


def _assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(ours, theirs), f"result {index}"
        assert theirs.any(), f"result {index} is zero everywhere"


def test_ten_repeats_agree_bit_for_bit(poisoned):
    inputs = _inputs()
    first = _everything(*inputs)
    for _ in range(9):
        _assert_equal(_everything(*inputs), first)


def test_no_host_synchronization(poisoned):
    inputs = _inputs()
    with no_synchronization():
        _everything(*inputs)


def test_cuda_graph():
    """Captured once, replayed on other logits: nothing about the routing is baked in."""
    logits, hidden = _inputs()
    graph, captured = capture(lambda: _everything(logits, hidden))
    for skew in (0.0, 8.0):
        logits.copy_(torch.randn_like(logits))
        logits[:, 3] += skew
        graph.replay()
        _assert_equal(captured, _everything(logits.clone(), hidden))


def test_kernels_run_on_the_current_stream():
    """The inputs arrive late on a side stream: work launched elsewhere would miss them."""
    logits, hidden = _inputs()
    expected = _everything(logits, hidden)
    late_logits, late_hidden = torch.zeros_like(logits), torch.zeros_like(hidden)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late_logits.copy_(logits)
        late_hidden.copy_(hidden)
        actual = _everything(late_logits, late_hidden)
    side.synchronize()
    _assert_equal(actual, expected)


def _needs_memory(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory, {free / 2**30:.1f} are")


def test_rows_beyond_2_31_elements():
    """Addresses past 32 bits in combine and in the bias gradients."""
    _needs_memory(16)
    tokens, top_k, hidden, experts = 65536, 8, 4352, 4
    ids = torch.randint(0, experts, (tokens, top_k), device=CUDA)
    plan = build_plan(ids, experts)
    rows = torch.empty(tokens * top_k, hidden, dtype=torch.bfloat16, device=CUDA).normal_()
    assert rows.numel() > 2**31
    scores = torch.rand(tokens * top_k, device=CUDA)
    out = combine(rows, plan.row_by_slot, scores, None, None, tokens, top_k)
    chosen = torch.arange(0, tokens, 511, device=CUDA)
    row = plan.row_by_slot.view(tokens, top_k)[chosen].long()
    assert row.max() * hidden > 2**31
    expected = (rows[row].double() * scores.view(tokens, top_k, 1)[chosen]).sum(1)
    torch.testing.assert_close(out[chosen].double(), expected, rtol=1e-2, atol=1e-2)

    actual = bias_grad_rows(rows, plan.offset_by_expert, dtype=torch.float32)
    last = rows[int(plan.offset_by_expert[-2]) :]
    expected = sum(part.double().sum(0) for part in last.split(4096))
    torch.testing.assert_close(actual[-1].double(), expected, rtol=1e-3, atol=0.1)


def test_logits_beyond_2_31_elements():
    _needs_memory(16)
    tokens, experts, top_k = 33000, 65536, 8
    logits = torch.empty(tokens, experts, dtype=torch.bfloat16, device=CUDA).normal_()
    assert logits.numel() > 2**31
    logits.requires_grad_()
    scores, ids = topk_routing(logits, top_k, order="topk_over_softmax")
    weights = torch.rand_like(scores)
    scores.backward(weights)
    tail = logits.detach()[-32:].clone().requires_grad_()
    expected, expected_ids = topk_routing(tail, top_k, order="topk_over_softmax")
    expected.backward(weights[-32:])
    assert torch.equal(ids[-32:], expected_ids) and torch.equal(scores[-32:], expected)
    assert torch.equal(logits.grad[-32:], tail.grad) and tail.grad.any()
