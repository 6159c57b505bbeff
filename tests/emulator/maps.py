"""Tensor maps in memory: their use by TMA, changing them, the fences in between.

PTX ISA 9.7.9.28 (tensormap.replace), 9.7.13.5 (fence.proxy.tensormap), 9.7.13.16
(tensormap.cp_fenceproxy). TMA reads a map through the tensormap proxy: what the kernel itself wrote
there it sees after a release fence of the writer and an acquire fence of the user on these bytes.
"""

import numpy as np

from . import tensormap
from .builder import BLOCK, converged, instruction, lanes_of
from .memory import LOCAL_WINDOW, SHARED_WINDOW, Fault, misaligned
from .ptx import Imm, PtxError
from .values import only

MAP_BYTES = 128


def read_map(M, w, ins, addr, rank, what):
    """The tensor map at an address, checked against the instruction and the driver's rules."""
    if addr % 64:
        raise Fault(f"{what}: tensor map at {addr:#x} is not 64-byte aligned")
    if SHARED_WINDOW <= addr < LOCAL_WINDOW:
        raise Fault(f"{what}: tensor map in shared memory")
    region = M.memory.region(addr, "tensor map")
    off = addr - region.base
    if off + MAP_BYTES > region.size:
        raise Fault(f"{what}: the tensor map at {addr:#x} runs past its buffer, {region.name}")
    if region.track and M.memory.order.check:
        at = np.array([off], np.int64)
        region.track.read(w, ins, at, MAP_BYTES, f"{what} of a tensor map")
        if region.track.writes is not None:
            check_fences(M, w, region.track, off, what)
    try:
        t = tensormap.decode(region.data[off : off + MAP_BYTES].tobytes())
    except ValueError as e:
        raise Fault(f"{what}: {e}") from None
    if rank != t.rank:
        raise Fault(f"{what} of rank {rank} with a tensor map of rank {t.rank}")
    if t.interleave:
        raise Fault(f"{what}: interleaved layouts are not supported: {t}")
    if why := t.problem():
        raise Fault(f"{what}: illegal tensor map: {why}: {t}")
    return t


def writes_of(track, off):
    granules = track.granules(np.array([off], np.int64), MAP_BYTES)
    return track.unordered_writes(granules)


def check_fences(M, w, track, off, what):
    """Every write of this launch to a map must be known to the warp by an acquire fence."""
    order = M.memory.order
    for n in writes_of(track, off):
        e = order.events[n]
        if not track.same_era(w, e):
            continue
        if not any(n in covered and order.knows(w, f) for f, covered in track.maps.get(off, ())):
            raise Fault(
                f"{what}: use of a tensor map in {track.name} + {off:#x} without a "
                f"fence.proxy.tensormap::generic.acquire after its change, the {e}"
            )


@instruction("fence.proxy.tensormap::generic.release", "cta cluster gpu sys")
def fence_release(b, ins):
    return lambda M, w, frag, m: M.memory.order.add_fence(w, M.memory.order.map_releases, ins)


@instruction("fence.proxy.tensormap::generic.acquire", "cta cluster gpu sys")
def fence_acquire(b, ins):
    """Lets TMA use a map as it was written before release fences that are ordered before this."""
    mem, size = ins.operands
    addr = b.address(mem, "u8")
    if not isinstance(size, Imm) or size.bits != MAP_BYTES:
        raise PtxError(f"line {ins.line}: the size of {ins.text} must be {MAP_BYTES}")

    def run(M, w, frag, m):
        order = M.memory.order
        for x in np.unique(addr(w.r)[list(lanes_of(m))]).tolist():
            region = M.memory.region(x, "tensor map")
            track, off = region.track, x - region.base
            if not order.check or track is None or track.writes is None:
                continue
            covered = {
                n
                for n in writes_of(track, off)
                if order.fenced(w, order.events[n], order.map_releases)
            }
            entries = track.maps.setdefault(off, [])
            if not entries or entries[-1][1] != covered or entries[-1][0].component != w.id:
                fence = order.new(w, ins, "fence", w.id, int(w.clock[w.id]))
                entries.append((order.events[fence], covered))

    return run


@instruction("tensormap.cp_fenceproxy", "*")
def copy_and_fence(b, ins):
    """Copies a map from shared to global memory and releases it, as one warp."""
    dst, src, size = ins.operands
    to, source = b.address(dst, "u8"), b.shared_address(src)
    if size.bits != MAP_BYTES or "release" not in ins.parts:
        raise b.unsupported(ins)

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        lane = next(iter(lanes_of(m)))
        a, s = int(to(w.r)[lane]), int(source(w.r)[lane])
        cta, off = w.cta.cluster.resolve(s)
        if a % MAP_BYTES or off % MAP_BYTES:
            raise Fault(f"tensormap.cp_fenceproxy: {a:#x} or {off:#x} is not 128-byte aligned")
        lines = np.array([off], np.uint32) + np.arange(0, MAP_BYTES, 16, dtype=np.uint32)
        cta.smem.check_generic(w, ins, lines, 16, write=False)
        change(M, w, ins, a, cta.smem.generic[1][off : off + MAP_BYTES].copy(), "map copy")
        M.memory.order.add_fence(w, M.memory.order.map_releases, ins)
        return None

    return run


def change(M, w, ins, addr, raw, what):
    """Writes a tensor map to global memory."""
    region = M.memory.region(addr, what)
    off = addr - region.base
    if off + MAP_BYTES > region.size:
        raise Fault(f"{what} at {addr:#x} runs past its buffer, {region.name}")
    if region.track:
        at = np.array([off], np.int64)
        region.track.write(w, ins, at, MAP_BYTES, what)
    region.data[off : off + MAP_BYTES] = raw


WITH_ORDINAL = ("box_dim", "global_dim", "global_stride", "element_stride")


@instruction("tensormap.replace.tile", "*")
def replace(b, ins):
    """Changes one field of a map in global memory or in the CTA's shared memory."""
    field, space = ins.parts[3], b.space(ins)
    _, kind, _ = b.type_of(ins)
    mem, *rest = ins.operands
    ordinal = rest.pop(0).bits if field in WITH_ORDINAL else 0
    value = b.get(rest[0], kind)
    to_shared = space == "shared"
    addr = b.shared_address(mem) if to_shared else b.address(mem, "u8")
    try:
        tensormap.replace(np.zeros(MAP_BYTES, np.uint8), field, ordinal, 1)
    except ValueError:
        raise b.unsupported(ins) from None

    def run(M, w, frag, m):
        a, v = addr(w.r), value(w.r)
        if a[0] % MAP_BYTES:
            raise misaligned("tensormap.replace", a[:1], MAP_BYTES)
        for i in lanes_of(m):
            x, new = int(a[i]), int(v[i])
            shared = to_shared or SHARED_WINDOW <= x < LOCAL_WINDOW
            if field == "global_stride" and new % 16:
                raise Fault(f"tensormap.replace: stride {new} is no multiple of 16 bytes")
            if shared:
                replace_shared(w, ins, i, x, field, ordinal, new)
                continue
            raw = M.memory.read(x, MAP_BYTES).copy()
            tensormap.replace(raw, field, ordinal, new)
            change(M, w, ins, x, raw, "tensormap.replace")

    return run


def replace_shared(w, ins, lane, addr, field, ordinal, value):
    cta, off = w.cta.cluster.resolve(addr & 0xFFFFFFFF)
    lines = np.array([off], np.uint32) + np.arange(0, MAP_BYTES, 16, dtype=np.uint32)
    cta.smem.check_generic(w, ins, lines, 16, write=True)
    tensormap.replace(cta.smem.generic[1][off : off + MAP_BYTES], field, ordinal, value)
    stores = cta.smem.note_store(np.arange(off // 16, off // 16 + 8), 16, (w, ins))
    w.stores(stores, only(lane))
