"""Token rounding's Triton kernels run by Triton's interpreter on CPU tensors.

Not collected on its own: ``test_token_rounding_triton.py`` runs it in a process of its own with
``TRITON_INTERPRET=1``, which must be set before triton is first imported.
"""

import pytest
import torch
import triton
import triton.language as tl

from sonic.routing.token_rounding import RULES
from sonic.triton import (
    rounding_keys,
    rounding_search,
    rounding_select,
    rounding_summaries,
    rounding_winners,
    switch_loss,
)
from sonic.triton import token_rounding as kernels
from sonic.triton.rounding_keys import _marks_of_one
from sonic.triton.rounding_search import _end_of, _gather_first, _halved, _parts_that_may_reach
from sonic.triton.rounding_summaries import (
    PARTS,
    _extremes_of_group,
    _summaries_launch,
    _summarize_written,
    popcount,
)
from sonic.triton.rounding_winners import keys_of_logits
from sonic.triton.switch_loss import _load_block
from sonic.triton.token_rounding import _kept_before
from sonic.triton.topk import HIGHEST
from tests import rounding_checks as checks

# Importing it skips this module where the interpreter does not work.
from tests.cpu import triton_interpreted  # noqa: F401
from tests.rounding_checks import Case

GROUP = rounding_keys.GROUP.value
every_rule = pytest.mark.parametrize("rule", RULES)


def _forget_launches():
    for remembered in (
        kernels._emit_launch,
        kernels._logit_grad_launch,
        rounding_select._scratch_size,
        rounding_select._select_launch,
        rounding_winners._winners_launch,
        _summaries_launch,
    ):
        remembered.cache_clear()


@pytest.fixture(autouse=True)
def own_launches():
    """A launch is remembered by its sizes alone, and not by what a test before changed."""
    _forget_launches()


@pytest.fixture(autouse=True)
def no_remembered_launches():
    """What is launched depends on constants, which tests change."""
    caches = (
        rounding_winners._winners_launch,
        rounding_summaries._summaries_launch,
        rounding_select._scratch_size,
        rounding_select._select_launch,
        kernels._emit_launch,
        kernels._logit_grad_launch,
    )
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def check(case, guarded, seed=0):
    """Against the oracle, and against the twin; the scores are returned for further use."""
    scores, uniform = checks.scores_of(case, seed), checks.uniform_of(case, seed)
    outputs = kernels.round_tokens(
        guarded.copy_of(scores),
        guarded.copy_of(uniform),
        case.top_k,
        case.tile,
        case.rule,
        case.num_pairs,
    )
    checks.assert_equals_oracle(outputs, case, scores, uniform)
    checks.assert_equals_twin(outputs, case, scores, uniform)
    return outputs


@pytest.mark.parametrize("seed", range(24))
def test_random_cases(seed, guarded):
    check(checks.random_case(seed), guarded, seed)


@every_rule
def test_several_groups_and_blocks_of_experts(rule, guarded):
    check(Case(150, 70, 4, 8, rule), guarded)


@pytest.mark.parametrize("experts", [1, 16, 17, 32, 33, 64])
@pytest.mark.parametrize("rule", ["nr", "up"])
def test_pairs_at_once(rule, experts, guarded):
    """What one word of a token's experts holds, and what two do."""
    for tokens in (64, 75):
        check(Case(tokens, experts, min(4, experts), 8, rule), guarded)


@pytest.fixture
def in_order(monkeypatch):
    """Pairs are put in order first, as with many experts."""
    monkeypatch.setattr(kernels, "_MOST_AT_ONCE", 0)


@pytest.mark.parametrize("seed", range(6))
def test_random_cases_in_order(seed, guarded, in_order):
    check(checks.random_case(seed), guarded, seed)


@pytest.mark.parametrize(("experts", "top_k"), [(16, 16), (33, 2), (64, 20)])
def test_pairs_in_order(experts, top_k, guarded, in_order):
    check(Case(75, experts, top_k, 8, "nr"), guarded)


@triton.jit
def _kept_before_and_by_this_one(bit, expert, BLOCK_E):
    before, size = _kept_before(bit, expert, BLOCK_E)
    return before + bit, size


@triton.jit
def _kept_before_in_one_word(bit, expert, BLOCK_E):
    before, size = _kept_before(bit, expert, BLOCK_E)
    return tl.where(expert < 32, before, before % 2), size


@pytest.mark.parametrize(
    ("wrong", "experts"), [(_kept_before_and_by_this_one, 16), (_kept_before_in_one_word, 64)]
)
def test_wrong_ranks_of_pairs_are_noticed(wrong, experts, guarded, monkeypatch):
    case = Case(75, experts, 8, 8, "nr")
    check(case, guarded)
    monkeypatch.setattr(kernels, "_kept_before", wrong)
    with pytest.raises(AssertionError):
        check(case, guarded)


@pytest.mark.parametrize("kind", ["softmax", "ties", "hot"])
@every_rule
def test_fewer_groups_are_listed_than_there_are(rule, kind, guarded, monkeypatch):
    """Groups are bisected, and where more of them tie than are listed, some are left out."""
    monkeypatch.setattr(rounding_select, "_LEAST_LIST", 1)
    check(Case(300, 3, 1, 4, rule, kind), guarded)


@pytest.mark.parametrize("kind", ["softmax", "ties"])
@every_rule
def test_neither_groups_nor_listed_keys_in_registers(rule, kind, guarded, monkeypatch):
    """Both in several blocks; a tile of 4 lists few groups, one of 32 all of them."""
    monkeypatch.setattr(rounding_select, "_LEAST_LIST", 1)
    monkeypatch.setattr(rounding_select, "_MAX_HELD", 4)
    monkeypatch.setattr(rounding_select, "_MAX_COUNTED", 4)
    monkeypatch.setattr(rounding_select, "_MAX_HELD_LIST", 2 * GROUP)
    for tile in (4, 32):
        check(Case(200, 3, 1, tile, rule, kind), guarded)


@pytest.mark.parametrize("kind", ["softmax", "ties"])
@every_rule
def test_no_tokens_are_compared(rule, kind, guarded, monkeypatch):
    """Where more tie than are compared with one another, bisections find the last token."""
    monkeypatch.setattr(rounding_select, "_LEAST_LIST", 1)
    monkeypatch.setattr(rounding_select, "_MAX_COMPARED", 1)
    check(Case(150, 3, 1, 16, rule, kind), guarded)


@triton.jit
def _end_one_later(found, want, count, ROOM: tl.constexpr):
    return _end_of(found, want + 1, count, ROOM)


@triton.jit
def _halved_too_high(middle, count, want, low, reach, high, beyond):
    return _halved(middle, count, want - 1, low, reach, high, beyond)


@pytest.mark.parametrize(
    ("compared", "name", "wrong"),
    [(256, "_end_of", _end_one_later), (1, "_halved", _halved_too_high)],
    ids=["compared", "bisected"],
)
def test_a_wrong_last_token_is_noticed(compared, name, wrong, guarded, monkeypatch):
    """In either way to find it."""
    monkeypatch.setattr(rounding_select, "_MAX_COMPARED", compared)
    case = Case(150, 3, 1, 16, "down")
    check(case, guarded)
    monkeypatch.setattr(rounding_search, name, wrong)
    with pytest.raises(AssertionError):
        check(case, guarded)


@pytest.mark.parametrize("kind", ["ties", "negative"])
def test_rows_that_no_block_holds(kind, guarded, monkeypatch):
    monkeypatch.setattr(rounding_keys, "MAX_BLOCK_E", 8)
    check(Case(40, 140, 3, 4, "nr", kind), guarded)


@pytest.mark.parametrize("tokens", [40, 45, 7])
def test_balance_in_blocks_of_experts(tokens, guarded, monkeypatch):
    """45 tokens: experts that can round up to 45 but to no multiple of 8 break the prefix sum."""
    monkeypatch.setattr(rounding_select, "_BALANCE_BLOCK", 4)
    for seed, kind in enumerate(("hot", "softmax", "ties")):
        check(Case(tokens, 11, 3, 8, "balance-f", kind), guarded, seed)


@every_rule
def test_scores_that_are_no_numbers(rule):
    """Whatever the scores, pairs are in range and counts are what they should be."""
    case = Case(60, 6, 2, 8, rule)
    scores, uniform = checks.scores_of(case), checks.uniform_of(case)
    scores[torch.rand(scores.shape) < 0.2] = torch.nan
    scores[torch.rand(scores.shape) < 0.1] = torch.inf
    outputs = kernels.round_tokens(scores, uniform, 2, 8, rule, case.num_pairs)
    expected = checks._forward_torch(scores, uniform, 2, 8, rule)
    assert torch.equal(outputs[0].nan_to_num(7.0), expected[0].nan_to_num(7.0))
    for actual, wanted in zip(outputs[1:], expected[1:], strict=True):
        assert torch.equal(actual, wanted)


def test_strided_scores(guarded):
    case = Case(30, 9, 2, 4, "nr")
    wide = torch.rand(60, 30)
    for scores in (wide[::2, 5:14], wide.t()[:, :9][:30]):
        outputs = kernels.round_tokens(scores, None, 2, 4, "nr", case.num_pairs)
        checks.assert_equals_oracle(outputs, case, scores, torch.zeros(9))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradient(dtype, guarded):
    case = Case(70, 9, 2, 16, "up")
    _, token_ids, expert_ids, *_ = check(case, guarded)
    dweights = guarded.copy_of(torch.randn(case.num_pairs))
    # The interpreter cuts bits off where a GPU rounds to nearest.
    rtol = 2.0**-7 if dtype is torch.bfloat16 else 0.0
    checks.check_gradient(dweights, token_ids, expert_ids, case, dtype, rtol)


@pytest.mark.parametrize("full", [False, True], ids=["winners", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(9, 8, 2), (70, 60, 4), (3, 1, 1), (5, 5, 5), (0, 4, 1)])
def test_winner_softmax(sizes, dtype, full, guarded):
    tokens, experts, top_k = sizes
    logits = guarded.copy_of((2 * torch.randn(tokens, experts)).to(dtype))
    checks.check_winner_softmax(logits, top_k, full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(9, 8, 2), (300, 60, 4), (3, 1, 1), (1, 5, 3)], ids=str)
def test_switch_loss(sizes, dtype, guarded):
    tokens, experts, top_k = sizes
    logits = guarded.copy_of((2 * torch.randn(tokens, experts)).to(dtype))
    checks.check_switch_loss(logits, top_k)


def test_switch_loss_in_blocks_of_experts_and_of_parts(guarded, monkeypatch):
    """Also where the first blocks have nothing but -inf, or a row nothing else."""
    for name, value in (("_ELEMENTS", 16), ("_MOST_ROWS", 2), ("_PARTS", 4)):
        monkeypatch.setattr(switch_loss, name, value)
    logits = 2 * torch.randn(2 * 40, 70)[::2]
    logits[:7, :40] = -torch.inf
    logits[1:9, 64:] = -torch.inf
    checks.check_switch_loss(logits, 3)
    barred = torch.full((2, 5), -torch.inf)
    load = torch.ones(5, dtype=torch.int32)
    loss, lse, mean = switch_loss.switch_loss(barred, load, 1.0)
    assert loss == 0 and not mean.any()
    gradient = switch_loss.switch_loss_grad(loss + 1, barred, load, lse, mean, 1.0)
    assert torch.equal(gradient, torch.zeros(2, 5))


@triton.jit
def _block_with_counts_of_the_next(logits, load, token, is_token, expert, num_experts, stride):
    value, _ = _load_block(logits, load, token, is_token, expert, num_experts, stride)
    count = tl.load(load + (expert + 1) % num_experts).to(tl.float32)
    return value, count[None, :]


@triton.jit
def _block_without_the_last(logits, load, token, is_token, expert, num_experts, stride):
    return _load_block(logits, load, token, is_token, expert, num_experts - 1, stride)


@pytest.mark.parametrize("wrong", [_block_with_counts_of_the_next, _block_without_the_last])
def test_wrong_terms_of_the_switch_loss_are_noticed(wrong, monkeypatch):
    logits = 2 * torch.randn(60, 8)
    checks.check_switch_loss(logits, 2)
    monkeypatch.setattr(switch_loss, "_load_block", wrong)
    with pytest.raises(AssertionError):
        checks.check_switch_loss(logits, 2)


def logits_of(case, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(case.tokens, case.experts, generator=generator)
    if case.kind == "ties":
        logits = logits.round()
    return logits.to(dtype)


@pytest.mark.parametrize("seed", range(18))
def test_random_logits(seed, guarded):
    """Every rule with every dtype."""
    case = checks.random_case(seed)
    dtype = (torch.bfloat16, torch.float16, torch.float32)[seed // len(RULES)]
    logits, uniform = logits_of(case, dtype, seed), checks.uniform_of(case, seed)
    checks.check_logits(guarded.copy_of(logits), guarded.copy_of(uniform), case, seed % 2 == 0)


@pytest.mark.parametrize("full", [False, True], ids=["winners", "full"])
def test_gradient_of_more_pairs_than_are_loaded_at_once(full, guarded):
    case = Case(40, 64, 20, 8, "nr", "softmax")
    logits = guarded.copy_of(logits_of(case, torch.float32))
    checks.check_logits(logits, checks.uniform_of(case), case, full)


@every_rule
def test_logits_of_several_groups_and_blocks_of_experts(rule, guarded, monkeypatch):
    monkeypatch.setattr(kernels, "_MAX_BLOCK_E", 32)
    for kind, dtype in (("softmax", torch.bfloat16), ("ties", torch.float32)):
        case = Case(150, 70, 4, 8, rule, kind)
        logits = guarded.copy_of(logits_of(case, dtype))
        checks.check_logits(logits, checks.uniform_of(case), case, kind == "ties")


def _summarize_always(monkeypatch):
    monkeypatch.setattr(rounding_summaries, "_LEAST_SUMMARIZED", 1)
    monkeypatch.setattr(rounding_summaries, "_LEAST_GROUPS", 1)


@pytest.fixture
def always_summarized(monkeypatch):
    _summarize_always(monkeypatch)


@pytest.fixture
def table_summarized(monkeypatch):
    monkeypatch.setattr(rounding_summaries, "_LEAST_GROUPS", 1)


@pytest.mark.parametrize("full", [False, True], ids=["winners", "full"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(150, 60, 4), (64, 5, 5), (75, 16, 3), (9, 1, 1)], ids=str)
def test_summaries_of_a_table(sizes, dtype, full, table_summarized):
    """Of whole groups, and of one that has only some tokens; no part is first."""
    tokens, experts, top_k = sizes
    logits = torch.randn(tokens, experts).to(dtype)
    logits[2], logits[3], logits[5, 0] = torch.nan, -logits[3].abs(), torch.inf
    keys, *_ = keys_of_logits(logits, top_k, full)
    expected = checks.summaries_of(keys.table, tokens)
    assert torch.equal(keys.summaries[..., [0, 1, 3]], expected[..., [0, 1, 3]])
    assert torch.equal(keys.words, expected[..., 0].T)


def _hold_fewer_groups(monkeypatch, most):
    """In registers, from the next launch on: launches are remembered by their sizes."""
    monkeypatch.setattr(rounding_select, "_MAX_HELD", most)
    monkeypatch.setattr(rounding_select, "_MAX_COUNTED", most)
    _forget_launches()


@every_rule
def test_selection_from_a_table_with_summaries(rule, guarded, table_summarized, monkeypatch):
    """Of groups that are in registers, and that are not."""
    for index, kind in enumerate(("softmax", "ties")):
        case = Case(200, 20, 4, 8, rule, kind)
        logits = guarded.copy_of(logits_of(case, (torch.bfloat16, torch.float32)[index]))
        checks.check_logits(logits, checks.uniform_of(case), case, False)
        _hold_fewer_groups(monkeypatch, 4)


@triton.jit
def _summarize_the_first(
    keys, summaries, words, group, num_tokens, num_experts, key_stride, BLOCK_E
):
    _summarize_written(
        keys - group * 32, summaries, words, group, num_tokens, num_experts, key_stride, BLOCK_E
    )


def test_wrong_summaries_of_a_table_are_noticed(guarded, table_summarized, monkeypatch):
    case = Case(150, 20, 4, 8, "nr")
    logits = guarded.copy_of(logits_of(case, torch.bfloat16))
    _check_parts(logits, case)
    monkeypatch.setattr(rounding_winners, "_summarize_written", _summarize_the_first)
    with pytest.raises(AssertionError):
        _check_parts(logits, case)


@pytest.mark.parametrize("full", [False, True], ids=["winners", "full"])
@pytest.mark.parametrize("sizes", [(150, 70, 4), (64, 5, 5), (75, 300, 3), (9, 3, 1)], ids=str)
def test_summaries(sizes, full, always_summarized):
    """Of whole groups, and of one that has only some tokens; experts in one block and in two; of
    logits that are columns of a wider tensor."""
    tokens, experts, top_k = sizes
    logits = torch.randn(tokens, experts + 9).bfloat16()[:, 4 : experts + 4]
    inf, nan = torch.inf, torch.nan
    logits[5, 0], logits[6, 1:] = nan, -nan
    for token, values in enumerate(
        ((0.0, -0.0, -1), (nan, inf, -nan), (-inf, -2, -2), (-1, -1, -inf))
    ):
        logits[token] = torch.tensor(values)[torch.arange(experts) % 3]
    logits[7] = -logits[7].abs()
    (table, *_), *expected = keys_of_logits(logits, top_k, full)
    keys, *others = keys_of_logits(logits, top_k, full, summarized=True)
    summaries, words = keys.summaries, keys.words
    assert torch.equal(summaries, checks.summaries_of(table, tokens))
    assert torch.equal(words, summaries[:, :, 0].T)
    torch.testing.assert_close(others, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("index", "rule"), list(enumerate(RULES)))
def test_selection_from_summaries(index, rule, guarded, always_summarized):
    kinds = ("softmax", 70, False), ("ties", 20, True), ("softmax", 5, False)
    kind, experts, full = kinds[index % len(kinds)]
    case = Case(150, experts, 4, 8, rule, kind)
    logits = logits_of(case, torch.bfloat16)
    # Columns of a wider tensor, in which others would win.
    wide = guarded.copy_of(torch.cat((logits + 9, logits, logits + 9), dim=1))
    logits = wide[:, experts : 2 * experts]
    checks.check_logits(logits, checks.uniform_of(case), case, full)


@pytest.mark.parametrize("rule", ["nr", "nr-s"])
def test_summaries_that_are_not_in_registers(rule, guarded, always_summarized, monkeypatch):
    monkeypatch.setattr(rounding_select, "_MAX_HELD", 4)
    monkeypatch.setattr(rounding_select, "_MAX_COUNTED", 4)
    case = Case(200, 70, 1, 4, rule)
    logits = guarded.copy_of(logits_of(case, torch.bfloat16))
    checks.check_logits(logits, checks.uniform_of(case), case, False)


def _logits_of_parts(case):
    """Of expert 0 two groups have nothing to add: all their tokens choose it."""
    logits = logits_of(case, torch.bfloat16)
    logits[GROUP : 3 * GROUP, 0] += 30
    return logits


def _changed_parts(logits, case):
    """Whether a part (E, groups, 4) has a token that is added or dropped, by the twin."""
    keys, *_ = keys_of_logits(logits, case.top_k, False)
    chosen = keys.table >= 0
    scores = (keys.table[:, : case.tokens] & HIGHEST.value).view(torch.float32).t().contiguous()
    won = checks.winners_of(logits.float(), case.top_k)
    uniform = checks.uniform_of(case)
    _, token, expert, *_ = checks.round_winners(scores, won, uniform, case.tile, case.rule)
    live = token < case.tokens
    kept = torch.zeros_like(chosen)
    kept[expert[live].long(), token[live].long()] = True
    return (kept != chosen).unflatten(1, (-1, 4, 8)).any(-1)


def _check_parts(logits, case):
    checks.check_logits(logits, checks.uniform_of(case), case, False)


@pytest.mark.parametrize("kind", ["softmax", "ties"])
@pytest.mark.parametrize("rule", ["up", "down"])
@pytest.mark.parametrize("tokens", [150, 129, 256])
def test_several_parts_of_a_group_change(tokens, rule, kind, guarded, always_summarized):
    """Besides groups that all tokens chose, and a last one of 22 tokens, of one, and of all."""
    case = Case(tokens, 6, 2, 32, rule, kind)
    logits = guarded.copy_of(_logits_of_parts(case))
    assert (_changed_parts(logits, case).sum(-1) > 2).any(1).sum() > 2
    _check_parts(logits, case)


@every_rule
def test_parts_that_are_not_in_registers(rule, guarded, always_summarized, monkeypatch):
    """Two at a time of many, of groups that are in registers, and that are not."""
    monkeypatch.setattr(rounding_select, "_MAX_HELD_PARTS", 16)
    case = Case(150, 6, 2, 32, rule)
    logits = guarded.copy_of(_logits_of_parts(case))
    assert (_changed_parts(logits, case).flatten(1).sum(1) > 2).sum() > 2
    _check_parts(logits, case)
    _hold_fewer_groups(monkeypatch, 2)
    _check_parts(logits, case)


@pytest.mark.parametrize("summarized", [False, True], ids=["table", "summaries"])
@pytest.mark.parametrize("rule", ["up", "down"])
def test_entries_are_written_twice(rule, summarized, guarded, monkeypatch):
    """More tokens than there is room for reach the rank of the groups: of five groups up to 15."""
    monkeypatch.setattr(rounding_select, "_LEAST_LIST", 1)
    if summarized:
        _summarize_always(monkeypatch)
    written = []

    def gather_first(*arguments):
        written.append(arguments)
        return _gather_first(*arguments)

    monkeypatch.setattr(rounding_search, "_gather_first", gather_first)
    case = Case(150, 6, 2, 16, rule)
    _check_parts(guarded.copy_of(logits_of(case, torch.bfloat16)), case)
    assert len(written) > case.experts


_TIED = Case(150, 3, 2, 4, "up", "tied")


def _tied_logits():
    """Five tokens chose the last expert, and all others tie for it."""
    logits = torch.tensor([0.0, -1.5, -1.5]).repeat(150, 1)
    logits[100:105, 1] = -2
    return logits.bfloat16()


def test_parts_that_tie(guarded, always_summarized):
    """The first tokens are taken, in whichever part their group's greatest rank is said to be."""
    logits = guarded.copy_of(_tied_logits())
    assert _changed_parts(logits, _TIED)[2].nonzero().tolist() == [[0, 0]]
    _check_parts(logits, _TIED)


@triton.jit
def _next_part(second):
    return (second + 1) & (PARTS - 1)


@triton.jit
def _nothing_in_other_parts(second):
    return second * 0 - 1


@triton.jit
def _most_without_last_bits(second):
    return second & -PARTS


@triton.jit
def _first_part_of_several(word, second, low, up):
    parts = _parts_that_may_reach(word, second, low, up)
    return tl.where(up, parts, parts & -parts)


@pytest.mark.parametrize(
    ("name", "wrong", "case"),
    [
        ("first_part", _next_part, Case(150, 6, 2, 2, "up")),
        ("most_of_other_parts", _nothing_in_other_parts, Case(150, 6, 2, 32, "up")),
        ("most_of_other_parts", _nothing_in_other_parts, _TIED),
        ("most_of_other_parts", _most_without_last_bits, _TIED),
        ("_parts_that_may_reach", _first_part_of_several, Case(150, 6, 2, 32, "down")),
    ],
)
def test_overlooked_parts_are_noticed(name, wrong, case, guarded, always_summarized, monkeypatch):
    """Of a few groups that are listed, in one of which one token is wanted, or of all."""
    monkeypatch.setattr(rounding_select, "_LEAST_LIST", 1)
    logits = guarded.copy_of(_tied_logits() if case is _TIED else _logits_of_parts(case))
    _check_parts(logits, case)
    monkeypatch.setattr(rounding_search, name, wrong)
    with pytest.raises(AssertionError):
        _check_parts(logits, case)


@triton.jit
def _one_too_few(word):
    return popcount(word) - 1


@triton.jit
def _marks_of_another(top, inverse, last, is_token, BITS: tl.constexpr):
    return top, inverse, last * 0, tl.where(is_token, last, 0)


@triton.jit
def _as_if_none_chose(least, greatest, all_chose):
    return greatest.to(tl.int32, bitcast=True) & HIGHEST, greatest.to(tl.int32, bitcast=True)


@triton.jit
def _in_another_order(address):
    top, inverse, turn, bound = _marks_of_one(address)
    return top, inverse, bound, turn


@triton.jit
def _of_all_parts(
    logits, marks, group, expert, num_tokens, num_experts, stride, BITS, BLOCK_E, FULL
):
    free, least, greatest, _, first = _extremes_of_group(
        logits, marks, group, expert, num_tokens, num_experts, stride, BITS, BLOCK_E, FULL
    )
    return free, least, greatest, greatest, first


@triton.jit
def _of_another_part(
    logits, marks, group, expert, num_tokens, num_experts, stride, BITS, BLOCK_E, FULL
):
    free, least, greatest, second, first = _extremes_of_group(
        logits, marks, group, expert, num_tokens, num_experts, stride, BITS, BLOCK_E, FULL
    )
    return free, least, greatest, second, (first + 1) & (PARTS - 1)


def _words_elsewhere(*sizes):
    launch = _summaries_launch(*sizes)
    return lambda *given: launch(*given[:-1], given[-1].clone())


def _words_by_expert(*sizes):
    launch = _summaries_launch(*sizes)

    def launch_and_turn(logits, marks, summaries, words):
        launch(logits, marks, summaries, words)
        words.view(words.shape[::-1]).copy_(words.T.clone())

    return launch_and_turn


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (rounding_winners, "_marks_of", _marks_of_another),
        (rounding_summaries, "_marks_of_one", _in_another_order),
        (rounding_summaries, "popcount", _one_too_few),
        (rounding_summaries, "_greatest_ranks", _as_if_none_chose),
        (rounding_summaries, "_extremes_of_group", _of_all_parts),
        (rounding_summaries, "_extremes_of_group", _of_another_part),
        (rounding_summaries, "_summaries_launch", _words_elsewhere),
        (rounding_summaries, "_summaries_launch", _words_by_expert),
    ],
)
def test_wrong_summaries_are_noticed(module, name, wrong, always_summarized, poisoned, monkeypatch):
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError):
        for sizes in ((64, 5, 5), (150, 70, 4)):
            test_summaries(sizes, False, always_summarized)
