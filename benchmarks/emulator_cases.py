"""Grouped GEMMs that run on a Hopper GPU and in the emulator: what, with which tiles, how large."""

from collections.abc import Iterator
from dataclasses import dataclass

from sonic.enums import ActivationType, GateUpLayout
from sonic.runtime.problem import (
    Operand,
    Problem,
    Schedule,
    TileConfig,
    down_backward_act_problem,
    down_problem,
    up_backward_act_problem,
    up_problem,
    weight_grad_problem,
)
from tests.grouped_gemms import GroupedGemm, Sizes

_BF16, _FP16 = "bfloat16", "float16"
_COOPERATIVE, _PINGPONG = Schedule.COOPERATIVE, Schedule.PINGPONG
_OVERLAPPED = Schedule.OVERLAPPED
_INTERLEAVED, _CONCATENATED = GateUpLayout.INTERLEAVED, GateUpLayout.CONCATENATED
# Several column tiles of every width, more stages than a ring has, experts of whole row tiles.
_LARGER = Sizes(150, 264, 200, (64, 0, 257, 128, 1))


@dataclass(frozen=True)
class Case:
    """One GEMM with one choice of tiles; ``seed`` makes its inputs."""

    gemm: GroupedGemm
    config: TileConfig
    seed: int

    @property
    def name(self) -> str:
        sizes, parts = self.gemm.sizes, [self.gemm.problem.name, self.config.name]
        if not self.config.raster_along_m:
            parts.append("along_n")
        if self.gemm.gated:
            parts.append(self.gemm.layout.value)
        return " ".join([*parts, f"T{sizes.tokens} H{sizes.hidden} I{sizes.width} R{sizes.live}"])


_UP_TILES = (
    TileConfig(128, 256, 1, 1, _COOPERATIVE, 2),
    TileConfig(128, 192, 1, 1, _COOPERATIVE, 2),
    TileConfig(128, 128, 1, 1, _COOPERATIVE, 2),
    TileConfig(128, 128, 1, 1, _PINGPONG, 2),
    TileConfig(128, 128, 2, 1, _COOPERATIVE, 2),
)
_GRAD_TILES = (
    TileConfig(128, 256, 1, 1, _COOPERATIVE, 4),
    TileConfig(128, 192, 1, 1, _COOPERATIVE, 4),
    TileConfig(128, 128, 1, 1, _PINGPONG, 2),
)
_WIDE_GRAD_TILES = (
    TileConfig(128, 128, 1, 1, _COOPERATIVE, 4),
    TileConfig(128, 256, 1, 1, _COOPERATIVE, 4),
)


def _activation_cases() -> Iterator[tuple[GroupedGemm, TileConfig]]:
    """Up-projections and their gradients with every activation."""
    for i, activation in enumerate(ActivationType):
        dtype = _FP16 if i % 3 == 1 else _BF16
        up = up_problem(activation, dtype, has_bias=i % 2 == 0, store_preact=i % 5 != 3)
        tiles = _UP_TILES[i % len(_UP_TILES)]
        yield GroupedGemm(up, layout=_INTERLEAVED), tiles
        if activation.is_gated:
            yield GroupedGemm(up, layout=_CONCATENATED), tiles
        grad = down_backward_act_problem(activation, _BF16 if i % 3 == 0 else _FP16)
        choices = _GRAD_TILES if activation.is_gated else _WIDE_GRAD_TILES
        yield GroupedGemm(grad), choices[i % len(choices)]
    swiglu = ActivationType.SWIGLU
    up = up_problem(swiglu, _BF16, has_bias=True, store_preact=True)
    yield GroupedGemm(up, _LARGER, _CONCATENATED), _UP_TILES[0]
    grad = down_backward_act_problem(swiglu, _BF16)
    yield GroupedGemm(grad, _LARGER), _GRAD_TILES[0]


def _down_cases() -> Iterator[tuple[GroupedGemm, TileConfig]]:
    plain, biased = down_problem(_BF16, False), down_problem(_FP16, True)
    for problem, config in (
        (plain, TileConfig(128, 192, 1, 1, _PINGPONG, 1)),
        (biased, TileConfig(128, 192, 1, 1, _PINGPONG, 1)),
        (biased, TileConfig(128, 256, 1, 1, _COOPERATIVE, 2, raster_along_m=False)),
        (plain, TileConfig(128, 128, 1, 1, _PINGPONG, 2)),
        (plain, TileConfig(128, 128, 2, 1, _PINGPONG, 2, raster_along_m=False)),
        (plain, TileConfig(128, 128, 1, 2, _COOPERATIVE, 2)),
    ):
        yield GroupedGemm(problem), config
        if config.cluster_size == 2 or config.epilogue_stages == 1:
            yield GroupedGemm(problem, _LARGER), config


def _up_backward_cases() -> Iterator[tuple[GroupedGemm, TileConfig]]:
    gated, plain = up_backward_act_problem(_BF16, True), up_backward_act_problem(_FP16, False)
    wide = TileConfig(128, 256, 1, 1, _COOPERATIVE, 2, raster_along_m=False)
    for problem, config in (
        (gated, TileConfig(128, 192, 1, 1, _PINGPONG, 2)),
        (gated, wide),
        (gated, TileConfig(128, 192, 2, 1, _PINGPONG, 2, raster_along_m=False)),
        (plain, wide),
    ):
        yield GroupedGemm(problem), config
        if problem.gated_rows:
            yield GroupedGemm(problem, layout=_CONCATENATED), config


def _weight_cases() -> Iterator[tuple[GroupedGemm, TileConfig]]:
    def problem(dtype: str, gather: Operand | None, gated: bool, accumulate: bool) -> Problem:
        return weight_grad_problem(dtype, gather, gated, accumulate)

    multicast = TileConfig(128, 256, 2, 1, _COOPERATIVE, 2)
    yield GroupedGemm(problem(_BF16, Operand.A, False, False)), multicast
    yield GroupedGemm(problem(_BF16, Operand.A, False, False), _LARGER), multicast
    yield GroupedGemm(problem(_FP16, Operand.A, False, True)), TileConfig(128, 192, 1, 1)
    yield GroupedGemm(problem(_BF16, None, False, False)), TileConfig(256, 192, 1, 1)
    up_multicast = TileConfig(256, 128, 1, 2, _COOPERATIVE, 1)
    for layout in (_INTERLEAVED, _CONCATENATED):
        yield GroupedGemm(problem(_BF16, Operand.B, True, False), layout=layout), up_multicast
    yield GroupedGemm(problem(_BF16, Operand.B, True, False), _LARGER), up_multicast
    yield (
        GroupedGemm(problem(_BF16, Operand.B, True, True), layout=_CONCATENATED),
        TileConfig(256, 128, 1, 1, _COOPERATIVE, 1),
    )
    yield (
        GroupedGemm(problem(_FP16, Operand.B, False, False)),
        TileConfig(256, 192, 1, 1, _COOPERATIVE, 1),
    )
    yield GroupedGemm(problem(_FP16, None, True, True)), TileConfig(256, 128, 1, 1)


def _scheduled_cases() -> Iterator[tuple[GroupedGemm, TileConfig]]:
    """Stores during the next main loop, tiles from a counter, weight gradients by turns."""
    swiglu, relu = ActivationType.SWIGLU, ActivationType.RELU
    forward = TileConfig(128, 256, 1, 1, _OVERLAPPED, 1, raster_along_m=False, dynamic=True)
    narrow = TileConfig(128, 192, 1, 1, _OVERLAPPED, 1, raster_along_m=False, dynamic=True)
    for layout in (_INTERLEAVED, _CONCATENATED):
        up = up_problem(swiglu, _BF16, has_bias=True, store_preact=True)
        yield GroupedGemm(up, layout=layout), forward
    yield GroupedGemm(up_problem(swiglu, _BF16, True, True), _LARGER), forward
    yield GroupedGemm(up_problem(ActivationType.GEGLU, _FP16, False, False)), narrow
    yield GroupedGemm(up_problem(relu, _BF16, False, True)), narrow
    backward = TileConfig(128, 256, 1, 1, _OVERLAPPED, 3, raster_along_m=False, dynamic=True)
    yield GroupedGemm(down_backward_act_problem(swiglu, _BF16)), backward
    yield GroupedGemm(down_backward_act_problem(swiglu, _BF16), _LARGER), backward
    yield GroupedGemm(down_backward_act_problem(relu, _FP16)), backward
    wide = TileConfig(128, 256, 1, 1, _OVERLAPPED, 1, raster_along_m=False, dynamic=True)
    turns = TileConfig(128, 192, 1, 1, _PINGPONG, 2, dynamic=True)
    for config in (wide, turns):
        yield GroupedGemm(down_problem(_BF16, True)), config
        yield GroupedGemm(down_problem(_BF16, True), _LARGER), config
        yield GroupedGemm(up_backward_act_problem(_BF16, True), layout=_CONCATENATED), config
    still = TileConfig(128, 192, 1, 1, _PINGPONG, 2)
    yield GroupedGemm(weight_grad_problem(_BF16, Operand.A, False, False)), still
    yield GroupedGemm(weight_grad_problem(_BF16, Operand.B, True, False), _LARGER), still
    stored_late = TileConfig(128, 256, 1, 1, _OVERLAPPED, 1)
    for problem in (
        weight_grad_problem(_BF16, Operand.A, False, False),
        weight_grad_problem(_FP16, Operand.B, True, False),
    ):
        yield GroupedGemm(problem), stored_late
        yield GroupedGemm(problem, _LARGER), stored_late
    adding = TileConfig(128, 192, 1, 1, _PINGPONG, 1)
    yield GroupedGemm(weight_grad_problem(_FP16, Operand.B, True, True)), adding


def all_cases() -> list[Case]:
    """Every case, always in the same order; the seed is the position."""
    made = [*_activation_cases(), *_down_cases(), *_up_backward_cases(), *_weight_cases()]
    made += _scheduled_cases()
    return [Case(gemm, config, seed) for seed, (gemm, config) in enumerate(made)]
