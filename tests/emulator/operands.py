"""Matrix operands in shared memory and in registers (PTX ISA 9.7.14-9.7.16)."""

import functools

import numpy as np

from .memory import SMEM_RESERVED, Fault
from .tensormap import swizzle
from .values import LANES, UINT, bf16_float

SM100_SWIZZLE = {0: 0, 2: 128, 4: 64, 6: 32}
SM90_SWIZZLE = {0: 0, 1: 128, 2: 64, 3: 32}
ELEM = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1}


@functools.lru_cache(8192)
def operand_offsets(desc, rows, k, elem, mn_major, sm100):
    """(element indices, 16-byte units) of the rows x k tile of a 64-bit matrix descriptor.

    9.7.15.5.1 (wgmma) and 9.7.16.4.1 (tcgen05): start address, leading and stride byte offsets in
    16-byte steps, swizzle mode; the swizzle XORs the absolute address, so steps along K are plain
    additions to the start.
    """
    start, lbo, sbo = ((desc >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if (desc >> 49) & 7:
        raise Fault(f"matrix descriptor {desc:#x}: base offset is not supported")
    if sm100 and (desc >> 46) & 7 != 1:
        raise Fault(f"matrix descriptor {desc:#x}: version bits are not 0b001")
    span = SM100_SWIZZLE.get(desc >> 61) if sm100 else SM90_SWIZZLE.get(desc >> 62)
    if span is None:
        raise Fault(f"matrix descriptor {desc:#x}: swizzle mode not supported")
    r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
    if not mn_major:
        kb = c * elem
        if span == 0:
            off = start + (r // 8) * sbo + (r % 8) * 16 + (kb // 16) * lbo + kb % 16
        else:
            off = start + (r // 8) * sbo + (r % 8) * span + kb
    else:
        chunk, within = r * elem // 16, r * elem % 16
        if span == 0:
            off = start + chunk * sbo + within + (c % 8) * 16 + (c // 8) * lbo
        else:
            w = span // 16
            off = (
                start
                + (chunk % w) * 16
                + (chunk // w) * lbo
                + within
                + (c % 8) * span
                + (c // 8) * sbo
            )
    off = swizzle(off, span)
    return off // elem, np.unique(off >> 4)


@functools.lru_cache(8192)
def quarter_offsets(desc, k, elem, mn_major, quarter):
    """The same for the 16 of 64 rows of A that one warp of a warpgroup multiplies."""
    index, _ = operand_offsets(desc, 64, k, elem, mn_major, False)
    rows = index[16 * quarter : 16 * quarter + 16]
    return rows, np.unique(rows * elem >> 4)


def check_extent(smem, units, what):
    """A descriptor that reaches outside the CTA's allocation is a fault."""
    start, end = int(units[0]) * 16, int(units[-1]) * 16 + 16
    if start < SMEM_RESERVED or end > smem.end:
        raise Fault(f"{what}: operand at {start:#x}..{end:#x} is outside the allocation")


def f8_table(exp_bits, man_bits, bias, finite):
    """The float32 value of every 8-bit code; `finite` types have no infinities and one NaN code."""
    out = np.zeros(256, np.float32)
    for code in range(256):
        s, e, m = (
            code >> 7,
            (code >> man_bits) & ((1 << exp_bits) - 1),
            code & ((1 << man_bits) - 1),
        )
        v = (
            m * 2.0 ** (1 - bias - man_bits)
            if e == 0
            else (1 + m / (1 << man_bits)) * 2.0 ** (e - bias)
        )
        if e == (1 << exp_bits) - 1:
            if finite and m == (1 << man_bits) - 1:
                v = np.nan
            elif not finite:
                v = np.inf if m == 0 else np.nan
        out[code] = -v if s else v
    return out


F8_TABLE = {"e4m3": f8_table(4, 3, 7, True), "e5m2": f8_table(5, 2, 15, False)}


def to_float(bits, dtype):
    """Raw element bits as float32."""
    if dtype == "bf16":
        return bf16_float(bits)
    if dtype == "f16":
        return bits.view(np.float16).astype(np.float32)
    if dtype == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    return F8_TABLE[dtype][bits]


def read_operand(smem, desc, rows, k, dtype, mn_major, negate, sm100):
    """The rows x k operand as the async proxy sees it now, float32."""
    index, _ = operand_offsets(desc, rows, k, ELEM[dtype], bool(mn_major), sm100)
    x = to_float(smem.asynchronous[ELEM[dtype]][index], dtype)
    return -x if negate else x


# In every fragment thread t of a warp holds, per 8x8 block of 16-bit (8x4 of 32-bit) elements, row
# t/4 and two adjacent columns 2*(t%4); D of mma and wgmma is made of such blocks with float32 pairs
# (figures in 9.7.14.5 and 9.7.15.5).
def gather_d(arrays, n):
    """The registers of a 16 x n float32 accumulator fragment -> the matrix."""
    x = (
        np.stack(arrays).view(np.float32).reshape(n // 8, 2, 2, 8, 4)
    )  # block, half, column, t/4, t%4
    return x.transpose(1, 3, 0, 4, 2).reshape(16, n)


def scatter_d(matrix, n):
    """A 16 x n float32 matrix -> the n/2 registers of its fragment."""
    x = (
        np.ascontiguousarray(matrix, np.float32)
        .reshape(2, 8, n // 8, 4, 2)
        .transpose(2, 0, 4, 1, 3)
    )
    return np.ascontiguousarray(x).reshape(n // 2, LANES).view(np.uint32)


def gather_ab(arrays, elem, rows):
    """Registers of a 16-row A (4) or 8-row B (2) fragment -> bits of the rows x 32/elem matrix."""
    per, halves = 4 // elem, rows // 8
    x = (
        np.stack(arrays).view(UINT[elem]).reshape(2, halves, 8, 4, per)
    )  # K half, row half, t/4, t%4, element
    return x.transpose(1, 2, 0, 3, 4).reshape(rows, 8 * per)
