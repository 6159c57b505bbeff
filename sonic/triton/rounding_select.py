"""Token rounding's decisions: how many tokens each expert keeps, and which.

M is the tile. An expert keeps as many of its preferred tokens as its rounded count says. Its column
of keys (see :mod:`sonic.triton.rounding_keys`) is read into registers once, and a bisection finds
the key at which the kept tokens end: only the last tile is undecided, and nothing is sorted. What
is left behind is 32 tokens' verdicts in a word, and the expert's kept tokens before them.

Source: SonicMoE (arXiv 2512.14080), algorithms 4 and 6.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sonic.triton.common import power_of_2
from sonic.triton.launch import Launcher
from sonic.triton.rounding_keys import _score_of
from sonic.triton.topk import HIGHEST, LOWEST

GROUP = tl.constexpr(32)  # tokens whose verdicts share a word
BAND = tl.constexpr(128)  # undecided tokens that are compared each with each

_MAX_HELD = 32768  # keys of a column in registers
_MAX_CHUNK_T = 16384
_KEYS_PER_WARP = 1024
_BALANCE_BLOCK = 1024  # experts whose running error is found at once


class Decisions(NamedTuple):
    """``words`` and ``counts_before`` (groups, E): bit i of a word is the verdict on token i of the
    group, ``counts_before`` the expert's kept tokens in earlier groups. ``counts`` (E,): tokens the
    expert keeps, ``load`` (E,): those that chose it. All int32."""

    words: torch.Tensor
    counts_before: torch.Tensor
    counts: torch.Tensor
    load: torch.Tensor


# --- one expert's column --------------------------------------------------------------------------


@triton.jit
def _load_keys(column, start, length, BLOCK: tl.constexpr):
    # The length is a multiple of 16, so that keys move in whole vectors. What pads the column ranks
    # with the least of real keys, and behind it by its index.
    token = start + tl.arange(0, BLOCK)
    return tl.load(column + token, mask=token < length, other=LOWEST)


@triton.jit
def _count_from(column, held, bound, length, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """How many keys are at least ``bound``, which exceeds the least key."""
    if HELD:
        return tl.sum((held >= bound).to(tl.int32), axis=0)
    else:
        count = 0
        for start in range(0, length, BLOCK):
            key = _load_keys(column, start, length, BLOCK)
            count += tl.sum((key >= bound).to(tl.int32), axis=0)
        return count


@triton.jit
def _bracket(held, in_chosen, num_tokens, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """The least key, and one above the greatest, among the tokens that chose the expert or among
    the others; of a column that is not held, bounds of any such key."""
    zero = tl.zeros([], tl.int64)
    if HELD:
        counts = (tl.arange(0, BLOCK) < num_tokens) & ((held >= 0) == in_chosen)
        low = zero + tl.min(tl.where(counts, held, HIGHEST), axis=0)
        high = zero + tl.max(tl.where(counts, held, LOWEST), axis=0) + 1
    else:
        low = zero + tl.where(in_chosen, 0, LOWEST)
        high = zero + tl.where(in_chosen, HIGHEST, -1) + 1
    return low, high


@triton.jit
def _tie_limit(column, held, threshold, ties, length, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """The token below which ``ties`` keys, one or more, equal the threshold; bisected as well."""
    low = 0
    high = length
    while high - low > 1:
        middle = (low + high) >> 1
        if HELD:
            token = tl.arange(0, BLOCK)
            count = tl.sum(((held == threshold) & (token < middle)).to(tl.int32), axis=0)
        else:
            count = 0
            for start in range(0, length, BLOCK):
                key = _load_keys(column, start, length, BLOCK)
                token = start + tl.arange(0, BLOCK)
                count += tl.sum(((key == threshold) & (token < middle)).to(tl.int32), axis=0)
        low = tl.where(count >= ties, low, middle)
        high = tl.where(count >= ties, middle, high)
    return high


@triton.jit
def _words(flags, CHUNK: tl.constexpr):
    """(CHUNK / 32,) int32 of as many tokens' flags, the first in the lowest bit."""
    bits = tl.reshape(flags.to(tl.int32), [CHUNK // GROUP, GROUP])
    return tl.sum(bits << tl.arange(0, GROUP)[None, :], axis=1)


@triton.jit
def popcount(word):
    """Ones in each int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return (word + (word >> 16)) & 0x3F


@triton.jit
def _list_band(
    column, held, low, high, band, num_tokens, length, BLOCK: tl.constexpr, HELD: tl.constexpr
):
    """band (BAND,): the tokens with keys from ``low`` to below ``high``, ascending; there must be
    no more of them."""
    before = 0
    for start in range(0, length, BLOCK):
        key = held
        if not HELD:
            key = _load_keys(column, start, length, BLOCK)
        token = start + tl.arange(0, BLOCK)
        word = _words((key >= low) & (key < high) & (token < num_tokens), BLOCK)
        size = popcount(word)
        place = before + tl.cumsum(size, axis=0) - size
        group = start + GROUP * tl.arange(0, BLOCK // GROUP)
        for step in range(0, tl.max(size, axis=0)):
            lowest = popcount((word & -word) - 1)
            tl.store(band + place + step, group + lowest, mask=step < size)
            word = word & (word - 1)
        before += tl.sum(size, axis=0)


@triton.jit
def _at_rank(column, band, size, rank):
    """Key and token of the listed one that as many others precede: those of greater keys, and of
    equal keys and lower tokens."""
    entry = tl.arange(0, BAND)
    token = tl.load(band + entry, mask=entry < size, other=0)
    key = tl.load(column + token, mask=entry < size, other=LOWEST)
    # The same again by the other axis.
    other = tl.load(band + entry[None, :], mask=entry[None, :] < size, other=0)
    other = tl.load(column + other, mask=entry[None, :] < size, other=LOWEST)
    ahead = (other > key[:, None]) | ((other == key[:, None]) & (entry[None, :] < entry[:, None]))
    here = tl.sum(ahead.to(tl.int32), axis=1) == rank
    return tl.sum(tl.where(here, key, 0), axis=0), tl.sum(tl.where(here, token, 0), axis=0)


@triton.jit
def _threshold(
    column,
    held,
    band,
    want,
    frequency,
    num_tokens,
    length,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
):
    """``(v, t)``: the first ``want`` tokens are those with keys above v, and with keys equal to v
    those below t."""
    in_chosen = want <= frequency
    # At least `want` keys reach `low`, and `beyond`, of which there are at most as many, `high`.
    beyond = tl.where(in_chosen, 0, frequency)
    reach = tl.where(in_chosen, frequency, num_tokens)
    low, high = _bracket(held, in_chosen, num_tokens, BLOCK, HELD)
    while (high - low > 1) & (reach - beyond > BAND) & (reach > want) & (beyond < want):
        middle = (low + high) >> 1
        count = _count_from(column, held, middle.to(tl.int32), length, BLOCK, HELD)
        enough = count >= want
        low = tl.where(enough, middle, low)
        reach = tl.where(enough, count, reach)
        high = tl.where(enough, high, middle)
        beyond = tl.where(enough, beyond, count)
    threshold, tie_limit = low.to(tl.int32), num_tokens
    if reach > want:
        if beyond == want:
            threshold, tie_limit = (high - 1).to(tl.int32), 0
        elif reach - beyond <= BAND:
            # Few are left: what there was to halve goes by comparing each with each.
            _list_band(column, held, low, high, band, num_tokens, length, BLOCK, HELD)
            # Orders the list, which other threads wrote, before the loads.
            tl.debug_barrier()
            threshold, last = _at_rank(column, band, reach - beyond, want - beyond - 1)
            tie_limit = last + 1
        else:
            tie_limit = _tie_limit(column, held, threshold, want - beyond, length, BLOCK, HELD)
    return threshold, tie_limit


@triton.jit
def _mass_between(column, low, high, length, BLOCK: tl.constexpr):
    """Sum of the scores whose keys lie strictly between two keys, and how many there are."""
    mass = tl.zeros([], tl.float64)
    count = 0
    for start in range(0, length, BLOCK):
        key = _load_keys(column, start, length, BLOCK)
        inside = (key > low) & (key < high)
        mass += tl.sum(tl.where(inside, _score_of(key), 0.0).to(tl.float64), axis=0)
        count += tl.sum(inside.to(tl.int32), axis=0)
    return mass, count


@triton.jit
def _mass_to_the_threshold(column, low, high, threshold, size, length, BLOCK: tl.constexpr):
    """As ``_mass_between``, with as many scores of the threshold's key as make ``size`` of them."""
    mass, count = _mass_between(column, low, high, length, BLOCK)
    rest = size - count
    return mass + tl.where(rest > 0, rest.to(tl.float64) * _score_of(threshold), 0.0)


@triton.jit
def _reachable(frequency, num_tokens, tile):
    """The multiples of the tile next to ``frequency``, below and above; T itself counts as one."""
    lower = tl.where(frequency == num_tokens, frequency, frequency // tile * tile)
    upper = tl.where(lower == frequency, frequency, tl.minimum(lower + tile, num_tokens))
    return lower, upper


@triton.jit
def _store_verdicts(
    words,
    counts_before,
    key,
    first,
    threshold,
    tie_limit,
    kept_before,
    expert,
    num_experts,
    num_groups,
    CHUNK: tl.constexpr,
):
    """Words and counts of the chunk of the column from token ``first`` on; how many it keeps."""
    tied = (key == threshold) & (first + tl.arange(0, CHUNK) < tie_limit)
    word = _words((key > threshold) | tied, CHUNK)
    size = popcount(word)
    group = first // GROUP + tl.arange(0, CHUNK // GROUP)
    offset = group.to(tl.int64) * num_experts + expert
    inside = group < num_groups
    tl.store(words + offset, word, mask=inside)
    tl.store(counts_before + offset, kept_before + tl.cumsum(size, axis=0) - size, mask=inside)
    return tl.sum(size, axis=0)


@triton.jit(do_not_specialize=["num_tokens", "num_groups", "tile"])
def _select_kernel(
    keys,
    uniform,
    count_by_expert,
    load,
    words,
    counts_before,
    bands,
    num_tokens,
    num_experts,
    num_groups,
    key_stride,
    tile,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HELD: tl.constexpr,
):
    """The expert's rounded count; words and counts_before (groups, E). With the rule ``"given"``
    the count is read instead of written. HELD: one block holds the column."""
    expert = tl.program_id(0)
    column = keys + expert.to(tl.int64) * key_stride
    band = bands + expert * BAND
    held = _load_keys(column, 0, key_stride, BLOCK)
    frequency = _count_from(column, held, 0, key_stride, BLOCK, HELD)
    tl.store(load + expert, frequency)
    lower, upper = _reachable(frequency, num_tokens, tile)
    if RULE == "nr-s":
        below, limit_below = _threshold(
            column, held, band, lower, frequency, num_tokens, key_stride, BLOCK, HELD
        )
        # Orders the loads of the list before it is written anew.
        tl.debug_barrier()
        above, limit_above = _threshold(
            column, held, band, upper, frequency, num_tokens, key_stride, BLOCK, HELD
        )
        last = _mass_to_the_threshold(
            column, -1, below, below, frequency - lower, key_stride, BLOCK
        )
        added = _mass_to_the_threshold(
            column, above, 0, above, upper - frequency, key_stride, BLOCK
        )
        goes_up = tl.load(uniform + expert).to(tl.float64) * (last + added) < last
        count = tl.where(goes_up, upper, lower)
        threshold = tl.where(goes_up, above, below)
        tie_limit = tl.where(goes_up, limit_above, limit_below)
    else:
        if RULE == "given":
            count = tl.load(count_by_expert + expert)
        elif RULE == "up":
            count = upper
        elif RULE == "down":
            count = lower
        elif RULE == "nr":
            excess = 2 * (frequency - lower) - (upper - lower)
            odd = (frequency // tile) % 2
            count = tl.where(excess + odd > 0, upper, lower)
        else:
            draw = tl.load(uniform + expert).to(tl.float64)
            goes_up = draw * (upper - lower).to(tl.float64) < (frequency - lower).to(tl.float64)
            count = tl.where(goes_up, upper, lower)
        threshold, tie_limit = _threshold(
            column, held, band, count, frequency, num_tokens, key_stride, BLOCK, HELD
        )
    if RULE != "given":
        tl.store(count_by_expert + expert, count)

    # A longer column is read again, in pieces: its keys and their verdicts need too many registers.
    if HELD and CHUNK == BLOCK:
        _store_verdicts(
            words,
            counts_before,
            held,
            0,
            threshold,
            tie_limit,
            0,
            expert,
            num_experts,
            num_groups,
            BLOCK,
        )
    else:
        kept_before = 0
        for start in range(0, key_stride, CHUNK):
            kept_before += _store_verdicts(
                words,
                counts_before,
                _load_keys(column, start, key_stride, CHUNK),
                start,
                threshold,
                tie_limit,
                kept_before,
                expert,
                num_experts,
                num_groups,
                CHUNK,
            )


# --- counts that depend on one another ------------------------------------------------------------


@triton.jit
def _frequency_kernel(keys, frequency, key_stride, BLOCK: tl.constexpr):
    expert = tl.program_id(0)
    column = keys + expert.to(tl.int64) * key_stride
    count = _count_from(column, 0, 0, key_stride, BLOCK, False)
    tl.store(frequency + expert, count)


@triton.jit
def _wrapped(value, tile):
    """The number congruent to ``value`` that is nearest to zero, from -(tile // 2) up."""
    rest = (value + tile // 2) % tile
    return tl.where(rest < 0, rest + tile, rest) - tile // 2


@triton.jit(do_not_specialize=["num_tokens", "tile"])
def _balance_kernel(frequency, count_by_expert, num_tokens, num_experts, tile, BLOCK: tl.constexpr):
    """Rounds each expert to whichever side leaves the smaller running error, down if equal.

    Rounding down subtracts the expert's excess from the error, rounding up adds a tile besides; so
    the error is the least number congruent to minus the sum of the excesses, a prefix sum. Only an
    expert that can round up to T but not to a whole tile breaks the congruence. There are fewer
    than ``2 top_k`` of these, and they are visited one by one.
    """
    tile = tl.minimum(tile, num_tokens)
    index = tl.arange(0, BLOCK)
    shift = tl.zeros([], tl.int64)
    for start in range(0, num_experts, BLOCK):
        mask = start + index < num_experts
        count = tl.load(frequency + start + index, mask=mask, other=0)
        lower, upper = _reachable(count, num_tokens, tile)
        excess = (count - lower).to(tl.int64)
        gap = (upper - lower).to(tl.int64)
        residue = shift - (tl.cumsum(excess, axis=0) - excess)
        short = (gap > 0) & (gap < tile)
        for _ in range(0, tl.sum(short.to(tl.int32), axis=0)):
            first = tl.min(tl.where(short, index, BLOCK), axis=0)
            here = index == first
            down = tl.sum(tl.where(here, _wrapped(residue, tile) - excess, 0), axis=0)
            span = tl.sum(tl.where(here, gap, 0), axis=0)
            added = tl.where(tl.abs(down + span) < tl.abs(down), span, 0)
            residue += tl.where(index > first, added, 0)
            shift += added
            short = short & (index != first)
        down = _wrapped(residue, tile) - excess
        result = tl.where(tl.abs(down + gap) < tl.abs(down), upper, lower)
        tl.store(count_by_expert + start + index, result, mask=mask)
        shift -= tl.sum(excess, axis=0)


# --- launchers ------------------------------------------------------------------------------------


_select = Launcher(_select_kernel)
_frequency = Launcher(_frequency_kernel)
_balance = Launcher(_balance_kernel)


def _balanced_counts(
    keys: torch.Tensor, decisions: Decisions, num_tokens: int, tile: int, block: int
) -> None:
    num_experts, key_stride = keys.shape
    load, counts = decisions.load, decisions.counts
    _frequency(num_experts, keys, load, key_stride, BLOCK=block, num_warps=max(4, block // 1024))
    block = min(power_of_2(num_experts), _BALANCE_BLOCK)
    _balance(1, load, counts, num_tokens, num_experts, tile, BLOCK=block, num_warps=4)


def decide(
    keys: torch.Tensor,
    uniform: torch.Tensor | None,
    decisions: Decisions,
    bands: torch.Tensor,
    num_tokens: int,
    tile: int,
    rule: str,
) -> None:
    """Fills in ``decisions``: one launch, three for ``"balance-f"``.

    Args:
        keys: (E, stride) int32 of :mod:`sonic.triton.rounding_keys`.
        uniform: (E,) fp32 in [0, 1), for ``"sr"`` and ``"nr-s"``.
        bands: (E, BAND) int32, overwritten.
        num_tokens: T, at least 1. tile: M. rule: see :mod:`sonic.routing.token_rounding`.
    """
    num_experts, key_stride = keys.shape
    block = max(1024, power_of_2(num_tokens))
    block = block if block <= _MAX_HELD else _MAX_CHUNK_T
    balanced = rule == "balance-f"
    if balanced:
        _balanced_counts(keys, decisions, num_tokens, tile, block)
    _select(
        num_experts,
        keys,
        uniform,
        decisions.counts,
        decisions.load,
        decisions.words,
        decisions.counts_before,
        bands,
        num_tokens,
        num_experts,
        decisions.words.shape[0],
        key_stride,
        tile,
        RULE="given" if balanced else rule,
        BLOCK=block,
        CHUNK=min(block, _MAX_CHUNK_T),
        HELD=num_tokens <= block,
        num_warps=max(8, min(32, block // _KEYS_PER_WARP)),
    )
