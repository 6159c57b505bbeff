"""Whether a compiled kernel that may overlap the launch before it waits for that in time."""

import re

WAIT = "griddepcontrol.wait"
START = "griddepcontrol.launch_dependents"
_BEGIN = r"(?:^|[;{])\s*(?:@!?%\w+\s+)?"
# Of parameters and shared memory no earlier launch knows.
_MEMORY = re.compile(
    _BEGIN
    + r"((?:ld|ldu|st|atom|red|cp|multimem|prefetchu?|applypriority|discard)\b"
    + r"(?!\.param|\.shared|[\w.]*\.shared(?:::cta)?\.b)[\w.:]*)",
    re.MULTILINE,
)
_LEAVES = re.compile(_BEGIN + r"(ret|exit|brx\S*|call\S*)\b", re.MULTILINE)
_BRANCH = re.compile(_BEGIN + r"bra(?:\.uni)?\s+(\$?\w+)", re.MULTILINE)
_PREDICATED = re.compile(r"@!?%\w+\s+" + re.escape(WAIT))


def fault_of_wait(ptx: str) -> str | None:
    """What is wrong with the one wait of a kernel, or None: all threads come to it, none has
    accessed memory before, and no later launch is let start early."""
    if START in ptx:
        return "the next launch may start early"
    if ptx.count(WAIT) != 1:
        return f"it waits in {ptx.count(WAIT)} places"
    if _PREDICATED.search(ptx):
        return "some threads do not wait"
    before = ptx[ptx.index(".entry") : ptx.index(WAIT)]
    access = _MEMORY.search(before)
    if access is not None:
        return f"{access[1]} comes before the wait"
    past = [label for label in _BRANCH.findall(before) if f"{label}:" not in before]
    if past or _LEAVES.search(before):
        return "some threads may pass by the wait"
    return None
