"""The table of instructions, and what their builders share.

A builder gets (Builder, Instr) and returns f(machine, warp, fragment, mask). The result None means
done, BLOCK means try again when woken, SOFT means done but sleep until something changes (a failed
try_wait).
"""

import numpy as np

from .gpus import check_instruction
from .memory import SMEM_RESERVED, Fault
from .ptx import PtxError, Sink, Vec
from .values import KIND, LANE_IDS, LANES, NP, STORE

BLOCK, SOFT = "block", "soft"
TABLE = {}
SPACES = ("shared", "global", "param", "local", "const")
MASK24 = np.uint32(0xFFFFFF)
STORE_NP = {w: NP[k] for w, k in STORE.items()}


def instruction(name, allow=""):
    """Registers the builder of instructions starting with `name`; `allow`: other modifiers."""

    def register(builder):
        TABLE[tuple(name.split("."))] = (builder, None if allow == "*" else set(allow.split()))
        return builder

    return register


def lanes_of(m):
    """The active lanes' numbers."""
    return range(LANES) if m is None else np.flatnonzero(m)


def set_reg(w, op, value, m):
    """Writes 32 values to a register, where the mask allows."""
    if isinstance(op, Sink):
        return
    want = STORE_NP[op.width]
    if value.dtype != want:
        value = value.astype(want)
    w.r[op.index] = value if m is None else np.where(m, value, w.r[op.index])


def first(value, m):
    """The value of the first active lane."""
    return int(value[0] if m is None else value[int(np.argmax(m))])


def converged(w, frag, needed=None):
    """Whether the fragment holds all live lanes of the warp (or those in `needed`)."""
    if len(w.frags) == 1:
        return True
    want = w.live if needed is None else w.live & needed
    have = frag.mask
    return have is None or not (want & ~have).any()


def member_lanes(bits):
    """A 32-bit member mask as 32 bools."""
    return ((np.uint32(bits) >> LANE_IDS) & np.uint32(1)).astype(bool)


def split_by_cta(w, a):
    """[(cta, selector, offsets)] of lanes' shared::cluster addresses."""
    rank = a >> np.uint32(24)
    if int(rank[0]) == w.cta.rank and (rank == rank[0]).all():
        off = a & MASK24
        if off.min() < SMEM_RESERVED or off.max() >= w.cta.smem.end:
            raise Fault(
                f"shared access at {int(off.min()):#x}..{int(off.max()):#x} is outside the "
                f"allocation {SMEM_RESERVED:#x}..{w.cta.smem.end:#x}"
            )
        return [(w.cta, slice(None), off)]
    out = []
    for x in np.unique(rank):
        sel = rank == x
        for one in (a[sel].min(), a[sel].max()):
            cta, _ = w.cta.cluster.resolve(int(one))
        out.append((cta, sel, a[sel] & MASK24))
    return out


class Builder:
    """Builds the functions of one kernel's instructions."""

    def __init__(self, program):
        self.program, self.codegen, self.sm100 = program, program.codegen, program.sm100

    def build(self, ins):
        """The function that executes an instruction."""
        check_instruction(ins, self.program.kernel.target)
        p = ins.parts
        for n in range(min(len(p), 6), 0, -1):
            entry = TABLE.get(p[:n])
            if entry:
                builder, allowed = entry
                unknown = (
                    []
                    if allowed is None
                    else [x for x in p[n:] if x not in allowed and x not in KIND]
                )
                if unknown:
                    raise PtxError(
                        f"line {ins.line}: modifier {unknown[0]} of {ins.text} is not supported"
                    )
                return builder(self, ins)
        raise self.unsupported(ins)

    @staticmethod
    def unsupported(ins):
        return PtxError(f"line {ins.line}: unsupported instruction {ins.text}")

    def get(self, op, kind):
        """A function of the register list that returns the operand's 32 values."""
        return eval("lambda r: " + self.codegen.src(op, kind), self.codegen.names)

    def address(self, mem, kind):
        """The same for the address of a memory operand."""
        g = self.get(mem.base, kind)
        if not mem.offset:
            return g
        t = NP[kind]
        off = t(mem.offset & ((1 << (8 * t().itemsize)) - 1))
        return lambda r: g(r) + off

    def shared_address(self, mem):
        """A shared-memory address as uint32, from a shared or generic address operand."""
        wide = getattr(mem.base, "width", 32) == 64
        g = self.address(mem, "u8" if wide else "u4")
        return (lambda r: g(r).astype(np.uint32)) if wide else g

    @staticmethod
    def vector(op):
        return op.items if isinstance(op, Vec) else (op,)

    @staticmethod
    def space(ins):
        """The state space an instruction names, "generic" if none."""
        return next(
            (p.split("::")[0] for p in ins.parts[1:] if p.split("::")[0] in SPACES), "generic"
        )

    @staticmethod
    def type_of(ins):
        """(PTX type, numpy kind, bytes) of an instruction's last type modifier."""
        t = next(p for p in reversed(ins.parts) if p in KIND)
        return t, KIND[t], int(KIND[t][1])
