"""mbarrier instructions (PTX ISA 9.7.13.15)."""

import numpy as np

from .builder import SOFT, instruction, lanes_of, set_reg
from .memory import Fault
from .ordering import before_writes
from .ptx import Mem, PtxError, Sink
from .races import CLUSTER, CTA, Knowledge, Release, live, scope_of
from .sync import MBarrier
from .values import LANES, only

MODIFIERS = "shared shared::cta shared::cluster release relaxed acquire cta cluster"


def operands(b, ins):
    """(state destination or None, address function, value functions) of an mbarrier instruction."""
    i = next(n for n, o in enumerate(ins.operands) if isinstance(o, Mem))
    state = ins.operands[0] if i else None
    return (
        state,
        b.shared_address(ins.operands[i]),
        [b.get(o, "u4") for o in ins.operands[i + 1 : i + 2]],
    )


@instruction("mbarrier.init", MODIFIERS)
def init(b, ins):
    _, addr, (count,) = operands(b, ins)

    def run(M, w, frag, m):
        a, n = addr(w.r), count(w.r)
        for i in lanes_of(m):
            cta, off = w.cta.cluster.resolve(int(a[i]))
            if off % 8:
                raise Fault(f"mbarrier at {off:#x} is not 8-byte aligned")
            if cta is not w.cta:
                raise Fault("mbarrier.init in another CTA's shared memory")
            if off in cta.mbars:
                raise Fault(f"mbarrier.init of a valid mbarrier at {off:#x}: mbarrier.inval first")
            cta.smem.begin_mbarrier(w, ins, off)
            cta.mbars[off] = MBarrier(cta, off, int(n[i]), w, i)
        M.progress = M.tick

    return run


@instruction("mbarrier.inval", MODIFIERS)
def inval(b, ins):
    _, addr, _ = operands(b, ins)

    def run(M, w, frag, m):
        for x in set(addr(w.r)[list(lanes_of(m))].tolist()):
            cta, off = w.cta.cluster.resolve(x)
            mb = cta.mbars.pop(off, None)
            if mb is None:
                raise Fault(f"mbarrier.inval of cta{cta.rank}+{off:#x}, which holds no mbarrier")
            known = before_writes(w.clock)
            for user, time in mb.users.items():
                if user != w.id and time > known[user]:
                    raise Fault(
                        f"race: mbarrier.inval of {mb}, which nothing orders after its use by warp "
                        f"{user} of the cluster"
                    )
            cta.smem.end_mbarrier(w, off)

    return run


def set_state(w, state, mb, lane, m):
    """The opaque state token: here the number of completed phases of the barrier."""
    if state is not None and not isinstance(state, Sink):
        value = np.full(LANES, mb.completed, np.uint64)
        set_reg(w, state, value, only(lane))


@instruction("mbarrier.arrive", MODIFIERS + " expect_tx noComplete")
def arrive(b, ins):
    return arrival(b, ins, lambda mb, M, n: mb.arrive(M, n))


@instruction("mbarrier.arrive_drop", MODIFIERS + " expect_tx noComplete")
def arrive_drop(b, ins):
    return arrival(b, ins, lambda mb, M, n: mb.drop(M, n))


def arrival(b, ins, act):
    state, addr, rest = operands(b, ins)
    expect, relaxed = "expect_tx" in ins.parts, "relaxed" in ins.parts
    scope = scope_of(ins.parts, CTA)

    def run(M, w, frag, m):
        a, n = addr(w.r), rest[0](w.r) if rest else None
        for i in lanes_of(m):
            mb = w.cta.cluster.mbarrier(w, int(a[i]))
            (w.release_fenced if relaxed else w.release_into)(mb, scope)
            set_state(w, state, mb, i, m)
            if expect:
                mb.expect_tx(int(n[i]))
                act(mb, M, 1)
            else:
                act(mb, M, 1 if n is None else int(n[i]))

    return run


@instruction("mbarrier.expect_tx", MODIFIERS)
def expect_tx(b, ins):
    _, addr, (count,) = operands(b, ins)

    def run(M, w, frag, m):
        a, n = addr(w.r), count(w.r)
        for i in lanes_of(m):
            w.cta.cluster.mbarrier(w, int(a[i])).add_tx(M, int(n[i]))

    return run


@instruction("mbarrier.complete_tx", MODIFIERS)
def complete_tx(b, ins):
    _, addr, (count,) = operands(b, ins)

    def run(M, w, frag, m):
        a, n = addr(w.r), count(w.r)
        for i in lanes_of(m):
            w.cta.cluster.mbarrier(w, int(a[i])).add_tx(M, -int(n[i]))

    return run


def waiting(b, ins):
    """try_wait and test_wait: true once the phase (or the state's phase) has completed."""
    pred, mem, which = ins.operands[:3]
    parity = "parity" in ins.parts
    addr, phase = b.shared_address(mem), b.get(which, "u4" if parity else "u8")
    if not isinstance(mem, Mem):
        raise PtxError(f"line {ins.line}: unsupported instruction {ins.text}")
    sleeps, relaxed = ins.parts[1] == "try_wait", "relaxed" in ins.parts
    scope = scope_of(ins.parts, CTA)

    def run(M, w, frag, m):
        a, p = addr(w.r), phase(w.r)
        done, seen = np.zeros(LANES, bool), {}
        for i in lanes_of(m):
            key = (int(a[i]), int(p[i]) & 1 if parity else int(p[i]))
            if key not in seen:
                seen[key] = test(w, *key, parity, relaxed, scope)
            done[i] = seen[key]
        set_reg(w, pred, done, m)
        if all(seen.values()):
            w.failed = 0
            return None
        # the first failure returns at once (a program may only be peeking), the next sleeps until
        # the phase completes
        w.failed += 1
        return SOFT if sleeps and w.failed > 1 else None

    return run


def test(w, addr, phase, parity, relaxed, scope):
    """Whether the wait is over; if so, the warp is ordered after the phase's releases.

    relaxed: not before its next fence.
    """
    mb = w.cta.cluster.mbarrier(w, addr)
    if mb.cta is not w.cta:
        raise Fault("wait on another CTA's mbarrier")
    ok = mb.phase != phase if parity else mb.completed > phase
    if not ok:
        mb.waiters.append(w)
        w.why = (mb, phase)
        return False
    (hear if relaxed else acquire)(w, mb, scope)
    return True


def acquire(w, mb, scope):
    """A wait is over: what it acquires. Asynchronous copies are over for waits of either scope."""
    for released in (mb.near, mb.far if scope == CLUSTER else None):
        if released:
            w.acquire(released.seen)
            if released.visible:
                w.hear_stores(live(released.visible))
            if released.tmem.ndim:
                heard = w.tmem_clock if w.tmem_heard is None else w.tmem_heard
                w.tmem_heard = np.maximum(heard, released.tmem)
    w.clock[mb.id] = max(int(w.clock[mb.id]), mb.completed + 1)


def hear(w, mb, scope):
    """The same for a relaxed wait, after which a fence acquires."""
    serial = w.cta.cluster.serial
    seen = mb.near.seen.copy()
    seen[mb.id] = max(int(seen[mb.id]), mb.completed + 1)
    known = Knowledge({serial: seen}, dirty=set(mb.near.visible))
    w.heard.append(Release(CLUSTER, serial, w.cta.rank, known))
    if mb.far and scope == CLUSTER:
        known = Knowledge({serial: mb.far.seen.copy()}, dirty=set(mb.far.visible))
        w.heard.append(Release(CLUSTER, serial, None, known))  # by no CTA that scope .cta includes


for _name in ("try_wait", "test_wait"):
    instruction(f"mbarrier.{_name}", MODIFIERS + " parity")(waiting)


@instruction("mbarrier.pending_count", MODIFIERS)
def pending_count(b, ins):
    raise b.unsupported(ins)
