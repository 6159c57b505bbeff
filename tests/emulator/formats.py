"""Narrow number formats (PTX ISA 5.2.3, 9.7.9.21): codes to float32, and float32 to codes.

e4m3, e5m2 (8 bits), e2m3, e3m2 (6 bits), e2m1 (4 bits), and the scales ue8m0 (a power of two) and
ue4m3 (e4m3 without its sign).
"""

from typing import NamedTuple

import numpy as np

from .values import bf16_float


class Format(NamedTuple):
    """`special`: "ieee" (infinities and NaNs), "nan" (one NaN code) or "none"."""

    exponent: int
    mantissa: int
    bias: int
    special: str

    @property
    def bits(self):
        return 1 + self.exponent + self.mantissa


FORMATS = {
    "e4m3": Format(4, 3, 7, "nan"),
    "e5m2": Format(5, 2, 15, "ieee"),
    "e2m3": Format(2, 3, 1, "none"),
    "e3m2": Format(3, 2, 3, "none"),
    "e2m1": Format(2, 1, 1, "none"),
}


def magnitudes(f):
    """The value of every code without its sign bit."""
    code = np.arange(1 << (f.bits - 1))
    e, m = code >> f.mantissa, code & ((1 << f.mantissa) - 1)
    fraction = m / (1 << f.mantissa)
    v = np.where(e == 0, fraction * 2.0 ** (1 - f.bias), (1 + fraction) * 2.0 ** (e - f.bias))
    if f.special == "nan":
        v[-1] = np.nan
    elif f.special == "ieee":
        top = e == (1 << f.exponent) - 1
        v = np.where(top, np.where(m == 0, np.inf, np.nan), v)
    return v


def decode_table(f):
    """float32 of every byte; bits above the format's are ignored."""
    v = magnitudes(f)
    code = np.arange(256)
    v = v[code & ((1 << (f.bits - 1)) - 1)]
    return np.where(code >> (f.bits - 1) & 1, -v, v).astype(np.float32)


TABLES = {name: decode_table(f) for name, f in FORMATS.items()}
with np.errstate(over="ignore"):
    TABLES["ue8m0"] = np.ldexp(1.0, np.arange(256) - 127).astype(np.float32)
TABLES["ue8m0"][255] = np.nan
TABLES["ue4m3"] = TABLES["e4m3"][np.arange(256) & 127]
FINITE = {name: v[np.isfinite(v)] for name, f in FORMATS.items() for v in [magnitudes(f)]}
MIDDLES = {name: (v[1:] + v[:-1]) / 2 for name, v in FINITE.items()}


def encode(x, name):
    """`cvt.rn.satfinite` of float32 to the format's codes, uint8.

    Nearest, ties to even; beyond the largest finite value, that; NaN: the NaN code 0x7F, or the
    largest value where there is none.
    """
    f, middles = FORMATS[name], MIDDLES[name]
    a = np.abs(x.astype(np.float64))
    code = np.searchsorted(middles, a, side="left")
    at = np.minimum(code, len(middles) - 1)
    code = code + ((code < len(middles)) & (middles[at] == a) & (code & 1 == 1))
    code = code | (np.signbit(x).astype(np.int64) << (f.bits - 1))
    nan = len(middles) if f.special == "none" else 0x7F
    return np.where(np.isnan(x), nan, code).astype(np.uint8)


def encode_ue8m0(x, up):
    """`cvt.rp` (`up`) or `cvt.rz` `.satfinite.ue8m0x2`: the exponent byte; NaN: 0xFF."""
    a = np.abs(x.astype(np.float64))
    m, e = np.frexp(a)  # a = m * 2**e, m in [0.5, 1)
    code = e - 1 + 127 + ((m > 0.5) if up else 0)
    code = np.where(a == 0, 0, np.where(np.isinf(a), 254, code))
    return np.where(np.isnan(x), 255, np.clip(code, 0, 254)).astype(np.uint8)


def unpack_nibbles(data, axis=-1):
    """Bytes with two 4-bit codes each, the low one first -> one code a byte."""
    return np.stack([data & 15, data >> 4], axis=axis).reshape(*data.shape[:-1], -1)


def unpack_padded(data, bits):
    """16-byte units that begin with 16 codes of 4 or 6 bits (b4x16_p64, b6x16_p32) -> codes."""
    units = data.reshape(*data.shape[:-1], -1, 16)
    if bits == 4:
        codes = unpack_nibbles(units[..., :8])
    else:
        three = units[..., :12].reshape(*units.shape[:-1], 4, 3).astype(np.uint32)
        word = three[..., 0] | three[..., 1] << 8 | three[..., 2] << 16
        codes = np.stack([(word >> (6 * i)) & 63 for i in range(4)], axis=-1)
        codes = codes.reshape(*units.shape[:-1], 16)
    return codes.reshape(data.shape).astype(np.uint8)


def to_float(bits, dtype):
    """Raw element bits as float32; 4- and 6-bit codes one a byte."""
    if dtype == "bf16":
        return bf16_float(bits)
    if dtype == "f16":
        return bits.view(np.float16).astype(np.float32)
    if dtype == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32)
    if dtype == "u8":
        return bits.astype(np.float32)
    if dtype == "s8":
        return bits.view(np.int8).astype(np.float32)
    return TABLES[dtype][bits]
