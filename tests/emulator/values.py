"""What registers hold and the arithmetic on it (PTX ISA 5.2 "Types", 9.7.1-9.7.9).

A register is a numpy array of 32 lanes that is never modified in place: bool for a predicate,
    otherwise the unsigned integer of the register's width. Kinds are numpy type codes: "?"
    predicate, "u4" uint32, "i8" int64, "f4" float32, ... bf16 has no numpy type and travels as
    "u2".
"""

import numpy as np

LANES = 32
POISON32 = 0x7FFF7FFF  # uninitialised memory and registers: a NaN as float32, bf16 pair, f16 pair
STORE = {1: "?", 8: "u1", 16: "u2", 32: "u4", 64: "u8"}
KIND = {
    "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "b32": "u4",
    "u32": "u4", "s32": "i4", "b64": "u8", "u64": "u8", "s64": "i8", "f32": "f4", "f64": "f8",
    "f16": "f2", "pred": "?", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4", "f32x2": "u8",
    "u16x2": "u4", "s16x2": "u4", "b128": "b128",
}  # fmt: skip
NP = {
    "?": np.bool_, "u1": np.uint8, "i1": np.int8, "u2": np.uint16, "i2": np.int16, "u4": np.uint32,
    "i4": np.int32, "u8": np.uint64, "i8": np.int64, "f2": np.float16, "f4": np.float32,
    "f8": np.float64,
}  # fmt: skip
UINT = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
LANE_IDS = np.arange(LANES, dtype=np.uint32)


def only(lane):
    """The mask of one lane."""
    return LANE_IDS == lane


def bf16_bits(x):
    """float32 -> bf16 bit patterns, round to nearest even, NaN -> 0x7FFF."""
    u = x.view(np.uint32)
    out = ((u + np.uint32(0x7FFF) + ((u >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(
        np.uint16
    )
    return np.where(np.isnan(x), np.uint16(0x7FFF), out)


def bf16_rz(x):
    """float32 -> bf16 bit patterns, round towards zero."""
    return (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def bf16_float(u):
    """bf16 bit patterns -> float32."""
    return (u.astype(np.uint32) << np.uint32(16)).view(np.float32)


def pack2(lo, hi):
    return lo.astype(np.uint32) | (hi.astype(np.uint32) << np.uint32(16))


def lo16(u):
    return (u & np.uint32(0xFFFF)).astype(np.uint16)


def hi16(u):
    return (u >> np.uint32(16)).astype(np.uint16)


def pack64(lo, hi):
    return lo.astype(np.uint64) | (hi.astype(np.uint64) << np.uint64(32))


def lo32(u):
    return (u & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def hi32(u):
    return (u >> np.uint64(32)).astype(np.uint32)


def pack_bytes(a, b, c, d):
    return pack2(
        a.astype(np.uint16) | (b.astype(np.uint16) << np.uint16(8)),
        c.astype(np.uint16) | (d.astype(np.uint16) << np.uint16(8)),
    )


def cvt_bf16x2(hi, lo):
    return pack2(bf16_bits(lo), bf16_bits(hi))


def cvt_f16x2(hi, lo):
    return pack2(lo.astype(np.float16).view(np.uint16), hi.astype(np.float16).view(np.uint16))


def relu32(x):
    """`.relu`: negative becomes +0, NaN stays."""
    return np.where((x > 0) | np.isnan(x), x, np.float32(0))


def saturate(x):
    """`.sat` of a floating-point operation: clamps to [0, 1], NaN becomes +0."""
    return np.clip(np.where(np.isnan(x), x.dtype.type(0), x), 0, 1).astype(x.dtype)


def shl(a, n):
    width = a.dtype.itemsize * 8
    n = np.minimum(n, np.uint32(width)).astype(a.dtype)
    return np.where(n < width, a << np.minimum(n, a.dtype.type(width - 1)), a.dtype.type(0))


def shr(a, n):
    width = a.dtype.itemsize * 8
    n = np.minimum(n, np.uint32(width)).astype(a.dtype)
    if a.dtype.kind == "i":
        return a >> np.minimum(n, a.dtype.type(width - 1))
    return np.where(n < width, a >> np.minimum(n, a.dtype.type(width - 1)), a.dtype.type(0))


def mulhi(a, b):
    if a.dtype.itemsize == 4:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)
    return np.array([(int(x) * int(y)) >> 64 for x, y in zip(a, b, strict=True)]).astype(a.dtype)


def mulwide(a, b):
    wide = {4: {"i": np.int64, "u": np.uint64}, 2: {"i": np.int32, "u": np.uint32}}[
        a.dtype.itemsize
    ][a.dtype.kind]
    return a.astype(wide) * b.astype(wide)


def divide(a, b):
    """Division; integers truncate, and what a zero divisor gives is a poison."""
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, b.dtype.type(1), b)
    if a.dtype.kind == "u":
        q = a // safe
    else:
        wide = np.abs(a.astype(np.int64)) // np.abs(safe.astype(np.int64))
        q = (np.sign(a).astype(np.int64) * np.sign(safe).astype(np.int64) * wide).astype(a.dtype)
    return np.where(b == 0, a.dtype.type(0x7FFF), q)


def remainder(a, b):
    return a - divide(a, b) * b


def prmt(a, b, sel):
    """`prmt.b32`: four bytes of {b, a} by nibbles of `sel`; bit 3 replicates the sign."""
    both = pack64(a, b)
    out = np.zeros(LANES, np.uint32)
    for i in range(4):
        s = (sel >> np.uint32(4 * i)) & np.uint32(15)
        byte = (
            (both >> ((s & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        ).astype(np.uint32)
        sign = np.where(byte & np.uint32(128), np.uint32(255), np.uint32(0))
        out |= np.where(s & np.uint32(8), sign, byte) << np.uint32(8 * i)
    return out


def lop3(a, b, c, table):
    out = np.zeros_like(a)
    for i in range(8):
        if (table >> i) & 1:
            out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return out


def funnel(left, clamp, lo, hi, n):
    """`shf.l/.r` with `.wrap` (amount modulo 32) or `.clamp` (at most 32)."""
    n = (np.minimum(n, np.uint32(32)) if clamp else n & np.uint32(31)).astype(np.uint64)
    both = pack64(lo, hi)
    return hi32(both << n) if left else lo32(both >> n)


def _field_mask(length):
    length = np.minimum(length, np.uint64(64))
    return np.where(
        length == 64,
        ~np.uint64(0),
        (np.uint64(1) << np.minimum(length, np.uint64(63))) - np.uint64(1),
    )


def bfe(a, pos, length):
    width = a.dtype.itemsize * 8
    pos, length = (
        (pos & np.uint32(255)).astype(np.uint64),
        (length & np.uint32(255)).astype(np.uint64),
    )
    signed = a.dtype.kind == "i"
    wide = a.astype(np.int64).view(np.uint64) if signed else a.astype(np.uint64)
    out = np.where(pos < 64, wide >> np.minimum(pos, np.uint64(63)), np.uint64(0)) & _field_mask(
        length
    )
    if signed:
        top = np.minimum(
            pos + np.maximum(length, np.uint64(1)) - np.uint64(1), np.uint64(width - 1)
        )
        sign = ((wide >> top) & np.uint64(1)).astype(bool) & (length > 0)
        out = np.where(
            sign,
            out
            | ~_field_mask(
                np.minimum(length, np.uint64(width) - np.minimum(pos, np.uint64(width)))
            ),
            out,
        )
    return out.astype(a.dtype) if not signed else out.astype(f"u{width // 8}").view(a.dtype)


def bfi(a, b, pos, length):
    pos, length = (
        (pos & np.uint32(255)).astype(np.uint64),
        (length & np.uint32(255)).astype(np.uint64),
    )
    pos = np.minimum(pos, np.uint64(63))
    mask = _field_mask(length) << pos
    return ((b.astype(np.uint64) & ~mask) | ((a.astype(np.uint64) << pos) & mask)).astype(b.dtype)


def bmsk(pos, length):
    """`bmsk.clamp.b32`."""
    pos = np.minimum(pos, np.uint32(32)).astype(np.uint64)
    return (_field_mask(np.minimum(length, np.uint32(32)).astype(np.uint64)) << pos).astype(
        np.uint32
    )


def popc(a):
    return np.bitwise_count(a).astype(np.uint32)


def clz(a):
    width = a.dtype.itemsize * 8
    return np.array([width - int(x).bit_length() for x in a], np.uint32)


def bfind(a, shift_amount):
    """Position of the highest bit that differs from the sign; 0xFFFFFFFF if there is none."""
    width = a.dtype.itemsize * 8
    out = np.array([(int(x) if int(x) >= 0 else ~int(x)).bit_length() - 1 for x in a])
    if shift_amount:
        out = np.where(out < 0, out, width - 1 - out)
    return out.astype(np.int32).view(np.uint32)


def brev(a):
    width = a.dtype.itemsize * 8
    return np.array([int(format(int(x), f"0{width}b")[::-1], 2) for x in a], a.dtype)


def f32x2(f, *args):
    lo = f(*(lo32(a).view(np.float32) for a in args)).view(np.uint32)
    hi = f(*(hi32(a).view(np.float32) for a in args)).view(np.uint32)
    return pack64(lo, hi)


def _half(f, args, take):
    return (
        f(*(take(a).view(np.float16).astype(np.float32) for a in args))
        .astype(np.float16)
        .view(np.uint16)
    )


def h2(f, *args):
    return pack2(_half(f, args, lo16), _half(f, args, hi16))


def bf2(f, *args):
    lo = bf16_bits(f(*(bf16_float(lo16(a)) for a in args)))
    return pack2(lo, bf16_bits(f(*(bf16_float(hi16(a)) for a in args))))


def bf1(f, *args):
    return bf16_bits(f(*(bf16_float(a) for a in args)))


def fma(a, b, c):
    """One rounding, but that of float64 on the way (it matters once in about 2**29 results)."""
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b + c).astype(np.float32)
    return a * b + c


def clamp_to(a, dtype):
    """`.sat` of an integer conversion."""
    to, frm = np.iinfo(dtype), np.iinfo(a.dtype)
    low, high = max(to.min, frm.min), min(to.max, frm.max)
    return np.clip(a, a.dtype.type(low), a.dtype.type(high)).astype(dtype)


def to_int(x, rounding, dtype):
    """Float to integer: saturates, NaN becomes 0."""
    info = np.iinfo(dtype)
    x = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[rounding](
        x.astype(np.float64)
    )
    top = float(info.max) if info.bits < 64 else np.nextafter(float(info.max), 0)
    out = np.clip(
        np.nan_to_num(x, nan=0.0, posinf=top, neginf=float(info.min)), float(info.min), top
    ).astype(dtype)
    return np.where(x >= float(info.max), dtype(info.max), out)


HELPERS = (
    bf16_bits, bf16_rz, bf16_float, pack2, lo16, hi16, pack64, lo32, hi32, pack_bytes, cvt_bf16x2,
    cvt_f16x2, relu32, saturate, shl, shr, mulhi, mulwide, divide, remainder, prmt, lop3, funnel,
    bfe, bfi, bmsk, popc, clz, bfind, brev, f32x2, h2, bf2, bf1, fma, clamp_to, to_int,
)  # fmt: skip
