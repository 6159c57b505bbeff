"""Token rounding's keys: how an expert ranks the tokens, as one int32 per token and expert.

T tokens, E experts. A token chooses its ``top_k`` best experts; an expert prefers the tokens that
chose it, then high scores, then low token indices::

    key[e, t] = bits of the score, with the sign bit set if token t did not choose expert e

Keys are written column by column, from given scores or, in one pass that also finds the winners,
from logits. The score of expert e is then ``exp(v_e)`` over the sum of ``exp(v)``, of the token's
winners or of all experts.

A column is searched by GROUPs of 32 tokens, of which a few numbers matter: which tokens chose the
expert, as a word, and the greatest *ranks* of one to add and of one to drop. Where columns are many
there is no table of keys: the kernel that finds the winners leaves four *marks* of each token, which
make any key of it from the logit, and a second one reads the logits again, by expert, and leaves
*summaries*. These have a fourth number, the *second*: which PART of eight tokens has the greatest
rank to add, in two bits, and in the others those of the greatest one of the other parts.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sonic.enums import ScoreOrder
from sonic.triton.common import (
    cdiv,
    check_float,
    check_shape,
    device_of,
    is_interpreted,
    power_of_2,
    row_major,
)
from sonic.triton.launch import Launcher, wait_for_earlier_launches
from sonic.triton.topk import (
    HIGHEST,
    LOWEST,
    _packed,
    _plain_bits,
    _select,
    _select_in_groups,
    _select_packed,
    _sortable,
    _unpacked,
    _value_of,
    free_bits,
    group_width,
    topk_scores,
)

_INTERPRETED = tl.constexpr(is_interpreted())
_LOG2_E = tl.constexpr(math.log2(math.e))

MAX_BLOCK_E = 4096  # experts of a token in one block
_ELEMENTS = 4096  # of a block, or those of one token
_ELEMENTS_PER_THREAD = 32  # where tokens choose from many experts
_MAX_ELEMENTS = 8192  # there; more take too many warps
_BYTES_PER_LOAD = 16  # of a thread
_LEAST_PIECE = 32  # bytes of a row that are loaded together, a sector

GROUP = tl.constexpr(32)  # tokens of a summary
PART = tl.constexpr(8)  # of these, those whose keys or logits are loaded at once
PARTS = tl.constexpr(4)  # of a group
_LEAST_GROUPED = 256  # experts of a block that is searched by groups of columns

# Experts from which, up to which, and groups from which on there are summaries instead of a table:
# where reading columns is much of the selection. Timed with 512 experts.
_LEAST_SUMMARIZED = 257
_MOST_SUMMARIZED = 512
_LEAST_GROUPS = 256
# There a program that finds winners is one warp, so that no reduction leaves it.
_WINNER_ELEMENTS = 2048  # of it: several tokens, whose searches wait side by side
_SUMMARY_BLOCK = 256  # experts of a program that summarizes, which has one group of tokens
_EXPERTS_PER_THREAD = 4  # of it


@triton.jit
def _exp(value):
    """Of fp32 numbers; 0 for what is less than 2^-126, which saves three instructions of five."""
    if _INTERPRETED:
        return tl.exp(value)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=f,f",
            [value * _LOG2_E],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def _rank_key(value):
    """int32 that orders like the fp32 score, negative scores as zero, any NaN highest."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value != value, HIGHEST, tl.where(value > 0.0, bits, 0))


@triton.jit
def _score_of(key):
    return (key & HIGHEST).to(tl.float32, bitcast=True)


@triton.jit
def _chosen(key, expert, TOP_K: tl.constexpr):
    """Whether a column holds one of its row's TOP_K largest keys, the first of equal ones first;
    keys are at least 0 in TOP_K columns or more, and -1 in those that do not count."""
    for _ in range(TOP_K):
        top = tl.max(key, axis=1)
        winner = tl.min(tl.where(key == top[:, None], expert[None, :], HIGHEST), axis=1)
        key = tl.where(expert[None, :] == winner[:, None], -1, key)
    return key < 0


@triton.jit
def _key_of(score, won, if_won):
    """Of a score that is at least 0 or no number, which then all of its token's scores are."""
    return (score.to(tl.int32, bitcast=True) & HIGHEST) | tl.where(won, if_won, LOWEST)


@triton.jit
def _marks_of(top, inverse, last, is_token, BITS: tl.constexpr):
    """What makes keys of a token's logits: its greatest one, the scores' factor, and of the last
    winner, packed, what turns the bits of those with its sign into its order, and a bound of the
    first expert's. Where there is no token scores are 0 and no expert is chosen."""
    turn = tl.where(last < 0, HIGHEST, 0)
    bound = tl.where(is_token, last - ((1 << BITS) - 1), 1 << 30)
    return top, tl.where(is_token, inverse, 0.0), turn, bound


@triton.jit
def _key_of_logit(value, expert, marks, BITS: tl.constexpr):
    """Keys of fp32 logits whose low BITS carry nothing."""
    top, inverse, turn, bound = marks
    # Logits of the other sign than the last winner's are in their places too.
    order = (_plain_bits(value) ^ turn) & (-1 << BITS)
    won = order >= bound + expert
    return _key_of(_exp(value - top) * inverse, won, 0)


@triton.jit
def _store_marks(marks, token, mask, values, ROWS: tl.constexpr):
    top, inverse, turn, bound = values
    top, inverse = top.to(tl.int32, bitcast=True), inverse.to(tl.int32, bitcast=True)
    # What is joined first lies farther apart: top, inverse, turn, bound.
    words = tl.reshape(tl.join(tl.join(top, turn), tl.join(inverse, bound)), [ROWS, 4])
    tl.store(marks + _offset_of_four(token.to(tl.int64)), words, mask=mask[:, None])


@triton.jit
def _load_marks(marks, token, mask):
    """Of a block of tokens; two of the four numbers at once, so that a thread needs no other."""
    pair = (marks + 4 * token.to(tl.int64)).to(tl.pointer_type(tl.int64), bitcast=True)
    scale = tl.load(pair, mask=mask, other=0)
    order = tl.load(pair + 1, mask=mask, other=0)
    top = scale.to(tl.int32).to(tl.float32, bitcast=True)
    inverse = (scale >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return top, inverse, order.to(tl.int32), (order >> 32).to(tl.int32)


@triton.jit
def _load_keys(keys, logits, marks, token, expert, mask, stride, key_stride, BITS: tl.constexpr):
    """Keys of tokens and experts: from their table (E, key_stride), or where there is none from
    logits (T, E) and the tokens' marks. LOWEST where masked."""
    if marks is None:
        address = keys + expert.to(tl.int64) * key_stride + token
        return tl.load(address, mask=mask, other=LOWEST)
    else:
        address = logits + token.to(tl.int64) * stride + expert
        value = tl.load(address, mask=mask, other=0.0).to(tl.float32)
        of_token = _load_marks(marks, token, mask)
        key = _key_of_logit(value, expert, of_token, BITS)
        return tl.where(mask, key, LOWEST)


@triton.jit
def _store_columns(keys, key, token, expert, num_experts, key_stride):
    """keys (E, key_stride) from a block (ROWS, experts)."""
    offset = expert.to(tl.int64)[:, None] * key_stride + token[None, :]
    mask = (expert[:, None] < num_experts) & (token[None, :] < key_stride)
    tl.store(keys + offset, tl.trans(key), mask=mask)


@triton.jit
def ones_by_byte(word):
    """Ones in each byte of each int32, in that byte."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    return ((word + (word >> 4)) & 0x0F0F0F0F).to(tl.int32, bitcast=True)


@triton.jit
def sum_of_bytes(word):
    """Of each int32, less than 256."""
    return ((word.to(tl.uint32, bitcast=True) * 0x01010101) >> 24).to(tl.int32, bitcast=True)


@triton.jit
def popcount(word):
    """Ones in each int32; in the form that compilers know to be one instruction."""
    return sum_of_bytes(ones_by_byte(word))


@triton.jit
def _greatest_ranks(least, greatest, all_chose):
    """Greatest ranks to add and to drop, -1 where there is no such token, from the least and the
    greatest keys (uint32): those of tokens that chose the expert are below all others."""
    to_add = greatest.to(tl.int32, bitcast=True) & HIGHEST
    to_drop = tl.maximum(least.to(tl.int32, bitcast=True) ^ HIGHEST, -1)
    # Behind the last token keys are the least of those that others may have.
    return tl.where(all_chose, -1, to_add), to_drop


@triton.jit
def first_part(second):
    """Of a group, that with the greatest rank to add."""
    return second & (PARTS - 1)


@triton.jit
def most_of_other_parts(second):
    """At least the greatest rank to add of the others, if they have one, and at most three more."""
    return second | (PARTS - 1)


@triton.jit
def _summarize(column, num_tokens, BLOCK: tl.constexpr):
    """Words, and greatest ranks to add and to drop, of BLOCK groups, given by the addresses of their
    first keys and by how many tokens there are from there on."""
    lane = tl.arange(0, PART)[None, :]
    free = tl.zeros([BLOCK, PART], tl.uint32)
    least = tl.full([BLOCK, PART], 0xFFFFFFFF, tl.uint32)
    greatest = tl.zeros([BLOCK, PART], tl.uint32)
    for part in range(PARTS):
        place = (PARTS - 1 - part) * PART + lane
        key = tl.load(column[:, None] + place).to(tl.uint32, bitcast=True)
        free = (free << 1) | (key >> 31)
        least = tl.minimum(least, key)
        greatest = tl.maximum(greatest, key)
    # A bit for each part, moved to where the part's first token has its own.
    free = (free * 0x00204081) & 0x01010101
    word = ~tl.sum(free.to(tl.int32, bitcast=True) << lane, axis=1)
    size = popcount(word)
    to_add, to_drop = _greatest_ranks(
        tl.min(least, axis=1), tl.max(greatest, axis=1), size >= tl.minimum(num_tokens, GROUP)
    )
    return word, to_add, to_drop


@triton.jit
def _offset_of_four(index):
    """Of the numbers (BLOCK, 4) of the summaries, or of the marks, with these indices."""
    return 4 * index[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def _load_summaries(summaries, expert, group, num_groups, BLOCK: tl.constexpr):
    """Words, seconds, and greatest ranks to add and to drop, of an expert's groups."""
    index = expert.to(tl.int64) * num_groups + group
    summary = tl.load(summaries + _offset_of_four(index))
    even, odd = tl.split(tl.reshape(summary, [BLOCK, 2, 2]))
    word, second = tl.split(even)
    to_add, to_drop = tl.split(odd)
    return word, second, to_add, to_drop


@triton.jit
def _marks_of_one(address):
    """Of one token, each a number that every thread has."""
    even, odd = tl.split(tl.reshape(tl.load(address + tl.arange(0, 4)), [2, 2]))
    top, turn = tl.split(even)
    inverse, bound = tl.split(odd)
    return top.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True), turn, bound


@triton.jit
def _load_logits(
    logits,
    token,
    is_token,
    num_experts,
    stride,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PIECE: tl.constexpr,
):
    """fp32 logits (ROWS, BLOCK_E), 0 where there is none. A row is loaded in pieces, one behind the
    other, and not at once: so few threads have it, each several parts of it, and what is found for
    a row is found by few."""
    piece = tl.arange(0, BLOCK_E // PIECE)[None, :, None]
    column = piece * PIECE + tl.arange(0, PIECE)[None, None, :]
    inside = is_token[:, None, None] & (column < num_experts)
    address = logits + token.to(tl.int64)[:, None, None] * stride + column
    value = tl.load(address, mask=inside, other=0.0)
    return tl.reshape(value, [ROWS, BLOCK_E]).to(tl.float32)


@triton.jit
def _sum_of_winners(term, ROWS: tl.constexpr, K_PAD: tl.constexpr):
    """Sum of each row (ROWS, K_PAD), pair by pair: the same bits whichever threads have a row."""
    for level in tl.static_range(6):
        if K_PAD >> level > 1:
            term = tl.sum(tl.reshape(term, [ROWS, K_PAD >> (level + 1), 2]), axis=2)
    return tl.reshape(term, [ROWS])


@triton.jit
def _winners(
    value,
    address,
    is_token,
    num_experts,
    BITS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Sortable logits and ids of each row's winners (ROWS, K_PAD), whatever they are from TOP_K on,
    its greatest one's logit, which columns won, and if BITS its last winner, packed."""
    expert = tl.arange(0, BLOCK_E)
    is_expert = expert < num_experts
    order = _sortable(value)
    index = tl.broadcast_to(expert[None, :], [ROWS, BLOCK_E])
    if BITS == 0:
        order = tl.where(is_expert[None, :], order, LOWEST)
        best, winner, left = _select(order, index, TOP_K, K_PAD, ROWS)
        first = tl.max(best, axis=1)
        return best, winner, first, left == LOWEST, first
    else:
        packed = _packed(order, index, BITS)
        if not EXACT:
            packed = tl.where(is_expert[None, :], packed, LOWEST)
        if WIDTH == 1:
            best, first, last = _select_packed(packed, TOP_K, K_PAD, ROWS, False)
        else:
            best, first, last = _select_in_groups(
                value, address, is_token, num_experts, BITS, TOP_K, K_PAD, ROWS, BLOCK_E, WIDTH,
                EXACT,
            )  # fmt: skip
        best, winner = _unpacked(best, BITS)
        first, _ = _unpacked(first, BITS)
        return best, winner, first, packed >= last[:, None], last


@triton.jit(do_not_specialize=["num_tokens"])
def _logit_scores_kernel(
    logits,
    scores,
    keys,
    marks,
    winner_scores,
    winner_ids,
    lse_by_token,
    num_tokens,
    num_experts,
    stride,
    key_stride,
    BITS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PIECE: tl.constexpr,
    WIDTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Scores of all experts, as (T, E) or as keys, or tokens' marks instead; with the last two
    winners and their scores (T, TOP_K), and ``lse_by_token``, the logarithm of the scores' divisor.
    EXACT: there are BLOCK_E experts, and no mask is needed."""
    wait_for_earlier_launches()
    num_experts = BLOCK_E if EXACT else num_experts
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = token < num_tokens
    expert = tl.arange(0, BLOCK_E)
    value = _load_logits(logits, token, is_token, num_experts, stride, ROWS, BLOCK_E, PIECE)
    is_expert = expert < num_experts
    address = logits + token.to(tl.int64) * stride
    best, winner, first, won, last = _winners(
        value, address, is_token, num_experts, BITS, TOP_K, K_PAD, ROWS, BLOCK_E, WIDTH, EXACT
    )

    lane = tl.arange(0, K_PAD)
    top = _value_of(first)
    winner_term = tl.where(lane[None, :] < TOP_K, _exp(_value_of(best) - top[:, None]), 0.0)
    if FULL:
        term = _exp(value - top[:, None])
        total = tl.sum(term if EXACT else tl.where(is_expert[None, :], term, 0.0), axis=1)
    else:
        total = _sum_of_winners(winner_term, ROWS, K_PAD)
    inverse = 1.0 / total
    if scores is not None:
        score = _exp(value - top[:, None]) * inverse[:, None]
        offset = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
        tl.store(scores + offset, score, mask=is_token[:, None] & is_expert[None, :])
    else:
        offset = token.to(tl.int64)[:, None] * TOP_K + lane[None, :]
        is_slot = is_token[:, None] & (lane[None, :] < TOP_K)
        tl.store(winner_scores + offset, winner_term * inverse[:, None], mask=is_slot)
        tl.store(winner_ids + offset, winner, mask=is_slot)
        tl.store(lse_by_token + token, top + tl.log(total), mask=is_token)
        if keys is not None:
            term = _exp(value - top[:, None])
            score = term * tl.where(is_token, inverse, 0.0)[:, None]
            key = _key_of(score, won, tl.where(is_token, 0, LOWEST)[:, None])
            _store_columns(keys, key, token, expert, num_experts, key_stride)
        else:
            values = _marks_of(top, inverse, last, is_token, BITS)
            _store_marks(marks, token, token < key_stride, values, ROWS)


@triton.jit
def _extremes_of_group(
    logits,
    marks,
    group,
    expert,
    num_tokens,
    num_experts,
    stride,
    BITS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    FULL: tl.constexpr,
):
    """Of each expert which tokens of the group did not choose it, as a word, the least and the
    greatest key, the greatest one of other parts, and which part has the greatest. FULL: there are
    all tokens. Behind the last expert anything."""
    free = tl.zeros([BLOCK_E], tl.uint32)
    least = tl.full([BLOCK_E], 0xFFFFFFFF, tl.uint32)
    greatest = tl.zeros([BLOCK_E], tl.uint32)
    second = tl.zeros([BLOCK_E], tl.uint32)
    first = tl.zeros([BLOCK_E], tl.int32)
    # The last token first, whose bit goes farthest.
    for index in tl.range(PARTS):
        part = PARTS - 1 - index
        greatest_here = tl.zeros([BLOCK_E], tl.uint32)
        for lane in tl.static_range(PART - 1, -1, -1):
            token = group * GROUP + part * PART + lane
            of_token = _marks_of_one(marks + 4 * token.to(tl.int64))
            address = logits + token.to(tl.int64) * stride + expert
            if FULL:
                value = tl.load(address, mask=expert < num_experts)
            else:
                mask = expert < tl.where(token < num_tokens, num_experts, 0)
                value = tl.load(address, mask=mask, other=0.0)
            key = _key_of_logit(value.to(tl.float32), expert, of_token, BITS)
            key = key.to(tl.uint32, bitcast=True)
            free = (free << 1) | (key >> 31)
            least = tl.minimum(least, key)
            greatest_here = tl.maximum(greatest_here, key)
        second = tl.maximum(second, tl.minimum(greatest, greatest_here))
        first = tl.where(greatest_here > greatest, part, first)
        greatest = tl.maximum(greatest, greatest_here)
    return free, least, greatest, second, first


@triton.jit(do_not_specialize=["num_tokens"])
def _summaries_kernel(
    logits,
    marks,
    summaries,
    words,
    num_tokens,
    num_experts,
    stride,
    key_stride,
    BITS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCKS: tl.constexpr,
    PER_THREAD: tl.constexpr,
):
    """summaries (E, groups, 4) of one group and BLOCK_E experts, and words (groups, E) once more: a thread has all tokens of its
    PER_THREAD experts, one after another, and waits for no other."""
    wait_for_earlier_launches()
    group = tl.program_id(0) // BLOCKS
    place = tl.max_contiguous(tl.arange(0, BLOCK_E), PER_THREAD)
    expert = tl.program_id(0) % BLOCKS * BLOCK_E + place
    if (group + 1) * GROUP <= num_tokens:
        free, least, greatest, second, first = _extremes_of_group(
            logits, marks, group, expert, num_tokens, num_experts, stride, BITS, BLOCK_E, True
        )
    else:
        free, least, greatest, second, first = _extremes_of_group(
            logits, marks, group, expert, num_tokens, num_experts, stride, BITS, BLOCK_E, False
        )
    word = ~free.to(tl.int32, bitcast=True)
    all_chose = popcount(word) >= tl.minimum(num_tokens - group * GROUP, GROUP)
    to_add, to_drop = _greatest_ranks(least, greatest, all_chose)
    # Of a part whose tokens all chose the expert it is a key below 2^31, and no rank to add.
    second = tl.where(second >> 31 == 1, second, 0).to(tl.int32, bitcast=True) & HIGHEST
    second = (second & -PARTS) | first
    summary = tl.join(tl.join(word, second), tl.join(to_add, to_drop))
    summary = tl.reshape(summary, [BLOCK_E, 4])
    offset = _offset_of_four(expert.to(tl.int64) * (key_stride // GROUP) + group)
    tl.store(summaries + offset, summary, mask=(expert < num_experts)[:, None])
    tl.store(words + group.to(tl.int64) * num_experts + expert, word, mask=expert < num_experts)


@triton.jit(do_not_specialize=["num_tokens"])
def _keys_kernel(
    scores,
    ids,
    keys,
    num_tokens,
    num_experts,
    stride,
    key_stride,
    TOP_K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Keys of given scores. Without ids one block holds whole rows and chooses by itself."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = (token[:, None] < num_tokens) & (expert[None, :] < num_experts)
    value = tl.load(
        scores + token.to(tl.int64)[:, None] * stride + expert[None, :], mask=mask, other=0.0
    )
    key = tl.where(mask, _rank_key(value.to(tl.float32)), -1)
    if HAS_IDS:
        chosen = key < -1
        for rank in range(TOP_K):
            slot = token.to(tl.int64) * TOP_K + rank
            winner = tl.load(ids + slot, mask=token < num_tokens, other=-1)
            chosen = chosen | (expert[None, :] == winner[:, None])
    else:
        chosen = _chosen(key, expert, TOP_K)
    key = tl.where(chosen, key, key | LOWEST)
    # The least of keys from T on.
    key = tl.where(token[:, None] < num_tokens, key, LOWEST)
    _store_columns(keys, key, token, expert, num_experts, key_stride)


# --- launchers ------------------------------------------------------------------------------------


_logit_scores = Launcher(_logit_scores_kernel, overlapping=True)
_summaries = Launcher(_summaries_kernel, overlapping=True)


def _blocks(block_e: int, itemsize: int, full: bool) -> tuple[int, int, int]:
    """Tokens, warps and the columns of a piece of a block that chooses. Eight tokens of an expert
    fill a sector of the keys, which up to 1024 experts allow.

    What a thread finds for a row costs as much whether it holds 8 elements of it or 32. A sum over
    all experts is left to more threads: its bits depend on who adds what.
    """
    per_thread = _ELEMENTS_PER_THREAD if block_e >= 128 and not full else 16
    rows = max(16 if block_e >= 64 and not full else 8, 512 // block_e)
    rows = min(rows, 32, _MAX_ELEMENTS // block_e)
    num_warps = max(1, rows * block_e // (32 * per_thread))
    parts = 1 if full else per_thread * itemsize // _BYTES_PER_LOAD
    return rows, num_warps, max(min(block_e, _LEAST_PIECE // itemsize), block_e // parts)


def _winner_blocks(
    block_e: int, itemsize: int, full: bool, leaves_marks: bool
) -> tuple[int, int, int]:
    """The same, whatever the block leaves. With marks and without a sum over all experts it is one
    warp, which has a row at once, as a number that a whole warp finds takes one instruction."""
    if full or not leaves_marks:
        return _blocks(block_e, itemsize, full)
    rows = max(1, _WINNER_ELEMENTS // block_e)
    return rows, max(1, block_e // _WINNER_ELEMENTS), min(block_e, 32 * _BYTES_PER_LOAD // itemsize)


def _key_stride(num_tokens: int) -> int:
    # Whole groups, so that keys move in whole vectors, and no mask is needed.
    return cdiv(num_tokens, GROUP.value) * GROUP.value


class Keys(NamedTuple):
    """Keys, as a ``table (E, stride)`` int32 with ``stride`` at least T; or ``logits (T, E)``, of
    which so many low ``bits`` carry nothing once they are fp32, ``marks (stride, 4)`` int32 that
    make keys of them, ``summaries (E, groups, 4)`` int32, and their ``words (groups, E)``."""

    table: torch.Tensor | None
    logits: torch.Tensor | None = None
    marks: torch.Tensor | None = None
    summaries: torch.Tensor | None = None
    words: torch.Tensor | None = None
    bits: int = 0

    @property
    def device(self) -> torch.device:
        return self._table_or_marks.device

    @property
    def stride(self) -> int:
        """Tokens of the table or of the marks, whole groups of them."""
        return self._table_or_marks.shape[0 if self.table is None else 1]

    @property
    def _table_or_marks(self) -> torch.Tensor:
        found = self.marks if self.table is None else self.table
        assert found is not None
        return found


def are_summarized(logits: torch.Tensor) -> bool:
    """Whether keys of logits are best left as summaries, without a table. fp32 has no bits free."""
    num_tokens, num_experts = logits.shape
    if not free_bits(logits.dtype, num_experts):
        return False
    few = num_experts < _LEAST_SUMMARIZED or num_tokens <= GROUP.value * (_LEAST_GROUPS - 1)
    return not few and num_experts <= _MOST_SUMMARIZED


def _launch(
    logits: torch.Tensor,
    scores: torch.Tensor | None,
    keys: Keys | None,
    winners: tuple[torch.Tensor | None, ...],
    top_k: int,
    full: bool,
) -> None:
    """Whichever there is: scores (T, E), the table or the marks of keys, and the ``winners`` with
    what their gradient needs, three tensors."""
    table, marks = (None, None) if keys is None else (keys.table, keys.marks)
    num_tokens, num_experts = logits.shape
    block_e = power_of_2(num_experts)
    rows, num_warps, piece = _winner_blocks(block_e, logits.itemsize, full, marks is not None)
    stride = _key_stride(num_tokens)
    _logit_scores(
        cdiv(stride, rows),
        logits,
        scores,
        table,
        marks,
        *winners,
        num_tokens,
        num_experts,
        logits.stride(0),
        stride,
        BITS=free_bits(logits.dtype, num_experts),
        TOP_K=top_k,
        K_PAD=power_of_2(top_k),
        FULL=full,
        ROWS=rows,
        BLOCK_E=block_e,
        PIECE=piece,
        WIDTH=group_width(block_e, top_k) if block_e >= _LEAST_GROUPED else 1,
        EXACT=num_experts == block_e,
        num_warps=num_warps,
    )


def _summarize_logits(keys: Keys) -> None:
    """Fill in the summaries of keys that have marks."""
    _, logits, marks, summaries, words, bits = keys
    assert logits is not None and summaries is not None
    num_tokens, num_experts = logits.shape
    blocks = cdiv(num_experts, _SUMMARY_BLOCK)
    _summaries(
        keys.stride // GROUP.value * blocks,
        logits,
        marks,
        summaries,
        words,
        num_tokens,
        num_experts,
        logits.stride(0),
        keys.stride,
        BITS=bits,
        BLOCK_E=_SUMMARY_BLOCK,
        BLOCKS=blocks,
        PER_THREAD=_EXPERTS_PER_THREAD,
        num_warps=_SUMMARY_BLOCK // (32 * _EXPERTS_PER_THREAD),
    )


def keys_of_logits(
    logits: torch.Tensor, top_k: int, full: bool, summarized: bool = False
) -> tuple[Keys, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, and what the gradient needs, in one launch, or two without a table.

    Args:
        logits: (T, E) bf16, fp16 or fp32, rows dense, T at least 1, E at most 4096.
        top_k: 1 to min(64, E). full: divide by the sum over all experts, not over the winners.
        summarized: no table, for dtypes of which :func:`are_summarized` may be true.

    Returns:
        The keys, ``winner_scores (T, top_k)`` fp32, ``winner_ids (T, top_k)`` int32, ``lse (T,)``
        fp32, the logarithm of the divisor.
    """
    num_tokens, num_experts = logits.shape
    device = logits.device
    stride = _key_stride(num_tokens)
    if summarized:
        options: dict[str, Any] = {"dtype": torch.int32, "device": device}
        groups = stride // GROUP.value
        marks = torch.empty(stride, 4, **options)
        summaries = torch.empty(num_experts, groups, 4, **options)
        words = torch.empty(groups, num_experts, **options)
        keys = Keys(None, logits, marks, summaries, words, free_bits(logits.dtype, num_experts))
    else:
        keys = Keys(torch.empty(num_experts, stride, dtype=torch.int32, device=device))
    winner_scores = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    winner_ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    lse = torch.empty(num_tokens, dtype=torch.float32, device=device)
    _launch(logits, None, keys, (winner_scores, winner_ids, lse), top_k, full)
    if summarized:
        _summarize_logits(keys)
    return keys, winner_scores, winner_ids, lse


def keys_of_scores(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """``keys (E, stride)`` of (T, E) scores, rows dense, T at least 1."""
    num_tokens, num_experts = scores.shape
    stride = _key_stride(num_tokens)
    keys = torch.empty(num_experts, stride, dtype=torch.int32, device=scores.device)
    block_e = power_of_2(num_experts)
    ids = None
    if block_e > MAX_BLOCK_E:
        _, ids = topk_scores(scores.clamp(min=0), top_k, ScoreOrder.SOFTMAX_OVER_TOPK)
        block_e = 128
    rows = min(64, max(1, _ELEMENTS // block_e))
    _keys_kernel[(cdiv(stride, rows), cdiv(num_experts, block_e))](
        scores,
        ids,
        keys,
        num_tokens,
        num_experts,
        scores.stride(0),
        stride,
        TOP_K=top_k,
        HAS_IDS=ids is not None,
        ROWS=rows,
        BLOCK_E=block_e,
        num_warps=4,
    )
    return keys


def winner_softmax(logits: torch.Tensor, top_k: int, full: bool) -> torch.Tensor:
    """Softmax of each row, over all entries, or over its ``top_k`` largest ones.

    Args:
        logits: (T, E) bf16, fp16 or fp32, E at most 4096. top_k: 1 to min(64, E).
        full: over all.

    Returns:
        (T, E) fp32, the scores that :func:`keys_of_logits` ranks. Over the winners, theirs sum to
        one, and the others are at most the least of them.
    """
    check_float("winner_softmax", logits=logits)
    scores = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        with device_of(logits):
            _launch(row_major(logits), scores, None, (None, None, None), top_k, full)
    return scores


@triton.jit(do_not_specialize=["num_tokens"])
def _winner_softmax_grad_kernel(
    dscores,
    scores,
    dlogits,
    num_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    wait_for_earlier_launches()
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_E)
    mask = (token[:, None] < num_tokens) & (expert[None, :] < num_experts)
    offset = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    score = tl.load(scores + offset, mask=mask, other=0.0)
    product = score * tl.load(dscores + offset, mask=mask, other=0.0)
    projection = tl.sum(product, axis=1)[:, None] * score
    if not FULL:
        chosen = _chosen(tl.where(mask, _rank_key(score), -1), expert, TOP_K)
        projection = tl.where(chosen, projection, 0.0)
    result = product - projection
    tl.store(dlogits + offset, result.to(dlogits.dtype.element_ty), mask=mask)


_winner_softmax_grad = Launcher(_winner_softmax_grad_kernel, overlapping=True)


def winner_softmax_grad(
    dscores: torch.Tensor, scores: torch.Tensor, top_k: int, full: bool, dtype: torch.dtype
) -> torch.Tensor:
    """(T, E) gradient of the logits of :func:`winner_softmax`, from its result."""
    num_tokens, num_experts = scores.shape
    check_shape("winner_softmax_grad", "dscores", dscores, (num_tokens, num_experts))
    dlogits = torch.empty(num_tokens, num_experts, dtype=dtype, device=scores.device)
    if num_tokens == 0:
        return dlogits
    block_e = power_of_2(num_experts)
    rows = min(64, max(1, _ELEMENTS // block_e))
    with device_of(scores):
        _winner_softmax_grad(
            cdiv(num_tokens, rows),
            dscores.contiguous(),
            scores.contiguous(),
            dlogits,
            num_tokens,
            num_experts,
            TOP_K=top_k,
            FULL=full,
            ROWS=rows,
            BLOCK_E=block_e,
            num_warps=4,
        )
    return dlogits
