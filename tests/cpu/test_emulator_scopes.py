"""What synchronises CTAs of a cluster: scopes, fences, mbarriers and who may touch them."""

import numpy as np
import pytest

from tests.emulator import Fault, Policy
from tests.emulator.encoder import tensor_map
from tests.emulator.snippet import run_ptx

SEEDS = range(4)
JOIN = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
# every CTA has an mbarrier at [%r9]; %r10: its rank; %p0: its first thread; %p1: CTA 0; %r15: the
# same place in the other CTA
PAIR = """
mov.u32 %r9, dynamic; setp.eq.u32 %p0, %r0, 0; mov.u32 %r10, %cluster_ctarank;
setp.eq.u32 %p1, %r10, 0; xor.b32 %r14, %r10, 1; mapa.shared::cluster.u32 %r15, %r9, %r14;
mul.wide.u32 %d8, %r0, 4; add.s64 %d8, %d0, %d8;
@%p0 mbarrier.init.shared::cta.b64 [%r9], 1; @%p0 fence.mbarrier_init.release.cluster;
"""
WAIT = """
{label}: mbarrier.try_wait.parity{scope}.shared::cta.b64 %p2, [%r9], 0; @!%p2 bra {label};
"""


def run(body, seed=0, ctas=2, params=(), words=64, mode="mixed"):
    store = np.zeros(words + 32, np.uint32)
    at = -store.ctypes.data % 128 // 4
    out = store[at : at + words]
    made = [tensor_map("u32", out.ctypes.data, (32, 2), [128], [32, 1])] if params else []
    run_ptx(
        PAIR + body, out, grid=(ctas, 1, 1), cluster=(ctas, 1, 1), smem=1024, params=made,
        policy=Policy(seed, mode), target="sm_100a",
    )  # fmt: skip
    return out


def fails(body, match, **options):
    for seed in SEEDS:
        with pytest.raises(Fault, match=match):
            run(body, seed, **options)


# ---- mbarriers across CTAs: CTA 1 arrives at that of CTA 0, which then uses the memory ----
HANDOVER = (
    JOIN
    + """
@%p1 bra OWNER;
{before} {fence}
@%p0 mbarrier.arrive{arrive}.shared::cluster.b64 _, [%r15];
bra END;
OWNER: """
    + WAIT.format(label="WAIT", scope="{wait}")
    + """
{after}
END: """
    + JOIN
)
STORE, LOAD = "@%p0 st.shared.u32 [%r9+64], 7;", "@%p0 ld.shared::cluster.u32 %r5, [%r15+64];"


def handover(before, after, arrive="", wait="", fence=""):
    return HANDOVER.format(before=before, after=after, arrive=arrive, wait=wait, fence=fence)


RELEASE, ACQUIRE = ".release.cluster", ".acquire.cluster"
NARROW = [
    ("", ""), (RELEASE, ""), ("", ACQUIRE), (".release.cta", ".acquire.cta"),
]  # fmt: skip


@pytest.mark.parametrize(("arrive", "wait"), NARROW)
def test_what_is_stored_before_an_arrival_needs_cluster_scope_at_both_ends(arrive, wait):
    """The defaults are .cta (9.7.13.15.13, 16)."""
    for seed in SEEDS:
        run(handover(STORE, LOAD, RELEASE, ACQUIRE), seed)
    fails(handover(STORE, LOAD, arrive, wait), "race: generic load .* nothing orders")


@pytest.mark.parametrize(("arrive", "wait"), NARROW)
def test_what_is_read_before_an_arrival_may_be_overwritten_after_the_wait(arrive, wait):
    """Accesses after the wait are not visible to those before the arrival: of every scope."""
    read, write = LOAD.replace("%r15", "%r9"), "@%p0 st.shared::cluster.u32 [%r15+64], 8;"
    for seed in SEEDS:
        run(handover(read, write, arrive, wait), seed)
        run(handover(STORE, write, arrive, wait), seed)
    relaxed = {"": ".relaxed.cta"}.get(arrive, arrive.replace("release", "relaxed"))
    fails(handover(read, write, relaxed, wait), "race: generic store .* nothing orders")


def test_a_relaxed_arrival_takes_the_narrower_of_its_scope_and_the_fences():
    relaxed, fence = ".relaxed.cluster", "@%p0 fence.release.sync_restrict::shared::cta.cluster;"
    for wait, acquire in ((ACQUIRE, ""), (".relaxed.cluster", "fence.acq_rel.cluster;")):
        for seed in SEEDS:
            run(handover(STORE, acquire + LOAD, relaxed, wait, fence), seed)
        for changed in (
            (relaxed, wait, "@%p0 fence.acq_rel.cta;"), (".relaxed.cta", wait, fence),
            (relaxed, wait, ""), (relaxed, wait.replace("cluster", "cta"), fence),
        ):  # fmt: skip
            fails(handover(STORE, acquire + LOAD, *changed), "race: generic load")
    fails(handover(STORE, "fence.acq_rel.cta;" + LOAD, relaxed, ".relaxed.cluster", fence), "race")


def test_global_memory_follows_the_same_scopes():
    store, load = "@%p0 st.global.u32 [%d0], 7;", "@%p0 ld.global.u32 %r5, [%d0];"
    for seed in SEEDS:
        run(handover(store, load, RELEASE, ACQUIRE), seed)
        run(handover(load, store), seed)
        run(handover(store, store), seed)
    fails(handover(store, load), "race: load of array 0 .* nothing orders")


def test_strong_accesses_of_scope_cta_do_not_reach_another_cta():
    """CTA 0 and CTA 1 add to a word of CTA 0's shared memory (8.7: scopes include each other)."""
    add = "@{0}%p1 red.relaxed.{1}.shared::cluster.add.u32 [{2}+64], 1;"
    clear = "@%p0 st.shared.u32 [%r9+64], 0;" + JOIN
    for scopes, right in (
        (("cluster", "cluster"), True), (("cta", "cluster"), False), (("cluster", "cta"), False),
    ):  # fmt: skip
        body = clear + add.format("", scopes[0], "%r9") + add.format("!", scopes[1], "%r15") + JOIN
        body += "@%p1 ld.shared.u32 %r5, [%r9+64]; @%p1 st.global.u32 [%d8], %r5;"
        if not right:
            fails(body, "race: generic store .*(strong|read|nothing orders)")
            continue
        for seed in SEEDS:
            assert (run(body, seed)[:32] == 64).all()


# ---- fence.proxy.async: a bulk copy takes what another CTA stored ----
BULK = """
@!%p1 bra SKIP;
@%p0 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r9+128], 128;
@%p0 cp.async.bulk.commit_group; @%p0 cp.async.bulk.wait_group 0;
SKIP:
"""


def test_a_proxy_fence_of_shared_cta_is_for_the_own_ctas_memory():
    """9.7.13.5: the order is that of operations on objects in the state space."""
    remote = (
        JOIN
        + "shl.b32 %r3, %r0, 2; add.u32 %r3, %r3, {at};"
        + "@{0}%p1 st.shared::cluster.u32 [%r3+128], 5;"
    )
    far, near = remote.format("!", at="%r15"), remote.format("", at="%r9")
    own, wide, every = (f"fence.proxy.async{x};" for x in (".shared::cta", ".shared::cluster", ""))
    for fence in (own, wide, every):
        assert (run(near + fence + JOIN + BULK + JOIN)[:32] == 5).all()
        assert (run(far + JOIN + fence + JOIN + BULK + JOIN)[:32] == 5).all()  # by the owner
    for fence in (wide, every):
        assert (run(far + fence + JOIN + BULK + JOIN)[:32] == 5).all()
    fails(far + own + JOIN + BULK + JOIN, "not followed by a fence.proxy.async")


# ---- barrier.cluster ----
RELAXED = "barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;"


def test_the_fence_of_initialisations_orders_no_stores():
    """9.7.13.5: it is about mbarrier.init alone."""
    init = (
        "@%p0 mbarrier.init.shared::cta.b64 [%r9+8], 1; @%p0 fence.mbarrier_init.release.cluster;"
    )
    arrive = "@%p0 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r15+8];"
    wait = WAIT.format(label="NEXT", scope="").replace("[%r9]", "[%r9+8]")
    for seed in SEEDS:
        run(init + RELAXED + arrive + wait + JOIN, seed)
        run(STORE + "fence.acq_rel.cluster;" + RELAXED + LOAD + JOIN, seed)
        run(STORE + JOIN + LOAD + JOIN, seed)
    fails(STORE + init + RELAXED + LOAD + JOIN, "race: generic load .* nothing orders")
    fails(STORE + "fence.acq_rel.cta;" + RELAXED + LOAD + JOIN, "race: generic load")
    fails(init.split(";")[0] + ";" + RELAXED + arrive + wait + JOIN, "never fenced")
    other = init.replace("@%p0 fence", "@!%p0 fence")
    fails(other + RELAXED + arrive + wait + JOIN, "never fenced")
    late = "@%p0 mbarrier.init.shared::cta.b64 [%r9+8], 1;" + RELAXED
    late += "@%p0 fence.mbarrier_init.release.cluster;" + arrive + wait + JOIN
    fails(late, "never fenced|nothing orders after its initialisation")


def test_a_thread_arrives_at_the_cluster_barrier_once():
    arrive = "barrier.cluster.arrive.aligned;"
    fails(arrive + JOIN, "threads that have not waited since their last")
    half = "setp.lt.u32 %p3, %r0, 16; @%p3 {0} @!%p3 {0} barrier.cluster.wait;"
    run(2 * half.format("barrier.cluster.arrive;"))
    fails(half.replace("@!", "@").format("barrier.cluster.arrive;"), "have not waited since")
    # those that exit need not wait
    run("setp.eq.u32 %p3, %r10, 1;" + arrive + "@%p3 ret; barrier.cluster.wait.aligned;")


# ---- mbarriers as memory ----
TOUCHES = {
    "store": "@%p0 st.shared.u32 [%r9+4], 1;",
    "load": "@%p0 ld.shared.u32 %r5, [%r9];",
    "atomic": "@%p0 red.shared.add.u32 [%r9], 1;",
    "vector store": "@%p0 st.shared.v4.u32 [%r9], {%r0, %r0, %r0, %r0};",
    "remote store": "@%p0 st.shared::cluster.u32 [%r15], 1;",
    "st.async": "@%p0 st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r15], 7, [%r15];",
    "cp.async": "@%p0 cp.async.ca.shared.global [%r9], [%d0], 8;",
    "bulk copy": "@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
    "[%r9], [%d0], 16, [%r9];",
    "bulk store": "@%p0 cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r9], 16;",
    "TMA load": "@%p0 cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes "
    "[%r9], [%d1, {0, 0}], [%r9];",
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_only_mbarrier_operations_may_touch_an_mbarrier(touch):
    """9.7.13.15.3: undefined, until an mbarrier.inval."""
    fails(JOIN + TOUCHES[touch] + JOIN, "which is initialised: mbarrier.inval first", params=(1,))


def test_memory_of_an_mbarrier_is_free_after_its_inval():
    inval = "@%p0 mbarrier.inval.shared::cta.b64 [%r9];"
    for touch in ("store", "vector store"):
        run(JOIN + inval + TOUCHES[touch] + JOIN)
    other = "setp.eq.u32 %p0, %r0, 32;" + TOUCHES["store"]
    two = PAIR + inval + "{}" + other
    for barrier, right in (("bar.sync 0;", True), ("", False)):
        options = {"block": (64, 1, 1), "smem": 1024, "target": "sm_100a"}
        if right:
            run_ptx(two.format(barrier), np.zeros(64, np.uint32), **options)
        else:
            with pytest.raises(Fault, match="race: generic store|is initialised"):
                run_ptx(two.format(barrier), np.zeros(64, np.uint32), **options)


def test_an_initialisation_must_come_after_other_uses_of_the_memory():
    use = "setp.eq.u32 %p3, %r0, 32; @%p3 st.shared.u32 [%r9+512], 1; {}"
    use += "@%p0 mbarrier.init.shared::cta.b64 [%r9+512], 1;"
    options = {"block": (64, 1, 1), "smem": 1024}
    run_ptx(PAIR + use.format("bar.sync 0;"), np.zeros(64, np.uint32), **options)
    with pytest.raises(Fault, match="race: mbarrier.init of|store of mbarrier"):
        run_ptx(PAIR + use.format(""), np.zeros(64, np.uint32), **options)


@pytest.mark.parametrize("form", ["mbarrier.expect_tx", "mbarrier.arrive.expect_tx"])
def test_more_bytes_than_an_mbarrier_counts_are_reported(form):
    """9.7.13.15.2: up to 2**20 - 1."""
    state = "_, " if "arrive" in form else ""
    line = f"@%p0 {form}.shared::cta.b64 {state}[%r9], {{}};"
    run(line.format(2**20 - 1))
    for n in (2**20, 2**31):
        fails(line.format(n), "transaction count out of range .* it may be -1048575 to 1048575")
    once = line.replace("arrive.expect_tx", "expect_tx").replace("_, ", "")
    fails(once.format(2**20 - 16) + line.format(16), "transaction count out of range")


# ---- st.async works in the generic proxy, 9.7.9.12 ----
SEND = (
    JOIN
    + """
@%p1 bra OWNER;
mul.lo.u32 %r3, %r0, 4; add.u32 %r3, %r3, %r15;
st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r3+128], 9, [%r15];
bra LAST;
OWNER: @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 128;
"""
    + WAIT.format(label="WAIT", scope="")
    + "{fence}"
    + BULK
    + "LAST:"
    + JOIN
)


def test_the_async_proxy_sees_remote_stores_after_a_fence():
    for seed in SEEDS:
        assert (run(SEND.format(fence="fence.proxy.async.shared::cta;"), seed)[:32] == 9).all()
    fails(SEND.format(fence=""), "not followed by a fence.proxy.async .* stored by .*st.async")


# CTA 0 reads its words and hands them to CTA 1, which overwrites them; CTA 0 reads them again.
RING = (
    """
shl.b32 %r3, %r0, 2; add.u32 %r4, %r3, %r9; add.u32 %r3, %r3, %r15;
st.shared.u32 [%r4+128], 1;
"""
    + JOIN
    + "@%p1 bra OWNER;"
    + WAIT.format(label="HANDED", scope="")
    + """
st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r3+128], 9, [%r15];
bra LAST;
OWNER: {early}
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 128;
bar.warp.sync -1;
@%p0 mbarrier.arrive.shared::cluster.b64 _, [%r15];
{late}
"""
    + WAIT.format(label="SENT", scope="")
    + """
ld.shared.u32 %r6, [%r4+128]; st.global.u32 [%d8], %r6; st.global.u32 [%d8+128], %r5;
LAST:"""
    + JOIN
)


def test_generic_accesses_around_a_remote_store_need_no_fence():
    """What the ring of a tile scheduler does: read, arrive, be overwritten, wait, read."""
    read = "ld.shared.u32 %r5, [%r4+128];"
    right = RING.format(early=read, late="")
    for seed in SEEDS:
        out = run(right, seed)
        assert (out[:32] == 9).all() and (out[32:] == 1).all()
    waits = (WAIT.format(label=label, scope="") for label in ("HANDED", "SENT"))
    for wrong in (RING.format(early="", late=read), *(right.replace(wait, "") for wait in waits)):
        assert wrong != right
        fails(wrong, "race: .*(nothing orders|in flight)")


# ---- multicast ----
def test_a_multicast_reaches_each_cta_at_a_time_of_its_own():
    """That CTA 0 has its copy says nothing of CTA 1's."""
    copy = (
        """
    @%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 128;"""
        + JOIN
        + """
    mov.u16 %h1, 3; setp.ne.u32 %p3, %r10, 0; @%p3 bra OTHER;
    @%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster
        [%r9+128], [%d0], 128, [%r9], %h1;
    {wait}
    st.relaxed.cluster.shared::cluster.u32 [%r15+512], 1;
    bra LAST;
    OTHER: POLL: ld.relaxed.cluster.shared::cta.u32 %r5, [%r9+512];
    setp.ne.u32 %p4, %r5, 1; @%p4 bra POLL;
    mbarrier.test_wait.parity.shared::cta.b64 %p5, [%r9], 0; selp.u32 %r6, 1, 2, %p5;
    add.s64 %d8, %d8, 128; st.global.u32 [%d8], %r6;
    LAST: """
    )
    wait = WAIT.format(label="WAIT", scope="")
    finish = (
        JOIN + "FINAL: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r9], 0; @!%p2 bra FINAL;"
    )
    seen = {int(run(copy.format(wait=wait) + finish, s, mode="random")[32]) for s in range(12)}
    assert seen == {1, 2}
