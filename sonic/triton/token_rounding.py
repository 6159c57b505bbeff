"""Token rounding: every expert's row count becomes a multiple of the tile, and the routing plan of
the pairs that are kept follows in the same launches.

T tokens, E experts, S slots. Three launches, four where there is no table of keys, two more of the
rule ``balance-f``, and three more of given scores with E > 4096, which find the winners first::

    keys     how experts rank tokens, of given scores           sonic.triton.rounding_keys
             the same of logits, with their winners             sonic.triton.rounding_winners
             what is known of 32 tokens, of or without a table  sonic.triton.rounding_summaries
    select   counts, and a verdict on every token and expert    sonic.triton.rounding_select
             which tokens to add or to drop                     sonic.triton.rounding_search
    emit     pairs, slots and rows, read off the verdicts

and one for the gradient. Nothing is sorted, and no kernel uses an atomic.

Source: SonicMoE (arXiv 2512.14080), algorithms 4 and 6.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sonic.triton.common import (
    cdiv,
    check_float,
    check_shape,
    device_of,
    power_of_2,
    row_major,
)
from sonic.triton.launch import Fixed, Launcher, wait_for_earlier_launches
from sonic.triton.rounding_keys import GROUP, Keys, _load_keys, _score_of, keys_of_scores
from sonic.triton.rounding_select import Decisions, decide, scratch_size
from sonic.triton.rounding_summaries import are_summarized, popcount
from sonic.triton.rounding_winners import keys_of_logits

_TAIL = 1024  # slots that a program clears
_MAX_PAIRS = 512  # whose rows and weights are found at once
_MAX_BLOCK_E = 512
_PARTS = 16  # of a block of experts
_MOST_AT_ONCE = 64  # experts of which all pairs of a group are looked at; two words hold no more


class Rounded(NamedTuple):
    """Results by slot and by row; see :func:`sonic.token_rounding` and :class:`sonic.RoutingPlan`.

    ``token_ids`` may be None, all else is there.
    """

    weights: torch.Tensor
    token_ids: torch.Tensor | None
    expert_ids: torch.Tensor
    offset_by_expert: torch.Tensor
    token_by_row: torch.Tensor
    slot_by_row: torch.Tensor
    row_by_slot: torch.Tensor
    offset_by_token: torch.Tensor


# --- pairs, slots and rows ------------------------------------------------------------------------


@triton.jit
def _write_first_rows(
    words,
    counts_before,
    counts,
    first_rows,
    offset_by_expert,
    line,
    num_experts,
    is_first,
    BLOCK_E: tl.constexpr,
    PART: tl.constexpr,
):
    """first_rows[expert]: row of the expert's first pair in this group. Returns the pairs of each
    of the group's tokens, those of all earlier tokens, and the last block's words by token."""
    block = tl.arange(0, BLOCK_E)
    size = tl.zeros([GROUP], tl.int32)
    before = 0
    first_row = 0
    offset_limit = tl.where(is_first, num_experts, 0)
    kept = tl.zeros([BLOCK_E // PART, GROUP], tl.int32)
    for start in range(0, num_experts, BLOCK_E):
        expert = start + block
        inside = expert < num_experts
        earlier = tl.load(counts_before + line + expert, mask=inside, other=0)
        count = tl.load(counts + expert, mask=inside, other=0)
        offset = first_row + tl.cumsum(count, axis=0) - count
        tl.store(first_rows + line + expert, offset + earlier, mask=inside)
        tl.store(offset_by_expert + expert, offset, mask=expert < offset_limit)
        kept = _words_by_token(words + line, start, num_experts, BLOCK_E, PART)
        size += tl.sum(popcount(kept), axis=0)
        before += tl.sum(earlier, axis=0)
        first_row += tl.sum(count, axis=0)
    one = tl.arange(0, 1)
    tl.store(offset_by_expert + num_experts + one, first_row, mask=one < tl.where(is_first, 1, 0))
    return size, before, kept


@triton.jit
def _words_by_token(words, start, num_experts, BLOCK_E: tl.constexpr, PART: tl.constexpr):
    """(BLOCK_E / PART, GROUP) int32: bit i of a word is whether expert i of the part keeps the
    token. The verdicts' words have a bit for each token instead."""
    member = tl.arange(0, PART)
    expert = start + PART * tl.arange(0, BLOCK_E // PART)[None, :] + member[:, None]
    word = tl.load(words + expert, mask=expert < num_experts, other=0)
    # A warp for each part, so that sums over its experts stay inside a thread.
    bit = (word[:, :, None] >> tl.arange(0, GROUP)[None, None, :]) & 1
    return tl.sum(bit << member[:, None, None], axis=0)


@triton.jit
def _row_of(pair, words, first_rows, line, live):
    """Expert and row of pairs of a group: GROUP times the expert plus the token's place."""
    expert = pair // GROUP
    word = tl.load(words + line + expert, mask=live, other=0)
    row = tl.load(first_rows + line + expert, mask=live, other=0)
    return expert, row + popcount(word & ((1 << (pair % GROUP)) - 1))


@triton.jit
def _load_weight(
    keys, logits, marks, scores, token, expert, stride, key_stride, live, BITS: tl.constexpr
):
    """fp32 scores of pairs, from scores, or if there are none from keys."""
    if scores is not None:
        address = scores + token.to(tl.int64) * stride + expert
        return tl.load(address, mask=live, other=0.0).to(tl.float32)
    else:
        key = _load_keys(keys, logits, marks, token, expert, live, stride, key_stride, BITS)
        return _score_of(key)


@triton.jit
def _store_slots(weights, token_ids, expert_ids, row_by_slot, slot, values, mask):
    weight, token, expert, row = values
    tl.store(weights + slot, weight, mask=mask)
    if token_ids is not None:
        tl.store(token_ids + slot, token, mask=mask)
    tl.store(expert_ids + slot, expert, mask=mask)
    tl.store(row_by_slot + slot, row, mask=mask)


@triton.jit
def _store_pairs(rounded, slot, values, mask):
    """Pairs, by their slots and by their rows."""
    weights, token_ids, expert_ids, by_expert, token_by_row, slot_by_row, row_by_slot, by_token = (
        rounded
    )
    token, row = values[1], values[3]
    _store_slots(weights, token_ids, expert_ids, row_by_slot, slot, values, mask)
    tl.store(token_by_row + row, token, mask=mask)
    tl.store(slot_by_row + row, slot, mask=mask)


@triton.jit
def _store_offsets(offset_by_token, slot_by_token, size, token, num_tokens):
    tl.store(offset_by_token + token, slot_by_token, mask=token < num_tokens)
    tl.store(offset_by_token + token + 1, slot_by_token + size, mask=token == num_tokens - 1)


@triton.jit
def _kept_before(bit, expert, BLOCK_E: tl.constexpr):
    """Of bits (BLOCK_E, GROUP), BLOCK_E at most 64, the sum over earlier experts, and over all."""
    tl.static_assert(BLOCK_E <= 64)
    mine = bit << (expert & 31)
    below = (1 << (expert & 31)) - 1
    if BLOCK_E <= 32:
        word = tl.sum(mine, axis=0)
        return popcount(word[None, :] & below), popcount(word)
    else:
        low = tl.sum(tl.where(expert < 32, mine, 0), axis=0)
        high = tl.sum(tl.where(expert < 32, 0, mine), axis=0)
        size = popcount(low)
        before = popcount(tl.where(expert < 32, low[None, :], high[None, :]) & below)
        return before + tl.where(expert < 32, 0, size[None, :]), size + popcount(high)


@triton.jit
def _emit_group_of_few(
    words, counts_before, counts, keys, scores, rounded, sizes, BLOCK_E: tl.constexpr
):
    """All pairs of a group of tokens at once, where a block has all experts and keys have a table:
    what is not a pair is looked at too, and but for scores nothing waits for memory twice."""
    by_expert, by_token = rounded[3], rounded[7]
    group, num_tokens, num_experts, stride, key_stride = sizes
    line = group.to(tl.int64) * num_experts
    expert = tl.arange(0, BLOCK_E)
    inside = expert < num_experts
    word = tl.load(words + line + expert, mask=inside, other=0)
    earlier = tl.load(counts_before + line + expert, mask=inside, other=0)
    count = tl.load(counts + expert, mask=inside, other=0)
    lane = tl.arange(0, GROUP)
    token = group * GROUP + lane
    # Tokens first, as compilers want what they store to places that may be anywhere, and single
    # ones, so that threads have as much of what they load as of what they store.
    member = tl.max_contiguous(token[:, None], [1, 1])
    mask = inside[None, :] & (member < num_tokens)
    if scores is None:
        weight = _load_weight(
            keys, None, None, None, member, expert[None, :], stride, key_stride, mask, 0
        )
    offset = tl.cumsum(count, axis=0) - count
    is_first = group == 0
    tl.store(by_expert + expert, offset, mask=expert < tl.where(is_first, num_experts, 0))
    one = tl.arange(0, 1)
    end = by_expert + num_experts + one
    tl.store(end, tl.sum(count, axis=0), mask=one < tl.where(is_first, 1, 0))

    bit = (word[:, None] >> lane[None, :]) & 1
    row = (offset + earlier)[:, None] + popcount(word[:, None] & ((1 << lane) - 1)[None, :])
    rank, size = _kept_before(bit, expert[:, None], BLOCK_E)
    # Pairs of earlier groups have lower tokens, and so lower slots, whatever their expert.
    slot_by_token = tl.sum(earlier, axis=0) + tl.cumsum(size, axis=0) - size
    _store_offsets(by_token, slot_by_token, size, token, num_tokens)
    row, slot, live = tl.trans(row), tl.trans(slot_by_token[None, :] + rank), tl.trans(bit != 0)
    if scores is not None:
        # Lines of these are tokens, which a thread would have one each of.
        weight = _load_weight(
            None, None, None, scores, member, expert[None, :], stride, key_stride, live, 0
        )
    _store_pairs(rounded, slot, (weight, member, expert[None, :], row), live)


@triton.jit
def _emit_group(
    words,
    counts_before,
    counts,
    first_rows,
    keys,
    logits,
    marks,
    scores,
    rounded,
    sizes,
    BITS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PART: tl.constexpr,
    ONE: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The pairs of a group of tokens. They are put in order of their slots first, so that threads
    next to one another write slots that are; until then ``row_by_slot`` holds them."""
    by_expert, row_by_slot, by_token = rounded[3], rounded[6], rounded[7]
    group, num_tokens, num_experts, stride, key_stride = sizes
    line = group.to(tl.int64) * num_experts
    size, before, left = _write_first_rows(
        words, counts_before, counts, first_rows, by_expert, line, num_experts, group == 0, BLOCK_E,
        PART,
    )  # fmt: skip
    lane = tl.arange(0, GROUP)
    token = group * GROUP + lane
    # Pairs of earlier groups have lower tokens, and so lower slots, whatever their expert.
    slot_by_token = before + tl.cumsum(size, axis=0) - size
    _store_offsets(by_token, slot_by_token, size, token, num_tokens)
    for start in range(0, num_experts, BLOCK_E):
        if not ONE:
            left = _words_by_token(words + line, start, num_experts, BLOCK_E, PART)
        number = popcount(left)
        slot = slot_by_token[None, :] + tl.cumsum(number, axis=0) - number
        slot_by_token += tl.sum(number, axis=0)
        first = start + PART * tl.arange(0, BLOCK_E // PART)[None, :]
        # Tokens first, as compilers want what they store to places that may be anywhere.
        rest, place = tl.trans(left), tl.trans(slot)
        # Few experts of a part keep a token, so that these go one by one.
        for _ in range(0, tl.max(tl.max(number, axis=0), axis=0)):
            expert = first + popcount((rest & -rest) - 1)
            tl.store(row_by_slot + place, expert * GROUP + lane[:, None], mask=rest != 0)
            rest = rest & (rest - 1)
            place += 1
    # Orders the pairs, and the first rows, that other threads wrote before the loads below.
    tl.debug_barrier()
    total = tl.sum(size, axis=0)
    for start in range(0, total, PAIRS):
        slot = before + start + tl.arange(0, PAIRS)
        live = slot < before + total
        pair = tl.load(row_by_slot + slot, mask=live, other=0)
        expert, row = _row_of(pair, words, first_rows, line, live)
        member = group * GROUP + pair % GROUP
        weight = _load_weight(
            keys, logits, marks, scores, member, expert, stride, key_stride, live, BITS
        )
        _store_pairs(rounded, slot, (weight, member, expert, row), live)


@triton.jit(do_not_specialize=["num_tokens", "num_groups", "num_slots"])
def _emit_kernel(
    words,
    counts_before,
    counts,
    first_rows,
    keys,
    logits,
    marks,
    scores,
    weights,
    token_ids,
    expert_ids,
    offset_by_expert,
    token_by_row,
    slot_by_row,
    row_by_slot,
    offset_by_token,
    num_tokens,
    num_experts,
    num_groups,
    num_slots,
    stride,
    key_stride,
    BITS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PART: tl.constexpr,
    ONE: tl.constexpr,
    PAIRS: tl.constexpr,
    TAIL: tl.constexpr,
):
    """The first ``num_groups`` programs write a group of tokens each, the others what lies behind
    the last pair. ``stride`` is that of scores or logits, ``key_stride`` that of the table of keys.
    ONE: a block holds all experts. Without ``first_rows`` these are few."""
    wait_for_earlier_launches()
    pid = tl.program_id(0)
    if pid < num_groups:
        rounded = (
            weights, token_ids, expert_ids, offset_by_expert, token_by_row, slot_by_row,
            row_by_slot, offset_by_token,
        )  # fmt: skip
        sizes = pid, num_tokens, num_experts, stride, key_stride
        if first_rows is None:
            _emit_group_of_few(words, counts_before, counts, keys, scores, rounded, sizes, BLOCK_E)
        else:
            _emit_group(
                words, counts_before, counts, first_rows, keys, logits, marks, scores, rounded,
                sizes, BITS, BLOCK_E, PART, ONE, PAIRS,
            )  # fmt: skip
    else:
        total = 0
        for start in range(0, num_experts, BLOCK_E):
            expert = start + tl.arange(0, BLOCK_E)
            count = tl.load(counts + expert, mask=expert < num_experts, other=0)
            total += tl.sum(count, axis=0)
        index = (pid - num_groups).to(tl.int64) * TAIL + tl.arange(0, TAIL)
        dead = (index >= total) & (index < num_slots)
        values = 0.0, num_tokens, num_experts, -1
        _store_slots(weights, token_ids, expert_ids, row_by_slot, index, values, dead)
        tl.store(token_by_row + index, -1, mask=dead)
        tl.store(slot_by_row + index, -1, mask=dead)


# --- gradients ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_slots", "num_tokens"])
def _scatter_kernel(
    dweights,
    token_ids,
    expert_ids,
    dscores,
    num_slots,
    num_tokens,
    num_experts,
    BLOCK: tl.constexpr,
):
    """dscores (T, E), zero before; pairs are distinct, so that no two slots meet."""
    wait_for_earlier_launches()
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < num_slots
    token = tl.load(token_ids + slot, mask=inside, other=num_tokens).to(tl.int64)
    live = token < num_tokens
    expert = tl.load(expert_ids + slot, mask=live, other=0)
    value = tl.load(dweights + slot, mask=live, other=0.0)
    tl.store(dscores + token * num_experts + expert, value.to(dscores.dtype.element_ty), mask=live)


@triton.jit
def _load_pairs(dweights, weights, first, size, start, PAIRS: tl.constexpr):
    """Slots (ROWS, PAIRS) of each row's pairs from the ``start``-th on, whether there are as many,
    their weights and these weights' gradients."""
    index = start + tl.arange(0, PAIRS)
    slot = first[:, None] + index[None, :]
    live = index[None, :] < size[:, None]
    weight = tl.load(weights + slot, mask=live, other=0.0)
    return slot, live, weight, tl.load(dweights + slot, mask=live, other=0.0)


@triton.jit
def _load_winners(
    winner_ids, winner_scores, token, is_token, TOP_K: tl.constexpr, K_PAD: tl.constexpr
):
    """Ids and scores (ROWS, K_PAD) of the tokens' winners, and which of them there are."""
    lane = tl.arange(0, K_PAD)[None, :]
    is_slot = is_token[:, None] & (lane < TOP_K)
    slot = token.to(tl.int64)[:, None] * TOP_K + lane
    winner = tl.load(winner_ids + slot, mask=is_slot, other=0)
    return winner, tl.load(winner_scores + slot, mask=is_slot, other=0.0), is_slot


@triton.jit
def _is_winner(expert, winner_ids, token, is_token, TOP_K: tl.constexpr):
    """Whether an entry of ``expert`` (ROWS, any) is among its token's winners."""
    result = expert < 0
    for rank in range(TOP_K):
        address = winner_ids + token.to(tl.int64) * TOP_K + rank
        winner = tl.load(address, mask=is_token, other=-1)
        result = result | (expert == winner[:, None])
    return result


@triton.jit(do_not_specialize=["num_tokens"])
def _logit_grad_kernel(
    dweights,
    weights,
    expert_ids,
    offset_by_token,
    winner_scores,
    winner_ids,
    lse_by_token,
    logits,
    dlogits,
    num_tokens,
    num_experts,
    stride,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """With w and d the kept pairs' weights and their gradients, and p the sum of w d over a token:
    ``w d`` at its pairs, less ``score p`` at its winners, or at all experts if there are logits."""
    wait_for_earlier_launches()
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = token < num_tokens
    first = tl.load(offset_by_token + token, mask=is_token, other=0)
    size = tl.load(offset_by_token + token + 1, mask=is_token, other=0) - first
    if logits is None:
        winner, score, is_slot = _load_winners(
            winner_ids, winner_scores, token, is_token, TOP_K, K_PAD
        )
    # Nearly always all pairs there are: what is wanted of them behind the barriers is loaded here.
    slot, live, weight, dweight = _load_pairs(dweights, weights, first, size, 0, PAIRS)
    kept_by = tl.load(expert_ids + slot, mask=live, other=0)
    most = tl.max(size, axis=0)
    projection = tl.zeros([ROWS], tl.float32) + tl.sum(weight * dweight, axis=1)
    for start in range(PAIRS, most, PAIRS):
        _, _, other_weight, other_dweight = _load_pairs(
            dweights, weights, first, size, start, PAIRS
        )
        projection += tl.sum(other_weight * other_dweight, axis=1)

    line = token.to(tl.int64)[:, None] * num_experts
    for start in range(0, num_experts, BLOCK_E):
        expert = start + tl.arange(0, BLOCK_E)[None, :]
        inside = is_token[:, None] & (expert < num_experts)
        dense = tl.zeros([ROWS, BLOCK_E], tl.float32)
        if logits is not None:
            lse = tl.load(lse_by_token + token, mask=is_token, other=0.0)
            address = logits + token.to(tl.int64)[:, None] * stride + expert
            value = tl.load(address, mask=inside, other=0.0).to(tl.float32)
            dense -= tl.exp(value - lse[:, None]) * projection[:, None]
        tl.store(dlogits + line + expert, dense.to(dlogits.dtype.element_ty), mask=inside)
    # Orders the stores to the same places, which other threads may do.
    tl.debug_barrier()
    if logits is None:
        taken = -score * projection[:, None]
        tl.store(dlogits + line + winner, taken.to(dlogits.dtype.element_ty), mask=is_slot)
        tl.debug_barrier()
    for start in range(0, most, PAIRS):
        if start > 0:
            slot, live, weight, dweight = _load_pairs(dweights, weights, first, size, start, PAIRS)
            kept_by = tl.load(expert_ids + slot, mask=live, other=0)
        share = weight * projection[:, None]
        if logits is None:
            chosen = _is_winner(kept_by, winner_ids, token, is_token, TOP_K)
            share = tl.where(chosen, share, 0.0)
        # Whether these are one instruction is left to compilers otherwise; a minus would subtract
        # from zero.
        result = tl.fma(weight, dweight, share * -1.0)
        tl.store(dlogits + line + kept_by, result.to(dlogits.dtype.element_ty), mask=live)


# --- launchers ------------------------------------------------------------------------------------


_emit_pairs = Launcher(_emit_kernel, overlapping=True)
_scatter = Launcher(_scatter_kernel, overlapping=True)
_logit_grad = Launcher(_logit_grad_kernel, overlapping=True)


def _emit(
    keys: Keys,
    scores: torch.Tensor | None,
    uniform: torch.Tensor | None,
    shape: torch.Size,
    tile: int,
    rule: str,
    num_slots: int,
    with_token_ids: bool,
) -> tuple[Rounded, torch.Tensor]:
    """Pairs and plan of the keys, and how many tokens chose each expert (E,)."""
    num_tokens, num_experts = shape
    table, logits, marks, *_ = keys
    rows = logits if scores is None else scores
    device = keys.device
    num_groups = cdiv(num_tokens, GROUP.value)
    options: dict[str, Any] = {"dtype": torch.int32, "device": device}
    verdicts = num_groups, num_experts
    words = torch.empty(verdicts, **options) if keys.words is None else keys.words
    before = torch.empty(verdicts, **options)
    at_once = table is not None and num_experts <= _MOST_AT_ONCE
    first_rows = None if at_once else torch.empty(verdicts, **options)
    counts, load = torch.empty(num_experts, **options), torch.empty(num_experts, **options)
    scratch_elements = scratch_size(keys, num_tokens, num_experts, tile, rule)
    decide(
        keys,
        uniform,
        Decisions(words, before, counts, load),
        torch.empty(scratch_elements, **options),
        num_tokens,
        tile,
        rule,
    )
    rounded = Rounded(
        weights=torch.empty(num_slots, dtype=torch.float32, device=device),
        token_ids=torch.empty(num_slots, **options) if with_token_ids else None,
        expert_ids=torch.empty(num_slots, **options),
        offset_by_expert=torch.empty(num_experts + 1, **options),
        token_by_row=torch.empty(num_slots, **options),
        slot_by_row=torch.empty(num_slots, **options),
        row_by_slot=torch.empty(num_slots, **options),
        offset_by_token=torch.empty(num_tokens + 1, **options),
    )
    launch = _emit_launch(
        num_tokens, num_experts, num_slots, 0 if rows is None else rows.stride(0), keys.stride,
        keys.bits, at_once,
    )  # fmt: skip
    launch(words, before, counts, first_rows, table, logits, marks, scores, *rounded)
    return rounded, load


@functools.lru_cache(maxsize=4096)
def _emit_launch(
    num_tokens: int,
    num_experts: int,
    num_slots: int,
    row_stride: int,
    key_stride: int,
    bits: int,
    at_once: bool,
) -> Fixed:
    num_groups = cdiv(num_tokens, GROUP.value)
    block_e = min(_MAX_BLOCK_E, max(_PARTS, power_of_2(num_experts)))
    # Pairs at once have no use for their number: one kernel for all of it.
    pairs = 1 if at_once else min(_MAX_PAIRS, max(128, power_of_2(cdiv(num_slots, num_groups))))
    kernel = _emit_pairs.bind(
        BITS=bits,
        BLOCK_E=block_e,
        PART=block_e // _PARTS,
        ONE=num_experts <= block_e,
        PAIRS=pairs,
        TAIL=_TAIL,
        num_warps=4,
    )
    sizes = num_tokens, num_experts, num_groups, num_slots, row_stride, key_stride
    return kernel.fix(num_groups + cdiv(num_slots, _TAIL), *sizes)


def round_tokens(
    scores: torch.Tensor,
    uniform: torch.Tensor | None,
    top_k: int,
    tile: int,
    rule: str,
    num_slots: int,
) -> Rounded:
    """Kept pairs and their routing plan.

    Args:
        scores: (T, E) bf16, fp16 or fp32, T at least 1.
        uniform: (E,) fp32 in [0, 1), for ``"sr"`` and ``"nr-s"``.
        top_k: 1 to min(64, E). tile: at least 1. rule: see :mod:`sonic.routing.token_rounding`.
        num_slots: S, a bound on the pairs that are kept.

    Returns:
        ``weights`` (S,) fp32, ``token_ids`` and ``expert_ids`` (S,) int32, then the five tensors of
        a :class:`sonic.RoutingPlan` in its order: its slots lie by token.
    """
    check_float("token_rounding", scores=scores)
    _check_uniform(scores, uniform)
    scores = row_major(scores)
    with device_of(scores):
        keys = Keys(keys_of_scores(scores, top_k))
        return _emit(keys, scores, uniform, scores.shape, tile, rule, num_slots, True)[0]


def round_logits(
    logits: torch.Tensor,
    uniform: torch.Tensor | None,
    top_k: int,
    tile: int,
    rule: str,
    num_slots: int,
    full: bool,
) -> tuple[Rounded, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`round_tokens` of the scores that the logits give, which are in memory as a table of
    keys at most.

    Args:
        logits: (T, E) bf16, fp16 or fp32, T at least 1, E at most
            :data:`sonic.triton.rounding_winners.MAX_EXPERTS`.
        full: scores are a softmax over all experts, not over the winners.

    Returns:
        The pairs and their plan without ``token_ids``, ``load (E,)`` int32: tokens that chose the
        expert, then ``winner_scores (T, top_k)``, ``winner_ids (T, top_k)`` and ``lse (T,)`` for
        :func:`round_logits_grad`.
    """
    check_float("token_rounding", logits=logits)
    _check_uniform(logits, uniform)
    logits = row_major(logits)
    with device_of(logits):
        # Counts that depend on one another are read off a table.
        summarized = rule != "balance-f" and are_summarized(logits)
        keys, *winners = keys_of_logits(logits, top_k, full, summarized)
        rounded, load = _emit(keys, None, uniform, logits.shape, tile, rule, num_slots, False)
    return rounded, load, winners[0], winners[1], winners[2]


def _check_uniform(table: torch.Tensor, uniform: torch.Tensor | None) -> None:
    if uniform is not None:
        check_shape("token_rounding", "uniform", uniform, (table.shape[1],))


def round_tokens_grad(
    dweights: torch.Tensor,
    token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens: int,
    num_experts: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(T, E) gradient of the scores: ``dweights`` at the kept pairs, zero elsewhere."""
    num_slots = dweights.shape[0]
    dscores = torch.zeros(num_tokens, num_experts, dtype=dtype, device=dweights.device)
    if num_slots == 0:
        return dscores
    with device_of(dweights):
        _scatter(
            cdiv(num_slots, 512),
            dweights.contiguous(),
            token_ids,
            expert_ids,
            dscores,
            num_slots,
            num_tokens,
            num_experts,
            BLOCK=512,
            num_warps=4,
        )
    return dscores


def round_logits_grad(
    dweights: torch.Tensor,
    weights: torch.Tensor,
    expert_ids: torch.Tensor,
    offset_by_token: torch.Tensor,
    winner_scores: torch.Tensor,
    winner_ids: torch.Tensor,
    lse: torch.Tensor,
    logits: torch.Tensor | None,
    num_experts: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(T, E) gradient of the logits of :func:`round_logits`, rounded once.

    Args:
        dweights, weights: (S,) fp32. expert_ids: (S,). offset_by_token: (T + 1,).
        winner_scores, winner_ids: (T, top_k). lse: (T,).
        logits: (T, E) if the scores were a softmax over all experts, else None.
        dtype: of the result.
    """
    num_tokens, top_k = winner_ids.shape
    dlogits = torch.empty(num_tokens, num_experts, dtype=dtype, device=weights.device)
    if num_tokens == 0:
        return dlogits
    if logits is not None:
        logits = row_major(logits)
    row_stride = 0 if logits is None else logits.stride(0)
    with device_of(weights):
        _logit_grad_launch(num_tokens, num_experts, row_stride, top_k)(
            dweights.contiguous(),
            weights,
            expert_ids,
            offset_by_token,
            winner_scores,
            winner_ids,
            lse,
            logits,
            dlogits,
        )
    return dlogits


@functools.lru_cache(maxsize=4096)
def _logit_grad_launch(num_tokens: int, num_experts: int, row_stride: int, top_k: int) -> Fixed:
    rows = 16
    kernel = _logit_grad.bind(
        TOP_K=top_k,
        K_PAD=power_of_2(top_k),
        ROWS=rows,
        BLOCK_E=min(256, power_of_2(num_experts)),
        PAIRS=16,
        num_warps=4,
    )
    return kernel.fix(cdiv(num_tokens, rows), num_tokens, num_experts, row_stride)
