"""Single changes to a kernel's PTX that break its synchronisation, its copies or its layouts.

Text only: nothing is known of the kernel. A change may turn out not to change what the kernel does.
"""

import re
from dataclasses import dataclass

WAIT = re.compile(
    r"\{\s*\.reg \.pred\s+P1;[^}]*?mbarrier\.try_wait[^}]*?\}",
    re.S,
)
NOT_IN_NAME = r"(?<![\w.:])"
GAP = r"(?:\s|\.loc[^\n]*\n)+"  # between two instructions
REMOVED = {
    "proxy fence": r"fence\.proxy\.async[^;]*;",
    "init fence": r"fence\.mbarrier_init[^;]*;",
    "barrier": NOT_IN_NAME + r"(?:bar|barrier)\.(?:sync|arrive)[^;]*;",
    "cluster wait": r"barrier\.cluster\.wait[^;]*;",
    "cluster arrive": r"barrier\.cluster\.arrive[^;]*;",
    "arrive": NOT_IN_NAME + r"mbarrier\.arrive\.(?!expect_tx)[^;]*;",
    "expect": r"mbarrier\.arrive\.expect_tx[^;]*;",
    "bulk wait": r"cp\.async\.bulk\.wait_group[^;]*;",
    "bulk commit": r"cp\.async\.bulk\.commit_group[^;]*;",
    "copy arrive": r"cp\.async\.mbarrier\.arrive[^;]*;",
    "mma wait": r"wgmma\.wait_group[^;]*;",
    "mma commit": r"(?:wgmma\.commit_group|tcgen05\.commit)[^;]*;",
    "mma fence": r"wgmma\.fence[^;]*;",
    "mma": r"(?:wgmma\.mma_async|tcgen05\.mma|" + NOT_IN_NAME + r"mma\.sync)\.[^;]*;",
    "tensor load": r"cp\.async\.bulk\.tensor\.\dd\.shared[^;]*;",
    "tensor store": r"cp\.(?:reduce\.)?async\.bulk\.tensor\.\dd\.global[^;]*;",
    "gathered copy": r"cp\.async\.c[ag]\.[^;]*;",
    "remote store": r"st\.async[^;]*;",
    "shared store": r"st\.shared[^;]*;",
    "atomic": NOT_IN_NAME + r"atom\.[^;]*;",
    "register increase": r"setmaxnreg\.dec[^;]*;",
    "tensor memory load wait": r"tcgen05\.wait::ld[^;]*;",
    "tensor memory store wait": r"tcgen05\.wait::st[^;]*;",
    "tensor memory fence": r"tcgen05\.fence::[^;]*;",
    "tensor memory load": r"tcgen05\.ld\.[^;]*;",
    "tensor memory allocation": r"tcgen05\.alloc[^;]*;",
    "tensor memory release": r"tcgen05\.dealloc[^;]*;",
    "matrix load": r"ldmatrix\.[^;]*;",
    "matrix store": r"stmatrix\.[^;]*;",
}
ADDRESS = r"\[([%\w$]+)(?:\+(-?\d+))?\]"
BARRIER_BYTES, ATOM_BYTES = 8, 1024  # of an mbarrier; of eight rows of 128-byte-swizzled memory
# an operand that is an mbarrier's address, as the last group of addresses of the match
AT_BARRIER = {
    "wait": r"mbarrier\.try_wait\.parity[^;\[]*" + ADDRESS,
    "arrive": NOT_IN_NAME + r"mbarrier\.arrive\.[^;\[]*" + ADDRESS,
    "copy arrive": r"cp\.async\.mbarrier\.arrive[^;\[]*" + ADDRESS,
    "commit": r"tcgen05\.commit[^;\[]*" + ADDRESS,
    "tensor load": r"cp\.async\.bulk\.tensor\.\dd\.shared[^;]*?\}\], " + ADDRESS,
}
AT_DATA = {
    "tensor load": r"cp\.async\.bulk\.tensor\.\dd\.shared[^;\[]*" + ADDRESS,
    "tensor store": r"cp\.(?:reduce\.)?async\.bulk\.tensor\.\dd\.global[^;]*?\}\], " + ADDRESS,
    "gathered copy": r"cp\.async\.c[ag]\.[^;\[]*" + ADDRESS,
    "matrix load": r"ldmatrix\.[^;\[]*" + ADDRESS,
    "matrix store": r"stmatrix\.[^;\[]*" + ADDRESS,
}
# An election, and the branch of the lanes that were not elected; without it all of them go on.
ELECTED = (
    rf"(elect\.sync\s+(%r\d+)\|(%p\d+), -1;){GAP}not\.pred\s+(%p\d+), \3;{GAP}"
    r"(@\4 bra\s+([\w$]+);)"
)
# What all lanes of a warp do, each for itself, as group 1.
BY_EVERY_LANE = {
    "copy arrive": r"(cp\.async\.mbarrier\.arrive[^;]*;)",
    "copy commit": r"(cp\.async\.commit_group[^;]*;)",
    "copy wait": r"(cp\.async\.wait_(?:group|all)[^;]*;)",
    "proxy fence": rf"(fence\.proxy\.async[^;]*;){GAP}(?:bar|barrier)\.(?:warp\.)?sync",
}
# What counts the operations of the thread that executes it; and those, where they stand apart.
OF_ONE_THREAD = {
    "commit": (r"tcgen05\.commit", r"tcgen05\.(?:mma|cp)\."),
    "bulk wait": (r"cp\.async\.bulk\.wait_group", r"async\.bulk\.(?!wait_group|commit_group)"),
}


@dataclass(frozen=True)
class Mutation:
    """A changed PTX text; `line` is where it differs, `last` where that ends."""

    kind: str
    detail: str
    text: str
    line: int
    last: int

    @property
    def name(self):
        return f"{self.kind}{f' {self.detail}' if self.detail else ''} (line {self.line})"


def mutation(text, start, end, replacement, kind, detail=""):
    """The text with [start, end) replaced, keeping the numbers of the lines after it."""
    replacement += "\n" * (text.count("\n", start, end) - replacement.count("\n"))
    line = text.count("\n", 0, start) + 1
    last = line + text.count("\n", start, end)
    return Mutation(kind, detail, text[:start] + replacement + text[end:], line, last)


def definition(text, register, before):
    """The last `mov` of a literal to a register before a place; group 1 is the number."""
    found = list(re.finditer(rf"mov\.b32\s+{re.escape(register)}, (\d+);", text[:before]))
    return found[-1] if found else None


def removals(text):
    """Every synchronisation, copy and MMA, one at a time, removed."""
    for m in WAIT.finditer(text):
        yield mutation(text, m.start(), m.end(), "", "mbarrier wait removed")
    for name, pattern in REMOVED.items():
        for m in re.finditer(pattern, text):
            start = m.start()
            # a guarded instruction goes with its guard
            guard = re.search(r"@!?%?\w+\s+$", text[max(0, start - 40) : start])
            start -= len(guard.group()) if guard else 0
            yield mutation(text, start, m.end(), "", f"{name} removed")
    # A register that is toggled in place is the phase of a ring.
    for m in re.finditer(r"xor\.b32\s+(%r\d+), \1, [^;]*;", text):
        yield mutation(text, m.start(), m.end(), "", "phase not advanced")
    for m in re.finditer(ELECTED, text):
        yield mutation(text, m.start(5), m.end(5), "", "all lanes elected")


def numbers(text):
    """Byte counts, arrival counts, phases, thread counts and ring lengths that are off."""
    for m in re.finditer(r"(mbarrier\.(?:arrive\.expect_tx|init)\.[^;]*, )(%?\w+);", text):
        expect, value = "expect_tx" in m.group(), m.group(2)
        d = None if value.isdigit() else definition(text, value, m.start())
        if d is None and not value.isdigit():
            continue
        number = int(value) if value.isdigit() else int(d.group(1))
        others = (number // 2, number + 16) if expect else (number + 1, number - 1)
        for other in others:
            if other > 0:
                kind = f"{'transaction' if expect else 'arrival'} count"
                detail = f"{number} -> {other}"
                yield mutation(text, m.start(2), m.end(2), str(other), kind, detail)
    for m in re.finditer(r"mbarrier\.try_wait\.parity[^;\[]*\[[^\]]*\], (%?\w+)", text):
        start, end = text.rfind("\n", 0, m.start()) + 1, text.index(";", m.end()) + 1
        flipped = f"{{ .reg .b32 flip; xor.b32 flip, {m.group(1)}, 1; "
        flipped += text[start : m.start(1)] + "flip" + text[m.end(1) : end] + " }"
        yield mutation(text, start, end, flipped, "phase flipped")
    for m in re.finditer(NOT_IN_NAME + r"bar\.(?:sync|arrive)\s+%?\w+, (\d+);", text):
        fewer = str(int(m.group(1)) - 32)
        yield mutation(text, m.start(1), m.end(1), fewer, "barrier of fewer threads")
    group_wait = r"(?:wgmma\.wait_group\.sync\.aligned|cp\.async\.bulk\.wait_group\.read)\s+(\d+);"
    for m in re.finditer(group_wait, text):
        number = int(m.group(1))
        detail = f"{number} -> {number + 1}"
        yield mutation(text, m.start(1), m.end(1), str(number + 1), "group wait too weak", detail)
    ring = rf"add\.s32\s+(%r\d+), %r\d+, 1;{GAP}setp\.(?:eq|ne)\.b32\s+%p\d+, \1, (\d+);"
    for m in re.finditer(ring, text):
        number = int(m.group(2))
        if 1 < number <= 32:
            detail = f"{number} -> {number - 1}"
            yield mutation(text, m.start(2), m.end(2), str(number - 1), "ring length", detail)


def moved(text, m, by, kind, detail):
    """The address in groups 1 and 2 of a match, `by` bytes on."""
    offset = int(m.group(2) or 0) + by
    return mutation(text, m.start(1), m.end() - 1, f"{m.group(1)}+{offset}", kind, detail)


def stages(text):
    """The mbarrier, or the memory, of the neighbouring stage or row group."""
    for what, pattern in AT_BARRIER.items():
        for m in re.finditer(pattern, text):
            yield moved(text, m, BARRIER_BYTES, "stage of a barrier", what)
    for what, pattern in AT_DATA.items():
        for m in re.finditer(pattern, text):
            yield moved(text, m, ATOM_BYTES, "place in shared memory", what)


def copies(text):
    """Zero-fill off, multicast to one CTA, exchanged coordinates, another CTA of the cluster."""
    for m in re.finditer(r"(cp\.async\.c[ag]\.[^;]*\], (\d+), )(%r\d+);", text):
        yield mutation(text, m.start(3), m.end(3), m.group(2), "zero fill removed")
    multicast = (
        r"(?:cp\.async\.bulk\.tensor|tcgen05\.commit)[^;]*multicast::cluster[^;]*, (%rs\d+);"
    )
    for m in re.finditer(multicast, text):
        # Predicates and 16-bit literals are the same in every instruction that takes a mask.
        yield mutation(text, m.start(1), m.end(1), "1", "multicast to one CTA")
    for m in re.finditer(r"(cp\.(?:reduce\.)?async\.bulk\.tensor[^;]*\{)([^,}]+), ([^,}]+)", text):
        exchanged = f"{m.group(3)}, {m.group(2)}"
        yield mutation(text, m.start(2), m.end(3), exchanged, "coordinates exchanged")
    for m in re.finditer(r"mapa\.shared::cluster\.u32\s+%r\d+, %r\d+, (%?\w+);", text):
        other = "0" if m.group(1) == "1" else "1"
        yield mutation(text, m.start(1), m.end(1), other, "rank of a peer")


def lanes(text):
    """What every lane must do done by one, what one thread must do done by another."""
    for what, pattern in BY_EVERY_LANE.items():
        for m in re.finditer(pattern, text):
            if re.search(r"@!?%?\w+\s+$", text[max(0, m.start() - 40) : m.start()]):
                continue
            one = "{ .reg .pred one; .reg .b32 lane; mov.u32 lane, %laneid; "
            one += f"setp.eq.u32 one, lane, 0; @one {m.group(1)} }}"
            yield mutation(text, *m.span(1), one, "by one lane", what)
    for m in re.finditer(ELECTED, text):
        leader, predicate, label = m.group(2), m.group(3), m.group(6)
        end = re.compile(rf"^{re.escape(label)}:", re.M).search(text, m.end())
        block = text[m.end() : end.start()] if end else ""
        for what, (there, apart) in OF_ONE_THREAD.items():
            if re.search(there, block) and not re.search(apart, block):
                next_lane = "{ .reg .b32 lane, next; mov.u32 lane, %laneid; "
                next_lane += f"add.u32 next, {leader}, 1; and.b32 next, next, 31; "
                next_lane += f"setp.eq.u32 {predicate}, lane, next; }}"
                yield mutation(
                    text,
                    m.start(1),
                    m.end(1),
                    m.group(1) + " " + next_lane,
                    "by another lane",
                    what,
                )


def layouts(text):
    """Swizzles that are off: of matrix descriptors, and of addresses that threads compute."""
    # A descriptor's constant half: swizzle in its top bits, the stride between row groups above 32.
    for m in re.finditer(r"or\.b64\s+%rd\d+, %rd\d+, (-?\d{16,});", text):
        value = int(m.group(1)) % 2**64
        for detail, bits in (("swizzle", 3 << 62), ("stride", 1 << 38)):
            changed = (value ^ bits) % 2**64
            changed -= 2**64 if changed >= 2**63 else 0
            yield mutation(text, *m.span(1), str(changed), "matrix descriptor", detail)
    # 16-byte pieces of a 128-byte row, exchanged by the row's number.
    for m in re.finditer(r"and\.b32\s+%r\d+, %r\d+, (112);", text):
        yield mutation(text, *m.span(1), "48", "swizzle of an address")


def executed_lines(emulator):
    """PTX lines that the emulator's last run executed."""
    program = next(iter(emulator.programs.values()))
    lines = set()
    for at in emulator.machine.executed:
        kind, _, after = program.nodes[at]
        end = after if kind == "run" else at + 1
        lines |= {ins.line for ins in program.kernel.instrs[at:end]}
    return lines


def all_mutations(text):
    """Every mutation of a PTX text."""
    for family in (removals, numbers, copies, stages, lanes, layouts):
        yield from family(text)
