"""Implementation package of sonic; not an API. Hopper kernels: wgmma, TMA, cp.async."""

from __future__ import annotations

import functools
from typing import Any

from kernels_sm90 import choice, search, tiles
from sonic.runtime.problem import Arch, Problem, TileConfig, Unsupported


class _Backend:
    arch = Arch.SM90
    gpus = tuple(choice.CARDS)

    def __init__(self, gpu: str) -> None:
        self.gpu = gpu
        self._card = choice.CARDS[gpu]

    def for_gpu(self, gpu: str) -> _Backend:
        return _for_kind(choice.kind_of(gpu))

    def supports(self, problem: Problem) -> Unsupported | None:
        return tiles.supports(problem)

    def supports_config(self, problem: Problem, config: TileConfig) -> Unsupported | None:
        return tiles.supports_config(problem, config)

    def default_config(
        self, problem: Problem, rows_per_expert: int, n: int, k: int, experts: int
    ) -> TileConfig:
        return choice.default_config(problem, rows_per_expert, n, k, experts, self._card)

    def default_configs(self, problem: Problem, n: int, k: int, experts: int) -> list[TileConfig]:
        return choice.default_configs(problem, n, k, experts, self._card)

    def candidates(self, problem: Problem) -> list[TileConfig]:
        return choice.candidates(problem)

    def search_space(self, problem: Problem) -> list[TileConfig]:
        return search.search_space(problem)

    def compile(self, problem: Problem, config: TileConfig) -> Any:
        from kernels_sm90.compile import compile_kernel

        return compile_kernel(problem, config)


@functools.cache
def _for_kind(gpu: str) -> _Backend:
    return _Backend(gpu)


BACKEND = _for_kind("H200")  # where no GPU is at hand: the one that the model was fitted to
