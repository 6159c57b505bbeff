"""`cvt` of 16-bit and narrower floats and of tf32 (PTX ISA 9.7.9.21), as generated source.

Pairs keep their first element, converted from operand a or the source's upper half, in the upper
half of the result.
"""

import numpy as np

from .formats import FORMATS, TABLES, encode, encode_ue8m0
from .ptx import PtxError
from .values import KIND, bf16_bits, bf16_float, bf16_rz, hi16, lo16, pack2, relu32

# narrow pairs: the type of one element, and the numpy kind of a pair
PAIRS = {f"{name}x2": (name, "u1" if name == "e2m1" else "u2") for name in (*FORMATS, "ue8m0")}
WIDE = {"f16": "u2", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4", "tf32": "u4"}
LARGEST = {"f16": np.float32(65504), "bf16": np.float32(3.3895313892515355e38)}


def f16_bits(x):
    """float32 -> f16 bit patterns, nearest even, NaN -> 0x7FFF."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def f16_rz(x):
    """float32 -> f16 bit patterns, towards zero: an infinity only from an infinity."""
    h = x.astype(np.float16)
    over = (np.abs(h.astype(np.float32)) > np.abs(x)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), h.view(np.uint16) - over)


def tf32(x, rounding):
    """float32 -> tf32 in 32 bits: nearest even (rn), ties away (rna) or towards zero (rz)."""
    u = x.view(np.uint32)
    low = (u >> np.uint32(13)) & np.uint32(1)
    add = {"rn": np.uint32(0xFFF) + low, "rna": np.uint32(0x1000), "rz": np.uint32(0)}[rounding]
    out = np.where(np.isinf(x), u, (u + add) & np.uint32(0xFFFFE000))
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), out)


def limited(x, name):
    """`.satfinite` for f16, bf16 and tf32."""
    top = LARGEST.get(name, np.float32(3.4011621342146535e38))
    return np.clip(x, -top, top)


def halves(u, name):
    """(upper, lower) of a pair as float32."""
    if name == "bf16":
        return bf16_float(hi16(u)), bf16_float(lo16(u))
    if name == "f16":
        return (half.view(np.float16).astype(np.float32) for half in (hi16(u), lo16(u)))
    if name == "e2m1":
        return TABLES[name][u >> 4], TABLES[name][u & 15]
    return TABLES[name][u >> 8], TABLES[name][u & 255]


def bits_of(x, name, rounding):
    """float32 -> the bit patterns of one element."""
    if name in FORMATS:
        return encode(x, name)
    if name == "ue8m0":
        return encode_ue8m0(x, rounding == "rp")
    towards_zero = rounding == "rz"
    if name == "bf16":
        return bf16_rz(x) if towards_zero else bf16_bits(x)
    return f16_rz(x) if towards_zero else f16_bits(x)


def joined(upper, lower, name):
    """The bits of a pair."""
    if name in ("f16", "bf16"):
        return pack2(lower, upper)
    if name == "e2m1":
        return (upper << 4 | lower).astype(np.uint8)
    return upper.astype(np.uint16) << np.uint16(8) | lower


def convert_pair(upper, lower, name, rounding, relu, finite):
    """Two float32 -> a pair."""
    out = []
    for x in (upper, lower):
        x = relu32(x) if relu else x
        x = limited(x, name) if finite and name in LARGEST else x
        out.append(bits_of(x, name, rounding))
    return joined(*out, name)


def convert_one(x, name, rounding, relu, finite):
    """A float32 -> bf16, f16 or tf32."""
    x = relu32(x) if relu else x
    x = limited(x, name) if finite else x
    return tf32(x, rounding) if name == "tf32" else bits_of(x, name, rounding)


FUNCTIONS = (convert_pair, convert_one, halves)
ROUNDINGS = ("rn", "rz", "rp", "rna")
MODIFIERS = {"satfinite", "rp", "rna", "tf32", *PAIRS}
USUAL = {"bf16x2": "cvt_bf16x2", "f16x2": "cvt_f16x2", "bf16": "bf16_bits"}  # of rn from f32


def types_of(ins):
    """(destination, source) type modifiers."""
    types = [p for p in ins.parts[1:] if p in KIND or p in PAIRS or p == "tf32"]
    return types[0], types[-1]


def element(t):
    """The element type of a pair: `f16x2` -> `f16`."""
    return PAIRS[t][0] if t in PAIRS else t.removesuffix("x2")


def legal(to, frm, parts, rounding):
    """Whether 9.7.9.21 has the conversion (`.rs` and four-element forms aside)."""
    finite = "satfinite" in parts
    if to in PAIRS:
        if to == "ue8m0x2":
            return frm in ("f32", "bf16x2") and rounding in ("rz", "rp") and "relu" not in parts
        return frm in ("f32", "f16x2", "bf16x2") and rounding == "rn" and finite
    if frm in PAIRS:
        wide = to == ("bf16x2" if frm == "ue8m0x2" else "f16x2") or to == "bf16x2"
        return wide and rounding == "rn" and not finite
    if to == "tf32":
        return frm == "f32" and rounding in ("rn", "rz", "rna")
    return frm == "f32" and rounding in ("rn", "rz")


def handles(to, frm, parts):
    """Whether a conversion is one of this module's."""
    if to == "f16" and frm == "f32":
        return bool({"rz", "relu", "satfinite"} & set(parts))
    return to in PAIRS or frm in PAIRS or to in WIDE and (frm == "f32" or to.endswith("x2"))


def emit(codegen, ins):
    """Source lines of such a conversion."""
    to, frm = types_of(ins)
    d, *s = ins.operands
    rounding = next((p for p in ins.parts if p in ROUNDINGS), None)
    pair = to not in ("f16", "bf16", "tf32")
    sources = 2 if pair and frm == "f32" else 1
    if "sat" in ins.parts or not legal(to, frm, ins.parts, rounding) or len(s) != sources:
        raise PtxError(f"line {ins.line}: unsupported instruction {ins.text}")
    tail = f"'{element(to)}', '{rounding}', {'relu' in ins.parts}, {'satfinite' in ins.parts}"
    kind = PAIRS[to][1] if to in PAIRS else WIDE[to]
    if to in USUAL and rounding == "rn" and frm == "f32" and "satfinite" not in ins.parts:
        args = [codegen.src(x, "f4") for x in s]
        args = [f"relu32({x})" for x in args] if "relu" in ins.parts else args
        e = f"{USUAL[to]}({', '.join(args)})"
    elif not pair:
        e = f"convert_one({codegen.src(s[0], 'f4')}, {tail})"
    elif frm == "f32":
        e = f"convert_pair({codegen.src(s[0], 'f4')}, {codegen.src(s[1], 'f4')}, {tail})"
    else:
        source = PAIRS[frm][1] if frm in PAIRS else "u4"
        e = f"convert_pair(*halves({codegen.src(s[0], source)}, '{element(frm)}'), {tail})"
    return codegen.assign(d, e, kind, ins.guard)
