"""Sums over the tokens that a router's losses and plan need: by tile, by sequence, in all."""

from typing import Any

import torch
import triton
import triton.language as tl

from sonic.runtime.route import Route, ScoreFunction
from sonic.triton.common import cdiv, device_of, power_of_2, row_major
from sonic.triton.launch import Launcher, wait_for_earlier_launches
from sonic.triton.scores import SCORES, _load_values, _probabilities, row_major_mask

# Tiles and columns that a program of the reduction takes at a time.
_FEW_TILES = (64, 8)
_MANY_TILES = (512, 8)


@triton.jit(do_not_specialize=["num_tiles", "tiles_per_sequence", "num_sequences", "stride"])
def _reduce_kernel(
    tile_count,
    tile_prob,
    tile_sums,
    prefix,
    count,
    prob_sum,
    live,
    sums,
    num_columns,
    num_tiles,
    tiles_per_sequence,
    num_sequences,
    stride,
    BALANCE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """prefix[e, tile] = winners of column e in earlier tiles; count, prob_sum and live by
    sequence; sums = squared logsumexp and entropy. The last program has the sums by tile."""
    wait_for_earlier_launches()
    column_programs = tl.cdiv(num_columns, COLUMNS)
    if tl.program_id(0) < column_programs:
        column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        is_column = column < num_columns
        carry = tl.zeros([COLUMNS], tl.int32)
        for sequence in range(num_sequences):
            earlier = carry
            prob = tl.zeros([COLUMNS], tl.float32)
            for start in range(0, tiles_per_sequence, BLOCK_TILES):
                local = start + tl.arange(0, BLOCK_TILES)
                inside = (local < tiles_per_sequence)[:, None] & is_column[None, :]
                tile = sequence * tiles_per_sequence + local
                offset = tile.to(tl.int64)[:, None] * num_columns + column[None, :]
                value = tl.load(tile_count + offset, mask=inside, other=0)
                before = carry[None, :] + tl.cumsum(value, axis=0) - value
                if prefix is not None:
                    address = prefix + column.to(tl.int64)[None, :] * stride + tile[:, None]
                    tl.store(address, before, mask=inside)
                carry += tl.sum(value, axis=0)
                if BALANCE:
                    prob += tl.sum(tl.load(tile_prob + offset, mask=inside, other=0.0), axis=0)
            tl.store(count + column, carry - earlier, mask=is_column)
            count += num_columns
            if BALANCE:
                tl.store(prob_sum + column, prob, mask=is_column)
                prob_sum += num_columns
    else:
        if BALANCE:
            square = tl.zeros([1], tl.float32)
            entropy = tl.zeros([1], tl.float32)
            for sequence in range(num_sequences):
                alive = tl.zeros([1], tl.float32)
                for start in range(0, tiles_per_sequence, BLOCK_TILES):
                    local = start + tl.arange(0, BLOCK_TILES)
                    inside = local < tiles_per_sequence
                    address = tile_sums + sequence * tiles_per_sequence + local
                    alive += tl.sum(tl.load(address, mask=inside, other=0.0), axis=0)
                    address += num_tiles
                    square += tl.sum(tl.load(address, mask=inside, other=0.0), axis=0)
                    address += num_tiles
                    entropy += tl.sum(tl.load(address, mask=inside, other=0.0), axis=0)
                one = tl.arange(0, 1)
                tl.store(live + sequence + one, alive.to(tl.int32))
            tl.store(sums + tl.arange(0, 1), square)
            tl.store(sums + 1 + tl.arange(0, 1), entropy)


@triton.jit
def _shares(count, column, num_columns, num_working, BLOCK: tl.constexpr):
    """Counts (BLOCK,) of one sequence, each null expert's replaced by the mean over all of them."""
    load = tl.load(count + column, mask=column < num_columns, other=0).to(tl.float32)
    if num_working < num_columns:
        null = tl.zeros([1], tl.float32)
        for start in range(num_working, num_columns, BLOCK):
            other = start + tl.arange(0, BLOCK)
            value = tl.load(count + other, mask=other < num_columns, other=0)
            null += tl.sum(value.to(tl.float32), axis=0)
        load = tl.where(column >= num_working, null / (num_columns - num_working), load)
    return load


@triton.jit
def _num_live(live, num_sequences):
    tokens = tl.zeros([1], tl.float32)
    for sequence in range(num_sequences):
        tokens += tl.load(live + sequence + tl.arange(0, 1)).to(tl.float32)
    return tl.maximum(tokens, 1.0)


@triton.jit(do_not_specialize=["num_sequences"])
def _finish_kernel(
    count,
    prob_sum,
    live,
    sums,
    offset_by_expert,
    switch_loss,
    sequence_loss,
    z_loss,
    entropy,
    num_columns,
    num_working,
    num_experts,
    num_sequences,
    TOP_K: tl.constexpr,
    BALANCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the scan over experts, the losses and the mean entropy."""
    wait_for_earlier_launches()
    column = tl.arange(0, BLOCK)
    is_column = column < num_columns
    total = tl.zeros([BLOCK], tl.int32)
    load_sum = tl.zeros([BLOCK], tl.float32)
    prob_total = tl.zeros([BLOCK], tl.float32)
    by_sequence = tl.zeros([1], tl.float32)
    for sequence in range(num_sequences):
        total += tl.load(count + column, mask=is_column, other=0)
        if BALANCE:
            load = _shares(count, column, num_columns, num_working, BLOCK)
            prob = tl.load(prob_sum + column, mask=is_column, other=0.0)
            length = tl.load(live + sequence + tl.arange(0, 1)).to(tl.float32)
            length = tl.maximum(length, 1.0)
            by_sequence += tl.sum(load * prob, axis=0) / (length * length)
            load_sum += load
            prob_total += prob
            prob_sum += num_columns
        count += num_columns
    if offset_by_expert is not None:
        tl.store(offset_by_expert + tl.arange(0, 1), 0)
        end = tl.cumsum(tl.where(column < num_experts, total, 0), axis=0)
        tl.store(offset_by_expert + 1 + column, end, mask=column < num_experts)
    if BALANCE:
        tokens = _num_live(live, num_sequences)
        even = num_columns / TOP_K
        one = tl.arange(0, 1)
        switch = tl.sum(load_sum * prob_total, axis=0) / (tokens * tokens)
        tl.store(switch_loss + one, even * switch)
        tl.store(sequence_loss + one, even * by_sequence / num_sequences)
        tl.store(z_loss + one, tl.load(sums + one) / tokens)
        tl.store(entropy + one, tl.load(sums + 1 + one) / tokens)


@triton.jit(do_not_specialize=["rows_per_sequence", "chunks", "num_columns"])
def _column_sums_kernel(
    logits,
    mask,
    lse_by_row,
    norm_by_row,
    partial,
    num_columns,
    rows_per_sequence,
    rows_per_chunk,
    chunks,
    stride,
    mask_stride,
    SCORE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partial[sequence * chunks + chunk, e] = sum of p over the chunk's rows of that sequence."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = (tl.program_id(1) % chunks) * rows_per_chunk
    sequence = tl.program_id(1) // chunks
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(first, first + rows_per_chunk, ROWS):
        local = start + tl.arange(0, ROWS)
        is_row = local < tl.minimum(first + rows_per_chunk, rows_per_sequence)
        row = sequence.to(tl.int64) * rows_per_sequence + local
        inside = is_row[:, None] & (column < num_columns)[None, :]
        value = _load_values(
            logits, mask, row[:, None], column[None, :], inside, stride, mask_stride
        )
        prob = _probabilities(value, inside, row, is_row, lse_by_row, norm_by_row, SCORE)
        total += tl.sum(prob, axis=0)
    offset = tl.program_id(1).to(tl.int64) * num_columns + column
    tl.store(partial + offset, total, mask=column < num_columns)


@triton.jit(do_not_specialize=["num_sequences"])
def _loss_weight_kernel(
    count,
    dprob_sum,
    dswitch,
    dsequence,
    dz,
    live,
    weight,
    dz_sum,
    num_columns,
    num_working,
    num_sequences,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """weight[s, e]: gradient of prob_sum, that through the losses included; dz_sum: of the sum of
    squared logsumexp."""
    wait_for_earlier_launches()
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_column = column < num_columns
    one = tl.arange(0, 1)
    tokens = _num_live(live, num_sequences)
    even = num_columns / TOP_K
    total = tl.zeros([BLOCK], tl.float32)
    if dswitch is not None:
        row = count
        for _ in range(num_sequences):
            total += _shares(row, column, num_columns, num_working, BLOCK)
            row += num_columns
        total *= even * tl.load(dswitch + one) / (tokens * tokens)
    for sequence in range(num_sequences):
        result = total
        if dsequence is not None:
            length = tl.load(live + sequence + one).to(tl.float32)
            length = tl.maximum(length, 1.0)
            factor = even * tl.load(dsequence + one) / (num_sequences * length * length)
            result += factor * _shares(count, column, num_columns, num_working, BLOCK)
            count += num_columns
        if dprob_sum is not None:
            result += tl.load(dprob_sum + column, mask=is_column, other=0.0)
            dprob_sum += num_columns
        if weight is not None:
            tl.store(weight + column, result, mask=is_column)
            weight += num_columns
    if dz is not None:
        tl.store(dz_sum + one, tl.load(dz + one) / tokens, mask=one + tl.program_id(0) == 0)


# ------------------------------------------------------------------------------- launchers


_reduce = Launcher(_reduce_kernel, overlapping=True)
_finish = Launcher(_finish_kernel, overlapping=True)
_loss_weight = Launcher(_loss_weight_kernel, overlapping=True)


def reduce_tiles(
    by_tile: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None],
    prefix: torch.Tensor | None,
    count: torch.Tensor,
    prob_sum: torch.Tensor,
    live: torch.Tensor,
    route: Route,
) -> torch.Tensor | None:
    """Writes the prefixes over the tiles and the sums by sequence.

    Args:
        by_tile: ``count (tiles, E)`` int32, ``prob (tiles, E)`` fp32 or None, and ``(3, tiles)``
            fp32 live tokens, squared logsumexp and entropy, or None.
        prefix: (E, stride) int32 or None. count, prob_sum: (S, E). live: (S,).

    Returns:
        (2,) fp32 sums of the squared logsumexp and the entropy, None without ``route.balance``.
    """
    tiles, num_columns = by_tile[0].shape
    sums = None
    if route.balance:
        sums = torch.empty(2, dtype=torch.float32, device=count.device)
    tiles_per_sequence = tiles // route.num_sequences
    block, columns = _FEW_TILES if tiles_per_sequence <= _FEW_TILES[0] else _MANY_TILES
    with device_of(count):
        _reduce(
            cdiv(num_columns, columns) + 1,
            *by_tile,
            prefix,
            count,
            prob_sum,
            live,
            sums,
            num_columns,
            tiles,
            tiles_per_sequence,
            route.num_sequences,
            0 if prefix is None else prefix.shape[1],
            BALANCE=route.balance,
            BLOCK_TILES=block,
            COLUMNS=columns,
            num_warps=max(4, min(8, block * columns // 512)),
        )
    return sums


def finish(
    count: torch.Tensor,
    prob_sum: torch.Tensor,
    live: torch.Tensor,
    sums: torch.Tensor | None,
    offset_by_expert: torch.Tensor,
    losses: list[torch.Tensor],
    route: Route,
) -> None:
    """Writes ``offset_by_expert`` unless it is empty, and with ``route.balance`` the four
    scalars."""
    num_sequences, num_columns = count.shape
    block = power_of_2(num_columns)
    with device_of(count):
        _finish(
            1,
            count,
            prob_sum,
            live,
            sums,
            offset_by_expert if offset_by_expert.numel() else None,
            *losses,
            num_columns,
            route.num_working,
            route.num_experts,
            num_sequences,
            TOP_K=route.top_k,
            BALANCE=route.balance,
            BLOCK=block,
            num_warps=max(1, min(8, block // 64)),
        )


def column_sums(
    logits: torch.Tensor,
    mask: torch.Tensor | None,
    lse: torch.Tensor,
    norm: torch.Tensor,
    route: Route,
) -> torch.Tensor:
    """``prob_sum (S, E)`` from the logits and the (T,) results of the row-wise pass; T > 0."""
    num_rows, num_columns = logits.shape
    logits = row_major(logits)
    mask, mask_stride = row_major_mask(mask)
    length = num_rows // route.num_sequences
    block = min(power_of_2(num_columns), 1024)
    rows = max(1, 2048 // block)
    # Enough programs to fill a GPU, few enough partial sums to be cheap.
    chunks = min(cdiv(length, rows), max(1, 256 // route.num_sequences))
    rows_per_chunk = cdiv(cdiv(length, chunks), rows) * rows
    options: dict[str, Any] = {"dtype": torch.float32, "device": logits.device}
    partial = torch.empty(route.num_sequences, chunks, num_columns, **options)
    grid = (cdiv(num_columns, block), route.num_sequences * chunks)
    with device_of(logits):
        _column_sums_kernel[grid](
            logits,
            mask,
            lse,
            norm,
            partial,
            num_columns,
            length,
            rows_per_chunk,
            chunks,
            logits.stride(0),
            mask_stride,
            SCORE=SCORES[ScoreFunction(route.score)],
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
        )
    return partial.sum(dim=1)


def loss_weights(
    dprob_sum: torch.Tensor | None,
    dswitch: torch.Tensor | None,
    dsequence: torch.Tensor | None,
    dz: torch.Tensor | None,
    count: torch.Tensor,
    live: torch.Tensor,
    route: Route,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of ``prob_sum (S, E)`` and of the sum of squared logsumexp ``()``.

    Args:
        dprob_sum: (S, E) fp32 or None. dswitch, dsequence, dz: () fp32 or None.
        count: (S, E) int32. live: (S,) int32.

    Returns:
        Each None where no gradient leads to it.
    """
    num_sequences, num_columns = count.shape
    by_column = [dprob_sum, dswitch, dsequence]
    options: dict[str, Any] = {"dtype": torch.float32, "device": count.device}
    weight = dz_sum = None
    if any(grad is not None for grad in by_column):
        weight = torch.empty(num_sequences, num_columns, **options)
    if dz is not None:
        dz_sum = torch.empty((), **options)
    if weight is None and dz_sum is None:
        return None, None
    block = min(power_of_2(num_columns), 1024)
    with device_of(count):
        _loss_weight(
            cdiv(num_columns, block),
            count,
            None if dprob_sum is None else dprob_sum.contiguous(),
            dswitch,
            dsequence,
            dz,
            live,
            weight,
            dz_sum,
            num_columns,
            route.num_working,
            num_sequences,
            TOP_K=route.top_k,
            BLOCK=block,
            num_warps=4,
        )
    return weight, dz_sum
