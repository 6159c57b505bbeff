"""Token rounding on the CPU: the torch twin against the oracle, its promises, its gradient."""

import sys

import pytest
import torch

import sonic
from kernels_sm90 import choice
from sonic import KernelBackendMoE, MoE
from sonic.enums import ScoreOrder
from sonic.functional import experts_planned
from sonic.plan import build_plan_flat
from sonic.reference import experts_flat_reference, load_balancing_loss
from sonic.routing import (
    max_pairs,
    rounded_routing,
    rounding_scores,
    token_rounding,
    token_rounding_plan,
)
from sonic.routing.rounded_routing import rounded_choices
from sonic.routing.route import route
from sonic.routing.switch_loss import switch_loss
from sonic.routing.token_rounding import KERNEL_TILE, RULES, _warned, winners_of
from sonic.routing.topk import topk_routing
from sonic.runtime.errors import ArgumentError, DTypeError, ShapeError
from sonic.runtime.problem import EpilogueKind, Problem, Ragged
from tests import rounding_checks as checks
from tests.rounding_checks import Case
from tests.routing_checks import assert_same_plan

every_rule = pytest.mark.parametrize("rule", RULES)
every_order = pytest.mark.parametrize("order", ScoreOrder, ids=lambda order: order.value)


def kept_table(scores, top_k, tile, rule, generator=None):
    """(T, E) bool, and the three lists cut to the kept pairs."""
    token_ids, expert_ids, weights = token_rounding(scores, top_k, tile, rule, generator)
    live = int((token_ids < scores.shape[0]).sum())
    table = torch.zeros(scores.shape, dtype=torch.bool)
    table[token_ids[:live], expert_ids[:live]] = True
    assert int(table.sum()) == live
    return table, (token_ids[:live], expert_ids[:live], weights[:live])


def chosen_table(scores, top_k):
    _, ids = topk_routing(scores.clamp(min=0), top_k)
    return torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, ids.long(), True)


# --- against the oracle ---------------------------------------------------------------------------


@pytest.mark.parametrize("block", range(10))
def test_a_thousand_random_cases_equal_the_oracle(block):
    moved = 0
    for seed in range(100 * block, 100 * (block + 1)):
        case = checks.random_case(seed)
        scores, uniform = checks.scores_of(case, seed), checks.uniform_of(case, seed)
        outputs = torch.ops.sonic.token_rounding(scores, uniform, case.top_k, case.tile, case.rule)
        checks.assert_equals_oracle(outputs, case, scores, uniform)
        moved += int(outputs[3][-1]) != case.tokens * case.top_k
    assert moved > 25  # the cases are not all fixed points of rounding


def test_half_way_goes_to_the_even_multiple():
    """f = 2 and f = 6 with tile 4 both become 0, 4 or 8 by the parity of the lower multiple."""
    for frequency, expected in ((2, 0), (6, 8), (10, 8), (14, 16)):
        scores = torch.zeros(20, 2)
        scores[:frequency, 0] = 1.0
        scores[frequency:, 1] = 1.0
        table, _ = kept_table(scores, 1, 4, "nr")
        assert int(table[:, 0].sum()) == expected == 4 * round(frequency / 4)


def test_ties_go_to_the_lower_token():
    scores = torch.full((7, 3), 0.25)
    table, _ = kept_table(scores, 1, 4, "up")  # all choose expert 0
    assert table[:, 0].all() and not table[:, 1:].any()  # 7 of 7 tokens: T is reachable
    scores[5:, 1] = 0.5
    up, _ = kept_table(scores, 1, 4, "up")
    assert up[:, 0].tolist() == [True] * 7 and up[:, 1].nonzero().flatten().tolist() == [0, 1, 5, 6]
    down, _ = kept_table(scores, 1, 4, "down")
    assert down[:, 0].nonzero().flatten().tolist() == [0, 1, 2, 3] and not down[:, 1].any()


# --- promises -------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize("tokens", [0, 1, 63, 256, 300])
def test_counts_are_multiples_of_the_tile_next_to_the_frequency(rule, tokens):
    tile = 16
    for seed, kind in enumerate(("softmax", "hot", "ties")):
        scores = checks.scores_of(Case(tokens, 24, 3, tile, rule, kind), seed)
        table, lists = kept_table(scores, 3, tile, rule)
        counts, frequency = table.sum(0), chosen_table(scores, 3).sum(0)
        assert ((counts % tile == 0) | (counts == tokens)).all()
        assert ((counts - frequency).abs() < tile).all()
        if rule == "nr":
            assert ((counts - frequency).abs() <= tile // 2).all()
        if rule == "up":
            assert (counts >= frequency).all()
        if rule == "down":
            assert (counts <= frequency).all()
        slots = max_pairs(tokens, 24, 3, tile, rule)
        assert table.sum() <= slots <= tokens * 3 + 24 * tile
        order = lists[0].long() * 24 + lists[1]
        assert (order.diff() > 0).all()
        assert torch.equal(lists[2], scores[lists[0], lists[1]])


@every_rule
def test_tokens_that_chose_outrank_those_that_did_not(rule):
    added = dropped = 0
    for seed in range(12):
        scores = checks.scores_of(Case(200, 10, 2, 32, rule), seed)
        table, _ = kept_table(scores, 2, 32, rule, torch.Generator().manual_seed(seed))
        chosen = chosen_table(scores, 2)
        for expert in range(10):
            kept, wanted, score = table[:, expert], chosen[:, expert], scores[:, expert]
            extra, lost = kept & ~wanted, wanted & ~kept
            added, dropped = added + int(extra.sum()), dropped + int(lost.sum())
            assert not (extra.any() and lost.any())
            if extra.any() and not (kept | wanted).all():
                assert score[extra].min() >= score[~kept & ~wanted].max()
            if lost.any() and (kept & wanted).any():
                assert score[lost].max() <= score[kept].min()
    assert (added > 0) == (rule != "down") and (dropped > 0) == (rule != "up")


@every_rule
def test_a_tile_of_one_is_top_k(rule):
    scores = checks.scores_of(Case(50, 9, 3, 1, rule))
    table, (token_ids, expert_ids, weights) = kept_table(scores, 3, 1, rule)
    assert torch.equal(table, chosen_table(scores, 3))
    assert token_ids.tolist() == [t for t in range(50) for _ in range(3)]
    assert len(token_rounding(scores, 3, 1, rule)[0]) == 150
    out, ids = topk_routing(scores.log(), 3, order="topk_over_softmax")
    by_expert = ids.long().argsort(dim=1)
    assert torch.equal(expert_ids.view(50, 3), ids.gather(1, by_expert))
    torch.testing.assert_close(weights.view(50, 3), out.gather(1, by_expert))


@pytest.mark.parametrize("tokens", [512, 500, 90])
@pytest.mark.parametrize("tile", [1, 7, 64, 128])
def test_balance_bounds_the_total_and_each_expert(tokens, tile):
    """Also of every prefix of the experts. By expert the bound is the tile, and half of it, which
    the paper states, does not hold."""
    farthest = 0
    for seed in range(20):
        case = Case(tokens, 33, 4, tile, "balance-f", "hot" if seed % 2 else "softmax")
        scores = checks.scores_of(case, seed)
        table, _ = kept_table(scores, 4, tile, "balance-f")
        moved = table.sum(0) - chosen_table(scores, 4).sum(0)
        assert (moved.abs() < tile).all()
        assert (2 * moved.cumsum(0).abs() <= tile).all()
        farthest = max(farthest, int(moved.abs().max()))
    if tile in (64, 128) and tokens > tile:
        assert farthest > tile // 2


@pytest.mark.parametrize("tokens", [128, 100])
def test_stochastic_rounding_preserves_the_expected_count(tokens):
    tile, draws = 16, 400
    scores = checks.scores_of(Case(tokens, 12, 2, tile, "sr"))
    frequency = chosen_table(scores, 2).sum(0)
    generator = torch.Generator().manual_seed(3)
    counts = torch.stack(
        [kept_table(scores, 2, tile, "sr", generator)[0].sum(0) for _ in range(draws)]
    ).double()
    assert ((counts == counts[0]).all(0) == (frequency % tile == 0)).all()
    # A count's deviation is at most half a tile.
    error = (counts.mean(0) - frequency).abs() / (tile / 2 / draws**0.5)
    assert error.max() < 4
    # and the total's is that of independent draws
    excess = frequency % tile
    deviation = (excess * (tile - excess)).sum().sqrt() / draws**0.5
    assert (counts.sum(1).mean() - 2 * tokens).abs() < 4 * deviation


def test_rounding_by_mass_goes_up_as_often_as_the_scores_say():
    tile, draws = 8, 2000
    scores = torch.zeros(16, 2)
    scores[:10, 0] = torch.linspace(0.9, 0.45, 10)
    scores[10:, 0] = torch.linspace(0.3, 0.05, 6)
    scores[:, 1] = 1 - scores[:, 0]
    scores[:10, 1] = 0.0
    # Ten tokens choose expert 0: eight stay, two and the six added ones are the undecided tile.
    ranked = scores[:, 0].sort(descending=True).values.double()
    probability = float(ranked[8:10].sum() / ranked[8:16].sum())
    generator = torch.Generator().manual_seed(5)
    ups = sum(
        int(kept_table(scores, 1, tile, "nr-s", generator)[0][:, 0].sum()) == 16
        for _ in range(draws)
    )
    assert 0.3 < probability < 0.6 and probability > 2 / 8 + 0.1  # unlike what the counts say
    assert abs(ups / draws - probability) < 4 * (probability * (1 - probability) / draws) ** 0.5


def test_rounding_by_mass_of_nothing_goes_down():
    scores = torch.zeros(6, 2)
    table, _ = kept_table(scores, 1, 4, "nr-s")
    assert table[:, 0].all() and not table[:, 1].any()
    scores = torch.zeros(9, 3)
    scores[:3, 1] = 0.5
    table, _ = kept_table(scores, 1, 4, "nr-s")  # six choose expert 0 with nothing
    assert table[:, 0].sum() == 4


@every_rule
def test_seeded_and_deterministic(rule):
    scores = checks.scores_of(Case(300, 20, 2, 16, rule))
    first = token_rounding(scores, 2, 16, rule, torch.Generator().manual_seed(1))
    again = token_rounding(scores, 2, 16, rule, torch.Generator().manual_seed(1))
    other = token_rounding(scores, 2, 16, rule, torch.Generator().manual_seed(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    same = all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert same == (rule not in ("sr", "nr-s"))
    state = torch.get_rng_state()
    token_rounding(scores, 2, 16, rule)
    assert torch.equal(state, torch.get_rng_state()) == (rule not in ("sr", "nr-s"))


def test_the_tile_of_the_kernels_is_what_auto_takes():
    """Every kernel that multiplies rows by an expert's weight has tiles of that many rows, but for
    the half tiles of experts with hardly any, and those that fit whatever rows there are."""
    for epilogue in (EpilogueKind.LINEAR, EpilogueKind.ACTIVATION, EpilogueKind.ACTIVATION_GRAD):
        for transposed in (False, True):
            problem = Problem(
                ragged=Ragged.ROWS,
                dtype="bfloat16",
                epilogue=epilogue,
                transposed_weight=transposed,
            )
            for config in choice.candidates(problem):
                assert config.swap_ab or config.tile_m in (KERNEL_TILE, KERNEL_TILE // 2)
            for rows in (64, 512, 4096):
                config = choice.default_config(problem, rows, 1024, 1024, 64)
                assert config.tile_m == KERNEL_TILE
    scores = checks.scores_of(Case(400, 4, 1, KERNEL_TILE, "nr"))
    expected = token_rounding(scores, 1, KERNEL_TILE)
    assert torch.equal(token_rounding(scores, 1, "auto")[0], expected[0])


# --- operator -------------------------------------------------------------------------------------


@every_rule
def test_the_plan_is_that_of_the_lists(rule):
    scores = checks.scores_of(Case(90, 7, 2, 8, rule))
    options = (2, 8, rule)
    token_ids, expert_ids, weights = token_rounding(
        scores, *options, torch.Generator().manual_seed(1)
    )
    own_weights, plan = token_rounding_plan(scores, *options, torch.Generator().manual_seed(1))
    assert torch.equal(weights, own_weights)
    assert_same_plan(plan, build_plan_flat(token_ids, expert_ids, 90, 7))
    assert (plan.expert_frequency() % 8 == 0).all() and plan.top_k == 0


@pytest.mark.parametrize("rule", ["nr", "sr", "up"])
def test_gradcheck(rule):
    scores = checks.scores_of(Case(9, 5, 2, 4, rule)).double().requires_grad_()

    def weights(values):
        return token_rounding(values, 2, 4, rule, torch.Generator().manual_seed(0))[2]

    torch.autograd.gradcheck(weights, scores)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_gradient_lands_on_the_kept_pairs(dtype):
    scores = checks.scores_of(Case(40, 6, 2, 8, "nr")).to(dtype).requires_grad_()
    token_ids, expert_ids, weights = token_rounding(scores, 2, 8)
    live = token_ids < 40
    assert weights.dtype == torch.float32 and not live.all()
    gradient = torch.randn_like(weights)
    weights.backward(gradient)
    expected = torch.zeros(40, 6, dtype=dtype)
    expected[token_ids[live], expert_ids[live]] = gradient[live].to(dtype)
    assert scores.grad.dtype == dtype and torch.equal(scores.grad, expected) and expected.any()


def test_saved_for_backward_is_what_the_docstring_says():
    saved = []
    scores = checks.scores_of(Case(40, 6, 2, 8, "nr")).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        token_ids, _, _ = token_rounding(scores, 2, 8)
    assert sum(tensor.nbytes for tensor in saved) == 8 * token_ids.numel()


@every_rule
def test_opcheck(rule):
    scores, uniform = torch.rand(11, 5).requires_grad_(), torch.rand(5)
    torch.library.opcheck(torch.ops.sonic.token_rounding.default, (scores, uniform, 2, 4, rule))
    token_ids, expert_ids, weights = token_rounding(scores.detach(), 2, 4, rule)
    torch.library.opcheck(
        torch.ops.sonic.token_rounding_backward.default,
        (weights, token_ids, expert_ids, 11, 5, torch.bfloat16),
    )


@every_rule
def test_under_compile(rule):
    torch._dynamo.reset()
    compiled = torch.compile(token_rounding, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (30, 41):
        scores = checks.scores_of(Case(tokens, 6, 2, 8, rule)).requires_grad_()
        torch.manual_seed(1)
        actual = compiled(scores, 2, 8, rule)
        torch.manual_seed(1)
        expected = token_rounding(scores, 2, 8, rule)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
        (gradient,) = torch.autograd.grad(actual[2].square().sum(), scores)
        assert torch.equal(gradient, torch.autograd.grad(expected[2].square().sum(), scores)[0])


def test_any_strides():
    base = checks.scores_of(Case(30, 24, 2, 8, "nr"))
    for view in (base.t()[:20, ::2], base[::2, 3:20], base[:1].expand(5, 24)):
        dense = view.contiguous()
        actual, expected = token_rounding(view, 2, 8), token_rounding(dense, 2, 8)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


SCORES = torch.zeros(4, 6)
HUGE = torch.empty(2**26, 64, device="meta")


@pytest.mark.parametrize(
    ("error", "text", "call"),
    [
        (ShapeError, r"\(6,\). Allowed: 2 axes, \(T, E\)", lambda: token_rounding(SCORES[0], 1, 8)),
        (ShapeError, "0 experts", lambda: token_rounding(SCORES[:, :0], 1, 8)),
        (ShapeError, "may keep more than .* Split", lambda: token_rounding(HUGE, 32, 8)),
        (DTypeError, "int64", lambda: token_rounding(SCORES.long(), 1, 8)),
        (ArgumentError, "top_k=7 came with 6 exp.*d: 1 to 6", lambda: token_rounding(SCORES, 7, 8)),
        (ArgumentError, "tile=0. Allowed: an int from 1", lambda: token_rounding(SCORES, 1, 0)),
        (ArgumentError, "tile=8.0 is of type float", lambda: token_rounding(SCORES, 1, 8.0)),
        (ArgumentError, "rule='near' is not known", lambda: token_rounding(SCORES, 1, 8, "near")),
        (ArgumentError, "order='sigmoid'", lambda: rounding_scores(SCORES, 1, order="sigmoid")),
        (ArgumentError, "rounding_scores: top_k=0", lambda: rounding_scores(SCORES, 0)),
        (ArgumentError, "rounded_routing: top_k=0", lambda: rounded_routing(SCORES, 0, 8)),
        (ArgumentError, "order='x'", lambda: rounded_routing(SCORES, 1, 8, order="x")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_errors(error, text, call):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("routing.token_rounding", 9),
        ("routing.rounded_routing", 3),
        ("routing.route", 4),
        ("routing.topk", 2),
        ("nn.moe", 3),
    ],
)
def test_docstring_examples_run(name, least):
    import doctest
    import importlib

    # Not an attribute of the package: there the function has the module's name.
    module = importlib.import_module(f"sonic.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted >= least and result.failed == 0


# --- scores from logits ---------------------------------------------------------------------------


@every_order
def test_the_winners_scores_are_those_of_top_k(order):
    logits = 3 * torch.randn(20, 9)
    scores = rounding_scores(logits, 3, order=order)
    expected, ids = topk_routing(logits, 3, order=order)
    torch.testing.assert_close(scores.gather(1, ids.long()), expected)
    assert (scores.argsort(dim=1) == logits.argsort(dim=1)).all()
    assert scores.dtype == torch.float32 and (scores > 0).all()


@every_order
def test_scores_gradcheck_and_opcheck(order):
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda values: rounding_scores(values, 2, order=order), logits)
    logits = torch.randn(4, 6).bfloat16().requires_grad_()
    scores = rounding_scores(logits, 2, order=order)
    (gradient,) = torch.autograd.grad(scores.square().sum(), logits)
    assert gradient.dtype == torch.bfloat16 and gradient.any()
    full = order is ScoreOrder.TOPK_OVER_SOFTMAX
    torch.library.opcheck(torch.ops.sonic.winner_softmax.default, (logits, 2, full))
    arguments = (scores.detach(), scores.detach(), 2, full, torch.bfloat16)
    torch.library.opcheck(torch.ops.sonic.winner_softmax_backward.default, arguments)


# --- from logits to the plan ----------------------------------------------------------------------


@every_order
@every_rule
def test_one_operator_equals_scores_and_rounding(rule, order):
    logits = (2 * torch.randn(60, 9)).requires_grad_()
    seeded = [torch.Generator().manual_seed(2) for _ in range(2)]
    scores = rounding_scores(logits, 3, order=order)
    expected, expected_plan = token_rounding_plan(scores, 3, 8, rule, seeded[0])
    weights, plan = rounded_routing(logits, 3, 8, rule, seeded[1], order=order)
    torch.testing.assert_close(weights, expected)
    assert_same_plan(plan, expected_plan)
    dweights = torch.randn_like(weights)
    (actual,) = torch.autograd.grad(weights, logits, dweights)
    (wanted,) = torch.autograd.grad(expected, logits, dweights)
    torch.testing.assert_close(actual, wanted)
    assert wanted.any()


@every_order
def test_one_operator_gradcheck_and_opcheck(order):
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(
        lambda values: rounded_routing(values, 2, 4, "up", order=order)[0], logits
    )
    full = order is ScoreOrder.TOPK_OVER_SOFTMAX
    logits = torch.randn(9, 5).bfloat16().requires_grad_()
    weights, _ = rounded_routing(logits, 2, 4, "nr", order=order)
    (gradient,) = torch.autograd.grad(weights.square().sum(), logits)
    assert gradient.dtype == torch.bfloat16 and gradient.any()
    op = torch.ops.sonic.rounded_routing.default
    torch.library.opcheck(op, (logits, None, 2, 4, "nr", full))
    weights, experts, _, _, _, _, by_token, _, *winners = op(logits, None, 2, 4, "nr", full)
    saved = (weights, experts, by_token, *winners, logits if full else None)
    torch.library.opcheck(
        torch.ops.sonic.rounded_routing_backward.default,
        tuple(
            value.detach() if isinstance(value, torch.Tensor) else value
            for value in (weights, *saved, 5, torch.bfloat16)
        ),
    )


@every_order
def test_one_operator_saves_what_its_docstring_says(order):
    saved = []
    logits = torch.randn(40, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        weights, _ = rounded_routing(logits, 2, 8, order=order)
    expected = 8 * len(weights) + 4 * 41 + 8 * 40 * 2 + 4 * 40
    if order is ScoreOrder.TOPK_OVER_SOFTMAX:
        expected += logits.nbytes
    assert sum(tensor.nbytes for tensor in saved) == expected


def test_one_operator_under_compile():
    torch._dynamo.reset()
    compiled = torch.compile(rounded_routing, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (30, 41):
        logits = torch.randn(tokens, 6, requires_grad=True)
        actual, plan = compiled(logits, 2, 8, "nr")
        expected, expected_plan = rounded_routing(logits, 2, 8, "nr")
        assert torch.equal(actual, expected)
        assert_same_plan(plan, expected_plan)
        (gradient,) = torch.autograd.grad(actual.square().sum(), logits)
        assert torch.equal(gradient, torch.autograd.grad(expected.square().sum(), logits)[0])


def test_switch_loss_is_its_formula_and_gradcheck_and_opcheck():
    logits = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    load = winners_of(logits, 2).flatten().bincount(minlength=5).int()
    loss = switch_loss(logits, load, 2)
    routed = route(logits, 2)
    assert torch.equal(routed.load[0], load)
    for other in (load_balancing_loss(logits, load), routed.switch):
        torch.testing.assert_close(loss, other)
        grads = [torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (loss, other)]
        assert grads[1].any()
        torch.testing.assert_close(*grads)
    torch.autograd.gradcheck(lambda values: switch_loss(values, load, 2), logits)
    assert switch_loss(logits[:0], 0 * load, 2) == 0
    low = logits.detach().bfloat16().requires_grad_()
    torch.library.opcheck(torch.ops.sonic.switch_loss.default, (low, load, 2))
    results = torch.ops.sonic.switch_loss(low.detach(), load, 2)
    assert [result.dtype for result in results] == [torch.float32] * 3
    arguments = (results[0], low.detach(), load, *results[1:], 2)
    torch.library.opcheck(torch.ops.sonic.switch_loss_backward.default, arguments)


@every_rule
@every_order
def test_one_operator_counts_choices_before_rounding(rule, order):
    logits = 2 * torch.randn(60, 9)
    weights, plan, load = rounded_choices(logits, 3, 8, rule, order=order)
    assert load.dtype == torch.int32
    assert torch.equal(load.long(), winners_of(logits, 3).flatten().bincount(minlength=9))
    assert not torch.equal(load, plan.expert_frequency()) and weights.any()


# --- layer ----------------------------------------------------------------------------------------

TORCH = KernelBackendMoE.torch
SIZES = (6, 2, 16, 12)  # experts, top_k, hidden, intermediate


def make(**options):
    return MoE(*SIZES, "swiglu", False, 0.3, dtype=torch.float64, **options)


@every_rule
def test_module_in_training_equals_the_oracle_layer(rule):
    module = make(routing="token_rounding", rounding=rule, tile=8)
    x = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    torch.manual_seed(4)
    out, loss = module(x, TORCH)
    logits = torch.nn.functional.linear(x, module.router.weight)
    best = logits.topk(2).values
    scores = torch.exp(logits - best.logsumexp(dim=1, keepdim=True))
    torch.manual_seed(4)
    uniform = torch.rand(6) if rule in ("sr", "nr-s") else None
    token_ids, expert_ids, weights = checks.token_rounding_oracle(scores, 2, 8, rule, uniform)
    weights = scores[token_ids, expert_ids]
    expected = experts_flat_reference(
        x, token_ids, expert_ids, weights, module.c_fc.weight, module.c_proj.weight
    )
    frequency = torch.bincount(expert_ids, minlength=6)
    assert (frequency % 8 == 0).all() and frequency.sum() != 100
    torch.testing.assert_close(out, expected)
    # The loss counts what the tokens chose.
    chosen = torch.bincount(logits.topk(2).indices.flatten(), minlength=6)
    assert not torch.equal(chosen, frequency)
    expected_loss = load_balancing_loss(logits, chosen)
    torch.testing.assert_close(loss, expected_loss)
    actual = torch.autograd.grad(out.sin().sum() + loss, leaves)
    wanted = torch.autograd.grad(expected.sin().sum() + expected_loss, leaves)
    for ours, theirs in zip(actual, wanted, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs)


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", checks.MODULE_SIZES, ids=str)
def test_module_in_low_precision(sizes, dtype, rule):
    """What the GPU's tests do with the kernels."""
    tokens, tile = sizes
    layer = checks.make_module("cpu", dtype, tile, rule)
    checks.check_module(layer, torch.randn(tokens, 136).to(dtype), TORCH)


@every_order
def test_module_in_low_precision_knows_every_score_order(order):
    layer = checks.make_module("cpu", torch.bfloat16, 16, "nr", score_order=order)
    checks.check_module(layer, torch.randn(300, 136).bfloat16(), TORCH)


def _half(loss):
    return 0.5 * (loss + loss.detach())


@pytest.mark.parametrize(
    ("change", "caught"),
    [
        (lambda out, loss: (out, loss.detach() + 0 * loss), "x|router"),
        (lambda out, loss: (out, _half(loss)), "x|router"),
        (lambda out, loss: (out, 1.001 * loss), "loss"),
        (lambda out, loss: (1.01 * out, loss), "out"),
    ],
    ids=["no gradient of the loss", "half of it", "loss", "output"],
)
def test_the_modules_check_notices_mistakes(change, caught):
    layer = checks.make_module("cpu", torch.bfloat16, 16, "nr")
    x = torch.randn(300, 136).bfloat16()
    checks.check_module(layer, x, TORCH)
    layer.register_forward_hook(lambda module, inputs, outputs: change(*outputs))
    with pytest.raises(AssertionError, match=caught):
        checks.check_module(layer, x, TORCH)


@pytest.mark.parametrize(
    "change", [{"rounding": "down"}, {"tile": 8}, {"routing": "top_k"}], ids=str
)
def test_the_modules_check_notices_other_pairs(change, monkeypatch):
    layer = checks.make_module("cpu", torch.bfloat16, 16, "up")
    x = torch.randn(300, 136).bfloat16()
    forward = layer.forward

    def changed(*arguments):
        with monkeypatch.context() as context:
            for name, value in change.items():
                context.setattr(layer, name, value)
            return forward(*arguments)

    layer.forward = changed
    with pytest.raises(AssertionError, match="out"):
        checks.check_module(layer, x, TORCH)


@every_order
def test_module_outside_of_training_is_top_k(order):
    module = make(routing="token_rounding", rounding="up", tile=16, score_order=order)
    plain = make(score_order=order)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(40, 16, dtype=torch.float64)
    expected, loss = plain(x, TORCH)
    assert not torch.allclose(module(x, TORCH)[0], expected)
    assert torch.equal(module(x, TORCH, is_inference_mode=True)[0], expected)
    module.eval()
    actual = module(x, TORCH)
    assert torch.equal(actual[0], expected) and torch.equal(actual[1], loss)
    module.train().tile = 1
    torch.testing.assert_close(module(x, TORCH)[0], expected)


@pytest.mark.parametrize("rounds", [False, True], ids=["top_k", "token_rounding"])
@every_order
def test_module_saves_what_its_docstring_says(order, rounds):
    options = {"routing": "token_rounding", "tile": 8} if rounds else {}
    module = make(score_order=order, **options).float()
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved = {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.data_ptr(), tensor.numel()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module(torch.randn(50, 16, requires_grad=True), TORCH)
    rounding = {"rounding": "nr", "tile": 8} if rounds else {}
    expected = sonic.saved_bytes(50, 16, 12, 6, 2, dtype=torch.float32, **rounding)
    pairs = max_pairs(50, 6, 2, 8, "nr")
    # Of the loss that follows rounding two numbers of a token, of the other the number of tokens.
    router = 4 * pairs + 8 * 50 * 2 + 4 * 50 + 8 * 50 if rounds else 4 * 50 * 2 + 4 * 50 + 4
    assert sum(saved.values()) == expected + 4 * 50 * 6 + router + 4 * 6
    assert out[1] > 0


def test_function_and_flat_lists_agree():
    module = make(routing="token_rounding", tile=8)
    x = torch.randn(50, 16, dtype=torch.float64)
    weights = (module.c_fc.weight, module.c_proj.weight)
    out, logits, frequency = sonic.moe(
        x, module.router.weight, *weights, top_k=2, rounding="nr", tile=8
    )
    pairs = sonic.token_rounding(rounding_scores(logits, 2), 2, 8)
    torch.testing.assert_close(out, sonic.experts_flat(x, *pairs, *weights))
    assert torch.equal(out, module(x, TORCH)[0])
    assert (frequency % 8 == 0).all() and frequency.sum() > 0


@every_rule
def test_saved_bytes_are_those_of_the_rounded_rows(rule):
    """Of the experts; the router's own operator keeps what its docstring says."""
    x = torch.randn(50, 16).requires_grad_()
    module = make(routing="token_rounding", rounding=rule, tile=8).float()
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr(), tensor.numel()] = tensor.nbytes
        return tensor

    weights = (module.c_fc.weight, module.c_proj.weight)
    logits = torch.nn.functional.linear(x, module.router.weight).detach()
    pair_weights, plan = rounded_routing(logits, 2, 8, rule)
    pair_weights.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = experts_planned(x, pair_weights, plan, *weights)
    held = sum(size for (address, _), size in saved.items()
               if address not in {weight.data_ptr() for weight in weights})  # fmt: skip
    options = {"dtype": torch.float32, "rounding": rule, "tile": 8}
    assert held == sonic.saved_bytes(50, 16, 12, 6, 2, **options)
    estimate = sonic.memory_estimate(50, 16, 12, 6, 2, **options)
    assert estimate.saved == held < estimate.backward_peak and out.requires_grad
    with pytest.raises(ArgumentError, match="rounding='near'.*Pass both"):
        sonic.memory_estimate(50, 16, 12, 6, 2, rounding="near")


def test_module_compiles():
    torch._dynamo.reset()
    module = make(routing="token_rounding", rounding="balance-f", tile=8)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(30, 16, dtype=torch.float64)
    for actual, expected in zip(compiled(x, TORCH), module(x, TORCH), strict=True):
        torch.testing.assert_close(actual, expected)


def test_module_trains():
    module = make(routing="token_rounding", rounding="sr", tile=8).float()
    x, target = torch.randn(64, 16), torch.randn(64, 16)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        out, aux = module(x, TORCH)
        loss = torch.nn.functional.mse_loss(out, target) + 0.01 * aux
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"routing": "rounding"}, "routing='rounding' is not known. Allowed: 'top_k'"),
        ({"rounding": "nearest"}, "rounding='nearest' is not known. Allowed: 'nr', 'sr'"),
        ({"tile": 0}, 'MoE: tile=0. Allowed: an int from 1 to 2147483647, or "auto"'),
        (
            {"tile": True},
            "MoE: tile=True is of type bool. Allowed: an int from 1 to 2147483647, or",
        ),
        ({"tile": "big"}, "MoE: tile='big'. Allowed: an int from 1 to 2147483647, or \"auto\""),
    ],
)
def test_wrong_options_are_refused(options, text):
    with pytest.raises(ArgumentError) as error:
        make(**options)
    assert text in str(error.value)


def test_representation_names_the_rounding():
    text = repr(make(routing="token_rounding", rounding="balance-f", tile=64))
    assert "routing='token_rounding', rounding='balance-f', tile=64" in text
    assert "rounding" not in repr(make())


@pytest.fixture
def nothing_warned(monkeypatch):
    """As in a new process, which has not looked at any shapes."""
    _warned.clear()
    for name in ("token_rounding", "rounded_routing"):
        module = sys.modules[f"sonic.routing.{name}"]
        monkeypatch.setattr(module, "_checked", module._checked.__wrapped__)


def warnings(caplog):
    """What the package's logger warned of."""
    return [r.getMessage() for r in caplog.records if (r.name, r.levelname) == ("sonic", "WARNING")]


def test_a_batch_too_small_for_the_tile_is_warned_of_once(nothing_warned, caplog):
    module = MoE(8, 2, 32, 16, "swiglu", False, 0.1, routing="token_rounding")
    x = torch.randn(64, 32)
    module.eval()(x, TORCH)
    module.train()(x, TORCH, is_inference_mode=True)
    torch.compile(module, backend="aot_eager", fullgraph=True)(x, TORCH)
    assert not warnings(caplog)
    for tokens in (64, 64, 65):
        assert not module(torch.randn(tokens, 32), TORCH)[0].any(), "what is warned of"
    (text,) = warnings(caplog)
    for part in ("T=64", "top_k=2", "E=8", "16 rows", "tile=128", "smaller tile", '"up"'):
        assert part in text


@pytest.mark.parametrize(
    ("tokens", "top_k", "tile", "rule", "warns"),
    [
        (64, 2, 33, "nr", True),
        (64, 2, 32, "nr", False),
        (64, 2, 17, "down", True),
        (64, 2, 16, "down", False),
        (64, 2, 128, "up", False),
        (64, 2, 128, "sr", False),
        (64, 2, 128, "balance-f", False),
        (64, 4, 128, "nr", False),  # the 64 tokens count as a multiple
        (0, 2, 128, "nr", False),
        (2, 1, 1, "down", False),
    ],
)
def test_small_batches_are_told_by_shapes(tokens, top_k, tile, rule, warns, nothing_warned, caplog):
    token_rounding(torch.rand(tokens, 8), top_k, tile, rule)
    assert len(warnings(caplog)) == warns
