"""How many columns of the rows of dX are in memory at once."""

import functools

_TILE_ROWS = 128
_TILE_COLUMNS = (256, 192)  # of the kernels that make expert outputs
# A slice is a launch of its own, and ends with SMs that wait for the last tiles: at least eight
# tiles for each of 132 SMs keep that small.
_LEAST_TILES = 8 * 132


@functools.lru_cache(maxsize=4096)
def column_slices(
    rows: int, columns: int, element_size: int, other_bytes: int
) -> tuple[tuple[int, int], ...]:
    """``(first column, number of columns)`` of the slices in which ``(rows, columns)`` is made.

    As few as it takes for a slice and the ``other_bytes`` that are alive beside it to need no more
    memory than the whole does, as long as each one still fills a GPU; one, if the others need more
    than that by themselves: every slice more costs time. Pure: sizes decide, and nothing that is
    measured.
    """
    room = rows * columns * element_size - other_bytes
    if other_bytes == 0 or room <= 0:
        return ((0, columns),)
    tile = min(_TILE_COLUMNS, key=lambda width: (-(-columns // width) * width, -width))
    tiles = -(-columns // tile)
    fitting = room // (rows * tile * element_size)
    full = -(-rows // _TILE_ROWS) * tiles // _LEAST_TILES
    slices = max(min(-(-tiles // max(fitting, 1)), tiles, full), 1)
    width = -(-tiles // slices) * tile
    return tuple((first, min(width, columns - first)) for first in range(0, columns, width))
