"""Bulk asynchronous copies of tensor tiles: TMA (PTX ISA 5.5, 9.7.9.27).

A load completes on an mbarrier some time after its issue; a store first reads shared memory, then
writes global memory, each some time later, and completes its bulk group. Boxes are read and written
row by row; elements outside the tensor are zeros (or NaN), or dropped.
"""

import math

import numpy as np

from . import tensormap
from .builder import instruction, lanes_of
from .bulk import REDUCTIONS, combine, enter_read, enter_write, land, ranks_of, stored
from .maps import read_map
from .memory import SMEM_RESERVED, Fault
from .races import GPU, WEAK
from .values import UINT

TENSOR = (
    "1d 2d 3d 4d 5d tile tile::gather4 tile::scatter4 shared shared::cta shared::cluster global "
    "mbarrier::complete_tx::bytes multicast::cluster cta_group::1 cta_group::2 L2::cache_hint "
    "bulk_group add min max inc dec and or xor"
)
NAN_BITS = {"f16": 0x7FFF, "bf16": 0x7FFF, "f32": 0x7FFFFFFF, "f32_ftz": 0x7FFFFFFF}
NAN_BITS["f64"] = 0x7FFFFFFFFFFFFFFF


class Box:
    """Where a box lies in global memory, row by row (a row: dimension 0).

    rows: which rows meet the tensor; off: their first bytes within `region`; nbytes: of each row,
    those inside the tensor, from byte `skip` of the row on. region: None if all lies outside.

    Addresses wrap modulo 2**64, which maps of ragged tensors rely on (strides near 2**34,
    coordinates near 2**30).
    """

    def __init__(self, memory, t, at, four_rows, what):
        self.map, self.region = t, None
        first, last = max(at[0], 0), min(at[0] + t.box[0], t.dims[0])
        self.skip, self.nbytes = (first - at[0]) * t.bits // 8, (last - first) * t.bits // 8
        address, inside = self.lines(t, at, four_rows)
        self.count = len(inside)
        self.rows = np.flatnonzero(inside) if last > first else np.zeros(0, np.int64)
        if len(self.rows):
            start = np.uint64((t.base + first * t.bits // 8) & 0xFFFFFFFFFFFFFFFF)
            self.place(memory, address[self.rows] + start, what)

    @staticmethod
    def lines(t, at, four_rows):
        """Per row of the box, slowest dimension first: byte offset of its start; whether inside."""
        if four_rows:
            y = np.array(at[1:], np.int64)
            return y.view(np.uint64) * np.uint64(t.strides[1]), (y >= 0) & (y < t.dims[1])
        address, inside = np.zeros(1, np.uint64), np.ones(1, bool)
        for d in range(t.rank - 1, 0, -1):
            x = at[d] + t.elem_strides[d] * np.arange(t.shape[d], dtype=np.int64)
            step = x.view(np.uint64) * np.uint64(t.strides[d])
            address = (address[:, None] + step).reshape(-1)
            inside = (inside[:, None] & ((x >= 0) & (x < t.dims[d]))).reshape(-1)
        return address, inside

    def place(self, memory, address, what):
        """A box lies in one buffer."""
        t, low, high = self.map, int(address.min()), int(address.max())
        r = memory.region(low, what)
        if high + self.nbytes > r.base + r.size:
            raise Fault(
                f"{what} at {high:#x}: the tensor map describes more than the buffer of {r.size} "
                f"bytes at {r.base:#x} holds (dims {t.dims}, strides {t.strides}, "
                f"map base {t.base:#x})"
            )
        self.region, self.off = r, (address - np.uint64(r.base)).view(np.int64)

    def index(self):
        """(type, positions) of the box's words in the buffer, in the widest type that fits."""
        low = math.gcd(int(np.bitwise_or.reduce(self.off)) | self.nbytes | 8, 8)
        return UINT[low], self.off[:, None] // low + np.arange(self.nbytes // low)

    def view(self, typ):
        size = np.dtype(typ).itemsize
        return self.region.data[: self.region.size // size * size].view(typ)

    def read(self):
        """The bytes of the box as shared memory has them: (16-byte units, 16)."""
        t = self.map
        packed = t.box[0] * t.bits // 8
        out = np.zeros((self.count, packed), np.uint8)
        if t.oob_nan:
            out.view(UINT[t.elem])[:] = NAN_BITS[t.dtype]
        if self.region is not None:
            typ, index = self.index()
            inside = self.view(typ)[index].view(np.uint8).reshape(len(index), -1)
            out[self.rows, self.skip : self.skip + self.nbytes] = inside
        if t.dtype in tensormap.PADDED:
            groups = out.reshape(-1, 2 * t.bits)  # 16 elements each
            out = np.full((len(groups), 16), 0xFF, np.uint8)  # nothing may rely on the padding
            out[:, : 2 * t.bits] = groups
        return out.reshape(-1, 16)

    def write(self, data, op):
        """Writes 16-byte units, or combines them with what is there."""
        if self.region is None:
            return
        rows = data.reshape(self.count, -1)[self.rows, self.skip : self.skip + self.nbytes]
        rows = np.ascontiguousarray(rows)
        if op is None:
            typ, index = self.index()
            self.view(typ)[index] = rows.view(typ)
            return
        typ = UINT[self.map.elem]
        index = self.off[:, None] // self.map.elem + np.arange(self.nbytes // self.map.elem)
        view = self.view(typ)
        view[index] = combine(view[index], rows.view(typ), self.map.dtype, op)


class Tile:
    """What an instruction says of the tensor: its map, coordinates, mode."""

    def __init__(self, b, ins, operand, what):
        self.ins, self.what = ins, what
        self.map = b.address(operand, "u8")
        self.coords = [b.get(c, "i4") for c in operand.coords]
        self.four_rows = any(p in ("tile::gather4", "tile::scatter4") for p in ins.parts)
        self.rank = int(next(p for p in ins.parts if p in ("1d", "2d", "3d", "4d", "5d"))[0])
        wanted = 5 if self.four_rows else self.rank
        if len(self.coords) != wanted or (self.four_rows and self.rank != 2):
            raise b.unsupported(ins)

    def read_map(self, M, w, i):
        return read_map(M, w, self.ins, int(self.map(w.r)[i]), self.rank, self.what)

    def box(self, M, w, i):
        """The Box of lane i."""
        at, t = [int(c(w.r)[i]) for c in self.coords], self.read_map(M, w, i)
        if self.four_rows and t.box[1] != 1:
            raise Fault(f"{self.what}: the box of {self.ins.op} must have one row, not {t.box[1]}")
        return Box(M.memory, t, at, self.four_rows, self.what)

    def nbytes(self, t):
        return 4 * t.row_bytes if self.four_rows else t.box_bytes

    def units(self, t, off):
        """16-byte units of shared memory, after checks of the address."""
        if off % 128:
            raise Fault(f"{self.what}: shared address {off:#x} is not 128-byte aligned")
        return tensormap.box_units(off, self.nbytes(t), t.swizzle, t.atom)


@instruction("cp.async.bulk.tensor", TENSOR)
def bulk_tensor(b, ins):
    spaces = [p.split("::")[0] for p in ins.parts[4:]]
    to_shared = next(p for p in spaces if p in ("shared", "global")) == "shared"
    return tma_load(b, ins) if to_shared else tma_store(b, ins, None)


@instruction("cp.reduce.async.bulk.tensor", TENSOR)
def reduce_tensor(b, ins):
    return tma_store(b, ins, next(p for p in ins.parts if p in REDUCTIONS))


@instruction("cp.async.bulk.prefetch.tensor", TENSOR + " L2")
def prefetch_tensor(b, ins):
    """Reads nothing that anyone sees; its tensor map must be legal."""
    tile = Tile(b, ins, ins.operands[0], "TMA prefetch")

    def prefetch(M, w, frag, m):
        for i in lanes_of(m):
            tile.read_map(M, w, i)

    return prefetch


def tma_load(b, ins):
    """Global to shared memory of one CTA or, with a multicast mask, of several."""
    dst, tm, bar, *rest = ins.operands
    tile = Tile(b, ins, tm, "TMA load")
    gd, gb = b.shared_address(dst), b.shared_address(bar)
    mask = b.get(rest[0], "u4") if "multicast::cluster" in ins.parts else None
    pair = "cta_group::2" in ins.parts

    def issue(M, w, i):
        box = tile.box(M, w, i)
        t, nbytes = box.map, tile.nbytes(box.map)
        M.memory.find(t.base, "base of a tensor map used for a load, which the hardware validates,")
        d, bar_at = int(gd(w.r)[i]), int(gb(w.r)[i])
        off, bar_off = d & 0xFFFFFF, bar_at & 0xFFFFFF
        targets = [d >> 24] if mask is None else ranks_of(int(mask(w.r)[i]))
        units = tile.units(t, off)
        if off < SMEM_RESERVED or off + nbytes > w.cta.smem.end:
            raise Fault(f"TMA load: destination {off:#x}+{nbytes} is outside the allocation")
        jobs = []
        for x in targets:
            # with cta_group::2 the barrier may be the peer's: its parity in the pair is that of the
            # operand
            bar_rank = (
                (x & ~1) | (bar_at >> 24 & 1) if pair else (x if mask is not None else bar_at >> 24)
            )
            cta, _ = w.cta.cluster.resolve(x << 24 | off)
            mb = w.cta.cluster.mbarrier(w, bar_rank << 24 | bar_off, remote=True)
            if mb.cta is not cta and not pair:
                raise Fault("TMA load: destination and mbarrier lie in different CTAs")
            cta.smem.check_async(w, units, "TMA load", write=True)
            jobs.append((cta.smem, cta.smem.begin("TMA write", units, ins, w), mb))
        if box.region is not None:
            bars = [mb for _, _, mb in jobs]
            enter_read(M, w, ins, box.region, box.off, box.nbytes, "TMA load", bars)

        land(M, w, ins, jobs, units, lambda: tensormap.flipped(units, box.read(), t.atom), nbytes)
        M.count("tma_load")

    def load(M, w, frag, m):
        for i in lanes_of(m):
            issue(M, w, i)

    return load


def tma_store(b, ins, op):
    """Shared to global memory, or a reduction into it."""
    tm, src = ins.operands[:2]
    what = "TMA reduction" if op else "TMA store"
    tile, gs = Tile(b, ins, tm, what), b.shared_address(src)
    strength = GPU if op else WEAK  # a reduction is relaxed, of scope gpu

    def issue(M, w, lanes, addr):
        box = tile.box(M, w, lanes[0])
        t = box.map
        if t.dtype in tensormap.PADDED or (op and t.bits < 8):
            raise Fault(f"{what}: elements of type {t.dtype} are not supported")
        cta, off = w.cta.cluster.resolve(addr)
        if cta is not w.cta:
            raise Fault(f"{what}: the source must lie in the issuing CTA's shared memory")
        units = tile.units(t, off)
        if off + tile.nbytes(t) > cta.smem.end:
            raise Fault(f"{what}: source {off:#x}+{tile.nbytes(t)} is outside the allocation")
        event = None
        if box.region is not None:
            event = enter_write(M, w, ins, box.region, box.off, box.nbytes, what, strength)

        def write(data):
            box.write(tensormap.flipped(units, data, t.atom), op)

        stored(M, w, np.array(lanes), cta.smem, units, ins, event, write)

    def store(M, w, frag, m):
        # Lanes that issue the very same store: the hardware's instruction is one of the warp, and
        # known kernels rely on it. All of them must wait for it, each for its own groups. By the
        # ISA each thread stores, which makes no difference; that each reduces (9.7.9.27.1.3) does.
        same = {}
        for i in lanes_of(m):
            at = tuple(int(c(w.r)[i]) for c in tile.coords)
            same.setdefault((int(gs(w.r)[i]), *at), []).append(i)
        for (addr, *_), lanes in same.items():
            if op and len(lanes) > 1:
                raise Fault(
                    f"{what} of the same tile by {len(lanes)} lanes, each of which reduces it: let "
                    "one thread issue it (elect.sync)"
                )
            issue(M, w, lanes, addr)

    return store
