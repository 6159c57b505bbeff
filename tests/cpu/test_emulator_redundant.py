"""Which mutations the rules of `tests.emulator.redundant` leave out, on hand-written PTX."""

import pytest

from tests.emulator import ptx
from tests.emulator.mutations import all_mutations
from tests.emulator.program import Program
from tests.emulator.redundant import Flow, why_redundant
from tests.emulator.report import kind_of
from tests.emulator.snippet import snippet_text


def rules(body, kind, target="sm_90a"):
    """The rule that applies to each mutation of a kind."""
    text = snippet_text(body.replace(";", ";\n"), target=target)
    (kernel,) = ptx.parse(text).values()
    program, flow = Program(kernel), Flow(kernel)
    return [why_redundant(program, flow, m) for m in all_mutations(text) if m.kind == kind]


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


LOAD = "tcgen05.ld.sync.aligned.32x32b.x2.b32 {%r10, %r11}, [%r3];"
USE = "add.u32 %r4, %r10, %r11;"
LOAD_WAIT = "tcgen05.wait::ld.sync.aligned;"
ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%r5];"


@pytest.mark.parametrize(
    ("body", "redundant"),
    [
        (LOAD + LOAD_WAIT + USE + ARRIVE, True),
        (LOAD + USE + LOAD_WAIT + ARRIVE, True),
        (LOAD + LOAD_WAIT + "st.shared.u32 [%r5], %r10; st.shared.u32 [%r5], %r11;" + ARRIVE, True),
        (LOAD + LOAD_WAIT + ARRIVE + USE, False),
        (LOAD + LOAD_WAIT + "add.u32 %r4, %r10, 1;" + ARRIVE, False),
        (LOAD + LOAD_WAIT + "@%p1 bra END;" + USE + "END:" + ARRIVE, False),
        (LOAD + LOAD.replace("%r1", "%r2") + LOAD_WAIT + USE + ARRIVE, False),
        (LOAD_WAIT + USE, False),
    ],
)
def test_loads_whose_registers_are_used(body, redundant):
    (rule,) = rules(body, "tensor memory load wait removed", "sm_100a")
    assert bool(rule) == redundant


def test_kinds_of_warnings_name_no_place():
    for words in ("no fence between", "no fence between the read,", "overwrites what a load read:"):
        warning = f"{words} PTX line 12: ld.shared.u32 %r1, [%r2]  [gemm.py:3] and PTX line 14: st"
        assert kind_of(warning) == words.removesuffix(" between").rstrip(",:")
