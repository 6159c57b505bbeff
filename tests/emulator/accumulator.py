"""A small tcgen05 kernel in PTX, with the waits and fences of PTX ISA 9.7.16.6 and none too many.

A thread of warp 4 multiplies A (128, 16) with B0 and then B1 (16, 16) into one accumulator in
tensor memory; warps 0 to 3 read each product, free the accumulator for the next, and store.
"""

import numpy as np

from . import ptx
from .operands import operand_offsets
from .program import Program
from .snippet import launch_ptx, snippet_text
from .values import bf16_bits, bf16_float

M, N, K = 128, 16, 16
BASE = 1024  # of dynamic shared memory
OPERAND_BYTES = 4096  # apart; A needs all of it
BARRIERS = 3 * OPERAND_BYTES  # full, empty, and the address of the accumulator
SMEM_BYTES = BARRIERS + 32
THREADS = 160

PROLOGUE = """
mov.b32 %r2, dynamic;
setp.eq.u32 %p1, %r0, 128;
setp.lt.u32 %p4, %r0, 32;
setp.lt.u32 %p6, %r0, 128;
and.b32 %r8, %r0, 31;
setp.eq.u32 %p7, %r8, 0;
setp.ne.u32 %p3, 0, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r2+{full}], 1;
@%p1 mbarrier.init.shared::cta.b64 [%r2+{empty}], 4;
@!%p4 bra FILL;
tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2+{address}], 32;
FILL:
mov.b32 %r3, %r0;
COPY: mad.wide.u32 %d8, %r3, 4, %d1;
ld.global.u32 %r4, [%d8];
mad.lo.u32 %r5, %r3, 4, %r2;
st.shared.u32 [%r5], %r4;
add.u32 %r3, %r3, {threads};
setp.lt.u32 %p5, %r3, {words};
@%p5 bra COPY;
fence.proxy.async.shared::cta;
bar.sync 0;
ld.shared.u32 %r6, [%r2+{address}];
@!%p6 bra ISSUER;
and.b32 %r7, %r0, 96;
shl.b32 %r7, %r7, 16;
add.u32 %r7, %r7, %r6;
"""
LOAD = """
FULL{i}:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2+{full}], {i};
@!%p2 bra FULL{i};
tcgen05.fence::after_thread_sync;
tcgen05.ld.sync.aligned.32x32b.x16.b32 {{{registers}}}, [%r7];
"""
FREE = """
tcgen05.wait::ld.sync.aligned;
tcgen05.fence::before_thread_sync;
@%p7 mbarrier.arrive.shared::cta.b64 _, [%r2+{empty}];
"""
ISSUE = """
tcgen05.mma.cta_group::1.kind::f16 [%r6], {a}, {b}, {idesc}, %p3;
tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2+{full}];
"""
WAIT_EMPTY = """
EMPTY:
mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2+{empty}], 0;
@!%p2 bra EMPTY;
tcgen05.fence::after_thread_sync;
"""
EPILOGUE = """
JOIN:
bar.sync 0;
@!%p4 bra END;
tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r6, 32;
END:
"""


def descriptor(operand, leading_bytes):
    """K-major, no swizzle: 8x8 matrices of 128 bytes, rows of them 128 bytes apart."""
    start = BASE + operand * OPERAND_BYTES
    return start >> 4 | leading_bytes >> 4 << 16 | 128 >> 4 << 32 | 1 << 46


A = descriptor(0, M * 16)
B = [descriptor(1 + i, N * 16) for i in range(2)]
# float32 accumulator, bfloat16 operands, N and M (9.7.16.4.2)
INSTRUCTION = 1 << 4 | 1 << 7 | 1 << 10 | N >> 3 << 17 | M >> 4 << 24


def body():
    """The kernel's instructions."""
    names = {"full": BARRIERS, "empty": BARRIERS + 8, "address": BARRIERS + 16}
    names |= {"threads": THREADS, "words": BARRIERS // 4, "a": A, "idesc": INSTRUCTION}
    names["registers"] = ", ".join(f"%r{20 + i}" for i in range(N))
    parts = [PROLOGUE.format(**names)]
    for i in range(2):
        parts.append(LOAD.format(**names, i=i))
        if i == 0:  # a use of its registers ends the last load
            parts.append(FREE.format(**names) + "mad.wide.u32 %d9, %r0, 64, %d0;\n")
        at = i * M * N * 4
        parts += [f"st.global.u32 [%d9+{at + 4 * j}], %r{20 + j};\n" for j in range(N)]
    parts += ["bra JOIN;\nISSUER:\n@!%p1 bra JOIN;", ISSUE.format(**names, b=B[0])]
    parts += [WAIT_EMPTY.format(**names), ISSUE.format(**names, b=B[1]), EPILOGUE]
    return "".join(parts)


class Accumulator:
    """The kernel with its inputs; `load` puts other PTX in its place, as `Emulator` does."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        bits = [bf16_bits(rng.standard_normal((n, K)).astype(np.float32)) for n in (M, N, N)]
        a, *b = [bf16_float(x) for x in bits]
        self.want = np.stack([a @ x.T for x in b])
        memory = np.zeros((BASE + BARRIERS) // 2, np.uint16)
        for desc, x in zip([A, *B], bits, strict=True):
            index, _ = operand_offsets(desc, *x.shape, 2, False, True)
            memory[index] = x
        self.image = memory[BASE // 2 :].view(np.uint32).copy()
        self.load(snippet_text(body(), arrays=2, target="sm_100a"))

    def load(self, ptx_text):
        self.ptx_text = ptx_text
        self.programs = {n: Program(k) for n, k in ptx.parse(ptx_text).items()}

    def run(self, policy, **machine_options):
        """Whether the products are right; `machine` is what ran."""
        out = np.full((2, M, N), np.nan, np.float32)
        (program,) = self.programs.values()
        options = {"block": (THREADS, 1, 1), "smem": SMEM_BYTES, "policy": policy}
        self.machine = launch_ptx(program, out, self.image, **options, **machine_options)
        return np.allclose(out, self.want, rtol=1e-5, atol=1e-5)
