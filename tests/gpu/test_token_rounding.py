"""Token rounding's kernels on a GPU: against oracle and twin, in graphs, without a host wait."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
pytest.importorskip("triton")

import sonic
from sonic.enums import ScoreOrder
from sonic.plan import build_plan_flat
from sonic.routing import rounded_routing, rounding_scores, token_rounding, token_rounding_plan
from sonic.routing.rounded_routing import rounded_choices
from sonic.routing.switch_loss import switch_loss
from sonic.routing.token_rounding import RULES, winners_of
from sonic.triton import rounding_summaries
from sonic.triton import token_rounding as token_rounding_kernels
from sonic.triton.token_rounding import round_logits
from tests import rounding_checks as checks
from tests.graphs import capture, kernels_of, no_synchronization
from tests.rounding_checks import Case
from tests.routing_checks import PLAN_TENSORS, assert_same_plan

CUDA = torch.device("cuda")
every_rule = pytest.mark.parametrize("rule", RULES)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str
)
low_precision = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def run(case, scores, uniform):
    return torch.ops.sonic.token_rounding(scores, uniform, case.top_k, case.tile, case.rule)


def test_random_cases_equal_the_oracle(poisoned):
    for seed in range(300):
        case = checks.random_case(seed, tokens=90, experts=20)
        scores = checks.scores_of(case, seed, CUDA)
        uniform = checks.uniform_of(case, seed, CUDA)
        with no_synchronization():
            outputs = run(case, scores, uniform)
        on_cpu = tuple(output.cpu() for output in outputs)
        checks.assert_equals_oracle(on_cpu, case, scores.cpu(), uniform.cpu())


SIZES = [
    # tokens, experts, top_k, tile
    (1, 1, 1, 1),
    (31, 7, 2, 128),
    (1000, 60, 4, 128),
    (4097, 128, 8, 128),
    (16384, 16, 2, 128),
    (16384, 128, 2, 128),
    (16384, 256, 4, 128),
    (16384, 512, 8, 128),
    (24576, 64, 8, 256),
    (40000, 33, 3, 192),
    (3000, 5000, 6, 16),
]


@every_rule
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_size_equals_the_twin(sizes, rule, guarded):
    for kind in ("softmax", "ties", "hot"):
        case = Case(*sizes, rule, kind)
        scores, uniform = checks.scores_of(case, 1, CUDA), checks.uniform_of(case, 1, CUDA)
        given = guarded.copy_of(scores), guarded.copy_of(uniform)
        with no_synchronization():
            outputs = run(case, *given)
        checks.assert_equals_twin(outputs, case, scores, uniform)
        counts = outputs[3].diff()
        assert ((counts % case.tile == 0) | (counts == case.tokens)).all()


@every_rule
@every_dtype
def test_scores_that_are_no_numbers(dtype, rule, poisoned):
    case = Case(3000, 64, 4, 128, rule)
    scores, uniform = checks.scores_of(case, 0, CUDA).to(dtype), checks.uniform_of(case, 0, CUDA)
    scores[torch.rand(scores.shape, device=CUDA) < 0.1] = torch.nan
    scores[torch.rand(scores.shape, device=CUDA) < 0.1] = torch.inf
    outputs, expected = (
        run(case, scores, uniform),
        checks._forward_torch(scores, uniform, 4, 128, rule),
    )
    assert torch.equal(outputs[0].nan_to_num(7.0), expected[0].nan_to_num(7.0))
    for actual, wanted in zip(outputs[1:], expected[1:], strict=True):
        assert torch.equal(actual, wanted)


@every_dtype
def test_gradient(dtype, guarded):
    case = Case(5000, 70, 4, 128, "nr")
    scores = checks.scores_of(case, 0, CUDA)
    _, token_ids, expert_ids, *_ = run(case, scores, None)
    dweights = guarded.copy_of(torch.randn(case.num_pairs, device=CUDA))
    checks.check_gradient(dweights, token_ids, expert_ids, case, dtype)


@pytest.mark.parametrize("full", [False, True], ids=["winners", "full"])
@every_dtype
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1000, 60, 4), (4097, 512, 10), (300, 4096, 33)])
def test_winner_softmax(sizes, dtype, full, guarded):
    tokens, experts, top_k = sizes
    logits = (2 * torch.randn(tokens, experts, device=CUDA)).to(dtype)
    checks.check_winner_softmax(guarded.copy_of(logits), top_k, full)


@pytest.mark.parametrize("full", [False, True], ids=["winners", "full"])
@every_dtype
@pytest.mark.parametrize("sizes", [size for size in SIZES if size[1] <= 4096], ids=str)
def test_logits_to_plan(sizes, dtype, full, guarded):
    """The fused kernels, for one rule each."""
    tokens, experts, top_k, _ = sizes
    rule = RULES[(tokens + experts) % len(RULES)]
    case = Case(*sizes, rule)
    logits = (2 * torch.randn(tokens, experts, device=CUDA)).to(dtype)
    checks.check_logits(guarded.copy_of(logits), checks.uniform_of(case, 0, CUDA), case, full)


@every_rule
@low_precision
@pytest.mark.parametrize(("experts", "full"), [(5, False), (64, True), (300, True), (500, False)])
def test_long_columns_equal_the_twin(experts, full, dtype, rule, guarded):
    """Every rule where a table has summaries, and where there are only these: the two tests below
    compare such kernels with each other, which share what they are made of. ``balance-f`` has a
    table at any rate."""
    case = Case(9001, experts, 4, 128, rule)
    logits = guarded.copy_of((2 * torch.randn(9001, experts, device=CUDA)).to(dtype))
    assert rounding_summaries.are_summarized(logits) == (experts > 256)
    assert rounding_summaries.are_summarized_with_table(*logits.shape) == (experts <= 64)
    checks.check_logits(logits, checks.uniform_of(case, 0, CUDA), case, full)


@low_precision
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "balance-f"])
def test_keys_without_a_table_are_the_same_bits(rule, dtype, monkeypatch):
    """As with one, of logits that are columns of a wider tensor, with ties, NaN and infinities;
    ``balance-f`` always has a table, and would be compared with itself."""
    tokens, experts, top_k = 9000, 500, 4
    logits = torch.randn(tokens, 2 * experts, device=CUDA).to(dtype)[:, 8 : experts + 8]
    logits[:, 3] = logits[:, 5] = -0.0
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0):
        logits[torch.rand(logits.shape, device=CUDA) < 2e-4] = value
    logits[7], logits[8], logits[9, 2:] = torch.nan, -1, -torch.nan
    case = Case(tokens, experts, top_k, 128, rule)
    arguments = checks.uniform_of(case, 0, CUDA), top_k, 128, rule, case.num_pairs, False
    without = round_logits(logits, *arguments)
    assert rounding_summaries.are_summarized(logits)
    monkeypatch.setattr(rounding_summaries, "_LEAST_SUMMARIZED", experts + 1)
    assert not rounding_summaries.are_summarized(logits)
    expected = round_logits(logits, *arguments)
    for actual, wanted in zip(
        (*without[0], *without[1:]), (*expected[0], *expected[1:]), strict=True
    ):
        assert actual is wanted or torch.equal(actual.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("full", [False, True], ids=["winners", "full"])
@pytest.mark.parametrize("experts", [5, 16, 32, 64])
@every_rule
def test_what_few_experts_have_of_their_own_are_the_same_bits(
    rule, experts, full, dtype, monkeypatch
):
    """Summaries of the table, and pairs that are emitted at once, beside neither of the two, which
    every rule has; with NaN and infinities."""
    tokens, top_k = 9001, 2
    logits = torch.randn(tokens, experts, device=CUDA).to(dtype)
    for value in (torch.nan, torch.inf, -torch.inf, 0.0):
        logits[torch.rand(logits.shape, device=CUDA) < 1e-3] = value
    case = Case(tokens, experts, top_k, 128, rule)
    arguments = checks.uniform_of(case, 0, CUDA), top_k, 128, rule, case.num_pairs, full
    results = []
    for most in (64, 0):
        monkeypatch.setattr(rounding_summaries, "_MOST_WITH_TABLE", most)
        monkeypatch.setattr(token_rounding_kernels, "_MOST_AT_ONCE", most)
        token_rounding_kernels._emit_launch.cache_clear()
        assert rounding_summaries.are_summarized_with_table(tokens, experts) == (most == 64)
        rounded, *rest = round_logits(logits, *arguments)
        results.append([t for t in (*rounded, *rest) if t is not None])
    token_rounding_kernels._emit_launch.cache_clear()
    for actual, wanted in zip(*results, strict=True):
        assert torch.equal(actual.view(torch.int32), wanted.view(torch.int32))


@pytest.mark.parametrize("order", ScoreOrder, ids=str)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [
        *((5000, experts, 4) for experts in (16, 128, 512)),
        *((9000, experts, 4) for experts in (4, 16, 30, 64)),
        *((9000, 512, k) for k in (8, 16, 64)),
    ],
)
def test_fused_and_separate_scores_are_the_same_bits(tokens, experts, top_k, order):
    """So that the layer and its parts choose the same pairs: whether one kernel makes both, with a
    table of keys, or there is none, and other threads have a token's winners."""
    logits = _logits(tokens, experts)
    expected = token_rounding_plan(rounding_scores(logits, top_k, order=order), top_k, 128)
    weights, plan = rounded_routing(logits, top_k, 128, order=order)
    assert torch.equal(weights, expected[0])
    assert_same_plan(plan, expected[1])


def _everything(logits, rule):
    """Weights, plan and the logits' gradient, by the fused operator and by its parts."""
    results = []
    for order in (ScoreOrder.SOFTMAX_OVER_TOPK, ScoreOrder.TOPK_OVER_SOFTMAX):
        leaf = logits.detach().requires_grad_()
        scores = rounding_scores(leaf, 4, order=order)
        results.append(scores.detach())
        for weights, plan in (
            token_rounding_plan(scores, 4, 128, rule),
            rounded_routing(leaf, 4, 128, rule, order=order),
        ):
            (gradient,) = torch.autograd.grad(weights, leaf, 1 + weights.detach())
            plan_tensors = [getattr(plan, name) for name in PLAN_TENSORS]
            results += [weights.detach(), gradient]
            results += [t for t in plan_tensors if t is not None]  # slots lie by token
    return results


def _assert_equal(actual, expected):
    assert len(actual) == len(expected)
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(ours, theirs), f"result {index}"
        assert theirs.any(), f"result {index} is zero everywhere"


def _logits(tokens=5000, experts=64):
    return torch.randn(tokens, experts, device=CUDA).bfloat16()


@every_rule
def test_ten_repeats_agree_bit_for_bit(rule, poisoned):
    logits = _logits()
    torch.manual_seed(1)
    first = _everything(logits, rule)
    for _ in range(9):
        torch.manual_seed(1)
        _assert_equal(_everything(logits, rule), first)


@every_rule
def test_no_host_synchronization(rule, poisoned):
    logits = _logits()
    generator = torch.Generator(CUDA).manual_seed(1)
    _everything(logits, rule)
    with no_synchronization():
        _everything(logits, rule)
        token_rounding(logits.softmax(1), 4, 128, rule, generator)


@pytest.mark.parametrize(
    "sizes", [(5000, 64), (9000, 64), (9000, 300)], ids=["table", "both", "summaries"]
)
@every_rule
def test_cuda_graph(rule, sizes):
    """Captured once, replayed on other logits, beside the same operators without a graph: what they
    compute is for the tests above. Random rules draw anew at every replay. Keys without a table
    come of ``sizes`` with 300 experts, but for ``balance-f``."""
    logits = _logits(*sizes)
    assert rounding_summaries.are_summarized(logits) == (sizes[1] == 300)
    graph, captured = capture(lambda: _everything(logits, rule))
    for skew in (0.0, 4.0):
        logits.copy_(torch.randn_like(logits))
        logits[:, 3] += skew
        torch.manual_seed(5)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        torch.manual_seed(5)
        _assert_equal(replayed, _everything(logits.clone(), rule))
    if rule in ("sr", "nr-s"):
        graph.replay()
        first = [tensor.clone() for tensor in captured]
        graph.replay()
        assert not torch.equal(first[3], captured[3])  # offset_by_expert


@pytest.mark.parametrize("rule", ["sr", "nr-s"])
def test_a_generator_decides(rule):
    scores = _logits().float().softmax(1)

    def seeded(seed):
        return token_rounding(scores, 4, 128, rule, torch.Generator(CUDA).manual_seed(seed))

    assert all(torch.equal(a, b) for a, b in zip(seeded(1), seeded(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seeded(1), seeded(2), strict=True))


def test_under_compile():
    """The operator behind torch.compile is the one of an eager call, which is what it returns."""
    compiled = torch.compile(token_rounding, fullgraph=True)
    scores = _logits().float().softmax(1)
    for actual, expected in zip(
        compiled(scores, 4, 128, "nr"), token_rounding(scores, 4, 128, "nr"), strict=True
    ):
        assert torch.equal(actual, expected)


@every_rule
def test_the_layer_equals_its_flat_form(rule):
    """One call, and the same pairs through general routing: same plan, so the same bits. Both round
    by the same operator, which is compared elsewhere; here it is plan and experts."""
    tokens, hidden, inner, experts = 2000, 256, 128, 16
    x = torch.randn(tokens, hidden, device=CUDA).bfloat16().requires_grad_()
    router = (torch.randn(experts, hidden, device=CUDA) / 16).bfloat16().requires_grad_()
    w1 = (torch.randn(experts, 2 * inner, hidden, device=CUDA) / 16).bfloat16().requires_grad_()
    w2 = (torch.randn(experts, hidden, inner, device=CUDA) / 11).bfloat16().requires_grad_()
    leaves = (x, router, w1, w2)
    torch.manual_seed(2)
    out, _, frequency = sonic.moe(x, router, w1, w2, top_k=2, rounding=rule)
    assert (frequency % 128 == 0).all() and frequency.any()
    logits = torch.nn.functional.linear(x, router)
    torch.manual_seed(2)
    weights, plan = rounded_routing(logits, 2, "auto", rule)
    token_ids, expert_ids = checks.pairs_of(plan)
    assert_same_plan(plan, build_plan_flat(token_ids, expert_ids, tokens, experts))
    flat = sonic.experts_flat(x, token_ids, expert_ids, weights, w1, w2)
    dout = torch.randn_like(out)
    assert torch.equal(out, flat) and out.any()
    actual = torch.autograd.grad(out, leaves, dout)
    expected = torch.autograd.grad(flat, leaves, dout)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours, theirs) and theirs.any()


@every_dtype
@pytest.mark.parametrize("sizes", [*(size[:3] for size in SIZES), (300, 65536, 8)], ids=str)
def test_switch_loss(sizes, dtype, guarded):
    tokens, experts, top_k = sizes
    logits = (2 * torch.randn(tokens, experts, device=CUDA)).to(dtype)
    checks.check_switch_loss(guarded.copy_of(logits), top_k)


def test_launches_of_the_switch_loss():
    """Two that read the logits and sum, and one for their gradient; the choices are counted by
    what rounds."""
    logits = _logits(32768, 128).requires_grad_()
    _, _, load = rounded_choices(logits, 8, 128)
    chosen = winners_of(logits.float(), 8).flatten().bincount(minlength=128)
    assert torch.equal(load.long(), chosen)
    loss = switch_loss(logits, load, 8)
    dloss = torch.ones_like(loss)

    def backward():
        torch.autograd.grad(loss, logits, dloss, retain_graph=True)

    assert len(kernels_of(lambda: switch_loss(logits, load, 8))) == 2
    assert len(kernels_of(backward)) == 1


def _module_and_input(rule, tokens=1000, tile="auto", dtype=torch.bfloat16, **options):
    layer = checks.make_module(CUDA, dtype, tile, rule, **options)
    return layer, torch.randn(tokens, layer.hidden_size, device=CUDA).to(dtype)


@every_rule
@low_precision
@pytest.mark.parametrize("sizes", checks.MODULE_SIZES, ids=str)
def test_module_against_the_reference(sizes, dtype, rule, poisoned):
    """Output, balancing loss and all gradients, for the pairs of the oracle."""
    checks.check_module(*_module_and_input(rule, *sizes, dtype))


@pytest.mark.parametrize("order", ScoreOrder, ids=str)
def test_module_of_every_score_order(order, poisoned):
    checks.check_module(*_module_and_input("nr", score_order=order))


@every_rule
def test_module_does_not_synchronize_and_repeats_bitwise(rule, poisoned):
    layer, x = _module_and_input(rule)
    dout = torch.randn_like(x)
    torch.manual_seed(1)
    first = list(checks.module_step(layer, x, dout).values())
    for _ in range(9):
        torch.manual_seed(1)
        with no_synchronization():
            again = checks.module_step(layer, x, dout)
        _assert_equal(list(again.values()), first)


@every_rule
def test_module_in_a_cuda_graph(rule):
    """Captured once with its loss and backward pass, replayed on other tokens and weights."""
    layer, x = _module_and_input(rule)
    dout = torch.randn_like(x)
    graph, captured = capture(lambda: list(checks.module_step(layer, x, dout).values()))
    seen = []
    for scale in (1.0, 0.5):
        with torch.no_grad():
            x.normal_()
            dout.normal_()
            layer.router.weight.mul_(scale)
        torch.manual_seed(5)
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        torch.manual_seed(5)
        _assert_equal(replayed, list(checks.module_step(layer, x, dout).values()))
        seen.append(replayed[1].item())
    assert seen[0] != seen[1]


def test_scores_beyond_2_31_elements():
    """The last tokens of a table that 32-bit addresses do not reach."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free GPU memory")
    tokens, experts = 33000, 65536
    scores = torch.empty(tokens, experts, device=CUDA, dtype=torch.bfloat16).uniform_()
    weights, token_ids, expert_ids, *plan = run(Case(tokens, experts, 2, 4, "down"), scores, None)
    live = token_ids < tokens
    tokens_kept, experts_kept = token_ids[live].long(), expert_ids[live].long()
    assert (tokens_kept.diff() >= 0).all() and int(tokens_kept[-1]) > 32900
    assert torch.equal(weights[live], scores[tokens_kept, experts_kept].float())
    counts = plan[0].diff()
    assert (counts % 4 == 0).all() and int(counts.sum()) == int(live.sum()) > 0
    assert torch.equal(torch.bincount(experts_kept, minlength=experts).int(), counts)
