"""What the Hopper kernel can run, with which tiles, and how its shared memory is divided. No GPU, no CuTeDSL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sonic.runtime.problem import (
    EpilogueKind,
    Operand,
    Problem,
    Ragged,
    Schedule,
    TileConfig,
    Unsupported,
)

if TYPE_CHECKING:
    from sonic.device.epilogue import Epilogue

WARPGROUP = 128
BLOCK_K = 64  # one 128-byte swizzle span of 16-bit elements
SHARED_MEMORY_BYTES = 232_448  # 227 KB per CTA on sm_90
_ELEMENT_BYTES = 2
_BARRIER_BYTES = 1024
_MAX_STAGES = 8


class SharedMemoryPlan:
    """Byte offsets of everything in shared memory. The A/B ring takes what the epilogue leaves."""

    def __init__(self, problem: Problem, config: TileConfig, epilogue: Epilogue):
        rows = (
            config.tile_m if config.schedule is Schedule.PINGPONG else config.tile_m // 2
        )  # per warpgroup
        self.a_bytes = config.tile_m * BLOCK_K * _ELEMENT_BYTES
        self.b_bytes = config.tile_n * BLOCK_K * _ELEMENT_BYTES
        d_element_bytes = 4 if epilogue.accumulates else _ELEMENT_BYTES
        self.d_bytes = rows * epilogue.d_chunk * d_element_bytes
        self.aux_bytes = rows * epilogue.aux_chunk * _ELEMENT_BYTES
        self.epilogue_stages = config.epilogue_stages
        self.group_bytes = self.epilogue_stages * (self.d_bytes + self.aux_bytes)
        self.c_slots = 2 * self.epilogue_stages if epilogue.c_blocks else 0
        epilogue_bytes = 2 * self.group_bytes
        free = SHARED_MEMORY_BYTES - _BARRIER_BYTES - epilogue_bytes
        self.stages = min(free // (self.a_bytes + self.b_bytes), _MAX_STAGES)
        self.full = 0
        self.empty = self.full + 8 * _MAX_STAGES
        self.c_full = self.empty + 8 * _MAX_STAGES
        self.a = _BARRIER_BYTES
        self.b = self.a + self.stages * self.a_bytes
        self.epilogue = self.b + self.stages * self.b_bytes
        self.total_bytes = self.epilogue + epilogue_bytes


def supports(problem: Problem) -> Unsupported | None:
    """Why the kernel cannot run ``problem``, or ``None``. The only statement of these constraints."""
    if problem.dtype not in ("bfloat16", "float16"):
        return Unsupported(
            f"dtype {problem.dtype}: the Hopper kernels multiply bfloat16 and float16",
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


def default_config(problem: Problem, rows_per_expert: int, n: int, k: int) -> TileConfig:
    """Tiles for a problem of about this size per expert. Pure and deterministic."""
    pingpong, cooperative = Schedule.PINGPONG, Schedule.COOPERATIVE
    if problem.ragged is Ragged.REDUCTION:
        if problem.gather is Operand.B:
            return TileConfig(256, 128, 1, 2, cooperative, epilogue_stages=1, raster_along_m=True)
        return TileConfig(128, 256, 2, 1, cooperative, epilogue_stages=2, raster_along_m=False)
    if problem.epilogue is EpilogueKind.ACTIVATION_GRAD:
        return TileConfig(128, 128, 1, 1, cooperative, epilogue_stages=4)
    if problem.epilogue is EpilogueKind.ACTIVATION:
        return TileConfig(128, 256, 1, 1, cooperative, epilogue_stages=1)
    if k >= 1024:
        return TileConfig(128, 256, 1, 1, cooperative, epilogue_stages=2)
    return TileConfig(128, 128, 1, 1, pingpong, epilogue_stages=2)
