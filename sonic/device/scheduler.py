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
    searching = tile >= first + tiles
    if searching:
        expert = expert + (Int32(1) if tiles > 0 else Int32(0))
        first = first + tiles
    return _seek(
        tile, (expert, first, tiles, begin, end), searching, offset_by_expert, num_experts,
        tiles_n, rows_per_tile, 0,
    )  # fmt: skip


@cute.jit
def seek_split_reduction(
    tile: Int32,
    cursor,
    offset_by_expert: cute.Tensor,
    num_experts: Int32,
    tiles_per_part: Int32,
    rows_per_part: Int32,
):
    """Cursor at ``tile``, where every expert has as many parts as it has started blocks of
    ``rows_per_part`` rows, but at least one, and a part has ``tiles_per_part`` tiles.

    The cursor is that of a part, and its third entry the part's number.
    """
    expert, first, part, begin, end = cursor
    begin = begin - part * rows_per_part  # of the expert
    first = first - part * tiles_per_part
    end = offset_by_expert[cutlass.min(expert + 1, num_experts)]
    tiles = _tiles_of(end - begin, tiles_per_part, rows_per_part, 1)
    searching = tile >= first + tiles
    if searching:
        expert = cutlass.min(expert + 1, num_experts)
        first = first + tiles
    expert, first, tiles, begin, end = _seek(
        tile, (expert, first, tiles, begin, end), searching, offset_by_expert, num_experts,
        tiles_per_part, rows_per_part, 1,
    )  # fmt: skip
    part = (tile - first) // tiles_per_part
    if expert == num_experts:
        part = Int32(0)
    begin = begin + part * rows_per_part
    first = first + part * tiles_per_part
    return expert, first, part, begin, cutlass.min(end, begin + rows_per_part)


def _tiles_of(rows, tiles_n, rows_per_tile, least: int):
    """Tiles of an expert with ``rows`` rows; ``least``: the fewest row tiles, 0 or 1."""
    row_tiles = (rows + rows_per_tile - 1) // rows_per_tile
    return (cutlass.max(row_tiles, 1) if least else row_tiles) * tiles_n


@cute.jit
def _seek(
    tile: Int32,
    cursor,
    searching: cutlass.Boolean,
    offset_by_expert: cute.Tensor,
    num_experts: Int32,
    tiles_n: Int32,
    rows_per_tile,
    least: cutlass.Constexpr,
):
    """The first expert from the cursor's on that has ``tile``; see :func:`seek_ragged_rows`."""
    expert, first, tiles, begin, end = cursor
    lane = cute.arch.lane_idx()
    while searching:
        candidate = expert + lane
        low = offset_by_expert[cutlass.min(candidate, num_experts)]
        high = offset_by_expert[cutlass.min(candidate + 1, num_experts)]
        count = _tiles_of(high - low, tiles_n, rows_per_tile, least)
        if cutlass.const_expr(least > 0):
            if candidate >= num_experts:
                count = Int32(0)
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
