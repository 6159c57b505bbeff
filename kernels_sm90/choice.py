"""Which tiles a grouped GEMM gets: those of the least time by a model of it. No GPU.

The model: a tile costs a time for each step of its main loop and one beside (``_Tiling``); a GPU
runs them in waves, of which a started one counts for half a full one, but the first as a whole; and
no GEMM takes less than its traffic. Experts get rows at random, so that what counts is the expected
number of row tiles. ``_order`` says how CTAs come to their tiles.

The constants were fitted to sweeps over all tilings (``benchmarks/tiles.py``, H200, 2026-11-27):
the six GEMMs of 26 layers, 55 to 84 tilings each, bf16 and SwiGLU; the thresholds of the orders lie
between layers that an order helped and others that it did not. Those of tiles that fit their expert
and of the H100 are from sweeps of the candidates (2026-11-28). Other activations, biases and fp16
take what these take. ``kernels_sm90/README.md`` says what came of it.

Tiles that fit are taken where they are ahead with uniform routing and not behind with a skewed one:
of single CTAs, on cards where reading weights for each of them costs less than the padding.

Few rows and less than one wave are another regime, of which a sweep of 18 layers says how the
forward GEMMs do: few rows get half tiles (``_few_rows``), and for less than one wave the model is
extrapolated, as if steps took as long as among busy neighbours. Not measured: other numbers of SMs,
and the backward GEMMs there.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from kernels_sm90.tiles import BLOCK_K, pieces_alternate, supports_config
from sonic.enums import ActivationType
from sonic.runtime.limits import MAX_SPLIT_EXPERTS
from sonic.runtime.problem import (
    EpilogueKind,
    Operand,
    Problem,
    Ragged,
    Schedule,
    TileConfig,
)

_SMS = 132
_CACHE_BYTES = 40e6  # what weights can have of 50 MB of L2
_ELEMENT_BYTES = 2
_STARTED_WAVE = 0.5  # what the missing tiles of the last wave cost, beside those that are there
_DRIFT = 1.04  # what a fixed stride costs over many waves
_RAMP = 0.135  # waves, before all SMs multiply and after some have finished
_PADDED = 0.6  # how much of the padding of an output reaches memory: an exponent
_SHARPNESS = 7  # of the greater of the times for multiplying and for traffic: a norm's exponent
_KERNELS = 4  # of one GEMM, for all numbers of rows: each costs seconds when a layer is first used
_KERNELS_OF_TWINS = 3  # where others of its kind are compiled too, see _limit
_TOLERANCE = 1.025  # further kernels are not worth compiling
_ROUNDED_ROWS = 3.5  # by which the height of a tile that fits exceeds its rows: to eights
_HOPELESS = 2.0  # times the best, or more: as bad as any
_WRONG_ORDER = 1.03  # what it costs, about, to take tiles in the order of other numbers of rows
_FEW_WAVES, _MANY_WAVES = 10, 32
_FEW_ROWS = 32  # of an expert: fewer only read its weights, see _few_rows
_ROWS_OF_WIDE_HALVES = 8
_ROWS_OF_ONE_TILE = 128  # or less: there tiles that fit were up to 15% behind, 1% ahead at best
_MOST_ROWS_THAT_FIT = 640  # more have little padding
_HALF_TILE_ROWS = 40  # of an expert on average, where hardly any has more than 64
_MOST_SMS = 0.9  # of a wave: enough to read weights at full bandwidth; assumed
_FEW_TILES = _SMS // 4  # of a weight gradient
_LEAST_SPLIT_EXPERTS = 4  # fewer have large shares of the rows by themselves
_MOST_ROWS = 4096  # more count as so many; with a few experts that is up to a fifth off

_COOPERATIVE, _PINGPONG, _OVERLAPPED = Schedule.COOPERATIVE, Schedule.PINGPONG, Schedule.OVERLAPPED


class Card(NamedTuple):
    """What tells one GPU from another here."""

    bytes_per_microsecond: float  # from and to memory
    drifts: bool  # what SMs that drift apart read again takes longer than multiplying
    # Times over those on an H200, where a tile takes its two costs: of CTAs that share weights, and
    # of gathers for two tiles at a time.
    pairs: float = 1.0
    gathers_by_turns: float = 1.0


H200 = Card(4.4e6, drifts=False)
# Also of any other Hopper card: a counter costs less than drifting where there is no need for it.
H100 = Card(3.2e6, drifts=True, pairs=0.96, gathers_by_turns=1.05)
CARDS = {"H100": H100, "H200": H200}


class _Size(NamedTuple):
    """What tiles are chosen for; ``n`` and ``k`` as for :func:`default_config`."""

    rows: int  # of an expert
    n: int
    k: int
    experts: int
    card: Card = H200


class _Tiling(NamedTuple):
    """A tiling, in whatever order, and its two costs in microseconds."""

    tile_m: int
    tile_n: int
    cluster_m: int
    schedule: Schedule
    epilogue_stages: int
    step: float  # of the main loop: BLOCK_K of the reduction
    rest: float  # of a tile: its start, and of its epilogue what nothing hides
    # Of tiles as high as their expert needs, for which ``step`` and ``rest`` are those of a full
    # one: the share of ``step`` that all heights have.
    fixed: float | None = None

    @property
    def fits(self) -> bool:
        return self.fixed is not None

    def config(self, order: _Order) -> TileConfig:
        return TileConfig(
            self.tile_m,
            self.tile_n,
            self.cluster_m,
            1,
            self.schedule,
            self.epilogue_stages,
            *order,
            swap_ab=self.fits,
        )


class _Order(NamedTuple):
    """How CTAs come to their tiles."""

    along_m: bool  # neighbours share weights; else they share rows
    dynamic: bool  # from a counter; else with a fixed stride


_FIXED_ALONG_N = _Order(along_m=False, dynamic=False)
_COUNTED_ALONG_M = _Order(along_m=True, dynamic=True)

# The GEMMs of a layer, as ``sonic.runtime.problem`` names them. Tiles of ragged rows have 128 of
# them, or as many as their expert needs.
_UP = (
    _Tiling(128, 256, 1, _OVERLAPPED, 1, step=0.803, rest=2.04),
    _Tiling(128, 192, 1, _OVERLAPPED, 1, step=0.647, rest=0.98),
    _Tiling(128, 128, 1, _OVERLAPPED, 1, step=0.462, rest=0.76),
    _Tiling(128, 256, 2, _OVERLAPPED, 1, step=0.769, rest=0.90),
)
# Where SMs are idle there is no next tile to hide an epilogue behind, and a copy only costs: of the
# time of 128x128 overlapped this took 0.93 to 0.95 in three such layers.
_UP_ALONE = _Tiling(128, 128, 1, _COOPERATIVE, 2, step=0.432, rest=0.71)
_DOWN = (
    _Tiling(128, 256, 1, _OVERLAPPED, 1, step=0.696, rest=1.39),
    _Tiling(128, 192, 1, _PINGPONG, 2, step=0.553, rest=0.66),
    _Tiling(128, 128, 1, _PINGPONG, 2, step=0.369, rest=0.87),
    _Tiling(128, 192, 2, _PINGPONG, 2, step=0.500, rest=0.55),
    _Tiling(128, 192, 2, _OVERLAPPED, 1, step=0.480, rest=1.10),
    _Tiling(160, 128, 1, _PINGPONG, 1, step=0.395, rest=2.10, fixed=0.97),
)
# Over few waves it was 3 to 11% behind 128x128 ping-pong in four layers of few experts.
_DOWN_OF_MANY_WAVES = _Tiling(128, 128, 1, _OVERLAPPED, 1, step=0.345, rest=1.93)
_DOWN_BACKWARD = (
    _Tiling(128, 256, 1, _OVERLAPPED, 3, step=0.931, rest=1.32),
    _Tiling(128, 192, 1, _OVERLAPPED, 3, step=0.767, rest=0.71),
    _Tiling(128, 128, 1, _OVERLAPPED, 3, step=0.537, rest=0.85),
    _Tiling(128, 256, 2, _OVERLAPPED, 3, step=0.874, rest=0.71),
    _Tiling(128, 128, 2, _OVERLAPPED, 3, step=0.505, rest=1.09),
)
_UP_BACKWARD = (
    _Tiling(128, 256, 1, _OVERLAPPED, 1, step=0.736, rest=1.88),
    _Tiling(128, 192, 1, _PINGPONG, 2, step=0.585, rest=0.92),
    _Tiling(128, 128, 1, _PINGPONG, 2, step=0.385, rest=1.60),
    _Tiling(128, 256, 2, _OVERLAPPED, 1, step=0.767, rest=1.05),
    _Tiling(128, 128, 2, _PINGPONG, 2, step=0.353, rest=1.12),
    _Tiling(176, 256, 1, _COOPERATIVE, 1, step=1.052, rest=5.31, fixed=0.19),
)
_DOWN_WEIGHT = (
    _Tiling(128, 256, 1, _OVERLAPPED, 1, step=0.873, rest=1.03),
    _Tiling(128, 192, 1, _PINGPONG, 2, step=0.675, rest=0.46),
    _Tiling(256, 128, 1, _OVERLAPPED, 1, step=0.956, rest=0.72),
)
_UP_WEIGHT = (
    _Tiling(128, 256, 1, _OVERLAPPED, 1, step=0.754, rest=1.19),
    _Tiling(128, 192, 1, _PINGPONG, 2, step=0.589, rest=0.48),
    _Tiling(256, 128, 1, _OVERLAPPED, 1, step=0.782, rest=0.97),
)
# Added to float32, a tile is not copied, as a copy would round it: cooperative schedules show their
# epilogues. Not in the sweep: what earlier runs of shapes A to F said.
_DOWN_WEIGHT_ADDED = (
    _Tiling(128, 192, 1, _PINGPONG, 1, step=0.60, rest=0.38),
    _Tiling(128, 256, 2, _COOPERATIVE, 2, step=0.74, rest=1.4),
    _Tiling(256, 128, 1, _COOPERATIVE, 1, step=0.80, rest=1.5),
)
_UP_WEIGHT_ADDED = (
    _Tiling(128, 192, 1, _PINGPONG, 1, step=0.60, rest=0.38),
    _Tiling(256, 128, 1, _COOPERATIVE, 1, step=0.84, rest=0.53),
)


def _tilings(problem: Problem) -> tuple[_Tiling, ...]:
    if problem.ragged is Ragged.REDUCTION:
        added = problem.epilogue is EpilogueKind.ACCUMULATE
        if problem.gather is Operand.B:
            return _UP_WEIGHT_ADDED if added else _UP_WEIGHT
        return _DOWN_WEIGHT_ADDED if added else _DOWN_WEIGHT
    if problem.epilogue is EpilogueKind.LINEAR:
        return _UP_BACKWARD if problem.transposed_weight else (*_DOWN, _DOWN_OF_MANY_WAVES)
    return _UP if problem.epilogue is EpilogueKind.ACTIVATION else _DOWN_BACKWARD


@functools.lru_cache(maxsize=4096)
def _expected_tiles(rows: int, tile: int) -> float:
    """Of an expert that gets ``rows`` on average: the mean of ``ceil(X / tile)``.

    ``X``, a sum of many rare events, is about normal with the variance ``rows``.
    """
    deviation = math.sqrt(rows)
    full = max(math.ceil((rows - 4 * deviation - 0.5) / tile), 0)  # surely reached
    expected, reached = float(full), 1.0
    while reached > 1e-4:
        reached = 0.5 * math.erfc((full * tile + 0.5 - rows) / (deviation * math.sqrt(2)))
        expected += reached
        full += 1
    return expected


class _Grid(NamedTuple):
    """The tiles of a GEMM, on average."""

    along_m: float  # of an expert
    along_n: int
    steps: float  # of a tile's main loop
    waves: float
    stored: float  # share of the tiles that hold output: a cluster may have an idle CTA
    filled: float  # rows of a tile that fits its expert, over those of a full one
    padding: float  # area of the tiles over that of the output, as far as extents are known

    @classmethod
    def of(cls, problem: Problem, tiling: _Tiling, size: _Size) -> _Grid:
        along_n = -(-size.n // tiling.tile_n)
        padding = along_n * tiling.tile_n / size.n
        filled = 1.0
        if problem.ragged is Ragged.REDUCTION:
            along_m = float(-(-size.k // (tiling.tile_m * tiling.cluster_m)) * tiling.cluster_m)
            padding *= along_m * tiling.tile_m / size.k
            steps, stored = _expected_tiles(size.rows, BLOCK_K), 1.0
        else:
            clusters = _expected_tiles(size.rows, tiling.tile_m * tiling.cluster_m)
            along_m = clusters * tiling.cluster_m
            steps = float(-(-size.k // BLOCK_K))
            stored = _expected_tiles(size.rows, tiling.tile_m) / along_m
            if tiling.fits:
                stored = 1.0
                filled = min((size.rows / along_m + _ROUNDED_ROWS) / tiling.tile_m, 1.0)
        waves = size.experts * along_m * along_n / _SMS
        return cls(along_m, along_n, steps, waves, stored, filled, padding)


def _traffic(problem: Problem, size: _Size) -> float:
    """Bytes that must come from memory or go there, each once."""
    gated = problem.activation is not None and problem.activation.is_gated
    weights, rows = float(size.experts * size.n * size.k), size.experts * size.rows
    if problem.ragged is Ragged.ROWS:
        weights *= _expected_tiles(size.rows, 2 * _MOST_ROWS)  # of experts with any row
    outputs = 1.0
    if problem.epilogue is EpilogueKind.ACTIVATION:
        outputs = 0.5 if gated else 1.0
        outputs += problem.store_preact
    elif problem.epilogue is EpilogueKind.ACTIVATION_GRAD:
        outputs = 5.0 if gated else 3.0  # h, dh and a'
    elif problem.epilogue is EpilogueKind.ACCUMULATE:
        weights *= 4  # read and written in float32
    return _ELEMENT_BYTES * (weights + rows * (size.k + size.n * outputs))


def _microseconds(
    problem: Problem, tiling: _Tiling, order: _Order, size: _Size, grid: _Grid
) -> float:
    begun = max(grid.waves, 1.0)  # less than a wave takes as long as its tiles
    waves = begun + _STARTED_WAVE * (math.ceil(begun) - begun) + _RAMP
    fixed = 1.0 if tiling.fixed is None else tiling.fixed
    step = tiling.step * (fixed + (1.0 - fixed) * grid.filled)
    rest = tiling.rest * grid.stored * grid.filled
    multiplying = waves * (grid.steps * step + rest)
    if tiling.cluster_m > 1:
        multiplying *= size.card.pairs
    if problem.gather is not None and tiling.schedule is _PINGPONG:
        multiplying *= size.card.gathers_by_turns
    moving = _traffic(problem, size) / size.card.bytes_per_microsecond
    moving *= waves / begun * grid.padding**_PADDED
    if problem.ragged is Ragged.ROWS and not order.dynamic and grid.waves >= _MANY_WAVES:
        waves_drift = _DRIFT
    else:
        waves_drift = 1.0
    norm = multiplying**_SHARPNESS + moving**_SHARPNESS
    return waves_drift * norm ** (1 / _SHARPNESS)


def _order(problem: Problem, tiling: _Tiling, size: _Size, grid: _Grid) -> _Order:
    """A counter keeps SMs together that a fixed stride lets drift apart: where experts have so few
    rows that their last, partial row tile counts, where the weights at hand exceed the cache, where
    the math warpgroups of a CTA are apart themselves, or wherever there are many tiles on a card
    that drifting costs more.
    """
    if problem.ragged is Ragged.REDUCTION:
        return _order_of_weight_gradient(problem, tiling, size, grid)
    if tiling.cluster_m > 1 or grid.waves < _FEW_WAVES:
        return _FIXED_ALONG_N
    if tiling.fits or size.card.drifts:
        return _COUNTED_ALONG_M
    tiles = grid.along_m * grid.along_n  # of an expert
    weights = _ELEMENT_BYTES * size.n * size.k * max(1.0, _SMS / tiles)  # that one wave reads
    exceed = weights > _CACHE_BYTES  # then they are best read by neighbours, at once
    many_waves = grid.waves >= _MANY_WAVES
    if problem.epilogue is EpilogueKind.ACTIVATION:
        few_or_most = not 1024 <= size.rows < _MOST_ROWS
        return _Order(exceed, dynamic=few_or_most or not many_waves)
    if problem.epilogue is EpilogueKind.ACTIVATION_GRAD:
        if pieces_alternate(grid.steps):
            far_exceed = weights > 1.5 * _CACHE_BYTES and grid.along_m > 1.01
            return _Order(far_exceed, dynamic=True)
        few_tiles = size.rows < 450 and tiles < 24  # of one expert: no share of a wave
        shared = exceed and 1.01 < grid.along_m < 3.3
        return _Order(shared, dynamic=True) if few_tiles else _FIXED_ALONG_N
    if not (many_waves or weights > _CACHE_BYTES / (1 if problem.transposed_weight else 3)):
        return _FIXED_ALONG_N
    return _order_of_linear(problem, tiling, size, grid, weights)


def _order_of_linear(
    problem: Problem, tiling: _Tiling, size: _Size, grid: _Grid, weights: float
) -> _Order:
    """Of the down-projection and of dX, whose rows lie in order: no gather slows their loads."""
    pingpong = tiling.schedule is _PINGPONG
    most = _CACHE_BYTES if problem.transposed_weight else _CACHE_BYTES / 2
    counted = _Order(along_m=pingpong or weights > most, dynamic=True)
    if problem.transposed_weight:
        fixed = size.k <= 512 if pingpong else size.rows >= 1024
        return _FIXED_ALONG_N if fixed else counted
    if weights > _CACHE_BYTES / 3:
        return counted if grid.along_m > 1.01 else counted._replace(along_m=False)
    if size.rows >= 1000:
        return _Order(along_m=False, dynamic=size.rows >= _MOST_ROWS)
    # The tiles of one expert fill nearly a wave: they hardly drift apart.
    fill = grid.along_m * grid.along_n >= 90
    return _Order(along_m=True, dynamic=False) if fill else counted


def _order_of_weight_gradient(
    problem: Problem, tiling: _Tiling, size: _Size, grid: _Grid
) -> _Order:
    """Tiles of hardly more than one step only store: there a counter spreads the stores."""
    if problem.epilogue is EpilogueKind.ACCUMULATE:
        return _Order(along_m=True, dynamic=False)  # others were not tried
    stores_only = grid.steps < (1.7 if tiling.tile_m == 256 else 1.1)
    if stores_only and grid.waves >= _FEW_WAVES:
        return _Order(along_m=False, dynamic=True)
    if size.card.drifts and grid.waves >= _FEW_WAVES and not 128 <= size.rows < 512:
        return _COUNTED_ALONG_M
    if problem.gather is not Operand.B:
        return _Order(along_m=True, dynamic=False)
    output = _ELEMENT_BYTES * size.n * size.k  # of an expert
    large = output > (_CACHE_BYTES / 3 if size.rows >= 1024 else _CACHE_BYTES + 10e6)
    pingpong = tiling.schedule is _PINGPONG
    return _Order(along_m=tiling.tile_n == 256 or (pingpong and large), dynamic=False)


def _only_reads(problem: Problem, size: _Size) -> bool:
    """Whether it is no concern of the model: few rows of an expert, and the widest tiles keep most
    SMs busy."""
    if problem.ragged is Ragged.REDUCTION:
        return False
    if problem.is_forward:
        return size.rows < _HALF_TILE_ROWS
    if size.rows >= _FEW_ROWS:
        return False
    return size.experts * -(-size.n // 256) >= _MOST_SMS * _SMS


def _fills_a_wave(problem: Problem, size: _Size) -> bool:
    """At least with narrow tiles; else SMs are idle, fewer of them with narrower tiles."""
    if problem.ragged is Ragged.REDUCTION:
        return True
    if size.rows < _FEW_ROWS:
        return False
    return size.experts * _expected_tiles(size.rows, 128) * -(-size.n // 128) >= _SMS


def _few_rows(problem: Problem, size: _Size) -> TileConfig:
    """Tiles of experts whose weights are read for hardly any rows. Memory decides, and no order of
    tiles. Rows that fit half a tile get half a tile: less shared memory for them is more stages of
    weights on their way. In gradients, the widest tiles that cover the columns, by rates that runs
    with 1 to 16 rows confirmed.
    """
    if problem.is_forward:
        return _half_tiles(problem, size)
    gated = problem.activation is not None and problem.activation.is_gated
    if problem.epilogue is EpilogueKind.LINEAR:
        # A short reduction hides little of an epilogue: there a second tile in flight hides more.
        wide, middle = (0.93, 1.0) if size.k <= 512 else (1.0, 0.95)
        rates = [
            (TileConfig(128, 256, 1, 1, _OVERLAPPED, 1, *_FIXED_ALONG_N), wide),
            (TileConfig(128, 192, 1, 1, _PINGPONG, 2, *_FIXED_ALONG_N), middle),
            (TileConfig(128, 128, 1, 1, _PINGPONG, 2, *_FIXED_ALONG_N), 0.85),
        ]
    else:
        narrow = TileConfig(128, 128, 1, 1, _PINGPONG, 2, *_FIXED_ALONG_N)
        if not gated or problem.activation is ActivationType.SWIGLU_OAI:
            # Ungated, a thread has twice the accumulator columns of a chunk live. The gradients of
            # gelu and of a clamped swiglu spill registers where a warpgroup holds a whole tile.
            narrow = TileConfig(128, 128, 1, 1, _COOPERATIVE, 4, *_FIXED_ALONG_N)
        rates = [
            (TileConfig(128, 256, 1, 1, _OVERLAPPED, 3, *_FIXED_ALONG_N), 1.0),
            (TileConfig(128, 192, 1, 1, _OVERLAPPED, 3, *_FIXED_ALONG_N), 0.87),
            (narrow, 0.8),
        ]

    def rate(entry: tuple[TileConfig, float]) -> float:
        config, full = entry
        return full * size.n / (-(-size.n // config.tile_n) * config.tile_n)

    return max(rates, key=rate)[0]


def _half_tiles(problem: Problem, size: _Size) -> TileConfig:
    """Narrow ones, but in inference wide ones of the many columns of an up-projection: 4% faster
    with 16 rows of 128 experts. With fewer rows than eight some experts may have none, and with
    them SMs: one token of these took 10% more.
    """
    narrow = TileConfig(64, 128, 1, 1, _PINGPONG, 2, *_FIXED_ALONG_N)
    inference = problem.epilogue is EpilogueKind.ACTIVATION and problem.is_of_inference
    many = size.n % 256 == 0 and size.experts * size.n // 256 >= 2 * _SMS
    wide = inference and many and size.rows >= _ROWS_OF_WIDE_HALVES
    return replace(narrow, tile_n=256) if wide else narrow


def _class_of_rows(rows: int) -> int:
    """Sixteen numbers of rows an octave stand for all."""
    rows = min(max(rows, 1), _MOST_ROWS)
    shift = max(rows.bit_length() - 5, 0)
    return (rows + (1 << shift >> 1)) >> shift << shift


_CLASSES_OF_ROWS = sorted({_class_of_rows(rows) for rows in range(1, _MOST_ROWS + 1)})


class _Plan(NamedTuple):
    """A tiling in an order of tiles: what a kernel is compiled for."""

    tiling: _Tiling
    order: _Order


def _rivals(problem: Problem, size: _Size) -> list[_Tiling]:
    """The tilings that may be the best of a size."""
    tilings = _tilings(problem)
    if not _fills_a_wave(problem, size):
        # A cluster idles CTAs too, and a tile wider than the columns multiplies for nothing.
        least = min(tiling.tile_n for tiling in tilings)
        widest = max(size.n, least)
        alone = [_UP_ALONE] if problem.epilogue is EpilogueKind.ACTIVATION else []
        return alone + [t for t in tilings if t.cluster_m == 1 and t.tile_n <= widest]
    down = problem.epilogue is EpilogueKind.LINEAR and problem.is_forward
    most = 300 if down else 1024
    if problem.ragged is Ragged.ROWS and size.rows >= most:
        tilings = tuple(t for t in tilings if t.cluster_m == 1)  # many row tiles share as it is
    fits = _ROWS_OF_ONE_TILE < size.rows <= _MOST_ROWS_THAT_FIT and not size.card.drifts
    if not fits:
        tilings = tuple(t for t in tilings if not t.fits)
    return list(tilings)


def _times(problem: Problem, size: _Size) -> dict[_Tiling, tuple[_Order, float]]:
    """Of each tiling the order of tiles that suits it, and its microseconds then."""
    times = {}
    for tiling in _rivals(problem, size):
        grid = _Grid.of(problem, tiling, size)
        if (tiling is _DOWN_OF_MANY_WAVES or tiling.fits) and grid.waves < _FEW_WAVES:
            continue
        order = _order(problem, tiling, size, grid)
        times[tiling] = order, _microseconds(problem, tiling, order, size, grid)
    return times


def _ratio(times: dict[_Tiling, tuple[_Order, float]], plan: _Plan) -> float:
    """Time of ``plan`` over the least of all."""
    if plan.tiling not in times:
        return math.inf
    order, time = times[plan.tiling]
    if order != plan.order:
        time *= _WRONG_ORDER
    return time / min(t for _, t in times.values())


def _limit(problem: Problem) -> int:
    """Kernels to compile: dX comes in slices of columns too, an up-projection for inference beside
    one for training, and weight gradients written beside added ones.
    """
    rows = problem.ragged is Ragged.ROWS
    sliced = problem.epilogue is EpilogueKind.LINEAR and problem.transposed_weight
    inference = problem.epilogue is EpilogueKind.ACTIVATION and problem.is_of_inference
    return _KERNELS if rows and not sliced and not inference else _KERNELS_OF_TWINS


class _Cover:
    """A few plans that together serve many sizes."""

    def __init__(self, problem: Problem, sizes: list[_Size], plans: Iterable[_Plan] = ()):
        self._times = [_times(problem, size) for size in sizes]
        self.plans = list(plans)

    def extend(self, count: int) -> None:
        """With the plan that helps most, ``count`` times at most."""
        rivals = (_Plan(t, order) for row in self._times for t, (order, _) in row.items())
        ratios = {plan: self._ratios(plan) for plan in dict.fromkeys((*self.plans, *rivals))}
        best = [_HOPELESS] * len(self._times)
        for plan in self.plans:
            best = list(map(min, best, ratios[plan]))
        for _ in range(count):
            if max(best, default=0.0) <= _TOLERANCE:
                return
            self.plans.append(min(ratios, key=lambda plan: sum(map(min, best, ratios[plan]))))
            best = list(map(min, best, ratios[self.plans[-1]]))

    def configs(self) -> list[TileConfig]:
        """For each size the best of the plans."""
        ratios = {plan: self._ratios(plan) for plan in self.plans}
        best = (min(ratios, key=lambda p: ratios[p][index]) for index in range(len(self._times)))
        return [plan.tiling.config(plan.order) for plan in best]

    def _ratios(self, plan: _Plan) -> list[float]:
        return [_ratio(row, plan) for row in self._times]


@functools.lru_cache(maxsize=1024)
def _choices(problem: Problem, n: int, k: int, experts: int, card: Card) -> dict[int, TileConfig]:
    """Tiles by class of rows: the best of the few that together serve all classes best, beside one
    for those with few rows, and one for those with idle SMs."""
    sizes = {rows: _Size(rows, n, k, experts, card) for rows in _CLASSES_OF_ROWS}
    choices = {rows: _few_rows(problem, s) for rows, s in sizes.items() if _only_reads(problem, s)}
    modelled = {rows: size for rows, size in sizes.items() if rows not in choices}
    full = {rows: s for rows, s in modelled.items() if _fills_a_wave(problem, s)}
    idle = {rows: s for rows, s in modelled.items() if rows not in full}
    cover = _Cover(problem, list(full.values()))
    cover.extend(_limit(problem))
    choices |= dict(zip(full, cover.configs(), strict=True))
    cover = _Cover(problem, list(idle.values()), cover.plans)
    cover.extend(1)
    choices |= dict(zip(idle, cover.configs(), strict=True))
    return {
        rows: replace(config, split=_is_split(problem, config, n, k, experts))
        for rows, config in choices.items()
    }


def _is_split(problem: Problem, config: TileConfig, n: int, k: int, experts: int) -> bool:
    """Whether few tiles share the rows of an expert: one with a quarter of all rows would keep
    these few SMs busy when the others have long finished."""
    if supports_config(problem, replace(config, split=True)) is not None:
        return False
    tiles = -(-k // config.tile_m) * -(-n // config.tile_n)
    return tiles <= _FEW_TILES and _LEAST_SPLIT_EXPERTS <= experts <= MAX_SPLIT_EXPERTS


def kind_of(gpu: str) -> str:
    """Which of ``CARDS`` has the tiles for ``gpu``, named as the driver does."""
    return "H200" if "H200" in gpu.split() else "H100"


def default_config(
    problem: Problem, rows_per_expert: int, n: int, k: int, experts: int, card: Card = H200
) -> TileConfig:
    """The tiles of the least expected time for this size. Pure and deterministic.

    ``n``: columns of the output. ``k``: the weight's other axis, which is the reduction for ragged
    rows and the rows of the output for a ragged reduction.
    """
    choices = _choices(problem, n, k, max(experts, 1), card)
    return choices[_class_of_rows(rows_per_expert)]


def default_configs(
    problem: Problem, n: int, k: int, experts: int, card: Card = H200
) -> list[TileConfig]:
    """Every choice of :func:`default_config` for these, whatever the rows per expert."""
    return list(dict.fromkeys(_choices(problem, n, k, max(experts, 1), card).values()))


def candidates(problem: Problem) -> list[TileConfig]:
    """What :func:`default_config` chooses from, whatever the size."""
    few = [_few_rows(problem, _Size(1, n, k, 1)) for n in (128, 192, 256) for k in (64, 1024)]
    few.append(_few_rows(problem, _Size(_ROWS_OF_WIDE_HALVES, 256, 64, 2 * _SMS)))
    if problem.ragged is Ragged.REDUCTION:
        few = []
    orders = [_Order(*flags) for flags in itertools.product((False, True), repeat=2)]
    ordered = [
        tiling.config(order)
        for tiling in _tilings(problem)
        for order in orders
        if not tiling.fits or order == _COUNTED_ALONG_M
    ]
    if problem.epilogue is EpilogueKind.ACTIVATION:
        ordered.append(_UP_ALONE.config(_FIXED_ALONG_N))
    ordered += [replace(config, split=True) for config in ordered]
    legal = [config for config in ordered if supports_config(problem, config) is None]
    return list(dict.fromkeys(few + legal))
