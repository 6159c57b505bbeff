"""How many columns of the rows of dX are in memory at once."""

import functools

# Assumed of every GPU, and true of Hopper: tiles of the kernels that make the rows of dX, and SMs.
# On another one results are right, and slices may be too many or too few.
_TILE_ROWS = 128
_TILE_COLUMNS = (256, 192)
_SMS = 132
# A slice is a launch of its own, and ends with SMs that wait for the last tiles: at least eight
# tiles for each SM keep that small.
_LEAST_TILES = 8 * _SMS


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
    if room <= 0:
        return ((0, columns),)
    tile, tiles = _tiles(columns)
    fitting = room // (rows * tile * element_size)
    full = -(-rows // _TILE_ROWS) * tiles // _LEAST_TILES
    slices = max(min(-(-tiles // max(fitting, 1)), tiles, full), 1)
    return _cut(columns, slices)


def slice_widths(columns: int, other_columns: int) -> tuple[int, ...]:
    """Numbers of columns of all slices that :func:`column_slices` may cut, whatever the number of
    rows, beside ``other_columns`` of each row that are alive too; the whole comes first."""
    tile, tiles = _tiles(columns)
    fitting = (columns - other_columns) // tile
    most = 1 if columns <= other_columns else min(-(-tiles // max(fitting, 1)), tiles)
    cuts = [width for slices in range(1, most + 1) for _, width in _cut(columns, slices)]
    return tuple(dict.fromkeys((columns, *cuts)))


def _tiles(columns: int) -> tuple[int, int]:
    """Columns of the tile that wastes the least, and how many of these there are."""
    tile = min(_TILE_COLUMNS, key=lambda width: (-(-columns // width) * width, -width))
    return tile, -(-columns // tile)


def _cut(columns: int, slices: int) -> tuple[tuple[int, int], ...]:
    """As :func:`column_slices`, into at most this many."""
    if slices == 1:
        return ((0, columns),)
    tile, tiles = _tiles(columns)
    width = -(-tiles // slices) * tile
    return tuple((first, min(width, columns - first)) for first in range(0, columns, width))
