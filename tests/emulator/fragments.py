"""Warp-level matrix instructions: ldmatrix, stmatrix, movmatrix, mma.sync (PTX ISA 9.7.14.5)."""

import numpy as np

from .builder import BLOCK, converged, instruction, set_reg, split_by_cta
from .memory import Fault
from .operands import ELEM, gather_ab, gather_d, scatter_d, to_float
from .values import LANES

MATRIX = "m8n8 x1 x2 x4 trans shared shared::cta"


def matrix_rows(w, addr, n, what):
    """The CTA and the 16-byte units of the 8 rows of each of n matrices; lane i addresses row i."""
    a = addr(w.r)[: 8 * n]
    if (a & np.uint32(15)).any():
        raise Fault(
            f"{what}: row address {int(a[(a & np.uint32(15)) != 0][0]):#x} is not 16-byte aligned"
        )
    parts = split_by_cta(w, a)
    if len(parts) != 1:
        raise Fault(f"{what} over several CTAs")
    return parts[0][0].smem, parts[0][2]


def matrix_count(b, ins, regs):
    n = {"x1": 1, "x2": 2, "x4": 4}[next(p for p in ins.parts if p in ("x1", "x2", "x4"))]
    if "m8n8" not in ins.parts or ins.parts[-1] != "b16" or n != len(regs):
        raise b.unsupported(ins)
    return n


@instruction("ldmatrix.sync.aligned", MATRIX)
def ldmatrix(b, ins):
    dst = b.vector(ins.operands[0])
    addr, trans, n = (
        b.shared_address(ins.operands[1]),
        "trans" in ins.parts,
        matrix_count(b, ins, dst),
    )

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        smem, off = matrix_rows(w, addr, n, "ldmatrix")
        smem.check_generic(w, ins, off, 16, write=False)
        rows = smem.generic[16][off >> np.uint32(4)].view(np.uint16).reshape(n, 8, 8)
        if trans:
            rows = rows.transpose(0, 2, 1)
        out = np.ascontiguousarray(rows).reshape(n, LANES, 2).view(np.uint32)[:, :, 0]
        for d, v in zip(dst, out, strict=True):
            set_reg(w, d, np.ascontiguousarray(v), None)

    return run


@instruction("stmatrix.sync.aligned", MATRIX)
def stmatrix(b, ins):
    src = b.vector(ins.operands[1])
    addr, trans, n = (
        b.shared_address(ins.operands[0]),
        "trans" in ins.parts,
        matrix_count(b, ins, src),
    )
    get = [b.get(x, "u4") for x in src]

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        smem, off = matrix_rows(w, addr, n, "stmatrix")
        smem.check_generic(w, ins, off, 16, write=True)
        data = np.stack([g(w.r) for g in get]).view(np.uint16).reshape(n, 8, 8)
        if trans:
            data = data.transpose(0, 2, 1)
        units = (off >> np.uint32(4)).astype(np.int64)
        smem.generic[16][units] = np.ascontiguousarray(data).view(np.uint8).reshape(-1, 16)
        w.dirty.add(smem.note_store(units, 16, (w, ins)))
        M.progress = M.tick

    return run


@instruction("movmatrix.sync.aligned", "m8n8 trans")
def movmatrix(b, ins):
    d, a = ins.operands
    ga = b.get(a, "u4")

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        x = ga(w.r).view(np.uint16).reshape(8, 8).T
        set_reg(w, d, np.ascontiguousarray(x).reshape(LANES, 2).view(np.uint32)[:, 0].copy(), None)

    return run


@instruction("mma.sync.aligned", "m16n8k8 m16n8k16 m16n8k32 row col e4m3 e5m2 tf32 kind::f8f6f4")
def mma_sync(b, ins):
    """D = A B + C of one warp: 16x8, float32 accumulators, K of 32 bytes."""
    p = ins.parts
    shape = next(x for x in p if x.startswith("m16n8"))
    types = [x for x in p[p.index(shape) + 1 :] if x in ELEM or x == "f32"]
    if len(types) != 4 or (types[0], types[3]) != ("f32", "f32") or "f32" in types[1:3]:
        raise b.unsupported(ins)
    _, ta, tb, _ = types
    k = int(shape.split("k")[1])
    if k * ELEM[ta] != 32:
        raise b.unsupported(ins)
    d, a, bb, c = (b.vector(x) for x in ins.operands)
    ga, gb, gc = ([b.get(x, "u4") for x in v] for v in (a, bb, c))

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        av = to_float(gather_ab([g(w.r) for g in ga], ELEM[ta], 16), ta)
        bv = to_float(gather_ab([g(w.r) for g in gb], ELEM[tb], 8), tb)
        cv = gather_d([g(w.r) for g in gc], 8)
        for reg, v in zip(d, scatter_d(cv + av @ bv.T, 8), strict=True):
            set_reg(w, reg, v, None)

    return run
