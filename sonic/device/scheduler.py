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
_PHASES = 4  # of a split reduction


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
        tiles_n, rows_per_tile, False,
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

    Experts come in ``_PHASES`` passes, those of many rows first: what a fixed stride hands out at
    one time is then about equally long. The cursor is that of a part; its third entry is ``_PHASES
    * part + pass``.
    """
    expert, first, which, begin, end = cursor
    part, phase = which // _PHASES, which % _PHASES
    begin = begin - part * rows_per_part  # of the expert
    first = first - part * tiles_per_part
    end = offset_by_expert[cutlass.min(expert + 1, num_experts)]
    tiles = _tiles_of_phase(end - begin, phase, tiles_per_part, rows_per_part)
    position = phase * num_experts + expert
    searching = tile >= first + tiles
    if searching:
        position = cutlass.min(position + 1, _PHASES * num_experts)
        first = first + tiles
    position, first, tiles, begin, end = _seek(
        tile, (position, first, tiles, begin, end), searching, offset_by_expert, num_experts,
        tiles_per_part, rows_per_part, True,
    )  # fmt: skip
    part = (tile - first) // tiles_per_part
    phase = _phase_of(position, num_experts)
    if phase == _PHASES:
        phase, part = Int32(_PHASES - 1), Int32(0)
    expert = position - phase * num_experts
    begin = begin + part * rows_per_part
    first = first + part * tiles_per_part
    return expert, first, _PHASES * part + phase, begin, cutlass.min(end, begin + rows_per_part)


def is_first_part(which):
    """Of the third entry of a cursor of :func:`seek_split_reduction`."""
    return which < _PHASES


def _phase_of(position, num_experts):
    """``position // num_experts`` of a position up to ``_PHASES * num_experts`` and more."""
    return sum(Int32(position >= (i + 1) * num_experts) for i in range(_PHASES))


def _tiles_of_phase(rows, phase, tiles_per_part, rows_per_part):
    """Tiles of an expert with ``rows`` rows, 0 in all passes but its own: that of more than a part,
    of more than a half, of more than a quarter of one, and of fewer.
    """
    own = sum(Int32(rows <= (rows_per_part >> i)) for i in range(_PHASES - 1))
    parts = cutlass.max((rows + rows_per_part - 1) // rows_per_part, 1)
    return parts * tiles_per_part * Int32(own == phase)


@cute.jit
def _seek(
    tile: Int32,
    cursor,
    searching: cutlass.Boolean,
    offset_by_expert: cute.Tensor,
    num_experts: Int32,
    tiles_n: Int32,
    rows_per_tile,
    in_phases: cutlass.Constexpr,
):
    """The first expert from the cursor's on that has ``tile``; see :func:`seek_ragged_rows`. In
    phases, an expert is a position: that many experts on, through one pass after another.
    """
    expert, first, tiles, begin, end = cursor
    lane = cute.arch.lane_idx()
    last = num_experts * (_PHASES if in_phases else 1)
    while searching:
        candidate = expert + lane
        if cutlass.const_expr(in_phases):
            phase = _phase_of(candidate, num_experts)
            index = candidate - phase * num_experts
            low = offset_by_expert[cutlass.min(index, num_experts)]
            high = offset_by_expert[cutlass.min(index + 1, num_experts)]
            count = _tiles_of_phase(high - low, phase, tiles_n, rows_per_tile)
        else:
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
            if expert >= last:
                expert = last
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
