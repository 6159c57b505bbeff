"""PTX text to instructions with resolved registers and labels (PTX ISA 4, 5)."""

import re
import struct
from dataclasses import dataclass, field

WIDTH = {
    "pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "bf16": 16,
    "b32": 32, "u32": 32, "s32": 32, "f32": 32, "b64": 64, "u64": 64, "s64": 64, "f64": 64,
    "b128": 128,
}  # fmt: skip


class PtxError(Exception):
    """The PTX text uses something that the emulator does not know."""


@dataclass(frozen=True)
class Reg:
    """A register: its place in the warp's list and its width in bits (1: a predicate)."""

    index: int
    width: int


@dataclass(frozen=True)
class Imm:
    """A literal: a signed integer, or the bit pattern of a floating-point literal."""

    bits: int
    is_float: bool = False


@dataclass(frozen=True)
class Sym:
    """A variable, parameter, label or function name."""

    name: str


@dataclass(frozen=True)
class Special:
    """A special register such as `%tid.x` (PTX ISA 10)."""

    name: str


@dataclass(frozen=True)
class Sink:
    """The destination `_`."""


@dataclass(frozen=True)
class Vec:
    """`{a, b, ...}`."""

    items: tuple


@dataclass(frozen=True)
class Pair:
    """`d|p`, two destinations."""

    first: object
    second: object


@dataclass(frozen=True)
class Not:
    """`!p`."""

    reg: Reg


@dataclass(frozen=True)
class Mem:
    """`[base + offset]`, or `[base, {coordinates}]` of a tensor copy."""

    base: object
    offset: int
    coords: tuple = ()


@dataclass
class Instr:
    """One instruction; `parts`: opcode split at dots, `source`: (file, line), innermost first."""

    op: str
    parts: tuple
    operands: list
    guard: object
    line: int
    text: str
    target: int = -1
    source: tuple = ()

    def where(self):
        """`PTX line n: text`, with the Python source line where the compiler kept it."""
        chain = " <- ".join(f"{f.rsplit('/', 1)[-1]}:{n}" for f, n in self.source)
        return f"PTX line {self.line}: {self.text[:160]}" + (f"  [{chain}]" if chain else "")


@dataclass
class Kernel:
    """An entry function. `params` are (name, size, alignment, offset in the parameter block)."""

    name: str
    params: list
    instrs: list = field(default_factory=list)
    reg_widths: list = field(default_factory=list)
    reg_names: dict = field(default_factory=dict)
    shared: dict = field(default_factory=dict)
    extern_shared: dict = field(default_factory=dict)
    local: dict = field(default_factory=dict)
    globals: dict = field(default_factory=dict)
    call_params: dict = field(default_factory=dict)
    directives: dict = field(default_factory=dict)
    target: str = ""
    param_bytes: int = 0


def strip_comments(text):
    """Blanks comments, keeping line numbers."""
    text = re.sub(r"/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def split_top(s, sep=","):
    """Splits at `sep` outside any brackets."""
    out, depth, start = [], 0, 0
    for i, ch in enumerate(s):
        if ch in "{[(":
            depth += 1
        elif ch in "}])":
            depth -= 1
        elif ch == sep and depth == 0:
            out.append(s[start:i].strip())
            start = i + 1
    tail = s[start:].strip()
    if tail:
        out.append(tail)
    return out


class Scope:
    """Register, label and call-parameter names of a `{ }` block."""

    def __init__(self, parent, kernel):
        self.parent, self.kernel = parent, kernel
        self.regs, self.ranges, self.vectors, self.labels, self.params = {}, {}, {}, {}, {}

    def declare(self, name, width):
        self.kernel.reg_names[len(self.kernel.reg_widths)] = name
        self.regs[name] = Reg(len(self.kernel.reg_widths), width)
        self.kernel.reg_widths.append(width)

    def declare_vector(self, name, width, count):
        """A vector variable (PTX ISA 5.4.2); its elements have two names each (5.4.3)."""
        for i in range(count):
            self.declare(f"{name}.{'xyzw'[i]}", width)
            self.regs[f"{name}.{'rgba'[i]}"] = self.regs[f"{name}.{'xyzw'[i]}"]
        self.vectors[name] = Vec(tuple(self.regs[f"{name}.{e}"] for e in "xyzw"[:count]))

    def declare_range(self, prefix, count, width):
        first = len(self.kernel.reg_widths)
        self.ranges[prefix] = (first, count, width)
        for i in range(count):
            self.kernel.reg_names[first + i] = f"{prefix}{i}"
        self.kernel.reg_widths += [width] * count

    def reg(self, name):
        """The register called `name` in this block or one around it, or None."""
        s = self
        m = re.fullmatch(r"(%?[A-Za-z_$]+)(\d+)", name)
        while s:
            if name in s.regs:
                return s.regs[name]
            if m and m.group(1) in s.ranges:
                first, count, width = s.ranges[m.group(1)]
                if int(m.group(2)) < count:
                    return Reg(first + int(m.group(2)), width)
            s = s.parent
        return None

    def find(self, kind, name):
        """The label ("labels"), call parameter ("params") or vector called `name`, or None."""
        s = self
        while s:
            if name in getattr(s, kind):
                return getattr(s, kind)[name]
            s = s.parent
        return None


def parse_declaration(stmt):
    """`.shared .align 16 .b8 name[128]` -> (name, bytes, alignment)."""
    stmt = re.sub(r"\.ptr(\s+\.(global|shared|const|local))?(\s+\.align\s+\d+)?", "", stmt)
    align = int(m.group(1)) if (m := re.search(r"\.align\s+(\d+)", stmt)) else 0
    m = re.search(
        r"\.(b8|b16|b32|b64|u8|u16|u32|u64|s32|s64|f32|f64)\s+([\w$%]+)\s*(?:\[(\d*)\])?", stmt
    )
    elem = WIDTH[m.group(1)] // 8
    count = 1 if m.group(3) is None else int(m.group(3) or 0)
    return m.group(2), elem * count, max(align, elem)


def parse_number(s):
    """An integer or floating-point literal as an Imm, or None."""
    if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", s):
        return Imm(int(m.group(1) or m.group(2), 16), True)
    if m := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", s):
        digits = m.group(2)
        value = int(digits, 8) if re.fullmatch(r"0[0-7]+", digits) else int(digits, 0)
        return Imm(-value if m.group(1) else value)
    if re.fullmatch(r"-?\d+\.\d+", s):
        return Imm(struct.unpack("<I", struct.pack("<f", float(s)))[0], True)
    return None


def parse_operand(s, scope):
    """One operand, registers resolved in `scope`."""
    s = s.strip()
    if s == "_":
        return Sink()
    if s[0] in "{(":
        return Vec(tuple(parse_operand(x, scope) for x in split_top(s[1:-1])))
    if s[0] == "[":
        inner = split_top(s[1:-1])
        base, offset = inner[0], 0
        if m := re.fullmatch(r"(.*?)\s*\+\s*(-?\w+)", base):
            base, offset = m.group(1), int(m.group(2), 0)
        coords = parse_operand(inner[1], scope) if len(inner) > 1 else Vec(())
        return Mem(
            parse_operand(base, scope),
            offset,
            coords.items if isinstance(coords, Vec) else (coords,),
        )
    if s[0] == "!":
        return Not(parse_operand(s[1:], scope))
    if "|" in s:
        first, second = s.split("|")
        return Pair(parse_operand(first, scope), parse_operand(second, scope))
    r = scope.reg(s)
    if r is None:
        r = scope.find("vectors", s)
    if r is not None:
        return r
    if s[0] == "%":
        return Special(s)
    number = parse_number(s)
    return Sym(s) if number is None else number


_LABEL = re.compile(r"([\w$%.]+)\s*:(?!:)")


def statements(body, first_line):
    """Yields (kind, text, line); kind is 'open', 'close', 'label', 'loc' or 'stmt'."""
    i, line, n = 0, first_line, len(body)
    while i < n:
        ch = body[i]
        if ch == "\n":
            line += 1
            i += 1
        elif ch.isspace() or ch == ";":
            i += 1
        elif ch == "{":
            yield "open", "", line
            i += 1
        elif ch == "}":
            yield "close", "", line
            i += 1
        elif m := _LABEL.match(body, i):
            yield "label", m.group(1), line
            i = m.end()
        elif body.startswith((".loc", ".file"), i) and not body.startswith(".local", i):
            j = body.index("\n", i)
            yield "loc", body[i:j], line
            i = j
        else:
            j = body.index(";", i)
            text = body[i:j]
            yield "stmt", " ".join(text.split()), line
            line += text.count("\n")
            i = j + 1


def matching_brace(text, at):
    """The index of the brace that closes the one at `at`."""
    depth = 0
    for m in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if m.group() == "{" else -1
        if depth == 0:
            return m.start()
    raise PtxError("unbalanced braces")


def parse_global(stmt):
    """`.global .align 1 .b8 text[5] = {...}` -> (name, initial bytes)."""
    head, _, init = stmt.partition("=")
    name, size, align = parse_declaration(head)
    width = WIDTH[re.search(r"\.(\w+)\s+[\w$%]+\s*(\[\d*\])?\s*$", head.strip()).group(1)] // 8
    data = bytearray(size)
    for i, x in enumerate(split_top(init.strip().strip("{}"))):
        number = parse_number(x)
        if number is None:
            raise PtxError(f"initialiser {x} of {name} is not supported")
        data[i * width : (i + 1) * width] = (number.bits & ((1 << (8 * width)) - 1)).to_bytes(
            width, "little"
        )
    return name, (bytes(data), align)


def parse(text):
    """All entry kernels of a PTX module, by name."""
    text = strip_comments(text)
    target = m.group(1) if (m := re.search(r"\.target\s+(\w+)", text)) else ""
    files = {int(m.group(1)): m.group(2) for m in re.finditer(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    shared, extern, module_globals, bodies = {}, {}, {}, []
    for m in re.finditer(r"\.entry\s+([\w$]+)\s*\(", text):
        close = text.index(")", m.end())
        brace = text.index("{", close)
        bodies.append(
            (
                m.group(1),
                text[m.end() : close],
                text[close + 1 : brace],
                brace,
                matching_brace(text, brace),
            )
        )
    outside = text
    for *_, a, b in reversed(bodies):
        outside = outside[:a] + outside[b + 1 :]
    outside = re.sub(r"\.section\s+[\w.]+\s*\{.*?\}", "", outside, flags=re.S)
    for m in re.finditer(r"(\.extern\s+)?\.shared[^;]*;", outside):
        name, size, align = parse_declaration(m.group()[:-1])
        (extern if m.group(1) else shared)[name] = (size, align)
    for m in re.finditer(r"\.(?:global|const)\s[^;]*;", outside):
        name, value = parse_global(m.group()[:-1])
        module_globals[name] = value
    kernels = {}
    for name, params, directives, a, b in bodies:
        k = parse_kernel(name, params, text[a + 1 : b], text[:a].count("\n") + 1, files)
        k.shared.update(shared)
        k.extern_shared.update(extern)
        k.globals, k.target = module_globals, target
        for d in re.finditer(r"\.(\w+)\s+([\d\s,]+)", directives):
            k.directives[d.group(1)] = tuple(int(x) for x in d.group(2).split(","))
        kernels[name] = k
    return kernels


def parse_registers(text, scope):
    """`.reg .b32 %r<20>`, `.reg .pred P1, P2` or `.reg .v4 .s32 quad`."""
    m = re.match(r"\.reg\s+(?:\.v([24])\s+)?\.(\w+)\s+(.*)", text)
    width = WIDTH[m.group(2)]
    for item in split_top(m.group(3)):
        if m.group(1):
            scope.declare_vector(item, width, int(m.group(1)))
        elif r := re.fullmatch(r"(%?[\w$]+?)<(\d+)>", item):
            scope.declare_range(r.group(1), int(r.group(2)), width)
        else:
            scope.declare(item, width)


def parse_loc(text, files):
    """`.loc f l c[, ..., inlined_at f l c]` -> ((file, line), ...), innermost first."""
    return tuple(
        (files.get(int(f), "?"), int(n))
        for f, n in re.findall(r"(?:\.loc|inlined_at)\s+(\d+)\s+(\d+)\s+\d+", text)
    )


def parse_instruction(text, line, scope, source):
    """One instruction, its guard and operands resolved; branch targets are filled in later."""
    guard, rest = None, text
    if m := re.match(r"@(!?)([\w$%]+)\s+(.*)", text):
        guard, rest = scope.reg(m.group(2)), m.group(3)
        if guard is None:
            raise PtxError(f"line {line}: unknown predicate {m.group(2)}")
        guard = Not(guard) if m.group(1) else guard
    op, _, tail = rest.partition(" ")
    operands = [parse_operand(s, scope) for s in split_top(tail)]
    return Instr(op, tuple(op.split(".")), operands, guard, line, text, source=source)


def parse_kernel(name, params, body, first_line, files):
    """One entry function from its parameter list and body."""
    k, at = Kernel(name, []), 0
    for p in split_top(params):
        pname, size, align = parse_declaration(p)
        at = -(-at // align) * align
        k.params.append((pname, size, align, at))
        at += size
    k.param_bytes = at
    scope, pending, source = Scope(None, k), [], ()
    for kind, text, line in statements(body, first_line):
        if kind == "open":
            scope = Scope(scope, k)
        elif kind == "close":
            scope = scope.parent
        elif kind == "label":
            scope.labels[text] = len(k.instrs)
        elif kind == "loc":
            source = parse_loc(text, files) or source
        elif text.startswith(".reg"):
            parse_registers(text, scope)
        elif text.startswith((".shared", ".local")):
            n, size, align = parse_declaration(text)
            (k.shared if text.startswith(".shared") else k.local)[n] = (size, align)
        elif text.startswith(".param"):
            n, size, align = parse_declaration(text)
            scope.params[n] = unique = f"{n}#{len(k.call_params)}"
            k.call_params[unique] = (size, align)
        elif not text.startswith("."):
            ins = parse_instruction(text, line, scope, source)
            if ins.parts[0] == "bra":
                pending.append((ins, scope))
            elif ins.parts[0] == "call" or "param" in ins.parts:
                rename_call_params(ins, scope)
            k.instrs.append(ins)
    for ins, s in pending:
        ins.target = s.find("labels", ins.operands[-1].name)
        if ins.target is None:
            raise PtxError(f"line {ins.line}: no label {ins.operands[-1].name}")
    return k


def rename_call_params(ins, scope):
    """Call parameters are block-scoped: gives the ones an instruction names their unique names."""

    def unique(op):
        if isinstance(op, Sym):
            return Sym(scope.find("params", op.name) or op.name)
        if isinstance(op, Mem):
            return Mem(unique(op.base), op.offset, op.coords)
        if isinstance(op, Vec):
            return Vec(tuple(unique(x) for x in op.items))
        return op

    ins.operands = [unique(o) for o in ins.operands]
