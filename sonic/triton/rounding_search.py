"""Token rounding's search: the n first tokens of one expert, to add or to drop.

They come first by *rank*, a number that the key gives (:mod:`sonic.triton.rounding_keys`), equal
ranks by token. Of every GROUP of 32 tokens the greatest rank is all that is needed, which summaries
have, or which is found reading the column of keys once (:mod:`sonic.triton.rounding_summaries`).
The n first tokens lie in the n groups whose greatest ranks come first, since these are n tokens of
n groups. So a search over the groups, by four at a step, finds a few that are listed, with a rank
that the n tokens reach and few others do. What is listed are UNITs of so many tokens: the groups,
or by summaries, which say where in a group these tokens may be, parts of it.

Entries of the listed tokens that reach the rank are written, and if they are few, compared with one
another, which gives the token at which the n end. If they are many, a bisection over the listed
tokens raises the rank until they are few; where that many tie, another one finds the place at which
the n end. Nothing is sorted.
"""

import triton
import triton.language as tl

from sonic.triton.rounding_keys import GROUP, _load_keys
from sonic.triton.rounding_summaries import (
    _load_summaries,
    _summarize,
    first_part,
    most_of_other_parts,
    popcount,
)
from sonic.triton.topk import HIGHEST

_ALL_PARTS = tl.constexpr(0b1111)
COMPARED = tl.constexpr(16)  # tokens that others are compared with at once


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


# A column, in what follows: keys, logits, marks and summaries, of which the keys are there, alone
# or with summaries, or the three others, the expert, the strides of logits and of keys, and BITS.


@triton.jit
def _summaries_from(column, first, num_tokens, num_groups, BLOCK: tl.constexpr):
    """Words, seconds, and greatest ranks to add and to drop of BLOCK groups: no token chose, and
    there are no ranks, where there is no group. Of a table the seconds mean nothing."""
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
    """Greatest ranks of BLOCK groups from ``first`` on, -1 behind the last group: ``held``, which
    are those of all groups, if HELD."""
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
    """Of groups in which a token of rank ``low`` or more is, as bits, the parts that may have one.
    To add: that of the group's greatest rank, or all if others may reach ``low`` too; to drop:
    those of which a token chose the expert."""
    with_added = tl.where(most_of_other_parts(second) >= low, _ALL_PARTS, 1 << first_part(second))
    # The least bit of each byte becomes whether there is any in it, and the four move to one place.
    some = word.to(tl.uint32, bitcast=True)
    some = some | (some >> 4)
    some = some | (some >> 2)
    some = (some | (some >> 1)) & 0x01010101
    with_dropped = ((some * 0x10204080) >> 28).to(tl.int32, bitcast=True)
    return tl.where(up, with_added, with_dropped)


@triton.jit
def _tied_apart(taken, tie, ties, LIST: tl.constexpr, beyond, reach, up):
    """Of too many groups that tie only so many that LIST are taken in all: the first ones, or the
    last ones to drop."""
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
    how many units, a rank that all these tokens reach, and one that none does. ``held``: greatest
    ranks, words and seconds of the groups, of use if HELD."""
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
    first,
    start,
    size,
    num_tokens,
    num_units,
    BLOCK: tl.constexpr,
    ALL: tl.constexpr,
    UNIT: tl.constexpr,
):
    """The same, of which the ``first`` block is at hand. ALL: that is all there may be."""
    key, unit = first
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
def _comes_first(rank, place, bound, place_limit):
    # The bound is at least 0.
    return (rank > bound) | ((rank == bound) & (place < place_limit))


@triton.jit
def _total(block):
    return tl.sum(tl.sum(block, axis=0), axis=0)


@triton.jit
def _count_listed(
    column,
    listed,
    first,
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
    """How many listed tokens are of rank above ``bound``, at least 0, or equal to it: at places
    below the limit if there is one."""
    count = 0
    for start in range(0, size, BLOCK):
        key, unit = _listed_from(
            column, listed, first, start, size, num_tokens, num_units, BLOCK, ALL, UNIT
        )
        rank = _rank(key, up)
        if place_limit is None:
            counted = rank >= bound
        else:
            counted = _comes_first(rank, _places(unit, num_tokens, up, UNIT), bound, place_limit)
        count += _total(counted.to(tl.int32))
    return count


@triton.jit
def _gather_first(
    column,
    listed,
    first,
    entries,
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
    """Write entries of the listed tokens that reach the ``bound``, of the first ROOM of them, and
    behind these COMPARED that are less than any. Returns how many tokens reach it."""
    lane = tl.arange(0, UNIT)[:, None]
    count = 0
    for start in range(0, size, BLOCK):
        key, unit = _listed_from(
            column, listed, first, start, size, num_tokens, num_units, BLOCK, ALL, UNIT
        )
        rank = _rank(key, up)
        reached = rank >= bound
        word = tl.sum(reached.to(tl.int32) << lane, axis=0)
        number = popcount(word)
        index = count + tl.cumsum(number, axis=0) - number
        index = index[None, :] + popcount(word[None, :] & ((1 << lane) - 1))
        entry = _entry(rank, _places(unit, num_tokens, up, UNIT))
        tl.store(entries + index, entry, mask=reached & (index < ROOM))
        count += tl.sum(number, axis=0)
    behind = tl.minimum(count, ROOM) + tl.arange(0, COMPARED)
    tl.store(entries + behind, tl.full([COMPARED], -1, tl.int64))
    return count


@triton.jit
def _entry(rank, place):
    """int64, greater for a token that comes before another; all of them differ."""
    return (rank.to(tl.int64) << 32) | (place ^ HIGHEST)


@triton.jit
def _end_of(entries, want, count, ROOM: tl.constexpr):
    """Rank and place of the token at which the ``want`` greatest of ``count`` entries end; COMPARED
    that are less than any lie behind these."""
    lane = tl.arange(0, ROOM)
    entry = tl.load(entries + lane, mask=lane < count, other=-1)
    better = tl.zeros([COMPARED, ROOM], tl.int32)
    for start in range(0, count, COMPARED):
        # Along the first axis, which a thread sums by itself.
        other = tl.load(entries + start + tl.arange(0, COMPARED))
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
    entries,
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
    """List the units that hold the ``want`` first tokens, and find where these tokens end: they are
    those of ranks above a bound, and of equal rank at places below a limit. Returns the number of
    units, bound and limit, and keys and units of the first LIST_BLOCK that are listed. ``held`` is
    that of :func:`_list_units`, ``entries`` room for ROOM + COMPARED int64."""
    num_units = num_groups * (GROUP // UNIT)
    ALL: tl.constexpr = LIST * (GROUP // UNIT) <= LIST_BLOCK
    size, low, high = _list_units(
        column, tops, held, listed, want, up, num_tokens, num_groups, BLOCK, HELD, LIST, UNIT
    )
    # Orders the list, which other threads wrote, before the loads, and what an earlier search of
    # this program loaded of the entries before what this one stores there.
    tl.debug_barrier()
    first = _load_listed(column, listed, 0, size, num_tokens, num_units, LIST_BLOCK, UNIT)
    reach = 0
    beyond = 0
    again = True
    while again:
        again = False
        reach = _gather_first(
            column, listed, first, entries, low.to(tl.int32), size, up, num_tokens, num_units,
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
            # Orders the entries that other threads wrote before those that take their places.
            tl.debug_barrier()
    exact = (beyond == want) & (reach > want)
    bound = tl.where(exact, high - 1, low).to(tl.int32)
    limit = tl.where(exact, 0, num_tokens)
    if (reach > want) & (reach <= ROOM) & (want > 0):
        # Orders the entries, which other threads wrote, before the loads.
        tl.debug_barrier()
        bound, last = _end_of(entries, want, reach, ROOM)
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
