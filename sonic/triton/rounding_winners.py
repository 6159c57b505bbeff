"""Token rounding's scores: a kernel that finds the winners of logits, and so their scores.

The score of expert e is ``exp(v_e)`` over the sum of ``exp(v)``, of the token's winners or of all
experts. In the same pass they become keys (:mod:`sonic.triton.rounding_keys`), column by column, or
tokens' marks where keys are left to summaries; or, for whoever wants scores alone, a table (T, E).
"""

import functools
from enum import Enum
from typing import Any

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
from sonic.triton.rounding_keys import (
    _ELEMENTS,
    GROUP,
    MAX_BLOCK_E,
    Keys,
    _chosen,
    _exp,
    _key_of,
    _key_stride,
    _marks_of,
    _rank_key,
    _store_columns,
    _store_marks,
)
from sonic.triton.rounding_summaries import (
    _summarize_written,
    are_summarized_with_table,
    summarize_logits,
)
from sonic.triton.topk import (
    LOWEST,
    _packed,
    _select,
    _select_in_groups,
    _select_packed,
    _sortable,
    _unpacked,
    _value_of,
    free_bits,
    group_width,
)

MAX_EXPERTS = MAX_BLOCK_E  # of logits: one block holds all of a token

_ELEMENTS_PER_THREAD = 32  # where tokens choose from many experts
_MAX_ELEMENTS = 8192  # of a block there; more take too many warps
_BYTES_PER_LOAD = 16  # of a thread
_LEAST_PIECE = 32  # bytes of a row that are loaded together, a sector
_LEAST_GROUPED = 256  # experts of a block that is searched by groups of columns
# A program that leaves marks is one warp, so that no reduction leaves it.
_WINNER_ELEMENTS = 2048  # of it: several tokens, whose searches wait side by side


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
    summaries,
    words,
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
    Where keys have summaries a program has one group of tokens. EXACT: there are BLOCK_E experts,
    and no mask is needed."""
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
            if summaries is not None:
                tl.static_assert(ROWS == GROUP)
                _summarize_written(
                    keys, summaries, words, tl.program_id(0), num_tokens, num_experts, key_stride,
                    BLOCK_E,
                )  # fmt: skip
        else:
            values = _marks_of(top, inverse, last, is_token, BITS)
            _store_marks(marks, token, token < key_stride, values, ROWS)


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


# --- launchers ------------------------------------------------------------------------------------


_logit_scores = Launcher(_logit_scores_kernel, overlapping=True)
_winner_softmax_grad = Launcher(_winner_softmax_grad_kernel, overlapping=True)


class _Leaves(Enum):
    """What a kernel of scores leaves."""

    SCORES = "scores, or the table of keys"
    SUMMARIES = "the table of keys, and summaries of it"
    MARKS = "tokens' marks"


def _blocks(block_e: int, itemsize: int, full: bool, whole_groups: bool) -> tuple[int, int, int]:
    """Tokens, warps and the columns of a piece of a block that chooses. Eight tokens of an expert
    fill a sector of the keys, which up to 1024 experts allow; ``whole_groups``: up to 256.

    What a thread finds for a row costs as much whether it holds 8 elements of it or 32. A sum over
    all experts is left to more threads: its bits depend on who adds what.
    """
    per_thread = _ELEMENTS_PER_THREAD if block_e >= 128 and not full else 16
    rows = max(16 if block_e >= 64 and not full else 8, 512 // block_e)
    rows = GROUP.value if whole_groups else min(rows, 32, _MAX_ELEMENTS // block_e)
    num_warps = max(1, rows * block_e // (32 * per_thread))
    parts = 1 if full else per_thread * itemsize // _BYTES_PER_LOAD
    return rows, num_warps, max(min(block_e, _LEAST_PIECE // itemsize), block_e // parts)


def _winner_blocks(
    block_e: int, itemsize: int, full: bool, leaves: _Leaves
) -> tuple[int, int, int]:
    """The same, whatever the block leaves. With marks and without a sum over all experts it is one
    warp, which has a row at once, as a number that a whole warp finds takes one instruction."""
    if full or leaves is not _Leaves.MARKS:
        return _blocks(block_e, itemsize, full, leaves is _Leaves.SUMMARIES)
    rows = max(1, _WINNER_ELEMENTS // block_e)
    return rows, max(1, block_e // _WINNER_ELEMENTS), min(block_e, 32 * _BYTES_PER_LOAD // itemsize)


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
    table, marks, summaries, words = None, None, None, None
    leaves = _Leaves.SCORES
    if keys is not None and keys.table is None:
        leaves, marks = _Leaves.MARKS, keys.marks  # a kernel behind this one summarizes them
    elif keys is not None:
        table, _, _, summaries, words, _ = keys
        if summaries is not None:
            leaves = _Leaves.SUMMARIES
    launch = _winners_launch(*logits.shape, logits.dtype, logits.stride(0), top_k, full, leaves)
    launch(logits, scores, table, marks, summaries, words, *winners)


@functools.lru_cache(maxsize=4096)
def _winners_launch(
    num_tokens: int,
    num_experts: int,
    dtype: torch.dtype,
    row_stride: int,
    top_k: int,
    full: bool,
    leaves: _Leaves,
) -> Fixed:
    block_e = power_of_2(num_experts)
    rows, num_warps, piece = _winner_blocks(block_e, dtype.itemsize, full, leaves)
    stride = _key_stride(num_tokens)
    kernel = _logit_scores.bind(
        BITS=free_bits(dtype, num_experts),
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
    return kernel.fix(cdiv(stride, rows), num_tokens, num_experts, row_stride, stride)


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
    options: dict[str, Any] = {"dtype": torch.int32, "device": device}
    summaries = words = None
    if summarized or are_summarized_with_table(num_tokens, num_experts):
        groups = stride // GROUP.value
        summaries = torch.empty(num_experts, groups, 4, **options)
        words = torch.empty(groups, num_experts, **options)
    if summarized:
        marks = torch.empty(stride, 4, **options)
        keys = Keys(None, logits, marks, summaries, words, free_bits(logits.dtype, num_experts))
    else:
        keys = Keys(torch.empty(num_experts, stride, **options), None, None, summaries, words)
    winner_scores = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    winner_ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    lse = torch.empty(num_tokens, dtype=torch.float32, device=device)
    _launch(logits, None, keys, (winner_scores, winner_ids, lse), top_k, full)
    if summarized:
        summarize_logits(keys)
    return keys, winner_scores, winner_ids, lse


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
