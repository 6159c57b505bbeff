"""One grouped GEMM of any kernel package in the emulator, against the reference.

`emulated_gemm` is for tests: `from tests.emulator.fixture import emulated_gemm`, then
`emulated_gemm(gemm, config, arch)` with a `GroupedGemm` of `tests.grouped_gemms`.
"""

from dataclasses import dataclass

import pytest
import torch

from sonic.reference import stages as reference
from sonic.reference.activations import activation_value
from sonic.runtime.layout import split_gate_up
from sonic.runtime.problem import Arch, Schedule, TileConfig
from sonic.testing import assert_close, poisoned_empty
from tests.gemm_bounds import bands, rounded_to_half
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


def low_precision(gemm: GroupedGemm, inputs: dict, config: TileConfig) -> dict:
    """The reference in the dtype of the inputs, with the roundings that these tiles make.

    An overlapped schedule copies accumulators in half precision. That is no coarser than what all
    outputs are rounded to, except for the score's gradient, which stays in float32.
    """
    low = gemm.run(reference, inputs)
    if "ds" in low and config.schedule is Schedule.OVERLAPPED:
        low["ds"] = _score_gradient_of_copies(gemm, cast(inputs, dtype=torch.float32))
    return low


def _score_gradient_of_copies(gemm: GroupedGemm, inputs: dict) -> torch.Tensor:
    """``<P, a>`` of each row, ``P = gather(dout) w2`` rounded to half precision."""
    dout = inputs["dout"][inputs["token_by_row"].clamp(min=0)]
    args = dout, inputs["w2"], inputs["offset_by_expert"]
    p = reference.up_backward_act(*args, layout=gemm.layout, gated=False)
    gate, up = split_gate_up(inputs["h"]) if gemm.gated else (inputs["h"], None)
    a = activation_value(inputs["activation"], gate, up)
    return (rounded_to_half(p) * a)[: gemm.sizes.live].double().sum(1)


def check_bounds(gemm: GroupedGemm, inputs: dict, outputs: dict, config: TileConfig) -> None:
    """By the project's bounds: at most twice the error of the reference in the same dtype."""
    wide = gemm.run(reference, cast(inputs, dtype=torch.float64))
    low = low_precision(gemm, inputs, config)
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
            check_bounds(gemm, inputs, run.outputs, run.config)
    return run


@pytest.fixture
def emulated_gemm():
    """:func:`check_emulated`; skips where an architecture has no kernels."""

    def check(gemm, config=None, arch=Arch.SM90, runs=RUNS):
        if not has_kernels(arch):
            pytest.skip(f"kernels_{arch.value} has no kernels yet")
        return check_emulated(gemm, config, arch, runs)

    return check
