"""Bulk copies of bytes, remote stores and reductions, and their completion."""

import numpy as np
import pytest

from tests.emulator import Fault, Policy, PtxError
from tests.emulator.snippet import run_ptx

SEEDS = range(4)
BEGIN = """
mov.u32 %r9, dynamic; setp.ne.u32 %p0, %r0, 0; mov.u32 %r10, %cluster_ctarank;
@%p0 bra READY;
mbarrier.init.shared::cta.b64 [%r9], 1; fence.mbarrier_init.release.cluster;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], {expect};
READY:
barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
"""
WAIT = """
WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r9], 0;
@!%p1 bra WAIT;
"""
# every thread copies its word at [%r9+at] to array 1, that of its CTA
OUT = """
mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 32, %r0; mul.wide.u32 %d8, %r2, 4;
add.s64 %d8, %d1, %d8; shl.b32 %r3, %r0, 2; add.u32 %r3, %r3, %r9;
ld.shared.u32 %r4, [%r3+{at}]; st.global.u32 [%d8], %r4;
"""
END = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


def source():
    store = np.arange(64, dtype=np.uint32)
    at = -store.ctypes.data % 16 // 4
    return store[at : at + 32]


def run(body, seed, ctas=1, target="sm_100a"):
    x, y = source(), np.zeros(32 * ctas, np.uint32)
    run_ptx(
        body, x, y, grid=(ctas, 1, 1), cluster=(ctas, 1, 1), smem=2048, target=target,
        policy=Policy(seed),
    )  # fmt: skip
    return x, y.reshape(ctas, 32)


IN = "@!%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "


@pytest.mark.parametrize("seed", SEEDS)
def test_global_to_shared(seed):
    copy = IN + "[%r9+128], [%d0], 128, [%r9];"
    body = BEGIN.format(expect=128) + copy + WAIT + OUT.format(at=128)
    x, y = run(body, seed)
    np.testing.assert_array_equal(y[0], x)
    with pytest.raises(Fault, match="race: generic load"):
        run(body.replace(WAIT, ""), seed)


def test_multicast():
    copy = """
    setp.eq.u32 %p2, %r10, 1; setp.eq.and.u32 %p2, %r0, 0, %p2; mov.u16 %h1, 5;
    @%p2 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
        [%r9+128], [%d0], 128, [%r9], %h1;
    setp.eq.u32 %p3, %r10, 1; @%p3 bra LAST;
    """
    body = BEGIN.format(expect=128) + copy + WAIT + OUT.format(at=128) + "LAST:" + END
    x, y = run(body, 0, ctas=3)
    np.testing.assert_array_equal(y[[0, 2]], [x, x])
    assert not y[1].any()


SEND = """
mov.u32 %r11, 0; shl.b32 %r12, %r0, 2; add.u32 %r12, %r12, %r9; mad.lo.u32 %r13, %r10, 100, %r0;
st.shared.u32 [%r12+256], %r13; {fence} bar.sync 0;
xor.b32 %r14, %r10, 1; mapa.shared::cluster.u32 %r15, %r9, %r14;
@!%p0 cp{reduce}.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes{op}
    [%r15+128], [%r9+256], 128, [%r15];
"""
FENCE = "fence.proxy.async.shared::cta;"


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_to_another_ctas_shared(seed):
    body = BEGIN.format(expect=128) + SEND.format(fence=FENCE, reduce="", op="")
    body += WAIT + OUT.format(at=128) + END
    _, y = run(body, seed, ctas=2)
    np.testing.assert_array_equal(y, np.arange(32) + np.array([[100], [0]]))
    with pytest.raises(Fault, match="not followed by a fence.proxy.async"):
        run(body.replace(FENCE, ""), seed, ctas=2)


@pytest.mark.parametrize("op", ["add", "min", "max", "inc", "dec", "and", "or", "xor"])
def test_reductions_into_another_ctas_shared(op):
    kind = "b32" if op in ("and", "or", "xor") else "u32"
    first = "shl.b32 %r12, %r0, 2; add.u32 %r12, %r12, %r9; st.shared.u32 [%r12+128], 50;" + FENCE
    send = SEND.format(fence=FENCE, reduce=".reduce", op=f".{op}.{kind}")
    body = BEGIN.format(expect=128).replace("READY:", "READY:" + first)
    _, y = run(body + send + WAIT + OUT.format(at=128) + END, 0, ctas=2)
    new, old = np.arange(32) + np.array([[100], [0]]), 50
    want = {
        "add": old + new, "min": np.minimum(old, new), "max": np.maximum(old, new),
        "and": old & new, "or": old | new, "xor": old ^ new,
        "inc": np.where(old >= new, 0, old + 1), "dec": np.where(old > new, new, old - 1),
    }  # fmt: skip
    np.testing.assert_array_equal(y, want[op])


def test_reductions_that_do_not_exist_are_refused():
    send = SEND.format(fence=FENCE, reduce=".reduce", op=".add.f32")
    with pytest.raises(PtxError, match="unsupported"):
        run(BEGIN.format(expect=128) + send, 0)


STORE = """
mov.u32 %r9, dynamic; shl.b32 %r12, %r0, 2; add.u32 %r12, %r12, %r9;
mul.wide.u32 %d8, %r0, 4; add.s64 %d8, %d1, %d8; ld.global.u32 %r13, [%d8];
st.shared.u32 [%r12], %r13; fence.proxy.async.shared::cta; bar.warp.sync -1;
setp.ne.u32 %p0, %r0, 0; @%p0 bra DONE; mov.u16 %h1, 0x00F3;
{store}
cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;
DONE:
"""


def out_of_shared(instruction, kind=np.uint32, old=0, new=None, seed=0):
    x, y = np.full(32 + 4, old, kind), np.array(new, kind)
    at = -x.ctypes.data % 16 // x.itemsize
    body = STORE.format(store=instruction).replace("[%d0]", f"[%d0+{at * x.itemsize}]")
    run_ptx(body, x, y, smem=1024, target="sm_100a", policy=Policy(seed))
    return x[at : at + 32]


def test_shared_to_global_and_byte_mask():
    store = "cp.async.bulk.global.shared::cta.bulk_group{} [%d0], [%r9], 128{};"
    new = np.arange(32) + 0x01020300
    np.testing.assert_array_equal(out_of_shared(store.format("", ""), new=new), new)
    got = out_of_shared(store.format(".cp_mask", ", %h1"), new=new).view(np.uint8).reshape(-1, 16)
    want = new.astype(np.uint32).view(np.uint8).reshape(-1, 16).copy()
    want[:, [2, 3, 8, 9, 10, 11, 12, 13, 14, 15]] = 0
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("op", "kind", "want"),
    [("add", np.float32, 7.5), ("min", np.int32, -3), ("max", np.int32, 4), ("add", np.int32, 1)],
)
def test_reductions_into_global(op, kind, want):
    name = {np.float32: "f32", np.int32: "s32"}[kind]
    reduce = f"cp.reduce.async.bulk.global.shared::cta.bulk_group.{op}.{name} [%d0], [%r9], 128;"
    old, new = (3.5, 4) if kind is np.float32 else (-3, 4)
    got = out_of_shared(reduce, kind, old, np.full(32, new, kind))
    np.testing.assert_array_equal(got, want)


# every CTA of a pair sends four bytes a lane into the other's, side by side
REMOTE = """
mul.lo.u32 %r11, %r0, 8; shl.b32 %r12, %r10, 2; add.u32 %r11, %r11, %r12; mov.u32 %r16, 0;
mapa.shared::cluster.u32 %r15, %r9, %r16; add.u32 %r11, %r11, %r15;
mad.lo.u32 %r13, %r10, 100, %r0;
st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r11+128], %r13, [%r15];
setp.ne.u32 %p3, %r10, 0; @%p3 bra LAST;
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_remote_stores_of_neighbouring_words(seed):
    read = OUT.format(at=128).replace("shl.b32 %r3, %r0, 2", "shl.b32 %r3, %r0, 3")
    body = BEGIN.format(expect=256) + REMOTE + WAIT + read + "LAST:" + END
    _, y = run(body, seed, ctas=2)
    np.testing.assert_array_equal(y[0], np.arange(32))
    _, y = run(body.replace("[%r3+128]", "[%r3+132]"), seed, ctas=2)
    np.testing.assert_array_equal(y[0], np.arange(32) + 100)
    with pytest.raises(Fault, match="race: generic load .* while in flight|nothing orders"):
        run(body.replace("@!%p1 bra WAIT;", ""), seed, ctas=2)


@pytest.mark.parametrize("seed", SEEDS)
def test_remote_reductions_of_the_same_word(seed):
    first = "shl.b32 %r12, %r0, 3; add.u32 %r12, %r12, %r9; st.shared.u32 [%r12+128], 1;"
    body = BEGIN.format(expect=256).replace("READY:", "READY:" + first)
    add = REMOTE.replace("st.async.weak.", "red.async.relaxed.cluster.")
    add = add.replace("bytes.u32", "bytes.add.u32")
    add = add.replace("shl.b32 %r12, %r10, 2", "mov.u32 %r12, 0")
    read = OUT.format(at=128).replace("shl.b32 %r3, %r0, 2", "shl.b32 %r3, %r0, 3")
    _, y = run(body + add + WAIT + read + "LAST:" + END, seed, ctas=2)
    np.testing.assert_array_equal(y[0], 1 + np.arange(32) + np.arange(32) + 100)


@pytest.mark.parametrize(
    "text", ["multimem.red.relaxed.gpu.global.add.u32 [%d0], %r0;",
             "cp.async.bulk.tensor.3d.shared::cta.global.im2col.mbarrier::complete_tx::bytes "
             "[%r9], [%d0, {0, 0, 0}], [%r9], {0};"]
)  # fmt: skip
def test_what_is_not_there_is_refused_by_name(text):
    with pytest.raises(PtxError, match=text.split(".")[0].split(" ")[0]):
        run_ptx(text, source())


TWO_LANES = """
mov.u32 %r9, dynamic; setp.eq.u32 %p0, %r0, 0; setp.eq.u32 %p1, %r0, {waits};
@%p0 st.shared.u32 [%r9], 7; @%p0 fence.proxy.async.shared::cta;
@%p0 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r9], 128;
@%p0 cp.async.bulk.commit_group;
@%p1 cp.async.bulk.wait_group.read 0;
@%p0 st.shared.u32 [%r9], 8;
"""


@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_groups_are_those_of_a_thread(mode):
    """Lane 1 waits for its own groups, of which it has none, not for the store of lane 0."""
    place = aligned_words()
    run_ptx(TWO_LANES.format(waits=0), place, smem=1024, policy=Policy(0, mode))
    with pytest.raises(
        Fault, match="race: generic store .* bulk store read|after the read by warp 0"
    ):
        run_ptx(TWO_LANES.format(waits=1), place, smem=1024, policy=Policy(0, mode))


def aligned_words():
    store = np.zeros(64, np.uint32)
    at = -store.ctypes.data % 16 // 4
    return store[at : at + 32]


REUSE = """
mov.u32 %r9, dynamic; setp.ne.u32 %p0, %r0, 0;
@!%p0 mbarrier.init.shared::cta.b64 [%r9], 1; fence.mbarrier_init.release.cluster;
{before} ld.shared.u32 %r4, [%r9+128]; {after} bar.warp.sync -1;
@!%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 128;
@!%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes
    [%r9+128], [%d0], 128, [%r9];
"""


BY_LANES = """
mov.u32 %r9, dynamic; setp.eq.u32 %p0, %r0, 0; setp.ne.u32 %p1, %r0, 0;
shl.b32 %r12, %r0, 2; add.u32 %r12, %r12, %r9;
st.shared.u32 [%r12], %r0; {between}
bar.warp.sync -1; {late}
@%p0 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r9], 128;
@%p0 cp.async.bulk.commit_group; @%p0 cp.async.bulk.wait_group 0;
"""


@pytest.mark.parametrize(
    "between, late, fenced",
    [
        (FENCE, "", True),
        ("@%p0 " + FENCE, "", False),
        ("@%p1 " + FENCE, "", False),
        ("@%p0 " + FENCE + "@%p1 " + FENCE, "", True),
        ("", "@%p0 " + FENCE, True),  # the lanes have met
    ],
)
def test_a_proxy_fence_of_one_lane_is_about_its_own_stores(between, late, fenced):
    place = aligned_words()
    body = BY_LANES.format(between=between, late=late)
    if fenced:
        run_ptx(body, place, smem=1024)
        assert place.tolist() == list(range(32))
        return
    with pytest.raises(Fault, match="bulk store .* not followed by a fence.proxy.async"):
        run_ptx(body, place, smem=1024)


@pytest.mark.parametrize("fence", [FENCE, "fence.proxy.async;"])
def test_a_copy_over_what_was_read_wants_a_proxy_fence_between(fence):
    """It is a warning; a fence before the read does not count."""
    met = "bar.warp.sync -1; @!%p0 " + fence
    places = [("", fence, False), ("", "", True), (fence, "", True)]
    places += [("", "@!%p0 " + fence, True), ("", met, False)]
    for before, after, warned in places:
        body = REUSE.format(before=before, after=after) + WAIT
        machine = run_ptx(body, aligned_words(), smem=1024, target="sm_100a")
        warnings = [w for w in machine.warnings if "no fence.proxy.async between the generic" in w]
        assert bool(warnings) == warned
        assert all("[%r9+128]" in w and "bulk copy over it" in w for w in warnings)
