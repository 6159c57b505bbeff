"""The layer's GPU stages, their compiled Hopper kernels run in the emulator, against the reference.

Small sizes that are no multiple of any tile, an empty expert, rows that belong to none, few CTAs so
that every pipeline wraps.
"""

import copy

import pytest
import torch

pytest.importorskip("cutlass")

from sonic import stages
from sonic.enums import ActivationType, GateUpLayout
from sonic.reference import stages as reference
from sonic.runtime.problem import Schedule, TileConfig
from sonic.testing import assert_close
from tests.emulator.layer import emulated_layer, emulator_for

TOKENS, HIDDEN, WIDTH = 90, 136, 72
COUNTS = [130, 0, 7]
UNUSED = 3
LIVE = sum(COUNTS)


class Case:
    """Tensors of one small layer, and the reference's results for them."""

    def __init__(self, activation, layout, dtype):
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        self.activation, self.layout, self.gated = activation, layout, activation.is_gated
        experts, width = len(COUNTS), WIDTH * (2 if activation.is_gated else 1)
        self.x, self.dout = random(TOKENS, HIDDEN), random(TOKENS, HIDDEN)
        self.w1, self.b1 = random(experts, width, HIDDEN) / 8, random(experts, width)
        self.w2, self.b2 = random(experts, HIDDEN, WIDTH) / 8, random(experts, HIDDEN)
        self.offsets = torch.tensor([0, *torch.tensor(COUNTS).cumsum(0)], dtype=torch.int32)
        self.tokens = torch.randint(0, TOKENS, (LIVE + UNUSED,), generator=generator).int()
        self.tokens[LIVE:] = -1
        self.scores = torch.rand(LIVE + UNUSED, generator=generator)
        self.h, self.a = self.up(reference, True)
        self.dh, self.a_scaled, _ = self.down_backward_act(reference)
        for t in (self.h, self.a, self.dh, self.a_scaled):
            t[LIVE:] = float("nan")  # what no stage may read

    def up(self, impl, store_preact=True):
        return impl.up_forward(
            self.x,
            self.w1,
            self.b1,
            self.tokens,
            self.offsets,
            activation=self.activation,
            layout=self.layout,
            store_preact=store_preact,
        )

    def down(self, impl):
        return (impl.down_forward(self.a, self.w2, self.b2, self.offsets),)

    def down_backward_act(self, impl):
        dh, a_scaled, partial = impl.down_backward_act(
            self.dout,
            self.w2,
            self.h,
            self.scores,
            self.tokens,
            self.offsets,
            activation=self.activation,
        )
        return dh, a_scaled, partial.sum(0)

    def down_backward_weight(self, impl, into=None):
        args = self.dout, self.a_scaled, self.tokens, self.offsets
        return (impl.down_backward_weight(*args, accumulate_into=into),)

    def up_backward_act(self, impl):
        args = self.dh, self.w1, self.offsets
        return (impl.up_backward_act(*args, layout=self.layout, gated=self.gated),)

    def up_backward_weight(self, impl, into=None):
        options = {"layout": self.layout, "gated": self.gated, "accumulate_into": into}
        return (impl.up_backward_weight(self.x, self.dh, self.tokens, self.offsets, **options),)

    def accumulate(self, impl):
        dtype = torch.promote_types(self.w2.dtype, torch.float32)
        return self.down_backward_weight(impl, torch.ones(self.w2.shape, dtype=dtype))

    def in_float64(self):
        """The same numbers."""
        wide = copy.copy(self)
        for name, value in vars(self).items():
            if torch.is_tensor(value) and value.is_floating_point():
                setattr(wide, name, value.double())
        return wide


STAGES = (
    "up",
    "down",
    "down_backward_act",
    "down_backward_weight",
    "up_backward_act",
    "up_backward_weight",
    "accumulate",
)


@pytest.fixture(scope="module")
def cases():
    swiglu, relu = ActivationType.SWIGLU, ActivationType.RELU
    interleaved, concatenated = GateUpLayout.INTERLEAVED, GateUpLayout.CONCATENATED
    return {
        "swiglu bf16": Case(swiglu, interleaved, torch.bfloat16),
        "swiglu fp16 concatenated": Case(swiglu, concatenated, torch.float16),
        "relu bf16": Case(relu, interleaved, torch.bfloat16),
    }


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["swiglu bf16", "swiglu fp16 concatenated", "relu bf16"])
def test_stage(cases, name, stage):
    case = cases[name]
    low, exact = (getattr(c, stage)(reference) for c in (case, case.in_float64()))
    for seed in range(2):
        with emulated_layer(seed=seed, sms=2) as session:
            got = getattr(case, stage)(stages)
        assert session.machines and not session.machines[-1].warnings
        for outputs in zip(got, exact, low, strict=True):
            by_row = outputs[0].shape[0] == LIVE + UNUSED
            g, e, w = (t[:LIVE] if by_row else t for t in outputs)
            assert_close(
                g,
                e,
                w,
                per_expert_rows=case.offsets if by_row else None,
                name=f"{stage} of {name}",
                # What is float32 sums products of such numbers, up to WIDTH of either sign.
                band_dtype=case.x.dtype,
                magnitude=WIDTH**0.5 if g.ndim == 1 else 0.0,
            )
            # Both are one rounding of a sum, taken in another order: apart by an ulp.
            ulp = torch.finfo(case.x.dtype).eps
            atol = ulp * w.float().abs().mean().item()
            torch.testing.assert_close(g.float(), w.float(), rtol=ulp, atol=atol)


@pytest.mark.parametrize(
    "config",
    [
        TileConfig(128, 256, 1, 1, Schedule.OVERLAPPED, 4),
        TileConfig(128, 192, 1, 1, Schedule.OVERLAPPED, 4, dynamic=True),
        TileConfig(128, 128, 1, 1, Schedule.PINGPONG, 2),
        TileConfig(128, 128, 1, 1, Schedule.COOPERATIVE, 4),
        TileConfig(128, 256, 2, 1, Schedule.OVERLAPPED, 3, raster_along_m=False),
        TileConfig(128, 128, 2, 1, Schedule.OVERLAPPED, 3, raster_along_m=False),
    ],
    ids=lambda config: config.name,
)
def test_a_gradient_overwrites_the_preactivation_without_a_race(cases, config):
    case = cases["swiglu bf16"]

    def run(h, seed, **how):
        arguments = case.dout, case.w2, h, case.scores, case.tokens, case.offsets
        with emulated_layer(seed=seed, sms=3, config=config) as session:
            results = stages.down_backward_act(*arguments, activation=case.activation, **how)
        assert session.machines and not session.machines[-1].warnings
        return results

    apart = run(case.h.clone(), 0)
    for seed in range(3):
        h = case.h.clone()
        dh, a_scaled, partial = run(h, seed, overwrite_h=True)
        assert dh is h
        assert torch.equal(dh[:LIVE], apart[0][:LIVE])
        assert torch.equal(a_scaled[:LIVE], apart[1][:LIVE])
        assert torch.equal(partial[:, :LIVE], apart[2][:, :LIVE])


def test_compiling_leaves_nothing_in_the_current_directory(cases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    emulator_for.cache_clear()
    with emulated_layer(sms=2) as session:
        cases["relu bf16"].down(stages)
    assert session.machines and not list(tmp_path.iterdir())
