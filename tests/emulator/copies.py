"""Non-bulk asynchronous copies, global to shared (PTX ISA 9.7.9.25.3).

A cp.async reads and writes at any time between its issue and the completion mechanism that the
thread waits on. It works in the generic proxy: wgmma and TMA see its data only after a
fence.proxy.async that is ordered after its completion.
"""

import numpy as np

from .builder import BLOCK, instruction, lanes_of, split_by_cta
from .memory import Fault
from .ptx import PtxError
from .races import live
from .values import LANES


class Copies:
    """The copies of one cp.async instruction, in flight until `finish`: a thread's are its own.

    words: of `smem`, by lane (ids: which); groups: how many groups each lane of the warp had
    committed. left: lanes whose copies neither an mbarrier's phase nor a wait of the lane covers,
    which say when others may rely on them.
    """

    __slots__ = (
        "smem", "ids", "words", "groups", "left", "done", "dirty", "waiters", "arrivals", "event",
    )  # fmt: skip

    def __init__(self, smem, ids, words, groups):
        self.smem, self.ids, self.words, self.groups = smem, ids, words, groups
        self.left = np.zeros(LANES, bool)
        self.left[ids] = True
        self.done, self.dirty, self.waiters, self.arrivals = False, set(), [], []

    def finish(self, M, dirty):
        self.done, self.dirty = True, dirty
        for w in self.waiters:
            M.wake(w)
        for arrival in self.arrivals:
            arrival.settle(M)

    def take(self, lanes):
        """Those of the lanes that are left, which are no longer."""
        mine = self.left & lanes
        self.left = self.left & ~lanes
        return mine

    def rely(self, lanes, component, time):
        """From `time` of the clock's `component` on, what these lanes copied may be used."""
        if self.smem.check:
            self.smem.history.end_copy(self.words[lanes[self.ids]].reshape(-1), component, time)
        if self.event is not None and not self.left.any():
            self.event.component, self.event.time = component, int(time)


class Arrival:
    """A cp.async.mbarrier.arrive of some lanes: it waits for all their earlier copies, then arrives
    once a lane. It says when those that nothing covered before may be used.
    """

    __slots__ = ("mb", "count", "copies", "pending")

    def __init__(self, mb, lanes, earlier):
        self.mb, self.count = mb, int(lanes.sum())
        self.pending = 1
        for c in earlier:
            if not c.done and lanes[c.ids].any():
                self.pending += 1
                c.arrivals.append(self)
        taken = [(c, c.take(lanes)) for c in earlier]
        self.copies = [(c, mine) for c, mine in taken if mine.any()]

    def settle(self, M):
        self.pending -= 1
        if self.pending:
            return
        for c, lanes in self.copies:
            c.rely(lanes, self.mb.id, self.mb.now)
        self.mb.near.add_stores({d for c, _ in self.copies for d in c.dirty})
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
        sources = locate_live(M.memory, g, n)
        off = parts[0][2].astype(np.int64)
        words = (off >> 2)[:, None] + np.arange(size // 4)
        copies = Copies(smem, lanes, words, w.copy_commits)
        copies.event = read_by_copy(M.memory.order, w, ins, sources)
        w.copies.append(copies)
        access = smem.begin("cp.async", words.reshape(-1), ins, w)

        def land():
            data = np.zeros((len(off), size), np.uint8)
            for rows, region, at, k in sources:
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


def read_by_copy(order, w, ins, sources):
    """Enters the reads of a cp.async, in flight until `rely`; returns their event."""
    if not order.check:
        return None
    number = order.new(w, ins, "cp.async read", w.id)
    for _, region, at, k in sources:
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


# Groups are a thread's own: each lane commits what it has issued itself (9.7.9.25.3.2-3).
@instruction("cp.async.commit_group")
def commit_group(b, ins):
    return lambda M, w, frag, m: commit(w, m)


def commit(w, m):
    w.copy_commits = w.copy_commits + (1 if m is None else m)


def wait_for(w, lanes, last):
    """BLOCK while copies of the lanes are in flight, of each lane those in its groups before number
    `last`; else orders the warp after them.
    """
    older = [(c, (c.groups < last) & lanes) for c in w.copies]
    pending = [c for c, mine in older if not c.done and mine[c.ids].any()]
    if pending:
        w.why = f"{len(pending)} cp.async in flight"
        pending[0].waiters.append(w)
        return BLOCK
    for c, mine in older:
        mine = c.take(mine)
        if mine.any():
            for d in live(c.dirty):
                w.stores(d, mine)
            c.rely(mine, w.id, w.clock[w.id])
    w.copies = still_needed(w.copies)
    return None


def still_needed(copies):
    return [c for c in copies if not c.done or c.left.any()]


def wait_group(b, ins):
    n = ins.operands[0].bits if ins.operands else None  # None: wait_all, which commits before

    def run(M, w, frag, m):
        lanes = np.ones(LANES, bool) if m is None else m
        out = wait_for(w, lanes, w.copy_commits + 1 if n is None else w.copy_commits - n)
        if out is None and n is None:
            commit(w, m)
        return out

    return run


instruction("cp.async.wait_group")(wait_group)
instruction("cp.async.wait_all")(wait_group)


@instruction("cp.async.mbarrier.arrive", "noinc shared shared::cta")
def mbarrier_arrive(b, ins):
    """9.7.13.15.15: arrives once the thread's copies are complete; no .noinc: count raised."""
    addr = b.shared_address(ins.operands[0])
    noinc = "noinc" in ins.parts

    def run(M, w, frag, m):
        a = addr(w.r)
        lanes = np.ones(LANES, bool) if m is None else m
        for where in np.unique(a[lanes]).tolist():
            own = lanes & (a == where)
            mb = w.cta.cluster.mbarrier(w, int(where))
            if mb.cta is not w.cta:
                raise Fault("cp.async.mbarrier.arrive on another CTA's mbarrier")
            if not noinc:
                mb.pending += int(own.sum())
            Arrival(mb, own, w.copies).settle(M)
        w.copies = still_needed(w.copies)
        M.progress = M.tick

    return run
