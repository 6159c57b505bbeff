"""Decoder of the 128-byte TMA tensor map (CUtensorMap), tiled mode.

The format is not documented; the fields here were found by varying the arguments of the documented
driver call `cuTensorMapEncodeTiled` (CUDA driver API, "Tensor Map Object Management") and are
tested against its encodings.
"""

import functools
from dataclasses import dataclass

import numpy as np

# the 4-bit type code found in the descriptor -> (name, bytes); tf32 is f32 with a flag
ELEMENT = {
    0: ("u8", 1), 1: ("u16", 2), 2: ("u32", 4), 3: ("s32", 4), 4: ("u64", 8), 5: ("s64", 8),
    6: ("f16", 2), 7: ("f32", 4), 8: ("f32_ftz", 4), 9: ("f64", 8), 10: ("bf16", 2),
}  # fmt: skip
SWIZZLE = (0, 32, 64, 128)


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor map: sizes in elements, innermost first; `strides` in bytes."""

    base: int
    rank: int
    dtype: str
    elem: int
    dims: tuple
    strides: tuple
    box: tuple
    elem_strides: tuple
    swizzle: int
    interleave: int
    oob_nan: bool

    @property
    def box_bytes(self):
        return int(np.prod(self.box)) * self.elem


@functools.lru_cache(1024)
def decode(raw):
    """The fields of the 128 bytes `raw`; ValueError for an unknown type code."""
    q = [int(x) for x in np.frombuffer(raw[:64], np.uint64)]
    flags = q[1] & 0xFFFFFFFF
    rank, code = ((flags >> 4) & 7) + 1, (flags >> 7) & 15
    if code not in ELEMENT:
        raise ValueError(f"tensor map: unknown element code {code}, flags {flags:#x}")
    name, elem = ELEMENT[code]

    def low(v):
        return v & 0xFFFFFFFF

    dims = [low(q[4]), q[4] >> 32, low(q[5]), q[5] >> 32, low(q[6])]
    # strides: 36 bits of (bytes >> 4); the low 32 in a word each, the top 4 packed in q[3]
    words = [q[1] >> 32, low(q[2]), q[2] >> 32, low(q[3])]
    top = [(q[3] >> (32 + 4 * i)) & 15 for i in range(4)]
    strides = [elem] + [((t << 32) | s) << 4 for s, t in zip(words, top, strict=True)]
    box = [(q[6] >> 56) & 255] + [(q[7] >> (8 * i)) & 255 for i in range(4)]
    steps = [((q[6] >> (32 + 3 * i)) & 7) + 1 for i in range(5)]
    return TensorMap(
        base=q[0],
        rank=rank,
        dtype=name,
        elem=elem,
        dims=tuple(d + 1 for d in dims[:rank]),
        strides=tuple(strides[:rank]),
        box=tuple(b + 1 for b in box[:rank]),
        elem_strides=tuple(steps[:rank]),
        swizzle=SWIZZLE[(flags >> 13) & 3],
        interleave=(flags >> 11) & 3,
        oob_nan=bool((flags >> 15) & 1),
    )


def swizzle(offset, span):
    """XORs 16-byte chunks of a span with bits 7.. of the absolute address."""
    if span == 0:
        return offset
    bits = {32: 1, 64: 3, 128: 7}[span]
    return offset ^ (((offset >> 7) & bits) << 4)


@functools.lru_cache(512)
def box_units(offset, nbytes, span):
    """The 16-byte units of shared memory that a box at `offset` fills, in byte order."""
    return swizzle(offset + 16 * np.arange(nbytes // 16), span) >> 4
