"""Token rounding's selection and plan, compiled by Triton, run in the emulator.

Triton's interpreter runs a program as numpy does, one operation at a time; here warps interleave,
and loads and stores of global memory that no barrier orders are reported.
"""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton

from sonic.reference import plan_oracle_flat
from sonic.routing import max_pairs
from sonic.routing.token_rounding import flat_plan
from sonic.triton import rounding_keys, rounding_select, token_rounding
from sonic.triton.rounding_keys import Ranked
from sonic.triton.topk import HIGHEST
from tests.cpu.test_triton_compile import compiled  # noqa: F401
from tests.emulator import Policy, ptx
from tests.emulator.program import Program
from tests.emulator.snippet import machine_for
from tests.routing_checks import assert_same_plan

pytestmark = pytest.mark.skipif(
    bool(triton.knobs.runtime.interpret), reason="TRITON_INTERPRET is set: nothing compiles"
)

EXPERTS = 3
SHARES = (0.2, 0.21, 0.9)  # of the tokens, that choose an expert
GROUP = rounding_keys.GROUP.value


def _choices(tokens, ties, seed):
    """Scores and choices (E, T)."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(EXPERTS, tokens, generator=generator)
    if ties:
        scores = (4 * scores).round() / 4
    chosen = torch.rand(EXPERTS, tokens, generator=generator) < torch.tensor(SHARES)[:, None]
    return scores, chosen


def _by_group(values, fill):
    """(groups, E, GROUP) of (E, T), with something behind the last token."""
    values = torch.nn.functional.pad(values, (0, -values.shape[1] % GROUP), value=fill)
    return values.view(EXPERTS, -1, GROUP).transpose(0, 1)


def _words(bits):
    """(groups, E) int32 from the bits (E, T) of their tokens."""
    words = (_by_group(bits, False).long() << torch.arange(GROUP)).sum(2)
    return (words - ((words >> 31) << 32)).to(torch.int32)


def _ranked(scores, chosen):
    bits = scores.view(torch.int32)
    ranks = torch.where(chosen, HIGHEST.value - bits, -1), torch.where(chosen, -1, bits)
    tops = torch.stack([_by_group(rank, -1).amax(2) for rank in ranks])
    return Ranked(scores.t().contiguous(), None, _words(chosen), tops)


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


def _run(kernel, arrays, sizes, programs):
    """The compiled kernel, on the arrays, in the emulator."""
    (parsed,) = ptx.parse(kernel.asm["ptx"]).values()
    values = [*(array.data_ptr() for array in arrays), *sizes, 0, 0]  # no scratch of Triton's own
    raw = [
        int(value).to_bytes(parameter[1], "little")
        for parameter, value in zip(parsed.params, values, strict=True)
    ]
    machine = machine_for([a.numpy().view(np.uint8).reshape(-1) for a in arrays], Policy(0))
    # Triton lets warps that hold the same value store it to one place of shared memory; order on
    # global memory is still checked.
    machine.race_check = False
    block = 32 * kernel.metadata.num_warps, 1, 1
    shared = kernel.metadata.shared
    machine.launch(Program(parsed), (programs, 1, 1), block, (1, 1, 1), shared, raw)


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize(
    ("tokens", "tile", "rule"),
    [(3000, 128, "nr"), (3001, 100, "up"), (3000, 128, "down"), (1500, 700, "down")],
)
def test_selection(compiled, tokens, tile, rule, ties):  # noqa: F811
    scores, chosen = _choices(tokens, ties, seed=tokens)
    ranked = _ranked(scores, chosen)
    groups = -(-tokens // GROUP)

    before = _poisoned(groups, EXPERTS)
    counts, load = _poisoned(EXPERTS), _poisoned(EXPERTS)
    scratch = _poisoned(rounding_select.scratch_size(tokens, EXPERTS, tile, rule))
    decisions = rounding_select.Decisions(before, counts, load)
    rounding_select.decide(ranked, None, decisions, scratch, tile, rule)
    (kernel,) = compiled["_select_kernel"]

    arrays = ranked.table, ranked.words, ranked.tops, counts, load, before, scratch
    _run(kernel, arrays, (tokens, EXPERTS, groups, EXPERTS, tile), EXPERTS)

    kept = _kept(scores, chosen, tile, rule)
    assert torch.equal(ranked.words, _words(kept))
    sizes = _by_group(kept, False).sum(2)
    assert torch.equal(before.long(), sizes.cumsum(0) - sizes)
    assert torch.equal(counts.long(), kept.sum(1)) and torch.equal(load.long(), chosen.sum(1))
    assert not torch.equal(kept, chosen)
    # Where few tokens are left they are compared with one another, where many tie they are not.
    room = rounding_select._room(tokens, tile, rule)
    lists = 2 * rounding_select._list_size(tokens, tile, rule)
    found = scratch.view(EXPERTS, -1)[:, lists : lists + 2 * room]
    changed = counts != load
    assert (found[changed] != -99).any(1).all() != (ties or tile > 2 * room)


def test_pairs_and_plan(compiled):  # noqa: F811
    """Slots, rows and what lies behind them, from verdicts."""
    tokens, tile = 70, 16
    scores, chosen = _choices(tokens, False, seed=1)
    ranked = _ranked(scores, chosen)._replace(words=_words(chosen))
    slots = max_pairs(tokens, EXPERTS, EXPERTS, tile, "down")
    rounded, _ = token_rounding._emit(ranked, None, tile, "down", slots, True)
    (kernel,) = compiled["_emit_kernel"]

    sizes = _by_group(chosen, False).sum(2)
    before = (sizes.cumsum(0) - sizes).to(torch.int32)
    counts, groups = chosen.sum(1).to(torch.int32), len(before)
    for values in rounded:
        values.view(torch.int32).fill_(-99)
    first_rows, pairs = _poisoned(groups, EXPERTS), _poisoned(slots)
    arrays = ranked.table, ranked.words, before, counts, first_rows, pairs, *rounded
    _run(kernel, arrays, (tokens, EXPERTS, groups, slots, EXPERTS), groups + 1)

    token_ids, expert_ids = chosen.t().nonzero().unbind(1)
    live = len(token_ids)
    assert torch.equal(rounded.token_ids[:live].long(), token_ids)
    assert torch.equal(rounded.expert_ids[:live].long(), expert_ids)
    assert torch.equal(rounded.weights[:live], scores[expert_ids, token_ids])
    assert not rounded.weights[live:].any() and (rounded.token_ids[live:] == tokens).all()
    plan = plan_oracle_flat(rounded.token_ids, rounded.expert_ids, tokens, EXPERTS)
    assert_same_plan(flat_plan(rounded[3:], tokens), plan)
