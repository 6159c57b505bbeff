"""tcgen05: allocation, MMA and commit, loads and stores of its memory (PTX ISA 9.7.16).

MMAs and commits of one thread run in order. `tcgen05.ld` reads at its issue, so that a missing
`wait::ld` cannot be found; nor are `tcgen05.fence`s needed.
"""

import numpy as np

from .accesses import store_shared
from .builder import BLOCK, converged, first, instruction, lanes_of, set_reg
from .memory import Fault
from .ordering import new_clock
from .ptx import Mem, Vec
from .state import TMEM_COLUMNS
from .tensorcore import Mma, check_tmem, shape_of
from .tma import ranks_of
from .values import LANE_IDS, POISON32

GROUPS = "cta_group::1 cta_group::2 sync aligned"


def allocate(cta, columns):
    """First fit; None if there is no room."""
    if cta.tmem is None:
        cta.tmem = np.full((128, TMEM_COLUMNS), POISON32, np.uint32)
    at = 0
    for start, n in sorted(cta.tmem_alloc.items()):
        if start - at >= columns:
            break
        at = start + n
    if at + columns > TMEM_COLUMNS:
        return None
    cta.tmem_alloc[at] = columns
    return at


def allocate_pair(M, w, frag, n):
    """Collective over the CTA pair: the address once both have asked, else None."""
    cta, peer = w.cta, w.cta.cluster.ctas[w.cta.rank ^ 1]
    if frag.token is None:
        frag.token = cta.alloc_calls = cta.alloc_calls + 1
        cta.alloc_waiters.append(w)
    if peer.alloc_calls < frag.token:
        w.why = "tcgen05.alloc of the peer CTA"
        return None
    if frag.token not in cta.alloc_done:
        for c in (cta, peer):
            c.alloc_done[frag.token] = allocate(c, n)
    for x in peer.alloc_waiters:
        M.wake(x)
    peer.alloc_waiters.clear()
    at, frag.token = cta.alloc_done[frag.token], None
    return -1 if at is None else at


@instruction("tcgen05.alloc", GROUPS + " shared::cta")
def alloc(b, ins):
    addr, columns = b.shared_address(ins.operands[0]), b.get(ins.operands[1], "u4")
    pair = "cta_group::2" in ins.parts

    def run(M, w, frag, m):
        n = first(columns(w.r), m)
        if n < 32 or n > TMEM_COLUMNS or n & (n - 1):
            raise Fault(f"tcgen05.alloc of {n} columns")
        if w.cta.tmem_relinquished:
            raise Fault("tcgen05.alloc after relinquish_alloc_permit")
        at = allocate_pair(M, w, frag, n) if pair else allocate(w.cta, n)
        if at is None and pair:
            return BLOCK
        if at is None or at < 0:
            raise Fault(
                f"tcgen05.alloc of {n} columns can never succeed: {w.cta.tmem_alloc} are taken"
            )
        M.progress = M.tick
        store_shared(w, addr(w.r)[:1], 4, [np.array([at], np.uint32)], ins)

    return run


@instruction("tcgen05.dealloc", GROUPS)
def dealloc(b, ins):
    addr, columns = b.get(ins.operands[0], "u4"), b.get(ins.operands[1], "u4")

    def run(M, w, frag, m):
        at, n = first(addr(w.r), m) & 0xFFFF, first(columns(w.r), m)
        if w.cta.tmem_alloc.pop(at, None) != n:
            raise Fault(f"tcgen05.dealloc of {n} columns at {at}: not an allocation")
        if w.cta.tmem_busy[at : at + n].any():
            raise Fault("tcgen05.dealloc while MMAs are still writing")

    return run


@instruction("tcgen05.relinquish_alloc_permit", GROUPS)
def relinquish(b, ins):
    def run(M, w, frag, m):
        w.cta.tmem_relinquished = True

    return run


@instruction("tcgen05.fence", "*")
def fence(b, ins):
    return lambda M, w, frag, m: None


@instruction("tcgen05.wait::ld", "sync aligned")
def wait_ld(b, ins):
    return lambda M, w, frag, m: None if converged(w, frag) else BLOCK


@instruction("tcgen05.wait::st", "sync aligned")
def wait_st(b, ins):
    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        if not w.st_pending:
            return None
        w.st_waiting, w.why = True, "tcgen05.st"
        return BLOCK

    return run


def access_shape(b, ins):
    """9.7.16.2.3: (columns, lane and column of each register and thread, whole lanes or not)."""
    shape = next(p for p in ins.parts if p[0].isdigit() and "x" in p and p.endswith("b"))
    count = int(next(p for p in ins.parts if p[0] == "x" and p[1:].isdigit())[1:])
    t = LANE_IDS.astype(np.int64)
    one = {
        "32x32b": [(t, 0 * t)],
        "16x64b": [(t // 4 + 8 * (t & 1), (t >> 1) & 1)],
        "16x128b": [(t // 4 + 8 * h, t % 4) for h in (0, 1)],
        "16x256b": [(t // 4 + 8 * h, 2 * (t % 4) + j) for h in (0, 1) for j in (0, 1)],
    }.get(shape)
    if one is None or "pack::16b" in ins.parts or "unpack::16b" in ins.parts:
        raise b.unsupported(ins)
    width = {"32x32b": 1, "16x64b": 2, "16x128b": 4, "16x256b": 8}[shape]
    lanes = np.stack([lane for _ in range(count) for lane, _ in one])
    columns = np.stack([c + width * i for i in range(count) for _, c in one])
    return width * count, lanes, columns, shape == "32x32b"


def place(w, address, n, whole, what):
    """The lane and column that a warp's access starts at, checked."""
    lane, column = address >> 16, address & 0xFFFF
    quarter = 32 * (w.index % 4)
    if lane != quarter and (whole or lane != quarter + 16):
        raise Fault(
            f"{what} of TMEM lane {lane} by warp {w.index}, which owns {quarter}..{quarter + 31}"
        )
    check_tmem(w.cta, column, n)
    if w.cta.smem.check and w.cta.tmem_busy[column : column + n].any():
        raise Fault(
            f"race: {what} of TMEM columns {column}..{column + n - 1} that an MMA is still using"
        )
    return lane, column


@instruction("tcgen05.ld.sync.aligned", "*")
def load(b, ins):
    n, lanes, columns, whole = access_shape(b, ins)
    dst = b.vector(ins.operands[0])
    if len(dst) != len(lanes):
        raise b.unsupported(ins)
    addr = b.address(ins.operands[1], "u4")

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        lane, column = place(w, first(addr(w.r), m), n, whole, "tcgen05.ld")
        for d, v in zip(dst, w.cta.tmem[lane + lanes, column + columns], strict=True):
            set_reg(w, d, v, m)

    return run


@instruction("tcgen05.st.sync.aligned", "*")
def store(b, ins):
    n, lanes, columns, whole = access_shape(b, ins)
    get = [b.get(x, "u4") for x in b.vector(ins.operands[1])]
    addr = b.address(ins.operands[0], "u4")

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        lane, column = place(w, first(addr(w.r), m), n, whole, "tcgen05.st")
        data = np.stack([g(w.r) for g in get])
        w.st_pending += 1

        def fire():
            w.cta.tmem[lane + lanes, column + columns] = data
            w.st_pending -= 1
            if w.st_waiting and not w.st_pending:
                w.st_waiting = False
                M.wake(w)

        M.later("mma", fire, cause=(w, ins))

    return run


KINDS = "cta_group::1 cta_group::2 kind::f16 kind::tf32 kind::f8f6f4"
COLLECTOR = "collector::a::fill collector::a::use collector::a::lastuse collector::a::discard"


@instruction("tcgen05.mma", f"{KINDS} {COLLECTOR}")
def mma(b, ins):
    pair = "cta_group::2" in ins.parts
    kind = next(x for x in ins.parts if x.startswith("kind::"))[6:]
    d, a, bd, idesc, *rest = ins.operands
    a_in_tmem = isinstance(a, Mem)
    gd, ga = b.address(d, "u4"), b.address(a, "u4") if a_in_tmem else b.get(a, "u8")
    gb, gi = b.get(bd, "u8"), b.get(idesc, "u4")
    disabled = [b.get(x, "u4") for x in rest.pop(0).items] if isinstance(rest[0], Vec) else []
    ge = b.get(rest[0], "?")

    def run(M, w, frag, m):
        r, cluster = w.r, w.cta.cluster
        for i in lanes_of(m):
            if pair and w.cta.rank & 1:
                raise Fault("tcgen05.mma.cta_group::2 issued by the odd CTA of the pair")
            if any(int(g(r)[i]) for g in disabled):
                raise Fault("tcgen05.mma: disable-output-lane is not supported")
            ctas = cluster.ctas[w.cta.rank : w.cta.rank + 2] if pair else [w.cta]
            shape = shape_of(int(gi(r)[i]), kind)
            op = Mma(
                w,
                ins,
                ctas,
                int(gd(r)[i]),
                int(ga(r)[i]),
                int(gb(r)[i]),
                shape,
                bool(ge(r)[i]),
                a_in_tmem,
            )
            w.mma_open.append(op)
            M.later("mma", op.run, queue=(w, i), cause=(w, ins))
            M.count("mma")

    return run


@instruction("tcgen05.commit", GROUPS + " mbarrier::arrive::one shared::cluster multicast::cluster")
def commit(b, ins):
    """An arrival when the thread's earlier MMAs are complete and have read their operands."""
    mem, *rest = ins.operands
    addr = b.shared_address(mem)
    mask = b.get(rest[0], "u4") if "multicast::cluster" in ins.parts else None

    def run(M, w, frag, m):
        for i in lanes_of(m):
            a = int(addr(w.r)[i])
            ranks = [a >> 24] if mask is None else ranks_of(int(mask(w.r)[i]))
            bars = [w.cta.cluster.mbarrier(w, x << 24 | a & 0xFFFFFF, remote=True) for x in ranks]
            ops, w.mma_open = w.mma_open, []
            clock, time = new_clock(), int(w.clock[w.id])
            w.release(clock)

            def fire(ops=ops, bars=bars, clock=clock, time=time):
                for op in ops:
                    for smem, access in op.reads:
                        smem.read_over_at(w, access, time)
                for mb in bars:
                    if mb.cta.live_warps == 0 and mb.cta is w.cta:
                        M.warnings.add(f"tcgen05.commit still pending on {mb} when its CTA exited")
                        continue
                    if mb.cta.live_warps == 0:
                        raise Fault(f"tcgen05.commit arrives at {mb} of a CTA that has exited")
                    np.maximum(mb.clock, clock, out=mb.clock)
                    mb.arrive(M, 1)

            M.later("mma", fire, queue=(w, i), cause=(w, ins))

    return run
