"""GEMMs that overlap the launch before them (programmatic dependent launch), in the emulator.

None lets the next one start early; here each does, as soon as it has waited itself, so that all its
work may come before, between and behind that of the launch which has to wait for it.
"""

import contextlib
import copy
import re

import pytest
import torch

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed")

from sonic import stages
from sonic.enums import ActivationType, GateUpLayout
from sonic.runtime import launch
from sonic.runtime.problem import Arch, Schedule, TileConfig
from sonic.testing import poisoned_empty
from tests.cpu.test_emulator_layer import LIVE, UNUSED, Case
from tests.emulator import Fault, Policy
from tests.emulator.layer import emulated_layer, emulator_for
from tests.emulator.machine import Machine
from tests.emulator.memory import GlobalMemory
from tests.waits import START, WAIT

SMS = 2
CONFIGS = [
    TileConfig(128, 128, 1, 1, Schedule.OVERLAPPED, 4, dynamic=True),
    TileConfig(128, 128, 1, 1, Schedule.PINGPONG, 2),
    TileConfig(128, 128, 2, 1, Schedule.OVERLAPPED, 3, raster_along_m=False),
]


def _up_down(case):
    case.h, case.a = case.up(stages)
    return case.h, case.a, *case.down(stages)


def _down_up(case):
    """As of two layers, one behind the other: a row is a token of the second."""
    case.x = stages.down_forward(case.a, case.w2, case.b2, case.offsets)
    return case.x, *case.up(stages)


def _gradient(case):
    dh, a_scaled, partial = stages.down_backward_act(
        case.dout, case.w2, case.h, case.scores, case.tokens, case.offsets,
        activation=case.activation,
    )  # fmt: skip
    return dh, a_scaled, partial.T


def _up_gradient(case):
    case.h, _ = case.up(stages)
    return case.h, *_gradient(case)


def _behind_gradient(stage):
    def run(case):
        case.dh, case.a_scaled, sums = _gradient(case)
        return case.dh, case.a_scaled, sums, *getattr(case, stage)(stages)

    return run


PAIRS = {
    "up, down": _up_down,
    "down, up": _down_up,
    "up, dH": _up_gradient,
    "dH, dW2": _behind_gradient("down_backward_weight"),
    "dH, dX": _behind_gradient("up_backward_act"),
    "dH, dW1": _behind_gradient("up_backward_weight"),
}


@pytest.fixture(scope="module")
def case():
    return Case(ActivationType.SWIGLU, GateUpLayout.INTERLEAVED, torch.bfloat16)


class Stream:
    """Takes launches of GEMMs; ``without_wait``: the second one forgets to wait."""

    def __init__(self, policy, without_wait):
        self.machine = Machine(GlobalMemory(), policy)
        self.without_wait = without_wait
        self.kept, self.launches = [], 0

    def kernel_for(self, backend, problem, config):
        emulator = emulator_for(problem, config, Arch.SM90)

        def call(*args):
            self.launches += 1
            waits = self.launches == 1 or not self.without_wait
            changed = copy.copy(emulator)
            text, places = re.subn(
                rf"{WAIT}\s*;", f"{WAIT}; {START};" if waits else f"{START};", emulator.ptx_text
            )
            assert places == 1
            changed.load(text)
            changed.enqueue(args, self.machine, SMS)
            self.kept.append(args)
            assert self.machine.stream[-1].programmatic

        return call


@contextlib.contextmanager
def _one_stream(monkeypatch, policy, config, without_wait=False):
    stream = Stream(policy, without_wait)
    with emulated_layer(sms=SMS, config=config), monkeypatch.context() as patch:
        patch.setattr(launch, "kernel_for", stream.kernel_for)
        with poisoned_empty():
            yield stream
        assert stream.launches == 2
        stream.machine.synchronize()


_EVERYWHERE = ("up, down", "dH, dX")


@pytest.mark.parametrize(
    ("pair", "config"),
    [(pair, c) for pair in PAIRS for c in CONFIGS if c is CONFIGS[0] or pair in _EVERYWHERE],
    ids=lambda value: getattr(value, "name", value),
)
def test_overlapping_gemms(case, monkeypatch, pair, config):
    run = PAIRS[pair]
    with emulated_layer(sms=SMS, config=config), poisoned_empty():
        alone = run(copy.copy(case))
    policy = Policy(1, {"launch": "eager"})
    with _one_stream(monkeypatch, policy, config) as stream:
        together = run(copy.copy(case))
    assert not stream.machine.warnings
    for got, want in zip(together, alone, strict=True):
        rows = LIVE if got.shape[0] == LIVE + UNUSED else got.shape[0]
        assert torch.equal(got[:rows], want[:rows]) and not got[:rows].isnan().any()


@pytest.mark.parametrize("pair", PAIRS)
def test_a_gemm_that_overlaps_has_to_wait(case, monkeypatch, pair):
    policy = Policy(1, {"launch": "eager"})
    with (
        pytest.raises(Fault, match="race: "),
        _one_stream(monkeypatch, policy, CONFIGS[0], without_wait=True),
    ):
        PAIRS[pair](copy.copy(case))
