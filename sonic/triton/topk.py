"""Fused top-k and softmax of router logits, and its gradient.

Selection works on the fp32 value of each logit mapped to an int32 that sorts alike, so it is exact;
equal logits go to the lower expert, -0 equals +0, and NaN sorts above everything (as in
``torch.topk``), so ids stay in range whatever the logits. With v the logits, w the winners and s
the scores::

    softmax_over_topk, topk_over_softmax_norm    s_j = exp(v_wj) / sum_i exp(v_wi)
    topk_over_softmax                            s_j = exp(v_wj) / sum_e exp(v_e)

The first two are one function: renormalising cancels the full denominator.
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
    is_interpreted,
    power_of_2,
    row_major,
)
from sonic.triton.launch import Launcher, wait_for_earlier_launches

# Key of a padded column: below the key of -inf, the least of any logit.
LOWEST = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)
# The sums of a GPU are no other NaN than this, those of the interpreter may be, and negative.
_MANY_NANS = tl.constexpr(is_interpreted())

_MAX_BLOCK_E = 4096
_MOST_GROUPED = 8  # neighbouring columns whose greatest one is looked at first
_FEWEST_GROUPED = 4
# Bits of a widened value's key that carry nothing.
_FREE_BITS = {torch.bfloat16: 16, torch.float16: 13}


def free_bits(dtype: torch.dtype, num_experts: int) -> int:
    """BITS of ``_select_best`` for logits of this dtype; 0 where an index does not fit."""
    bits = _FREE_BITS.get(dtype, 0)
    return bits if num_experts <= 1 << bits else 0


def group_width(block_e: int, top_k: int) -> int:
    """WIDTH of ``_select_in_groups``; 1 where groups and their columns are not far fewer than all
    columns, so that ``_select_packed`` costs less."""
    width = _MOST_GROUPED
    while width >= _FEWEST_GROUPED and 4 * width * power_of_2(top_k) > block_e:
        width //= 2
    return width if width >= _FEWEST_GROUPED else 1


@triton.jit
def _plain_bits(value):
    """Bits of the fp32 value, those of +0 for -0, and of one positive NaN for any."""
    if _MANY_NANS:
        value = tl.where(value != value, float("nan"), value)
    # A sum is -0 only if both are, and if it is no number its bits are HIGHEST.
    return (value + 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _sortable(value):
    """int32 that orders like the fp32 value, -0 like +0, any NaN highest."""
    bits = _plain_bits(value)
    return bits ^ ((bits >> 31) & HIGHEST)


@triton.jit
def _value_of(key):
    return (key ^ ((key >> 31) & HIGHEST)).to(tl.float32, bitcast=True)


@triton.jit
def _select(key, index, TOP_K: tl.constexpr, K_PAD: tl.constexpr, ROWS: tl.constexpr):
    """The TOP_K largest (key, lowest index first) of each row, descending, columns past TOP_K
    holding LOWEST and index 0; and the keys left over, winners replaced by LOWEST."""
    lane = tl.arange(0, K_PAD)
    best_key = tl.full([ROWS, K_PAD], LOWEST, tl.int32)
    best_index = tl.zeros([ROWS, K_PAD], tl.int32)
    for rank in range(TOP_K):
        top = tl.max(key, axis=1)
        winner = tl.min(tl.where(key == top[:, None], index, HIGHEST), axis=1)
        best_key = tl.where(lane[None, :] == rank, top[:, None], best_key)
        best_index = tl.where(lane[None, :] == rank, winner[:, None], best_index)
        key = tl.where(index == winner[:, None], LOWEST, key)
    return best_key, best_index, key


@triton.jit
def _packed(key, index, BITS: tl.constexpr):
    """Keys whose low BITS carried nothing, all different: of equal ones the lowest index is the
    greatest."""
    return (key | ((1 << BITS) - 1)) - index


@triton.jit
def _unpacked(packed, BITS: tl.constexpr):
    """Key and index."""
    LOW: tl.constexpr = (1 << BITS) - 1
    # The key of a negative value ends in ones, that of any other in zeros.
    return tl.where(packed < 0, packed | LOW, packed & ~LOW), LOW - (packed & LOW)


@triton.jit
def _select_packed(
    packed, TOP_K: tl.constexpr, K_PAD: tl.constexpr, ROWS: tl.constexpr, SHORT: tl.constexpr
):
    """The TOP_K largest of each row, which all differ, descending, LOWEST behind them; then the
    first and the last of these. SHORT: a row may have fewer, and LOWEST besides."""
    lane = tl.arange(0, K_PAD)
    first = tl.max(packed, axis=1)
    top = first
    best = tl.where(lane[None, :] == 0, top[:, None], LOWEST)
    for rank in range(1, TOP_K):
        # Counted upwards from `top` and around, the farthest key is the next one below it.
        distance = tl.max((packed - top[:, None]).to(tl.uint32, bitcast=True), axis=1)
        below = top + distance.to(tl.int32, bitcast=True)
        top = tl.where(top == LOWEST, LOWEST, below) if SHORT else below
        best = tl.where(lane[None, :] == rank, top[:, None], best)
    return best, first, top


@triton.jit
def _greater(value, other):
    """The greater of two, any NaN the greatest."""
    return tl.maximum(value, other, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _select_in_groups(
    value,
    address,
    is_row,
    num_columns,
    BITS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDTH: tl.constexpr,
    EXACT: tl.constexpr,
):
    """What ``_select_packed`` returns, of fp32 values (ROWS, BLOCK_E) and their columns, with few
    looks at most of them. A group is WIDTH neighbouring columns; the TOP_K best columns of a row
    lie in the TOP_K groups whose best ones come first, since those are TOP_K columns themselves.
    The columns of these groups are loaded again from ``address (ROWS,)``, and are 0 where there is
    no row; ``num_columns`` are in a row, BLOCK_E if EXACT, in TOP_K groups or more."""
    column = tl.arange(0, BLOCK_E)[None, :]
    if not EXACT:
        value = tl.where(column < num_columns, value, float("-inf"))
    value = tl.reshape(value, [ROWS, BLOCK_E // WIDTH, WIDTH])
    best = _sortable(tl.reduce(value, 2, _greater))
    group = tl.arange(0, BLOCK_E // WIDTH)[None, :]
    packed = _packed(best, group, BITS)
    if not EXACT:
        packed = tl.where(group * WIDTH < num_columns, packed, LOWEST)
    best, _, _ = _select_packed(packed, TOP_K, K_PAD, ROWS, False)
    _, group = _unpacked(best, BITS)
    column = group[:, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    # Told anew, so that neighbouring threads have the columns of one row, and load several at once.
    column = tl.reshape(column, [ROWS, K_PAD * WIDTH])
    column = tl.max_contiguous(tl.multiple_of(column, [1, WIDTH]), [1, WIDTH])
    inside = (tl.arange(0, K_PAD * WIDTH) < TOP_K * WIDTH)[None, :] & (column < num_columns)
    mask = inside & is_row[:, None]
    value = tl.load(address[:, None] + column, mask=mask, other=0.0).to(tl.float32)
    packed = tl.where(inside, _packed(_sortable(value), column, BITS), LOWEST)
    return _select_packed(packed, TOP_K, K_PAD, ROWS, False)


@triton.jit
def _select_best(
    key, index, BITS: tl.constexpr, TOP_K: tl.constexpr, K_PAD: tl.constexpr, ROWS: tl.constexpr
):
    """As ``_select``, faster where the low BITS of every key carry nothing: with the index in them
    keys are distinct, and one reduction per winner decides value and index at once."""
    if BITS == 0:
        return _select(key, index, TOP_K, K_PAD, ROWS)
    else:
        packed = tl.where(key == LOWEST, LOWEST, _packed(key, index, BITS))
        best, _, last = _select_packed(packed, TOP_K, K_PAD, ROWS, True)
        left = tl.where(packed >= last[:, None], LOWEST, packed)
        best_key, best_index = _unpacked(best, BITS)
        none = best == LOWEST
        return tl.where(none, LOWEST, best_key), tl.where(none, 0, best_index), left


@triton.jit
def _exp_sum(key, ROWS: tl.constexpr):
    """Row maximum and sum of exp(value - maximum) over the columns that hold a logit."""
    top = _value_of(tl.max(key, axis=1))
    # A row of nothing but -inf adds nothing to a longer row; alone it gives 0/0, as torch does.
    shift = tl.where(top == float("-inf"), 0.0, top)
    terms = tl.where(key == LOWEST, 0.0, tl.exp(_value_of(key) - shift[:, None]))
    return top, tl.sum(terms, axis=1)


@triton.jit
def _store_scores(
    scores,
    ids,
    row,
    num_rows,
    best_key,
    best_index,
    total,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    FULL: tl.constexpr,
):
    lane = tl.arange(0, K_PAD)
    mask = (row[:, None] < num_rows) & (lane[None, :] < TOP_K)
    top = _value_of(tl.max(best_key, axis=1))
    terms = tl.where(lane[None, :] < TOP_K, tl.exp(_value_of(best_key) - top[:, None]), 0.0)
    if not FULL:
        total = tl.sum(terms, axis=1)
    offset = row.to(tl.int64)[:, None] * TOP_K + lane[None, :]
    tl.store(scores + offset, terms / total[:, None], mask=mask)
    tl.store(ids + offset, best_index, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _topk_kernel(
    logits,
    scores,
    ids,
    num_rows,
    num_experts,
    stride,
    BITS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDTH: tl.constexpr,
):
    wait_for_earlier_launches()
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_E)
    mask = (row[:, None] < num_rows) & (expert[None, :] < num_experts)
    address = logits + row.to(tl.int64) * stride
    value = tl.load(address[:, None] + expert[None, :], mask=mask, other=0.0).to(tl.float32)
    key = tl.where(mask, _sortable(value), LOWEST)
    if BITS == 0 or WIDTH == 1:
        index = tl.broadcast_to(expert[None, :], [ROWS, BLOCK_E])
        best_key, best_index, _ = _select_best(key, index, BITS, TOP_K, K_PAD, ROWS)
    else:
        best, _, _ = _select_in_groups(
            value, address, row < num_rows, num_experts, BITS, TOP_K, K_PAD, ROWS, BLOCK_E, WIDTH,
            False,
        )  # fmt: skip
        best_key, best_index = _unpacked(best, BITS)
    total = tl.zeros([ROWS], tl.float32)
    if FULL:
        top, total = _exp_sum(key, ROWS)
    _store_scores(scores, ids, row, num_rows, best_key, best_index, total, TOP_K, K_PAD, FULL)


@triton.jit
def _topk_chunk_kernel(
    logits,
    chunk_keys,
    chunk_ids,
    chunk_top,
    chunk_sum,
    num_experts,
    num_chunks,
    stride,
    BITS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Winners of one chunk of one row: chunk_keys, chunk_ids (T, chunks, TOP_K); with FULL its
    maximum and exp-sum."""
    wait_for_earlier_launches()
    row = (tl.program_id(0) // num_chunks).to(tl.int64)
    chunk = tl.program_id(0) % num_chunks
    expert = chunk * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    value = tl.load(logits + row * stride + expert, mask=expert < num_experts, other=0.0)
    key = tl.where(expert < num_experts, _sortable(value.to(tl.float32)), LOWEST)
    best_key, best_index, _ = _select_best(key, expert, BITS, TOP_K, K_PAD, 1)
    lane = tl.arange(0, K_PAD)[None, :]
    offset = (row * num_chunks + chunk) * TOP_K + lane
    tl.store(chunk_keys + offset, best_key, mask=lane < TOP_K)
    tl.store(chunk_ids + offset, best_index, mask=lane < TOP_K)
    if FULL:
        top, total = _exp_sum(key, 1)
        offset = row * num_chunks + chunk + tl.arange(0, 1)
        tl.store(chunk_top + offset, top)
        tl.store(chunk_sum + offset, total)


@triton.jit(do_not_specialize=["num_rows"])
def _topk_merge_kernel(
    chunk_keys,
    chunk_ids,
    chunk_top,
    chunk_sum,
    scores,
    ids,
    num_rows,
    num_chunks,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_CHUNKS: tl.constexpr,
):
    wait_for_earlier_launches()
    row = tl.program_id(0) + tl.arange(0, 1)
    base = row.to(tl.int64)[:, None] * num_chunks
    lane = tl.arange(0, BLOCK)[None, :]
    inside = lane < num_chunks * TOP_K
    key = tl.load(chunk_keys + base * TOP_K + lane, mask=inside, other=LOWEST)
    index = tl.load(chunk_ids + base * TOP_K + lane, mask=inside, other=HIGHEST)
    best_key, best_index, _ = _select(key, index, TOP_K, K_PAD, 1)
    total = tl.zeros([1], tl.float32)
    if FULL:
        chunk = tl.arange(0, BLOCK_CHUNKS)[None, :]
        inside = chunk < num_chunks
        top = tl.load(chunk_top + base + chunk, mask=inside, other=float("-inf"))
        part = tl.load(chunk_sum + base + chunk, mask=inside, other=0.0)
        shift = _value_of(tl.max(best_key, axis=1))
        total = tl.sum(tl.where(inside, part * tl.exp(top - shift[:, None]), 0.0), axis=1)
    _store_scores(scores, ids, row, num_rows, best_key, best_index, total, TOP_K, K_PAD, FULL)


@triton.jit(do_not_specialize=["num_rows"])
def _topk_grad_kernel(
    dscores,
    logits,
    scores,
    ids,
    dlogits,
    num_rows,
    num_experts,
    stride,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    FULL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    wait_for_earlier_launches()
    blocks = tl.cdiv(num_experts, BLOCK_E)
    row = tl.program_id(0) // blocks * ROWS + tl.arange(0, ROWS)
    row_mask = row < num_rows
    row = row.to(tl.int64)
    lane = tl.arange(0, K_PAD)
    mask = row_mask[:, None] & (lane[None, :] < TOP_K)
    offset = row[:, None] * TOP_K + lane[None, :]
    grad = tl.load(dscores + offset, mask=mask, other=0.0)
    score = tl.load(scores + offset, mask=mask, other=0.0)
    mean = tl.sum(grad * score, axis=1)

    expert = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    result = tl.zeros([ROWS, BLOCK_E], tl.float32)
    for rank in range(TOP_K):
        winner = tl.load(ids + row * TOP_K + rank, mask=row_mask, other=-1)
        value = tl.load(dscores + row * TOP_K + rank, mask=row_mask, other=0.0)
        if not FULL:
            value = (value - mean) * tl.load(scores + row * TOP_K + rank, mask=row_mask, other=0.0)
        result = tl.where(expert[None, :] == winner[:, None], value[:, None], result)
    mask = row_mask[:, None] & (expert[None, :] < num_experts)
    if FULL:
        # The first winner holds the row's maximum m and the score exp(m - m) / Z: Z need not be
        # summed again.
        first = tl.load(ids + row * TOP_K, mask=row_mask, other=0)
        inverse_sum = tl.load(scores + row * TOP_K, mask=row_mask, other=0.0)
        top = tl.load(logits + row * stride + first, mask=row_mask, other=0.0).to(tl.float32)
        value = tl.load(logits + row[:, None] * stride + expert[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        probability = tl.exp(value - top[:, None]) * inverse_sum[:, None]
        result = probability * (result - mean[:, None])
    offset = row[:, None] * num_experts + expert[None, :]
    tl.store(dlogits + offset, result.to(dlogits.dtype.element_ty), mask=mask)


_topk = Launcher(_topk_kernel, overlapping=True)
_topk_chunk = Launcher(_topk_chunk_kernel, overlapping=True)
_topk_merge = Launcher(_topk_merge_kernel, overlapping=True)
_topk_grad = Launcher(_topk_grad_kernel, overlapping=True)


def topk_scores(
    logits: torch.Tensor, top_k: int, order: ScoreOrder
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and experts of each row's ``top_k`` largest logits.

    Args:
        logits: (T, E) bf16, fp16 or fp32, E up to 65,536.
        top_k: 1 to min(64, E).
        order: see the module docstring.

    Returns:
        ``scores (T, top_k)`` fp32 descending, ``ids (T, top_k)`` int32; ties go to the lower id. A
        row with NaN or +inf gets NaN scores and ids in range.
    """
    check_float("topk_scores", logits=logits)
    num_rows, num_experts = logits.shape
    scores = torch.empty(num_rows, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(num_rows, top_k, dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        return scores, ids
    logits = row_major(logits)
    options = {
        "TOP_K": top_k,
        "K_PAD": power_of_2(top_k),
        "FULL": ScoreOrder(order) is ScoreOrder.TOPK_OVER_SOFTMAX,
    }
    block_e = power_of_2(num_experts)
    bits = free_bits(logits.dtype, num_experts)
    with device_of(logits):
        if block_e <= _MAX_BLOCK_E:
            # One warp holds whole rows up to 1024 experts, so that no reduction leaves the warp.
            rows = max(1, 512 // block_e)
            _topk(
                cdiv(num_rows, rows),
                logits,
                scores,
                ids,
                num_rows,
                num_experts,
                logits.stride(0),
                BITS=bits,
                **options,
                ROWS=rows,
                BLOCK_E=block_e,
                WIDTH=group_width(block_e, top_k),
                num_warps=max(1, block_e // 1024),
            )
            return scores, ids
        num_chunks = cdiv(num_experts, _MAX_BLOCK_E)
        chunk_keys = torch.empty(
            num_rows, num_chunks, top_k, dtype=torch.int32, device=logits.device
        )
        chunk_ids = torch.empty_like(chunk_keys)
        chunk_top = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=logits.device)
        chunk_sum = torch.empty_like(chunk_top)
        _topk_chunk(
            num_rows * num_chunks,
            logits,
            chunk_keys,
            chunk_ids,
            chunk_top,
            chunk_sum,
            num_experts,
            num_chunks,
            logits.stride(0),
            BITS=bits,
            **options,
            BLOCK_E=_MAX_BLOCK_E,
            num_warps=4,
        )
        block = power_of_2(num_chunks * top_k)
        _topk_merge(
            num_rows,
            chunk_keys,
            chunk_ids,
            chunk_top,
            chunk_sum,
            scores,
            ids,
            num_rows,
            num_chunks,
            **options,
            BLOCK=block,
            BLOCK_CHUNKS=power_of_2(num_chunks),
            num_warps=1 if block <= 512 else 2,
        )
    return scores, ids


def topk_scores_grad(
    dscores: torch.Tensor,
    logits: torch.Tensor,
    scores: torch.Tensor,
    ids: torch.Tensor,
    order: ScoreOrder,
) -> torch.Tensor:
    """Gradient of :func:`topk_scores` with respect to the logits.

    Args:
        dscores: (T, top_k) fp32.
        logits: (T, E), the forward's input. Its values are read for ``topk_over_softmax`` only.
        scores, ids: (T, top_k), the forward's results.

    Returns:
        (T, E) of the logits' dtype, every element written: zero for experts not chosen, except with
        ``topk_over_softmax``, where every expert has a gradient.
    """
    check_float("topk_scores_grad", logits=logits)
    num_rows, num_experts = logits.shape
    top_k = scores.shape[1]
    for name, tensor in (("dscores", dscores), ("scores", scores), ("ids", ids)):
        check_shape("topk_scores_grad", name, tensor, (num_rows, top_k))
    dlogits = torch.empty(num_rows, num_experts, dtype=logits.dtype, device=scores.device)
    if num_rows == 0:
        return dlogits
    full = ScoreOrder(order) is ScoreOrder.TOPK_OVER_SOFTMAX
    if full:
        logits = row_major(logits)
    block_e = min(power_of_2(num_experts), 1024)
    rows = max(1, 512 // block_e)
    with device_of(scores):
        _topk_grad(
            cdiv(num_rows, rows) * cdiv(num_experts, block_e),
            dscores.contiguous(),
            logits,
            scores.contiguous(),
            ids.contiguous(),
            dlogits,
            num_rows,
            num_experts,
            logits.stride(0),
            TOP_K=top_k,
            K_PAD=power_of_2(top_k),
            FULL=full,
            ROWS=rows,
            BLOCK_E=block_e,
            num_warps=1,
        )
    return dlogits
