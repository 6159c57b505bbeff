"""One launch of a kernel: its memory, the CTAs that wait to start, what came before it.

PTX ISA 2.2 "Thread hierarchy", 9.7.13.14 (griddepcontrol), 10 (special registers).
"""

import numpy as np

from .gpus import check_launch, check_residency, ctas_per_sm
from .memory import SMEM_RESERVED, Fault
from .ptx import PtxError
from .races import Knowledge
from .report import short
from .state import Cluster, Cta, Warp
from .values import LANES, POISON32


class Grid:
    """A launch. `serial` counts them; `previous` is the one before it in the stream, if that was
    not complete when this one was queued.

    `programmatic`: it may start as soon as every CTA of `previous` has issued
    griddepcontrol.launch_dependents or has exited. `params`: bytes of each parameter.
    """

    def __init__(
        self, machine, serial, program, dims, block, cluster, smem, params, non_portable=True
    ):
        self.machine, self.serial, self.program = machine, serial, program
        self.kernel, self.dims, self.block, self.cluster_dim = (
            program.kernel,
            tuple(dims),
            tuple(block),
            tuple(cluster),
        )
        self.name = self.kernel.name
        self.label = f"{short(self.name)} (launch {serial})"
        self.previous, self.programmatic = None, False
        self.behind = frozenset()  # serials of launches that were not complete when it started
        self.after = None  # what is known after griddepcontrol.wait
        self.started = self.complete = False
        self.due = self.released = False  # the policy's moment for a programmatic launch
        self.active = 0  # clusters that run
        self.silent = 0  # CTAs that neither issued launch_dependents nor exited
        self.waiters = []  # warps in griddepcontrol.wait of the next grid
        self.blocks, self.bases = [], []
        self.executed = machine.coverage.setdefault(self.name, set())
        self.counts = tuple(g // c for g, c in zip(self.dims, self.cluster_dim, strict=True))
        if tuple(c * d for c, d in zip(self.counts, self.cluster_dim, strict=True)) != self.dims:
            raise Fault(f"grid {self.dims} is not a multiple of the cluster {self.cluster_dim}")
        self.threads = self.block[0] * self.block[1] * self.block[2]
        self.ctas_per_cluster = cluster[0] * cluster[1] * cluster[2]
        self.lay_out_shared(smem)
        check_launch(machine.gpu_for(self.kernel.target), self, smem, non_portable)
        self.load_params(params)
        self.load_globals()
        x, y, z = self.counts
        self.todo = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
        self.todo.reverse()
        self.silent = len(self.todo) * self.ctas_per_cluster

    def __str__(self):
        return self.label

    # ---- the stream ----
    def before(self):
        """What is known once griddepcontrol.wait returns."""
        if self.after is None:
            known = set()
            if self.previous is not None:
                known = {self.previous.serial}
                if self.previous.after is not None:  # then it has waited for what it follows
                    known |= self.previous.after.grids
            self.after = Knowledge({}, frozenset(known))
        return self.after

    def may_start(self):
        """Whether what precedes it in the stream lets it start."""
        before = self.previous
        if self.machine.stream[0] is self:
            return True
        return self.programmatic and (before.complete or (before.started and not before.silent))

    def release(self):
        """The moment has come that the policy chose for an early start."""
        self.released = self.machine.attention = True

    def speaks(self, cta):
        """A CTA issued launch_dependents or exited; the next grid may start after the last."""
        if not cta.spoke:
            cta.spoke = True
            self.silent -= 1
            if not self.silent:
                self.machine.attention = True

    def finish(self):
        """The last CTA has exited and memory is written."""
        self.complete, self.previous = True, None
        for base in self.bases:
            self.machine.memory.remove(base)
        for w in self.waiters:
            self.machine.wake(w)
        self.waiters.clear()

    # ---- memory ----
    def aligned_block(self, size, name, track):
        """A registered, 256-byte aligned block of host memory; it lives as long as the grid."""
        store = np.zeros(size + 256, np.uint8)
        shift = -store.ctypes.data % 256
        block = store[shift : shift + size]
        self.blocks.append(store)
        self.machine.memory.add(block.ctypes.data, block, name, track)
        self.bases.append(block.ctypes.data)
        return block

    def load_params(self, params):
        size = max(self.kernel.param_bytes, 16)
        self.param = self.aligned_block(size, "kernel parameters", track=False)
        for (_, n, _, at), raw in zip(self.kernel.params, params, strict=True):
            self.param[at : at + n] = np.frombuffer(raw, np.uint8, n)

    def load_globals(self):
        self.global_at = {}
        for name, (data, _) in self.kernel.globals.items():
            block = self.aligned_block(max(len(data), 1), name, track=True)
            block[: len(data)] = np.frombuffer(data, np.uint8)
            self.global_at[name] = block.ctypes.data

    def lay_out_shared(self, dynamic):
        """Addresses of shared variables; dynamic shared memory comes last."""
        self.shared_at, at = {}, SMEM_RESERVED
        for name, (n, align) in self.kernel.shared.items():
            at = -(-at // align) * align
            self.shared_at[name] = at
            at += n
        for name, (_, align) in self.kernel.extern_shared.items():
            at = -(-at // max(align, 16)) * max(align, 16)
            self.shared_at[name] = at
        self.smem_end = at + dynamic

    def cancel(self, refusal):
        """Takes a cluster that has not started off the launch: its first CTA's position, or None,
        which happens with probability `refusal` even if there is one.
        """
        rng = self.machine.rng
        if not self.todo or rng.random() < refusal:
            return None
        at = self.todo.pop(rng.randrange(len(self.todo)) if self.machine.any_cancel else -1)
        self.silent -= self.ctas_per_cluster
        self.machine.attention = True
        return tuple(a * c for a, c in zip(at, self.cluster_dim, strict=True))

    # ---- starting clusters ----
    def start(self):
        stream = self.machine.stream
        self.behind = frozenset(g.serial for g in stream[: stream.index(self)])
        self.started = True
        gpu = self.machine.gpu_for(self.kernel.target)
        if warning := check_residency(gpu, self):
            self.machine.warnings.add(warning)
        if not self.behind:
            self.machine.memory.order.reset()

    def start_cluster(self):
        """Puts the CTAs of the next cluster on the machine."""
        machine, at = self.machine, self.todo.pop()
        if not self.started:
            self.start()
        cdim, warps = self.cluster_dim, -(-self.threads // LANES)
        size = self.ctas_per_cluster
        cluster = Cluster(self, at, size, size * warps, machine.new_cluster_serial())
        for rank in range(self.ctas_per_cluster):
            local = (rank % cdim[0], rank // cdim[0] % cdim[1], rank // (cdim[0] * cdim[1]))
            ctaid = tuple(a * c + i for a, c, i in zip(at, cdim, local, strict=True))
            cta = Cta(cluster, rank, ctaid, self.program, self.smem_end, machine.race_check)
            cluster.ctas.append(cta)
            for index in range(warps):
                tid = np.arange(index * LANES, (index + 1) * LANES)
                registers = self.registers(cta, tid, at, local)
                w = Warp(cta, index, registers, tid < self.threads, self.program.local_bytes)
                w.rank = machine.rng.random()
                cta.warps.append(w)
                cta.live_warps += 1
                cluster.live_warps += 1
                cluster.barrier.live_lanes += int(w.live.sum())
                machine.ready.append(w)
        self.place(cluster)
        self.active += 1
        machine.active.append(cluster)

    def place(self, cluster):
        """Puts a cluster's CTAs on SMs that others of the launch are on already, if they fit."""
        fit = ctas_per_sm(self.machine.gpu_for(self.kernel.target), self)
        for other in self.machine.active:
            if other.grid is self and len(other.sharing) < fit:
                cluster.sharing = other.sharing
                cluster.sharing.append(cluster)
                return

    def registers(self, cta, tid, at, local):
        """A warp's initial registers: poison, then special registers and symbols."""
        blank = {
            1: np.zeros(LANES, bool),
            8: np.full(LANES, 0x7F, np.uint8),
            16: np.full(LANES, 0x7FFF, np.uint16),
            32: np.full(LANES, POISON32, np.uint32),
            64: np.full(LANES, POISON32 << 32 | POISON32, np.uint64),
        }
        r = [blank.get(w, blank[32]) for w in self.kernel.reg_widths]
        special = self.special_registers(cta, tid, at, local)
        params = {name: offset for name, _, _, offset in self.kernel.params}
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
                raise PtxError(f"{self.name}: unknown symbol or special register {name}")
            r.append(np.full(LANES, value, np.uint64))
        return r

    def special_registers(self, cta, tid, at, local):
        def u4(v):
            return np.full(LANES, v, np.uint32)

        b, c, g = self.block, self.cluster_dim, self.dims
        gpu = self.machine.gpu_for(self.kernel.target)
        lane = np.arange(LANES, dtype=np.uint32)
        below = (np.uint32(1) << lane) - np.uint32(1)
        special = {
            "%laneid": lane,
            "%warpid": u4(tid[0] // LANES),
            "%nwarpid": u4(64),
            "%cluster_ctarank": u4(cta.rank),
            "%cluster_nctarank": u4(c[0] * c[1] * c[2]),
            "%is_explicit_cluster": np.full(LANES, True),
            "%smid": u4(self.machine.rng.randrange(gpu.sms)),
            "%nsmid": u4(gpu.sms),
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
                "nclusterid": self.counts[i],
            }
            values |= {"cluster_ctaid": local[i], "cluster_nctaid": c[i]}
            for name, value in values.items():
                special[f"%{name}.{axis}"] = u4(value)
        return special
