"""Registers that an asynchronous instruction has not finished with: those of tcgen05.ld and wgmma.

`Warp.late` has, by register, the operation that is still to write or read it, or whose result was
moved there; the machine calls `touch` before it runs anything while that is not empty.
"""

from .ptx import Mem, Not, Pair, Reg, Vec


def registers(op):
    """The indices of the registers that an operand names."""
    if isinstance(op, Reg):
        return {op.index}
    if isinstance(op, Not):
        return {op.reg.index}
    if isinstance(op, Vec):
        return set().union(*(registers(x) for x in op.items))
    if isinstance(op, Pair):
        return registers(op.first) | registers(op.second)
    if isinstance(op, Mem):
        return registers(op.base).union(*(registers(x) for x in op.coords))
    return set()


def uses_of(ins):
    """The registers that an instruction names; a wgmma looks after its own."""
    if ins.parts[:2] == ("wgmma", "mma_async"):
        return frozenset()
    return frozenset().union(*(registers(x) for x in [*ins.operands, ins.guard]))


def targets_of(ins):
    """Where a mov puts what it reads. A compiler may rename registers instead, so that it waits
    for nothing itself."""
    if ins.parts[0] != "mov" or ins.guard is not None:
        return frozenset()
    return frozenset(registers(ins.operands[0]))


def touch(machine, w, pc):
    """Tells operations in flight that the node at `pc` is about to use their registers."""
    uses = w.cta.program.uses.get(pc)
    if uses is None:
        uses = w.cta.program.uses[pc] = [
            (ins, uses_of(ins) - targets_of(ins), targets_of(ins))
            for ins in w.cta.program.node_instructions(pc)
        ]
    late = w.late
    for ins, used, targets in uses:
        for register in targets:
            if register in late:
                late[register].touched(machine, w, ins, register)
        for register in used:
            if register not in late:
                continue
            if targets:
                late[register].moved(machine, w, ins, register, targets)
            else:
                late[register].touched(machine, w, ins, register)
