"""Asynchronous warpgroup MMA (PTX ISA 9.7.15).

An operation is collective: it starts when the four warps of a warpgroup have issued it. It reads
its operands and accumulators and writes its accumulators when it fires, between its start and the
waits for its groups. Warp w multiplies rows 16*(w%4).. of the 64.

A warp's wait orders its own part alone: neither the reads of the other three, which wait for
themselves, nor what they did before.
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
from .values import LANES


class Operation:
    """One wgmma of a warpgroup: `parts` by warp, `what` must be the same for all of them."""

    def __init__(self, what):
        self.what, self.parts, self.done, self.waiters = what, {}, False, []


class Part:
    """What one warp contributes: its accumulators, its A (registers or smem), its reads in flight.

    9.7.15.7.3: until a wait_group, only a wgmma of the same shape may use the accumulators, and
    only a wgmma may read the registers of A.
    """

    def __init__(self, warp, ins, form, rows, reads):
        self.warp, self.ins, self.form = warp, ins, form
        self.rows, self.reads, self.ended = rows, reads, False
        late, own = warp.late, form.d_registers
        for other in {late.get(i) for i in own} - {None}:
            if not other.ended and other.form.accumulators != form.accumulators:
                raise self.conflict(other, "accumulators of another shape or other registers")
        for other in {late.get(i) for i in form.a_registers} - {None}:
            if not other.ended and not other.form.d_set.isdisjoint(form.a_registers):
                raise self.conflict(other, "its A operand")
        late.update(dict.fromkeys((*form.a_registers, *own), self))

    @staticmethod
    def conflict(other, what):
        return Fault(
            f"wgmma uses accumulators as {what} while another wgmma is still writing them: no "
            f"wgmma.wait_group since {other.ins.where()}"
        )

    def touched(self, M, w, ins, register):
        """Another instruction is about to use a register."""
        if self.ended:
            w.accessed[register] = ins
            del w.late[register]
            return
        name = w.cta.program.kernel.reg_names[register]
        use = "accumulator" if register in self.form.d_set else "A operand"
        raise Fault(
            f"{ins.where()} uses {name}, {use} of a wgmma that no wgmma.wait_group is known to "
            f"have ended: {self.ins.where()}"
        )

    def moved(self, M, w, ins, register, targets):
        self.touched(M, w, ins, register)

    def over(self):
        """A wait_group has seen the end; the accumulators' next use is noted, for `check_fence`."""
        late, self.ended = self.warp.late, True
        for i in self.form.a_registers:
            if late.get(i) is self:
                del late[i]


@instruction("wgmma.fence.sync.aligned")
def fence(b, ins):
    """9.7.15.7.1: orders the warp's register accesses before the wgmma operations that follow."""

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        w.fenced, w.produced = list(w.r), {}
        w.accessed.clear()

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
            op.parts[w].over()
        over = [a for op in older for a in op.parts[w].reads]
        w.cta.smem.reads_over(w, over, recent)
        w.wgmma_groups = w.wgmma_groups[cut:]
        return None

    return run


def check_access(M, w, form):
    """9.7.15.7.1: a wgmma.fence lies between any access to accumulators and a wgmma of them.

    A warning, because the compiler moves reads of accumulators past the fence, as it may.
    """
    if not w.accessed.keys().isdisjoint(form.d_set):
        ins = next(ins for i, ins in w.accessed.items() if i in form.d_set)
        here = w.cta.program.kernel.instrs[w.frags[0].pc]
        M.warnings.add(
            f"no wgmma.fence between an access to accumulators, {ins.where()}, and {here.where()}"
        )
        w.accessed.clear()


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
                    f"{what} written after the last wgmma.fence, before {where}: "
                    f"{kernel.reg_names[i]}"
                )
                return


TYPES = {
    "f16": ({"f16"}, ("f32", "f16")),
    "bf16": ({"bf16"}, ("f32",)),
    "tf32": ({"tf32"}, ("f32",)),
    "e4m3": ({"e4m3", "e5m2"}, ("f32", "f16")),
    "e5m2": ({"e4m3", "e5m2"}, ("f32", "f16")),
    "s8": ({"s8", "u8"}, ("s32",)),
    "u8": ({"s8", "u8"}, ("s32",)),
}  # A: B, D


class Form:
    """The types and shape of a wgmma.mma_async: 64 x n x k, and its immediate operands."""

    def __init__(self, b, ins):
        p = ins.parts
        shape = next((x for x in p if x.startswith("m64n")), None)
        if shape is None or "sp" in p:
            raise b.unsupported(ins)
        self.n, self.k = (int(x) for x in shape[4:].split("k"))
        self.d, self.a, self.b = p[p.index(shape) + 1 : p.index(shape) + 4]
        others, results = TYPES.get(self.a, (set(), ()))
        self.saturate = "satfinite" in p
        known = self.k * ELEM.get(self.a, 0) == 32 and self.b in others and self.d in results
        if not known or self.saturate and self.d != "s32":
            raise b.unsupported(ins)
        d, a, self.b_desc, self.scale_d, *imm = ins.operands
        self.d_registers = [x.index for x in b.vector(d)]
        self.d_set = frozenset(self.d_registers)
        self.accumulators = self.d, self.n, tuple(self.d_registers)
        self.in_registers = len(b.vector(a)) == 4
        self.a_operands = b.vector(a)
        self.a_registers = [x.index for x in self.a_operands] if self.in_registers else []
        imm = [x.bits for x in imm]
        signs = [] if self.d == "s32" else imm[:2]
        trans = imm[len(signs) :]
        count = 0 if ELEM[self.a] != 2 else 1 if self.in_registers else 2
        if set(signs) - {1, -1} or len(signs) != (0 if self.d == "s32" else 2):
            raise b.unsupported(ins)
        if len(trans) != count or len(self.d_registers) != self.n // (4 if self.d == "f16" else 2):
            raise b.unsupported(ins)
        self.negate_a, self.negate_b = (x == -1 for x in signs or (1, 1))
        self.mn_b = trans[-1] if trans else 0
        self.mn_a = trans[0] if count == 2 else 0

    def gather(self, registers):
        """One warp's 16 x n accumulators."""
        if self.d == "f16":
            x = np.stack(registers).view(np.float16).reshape(self.n // 8, 2, 8, 4, 2)
            return x.transpose(1, 2, 0, 3, 4).reshape(16, self.n).astype(np.float32)
        x = gather_d(registers, self.n)
        return x.view(np.int32).astype(np.int64) if self.d == "s32" else x

    def scatter(self, tile):
        """16 x n sums -> registers."""
        if self.d == "f16":
            x = tile.astype(np.float16).reshape(2, 8, self.n // 8, 4, 2).transpose(2, 0, 1, 3, 4)
            return np.ascontiguousarray(x).view(np.uint32).reshape(self.n // 4, LANES)
        if self.d == "s32":
            tile = tile.astype(np.int64)
            tile = np.clip(tile, -(2**31), 2**31 - 1) if self.saturate else tile
            return scatter_d(tile.astype(np.int32), self.n)
        return scatter_d(tile, self.n)


@instruction("wgmma.mma_async.sync.aligned", "*")
def mma_async(b, ins):
    """D (64 x n) = A B + D * scale-d; A from shared memory or registers."""
    form = Form(b, ins)
    ga = [b.get(x, "u4") for x in form.a_operands] if form.in_registers else None
    gd = None if form.in_registers else b.get(form.a_operands[0], "u8")
    gb, gs = b.get(form.b_desc, "u8"), b.get(form.scale_d, "?")
    n, k, size = form.n, form.k, ELEM[form.a]

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        r, smem = w.r, w.cta.smem
        keep, b_desc = bool(gs(r)[0]), int(gb(r)[0])
        a_desc = None if form.in_registers else int(gd(r)[0])
        check_fence(M, w, form.d_registers if keep else (), "accumulator")
        if w.accessed:
            check_access(M, w, form)
        units = [operand_offsets(b_desc, n, k, size, bool(form.mn_b), False)[1]]
        if form.in_registers:
            check_fence(M, w, form.a_registers, "A operand")
            rows = gather_ab([g(r) for g in ga], size, 16)
        else:
            rows, own = quarter_offsets(a_desc, k, size, bool(form.mn_a), w.index % 4)
            units.append(own)
        for u in units:
            check_extent(smem, u, "wgmma")
            smem.check_async(w, u, "wgmma operand read", write=False)
        reads = [smem.begin("wgmma read", u, ins, w) for u in units]
        op = join(w, (ins.line, a_desc, b_desc, keep))
        op.parts[w] = Part(w, ins, form, rows, reads)
        w.wgmma_open.append(op)
        if len(op.parts) == 4:
            queue = w.cta, w.index // 4  # those of a warpgroup are in order, of two are not
            M.later("mma", lambda: fire(M, smem, op, b_desc, keep), queue=queue, cause=(w, ins))
            M.count("wgmma")

    def fire(M, smem, op, b_desc, keep):
        parts = sorted(op.parts.values(), key=lambda p: p.warp.index)
        rows = np.concatenate([p.rows for p in parts])
        av = to_float(rows if form.in_registers else smem.asynchronous[size][rows], form.a)
        key = b_desc, n, k, form.b, form.mn_b, form.negate_b
        bv = M.cached_operand(smem, key, lambda: read_operand(smem, *key, False))
        out = (-av if form.negate_a else av) @ bv.T
        for i, p in enumerate(parts):
            w, tile = p.warp, out[16 * i : 16 * i + 16]
            if keep:
                tile = tile + form.gather([w.r[x] for x in form.d_registers])
            for x, v in zip(form.d_registers, form.scatter(tile), strict=True):
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
