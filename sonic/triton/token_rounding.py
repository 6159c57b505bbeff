"""Token rounding: every expert's row count becomes a multiple of the tile, and the routing plan of
the pairs that are kept follows in the same launches.

T tokens, E experts, M the tile. A token chooses its ``top_k`` best experts; an expert prefers the
tokens that chose it, then high scores, then low token indices, and keeps as many as its rounded
count says. One int32 orders a column like that::

    key[e, t] = bits of the score, with the sign bit set if token t did not choose expert e

``_keys_kernel`` writes it column by column, ``_select_kernel`` finds by bisection the key at which
an expert's kept tokens end (only its last tile is undecided, but no list of candidates is needed)
and leaves 32 tokens' verdicts in a word and the expert's kept tokens before them in a count, and
``_emit_kernel`` reads pairs, slots and rows off the words and the counts. Nothing is sorted.

Source: SonicMoE (arXiv 2512.14080), algorithms 4 and 6.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from sonic.enums import ScoreOrder
from sonic.triton.common import check_float, check_shape, device_of, row_major
from sonic.triton.topk import topk_scores

LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)
GROUP = tl.constexpr(32)  # tokens whose verdicts share a word

MAX_BLOCK_E = 4096  # experts of a token in one block
_MAX_HELD = 32768  # keys of a column in registers
_MAX_CHUNK_T = 16384
_BALANCE_BLOCK = 1024  # experts whose running error is found at once


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


# --- scores ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_tokens"])
def _winner_softmax_kernel(
    logits,
    scores,
    num_tokens,
    num_experts,
    stride,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """exp(v_e) over the sum of exp(v) of the token's winners."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_E)
    mask = (token[:, None] < num_tokens) & (expert[None, :] < num_experts)
    offset = token.to(tl.int64)[:, None] * stride + expert[None, :]
    value = tl.load(logits + offset, mask=mask, other=0.0).to(tl.float32)
    top = tl.max(tl.where(mask, value, float("-inf")), axis=1)
    term = tl.exp(value - top[:, None])
    chosen = _chosen(tl.where(mask, _rank_key(term), -1), expert, TOP_K)
    result = term / tl.sum(tl.where(chosen & mask, term, 0.0), axis=1)[:, None]
    offset = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    tl.store(scores + offset, result, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _winner_softmax_grad_kernel(
    dscores,
    scores,
    dlogits,
    num_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_E)
    mask = (token[:, None] < num_tokens) & (expert[None, :] < num_experts)
    offset = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    score = tl.load(scores + offset, mask=mask, other=0.0)
    product = score * tl.load(dscores + offset, mask=mask, other=0.0)
    chosen = _chosen(tl.where(mask, _rank_key(score), -1), expert, TOP_K)
    projection = tl.sum(product, axis=1)[:, None] * score
    result = product - tl.where(chosen, projection, 0.0)
    tl.store(dlogits + offset, result.to(dlogits.dtype.element_ty), mask=mask)


# --- keys -----------------------------------------------------------------------------------------


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
    """keys (E, key_stride), the least of keys from T on. Without ids one block holds whole rows and
    chooses by itself."""
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
    key = tl.trans(tl.where(token[:, None] < num_tokens, key, LOWEST))
    offset = expert.to(tl.int64)[:, None] * key_stride + token[None, :]
    mask = (expert[:, None] < num_experts) & (token[None, :] < key_stride)
    tl.store(keys + offset, key, mask=mask)


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
def _threshold(column, held, want, frequency, length, BLOCK: tl.constexpr, HELD: tl.constexpr):
    """``(v, n)``: the first ``want`` tokens are those with keys above v, and the first n equal to
    v."""
    in_chosen = want <= frequency
    zero = tl.zeros([], tl.int64)
    # At least `want` keys reach `low`, fewer reach `high`, and `beyond` counts the latter.
    low = zero + tl.where(in_chosen, 0, LOWEST)
    high = zero + tl.where(in_chosen, HIGHEST, -1) + 1
    beyond = tl.where(in_chosen, 0, frequency)
    exact = want == frequency
    while (high - low > 1) & (exact == 0):
        middle = (low + high) >> 1
        count = _count_from(column, held, middle.to(tl.int32), length, BLOCK, HELD)
        enough = count >= want
        exact = count == want
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        beyond = tl.where(enough, beyond, count)
    return tl.where(exact, low - 1, low).to(tl.int32), tl.where(exact, 0, want - beyond)


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


@triton.jit(do_not_specialize=["num_tokens", "num_groups", "tile"])
def _select_kernel(
    keys,
    uniform,
    count_by_expert,
    words,
    counts_before,
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
    held = _load_keys(column, 0, key_stride, BLOCK)
    frequency = _count_from(column, held, 0, key_stride, BLOCK, HELD)
    lower, upper = _reachable(frequency, num_tokens, tile)
    if RULE == "nr-s":
        below, ties_below = _threshold(column, held, lower, frequency, key_stride, BLOCK, HELD)
        above, ties_above = _threshold(column, held, upper, frequency, key_stride, BLOCK, HELD)
        last = _mass_to_the_threshold(
            column, -1, below, below, frequency - lower, key_stride, BLOCK
        )
        added = _mass_to_the_threshold(
            column, above, 0, above, upper - frequency, key_stride, BLOCK
        )
        goes_up = tl.load(uniform + expert).to(tl.float64) * (last + added) < last
        count = tl.where(goes_up, upper, lower)
        threshold = tl.where(goes_up, above, below)
        ties = tl.where(goes_up, ties_above, ties_below)
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
        threshold, ties = _threshold(column, held, count, frequency, key_stride, BLOCK, HELD)
    if RULE != "given":
        tl.store(count_by_expert + expert, count)

    lane = tl.arange(0, GROUP)
    ties_before = 0
    kept_before = 0
    for start in range(0, key_stride, CHUNK):
        key = _load_keys(column, start, key_stride, CHUNK)
        keep = key > threshold
        if ties > 0:
            tied = (key == threshold).to(tl.int32)
            rank = ties_before + tl.cumsum(tied, axis=0)
            keep = keep | ((tied > 0) & (rank <= ties))
            ties_before += tl.sum(tied, axis=0)
        bits = tl.reshape(keep.to(tl.int32), [CHUNK // GROUP, GROUP])
        size = tl.sum(bits, axis=1)
        group = start // GROUP + tl.arange(0, CHUNK // GROUP)
        offset = group.to(tl.int64) * num_experts + expert
        inside = group < num_groups
        tl.store(words + offset, tl.sum(bits << lane[None, :], axis=1), mask=inside)
        tl.store(counts_before + offset, kept_before + tl.cumsum(size, axis=0) - size, mask=inside)
        kept_before += tl.sum(size, axis=0)


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


# --- pairs, slots and rows ------------------------------------------------------------------------


@triton.jit(do_not_specialize=["num_tokens", "num_groups", "num_slots"])
def _emit_kernel(
    words,
    counts_before,
    count_by_expert,
    scores,
    token_ids,
    expert_ids,
    weights,
    offset_by_expert,
    token_by_row,
    slot_by_row,
    row_by_slot,
    offset_by_token,
    slot_by_position,
    num_tokens,
    num_experts,
    num_groups,
    num_slots,
    stride,
    BLOCK_E: tl.constexpr,
    BLOCK_TAIL: tl.constexpr,
):
    """The first ``num_groups`` programs write a group of tokens each, the others what lies behind
    the last pair."""
    pid = tl.program_id(0)
    lane = tl.arange(0, GROUP)
    block = tl.arange(0, BLOCK_E)
    if pid < num_groups:
        token = pid * GROUP + lane
        line = pid.to(tl.int64) * num_experts
        size = tl.zeros([GROUP], tl.int32)
        before = 0
        for start in range(0, num_experts, BLOCK_E):
            expert = start + block
            word = tl.load(words + line + expert, mask=expert < num_experts, other=0)
            earlier = tl.load(counts_before + line + expert, mask=expert < num_experts, other=0)
            size += tl.sum((word[None, :] >> lane[:, None]) & 1, axis=1)
            # Pairs of earlier groups have lower tokens, and so lower slots, whatever their expert.
            before += tl.sum(earlier, axis=0)
        slot = before + tl.cumsum(size, axis=0) - size
        tl.store(offset_by_token + token, slot, mask=token < num_tokens)
        tl.store(offset_by_token + token + 1, slot + size, mask=token == num_tokens - 1)
        offset_limit = tl.where(pid == 0, num_experts, 0)
        first_row = 0
        for start in range(0, num_experts, BLOCK_E):
            expert = start + block
            inside = expert < num_experts
            word = tl.load(words + line + expert, mask=inside, other=0)
            earlier = tl.load(counts_before + line + expert, mask=inside, other=0)
            count = tl.load(count_by_expert + expert, mask=inside, other=0)
            offset = first_row + tl.cumsum(count, axis=0) - count
            tl.store(offset_by_expert + expert, offset, mask=expert < offset_limit)
            bit = (word[None, :] >> lane[:, None]) & 1
            kept = bit > 0
            position = slot[:, None] + tl.cumsum(bit, axis=1) - bit
            row = (offset + earlier)[None, :] + tl.cumsum(bit, axis=0) - bit
            tokens = tl.broadcast_to(token[:, None], [GROUP, BLOCK_E])
            experts = tl.broadcast_to(expert[None, :], [GROUP, BLOCK_E])
            address = scores + token.to(tl.int64)[:, None] * stride + expert[None, :]
            score = tl.load(address, mask=kept, other=0.0).to(tl.float32)
            tl.store(token_ids + position, tokens, mask=kept)
            tl.store(expert_ids + position, experts, mask=kept)
            tl.store(weights + position, score, mask=kept)
            tl.store(row_by_slot + position, row, mask=kept)
            tl.store(slot_by_position + position, position, mask=kept)
            tl.store(token_by_row + row, tokens, mask=kept)
            tl.store(slot_by_row + row, position, mask=kept)
            slot += tl.sum(bit, axis=1)
            first_row += tl.sum(count, axis=0)
        last = lane < tl.where(pid == 0, 1, 0)
        tl.store(offset_by_expert + num_experts + lane, first_row, mask=last)
    else:
        live = 0
        for start in range(0, num_experts, BLOCK_E):
            expert = start + block
            count = tl.load(count_by_expert + expert, mask=expert < num_experts, other=0)
            live += tl.sum(count, axis=0)
        index = (pid - num_groups).to(tl.int64) * BLOCK_TAIL + tl.arange(0, BLOCK_TAIL)
        dead = (index >= live) & (index < num_slots)
        tl.store(token_ids + index, num_tokens, mask=dead)
        tl.store(expert_ids + index, num_experts, mask=dead)
        tl.store(weights + index, 0.0, mask=dead)
        tl.store(row_by_slot + index, -1, mask=dead)
        tl.store(slot_by_position + index, -1, mask=dead)
        tl.store(token_by_row + index, -1, mask=dead)
        tl.store(slot_by_row + index, -1, mask=dead)


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
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < num_slots
    token = tl.load(token_ids + slot, mask=inside, other=num_tokens).to(tl.int64)
    live = token < num_tokens
    expert = tl.load(expert_ids + slot, mask=live, other=0)
    value = tl.load(dweights + slot, mask=live, other=0.0)
    tl.store(dscores + token * num_experts + expert, value.to(dscores.dtype.element_ty), mask=live)


# --- launchers ------------------------------------------------------------------------------------


def _rows_of(block_e: int) -> int:
    return min(64, max(1, 4096 // block_e))


def winner_softmax(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Softmax of each row, over its ``top_k`` largest entries instead of all.

    Args:
        logits: (T, E) bf16, fp16 or fp32, E at most 4096. top_k: 1 to min(64, E).

    Returns:
        (T, E) fp32; those of the winners sum to one, the others are at most the least of them.
    """
    check_float("winner_softmax", logits=logits)
    num_tokens, num_experts = logits.shape
    scores = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=logits.device)
    if num_tokens == 0:
        return scores
    logits = row_major(logits)
    block_e = triton.next_power_of_2(num_experts)
    rows = _rows_of(block_e)
    with device_of(logits):
        _winner_softmax_kernel[(triton.cdiv(num_tokens, rows),)](
            logits,
            scores,
            num_tokens,
            num_experts,
            logits.stride(0),
            TOP_K=top_k,
            ROWS=rows,
            BLOCK_E=block_e,
            num_warps=4,
        )
    return scores


def winner_softmax_grad(
    dscores: torch.Tensor, scores: torch.Tensor, top_k: int, dtype: torch.dtype
) -> torch.Tensor:
    """(T, E) gradient of the logits of :func:`winner_softmax`, from its result."""
    num_tokens, num_experts = scores.shape
    check_shape("winner_softmax_grad", "dscores", dscores, (num_tokens, num_experts))
    dlogits = torch.empty(num_tokens, num_experts, dtype=dtype, device=scores.device)
    if num_tokens == 0:
        return dlogits
    block_e = triton.next_power_of_2(num_experts)
    rows = _rows_of(block_e)
    with device_of(scores):
        _winner_softmax_grad_kernel[(triton.cdiv(num_tokens, rows),)](
            dscores.contiguous(),
            scores.contiguous(),
            dlogits,
            num_tokens,
            num_experts,
            TOP_K=top_k,
            ROWS=rows,
            BLOCK_E=block_e,
            num_warps=4,
        )
    return dlogits


def _column_keys(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    num_tokens, num_experts = scores.shape
    key_stride = triton.cdiv(num_tokens, 16) * 16
    keys = torch.empty(num_experts, key_stride, dtype=torch.int32, device=scores.device)
    block_e = triton.next_power_of_2(num_experts)
    ids = None
    if block_e > MAX_BLOCK_E:
        _, ids = topk_scores(scores.clamp(min=0), top_k, ScoreOrder.SOFTMAX_OVER_TOPK)
        block_e = 128
    rows = _rows_of(block_e)
    _keys_kernel[(triton.cdiv(key_stride, rows), triton.cdiv(num_experts, block_e))](
        scores,
        ids,
        keys,
        num_tokens,
        num_experts,
        scores.stride(0),
        key_stride,
        TOP_K=top_k,
        HAS_IDS=ids is not None,
        ROWS=rows,
        BLOCK_E=block_e,
        num_warps=4,
    )
    return keys


def _balanced_counts(keys: torch.Tensor, num_tokens: int, tile: int, block: int) -> torch.Tensor:
    num_experts, key_stride = keys.shape
    frequency = torch.empty(num_experts, dtype=torch.int32, device=keys.device)
    counts = torch.empty_like(frequency)
    _frequency_kernel[(num_experts,)](
        keys, frequency, key_stride, BLOCK=block, num_warps=max(4, block // 1024)
    )
    block = min(triton.next_power_of_2(num_experts), _BALANCE_BLOCK)
    _balance_kernel[(1,)](
        frequency, counts, num_tokens, num_experts, tile, BLOCK=block, num_warps=4
    )
    return counts


def round_tokens(
    scores: torch.Tensor,
    uniform: torch.Tensor | None,
    top_k: int,
    tile: int,
    rule: str,
    num_slots: int,
) -> tuple[torch.Tensor, ...]:
    """Kept pairs and their routing plan.

    Args:
        scores: (T, E) bf16, fp16 or fp32, T at least 1.
        uniform: (E,) fp32 in [0, 1), for ``"sr"`` and ``"nr-s"``.
        top_k: 1 to min(64, E). tile: at least 1. rule: see :mod:`sonic.routing.token_rounding`.
        num_slots: S, a bound on the pairs that are kept.

    Returns:
        ``weights`` (S,) fp32, ``token_ids`` and ``expert_ids`` (S,) int32, then the six tensors of
        a :class:`sonic.RoutingPlan` in its order.
    """
    check_float("token_rounding", scores=scores)
    num_tokens, num_experts = scores.shape
    if uniform is not None:
        check_shape("token_rounding", "uniform", uniform, (num_experts,))
    scores = row_major(scores)
    device = scores.device
    num_groups = triton.cdiv(num_tokens, GROUP.value)
    options: dict[str, Any] = {"dtype": torch.int32, "device": device}
    words = torch.empty(num_groups, num_experts, **options)
    counts_before = torch.empty_like(words)
    by_slot = [torch.empty(num_slots, **options) for _ in range(6)]
    token_ids, expert_ids, token_by_row, slot_by_row, row_by_slot, slot_by_position = by_slot
    weights = torch.empty(num_slots, dtype=torch.float32, device=device)
    offset_by_expert = torch.empty(num_experts + 1, **options)
    offset_by_token = torch.empty(num_tokens + 1, **options)
    by_row = token_by_row, slot_by_row, row_by_slot
    plan = (offset_by_expert, *by_row, offset_by_token, slot_by_position)
    block = max(1024, triton.next_power_of_2(num_tokens))
    block = block if block <= _MAX_HELD else _MAX_CHUNK_T
    with device_of(scores):
        keys = _column_keys(scores, top_k)
        balanced = rule == "balance-f"
        if balanced:
            counts = _balanced_counts(keys, num_tokens, tile, block)
        else:
            counts = torch.empty(num_experts, **options)
        _select_kernel[(num_experts,)](
            keys,
            uniform,
            counts,
            words,
            counts_before,
            num_tokens,
            num_experts,
            num_groups,
            keys.shape[1],
            tile,
            RULE="given" if balanced else rule,
            BLOCK=block,
            CHUNK=min(block, _MAX_CHUNK_T),
            HELD=num_tokens <= block,
            num_warps=max(4, block // 1024),
        )
        tail = 1024
        block_e = min(64, max(16, triton.next_power_of_2(num_experts)))
        _emit_kernel[(num_groups + triton.cdiv(num_slots, tail),)](
            words,
            counts_before,
            counts,
            scores,
            token_ids,
            expert_ids,
            weights,
            *plan,
            num_tokens,
            num_experts,
            num_groups,
            num_slots,
            scores.stride(0),
            BLOCK_E=block_e,
            BLOCK_TAIL=tail,
            num_warps=4,
        )
    return weights, token_ids, expert_ids, *plan


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
        _scatter_kernel[(triton.cdiv(num_slots, 512),)](
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
