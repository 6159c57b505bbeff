"""Synchronisation objects: mbarriers, named barriers, cluster barriers (PTX ISA 9.7.13)."""

import numpy as np

from .memory import Fault
from .ordering import CLUSTER, new_clock, pass_narrowly
from .races import live

TX_RANGE = (1 << 20) - 1


class Released:
    """What arrivals of this phase release (`clock`, `dirty`) and those of completed ones did."""

    def __init__(self):
        self.clock, self.seen, self.dirty, self.visible = new_clock(), new_clock(), set(), set()
        self.tmem = np.int32(0)  # a clock for tcgen05 only: relaxed arrivals after its fence

    def add(self, clock, dirty):
        np.maximum(self.clock, clock, out=self.clock)
        self.add_stores(dirty)

    def add_stores(self, dirty):
        if dirty:
            self.dirty |= live(dirty)

    def complete(self):
        np.maximum(self.seen, self.clock, out=self.seen)
        if self.dirty or self.visible:
            self.visible, self.dirty = live(self.visible | self.dirty), set()


class MBarrier:
    """An mbarrier (9.7.13.15): a phase ends when no arrivals and no bytes are pending.

    Only its own CTA waits on it (9.7.13.15.8). Arrivals and waits are of scope .cta unless they say
    more (9.7.13.15.13, 16): `near` is what every wait acquires, `far` what other CTAs released with
    scope .cluster, for waits of that scope; None if there was none. Its component of the clocks is
    1 once it is initialised and one more with each completed phase.
    """

    def __init__(self, cta, offset, count, warp, lane):
        if not 1 <= count <= TX_RANGE:
            raise Fault(f"mbarrier.init with count {count}")
        self.cta, self.offset, self.expected, self.pending, self.tx, self.phase = (
            cta,
            offset,
            count,
            count,
            0,
            0,
        )
        self.completed = 0
        self.waiters = []
        self.init_warp, self.init_lane, self.published = warp, lane, False
        self.init_meeting = warp.meetings
        self.users = {}  # by warp's component, the time of the last operation on it
        self.id = cta.cluster.new_component()
        warp.clock[self.id] = 1
        self.near, self.far = Released(), None

    def __str__(self):
        return (
            f"mbarrier cta{self.cta.rank}+{self.offset:#x} phase {self.phase} "
            f"(completed {self.completed}) pending arrivals {self.pending}/{self.expected}, "
            f"pending bytes {self.tx}"
        )

    @property
    def now(self):
        """The time of its component once the phase under way is complete."""
        return self.completed + 2

    def release(self, clock, dirty, cta, scope):
        """An arrival by a warp of a CTA: what comes before it comes before what waiters do."""
        if cta is self.cta:
            self.near.add(clock, dirty)
            return
        pass_narrowly(clock, self.near.clock)
        if scope >= CLUSTER:
            self.far = self.far or Released()
            self.far.add(clock, dirty)

    def release_tmem(self, clock, cta, scope):
        """The same for what a tcgen05.fence::before_thread_sync came after, in tensor memory."""
        if cta is not self.cta:
            if scope >= CLUSTER:
                self.far = self.far or Released()
                self.far.tmem = np.maximum(self.far.tmem, clock)
            clock, wide = new_clock(), clock
            pass_narrowly(wide, clock)
        self.near.tmem = np.maximum(self.near.tmem, clock)

    def arrive(self, machine, n):
        if n > self.pending:
            raise Fault(f"{self}: {n} arrivals, more than are pending")
        self.pending -= n
        self.settle(machine)

    def drop(self, machine, n):
        self.expected -= n
        self.arrive(machine, n)

    def expect_tx(self, n):
        """9.7.13.15.2 has the range of the count; more is undefined."""
        self.tx += n
        if abs(self.tx) > TX_RANGE:
            raise Fault(
                f"{self}: transaction count out of range after {n:+}; it may be {-TX_RANGE} to "
                f"{TX_RANGE}"
            )

    def add_tx(self, machine, n):
        self.expect_tx(n)
        self.settle(machine)

    def settle(self, machine):
        machine.progress = machine.tick
        if self.pending == 0 and self.tx == 0:
            self.phase ^= 1
            self.completed += 1
            self.pending = self.expected
            self.near.complete()
            if self.far:
                self.far.complete()
            for w in self.waiters:
                machine.wake(w)
            self.waiters.clear()


class NamedBarrier:
    """One of the CTA's 16 barriers of `bar`/`barrier` (9.7.13.1)."""

    def __init__(self, number):
        self.number, self.arrived, self.generation, self.expected = number, 0, 0, 0
        self.waiters, self.warps, self.joined, self.dirty = [], [], [], set()
        self.clock = new_clock()

    def __str__(self):
        warps = sorted(w.index for w in self.warps)
        return (
            f"named barrier {self.number}: {self.arrived} of {self.expected or 'all'} threads "
            f"arrived (warps {warps})"
        )

    def settle(self, machine, cta):
        """Completes the barrier if enough threads have arrived."""
        need = self.expected or sum(-(-int(x.live.sum()) // 32) * 32 for x in cta.warps)
        if not self.arrived or self.arrived < need:
            return
        if self.arrived > need:
            raise Fault(f"{self}: more threads than expected")
        self.arrived, self.expected = 0, 0
        self.generation += 1
        machine.progress = machine.tick
        known = live(self.dirty)
        for x in self.joined:  # those that only arrived learn nothing
            x.dirty |= known
            x.acquire(self.clock)
        self.warps.clear()
        self.joined.clear()
        self.dirty = set()
        for x in self.waiters:
            machine.wake(x)
        self.waiters.clear()


class ClusterBarrier:
    """`barrier.cluster` (9.7.13.4)."""

    def __init__(self):
        self.phase, self.arrived, self.live_lanes = 0, 0, 0
        self.waiters, self.dirty, self.visible = [], set(), set()
        self.clock, self.seen = new_clock(), new_clock()

    def __str__(self):
        return f"cluster barrier: {self.arrived} of {self.live_lanes} threads arrived"

    def settle(self, machine):
        if self.arrived and self.arrived == self.live_lanes:
            self.arrived = 0
            self.phase += 1
            self.visible, self.dirty = live(self.dirty), set()
            self.seen[:] = self.clock
            machine.progress = machine.tick
            for x in self.waiters:
                machine.wake(x)
            self.waiters.clear()
