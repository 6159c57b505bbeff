"""The calibration of the emulator: its bounds can fail, and a kernel an architecture runs."""

import math
import re

import pytest
import torch

from tests.calibration.configurations import ARCHITECTURES, CONFIGURATIONS
from tests.calibration.findings import first_loads
from tests.calibration.problems import compare, expected, make_tensors
from tests.emulator import Policy
from tests.emulator.mutations import all_mutations

VARIED = (
    "h-dense-c", "h-dense-bias", "h-dense-add", "h-dense-gelu", "h-dense-fp8", "h-rows-dswiglu",
    "h-rows-gather-geglu", "h-depth-gather", "b-dense-128x128-m-n-m", "g-rows-c",
)  # fmt: skip
RUN = ("h-rows-swiglu", "b-rows-2cta", "g-depth-128x128")


def outputs(name):
    """A configuration, its tensors and reference; the outputs hold the rounded reference."""
    c = CONFIGURATIONS[name]
    tensors = make_tensors(c)
    want = expected(c, tensors)
    for output, (value, _) in want.items():
        tensors[output].copy_(value)
    return c, tensors, want


def test_there_are_enough_of_each_kind():
    for arch in ARCHITECTURES:
        mine = [c for c in CONFIGURATIONS.values() if c.arch == arch]
        assert len(mine) >= 20
        assert {c.kind for c in mine} == {"dense", "varlen_m", "varlen_k"}
        assert any(c.gather and c.kind == "varlen_k" for c in mine)
        assert {c.epilogue for c in mine} >= {"swiglu", "geglu", "dswiglu", "gelu_tanh_approx"}


@pytest.mark.parametrize("name", VARIED)
def test_the_rounded_reference_is_within_the_bound_and_little_more_is_not(name):
    c, tensors, want = outputs(name)
    assert compare(c, tensors)[1] <= 1
    for output, (value, bound) in want.items():
        at = (value.abs() / bound.clamp_min(1e-30)).argmax()
        out = tensors[output]
        place = torch.unravel_index(at, out.shape)
        kept = out[place].clone()
        out[place] = value[place] + 3 * bound[place]
        assert compare(c, tensors)[1] > 1
        out[place] = math.nan
        assert compare(c, tensors)[1] == math.inf
        out[place] = kept


def test_a_store_behind_a_row_is_seen():
    c, tensors, _ = outputs("h-dense-128x128")
    row = tensors["D"].stride(-2)
    tensors["D"].as_strided((row,), (1,))[-1] = 0
    assert compare(c, tensors)[1] == math.inf


@pytest.mark.parametrize("name", RUN)
def test_a_kernel_gives_the_right_values_and_no_report(name):
    from tests.calibration.kernels import available, calibration_kernel

    if not available(name):
        pytest.skip("needs quack-kernels; see tests/calibration/README.md")
    kernel = calibration_kernel(name)
    for seed in range(2):
        assert kernel.run(Policy(seed), seed)[0][1] <= 1


FOUND = ("h-dense-c", "g-depth-empty", "b-rows-gather")


@pytest.mark.parametrize("name", FOUND)
def test_a_finding_is_reported_and_the_rest_is_checked_without_it(name):
    from tests.calibration.kernels import available, calibration_kernel
    from tests.calibration.run import report_of

    if not available(name):
        pytest.skip("needs quack-kernels; see tests/calibration/README.md")
    kernel = calibration_kernel(name)
    (finding,) = kernel.configuration.findings
    (_, share), machine = kernel.run(Policy(1), 1, **kernel.options())
    assert share <= 1
    assert re.search(finding.report, report_of(kernel, kernel.options(but=finding), machine.steps))


def test_the_read_of_an_empty_segment_is_the_only_race_let_through():
    from tests.calibration.kernels import available, calibration_kernel
    from tests.emulator import Fault

    name = "g-depth-empty"
    if not available(name):
        pytest.skip("needs quack-kernels; see tests/calibration/README.md")
    kernel = calibration_kernel(name)
    (program,) = kernel.emulator.programs.values()
    lines, _ = first_loads(program.kernel)
    text = kernel.emulator.ptx_text.splitlines()
    assert lines and all("ldmatrix" in text[line - 1] for line in lines)
    assert len(lines) < sum("ldmatrix" in line for line in text)
    wait = next(
        m
        for m in all_mutations(kernel.emulator.ptx_text)
        if m.kind == "mbarrier wait removed" and 0 < min(lines) - m.line < 30
    )
    kernel.emulator.load(wait.text)
    with pytest.raises(Fault, match="race: "):
        kernel.run(Policy(0), 0, **kernel.options())
