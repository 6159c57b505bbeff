"""Each grouped GEMM against its torch twin, with tiles that the defaults do not choose."""

from dataclasses import replace

import pytest

from sonic.enums import GateUpLayout
from sonic.reference import stages as reference
from sonic.runtime.problem import Schedule, TileConfig
from tests.stage_checks import ROW_STAGES, WEIGHT_STAGES, check_output, in_float64, make_case, run

stages = pytest.importorskip("sonic.stages", reason="needs Triton")

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
    TileConfig(160, 256, swap_ab=True),
    TileConfig(128, 256, 2, raster_along_m=False, swap_ab=True),
    TileConfig(176, 256, dynamic=True, swap_ab=True),
    TileConfig(160, 128, 2, 1, PINGPONG, raster_along_m=False, swap_ab=True),
    TileConfig(128, 128, 1, 1, PINGPONG, dynamic=True, swap_ab=True),
]
REDUCTION_TILES = [
    TileConfig(128, 256),
    TileConfig(128, 128, epilogue_stages=4),
    TileConfig(256, 128, raster_along_m=False),
    TileConfig(128, 192),
]


@pytest.fixture(params=[GateUpLayout.INTERLEAVED, GateUpLayout.CONCATENATED], ids=lambda p: p.value)
def case(request):
    return make_case(request.param, "cuda")


def check(stage, config, case, monkeypatch):
    monkeypatch.setattr(stages, "config_for", lambda *_: config)
    monkeypatch.setattr(stages, "prepared", stages.prepared.__wrapped__)
    results = run(stages, stage, case), run(reference, stage, case)
    for outputs in zip(*results, run(reference, stage, in_float64(case)), strict=True):
        check_output(stage, case, *outputs)


@pytest.mark.parametrize("config", ROW_TILES, ids=lambda config: config.name)
@pytest.mark.parametrize("stage", ROW_STAGES)
def test_ragged_rows(stage, config, case, monkeypatch):
    if config.swap_ab and config.tile_m > 160 and stage == "down_backward_act":
        config = replace(config, tile_m=144)  # with rows of C in registers too, see tiles.py
    check(stage, config, case, monkeypatch)


@pytest.mark.parametrize("config", REDUCTION_TILES, ids=lambda config: config.name)
@pytest.mark.parametrize("stage", WEIGHT_STAGES)
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
