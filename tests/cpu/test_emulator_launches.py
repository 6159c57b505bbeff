"""Launches that overlap (griddepcontrol) and clusters taken over before they start (CLC)."""

import numpy as np
import pytest

from tests.emulator import STREAM, Fault, Policy, PtxError, run_kernel
from tests.emulator.snippet import run_ptx, run_stream

SEEDS = range(8)
AT = "mov.u32 %r1, %ctaid.x; mad.lo.u32 %r2, %r1, 32, %r0; mul.wide.u32 %d2, %r2, 4;"
WRITE = AT + "add.s64 %d3, %d0, %d2; {before} st.global.u32 [%d3], %r2; {after}"
READ = """
add.s64 %d3, %d0, %d2; add.s64 %d4, %d1, %d2;
{wait}
ld.global.u32 %r3, [%d3]; add.u32 %r3, %r3, 1; st.global.u32 [%d4], %r3;
"""
WAIT = "griddepcontrol.wait;"
GO = """griddepcontrol.launch_dependents;
mov.u32 %r20, 0; SPIN: add.u32 %r20, %r20, 1; setp.lt.u32 %p20, %r20, 200; @%p20 bra SPIN;
"""


def run(first, second, seed, programmatic=True):
    x, y = np.zeros(128, np.uint32), np.zeros(128, np.uint32)
    machine = run_stream(
        [(first, 4, 32, False), (second, 4, 32, programmatic)], x, y, policy=Policy(seed)
    )
    return x, y, machine


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("trigger", ["before", "after", "never"])
def test_the_wait_orders_a_dependent_launch(seed, trigger):
    places = dict.fromkeys(("before", "after"), "") | ({trigger: GO} if trigger != "never" else {})
    _, y, _ = run(WRITE.format(**places), AT + READ.format(wait=WAIT), seed)
    np.testing.assert_array_equal(y, np.arange(128) + 1)


def test_without_the_wait_it_is_a_race_whenever_the_launches_overlap():
    found = 0
    for seed in SEEDS:
        try:
            run(WRITE.format(before=GO, after=""), AT + READ.format(wait=""), seed)
        except Fault as e:
            found += 1
            assert "race: " in str(e) and "griddepcontrol.wait orders them" in str(e)
            assert str(e).count("PTX line") >= 2
    assert found > len(SEEDS) // 2


def test_a_launch_without_the_attribute_needs_no_wait():
    for seed in SEEDS:
        _, y, _ = run(WRITE.format(before=GO, after=""), AT + READ.format(wait=""), seed, False)
        np.testing.assert_array_equal(y, np.arange(128) + 1)


def test_the_wait_of_one_warp_is_passed_on_by_a_barrier():
    second = (
        "mov.u32 %r1, 0; mov.u32 %r2, %r0; mul.wide.u32 %d2, %r2, 4;"
        "setp.lt.u32 %p0, %r0, 32; @!%p0 bra OTHER;" + WAIT + "OTHER: bar.sync 0;"
    )
    for seed in SEEDS:
        for line, fails in (("bar.sync 0;", False), ("", True)):
            x, y = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
            body = second.replace("bar.sync 0;", line) + READ.format(wait="")
            launches = [(WRITE.format(before=GO, after=""), 2, 32, False), (body, 1, 64, True)]
            try:
                run_stream(launches, x, y, policy=Policy(seed, "eager"))
                failed = False
            except Fault:
                failed = True
            assert failed == fails


def test_writing_what_the_launch_before_reads_needs_the_wait():
    read = AT + "add.s64 %d3, %d0, %d2;" + GO + "ld.global.u32 %r3, [%d3];"
    for seed in SEEDS:
        run(read, WRITE.format(before=WAIT, after=""), seed)
    with pytest.raises(Fault, match="race: "):
        for seed in SEEDS:
            run(read, WRITE.format(before="", after=""), seed)


def test_a_third_launch_does_not_know_the_first_through_one_that_never_waits():
    first = WRITE.format(before=GO, after="")
    middle, last = GO, AT + READ.format(wait=WAIT)
    found = 0
    for seed in range(12):
        for wait in (WAIT, ""):
            x, y = np.zeros(128, np.uint32), np.zeros(128, np.uint32)
            launches = [(first, 4, 32, False), (middle + wait, 1, 32, True), (last, 4, 32, True)]
            try:
                run_stream(launches, x, y, policy=Policy(seed))
                np.testing.assert_array_equal(y, np.arange(128) + 1)
            except Fault:
                assert not wait
                found += 1
    assert found


# ---- cluster launch control ----
CLC = """
mov.u32 %r9, dynamic; mov.u32 %r10, 0; mov.u32 %r1, %ctaid.x;
setp.ne.u32 %p0, %r0, 0; @%p0 bra READY;
mbarrier.init.shared::cta.b64 [%r9], 1; fence.mbarrier_init.release.cluster;
READY: bar.sync 0;
TILE:
@%p0 bra WAIT;
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 16;
{request}
mul.wide.u32 %d2, %r1, 4; add.s64 %d3, %d0, %d2; red.global.add.u32 [%d3], 1;
WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r9], %r10;
@!%p1 bra WAIT;
xor.b32 %r10, %r10, 1;
ld.shared.v2.b64 {{%d4, %d5}}, [%r9+16];
{{
.reg .b128 %q;
mov.b128 %q, {{%d4, %d5}};
clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p2, %q;
clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r1, %q;
@%p2 clusterlaunchcontrol.query_cancel.get_first_ctaid.v4.b32.b128 {{%r1, %r2, %r3, %r4}}, %q;
}}
bar.sync 0;
@%p2 bra TILE;
{after}
"""
REQUEST = (
    "clusterlaunchcontrol.try_cancel.async.shared::cta.mbarrier::complete_tx::bytes.b128 "
    "[%r9+16], [%r9];"
)


def cancel(body, seed, **options):
    x = np.zeros(40, np.uint32)
    machine = run_ptx(
        body, x, grid=(40, 1, 1), block=(64, 1, 1), smem=256, target="sm_100a",
        policy=Policy(seed), **options,
    )  # fmt: skip
    return x, machine


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("any_cancel", [False, True])
def test_every_cluster_is_run_or_taken_over_exactly_once(seed, any_cancel):
    x, machine = cancel(CLC.format(request=REQUEST, after=""), seed, any_cancel=any_cancel)
    np.testing.assert_array_equal(x, 1)
    assert machine.stats["try_cancel"] > 4


def test_a_request_after_a_refusal_is_reported():
    with pytest.raises(Fault, match="try_cancel after a refusal"):
        cancel(CLC.format(request=REQUEST, after=f"@%p0 bra E; {REQUEST} E:"), 0)


def test_an_answer_that_was_not_waited_for_is_a_race():
    for seed in SEEDS:
        body = CLC.format(request=REQUEST, after="").replace("@!%p1 bra WAIT;", "")
        with pytest.raises(Fault, match=r"race: |no answer"):
            cancel(body, seed)


def test_an_answer_needs_its_bytes():
    with pytest.raises(Fault, match="deadlock"):
        cancel(CLC.format(request=REQUEST, after="").replace("_, [%r9], 16", "_, [%r9], 32"), 0)


def test_an_answer_goes_to_every_cta_of_the_cluster():
    request = REQUEST.replace("bytes.b128", "bytes.multicast::cluster::all.b128")
    body = """
    mov.u32 %r9, dynamic; mov.u32 %r1, %ctaid.x; setp.ne.u32 %p0, %r0, 0;
    @%p0 bra READY;
    mbarrier.init.shared::cta.b64 [%r9], 1; fence.mbarrier_init.release.cluster;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], 16;
    READY: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
    mov.u32 %r2, %cluster_ctarank; setp.eq.u32 %p3, %r2, 0; setp.eq.and.u32 %p3, %r0, 0, %p3;
    @%p3 REQUEST
    WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r9], 0;
    @!%p1 bra WAIT;
    ld.shared.v2.b64 {%d4, %d5}, [%r9+16];
    .reg .b128 %q;
    mov.b128 %q, {%d4, %d5};
    clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p2, %q;
    clusterlaunchcontrol.query_cancel.get_first_ctaid::x.b32.b128 %r3, %q;
    @!%p2 mov.u32 %r3, 1000;
    mul.wide.u32 %d2, %r1, 4; add.s64 %d3, %d0, %d2; st.global.u32 [%d3], %r3;
    """
    x = np.full(40, 2000, np.uint32)
    run_ptx(
        body.replace("REQUEST", request), x, grid=(40, 1, 1), cluster=(2, 1, 1), smem=256,
        target="sm_100a", resident=2,
    )  # fmt: skip
    np.testing.assert_array_equal(x[::2], x[1::2])
    taken = set(x[x < 1000].tolist())
    assert taken and all(t % 2 == 0 for t in taken)
    assert all((x[t : t + 2] == 2000).all() for t in taken)  # those never started


def test_other_words_are_no_answer():
    body = """
    .reg .b128 %q; mov.u64 %d4, 5; mov.b128 %q, {%d4, %d4};
    clusterlaunchcontrol.query_cancel.is_canceled.pred.b128 %p2, %q;
    """
    with pytest.raises(Fault, match="no answer"):
        run_ptx(body, target="sm_100a")
    with pytest.raises(PtxError):
        run_ptx(body.replace("mov.b128", "add.b128"), target="sm_100a")


# ---- as CuTeDSL launches them ----
def two_kernels(wait):
    """A jitted host function that launches two kernels with `use_pdl=True`: z = 64 x reversed."""
    cutlass = pytest.importorskip("cutlass")
    import cutlass.cute as cute

    @cute.kernel
    def first(x: cute.Tensor, y: cute.Tensor):
        cute.arch.griddepcontrol_launch_dependents()
        i = cute.arch.block_idx()[0] * 64 + cute.arch.thread_idx()[0]
        total = cutlass.Float32(0.0)
        for _ in cutlass.range(64, unroll=1):
            total += x[i]
        y[i] = total

    @cute.kernel
    def second(y: cute.Tensor, z: cute.Tensor):
        i = cute.arch.block_idx()[0] * 64 + cute.arch.thread_idx()[0]
        if cutlass.const_expr(wait):
            cute.arch.griddepcontrol_wait()
        z[i] = y[255 - i]

    @cute.jit
    def both(x: cute.Tensor, y: cute.Tensor, z: cute.Tensor, stream):
        first(x, y).launch(grid=[4, 1, 1], block=[64, 1, 1], stream=stream, use_pdl=True)
        second(y, z).launch(grid=[4, 1, 1], block=[64, 1, 1], stream=stream, use_pdl=True)

    return both


def test_programmatic_launches_of_cutedsl():
    torch = pytest.importorskip("torch")

    def run(function, seed):
        x, y, z = (torch.randn(256) for _ in range(3))
        run_kernel(function, [x, y, z, STREAM], "sm_100a", policy=Policy(seed, {"launch": "eager"}))
        torch.testing.assert_close(z, 64 * x.flip(0))

    run(two_kernels(True), 0)
    with pytest.raises(Fault, match=r"race: load of argument 1 .* store by .* \(launch 1\), cta"):
        run(two_kernels(False), 0)
