"""Order on global memory: races between warps and CTAs, and what orders their accesses."""

import numpy as np
import pytest

from tests.emulator import Fault, Policy
from tests.emulator.snippet import run_ptx

SEEDS = range(4)
# Every thread writes its word of array 0; then a thread of the other warp (or CTA) reads it.
WRITE = "mul.wide.u32 %d2, %r0, 4; add.s64 %d3, %d0, %d2; st.global.u32 [%d3], %r0;"
READ_OTHER = """
xor.b32 %r1, %r0, 32; mul.wide.u32 %d4, %r1, 4; add.s64 %d5, %d0, %d4;
ld.global.u32 %r2, [%d5]; add.s64 %d6, %d1, %d2; st.global.u32 [%d6], %r2;
"""


def buffers(n=64, dtype=np.uint32):
    return np.zeros(n, dtype), np.zeros(n, dtype)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_orders_the_warps_of_a_cta(seed):
    x, y = buffers()
    run_ptx(WRITE + "bar.sync 0;" + READ_OTHER, x, y, block=(64, 1, 1), policy=Policy(seed))
    np.testing.assert_array_equal(y, np.arange(64) ^ 32)


@pytest.mark.parametrize("seed", SEEDS)
def test_without_the_barrier_it_is_a_race_in_every_interleaving(seed):
    x, y = buffers()
    with pytest.raises(Fault, match=r"race: (load|store) of array 0 .* (store|load) by .*warp"):
        run_ptx(WRITE + READ_OTHER, x, y, block=(64, 1, 1), policy=Policy(seed))


def test_race_check_can_be_turned_off():
    x, y = buffers()
    run_ptx(WRITE + READ_OTHER, x, y, block=(64, 1, 1), race_check=False)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("space", ["b16", "b8"])
def test_neighbours_in_a_word_are_told_apart(seed, space):
    width = {"b16": 2, "b8": 1}[space]
    x = np.zeros(64, {2: np.uint16, 1: np.uint8}[width])
    body = f"""
    mov.u32 %r1, %ctaid.x; shl.b32 %r2, %r0, 1; add.u32 %r2, %r2, %r1;
    mul.wide.u32 %d2, %r2, {width}; add.s64 %d3, %d0, %d2; cvt.u16.u32 %h0, %r2;
    st.global.{space.replace("b", "u")} [%d3], %h0;
    """
    run_ptx(body, x, grid=(2, 1, 1), policy=Policy(seed))
    np.testing.assert_array_equal(x, np.arange(64))
    clash = body.replace("add.u32 %r2, %r2, %r1;", "")  # both CTAs write the even elements
    with pytest.raises(Fault, match="race: store of array 0"):
        run_ptx(
            clash.replace("cvt.u16.u32 %h0, %r2", "cvt.u16.u32 %h0, %r1"),
            np.zeros_like(x), grid=(2, 1, 1), policy=Policy(seed),
        )  # fmt: skip


def test_ctas_that_store_the_same_value_do_not_race():
    x = np.zeros(32, np.uint32)
    run_ptx(WRITE, x, grid=(3, 1, 1))
    np.testing.assert_array_equal(x, np.arange(32))


# CTA 0 writes data and raises a flag; CTA 1 waits for the flag and reads.
HANDSHAKE = """
mov.u32 %r1, %ctaid.x; setp.ne.u32 %p0, %r1, 0; setp.ne.u32 %p1, %r0, 0;
add.s64 %d2, %d0, 64;
@%p0 bra READER;
@%p1 bra DONE;
mov.u32 %r2, 77; st.global.u32 [%d0], %r2; mov.u32 %r3, 1;
{release}
bra DONE;
READER: @%p1 bra DONE;
{wait}
setp.eq.u32 %p2, %r4, 0; @%p2 bra READER;
{after}
ld.global.u32 %r5, [%d0]; st.global.u32 [%d1], %r5;
DONE:
"""
RELEASES = {
    "store": "st.release.gpu.global.u32 [%d2], %r3;",
    "red": "red.release.gpu.global.add.u32 [%d2], %r3;",
    "atom": "atom.acq_rel.gpu.global.exch.b32 %r6, [%d2], %r3;",
    "fence": "fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%d2], %r3;",
    "membar": "membar.gl; st.volatile.global.u32 [%d2], %r3;",
}
ACQUIRES = {
    "load": ("ld.acquire.gpu.global.u32 %r4, [%d2];", ""),
    "fence": ("ld.relaxed.gpu.global.u32 %r4, [%d2];", "fence.acq_rel.gpu;"),
    "atom": ("atom.acquire.gpu.global.or.b32 %r4, [%d2], 0;", ""),
    "volatile": ("ld.volatile.global.u32 %r4, [%d2];", "membar.gl;"),
}


def handshake(release, wait, after, seed):
    x, y = np.zeros(32, np.uint32), np.zeros(1, np.uint32)
    body = HANDSHAKE.format(release=release, wait=wait, after=after)
    run_ptx(body, x, y, grid=(2, 1, 1), policy=Policy(seed))
    return int(y[0])


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("acquire", ACQUIRES)
def test_release_and_acquire_order_two_ctas(release, acquire):
    for seed in SEEDS:
        assert handshake(RELEASES[release], *ACQUIRES[acquire], seed) == 77


BROKEN = {
    "no release": (RELEASES["store"].replace("release", "relaxed"), *ACQUIRES["load"]),
    "no acquire": (RELEASES["store"], ACQUIRES["fence"][0], ""),
    "relaxed atomic": (RELEASES["red"].replace("release", "relaxed"), *ACQUIRES["load"]),
    "narrow release": (RELEASES["store"].replace("gpu", "cta"), *ACQUIRES["load"]),
    "narrow fence": (RELEASES["fence"].replace("acq_rel.gpu", "acq_rel.cta"), *ACQUIRES["load"]),
    "narrow acquire": (RELEASES["store"], "ld.acquire.cta.global.u32 %r4, [%d2];", ""),
    "weak flag": ("st.global.u32 [%d2], %r3;", *ACQUIRES["load"]),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_broken_handshake_is_a_race(mistake):
    for seed in SEEDS:
        with pytest.raises(Fault, match=r"race: (load|store) of array 0") as e:
            handshake(*BROKEN[mistake], seed)
        assert "PTX line" in str(e.value) and "cta(" in str(e.value)


def test_what_a_third_cta_passes_on_is_ordered_too():
    body = """
    mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r0, 0; @%p1 bra DONE;
    mul.wide.u32 %d2, %r1, 4; add.s64 %d3, %d0, %d2; add.s64 %d4, %d1, %d2;
    setp.eq.u32 %p0, %r1, 0; @%p0 bra GO;
    WAIT: ld.acquire.gpu.global.u32 %r2, [%d3+-4]; setp.eq.u32 %p2, %r2, 0; @%p2 bra WAIT;
    GO: st.global.u32 [%d4], %r1;
    mov.u32 %r3, 1; st.release.gpu.global.u32 [%d3], %r3;
    setp.ne.u32 %p3, %r1, 3; @%p3 bra DONE;
    ld.global.u32 %r4, [%d1+4]; st.global.u32 [%d1+64], %r4;
    DONE:
    """
    for seed in SEEDS:
        x, y = buffers(32)
        run_ptx(body, x, y, grid=(4, 1, 1), policy=Policy(seed))
        assert y[16] == 1


LAST_CTA = """
mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r0, 0;
mul.wide.u32 %d2, %r1, 4; add.s64 %d3, %d1, %d2; st.global.u32 [%d3], %r1;
bar.sync 0; @%p1 bra DONE;
{count}
setp.ne.u32 %p2, %r2, 4; @%p2 bra DONE;
{after}
ld.global.u32 %r3, [%d1]; ld.global.u32 %r4, [%d1+12]; add.u32 %r3, %r3, %r4;
st.global.u32 [%d1+64], %r3;
DONE:
"""


def test_the_last_of_the_ctas_by_a_counter():
    """The pattern of a semaphore: atomics continue what earlier ones released."""
    count = "atom.acq_rel.gpu.global.add.u32 %r2, [%d0], 1;"
    fenced = "fence.acq_rel.gpu; atom.global.add.u32 %r2, [%d0], 1; fence.acq_rel.gpu;"
    for seed in SEEDS:
        for lines in (count, fenced):
            x, y = buffers(32)
            body = LAST_CTA.format(count=lines, after="")
            run_ptx(body, x, y, grid=(5, 1, 1), policy=Policy(seed))
            assert x[0] == 5 and y[16] == 3
        x, y = buffers(32)
        relaxed = LAST_CTA.format(count=count.replace("acq_rel", "relaxed"), after="")
        with pytest.raises(Fault, match="race: load of array 1"):
            run_ptx(relaxed, x, y, grid=(5, 1, 1), policy=Policy(seed))


def test_atomics_do_not_race_with_each_other_but_with_plain_accesses():
    add = "red.global.add.u32 [%d0], 1;"
    x = np.zeros(4, np.uint32)
    run_ptx(add, x, grid=(3, 1, 1), block=(64, 1, 1))
    assert x[0] == 3 * 64
    read = "ld.global.u32 %r1, [%d0];"
    with pytest.raises(Fault, match="race: (load|atomic) of array 0"):
        run_ptx(add + read, np.zeros(4, np.uint32), grid=(2, 1, 1))
    with pytest.raises(Fault, match="scopes, .*, do not include each other"):
        run_ptx("red.relaxed.cta.global.add.u32 [%d0], 1;", x, grid=(2, 1, 1))


def test_a_weak_read_after_only_one_of_two_atomics_is_a_race():
    """Two warps count; the third waits, by barrier 1, for one of them only."""
    body = """
    shr.u32 %r1, %r0, 5; setp.eq.u32 %p0, %r1, 0; setp.eq.u32 %p1, %r1, 1;
    setp.eq.u32 %p2, %r1, 2;
    @!%p2 red.global.add.u32 [%d0], 1;
    @%p0 bar.arrive 1, 64;
    @%p2 bar.sync 1, 64;
    @%p2 ld.global.u32 %r2, [%d0];
    """
    for seed in SEEDS:
        with pytest.raises(Fault, match="race: (load|atomic) of array 0"):
            run_ptx(body, np.zeros(4, np.uint32), block=(96, 1, 1), policy=Policy(seed))


def test_non_coherent_loads_of_what_the_kernel_wrote():
    body = "bar.sync 0; ld.global{} .u32 %r3, [%d3];"
    x, _ = buffers(32)
    run_ptx(WRITE + body.format("").replace(" .", "."), x)
    with pytest.raises(Fault, match=r"ld.global.nc of array 0, which may read a stale value"):
        run_ptx(WRITE + body.format(".nc").replace(" .", "."), x)


# ---- shared memory: atomics and strong accesses, parts of words ----
def shared(body, seed):
    x = np.zeros(64, np.uint32)
    run_ptx("mov.u32 %r9, dynamic;" + body, x, block=(64, 1, 1), smem=1024, policy=Policy(seed))
    return x


SHARED_FLAG = """
setp.ne.u32 %p1, %r0, 0; setp.lt.u32 %p0, %r0, 32;
@!%p1 st.shared.u32 [%r9+64], 0;
bar.sync 0;
@!%p0 bra READER;
@%p1 bra DONE;
mov.u32 %r2, 77; st.shared.u32 [%r9], %r2;
{release}
bra DONE;
READER: setp.ne.u32 %p1, %r0, 32; @%p1 bra DONE;
AGAIN: {acquire}
setp.eq.u32 %p2, %r4, 0; @%p2 bra AGAIN;
ld.shared.u32 %r5, [%r9]; st.global.u32 [%d0], %r5;
DONE:
"""


def test_strong_accesses_of_shared_memory_order_as_they_say():
    release = "red.release.cta.shared::cta.add.u32 [%r9+64], 1;"
    acquire = "ld.acquire.cta.shared::cta.u32 %r4, [%r9+64];"
    for seed in SEEDS:
        assert shared(SHARED_FLAG.format(release=release, acquire=acquire), seed)[0] == 77
        relaxed = release.replace("release", "relaxed")
        with pytest.raises(Fault, match="race: generic (load|store) of cta0 shared"):
            shared(SHARED_FLAG.format(release=relaxed, acquire=acquire), seed)


def test_a_relaxed_wait_orders_only_with_a_fence():
    body = """
    setp.eq.u32 %p0, %r0, 0; setp.lt.u32 %p1, %r0, 32;
    @%p0 mbarrier.init.shared::cta.b64 [%r9], 32; bar.sync 0;
    shl.b32 %r1, %r0, 2; add.u32 %r1, %r1, %r9;
    @!%p1 bra READER;
    st.shared.u32 [%r1+128], %r0; mbarrier.arrive.shared::cta.b64 _, [%r9];
    bra DONE;
    READER: mbarrier.try_wait.parity{}.shared::cta.b64 %p2, [%r9], 0; @!%p2 bra READER;
    {} ld.shared.u32 %r2, [%r1];
    DONE:
    """
    for seed in SEEDS:
        shared(body.format("", ""), seed)
        shared(body.format(".relaxed.cta", "fence.acq_rel.cta;"), seed)
        with pytest.raises(Fault, match="race: generic load"):
            shared(body.format(".relaxed.cta", ""), seed)


def test_atomics_on_shared_memory_race_with_plain_accesses():
    add = "red.shared.add.u32 [%r9], 1;"
    first = "setp.eq.u32 %p0, %r0, 0; @%p0 st.shared.u32 [%r9], 0; bar.sync 0;"
    last = "bar.sync 0; @%p0 ld.shared.u32 %r1, [%r9]; @%p0 st.global.u32 [%d0], %r1;"
    for seed in SEEDS:
        assert shared(first + add + last, seed)[0] == 64
        with pytest.raises(Fault, match="race: generic (load|store)"):
            shared(first + add + last.replace("bar.sync 0;", ""), seed)


@pytest.mark.parametrize("width", [1, 2])
def test_parts_of_shared_words_are_told_apart(width):
    """Warp 0 writes the even elements, warp 1 the odd ones."""
    body = f"""
    shr.u32 %r1, %r0, 5; and.b32 %r2, %r0, 31; shl.b32 %r2, %r2, 1; add.u32 %r2, %r2, %r1;
    mul.lo.u32 %r3, %r2, {width}; add.u32 %r3, %r3, %r9; cvt.u16.u32 %h0, %r2;
    st.shared.u{8 * width} [%r3], %h0;
    """
    other = f"xor.b32 %r4, %r3, {width}; ld.shared.u{8 * width} %h1, [%r4];"
    for seed in SEEDS:
        shared(body + f"ld.shared.u{8 * width} %h1, [%r3];", seed)
        shared(body + "bar.sync 0;" + other, seed)
        with pytest.raises(Fault, match="race: generic (load|store)"):
            shared(body + other, seed)
