"""Token rounding's keys and selection, compiled by Triton, run in the emulator.

Triton's interpreter runs a program as numpy does, one operation at a time; here warps interleave,
and loads and stores of global memory that no barrier orders are reported.
"""

import re

import pytest
import torch

pytest.importorskip("triton")

import triton

from sonic.triton import rounding_keys, rounding_select
from sonic.triton.topk import LOWEST
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


def _launch_of(kernel, arrays, sizes, waits=True):
    """What a machine has to know of a launch of tensors and numbers, in this order; unless it
    ``waits``, of a kernel that forgets to. The next one may start as early as ever possible."""
    wait = r"griddepcontrol\.wait\s*;"
    start = "griddepcontrol.launch_dependents;"
    text = re.sub(wait, f"griddepcontrol.wait; {start}" if waits else start, kernel.asm["ptx"])
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


@pytest.mark.parametrize("summarized", [False, True], ids=["keys", "summaries"])
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    ("tokens", "tile", "rule"),
    [(3000, 128, "nr"), (3001, 100, "up"), (3000, 128, "down"), (1500, 700, "down")],
)
def test_selection(compiled, tokens, tile, rule, ties, summarized):  # noqa: F811
    keys, scores, chosen = _table(tokens, ties, seed=tokens)
    groups = -(-tokens // GROUP)
    summaries = summaries_of(keys, tokens) if summarized else None
    words, before = _poisoned(groups, EXPERTS), _poisoned(groups, EXPERTS)
    counts, load = _poisoned(EXPERTS), _poisoned(EXPERTS)
    scratch = _poisoned(rounding_select.scratch_size(tokens, EXPERTS, tile, rule))
    decisions = rounding_select.Decisions(words, before, counts, load)
    given = rounding_keys.Keys(keys, summaries=summaries)
    rounding_select.decide(given, None, decisions, scratch, tokens, tile, rule)
    (kernel,) = compiled["_select_kernel"]
    arrays = load, keys, *([summaries] if summarized else []), counts, words, before, scratch
    _run(kernel, EXPERTS, arrays, (tokens, EXPERTS, groups, 0, keys.shape[1], tile))

    kept = torch.zeros(EXPERTS, groups * GROUP, dtype=torch.bool)
    kept[:, :tokens] = _kept(scores, chosen, tile, rule)
    bits = kept.view(EXPERTS, groups, GROUP).transpose(0, 1)
    expected = (bits.long() << torch.arange(GROUP)).sum(2)
    assert torch.equal(words.long() & 0xFFFFFFFF, expected)
    sizes = bits.sum(2)
    assert torch.equal(before.long(), sizes.cumsum(0) - sizes)
    assert torch.equal(counts.long(), kept.sum(1)) and torch.equal(load.long(), chosen.sum(1))
    assert not torch.equal(kept[:, :tokens], chosen)
    # Where few tokens are left they are compared with one another, where many tie they are not.
    room = rounding_select._room(tokens, tile, rule)
    lists = 2 * rounding_select._list_size(tokens, tile, rule)
    found = scratch.view(EXPERTS, -1)[:, lists : lists + 2 * room]
    changed = counts != load
    assert (found[changed] != -99).any(1).all() != (ties or tile > 2 * room)


@pytest.mark.parametrize("full", [False, True], ids=["winners", "full"])
def test_summaries(compiled, full):  # noqa: F811
    """The same keys are summarized as are written, by threads that hold other logits."""
    tokens, experts, top_k = 75, 300, 3
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = []
    for summarized in (False, True):
        # Nothing runs, so that what is returned holds what was there.
        keys, *winners = rounding_keys.keys_of_logits(logits, top_k, full, summarized)
        rows = keys.marks if summarized else keys.table
        for result in (rows, *winners):
            result.fill_(-99)
        kernel = compiled["_logit_scores_kernel"][-1]
        tokens_of_one, *_ = (
            rounding_keys._winner_blocks(512, logits.itemsize)
            if summarized and not full
            else rounding_keys._blocks(512, logits.itemsize, full)
        )
        programs = keys.stride // tokens_of_one
        sizes = tokens, experts, experts, keys.stride
        _run(kernel, programs, (logits, rows, *winners), sizes)
        if summarized:
            keys.summaries.fill_(-99)
            (kernel,) = compiled["_summaries_kernel"]
            programs = keys.stride // GROUP * -(-experts // rounding_keys._SUMMARY_BLOCK)
            _run(kernel, programs, (logits, keys.marks, keys.summaries), sizes)
        results.append((keys, *winners))
    (written, *winners), (keys, *others) = results
    table = written.table
    assert torch.equal((table[:, :tokens] >= 0).sum(0), torch.full((tokens,), top_k))
    assert torch.equal(keys.summaries, summaries_of(table, tokens))
    assert all(map(torch.equal, winners, others))


def _overlapping(compiled, policy, without_wait):  # noqa: F811
    """Winners, summaries, and selection for the first six experts, launched together; the counts
    and loads of these, and how many tokens chose them."""
    tokens, experts, top_k, tile, few = 75, 300, 3, 4, 6
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[:, :few] += 2
    keys, *winners = rounding_keys.keys_of_logits(logits, top_k, False, True)
    stride = keys.stride
    groups = stride // GROUP
    words, before = _poisoned(groups, experts), _poisoned(groups, experts)
    counts, load = _poisoned(experts), _poisoned(experts)
    scratch = _poisoned(rounding_select.scratch_size(tokens, experts, tile, "up"))
    decisions = rounding_select.Decisions(words, before, counts, load)
    rounding_select.decide(keys, None, decisions, scratch, tokens, tile, "up")
    for result in (keys.marks, keys.summaries, *winners):
        result.fill_(-99)
    chosen = load, logits, keys.marks, keys.summaries, counts, words, before, scratch
    sizes = tokens, experts, experts, stride
    programs = stride // rounding_keys._winner_blocks(512, logits.itemsize)[0]
    machine = _machine((*chosen, *winners), policy)
    for name, grid, arrays, numbers in (
        ("_logit_scores_kernel", programs, (logits, keys.marks, *winners), sizes),
        ("_summaries_kernel", 2 * groups, (logits, keys.marks, keys.summaries), sizes),
        ("_select_kernel", few, chosen, (tokens, experts, groups, experts, stride, tile)),
    ):
        (kernel,) = compiled[name]
        wait = name != without_wait
        program, block, shared, raw = _launch_of(kernel, arrays, numbers, wait)
        machine.enqueue(program, (grid, 1, 1), block, (1, 1, 1), shared, raw, programmatic=True)
    machine.synchronize()
    return counts[:few], load[:few], winners[1].flatten().bincount(minlength=experts)[:few]


@pytest.mark.parametrize("seed", range(2))
def test_launches_that_overlap(compiled, seed):  # noqa: F811
    counts, load, expected = _overlapping(compiled, Policy(seed), None)
    assert torch.equal(load.long(), expected) and expected.all()
    assert torch.equal(counts, (load + 3) // 4 * 4)


@pytest.mark.parametrize("name", ["_summaries_kernel", "_select_kernel"])
def test_a_launch_that_overlaps_has_to_wait(compiled, name):  # noqa: F811
    with pytest.raises(Fault, match="race: "):
        for seed in range(4):
            _overlapping(compiled, Policy(seed), name)
