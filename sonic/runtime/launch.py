"""Launches grouped GEMMs, loading or compiling each on first use. Holds the process's kernels."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sonic.runtime.backend import Backend, backend_for
from sonic.runtime.cache import KernelKey, kernel_cache
from sonic.runtime.errors import CompileError, SonicError, UnsupportedError
from sonic.runtime.problem import Problem, Ragged, TileConfig
from sonic.runtime.settings import CompileMode
from sonic.runtime.tuned import TunedSize, tuned_file, tuned_tiles

_log = logging.getLogger("sonic")
_LEAST_ROWS_OF_A_PART = 512  # of a split reduction
_kernels: dict[tuple[Backend, Problem, TileConfig], Any] = {}
# CuTeDSL traces into process-wide state, so two threads must not compile at once.
_compile_lock = threading.Lock()


def kernel_for(backend: Backend, problem: Problem, config: TileConfig) -> Any:
    """The compiled kernel: this process's, or from the cache on disk, or else compiled now.

    :raises UnsupportedError: the backend refuses ``problem``.
    :raises CompileError: the compiler failed; its error is the cause.
    """
    key = (backend, problem, config)
    kernel = _kernels.get(key)
    if kernel is None:
        with _compile_lock:
            kernel = _kernels.get(key)
            if kernel is None:
                kernel = _kernels[key] = _load_or_compile(backend, problem, config)
    return kernel


def _load_or_compile(backend: Backend, problem: Problem, config: TileConfig) -> Any:
    refusal = backend.supports(problem)
    if refusal is not None:
        raise UnsupportedError(
            f"{backend.arch.value} kernels do not support {refusal.reason}; {refusal.remedy}"
        )
    key = KernelKey(backend.arch, problem, config)
    return kernel_cache().load_or_compile(key, lambda: _compile(backend, problem, config))


def _compile(backend: Backend, problem: Problem, config: TileConfig) -> Any:
    start = time.perf_counter()
    try:
        kernel = backend.compile(problem, config)
    except SonicError:  # a refusal, which says what to do
        raise
    except Exception as error:
        raise CompileError(
            f"compiling {problem.name} with tile {config.name} for {backend.arch.value} failed: "
            f"{error}"
        ) from error
    _log.info(
        "compiled %s %s for %s in %.1f s",
        problem.name,
        config.name,
        backend.arch.value,
        time.perf_counter() - start,
    )
    return kernel


def compile_ahead(
    problem: Problem, device: torch.device, widths: tuple[int, ...], k: int, experts: int
) -> None:
    """Compile what :func:`config_for` calls for with another number of rows, so that no later call
    has to; ``widths``: each ``n`` that may come.

    Only kernels that the cache keeps, so that this happens once, and not with
    ``SONIC_COMPILE=needed``. One that cannot be compiled is left to the call that needs it.
    """
    _compile_ahead(backend_for(device), problem, widths, k, experts)


@functools.lru_cache(maxsize=4096)
def _compile_ahead(
    backend: Backend, problem: Problem, widths: tuple[int, ...], k: int, experts: int
) -> None:
    cache = kernel_cache()
    if cache.settings.compile is CompileMode.NEEDED or not cache.keeps(backend.arch):
        return
    choices = (config for n in widths for config in backend.default_configs(problem, n, k, experts))
    for config in dict.fromkeys(choices):
        if not cache.holds(KernelKey(backend.arch, problem, config)):
            try:
                kernel_for(backend, problem, config)
            except CompileError as error:
                _log.warning("a kernel for other numbers of tokens is missing: %s", error)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _grid(
    problem: Problem, config: TileConfig, rows: int, experts: int, m: int, n: int, sms: int
) -> int:
    """CTAs to launch: the number of tiles, or its bound that needs no host sync, or one per SM."""
    tile_n = config.tile_n * config.cluster_n
    tile_m = config.tile_m * config.cluster_m
    tiles = -(-n // tile_n)
    if problem.ragged is Ragged.ROWS:
        tiles *= (rows + experts * (tile_m - 1)) // tile_m
    else:
        tiles *= experts * -(-m // tile_m)
    return max(min(tiles, sms // config.cluster_size), 1) * config.cluster_size


def later_parts(config: TileConfig, rows: int, experts: int, m: int, n: int, sms: int) -> int:
    """How many parts, beside the first one of every expert, a split reduction has room for.

    No part has more rows than a sixteenth of an SM's share of the work; an expert with twice its
    share of the rows has one part, and so has one with few rows.
    """
    tiles = -(-m // config.tile_m) * -(-n // config.tile_n)
    return max(min(16 * sms // tiles, experts // 2, rows // _LEAST_ROWS_OF_A_PART) - 1, 1)


def config_for(
    problem: Problem, device: torch.device, rows: int, experts: int, n: int, k: int
) -> TileConfig:
    """The tiles that :func:`grouped_gemm` will use for this size: tuned ones, if there are any."""
    rows_per_expert = rows // experts if experts else rows
    return _config(backend_for(device), device, problem, rows_per_expert, n, k, experts)


# Routing changes the row count from call to call; a bounded memo keeps the choice off the hot path.
@functools.lru_cache(maxsize=4096)
def _config(
    backend: Backend,
    device: torch.device,
    problem: Problem,
    rows_per_expert: int,
    n: int,
    k: int,
    experts: int,
) -> TileConfig:
    size = TunedSize(problem, rows_per_expert, n, k, experts)
    tuned = _tuned(backend, device).get(size)
    refusal = None if tuned is None else backend.supports_config(problem, tuned)
    if tuned is not None and refusal is None:
        return tuned
    if tuned is not None and refusal is not None:  # a file that somebody edited
        path = tuned_file(backend.arch, torch.cuda.get_device_name(device))
        what = tuned.name, problem.name, path, refusal.reason
        _log.warning("did not use the tuned tiles %s of %s in %s: %s", *what)
    return backend.default_config(*size)


def forget_tiles() -> None:
    """What is chosen next is read from the file of tuned tiles again."""
    tuned_tiles.cache_clear()
    _config.cache_clear()
    prepared.cache_clear()


def _tuned(backend: Backend, device: torch.device) -> Mapping[TunedSize, TileConfig]:
    return tuned_tiles(backend.arch, torch.cuda.get_device_name(device))


@dataclass(frozen=True)
class GroupedGemm:
    """A compiled kernel and what it is told besides its operands; see ``Problem`` for those."""

    kernel: Any
    config: TileConfig
    device: torch.device
    scalars: tuple[int, int, int]  # the two strides, and the grid
    parts: int = 0  # of a split reduction: the length of ``aux``

    def __call__(
        self,
        a: torch.Tensor,
        b: torch.Tensor,
        offset_by_expert: torch.Tensor,
        *,
        d: torch.Tensor | None = None,
        aux: torch.Tensor | None = None,
        c: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        score: torch.Tensor | None = None,
        row_sum: torch.Tensor | None = None,
        gather: torch.Tensor | None = None,
    ) -> None:
        """Launches it on the current stream."""
        # A kept counter would outlive the memory pool of a captured graph, or be shared by its
        # replays.
        counter = None
        if self.config.dynamic:
            counter = torch.zeros(1, dtype=torch.int32, device=self.device)
        vectors = (bias, score, row_sum, gather, offset_by_expert, counter)
        self.kernel(a, b, d, aux, c, *vectors, *self.scalars)


def grouped_gemm(
    problem: Problem,
    config: TileConfig,
    device: torch.device,
    *,
    rows: int,
    experts: int,
    m: int = 0,
    n: int,
    strides: tuple[int, int] = (0, 0),
    kernel: Any = None,
) -> GroupedGemm:
    """The kernel for ``problem``, loaded or compiled, for these sizes.

    :param rows: static bound of the routed rows, ``R``.
    :param m, n: rows of an expert's output, if they are not ragged, and its columns.
    :param strides: element strides of gate -> up and of unit -> next unit, for gated weight rows.
    :param kernel: one that was compiled elsewhere for the same problem and tiles.
    """
    if kernel is None:
        kernel = kernel_for(backend_for(device), problem, config)
    sms = _multiprocessors(device)
    parts = later_parts(config, rows, experts, m, n, sms) if config.split else 0
    grid = _grid(problem, config, rows, experts, m, n, sms)
    return GroupedGemm(kernel, config, device, (*strides, grid), parts)


@functools.lru_cache(maxsize=4096)
def prepared(make: Callable[..., GroupedGemm], *look: Hashable) -> GroupedGemm:
    """``make(*look)``, made once: most calls of a layer look like one before."""
    return make(*look)
