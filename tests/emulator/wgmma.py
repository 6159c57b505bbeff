"""Asynchronous warpgroup MMA (PTX ISA 9.7.15).

An operation is collective: it starts when the four warps of a warpgroup have issued it. It reads
its operands and accumulators and writes its accumulators when it fires, between its start and the
waits for its groups. Warp w multiplies rows 16*(w%4).. of the 64.

That a finished operation was issued by all four warps orders what they did before it. The ISA does
not say so, but kernels known to be good rely on it.
"""

import numpy as np

from .builder import BLOCK, converged, instruction
from .memory import Fault
from .operands import (
    ELEM,
    check_extent,
    gather_ab,
    gather_d,
    operand_offsets,
    quarter_offsets,
    read_operand,
    scatter_d,
    to_float,
)
from .ordering import new_clock


class Operation:
    """One wgmma of a warpgroup: `parts` by warp, `what` must be the same for all of them."""

    def __init__(self, what):
        self.what, self.parts, self.done, self.waiters, self.clock = (
            what,
            {},
            False,
            [],
            new_clock(),
        )


class Part:
    """What one warp contributes: where its accumulators are, its rows of A, its reads in flight."""

    def __init__(self, warp, registers, rows, reads):
        self.warp, self.registers, self.rows, self.reads = warp, registers, rows, reads


@instruction("wgmma.fence.sync.aligned")
def fence(b, ins):
    """9.7.15.7.1: orders the warp's register accesses before the wgmma operations that follow."""

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        w.fenced, w.produced = list(w.r), {}

    return run


@instruction("wgmma.commit_group.sync.aligned")
def commit_group(b, ins):
    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        w.wgmma_groups.append(w.wgmma_open)
        w.wgmma_open = []

    return run


@instruction("wgmma.wait_group.sync.aligned")
def wait_group(b, ins):
    n = ins.operands[0].bits

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        cut = max(len(w.wgmma_groups) - n, 0)
        older = [op for g in w.wgmma_groups[:cut] for op in g]
        pending = [op for op in older if not op.done]
        if pending:
            w.why = f"{len(pending)} wgmma operations"
            pending[-1].waiters.append(w)  # they finish in order
            return BLOCK
        recent = [
            a for g in [*w.wgmma_groups[cut:], w.wgmma_open] for op in g for a in op.parts[w].reads
        ]
        for op in older:
            w.acquire(op.clock)
        over = [a for op in older for a in op.parts[w].reads]
        w.cta.smem.reads_over(w, over, recent)
        w.wgmma_groups = w.wgmma_groups[cut:]
        return None

    return run


def check_fence(M, w, registers, what):
    """9.7.15.7.1: only a wgmma may write its registers after the last wgmma.fence.

    Values are told apart by their arrays: a copy of a fenced value is no write, nor is a constant,
        since the compiler sinks the initialisation of accumulators past the fence. It may sink
        other pure instructions too, so this is a warning.
    """
    r, fenced, produced = w.r, w.fenced, w.produced
    if fenced is None:
        raise Fault("wgmma without an earlier wgmma.fence")
    suspects = [
        i
        for i in registers
        if fenced[i] is not r[i] and produced.get(i) is not r[i] and r[i].flags.writeable
    ]
    if suspects:
        known = {id(x) for x in fenced} | {id(x) for x in produced.values()}
        for i in suspects:
            if id(r[i]) not in known:
                kernel = w.cta.program.kernel
                where = kernel.instrs[w.frags[0].pc].where()
                M.warnings.add(
                    f"{what} {kernel.reg_names[i]} was written after the last wgmma.fence, {where}"
                )
                return


@instruction("wgmma.mma_async.sync.aligned", "*")
def mma_async(b, ins):
    """D (64 x N, float32) = A B + D * scale-d; A from shared memory or registers."""
    p = ins.parts
    shape = next(x for x in p if x.startswith("m64n"))
    n, k = (int(x) for x in shape[4:].split("k"))
    td, ta, tb = p[p.index(shape) + 1 : p.index(shape) + 4]
    d, a, bd, scale_d, *imm = ins.operands
    if td != "f32" or k * ELEM.get(ta, 0) != 32 or tb not in ELEM or "sp" in p:
        raise b.unsupported(ins)
    d = [x.index for x in b.vector(d)]
    in_regs = len(b.vector(a)) == 4
    ga = [b.get(x, "u4") for x in a.items] if in_regs else b.get(a, "u8")
    gb, gs = b.get(bd, "u8"), b.get(scale_d, "?")
    imm = [x.bits for x in imm]
    neg_a, neg_b = imm[0] == -1, imm[1] == -1
    trans = [*imm[2:], 0, 0]
    mn_a, mn_b = (0, trans[0]) if in_regs else (trans[0], trans[1])
    if len(d) != n // 2 or {imm[0], imm[1]} - {1, -1}:
        raise b.unsupported(ins)

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        r, smem = w.r, w.cta.smem
        keep, b_desc = bool(gs(r)[0]), int(gb(r)[0])
        a_desc = None if in_regs else int(ga(r)[0])
        check_fence(M, w, d if keep else (), "accumulator")
        units = [operand_offsets(b_desc, n, k, ELEM[tb], bool(mn_b), False)[1]]
        if in_regs:
            check_fence(M, w, [x.index for x in a.items], "A operand")
            rows = gather_ab([g(r) for g in ga], ELEM[ta], 16)
        else:
            rows, own = quarter_offsets(a_desc, k, ELEM[ta], bool(mn_a), w.index % 4)
            units.append(own)
        for u in units:
            check_extent(smem, u, "wgmma")
            smem.check_async(w, u, "wgmma operand read", write=False)
        reads = [smem.begin("wgmma read", u, ins, w) for u in units]
        op = join(w, (ins.line, a_desc, b_desc, keep))
        op.parts[w] = Part(w, d, rows, reads)
        w.wgmma_open.append(op)
        w.release(op.clock)
        if len(op.parts) == 4:
            M.later("mma", lambda: fire(M, smem, op, b_desc, keep), queue=w.cta, cause=(w, ins))
            M.count("wgmma")

    def fire(M, smem, op, b_desc, keep):
        parts = sorted(op.parts.values(), key=lambda p: p.warp.index)
        rows = np.concatenate([p.rows for p in parts])
        av = to_float(rows if in_regs else smem.asynchronous[ELEM[ta]][rows], ta)
        bv = M.cached_operand(
            smem,
            (b_desc, n, k, tb, mn_b, neg_b),
            lambda: read_operand(smem, b_desc, n, k, tb, mn_b, neg_b, False),
        )
        out = (-av if neg_a else av) @ bv.T
        for i, p in enumerate(parts):
            w, tile = p.warp, out[16 * i : 16 * i + 16]
            if keep:
                tile = tile + gather_d([w.r[x] for x in p.registers], n)
            for x, v in zip(p.registers, scatter_d(tile, n), strict=True):
                w.r[x] = w.produced[x] = v
            for access in p.reads:
                smem.end_access(access)
        op.done = True
        for x in op.waiters:
            M.wake(x)

    return run


def join(w, what):
    """The operation that this warp's next wgmma belongs to."""
    group = w.index // 4
    if len(w.cta.warps) < 4 * group + 4:
        raise Fault("wgmma in a warpgroup of fewer than four warps")
    key = group, w.wgmma_issued
    w.wgmma_issued += 1
    op = w.cta.wgmma.get(key)
    if op is None:
        op = w.cta.wgmma[key] = Operation(what)
    if op.what != what:
        raise Fault(f"wgmma: the warps of a warpgroup disagree: {op.what} and {what}")
    if len(op.parts) == 3:
        del w.cta.wgmma[key]
    return op
