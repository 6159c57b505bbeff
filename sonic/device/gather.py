"""cp.async loaders of rows picked by index, into 128-byte-swizzled shared memory.

Both loaders move 16-byte pieces: eight neighbouring threads fetch 128 contiguous bytes of one
source row. A loader carries its registers in a ``state`` tuple, so that it can live in a loop:
``look_ahead`` reads the first indices of a tile long before ``begin_tile`` needs them, ``prepare``
computes the addresses of a stage while it is awaited, and ``load`` only issues the copies, with a
``pause`` after every few of them: a burst delays the loads of the math warps from shared memory.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64

from sonic.device.ptx import copy_bytes_or_zero, keep_in_register, sleep

_PIECE = 8  # 16-bit elements of one cp.async
_PIECE_BYTES = 16
_PIECES_PER_ROW = 8
_ROW_BYTES = 128
_SLAB = 64  # elements of one swizzled row


def _swizzled(row, piece):
    """Byte offset of a 16-byte piece in rows of 128 bytes under the 128-byte swizzle."""
    return row * _ROW_BYTES + ((piece ^ (row & 7)) << 4)


def _copy(destination, source, address, size):
    """Copies ``size`` bytes, 0 or 16, from a global address; the rest is zeros."""
    kind = source.element_type
    pointer = cute.make_ptr(kind, address, cute.AddressSpace.gmem, assumed_align=_PIECE_BYTES)
    copy_bytes_or_zero(destination, pointer, size)


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
    pause: int  # nanoseconds after every other copy of a thread

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
        """``(sizes, addresses)`` of this thread's copies, one step before the tile's first one.

        The sizes, 16 bytes or 0 where there is no row, share one register: row ``i`` has the bit
        ``4 + i``.
        """
        piece = self.thread % _PIECES_PER_ROW
        base = self.source.iterator.toint() + (piece * _PIECE_BYTES - _ROW_BYTES)
        sizes = Int32(0)
        addresses = []
        for i in cutlass.range_constexpr(len(tokens)):
            addresses.append(base + Int64(tokens[i]) * self.columns * 2)
            if tokens[i] >= 0:
                sizes = sizes | (_PIECE_BYTES << i)
        return sizes, *addresses

    def prepare(self, state, k: Int32):
        """Goes on to the next columns."""
        sizes, *addresses = state
        return sizes, *(address + _ROW_BYTES for address in addresses)

    @cute.jit
    def load(self, state, destination, k: Int32, rows):
        """Issues the copies of columns ``[k, k + 64)`` of the tile's first ``rows`` rows."""
        step = self.threads // _PIECES_PER_ROW
        piece = self.thread % _PIECES_PER_ROW
        first = destination + _swizzled(self.thread // _PIECES_PER_ROW, piece)
        sizes, *addresses = state
        if k + piece * _PIECE >= self.columns:
            sizes = Int32(0)
        for i in cutlass.range_constexpr(self.rows // step):
            if i * step < rows:
                place = first + i * step * _ROW_BYTES
                _copy(place, self.source, addresses[i], (sizes >> i) & _PIECE_BYTES)
                if cutlass.const_expr(self.pause > 0 and i % 2 == 1 and (i + 1) * step < self.rows):
                    sleep(self.pause)


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
    pause: int  # nanoseconds after the copies of a row

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
        """``(begin, end, first column, copies to issue, tokens of the first stage)``."""
        rows = self.depth // (self.threads // _PIECES_PER_ROW)
        none = tuple((Int32(0), Int64(0)) for _ in range(rows))
        return begin, end, first, none, self._fetch(begin, end, Int32(0))

    def begin_tile(self, state):
        return state

    @cute.jit
    def prepare(self, state, k: Int32):
        """``(size, address)`` of the first copy of each of this thread's rows of the stage."""
        begin, end, first, _, tokens = state
        piece = self.thread % _PIECES_PER_ROW
        base = self.source.iterator.toint() + Int64(first + piece * _PIECE) * 2
        copies = []
        for token in tokens:
            address = base + Int64(cutlass.max(token, 0)) * self.columns * 2
            size = Int32(_PIECE_BYTES) if token >= 0 else Int32(0)
            copies.append((keep_in_register(size), keep_in_register(address)))
        return begin, end, first, tuple(copies), self._fetch(begin, end, k + self.depth)

    @cute.jit
    def load(self, state, destination, k: Int32, rows):
        """Issues the copies of rows ``[k, k + depth)`` of the segment.

        ``rows`` is the other loader's: the extent here is the same for all tiles.
        """
        if state[2] + self.extent <= self.columns:
            self._copy_rows(state, destination, False)
        else:
            self._copy_rows(state, destination, True)

    @cute.jit
    def _copy_rows(self, state, destination, clipped: cutlass.Constexpr):
        """``clipped``: some of the tile's columns may not exist."""
        first, copies = state[2], state[3]
        step = self.threads // _PIECES_PER_ROW
        piece = self.thread % _PIECES_PER_ROW
        place = destination + _swizzled(self.thread // _PIECES_PER_ROW, piece)
        for i in cutlass.range_constexpr(self.depth // step):
            for slab in cutlass.range_constexpr(self.extent // _SLAB):
                size, address = copies[i]
                if cutlass.const_expr(clipped):
                    if first + piece * _PIECE + slab * _SLAB >= self.columns:
                        size = Int32(0)
                offset = (i * step + slab * self.depth) * _ROW_BYTES
                _copy(place + offset, self.source, address + slab * _ROW_BYTES, size)
            if cutlass.const_expr(self.pause > 0 and (i + 1) * step < self.depth):
                sleep(self.pause)
