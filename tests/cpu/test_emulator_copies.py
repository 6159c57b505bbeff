"""cp.async: groups and arrivals are a thread's own (PTX ISA 9.7.9.25.3, 9.7.13.15.15)."""

import numpy as np
import pytest

from tests.emulator import Fault, Policy
from tests.emulator.snippet import run_ptx

MODES = ("eager", "random", "lazy")
# lane i copies 16 bytes to [%r3]; %p1: the lanes below {lanes}
COPY = """
mov.u32 %r9, dynamic; mad.lo.u32 %r3, %r0, 16, %r9; mad.wide.u32 %d8, %r0, 16, %d1;
setp.lt.u32 %p1, %r0, {lanes}; setp.eq.u32 %p0, %r0, 0;
@%p0 mbarrier.init.shared::cta.b64 [%r9], {count}; bar.warp.sync -1;
cp.async.cg.shared.global [%r3+64], [%d8], 16;
"""
READ = """
@%p1 ld.shared.u32 %r4, [%r3+64]; mad.wide.u32 %d9, %r0, 4, %d0; @%p1 st.global.u32 [%d9], %r4;
"""
WAIT = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r9], 0; @!%p2 bra WAIT;"


def run(body, mode, lanes, count=32):
    """What the first lanes read of what they copied; the others read nothing."""
    source, out = np.arange(1, 129, dtype=np.uint32), np.zeros(32, np.uint32)
    body = COPY.format(lanes=lanes, count=count) + body
    run_ptx(body, out, source, smem=1024, policy=Policy(0, mode))
    return out, np.where(np.arange(32) < lanes, source[::4], 0)


COMPLETIONS = {
    "group": "{0} cp.async.commit_group; {1} cp.async.wait_group 0;",
    "all": "{1} cp.async.wait_all;",
    "mbarrier": "{0} cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r9]; " + WAIT,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("completion", COMPLETIONS)
def test_what_one_lane_does_covers_its_own_copies_alone(completion, mode):
    finish = COMPLETIONS[completion]
    np.testing.assert_array_equal(*run(finish.format("", "") + READ, mode, 32))
    np.testing.assert_array_equal(*run(finish.format("@%p0", "@%p0") + READ, mode, 1, count=1))
    for one in {finish.format("@%p0", "@%p0"), finish.format("", "@%p0")}:
        if "@%p0" in one:
            with pytest.raises(Fault, match="race: generic load .*cp.async"):
                run(one + READ, mode, 2, count=1)


@pytest.mark.parametrize("mode", MODES)
def test_groups_are_counted_by_thread(mode):
    """Of three groups of lanes 1 to 31 the first is waited for, and not the only one of lane 0."""
    body = "cp.async.commit_group;" + 2 * "@!%p0 cp.async.commit_group;" + "cp.async.wait_group 2;"
    run(body + READ.replace("@%p1", "@!%p0"), mode, 32)
    with pytest.raises(Fault, match="race: generic load .*cp.async"):
        run(body + READ.replace("@%p1", "@%p0"), mode, 32)


def test_an_arrival_waits_for_all_earlier_copies_of_its_thread():
    """The second mbarrier's phase says that the first one's copies are complete too."""
    body = """
    @%p0 mbarrier.init.shared::cta.b64 [%r9+8], 32; bar.warp.sync -1;
    cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r9];
    cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r9+8];
    NEXT: mbarrier.test_wait.parity.shared::cta.b64 %p3, [%r9+8], 0; @!%p3 bra NEXT;
    mbarrier.test_wait.parity.shared::cta.b64 %p4, [%r9], 0;
    @!%p4 bra END;
    """
    for mode in MODES:
        np.testing.assert_array_equal(*run(body + READ + "END:", mode, 32))
