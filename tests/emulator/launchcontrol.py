"""Cluster launch control: taking over clusters that have not started (PTX ISA 9.7.13.18).

A request is answered some time later with 16 bytes in shared memory, written by the async proxy and
counted on an mbarrier: the first CTA of a cluster that then never starts, or a refusal, which the
policy's seed may also draw while clusters are left. 128-bit registers hold such answers: arrays of
two words a lane.
"""

import numpy as np

from .builder import instruction, lanes_of, set_reg
from .bulk import land
from .memory import Fault
from .ordering import before_writes
from .ptx import Reg, Vec
from .values import LANES

ANSWER = 0xC1C0_0000  # marks the last word of an answer; bit 0: a cluster was cancelled
REFUSAL = 0.1  # how often a request is refused while clusters are left
AXES = "xyz"


def wide(op):
    return isinstance(op, Reg) and op.width == 128


@instruction("mov.b128")
def move(b, ins):
    """Between a 128-bit register and two words, or another such register (9.7.9.3)."""
    dst, src = ins.operands
    if wide(dst):
        if wide(src):
            parts = [lambda r, j=j: r[src.index][:, j] for j in range(2)]
        elif isinstance(src, Vec) and len(src.items) == 2:
            parts = [b.get(x, "u8") for x in src.items]
        else:
            raise b.unsupported(ins)

        def pack(M, w, frag, m):
            new = np.stack([g(w.r) for g in parts], axis=1)
            old = w.r[dst.index]
            if m is not None:
                old = old if old.ndim == 2 else np.zeros((LANES, 2), np.uint64)
                new = np.where(m[:, None], new, old)
            w.r[dst.index] = new

        return pack
    if not (wide(src) and isinstance(dst, Vec) and len(dst.items) == 2):
        raise b.unsupported(ins)

    def unpack(M, w, frag, m):
        for j, d in enumerate(dst.items):
            set_reg(w, d, np.ascontiguousarray(w.r[src.index][:, j]), m)

    return unpack


@instruction(
    "clusterlaunchcontrol.try_cancel.async",
    "shared::cta mbarrier::complete_tx::bytes multicast::cluster::all",
)
def try_cancel(b, ins):
    dst, bar = ins.operands
    gd, gb = b.shared_address(dst), b.shared_address(bar)
    everywhere = "multicast::cluster::all" in ins.parts

    def issue(M, w, i):
        cluster = w.cta.cluster
        for component, time in cluster.refusals:
            if before_writes(w.clock)[component] >= time:
                raise Fault("clusterlaunchcontrol.try_cancel after a refusal was seen: undefined")
        d, bar_at = int(gd(w.r)[i]), int(gb(w.r)[i])
        off, bar_off = d & 0xFFFFFF, bar_at & 0xFFFFFF
        if off % 16:
            raise Fault(f"clusterlaunchcontrol.try_cancel: {off:#x} is not 16-byte aligned")
        ranks = range(len(cluster.ctas)) if everywhere else [d >> 24]
        jobs, units = [], np.array([off >> 4])
        for x in ranks:
            cta, _ = cluster.resolve(x << 24 | off)
            mb = cluster.mbarrier(w, (x if everywhere else bar_at >> 24) << 24 | bar_off, True)
            cta.smem.check_async(w, units, "cancel answer", write=True)
            jobs.append((cta.smem, cta.smem.begin("TMA write", units, ins, w), mb))

        def answer():
            at = cluster.grid.cancel(REFUSAL)
            words = [0, 0, 0, ANSWER] if at is None else [*at, ANSWER | 1]
            return np.array(words, np.uint32).view(np.uint8)

        land(M, w, ins, jobs, units, answer, 16)
        M.count("try_cancel")

    def run(M, w, frag, m):
        for i in lanes_of(m):
            issue(M, w, i)

    return run


def words_of(w, op, lanes):
    """The four words of the answers of some lanes; Fault unless they are answers."""
    value = w.r[op.index]
    if value.ndim != 2:
        raise Fault("clusterlaunchcontrol.query_cancel of a register that was never written")
    words = np.ascontiguousarray(value).view(np.uint32)
    if ((words[lanes, 3] & 0xFFFF_FFFE) != ANSWER).any():
        raise Fault("clusterlaunchcontrol.query_cancel of what is no answer to a try_cancel")
    return words


@instruction("clusterlaunchcontrol.query_cancel.is_canceled", "pred")
def is_canceled(b, ins):
    pred, handle = ins.operands

    def run(M, w, frag, m):
        lanes = list(lanes_of(m))
        done = (words_of(w, handle, lanes)[:, 3] & 1).astype(bool)
        if not done[lanes].all():
            w.cta.cluster.refusals.append((w.id, int(w.clock[w.id])))
            w.clock[w.id] += 1
        set_reg(w, pred, done, m)

    return run


@instruction("clusterlaunchcontrol.query_cancel.get_first_ctaid", "v4 b32")
@instruction("clusterlaunchcontrol.query_cancel.get_first_ctaid::x", "b32")
@instruction("clusterlaunchcontrol.query_cancel.get_first_ctaid::y", "b32")
@instruction("clusterlaunchcontrol.query_cancel.get_first_ctaid::z", "b32")
def first_ctaid(b, ins):
    """The position of the cancelled cluster's first CTA; of a refusal, anything."""
    dst, handle = ins.operands
    axis = ins.parts[2].rpartition("::")[2]
    chosen = [AXES.index(axis)] if axis in AXES else range(3)

    def run(M, w, frag, m):
        words = words_of(w, handle, list(lanes_of(m)))
        known = words[:, 3] & 1 == 1
        for d, j in zip(b.vector(dst), chosen, strict=False):  # a vector's fourth is unspecified
            set_reg(w, d, np.where(known, words[:, j], np.uint32(0x7FFF_FFFF)), m)

    return run
