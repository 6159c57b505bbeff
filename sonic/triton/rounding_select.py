"""Token rounding's decisions: how many tokens each expert keeps, and which.

M is the tile, f the tokens that chose an expert. Rounding adds or drops n < M of its tokens: the
best of those that had not chosen it, or the worst of those that had, as
:mod:`sonic.triton.rounding_search` finds them. A program decides for one expert. What is left
behind is 32 tokens' verdicts in a word, and the expert's kept tokens before them.

Source: SonicMoE (arXiv 2512.14080), algorithms 4 and 6.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sonic.triton.common import cdiv, power_of_2
from sonic.triton.launch import Fixed, Launcher, wait_for_earlier_launches
from sonic.triton.rounding_keys import GROUP, Keys, _score_of
from sonic.triton.rounding_search import (
    COMPARED,
    _comes_first,
    _listed_from,
    _load_listed,
    _places,
    _rank,
    _search,
    _summaries_from,
    _total,
)
from sonic.triton.rounding_summaries import PART, ones_by_byte, popcount, sum_of_bytes
from sonic.triton.topk import LOWEST

_MAX_HELD = 1024  # groups whose greatest ranks stay in registers
_MAX_COUNTED = 512  # groups whose ranks are counted at once where they do not
_MAX_HELD_LIST = 8192  # listed tokens whose keys stay in registers
_MAX_HELD_PARTS = 1024  # the same where parts are listed, of which there are hardly ever more
_LEAST_LIST = 16  # groups
_MAX_COMPARED = 256  # tokens that are compared with one another
_GROUPS_PER_WARP = 64
_SUMMARIES_PER_WARP = 128
_FEW_LISTED = 64  # groups that may be listed, whose keys take few registers
_REGISTERS = 65536  # of a processor
_BALANCE_BLOCK = 1024  # experts whose running error is found at once


class Decisions(NamedTuple):
    """``words`` and ``counts_before`` (groups, E): bit i of a word is the verdict on token i of the
    group, ``counts_before`` the expert's kept tokens in earlier groups. ``counts`` (E,): tokens the
    expert keeps, ``load`` (E,): those that chose it. All int32. Words of keys that have some are
    the same memory: what tokens chose becomes the verdict on them."""

    words: torch.Tensor
    counts_before: torch.Tensor
    counts: torch.Tensor
    load: torch.Tensor


# --- one expert -----------------------------------------------------------------------------------


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
    """Write verdicts on the listed units, and how many tokens the expert keeps of each: what
    :func:`_search` ``found``, as it returns it, is added or dropped."""
    size, bound, limit, first = found
    expert = column[4]
    PARTS_OF_WORD: tl.constexpr = GROUP // UNIT
    if UNIT != GROUP:
        # A part's verdicts are a byte of the group's word, the first part's the lowest.
        words = words.to(tl.pointer_type(tl.int8), bitcast=True)
        sizes = sizes.to(tl.pointer_type(tl.int8), bitcast=True)
    for start in range(0, size, BLOCK):
        key, unit = _listed_from(
            column, listed, first, start, size, num_tokens, num_units, BLOCK, ALL, UNIT
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
    """counts_before of the expert, from the tokens that it keeps of each group, or of each part in
    a byte of the group's number."""
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
    the count is read instead of written. Where there are summaries the words are those of tokens
    that chose, and those of listed parts change. HELD: BLOCK groups are all there are.

    Scratch of an expert: two lists of UNITS, to drop and to add, the entries of a search, what is
    kept of each group (of parts, a byte for each), and unless HELD greatest ranks to drop and to
    add. A rule that knows its count before it searches has one list."""
    wait_for_earlier_launches()
    expert = tl.program_id(0)
    column = keys, logits, marks, summaries, expert, stride, key_stride, BITS
    num_units = num_groups * (GROUP // UNIT)
    UNITS: tl.constexpr = LIST * (GROUP // UNIT)
    ALL: tl.constexpr = UNITS <= LIST_BLOCK
    kept: tl.constexpr = 1 if HELD else 3
    # An even number, as entries have eight bytes.
    line = 2 * (UNITS + ROOM + COMPARED + (kept * num_groups + 1) // 2)
    listed = scratch + expert.to(tl.int64) * line
    entries = (listed + 2 * UNITS).to(tl.pointer_type(tl.int64), bitcast=True)
    sizes = listed + 2 * (UNITS + ROOM + COMPARED)
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
        found = (
            size,
            bound,
            limit,
            _load_listed(column, listed, 0, size, num_tokens, num_units, LIST_BLOCK, UNIT),
        )
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


def _most_changed(num_tokens: int, tile: int, rule: str) -> int:
    """Tokens that may be added or dropped."""
    return max(1, min(tile // 2 if rule == "nr" else tile - 1, num_tokens))


def _list_size(num_tokens: int, tile: int, rule: str) -> int:
    """Groups that an expert lists at most: no fewer than the tokens that may be added or dropped,
    or all there are."""
    most = power_of_2(_most_changed(num_tokens, tile, rule))
    return min(max(_LEAST_LIST, most), power_of_2(cdiv(num_tokens, GROUP.value)))


def _room(num_tokens: int, tile: int, rule: str) -> int:
    """Tokens that are compared with one another at most, twice those wanted: few more reach the
    rank of their groups, unless ranks tie."""
    return min(
        max(_LEAST_LIST, 2 * power_of_2(_most_changed(num_tokens, tile, rule))), _MAX_COMPARED
    )


def _unit(keys: Keys) -> int:
    """Tokens that are listed together."""
    return PART.value if keys.table is None else GROUP.value


def scratch_size(keys: Keys, num_tokens: int, num_experts: int, tile: int, rule: str) -> int:
    """Elements of ``scratch`` of :func:`decide`; ``_select_kernel`` says what they are."""
    return _scratch_size(_unit(keys), num_tokens, num_experts, tile, rule)


@functools.lru_cache(maxsize=4096)
def _scratch_size(unit: int, num_tokens: int, num_experts: int, tile: int, rule: str) -> int:
    num_groups = cdiv(num_tokens, GROUP.value)
    kept = 3 if num_groups > _MAX_HELD else 1
    units = _list_size(num_tokens, tile, rule) * GROUP.value // unit
    entries = _room(num_tokens, tile, rule) + COMPARED.value
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
        keys: of :mod:`sonic.triton.rounding_keys`, with a table for ``"balance-f"``.
        decisions: uninitialised, except that ``words`` are those of keys that have some.
        uniform: (E,) fp32 in [0, 1), for ``"sr"`` and ``"nr-s"``.
        scratch: int32, of as many elements as :func:`scratch_size` says, overwritten; at an address
            that is a multiple of eight.
        num_tokens: T, at least 1. tile: M. rule: see :mod:`sonic.routing.token_rounding`.
    """
    num_experts = decisions.load.shape[0]
    if rule == "balance-f":
        assert keys.table is not None
        _balanced_counts(keys.table, decisions, num_tokens, tile)
    launch = _select_launch(
        num_tokens,
        num_experts,
        decisions.words.shape[0],
        0 if keys.logits is None else keys.logits.stride(0),
        keys.stride,
        tile,
        rule,
        keys.bits,
        _unit(keys),
    )
    launch(
        decisions.load,
        *keys[:4],
        uniform,
        decisions.counts,
        decisions.words,
        decisions.counts_before,
        scratch,
    )


@functools.lru_cache(maxsize=4096)
def _select_launch(
    num_tokens: int,
    num_experts: int,
    num_groups: int,
    row_stride: int,
    key_stride: int,
    tile: int,
    rule: str,
    bits: int,
    unit: int,
) -> Fixed:
    has_table = unit == GROUP.value
    held = num_groups <= _MAX_HELD
    block = power_of_2(num_groups) if held else _MAX_COUNTED
    listed = _list_size(num_tokens, tile, rule)
    per_warp = _GROUPS_PER_WARP if has_table else _SUMMARIES_PER_WARP
    num_warps = max(4, min(16, max(block, 2 * listed) // per_warp))
    registers: dict[str, int] = {}
    if listed > _FEW_LISTED or not held:
        # All that a program may have: left to itself, the compiler of Triton 3.9 spills before.
        registers["maxnreg"] = min(255, _REGISTERS // (32 * num_warps))
    elif num_warps == 4:
        # Four programs run at once. Without a number it spills here too, of fewer registers.
        registers["maxnreg"] = _REGISTERS // (4 * 32 * num_warps)
    most_held = _MAX_HELD_LIST if has_table else _MAX_HELD_PARTS
    kernel = _select.bind(
        RULE="given" if rule == "balance-f" else rule,
        BITS=bits,
        BLOCK=block,
        HELD=held,
        LIST=listed,
        LIST_BLOCK=min(listed * GROUP.value, most_held) // unit,
        ROOM=_room(num_tokens, tile, rule),
        UNIT=unit,
        num_warps=num_warps,
        **registers,
    )
    sizes = num_tokens, num_experts, num_groups, row_stride, key_stride, tile
    return kernel.fix(num_experts, *sizes)
