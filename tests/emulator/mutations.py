"""Single changes to a kernel's PTX that break its synchronisation or its copies."""

import re
from dataclasses import dataclass

WAIT = re.compile(
    r"\{\s*\.reg \.pred\s+P1;[^}]*?mbarrier\.try_wait[^}]*?\}",
    re.S,
)
REMOVED = {
    "proxy fence": r"fence\.proxy\.async[^;]*;",
    "init fence": r"fence\.mbarrier_init[^;]*;",
    "barrier": r"(?<![\w.])(?:bar|barrier)\.(?:sync|arrive)[^;]*;",
    "cluster wait": r"barrier\.cluster\.wait[^;]*;",
    "arrive": r"(?<![\w.])mbarrier\.arrive\.(?!expect_tx)[^;]*;",
    "expect": r"mbarrier\.arrive\.expect_tx[^;]*;",
    "bulk wait": r"cp\.async\.bulk\.wait_group[^;]*;",
    "bulk commit": r"cp\.async\.bulk\.commit_group[^;]*;",
    "copy arrive": r"cp\.async\.mbarrier\.arrive[^;]*;",
    "mma wait": r"wgmma\.wait_group[^;]*;",
    "mma commit": r"wgmma\.commit_group[^;]*;",
    "mma fence": r"wgmma\.fence[^;]*;",
    "tensor load": r"cp\.async\.bulk\.tensor\.\dd\.shared[^;]*;",
    "tensor store": r"cp\.(?:reduce\.)?async\.bulk\.tensor\.\dd\.global[^;]*;",
    "gathered copy": r"cp\.async\.c[ag]\.[^;]*;",
    "register increase": r"setmaxnreg\.dec[^;]*;",
}


@dataclass(frozen=True)
class Mutation:
    """A changed PTX text; `line` is where it differs, `last` where that ends."""

    name: str
    text: str
    line: int
    last: int


def mutation(text, start, end, replacement, name):
    """The text with [start, end) replaced, keeping the numbers of the lines after it."""
    replacement += "\n" * (text.count("\n", start, end) - replacement.count("\n"))
    line = text.count("\n", 0, start) + 1
    last = line + text.count("\n", start, end)
    return Mutation(f"{name} (line {line})", text[:start] + replacement + text[end:], line, last)


def definition(text, register, before):
    """The last `mov` of a literal to a register before a place; group 1 is the number."""
    found = list(re.finditer(rf"mov\.b32\s+{re.escape(register)}, (\d+);", text[:before]))
    return found[-1] if found else None


def removals(text):
    """Every synchronisation, one at a time, removed."""
    for m in WAIT.finditer(text):
        yield mutation(text, m.start(), m.end(), "", "mbarrier wait removed")
    for name, pattern in REMOVED.items():
        for m in re.finditer(pattern, text):
            start = m.start()
            # a guarded instruction goes with its guard
            guard = re.search(r"@!?%?\w+\s+$", text[max(0, start - 40) : start])
            start -= len(guard.group()) if guard else 0
            yield mutation(text, start, m.end(), "", f"{name} removed")


def numbers(text):
    """Byte counts, arrival counts, phases and thread counts that are off."""
    for m in re.finditer(r"(mbarrier\.(?:arrive\.expect_tx|init)\.[^;]*, )(%?\w+);", text):
        expect, value = "expect_tx" in m.group(), m.group(2)
        d = None if value.isdigit() else definition(text, value, m.start())
        if d is None and not value.isdigit():
            continue
        number = int(value) if value.isdigit() else int(d.group(1))
        others = (number // 2, number + 16) if expect else (number + 1, number - 1)
        for other in others:
            if other > 0:
                name = f"{'bytes' if expect else 'count'} {number} -> {other}"
                yield mutation(text, m.start(2), m.end(2), str(other), name)
    for m in re.finditer(r"mbarrier\.try_wait\.parity[^;\[]*\[[^\]]*\], (%?\w+)", text):
        start, end = text.rfind("\n", 0, m.start()) + 1, text.index(";", m.end()) + 1
        flipped = f"{{ .reg .b32 flip; xor.b32 flip, {m.group(1)}, 1; "
        flipped += text[start : m.start(1)] + "flip" + text[m.end(1) : end] + " }"
        yield mutation(text, start, end, flipped, "phase flipped")


def copies(text):
    """Zero-fill turned off, and multicast to all CTAs turned into a copy to the own one."""
    for m in re.finditer(r"(cp\.async\.c[ag]\.[^;]*\], (\d+), )(%r\d+);", text):
        yield mutation(text, m.start(3), m.end(3), m.group(2), "zero fill removed")


def all_mutations(text):
    """Every mutation of a PTX text."""
    yield from removals(text)
    yield from numbers(text)
    yield from copies(text)
