"""Every refusal of the Hopper kernels: a problem or tiles one change away from legal ones."""

from dataclasses import replace

import pytest

from kernels_sm90.tiles import supports, supports_config
from sonic.enums import ActivationType
from sonic.runtime.limits import KERNEL_DTYPES
from sonic.runtime.problem import (
    EpilogueKind,
    Operand,
    Problem,
    Ragged,
    Schedule,
    TileConfig,
    down_backward_act_problem,
    down_problem,
    layer_problems,
    up_backward_act_problem,
    up_problem,
    weight_grad_problem,
)

SWIGLU = ActivationType.SWIGLU
DOWN = down_problem("bfloat16", has_bias=False)
GATHERED = up_problem(SWIGLU, "bfloat16", has_bias=False, store_preact=True)
DW = weight_grad_problem("bfloat16", Operand.A, gated=False, accumulate=False)
ACCUMULATE = weight_grad_problem("bfloat16", Operand.A, gated=False, accumulate=True)
DX = up_backward_act_problem("bfloat16", gated=False)
DH = down_backward_act_problem(SWIGLU, "bfloat16")
COOPERATIVE = TileConfig(128, 128)
PINGPONG = TileConfig(128, 128, schedule=Schedule.PINGPONG)
SWAPPED = TileConfig(160, 256, swap_ab=True)


@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("activation", list(ActivationType))
def test_the_problems_of_a_layer_are_supported(activation, dtype):
    for has_bias in (False, True):
        for accumulate in (False, True):
            for problem in layer_problems(activation, dtype, has_bias, accumulate):
                assert supports(problem) is None, problem.name


def test_the_problems_of_the_forward_pass_and_of_inference():
    """Each kernel of a layer, by its place in ``layer_problems``."""
    up, up_inference, down = range(3)
    for accumulate in (False, True):
        problems = layer_problems(SWIGLU, "bfloat16", True, accumulate)
        forward = [i for i, problem in enumerate(problems) if problem.is_forward]
        inference = [i for i, problem in enumerate(problems) if problem.is_of_inference]
        assert forward == [up, up_inference, down]
        assert inference == [up_inference, down]


PROBLEMS = {
    "dtype": (DOWN, {"dtype": "float32"}, "dtype float32"),
    "gathered weight": (DOWN, {"gather": Operand.B}, "a gathered weight"),
    "accumulated rows": (DOWN, {"epilogue": EpilogueKind.ACCUMULATE}, "into ragged rows"),
    "epilogue of a weight gradient": (DW, {"epilogue": EpilogueKind.ACTIVATION}, "activation of"),
    "bias of a transposed weight": (DX, {"has_bias": True}, "a bias of a transposed"),
    "bias of a weight gradient": (DW, {"has_bias": True}, "a weight gradient"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_refused_problem(name):
    problem, change, reason = PROBLEMS[name]
    assert supports(problem) is None
    refusal = supports(replace(problem, **change))
    assert refusal is not None and reason in refusal.reason and refusal.remedy


CONFIGS = {
    "rows of a cooperative tile": (DOWN, COOPERATIVE, {"tile_m": 64}, "a multiple of 128 up to"),
    "rows of a ping-pong tile": (DOWN, PINGPONG, {"tile_m": 96}, "a multiple of 64 up to 256"),
    "too many rows": (DOWN, COOPERATIVE, {"tile_m": 384}, "tile_m=384"),
    "columns": (DOWN, COOPERATIVE, {"tile_n": 120}, "tile_n=120: a multiple of"),
    "columns of a transposed weight": (DX, COOPERATIVE, {"tile_n": 96}, "a multiple of 64 up to"),
    "no columns": (DOWN, COOPERATIVE, {"tile_n": 0}, "tile_n=0"),
    "too many columns": (DOWN, COOPERATIVE, {"tile_n": 512}, "up to 256"),
    "overlapped accumulation": (
        ACCUMULATE, COOPERATIVE, {"schedule": Schedule.OVERLAPPED}, "that accumulates",
    ),
    "elements of an overlapped tile": (
        DOWN, COOPERATIVE, {"schedule": Schedule.OVERLAPPED, "tile_m": 256, "tile_n": 192},
        "256x192 with an overlapped epilogue",
    ),
    "a dynamic order of clusters": (
        DOWN, COOPERATIVE, {"dynamic": True, "cluster_m": 2}, "a dynamic tile order of clusters",
    ),
    "rows of a tile that fits": (DOWN, SWAPPED, {"tile_m": 120}, "tile_m=120: a multiple of 16"),
    "columns of a tile that fits": (DOWN, SWAPPED, {"tile_n": 128}, "256 is built"),
    "columns of a tile by turns": (
        DOWN, SWAPPED, {"schedule": Schedule.PINGPONG}, "a pingpong schedule: 128 is built",
    ),
    "schedule of a tile that fits": (
        DOWN, SWAPPED, {"schedule": Schedule.OVERLAPPED}, "an overlapped schedule",
    ),
    "cluster of a tile that fits": (DOWN, SWAPPED, {"cluster_n": 2}, "1x1 and 2x1 are built"),
    "accumulators of a tile that fits": (DOWN, SWAPPED, {"tile_m": 208}, "208 accumulators"),
    "a weight gradient that fits": (DW, COOPERATIVE, {"swap_ab": True}, "no ragged rows"),
    "split rows": (DOWN, SWAPPED, {"split": True}, "a split reduction of anything but"),
    "cluster": (DOWN, COOPERATIVE, {"cluster_m": 2, "cluster_n": 2}, "cluster 2x2"),
    "shared gathered rows": (GATHERED, COOPERATIVE, {"cluster_n": 2}, "multicast of the gathered"),
    "shared gathered columns": (
        replace(DW, gather=Operand.B), COOPERATIVE, {"cluster_m": 2}, "multicast of the gathered",
    ),
    "accumulators": (DOWN, COOPERATIVE, {"tile_m": 256, "tile_n": 256}, "256 accumulators"),
    "stages of the epilogue": (DOWN, COOPERATIVE, {"epilogue_stages": 0}, "at least 2 where"),
    "stages of a loaded tile": (DH, COOPERATIVE, {"epilogue_stages": 1}, "epilogue_stages=1"),
    "stages of a tile loaded ahead": (
        DH, replace(COOPERATIVE, schedule=Schedule.OVERLAPPED, tile_n=64),
        {"epilogue_stages": 6}, "at most 5 for tile_n=64",
    ),
    "shared memory": (
        ACCUMULATE, COOPERATIVE, {"tile_m": 256, "epilogue_stages": 8}, "bytes of shared memory",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_refused_tiles(name):
    problem, config, change, reason = CONFIGS[name]
    assert supports_config(problem, config) is None
    refusal = supports_config(problem, replace(config, **change))
    assert refusal is not None and reason in refusal.reason and refusal.remedy


def test_a_refused_problem_is_an_error_that_says_what_to_do():
    from kernels_sm90 import BACKEND
    from sonic.runtime import launch
    from sonic.runtime.errors import UnsupportedError

    problem = Problem(Ragged.ROWS, "float32", EpilogueKind.LINEAR)
    with pytest.raises(UnsupportedError, match='float32.*cast the tensors.*impl="reference"'):
        launch.kernel_for(BACKEND, problem, COOPERATIVE)


def test_no_two_tilings_of_a_problem_share_a_name():
    from kernels_sm90 import BACKEND

    for problem in (DOWN, DX, DW, DH, GATHERED, ACCUMULATE):
        space = BACKEND.search_space(problem)
        assert len({config.name for config in space}) == len(space)
        flags = {(config.raster_along_m, config.dynamic) for config in space}
        assert flags == {(False, False), (False, True), (True, False), (True, True)}
