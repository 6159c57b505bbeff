"""Bulk asynchronous copies of plain bytes, and the groups of bulk stores (PTX ISA 9.7.9.25.4).

A copy to shared memory completes on an mbarrier some time after its issue; a copy to global memory
first reads shared memory, then writes, each some time later, and completes its bulk group.
"""

import functools

import numpy as np

from .builder import BLOCK, instruction, lanes_of
from .memory import Fault
from .races import GPU, WEAK
from .values import UINT, bf16_bits, bf16_float

REDUCTIONS = ("add", "min", "max", "inc", "dec", "and", "or", "xor")
# what `cp.reduce.async.bulk` allows by type, to global memory and to shared memory
TO_GLOBAL = {
    "s32": "add min max", "u32": "add min max inc dec", "s64": "min max", "u64": "add min max",
    "b32": "and or xor", "b64": "and or xor", "f16": "add min max", "bf16": "add min max",
    "f32": "add", "f64": "add",
}  # fmt: skip
TO_SHARED = {
    "s32": "add min max", "u32": "add min max inc dec", "s64": "add", "u64": "add",
    "b32": "and or xor",
}  # fmt: skip


class BulkStore:
    """A bulk copy out of shared memory: how far it is, and who waits for it.

    `lanes` issued it, and `groups` says how many groups each had committed; it is over for others
    once all of them have waited, as `reading` and `writing` (lanes that have not) say. `event`: its
    write, in `races`.
    """

    __slots__ = (
        "access", "event", "lanes", "groups", "reading", "writing", "read", "written", "waiters",
    )  # fmt: skip

    def __init__(self, access, event, lanes, commits):
        self.access, self.event, self.lanes, self.groups = access, event, lanes, commits[lanes]
        self.reading, self.writing = (np.ones(len(lanes), bool) for _ in range(2))
        self.read, self.written, self.waiters = False, False, []

    def reached(self, M, state):
        setattr(self, state, True)
        for w in self.waiters:
            M.wake(w)
        self.waiters.clear()


@instruction("cp.async.bulk.commit_group")
def commit_group(b, ins):
    """Groups are a thread's own: each lane commits what it has issued itself."""

    def run(M, w, frag, m):
        w.bulk_commits += 1 if m is None else m

    return run


@instruction("cp.async.bulk.wait_group", "read")
def wait_group(b, ins):
    """All groups of a thread but its n most recent must be complete, in whatever order."""
    n, state = ins.operands[0].bits, "read" if "read" in ins.parts else "written"

    def run(M, w, frag, m):
        last = w.bulk_commits - n if m is None else np.where(m, w.bulk_commits - n, 0)
        older = [(op, op.groups < last[op.lanes]) for op in w.bulk_stores]
        pending = [op for op, lanes in older if lanes.any() and not getattr(op, state)]
        if pending:
            w.why = f"{len(pending)} bulk stores not {state} yet"
            for op in pending:
                op.waiters.append(w)
            return BLOCK
        finished = []
        for op, lanes in older:
            finished += [op.access] if op.reading.any() and lanes[op.reading].all() else []
            op.reading &= ~lanes
            if state == "written":
                op.writing &= ~lanes
                if op.event is not None and not op.writing.any():
                    op.event.time = int(w.clock[w.id])
        reading = [op.access for op in w.bulk_stores if op.reading.any()]
        w.cta.smem.reads_over(w, finished, reading)
        # those that were waited for as read only may still have to be waited for as written
        w.bulk_stores = [op for op in w.bulk_stores if op.writing.any()]
        return None

    return run


@instruction("cp.async.bulk.prefetch", "*")
def prefetch(b, ins):
    return lambda M, w, frag, m: None


def stored(M, w, lanes, smem, units, ins, event, write):
    """Schedules the halves of a bulk store: `write(bytes)` runs some time after the read.

    lanes: that issued it, numbers in an array. event: its write to global memory, as `races`
    entered it, or None.
    """
    smem.check_async(w, units, "bulk store", write=False)
    access = smem.begin("bulk store read", units, ins, w)
    op = BulkStore(access, event, lanes, w.bulk_commits)
    w.bulk_stores.append(op)

    def read():
        data = smem.asynchronous[16][units].copy()
        smem.end_access(access)
        op.reached(M, "read")

        def finish():
            write(data)
            op.reached(M, "written")

        M.later("tma_store", finish, cause=(w, ins))

    M.later("tma_store", read, cause=(w, ins))
    M.count("tma_store")


def enter_write(M, w, ins, region, off, nbytes, what, strength=WEAK):
    """Enters a write of the async proxy to global memory, in flight until its issuer waits."""
    order = M.memory.order
    if not order.check or region.track is None:
        return None
    number = order.new(w, ins, what, w.id, strength=strength, proxy="async")
    region.track.write(w, ins, off, nbytes, what, strength, number)
    return order.events[number]


def enter_read(M, w, ins, region, off, nbytes, what, bars):
    """Enters a read of global memory that is over once each of the mbarriers has counted it."""
    order = M.memory.order
    if not order.check or region.track is None:
        return
    for mb in bars:
        number = order.new(w, ins, what, mb.id, mb.now, proxy="async")
        region.track.read(w, ins, off, nbytes, what, number=number)


def combine(old, new, dtype, op):
    """`op` of raw element bits, as the reduction forms do it."""
    if op in ("and", "or", "xor"):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[op](old, new)
    one = old.dtype.type(1)
    if op == "inc":
        return np.where(old >= new, old.dtype.type(0), old + one)
    if op == "dec":
        return np.where((old == 0) | (old > new), new, old - one)
    f = {"add": np.add, "min": np.fmin, "max": np.fmax}[op]
    if dtype == "bf16":
        return bf16_bits(f(bf16_float(old), bf16_float(new)))
    types = {"f32": np.float32, "f32_ftz": np.float32, "f16": np.float16, "f64": np.float64}
    types |= {"s32": np.int32, "s64": np.int64}
    typ = types.get(dtype, old.dtype)
    return f(old.view(typ), new.view(typ)).view(old.dtype)


# ---- copies of bytes ----
BULK = (
    "shared shared::cta shared::cluster global mbarrier::complete_tx::bytes multicast::cluster "
    "L2::cache_hint bulk_group cp_mask ignore_oob noftz add min max inc dec and or xor"
)


def ranks_of(mask):
    return [x for x in range(16) if (mask >> x) & 1]


def bulk_checks(what, *numbers):
    if any(n % 16 for n in numbers):
        listed = ", ".join(hex(n) for n in numbers)
        raise Fault(f"{what}: addresses and size must be multiples of 16: {listed}")


def spaces_of(ins):
    """("global" or "shared", the same): destination and source."""
    return [p.split("::")[0] for p in ins.parts[3:] if p.split("::")[0] in ("shared", "global")]


def one(off):
    return np.array([off], np.int64)


@instruction("cp.async.bulk.shared::cluster", BULK)
@instruction("cp.async.bulk.shared::cta", BULK)
@instruction("cp.async.bulk.shared", BULK)
@instruction("cp.async.bulk.global", BULK)
def bulk_copy(b, ins):
    """`cp.async.bulk` without a tensor map, in its directions."""
    if spaces_of(ins) == ["global", "shared"]:
        return bulk_out(b, ins, None)
    return bulk_in(b, ins, None)


@instruction("cp.reduce.async.bulk.shared::cluster", BULK)
@instruction("cp.reduce.async.bulk.shared::cta", BULK)
@instruction("cp.reduce.async.bulk.global", BULK)
def bulk_reduce(b, ins):
    op = next(p for p in ins.parts if p in REDUCTIONS)
    dtype, _, _ = b.type_of(ins)
    to_global = spaces_of(ins)[0] == "global"
    if op not in (TO_GLOBAL if to_global else TO_SHARED).get(dtype, "").split():
        raise b.unsupported(ins)
    return bulk_out(b, ins, op) if to_global else bulk_in(b, ins, op)


def bulk_in(b, ins, op):
    """To the shared memory of one CTA or several, from global memory or another CTA's."""
    if "ignore_oob" in ins.parts or "cp_mask" in ins.parts:
        raise b.unsupported(ins)
    dst, src, size, bar, *rest = ins.operands
    gd, gn, gb = b.shared_address(dst), b.get(size, "u4"), b.shared_address(bar)
    from_shared = spaces_of(ins)[1] == "shared"
    gs = b.shared_address(src) if from_shared else b.address(src, "u8")
    mask = b.get(rest[0], "u4") if "multicast::cluster" in ins.parts else None
    dtype, _, elem = b.type_of(ins) if op else ("u8", None, 1)
    what = "bulk reduction" if op else "bulk copy"

    def copy(M, w, frag, m):
        for i in lanes_of(m):
            d, s, n, bar_at = (int(g(w.r)[i]) for g in (gd, gs, gn, gb))
            bulk_checks("cp.async.bulk", d, s, n)
            if not n:
                continue
            jobs = []
            units = np.arange((d & 0xFFFFFF) >> 4, ((d & 0xFFFFFF) + n) >> 4)
            for x in [d >> 24] if mask is None else ranks_of(int(mask(w.r)[i])):
                cta, _ = w.cta.cluster.resolve(x << 24 | d & 0xFFFFFF)
                w.cta.cluster.resolve(x << 24 | (d & 0xFFFFFF) + n - 1)
                at = bar_at if mask is None else x << 24 | bar_at & 0xFFFFFF
                mb = w.cta.cluster.mbarrier(w, at, remote=True)
                if mb.cta is not cta and from_shared:
                    raise Fault(f"{what}: destination and mbarrier lie in different CTAs")
                cta.smem.check_async(w, units, what, write=True)
                jobs.append((cta.smem, cta.smem.begin("TMA write", units, ins, w), mb))
            if from_shared:
                read = from_cta(w, ins, s, n)
            else:
                region = M.memory.region(s, "bulk copy")
                data = M.memory.read(s, n)
                bars = [mb for _, _, mb in jobs]
                enter_read(M, w, ins, region, one(s - region.base), n, what, bars)
                read = data.copy

            def reduced(smem, data, units=units):
                old = smem.asynchronous[16][units].reshape(-1).view(UINT[elem])
                flat = data.reshape(-1).view(UINT[elem])
                return combine(old, flat, dtype, op).view(np.uint8).reshape(-1, 16)

            land(M, w, ins, jobs, units, read, n, reduced if op else None)
            M.count("bulk_copy")

    return copy


def land(M, w, ins, jobs, units, read, n, reduced=None):
    """Schedules the writes of a copy of n bytes to shared memory, in each CTA at a time of its own.

    jobs: (SharedMemory, Access, MBarrier) of each; read: reads the source, once, as the first one
    lands; reduced: what to write instead, a function of (SharedMemory, bytes).
    """
    data = functools.cache(lambda: read().reshape(-1, 16))

    def arrive(smem, access, mb):
        smem.write_async(units, reduced(smem, data()) if reduced else data())
        smem.end_access(access)
        smem.written_by(access, mb)
        mb.add_tx(M, -n)

    for job in jobs:
        M.later("tma_load", functools.partial(arrive, *job), cause=(w, ins))


def from_cta(w, ins, addr, n):
    """A function that reads `n` bytes of shared memory, once, when the copy comes to it."""
    cta, off = w.cta.cluster.resolve(addr)
    if cta is not w.cta:
        raise Fault("bulk copy: the source must lie in the issuing CTA's shared memory")
    w.cta.cluster.resolve(addr + n - 1)
    units = np.arange(off >> 4, (off + n) >> 4)
    cta.smem.check_async(w, units, "bulk copy", write=False)
    access = cta.smem.begin("bulk copy read", units, ins, w)

    def read():
        data = cta.smem.asynchronous[16][units].copy()
        cta.smem.end_access(access)
        return data

    return read


def bulk_out(b, ins, op):
    """To global memory; with `.cp_mask`, of every 16 bytes those whose bit is set."""
    dst, src, size, *rest = ins.operands
    gd, gs, gn = b.address(dst, "u8"), b.shared_address(src), b.get(size, "u4")
    mask = b.get(rest[-1], "u4") if "cp_mask" in ins.parts else None
    if mask and op:
        raise b.unsupported(ins)
    dtype, _, elem = b.type_of(ins) if op else ("u8", None, 1)
    strength = GPU if op else WEAK  # a reduction is relaxed, of scope gpu
    what = "bulk reduction" if op else "bulk store"

    def copy(M, w, frag, m):
        for i in lanes_of(m):
            d, s, n = (int(g(w.r)[i]) for g in (gd, gs, gn))
            bulk_checks("cp.async.bulk", d, s, n)
            if not n:
                continue
            target, region = M.memory.read(d, n), M.memory.region(d)
            cta, off = w.cta.cluster.resolve(s)
            w.cta.cluster.resolve(s + n - 1)
            at = np.arange(n)
            if mask is not None:
                chosen = (int(mask(w.r)[i]) >> (at % 16)) & 1 == 1
                at = at[chosen]
                event = enter_write(M, w, ins, region, at + (d - region.base), 1, what)
            else:
                event = enter_write(M, w, ins, region, one(d - region.base), n, what, strength)

            def write(data, target=target, at=at):
                if op:
                    old = target.view(UINT[elem])
                    old[:] = combine(old, data.reshape(-1).view(UINT[elem]), dtype, op)
                else:
                    target[at] = data.reshape(-1)[at]

            units = np.arange(off >> 4, (off + n) >> 4)
            stored(M, w, one(i), cta.smem, units, ins, event, write)

    return copy
