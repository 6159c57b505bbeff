"""Matrix operands in shared memory and in registers (PTX ISA 9.7.14-9.7.16)."""

import functools

import numpy as np

from .formats import FORMATS, to_float, unpack_nibbles, unpack_padded
from .memory import SMEM_RESERVED, Fault
from .tensormap import swizzle
from .values import LANES, UINT

SM100_SWIZZLE = {0: 0, 2: 128, 4: 64, 6: 32}
SM90_SWIZZLE = {0: 0, 1: 128, 2: 64, 3: 32}
# bits of a descriptor that are zero: between its fields, and above the offset of the base
SM90_ZERO = 0x3FF1_C000_C000_C000
SM100_ZERO = 0x1FF0_0000_C000_C000
ELEM = {
    "f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1, "e2m3": 1, "e3m2": 1, "e2m1": 1,
    "s8": 1, "u8": 1,
}  # fmt: skip


@functools.lru_cache(8192)
def operand_offsets(desc, rows, k, elem, mn_major, sm100):
    """(element indices, 16-byte units) of the rows x k tile of a 64-bit matrix descriptor.

    9.7.15.5.1 (wgmma) and 9.7.16.4.1 (tcgen05): start address, leading and stride byte offsets in
    16-byte steps, swizzle mode; the swizzle XORs the absolute address, so steps along K are plain
    additions to the start.
    """
    start, lbo, sbo = ((desc >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
    if desc & (SM100_ZERO if sm100 else SM90_ZERO):
        raise Fault(f"matrix descriptor {desc:#x}: bits outside its fields are set")
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


def read_operand(smem, desc, rows, k, dtype, mn_major, negate, sm100, packed=False):
    """The rows x k operand as the async proxy sees it now, float32.

    Codes of 4 and 6 bits are padded to 16 bytes for 16 of them along the contiguous dimension;
    `packed`: two 4-bit codes a byte, K-major.
    """
    bytes_k = k // 2 if packed else k
    index, _ = operand_offsets(desc, rows, bytes_k, ELEM[dtype], bool(mn_major), sm100)
    bits = smem.asynchronous[ELEM[dtype]][index]
    if packed:
        bits = unpack_nibbles(bits)
    elif dtype in FORMATS and FORMATS[dtype].bits < 8:
        width = FORMATS[dtype].bits
        bits = unpack_padded(bits.T, width).T if mn_major else unpack_padded(bits, width)
    x = to_float(bits, dtype)
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
    """A 16 x n matrix of 32-bit elements -> the n/2 registers of its fragment."""
    x = np.ascontiguousarray(matrix).reshape(2, 8, n // 8, 4, 2).transpose(2, 0, 4, 1, 3)
    return np.ascontiguousarray(x).reshape(n // 2, LANES).view(np.uint32)


def gather_ab(arrays, elem, rows):
    """Registers of a 16-row A or 8-row B fragment -> bits of the matrix; 16 bytes of K a half."""
    per, halves = 4 // elem, rows // 8
    depth = len(arrays) // halves
    x = (
        np.stack(arrays).view(UINT[elem]).reshape(depth, halves, 8, 4, per)
    )  # K half, row half, t/4, t%4, element
    return x.transpose(1, 2, 0, 3, 4).reshape(rows, 4 * depth * per)
