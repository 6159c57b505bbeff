"""tcgen05.mma, cp and commit (PTX ISA 9.7.16.9-10).

The operations of one thread run in order: 9.7.16.6.2 has the pairs that kernels use pipelined.
"""

import numpy as np

from .builder import instruction, lanes_of
from .memory import Fault
from .operands import check_extent, operand_offsets
from .ordering import CLUSTER, new_clock, pass_narrowly
from .ptx import Mem, Vec
from .tcgen05 import GROUPS, cta_group, fence_before_sync
from .tensorcore import BLOCK, Mma, shape_of
from .tma import ranks_of
from .tmem import begin_read, end_reads, engine_of

KINDS = (
    "cta_group::1 cta_group::2 kind::f16 kind::tf32 kind::f8f6f4 kind::i8 kind::mxf8f6f4 "
    "kind::mxf4 kind::mxf4nvf4 block_scale scale_vec::1X scale_vec::2X scale_vec::4X block16 "
    "block32"
)
COLLECTOR = "collector::a::fill collector::a::use collector::a::lastuse collector::a::discard"


def pair_of(w, g, what):
    """The CTAs that an instruction of cta_group::g works on."""
    if g == 1:
        return [w.cta]
    if w.cta.rank & 1:
        raise Fault(f"{what}.cta_group::2 issued by the odd CTA of the pair")
    return w.cta.cluster.ctas[w.cta.rank : w.cta.rank + 2]


def scale_count(b, ins, kind):
    """Scale factors along K; 0 without block scaling."""
    if ("block_scale" in ins.parts) != (kind in BLOCK):
        raise b.unsupported(ins)
    if kind not in BLOCK:
        return 0
    known = {
        "scale_vec::1X": 1, "scale_vec::2X": 2, "scale_vec::4X": 4, "block16": 4,
        "block32": BLOCK[kind][0],
    }  # fmt: skip
    given = [known[p] for p in ins.parts if p in known]
    if kind == "mxf4nvf4" and not given or len(given) > 1:
        raise b.unsupported(ins)
    n = given[0] if given else BLOCK[kind][0]
    if n not in BLOCK[kind]:
        raise b.unsupported(ins)
    return n


@instruction("tcgen05.mma", f"{KINDS} {COLLECTOR}")
def mma(b, ins):
    """D = A B + D, of one thread: 9.7.16.10.9.1."""
    g = cta_group(b, ins)
    kind = next(x for x in ins.parts if x.startswith("kind::"))[6:]
    scales = scale_count(b, ins, kind)
    d, a, bd, idesc, *rest = ins.operands
    a_in_tmem = isinstance(a, Mem)
    gd, ga = b.address(d, "u4"), b.address(a, "u4") if a_in_tmem else b.get(a, "u8")
    gb, gi = b.get(bd, "u8"), b.get(idesc, "u4")
    addresses = [b.address(rest.pop(0), "u4") for _ in range(2 if scales else 0)]
    masks = [b.get(x, "u4") for x in rest.pop(0).items] if isinstance(rest[0], Vec) else None
    if masks is not None and len(masks) != 4 * g:
        raise b.unsupported(ins)
    ge, scale = b.get(rest.pop(0), "?"), rest[0].bits if rest else 0
    if not 0 <= scale <= 15 or scale and kind not in ("f16", "tf32"):
        raise b.unsupported(ins)

    def run(M, w, frag, m):
        r = w.r
        for i in lanes_of(m):
            shape = shape_of(int(gi(r)[i]), kind, scales)
            engine = engine_of(w, int(i))
            op = Mma(
                M,
                w,
                ins,
                engine,
                pair_of(w, g, "tcgen05.mma"),
                shape,
                int(gd(r)[i]),
                int(ga(r)[i]),
                int(gb(r)[i]),
                bool(ge(r)[i]),
                a_in_tmem=a_in_tmem,
                disabled=None if masks is None else lane_masks(masks, r, i),
                scale=scale,
                scales=[int(f(r)[i]) for f in addresses] or None,
            )
            engine.open.append(op)
            M.later("mma", op.run, queue=(w, i), cause=(w, ins))
            M.count("mma")

    return run


def lane_masks(masks, r, lane):
    """disable-output-lane as bools, by (CTA, TMEM lane)."""
    words = np.array([int(g(r)[lane]) for g in masks], "<u4")
    return np.unpackbits(words.view(np.uint8), bitorder="little").reshape(-1, 128).astype(bool)


# shape and multicast: rows, bytes of a row, the lane of each row by copy
COPIES = {
    ("128x256b",): (128, 32, [np.arange(128)]),
    ("128x128b",): (128, 16, [np.arange(128)]),
    ("4x256b",): (4, 32, [32 * np.arange(4)]),
    ("64x128b", "warpx2::02_13"): (64, 16, [np.arange(64), 64 + np.arange(64)]),
    ("64x128b", "warpx2::01_23"): (
        64,
        16,
        [np.arange(64) + 32 * (np.arange(64) // 32) + 32 * i for i in (0, 1)],
    ),
    ("32x128b", "warpx4"): (32, 16, [32 * i + np.arange(32) for i in range(4)]),
}


class Copy:
    """One tcgen05.cp that a thread of warp `w` issued for `ctas`; `run` does it later."""

    def __init__(self, machine, w, ins, engine, ctas, address, desc, form):
        self.ctas, self.desc, self.form, self.reads = ctas, desc, form, []
        self.lane, self.column = address >> 16 & 0x7F, address & 0xFFFF
        rows, width, copies = form
        if self.lane and rows != 4 or self.lane >= 32:
            raise Fault(f"tcgen05.cp of {rows} rows to TMEM lane {self.lane}")
        columns = slice(self.column, self.column + width // 4)
        lanes = self.lane + np.concatenate(copies)
        touched = range(8) if rows > 4 else np.unique(lanes // 16).tolist()
        units = operand_offsets(desc, rows, width, 1, False, True)[1]
        for c in ctas:
            if c.tmem is None:
                raise Fault(f"tcgen05.cp on cta{c.ctaid}, which has allocated no TMEM")
            c.tmem.check_columns(self.column, width // 4)
            for half in touched if c.tmem.check else ():
                at = slice(half, half + 1), columns
                c.tmem.after_writes(machine, w, *at, ins, engine)
                c.tmem.after_reads(machine, w, *at, ins, engine)
                c.tmem.stamp_write(*at, engine.component, engine.time, ins.line)
            check_extent(c.smem, units, "tcgen05.cp")
            self.reads.append(begin_read(w, c.smem, units, ins, "tcgen05.cp read"))

    def run(self):
        rows, width, copies = self.form
        index, _ = operand_offsets(self.desc, rows, width, 1, False, True)
        columns = slice(self.column, self.column + width // 4)
        for c, (smem, access) in zip(self.ctas, self.reads, strict=True):
            data = np.ascontiguousarray(smem.asynchronous[1][index]).view(np.uint32)
            for lanes in copies:
                c.tmem.data[self.lane + lanes, columns] = data
            smem.end_access(access)


@instruction(
    "tcgen05.cp",
    "cta_group::1 cta_group::2 128x256b 128x128b 4x256b 64x128b 32x128b warpx2::02_13 "
    "warpx2::01_23 warpx4",
)
def copy(b, ins):
    """9.7.16.9.1: rows of shared memory, K-major, to lanes of tensor memory."""
    g = cta_group(b, ins)
    form = COPIES.get(tuple(p for p in ins.parts[2:] if not p.startswith("cta_group")))
    if form is None:
        raise b.unsupported(ins)
    gd, gs = b.address(ins.operands[0], "u4"), b.get(ins.operands[1], "u8")

    def run(M, w, frag, m):
        for i in lanes_of(m):
            engine, ctas = engine_of(w, int(i)), pair_of(w, g, "tcgen05.cp")
            op = Copy(M, w, ins, engine, ctas, int(gd(w.r)[i]), int(gs(w.r)[i]), form)
            engine.open.append(op)
            M.later("mma", op.run, queue=(w, i), cause=(w, ins))
            M.count("tcgen05.cp")

    return run


@instruction("tcgen05.commit", GROUPS + " mbarrier::arrive::one shared::cluster multicast::cluster")
def commit(b, ins):
    """An arrival when the earlier operations of this thread are complete, no other lane's.

    It makes these visible, to waits of either scope, and as a fence::before_thread_sync what that
    fence covers. It is no release of the thread's loads and stores, but comes after them.
    """
    mem, *rest = ins.operands
    cta_group(b, ins)
    addr = b.shared_address(mem)
    mask = b.get(rest[0], "u4") if "multicast::cluster" in ins.parts else None

    def run(M, w, frag, m):
        for i in lanes_of(m):
            a = int(addr(w.r)[i])
            ranks = [a >> 24] if mask is None else ranks_of(int(mask(w.r)[i]))
            bars = [w.cta.cluster.mbarrier(w, x << 24 | a & 0xFFFFFF, remote=True) for x in ranks]
            engine = engine_of(w, int(i))
            ops, engine.open = engine.open, []
            clock, time = new_clock(), int(w.clock[w.id])
            pass_narrowly(w.clock, clock)
            if w.tmem_unfenced:
                fence_before_sync(w)
            fenced = w.tmem_fenced
            w.clock[w.id] += 1
            engine.commits += 1
            clock[engine.component] = engine.commits

            def fire(ops=ops, bars=bars, clock=clock, time=time, fenced=fenced):
                end_reads(w, ops, time)
                for mb in bars:
                    if mb.cta.live_warps == 0 and mb.cta is w.cta:
                        M.warnings.add(f"tcgen05.commit still pending on {mb} when its CTA exited")
                        continue
                    if mb.cta.live_warps == 0:
                        raise Fault(f"tcgen05.commit arrives at {mb} of a CTA that has exited")
                    mb.near.add(clock, ())
                    if fenced is not None:
                        mb.release_tmem(fenced, w.cta, CLUSTER)
                    mb.arrive(M, 1)

            M.later("mma", fire, queue=(w, i), cause=(w, ins))

    return run
