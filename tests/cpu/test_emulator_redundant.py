"""Which mutations the rules of `tests.emulator.redundant` leave out, on hand-written PTX."""

import pytest

from tests.emulator import Fault, ptx
from tests.emulator.mutations import all_mutations
from tests.emulator.program import Program
from tests.emulator.redundant import Flow, why_redundant
from tests.emulator.report import kind_of
from tests.emulator.snippet import launch_ptx, snippet_text


def program(text):
    (kernel,) = ptx.parse(text).values()
    return Program(kernel)


def rules(body, kind, target="sm_90a"):
    """The rule that applies to each mutation of a kind."""
    text = snippet_text(body.replace(";", ";\n"), target=target)
    flow = Flow(program(text).kernel)
    return [why_redundant(flow, m) for m in all_mutations(text) if m.kind == kind]


ELECTED = """
elect.sync %r9|%p1, -1;
not.pred %p2, %p1;
@%p2 bra END;
{}
END:
"""
WAIT = "cp.async.bulk.wait_group.read 0;"


@pytest.mark.parametrize(
    ("block", "redundant"),
    [(WAIT, True), (WAIT + WAIT, True), (WAIT + "cp.async.bulk.commit_group;", False)],
)
def test_more_lanes_may_wait(block, redundant):
    (rule,) = rules(ELECTED.format(block), "all lanes elected")
    assert bool(rule) == redundant


FENCE = "fence.proxy.async.shared::cta;"
BARRIER = "bar.sync 0;"


@pytest.mark.parametrize(
    ("body", "kind", "redundant"),
    [
        (FENCE + FENCE, "proxy fence removed", [True, True]),
        (FENCE + BARRIER + FENCE, "proxy fence removed", [False, False]),
        # the guarded one is no use to all; it may go itself
        ("@%p1 " + FENCE + FENCE, "proxy fence removed", [True, False]),
        (FENCE + "@%p1 " + FENCE, "proxy fence removed", [False, True]),
        (FENCE + "fence.proxy.async.global;", "proxy fence removed", [False, False]),
        # who jumps between them executes the second alone
        ("@%p1 bra HERE;" + FENCE + "HERE:" + FENCE, "proxy fence removed", [True, False]),
        (WAIT + WAIT, "bulk wait removed", [True, True]),
        (WAIT + WAIT.replace("0", "1"), "bulk wait removed", [False, False]),
        (BARRIER + BARRIER, "barrier removed", [False, False]),
        ("bar.arrive 1, 64;" * 2, "barrier removed", [False, False]),
        ("mbarrier.arrive.shared::cta.b64 _, [%r5];" * 2, "arrive removed", [False, False]),
        ("cp.async.bulk.commit_group;" * 2, "bulk commit removed", [False, False]),
    ],
)
def test_what_stands_twice_in_a_row(body, kind, redundant):
    assert [bool(rule) for rule in rules(body, kind)] == redundant


def test_one_of_two_barriers_in_a_row_is_missed_by_the_warp_that_meets_both():
    """Warp 1 stores between them; without either of warp 0's, it waits for ever at its second."""
    body = "@%p1 bra OTHER; bar.sync 1, 64; bar.sync 1, 64; bra END;"
    body += "OTHER: bar.sync 1, 64; st.shared.u32 [dynamic], 7; bar.sync 1, 64; END:"
    text = snippet_text(f"setp.ge.u32 %p1, %r0, 32;{body}".replace(";", ";\n"))
    launch_ptx(program(text), block=(64, 1, 1), smem=16)
    removed = [m for m in all_mutations(text) if m.kind == "barrier removed"]
    assert len(removed) == 4
    for mutant in removed:
        assert not why_redundant(Flow(program(text).kernel), mutant)
        with pytest.raises(Fault, match="deadlock"):
            launch_ptx(program(mutant.text), block=(64, 1, 1), smem=16)


def test_a_wait_for_loads_is_never_left_out():
    """Whether uses of the registers stand in for it is for the emulator to say."""
    body = "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r10, %r11}, [%r3];"
    body += "tcgen05.wait::ld.sync.aligned; add.u32 %r4, %r10, %r11;"
    assert rules(body, "tensor memory load wait removed", "sm_100a") == [""]


def test_kinds_of_warnings_name_no_place():
    for words in ("no fence between", "no fence between the read,", "overwrites what a load read:"):
        warning = f"{words} PTX line 12: ld.shared.u32 %r1, [%r2]  [gemm.py:3] and PTX line 14: st"
        assert kind_of(warning) == words.removesuffix(" between").rstrip(",:")
