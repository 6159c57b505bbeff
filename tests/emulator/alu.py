"""Register-only instructions as generated source over 32-lane arrays (PTX ISA 9.7.1-9.7.9).

A run of such instructions becomes one function f(r, m): r is the warp's register list, m the mask
of active lanes. A second version without the masking serves the common case that all 32 lanes are
active.
"""

import numpy as np

from . import conversions
from .ptx import Imm, Not, Pair, PtxError, Reg, Sink, Special, Sym, Vec
from .values import HELPERS, KIND, LANES, NP, STORE

COMPARE = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=",
    "hi": ">", "hs": ">=",
}  # fmt: skip
UNORDERED = ("ltu", "leu", "gtu", "geu", "equ", "neu")
BINARY = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "and": "{0} & {1}", "or": "{0} | {1}",
    "xor": "{0} ^ {1}", "min": "np.minimum({0}, {1})", "max": "np.maximum({0}, {1})",
    "div": "divide({0}, {1})", "rem": "remainder({0}, {1})",
}  # fmt: skip
FLOAT_MINMAX = {"min": "np.fmin({0}, {1})", "max": "np.fmax({0}, {1})"}
UNARY = {
    "not": "~{0}", "neg": "-{0}", "abs": "np.abs({0})", "sqrt": "np.sqrt({0})",
    "rcp": "(np.float32(1) / {0})", "rsqrt": "(np.float32(1) / np.sqrt({0}))",
    "ex2": "np.exp2({0})", "lg2": "np.log2({0})", "sin": "np.sin({0})", "cos": "np.cos({0})",
    "tanh": "np.tanh({0})",
}  # fmt: skip
PACKED = {
    "add": "np.add", "sub": "np.subtract", "mul": "np.multiply", "min": "np.fmin", "max": "np.fmax",
    "neg": "np.negative", "abs": "np.abs", "fma": "fma", "tanh": "np.tanh", "ex2": "np.exp2",
}  # fmt: skip
NAN_MINMAX = {"min": "np.minimum", "max": "np.maximum"}
PACKER = {
    "f32x2": ("f32x2", "u8"),
    "f16x2": ("h2", "u4"),
    "bf16x2": ("bf2", "u4"),
    "bf16": ("bf1", "u2"),
}
# Modifiers that change nothing here (float32 arithmetic is IEEE, round to nearest, subnormals kept)
# or that the handler looks at; an instruction with any other is refused rather than run without it.
KNOWN = {
    "rn", "rz", "ftz", "approx", "full", "lo", "hi", "wide", "relu", "sat", "rzi", "rni", "rmi",
    "rpi", "l", "r", "clamp", "wrap", "to", "shared", "global", "param", "local", "const",
    "shared::cluster", "shared::cta", "xor", "and", "or", "num", "nan", "NaN", "shiftamt", *KIND,
    *COMPARE, *UNORDERED,
}  # fmt: skip
BITS = {"?": 1, "u1": 8, "i1": 8, "u2": 16, "i2": 16, "f2": 16, "u4": 32, "i4": 32, "f4": 32}


class Codegen:
    """Emits source for the register-only instructions of a kernel; `names` has the constants."""

    def __init__(self, symbol_value):
        self.symbol_value = symbol_value
        self.names = {
            "np": np,
            "where": np.where,
            **{f.__name__: f for f in (*HELPERS, *conversions.FUNCTIONS)},
            **{t: d for t, d in NP.items() if t != "?"},
        }
        self.constants = {}
        self.masked = True

    # ---- operands ----
    def const(self, value, kind):
        """The name of a 32-lane constant."""
        key = (value, kind)
        if key not in self.constants:
            bits = BITS.get(kind, 64)
            if kind == "?":
                arr = np.full(LANES, bool(value))
            else:
                arr = np.full(LANES, value & ((1 << bits) - 1), NP["u" + str(bits // 8)]).view(
                    NP[kind]
                )
            arr.flags.writeable = False
            name = self.constants[key] = f"K{len(self.constants)}"
            self.names[name] = arr
        return self.constants[key]

    def register(self, op, kind):
        have, e = STORE[op.width], f"r[{op.index}]"
        if have == kind:
            return e
        if kind == "?" or have == "?":
            raise PtxError(f"predicate used as {kind}")
        hw, kw = int(have[1]), int(kind[1])
        if hw == kw:
            return f"{e}.view({kind})"
        if hw > kw:
            return f"{e}.astype(u{kw}).view({kind})" if kind[0] != "u" else f"{e}.astype({kind})"
        return f"{e}.astype({kind})"

    def src(self, op, kind):
        """An expression of numpy kind `kind` for a source operand."""
        if isinstance(op, Reg):
            return self.register(op, kind)
        if isinstance(op, Not):
            return f"(~r[{op.reg.index}])"
        if isinstance(op, Imm):
            if kind == "f4" and not op.is_float:
                return self.const(int(np.float32(op.bits).view(np.uint32)), "f4")
            return self.const(op.bits, kind)
        if isinstance(op, Special):
            e = f"r[{self.symbol_value(op.name)}]"
            return e if kind in ("u4", "?") else f"{e}.astype({kind})"
        if isinstance(op, Sym):
            return f"r[{self.symbol_value(op.name)}]" + ("" if kind == "u8" else f".astype({kind})")
        if isinstance(op, Vec):
            return self.packed_source(op, kind)
        raise PtxError(f"operand {op} as {kind}")

    def packed_source(self, op, kind):
        n = len(op.items)
        if kind == "u8" and n == 2:
            return f"pack64({self.src(op.items[0], 'u4')}, {self.src(op.items[1], 'u4')})"
        if kind == "u4" and n == 2:
            return f"pack2({self.src(op.items[0], 'u2')}, {self.src(op.items[1], 'u2')})"
        if kind == "u2" and n == 2:
            low, high = (self.src(x, "u1") for x in op.items)
            return f"({low} | {high}.astype(u2) << u2(8))"
        if kind == "u4" and n == 4:
            return f"pack_bytes({', '.join(self.src(x, 'u2') for x in op.items)})"
        if kind == "u8" and n == 4:
            a, b, c, d = (self.src(x, "u2") for x in op.items)
            return f"pack64(pack2({a}, {b}), pack2({c}, {d}))"
        raise PtxError(f"vector of {n} as {kind}")

    def assign(self, op, expr, kind, guard):
        """Source storing `expr`, of numpy kind `kind`, into a register."""
        if isinstance(op, Sink):
            return []
        want = STORE[op.width]
        if want != kind:
            if "?" in (want, kind):
                raise PtxError(f"a {kind} value for a {want} register")
            ww, kw = int(want[1]), int(kind[1])
            if ww == kw:
                expr = f"({expr}).view({want})"
            elif kind[0] == "i":
                expr = f"({expr}).astype(i{ww}).view({want})"
            elif kind[0] == "f":
                expr = f"({expr}).view(u{kw}).astype({want})"
            else:
                expr = f"({expr}).astype({want})"
        i = op.index
        if guard is None:
            return [f"r[{i}] = where(m, {expr}, r[{i}])" if self.masked else f"r[{i}] = {expr}"]
        g = f"~r[{guard.reg.index}]" if isinstance(guard, Not) else f"r[{guard.index}]"
        return [f"r[{i}] = where({f'({g}) & m' if self.masked else g}, {expr}, r[{i}])"]

    # ---- instructions ----
    def handles(self, ins):
        """Whether the instruction is a register-only one."""
        name = ins.parts[0]
        if "b128" in ins.parts:
            return False
        return hasattr(self, "op_" + name) or name in BINARY or name in UNARY

    def emit(self, ins):
        """Source lines of a register-only instruction."""
        handler = getattr(self, "op_" + ins.parts[0], None) or self.simple
        known = KNOWN | conversions.MODIFIERS if ins.parts[0] == "cvt" else KNOWN
        unknown = [p for p in ins.parts[1:] if p not in known]
        if unknown:
            raise PtxError(f"line {ins.line}: modifier {unknown[0]} of {ins.text} is not supported")
        types = [p for p in ins.parts[1:] if p in KIND]
        if ins.parts[0] in ("add", "sub", "fma") and len(types) > 1:
            return self.mixed(ins, types)
        return handler(ins)

    def mixed(self, ins, types):
        """`add.f32.bf16 d, a, c` and the like (PTX ISA 9.7.5): a, and b of fma, are narrower."""
        if types[0] != "f32" or types[1] not in ("f16", "bf16") or {"rz", "relu"} & set(ins.parts):
            raise PtxError(f"line {ins.line}: unsupported instruction {ins.text}")
        d, *narrow, c = ins.operands
        wide = {"f16": ("f2", "{}.astype(f4)"), "bf16": ("u2", "bf16_float({})")}[types[1]]
        values = [wide[1].format(self.src(x, wide[0])) for x in narrow] + [self.src(c, "f4")]
        form = "fma({0}, {1}, {2})" if ins.parts[0] == "fma" else BINARY[ins.parts[0]]
        return self.assign(d, self.saturated(ins, form.format(*values), "f4"), "f4", ins.guard)

    @staticmethod
    def kind(ins):
        """The (numpy kind, PTX type) of an instruction: its last type modifier."""
        for p in reversed(ins.parts[1:]):
            if p in KIND:
                return KIND[p], p
        raise PtxError(f"line {ins.line}: no type in {ins.text}")

    def packed(self, ins, t):
        """Two-element types and bf16: element-wise on float32, each result rounded."""
        name = ins.parts[0]
        if (
            name not in PACKED
            or {"sat", "rz"} & set(ins.parts)
            or ("NaN" in ins.parts and name not in NAN_MINMAX)
            or ("relu" in ins.parts and name != "fma")
        ):
            raise PtxError(f"line {ins.line}: unsupported instruction {ins.text}")
        d, *s = ins.operands
        f, k = PACKER[t]
        op = "lambda a, b, c: relu32(fma(a, b, c))" if "relu" in ins.parts else PACKED[name]
        op = NAN_MINMAX[name] if "NaN" in ins.parts else op
        return self.assign(d, f"{f}({op}, {', '.join(self.src(x, k) for x in s)})", k, ins.guard)

    def simple(self, ins):
        k, t = self.kind(ins)
        d, *s = ins.operands
        name = ins.parts[0]
        if t in PACKER and name in PACKED:
            return self.packed(ins, t)
        if name in BINARY:
            form = (
                FLOAT_MINMAX[name]
                if k[0] == "f" and name in FLOAT_MINMAX and "NaN" not in ins.parts
                else BINARY[name]
            )
        else:
            form = UNARY[name]
            if name == "neg" and k[0] == "u":
                k = "i" + k[1]
        if "rz" in ins.parts:
            raise PtxError(f"line {ins.line}: rounding of {ins.text} is not supported")
        srcs = [self.src(x, k) for x in s]
        if name in ("min", "max") and len(srcs) == 3:
            srcs = [form.format(*srcs[:2]), srcs[2]]
        if len(srcs) != (2 if name in BINARY else 1):
            raise PtxError(f"line {ins.line}: operand count of {ins.text} is not supported")
        e = form.format(*srcs)
        if "relu" in ins.parts:
            if name not in ("min", "max"):
                raise PtxError(f"line {ins.line}: relu of {ins.text} is not supported")
            e = f"np.maximum({e}, {self.const(0, k)})"
        return self.assign(d, self.saturated(ins, e, k), k, ins.guard)

    @staticmethod
    def saturated(ins, e, k):
        if "sat" not in ins.parts:
            return e
        if k[0] != "f":
            raise PtxError(f"line {ins.line}: sat of {ins.text} is not supported")
        return f"saturate({e})"

    def op_mov(self, ins):
        k, _ = self.kind(ins)
        d, s = ins.operands
        k = {"f4": "u4", "f8": "u8", "i4": "u4", "i8": "u8", "f2": "u2", "i2": "u2"}.get(k, k)
        if not isinstance(d, Vec):
            return self.assign(d, self.src(s, k), k, ins.guard)
        pieces, sub = {
            ("u8", 2): (("lo32(x)", "hi32(x)"), "u4"),
            ("u4", 2): (("lo16(x)", "hi16(x)"), "u2"),
            ("u2", 2): (("(x & u2(255)).astype(u1)", "(x >> u2(8)).astype(u1)"), "u1"),
            ("u4", 4): (
                tuple(f"((x >> np.uint32({8 * i})) & np.uint32(255)).astype(u2)" for i in range(4)),
                "u2",
            ),
            ("u8", 4): (("lo16(lo32(x))", "hi16(lo32(x))", "lo16(hi32(x))", "hi16(hi32(x))"), "u2"),
        }[(k, len(d.items))]
        lines = [f"x = {self.src(s, k)}"]
        for item, p in zip(d.items, pieces, strict=True):
            lines += self.assign(item, p, sub, ins.guard)
        return lines

    def op_cvta(self, ins):
        d, s = ins.operands
        e = self.src(s, "u8")
        space = next(
            p.split("::")[0]
            for p in ins.parts[1:]
            if p.split("::")[0] in ("shared", "param", "global", "local", "const")
        )
        if space in ("shared", "local"):
            window = "SHARED_WINDOW" if space == "shared" else "LOCAL_WINDOW"
            e = f"({e} - {window})" if "to" in ins.parts else f"({e} + {window})"
        return self.assign(d, e, "u8", ins.guard)

    def op_setp(self, ins):
        k, t = self.kind(ins)
        cmp = ins.parts[1]
        d, a, b, *rest = ins.operands
        x, y = self.src(a, k), self.src(b, k)
        if t == "bf16":
            x, y = f"bf16_float({x})", f"bf16_float({y})"
        elif t in PACKER or t in ("f16x2", "u16x2", "s16x2"):
            raise PtxError(f"line {ins.line}: unsupported instruction {ins.text}")
        if cmp == "ne" and (k[0] == "f" or t == "bf16"):
            e = f"(({x} != {y}) & ~(np.isnan({x}) | np.isnan({y})))"
        elif cmp in COMPARE:
            e = f"({x} {COMPARE[cmp]} {y})"
        elif cmp in UNORDERED:
            e = f"(({x} {COMPARE[cmp[:2]]} {y}) | np.isnan({x}) | np.isnan({y}))"
        elif cmp in ("nan", "num"):
            e = f"{'~' if cmp == 'num' else ''}(np.isnan({x}) | np.isnan({y}))"
        else:
            raise PtxError(f"line {ins.line}: unsupported instruction {ins.text}")
        combine = next((p for p in ins.parts[2:] if p in ("and", "or", "xor")), None)
        first, second = e, f"~{e}"
        if combine:
            c, sign = self.src(rest[0], "?"), {"and": "&", "or": "|", "xor": "^"}[combine]
            first, second = f"{e} {sign} {c}", f"(~{e}) {sign} {c}"
        if isinstance(d, Pair):
            lines = [f"c1, c2 = {first}, {second}"] + self.assign(d.first, "c1", "?", ins.guard)
            return lines + self.assign(d.second, "c2", "?", ins.guard)
        return self.assign(d, first, "?", ins.guard)

    def op_selp(self, ins):
        k, _ = self.kind(ins)
        d, a, b, p = ins.operands
        return self.assign(
            d, f"where({self.src(p, '?')}, {self.src(a, k)}, {self.src(b, k)})", k, ins.guard
        )

    def shift(self, ins, sign, function):
        k, _ = self.kind(ins)
        d, a, n = ins.operands
        if isinstance(n, Imm) and 0 <= n.bits < int(k[1]) * 8:
            e = f"{self.src(a, k)} {sign} {self.const(n.bits, k)}"
        else:
            e = f"{function}({self.src(a, k)}, {self.src(n, 'u4')})"
        return self.assign(d, e, k, ins.guard)

    def op_shl(self, ins):
        return self.shift(ins, "<<", "shl")

    def op_shr(self, ins):
        return self.shift(ins, ">>", "shr")

    def op_mul(self, ins):
        k, t = self.kind(ins)
        if t in PACKER:
            return self.packed(ins, t)
        d, a, b = ins.operands
        x, y = self.src(a, k), self.src(b, k)
        if "hi" in ins.parts:
            return self.assign(d, f"mulhi({x}, {y})", k, ins.guard)
        if "wide" in ins.parts:
            return self.assign(d, f"mulwide({x}, {y})", k[0] + str(int(k[1]) * 2), ins.guard)
        return self.assign(d, self.saturated(ins, f"{x} * {y}", k), k, ins.guard)

    def op_mad(self, ins):
        k, t = self.kind(ins)
        if k[0] == "f" or t in PACKER:
            return self.op_fma(ins)
        d, a, b, c = ins.operands
        x, y = self.src(a, k), self.src(b, k)
        if "wide" in ins.parts:
            w = k[0] + str(int(k[1]) * 2)
            return self.assign(d, f"mulwide({x}, {y}) + {self.src(c, w)}", w, ins.guard)
        e = f"mulhi({x}, {y})" if "hi" in ins.parts else f"{x} * {y}"
        return self.assign(d, f"{e} + {self.src(c, k)}", k, ins.guard)

    def op_fma(self, ins):
        k, t = self.kind(ins)
        if t in PACKER:
            return self.packed(ins, t)
        if "rz" in ins.parts or "relu" in ins.parts:
            raise PtxError(f"line {ins.line}: unsupported instruction {ins.text}")
        d, a, b, c = ins.operands
        e = f"fma({self.src(a, k)}, {self.src(b, k)}, {self.src(c, k)})"
        return self.assign(d, self.saturated(ins, e, k), k, ins.guard)

    def op_cvt(self, ins):
        to, frm = conversions.types_of(ins)
        if conversions.handles(to, frm, ins.parts):
            return conversions.emit(self, ins)
        d, *s = ins.operands
        kt, kf = KIND[to], KIND[frm]
        rounding = next((p for p in ins.parts if p in ("rzi", "rni", "rmi", "rpi")), None)
        if {"rz", "rp", "rna", "satfinite"} & set(ins.parts):
            raise PtxError(f"line {ins.line}: rounding of {ins.text} is not supported")
        if "relu" in ins.parts or to in PACKER or frm in ("f32x2", "f16x2", "bf16x2"):
            raise PtxError(f"line {ins.line}: unsupported instruction {ins.text}")
        elif frm == "bf16" and kt[0] == "f":
            e = f"bf16_float({self.src(s[0], 'u2')}).astype({kt})"
        elif frm == "bf16":
            e = f"to_int(bf16_float({self.src(s[0], 'u2')}), '{rounding}', {kt})"
        elif kf[0] == "f" and kt[0] in "iu":
            e = f"to_int({self.src(s[0], kf)}, '{rounding}', {kt})"
        elif kf[0] == "f" and kt[0] == "f" and rounding:
            f = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}[rounding]
            e = f"{f}({self.src(s[0], kf)}).astype({kt})"
        elif "sat" in ins.parts and kt[0] != "f":
            e = f"clamp_to({self.src(s[0], kf)}, {kt})"
        else:
            e = self.saturated(ins, f"{self.src(s[0], kf)}.astype({kt})", kt)
        return self.assign(d, e, kt, ins.guard)

    def words(self, ins, function, n, *extra):
        """A function of n 32-bit operands."""
        d, *s = ins.operands
        args = [self.src(x, "u4") for x in s[:n]]
        return self.assign(
            d, f"{function}({', '.join([*map(str, extra), *args])})", "u4", ins.guard
        )

    def op_prmt(self, ins):
        if len(ins.parts) != 2:
            raise PtxError(f"line {ins.line}: unsupported instruction {ins.text}")
        return self.words(ins, "prmt", 3)

    def op_lop3(self, ins):
        d, a, b, c, t = ins.operands[:5]
        args = ", ".join(self.src(x, "u4") for x in (a, b, c))
        return self.assign(d, f"lop3({args}, {t.bits})", "u4", ins.guard)

    def op_shf(self, ins):
        return self.words(ins, "funnel", 3, ins.parts[1] == "l", "clamp" in ins.parts)

    def op_bmsk(self, ins):
        return self.words(ins, "bmsk", 2)

    def op_bfe(self, ins):
        k, _ = self.kind(ins)
        d, a, b, c = ins.operands
        return self.assign(
            d, f"bfe({self.src(a, k)}, {self.src(b, 'u4')}, {self.src(c, 'u4')})", k, ins.guard
        )

    def op_bfi(self, ins):
        k, _ = self.kind(ins)
        d, a, b, p, c = ins.operands
        args = f"{self.src(a, k)}, {self.src(b, k)}, {self.src(p, 'u4')}, {self.src(c, 'u4')}"
        return self.assign(d, f"bfi({args})", k, ins.guard)

    def count(self, ins, e):
        return self.assign(ins.operands[0], e, "u4", ins.guard)

    def op_popc(self, ins):
        return self.count(ins, f"popc({self.src(ins.operands[1], self.kind(ins)[0])})")

    def op_clz(self, ins):
        return self.count(ins, f"clz({self.src(ins.operands[1], self.kind(ins)[0])})")

    def op_bfind(self, ins):
        return self.count(
            ins, f"bfind({self.src(ins.operands[1], self.kind(ins)[0])}, {'shiftamt' in ins.parts})"
        )

    def op_brev(self, ins):
        k, _ = self.kind(ins)
        return self.assign(ins.operands[0], f"brev({self.src(ins.operands[1], k)})", k, ins.guard)

    def op_mapa(self, ins):
        """9.7.9.24: the same offset in CTA `c` of the cluster; ranks live in bits 24 and up."""
        d, a, c = ins.operands
        k, _ = self.kind(ins)
        rank, low = (
            self.const(24, k),
            self.const(0xFFFFFF if "shared::cluster" in ins.parts else ~(0xFF << 24), k),
        )
        e = f"({self.src(a, k)} & {low}) | ({self.src(c, 'u4')}.astype({k}) << {rank})"
        return self.assign(d, e, k, ins.guard)
