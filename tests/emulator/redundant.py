"""Mutations that change nothing, by rules that look at a kernel's text alone, before it runs.

What no rule proves is tried. The result file lists each place that one leaves out.
"""

BULK_WAIT = ("cp", "async", "bulk", "wait_group")
# Removals of what is as good once as twice in a row: fences, and waits for what is one's own.
# Barriers are not: each counts for the warps that meet there.
IDEMPOTENT = {
    f"{name} removed"
    for name in (
        "proxy fence", "init fence", "mma fence", "tensor memory fence", "bulk wait", "mma wait",
        "tensor memory load wait", "tensor memory store wait",
    )
}  # fmt: skip


class Flow:
    """The control flow of a kernel, by positions in `Kernel.instrs`; `targets`: of branches."""

    def __init__(self, kernel):
        self.instrs = kernel.instrs
        self.targets = {ins.target for ins in self.instrs if ins.parts[0] == "bra"}


def only_waits(flow, at):
    """A branch keeps lanes out of a block that only waits for a thread's own bulk stores: without
    it, more lanes wait, which ends by itself and makes nothing earlier."""
    block = flow.instrs[at + 1 : flow.instrs[at].target]
    return bool(block) and all(ins.parts[:4] == BULK_WAIT for ins in block)


def same_beside(flow, at):
    """Whether whoever comes to an instruction executes the same one right before or after it."""
    ins = flow.instrs[at]

    def same(i):
        if not 0 <= i < len(flow.instrs) or flow.instrs[i].guard is not None:
            return False
        other = flow.instrs[i]
        return other.parts == ins.parts and other.operands == ins.operands

    return same(at + 1) or (at not in flow.targets and same(at - 1))


def why_redundant(flow, mutant):
    """The rule by which a mutation of a program changes nothing, or ""."""
    places = (i for i, x in enumerate(flow.instrs) if mutant.line <= x.line <= mutant.last)
    at = next(places, None)
    if at is None:
        return ""
    if mutant.kind == "all lanes elected" and only_waits(flow, at):
        return "more lanes wait for their own bulk stores"
    if mutant.kind in IDEMPOTENT and same_beside(flow, at):
        return "the same fence or wait stands beside it"
    return ""
