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
    """The copies of one cp.async instruction: `words` of `smem`, in flight until `finish`.

    `covered`: an mbarrier arrival or a wait has taken charge of saying when others may rely on
    them.
    """

    __slots__ = (
        "lanes", "smem", "words", "done", "covered", "dirty", "waiters", "arrivals", "event",
    )  # fmt: skip

    def __init__(self, lanes, smem, words):
        self.lanes, self.smem, self.words = lanes, smem, words
        self.done, self.covered = False, False
        self.dirty, self.waiters, self.arrivals = set(), [], []

    def finish(self, M, dirty):
        self.done, self.dirty = True, dirty
        for w in self.waiters:
            M.wake(w)
        for arrival in self.arrivals:
            arrival.settle(M)

    def rely(self, component, time):
        """From `time` of the clock's `component` on, what was copied may be used."""
        if self.smem.check:
            self.smem.history.end_copy(self.words, component, time)
        if self.event is not None:
            self.event.component, self.event.time = component, int(time)


class Arrival:
    """A cp.async.mbarrier.arrive: it waits for the earlier `copies`, then arrives once a lane."""

    __slots__ = ("mb", "count", "copies", "pending")

    def __init__(self, mb, count, copies):
        self.mb, self.count, self.copies = mb, count, copies
        self.pending = 1 + sum(not c.done for c in copies)
        for c in copies:
            c.covered = True
            if not c.done:
                c.arrivals.append(self)

    def settle(self, M):
        self.pending -= 1
        if self.pending:
            return
        for c in self.copies:
            c.rely(self.mb.id, self.mb.now)
        self.mb.near.add_stores({d for c in self.copies for d in c.dirty})
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
        smem = w.cta.smem
        smem.check_generic(w, ins, parts[0][2], size, write=True, what="cp.async write")
        live = locate_live(M.memory, g, n)
        off = parts[0][2].astype(np.int64)
        words = ((off >> 2)[:, None] + np.arange(size // 4)).reshape(-1)
        copies = Copies(frozenset(lanes.tolist()), smem, words)
        copies.event = read_by_copy(M.memory.order, w, ins, live)
        w.copies = [c for c in w.copies if not c.covered]
        w.copies.append(copies)
        if len(w.copy_open) > 64:  # a kernel that waits by mbarrier never commits a group
            w.copy_open = [c for c in w.copy_open if not (c.done and c.covered)]
        w.copy_open.append(copies)
        access = smem.begin("cp.async", words, ins, w)

        def land():
            data = np.zeros((len(off), size), np.uint8)
            for rows, region, at, k in live:
                data[rows, :k] = region.data[at[:, None] + np.arange(k)]
            index = off[:, None] + np.arange(size)
            smem.generic[1][index] = data
            smem.end_access(access)
            if M.copy_fence:
                copies.finish(M, {smem.note_store(np.sort(off) // size, size, (w, ins))})
            else:
                smem.asynchronous[1][index] = data
                smem.clean(off // size, size)
                copies.finish(M, set())

        M.later("cp_async", land)
        M.count("cp.async")

    return run


def read_by_copy(order, w, ins, live):
    """Enters the reads of a cp.async, in flight until `rely`; returns their event."""
    if not order.check:
        return None
    number = order.new(w, ins, "cp.async read", w.id)
    for _, region, at, k in live:
        if region.track:
            region.track.read(w, ins, at, k, "cp.async read", number=number)
    return order.events[number]


def locate_live(memory, addrs, n):
    """[(rows, Region, offsets, bytes)] of the lanes that read anything."""
    return [
        (np.flatnonzero(n == k)[sel], region, at, int(k))
        for k in np.unique(n[n > 0])
        for sel, region, at in memory.locate(addrs[n == k], int(k), "cp.async read", align=1)
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
                if not c.covered:
                    c.covered = True
                    c.rely(w.id, w.clock[w.id])
        return None
    w.why = f"{len(pending)} cp.async in flight"
    pending[0].waiters.append(w)
    return BLOCK


@instruction("cp.async.wait_group")
def wait_group(b, ins):
    n = ins.operands[0].bits

    def run(M, w, frag, m):
        older = w.copy_groups[: max(len(w.copy_groups) - n, 0)]
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
    """9.7.13.15.17: arrives once the thread's copies are complete; no .noinc: count raised."""
    addr = b.shared_address(ins.operands[0])
    noinc = "noinc" in ins.parts

    def run(M, w, frag, m):
        a = addr(w.r)
        lanes = list(lanes_of(m))
        for where in np.unique(a[lanes]).tolist():
            own = frozenset(i for i in lanes if int(a[i]) == where)
            mb = w.cta.cluster.mbarrier(w, int(where))
            if mb.cta is not w.cta:
                raise Fault("cp.async.mbarrier.arrive on another CTA's mbarrier")
            if not noinc:
                mb.pending += len(own)
            earlier = [c for c in w.copies if not c.covered and c.lanes & own]
            Arrival(mb, len(own), earlier).settle(M)
        M.progress = M.tick

    return run
