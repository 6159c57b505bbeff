"""cp.async loaders of rows picked by index, into 128-byte-swizzled shared memory.

Both loaders move 16-byte pieces: eight neighbouring threads fetch 128 contiguous bytes of one
source row. A loader carries its per-tile registers in a ``state`` tuple, so that it can live in a
loop: ``look_ahead`` reads the first indices of a tile long before ``begin_tile`` needs them.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from sonic.device.ptx import copy_16_bytes_or_zero

_PIECE = 8  # 16-bit elements of one cp.async
_PIECES_PER_ROW = 8
_ROW_BYTES = 128
_SLAB = 64  # elements of one swizzled row


def _swizzled(row, piece):
    """Byte offset of a 16-byte piece in rows of 128 bytes under the 128-byte swizzle."""
    return row * _ROW_BYTES + ((piece ^ (row & 7)) << 4)


@dataclass(frozen=True)
class GatherMajorColumns:
    """Tile ``(rows, 64 columns)`` of gathered rows, reduction along the columns (ragged rows).

    Rows past the segment's end and columns past ``columns`` are zero and cost no traffic.
    """

    source: cute.Tensor  # (tokens, columns)
    index: cute.Tensor  # (rows,) int32
    thread: Int32
    threads: int
    rows: int
    columns: Int32

    @cute.jit
    def look_ahead(self, begin: Int32, end: Int32, first: Int32):
        """Tokens of this thread's source rows in a coming tile; the loads stay in flight."""
        step = self.threads // _PIECES_PER_ROW
        tokens = []
        for i in cutlass.range_constexpr(self.rows // step):
            row = begin + first + self.thread // _PIECES_PER_ROW + i * step
            token = Int32(-1)
            if row < end:
                token = self.index[row]
            tokens.append(token)
        return tuple(tokens)

    @cute.jit
    def begin_tile(self, tokens):
        """Element offsets of this thread's source rows, negative where there is none."""
        piece = self.thread % _PIECES_PER_ROW
        return tuple(Int64(token) * self.columns + piece * _PIECE for token in tokens)

    def prepare(self, offsets, k: Int32):
        return offsets

    @cute.jit
    def load(self, offsets, destination, k: Int32, rows):
        """Issues the copies of columns ``[k, k + 64)`` of the tile's first ``rows`` rows."""
        step = self.threads // _PIECES_PER_ROW
        piece = self.thread % _PIECES_PER_ROW
        row = self.thread // _PIECES_PER_ROW
        inside = k + piece * _PIECE < self.columns
        base = self.source.iterator
        for i in cutlass.range_constexpr(self.rows // step):
            if i * step < rows:
                copy_16_bytes_or_zero(
                    destination + (_swizzled(row, piece) + i * step * _ROW_BYTES),
                    base + (offsets[i] + k),
                    inside & (offsets[i] >= 0),
                )


@dataclass(frozen=True)
class GatherMajorRows:
    """Tile ``(depth rows, extent columns)`` of gathered rows, reduction along the rows.

    Rows past the segment's end and columns past ``columns`` are zero. The indices of the next stage
    are fetched while the current one is awaited.
    """

    source: cute.Tensor  # (tokens, columns)
    index: cute.Tensor  # (rows,) int32
    thread: Int32
    threads: int
    extent: int
    depth: int
    columns: Int32

    @cute.jit
    def _fetch(self, begin: Int32, end: Int32, k: Int32):
        step = self.threads // _PIECES_PER_ROW
        tokens = []
        for i in cutlass.range_constexpr(self.depth // step):
            row = begin + k + self.thread // _PIECES_PER_ROW + i * step
            token = Int32(-1)
            if row < end:
                token = self.index[row]
            tokens.append(token)
        return tuple(tokens)

    @cute.jit
    def look_ahead(self, begin: Int32, end: Int32, first: Int32):
        """``(begin, end, first column, tokens to load, tokens of the first stage)``."""
        none = tuple(Int32(-1) for _ in range(self.depth // (self.threads // _PIECES_PER_ROW)))
        return begin, end, first, none, self._fetch(begin, end, Int32(0))

    def begin_tile(self, state):
        return state

    @cute.jit
    def prepare(self, state, k: Int32):
        begin, end, first, _, ahead = state
        return begin, end, first, ahead, self._fetch(begin, end, k + self.depth)

    @cute.jit
    def load(self, state, destination, k: Int32, rows):
        """Issues the copies of rows ``[k, k + depth)`` of the segment.

        ``rows`` is the other loader's: the extent here is the same for all tiles.
        """
        _, _, first, tokens, _ = state
        step = self.threads // _PIECES_PER_ROW
        piece = self.thread % _PIECES_PER_ROW
        row = self.thread // _PIECES_PER_ROW
        base = self.source.iterator
        for i in cutlass.range_constexpr(self.depth // step):
            token = tokens[i]
            source = Int64(cutlass.max(token, 0)) * self.columns + first + piece * _PIECE
            for slab in cutlass.range_constexpr(self.extent // _SLAB):
                column = first + piece * _PIECE + slab * _SLAB
                inside = (token >= 0) & (column < self.columns)
                copy_16_bytes_or_zero(
                    destination
                    + (_swizzled(row, piece) + (i * step + slab * self.depth) * _ROW_BYTES),
                    base + (source + slab * _SLAB),
                    inside,
                )
