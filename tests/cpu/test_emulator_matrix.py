"""wgmma and tcgen05.mma in the emulator, from hand-written PTX, against numpy."""

import numpy as np
import pytest

from tests.emulator import Fault, Policy
from tests.emulator.operands import operand_offsets
from tests.emulator.snippet import run_ptx
from tests.emulator.values import bf16_bits, bf16_float

RNG = np.random.default_rng(0)
K = 16


def matrix(rows, columns):
    """A random bf16 matrix: (bits, values)."""
    bits = bf16_bits(RNG.standard_normal((rows, columns)).astype(np.float32))
    return bits, bf16_float(bits)


def descriptor(start, lbo, sbo, swizzle, sm100):
    """A shared-memory matrix descriptor (byte offsets)."""
    d = start >> 4 | (lbo >> 4) << 16 | (sbo >> 4) << 32
    return d | (1 << 46 | swizzle << 61 if sm100 else swizzle << 62)


def image(bits, desc, mn_major, sm100, size):
    """Bytes of shared memory from 1024 on, holding a matrix as its descriptor says."""
    index, _ = operand_offsets(desc, *bits.shape, 2, mn_major, sm100)
    memory = np.zeros((1024 + size) // 2, np.uint16)
    assert len(np.unique(index)) == index.size, "the layout overlaps itself"
    memory[index] = bits
    return memory[512:].view(np.uint32).copy()


FILL = """
mov.b32 %r2, dynamic;
mov.b32 %r3, %r0;
FILL: mad.wide.u32 %d8, %r3, 4, %d{array};
ld.global.u32 %r4, [%d8];
mad.lo.u32 %r5, %r3, 4, %r2;
st.shared.u32 [%r5+{at}], %r4;
add.u32 %r3, %r3, 128;
setp.lt.u32 %p6, %r3, {words};
@%p6 bra FILL;
"""
A_AT, B_AT, SIZE = 0, 16384, 16384


def fill(a, b):
    text = FILL.format(array=1, at=A_AT, words=len(a))
    return text + FILL.replace("FILL", "AGAIN").format(array=2, at=B_AT, words=len(b))


# (MN-major, sm_90 swizzle code, leading and stride byte offsets)
LAYOUTS = {
    "K, 128B": (False, 1, 16, 1024),
    "K, 64B": (False, 2, 16, 512),
    "K, 32B": (False, 3, 16, 256),
    "K, none": (False, 0, 2048, 128),
    "MN, 128B": (True, 1, 4096, 1024),
    "MN, none": (True, 0, 1024, 128),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("n", [8, 64])
def test_wgmma(layout, n):
    """Two accumulating products and a negated one: A B^T + A B^T - A B^T."""
    mn, swizzle, lbo, sbo = LAYOUTS[layout]
    (a_bits, a), (b_bits, b) = matrix(64, K), matrix(n, K)
    a_desc = descriptor(1024 + A_AT, lbo, sbo, swizzle, False)
    b_desc = descriptor(1024 + B_AT, lbo, sbo, swizzle, False)
    images = image(a_bits, a_desc, mn, False, SIZE), image(b_bits, b_desc, mn, False, B_AT + SIZE)
    registers = ", ".join(f"%r{20 + i}" for i in range(n // 2))
    head = (
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{registers}}}, {a_desc}, {b_desc}"
    )
    t = int(mn)
    body = (
        fill(images[0], images[1][B_AT // 4 :])
        + f"""
    fence.proxy.async.shared::cta;
    bar.sync 0;
    setp.ne.u32 %p2, 0, 1;
    setp.ne.u32 %p3, 0, 0;
    wgmma.fence.sync.aligned;
    {head}, %p3, 1, 1, {t}, {t};
    {head}, %p2, 1, 1, {t}, {t};
    {head}, %p2, -1, 1, {t}, {t};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    mad.wide.u32 %d9, %r0, {2 * n}, %d0;
    """
    )
    body += "".join(f"st.global.u32 [%d9+{4 * i}], %r{20 + i};" for i in range(n // 2))
    for seed in range(2):
        out = np.full((128, n // 2), np.nan, np.float32)
        run_ptx(
            body, out, *images_of(images), block=(128, 1, 1), smem=2 * SIZE, policy=Policy(seed)
        )
        np.testing.assert_allclose(accumulators(out, n), a @ b.T, rtol=1e-5, atol=1e-5)


def images_of(images):
    return images[0], images[1][B_AT // 4 :].copy()


def accumulators(out, n):
    """The 64 x n matrix of a warpgroup's registers (thread, register): PTX ISA 9.7.15.5.1.1."""
    d = np.zeros((64, n), np.float32)
    for t in range(128):
        row = t // 32 * 16 + t % 32 // 4
        for i in range(n // 2):
            d[row + 8 * (i // 2 % 2), 8 * (i // 4) + t % 4 * 2 + i % 2] = out[t, i]
    return d


def test_wgmma_needs_its_four_warps():
    body = (
        "setp.gt.u32 %p1, %r0, 95; @%p1 bra END; wgmma.fence.sync.aligned; setp.ne.u32 %p3, 0, 0;"
    )
    d = descriptor(1024, 16, 1024, 1, False)
    body += "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, "
    body += f"{d}, {d}, %p3, 1, 1, 0, 0;"
    body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0; END:"
    with pytest.raises(Fault, match=r"deadlock[\s\S]*waits for 1 wgmma operations"):
        run_ptx(body, block=(128, 1, 1), smem=SIZE)


MMA_BODY = """
mov.b32 %r2, dynamic;
setp.eq.u32 %p1, %r0, 0;
setp.lt.u32 %p4, %r0, 32;
@%p1 mbarrier.init.shared::cta.b64 [%r2+32768], 1;
@%p1 fence.mbarrier_init.release.cluster;
@!%p4 bra FILLED;
tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2+32776], 32;
FILLED:
{fill}
fence.proxy.async.shared::cta;
bar.sync 0;
ld.shared.u32 %r6, [%r2+32776];
setp.ne.u32 %p3, 0, 0;
setp.ne.u32 %p5, 0, 1;
@!%p1 bra ISSUED;
tcgen05.mma.cta_group::1.kind::f16 [%r6], {a}, {b}, {idesc}, %p3;
tcgen05.mma.cta_group::1.kind::f16 [%r6], {a}, {b}, {idesc}, %p5;
tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2+32768];
ISSUED:
{wait}
and.b32 %r7, %r0, 96;
shl.b32 %r7, %r7, 16;
add.u32 %r7, %r7, %r6;
tcgen05.ld.sync.aligned.32x32b.x16.b32 {{{registers}}}, [%r7];
tcgen05.wait::ld.sync.aligned;
mad.wide.u32 %d9, %r0, 64, %d0;
{save}
bar.sync 0;
@!%p4 bra END;
tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r6, 32;
END:
"""
WAIT = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2+32768], 0; @!%p2 bra WAIT;"


def tcgen05_body(layout, wait=WAIT):
    """(kernel body, images, expected) of D = 2 A B^T with M=128, N=16, K=16."""
    mn, swizzle, lbo, sbo = LAYOUTS[layout]
    code = {0: 0, 1: 2, 2: 4, 3: 6}[swizzle]
    (a_bits, a), (b_bits, b) = matrix(128, K), matrix(16, K)
    if layout == "MN, none":
        lbo = 2048
    a_desc = descriptor(1024 + A_AT, lbo, sbo, code, True)
    b_desc = descriptor(1024 + B_AT, lbo, sbo, code, True)
    images = image(a_bits, a_desc, mn, True, SIZE), image(b_bits, b_desc, mn, True, B_AT + SIZE)
    idesc = 1 << 4 | 1 << 7 | 1 << 10 | mn << 15 | mn << 16 | (16 >> 3) << 17 | (128 >> 4) << 24
    body = MMA_BODY.format(
        fill=fill(images[0], images[1][B_AT // 4 :]),
        a=a_desc,
        b=b_desc,
        idesc=idesc,
        wait=wait,
        registers=", ".join(f"%r{20 + i}" for i in range(16)),
        save="".join(f"st.global.u32 [%d9+{4 * i}], %r{20 + i};" for i in range(16)),
    )
    return body, images_of(images), 2 * a @ b.T


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tcgen05_mma(layout):
    body, images, want = tcgen05_body(layout)
    for seed in range(2):
        out = np.full((128, 16), np.nan, np.float32)
        options = {"block": (128, 1, 1), "smem": 2 * SIZE + 16, "target": "sm_100a"}
        run_ptx(body, out, *images, policy=Policy(seed), **options)
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_tcgen05_load_before_the_mma_is_done():
    body, images, _ = tcgen05_body("K, 128B", wait="bar.sync 0;")
    options = {"block": (128, 1, 1), "smem": 2 * SIZE + 16, "target": "sm_100a"}
    with pytest.raises(Fault, match="race: tcgen05.ld of TMEM columns 0..15"):
        run_ptx(body, np.zeros((128, 16), np.float32), *images, policy=Policy(0, "lazy"), **options)
