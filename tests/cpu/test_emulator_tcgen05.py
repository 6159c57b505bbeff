"""Tensor memory in the emulator: allocation, loads and stores, and what must be ordered."""

import re

import numpy as np
import pytest

from tests.emulator import Fault, Policy, PtxError
from tests.emulator.snippet import run_ptx

RNG = np.random.default_rng(0)
ALLOC = """
mov.b32 %r2, dynamic;
setp.lt.u32 %p4, %r0, 32;
@!%p4 bra ALLOCATED;
tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r2], {columns};
ALLOCATED: bar.sync 0;
ld.shared.u32 %r6, [%r2];
and.b32 %r7, %r0, 96;
shl.b32 %r7, %r7, 16;
add.u32 %r7, %r7, %r6;
"""
FREE = """
bar.sync 0;
@!%p4 bra END;
tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r6, {columns};
END:
"""


def run(body, *arrays, columns=32, threads=128, **options):
    text = ALLOC.format(columns=columns) + body + FREE.format(columns=columns)
    options = {"block": (threads, 1, 1), "smem": 64, "target": "sm_100a"} | options
    return run_ptx(text, *arrays, **options)


def names(first, n):
    return ", ".join(f"%r{first + i}" for i in range(n))


def load_words(first, n, array):
    """Each thread's n words of an array (threads, n) to registers."""
    text = f"mad.wide.u32 %d8, %r0, {4 * n}, %d{array};"
    return text + "".join(f"ld.global.u32 %r{first + i}, [%d8+{4 * i}];" for i in range(n))


def save_words(first, n, array):
    text = f"mad.wide.u32 %d8, %r0, {4 * n}, %d{array};"
    return text + "".join(f"st.global.u32 [%d8+{4 * i}], %r{first + i};" for i in range(n))


WAIT_ST, WAIT_LD = "tcgen05.wait::st.sync.aligned;\n", "tcgen05.wait::ld.sync.aligned;\n"


def position(shape, thread, register):
    """Lane and column of a thread's register: figures of 9.7.16.8.2, by hand."""
    quad, pair = thread // 4, thread % 4
    if shape == "32x32b":
        return thread, register
    if shape == "16x64b":
        return quad + 8 * (thread % 2), 2 * register + pair // 2
    if shape == "16x128b":
        return quad + 8 * (register % 2), 4 * (register // 2) + pair
    return quad + 8 * (register // 2 % 2), 8 * (register // 4) + 2 * pair + register % 2


SHAPES = [("32x32b", 1), ("32x32b", 8), ("16x64b", 4), ("16x128b", 2), ("16x256b", 2)]
REGISTERS = {"32x32b": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4}
COLUMNS = {"32x32b": 1, "16x64b": 2, "16x128b": 4, "16x256b": 8}


@pytest.mark.parametrize("shape, count", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_shapes_store_and_load(shape, count, seed):
    """A store of every shape, read back as lanes and columns, and the other way round."""
    n, width = REGISTERS[shape] * count, COLUMNS[shape] * count
    src = RNG.integers(0, 1 << 32, (128, n), dtype=np.uint32)
    memory, again = np.zeros((128, width), np.uint32), np.zeros((128, n), np.uint32)
    body = f"""
    {load_words(20, n, 1)}
    tcgen05.st.sync.aligned.{shape}.x{count}.b32 [%r7], {{{names(20, n)}}};
    {WAIT_ST}
    tcgen05.ld.sync.aligned.32x32b.x{width}.b32 {{{names(40, width)}}}, [%r7];
    tcgen05.ld.sync.aligned.{shape}.x{count}.b32 {{{names(80, n)}}}, [%r7];
    {WAIT_LD}
    {save_words(40, width, 0)}
    {save_words(80, n, 2)}
    """
    run(body, memory, src, again, policy=Policy(seed))
    np.testing.assert_array_equal(again, src)
    for t in range(128):
        for i in range(n):
            lane, column = position(shape, t % 32, i)
            assert memory[t // 32 * 32 + lane, column] == src[t, i]


def test_split_shape_and_lower_half():
    """16x32bx2: threads 16.. take the columns from the split on; lanes 16.. of each quarter."""
    src = RNG.integers(0, 1 << 32, (128, 16), dtype=np.uint32)
    out = np.zeros((128, 4), np.uint32)
    body = f"""
    {load_words(20, 16, 1)}
    tcgen05.st.sync.aligned.32x32b.x16.b32 [%r7], {{{names(20, 16)}}};
    {WAIT_ST}
    add.u32 %r8, %r7, 0x100000;
    tcgen05.ld.sync.aligned.16x32bx2.x4.b32 {{{names(40, 4)}}}, [%r8], 8;
    {WAIT_LD}
    {save_words(40, 4, 0)}
    """
    run(body, out, src)
    for t in range(128):
        lane, column = t // 32 * 32 + 16 + t % 16, 8 if t % 32 >= 16 else 0
        np.testing.assert_array_equal(out[t], src[lane, column : column + 4])


def test_packed_halves():
    """.pack::16b joins the low halves of two columns, .unpack::16b parts them."""
    src = RNG.integers(0, 1 << 32, (128, 4), dtype=np.uint32)
    memory, again = np.zeros((128, 8), np.uint32), np.zeros((128, 4), np.uint32)
    body = f"""
    {load_words(20, 4, 1)}
    tcgen05.st.sync.aligned.32x32b.x4.unpack::16b.b32 [%r7], {{{names(20, 4)}}};
    {WAIT_ST}
    tcgen05.ld.sync.aligned.32x32b.x8.b32 {{{names(40, 8)}}}, [%r7];
    tcgen05.ld.sync.aligned.32x32b.x4.pack::16b.b32 {{{names(60, 4)}}}, [%r7];
    {WAIT_LD}
    {save_words(40, 8, 0)}
    {save_words(60, 4, 2)}
    """
    run(body, memory, src, again)
    np.testing.assert_array_equal(again, src)
    np.testing.assert_array_equal(memory[:, 0::2] & 0xFFFF, src & 0xFFFF)
    np.testing.assert_array_equal(memory[:, 1::2] & 0xFFFF, src >> 16)


def test_load_with_reduction():
    src = RNG.standard_normal((128, 8)).astype(np.float32)
    src[3, 2] = np.nan
    out = np.zeros((128, 2), np.float32)
    body = f"""
    {load_words(20, 8, 1)}
    tcgen05.st.sync.aligned.32x32b.x8.b32 [%r7], {{{names(20, 8)}}};
    {WAIT_ST}
    tcgen05.ld.red.sync.aligned.32x32b.x8.max.abs.f32 {{{names(40, 8)}}}, %r60, [%r7];
    tcgen05.ld.red.sync.aligned.32x32b.x8.min.NaN.f32 {{{names(40, 8)}}}, %r61, [%r7];
    {WAIT_LD}
    {save_words(60, 2, 0)}
    """
    run(body, out, src.view(np.uint32), target="sm_103a")
    np.testing.assert_array_equal(out[:, 0], np.nanmax(np.abs(src), axis=1))
    np.testing.assert_array_equal(out[:, 1], src.min(axis=1))


def test_registers_are_delivered_as_late_as_may_be():
    """The use of a register waits for its load, whenever that reads."""
    body = f"""
    tcgen05.st.sync.aligned.32x32b.x1.b32 [%r7], {{%r0}};
    {WAIT_ST}
    mov.b32 %r9, 77;
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {{%r9}}, [%r7];
    add.u32 %r9, %r9, 1;
    {save_words(9, 1, 0)}
    """
    for seed in range(4):
        out = np.zeros((128, 1), np.uint32)
        run(body, out, policy=Policy(seed))
        assert out[:, 0].tolist() == list(range(1, 129))


ST = "tcgen05.st.sync.aligned.32x32b.x2.b32 [%r7], {%r0, %r0};\n"
LD = "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r40, %r41}, [%r7];\n"
NOT_OVER = r"race: tcgen05\.{} of TMEM columns 0\.\.1, after the {} by .*tcgen05\.{}.*wait::{}"


@pytest.mark.parametrize(
    "body, message",
    [
        (ST + LD, NOT_OVER.format("ld", "write", "st", "st")),
        (ST + ST, NOT_OVER.format("st", "write", "st", "st")),
        (ST + WAIT_ST + LD + ST, NOT_OVER.format("st", "read", "ld", "ld")),
        (ST.replace("%r7", "%r6"), "TMEM lane 0 by warp [123], which may access lanes"),
        (ST.replace("%r7", "%r7+31"), r"columns 31\.\.32 are not in an allocation"),
    ],
)
@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_mistakes_of_a_warp(body, message, mode):
    with pytest.raises(Fault, match=message):
        run(body + WAIT_ST + WAIT_LD, policy=Policy(1, mode))


def test_dealloc_while_a_load_is_not_over():
    with pytest.raises(
        Fault, match=r"race: tcgen05\.dealloc of TMEM columns 0\.\.31, after the re"
    ):
        run(ST + WAIT_ST + LD)


def test_other_warps_of_the_same_lanes_are_ordered_too():
    """Warps 0 and 4 own the same lanes."""
    body = """
    setp.ge.u32 %p1, %r0, 128;
    @%p1 bra LOWER;
    {st}
    {wait}
    {meet}
    bra MET;
    LOWER: {meet}
    {ld}
    tcgen05.wait::ld.sync.aligned;
    MET:
    """
    good = body.format(st=ST, wait=WAIT_ST, meet="bar.sync 1, 256;", ld=LD)
    assert "fence::before" in str(run(good, threads=256).warnings)
    fences = "tcgen05.fence::before_thread_sync; bar.sync 1, 256; tcgen05.fence::after_thread_sync;"
    assert not run(good.replace("bar.sync 1, 256;", fences), threads=256).warnings
    with pytest.raises(Fault, match=r"race: tcgen05\.(ld|st)"):
        run(body.format(st=ST, wait=WAIT_ST, meet="", ld=LD), threads=256)


ONE_WARP = "setp.lt.u32 %p4, %r0, 32; mov.b32 %r2, dynamic;"


def allocation(columns, at=0, group=1):
    return (
        f"tcgen05.alloc.cta_group::{group}.sync.aligned.shared::cta.b32 [%r2+{at}], {columns};"
        f"ld.shared.u32 %r{10 + at // 4}, [%r2+{at}];"
    )


def freed(columns, at=0):
    return f"tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r{10 + at // 4}, {columns};"


RELINQUISH = "tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;"


@pytest.mark.parametrize(
    "body, message",
    [
        (allocation(48), "alloc of 48 columns: a power of two from 32 to 512"),
        (allocation(16), "alloc of 16 columns: a power of two from 32 to 512"),
        (allocation(32) + allocation(64, 4), "sizes must not increase"),
        (RELINQUISH + allocation(32), "alloc after relinquish_alloc_permit"),
        (allocation(64) + freed(32), r"dealloc of 32 columns at 0: not an allocation.*\{0: 64\}"),
        (allocation(64), r"exits with TMEM still allocated: \{0: 64\}"),
        (
            allocation(512) + allocation(32, 4),
            r"deadlock[\s\S]*waits for tcgen05.alloc of 32 columns: \{0: 512\} of the SM are taken",
        ),
    ],
)
def test_mistakes_of_allocation(body, message):
    with pytest.raises(Fault, match=message):
        run_ptx(ONE_WARP + body, smem=64, target="sm_100a")


def test_allocation_waits_for_room():
    """Warp 1 allocates what warp 0 frees."""
    body = f"""
    {ONE_WARP}
    @%p4 bra FIRST;
    bar.sync 1, 64;
    {allocation(256, 4)}
    {freed(256, 4)}
    bra END;
    FIRST: {allocation(512)}
    bar.sync 1, 64;
    {freed(512)}
    END:
    """
    for seed in range(4):
        run_ptx(body, smem=64, block=(64, 1, 1), target="sm_100a", policy=Policy(seed))


def test_ctas_of_an_sm_share_its_columns():
    """They get different ones, and wait for each other; shared memory keeps them apart."""
    body = f"{ONE_WARP} {allocation(256)} mov.u32 %r1, %ctaid.x; mul.wide.u32 %d8, %r1, 4;"
    body += f"add.s64 %d8, %d0, %d8; st.global.u32 [%d8], %r10; {freed(256)}"
    options = {"grid": (6, 1, 1), "target": "sm_100a"}
    for smem, columns in ((64, {0, 256}), (200_000, {0})):
        seen = set()
        for seed in range(4):
            out = np.zeros(6, np.uint32)
            run_ptx(body, out, smem=smem, policy=Policy(seed), **options)
            seen |= set(out.tolist())
        assert seen == columns


def test_a_cta_that_waits_for_one_without_tensor_memory():
    """CTA 0 holds all columns until CTA 1, on the same SM, has had some."""
    body = f"""
    {ONE_WARP} mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; @%p1 bra SECOND;
    {allocation(512)} st.release.gpu.global.u32 [%d0], 1;
    WAIT: ld.acquire.gpu.global.u32 %r3, [%d0]; setp.ne.u32 %p2, %r3, 2; @%p2 bra WAIT;
    {freed(512)} bra END;
    SECOND: ld.acquire.gpu.global.u32 %r3, [%d0]; setp.ne.u32 %p2, %r3, 1; @%p2 bra SECOND;
    {allocation(32)} st.release.gpu.global.u32 [%d0], 2; {freed(32)}
    END:
    """
    options = {"grid": (2, 1, 1), "target": "sm_100a", "max_steps": 20_000}
    run_ptx(body, np.zeros(1, np.uint32), smem=200_000, **options)  # an SM each
    with pytest.raises(Fault, match=r"alloc of 32 columns: \{0: 512\} of the SM are taken"):
        run_ptx(body, np.zeros(1, np.uint32), smem=64, **options)


@pytest.mark.parametrize(
    "text",
    [
        allocation(32) + freed(32).replace("group::1", "group::2"),
        "tcgen05.ld.sync.aligned.32x32b.x4.b32 {%r1, %r2}, [%r3];",
        "tcgen05.ld.sync.aligned.64x32b.x1.b32 {%r1}, [%r3];",
        "tcgen05.ld.sync.aligned.32x32b.x1.sideways.b32 {%r1}, [%r3];",
    ],
)
def test_unknown_forms_are_refused(text):
    with pytest.raises(PtxError, match="line"):
        run_ptx(text, smem=64, target="sm_100a")


HANDSHAKE = """
setp.eq.u32 %p1, %r0, 128;
@%p1 mbarrier.init.shared::cta.b64 [%r2+8], 1;
@%p1 mbarrier.init.shared::cta.b64 [%r2+16], 128;
@%p1 fence.mbarrier_init.release.cluster;
setp.ne.u32 %p3, 0, 0;
bar.sync 0;
setp.ge.u32 %p5, %r0, 128;
@%p5 bra ISSUER;
{full}
{after}
tcgen05.ld.sync.aligned.32x32b.x16.b32 {{{registers}}}, [%r7];
{wait}
{use}
{before}
{arrive}
{save}
bra JOIN;
ISSUER:
@!%p1 bra JOIN;
tcgen05.mma.cta_group::1.kind::f16 [%r6], {a}, {b}, {idesc}, %p3;
{commit}
{empty}
{again}
tcgen05.mma.cta_group::1.kind::f16 [%r6], {a}, {b}, {idesc}, %p3;
tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2+8];
JOIN:
LAST: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2+8], 1; @!%p2 bra LAST;
"""
PIECES = {
    "full": "FULL: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2+8], 0; @!%p2 bra FULL;",
    "empty": "EMPTY: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2+16], 0; @!%p2 bra EMPTY;",
    "after": "tcgen05.fence::after_thread_sync;",
    "again": "tcgen05.fence::after_thread_sync;",
    "before": "tcgen05.fence::before_thread_sync;",
    "wait": WAIT_LD,
    "commit": "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2+8];",
    "use": "",
    "arrive": "mbarrier.arrive.shared::cta.b64 _, [%r2+16];",
    "registers": names(20, 16),
    "save": save_words(20, 16, 0),
    "a": 2048 >> 4 | 64 << 32 | 1 << 46 | 2 << 61,
    "b": 18432 >> 4 | 64 << 32 | 1 << 46 | 2 << 61,
    "idesc": 1 << 4 | 1 << 7 | 1 << 10 | (16 >> 3) << 17 | (128 >> 4) << 24,
}


def handshake(seed=0, mode="mixed", **changes):
    """One accumulator, written by an MMA, read by four warps, and written again."""
    body = HANDSHAKE.format(**PIECES | changes)
    out = np.zeros((160, 16), np.uint32)
    return run(body, out, threads=160, smem=65536, policy=Policy(seed, mode))


def test_fenced_handshake_has_no_reports():
    for seed in range(4):
        assert not handshake(seed).warnings


RELAXED = {"arrive": "mbarrier.arrive.relaxed.cluster.shared::cta.b64 _, [%r2+16];"}


def test_a_relaxed_arrival_orders_with_the_fences():
    """The canonical pattern of 9.7.16.6.4.4, and that pattern without one of its fences."""
    for seed in range(4):
        assert not handshake(seed, **RELAXED).warnings
    for missing in ("before", "again"):
        with pytest.raises(Fault, match=r"race: tcgen05\.mma of .* the read by .*tcgen05\.ld"):
            handshake(0, **RELAXED, **{missing: ""})


MOVED = "mov.b64 %d20, {%r20, %r35};"  # a compiler may do it by renaming registers


@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
def test_a_mov_of_a_register_waits_for_no_load(mode):
    """Its result's use does."""
    later = {"save": "add.s64 %d21, %d20, 1;" + PIECES["save"]}
    with pytest.raises(
        Fault, match=r"race: tcgen05\.mma of .* the read by .*tcgen05\.ld.*wait::ld"
    ):
        handshake(1, mode, wait="", use=MOVED, **later)
    used = {"wait": "", "use": MOVED + "mov.b64 %d22, %d20; add.s64 %d21, %d22, 1;"}
    warning = "tcgen05.mma overwrites what a tcgen05.ld read that no tcgen05.wait::ld follows"
    assert any(warning in w for w in handshake(1, mode, **used).warnings)
    for seed in range(3):
        assert not handshake(seed, mode, use=MOVED, **later).warnings


def test_a_later_wait_does_not_move_a_load_that_is_over():
    used = {"wait": "", "use": "add.u32 %r60, %r20, %r35;", "save": WAIT_LD + PIECES["save"]}
    for seed in range(4):
        assert handshake(seed, **used).warnings


@pytest.mark.parametrize(
    "missing, message",
    [
        ({"full": ""}, r"race: tcgen05\.(ld|mma) of TMEM columns 0\.\.15, after the (read|write)"),
        ({"empty": ""}, r"deadlock|race: tcgen05\.(ld|mma) of .* after the (read|write)"),
        ({"wait": ""}, r"race: tcgen05\.mma of .* the read by .*tcgen05\.ld.*wait::ld"),
        ({"commit": ""}, "deadlock|whose commit's mbarrier nothing here has waited for"),
    ],
)
@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
def test_broken_handshake_is_a_fault(missing, message, mode):
    with pytest.raises(Fault, match=message):
        handshake(1, mode, **missing)


@pytest.mark.parametrize(
    "missing, message",
    [
        ({"after": ""}, r"no tcgen05\.fence::after_thread_sync between .*\.mma\..* and .*\.ld\."),
        ({"again": ""}, r"no tcgen05\.fence::after_thread_sync between .*\.ld\..* and .*\.mma\."),
        ({"before": ""}, r"no tcgen05\.fence::before_thread_sync between .*\.ld\..* and .*\.mma\."),
        (
            {"wait": "", "use": "add.u32 %r60, %r20, %r35;"},
            r"tcgen05\.mma overwrites what a tcgen05\.ld read that no tcgen05\.wait::ld follows",
        ),
    ],
)
def test_order_that_works_on_hardware_is_a_warning(missing, message):

    warnings = handshake(2, **missing).warnings
    assert any(re.search(message, w) for w in warnings), warnings
