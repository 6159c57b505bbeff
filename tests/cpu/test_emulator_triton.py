"""Token rounding's keys and selection, compiled by Triton, run in the emulator.

Triton's interpreter runs a program as numpy does, one operation at a time; here warps interleave,
and loads and stores of global memory that no barrier orders are reported.
"""

import re

import pytest
import torch

pytest.importorskip("triton")

import triton

from sonic.triton import rounding_keys, rounding_select, rounding_summaries, rounding_winners
from sonic.triton.common import power_of_2
from sonic.triton.rounding_winners import _Leaves
from sonic.triton.topk import HIGHEST, LOWEST
from tests.cpu.test_triton_compile import compiled  # noqa: F401
from tests.emulator import Fault, Policy, ptx
from tests.emulator.program import Program
from tests.emulator.snippet import machine_for
from tests.rounding_checks import summaries_of

pytestmark = pytest.mark.skipif(
    bool(triton.knobs.runtime.interpret), reason="TRITON_INTERPRET is set: nothing compiles"
)

EXPERTS = 3
SHARES = (0.2, 0.21, 0.9)  # of the tokens, that choose an expert
GROUP = rounding_keys.GROUP.value


def _table(tokens, ties, seed):
    """Keys (E, stride), scores and choices (E, T)."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(EXPERTS, tokens, generator=generator)
    if ties:
        scores = (4 * scores).round() / 4
    chosen = torch.rand(EXPERTS, tokens, generator=generator) < torch.tensor(SHARES)[:, None]
    keys = torch.full((EXPERTS, -(-tokens // GROUP) * GROUP), LOWEST.value, dtype=torch.int32)
    bits = scores.view(torch.int32)
    keys[:, :tokens] = torch.where(chosen, bits, bits | LOWEST.value)
    return keys, scores, chosen


def _logits(tokens, ties, seed):
    """Of which a token chooses two experts of three: one few do, one most."""
    logits = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed))
    logits += torch.tensor([-0.5, 0.5, 1.5])
    return (logits.sign() if ties else logits).bfloat16()


def _launch_of(kernel, arrays, sizes, waits=True):
    """What a machine has to know of a launch of tensors and numbers, in this order; unless it
    ``waits``, of a kernel that forgets to. The next one may start as early as ever possible."""
    wait = r"griddepcontrol\.wait\s*;"
    start = "griddepcontrol.launch_dependents;"
    text, waited = re.subn(
        wait, f"griddepcontrol.wait; {start}" if waits else start, kernel.asm["ptx"]
    )
    assert waited == 1  # of these kernels every one, or there was nothing to forget
    (parsed,) = ptx.parse(text).values()
    values = [*(array.data_ptr() for array in arrays), *sizes, 0, 0]  # no scratch of Triton's own
    raw = [
        int(value).to_bytes(parameter[1], "little")
        for parameter, value in zip(parsed.params, values, strict=True)
    ]
    block = 32 * kernel.metadata.num_warps, 1, 1
    return Program(parsed), block, kernel.metadata.shared, raw


def _machine(arrays, policy):
    """On numpy's memory."""
    memory = [a.view(torch.uint8).numpy().reshape(-1) for a in arrays]
    machine = machine_for(memory, policy)
    # Triton lets warps that hold the same value store it to one place of shared memory; order on
    # global memory is still checked.
    machine.race_check = False
    return machine


def _run(kernel, programs, arrays, sizes):
    program, block, shared, raw = _launch_of(kernel, arrays, sizes)
    _machine(arrays, Policy(0)).launch(program, (programs, 1, 1), block, (1, 1, 1), shared, raw)


def _keys_of(compiled, logits, top_k, full, summarized):  # noqa: F811
    """Keys and winners, written by the kernels."""
    # Nothing runs, so that what is returned holds what was there.
    keys, *winners = rounding_winners.keys_of_logits(logits, top_k, full, summarized)
    rows, leaves = (keys.table,), _Leaves.SCORES
    if summarized:
        rows, leaves = (keys.marks,), _Leaves.MARKS
    elif keys.summaries is not None:
        rows, leaves = (keys.table, keys.summaries, keys.words), _Leaves.SUMMARIES
    for result in (*rows, *winners):
        result.fill_(-99)
    experts = logits.shape[1]
    tokens_of_one, *_ = rounding_winners._winner_blocks(
        power_of_2(experts), logits.itemsize, full, leaves
    )
    sizes = *logits.shape, experts, keys.stride
    kernel = compiled["_logit_scores_kernel"][-1]
    _run(kernel, -(-keys.stride // tokens_of_one), (logits, *rows, *winners), sizes)
    if summarized:
        keys.summaries.fill_(-99)
        keys.words.fill_(-99)
        (kernel,) = compiled["_summaries_kernel"]
        programs = keys.stride // GROUP * -(-experts // rounding_summaries._SUMMARY_BLOCK)
        _run(kernel, programs, (logits, keys.marks, keys.summaries, keys.words), sizes)
    return keys, *winners


def _kept(scores, chosen, tile, rule):
    """Whether an expert keeps a token (E, T), by sorting."""
    kept = torch.zeros_like(chosen)
    for expert in range(EXPERTS):
        order = torch.sort(scores[expert], descending=True, stable=True).indices
        order = torch.cat([order[chosen[expert][order]], order[~chosen[expert][order]]])
        frequency = int(chosen[expert].sum())
        lower, rest = frequency // tile * tile, frequency % tile
        goes_up = {"up": rest > 0, "down": False, "nr": 2 * rest > tile}[rule]
        kept[expert, order[: lower + tile * goes_up]] = True
    return kept


def _poisoned(*shape):
    return torch.full(shape, -99, dtype=torch.int32)


@pytest.fixture
def table_summarized(monkeypatch):
    monkeypatch.setattr(rounding_summaries, "_LEAST_GROUPS", 1)


@pytest.mark.parametrize("given", ["keys", "summaries", "both"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    ("tokens", "tile", "rule"),
    [(3000, 128, "nr"), (3001, 100, "up"), (3000, 128, "down"), (1500, 700, "down")],
)
def test_selection(compiled, tokens, tile, rule, ties, given, table_summarized):  # noqa: F811
    if given != "keys":
        logits = _logits(tokens, ties, seed=tokens)
        keys, *_ = _keys_of(compiled, logits, 2, False, False)
        table = keys.table
        if given == "summaries":
            keys, *_ = _keys_of(compiled, logits, 2, False, True)
        scores = (table[:, :tokens] & HIGHEST.value).view(torch.float32)
        chosen = table[:, :tokens] >= 0
        row_stride = EXPERTS if given == "summaries" else 0
    else:
        table, scores, chosen = _table(tokens, ties, seed=tokens)
        keys, row_stride = rounding_keys.Keys(table), 0
    groups = keys.stride // GROUP
    words = _poisoned(groups, EXPERTS) if keys.words is None else keys.words
    before = _poisoned(groups, EXPERTS)
    counts, load = _poisoned(EXPERTS), _poisoned(EXPERTS)
    scratch = _poisoned(rounding_select.scratch_size(keys, tokens, EXPERTS, tile, rule))
    decisions = rounding_select.Decisions(words, before, counts, load)
    rounding_select.decide(keys, None, decisions, scratch, tokens, tile, rule)
    (kernel,) = compiled["_select_kernel"]
    parts = [part for part in keys[:4] if part is not None]
    arrays = load, *parts, counts, words, before, scratch
    _run(kernel, EXPERTS, arrays, (tokens, EXPERTS, groups, row_stride, keys.stride, tile))

    kept = torch.zeros(EXPERTS, groups * GROUP, dtype=torch.bool)
    kept[:, :tokens] = _kept(scores, chosen, tile, rule)
    bits = kept.view(EXPERTS, groups, GROUP).transpose(0, 1)
    expected = (bits.long() << torch.arange(GROUP)).sum(2)
    assert torch.equal(words.long() & 0xFFFFFFFF, expected)
    sizes = bits.sum(2)
    assert torch.equal(before.long(), sizes.cumsum(0) - sizes)
    assert torch.equal(counts.long(), kept.sum(1)) and torch.equal(load.long(), chosen.sum(1))
    assert not torch.equal(kept[:, :tokens], chosen)
    # Where few tokens are left they are compared with one another, and there is an end of them.
    room = rounding_select._room(tokens, tile, rule)
    lists = 2 * rounding_select._list_size(tokens, tile, rule) * (4 if given == "summaries" else 1)
    found = scratch.view(EXPERTS, -1)[counts != load, lists : lists + 2 * room]
    assert (found == -1).any(1).all() != (ties or tile > 2 * room)


@pytest.mark.parametrize("full", [False, True], ids=["winners", "full"])
def test_summaries(compiled, full):  # noqa: F811
    """The same keys are summarized as are written, by threads that hold other logits."""
    tokens, experts, top_k = 75, 300, 3
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)).bfloat16()
    (table, *_), *winners = _keys_of(compiled, logits, top_k, full, False)
    keys, *others = _keys_of(compiled, logits, top_k, full, True)
    assert torch.equal((table[:, :tokens] >= 0).sum(0), torch.full((tokens,), top_k))
    assert torch.equal(keys.summaries, summaries_of(table, tokens))
    assert all(map(torch.equal, winners, others))


@pytest.mark.parametrize("full", [False, True], ids=["winners", "full"])
@pytest.mark.parametrize("experts", [11, 50])
def test_summaries_of_a_table(compiled, experts, full, table_summarized):  # noqa: F811
    """By the program that has written it, of one warp and of several."""
    logits = torch.randn(75, experts, generator=torch.Generator().manual_seed(0)).bfloat16()
    keys, *_ = _keys_of(compiled, logits, 3, full, False)
    kernel = compiled["_logit_scores_kernel"][-1]
    assert (kernel.metadata.num_warps > 1) == (experts > 32)
    expected = summaries_of(keys.table, 75)
    assert torch.equal(keys.summaries[..., [0, 1, 3]], expected[..., [0, 1, 3]])
    assert torch.equal(keys.words, expected[..., 0].T)


def test_summaries_of_a_table_come_behind_a_barrier(compiled, table_summarized):  # noqa: F811
    logits = torch.randn(32, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    _keys_of(compiled, logits, 3, False, False)
    (kernel,) = compiled["_logit_scores_kernel"]
    text = kernel.asm["ptx"]
    # Loads of keys are the last ones.
    loads = text.rindex("ld.global")
    stores = text.rindex("st.global", 0, loads)
    found = re.search(r"bar\.sync[^;]*;", text[stores:loads])
    kernel.asm["ptx"] = text[:stores] + text[stores:].replace(found[0], "", 1)
    with pytest.raises(Fault, match="race: "):
        _keys_of(compiled, logits, 3, False, False)


def _in_turn(compiled, policy, overlapping=True, without_wait=None):  # noqa: F811
    """Winners, summaries, and selection for the first six experts, launched together or each once
    the one before has ended: counts, loads, words and counts before of these, then marks, summaries
    and winners."""
    tokens, experts, top_k, tile, few = 75, 300, 3, 4, 6
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[:, :few] += 2
    keys, *winners = rounding_winners.keys_of_logits(logits, top_k, False, True)
    stride = keys.stride
    groups = stride // GROUP
    words, before = keys.words, _poisoned(groups, experts)
    counts, load = _poisoned(experts), _poisoned(experts)
    scratch = _poisoned(rounding_select.scratch_size(keys, tokens, experts, tile, "up"))
    decisions = rounding_select.Decisions(words, before, counts, load)
    rounding_select.decide(keys, None, decisions, scratch, tokens, tile, "up")
    for result in (keys.marks, keys.summaries, words, *winners):
        result.fill_(-99)
    chosen = load, logits, keys.marks, keys.summaries, counts, words, before, scratch
    sizes = tokens, experts, experts, stride
    tokens_of_one, *_ = rounding_winners._winner_blocks(512, logits.itemsize, False, _Leaves.MARKS)
    programs = stride // tokens_of_one
    machine = _machine((*chosen, *winners), policy)
    for name, grid, arrays, numbers in (
        ("_logit_scores_kernel", programs, (logits, keys.marks, *winners), sizes),
        ("_summaries_kernel", 2 * groups, (logits, keys.marks, keys.summaries, keys.words), sizes),
        ("_select_kernel", few, chosen, (tokens, experts, groups, experts, stride, tile)),
    ):
        (kernel,) = compiled[name]
        wait = name != without_wait
        program, block, shared, raw = _launch_of(kernel, arrays, numbers, wait)
        machine.enqueue(program, (grid, 1, 1), block, (1, 1, 1), shared, raw, programmatic=True)
        if not overlapping:
            machine.synchronize()
    machine.synchronize()
    decided = counts[:few], load[:few], words[:, :few], before[:, :few]
    return *decided, keys.marks, keys.summaries, *winners


@pytest.mark.parametrize("seed", range(2))
def test_launches_that_overlap(compiled, seed):  # noqa: F811
    results = _in_turn(compiled, Policy(seed))
    counts, load = results[:2]
    chosen = results[-2].flatten().bincount(minlength=load.numel())[: load.numel()]
    assert torch.equal(load.long(), chosen) and chosen.all()
    assert torch.equal(counts, (load + 3) // 4 * 4)
    alone = _in_turn(compiled, Policy(seed), overlapping=False)
    assert all(map(torch.equal, results, alone))


@pytest.mark.parametrize("name", ["_summaries_kernel", "_select_kernel"])
def test_a_launch_that_overlaps_has_to_wait(compiled, name):  # noqa: F811
    with pytest.raises(Fault, match="race: "):
        for seed in range(4):
            _in_turn(compiled, Policy(seed), without_wait=name)
