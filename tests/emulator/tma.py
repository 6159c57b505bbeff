"""Bulk asynchronous copies: tensor tiles (TMA) and plain bytes (PTX ISA 9.7.9.25.4-9.7.9.27).

A load completes on an mbarrier some time after its issue; a store first reads shared memory, then
writes global memory, each some time later, and completes its bulk group.
"""

import numpy as np

from . import tensormap
from .builder import BLOCK, instruction, lanes_of
from .memory import LOCAL_WINDOW, SHARED_WINDOW, SMEM_RESERVED, Fault
from .values import UINT, bf16_bits, bf16_float

TENSOR = (
    "1d 2d 3d 4d 5d tile shared shared::cta shared::cluster global mbarrier::complete_tx::bytes "
    "multicast::cluster cta_group::1 cta_group::2 L2::cache_hint bulk_group add min max inc dec "
    "and or xor"
)


class BulkStore:
    """A bulk copy out of shared memory: how far it is, and who waits for it.

    `over`: its issuer has waited at least for the read.
    """

    __slots__ = ("access", "read", "written", "over", "waiters")

    def __init__(self, access):
        self.access, self.waiters = access, []
        self.read, self.written, self.over = False, False, False

    def reached(self, M, state):
        setattr(self, state, True)
        for w in self.waiters:
            M.wake(w)
        self.waiters.clear()


@instruction("cp.async.bulk.commit_group")
def commit_group(b, ins):
    def run(M, w, frag, m):
        w.bulk_groups.append(w.bulk_open)
        w.bulk_open = []

    return run


@instruction("cp.async.bulk.wait_group", "read")
def wait_group(b, ins):
    """All groups but the n most recent must be complete, whatever order they finish in."""
    n, state = ins.operands[0].bits, "read" if "read" in ins.parts else "written"

    def run(M, w, frag, m):
        cut = max(len(w.bulk_groups) - n, 0)
        older = [op for g in w.bulk_groups[:cut] for op in g]
        pending = [op for op in older if not getattr(op, state)]
        if pending:
            w.why = f"{len(pending)} bulk stores not {state} yet"
            for op in pending:
                op.waiters.append(w)
            return BLOCK
        recent = [op for g in [*w.bulk_groups[cut:], w.bulk_open] for op in g]
        finished, reading = ([op.access for op in x if not op.over] for x in (older, recent))
        w.cta.smem.reads_over(w, finished, reading)
        for op in older:
            op.over = True
        # groups that were waited for as read only may still have to be waited for as written
        left = [g for g in w.bulk_groups[:cut] if any(not op.written for op in g)]
        w.bulk_groups = left + w.bulk_groups[cut:]
        return None

    return run


@instruction("cp.async.bulk.prefetch", "*")
def prefetch(b, ins):
    return lambda M, w, frag, m: None


def read_map(M, addr, coords, what):
    """The tensor map at an address, checked against the instruction and the hardware's rules."""
    if addr % 64:
        raise Fault(f"{what}: tensor map at {addr:#x} is not 64-byte aligned")
    if SHARED_WINDOW <= addr < LOCAL_WINDOW:
        raise Fault(f"{what}: tensor map in shared memory")
    t = tensormap.decode(M.memory.read(addr, 128).tobytes())
    if len(coords) != t.rank:
        raise Fault(f"{what} of rank {len(coords)} with a tensor map of rank {t.rank}")
    if t.interleave or t.oob_nan or set(t.elem_strides) != {1}:
        raise Fault(f"{what}: interleaving, NaN fill and traversal strides are not supported: {t}")
    row = t.box[0] * t.elem
    if row % 16 or (t.swizzle and row > t.swizzle):
        raise Fault(f"{what}: a box row of {row} bytes does not fit swizzle {t.swizzle}")
    return t


def addresses(t, at):
    """Per element of the box, slowest dimension first: its address, and whether it is inside.

    Addresses wrap modulo 2**64, which maps of ragged tensors rely on (strides near 2**34,
    coordinates near 2**30).
    """
    address = np.full((1,) * t.rank, t.base, np.uint64)
    inside = np.ones((1,) * t.rank, bool)
    for d in range(t.rank):
        x = at[d] + np.arange(t.box[d], dtype=np.int64)
        shape = [1] * t.rank
        shape[t.rank - 1 - d] = t.box[d]
        address = address + (x.view(np.uint64) * np.uint64(t.strides[d])).reshape(shape)
        inside = inside & ((x >= 0) & (x < t.dims[d])).reshape(shape)
    return np.broadcast_to(address, inside.shape).reshape(-1), inside.reshape(-1)


def region_view(memory, t, address, what):
    """(elements of the buffer, index of each address); a box lies in one buffer."""
    low, high = int(address.min()), int(address.max())
    base, size, data = memory.find(low, what)
    if high + t.elem > base + size:
        raise Fault(
            f"{what} at {high:#x}: the tensor map describes more than the buffer of {size} bytes "
            f"at {base:#x} holds (dims {t.dims}, strides {t.strides}, map base {t.base:#x})"
        )
    view = data[: size // t.elem * t.elem].view(UINT[t.elem])
    return view, ((address - np.uint64(base)) // np.uint64(t.elem)).astype(np.int64)


def gather(memory, t, at):
    """The bytes of a box; zeros outside the tensor."""
    address, inside = addresses(t, at)
    out = np.zeros(len(inside), UINT[t.elem])
    if inside.any():
        view, where = region_view(memory, t, address[inside], "TMA load")
        out[inside] = view[where]
    return out.view(np.uint8)


def combine(old, new, dtype, op):
    """`op` of raw element bits, as the reduction forms do it."""
    if op in ("and", "or", "xor"):
        return {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[op](old, new)
    f = {"add": np.add, "min": np.minimum, "max": np.maximum}.get(op)
    if f is None:
        raise Fault(f"bulk reduction .{op} is not supported")
    if dtype == "bf16":
        return bf16_bits(f(bf16_float(old), bf16_float(new)))
    types = {
        "f32": np.float32,
        "f32_ftz": np.float32,
        "f16": np.float16,
        "f64": np.float64,
        "s32": np.int32,
        "s64": np.int64,
    }
    typ = types.get(dtype, old.dtype)
    return f(old.view(typ), new.view(typ)).view(old.dtype)


def scatter(memory, t, at, data, op):
    """Writes a box, or combines it with what is there; elements outside the tensor are dropped."""
    address, inside = addresses(t, at)
    if not inside.any():
        return
    view, where = region_view(memory, t, address[inside], "TMA store")
    new = data.view(UINT[t.elem])[inside]
    view[where] = combine(view[where], new, t.dtype, op) if op else new


@instruction("cp.async.bulk.tensor", TENSOR)
def bulk_tensor(b, ins):
    to_shared = next(p for p in ins.parts[4:] if p.startswith(("shared", "global"))).startswith(
        "shared"
    )
    return tma_load(b, ins) if to_shared else tma_store(b, ins, None)


@instruction("cp.reduce.async.bulk.tensor", TENSOR)
def reduce_tensor(b, ins):
    return tma_store(
        b,
        ins,
        next(p for p in ins.parts if p in ("add", "min", "max", "inc", "dec", "and", "or", "xor")),
    )


def ranks_of(mask):
    return [x for x in range(16) if (mask >> x) & 1]


def tma_load(b, ins):
    """Global to shared memory of one CTA or, with a multicast mask, of several."""
    dst, tm, bar, *rest = ins.operands
    gd, gt, gb = b.shared_address(dst), b.address(tm, "u8"), b.shared_address(bar)
    coords = [b.get(c, "i4") for c in tm.coords]
    mask = b.get(rest[0], "u4") if "multicast::cluster" in ins.parts else None
    pair = "cta_group::2" in ins.parts

    def issue(M, w, i):
        r = w.r
        at = [int(c(r)[i]) for c in coords]
        t = read_map(M, int(gt(r)[i]), at, "TMA load")
        M.memory.find(t.base, "base of a tensor map used for a load, which the hardware validates,")
        d, bar_at = int(gd(r)[i]), int(gb(r)[i])
        off, bar_off = d & 0xFFFFFF, bar_at & 0xFFFFFF
        targets = [d >> 24] if mask is None else ranks_of(int(mask(r)[i]))
        if off % 128:
            raise Fault(f"TMA load: destination {d:#x} is not 128-byte aligned")
        if off < SMEM_RESERVED or off + t.box_bytes > w.cta.smem.end:
            raise Fault(f"TMA load: destination {off:#x}+{t.box_bytes} is outside the allocation")
        units = tensormap.box_units(off, t.box_bytes, t.swizzle)
        jobs = []
        for x in targets:
            # with cta_group::2 the barrier may be the peer's: its parity in the pair is that of the
            # operand
            bar_rank = (
                (x & ~1) | (bar_at >> 24 & 1) if pair else (x if mask is not None else bar_at >> 24)
            )
            cta, _ = w.cta.cluster.resolve(x << 24 | off)
            mb = w.cta.cluster.mbarrier(w, bar_rank << 24 | bar_off, remote=True)
            cta.smem.check_async(w, units, "TMA load", write=True)
            jobs.append((cta.smem, cta.smem.begin("TMA write", units, ins, w), mb))

        def run():
            data = gather(M.memory, t, at).reshape(-1, 16)
            for smem, access, mb in jobs:
                smem.write_async(units, data)
                smem.end_access(access)
                smem.written_by(access, mb)
                mb.add_tx(M, -t.box_bytes)

        M.later("tma_load", run, cause=(w, ins))
        M.count("tma_load")

    def load(M, w, frag, m):
        for i in lanes_of(m):
            issue(M, w, i)

    return load


def stored(M, w, smem, units, ins, write):
    """Schedules the halves of a bulk store: `write(bytes)` runs some time after the read."""
    smem.check_async(w, units, "bulk store", write=False)
    access = smem.begin("bulk store read", units, ins, w)
    op = BulkStore(access)
    w.bulk_open.append(op)

    def read():
        data = smem.asynchronous[16][units].copy()
        smem.end_access(access)
        op.reached(M, "read")

        def finish():
            write(data.reshape(-1))
            op.reached(M, "written")

        M.later("tma_store", finish, cause=(w, ins))

    M.later("tma_store", read, cause=(w, ins))
    M.count("tma_store")


def tma_store(b, ins, op):
    """Shared to global memory, or a reduction into it."""
    tm, src = ins.operands[:2]
    gt, gs = b.address(tm, "u8"), b.shared_address(src)
    coords = [b.get(c, "i4") for c in tm.coords]

    def store(M, w, frag, m):
        seen = set()  # lanes that issue the very same store: the hardware instruction is warp-wide
        for i in lanes_of(m):
            at = [int(c(w.r)[i]) for c in coords]
            addr = int(gs(w.r)[i])
            if (addr, *at) in seen:
                continue
            seen.add((addr, *at))
            t = read_map(M, int(gt(w.r)[i]), at, "TMA store")
            cta, off = w.cta.cluster.resolve(addr)
            if off % 128:
                raise Fault(f"TMA store: source {off:#x} is not 128-byte aligned")
            if off + t.box_bytes > cta.smem.end:
                raise Fault(f"TMA store: source {off:#x}+{t.box_bytes} is outside the allocation")
            units = tensormap.box_units(off, t.box_bytes, t.swizzle)
            stored(
                M,
                w,
                cta.smem,
                units,
                ins,
                lambda data, t=t, at=at: scatter(M.memory, t, at, data, op),
            )

    return store


BULK = (
    "shared shared::cta shared::cluster global mbarrier::complete_tx::bytes multicast::cluster "
    "L2::cache_hint bulk_group noftz add min max inc dec and or xor"
)


def bulk_checks(what, *numbers):
    if any(n % 16 for n in numbers):
        listed = ", ".join(hex(n) for n in numbers)
        raise Fault(f"{what}: addresses and size must be multiples of 16: {listed}")


def bulk_copy(b, ins):
    """`cp.async.bulk` without a tensor map, in its three directions."""
    spaces = [p.split("::")[0] for p in ins.parts[3:] if p.split("::")[0] in ("shared", "global")]
    if spaces == ["global", "shared"]:
        return bulk_out(b, ins, None)
    dst, src, size, bar, *rest = ins.operands
    gd, gn, gb = b.shared_address(dst), b.get(size, "u4"), b.shared_address(bar)
    from_shared = spaces[1] == "shared"
    gs = b.shared_address(src) if from_shared else b.address(src, "u8")
    mask = b.get(rest[0], "u4") if "multicast::cluster" in ins.parts else None

    def copy(M, w, frag, m):
        for i in lanes_of(m):
            d, s, n, bar_at = (int(g(w.r)[i]) for g in (gd, gs, gn, gb))
            bulk_checks("cp.async.bulk", d, s, n)
            jobs = []
            units = np.arange((d & 0xFFFFFF) >> 4, ((d & 0xFFFFFF) + n) >> 4)
            for x in [d >> 24] if mask is None else ranks_of(int(mask(w.r)[i])):
                cta, _ = w.cta.cluster.resolve(x << 24 | d & 0xFFFFFF)
                w.cta.cluster.resolve(x << 24 | (d & 0xFFFFFF) + max(n, 1) - 1)
                at = bar_at if mask is None else x << 24 | bar_at & 0xFFFFFF
                mb = w.cta.cluster.mbarrier(w, at, remote=True)
                cta.smem.check_async(w, units, "bulk copy", write=True)
                jobs.append((cta.smem, cta.smem.begin("TMA write", units, ins, w), mb))
            source = None
            if from_shared:
                cta, off = w.cta.cluster.resolve(s)
                own = np.arange(off >> 4, (off + n) >> 4)
                cta.smem.check_async(w, own, "bulk copy", write=False)
                source = (cta.smem, own, cta.smem.begin("bulk copy read", own, ins, w))

            def run(jobs=jobs, source=source, s=s, n=n, units=units):
                if source:
                    smem, own, access = source
                    data = smem.asynchronous[16][own].copy()
                    smem.end_access(access)
                else:
                    data = M.memory.read(s, n).reshape(-1, 16)
                for smem, access, mb in jobs:
                    smem.write_async(units, data)
                    smem.end_access(access)
                    smem.written_by(access, mb)
                    mb.add_tx(M, -n)

            M.later("tma_load", run, cause=(w, ins))
            M.count("bulk_copy")

    return copy


def bulk_out(b, ins, op):
    dst, src, size = ins.operands[:3]
    gd, gs, gn = b.address(dst, "u8"), b.shared_address(src), b.get(size, "u4")
    dtype, _, elem = b.type_of(ins) if op else ("u8", None, 1)

    def copy(M, w, frag, m):
        for i in lanes_of(m):
            d, s, n = (int(g(w.r)[i]) for g in (gd, gs, gn))
            bulk_checks("cp.async.bulk", d, s, n)
            M.memory.read(d, n)
            cta, off = w.cta.cluster.resolve(s)

            def write(data, d=d, n=n):
                target = M.memory.read(d, n).view(UINT[elem])
                target[:] = (
                    combine(target, data.view(UINT[elem]), dtype, op)
                    if op
                    else data.view(UINT[elem])
                )

            stored(M, w, cta.smem, np.arange(off >> 4, (off + n) >> 4), ins, write)

    return copy


for _to in ("shared", "shared::cta", "shared::cluster", "global"):
    instruction(f"cp.async.bulk.{_to}", BULK)(bulk_copy)


@instruction("cp.reduce.async.bulk.global", BULK)
def bulk_reduce(b, ins):
    return bulk_out(
        b,
        ins,
        next(p for p in ins.parts if p in ("add", "min", "max", "inc", "dec", "and", "or", "xor")),
    )
