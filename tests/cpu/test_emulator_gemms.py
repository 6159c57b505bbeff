"""Every grouped GEMM that a layer can ask for, its compiled kernel run in the emulator.

Small sizes that are no multiple of any tile, an empty expert, NaN in rows that belong to none.
Results are held to the reference, and bitwise to exact sums.
"""

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed")

from kernels_sm90.tiles import BLOCK_K, pieces_alternate, supports_config
from sonic.device.blocks import EpilogueBlocks
from sonic.enums import ActivationType, GateUpLayout
from sonic.reference import stages as reference
from sonic.runtime import launch
from sonic.runtime.problem import (
    Arch,
    Operand,
    Schedule,
    TileConfig,
    down_backward_act_problem,
    down_problem,
    layer_problems,
    up_backward_act_problem,
    up_problem,
    weight_grad_problem,
)
from tests.emulator.fixture import check_exact, emulated_gemm, run_emulated  # noqa: F401
from tests.emulator.layer import has_kernels
from tests.grouped_gemms import EXACT, NORMAL, GroupedGemm, Sizes, cast

READY = [arch for arch in Arch if has_kernels(arch)]
COOPERATIVE, PINGPONG = Schedule.COOPERATIVE, Schedule.PINGPONG
OVERLAPPED = Schedule.OVERLAPPED
DOWN = down_problem("bfloat16", False)
DOWN_WEIGHT = weight_grad_problem("bfloat16", Operand.A, False, False)
UP_WEIGHT = weight_grad_problem("bfloat16", Operand.B, True, False)
# A tile and a bit in every direction, and few of them: most of the time goes into tiles.
SIZES = Sizes(40, 136, 72, (130, 0, 7))


def problems():
    """Distinct problems of layers with every activation; dtype, bias and accumulation alternate."""
    found = {}
    for i, activation in enumerate(ActivationType):
        dtype = ("bfloat16", "float16")[i % 2]
        for problem in layer_problems(activation, dtype, i % 3 == 0, accumulate=i % 4 < 2):
            found[problem] = None
    for gated in (False, True):  # rows that lie in order already, as of grouped_mm
        found[weight_grad_problem("bfloat16", None, gated, accumulate=gated)] = None
    return list(found)


@pytest.mark.parametrize("arch", Arch, ids=lambda a: a.value)
def test_architecture(emulated_gemm, arch):  # noqa: F811
    """Says which architectures this file runs on; the rest are skipped here, once."""
    emulated_gemm(GroupedGemm(DOWN, SIZES), arch=arch)


@pytest.mark.parametrize("arch", READY, ids=lambda a: a.value)
@pytest.mark.parametrize("problem", problems(), ids=lambda p: p.name)
def test_problem(emulated_gemm, problem, arch):  # noqa: F811
    layout = (GateUpLayout.INTERLEAVED, GateUpLayout.CONCATENATED)[len(problem.name) % 2]
    emulated_gemm(GroupedGemm(problem, SIZES, layout), arch=arch)


TILES = [
    (DOWN, TileConfig(128, 128, 2, 1, PINGPONG, 2)),
    (DOWN, TileConfig(128, 64, 1, 2, COOPERATIVE, 2)),
    (up_backward_act_problem("bfloat16", True), TileConfig(64, 192, 1, 1, PINGPONG, 2)),
    (
        up_backward_act_problem("bfloat16", True),
        TileConfig(128, 128, 2, 1, PINGPONG, 2, raster_along_m=False),
    ),
    (up_backward_act_problem("bfloat16", True), TileConfig(128, 64, 1, 1, OVERLAPPED, 2)),
    (DOWN, TileConfig(128, 64, 1, 1, OVERLAPPED, 1, dynamic=True)),
    (
        up_backward_act_problem("bfloat16", True),
        TileConfig(128, 64, 1, 1, PINGPONG, 2, dynamic=True),
    ),
    (DOWN_WEIGHT, TileConfig(128, 128, 2, 1, COOPERATIVE, 4)),
    (DOWN_WEIGHT, TileConfig(128, 128, 2, 1, OVERLAPPED, 2)),
    (
        weight_grad_problem("bfloat16", Operand.B, True, False),
        TileConfig(256, 64, 1, 2, OVERLAPPED, 1),
    ),
    (
        weight_grad_problem("bfloat16", Operand.B, True, True),
        TileConfig(128, 64, 1, 2, COOPERATIVE, 1),
    ),
    # What ``kernels_sm90.choice`` takes for larger sizes than these.
    (
        up_problem(ActivationType.SWIGLU, "bfloat16", True, True),
        TileConfig(128, 256, 2, 1, OVERLAPPED, 1, raster_along_m=False),
    ),
    (
        down_backward_act_problem(ActivationType.SWIGLU, "bfloat16"),
        TileConfig(128, 128, 2, 1, OVERLAPPED, 3, raster_along_m=False),
    ),
    (DOWN, TileConfig(128, 192, 2, 1, PINGPONG, 2, raster_along_m=False)),
    (
        up_problem(ActivationType.SWIGLU_OAI, "float16", True, False),
        TileConfig(64, 256, 1, 1, PINGPONG, 2, raster_along_m=False),
    ),
    (DOWN_WEIGHT, TileConfig(128, 192, 1, 1, PINGPONG, 2, raster_along_m=False, dynamic=True)),
    (
        weight_grad_problem("bfloat16", Operand.B, True, False),
        TileConfig(256, 128, 1, 1, OVERLAPPED, 1, raster_along_m=False, dynamic=True),
    ),
]


@pytest.mark.parametrize(("problem", "config"), TILES, ids=lambda v: v.name)
def test_tiles(emulated_gemm, problem, config):  # noqa: F811
    """Schedules, multicast, rasters and tiles from a counter that the default choice leaves out."""
    emulated_gemm(GroupedGemm(problem, SIZES), config)


@pytest.mark.parametrize("activation", [ActivationType.SWIGLU, ActivationType.RELU])
def test_pieces_that_alternate(emulated_gemm, activation):  # noqa: F811
    """A reduction so long that the math warpgroups store their pieces in turns."""
    config = TileConfig(128, 64, 1, 1, OVERLAPPED, 3, dynamic=True)
    sizes = Sizes(40, 25 * BLOCK_K + 8, 136, (130, 0, 7))
    assert pieces_alternate(26) and not pieces_alternate(25)
    emulated_gemm(GroupedGemm(down_backward_act_problem(activation, "bfloat16"), sizes), config)


def test_all_of_a_loaded_tile_ahead(emulated_gemm):  # noqa: F811
    """As many slots as are supported: one more than a tile has chunks."""
    problem = down_backward_act_problem(ActivationType.GELU, "bfloat16")
    most = 64 // EpilogueBlocks.of(problem).acc_chunk + 1
    config = TileConfig(128, 64, 1, 1, OVERLAPPED, most)
    assert supports_config(problem, config) is None
    assert supports_config(problem, replace(config, epilogue_stages=most + 1)) is not None
    emulated_gemm(GroupedGemm(problem, replace(SIZES, width=200)), config)


# Three heights, an expert that leaves the second CTA of a pair nothing, and outputs of one, two or
# three warpgroups' shares of columns, the last one partial.
SWAPPED_SIZES = Sizes(40, 264, 136, (130, 0, 1, 33))
SWAPPED = [
    (DOWN, TileConfig(48, 256, epilogue_stages=1, swap_ab=True)),
    (down_problem("float16", True), TileConfig(64, 256, 2, swap_ab=True)),
    (
        up_backward_act_problem("bfloat16", True),
        TileConfig(64, 128, 1, 1, PINGPONG, dynamic=True, swap_ab=True),
    ),
    (
        up_problem(ActivationType.SWIGLU, "bfloat16", True, True),
        TileConfig(48, 256, 2, epilogue_stages=1, raster_along_m=False, swap_ab=True),
    ),
    (
        up_problem(ActivationType.SWIGLU_OAI, "float16", True, False),
        TileConfig(32, 256, epilogue_stages=1, dynamic=True, swap_ab=True),
    ),
    (up_problem(ActivationType.GELU, "bfloat16", True, True), TileConfig(64, 256, swap_ab=True)),
    (
        down_backward_act_problem(ActivationType.SWIGLU, "bfloat16"),
        TileConfig(48, 256, epilogue_stages=3, dynamic=True, swap_ab=True),
    ),
    (
        down_backward_act_problem(ActivationType.RELU_SQ, "float16"),
        TileConfig(32, 128, 2, 1, PINGPONG, 3, swap_ab=True),
    ),
]


@pytest.mark.parametrize(("problem", "config"), SWAPPED, ids=lambda v: v.name)
def test_tiles_that_fit_their_expert(emulated_gemm, problem, config):  # noqa: F811
    """Every epilogue, single CTAs and pairs that share weights, both schedules."""
    layout = (GateUpLayout.INTERLEAVED, GateUpLayout.CONCATENATED)[config.tile_m % 64 == 0]
    emulated_gemm(GroupedGemm(problem, SWAPPED_SIZES, layout), config)


def test_a_tile_of_the_greatest_height(emulated_gemm):  # noqa: F811
    """Rows of one tile and a bit, and of a tile that is as high as may be."""
    config = TileConfig(176, 256, epilogue_stages=1, dynamic=True, swap_ab=True)
    emulated_gemm(GroupedGemm(DOWN, Sizes(40, 136, 72, (176, 180))), config, runs=((0, EXACT),))


@pytest.mark.parametrize("counts", [(1,), (64, 0, 128)], ids=str)
@pytest.mark.parametrize("problem", [DOWN, DOWN_WEIGHT], ids=lambda p: p.ragged.value)
def test_rows_of_experts(emulated_gemm, problem, counts):  # noqa: F811
    """A single row, and whole tiles; ragged along M and along K."""
    emulated_gemm(GroupedGemm(problem, replace(SIZES, counts=counts)))


def test_no_rows(emulated_gemm):  # noqa: F811
    """Experts without rows have a gradient of zero."""
    sizes = replace(SIZES, counts=(0, 0))
    run = emulated_gemm(GroupedGemm(DOWN_WEIGHT, sizes), runs=((0, EXACT),))
    assert not run.outputs["dw2"].any()


SPLIT = [
    (DOWN_WEIGHT, TileConfig(128, 256, 1, 1, OVERLAPPED, 1, split=True)),
    (DOWN_WEIGHT, TileConfig(128, 64, 2, 1, PINGPONG, 2, split=True)),
    (UP_WEIGHT, TileConfig(128, 192, 1, 1, PINGPONG, 2, dynamic=True, split=True)),
    (UP_WEIGHT, TileConfig(256, 128, 1, 1, OVERLAPPED, 1, raster_along_m=False, split=True)),
]


@pytest.mark.parametrize("layout", GateUpLayout, ids=lambda v: v.value)
@pytest.mark.parametrize("rows", [(1, (130, 0, 7)), (6, (0, 3, 0, 290, 0, 70, 64, 0))], ids=str)
@pytest.mark.parametrize("case", SPLIT, ids=lambda v: f"{v[0].name} {v[1].name}")
def test_split_reductions(emulated_gemm, monkeypatch, case, rows, layout):  # noqa: F811
    """Experts of one to seven parts, some of them empty, and parts of less than a step."""
    (problem, config), (parts, counts) = case, rows
    if layout is GateUpLayout.CONCATENATED and not problem.gated_rows:
        pytest.skip("no gate and up")
    monkeypatch.setattr(launch, "later_parts", lambda *_: parts)
    gemm = GroupedGemm(problem, replace(SIZES, counts=counts), layout)
    emulated_gemm(gemm, config, runs=((0, NORMAL),))
    inputs = gemm.inputs(1, EXACT)
    got = run_emulated(gemm, inputs, 1, config, Arch.SM90).outputs
    for name, expected in of_rounded_parts(gemm, inputs, parts).items():
        assert torch.equal(got[name], expected)


def of_rounded_parts(gemm, inputs, parts):
    """Exact sums over parts of an expert's rows, each rounded, and their sum."""
    size = -(-gemm.sizes.rows // (parts + 1))
    counts, owners = [], []
    for expert, count in enumerate(gemm.sizes.counts):
        for begin in range(0, max(count, 1), size):
            counts.append(min(count - begin, size))
            owners.append(expert)
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    by_part = replace(gemm, sizes=replace(gemm.sizes, counts=tuple(counts)))
    outputs = by_part.run(reference, cast(inputs) | {"offset_by_expert": offsets})
    for name, summed in outputs.items():
        total = torch.zeros(len(gemm.sizes.counts), *summed.shape[1:])
        total.index_add_(0, torch.tensor(owners), summed.to(gemm.dtype).float())
        outputs[name] = total.to(gemm.dtype)
    return outputs


def test_a_wrong_result_is_refused():
    """The comparison sees one element that is one step off, and one that was never written."""
    gemm = GroupedGemm(DOWN, SIZES)
    inputs = gemm.inputs(0, EXACT)
    right = gemm.run(reference, cast(inputs))
    check_exact(gemm, inputs, right, TileConfig(128, 128))
    for row, column, change in ((0, 0, 1 / 128), (136, 71, float("nan"))):
        wrong = {"y": right["y"].clone()}
        wrong["y"][row, column] += max(abs(wrong["y"][row, column]), 1) * change
        with pytest.raises(AssertionError, match="y: 1 elements"):
            check_exact(gemm, inputs, wrong, TileConfig(128, 128))
