"""tcgen05.mma: the instruction descriptor and one operation (PTX ISA 9.7.16.4, 9.7.16.10).

Where an accumulator row lies depends on M and on the number of CTAs (9.7.16.10.5): M=128 on one CTA
and M=256 on two: lane = row; M=64 on one: 16 rows in each warp's 32 lanes; M=128 on two: 64 rows a
CTA, lanes 0..63 hold the first half of N and 64..127 the second. A 16-bit accumulator takes the low
half of a column.

Scale factors: the word of row r of A or column r of B lies in lane r % 32 of each of the four lane
partitions, r // 32 columns on; the descriptor's ID names its first byte.
"""

import functools

import numpy as np

from .formats import TABLES, to_float, unpack_nibbles
from .memory import Fault
from .operands import ELEM, check_extent, operand_offsets, read_operand
from .tmem import begin_read
from .values import UINT

NARROW = {0: "e4m3", 1: "e5m2", 3: "e2m3", 4: "e3m2", 5: "e2m1"}
TYPES = {
    "f16": {0: "f16", 1: "bf16"},
    "tf32": {2: "tf32"},
    "i8": {0: "u8", 1: "s8"},
    "f8f6f4": NARROW,
    "mxf8f6f4": NARROW,
    "mxf4": {1: "e2m1"},
    "mxf4nvf4": {1: "e2m1"},
}
ACCUMULATORS = {
    "f16": {0: "f16", 1: "f32"},
    "f8f6f4": {0: "f16", 1: "f32"},
    "tf32": {1: "f32"},
    "i8": {2: "s32"},
}
BLOCK = {"mxf8f6f4": (1,), "mxf4": (2,), "mxf4nvf4": (2, 4)}  # scale factors along K


class Shape:
    """A 32-bit instruction descriptor (9.7.16.4.2) of a dense MMA.

    `scales`: scale factors along K of a block-scaled kind, else 0.
    """

    def __init__(self, idesc, kind, scales):
        self.kind, self.scales = kind, scales
        if idesc & 7:
            raise Fault(f"instruction descriptor {idesc:#x}: sparsity is not supported")
        try:
            self.a = TYPES[kind][(idesc >> 7) & 7]
            self.b = TYPES[kind][(idesc >> 10) & (3 if "mxf4" in kind else 7)]
            self.d = "f32" if scales else ACCUMULATORS[kind][(idesc >> 4) & 3]
        except KeyError:
            raise Fault(
                f"instruction descriptor {idesc:#x}: its types are none of kind::{kind}"
            ) from None
        self.saturate = kind == "i8" and bool(idesc & 8)
        self.neg_a, self.neg_b = (idesc >> 13) & 1, (idesc >> 14) & 1
        self.mn_a, self.mn_b = (idesc >> 15) & 1, (idesc >> 16) & 1
        self.n, self.m = ((idesc >> 17) & 63) << 3, ((idesc >> 24) & 31) << 4
        self.packed = kind in ("mxf4", "mxf4nvf4")
        self.k = 64 if self.packed else 32 // ELEM[self.a]
        if scales:
            self.read_scales(idesc)
        if kind == "i8" and (self.neg_a or self.neg_b):
            raise Fault("tcgen05.mma.kind::i8 cannot negate an operand")
        if self.packed and (self.mn_a or self.mn_b):
            raise Fault(f"tcgen05.mma.kind::{kind}: both operands must be K-major")

    def read_scales(self, idesc):
        self.scale_type = "ue8m0" if (idesc >> 23) & 1 else "ue4m3"
        self.id_a, self.id_b = (idesc >> 29) & 3, (idesc >> 4) & 3
        if self.scale_type == "ue4m3" and self.scales != 4:
            raise Fault("tcgen05.mma: ue4m3 scales need kind::mxf4nvf4 with scale_vec::4X")
        if self.packed and idesc >> 31:
            raise Fault("tcgen05.mma: K = 96 is not supported")
        for name, value in (("A", self.id_a), ("B", self.id_b)):
            if value % self.scales:
                raise Fault(
                    f"tcgen05.mma: scale factor {name} ID {value} with scale_vec::{self.scales}X"
                )

    def check(self, g):
        """9.7.16.2.1: the shapes that exist on `g` CTAs."""
        rows = {1: (64, 128), 2: (128, 256)}[g]
        if self.scales:
            rows = rows[1:]
        step = 16 if self.m in (128, 256) else 8
        if g == 2 and self.m == 256:
            step = 16 if self.kind != "i8" else 32
        if self.m not in rows or self.n % step or not step <= self.n <= 256:
            raise Fault(
                f"tcgen05.mma.cta_group::{g}.kind::{self.kind}: M={self.m} N={self.n}; M may be "
                f"{' or '.join(map(str, rows))}, N a multiple of {step} up to 256"
            )


@functools.lru_cache(256)
def shape_of(idesc, kind, scales):
    return Shape(idesc, kind, scales)


def scale_factors(data, address, rows, shape, identifier):
    """The (rows, k) multipliers of a matrix from its scale factors in tensor memory."""
    column = address & 0xFFFF
    r = np.arange(rows)
    words = [data[32 * p + r % 32, column + r // 32] for p in range(4)]
    take = slice(identifier, identifier + shape.scales)
    copies = [np.ascontiguousarray(w).view(np.uint8).reshape(rows, 4)[:, take] for w in words]
    for p, other in enumerate(copies[1:], 1):
        if not np.array_equal(copies[0], other):
            row = int(np.flatnonzero((copies[0] != other).any(1))[0])
            raise Fault(
                f"tcgen05.mma: the scale factors of row {row} differ between lane partitions 0 and "
                f"{p}; they must be the same in all four"
            )
    return np.repeat(TABLES[shape.scale_type][copies[0]], shape.k // shape.scales, axis=1)


class Mma:
    """One tcgen05.mma that a thread of warp `w` issued for `ctas`; `run` does it later.

    d, a, b: addresses or descriptors; `disabled`: lanes of each CTA that stay as they are;
    `scale`: scale-input-d; `scales`: the addresses of scale A and scale B, or None.
    """

    def __init__(self, machine, w, ins, engine, ctas, shape, d, a, b, accumulate, **options):
        self.ctas, self.shape, self.accumulate = ctas, shape, accumulate
        self.a, self.b, self.a_in_tmem = a, b, options["a_in_tmem"]
        self.disabled, self.scale = options["disabled"], options["scale"]
        self.scales = options["scales"]
        s, g = shape, len(ctas)
        s.check(g)
        self.rows = s.m // g
        self.lane, self.column = d >> 16 & 0x7F, d & 0xFFFF
        self.split_n = g == 2 and s.m == 128
        self.columns = s.n // 2 if self.split_n else s.n
        if self.lane and not (s.m == 64 and self.lane == 16):
            raise Fault(f"tcgen05.mma: M={s.m} with the accumulator at TMEM lane {self.lane}")
        self.issue_tensor_memory(machine, w, ins, engine)
        self.issue_shared_memory(w, ins)

    def issue_shared_memory(self, w, ins):
        self.reads = []
        s, bytes_k = self.shape, 32
        for c in self.ctas:
            operands = [(self.b, s.n // len(self.ctas), s.b, s.mn_b)]
            if not self.a_in_tmem:
                operands.append((self.a, self.rows, s.a, s.mn_a))
            for desc, rows, dtype, mn in operands:
                elem = ELEM[dtype]
                units = operand_offsets(desc, rows, bytes_k // elem, elem, bool(mn), True)[1]
                check_extent(c.smem, units, "tcgen05.mma")
                self.reads.append(begin_read(w, c.smem, units, ins, "tcgen05.mma operand read"))

    def issue_tensor_memory(self, machine, w, ins, engine):
        """Bounds and order of what it writes and reads in tensor memory."""
        s = self.shape
        halves = slice(self.lane // 16, 8, 2) if s.m == 64 else slice(0, 8)
        written = slice(self.column, self.column + self.columns)
        read = []
        if self.a_in_tmem:
            read.append((self.a & 0xFFFF, 8))
        if self.scales:
            read.append((self.scales[0] & 0xFFFF, -(-self.rows // 32)))
            read.append((self.scales[1] & 0xFFFF, -(-s.n // 32)))
        for c in self.ctas:
            memory = c.tmem
            if memory is None:
                raise Fault(f"tcgen05.mma on cta{c.ctaid}, which has allocated no TMEM")
            memory.check_columns(self.column, self.columns)
            for column, n in read:
                memory.check_columns(column, n)
            if not memory.check:
                continue
            memory.mma_order(machine, w, halves, written, ins, engine)
            memory.stamp_write(halves, written, engine.component, engine.time, ins.line)
            for column, n in read:
                at = slice(0, 8), slice(column, column + n)
                memory.after_writes(machine, w, *at, ins, engine, write=False)
                memory.stamp_read(*at, -1, engine.component, engine.time, ins.line)

    def a_of(self, cta):
        """This CTA's rows of A."""
        s = self.shape
        if not self.a_in_tmem:
            return read_operand(
                cta.smem, self.a, self.rows, s.k, s.a, s.mn_a, s.neg_a, True, s.packed
            )
        lane, column = self.a >> 16 & 0x7F, self.a & 0xFFFF
        lanes = lane + np.arange(self.rows)
        if s.m == 64:  # 16 rows in each warp's lanes, as in the accumulator
            lanes = self.lane + np.arange(64) // 16 * 32 + np.arange(64) % 16
        bits = np.ascontiguousarray(cta.tmem.data[lanes, column : column + 8])
        bits = bits.view(UINT[ELEM[s.a]])
        a = to_float(unpack_nibbles(bits) if s.packed else bits, s.a)
        return -a if s.neg_a else a

    def placed(self, d):
        """[(lanes, values)] of a CTA's part of the product."""
        s = self.shape
        if self.split_n:
            return [(slice(0, 64), d[:, : s.n // 2]), (slice(64, 128), d[:, s.n // 2 :])]
        if s.m == 64:
            return [
                (slice(32 * i + self.lane, 32 * i + self.lane + 16), d[16 * i : 16 * i + 16])
                for i in range(4)
            ]
        return [(slice(0, 128), d)]

    def run(self):
        s, g = self.shape, len(self.ctas)
        b = np.concatenate(
            [
                read_operand(c.smem, self.b, s.n // g, s.k, s.b, s.mn_b, s.neg_b, True, s.packed)
                for c in self.ctas
            ]
        )
        for i, c in enumerate(self.ctas):
            av, bv, data = self.a_of(c), b, c.tmem.data
            if self.scales:
                av = av * scale_factors(data, self.scales[0], self.rows, s, s.id_a)
                bv = bv * scale_factors(data, self.scales[1], s.n, s, s.id_b)
            for lanes, v in self.placed(av @ bv.T):
                keep = self.disabled[i][lanes] if self.disabled is not None else None
                self.store(data, lanes, v, keep)
        for smem, access in self.reads:
            smem.end_access(access)

    def store(self, data, lanes, product, keep):
        """Adds to the accumulators or replaces them, but in the lanes of `keep`."""
        at = lanes, slice(self.column, self.column + self.columns)
        old, kind = data[at], self.shape.d
        if kind == "f32":
            new = self.accumulated(old.view(np.float32), product).view(np.uint32)
        elif kind == "f16":
            half = (old & np.uint32(0xFFFF)).astype(np.uint16).view(np.float16)
            total = self.accumulated(half.astype(np.float32), product).astype(np.float16)
            new = total.view(np.uint16).astype(np.uint32) | np.uint32(0x7FFF0000)
        else:
            total = product.astype(np.int64)
            if self.accumulate:
                total = total + old.view(np.int32)
            if self.shape.saturate:
                total = np.clip(total, -(2**31), 2**31 - 1)
            new = total.astype(np.int32).view(np.uint32)
        data[at] = new if keep is None else np.where(keep[:, None], old, new)

    def accumulated(self, old, product):
        if not self.accumulate:
            return np.ascontiguousarray(product, np.float32)
        return (old * np.float32(2.0**-self.scale) if self.scale else old) + product
