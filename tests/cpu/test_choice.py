"""The model that chooses the tiles of the Hopper kernels."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from benchmarks.shapes import DECODE_SHAPE, NAMED_SHAPES, Shape
from benchmarks.tiles import launches
from kernels_sm90 import BACKEND, choice
from kernels_sm90.tiles import supports_config
from sonic.enums import ActivationType
from sonic.runtime.launch import later_parts
from sonic.runtime.problem import (
    EpilogueKind,
    Problem,
    Ragged,
    Schedule,
    TileConfig,
    layer_problems,
)
from sonic.triton.parts import rows_per_part


def every_problem() -> list[Problem]:
    return [
        problem
        for activation in ActivationType
        for accumulate in (False, True)
        for problem in layer_problems(activation, "bfloat16", True, accumulate)
    ]


@pytest.mark.parametrize("rows", [3, 45, 128, 209, 320, 2048])
@pytest.mark.parametrize("tile", [64, 128, 256])
def test_expected_tiles_are_those_of_random_routing(rows: int, tile: int) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.poisson(torch.full((100_000,), float(rows)), generator=generator)
    mean = torch.ceil(counts / tile).mean().item()
    assert choice._expected_tiles(rows, tile) == pytest.approx(mean, rel=0.02, abs=0.03)


def test_candidates_are_legal_for_every_problem() -> None:
    for problem in every_problem():
        for config in choice.candidates(problem):
            assert supports_config(problem, config) is None, (problem.name, config.name)


@pytest.mark.parametrize("named", NAMED_SHAPES, ids=lambda named: named.letter)
def test_few_kernels_serve_all_numbers_of_rows(named) -> None:
    for gemm, (problem, n, k) in launches(named.shape).items():
        configs = choice.default_configs(problem, n, k, named.shape.E)
        few = 1 if problem.ragged is Ragged.ROWS else 0
        if gemm == "up_inference":  # of two widths
            few = 2
        assert 1 <= len(configs) <= choice._limit(problem) + few


def test_weight_gradients_of_few_tiles_are_split() -> None:
    """12 and 24 tiles of an expert, where it has 32 and 64, and where 3 experts have large shares
    anyway."""
    for shape, expected in (
        (Shape(24576, 1536, 256, 128, 8), (True, True)),
        (Shape(16384, 2048, 512, 512, 10), (True, False)),
        (Shape(24576, 1536, 256, 3, 2), (False, False)),
    ):
        for gemm, split in zip(("dw2", "dw1"), expected, strict=True):
            problem, n, k = launches(shape)[gemm]
            config = choice.default_config(problem, shape.rows // shape.E, n, k, shape.E)
            assert config.split is split, (shape, gemm)
            added = replace(problem, epilogue=EpilogueKind.ACCUMULATE)
            assert not choice.default_config(added, shape.rows // shape.E, n, k, shape.E).split


@pytest.mark.parametrize("rows", [1, 700, 200_000])
@pytest.mark.parametrize("experts", [4, 128, 4096])
def test_parts_are_a_sixteenth_of_the_share_of_an_sm(rows: int, experts: int) -> None:
    config = TileConfig(128, 256, split=True)
    parts = later_parts(config, rows, experts, m=256, n=1536, sms=132)  # 12 tiles
    assert parts >= 1
    if parts > 1:
        size = rows_per_part(rows, parts)
        assert size >= max(rows * 12 / 132 / 16, 2 * rows / experts, 512)


def test_cards_are_told_by_the_name_of_the_gpu() -> None:
    for gpu, kind in (
        ("NVIDIA H200", "H200"),
        ("H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GH200 480GB", "H100"),
        ("NVIDIA H20", "H100"),
    ):
        assert BACKEND.for_gpu(gpu).gpu == kind
        assert BACKEND.for_gpu(gpu) is BACKEND.for_gpu(kind)


def test_an_h100_takes_tiles_from_a_counter_wherever_there_are_many() -> None:
    """There SMs that drift apart lose up to 1.7 times in rows, as in the committed sweep."""
    for named in NAMED_SHAPES:
        for problem, n, k in launches(named.shape).values():
            if problem.ragged is Ragged.ROWS:
                rows = named.shape.rows // named.shape.E
                config = BACKEND.for_gpu("H100").default_config(problem, rows, n, k, named.shape.E)
                assert config.dynamic or config.cluster_m == 2, (named.letter, config.name)


def test_pieces_that_come_in_turns_want_a_counter() -> None:
    """dH of reductions of 1664 columns or more, on an H200 too; B has 1536."""
    orders = {}
    for named in NAMED_SHAPES:
        problem, n, k = launches(named.shape)["dh"]
        rows = named.shape.rows // named.shape.E
        config = BACKEND.for_gpu("H200").default_config(problem, rows, n, k, named.shape.E)
        orders[named.letter] = (config.dynamic, config.raster_along_m)
    along_n, along_m = (True, False), (True, True)
    assert {letter: orders[letter] for letter in "ABCDEF"} == {
        "A": along_n, "B": (False, False), "C": along_n, "D": along_m, "E": along_n, "F": along_m,
    }  # fmt: skip


def test_tiles_fit_where_the_last_row_tile_is_a_large_part() -> None:
    """Experts of 256 rows in tiles of 128 multiply 24% padding; of 2048 rows hardly any. On an H100
    such tiles, of single CTAs, read weights too often."""
    for tokens, gpu, fits in ((8192, "H200", True), (65536, "H200", False), (8192, "H100", False)):
        shape = Shape(tokens, 2880, 2880, 128, 4)
        for gemm in ("down", "dx"):
            problem, n, k = launches(shape)[gemm]
            rows = shape.rows // shape.E
            config = BACKEND.for_gpu(gpu).default_config(problem, rows, n, k, shape.E)
            assert config.swap_ab is fits and config.cluster_m == 1, (tokens, gemm, gpu)


@pytest.mark.parametrize("gpu", BACKEND.gpus)
def test_tiles_fit_neither_hardly_any_rows_nor_idle_sms(gpu: str) -> None:
    for experts, n, k, rows in itertools.product(
        (2, 512), (1024, 8192), (1024, 8192), (64, 128, 256)
    ):
        if rows == 256 and experts > 2:
            continue
        for problem in every_problem():
            config = BACKEND.for_gpu(gpu).default_config(problem, rows, n, k, experts)
            assert not config.swap_ab, (problem.name, experts, n, k, rows)


def test_two_row_tiles_of_an_expert_share_its_weights() -> None:
    """Experts with 152 rows have two row tiles nearly always, those with 320 have three."""
    for shape, cluster_m in (
        (Shape(4352, 1472, 256, 344, 12), 2),
        (Shape(16384, 2048, 512, 512, 10), 1),
    ):
        problem, n, k = launches(shape)["up"]
        config = choice.default_config(problem, shape.rows // shape.E, n, k, shape.E)
        assert config.cluster_m == cluster_m


def test_the_number_of_experts_decides_how_full_the_last_wave_is() -> None:
    """The grid of 16 experts with 512 rows is six waves of narrow tiles, or 3.3 of wide ones."""
    shape = Shape(1024, 5632, 704, 16, 8)
    problem, n, k = launches(shape)["up"]
    widths = {}
    for experts in (shape.E, 64 * shape.E):
        widths[experts] = choice.default_config(problem, 512, n, k, experts).tile_n
    assert list(widths.values()) == [128, 256]


def test_a_tile_that_is_alone_is_cooperative() -> None:
    """An up-projection that leaves SMs idle has no next tile to hide an epilogue behind."""
    problem, n, k = launches(Shape(256, 7168, 2048, 4, 1))["up_inference"]
    config = choice.default_config(problem, 64, n, k, 4)
    assert config == TileConfig(128, 128, 1, 1, Schedule.COOPERATIVE, 2, False, False)


def test_few_rows_have_half_tiles() -> None:
    """As in the committed sweep of few rows; 64 rows and more fill a tile."""
    for tokens, gemm, expected in (
        (1, "up", "64x128"),
        (16, "up", "64x128"),
        (256, "up_inference", "64x256"),
        (256, "down", "64x128"),
        (1024, "up", "128x256"),
    ):
        shape = Shape(tokens, *DECODE_SHAPE)
        problem, n, k = launches(shape)[gemm]
        config = choice.default_config(problem, shape.rows // shape.E, n, k, shape.E)
        assert config.name.startswith(expected), (tokens, gemm, config.name)


@pytest.mark.parametrize("rows", [1, 20, 31, 32, 100])
def test_few_experts_have_narrow_tiles(rows: int) -> None:
    """Where even those are no whole wave: each wide one would leave an SM idle beside it."""
    shape = Shape(rows, 2048, 256, 8, 8)
    for problem, n, k in launches(shape).values():
        if problem.ragged is Ragged.ROWS and n < 2048:
            config = choice.default_config(problem, rows, n, k, shape.E)
            assert (config.tile_n, config.cluster_size) == (128, 1)


@pytest.mark.parametrize("experts", [1, 8, 16])
def test_no_tile_is_wider_than_columns_that_leave_sms_idle(experts: int) -> None:
    for problem in every_problem():
        if problem.ragged is Ragged.ROWS:
            for n, least in ((64, 128), (200, 192), (256, 256)):
                for config in choice.default_configs(problem, n, 512, experts):
                    full = experts * -(-4096 // 128) * -(-n // 128) >= 132
                    assert full or config.tile_n <= least


def without_order(config: TileConfig) -> TileConfig:
    return replace(config, raster_along_m=True, dynamic=False)


def test_few_kernels_cost_little_by_the_model() -> None:
    """Three or four kernels for all numbers of rows, beside the best tiling for each."""
    generator = torch.Generator().manual_seed(0)

    def drawn(least: int, most: int) -> int:
        exponent = torch.rand((), generator=generator) * math.log2(most / least)
        return 8 * round(least * 2 ** exponent.item() / 8)

    ratios = []
    for _ in range(6):
        shape = Shape(1, drawn(1024, 8192), drawn(128, 4096), drawn(8, 512), 1)
        for problem, n, k in launches(shape).values():
            for rows in (64, 200, 500, 1500, 4000):
                size = choice._Size(choice._class_of_rows(rows), n, k, shape.E)
                if choice._only_reads(problem, size) or not choice._fills_a_wave(problem, size):
                    continue
                times = choice._times(problem, size)
                config = choice.default_config(problem, rows, n, k, shape.E)
                ratios += [
                    time / min(t for _, t in times.values())
                    for tiling, (order, time) in times.items()
                    if without_order(tiling.config(order)) == without_order(config)
                ]
    assert len(ratios) > 100
    assert max(ratios) < 1.15 and sum(ratios) / len(ratios) < 1.02


@pytest.mark.parametrize("rows", [0, 1, 2**30])
def test_extreme_sizes_have_tiles(rows: int) -> None:
    for problem in every_problem():
        for n, k, experts in ((8, 8, 0), (8, 16384, 1), (16384, 8, 65_536)):
            config = choice.default_config(problem, rows, n, k, experts)
            assert supports_config(problem, config) is None
    assert math.isfinite(choice._expected_tiles(2**30, 64))
