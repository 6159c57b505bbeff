"""What the Hopper kernel can run, and its shared-memory plan. No GPU."""

from __future__ import annotations

from typing import Any

from sonic.device.blocks import EpilogueBlocks
from sonic.runtime.limits import KERNEL_DTYPES
from sonic.runtime.problem import (
    EpilogueKind,
    Operand,
    Problem,
    Ragged,
    Schedule,
    TileConfig,
    Unsupported,
)

WARPGROUP = 128
BLOCK_K = 64  # one 128-byte swizzle span of 16-bit elements
SHARED_MEMORY_BYTES = 232_448  # 227 KB per CTA on sm_90
_ELEMENT_BYTES = 2
_BARRIER_BYTES = 1024
_MAX_STAGES = 8
# Of tiles that fit their expert: rows that are stored at a time, and columns of a math warpgroup.
SWAP_ROWS = 16
SWAP_COLUMNS = 128
_MOST_ACCUMULATORS = 192  # of a thread
_MOST_SWAPPED_WITH_C = 160  # there the loaded values and row sums are alive too, and more spill
_STEPS_OF_TURNS = 26  # of the main loop
TILE_SLOTS = 8  # tiles taken ahead of the slowest warp, with a dynamic tile order


def pieces_alternate(k_tiles: Any) -> Any:
    """Whether the pieces of dH's epilogue come to the two math warpgroups in turns, if tiles come
    from a counter.

    They do where there are one and a half main-loop steps, or more, to each of the 16 pieces of 256
    columns, beside the last two steps: with fewer a piece is longer than what could hide it. A step
    of fewer columns is shorter, and they have fewer pieces in proportion.
    """
    return k_tiles >= _STEPS_OF_TURNS


class SharedMemoryPlan:
    """Byte offsets of everything in shared memory. The A/B ring takes what the epilogue leaves."""

    def __init__(self, problem: Problem, config: TileConfig, epilogue: EpilogueBlocks):
        self.a_bytes = config.tile_m * BLOCK_K * _ELEMENT_BYTES
        self.b_bytes = config.tile_n * BLOCK_K * _ELEMENT_BYTES
        d_element_bytes = 4 if epilogue.accumulates else _ELEMENT_BYTES
        if config.swap_ab:
            columns = SWAP_COLUMNS // epilogue.acc_blocks  # of a tensor with one block a unit
            self.d_bytes = SWAP_ROWS * columns * epilogue.d_blocks * _ELEMENT_BYTES
            self.aux_bytes = SWAP_ROWS * columns * epilogue.aux_blocks * _ELEMENT_BYTES
        else:
            rows = config.tile_m if config.schedule is Schedule.PINGPONG else config.tile_m // 2
            self.d_bytes = rows * epilogue.d_chunk * d_element_bytes
            self.aux_bytes = rows * epilogue.aux_chunk * _ELEMENT_BYTES
        self.epilogue_stages = config.epilogue_stages
        # A slot of D that also holds C is filled ahead of time; a slot of Aux is only written.
        self.aux_stages = min(self.epilogue_stages, 2)
        self.group_bytes = self.epilogue_stages * self.d_bytes + self.aux_stages * self.aux_bytes
        self.c_slots = 2 * self.epilogue_stages if epilogue.c_blocks else 0
        # Row sums of a warpgroup, by even and odd chunks, warp and row.
        self.sum_bytes = 2 * 4 * SWAP_ROWS * 4 if config.swap_ab and epilogue.has_row_sum else 0
        epilogue_bytes = 2 * (self.group_bytes + self.sum_bytes)
        free = SHARED_MEMORY_BYTES - _BARRIER_BYTES - epilogue_bytes
        self.stages = min(free // (self.a_bytes + self.b_bytes), _MAX_STAGES)
        self.full = 0
        self.empty = self.full + 8 * _MAX_STAGES
        self.c_full = self.empty + 8 * _MAX_STAGES
        self.tile_full = _BARRIER_BYTES // 2
        self.tile_empty = self.tile_full + 8 * TILE_SLOTS
        self.tile_ring = self.tile_empty + 8 * TILE_SLOTS
        self.a = _BARRIER_BYTES
        self.b = self.a + self.stages * self.a_bytes
        self.epilogue = self.b + self.stages * self.b_bytes
        self.sums = self.epilogue + 2 * self.group_bytes
        self.total_bytes = self.epilogue + epilogue_bytes


def supports(problem: Problem) -> Unsupported | None:
    """Why the kernel cannot run ``problem``, or ``None``."""
    if problem.dtype not in KERNEL_DTYPES:
        return Unsupported(
            f"dtype {problem.dtype}: the Hopper kernels multiply {' and '.join(KERNEL_DTYPES)}",
            'cast the tensors, or pass impl="reference"',
        )
    rows = problem.ragged is Ragged.ROWS
    if rows and problem.gather is Operand.B:
        return Unsupported("a gathered weight", "gather the activations (operand a)")
    if rows and problem.epilogue is EpilogueKind.ACCUMULATE:
        return Unsupported("accumulation into ragged rows", "accumulate weight gradients only")
    if not rows and problem.epilogue not in (EpilogueKind.LINEAR, EpilogueKind.ACCUMULATE):
        return Unsupported(
            f"epilogue {problem.epilogue.value} of a ragged reduction",
            "use the linear or the accumulate epilogue",
        )
    if problem.has_bias and (not rows or problem.transposed_weight):
        return Unsupported("a bias of a transposed weight or a weight gradient", "add it outside")
    return None


def supports_config(problem: Problem, config: TileConfig) -> Unsupported | None:
    """Why ``problem`` cannot run with these tiles, or ``None``."""
    epilogue = EpilogueBlocks.of(problem)
    remedy = "use default_config"
    if config.swap_ab:
        refusal = _refuse_swapped(problem, config, remedy)
    else:
        refusal = _refuse_tile(problem, config, epilogue, remedy)
    return (
        refusal
        or _refuse_order(problem, config, remedy)
        or _refuse_sizes(problem, config, epilogue, remedy)
    )


def _refuse_tile(
    problem: Problem, config: TileConfig, epilogue: EpilogueBlocks, remedy: str
) -> Unsupported | None:
    """What only holds for tiles of which the rows are wgmma's M."""
    pingpong = config.schedule is Schedule.PINGPONG
    rows_unit = 64 if pingpong else 128
    columns_unit = epilogue.acc_chunk
    if problem.ragged is Ragged.REDUCTION or problem.transposed_weight:
        columns_unit = max(columns_unit, BLOCK_K)
    if config.tile_m % rows_unit or config.tile_m > 256:
        return Unsupported(
            f"tile_m={config.tile_m}: a multiple of {rows_unit} up to 256 with a "
            f"{config.schedule.value} schedule",
            remedy,
        )
    if config.tile_n % columns_unit or not 0 < config.tile_n <= 256:
        return Unsupported(
            f"tile_n={config.tile_n}: a multiple of {columns_unit} up to 256 here", remedy
        )
    if config.schedule is Schedule.OVERLAPPED:
        if problem.epilogue is EpilogueKind.ACCUMULATE:
            return Unsupported("an overlapped epilogue that accumulates: copies round", remedy)
        if config.tile_m * config.tile_n > 128 * 256:
            return Unsupported(
                f"{config.tile_m}x{config.tile_n} with an overlapped epilogue: at most 128x256 "
                "elements, of which a copy fits the registers",
                remedy,
            )
        # Of C all slots but one are filled ahead, with chunks of one tile.
        most = config.tile_n // epilogue.acc_chunk + 1
        if epilogue.c_blocks and config.epilogue_stages > most:
            return Unsupported(
                f"epilogue_stages={config.epilogue_stages} with an overlapped epilogue that loads "
                f"a tile: at most {most} for tile_n={config.tile_n}",
                remedy,
            )
    return None


def _refuse_order(problem: Problem, config: TileConfig, remedy: str) -> Unsupported | None:
    """What cannot be handed out so, or shared."""
    stored = problem.ragged is Ragged.REDUCTION and problem.epilogue is EpilogueKind.LINEAR
    if config.split and not stored:
        return Unsupported("a split reduction of anything but a stored weight gradient", remedy)
    if config.dynamic and config.cluster_size > 1:
        return Unsupported("a dynamic tile order of clusters: only single CTAs take tiles", remedy)
    if (config.cluster_m, config.cluster_n) not in ((1, 1), (2, 1), (1, 2)):
        return Unsupported(
            f"cluster {config.cluster_m}x{config.cluster_n}: 1x1, 2x1 and 1x2 are built", remedy
        )
    shared = Operand.B if config.cluster_m == 2 else Operand.A
    if config.cluster_size == 2 and problem.gather is shared:
        return Unsupported("multicast of the gathered operand: share the other one", remedy)
    return None


def _refuse_swapped(problem: Problem, config: TileConfig, remedy: str) -> Unsupported | None:
    """What only holds for tiles of which the rows are wgmma's N."""
    if problem.ragged is not Ragged.ROWS:
        return Unsupported("swap_ab of a weight gradient, whose tiles have no ragged rows", remedy)
    if config.schedule is Schedule.OVERLAPPED:
        return Unsupported("swap_ab with an overlapped schedule: copies are not built", remedy)
    if config.cluster_n > 1:
        return Unsupported("swap_ab with cluster_n=2: 1x1 and 2x1 are built", remedy)
    columns = SWAP_COLUMNS * (1 if config.schedule is Schedule.PINGPONG else 2)
    if config.tile_n != columns:
        return Unsupported(
            f"tile_n={config.tile_n} with swap_ab and a {config.schedule.value} schedule: "
            f"{columns} is built",
            remedy,
        )
    if config.tile_m % SWAP_ROWS or not 0 < config.tile_m <= 256:
        return Unsupported(
            f"tile_m={config.tile_m}: a multiple of {SWAP_ROWS} up to 256 with swap_ab", remedy
        )
    return None


def _refuse_sizes(
    problem: Problem, config: TileConfig, epilogue: EpilogueBlocks, remedy: str
) -> Unsupported | None:
    """What registers and shared memory do not hold."""
    pingpong = config.schedule is Schedule.PINGPONG
    accumulators = config.tile_m * config.tile_n // WARPGROUP // (1 if pingpong else 2)
    most = _MOST_SWAPPED_WITH_C if config.swap_ab and epilogue.c_blocks else _MOST_ACCUMULATORS
    if accumulators > most:
        return Unsupported(f"{accumulators} accumulators per thread: at most {most}", remedy)
    if config.epilogue_stages < (2 if epilogue.c_blocks else 1):
        return Unsupported(
            f"epilogue_stages={config.epilogue_stages}: at least 2 where a tile is loaded, else 1",
            remedy,
        )
    plan = SharedMemoryPlan(problem, config, epilogue)
    if plan.stages < 2:
        return Unsupported(
            f"{plan.stages} main-loop stages beside {config.epilogue_stages} epilogue stages in "
            f"{SHARED_MEMORY_BYTES} bytes of shared memory: at least 2",
            remedy,
        )
    return None
