"""Persistent tile schedulers that read the expert offsets on the device.

A cluster works on growing numbers of one linear order over (expert, tile of that expert): every
``clusters``-th, or those that it takes from a counter. Every warp decodes a number for itself,
without a host sync. A scheduler's *cursor* is a tuple of registers that a warp carries from tile to
tile; experts only move forward, so decoding all tiles reads each offset once per warp.

Cursor: ``(expert, first, tiles, begin, end)``: the expert, the linear index of its first tile, its
number of tiles, and its row range. ``expert == num_experts`` means that no tile is left.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from sonic.device.ptx import count_trailing_zeros

_LANES = 32


@dataclass(frozen=True)
class TileOrder:
    """Cluster tiles of one expert, in the order in which they are handed out."""

    raster_along_m: bool

    @cute.jit
    def coordinates(self, local: Int32, tiles_m: Int32, tiles_n: Int32):
        """``(m, n)`` of the expert's cluster tile ``local``; any pair past the last tile."""
        if cutlass.const_expr(self.raster_along_m):
            tiles_m = cutlass.max(tiles_m, 1)
            n = local // tiles_m
            m = local - n * tiles_m
        else:
            m = local // tiles_n
            n = local - m * tiles_n
        return m, n


@cute.jit
def start_cursor():
    """Cursor before the first tile."""
    return Int32(0), Int32(0), Int32(0), Int32(0), Int32(0)


@cute.jit
def seek_ragged_rows(
    tile: Int32,
    cursor,
    offset_by_expert: cute.Tensor,
    num_experts: Int32,
    tiles_n: Int32,
    rows_per_tile: cutlass.Constexpr,
):
    """Cursor at ``tile``, where ``e`` has ``ceil(rows_e / rows_per_tile) * tiles_n`` tiles.

    Called by whole warps. Thirty-two experts are scanned at a time: each lane counts the tiles of
    one, an inclusive warp scan places them, and the first lane past ``tile`` owns it.
    """
    expert, first, tiles, begin, end = cursor
    lane = cute.arch.lane_idx()
    searching = tile >= first + tiles
    if searching:
        expert = expert + (Int32(1) if tiles > 0 else Int32(0))
        first = first + tiles
    while searching:
        candidate = expert + lane
        low = offset_by_expert[cutlass.min(candidate, num_experts)]
        high = offset_by_expert[cutlass.min(candidate + 1, num_experts)]
        count = (high - low + rows_per_tile - 1) // rows_per_tile * tiles_n
        inclusive = count
        for i in cutlass.range_constexpr(5):
            below = cute.arch.shuffle_sync_up(inclusive, 1 << i, mask_and_clamp=0)
            inclusive = inclusive + (below if lane >= (1 << i) else Int32(0))
        owners = cute.arch.vote_ballot_sync(first + inclusive > tile)
        if owners != 0:
            owner = count_trailing_zeros(owners)
            tiles = cute.arch.shuffle_sync(count, owner)
            first = first + cute.arch.shuffle_sync(inclusive, owner) - tiles
            begin = cute.arch.shuffle_sync(low, owner)
            end = cute.arch.shuffle_sync(high, owner)
            expert = expert + owner
            searching = cutlass.Boolean(False)
        else:
            first = first + cute.arch.shuffle_sync(inclusive, _LANES - 1)
            expert = expert + _LANES
            tiles = Int32(0)
            if expert >= num_experts:
                expert = num_experts
                searching = cutlass.Boolean(False)
    return expert, first, tiles, begin, end


@cute.jit
def seek_ragged_reduction(
    tile: Int32, cursor, offset_by_expert: cute.Tensor, num_experts: Int32, tiles_per_expert: Int32
):
    """Cursor at ``tile``, where every expert, empty or not, has the same number of tiles."""
    expert, first, tiles, begin, end = cursor
    expert = cutlass.min(tile // tiles_per_expert, num_experts)
    first = expert * tiles_per_expert
    begin = offset_by_expert[cutlass.min(expert, num_experts - 1)]
    end = offset_by_expert[cutlass.min(expert + 1, num_experts)]
    return expert, first, tiles_per_expert, begin, end
