"""mma.sync: a warp's product of fragments in registers (PTX ISA 9.7.14.5), dense.

Without block scaling: f16, bf16, tf32, fp8, 8-bit integers, and `kind::f8f6f4`, whose codes of 6
and 4 bits take bits 0..5 and 2..5 of a byte. With it: `kind::mxf8f6f4`, `mxf4` and `mxf4nvf4`; row
r of A takes its scale factors from lane 4 (r % 8) + 2 thread-id-a + r / 8, column n of B from lane
4 n + thread-id-b.
"""

import numpy as np

from .builder import BLOCK, converged, instruction, set_reg
from .formats import FORMATS, TABLES, to_float, unpack_nibbles
from .memory import Fault
from .operands import ELEM, gather_ab, gather_d, scatter_d
from .values import LANES

SHAPES = "m16n8k4 m16n8k8 m16n8k16 m16n8k32 m16n8k64"
NARROW = tuple(FORMATS)
KINDS = "kind::f8f6f4 kind::mxf8f6f4 kind::mxf4 kind::mxf4nvf4"
SCALES = "block_scale scale_vec::1X scale_vec::2X scale_vec::4X ue8m0 ue4m3"
# By type of A and B: K of an instruction, of 16 and 32 bytes a row (tf32: the first).
DEPTHS = {
    "f16": (8, 16), "bf16": (8, 16), "tf32": (4, 8), "e4m3": (16, 32), "e5m2": (16, 32),
    "s8": (16, 32), "u8": (16, 32),
}  # fmt: skip
BLOCKS = {"mxf8f6f4": ("1X",), "mxf4": ("2X",), "mxf4nvf4": ("2X", "4X")}


class Form:
    """What an mma.sync multiplies: its types, depth and, if block-scaled, its scale factors."""

    def __init__(self, b, ins):
        p = ins.parts
        shape = next(x for x in p if x.startswith("m16n8k"))
        self.k = int(shape[6:])
        self.kind = next((x[6:] for x in p if x.startswith("kind::")), None)
        known = {*ELEM, "f32", "s32"}
        types = [x for x in p[p.index(shape) + 1 :] if x in known]
        if len(types) != 4 or not {"row", "col"} <= set(p):
            raise b.unsupported(ins)
        self.d, self.a, self.b, self.c = types
        self.saturate = "satfinite" in p
        self.packed = self.kind in ("mxf4", "mxf4nvf4")
        self.scales, self.scale_type = 0, None
        if self.kind in BLOCKS:
            self.read_scales(b, ins)
        elif "block_scale" in p:
            raise b.unsupported(ins)
        if not self.legal():
            raise b.unsupported(ins)

    def read_scales(self, b, ins):
        p = ins.parts
        given = [x[11:] for x in p if x.startswith("scale_vec::")]
        default = BLOCKS[self.kind][0] if self.kind != "mxf4nvf4" else None
        size = given[0] if given else default
        self.scale_type = p[-1]
        if "block_scale" not in p or size not in BLOCKS[self.kind] or self.scale_type not in TABLES:
            raise b.unsupported(ins)
        self.scales = int(size[0])
        if self.scale_type == "ue4m3" and self.scales != 4:
            raise b.unsupported(ins)

    def legal(self):
        """Table 34 and 9.7.14.5.14: the combinations of types and depths that exist."""
        a, b, d = self.a, self.b, self.d
        if d != self.c or self.saturate and d != "s32":
            return False
        if self.packed:
            return (a, b, d, self.k) == ("e2m1", "e2m1", "f32", 64)
        if self.kind:
            floats = ("f32",) if self.scales else ("f32", "f16")
            return a in NARROW and b in NARROW and d in floats and self.k == 32
        if a not in DEPTHS or self.k not in DEPTHS[a]:
            return False
        if a in ("s8", "u8"):
            return b in ("s8", "u8") and d == "s32"
        same = b == a or {a, b} <= {"e4m3", "e5m2"}
        return same and (d == "f32" or d == "f16" and a not in ("bf16", "tf32"))

    def matrix(self, words, dtype, rows):
        """The rows x K matrix of an A (16 rows) or B (8) fragment, float32."""
        bits = gather_ab(words, ELEM[dtype], rows)
        if self.packed:
            bits = unpack_nibbles(bits)
        elif self.kind and dtype == "e2m1":
            bits = bits >> 2
        return to_float(bits, dtype)

    def product(self, a, b, c):
        """A B + C in the accumulators' type."""
        if self.d == "s32":
            total = (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.int64) + c
            if self.saturate:
                total = np.clip(total, -(2**31), 2**31 - 1)
            return total.astype(np.int32)
        return c + a @ b.T


class Scales:
    """A scale operand: a register, and the byte-id and thread-id that select from it."""

    def __init__(self, b, data, selector, form, rows):
        self.data, self.form, self.rows = b.get(b.vector(data)[0], "u4"), form, rows
        self.byte, self.thread = (b.get(x, "u2") for x in selector.items)

    def factors(self, r):
        """The (rows, K) multipliers from the registers of a warp's lanes; see the module."""
        form, rows = self.form, self.rows
        byte, thread = int(self.byte(r)[0]), int(self.thread(r)[0])
        threads = 2 if rows == 16 else 4
        if byte % form.scales or byte > 3 or thread >= threads:
            raise Fault(
                f"mma.sync: byte-id {byte} and thread-id {thread} of scale "
                f"{'A' if rows == 16 else 'B'}; allowed are multiples of {form.scales} below 4 and "
                f"numbers below {threads}"
            )
        i = np.arange(rows)
        lanes = 4 * (i % 8) + (2 * thread + i // 8 if rows == 16 else thread)
        data = np.ascontiguousarray(self.data(r)[lanes]).view(np.uint8).reshape(rows, 4)
        factors = TABLES[form.scale_type][data[:, byte : byte + form.scales]]
        return np.repeat(factors, form.k // form.scales, axis=1)


def gather_half(arrays):
    """The two f16x2 registers of a 16 x 8 accumulator fragment -> float32 matrix."""
    x = np.stack(arrays).view(np.float16).reshape(2, 8, 4, 2)
    return x.reshape(16, 8).astype(np.float32)


def scatter_half(matrix):
    return matrix.astype(np.float16).view(np.uint32).reshape(2, LANES)


@instruction(
    "mma.sync.aligned", f"{SHAPES} row col tf32 satfinite {' '.join(NARROW)} {KINDS} {SCALES}"
)
def mma_sync(b, ins):
    """D = A B + C of one warp, 16 x 8."""
    form = Form(b, ins)
    d, a, bb, c = (b.vector(x) for x in ins.operands[:4])
    depth = form.k // 2 if form.packed else form.k * ELEM[form.a]
    halves, accumulators = depth // 16, 2 if form.d == "f16" else 4
    if (len(d), len(a), len(bb), len(c)) != (accumulators, 2 * halves, halves, accumulators):
        raise b.unsupported(ins)
    ga, gb, gc = ([b.get(x, "u4") for x in v] for v in (a, bb, c))
    scales = []
    if form.scales:
        data_a, ids_a, data_b, ids_b = ins.operands[4:]
        scales = [Scales(b, data_a, ids_a, form, 16), Scales(b, data_b, ids_b, form, 8)]
    half, integer = form.d == "f16", form.d == "s32"

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        av = form.matrix([g(w.r) for g in ga], form.a, 16)
        bv = form.matrix([g(w.r) for g in gb], form.b, 8)
        if scales:
            av, bv = av * scales[0].factors(w.r), bv * scales[1].factors(w.r)
        words = [g(w.r) for g in gc]
        if half:
            out = scatter_half(form.product(av, bv, gather_half(words)))
        else:
            cv = gather_d(words, 8)
            out = scatter_d(form.product(av, bv, cv.view(np.int32) if integer else cv), 8)
        for reg, v in zip(d, out, strict=True):
            set_reg(w, reg, v, None)

    return run
