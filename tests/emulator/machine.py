"""The emulated GPU: the stream of launches, the randomised scheduler, asynchronous events."""

import heapq

import numpy as np

from .builder import SOFT
from .gpus import gpu_for
from .grid import Grid
from .inflight import touch
from .memory import Fault
from .policy import Policy
from .ptx import Not
from .report import report, short
from .state import Fragment
from .values import LANES

FULL, NONE = b"\1" * LANES, b"\0" * LANES
STALL = 300_000  # scheduler steps without any progress that count as a livelock
PATIENCE = 2_000  # those after which an asynchronous operation completes, however late it may be


class Machine:
    """Runs a stream of launches against one GlobalMemory.

    resident: clusters of a launch that run at a time. race_check: report unordered accesses.
    exit_check: report CTAs that exit while a bulk store still reads their shared memory.
    copy_fence: wgmma, tcgen05.mma and TMA see what cp.async wrote only after a fence.proxy.async.
    gpu: a name in `gpus.GPUS`, whose limits hold; by default the usual one for the code's target.
    any_cancel: cluster launch control hands out clusters in any order, as the ISA allows, not in
        that of the launch, on which known kernels rely.
    any_leader: elect.sync takes any lane, as the ISA allows, not the lowest.
    unused: a function of (warp, instruction), or None: whether an ldmatrix reads what is not used,
        so that it may race. It gives NaN.
    """

    def __init__(
        self,
        memory,
        policy=None,
        resident=4,
        race_check=True,
        exit_check=True,
        copy_fence=True,
        any_cancel=False,
        any_leader=True,
        unused=None,
        max_steps=50_000_000,
        gpu=None,
    ):
        self.memory, self.policy, self.resident = memory, policy or Policy(), resident
        self.race_check, self.exit_check, self.max_steps = race_check, exit_check, max_steps
        self.copy_fence, self.any_cancel, self.any_leader = copy_fence, any_cancel, any_leader
        self.unused = unused
        self.rng, self.gpu = self.policy.rng, gpu
        memory.order.check = race_check
        self.stats, self.warnings, self.output = {}, set(), []
        self.coverage = {}  # by kernel, the first instructions of the nodes that ran
        self.operand_cache = {}
        self.steps = self.tick = self.progress = self.sequence = 0
        self.idle = self.idle_at = 0
        self.events, self.queue_due, self.ready, self.active = [], {}, [], []
        self.stream, self.launches, self.clusters = [], 0, 0
        self.attention = False  # a cluster or a launch may be able to start
        self.failed = None  # the cluster of the warp whose instruction was a Fault

    def count(self, name):
        self.stats[name] = self.stats.get(name, 0) + 1

    # ---- asynchronous events ----
    def later(self, engine, fn, queue=None, cause=None):
        """Runs `fn` when the policy says; operations of one `queue` never overtake each other.
        `cause`: (warp, instruction).
        """
        due = self.tick + self.policy.delay(engine)
        if queue is not None:
            due = max(due, self.queue_due.get(queue, 0) + 1e-6)
            self.queue_due[queue] = due
        self.sequence += 1
        heapq.heappush(self.events, (due, self.sequence, fn, cause))

    def fire(self):
        _, _, fn, cause = heapq.heappop(self.events)
        self.run_event(fn, cause)

    def run_event(self, fn, cause):
        self.progress = self.tick
        try:
            fn()
        except Fault as e:
            if cause is None:
                raise
            raise Fault(
                f"{e}\n  in an asynchronous operation issued by {cause[0]}, {cause[1].where()}"
            ) from None

    def wake(self, w):
        """Makes a sleeping warp look again."""
        for f in w.frags:
            f.blocked = False
        if not w.ready and w.frags:
            w.ready = True
            self.ready.append(w)

    def cached_operand(self, smem, key, read):
        """An operand as last read from this shared memory, if nothing has changed there since."""
        key = (id(smem), *key)
        hit = self.operand_cache.get(key)
        if hit is not None and hit[0] is smem and hit[1] == smem.version:
            return hit[2]
        value = read()
        if len(self.operand_cache) > 32:
            self.operand_cache.clear()
        self.operand_cache[key] = (smem, smem.version, value)
        return value

    # ---- launching ----
    def launch(self, program, grid, block, cluster, smem, params):
        """Runs a kernel to its end. `params`: bytes of each; `smem`: dynamic shared bytes."""
        self.enqueue(program, grid, block, cluster, smem, params)
        self.synchronize()

    def enqueue(
        self,
        program,
        grid,
        block,
        cluster,
        smem,
        params,
        programmatic=False,
        non_portable=True,
    ):
        """Appends a launch to the stream.

        programmatic: with the attribute programmatic stream serialization, which lets it overlap
        with the launch before it. non_portable: with that for clusters of more than eight CTAs.
        """
        self.launches += 1
        g = Grid(self, self.launches, program, grid, block, cluster, smem, params, non_portable)
        g.previous = self.stream[-1] if self.stream else None
        g.programmatic = programmatic
        self.stream.append(g)

    def synchronize(self):
        """Runs all launches in the stream."""
        self.tick = self.progress = self.idle_at = 0
        self.idle = 0
        self.events, self.queue_due, self.ready, self.active = [], {}, [], []
        self.operand_cache.clear()
        try:
            with np.errstate(all="ignore"):
                while self.stream:
                    self.start_some()
                    self.run_some()
        except Fault as e:
            names = dict.fromkeys(short(g.name) for g in self.stream if g.active)
            raise Fault(f"{' and '.join(names)}: {e}\n{report(self, self.failed)}") from None
        finally:
            for g in self.stream:
                g.finish()
            self.stream.clear()

    def start_some(self):
        """Starts the clusters for which there is room, of the grids that may run."""
        self.attention = False
        for g in self.stream:
            if not g.started and not g.may_start():
                break
            if not g.started and g.previous is not None and not g.previous.complete:
                if not g.due:
                    g.due = True
                    if self.policy.mode["launch"] == "eager":
                        g.released = True
                    else:
                        self.later("launch", g.release)
                if not g.released:
                    break
            while g.todo and g.active < self.resident:
                g.start_cluster()

    def gpu_for(self, target):
        """The Gpu that runs code for a target."""
        return gpu_for(target, self.gpu)

    def new_cluster_serial(self):
        self.clusters += 1
        return self.clusters

    @property
    def executed(self):
        """First instructions of the nodes that ran, of all kernels."""
        return set().union(*self.coverage.values())

    # ---- scheduling ----
    def run_some(self):
        """Runs until a cluster may be able to start."""
        rng, ready, events = self.rng, self.ready, self.events
        while not self.attention:
            self.tick += 1
            while events and events[0][0] <= self.tick:
                self.fire()
            if ready:
                w = self.choose()
                self.step(w, rng.choice((1, 2, 4, 8, 32)))
                if w.ready:
                    ready.append(w)
                if events and self.tick - self.progress > PATIENCE:
                    self.fire()  # warps that poll memory may wait for what it brings about
                if self.tick - self.progress > STALL:
                    raise Fault("no progress: livelock or a wait that is never satisfied")
                if self.steps > self.max_steps:
                    raise Fault("step limit reached")
            elif events:
                self.fire()
            else:
                self.nudge()

    def choose(self):
        """Takes the next warp off the ready list."""
        rng, ready = self.rng, self.ready
        i = int(rng.random() * len(ready))
        if self.policy.priority and rng.random() < 0.98:
            if rng.random() < 0.002:
                ready[i].rank = rng.random()
            i = max(range(len(ready)), key=lambda j: ready[j].rank)
        w = ready[i]
        ready[i] = ready[-1]
        ready.pop()
        return w

    def nudge(self):
        """Everything sleeps: try_wait may time out, so waiters look again before a deadlock."""
        self.idle = self.idle + 1 if self.progress <= self.idle_at else 1
        self.idle_at = self.tick
        waiters = {
            id(x): x
            for cl in self.active
            for c in cl.ctas
            for mb in c.mbars.values()
            for x in mb.waiters
        }
        if self.idle > 4 or not waiters:
            raise Fault("deadlock")
        for x in waiters.values():
            self.wake(x)
        for cl in self.active:
            for c in cl.ctas:
                for mb in c.mbars.values():
                    mb.waiters.clear()

    def step(self, w, budget):
        """Runs a warp for about `budget` operations, or until it sleeps."""
        nodes, r, frags = w.cta.program.nodes, w.r, w.frags
        executed = w.cta.cluster.grid.executed
        frag = frags[0]
        while budget > 0:
            if len(frags) > 1:
                frag = self.pick(w)
                if frag is None:
                    w.ready = False
                    return
            pc = frag.pc
            kind, a, b = nodes[pc]
            if w.late:
                touch(self, w, pc)
            self.steps += 1
            executed.add(pc)
            if kind == "run":
                m = frag.mask
                (a[0] if m is None else a[1])(r, m)
                frag.pc = b
            elif kind == "op":
                budget -= 1
                if self.operate(w, frag, a, b) and len(frags) == 1:
                    w.ready = False
                    return
            elif kind == "bra":
                if self.branch(w, frag, a, b):
                    budget -= 1
            elif kind == "nop":
                frag.pc = pc + 1
            else:
                self.exit(w, frag, a)
                if not w.frags:
                    w.ready = False
                    return
                frag = frags[0]

    @staticmethod
    def guarded(r, guard, mask):
        """(lanes that a guarded instruction runs for, their bytes); the mask None means all 32."""
        g = ~r[guard.reg.index] if isinstance(guard, Not) else r[guard.index]
        m = g if mask is None else g & mask
        bits = m.tobytes()
        return (None if bits == FULL else m), bits

    def operate(self, w, frag, op, guard):
        """One instruction of the table; returns whether the fragment sleeps now."""
        m = frag.mask
        if guard is not None:
            m, bits = self.guarded(w.r, guard, m)
            if bits == NONE:
                frag.pc += 1
                return False
        try:
            out = op(self, w, frag, m)
        except Fault as e:
            where, self.failed = w.cta.program.kernel.instrs[frag.pc].where(), w.cta.cluster
            raise Fault(f"{e}\n  at {w}, {where}") from None
        if out is None:
            frag.pc += 1
            return False
        if out == SOFT:
            frag.pc += 1
        frag.blocked = True
        return True

    def branch(self, w, frag, guard, target):
        """A branch, which may split the fragment; returns whether all its lanes jump backwards."""
        pc, mask = frag.pc, frag.mask
        if guard is not None:
            m, bits = self.guarded(w.r, guard, mask)
            if bits == NONE:
                frag.pc = pc + 1
                return False
            if bits != FULL and (mask is None or bits != mask.tobytes()):
                frag.pc, frag.mask = pc + 1, ~m if mask is None else mask & ~m
                w.frags.append(Fragment(target, m))
                return False
        frag.pc = target
        return target <= pc

    def exit(self, w, frag, guard):
        m, bits = frag.mask, FULL
        if guard is not None:
            m, bits = self.guarded(w.r, guard, m)
        if bits == NONE:
            frag.pc += 1
            return
        gone = np.ones(LANES, bool) if m is None else m
        self.leave(w, frag, gone & w.live)

    @staticmethod
    def pick(w):
        """Merges fragments that meet; returns the lowest in the program that can run."""
        by_pc, best = {}, None
        for f in w.frags:
            other = by_pc.get(f.pc)
            if other is not None and f.token is None and other.token is None:
                other.mask = other.mask | f.mask
                other.blocked = False
                if other.mask.tobytes() == FULL:
                    other.mask = None
            else:
                by_pc[f.pc if other is None else (f.pc, id(f))] = f
        if len(by_pc) != len(w.frags):
            w.frags[:] = by_pc.values()
        for f in w.frags:
            if not f.blocked and (best is None or f.pc < best.pc):
                best = f
        return best

    def leave(self, w, frag, lanes):
        """Lanes exit."""
        w.live = w.live & ~lanes
        cta, cluster = w.cta, w.cta.cluster
        cluster.barrier.live_lanes -= int(lanes.sum())
        if cluster.barrier.phase == w.cluster_target:
            cluster.barrier.arrived -= int((lanes & w.cluster_arrived).sum())
        if frag.mask is None:
            frag.mask = np.ones(LANES, bool)
        frag.mask = frag.mask & ~lanes
        if frag.mask.any():
            frag.pc += 1
        else:
            w.frags.remove(frag)
        for f in w.frags:
            f.blocked = False
        self.progress = self.tick
        if not w.frags:
            cta.live_warps -= 1
            cluster.live_warps -= 1
            if cta.live_warps == 0:
                cta.check_exit(self)
                cluster.grid.speaks(cta)
        cluster.barrier.settle(self)
        for bar in cta.bars.values():
            bar.settle(self, cta)
        if cluster.live_warps == 0:
            self.end(cluster)

    def end(self, cluster):
        """The last warp of a cluster has exited: its stores reach global memory."""
        events, grid = self.events, cluster.grid
        while own := [e for e in events if e[3] and e[3][0].cta.cluster is cluster]:
            first = min(own)
            events.remove(first)
            heapq.heapify(events)
            self.run_event(*first[2:])
        self.active.remove(cluster)
        cluster.sharing.remove(cluster)
        grid.active -= 1
        self.attention = True
        if not grid.active and not grid.todo:
            while self.events:
                self.fire()
            self.stream.remove(grid)
            grid.finish()
