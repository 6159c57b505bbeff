"""One pass over router logits: winners, weights, balance sums, losses and the routing plan.

The operation is that of :mod:`sonic.reference.routers`. Where a row of logits fits a block of 1024
columns, four launches make everything::

    route    a program per tile of tokens: winners and weights; per tile and column the count of
             winners and the sum of p; for every slot its rank among the tile's slots of its column
    reduce   per column: counts become their exclusive prefix over the tiles; sums by sequence
    finish   offset_by_expert, the losses
    place    the plan's scatter kernel: rank + prefix + offset is the row

Wider rows, sequences that no tile divides, and winners decided elsewhere take ``route`` alone, the
plan's own kernels and a column-sum kernel. The backward pass is one kernel, after a small one that
turns gradients of losses into one weight per sequence and column. No kernel uses an atomic.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from sonic.runtime.route import Route, RouteTensors, ScoreFunction
from sonic.triton import plan as triton_plan
from sonic.triton.balance import finish, reduce_tiles
from sonic.triton.common import cdiv, check_float, device_of, power_of_2, row_major
from sonic.triton.launch import Launcher, wait_for_earlier_launches
from sonic.triton.scores import (
    EPSILON,
    SCORES,
    SOFTMAX,
    _load_values,
    _pointwise_score,
    row_major_mask,
)
from sonic.triton.topk import LOWEST, _select, _select_best, _sortable, _value_of, free_bits

# Key of -inf: winners at or below it found nothing to choose.
BARRED = tl.constexpr(-(2**31) + 2**23 - 1)

_MAX_FUSED_COLUMNS = 1024
_TILE_ELEMENTS = 2048
_ELEMENTS_PER_WARP = 512
_MIN_TILE_ROWS = 4


@triton.jit
def _close_groups(
    key,
    TOPK_GROUPS: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    TOPK_GROUPS_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Keys with those of all but the best groups lowered to BARRED."""
    by_group = tl.reshape(key, [ROWS, GROUPS_PAD, GROUP_PAD])
    lane = tl.arange(0, GROUP_PAD)[None, None, :]
    rest = by_group
    best = tl.max(by_group, axis=2)
    rank = tl.zeros([ROWS, GROUPS_PAD], tl.float32)
    for _ in tl.static_range(GROUP_BEST):
        top = tl.max(rest, axis=2)
        rank += tl.where(top <= BARRED, 0.0, _value_of(top))
        place = tl.min(tl.where(rest == top[:, :, None], lane, GROUP_PAD), axis=2)
        rest = tl.where(lane == place[:, :, None], LOWEST, rest)
    group_key = tl.where(best <= BARRED, best, _sortable(rank))
    group = tl.broadcast_to(tl.arange(0, GROUPS_PAD)[None, :], [ROWS, GROUPS_PAD])
    _, _, left = _select(group_key, group, TOPK_GROUPS, TOPK_GROUPS_PAD, ROWS)
    by_group = tl.where((left == LOWEST)[:, :, None], by_group, tl.minimum(by_group, BARRED))
    return tl.reshape(by_group, [ROWS, GROUPS_PAD * GROUP_PAD])


@triton.jit
def _winner_weights(value, working, lse, scale, SCORE: tl.constexpr, RENORMALIZE: tl.constexpr):
    """Weights (ROWS, K_PAD) of winners from their logits."""
    if SCORE == SOFTMAX:
        if RENORMALIZE:
            chosen = tl.where(working, value, float("-inf"))
            top = tl.max(chosen, axis=1)
            shift = tl.where(top == float("-inf"), 0.0, top)
            weight = tl.exp(chosen - shift[:, None])
            total = tl.sum(weight, axis=1)
            weight = weight / tl.where(total == 0.0, 1.0, total)[:, None]
        else:
            weight = tl.where(working, tl.exp(value - lse[:, None]), 0.0)
    else:
        weight = tl.where(working, _pointwise_score(value, SCORE), 0.0)
        if RENORMALIZE:
            weight = weight / (tl.sum(weight, axis=1)[:, None] + EPSILON)
    return weight * scale


@triton.jit
def _store_tile_sums(
    prob, lse, live, tile, tile_prob, tile_sums, column, inside, num_columns, num_tiles
):
    """Per tile: the sum of p by column; live tokens, their squared logsumexp and entropy."""
    offset = tile.to(tl.int64) * num_columns + column
    tl.store(tile_prob + offset, tl.sum(prob, axis=0), mask=inside)
    square = tl.where(live, lse * lse, 0.0)
    entropy = _row_entropy(prob)
    tl.store(tile_sums + tile, tl.sum(live.to(tl.float32), axis=0))
    tl.store(tile_sums + num_tiles + tile, tl.sum(square, axis=0))
    tl.store(tile_sums + 2 * num_tiles + tile, tl.sum(entropy, axis=0))


@triton.jit
def _row_entropy(prob):
    positive = prob > 0.0
    return -tl.sum(tl.where(positive, prob * tl.log(tl.where(positive, prob, 1.0)), 0.0), axis=1)


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def _route_kernel(
    logits,
    bias,
    mask,
    given,
    scores,
    ids,
    lse_by_row,
    norm_by_row,
    entropy_by_row,
    rank_by_slot,
    tile_count,
    tile_prob,
    tile_sums,
    num_rows,
    num_tiles,
    stride,
    mask_stride,
    num_working,
    num_experts,
    scale,
    SCORE: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BITS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr,
    TOPK_GROUPS_PAD: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BY_SCORE: tl.constexpr,
    BALANCE: tl.constexpr,
    FUSED: tl.constexpr,
    ROWS: tl.constexpr,
):
    wait_for_earlier_launches()
    # Every group starts at a power of two of the block, so that a reshape separates them.
    BLOCK: tl.constexpr = GROUPS_PAD * GROUP_PAD
    NUM_COLUMNS: tl.constexpr = NUM_GROUPS * GROUP_SIZE
    tile = tl.program_id(0)
    row = tile * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, BLOCK)
    column = (place // GROUP_PAD) * GROUP_SIZE + place % GROUP_PAD
    is_column = (place % GROUP_PAD < GROUP_SIZE) & (column < NUM_COLUMNS)
    inside = (row < num_rows)[:, None] & is_column[None, :]
    value = _load_values(logits, mask, row[:, None], column[None, :], inside, stride, mask_stride)

    top = tl.max(value, axis=1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    term = tl.exp(value - shift[:, None])
    total = tl.sum(term, axis=1)
    live = total != 0.0
    lse = shift + tl.log(total)
    tl.store(lse_by_row + row, lse, mask=row < num_rows)
    if SCORE == SOFTMAX:
        score = term
        norm = total
    else:
        score = tl.where(inside, _pointwise_score(value, SCORE), 0.0)
        norm = tl.sum(score, axis=1)
    prob = score / tl.where(norm == 0.0, 1.0, norm)[:, None]

    lane = tl.arange(0, K_PAD)
    slot = row.to(tl.int64)[:, None] * TOP_K + lane[None, :]
    is_slot = (row < num_rows)[:, None] & (lane < TOP_K)[None, :]
    if given is not None:
        winner = tl.load(given + slot, mask=is_slot, other=-1).to(tl.int32)
    else:
        choice = value
        if BY_SCORE:
            choice = prob if SCORE == SOFTMAX else score
            if bias is not None:
                choice += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
            choice = tl.where(value == float("-inf"), value, choice)
        key = tl.where(is_column[None, :], _sortable(choice), LOWEST)
        if NUM_GROUPS > 1:
            key = _close_groups(
                key, TOPK_GROUPS, GROUP_BEST, GROUPS_PAD, GROUP_PAD, TOPK_GROUPS_PAD, ROWS
            )
        index = tl.broadcast_to(column[None, :], [ROWS, BLOCK])
        best_key, winner, left = _select_best(key, index, BITS, TOP_K, K_PAD, ROWS)
        if FUSED:
            won = ((left == LOWEST) & (key > BARRED)).to(tl.int32)
            tl.store(
                tile_count + tile.to(tl.int64) * NUM_COLUMNS + column,
                tl.sum(won, axis=0),
                mask=is_column,
            )
            before = tl.cumsum(won, axis=0) - won
            winner_place = (winner // GROUP_SIZE) * GROUP_PAD + winner % GROUP_SIZE
            if rank_by_slot is not None:
                rank = tl.gather(before, winner_place, axis=1)
                placed = (best_key > BARRED) & (winner < num_experts)
                tl.store(rank_by_slot + slot, tl.where(placed, rank, -1), mask=is_slot)
        winner = tl.where(best_key > BARRED, winner, -1)
    tl.store(ids + slot, winner, mask=is_slot)

    working = is_slot & (winner >= 0) & (winner < num_working)
    winner = tl.where(working, winner, 0)
    chosen = _load_values(logits, mask, row[:, None], winner, working, stride, mask_stride)
    weight = _winner_weights(chosen, working, lse, scale, SCORE, RENORMALIZE)
    tl.store(scores + slot, weight, mask=is_slot)
    if BALANCE:
        if FUSED:
            _store_tile_sums(
                prob,
                lse,
                live,
                tile,
                tile_prob,
                tile_sums,
                column,
                is_column,
                NUM_COLUMNS,
                num_tiles,
            )
        else:
            tl.store(norm_by_row + row, norm, mask=row < num_rows)
            tl.store(entropy_by_row + row, _row_entropy(prob), mask=row < num_rows)


# ------------------------------------------------------------------------------- launchers


_route = Launcher(_route_kernel, overlapping=True)


def _block_shape(num_columns: int, num_groups: int) -> tuple[int, int]:
    """Groups and columns per group, padded to powers of two."""
    return (
        power_of_2(num_groups),
        power_of_2(num_columns // num_groups),
    )


def _tile_rows(block: int, tokens_per_sequence: int, num_sequences: int) -> int:
    """Tokens per program; a tile lies within one sequence."""
    rows = min(128, max(_MIN_TILE_ROWS, _TILE_ELEMENTS // block))
    if num_sequences > 1:
        while rows > 1 and tokens_per_sequence % rows:
            rows //= 2
    return rows


def is_fused(num_tokens: int, num_columns: int, given: bool, route: Route) -> bool:
    """Whether the four launches of the module docstring serve this size."""
    if given or num_tokens == 0:
        return False
    groups, size = _block_shape(num_columns, route.num_groups)
    if groups * size > _MAX_FUSED_COLUMNS:
        return False
    if not route.balance and (
        route.num_experts == 0
        or triton_plan.method_for(num_tokens * route.top_k, route.num_experts) == "direct"
    ):
        return False
    sequences = route.num_sequences
    return _tile_rows(groups * size, num_tokens // sequences, sequences) >= _MIN_TILE_ROWS


def _launch_route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    given: torch.Tensor | None,
    outputs: tuple[torch.Tensor | None, ...],
    route: Route,
    fused: bool,
    rows: int,
) -> None:
    num_rows, num_columns = logits.shape
    groups, size = _block_shape(num_columns, route.num_groups)
    mask, mask_stride = row_major_mask(mask)
    by_score = bias is not None or (route.num_groups > 1 and route.group_best > 1)
    # Scores, and sums with a mask, are numbers of full precision.
    exact = by_score or mask is not None
    _route(
        cdiv(num_rows, rows),
        logits,
        None if bias is None else bias.contiguous(),
        mask,
        given,
        *outputs,
        num_rows,
        cdiv(num_rows, rows),
        logits.stride(0),
        mask_stride,
        route.num_working,
        route.num_experts,
        float(route.scale),
        SCORE=SCORES[ScoreFunction(route.score)],
        RENORMALIZE=route.renormalize,
        BITS=0 if exact else free_bits(logits.dtype, num_columns),
        TOP_K=route.top_k,
        K_PAD=power_of_2(route.top_k),
        NUM_GROUPS=route.num_groups,
        TOPK_GROUPS=route.topk_groups,
        TOPK_GROUPS_PAD=power_of_2(route.topk_groups),
        GROUP_BEST=route.group_best,
        GROUP_SIZE=num_columns // route.num_groups,
        GROUPS_PAD=groups,
        GROUP_PAD=size,
        BY_SCORE=by_score,
        BALANCE=route.balance,
        FUSED=fused,
        ROWS=rows,
        num_warps=min(16, max(1, rows * groups * size // _ELEMENTS_PER_WARP)),
    )


def route_rows(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    given: torch.Tensor | None,
    route: Route,
) -> tuple[torch.Tensor, ...]:
    """Winners and weights by token, and what :func:`sonic.triton.balance.column_sums` needs.

    Args:
        logits: (T, E) bf16, fp16 or fp32. bias: (E,) or None. mask: (T, E) or (1, E) or None.
        given: (T, top_k) int32 or int64 winners, or None to choose them.

    Returns:
        ``scores (T, top_k)``, ``ids (T, top_k)``, ``lse (T,)``, and with ``route.balance`` ``norm``
        and ``entropy`` (T,), the sum of a token's scores and the entropy of their shares.
    """
    check_float("route", logits=logits)
    logits = row_major(logits)
    num_rows = logits.shape[0]
    options: dict[str, Any] = {"dtype": torch.float32, "device": logits.device}
    scores = torch.empty(num_rows, route.top_k, **options)
    ids = torch.empty(num_rows, route.top_k, dtype=torch.int32, device=logits.device)
    by_row = [torch.empty(num_rows, **options) for _ in range(3 if route.balance else 1)]
    lse, norm, entropy = by_row if route.balance else (*by_row, None, None)
    groups, size = _block_shape(logits.shape[1], route.num_groups)
    given = None if given is None else given.contiguous()
    with device_of(logits):
        outputs = scores, ids, lse, norm, entropy, None, None, None, None
        rows = max(1, 512 // (groups * size))
        _launch_route(logits, bias, mask, given, outputs, route, False, rows)
    return scores, ids, *by_row


def route_fused(
    logits: torch.Tensor, bias: torch.Tensor | None, mask: torch.Tensor | None, route: Route
) -> RouteTensors:
    """The whole pass in four launches, three without a plan; :func:`is_fused` must hold."""
    check_float("route", logits=logits)
    logits = row_major(logits)
    num_rows, num_columns = logits.shape
    num_slots, sequences = num_rows * route.top_k, route.num_sequences
    groups, size = _block_shape(num_columns, route.num_groups)
    rows = _tile_rows(groups * size, num_rows // sequences, sequences)
    tiles = cdiv(num_rows, rows)
    stride = cdiv(tiles, 16) * 16
    device = logits.device

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    scores, lse = floats(num_rows, route.top_k), floats(num_rows)
    ids = integers(num_rows, route.top_k)
    sums = (sequences, num_columns) if route.balance else (0, 0)
    prob_sum, live = floats(*sums), integers(sums[0])
    losses = [floats() if route.balance else floats(0) for _ in range(4)]
    count = integers(sequences, num_columns)
    has_plan = route.num_experts > 0
    offset_by_expert = integers(route.num_experts + 1 if has_plan else 0)
    token_by_row, slot_by_row, row_by_slot = (
        integers(num_slots if has_plan else 0) for _ in range(3)
    )
    tile_count = integers(tiles, num_columns)
    tile_prob = floats(tiles, num_columns) if route.balance else None
    tile_sums = floats(3, tiles) if route.balance else None
    prefix = integers(num_columns, stride) if has_plan else None
    with device_of(logits):
        rank_by_slot = row_by_slot if has_plan else None
        outputs = scores, ids, lse, None, None, rank_by_slot, tile_count, tile_prob, tile_sums
        _launch_route(logits, bias, mask, None, outputs, route, True, rows)
        by_tile = tile_count, tile_prob, tile_sums
        z_and_entropy = reduce_tiles(by_tile, prefix, count, prob_sum, live, route)
        finish(count, prob_sum, live, z_and_entropy, offset_by_expert, losses, route)
        if prefix is not None:
            triton_plan.place_slots(
                ids,
                prefix,
                (offset_by_expert, token_by_row, slot_by_row, row_by_slot),
                tile=rows * route.top_k,
                top_k=route.top_k,
            )
    switch, sequence, z, entropy = losses
    if not route.balance:
        count = integers(0, 0)
    return RouteTensors(
        scores,
        prob_sum,
        switch,
        sequence,
        z,
        ids,
        lse,
        count,
        live,
        entropy,
        offset_by_expert,
        token_by_row,
        slot_by_row,
        row_by_slot,
    )
