"""The emulated GPU: launches, the randomised scheduler and the asynchronous units."""

import heapq

import numpy as np

from .builder import SOFT
from .memory import SMEM_RESERVED, Fault
from .policy import Policy
from .ptx import Not
from .report import report
from .state import Cluster, Cta, Fragment, Warp
from .values import LANES, POISON32

FULL, NONE = b"\1" * LANES, b"\0" * LANES
STALL = 300_000  # scheduler steps without any progress that count as a livelock


class Machine:
    """Runs launches one after another against one GlobalMemory.

    resident: clusters that run at a time. race_check: report unordered accesses to shared memory.
    exit_check: report CTAs that exit while a bulk store still reads their shared memory.
    """

    def __init__(
        self,
        memory,
        policy=None,
        resident=4,
        race_check=True,
        exit_check=True,
        max_steps=50_000_000,
    ):
        self.memory, self.policy, self.resident = memory, policy or Policy(), resident
        self.race_check, self.exit_check, self.max_steps = race_check, exit_check, max_steps
        self.rng = self.policy.rng
        self.stats, self.warnings, self.output = {}, set(), []
        self.executed = set()  # first instructions of the nodes that ran: coverage
        self.operand_cache = {}
        self.steps = self.tick = self.progress = self.sequence = 0
        self.events, self.queue_due, self.ready, self.active, self.blocks = [], {}, [], [], []

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
        self.program, self.grid, self.block, self.cluster_dim = program, grid, block, cluster
        self.tick = self.progress = self.idle_at = 0
        self.idle = 0
        self.events, self.queue_due, self.ready, self.active, self.blocks = [], {}, [], [], []
        self.operand_cache.clear()
        bases = [self.load_params(program.kernel, params), *self.load_globals(program.kernel)]
        self.lay_out_shared(program.kernel, smem)
        counts = [g // c for g, c in zip(grid, cluster, strict=True)]
        if [c * d for c, d in zip(counts, cluster, strict=True)] != list(grid):
            raise Fault(f"grid {grid} is not a multiple of the cluster {cluster}")
        todo = [
            (x, y, z) for z in range(counts[2]) for y in range(counts[1]) for x in range(counts[0])
        ]
        todo.reverse()
        try:
            with np.errstate(all="ignore"):
                while todo or self.active:
                    while todo and len(self.active) < self.resident:
                        self.start_cluster(todo.pop(), counts)
                    self.run_some()
        except Fault as e:
            raise Fault(f"{program.kernel.name}: {e}\n{report(self)}") from None
        finally:
            for base in bases:
                self.memory.remove(base)

    def aligned_block(self, size, name):
        """A registered, 256-byte aligned block of host memory; it lives as long as the launch."""
        store = np.zeros(size + 256, np.uint8)
        shift = -store.ctypes.data % 256
        block = store[shift : shift + size]
        self.blocks.append(store)
        self.memory.add(block.ctypes.data, block, name)
        return block

    def load_params(self, kernel, params):
        self.param = self.aligned_block(max(kernel.param_bytes, 16), "kernel parameters")
        for (_, n, _, at), raw in zip(kernel.params, params, strict=True):
            self.param[at : at + n] = np.frombuffer(raw, np.uint8, n)
        return self.param.ctypes.data

    def load_globals(self, kernel):
        self.global_at = {}
        for name, (data, _) in kernel.globals.items():
            block = self.aligned_block(max(len(data), 1), name)
            block[: len(data)] = np.frombuffer(data, np.uint8)
            self.global_at[name] = block.ctypes.data
        return list(self.global_at.values())

    def lay_out_shared(self, kernel, dynamic):
        """Addresses of shared variables; dynamic shared memory comes last."""
        self.shared_at, at = {}, SMEM_RESERVED
        for name, (n, align) in kernel.shared.items():
            at = -(-at // align) * align
            self.shared_at[name] = at
            at += n
        for name, (_, align) in kernel.extern_shared.items():
            at = -(-at // max(align, 16)) * max(align, 16)
            self.shared_at[name] = at
        self.smem_end = at + dynamic

    def start_cluster(self, at, counts):
        """Puts the CTAs of the cluster at position `at` of the grid of clusters on the machine."""
        cdim, threads = self.cluster_dim, self.block[0] * self.block[1] * self.block[2]
        ctas = cdim[0] * cdim[1] * cdim[2]
        cluster = Cluster(at, ctas * -(-threads // LANES))
        for rank in range(ctas):
            local = (rank % cdim[0], rank // cdim[0] % cdim[1], rank // (cdim[0] * cdim[1]))
            ctaid = tuple(a * c + i for a, c, i in zip(at, cdim, local, strict=True))
            cta = Cta(cluster, rank, ctaid, self.program, self.smem_end, self.race_check)
            cluster.ctas.append(cta)
            for index in range(-(-threads // LANES)):
                tid = np.arange(index * LANES, (index + 1) * LANES)
                w = Warp(
                    cta,
                    index,
                    self.registers(cta, tid, at, counts, local),
                    tid < threads,
                    self.program.local_bytes,
                )
                w.rank = self.rng.random()
                cta.warps.append(w)
                cta.live_warps += 1
                cluster.live_warps += 1
                cluster.barrier.live_lanes += int(w.live.sum())
                self.ready.append(w)
        self.active.append(cluster)

    def registers(self, cta, tid, at, counts, local):
        """A warp's initial registers: poison, then special registers and symbols."""
        blank = {
            1: np.zeros(LANES, bool),
            16: np.full(LANES, 0x7FFF, np.uint16),
            32: np.full(LANES, POISON32, np.uint32),
            64: np.full(LANES, POISON32 << 32 | POISON32, np.uint64),
        }
        r = [blank.get(w, blank[32]) for w in self.program.kernel.reg_widths]
        special = self.special_registers(cta, tid, at, counts, local)
        params = {name: offset for name, _, _, offset in self.program.kernel.params}
        for name in self.program.extra:
            if name in special:
                r.append(special[name])
                continue
            if name in self.shared_at:
                value = cta.rank << 24 | self.shared_at[name]
            elif name in params:
                value = self.param.ctypes.data + params[name]
            elif name in self.program.local_at:
                value = self.program.local_at[name]
            elif name in self.global_at:
                value = self.global_at[name]
            else:
                raise Fault(f"unknown symbol or special register {name}")
            r.append(np.full(LANES, value, np.uint64))
        return r

    def special_registers(self, cta, tid, at, counts, local):
        def u4(v):
            return np.full(LANES, v, np.uint32)

        b, c, g = self.block, self.cluster_dim, self.grid
        lane = np.arange(LANES, dtype=np.uint32)
        below = (np.uint32(1) << lane) - np.uint32(1)
        special = {
            "%laneid": lane,
            "%warpid": u4(tid[0] // LANES),
            "%nwarpid": u4(64),
            "%cluster_ctarank": u4(cta.rank),
            "%cluster_nctarank": u4(c[0] * c[1] * c[2]),
            "%is_explicit_cluster": np.full(LANES, True),
            "%smid": u4(self.rng.randrange(132)),
            "%nsmid": u4(132),
            "%clock": u4(0),
            "%clock64": np.zeros(LANES, np.uint64),
            "%globaltimer": np.zeros(LANES, np.uint64),
            "%dynamic_smem_size": u4(self.smem_end - SMEM_RESERVED),
            "%lanemask_lt": below,
            "%lanemask_le": below << np.uint32(1) | np.uint32(1),
            "%lanemask_eq": np.uint32(1) << lane,
            "%lanemask_gt": ~(below << np.uint32(1) | np.uint32(1)),
            "%lanemask_ge": ~below,
        }
        pos = {"x": tid % b[0], "y": tid // b[0] % b[1], "z": tid // (b[0] * b[1])}
        for i, axis in enumerate("xyz"):
            special["%tid." + axis] = pos[axis].astype(np.uint32)
            values = {
                "ntid": b[i],
                "ctaid": cta.ctaid[i],
                "nctaid": g[i],
                "clusterid": at[i],
                "nclusterid": counts[i],
            }
            values |= {"cluster_ctaid": local[i], "cluster_nctaid": c[i]}
            for name, value in values.items():
                special[f"%{name}.{axis}"] = u4(value)
        return special

    # ---- scheduling ----
    def run_some(self):
        """Runs until a cluster finishes."""
        n, rng, ready, events = len(self.active), self.rng, self.ready, self.events
        while len(self.active) == n:
            self.tick += 1
            while events and events[0][0] <= self.tick:
                self.fire()
            if ready:
                w = self.choose()
                self.step(w, rng.choice((1, 2, 4, 8, 32)))
                if w.ready:
                    ready.append(w)
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
        nodes, r, frags = self.program.nodes, w.r, w.frags
        frag = frags[0]
        while budget > 0:
            if len(frags) > 1:
                frag = self.pick(w)
                if frag is None:
                    w.ready = False
                    return
            pc = frag.pc
            kind, a, b = nodes[pc]
            self.steps += 1
            self.executed.add(pc)
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
            raise Fault(f"{e}\n  at {w}, {self.program.kernel.instrs[frag.pc].where()}") from None
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
        cluster.barrier.settle(self)
        for bar in cta.bars.values():
            bar.settle(self, cta)
        if cluster.live_warps == 0:
            while self.events:  # let the stores reach global memory
                self.fire()
            self.active.remove(cluster)
