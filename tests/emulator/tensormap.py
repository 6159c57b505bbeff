"""The 128-byte TMA tensor map (CUtensorMap), tiled mode: decoding, legality, shared-memory layout.

The format is not documented; the fields here were found by varying the arguments of the documented
driver call `cuTensorMapEncodeTiled` (CUDA driver API, "Tensor Map Object Management") and are
tested against its encodings. Packed types and swizzle atoms are as CuTeDSL encodes them itself.
"""

import functools
from dataclasses import dataclass

import numpy as np

# the 4-bit type code found in the descriptor -> (name, bits of an element in global memory); tf32
# is f32 with a flag
ELEMENT = {
    0: ("u8", 8), 1: ("u16", 16), 2: ("u32", 32), 3: ("s32", 32), 4: ("u64", 64), 5: ("s64", 64),
    6: ("f16", 16), 7: ("f32", 32), 8: ("f32_ftz", 32), 9: ("f64", 64), 10: ("bf16", 16),
    11: ("b4x16", 4), 12: ("b4x16_p64", 4), 13: ("b6x16_p32", 6),
}  # fmt: skip
PADDED = ("b4x16_p64", "b6x16_p32")  # 16 elements take 16 bytes of shared memory
SWIZZLE = (0, 32, 64, 128)
ATOMS = ("16B", "32B", "32B_flip_8B", "64B")
FLOATS = ("f16", "f32", "f32_ftz", "f64", "bf16")


@dataclass(frozen=True)
class TensorMap:
    """A tiled tensor map: sizes in elements, innermost first; `strides` in bytes.

    bits: of an element in global memory. swizzle: bytes of its span; atom: what it permutes.
    """

    base: int
    rank: int
    dtype: str
    bits: int
    dims: tuple
    strides: tuple
    box: tuple
    elem_strides: tuple
    swizzle: int
    atom: str
    interleave: int
    oob_nan: bool

    @property
    def elem(self):
        """Bytes of an element, of those types that have whole bytes."""
        return self.bits // 8

    @functools.cached_property
    def shape(self):
        """The box as it lies in shared memory: traversal strides skip elements of dimensions 1.."""
        steps = (1, *self.elem_strides[1:])
        return tuple(-(-b // s) for b, s in zip(self.box, steps, strict=True))

    @property
    def row_bytes(self):
        """Bytes of a row of the box in shared memory."""
        return self.shape[0] if self.dtype in PADDED else self.shape[0] * self.bits // 8

    @property
    def box_bytes(self):
        return int(np.prod(self.shape[1:], dtype=np.int64)) * self.row_bytes

    def problem(self):
        """Why the driver would refuse it, or None."""
        wide = 32 if self.interleave == 2 or self.dtype in PADDED else 16
        row = self.shape[0] * self.bits // 8 if self.dtype not in PADDED else self.shape[0]
        rules = [
            (self.base % wide, f"its address is not {wide}-byte aligned"),
            (any(s % wide for s in self.strides[1:]), f"a stride is no multiple of {wide} bytes"),
            (any(s >= 1 << 40 for s in self.strides[1:]), "a stride is 2**40 bytes or more"),
            (any(b > 256 for b in self.box), "a side of the box is longer than 256"),
            (not self.interleave and row % 16, f"a box row of {row} bytes is no multiple of 16"),
            (
                not self.interleave and self.swizzle and row > self.swizzle,
                f"a box row of {row} bytes is longer than the swizzle's {self.swizzle}",
            ),
            (self.atom != "16B" and self.swizzle != 128, f"atom {self.atom} needs a 128B swizzle"),
            (self.oob_nan and self.dtype not in FLOATS, f"NaN fill of type {self.dtype}"),
        ]
        if self.dtype in PADDED:
            rules += [
                (self.dims[0] % 128, f"dimension 0 of {self.dtype} is no multiple of 128"),
                (self.box[0] != 128, f"box side 0 of {self.dtype} is not 128"),
                (self.swizzle in (32, 64), f"{self.dtype} with a {self.swizzle}B swizzle"),
                (self.atom == "32B_flip_8B", f"{self.dtype} with atom {self.atom}"),
            ]
        if self.dtype == "b4x16":
            rules.append((self.dims[0] % 2, "dimension 0 of b4x16 is odd"))
        return next((why for wrong, why in rules if wrong), None)


@functools.lru_cache(1024)
def decode(raw):
    """The fields of the 128 bytes `raw`; ValueError for an unknown type code."""
    q = [int(x) for x in np.frombuffer(raw[:64], np.uint64)]
    flags = q[1] & 0xFFFFFFFF
    rank, code = ((flags >> 4) & 7) + 1, (flags >> 7) & 15
    if code not in ELEMENT:
        raise ValueError(f"tensor map: unknown element code {code}, flags {flags:#x}")
    name, bits = ELEMENT[code]

    def low(v):
        return v & 0xFFFFFFFF

    dims = [low(q[4]), q[4] >> 32, low(q[5]), q[5] >> 32, low(q[6])]
    # strides: 36 bits of (bytes >> 4); the low 32 in a word each, the top 4 packed in q[3]
    words = [q[1] >> 32, low(q[2]), q[2] >> 32, low(q[3])]
    top = [(q[3] >> (32 + 4 * i)) & 15 for i in range(4)]
    strides = [bits // 8] + [((t << 32) | s) << 4 for s, t in zip(words, top, strict=True)]
    box = [(q[6] >> 56) & 255] + [(q[7] >> (8 * i)) & 255 for i in range(4)]
    steps = [((q[6] >> (32 + 3 * i)) & 7) + 1 for i in range(5)]
    return TensorMap(
        base=q[0],
        rank=rank,
        dtype=name,
        bits=bits,
        dims=tuple(d + 1 for d in dims[:rank]),
        strides=tuple(strides[:rank]),
        box=tuple(b + 1 for b in box[:rank]),
        elem_strides=tuple(steps[:rank]),
        swizzle=SWIZZLE[(flags >> 13) & 3],
        atom=ATOMS[(flags >> 19) & 3],
        interleave=(flags >> 11) & 3,
        oob_nan=bool((flags >> 15) & 1),
    )


def put(raw, bit, width, value):
    """Sets `width` bits from `bit` on in the 128 bytes `raw` (a uint8 array, changed in place)."""
    number = int.from_bytes(raw.tobytes(), "little")
    mask = (1 << width) - 1 << bit
    number = number & ~mask | (value << bit) & mask
    raw[:] = np.frombuffer(number.to_bytes(128, "little"), np.uint8)


def replace(raw, field, ordinal, value):
    """`tensormap.replace` (PTX ISA 9.7.9.28): a field of the 128 bytes `raw`, in place."""
    flags = 64
    if field == "global_address":
        put(raw, 0, 64, value)
    elif field == "rank":  # zero-based
        put(raw, flags + 4, 3, value)
    elif field == "box_dim":
        put(raw, 6 * 64 + 56 + 8 * ordinal, 8, value - 1)
    elif field == "global_dim":
        put(raw, 4 * 64 + 32 * ordinal, 32, value - 1)
    elif field == "global_stride":
        put(raw, 64 + 32 * (ordinal + 1), 32, value >> 4)
        put(raw, 3 * 64 + 32 + 4 * ordinal, 4, value >> 36)
    elif field == "element_stride":
        put(raw, 6 * 64 + 32 + 3 * ordinal, 3, value - 1)
    elif field == "elemtype":  # 11 and 12 are tf32, a flag here
        put(raw, flags + 7, 4, {11: 7, 12: 8}.get(value, value - 2 if value > 12 else value))
        put(raw, flags + 16, 1, int(value in (11, 12)))
    elif field == "interleave_layout":
        put(raw, flags + 11, 2, value)
    elif field == "swizzle_mode":
        put(raw, flags + 13, 2, value)
    elif field == "swizzle_atomicity":
        put(raw, flags + 19, 2, value)
    elif field == "fill_mode":
        put(raw, flags + 15, 1, value)
    else:
        raise ValueError(f"unknown field {field} of a tensor map")


def swizzle(offset, span, atom="16B"):
    """Where a byte goes: XORs the chunks of a span with bits 7.. of the absolute address."""
    if span == 0:
        return offset
    if atom in ("32B", "32B_flip_8B"):
        return offset ^ (((offset >> 7) & 3) << 5)
    if atom == "64B":
        return offset ^ (((offset >> 7) & 1) << 6)
    bits = {32: 1, 64: 3, 128: 7}[span]
    return offset ^ (((offset >> 7) & bits) << 4)


@functools.lru_cache(512)
def box_units(offset, nbytes, span, atom="16B"):
    """The 16-byte units of shared memory that a box at `offset` fills, in byte order."""
    return swizzle(offset + 16 * np.arange(nbytes // 16), span, atom) >> 4


def flipped(units, data, atom):
    """Data of 16-byte units with the halves exchanged where that atom does so: in every other
    128-byte row.
    """
    if atom != "32B_flip_8B":
        return data
    halves = data.reshape(-1, 2, 8)
    return np.where((units >> 3 & 1)[:, None, None] == 1, halves[:, ::-1], halves).reshape(-1, 16)
