"""How epilogues divide their tensors into blocks and chunks. Plain data: imports no CuTeDSL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from sonic.runtime.problem import EpilogueKind, Problem

BLOCK = 8  # columns of one accumulator block
CHUNK_COLUMNS = 64  # 16-bit columns of D that go through shared memory at a time
# Where a tile C is loaded too, its slots take a main-loop stage's room at that width.
CHUNK_COLUMNS_WITH_C = 32

_Blocks = TypeVar("_Blocks", bound="EpilogueBlocks")


@dataclass(frozen=True)
class EpilogueBlocks:
    """Blocks per unit of each tensor that one epilogue reads and writes; 0 for none."""

    problem: Problem
    acc_blocks: int
    c_blocks: int
    d_blocks: int
    aux_blocks: int
    has_row_sum: bool = False

    @classmethod
    def of(cls: type[_Blocks], problem: Problem) -> _Blocks:
        """The blocks of ``problem``'s epilogue."""
        kind = problem.epilogue
        pair = 2 if problem.activation is not None and problem.activation.is_gated else 1
        if kind is EpilogueKind.ACTIVATION:
            return cls(problem, pair, 0, pair if problem.store_preact else 0, 1)
        if kind is EpilogueKind.ACTIVATION_GRAD:
            return cls(problem, 1, pair, pair, 1, has_row_sum=True)
        return cls(problem, 1, 0, 1, 0)

    @property
    def units_per_chunk(self) -> int:
        if self.accumulates:
            return CHUNK_COLUMNS // 2 // BLOCK
        widest = max(self.acc_blocks, self.c_blocks, self.d_blocks, self.aux_blocks)
        columns = CHUNK_COLUMNS_WITH_C if self.c_blocks else CHUNK_COLUMNS
        return columns // (widest * BLOCK)

    @property
    def accumulates(self) -> bool:
        return self.problem.epilogue is EpilogueKind.ACCUMULATE

    @property
    def precise(self) -> bool:
        """Whether the output keeps more bits than the fastest transcendentals give."""
        return self.problem.dtype != "bfloat16"

    def chunk_columns(self, blocks: int) -> int:
        """Columns per chunk of a tensor with ``blocks`` blocks per unit."""
        return self.units_per_chunk * blocks * BLOCK

    @property
    def acc_chunk(self) -> int:
        return self.chunk_columns(self.acc_blocks)

    @property
    def d_chunk(self) -> int:
        return self.chunk_columns(self.d_blocks)

    @property
    def aux_chunk(self) -> int:
        return self.chunk_columns(self.aux_blocks)
