"""Token rounding's ranks: what of the scores decides which tokens an expert keeps.

T tokens, E experts. A token chooses its ``top_k`` best experts; an expert prefers the tokens that
chose it, then high scores, then low token indices::

    key[t, e] = bits of the score, with the sign bit set if token t chose expert e

Keys are not kept. A program sees GROUP tokens of the experts and leaves, for each expert, which of
them chose it, and the greatest ranks that it has to add and to drop. Whoever needs a score later
computes it again, from the given scores, or as ``exp(v_e)`` over the sum of ``exp(v)``, of the
token's winners or of all experts, in the same operations and so with the same bits.
"""

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
    power_of_2,
    row_major,
)
from sonic.triton.launch import Launcher
from sonic.triton.topk import (
    HIGHEST,
    LOWEST,
    _select_best,
    _sortable,
    _value_of,
    free_bits,
    topk_scores,
)

GROUP = tl.constexpr(32)  # tokens whose verdicts share a word

MAX_BLOCK_E = 4096  # experts of a token in one block
_ELEMENTS = 4096  # of a block, or those of one token
_ELEMENTS_PER_WARP = 512  # where tokens choose
_ELEMENTS_OF_ROWS = 1024  # of a block of _WARPS warps, unless its rows are longer
_BYTES_PER_LOAD = 512  # of a warp
_WARPS = 4
_MOST_WARPS = 8  # of a block that chooses; more would have to do with too few registers


class Ranked(NamedTuple):
    """What :mod:`sonic.triton.rounding_select` needs of the scores.

    ``table`` (T, E): the scores; or logits, with ``scales`` (T, 2) fp32, the greatest one and the
    inverse of the divisor. ``words`` (groups, E) int32: bit i of a word is whether
    token i of the group chose the expert. ``tops`` (2, groups, E) int32: the greatest ranks of a
    token to drop, and to add; -1 if there is none."""

    table: torch.Tensor
    scales: torch.Tensor | None
    words: torch.Tensor
    tops: torch.Tensor


@triton.jit
def _rank_key(value):
    """int32 that orders like the fp32 score, negative scores as zero, any NaN highest."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value != value, HIGHEST, tl.maximum(bits, 0))


@triton.jit
def _key_of(score, chosen):
    rank = _rank_key(score)
    return tl.where(chosen, rank | LOWEST, rank)


@triton.jit
def _score_of(key):
    return (key & HIGHEST).to(tl.float32, bitcast=True)


@triton.jit
def _rank_to_add(key):
    """Of a token that did not choose the expert, greater for a better one; -1 of any other."""
    return tl.maximum(key, -1)


@triton.jit
def _rank_to_drop(key):
    """Of a token that chose the expert, greater for a worse one; -1 of any other."""
    return tl.maximum(~key, -1)


@triton.jit
def _softmax_score(logit, top, inverse):
    return tl.exp(logit - top) * inverse


@triton.jit
def _load_score(table, scales, token, expert, stride, mask):
    """fp32 scores of pairs, from scores, or if ``scales`` are given from logits."""
    address = table + token.to(tl.int64) * stride + expert
    value = tl.load(address, mask=mask, other=0.0).to(tl.float32)
    if scales is not None:
        scale = scales + 2 * token.to(tl.int64)
        top = tl.load(scale, mask=mask, other=0.0)
        inverse = tl.load(scale + 1, mask=mask, other=0.0)
        value = _softmax_score(value, top, inverse)
    return value


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
def _experts(BLOCK_E: tl.constexpr, HALVES: tl.constexpr):
    """The experts of a block's columns: in order, or of its two halves in turn."""
    column = tl.arange(0, BLOCK_E)
    if HALVES:
        column = (column % 2) * (BLOCK_E // 2) + column // 2
    return column


@triton.jit
def _load_logits(
    logits, row, num_experts, stride, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
    HALVES: tl.constexpr,
):  # fmt: skip
    """fp32 logits of all experts as :func:`_experts` has them, 0 behind the last one."""
    address = logits + row[:, None] * stride
    if HALVES:
        # A warp holds as much of a row as it loads at once. Two loads let it hold all of it, so
        # that what is summed over a row does not leave the warp.
        column = tl.arange(0, BLOCK_E // 2)[None, :]
        low = tl.load(address + column, mask=column < num_experts, other=0.0)
        column += BLOCK_E // 2
        high = tl.load(address + column, mask=column < num_experts, other=0.0)
        value = tl.reshape(tl.join(low, high), [ROWS, BLOCK_E])
    else:
        column = tl.arange(0, BLOCK_E)[None, :]
        value = tl.load(address + column, mask=column < num_experts, other=0.0)
    return value.to(tl.float32)


@triton.jit
def _no_ranks(ROWS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Words, greatest and least keys of no token, by row and expert."""
    word = tl.zeros([ROWS, BLOCK_E], tl.int32)
    greatest = tl.full([ROWS, BLOCK_E], LOWEST, tl.int32)
    return word, greatest, tl.full([ROWS, BLOCK_E], HIGHEST, tl.int32)


@triton.jit
def _with_ranks(word, greatest, least, key, place, is_token):
    """The three with the keys of one more token in each row, the ``place``-th of its group. Where
    there is none, its keys have to be those of another one."""
    bit = tl.where(is_token, 1 << place, 0)[:, None]
    word = tl.where(key < 0, word | bit, word)
    return word, tl.maximum(greatest, key), tl.minimum(least, key)


@triton.jit
def _store_ranks(words, tops, word, greatest, least, group, expert, num_tokens, num_experts):
    """A group's words and greatest ranks."""
    offset = group.to(tl.int64) * num_experts + expert
    mask = expert < num_experts
    tl.store(words + offset, tl.sum(word, axis=0), mask=mask)
    tl.store(tops + offset, _rank_to_drop(tl.min(least, axis=0)), mask=mask)
    offset += ((num_tokens + GROUP - 1) // GROUP).to(tl.int64) * num_experts
    tl.store(tops + offset, _rank_to_add(tl.max(greatest, axis=0)), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _logit_scores_kernel(
    logits,
    scores,
    words,
    tops,
    scales,
    winner_scores,
    winner_ids,
    lse_by_token,
    num_tokens,
    num_experts,
    stride,
    BITS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    HALVES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Scores of all experts, as (T, E) or as ranks; winners and their scores (T, TOP_K). Either
    ``scores`` or all other results may be missing; ``lse_by_token`` is the logarithm of the scores'
    divisor. EXACT: there are BLOCK_E experts, and no mask is needed."""
    group = tl.program_id(0)
    num_experts = BLOCK_E if EXACT else num_experts
    expert = _experts(BLOCK_E, HALVES)
    is_expert = expert < num_experts
    lane = tl.arange(0, K_PAD)
    word, greatest, least = _no_ranks(ROWS, BLOCK_E)
    for step in range(0, GROUP, ROWS):
        place = step + tl.arange(0, ROWS)
        token = group * GROUP + place
        is_token = token < num_tokens
        inside = is_token[:, None] & is_expert[None, :]
        # The last token once more, where there is none.
        source = tl.minimum(token, num_tokens - 1).to(tl.int64)
        value = _load_logits(logits, source, num_experts, stride, ROWS, BLOCK_E, HALVES)
        order = tl.where(is_expert[None, :], _sortable(value), LOWEST)
        index = tl.broadcast_to(expert[None, :], [ROWS, BLOCK_E])
        best, winner, left = _select_best(order, index, BITS, TOP_K, K_PAD, ROWS)

        top = _value_of(tl.max(best, axis=1))
        winner_term = tl.where(lane[None, :] < TOP_K, tl.exp(_value_of(best) - top[:, None]), 0.0)
        if FULL:
            term = tl.exp(value - top[:, None])
            total = tl.sum(tl.where(is_expert[None, :], term, 0.0), axis=1)
        else:
            total = tl.sum(winner_term, axis=1)
        inverse = 1.0 / total
        score = _softmax_score(value, top[:, None], inverse[:, None])
        if scores is not None:
            offset = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
            tl.store(scores + offset, score, mask=inside)
        if words is not None:
            key = _key_of(score, left == LOWEST)
            word, greatest, least = _with_ranks(word, greatest, least, key, place, is_token)
            side = tl.arange(0, 2)[None, :]
            scale = tl.where(side == 0, top[:, None], inverse[:, None])
            offset = token.to(tl.int64)[:, None] * 2 + side
            tl.store(scales + offset, scale, mask=is_token[:, None])
            tl.store(lse_by_token + token, top + tl.log(total), mask=is_token)
            offset = token.to(tl.int64)[:, None] * TOP_K + lane[None, :]
            is_slot = is_token[:, None] & (lane[None, :] < TOP_K)
            tl.store(winner_scores + offset, winner_term * inverse[:, None], mask=is_slot)
            tl.store(winner_ids + offset, winner, mask=is_slot)
    if words is not None:
        _store_ranks(words, tops, word, greatest, least, group, expert, num_tokens, num_experts)


@triton.jit(do_not_specialize=["num_tokens"])
def _rank_scores_kernel(
    scores,
    ids,
    words,
    tops,
    num_tokens,
    num_experts,
    stride,
    TOP_K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Ranks of given scores. Without ids one block holds whole rows and chooses by itself."""
    group = tl.program_id(0)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    is_expert = (expert < num_experts)[None, :]
    word, greatest, least = _no_ranks(ROWS, BLOCK_E)
    for step in range(0, GROUP, ROWS):
        place = step + tl.arange(0, ROWS)
        token = group * GROUP + place
        # The last token once more, where there is none.
        source = tl.minimum(token, num_tokens - 1).to(tl.int64)
        address = scores + source[:, None] * stride + expert[None, :]
        score = tl.load(address, mask=is_expert, other=0.0).to(tl.float32)
        if HAS_IDS:
            chosen = tl.zeros([ROWS, BLOCK_E], tl.int1)
            for rank in range(TOP_K):
                winner = tl.load(ids + source * TOP_K + rank)
                chosen = chosen | (expert[None, :] == winner[:, None])
        else:
            chosen = _chosen(tl.where(is_expert, _rank_key(score), -1), expert, TOP_K)
        key = _key_of(score, chosen)
        is_token = token < num_tokens
        word, greatest, least = _with_ranks(word, greatest, least, key, place, is_token)
    _store_ranks(words, tops, word, greatest, least, group, expert, num_tokens, num_experts)


# --- launchers ------------------------------------------------------------------------------------


_logit_scores = Launcher(_logit_scores_kernel)


def _rows_and_warps(block_e: int) -> tuple[int, int]:
    """Tokens of a group that are seen at once, and warps: of which each has a row, or several, as
    long as rows are short enough."""
    most = _MOST_WARPS * _ELEMENTS_PER_WARP // block_e
    rows = min(GROUP.value, max(_WARPS, _ELEMENTS_OF_ROWS // block_e), max(1, most))
    return rows, max(_WARPS, rows * block_e // _ELEMENTS_PER_WARP)


def _empty_ranks(num_tokens: int, num_experts: int, device: torch.device) -> list[torch.Tensor]:
    shape = cdiv(num_tokens, GROUP.value), num_experts
    options: dict[str, Any] = {"dtype": torch.int32, "device": device}
    return [torch.empty(shape, **options), torch.empty((2, *shape), **options)]


def _launch(
    logits: torch.Tensor, outputs: tuple[torch.Tensor | None, ...], top_k: int, full: bool
) -> None:
    num_tokens, num_experts = logits.shape
    block_e = power_of_2(num_experts)
    rows, num_warps = _rows_and_warps(block_e)
    _logit_scores(
        cdiv(num_tokens, GROUP.value),
        logits,
        *outputs,
        num_tokens,
        num_experts,
        logits.stride(0),
        BITS=free_bits(logits.dtype, num_experts),
        TOP_K=top_k,
        K_PAD=power_of_2(top_k),
        FULL=full,
        ROWS=rows,
        BLOCK_E=block_e,
        HALVES=block_e * logits.itemsize == 2 * _BYTES_PER_LOAD,
        EXACT=num_experts == block_e,
        num_warps=num_warps,
    )


def rank_logits(
    logits: torch.Tensor, top_k: int, full: bool
) -> tuple[Ranked, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ranks, and what the gradient needs, in one launch.

    Args:
        logits: (T, E) bf16, fp16 or fp32, rows dense, T at least 1, E at most 4096.
        top_k: 1 to min(64, E). full: divide by the sum over all experts, not over the winners.

    Returns:
        The ranks, ``winner_scores (T, top_k)`` fp32, ``winner_ids (T, top_k)`` int32, ``lse (T,)``
        fp32, the logarithm of the divisor.
    """
    num_tokens, num_experts = logits.shape
    device = logits.device
    words, tops = _empty_ranks(num_tokens, num_experts, device)
    winner_scores = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    winner_ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    scales = torch.empty(num_tokens, 2, dtype=torch.float32, device=device)
    lse = torch.empty(num_tokens, dtype=torch.float32, device=device)
    _launch(logits, (None, words, tops, scales, winner_scores, winner_ids, lse), top_k, full)
    return Ranked(logits, scales, words, tops), winner_scores, winner_ids, lse


def rank_scores(scores: torch.Tensor, top_k: int) -> Ranked:
    """Ranks of (T, E) scores, rows dense, T at least 1."""
    num_tokens, num_experts = scores.shape
    words, tops = _empty_ranks(num_tokens, num_experts, scores.device)
    block_e = power_of_2(num_experts)
    ids = None
    if block_e > MAX_BLOCK_E:
        _, ids = topk_scores(scores.clamp(min=0), top_k, ScoreOrder.SOFTMAX_OVER_TOPK)
        block_e = 128
    _rank_scores_kernel[(cdiv(num_tokens, GROUP.value), cdiv(num_experts, block_e))](
        scores,
        ids,
        words,
        tops,
        num_tokens,
        num_experts,
        scores.stride(0),
        TOP_K=top_k,
        HAS_IDS=ids is not None,
        ROWS=min(GROUP.value, max(1, _ELEMENTS // 2 // block_e)),
        BLOCK_E=block_e,
        num_warps=max(_WARPS, block_e // _ELEMENTS_PER_WARP),
    )
    return Ranked(scores, None, words, tops)


def winner_softmax(logits: torch.Tensor, top_k: int, full: bool) -> torch.Tensor:
    """Softmax of each row, over all entries, or over its ``top_k`` largest ones.

    Args:
        logits: (T, E) bf16, fp16 or fp32, E at most 4096. top_k: 1 to min(64, E).
        full: over all.

    Returns:
        (T, E) fp32, the scores that :func:`rank_logits` ranks. Over the winners, theirs sum to one,
        and the others are at most the least of them.
    """
    check_float("winner_softmax", logits=logits)
    scores = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        with device_of(logits):
            _launch(row_major(logits), (scores, *[None] * 6), top_k, full)
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


_winner_softmax_grad = Launcher(_winner_softmax_grad_kernel)


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
