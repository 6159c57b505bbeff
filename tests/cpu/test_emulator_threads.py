"""Whose accesses a fence, a wait or a commit orders: those of a thread, of its warp, of neither."""

import numpy as np
import pytest

from tests.emulator import Fault, Policy
from tests.emulator.snippet import run_ptx

SEEDS = range(4)
# %r3: a word of the thread's own; %p0: the first thread; %p10: warp 0
START = """
mov.u32 %r9, dynamic; setp.eq.u32 %p0, %r0, 0; shl.b32 %r3, %r0, 2; add.u32 %r3, %r3, %r9;
setp.lt.u32 %p10, %r0, 32; setp.eq.u32 %p5, %r0, {lane};
"""
BULK_STORE = """
{by} cp.async.bulk.global.shared::cta.bulk_group [%d0], [%r9+128], 128;
{by} cp.async.bulk.commit_group; {by} cp.async.bulk.wait_group 0;
"""
INIT = "@%p0 mbarrier.init.shared::cta.b64 [%r9+16], {count};"
FENCE_INIT = "fence.mbarrier_init.release.cluster;"
WAIT = "{at}: mbarrier.try_wait.parity{how}.shared::cta.b64 %p2, [%r9+16], 0; @!%p2 bra {at};"
JOIN = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"


def run(body, seed=0, warps=1, ctas=1, lane=0):
    store = np.zeros(96, np.uint32)
    at = -store.ctypes.data % 128 // 4
    out = store[at : at + 64]
    run_ptx(
        START.format(lane=lane) + body, out, block=(32 * warps, 1, 1), grid=(ctas, 1, 1),
        cluster=(ctas, 1, 1), smem=2048, policy=Policy(seed), target="sm_100a",
    )  # fmt: skip
    return out


def fails(body, match, seeds=SEEDS, **options):
    for seed in seeds:
        with pytest.raises(Fault, match=match):
            run(body, seed, **options)


def passes(body, **options):
    for seed in SEEDS:
        run(body, seed, **options)


@pytest.mark.parametrize(
    "store",
    [
        "st.shared.u32 [%r9+128], 5;",
        "red.shared.add.u32 [%r9+128], 5;",
        "atom.shared.exch.b32 %r7, [%r9+128], 5;",
    ],
)
def test_a_proxy_fence_is_about_the_stores_of_its_lane(store):
    body = "st.shared.u32 [%r3+128], 1; fence.proxy.async; bar.warp.sync -1; @%p0 " + store
    body += "{meet} @%p5 fence.proxy.async;" + BULK_STORE.format(by="@%p5")
    passes(body.format(meet=""), lane=0)
    passes(body.format(meet="bar.warp.sync -1;"), lane=1)
    fails(body.format(meet=""), "not followed by a fence.proxy.async", lane=1)


LOAD = """
@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9+16], 128;
@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r9+128],[%d0],128,[%r9+16];
""" + WAIT.format(at="HERE", how="")


@pytest.mark.parametrize("fence", [FENCE_INIT, "fence.proxy.async;"])
def test_a_fence_is_about_the_mbarriers_that_its_lane_initialised(fence):
    body = INIT.format(count=1) + "{meet} @%p5 " + fence + "bar.warp.sync -1;" + LOAD
    passes(body.format(meet=""), lane=0)
    fails(body.format(meet=""), "its initialisation was never fenced", lane=1)


def test_a_proxy_fence_after_the_lanes_met_is_about_the_others_mbarriers_too():
    body = INIT.format(count=1) + "bar.warp.sync -1; @%p5 {} bar.warp.sync -1;" + LOAD
    passes(body.format("fence.proxy.async;"), lane=1)
    fails(body.format(FENCE_INIT), "its initialisation was never fenced", lane=1)


@pytest.mark.parametrize(
    ("how", "fence"), [("", ""), (".relaxed.cta", "fence.acq_rel.cta;"), (".relaxed.cta", "")]
)
def test_a_wait_that_acquires_is_after_the_stores_of_every_lane_that_arrived(how, fence):
    body = INIT.format(count=32) + FENCE_INIT + "bar.sync 0; st.shared.u32 [%r3+128], 5;"
    body += "mbarrier.arrive.shared::cta.b64 _, [%r9+16]; @!%p0 bra END;"
    body += WAIT.format(at="HERE", how=how) + fence + "fence.proxy.async;"
    body += BULK_STORE.format(by="") + "END:"
    if how and not fence:
        fails(body, "not followed by a fence.proxy.async")
    else:
        passes(body)
        assert (run(body)[:32] == 5).all()


def test_a_proxy_fence_does_not_publish_what_another_warp_stored_over_it():
    body = """
    @%p10 bra FIRST;
    add.u32 %r3, %r3, -128; bar.sync 0; st.shared.u32 [%r3+128], 2; bra JOIN;
    FIRST: st.shared.u32 [%r3+128], 1; bar.sync 0; {delay} fence.proxy.async;
    JOIN: bar.sync 0; {fence}
    """
    body += BULK_STORE.format(by="@%p5")
    late = body.format(delay="mov.u32 %r6, 0;" * 20, fence="")
    fails(late, "not followed by a fence.proxy.async", seeds=range(12), warps=2, lane=32)
    passes(body.format(delay="", fence="fence.proxy.async;"), warps=2, lane=32)


COMMIT = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64"


@pytest.mark.parametrize("place", ["shared", "global"])
def test_a_commit_releases_no_stores(place):
    address = {"shared": "[%r9+512]", "global": "[%d0]"}[place]
    body = INIT.format(count=1) + FENCE_INIT + "bar.sync 0; @%p10 bra ONE;"
    body += WAIT.format(at="HERE", how="") + f"ld.{place}.u32 %r6, {address}; bra END;"
    body += f"ONE: @!%p0 bra END; st.{place}.u32 {address}, 7; {{}} [%r9+16]; END:"
    fails(body.format(COMMIT), "race: ", warps=2)
    fails(body.format("mbarrier.arrive.relaxed.cta.shared::cta.b64 _,"), "race: ", warps=2)
    passes(body.format("mbarrier.arrive.shared::cta.b64 _,"), warps=2)


@pytest.mark.parametrize(
    ("access", "report"),
    [
        ("ld.shared::cluster.u32 %r6, [%r15+512]", "race"),
        ("st.shared::cluster.u32 [%r15+512], 8", ""),
    ],
)
def test_what_follows_a_peers_commit_may_overwrite_but_not_read(access, report):
    body = INIT.format(count=1) + FENCE_INIT
    body += """
    mov.u32 %r10, %cluster_ctarank; setp.eq.u32 %p6, %r10, 0; xor.b32 %r14, %r10, 1;
    mapa.shared::cluster.u32 %r15, %r9, %r14;
    """
    body += JOIN + "@!%p6 bra PEER; @!%p0 bra END; st.shared.u32 [%r9+512], 7;"
    body += COMMIT + " [%r15+16]; bra END; PEER:" + WAIT.format(at="HERE", how="")
    body += f"@%p0 {access}; END: {JOIN}"
    if report:
        fails(body, report, ctas=2)
    else:
        passes(body, ctas=2)


def test_an_mbarrier_ends_after_its_uses():
    body = INIT.format(count=1) + "bar.sync 0; @%p10 bra OWNER;"
    body += WAIT.format(at="THERE", how="") + "{after} bra END; OWNER: @%p0 {arrive}"
    body += "bar.warp.sync -1;" + WAIT.format(at="HERE", how="") + "{before}"
    body += "@%p0 mbarrier.inval.shared::cta.b64 [%r9+16]; END:"
    arrive = "mbarrier.arrive.shared::cta.b64 _, [%r9+16];"
    apart = body.format(arrive=arrive, after="", before="")
    fails(apart, "race: mbarrier.inval|no initialised mbarrier", seeds=range(12), warps=2)
    passes(body.format(arrive=arrive, after="bar.sync 1;", before="bar.sync 1;"), warps=2)


@pytest.mark.parametrize("before", ["", JOIN])
def test_a_cluster_wait_follows_an_arrival(before):
    fails(before + "barrier.cluster.wait.aligned;", "not arrived since their last", ctas=2)
    passes(before + JOIN, ctas=2)


def test_a_named_barrier_is_of_some_threads():
    fails("bar.sync 1, 0;", "expects 0 threads", warps=2)
