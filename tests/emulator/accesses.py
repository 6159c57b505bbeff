"""Loads, stores and atomics (PTX ISA 9.7.9.8-9.7.9.11, 9.7.13.6-7).

Each instruction of a warp takes effect at once, for all its lanes; its modifiers say what else it
orders (see `races`).
"""

import numpy as np

from .builder import MASK24, instruction, lanes_of, set_reg, split_by_cta
from .memory import LOCAL_WINDOW, SHARED_WINDOW, Fault, misaligned
from .ptx import Mem, PtxError, Sink, Sym
from .semantics import PLAIN, Semantics
from .values import LANES, NP, UINT, bf16_bits, bf16_float, only

CACHE = (
    "weak relaxed acquire release acq_rel volatile mmio cta cluster gpu sys shared shared::cta "
    "shared::cluster global param param::entry param::func local const nc ca cg cs lu cv wb wt v2 "
    "v4 v8 L1::evict_normal L1::evict_unchanged L1::evict_first L1::evict_last L1::no_allocate "
    "L2::cache_hint L2::64B L2::128B L2::256B L2::evict_first L2::evict_last"
)


def load_shared(w, a, size, n, ins, order=PLAIN):
    """n consecutive values of `size` bytes at each shared address; order: its Semantics."""
    if (a % np.uint32(size * n)).any():
        raise misaligned("shared load", a, size * n)
    values = [np.zeros(len(a), UINT[size]) for _ in range(n)]
    for cta, sel, off in split_by_cta(w, a):
        cta.smem.check_generic(w, ins, off, size * n, write=False, strength=order.strength)
        if order.strength and cta.smem.releases:
            order.observe(w, cta.smem.releases, off)
        at = (off // np.uint32(size)).astype(np.int64)
        view = cta.smem.generic[size]
        for j in range(n):
            values[j][sel] = view[at + j]
    return values


def store_shared(w, a, size, vals, ins, order=PLAIN, lanes=None):
    """Stores the arrays `vals` to consecutive places at each shared address, those of `lanes`."""
    n = len(vals)
    if (a % np.uint32(size * n)).any():
        raise misaligned("shared store", a, size * n)
    for cta, sel, off in split_by_cta(w, a):
        cta.smem.check_generic(w, ins, off, size * n, write=True, strength=order.strength)
        if order.strength:
            order.publish(w, cta.smem.releases, off, keep=False)
        at = (off // np.uint32(size)).astype(np.int64)
        view = cta.smem.generic[size]
        for j in range(n):
            view[at + j] = vals[j][sel]
        index = at if n == 1 else np.concatenate([at + j for j in range(n)])
        w.stores(cta.smem.note_store(index, size, (w, ins)), lanes)


def window(a):
    """The state space of generic addresses, by the first lane's."""
    top = int(a[0])
    return "local" if top >= LOCAL_WINDOW else "shared" if top >= SHARED_WINDOW else "global"


def local_bytes(w, a, nbytes):
    off = (a & np.uint64(LOCAL_WINDOW - 1)).astype(np.int64)
    if (
        w.local is None
        or off.min() < 0
        or off.max() + nbytes > w.local.shape[1]
        or (off % nbytes).any()
    ):
        raise Fault(
            f"local access of {nbytes} bytes at offset {int(off.max())}: misaligned or outside the "
            "allocation"
        )
    return off


@instruction("ld", CACHE)
def load(b, ins):
    space = b.space(ins)
    _, kind, size = b.type_of(ins)
    raw, typ = UINT[size], NP[kind]
    dst, mem = b.vector(ins.operands[0]), ins.operands[1]
    nbytes = size * len(dst)

    def finish(w, values, m):
        for d, v in zip(dst, values, strict=True):
            if isinstance(d, Sink):
                continue
            full = v
            if m is not None:
                full = np.zeros(LANES, raw)
                full[m] = v
            if kind[0] == "i":
                full = full.view(typ).astype(f"i{max(d.width // 8, size)}")
            set_reg(w, d, full, m)

    if space == "param" and isinstance(mem.base, Sym):
        return load_param(b, ins, mem, raw, size, len(dst), finish)
    addr = b.address(mem, "u4" if space == "shared" else "u8")
    order = Semantics(ins, "load")

    def ld(M, w, frag, m):
        a = addr(w.r)
        if m is not None:
            a = a[m]
        where = window(a) if space in ("generic", "param") else space
        if where == "shared":
            w.reads(m)
            finish(
                w,
                load_shared(
                    w,
                    a if a.dtype == np.uint32 else (a - np.uint64(SHARED_WINDOW)).astype(np.uint32),
                    size,
                    len(dst),
                    ins,
                    order,
                ),
                m,
            )
        elif where == "local":
            off, lanes = local_bytes(w, a, nbytes), np.asarray(lanes_of(m))
            rows = np.stack([w.local[lanes, off + i] for i in range(nbytes)], axis=1)
            finish(w, list(np.ascontiguousarray(rows).view(raw).T.copy()), m)
        else:
            values = [np.zeros(len(a), raw) for _ in dst]
            for sel, region, off in M.memory.locate(a, nbytes, "load"):
                if region.track:
                    order.load(w, ins, region.track, off, nbytes)
                view = region.data[: region.size // size * size].view(raw)
                for j, v in enumerate(values):
                    v[sel] = view[off // size + j]
            finish(w, values, m)

    return ld


def load_param(b, ins, mem, raw, size, n, finish):
    """`ld.param` of a kernel parameter, or of the value a call returned."""
    entry = next((p for p in b.program.kernel.params if p[0] == mem.base.name), None)
    if entry is None:

        def ld_return(M, w, frag, m):
            block = w.call_params[mem.base.name][:, mem.offset : mem.offset + size * n]
            values = np.ascontiguousarray(block).view(raw).T
            finish(w, [v.copy() if m is None else v[m] for v in values], m)

        return ld_return
    at = entry[3] + mem.offset

    def ld_param(M, w, frag, m):
        param = w.cta.cluster.grid.param
        values = np.frombuffer(param[at : at + size * n].tobytes(), raw)
        lanes = LANES if m is None else int(m.sum())
        finish(w, [np.full(lanes, v, raw) for v in values], m)

    return ld_param


@instruction("st", CACHE)
def store(b, ins):
    space = b.space(ins)
    _, _, size = b.type_of(ins)
    mem = ins.operands[0]
    src = [b.get(x, f"u{size}") for x in b.vector(ins.operands[1])]
    nbytes = size * len(src)
    if space == "param":
        name, (total, _) = mem.base.name, b.program.kernel.call_params[mem.base.name]

        def st_param(M, w, frag, m):
            block = w.call_params.setdefault(name, np.zeros((LANES, total), np.uint8))
            block[:, mem.offset : mem.offset + nbytes] = (
                np.stack([g(w.r) for g in src], axis=1).view(np.uint8).reshape(LANES, nbytes)
            )

        return st_param
    addr = b.address(mem, "u4" if space == "shared" else "u8")
    order = Semantics(ins, "store")

    def st(M, w, frag, m):
        a, vals = addr(w.r), [g(w.r) for g in src]
        if m is not None:
            a, vals = a[m], [v[m] for v in vals]
        M.progress = M.tick
        where = window(a) if space == "generic" else space
        if where == "shared":
            store_shared(
                w,
                a if a.dtype == np.uint32 else (a - np.uint64(SHARED_WINDOW)).astype(np.uint32),
                size,
                vals,
                ins,
                order,
                m,
            )
        elif where == "local":
            off, lanes = local_bytes(w, a, nbytes), np.asarray(lanes_of(m))
            rows = np.stack(vals, axis=1).view(np.uint8).reshape(len(off), nbytes)
            for i in range(nbytes):
                w.local[lanes, off + i] = rows[:, i]
        else:
            for sel, region, off in M.memory.locate(a, nbytes, "store"):
                view = region.data[: region.size // size * size].view(UINT[size])
                at, new = off // size, [v[sel] for v in vals]
                if region.track:

                    def same(view=view, at=at, new=new):
                        return all((view[at + j] == v).all() for j, v in enumerate(new))

                    order.store(w, ins, region.track, off, nbytes, same)
                for j, v in enumerate(new):
                    view[at + j] = v

    return st


def _on_float(f):
    """A bf16 operation by way of float32."""
    return lambda o, x: bf16_bits(np.float32(f(bf16_float(o), bf16_float(x))))


OPERATIONS = {
    "add": lambda o, x: o + x,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda o, x: o & x,
    "or": lambda o, x: o | x,
    "xor": lambda o, x: o ^ x,
    "exch": lambda o, x: x,
    "inc": lambda o, x: np.where(o >= x, o.dtype.type(0), o + o.dtype.type(1)),
    "dec": lambda o, x: np.where((o == 0) | (o > x), x, o - o.dtype.type(1)),
}
ATOMIC = CACHE + " noftz add min max and or xor exch cas inc dec"


@instruction("atom", ATOMIC)
def atom(b, ins):
    return atomic(b, ins, b.vector(ins.operands[0]), ins.operands[1], ins.operands[2:])


@instruction("red", ATOMIC)
def red(b, ins):
    return atomic(b, ins, (), ins.operands[0], ins.operands[1:])


def atomic(b, ins, dst, mem, rest):
    """One lane after another, in a random order: nothing promises an order among lanes."""
    space = b.space(ins)
    t, kind, size = b.type_of(ins)
    name = next(p for p in ins.parts[1:] if p in OPERATIONS or p == "cas")
    typ = {"f16x2": np.float16, "bf16x2": np.uint16, "bf16": np.uint16}.get(t, NP[kind])
    f = OPERATIONS.get(name)
    if t in ("bf16", "bf16x2"):
        f = _on_float(f)
    if not isinstance(mem, Mem):
        raise PtxError(f"line {ins.line}: unsupported instruction {ins.text}")
    src = [[b.get(x, f"u{size}") for x in b.vector(v)] for v in rest[: 2 if name == "cas" else 1]]
    addr = b.address(mem, "u4" if space == "shared" else "u8")
    width, order = len(src[0]), Semantics(ins, "atomic")

    def run(M, w, frag, m):
        a = addr(w.r)
        vals = [[g(w.r) for g in column] for column in src]
        out = [np.zeros(LANES, UINT[size]) for _ in range(width)]
        sequence = list(lanes_of(m))
        M.rng.shuffle(sequence)
        for i in sequence:
            cell = cell_at(M, w, i, int(a[i]), space, size * width, ins, order)
            cell = cell.view(UINT[size])
            for j in range(width):
                old = cell[j : j + 1].copy()
                out[j][i] = old[0]
                new = vals[-1][j][i : i + 1].view(typ)
                if name == "cas":
                    if old[0] == vals[0][j][i]:
                        cell[j : j + 1] = new.view(UINT[size])
                else:
                    cell[j : j + 1] = np.asarray(f(old.view(typ), new), typ).view(UINT[size])
        for d, v in zip(dst, out, strict=False):
            set_reg(w, d, v, m)
        M.progress = M.tick

    return run


def cell_at(M, w, lane, addr, space, nbytes, ins, order):
    """The bytes that an atomic operation of a lane works on."""
    if space == "shared" or SHARED_WINDOW <= addr < LOCAL_WINDOW:
        cta, off = w.cta.cluster.resolve(addr & 0xFFFFFFFF)
        if off % nbytes:
            raise Fault(f"shared atomic misaligned for {nbytes} bytes: {off:#x}")
        cell = np.array([off], np.uint32)
        cta.smem.check_generic(w, ins, cell, nbytes, write=True, strength=order.strength)
        order.observe(w, cta.smem.releases, cell)
        order.publish(w, cta.smem.releases, cell, keep=True)
        index = np.arange(off & int(MASK24), off + nbytes)
        w.stores(cta.smem.note_store(index, 1, (w, ins)), only(lane))
        return cta.smem.generic[1][off : off + nbytes]
    ((_, region, off),) = M.memory.locate(np.array([addr], np.uint64), nbytes, "atomic")
    if region.track:
        order.modify(w, ins, region.track, off, nbytes)
    return region.data[int(off[0]) : int(off[0]) + nbytes]
