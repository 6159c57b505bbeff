"""Each grouped GEMM against its torch twin, with tiles that the defaults do not choose."""

from dataclasses import replace

import pytest
import torch

from sonic.enums import ActivationType, GateUpLayout
from sonic.plan import build_plan
from sonic.reference import stages as reference
from sonic.runtime.problem import Schedule, TileConfig
from sonic.testing import relative_error

stages = pytest.importorskip("sonic.stages", reason="needs Triton")

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 1500, 328, 200, 6, 2
PINGPONG = Schedule.PINGPONG
ROW_TILES = [
    TileConfig(128, 256),
    TileConfig(128, 128, 2, 1),
    TileConfig(256, 128, 1, 1, raster_along_m=False),
    TileConfig(128, 128, 1, 1, PINGPONG),
    TileConfig(128, 128, 2, 1, PINGPONG, raster_along_m=False),
    TileConfig(64, 128, 1, 1, PINGPONG, 2, raster_along_m=False),
    TileConfig(64, 256, 1, 1, PINGPONG),
    TileConfig(128, 192, 2, 1),
]
REDUCTION_TILES = [
    TileConfig(128, 256),
    TileConfig(128, 128, epilogue_stages=4),
    TileConfig(256, 128, raster_along_m=False),
    TileConfig(128, 192),
]
# Both sides round once from float32 sums, so they differ in few elements, by one ulp.
BOUND = 3e-4


@pytest.fixture(params=[GateUpLayout.INTERLEAVED, GateUpLayout.CONCATENATED], ids=lambda p: p.value)
def case(request):
    """Operands of every stage: an empty expert, dropped slots, NaN where nothing may be read."""
    torch.manual_seed(0)
    dtype = torch.bfloat16

    def normal(*size):
        return torch.randn(size, device="cuda").to(dtype)

    ids = torch.randint(EXPERTS, (TOKENS, TOP_K), device="cuda", dtype=torch.int32)
    ids[ids == 2] = 3
    ids[::7, 0] = EXPERTS
    plan = build_plan(ids, EXPERTS)
    rows = TOKENS * TOP_K
    dead = torch.arange(rows, device="cuda") >= plan.offset_by_expert[-1]
    values = {
        "x": normal(TOKENS, HIDDEN),
        "dout": normal(TOKENS, HIDDEN),
        "w1": normal(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5,
    }
    values |= {
        "w2": normal(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5,
        "a": normal(rows, WIDTH),
        "h": normal(rows, 2 * WIDTH),
    }
    for name in ("a", "h"):
        values[name][dead] = float("nan")
    score = torch.rand(rows, device="cuda").masked_fill(dead, float("nan"))
    return {**values, "score": score, "plan": plan, "layout": request.param}


def run(module, stage, case):
    plan, layout = case["plan"], case["layout"]
    token, offset = plan.token_by_row, plan.offset_by_expert
    act = ActivationType.SWIGLU
    if stage == "up":
        return module.up_forward(
            case["x"], case["w1"], None, token, offset,
            activation=act, layout=layout, store_preact=True,
        )  # fmt: skip
    if stage == "down":
        return (module.down_forward(case["a"], case["w2"], None, offset),)
    if stage == "down_backward_act":
        dh, a_scaled, ds = module.down_backward_act(
            case["dout"], case["w2"], case["h"], case["score"], token, offset, activation=act
        )
        return dh, a_scaled, ds.sum(0)
    if stage == "up_backward_act":
        return (module.up_backward_act(case["h"], case["w1"], offset, layout=layout, gated=True),)
    if stage == "down_backward_weight":
        return (module.down_backward_weight(case["dout"], case["a"], token, offset),)
    return (
        module.up_backward_weight(case["x"], case["h"], token, offset, layout=layout, gated=True),
    )


def check(stage, config, case, monkeypatch):
    monkeypatch.setattr(stages, "config_for", lambda *_: config)
    monkeypatch.setattr(stages, "prepared", stages.prepared.__wrapped__)
    live = int(case["plan"].offset_by_expert[-1])
    ragged_rows = not stage.endswith("weight")
    for got, want in zip(run(stages, stage, case), run(reference, stage, case), strict=True):
        if ragged_rows:
            got, want = got[:live], want[:live]
        assert torch.isfinite(got).all()
        assert want.abs().max() > 0
        assert relative_error(got, want) < BOUND


@pytest.mark.parametrize("config", ROW_TILES, ids=lambda config: config.name)
@pytest.mark.parametrize("stage", ["up", "down", "down_backward_act", "up_backward_act"])
def test_ragged_rows(stage, config, case, monkeypatch):
    check(stage, config, case, monkeypatch)


@pytest.mark.parametrize("config", REDUCTION_TILES, ids=lambda config: config.name)
@pytest.mark.parametrize("stage", ["down_backward_weight", "up_backward_weight"])
def test_ragged_reduction(stage, config, case, monkeypatch):
    check(stage, config, case, monkeypatch)


@pytest.mark.parametrize(
    ("stage", "cluster"),
    [("down_backward_weight", (2, 1)), ("up_backward_weight", (1, 2))],
    ids=["multicast_b", "multicast_a"],
)
def test_multicast_of_the_operand_that_is_not_gathered(stage, cluster, case, monkeypatch):
    config = replace(TileConfig(128, 128), cluster_m=cluster[0], cluster_n=cluster[1])
    check(stage, config, case, monkeypatch)
