"""Single changes to the PTX of right kernels: nearly all must be found."""

import pytest
import torch

pytest.importorskip("cutlass")

from tests.cpu.test_emulator import GatherProblem, compile_pair
from tests.emulator import STREAM, Fault, Policy
from tests.emulator.accumulator import Accumulator
from tests.emulator.mutations import all_mutations, executed_lines

SEEDS = (0, 3, 4)


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
