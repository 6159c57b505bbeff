"""Matrices between shared memory and a warp's registers: ldmatrix, stmatrix, movmatrix."""

import numpy as np

from .builder import BLOCK, converged, instruction, set_reg, split_by_cta
from .formats import unpack_padded
from .memory import Fault
from .values import LANES, POISON32

MATRIX = "m8n8 x1 x2 x4 trans shared shared::cta"
PADDED = {"b6x16_p32": 6, "b4x16_p64": 4}


def matrix_rows(w, addr, n, what):
    """The CTA and the 16-byte units of n rows; lane i addresses row i."""
    a = addr(w.r)[:n]
    if (a & np.uint32(15)).any():
        raise Fault(
            f"{what}: row address {int(a[(a & np.uint32(15)) != 0][0]):#x} is not 16-byte aligned"
        )
    parts = split_by_cta(w, a)
    if len(parts) != 1:
        raise Fault(f"{what} over several CTAs")
    return parts[0][0].smem, parts[0][2]


def matrix_count(b, ins, registers):
    """Matrices of an instruction with that many registers (two a matrix of m16n16)."""
    n = {"x1": 1, "x2": 2, "x4": 4}[next(p for p in ins.parts if p in ("x1", "x2", "x4"))]
    if registers != n * (2 if "m16n16" in ins.parts else 1):
        raise b.unsupported(ins)
    return n


def words_of(pieces):
    """(n, 32, bytes of a lane) -> the n registers."""
    return list(np.ascontiguousarray(pieces).view(np.uint32)[..., 0])


def plain(rows, n, trans):
    """m8n8 of 16-bit elements: lane t has two of row t / 4, or of column t / 4."""
    x = rows.view(np.uint16).reshape(n, 8, 8)
    if trans:
        x = x.transpose(0, 2, 1)
    return words_of(np.ascontiguousarray(x).reshape(n, LANES, 2))


def square(rows, n):
    """m16n16 of bytes, transposed: lane t has rows 4 (t % 4).. of columns t / 4 and t / 4 + 8."""
    x = rows.reshape(n, 4, 4, 2, 8).transpose(0, 3, 4, 1, 2)  # column half, t/4, t%4, row
    return words_of(np.ascontiguousarray(x).reshape(2 * n, LANES, 4))


@instruction("ldmatrix.sync.aligned", MATRIX + " m8n16 m16n16 b8x16 b6x16_p32 b4x16_p64")
def ldmatrix(b, ins):
    """9.7.14.5.15: b8x16.b4x16_p64 and b6x16_p32 spread 16 codes of a row to 16 bytes."""
    dst, p = b.vector(ins.operands[0]), ins.parts
    addr, trans, n = b.shared_address(ins.operands[1]), "trans" in p, matrix_count(b, ins, len(dst))
    shape = next((x for x in ("m8n8", "m8n16", "m16n16") if x in p), None)
    width = PADDED.get(p[-1])
    forms = {"m8n8": p[-1] == "b16", "m8n16": width and not trans}
    forms["m16n16"] = trans and n < 4 and (width or p[-1] == "b8")
    if not forms.get(shape) or (width is not None) != ("b8x16" in p):
        raise b.unsupported(ins)
    count = n * (16 if shape == "m16n16" else 8)

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        smem, off = matrix_rows(w, addr, count, "ldmatrix")
        if M.unused is not None and M.unused(w, ins):
            rows = np.full((count, 4), POISON32, np.uint32).view(np.uint8)
        else:
            w.reads(None)
            smem.check_generic(w, ins, off, 16, write=False)
            rows = smem.generic[16][off >> np.uint32(4)]
        if width:
            rows = unpack_padded(rows, width)
        out = square(rows, n) if shape == "m16n16" else plain(rows, n, trans)
        for d, v in zip(dst, out, strict=True):
            set_reg(w, d, np.ascontiguousarray(v), None)

    return run


@instruction("stmatrix.sync.aligned", MATRIX + " m16n8")
def stmatrix(b, ins):
    """9.7.14.5.16: m16n8 stores a 16 x 8 matrix of bytes as 8 rows of 16."""
    src, p = b.vector(ins.operands[1]), ins.parts
    addr, trans, n = b.shared_address(ins.operands[0]), "trans" in p, matrix_count(b, ins, len(src))
    tall = "m16n8" in p
    if not (p[-1] == "b8" and trans if tall else "m8n8" in p and p[-1] == "b16"):
        raise b.unsupported(ins)
    get = [b.get(x, "u4") for x in src]

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        smem, off = matrix_rows(w, addr, 8 * n, "stmatrix")
        smem.check_generic(w, ins, off, 16, write=True)
        data = np.stack([g(w.r) for g in get])
        if tall:  # matrix, t/4, t%4, column half, row of the pair
            data = data.view(np.uint8).reshape(n, 8, 4, 2, 2).transpose(0, 2, 4, 3, 1)
        else:
            data = data.view(np.uint16).reshape(n, 8, 8)
            data = data.transpose(0, 2, 1) if trans else data
        units = (off >> np.uint32(4)).astype(np.int64)
        smem.generic[16][units] = np.ascontiguousarray(data).view(np.uint8).reshape(-1, 16)
        w.stores(smem.note_store(units, 16, (w, ins)), None)
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
