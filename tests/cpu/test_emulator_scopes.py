"""What synchronises CTAs of a cluster: scopes, fences, mbarriers and who may touch them."""

import numpy as np

from tests.emulator import Policy
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
