"""One grouped GEMM of any kernel package in the emulator, against the reference.

`emulated_gemm` is for tests: `from tests.emulator.fixture import emulated_gemm`, then
`emulated_gemm(gemm, config, arch)` with a `GroupedGemm` of `tests.grouped_gemms`.
"""

from dataclasses import dataclass

import pytest
import torch

from sonic.reference import stages as reference
from sonic.runtime.problem import Arch, TileConfig
from sonic.testing import assert_close, poisoned_empty
from tests.gemm_bounds import bands
from tests.grouped_gemms import EXACT, NORMAL, GroupedGemm, cast

from .layer import emulated_layer, has_kernels

SMS = 2  # few CTAs, so that each takes several tiles
RUNS = ((0, NORMAL), (1, EXACT))


@dataclass(frozen=True)
class EmulatedRun:
    """What a test may look at after the comparison; `machine` is that of the last run."""

    outputs: dict
    machine: object
    config: TileConfig


def run_emulated(gemm: GroupedGemm, inputs: dict, seed: int, config: TileConfig | None, arch: Arch):
    """The EmulatedRun, into memory that held NaN; Fault if the emulator finds anything."""
    from sonic import stages

    with emulated_layer(seed=seed, sms=SMS, config=config, arch=arch) as session, poisoned_empty():
        outputs = gemm.run(stages, inputs)
    machine = session.machines[-1]
    assert not machine.warnings, machine.warnings
    return EmulatedRun(outputs, machine, session.configs[-1])


def check_bounds(gemm: GroupedGemm, inputs: dict, outputs: dict) -> None:
    """By the project's bounds: at most twice the error of the reference in the same dtype."""
    wide = gemm.run(reference, cast(inputs, dtype=torch.float64))
    low = gemm.run(reference, inputs)
    offsets = inputs["offset_by_expert"] if gemm.stage.by_row else None
    for name, got in outputs.items():
        assert_close(
            got,
            wide[name].double(),
            low[name],
            per_expert_rows=offsets,
            name=f"{gemm.problem.name} {name}",
            # Sums that stay in float32 are of products with rounded operands.
            band_dtype=gemm.dtype if got.dtype in (torch.float32, torch.float64) else None,
        )


def check_exact(gemm: GroupedGemm, inputs: dict, outputs: dict, config: TileConfig) -> None:
    """By the bands of `tests.gemm_bounds`, which ask bitwise equality where sums are exact."""
    for name, band in bands(gemm, inputs, EXACT, config).items():
        wrong = band.outside(outputs[name])
        assert not wrong, f"{gemm.problem.name} {name}: {wrong} elements are not what they must be"


def check_emulated(
    gemm: GroupedGemm,
    config: TileConfig | None = None,
    arch: Arch = Arch.SM90,
    runs: tuple[tuple[int, str], ...] = RUNS,
) -> EmulatedRun:
    """Runs a grouped GEMM several times, and compares every result; returns the last run.

    config: None for the package's choice. runs: (seed, kind of inputs); a seed makes the inputs and
    the schedule.
    """
    for seed, kind in runs:
        inputs = gemm.inputs(seed, kind)
        run = run_emulated(gemm, inputs, seed, config, arch)
        if kind == EXACT:
            check_exact(gemm, inputs, run.outputs, run.config)
        else:
            check_bounds(gemm, inputs, run.outputs)
    return run


@pytest.fixture
def emulated_gemm():
    """:func:`check_emulated`; skips where an architecture has no kernels."""

    def check(gemm, config=None, arch=Arch.SM90, runs=RUNS):
        if not has_kernels(arch):
            pytest.skip(f"kernels_{arch.value} has no kernels yet")
        return check_emulated(gemm, config, arch, runs)

    return check
