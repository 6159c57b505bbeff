"""Token rounding's keys: how an expert ranks the tokens, as one int32 per token and expert.

T tokens, E experts. A token chooses its ``top_k`` best experts; an expert prefers the tokens that
chose it, then high scores, then low token indices::

    key[e, t] = bits of the score, with the sign bit set if token t did not choose expert e

Keys are written column by column, from given scores or, in one pass that also finds the winners,
from logits. The score of expert e is then ``exp(v_e)`` over the sum of ``exp(v)``, of the token's
winners or of all experts.
"""

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
    _packed,
    _select,
    _select_packed,
    _sortable,
    _unpacked,
    _value_of,
    free_bits,
    topk_scores,
)

MAX_BLOCK_E = 4096  # experts of a token in one block
_ELEMENTS = 4096  # of a block, or those of one token
_ELEMENTS_PER_THREAD = 32  # where tokens choose from many experts
_MAX_ELEMENTS = 8192  # there; more take too many warps
_BYTES_PER_LOAD = 16  # of a thread
_LEAST_PIECE = 32  # bytes of a row that are loaded together, a sector


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
def _store_columns(keys, key, token, expert, num_experts, key_stride):
    """keys (E, key_stride) from a block (ROWS, experts)."""
    offset = expert.to(tl.int64)[:, None] * key_stride + token[None, :]
    mask = (expert[:, None] < num_experts) & (token[None, :] < key_stride)
    tl.store(keys + offset, tl.trans(key), mask=mask)


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
def _winners(
    order,
    expert,
    is_expert,
    BITS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Sortable logits and ids of each row's winners (ROWS, K_PAD), whatever they are from TOP_K on,
    its greatest one (ROWS,), and which columns won."""
    index = tl.broadcast_to(expert[None, :], [ROWS, BLOCK_E])
    if BITS == 0:
        order = tl.where(is_expert[None, :], order, LOWEST)
        best, winner, left = _select(order, index, TOP_K, K_PAD, ROWS)
        return best, winner, tl.max(best, axis=1), left == LOWEST
    else:
        packed = _packed(order, index, BITS)
        if not EXACT:
            packed = tl.where(is_expert[None, :], packed, LOWEST)
        best, first, last = _select_packed(packed, TOP_K, K_PAD, ROWS, False)
        best, winner = _unpacked(best, BITS)
        first, _ = _unpacked(first, BITS)
        return best, winner, first, packed >= last[:, None]


@triton.jit(do_not_specialize=["num_tokens"])
def _logit_scores_kernel(
    logits,
    scores,
    keys,
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
    EXACT: tl.constexpr,
):
    """Scores of all experts, as (T, E) or as keys; winners and their scores (T, TOP_K). Either
    pair of pointers may be missing; ``lse_by_token`` is the logarithm of the scores' divisor.
    EXACT: there are BLOCK_E experts, and no mask is needed."""
    num_experts = BLOCK_E if EXACT else num_experts
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = token < num_tokens
    expert = tl.arange(0, BLOCK_E)
    value = _load_logits(logits, token, is_token, num_experts, stride, ROWS, BLOCK_E, PIECE)
    is_expert = expert < num_experts
    best, winner, first, won = _winners(
        _sortable(value), expert, is_expert, BITS, TOP_K, K_PAD, ROWS, BLOCK_E, EXACT
    )

    lane = tl.arange(0, K_PAD)
    top = _value_of(first)
    term = tl.exp(value - top[:, None])
    winner_term = tl.where(lane[None, :] < TOP_K, tl.exp(_value_of(best) - top[:, None]), 0.0)
    if FULL:
        total = tl.sum(term if EXACT else tl.where(is_expert[None, :], term, 0.0), axis=1)
    else:
        total = tl.sum(winner_term, axis=1)
    inverse = 1.0 / total
    score = term * inverse[:, None]
    if scores is not None:
        offset = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
        tl.store(scores + offset, score, mask=is_token[:, None] & is_expert[None, :])
    if keys is not None:
        # Scores are at least 0. One that is no number makes its token's divisor none, and so all
        # scores of the token: what ranks them is a matter of rows.
        bits = score.to(tl.int32, bitcast=True) & tl.where(is_token, HIGHEST, 0)[:, None]
        if_won = tl.where(is_token, tl.where(total == total, 0, HIGHEST), LOWEST)
        key = bits | tl.where(won, if_won[:, None], (if_won | LOWEST)[:, None])
        _store_columns(keys, key, token, expert, num_experts, key_stride)
        tl.store(lse_by_token + token, top + tl.log(total), mask=is_token)
        offset = token.to(tl.int64)[:, None] * TOP_K + lane[None, :]
        is_slot = is_token[:, None] & (lane[None, :] < TOP_K)
        tl.store(winner_scores + offset, winner_term * inverse[:, None], mask=is_slot)
        tl.store(winner_ids + offset, winner, mask=is_slot)


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


_logit_scores = Launcher(_logit_scores_kernel)


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


def _key_stride(num_tokens: int) -> int:
    # A multiple of 16, so that keys move in whole vectors.
    return cdiv(num_tokens, 16) * 16


def _launch(
    logits: torch.Tensor, outputs: tuple[torch.Tensor | None, ...], top_k: int, full: bool
) -> None:
    num_tokens, num_experts = logits.shape
    block_e = power_of_2(num_experts)
    rows, num_warps, piece = _blocks(block_e, logits.itemsize, full)
    stride = _key_stride(num_tokens)
    _logit_scores(
        cdiv(stride, rows),
        logits,
        *outputs,
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
        EXACT=num_experts == block_e,
        num_warps=num_warps,
    )


def keys_of_logits(
    logits: torch.Tensor, top_k: int, full: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, and what the gradient needs, in one launch.

    Args:
        logits: (T, E) bf16, fp16 or fp32, rows dense, T at least 1, E at most 4096.
        top_k: 1 to min(64, E). full: divide by the sum over all experts, not over the winners.

    Returns:
        ``keys (E, stride)`` int32 with ``stride`` at least T, ``winner_scores (T, top_k)`` fp32,
        ``winner_ids (T, top_k)`` int32, ``lse (T,)`` fp32, the logarithm of the divisor.
    """
    num_tokens, num_experts = logits.shape
    device = logits.device
    keys = torch.empty(num_experts, _key_stride(num_tokens), dtype=torch.int32, device=device)
    winner_scores = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    winner_ids = torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)
    lse = torch.empty(num_tokens, dtype=torch.float32, device=device)
    _launch(logits, (None, keys, winner_scores, winner_ids, lse), top_k, full)
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
            _launch(row_major(logits), (scores, None, None, None, None), top_k, full)
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
