"""The tiles that a search for the fastest ones tries. What it may choose from by itself, without a
search, is in ``choice.candidates``."""

from __future__ import annotations

import itertools
from dataclasses import replace

from kernels_sm90.tiles import SWAP_COLUMNS, SharedMemoryPlan, supports_config
from sonic.device.blocks import EpilogueBlocks
from sonic.runtime.problem import Problem, Ragged, Schedule, TileConfig

_TILE_M = (64, 128, 192, 256)
_MOST_ROWS = (128, 160, 176)  # of tiles that fit their expert
_MOST_ROWS_WITH_C = (128, 144)
_TILE_N = (128, 192, 256)
_CLUSTER = (1, 2)
_LEAST_ELEMENTS = 128 * 128  # smaller tiles load more than they multiply


def search_space(problem: Problem) -> list[TileConfig]:
    """Every legal tiling of ``problem`` but for those that others make superfluous:

    * tiles of fewer than 128x128 elements;
    * a cooperative schedule where an overlapped one is legal, which also hides its stores;
    * numbers of epilogue stages beside those of ``_epilogue_stages``.

    Of tiles that fit the rows of an expert only those of :func:`swapped_space`.
    """
    space = []
    for m, n, schedule in itertools.product(_TILE_M, _TILE_N, Schedule):
        if m * n < _LEAST_ELEMENTS:
            continue
        for stages in _epilogue_stages(problem, schedule):
            plain = TileConfig(m, n, 1, 1, schedule, stages)
            if schedule is Schedule.COOPERATIVE and _is_legal_overlapped(problem, plain):
                continue
            for cluster_m, cluster_n in itertools.product(_CLUSTER, _CLUSTER):
                for along_m, dynamic in itertools.product((False, True), repeat=2):
                    config = TileConfig(
                        m, n, cluster_m, cluster_n, schedule, stages, along_m, dynamic
                    )
                    if supports_config(problem, config) is None:
                        space.append(config)
    return space + swapped_space(problem)


def swapped_space(problem: Problem) -> list[TileConfig]:
    """Tilings of ragged rows that fit the rows of an expert, in two orders each.

    With as many epilogue stages as cost no stage of the main loop, and with two if that is one.
    """
    space = []
    most_rows = _MOST_ROWS_WITH_C if EpilogueBlocks.of(problem).c_blocks else _MOST_ROWS
    schedules = ((Schedule.COOPERATIVE, 2), (Schedule.PINGPONG, 1))
    for m, cluster_m, (schedule, groups) in itertools.product(most_rows, _CLUSTER, schedules):
        n = groups * SWAP_COLUMNS
        slots = [
            TileConfig(m, n, cluster_m, 1, schedule, stages, dynamic=cluster_m == 1, swap_ab=True)
            for stages in (1, 2, 3)
        ]
        slots = [config for config in slots if supports_config(problem, config) is None]
        if slots:
            best = max(slots, key=lambda c: (_main_loop_stages(problem, c), c.epilogue_stages))
            kept = [
                c
                for c in slots
                if c == best or best.epilogue_stages == 1 and c.epilogue_stages == 2
            ]
            space += [replace(c, raster_along_m=along) for c in kept for along in (False, True)]
    return space


def _main_loop_stages(problem: Problem, config: TileConfig) -> int:
    return SharedMemoryPlan(problem, config, EpilogueBlocks.of(problem)).stages


def _is_legal_overlapped(problem: Problem, config: TileConfig) -> bool:
    stages = _epilogue_stages(problem, Schedule.OVERLAPPED)[0]
    overlapped = TileConfig(config.tile_m, config.tile_n, 1, 1, Schedule.OVERLAPPED, stages)
    return supports_config(problem, overlapped) is None


def _epilogue_stages(problem: Problem, schedule: Schedule) -> tuple[int, ...]:
    """Slots of the output in shared memory; what they leave goes to the main loop."""
    if EpilogueBlocks.of(problem).c_blocks:
        return (3, 4) if schedule is Schedule.OVERLAPPED else (2,)
    if schedule is Schedule.OVERLAPPED:
        return (1,)
    return (1, 2) if problem.ragged is Ragged.REDUCTION else (2,)
