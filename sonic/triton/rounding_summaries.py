"""Token rounding's summaries: what a search has to know of a group of tokens, without its keys.

A column of keys is searched by GROUPs of 32 tokens, of which a few numbers matter: which tokens
chose the expert, as a word, and the greatest *ranks* of one to add and of one to drop. Of a table
(:mod:`sonic.triton.rounding_keys`) they are found when they are asked for, unless columns are few
and long: then each is searched by one program, which would read it alone, and the many that write
the table leave *summaries* of it. Where columns are many there is no table: a kernel reads the
logits again, by expert, makes keys of them by the tokens' marks, and leaves summaries. These have a
fourth number, the *second*: which PART of eight tokens has the greatest rank to add, in two bits,
and in the others those of the greatest one of the other parts.
"""

import functools

import torch
import triton
import triton.language as tl

from sonic.triton.common import cdiv
from sonic.triton.launch import Fixed, Launcher, wait_for_earlier_launches
from sonic.triton.rounding_keys import (
    GROUP,
    Keys,
    _key_of_logit,
    _marks_of_one,
    _offset_of_four,
)
from sonic.triton.topk import HIGHEST, free_bits

PART = tl.constexpr(8)  # tokens of a group whose keys or logits are loaded at once
PARTS = tl.constexpr(4)  # of a group

# Experts from which, up to which, and groups from which on there are summaries instead of a table:
# where reading columns is much of the selection. Timed with 512 experts.
_LEAST_SUMMARIZED = 257
_MOST_SUMMARIZED = 512
_LEAST_GROUPS = 256
# Experts up to which a table has summaries too, with as many groups.
_MOST_WITH_TABLE = 64
_SUMMARY_BLOCK = 256  # experts of a program, which has one group of tokens
_EXPERTS_PER_THREAD = 4  # of it


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
    """Of a group, by its second, that with the greatest rank to add."""
    return second & (PARTS - 1)


@triton.jit
def most_of_other_parts(second):
    """At least the greatest rank to add of a group's other parts, and at most three more, by its
    second. Where they have none it is 3."""
    return second | (PARTS - 1)


@triton.jit
def _summarize(column, num_tokens, BLOCK: tl.constexpr):
    """Words, and greatest ranks to add and to drop, of BLOCK groups of a table, given by the
    addresses of their first keys and by how many tokens there are from there on."""
    lane = tl.arange(0, PART)[None, :]
    free = tl.zeros([BLOCK, PART], tl.uint32)
    least = tl.full([BLOCK, PART], 0xFFFFFFFF, tl.uint32)
    greatest = tl.zeros([BLOCK, PART], tl.uint32)
    for part in tl.static_range(PARTS):
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
def _load_summaries(summaries, expert, group, num_groups, BLOCK: tl.constexpr):
    """Words, seconds, and greatest ranks to add and to drop, of an expert's groups."""
    index = expert.to(tl.int64) * num_groups + group
    summary = tl.load(summaries + _offset_of_four(index))
    even, odd = tl.split(tl.reshape(summary, [BLOCK, 2, 2]))
    word, second = tl.split(even)
    to_add, to_drop = tl.split(odd)
    return word, second, to_add, to_drop


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


@triton.jit
def _store_summaries(
    summaries, words, found, group, expert, num_experts, num_groups, BLOCK_E: tl.constexpr
):
    """summaries (E, groups, 4) and words (groups, E) of one group: words, seconds, and greatest
    ranks to add and to drop. Selection changes the second words, here they are written in lines."""
    word, second, to_add, to_drop = found
    summary = tl.join(tl.join(word, second), tl.join(to_add, to_drop))
    summary = tl.reshape(summary, [BLOCK_E, 4])
    offset = _offset_of_four(expert.to(tl.int64) * num_groups + group)
    tl.store(summaries + offset, summary, mask=(expert < num_experts)[:, None])
    tl.store(words + group.to(tl.int64) * num_experts + expert, word, mask=expert < num_experts)


@triton.jit
def _summarize_written(
    keys, summaries, words, group, num_tokens, num_experts, key_stride, BLOCK_E: tl.constexpr
):
    """Summaries of a group of a table's tokens, whose keys this program has just written; seconds
    mean nothing."""
    # Orders the keys that other threads wrote before the loads.
    tl.debug_barrier()
    expert = tl.arange(0, BLOCK_E)
    # The last expert once more, where there is none.
    source = tl.minimum(expert, num_experts - 1)
    first_token = group * GROUP
    word, to_add, to_drop = _summarize(
        keys + source.to(tl.int64) * key_stride + first_token, num_tokens - first_token, BLOCK_E
    )
    found = word, word, to_add, to_drop
    num_groups = key_stride // GROUP
    _store_summaries(summaries, words, found, group, expert, num_experts, num_groups, BLOCK_E)


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
    """Summaries and words of one group and BLOCK_E experts. A thread has all tokens of its
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
    # A key below 2^31, which is no rank to add, if all tokens of the other parts chose the expert.
    second = tl.where(second >> 31 == 1, second, 0).to(tl.int32, bitcast=True) & HIGHEST
    found = word, (second & -PARTS) | first, to_add, to_drop
    num_groups = key_stride // GROUP
    _store_summaries(summaries, words, found, group, expert, num_experts, num_groups, BLOCK_E)


# --- launchers ------------------------------------------------------------------------------------


_summaries = Launcher(_summaries_kernel, overlapping=True)


def are_summarized(logits: torch.Tensor) -> bool:
    """Whether keys of logits are best left as summaries, without a table. fp32 has no bits free."""
    num_tokens, num_experts = logits.shape
    if not free_bits(logits.dtype, num_experts):
        return False
    few = num_experts < _LEAST_SUMMARIZED or num_tokens <= GROUP.value * (_LEAST_GROUPS - 1)
    return not few and num_experts <= _MOST_SUMMARIZED


def are_summarized_with_table(num_tokens: int, num_experts: int) -> bool:
    """Whether a table of keys that is made of logits has summaries besides."""
    return num_experts <= _MOST_WITH_TABLE and num_tokens > GROUP.value * (_LEAST_GROUPS - 1)


def summarize_logits(keys: Keys) -> None:
    """Fill in the summaries of keys that have marks."""
    _, logits, marks, summaries, words, bits = keys
    assert logits is not None and summaries is not None
    launch = _summaries_launch(*logits.shape, logits.stride(0), keys.stride, bits)
    launch(logits, marks, summaries, words)


@functools.lru_cache(maxsize=4096)
def _summaries_launch(
    num_tokens: int, num_experts: int, row_stride: int, key_stride: int, bits: int
) -> Fixed:
    blocks = cdiv(num_experts, _SUMMARY_BLOCK)
    kernel = _summaries.bind(
        BITS=bits,
        BLOCK_E=_SUMMARY_BLOCK,
        BLOCKS=blocks,
        PER_THREAD=_EXPERTS_PER_THREAD,
        num_warps=_SUMMARY_BLOCK // (32 * _EXPERTS_PER_THREAD),
    )
    programs = key_stride // GROUP.value * blocks
    return kernel.fix(programs, num_tokens, num_experts, row_stride, key_stride)
