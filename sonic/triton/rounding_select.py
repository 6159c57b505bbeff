"""Token rounding's decisions: how many tokens each expert keeps, and which.

M is the tile, f the tokens that chose an expert. Rounding adds or drops n < M of its tokens: the
best of those that had not chosen it, or the worst of those that had. Either are the n first by
*rank*, a number that the key gives (see :mod:`sonic.triton.rounding_keys`), equal ranks by token.

A program decides for one expert. It needs of every GROUP of 32 tokens the greatest rank only, which
the keys' summaries have, or which it finds reading the column of keys once. The n first tokens lie
in the n groups whose greatest ranks come first, since these are n tokens of n groups. So a search
over the groups, by four at a step, finds a few that are listed, with a rank that the n tokens reach
and few others do. What is listed are UNITs of so many tokens: the groups, or by summaries, which say
where in a group these tokens may be, parts of it. All that reach the rank are compared with one
another, which gives the token at which the n tokens end; where too many tie for that, a bisection
over the listed tokens does. Nothing is sorted.

What is left behind is 32 tokens' verdicts in a word, and the expert's kept tokens before them.

Source: SonicMoE (arXiv 2512.14080), algorithms 4 and 6.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sonic.triton.common import cdiv, power_of_2
from sonic.triton.launch import Launcher, wait_for_earlier_launches
from sonic.triton.rounding_keys import (
    GROUP,
    PART,
    Keys,
    _load_keys,
    _load_summaries,
    _score_of,
    _summarize,
    first_part,
    most_of_other_parts,
    ones_by_byte,
    popcount,
    sum_of_bytes,
)
from sonic.triton.topk import HIGHEST, LOWEST

_ALL_PARTS = tl.constexpr(0b1111)
_COMPARED = tl.constexpr(16)  # tokens that others are compared with at once

_MAX_HELD = 1024  # groups whose greatest ranks stay in registers
_MAX_COUNTED = 512  # groups whose ranks are counted at once where they do not
_MAX_HELD_LIST = 8192  # listed tokens whose keys do
_MAX_HELD_PARTS = 1024  # where parts are listed, of which there are hardly ever more
_LEAST_LIST = 16
_MAX_COMPARED = 256  # tokens that are compared with one another
_GROUPS_PER_WARP = 64
_SUMMARIES_PER_WARP = 128
_FEW_LISTED = 64  # whose keys take few registers
_REGISTERS = 65536  # of a processor
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
def _rank_to_add(key):
    """Of a token that did not choose the expert, greater for a better one; -1 of any other. Behind
    the last token it is 0, the least: at places where no token is, which come last."""
    return tl.where(key < 0, key & HIGHEST, -1)


@triton.jit
def _rank_to_drop(key):
    """Of a token that chose the expert, greater for a worse one; -1 of any other."""
    return tl.where(key >= 0, HIGHEST - key, -1)


@triton.jit
def _rank(key, up):
    return tl.where(up, _rank_to_add(key), _rank_to_drop(key))


@triton.jit
def _summaries_from(
    column,
    first,
    num_tokens,
    num_groups,
    BLOCK: tl.constexpr,
):
    """Words, seconds, and greatest ranks to add and to drop of BLOCK groups: no token chose, and
    there are no ranks, where there is no group. Of keys in a table the seconds are nothing."""
    keys, _, _, summaries, expert, _, key_stride, _ = column
    group = first + tl.arange(0, BLOCK)
    inside = group < num_groups
    # The last group once more, where there is none.
    source = tl.minimum(group, num_groups - 1)
    if summaries is None:
        first_token = source * GROUP
        word, to_add, to_drop = _summarize(
            keys + expert.to(tl.int64) * key_stride + first_token, num_tokens - first_token, BLOCK
        )
        second = word
    else:
        word, second, to_add, to_drop = _load_summaries(
            summaries, expert, source, num_groups, BLOCK
        )
    return (
        tl.where(inside, word, 0),
        second,
        tl.where(inside, to_add, -1),
        tl.where(inside, to_drop, -1),
    )


@triton.jit
def _tops(tops, held, first, num_groups, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """Greatest ranks of the groups from ``first`` on, -1 behind the last group."""
    if HELD:
        return held
    else:
        group = first + tl.arange(0, BLOCK)
        return tl.load(tops + group, mask=group < num_groups, other=-1)


@triton.jit
def _both_spreads(count, greatest, least, other_count, other_greatest, other_least):
    return (
        count + other_count,
        tl.maximum(greatest, other_greatest),
        tl.minimum(least, other_least),
    )


@triton.jit
def _spread(tops, held, num_groups, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """How many groups have a greatest rank, and of all these ranks the greatest and the least, or 0
    if a group has none."""
    count = 0
    greatest = -1
    least = HIGHEST
    for first in range(0, BLOCK if HELD else num_groups, BLOCK):
        top = _tops(tops, held, first, num_groups, BLOCK, HELD)
        inside = first + tl.arange(0, BLOCK) < num_groups
        ranks = (top >= 0).to(tl.int32), top, tl.where(inside, tl.maximum(top, 0), HIGHEST)
        number, high, low = tl.reduce(ranks, 0, _both_spreads)
        count += number
        greatest = tl.maximum(greatest, high)
        least = tl.minimum(least, low)
    return count, greatest, least


@triton.jit
def _groups_from(
    tops, held, low, middle, high, num_groups, BLOCK: tl.constexpr, HELD: tl.constexpr
):
    """How many groups have a token of each of three ascending ranks or more, in one reduction; at
    most 1023 have one of rank ``middle``."""
    count_low = 0
    count_middle = 0
    count_high = 0
    for first in range(0, BLOCK if HELD else num_groups, BLOCK):
        top = _tops(tops, held, first, num_groups, BLOCK, HELD)
        reached = ((top >= low).to(tl.int32) << 20) + ((top >= middle).to(tl.int32) << 10)
        reached = tl.sum(reached + (top >= high).to(tl.int32), axis=0)
        count_low += reached >> 20
        count_middle += (reached >> 10) & 1023
        count_high += reached & 1023
    return count_low, count_middle, count_high


@triton.jit
def _halved(middle, count, want, low, reach, high, beyond):
    """A step of a bisection: `reach`, at least ``want``, reach `low`; `beyond`, fewer, `high`;
    ``count`` reach ``middle``, which takes the place of one of the two."""
    enough = count >= want
    low = tl.where(enough, middle, low)
    reach = tl.where(enough, count, reach)
    high = tl.where(enough, high, middle)
    beyond = tl.where(enough, beyond, count)
    return low, reach, high, beyond


@triton.jit
def _parts_that_may_reach(word, second, low, up):
    """Of groups in which a token of rank ``low`` or more is, as bits, the parts that may have one:
    that of the first one to add, all if other parts have one too; those with tokens to drop."""
    with_added = tl.where(most_of_other_parts(second) >= low, _ALL_PARTS, 1 << first_part(second))
    # The least bit of each byte is whether there is any, and the four move to one place.
    some = word.to(tl.uint32, bitcast=True)
    some = some | (some >> 4)
    some = some | (some >> 2)
    some = (some | (some >> 1)) & 0x01010101
    with_dropped = ((some * 0x10204080) >> 28).to(tl.int32, bitcast=True)
    return tl.where(up, with_added, with_dropped)


@triton.jit
def _tied_apart(taken, tie, ties, LIST: tl.constexpr, beyond, reach, up):
    """Of too many groups that tie the first ones, or the last to drop, with LIST in all."""
    before = ties + tl.cumsum(tie.to(tl.int32), axis=0) - tie.to(tl.int32)
    before -= tl.where(up, 0, reach - LIST)
    return taken & (~tie | ((before >= 0) & (before < LIST - beyond)))


@triton.jit
def _list_units(
    column,
    tops,
    held,
    listed,
    want,
    up,
    num_tokens,
    num_groups,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
    LIST: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Write units that hold the ``want`` first tokens, ascending, of LIST groups at most. Returns
    how many, a rank that all these tokens reach, and one that none does."""
    top, word, second = held
    reach, greatest, least = _spread(tops, top, num_groups, BLOCK, HELD)
    beyond = 0
    # Fewer groups than wanted tokens: some of these are not the first of their group.
    low = tl.where(reach < want, 0, least).to(tl.uint32)
    end = (greatest + 1).to(tl.uint32)
    high = end
    # `reach` groups, at least `want` of them, reach `low`, and `beyond`, which are fewer, `high`.
    while (want > 0) & (reach > LIST) & (high - low > 1):
        middle = (low + high) >> 1
        below, above = (low + middle) >> 1, (middle + high) >> 1
        # Not all groups reach `middle`, which is above the least rank.
        count_below, count, count_above = _groups_from(
            tops, top, below.to(tl.int32), middle.to(tl.int32), above.to(tl.int32), num_groups,
            BLOCK, HELD,
        )  # fmt: skip
        low, reach, high, beyond = _halved(middle, count, want, low, reach, high, beyond)
        middle = tl.where(count >= want, above, below)
        count = tl.where(count >= want, count_above, count_below)
        low, reach, high, beyond = _halved(middle, count, want, low, reach, high, beyond)
    bound = low.to(tl.int32)
    size = 0
    ties = 0
    for first in range(0, BLOCK if HELD else num_groups, BLOCK):
        top = _tops(tops, top, first, num_groups, BLOCK, HELD)
        taken = (top >= bound) & (top >= 0) & (want > 0)
        # Too many are left only if they tie.
        if reach > LIST:
            tie = (top == bound) & taken
            taken = _tied_apart(taken, tie, ties, LIST, beyond, reach, up)
            ties += tl.sum(tie.to(tl.int32), axis=0)
        units = taken.to(tl.int32)
        if UNIT != GROUP:
            if not HELD:
                word, second, _, _ = _summaries_from(column, first, num_tokens, num_groups, BLOCK)
            units = tl.where(taken, _parts_that_may_reach(word, second, bound, up), 0)
        number = popcount(units)
        place = size + tl.cumsum(number, axis=0) - number
        unit = (first + tl.arange(0, BLOCK)) * (GROUP // UNIT)
        for part in tl.static_range(GROUP // UNIT):
            here = (units >> part) & 1
            tl.store(listed + place, unit + part, mask=here != 0)
            place += here
        if UNIT != GROUP or not HELD:
            size += tl.sum(number, axis=0)
    if UNIT == GROUP:
        size = tl.where(want > 0, tl.minimum(reach, LIST), 0)
    return size, low, end


@triton.jit
def _load_listed(
    column, listed, start, size, num_tokens, num_units, BLOCK: tl.constexpr, UNIT: tl.constexpr
):
    """Keys (UNIT, BLOCK) of the units listed from the ``start``-th on, and these units, with
    ``num_units`` behind the last one."""
    keys, logits, marks, _, expert, stride, key_stride, BITS = column
    entry = start + tl.arange(0, BLOCK)
    unit = tl.load(listed + entry, mask=entry < size, other=num_units)
    if marks is not None:
        # Or the compiler loads one unit behind another, and the keys of each before the next
        # (selection 22.0 to 18.9 us with 512 experts, 2026-11-28).
        tl.debug_barrier()
    # A thread loads single keys, and neighbours those of a unit: as they have to lie for sums over
    # it, and for stores to places that are next to one another.
    token = tl.max_contiguous(unit[None, :] * UNIT + tl.arange(0, UNIT)[:, None], [1, 1])
    mask = token < num_tokens
    return _load_keys(keys, logits, marks, token, expert, mask, stride, key_stride, BITS), unit


@triton.jit
def _listed_from(
    column,
    listed,
    held,
    start,
    size,
    num_tokens,
    num_units,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The same, of which the first block is ``held``. ALL: that is all there may be."""
    key, unit = held
    if not ALL:
        if start > 0:
            key, unit = _load_listed(
                column, listed, start, size, num_tokens, num_units, BLOCK, UNIT
            )
    return key, unit


@triton.jit
def _places(unit, num_tokens, up, UNIT: tl.constexpr):
    """Places of these units' tokens: of equal ranks the lowest place comes first."""
    token = unit[None, :] * UNIT + tl.arange(0, UNIT)[:, None]
    return tl.where(up, token, num_tokens - 1 - token)


@triton.jit
def _count_listed(
    column,
    listed,
    held,
    bound,
    place_limit,
    size,
    up,
    num_tokens,
    num_units,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Listed tokens of rank above ``bound``, at least 0, or equal to it: at places below the limit
    if there is one."""
    count = 0
    for start in range(0, size, BLOCK):
        key, unit = _listed_from(
            column, listed, held, start, size, num_tokens, num_units, BLOCK, ALL, UNIT
        )
        rank = _rank(key, up)
        if place_limit is None:
            first = rank >= bound
        else:
            first = _comes_first(rank, _places(unit, num_tokens, up, UNIT), bound, place_limit)
        count += _total(first.to(tl.int32))
    return count


@triton.jit
def _comes_first(rank, place, bound, place_limit):
    # The bound is at least 0.
    return (rank > bound) | ((rank == bound) & (place < place_limit))


@triton.jit
def _total(block):
    return tl.sum(tl.sum(block, axis=0), axis=0)


@triton.jit
def _gather_first(
    column,
    listed,
    held,
    found,
    bound,
    size,
    up,
    num_tokens,
    num_units,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,
    ROOM: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Write entries of the listed tokens that reach a rank, the first ROOM of them, and behind them
    some that none is. Returns how many tokens reach it."""
    lane = tl.arange(0, UNIT)[:, None]
    count = 0
    for start in range(0, size, BLOCK):
        key, unit = _listed_from(
            column, listed, held, start, size, num_tokens, num_units, BLOCK, ALL, UNIT
        )
        rank = _rank(key, up)
        reached = rank >= bound
        word = tl.sum(reached.to(tl.int32) << lane, axis=0)
        number = popcount(word)
        index = count + tl.cumsum(number, axis=0) - number
        index = index[None, :] + popcount(word[None, :] & ((1 << lane) - 1))
        entry = _entry(rank, _places(unit, num_tokens, up, UNIT))
        tl.store(found + index, entry, mask=reached & (index < ROOM))
        count += tl.sum(number, axis=0)
    behind = tl.minimum(count, ROOM) + tl.arange(0, _COMPARED)
    tl.store(found + behind, tl.full([_COMPARED], -1, tl.int64))
    return count


@triton.jit
def _entry(rank, place):
    """int64, greater for a token that comes before another; all of them differ."""
    return (rank.to(tl.int64) << 32) | (place ^ HIGHEST)


@triton.jit
def _end_of(found, want, count, ROOM: tl.constexpr):
    """Rank and place of the token, of the ``count`` that were found, at which ``want`` end."""
    lane = tl.arange(0, ROOM)
    entry = tl.load(found + lane, mask=lane < count, other=-1)
    better = tl.zeros([_COMPARED, ROOM], tl.int32)
    for start in range(0, count, _COMPARED):
        # Along the first axis, which a thread sums by itself.
        other = tl.load(found + start + tl.arange(0, _COMPARED))
        better += (other[:, None] > entry[None, :]).to(tl.int32)
    is_last = tl.sum(better, axis=0) == want - 1
    last = tl.max(tl.where(is_last, entry, -1), axis=0)
    return (last >> 32).to(tl.int32), last.to(tl.int32) ^ HIGHEST


@triton.jit
def _search(
    column,
    tops,
    held,
    listed,
    found,
    want,
    up,
    num_tokens,
    num_groups,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
    LIST: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Units that hold the ``want`` first tokens, listed, and where these tokens end: those of ranks
    above a bound, and of equal rank at places below a limit. Returns the number of units, bound and
    limit, and keys and units of the first LIST_BLOCK that are listed."""
    num_units = num_groups * (GROUP // UNIT)
    ALL: tl.constexpr = LIST * (GROUP // UNIT) <= LIST_BLOCK
    size, low, high = _list_units(
        column, tops, held, listed, want, up, num_tokens, num_groups, BLOCK, HELD, LIST, UNIT
    )
    # Orders the list, which other threads wrote, before the loads, and what an earlier search of
    # this program loaded of `found` before what this one stores there.
    tl.debug_barrier()
    first = _load_listed(column, listed, 0, size, num_tokens, num_units, LIST_BLOCK, UNIT)
    reach = 0
    beyond = 0
    again = True
    while again:
        again = False
        reach = _gather_first(
            column, listed, first, found, low.to(tl.int32), size, up, num_tokens, num_units,
            LIST_BLOCK, ALL, ROOM, UNIT,
        )  # fmt: skip
        if reach > ROOM:
            few = tl.maximum(want, ROOM)
            while (reach > few) & (beyond < want) & (high - low > 1):
                middle = (low + high) >> 1
                count = _count_listed(
                    column, listed, first, middle.to(tl.int32), None, size, up, num_tokens,
                    num_units, LIST_BLOCK, ALL, UNIT,
                )  # fmt: skip
                low, reach, high, beyond = _halved(middle, count, want, low, reach, high, beyond)
            again = (reach > want) & (reach <= ROOM)
            # What other threads wrote comes before what they write then.
            tl.debug_barrier()
    exact = (beyond == want) & (reach > want)
    bound = tl.where(exact, high - 1, low).to(tl.int32)
    limit = tl.where(exact, 0, num_tokens)
    if (reach > want) & (reach <= ROOM) & (want > 0):
        # Orders what other threads found before the loads.
        tl.debug_barrier()
        bound, last = _end_of(found, want, reach, ROOM)
        limit = last + 1
    else:
        limit_low = 0
        # Tokens tie at the bound, and not all of them are wanted: bisected by their place.
        while (reach > want) & (beyond < want) & (limit - limit_low > 1):
            middle = (limit_low + limit) >> 1
            count = _count_listed(
                column, listed, first, bound, middle, size, up, num_tokens, num_units, LIST_BLOCK,
                ALL, UNIT,
            )  # fmt: skip
            enough = count >= want
            limit_low = tl.where(enough, limit_low, middle)
            limit = tl.where(enough, middle, limit)
    return size, bound, limit, first


@triton.jit
def _mass(
    column,
    listed,
    size,
    bound,
    limit,
    up,
    num_tokens,
    num_units,
    BLOCK: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Sum of the scores of the tokens that :func:`_search` found."""
    mass = tl.zeros([], tl.float64)
    for start in range(0, size, BLOCK):
        key, unit = _load_listed(column, listed, start, size, num_tokens, num_units, BLOCK, UNIT)
        place = _places(unit, num_tokens, up, UNIT)
        first = _comes_first(_rank(key, up), place, bound, limit)
        mass += _total(tl.where(first, _score_of(key), 0.0).to(tl.float64))
    return mass


@triton.jit
def _reachable(frequency, num_tokens, tile):
    """The multiples of the tile next to ``frequency``, below and above; T itself counts as one."""
    lower = tl.where(frequency == num_tokens, frequency, frequency // tile * tile)
    upper = tl.where(lower == frequency, frequency, tl.minimum(lower + tile, num_tokens))
    return lower, upper


@triton.jit
def _rounded_count(
    count_by_expert, uniform, expert, frequency, lower, upper, tile, RULE: tl.constexpr
):
    """The expert's count by any rule that looks at no score."""
    if RULE == "given":
        return tl.load(count_by_expert + expert)
    elif RULE == "up":
        return upper
    elif RULE == "down":
        return lower
    elif RULE == "nr":
        excess = 2 * (frequency - lower) - (upper - lower)
        odd = (frequency // tile) % 2
        return tl.where(excess + odd > 0, upper, lower)
    else:
        draw = tl.load(uniform + expert).to(tl.float64)
        goes_up = draw * (upper - lower).to(tl.float64) < (frequency - lower).to(tl.float64)
        return tl.where(goes_up, upper, lower)


@triton.jit
def _change_verdicts(
    column,
    words,
    sizes,
    num_experts,
    listed,
    found,
    up,
    num_tokens,
    num_units,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Of the listed units, and how many tokens the expert keeps of each: what :func:`_search`
    ``found`` is added or dropped."""
    size, bound, limit, held = found
    expert = column[4]
    PARTS_OF_WORD: tl.constexpr = GROUP // UNIT
    if UNIT != GROUP:
        # A part's verdicts are a byte of the group's word, the first part's the lowest.
        words = words.to(tl.pointer_type(tl.int8), bitcast=True)
        sizes = sizes.to(tl.pointer_type(tl.int8), bitcast=True)
    for start in range(0, size, BLOCK):
        key, unit = _listed_from(
            column, listed, held, start, size, num_tokens, num_units, BLOCK, ALL, UNIT
        )
        place = _places(unit, num_tokens, up, UNIT)
        changed = _comes_first(_rank(key, up), place, bound, limit)
        bit = ((key >= 0) ^ changed).to(tl.int32) << tl.arange(0, UNIT)[:, None]
        verdicts = tl.sum(bit, axis=0)
        word = (unit // PARTS_OF_WORD).to(tl.int64) * num_experts + expert
        offset = word * PARTS_OF_WORD + unit % PARTS_OF_WORD
        inside = unit < num_units
        tl.store(words + offset, verdicts.to(words.dtype.element_ty), mask=inside)
        tl.store(sizes + unit, popcount(verdicts).to(sizes.dtype.element_ty), mask=inside)


@triton.jit
def _count_verdicts(
    sizes,
    counts_before,
    expert,
    num_experts,
    num_groups,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
    UNIT: tl.constexpr,
):
    """counts_before of the expert, from the tokens that it keeps of each group."""
    before = 0
    for first in range(0, BLOCK if HELD else num_groups, BLOCK):
        group = first + tl.arange(0, BLOCK)
        offset = group.to(tl.int64) * num_experts + expert
        size = tl.load(sizes + group, mask=group < num_groups, other=0)
        if UNIT != GROUP:
            size = sum_of_bytes(size)
        place = before + tl.cumsum(size, axis=0) - size
        tl.store(counts_before + offset, place, mask=group < num_groups)
        if not HELD:
            before += tl.sum(size, axis=0)


@triton.jit(do_not_specialize=["num_tokens", "num_groups", "tile"])
def _select_kernel(
    load,
    keys,
    logits,
    marks,
    summaries,
    uniform,
    count_by_expert,
    words,
    counts_before,
    scratch,
    num_tokens,
    num_experts,
    num_groups,
    stride,
    key_stride,
    tile,
    RULE: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    HELD: tl.constexpr,
    LIST: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The expert's rounded count; words and counts_before (groups, E). With the rule ``"given"``
    the count is read instead of written. HELD: BLOCK groups are all there are. Scratch of an
    expert: two lists, to drop and to add, what ``_gather_first`` writes, each group's kept tokens,
    and unless HELD greatest ranks to drop and to add."""
    wait_for_earlier_launches()
    expert = tl.program_id(0)
    column = keys, logits, marks, summaries, expert, stride, key_stride, BITS
    num_units = num_groups * (GROUP // UNIT)
    UNITS: tl.constexpr = LIST * (GROUP // UNIT)
    ALL: tl.constexpr = UNITS <= LIST_BLOCK
    kept: tl.constexpr = 1 if HELD else 3
    # An even number, as what is found has eight bytes.
    line = 2 * (UNITS + ROOM + _COMPARED + (kept * num_groups + 1) // 2)
    listed = scratch + expert.to(tl.int64) * line
    entries = (listed + 2 * UNITS).to(tl.pointer_type(tl.int64), bitcast=True)
    sizes = listed + 2 * (UNITS + ROOM + _COMPARED)
    tops = sizes + num_groups
    frequency = 0
    word = tl.zeros([BLOCK], tl.int32)
    second = tl.zeros([BLOCK], tl.int32)
    to_add = tl.full([BLOCK], -1, tl.int32)
    to_drop = tl.full([BLOCK], -1, tl.int32)
    for first in range(0, BLOCK if HELD else num_groups, BLOCK):
        word, second, to_add, to_drop = _summaries_from(
            column, first, num_tokens, num_groups, BLOCK
        )
        size = popcount(word)
        group = first + tl.arange(0, BLOCK)
        inside = group < num_groups
        if summaries is None:
            tl.store(words + group.to(tl.int64) * num_experts + expert, word, mask=inside)
        tl.store(sizes + group, size if UNIT == GROUP else ones_by_byte(word), mask=inside)
        if not HELD:
            tl.store(tops + group, to_drop, mask=inside)
            tl.store(tops + num_groups + group, to_add, mask=inside)
        frequency += tl.sum(size, axis=0)
    if not HELD:
        # Orders what other threads stored before the loads.
        tl.debug_barrier()
    tl.store(load + expert, frequency)
    lower, upper = _reachable(frequency, num_tokens, tile)
    if RULE == "nr-s":
        down = _search(
            column, tops, (to_drop, word, second), listed, entries, frequency - lower, False,
            num_tokens, num_groups, BLOCK, HELD, LIST, LIST_BLOCK, ROOM, UNIT,
        )  # fmt: skip
        up = _search(
            column, tops + num_groups, (to_add, word, second), listed + UNITS, entries,
            upper - frequency, True, num_tokens, num_groups, BLOCK, HELD, LIST, LIST_BLOCK, ROOM,
            UNIT,
        )  # fmt: skip
        last = _mass(
            column, listed, down[0], down[1], down[2], False, num_tokens, num_units, LIST_BLOCK,
            UNIT,
        )  # fmt: skip
        added = _mass(
            column, listed + UNITS, up[0], up[1], up[2], True, num_tokens, num_units, LIST_BLOCK,
            UNIT,
        )  # fmt: skip
        goes_up = tl.load(uniform + expert).to(tl.float64) * (last + added) < last
        tl.store(count_by_expert + expert, tl.where(goes_up, upper, lower))
        size = tl.where(goes_up, up[0], down[0])
        bound = tl.where(goes_up, up[1], down[1])
        limit = tl.where(goes_up, up[2], down[2])
        listed += tl.where(goes_up, UNITS, 0)
        held = _load_listed(column, listed, 0, size, num_tokens, num_units, LIST_BLOCK, UNIT)
        found = size, bound, limit, held
    else:
        count = _rounded_count(
            count_by_expert, uniform, expert, frequency, lower, upper, tile, RULE
        )
        if RULE != "given":
            tl.store(count_by_expert + expert, count)
        goes_up = count > frequency
        found = _search(
            column, tops + tl.where(goes_up, num_groups, 0),
            (tl.where(goes_up, to_add, to_drop), word, second), listed, entries,
            tl.abs(count - frequency), goes_up, num_tokens, num_groups, BLOCK, HELD, LIST,
            LIST_BLOCK, ROOM, UNIT,
        )  # fmt: skip
    _change_verdicts(
        column, words, sizes, num_experts, listed, found, goes_up, num_tokens, num_units,
        LIST_BLOCK, ALL, UNIT,
    )  # fmt: skip
    # Orders the sizes that other threads changed before they are added up.
    tl.debug_barrier()
    _count_verdicts(sizes, counts_before, expert, num_experts, num_groups, BLOCK, HELD, UNIT)


# --- counts that depend on one another ------------------------------------------------------------


@triton.jit
def _frequency_kernel(keys, frequency, key_stride, BLOCK: tl.constexpr):
    wait_for_earlier_launches()
    expert = tl.program_id(0)
    column = keys + expert.to(tl.int64) * key_stride
    count = 0
    for start in range(0, key_stride, BLOCK):
        token = start + tl.arange(0, BLOCK)
        key = tl.load(column + token, mask=token < key_stride, other=LOWEST)
        count += tl.sum((key >= 0).to(tl.int32), axis=0)
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
    wait_for_earlier_launches()
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


_select = Launcher(_select_kernel, overlapping=True)
_frequency = Launcher(_frequency_kernel, overlapping=True)
_balance = Launcher(_balance_kernel, overlapping=True)


def _balanced_counts(keys: torch.Tensor, decisions: Decisions, num_tokens: int, tile: int) -> None:
    num_experts, key_stride = keys.shape
    load, counts = decisions.load, decisions.counts
    _frequency(num_experts, keys, load, key_stride, BLOCK=8192, num_warps=8)
    block = min(power_of_2(num_experts), _BALANCE_BLOCK)
    _balance(1, load, counts, num_tokens, num_experts, tile, BLOCK=block, num_warps=4)


def _list_size(num_tokens: int, tile: int, rule: str) -> int:
    """Groups that an expert lists at most: no fewer than the tokens that may be added or dropped,
    or all there are."""
    most = power_of_2(_most_changed(num_tokens, tile, rule))
    return min(max(_LEAST_LIST, most), power_of_2(cdiv(num_tokens, GROUP.value)))


def _room(num_tokens: int, tile: int, rule: str) -> int:
    """Tokens that are compared with one another at most; that few exceed those wanted, unless ranks
    tie."""
    return min(
        max(_LEAST_LIST, 2 * power_of_2(_most_changed(num_tokens, tile, rule))), _MAX_COMPARED
    )


def _most_changed(num_tokens: int, tile: int, rule: str) -> int:
    """Tokens that may be added or dropped."""
    return max(1, min(tile // 2 if rule == "nr" else tile - 1, num_tokens))


def _unit(keys: Keys) -> int:
    """Tokens that are listed together."""
    return GROUP.value if keys.summaries is None else PART.value


def scratch_size(keys: Keys, num_tokens: int, num_experts: int, tile: int, rule: str) -> int:
    """Elements of ``scratch`` of :func:`decide`."""
    num_groups = cdiv(num_tokens, GROUP.value)
    kept = 3 if num_groups > _MAX_HELD else 1
    units = _list_size(num_tokens, tile, rule) * GROUP.value // _unit(keys)
    entries = _room(num_tokens, tile, rule) + _COMPARED.value
    return num_experts * 2 * (units + entries + cdiv(kept * num_groups, 2))


def decide(
    keys: Keys,
    uniform: torch.Tensor | None,
    decisions: Decisions,
    scratch: torch.Tensor,
    num_tokens: int,
    tile: int,
    rule: str,
) -> None:
    """Fills in ``decisions``: one launch, three for ``"balance-f"``.

    Args:
        keys: of :mod:`sonic.triton.rounding_keys`, with a table for ``"balance-f"``; if they have
            words, these are those of ``decisions``.
        uniform: (E,) fp32 in [0, 1), for ``"sr"`` and ``"nr-s"``.
        scratch: int32, of as many elements as :func:`scratch_size` says, overwritten; at an address
            that is a multiple of eight.
        num_tokens: T, at least 1. tile: M. rule: see :mod:`sonic.routing.token_rounding`.
    """
    _, logits, _, summaries, *_ = keys
    unit = _unit(keys)
    most_held = _MAX_HELD_LIST if summaries is None else _MAX_HELD_PARTS
    num_experts = decisions.load.shape[0]
    num_groups = decisions.words.shape[0]
    held = num_groups <= _MAX_HELD
    block = power_of_2(num_groups) if held else _MAX_COUNTED
    listed = _list_size(num_tokens, tile, rule)
    per_warp = _GROUPS_PER_WARP if summaries is None else _SUMMARIES_PER_WARP
    num_warps = max(4, min(16, max(block, 2 * listed) // per_warp))
    registers: dict[str, int] = {}
    if listed > _FEW_LISTED or not held:
        # All that a program may have: left to itself, the compiler of Triton 3.9 spills before.
        registers["maxnreg"] = min(255, _REGISTERS // (32 * num_warps))
    elif num_warps == 4:
        # Four programs run at once. Without a number it spills here too, of fewer registers.
        registers["maxnreg"] = _REGISTERS // (4 * 32 * num_warps)
    balanced = rule == "balance-f"
    if balanced:
        assert keys.table is not None
        _balanced_counts(keys.table, decisions, num_tokens, tile)
    _select(
        num_experts,
        decisions.load,
        *keys[:4],
        uniform,
        decisions.counts,
        decisions.words,
        decisions.counts_before,
        scratch,
        num_tokens,
        num_experts,
        num_groups,
        0 if logits is None else logits.stride(0),
        keys.stride,
        tile,
        RULE="given" if balanced else rule,
        BITS=keys.bits,
        BLOCK=block,
        HELD=held,
        LIST=listed,
        LIST_BLOCK=min(listed * GROUP.value, most_held) // unit,
        ROOM=_room(num_tokens, tile, rule),
        UNIT=unit,
        num_warps=num_warps,
        **registers,
    )
