"""Right kernels that mutations are made of, by architecture, each on a problem small enough to run
often and large enough that every ring of buffers wraps.

sm_90a: the layer's six stages, seven grouped GEMMs of `kernels_sm90`. sm_100a and sm_120a: GEMMs of
quack-kernels, as in tests/calibration, and for sm_100a a kernel with the tensor-memory fences that
those leave out.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sonic.enums import ActivationType, GateUpLayout
from sonic.runtime.problem import (
    Arch,
    Operand,
    Schedule,
    TileConfig,
    down_backward_act_problem,
    down_problem,
    up_backward_act_problem,
    up_problem,
    weight_grad_problem,
)
from tests.calibration.configurations import CONFIGURATIONS, Configuration
from tests.calibration.kernels import available, calibration_kernel
from tests.gemm_bounds import bands
from tests.grouped_gemms import NORMAL, GroupedGemm, Sizes

from .accumulator import Accumulator, K, M, N
from .layer import emulated_layer, emulator_for
from .policy import Policy
from .run import Emulator

ARCHITECTURES = ("sm_90a", "sm_100a", "sm_120a")


@dataclass(frozen=True)
class Subject:
    """A kernel, and the sizes of the problem that it is run on.

    `run(seed, max_steps)` runs whatever PTX `emulator` was last loaded with. It returns what is
    wrong with the result, or "", and the machine's warnings. Raises Fault if the emulator reports
    anything.
    """

    name: str
    arch: str
    problem: str
    emulator: Emulator | Accumulator
    run: Callable[[int, int], tuple[str, set[str]]]


def subjects(arch: str) -> list[Callable[[], Subject]]:
    """One function for each subject of an architecture, which compiles it."""
    if arch == "sm_90a":
        return [functools.partial(_layer_subject, *entry) for entry in _hopper()]
    names = [name for name in _CALIBRATION[arch] if available(name)]
    if len(names) < len(_CALIBRATION[arch]):
        raise RuntimeError(
            f"no compiled calibration kernels for {sorted(set(_CALIBRATION[arch]) - set(names))}: "
            "tests/calibration/README.md says how to make them"
        )
    made = [functools.partial(_calibration_subject, arch, name) for name in names]
    return [_accumulator_subject, *made] if arch == "sm_100a" else made


def problems(arch: str) -> dict[str, str]:
    """`Subject.problem` of each subject, by name, without compiling anything."""
    if arch == "sm_90a":
        return {name: _layer_sizes(gemm, ctas) for name, gemm, _, ctas in _hopper()}
    found = {name: _calibration_sizes(CONFIGURATIONS[name]) for name in _CALIBRATION[arch]}
    return {_ACCUMULATOR: _ACCUMULATOR_SIZES} | found if arch == "sm_100a" else found


def _layer_sizes(gemm: GroupedGemm, ctas: int) -> str:
    sizes = gemm.sizes
    layer = f"{sizes.tokens} tokens, hidden {sizes.hidden}, width {sizes.width}"
    return f"{layer}, rows {sizes.counts} and {sizes.dead_rows}, {ctas} CTAs"


def _calibration_sizes(c: Configuration) -> str:
    gemm = f"m {c.m}, n {c.n}, k {c.k}, lengths {c.lengths}, batch {c.batch}"
    return f"{gemm}, {c.clusters} clusters"


_ACCUMULATOR, _ACCUMULATOR_SIZES = "accumulator", f"m {M}, n {N}, k {K}"

# One or two CTAs, ragged rows and depth, gathers, a gated epilogue, a loaded C, launch control.
_CALIBRATION = {
    "sm_100a": (
        "b-dense-256x128-2x1",
        "b-dense-c-2cta",
        "b-rows-swiglu",
        "b-rows-gather4-2cta",
        "b-depth-2cta",
        "b-dense-launch-control",
    ),
    "sm_120a": (
        "g-dense-c-pingpong",
        "g-rows-128x128",
        "g-rows-gather-geglu",
        "g-rows-swiglu",
        "g-depth-128x128",
        "g-rows-pingpong",
    ),
}


def _hopper() -> list[tuple[str, GroupedGemm, TileConfig, int]]:
    """Every stage; every schedule, multicast of either operand, both gathers, tiles from a counter.
    The last entry is the number of CTAs.

    Few tokens, so that every gathered copy meets the last one, behind which there is nothing. A
    CTA uses the ring of stages more than once, and the ring of tiles where there is one.
    """
    cooperative, pingpong = Schedule.COOPERATIVE, Schedule.PINGPONG
    overlapped = Schedule.OVERLAPPED
    swiglu, reglu, bf16 = ActivationType.SWIGLU, ActivationType.REGLU, "bfloat16"
    deep = Sizes(6, 648, 136, (130, 0, 7))  # eleven steps: every loop meets the ring's end
    wide = Sizes(6, 200, 456, (130, 0, 7))
    many_tiles = Sizes(6, 520, 104, (130, 0, 7))
    long = Sizes(6, 264, 136, (200, 0, 137))
    down_act = down_backward_act_problem(reglu, bf16)
    return [
        (
            "up",
            GroupedGemm(up_problem(swiglu, bf16, True, True), deep),
            TileConfig(128, 64, 1, 1, overlapped, 1, dynamic=True),
            1,
        ),
        (
            "down",
            GroupedGemm(down_problem(bf16, True), wide),
            TileConfig(128, 64, 2, 1, pingpong),
            2,
        ),
        (
            "down_backward_act",
            GroupedGemm(down_act, deep),
            TileConfig(128, 64, 1, 1, overlapped, 3, raster_along_m=False, dynamic=True),
            1,
        ),
        (
            "down_backward_weight",
            GroupedGemm(weight_grad_problem(bf16, Operand.A, False, False), long),
            TileConfig(128, 128, 1, 1, pingpong, 2),
            1,
        ),
        (
            "down_backward_weight_overlapped",
            GroupedGemm(weight_grad_problem(bf16, Operand.A, False, False), long),
            TileConfig(128, 64, 1, 1, overlapped, 1),
            1,
        ),
        (
            "up_backward_act",
            GroupedGemm(up_backward_act_problem(bf16, True), many_tiles, GateUpLayout.CONCATENATED),
            TileConfig(128, 64, 1, 1, pingpong, 2, dynamic=True),
            2,
        ),
        (
            "up_backward_weight",
            GroupedGemm(weight_grad_problem(bf16, Operand.B, True, True), long),
            TileConfig(256, 128, 1, 2, cooperative, 1),
            2,
        ),
    ]


def _layer_subject(name: str, gemm: GroupedGemm, config: TileConfig, ctas: int) -> Subject:
    from sonic import stages
    from sonic.testing import poisoned_empty

    inputs: dict[str, Any] = gemm.inputs(0, NORMAL)
    expected = bands(gemm, inputs, NORMAL, config)

    def run(seed: int, max_steps: int) -> tuple[str, set[str]]:
        options = {"seed": seed, "sms": ctas, "config": config, "max_steps": max_steps}
        with emulated_layer(**options) as session, poisoned_empty():
            outputs = gemm.run(stages, inputs)
        wrong = {name: expected[name].outside(tensor) for name, tensor in outputs.items()}
        text = ", ".join(f"{n} elements of {name} are wrong" for name, n in wrong.items() if n)
        return text, set(session.machines[-1].warnings)

    emulator = emulator_for(gemm.problem, config, Arch.SM90)
    return Subject(name, "sm_90a", _layer_sizes(gemm, ctas), emulator, run)


def _calibration_subject(arch: str, name: str) -> Subject:
    kernel = calibration_kernel(name)
    options = kernel.options()

    def run(seed: int, max_steps: int) -> tuple[str, set[str]]:
        (error, share), machine = kernel.run(Policy(seed), max_steps=max_steps, **options)
        right = share <= 1
        text = f"an error of {error:.3g} of the largest value, {share:.3g} times the bound"
        return "" if right else text, set(machine.warnings)

    return Subject(name, arch, _calibration_sizes(kernel.configuration), kernel.emulator, run)


def _accumulator_subject() -> Subject:
    kernel = Accumulator()

    def run(seed: int, max_steps: int) -> tuple[str, set[str]]:
        right = kernel.run(Policy(seed), max_steps=max_steps)
        return "" if right else "the products are wrong", set(kernel.machine.warnings)

    return Subject(_ACCUMULATOR, "sm_100a", _ACCUMULATOR_SIZES, kernel, run)
