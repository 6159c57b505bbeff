"""Stores and reductions to a CTA of the cluster that complete on an mbarrier there, later.

PTX ISA 9.7.9.12 (st.async), 9.7.13.8 (red.async). Both work in the generic proxy, which the two
sections name: TMA and the tensor cores see what they wrote after a fence.proxy.async of a warp that
waited on the mbarrier, and what was read or written in the generic proxy before needs none.
"""

import numpy as np

from .accesses import OPERATIONS
from .builder import instruction, lanes_of
from .memory import Fault
from .races import CLUSTER, WEAK
from .values import NP, UINT

REDUCED = {
    "u32": "inc dec min max add and or xor", "s32": "min max add", "b32": "and or xor",
    "u64": "add", "s64": "add",
}  # fmt: skip


def remote(b, ins, op):
    """`op`: a reduction, or None for a store of one to four values."""
    t, kind, size = b.type_of(ins)
    dst, value, bar = ins.operands
    src = [b.get(x, f"u{size}") for x in b.vector(value)]
    addr, mbar = b.shared_address(dst), b.shared_address(bar)
    nbytes, name = size * len(src), ".".join(ins.parts[:2])

    def run(M, w, frag, m):
        a, at, vals = addr(w.r), mbar(w.r), [g(w.r) for g in src]
        for i in lanes_of(m):
            cta, off = w.cta.cluster.resolve(int(a[i]))
            if off % nbytes:
                raise Fault(f"{name} misaligned for {nbytes} bytes: {off:#x}")
            mb = w.cta.cluster.mbarrier(w, int(at[i]), remote=True)
            if mb.cta is not cta:
                raise Fault(f"{name}: data and mbarrier lie in different CTAs")
            data = np.array([v[i] for v in vals], UINT[size])
            words = np.arange(off // 4, (off + nbytes) // 4)
            smem, reduced = cta.smem, cta.smem.reduced
            if op is None or not reduced.issuperset(words.tolist()):
                strength = CLUSTER if op else WEAK
                where = np.array([off], np.uint32)
                smem.check_generic(w, ins, where, nbytes, True, strength, name, enter=op is None)
            if op:
                reduced.update(words.tolist())
            access = smem.begin(name, words, ins, w)

            def land(smem=smem, off=off, data=data, mb=mb, access=access):
                if op:
                    old = smem.generic[size][off // size : off // size + 1].view(NP[kind])
                    data = np.asarray(OPERATIONS[op](old, data.view(NP[kind])), NP[kind])
                smem.generic[1][off : off + nbytes] = data.view(np.uint8)
                stores = {
                    smem.note_store(np.arange(off // size, (off + nbytes) // size), size, (w, ins))
                }
                smem.end_access(access)
                smem.written_by(access, mb)
                mb.near.add_stores(stores)
                mb.add_tx(M, -nbytes)

            M.later("tma_store", land, cause=(w, ins))

    return run


@instruction("st.async", "weak shared::cluster mbarrier::complete_tx::bytes v2 v4")
def store_async(b, ins):
    return remote(b, ins, None)


@instruction(
    "red.async",
    "relaxed cluster shared::cluster mbarrier::complete_tx::bytes inc dec min max add and or xor",
)
def reduce_async(b, ins):
    op = next(p for p in ins.parts if p in OPERATIONS)
    if op not in REDUCED.get(b.type_of(ins)[0], "").split():
        raise b.unsupported(ins)
    return remote(b, ins, op)
