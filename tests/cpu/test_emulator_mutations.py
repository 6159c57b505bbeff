"""Single changes to PTX: what each is made into; in right kernels nearly all must be found."""

import numpy as np
import pytest
import torch

pytest.importorskip("cutlass")

from tests.cpu.test_emulator import GatherProblem, compile_pair
from tests.emulator import STREAM, Fault, Policy
from tests.emulator.accumulator import Accumulator
from tests.emulator.mutations import all_mutations, executed_lines, lanes
from tests.emulator.snippet import run_ptx

SEEDS = (0, 3, 4)
ONE = "{ .reg .pred one; .reg .b32 lane; mov.u32 lane, %laneid; setp.eq.u32 one, lane, 0; @one "
ELECTED = """
elect.sync %r9|%p1, -1;
.loc 1 2 3
not.pred %p2, %p1;
@%p2 bra END;
{}
END:
"""
NEXT = (
    "elect.sync %r9|%p1, -1; { .reg .b32 lane, next; mov.u32 lane, %laneid; add.u32 next, %r9, 1; "
    "and.b32 next, next, 31; setp.eq.u32 %p1, lane, next; }"
)
COMMIT = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2];"
BULK_WAIT = "cp.async.bulk.wait_group 0;"


@pytest.mark.parametrize(
    ("what", "before", "line", "after"),
    [
        ("copy arrive", "", "cp.async.mbarrier.arrive.noinc.shared.b64 [%r5];", ""),
        ("copy commit", "", "cp.async.commit_group;", ""),
        ("copy wait", "", "cp.async.wait_group 1;", ""),
        ("copy wait", "", "cp.async.wait_all;", ""),
        ("proxy fence", "", "fence.proxy.async.shared::cta;", "\nbar.warp.sync -1;"),
        ("proxy fence", "", "fence.proxy.async;", "\n.loc 1 2 3\n\tbarrier.sync 1, 64;"),
        # others are a thread's own, whatever the lanes do after them
        (None, "", "fence.proxy.async;", "\nmov.u32 %r1, 0;\nbar.sync 0;"),
        (None, "", "fence.proxy.tensormap::generic.release.gpu;", "\nbar.sync 0;"),
        (None, "", "cp.async.bulk.commit_group;", ""),
        # what a guard keeps from some lanes already
        (None, "@%p1 ", "cp.async.commit_group;", ""),
        (None, "@!%p1 ", "fence.proxy.async;", "\nbar.sync 0;"),
    ],
)
def test_what_every_lane_does_is_done_by_one(what, before, line, after):
    text = f"mov.u32 %r0, 1;\n{before}{{}}{after}\nret;\n"
    made = list(lanes(text.format(line)))
    if what is None:
        assert not made
        return
    (m,) = made
    assert (m.kind, m.detail, m.line, m.last) == ("by one lane", what, 2, 2)
    assert m.text == text.format(ONE + line + " }")


@pytest.mark.parametrize(
    ("what", "block"),
    [
        ("commit", COMMIT),
        ("commit", "mov.u32 %r1, 0;\n" + COMMIT),
        ("bulk wait", BULK_WAIT),
        ("bulk wait", "cp.async.bulk.commit_group;\n" + BULK_WAIT),
        # with what they count, all of it is done by another thread, which is right
        (None, "tcgen05.mma.cta_group::1.kind::f16 [%r6], %rd1, %rd2, %r7, %p3;\n" + COMMIT),
        (None, "tcgen05.cp.cta_group::1.128x256b [%r6], %rd1;\n" + COMMIT),
        (None, "cp.async.bulk.tensor.2d.global.shared::cta [%rd1, {0, 0}], [%r1];\n" + BULK_WAIT),
        (None, "cp.reduce.async.bulk.global.shared::cta.add.f32 [%rd1], [%r1], 16;\n" + BULK_WAIT),
        (None, "cp.async.bulk.commit_group;"),
    ],
)
def test_what_one_thread_counts_is_counted_by_another(what, block):
    text = ELECTED.format(block)
    made = list(lanes(text))
    if what is None:
        assert not made
        return
    (m,) = made
    assert (m.kind, m.detail, m.line, m.last) == ("by another lane", what, 2, 2)
    assert m.text == text.replace("elect.sync %r9|%p1, -1;", NEXT)


def test_counts_behind_the_end_of_an_election_are_not_its_own():
    assert not list(lanes(ELECTED.format("mov.u32 %r1, 0;") + COMMIT))


def test_the_changed_lanes_are_those_that_execute():
    store = "mad.wide.u32 %d8, %r0, 4, %d0;\nst.global.u32 [%d8], 1;\n"
    (m,) = lanes(ELECTED.format(store + BULK_WAIT).replace(".loc 1 2 3\n", ""))
    for seed in SEEDS:
        out = np.zeros((2, 32), np.uint32)
        run_ptx(ELECTED.format(store + BULK_WAIT), out[0], policy=Policy(seed))
        run_ptx(m.text, out[1], policy=Policy(seed))
        assert out.sum() == 2 and (np.roll(out[0], 1) == out[1]).all()


def survivors(emulator, is_wrong):
    """(mutations that no seed finds, number tried); `is_wrong(policy)` runs the kernel."""
    text = emulator.ptx_text
    assert not any(is_wrong(Policy(seed)) for seed in SEEDS)
    lines, missed, tried = executed_lines(emulator), [], 0
    for m in all_mutations(text):
        if not lines & set(range(m.line, m.last + 1)):
            continue
        emulator.load(m.text)
        tried += 1
        for seed in SEEDS:
            try:
                if is_wrong(Policy(seed)):
                    break
            except Fault:
                break
        else:
            missed.append(f"{m.name}: {text.splitlines()[m.line - 1].strip()[:90]}")
    return missed, tried


def test_gathered_gemm():
    # several K-tiles, so that the buffers are used again; rows and columns past the end
    problem = GatherProblem(tokens=90, depth=264, columns=72, begin=37, end=150, rows=200)
    emulator = problem.compile()

    def is_wrong(policy):
        return problem.wrong(problem.run(emulator, policy))

    missed, tried = survivors(emulator, is_wrong)
    assert tried >= 25
    assert len(missed) <= 0.05 * tried, missed


def test_cluster():
    emulator = compile_pair()
    src = torch.randn(300, 32)

    def is_wrong(policy):
        out = torch.ones(300, 32)
        emulator([src, out, STREAM], policy)
        return not torch.allclose(out, src + 1, atol=1e-5)

    missed, tried = survivors(emulator, is_wrong)
    assert tried >= 15
    assert len(missed) <= 0.05 * tried, missed


def test_accumulator():
    kernel = Accumulator()

    def is_wrong(policy):
        return not kernel.run(policy) or kernel.machine.warnings

    missed, tried = survivors(kernel, is_wrong)
    assert tried >= 25
    assert not missed
