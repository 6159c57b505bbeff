"""Non-bulk asynchronous copies, global to shared (PTX ISA 9.7.9.25.3).

A cp.async reads and writes at any time between its issue and the completion mechanism that the
thread waits on. It works
in the generic proxy: wgmma and TMA see its data only after a fence.proxy.async that is ordered
    after its completion.
"""

import numpy as np

from .builder import BLOCK, instruction, lanes_of, split_by_cta
from .memory import Fault
from .ptx import PtxError


class Copies:
    """The copies of one cp.async instruction, in flight until `finish`."""

    __slots__ = ("lanes", "done", "dirty", "waiters", "arrivals")

    def __init__(self, lanes):
        self.lanes, self.done, self.dirty, self.waiters, self.arrivals = lanes, False, set(), [], []

    def finish(self, M, dirty):
        self.done, self.dirty = True, dirty
        for w in self.waiters:
            M.wake(w)
        for arrival in self.arrivals:
            arrival.settle(M, self)


class Arrival:
    """A cp.async.mbarrier.arrive that waits for its lanes' earlier copies, then arrives once a
    lane.
    """

    __slots__ = ("mb", "count", "pending", "dirty")

    def __init__(self, mb, count, pending):
        self.mb, self.count, self.pending, self.dirty = mb, count, pending, set()

    def settle(self, M, copies):
        self.dirty |= copies.dirty
        self.pending -= 1
        if self.pending == 0:
            self.mb.release(self.dirty)
            self.mb.arrive(M, self.count)


PREFETCH = "L2::cache_hint L2::64B L2::128B L2::256B"


def cp_async(b, ins):
    """`cp.async.{ca,cg}.shared.global [dst], [src], size{, src-size | ignore-src}{, policy}`."""
    dst, src, size, *rest = ins.operands
    size = size.bits
    level = "cg" if "cg" in ins.parts else "ca"
    if size not in ((16,) if level == "cg" else (4, 8, 16)):
        raise PtxError(f"line {ins.line}: cp.async.{level} of {size} bytes is not legal")
    if "L2::cache_hint" in ins.parts:
        rest = rest[:-1]
    gd, gs = b.shared_address(dst), b.address(src, "u8")
    ignore = count = None
    if rest and getattr(rest[0], "width", 32) == 1:
        ignore = b.get(rest[0], "?")
    elif rest:
        count = b.get(rest[0], "u4")

    def run(M, w, frag, m):
        lanes = np.asarray(lanes_of(m))
        a, g = gd(w.r)[lanes], gs(w.r)[lanes]
        n = np.full(len(lanes), size) if count is None else count(w.r)[lanes].astype(np.int64)
        if ignore is not None:
            n = np.where(ignore(w.r)[lanes], 0, size)
        if (n > size).any():
            raise Fault(f"cp.async: src-size {int(n.max())} is larger than cp-size {size}")
        if (a % np.uint32(size)).any() or (g[n > 0] % np.uint64(size)).any():
            raise Fault(f"cp.async: address misaligned for {size} bytes")
        parts = split_by_cta(w, a)
        if len(parts) != 1 or parts[0][0] is not w.cta:
            raise Fault("cp.async into another CTA's shared memory")
        off = parts[0][2].astype(np.int64)
        smem = w.cta.smem
        units = np.unique(off >> 4)
        if (
            smem.check
            and smem.inflight
            and (smem.writing[units].any() or smem.reading[units].any())
        ):
            raise smem.conflict("cp.async write", units, ("TMA write", "read"))
        words = ((off >> 2)[:, None] + np.arange(size // 4)).reshape(-1)
        if smem.check and smem.copies and smem.copying[words].any():
            raise smem.conflict("cp.async write", words >> 2, ("cp.async",))
        locate_live(
            M.memory, g, n
        )  # reports an invalid source at the instruction, not when it lands
        copies = Copies(frozenset(lanes.tolist()))
        w.copies = [c for c in w.copies if not c.done]
        w.copies.append(copies)
        if len(w.copy_open) > 64:  # a kernel that waits by mbarrier never commits a group
            w.copy_open = [
                c for c in w.copy_open if not c.done or any(not d.flushed for d in c.dirty)
            ]
        w.copy_open.append(copies)
        access = smem.begin("cp.async", words, ins, w)

        def land():
            data = np.zeros((len(off), size), np.uint8)
            for rows, buffer, at, k in locate_live(M.memory, g, n):
                data[rows, :k] = buffer[at[:, None] + np.arange(k)]
            index = off[:, None] + np.arange(size)
            smem.generic[1][index] = data
            smem.end_access(access)
            copies.finish(M, {smem.note_store(np.sort(off) // size, size, (w, ins))})

        M.later("cp_async", land)
        M.count("cp.async")

    return run


def locate_live(memory, addrs, n):
    """[(rows, buffer, offsets, bytes)] of the lanes that read anything, by how many bytes they
    read.
    """
    return [
        (np.flatnonzero(n == k)[sel], buffer, at, int(k))
        for k in np.unique(n[n > 0])
        for sel, buffer, at in memory.locate(addrs[n == k], int(k), "cp.async read", align=1)
    ]


for _level in ("ca", "cg"):
    instruction(f"cp.async.{_level}.shared.global", PREFETCH)(cp_async)
    instruction(f"cp.async.{_level}.shared::cta.global", PREFETCH)(cp_async)


@instruction("cp.async.commit_group")
def commit_group(b, ins):
    def run(M, w, frag, m):
        w.copy_groups.append(w.copy_open)
        w.copy_open = []

    return run


def wait_for(w, groups):
    """BLOCK while any copy of the groups is in flight; else orders the warp after them."""
    pending = [c for g in groups for c in g if not c.done]
    if not pending:
        for g in groups:
            for c in g:
                w.dirty |= {d for d in c.dirty if not d.flushed}
        return None
    w.why = f"{len(pending)} cp.async in flight"
    pending[0].waiters.append(w)
    return BLOCK


@instruction("cp.async.wait_group")
def wait_group(b, ins):
    n = ins.operands[0].bits

    def run(M, w, frag, m):
        older = w.copy_groups[: len(w.copy_groups) - n] if n else w.copy_groups
        out = wait_for(w, older)
        if out is None:
            w.copy_groups = w.copy_groups[len(older) :]
        return out

    return run


@instruction("cp.async.wait_all")
def wait_all(b, ins):
    def run(M, w, frag, m):
        out = wait_for(w, [*w.copy_groups, w.copy_open])
        if out is None:
            w.copy_groups, w.copy_open = [], []
        return out

    return run


@instruction("cp.async.mbarrier.arrive", "noinc shared shared::cta")
def mbarrier_arrive(b, ins):
    """9.7.13.15.17: arrives when the thread's earlier copies are complete; without .noinc the count
    is raised first.
    """
    addr = b.shared_address(ins.operands[0])
    noinc = "noinc" in ins.parts

    def run(M, w, frag, m):
        a = addr(w.r)
        lanes = list(lanes_of(m))
        w.copies = [c for c in w.copies if not c.done]
        for where in np.unique(a[lanes]).tolist():
            own = frozenset(i for i in lanes if int(a[i]) == where)
            mb = w.cta.cluster.mbarrier(w, int(where))
            if mb.cta is not w.cta:
                raise Fault("cp.async.mbarrier.arrive on another CTA's mbarrier")
            if not noinc:
                mb.pending += len(own)
            waiting = [c for c in w.copies if c.lanes & own]
            landed = [
                c for g in [*w.copy_groups, w.copy_open] for c in g if c.done and c.lanes & own
            ]
            arrival = Arrival(mb, len(own), len(waiting) + 1)
            arrival.dirty = {d for c in landed for d in c.dirty if not d.flushed}
            for c in waiting:
                c.arrivals.append(arrival)
            arrival.settle(M, Copies(own))
        M.progress = M.tick

    return run
