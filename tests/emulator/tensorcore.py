"""tcgen05.mma: the instruction descriptor, one operation, and tensor memory (PTX ISA 9.7.16).

Tensor memory is 128 lanes by 512 columns of 32 bits. Where an accumulator row lies depends on M and
on the number of CTAs (9.7.16.10.5): M=128 on one CTA and M=256 on two: lane = row; M=64 on one: 16
rows in each warp's 32 lanes; M=128 on two: 64 rows a CTA, lanes 0..63 hold the first half of N and
64..127 the second.
"""

import functools

import numpy as np

from .memory import Fault
from .operands import ELEM, operand_offsets, read_operand, to_float
from .values import UINT

F16_KIND = {0: "f16", 1: "bf16"}
F8_KIND = {0: "e4m3", 1: "e5m2"}


class Shape:
    """A 32-bit instruction descriptor (9.7.16.4.2), dense kinds without block scaling."""

    def __init__(self, idesc, kind):
        if idesc & 0xF:
            raise Fault(
                f"instruction descriptor {idesc:#x}: sparsity or saturation is not supported"
            )
        types = {"f16": F16_KIND, "tf32": {2: "tf32"}, "f8f6f4": F8_KIND}.get(kind, {})
        try:
            self.a, self.b = types[(idesc >> 7) & 7], types[(idesc >> 10) & 7]
        except KeyError:
            raise Fault(
                f"instruction descriptor {idesc:#x}: types of kind::{kind} not supported"
            ) from None
        if (idesc >> 4) & 3 != 1:
            raise Fault("tcgen05.mma: f16 accumulators are not supported")
        self.neg_a, self.neg_b = (idesc >> 13) & 1, (idesc >> 14) & 1
        self.mn_a, self.mn_b = (idesc >> 15) & 1, (idesc >> 16) & 1
        self.n, self.m = ((idesc >> 17) & 63) << 3, ((idesc >> 24) & 31) << 4
        self.k = 32 // ELEM[self.a]


@functools.lru_cache(256)
def shape_of(idesc, kind):
    return Shape(idesc, kind)


class Mma:
    """One tcgen05.mma that warp `w` issued for `ctas`; `run` does it later."""

    def __init__(self, w, ins, ctas, d_addr, a, b_desc, shape, accumulate, a_in_tmem):
        self.ctas, self.shape, self.accumulate = ctas, shape, accumulate
        self.a, self.b, self.a_in_tmem = a, b_desc, a_in_tmem
        s, g = shape, len(ctas)
        self.rows = s.m // g
        self.lane, self.column = d_addr >> 16, d_addr & 0xFFFF
        self.split_n = g == 2 and s.m == 128
        if not (g == 2 and s.m in (128, 256) or g == 1 and s.m in (64, 128)):
            raise Fault(f"tcgen05.mma: M={s.m} with cta_group::{g}")
        self.columns = s.n // 2 if self.split_n else s.n
        for c in ctas:
            check_tmem(c, self.column, self.columns)
        self.reads = []
        for c in ctas:
            if not a_in_tmem:
                self.begin(
                    w, ins, c, operand_offsets(a, self.rows, s.k, ELEM[s.a], bool(s.mn_a), True)[1]
                )
            self.begin(
                w, ins, c, operand_offsets(b_desc, s.n // g, s.k, ELEM[s.b], bool(s.mn_b), True)[1]
            )
        for c in ctas:
            c.tmem_busy[self.column : self.column + self.columns] += 1

    def begin(self, w, ins, cta, units):
        cta.smem.check_async(w, units, "tcgen05.mma operand read", write=False)
        self.reads.append((cta.smem, cta.smem.begin("tcgen05.mma read", units, ins, w)))

    def a_of(self, cta):
        """This CTA's rows of A."""
        s = self.shape
        if not self.a_in_tmem:
            return read_operand(cta.smem, self.a, self.rows, s.k, s.a, s.mn_a, s.neg_a, True)
        per = 4 // ELEM[s.a]
        lane, column = self.a >> 16, self.a & 0xFFFF
        bits = np.ascontiguousarray(cta.tmem[lane : lane + self.rows, column : column + s.k // per])
        a = to_float(bits.view(UINT[ELEM[s.a]]), s.a)
        return -a if s.neg_a else a

    def placed(self, d):
        """[(lanes, values)] of a CTA's part of the product."""
        s = self.shape
        if self.split_n:
            return [(slice(0, 64), d[:, : s.n // 2]), (slice(64, 128), d[:, s.n // 2 :])]
        if s.m == 64:
            return [(slice(32 * i, 32 * i + 16), d[16 * i : 16 * i + 16]) for i in range(4)]
        return [(slice(0, 128), d)]

    def run(self):
        s, g = self.shape, len(self.ctas)
        b = np.concatenate(
            [
                read_operand(c.smem, self.b, s.n // g, s.k, s.b, s.mn_b, s.neg_b, True)
                for c in self.ctas
            ]
        )
        columns = slice(self.column, self.column + self.columns)
        for c in self.ctas:
            memory = c.tmem.view(np.float32)
            for lanes, v in self.placed(self.a_of(c) @ b.T):
                memory[lanes, columns] = memory[lanes, columns] + v if self.accumulate else v
            c.tmem_busy[columns] -= 1
        for smem, access in self.reads:
            smem.end_access(access)


def check_tmem(cta, column, n):
    """Columns must lie in one allocation."""
    for start, columns in cta.tmem_alloc.items():
        if start <= column and column + n <= start + columns:
            return
    raise Fault(
        f"TMEM columns {column}..{column + n - 1} are not in an allocation {cta.tmem_alloc}"
    )
