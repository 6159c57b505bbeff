"""Mutations that change nothing, by rules that look at a kernel's text alone, before it runs.

What no rule proves is tried.
"""

from .inflight import registers

LOAD, LOAD_WAIT = ("tcgen05", "ld"), ("tcgen05", "wait::ld")
BULK_WAIT = ("cp", "async", "bulk", "wait_group")
# what other warps and asynchronous units cannot tell apart from doing it earlier or later
PRIVATE = {"ld", "st", "stmatrix", "ldmatrix"}


class Flow:
    """The control flow of a kernel, by positions in `Kernel.instrs`; `before`: predecessors."""

    def __init__(self, kernel):
        self.instrs = kernel.instrs
        self.before = [[] for _ in self.instrs]
        for i, ins in enumerate(self.instrs):
            following = [ins.target] if ins.parts[0] == "bra" else []
            if ins.parts[0] not in ("bra", "ret", "exit") or ins.guard is not None:
                following.append(i + 1)
            for j in following:
                if j < len(self.instrs):
                    self.before[j].append(i)

    def since(self, at, head):
        """Positions on the paths to `at` that begin after the last instruction with that `head`."""
        found, todo = set(), list(self.before[at])
        while todo:
            i = todo.pop()
            if i in found or self.instrs[i].parts[: len(head)] == head:
                continue
            found.add(i)
            todo += self.before[i]
        return found


def named(ins):
    """The registers in the operands and the guard of an instruction."""
    return set().union(*(registers(x) for x in [*ins.operands, ins.guard]))


def only_waits(flow, at):
    """More lanes run a block in which a thread waits for bulk stores that it issued itself."""
    block = flow.instrs[at + 1 : flow.instrs[at].target]
    return bool(block) and all(ins.parts[:4] == BULK_WAIT for ins in block)


def needless_load_wait(flow, at, is_arithmetic):
    """PTX ISA 9.7.16.6.4.5: the use of a register of a tcgen05.ld waits for it. So all loads are
    over where each has had all its registers used before anything that others can notice."""
    loads = [i for i in flow.since(at, LOAD_WAIT) if flow.instrs[i].parts[:2] == LOAD]
    return bool(loads) and all(used_at_once(flow, i, is_arithmetic) for i in loads)


def used_at_once(flow, at, is_arithmetic):
    """Whether all registers of a load are used before its block, or its privacy, ends."""
    unused = registers(flow.instrs[at].operands[0])
    i = at + 1
    while unused and i < len(flow.instrs):
        ins = flow.instrs[i]
        if ins.parts[:2] not in (LOAD, LOAD_WAIT):
            if not (is_arithmetic(ins) or ins.parts[0] in PRIVATE):
                return False
            unused -= named(ins)
        i += 1
    return not unused


def why_redundant(program, flow, mutant):
    """The rule by which a mutation of a program changes nothing, or ""."""
    places = (i for i, x in enumerate(flow.instrs) if mutant.line <= x.line <= mutant.last)
    at = next(places, None)
    if at is None:
        return ""
    if mutant.kind == "all lanes elected" and only_waits(flow, at):
        return "more lanes wait for bulk stores, of which they have issued none"
    if mutant.kind == "tensor memory load wait removed":
        if needless_load_wait(flow, at, program.codegen.handles):
            return "the registers of the loads are used at once, which waits for them"
    return ""
