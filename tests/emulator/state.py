"""Warps, CTAs and clusters in execution (PTX ISA 2 "Programming model")."""

import numpy as np

from .memory import SMEM_RESERVED, Fault, SharedMemory
from .ordering import COMPONENTS, new_clock
from .races import live
from .sync import ClusterBarrier
from .values import LANES


class Fragment:
    """Lanes of a warp that share a program counter; `mask` is None when all 32 do."""

    __slots__ = ("pc", "mask", "blocked", "token")

    def __init__(self, pc, mask):
        self.pc, self.mask, self.blocked, self.token = pc, mask, False, None


class Warp:
    """A warp: its registers `r`, divergent fragments and what it has in flight."""

    def __init__(self, cta, index, registers, lanes, local_bytes):
        self.cta, self.index, self.r = cta, index, registers
        self.id = cta.cluster.new_component()
        self.clock = new_clock()  # what is ordered before what this warp does next
        self.clock[self.id] = 1
        self.frags = [Fragment(0, None if lanes.all() else lanes)]
        self.live = lanes  # lanes that have not exited
        self.ready = True
        self.rank = 0.0  # scheduling priority, where the policy uses one
        self.why = None  # what it waits for, for reports
        self.failed = 0  # failed try_waits in a row
        self.dirty = set()  # unfenced generic stores, ordered before what this warp does next
        # by which lanes they were stored, until all lanes meet or those issue a proxy fence
        self.apart = {}
        self.read_apart = np.zeros(LANES, bool)  # the lanes that read shared memory, likewise
        self.meetings = 0  # of its lanes
        self.stamped = {}  # its events of the races on global memory, to be shared
        self.heard, self.fences, self.learned = [], {}, {}  # of releases and fences, see `races`
        # of barrier.cluster: the phase it waits for, lanes that have arrived since their last wait
        self.cluster_target, self.cluster_arrived = 0, np.zeros(LANES, bool)
        self.inits = set()  # components of mbarriers that its fence.mbarrier_init came after
        # cp.async.bulk out of shared memory; how many groups each lane has committed
        self.bulk_stores, self.bulk_commits = [], np.zeros(LANES, np.int64)
        self.copies, self.copy_commits = [], np.zeros(LANES, np.int64)  # cp.async, likewise
        self.wgmma_open, self.wgmma_groups, self.wgmma_issued = [], [], 0
        # registers at the last wgmma.fence, and those that a wgmma wrote since
        self.fenced, self.produced = None, {}
        self.accessed = {}  # accumulators used since the last wgmma.fence -> by which instruction
        self.late = {}  # register -> asynchronous operation that has not finished with it
        self.leaders = {}  # by member mask, the order in which elect.sync prefers lanes
        self.engines = {}  # by lane, the Engine of its asynchronous tcgen05 operations
        self.engine_reads = {}  # access -> memory, of these, before the arrival of their commit
        self.tmem_clock = new_clock()  # its clock at the last tcgen05.fence::after_thread_sync
        # what its tcgen05.fence::before_thread_sync published, what relaxed arrivals brought it
        self.tmem_fenced, self.tmem_heard = None, None
        self.tmem_loads, self.tmem_stores = [], []  # tcgen05.ld and tcgen05.st not waited for
        self.tmem_unfenced = {}  # TMEM accesses since the last tcgen05.fence::before_thread_sync
        self.local = np.zeros((LANES, local_bytes), np.uint8) if local_bytes else None
        self.call_params = {}

    def __str__(self):
        return f"cta{self.cta.ctaid} rank {self.cta.rank} warp {self.index}"

    def stores(self, dirty, lanes):
        """A generic store to shared memory, by the lanes of a mask (None: all)."""
        self.dirty.add(dirty)
        stored = self.live if lanes is None else lanes
        before = self.apart.get(dirty)
        self.apart[dirty] = stored if before is None else stored | before

    def fence_store(self, dirty, lanes):
        """Whether fences, the last by the lanes of a mask, come after a store: each lane's own, or
        any after a barrier at which the lanes met."""
        stored = self.apart.pop(dirty, None)
        if stored is None or lanes is None or not (left := stored & ~lanes).any():
            return True
        self.apart[dirty] = left
        return False

    def reads(self, lanes):
        """A generic load of shared memory."""
        self.read_apart = self.live if lanes is None else self.read_apart | lanes

    def fence_reads(self, lanes):
        """The same as `fence_store` for all loads so far."""
        if lanes is None:
            self.read_apart = np.zeros(LANES, bool)
        else:
            self.read_apart = self.read_apart & ~lanes
        return not self.read_apart.any()

    def hear_stores(self, dirty):
        """Stores are ordered before what any lane does next."""
        self.dirty |= dirty
        for d in self.apart.keys() & dirty:
            del self.apart[d]

    def meet(self):
        """A barrier of the warp: what its lanes did is ordered before what any of them does."""
        self.apart.clear()
        self.meetings += 1
        self.read_apart = np.zeros(LANES, bool)

    def release(self, clock):
        """Orders what the warp did before what those do that acquire the clock."""
        np.maximum(clock, self.clock, out=clock)
        self.clock[self.id] += 1

    def acquire(self, clock):
        """Orders what was released into the clock before what the warp does next."""
        np.maximum(self.clock, clock, out=self.clock)

    def release_into(self, barrier, scope):
        """An arrival at an mbarrier, with its release."""
        if self.dirty:
            self.dirty = live(self.dirty)
        barrier.release(self.clock, self.dirty, self.cta, scope)
        self.clock[self.id] += 1

    def release_fenced(self, barrier, scope):
        """A relaxed arrival: with a fence before it, a release pattern (PTX ISA 8.8)."""
        for of_fence, known in self.fences.items():
            clock = known.clocks[self.cta.cluster.serial]
            barrier.release(clock, known.dirty, self.cta, min(scope, of_fence))
        if self.tmem_fenced is not None:
            barrier.release_tmem(self.tmem_fenced, self.cta, scope)


class Cta:
    """A CTA and what it owns."""

    def __init__(self, cluster, rank, ctaid, program, smem_end, check):
        self.cluster, self.rank, self.ctaid, self.program = cluster, rank, ctaid, program
        foreign = np.arange(cluster.warps) // (cluster.warps // cluster.size) != rank
        self.smem = SharedMemory(f"cta{rank} shared", smem_end, foreign, check)
        self.mbars, self.bars, self.warps = self.smem.mbarriers, {}, []
        self.live_warps = 0
        self.registers = None  # the setmaxnreg pool
        self.spoke = False  # issued griddepcontrol.launch_dependents, or exited
        self.wgmma = {}  # (warpgroup, number) -> operation that not all its warps have issued yet
        self.tmem = None  # its TensorMemory, made on the first allocation

    def check_exit(self, machine):
        """The rules for a CTA whose last warp has exited."""
        if self.registers:
            self.registers.check_exit()
        if self.tmem and self.tmem.taken:
            raise Fault(f"cta{self.ctaid} exits with TMEM still allocated: {self.tmem.taken}")
        for access in self.smem.accesses:
            report = f"cta{self.ctaid} exits while its shared memory is in use: {access}"
            if machine.exit_check or access.kind != "bulk store read":
                raise Fault(report)
            machine.warnings.add(report)


class Cluster:
    """The CTAs of a cluster and their common barrier."""

    def __init__(self, grid, index, size, warps, serial):
        self.grid, self.serial = grid, serial  # `serial` numbers the clusters of the machine
        self.size = size  # CTAs
        self.index, self.warps, self.ctas, self.live_warps = index, warps, [], 0
        self.components = 0  # of its clocks, in use
        self.refusals = []  # (component, time) of the queries that saw one (launchcontrol)
        self.imports = {}  # by component, [(time, Knowledge of other clusters)]
        self.barrier = ClusterBarrier()
        self.sharing = [self]  # clusters in execution whose CTAs of one rank are on one SM

    def new_component(self):
        """The number of a new component of the cluster's clocks."""
        if self.components == COMPONENTS:
            raise Fault(f"more than {COMPONENTS} warps and mbarrier initialisations in a cluster")
        self.components += 1
        return self.components - 1

    def resolve(self, addr):
        """The CTA and offset of one shared::cluster address; ranks live in bits 24 and up."""
        rank, off = addr >> 24, addr & 0xFFFFFF
        if rank >= len(self.ctas):
            raise Fault(
                f"shared address {addr:#x} names CTA {rank} of the cluster, which does not exist"
            )
        cta = self.ctas[rank]
        if cta.live_warps == 0:
            raise Fault(f"access to the shared memory of cta{rank}, which has exited")
        if not SMEM_RESERVED <= off < cta.smem.end:
            raise Fault(
                f"shared address {addr:#x} is outside the allocation "
                f"{SMEM_RESERVED:#x}..{cta.smem.end:#x}"
            )
        return cta, off

    def mbarrier(self, warp, addr, remote=False):
        """The mbarrier at an address, used by `warp` (or by an asynchronous unit: `remote`)."""
        cta, off = self.resolve(addr)
        mb = cta.mbars.get(off)
        if mb is None:
            raise Fault(f"no initialised mbarrier at cta{cta.rank}+{off:#x}")
        if (remote or cta is not warp.cta) and not mb.published:
            raise Fault(
                f"use of {mb} by another CTA or an asynchronous unit, but its initialisation was "
                "never fenced"
            )
        if not warp.clock[mb.id]:
            raise Fault(f"use of {mb}, which nothing orders after its initialisation")
        mb.users[warp.id] = int(warp.clock[warp.id])
        return mb
