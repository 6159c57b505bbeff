"""``sonic tune``: the fastest tiles for layers of given sizes, found on the GPU at hand."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from sonic.cli import LayerSize, all_launches, check_sizes, compile_kernels, folder_to_fill
from sonic.enums import ActivationType
from sonic.plan import build_plan
from sonic.runtime.backend import Backend, backend_for
from sonic.runtime.errors import ArgumentError
from sonic.runtime.launch import forget_tiles
from sonic.runtime.problem import Problem, TileConfig
from sonic.runtime.tuned import TunedSize, keep_tuned, tuned_file, tuned_tiles
from sonic.runtime.tuning import TimedGemm, search

_log = logging.getLogger("sonic")
_LEAST_GAIN = 1.01  # what two runs of one kernel may differ by


class _Result(NamedTuple):
    """What a search found for one GEMM; milliseconds."""

    size: TunedSize
    default: TileConfig
    default_time: float
    best: TileConfig
    best_time: float

    @property
    def gain(self) -> float:
        return self.default_time / self.best_time


def run(parsed: argparse.Namespace) -> int:
    """Searches, or shows or forgets what was found for the current GPU; the exit status.

    :raises SonicError: there is no GPU with kernels, or nothing can be kept.
    """
    check_sizes(parsed.thiek or ())
    device = torch.device("cuda")
    backend = backend_for(device, None)
    gpu = torch.cuda.get_device_name(device)
    if parsed.show:
        tiles = tuned_tiles(backend.arch, gpu)
        for size, config in tiles.items():
            print(_describe(size, config))
        print(f"{len(tiles)} tuned sizes for {gpu}")
        return 0
    folder_to_fill(backend.arch)
    path = tuned_file(backend.arch, gpu)
    if path is None:
        raise ArgumentError("the cache cannot be used, see the warning above: repair it first")
    if parsed.clear:
        path.unlink(missing_ok=True)
        forget_tiles()
        print(f"no tuned sizes for {gpu}")
        return 0
    sizes = list(dict.fromkeys(parsed.thiek))
    options = ActivationType(parsed.activation), parsed.dtype, parsed.add_bias
    kernels = {
        (problem, config): None
        for size in sizes
        for problem, n, k in all_launches(size, *options)
        for config in (
            _default(backend, size, problem, n, k),
            *_space(backend, size, problem, n, k),
        )
    }
    if compile_kernels(backend.arch, list(kernels), min(parsed.jobs, len(kernels))):
        return 1
    for size in sizes:
        found = {}
        for result in _search_layer(backend, size, options, device):
            print(
                f"{_describe(result.size, result.best)}: {result.best_time:.3f} ms, "
                f"{result.gain:.3f} times as fast as without tuning",
                flush=True,
            )
            # Also where nothing is gained: an earlier search may have found something else.
            gains = result.gain >= _LEAST_GAIN
            found[result.size] = result.best if gains else result.default
        keep_tuned(path, found)
        forget_tiles()
    print(f"kept in {path}")
    return 0


def _default(backend: Backend, size: LayerSize, problem: Problem, n: int, k: int) -> TileConfig:
    return backend.default_config(problem, size.rows_per_expert, n, k, size.experts)


def _space(backend: Backend, size: LayerSize, problem: Problem, n: int, k: int) -> list[TileConfig]:
    """The tiles to try: split as by default, since a search sees uniform routing only."""
    split = _default(backend, size, problem, n, k).split
    space = [replace(config, split=split) for config in backend.search_space(problem)]
    return [config for config in space if backend.supports_config(problem, config) is None]


def _search_layer(
    backend: Backend,
    size: LayerSize,
    options: tuple[ActivationType, str, bool],
    device: torch.device,
) -> Iterator[_Result]:
    routing = _routing(size, device)
    for problem, n, k in all_launches(size, *options):
        tuned = TunedSize(problem, size.rows_per_expert, n, k, size.experts)
        default = _default(backend, size, problem, n, k)
        gemm = TimedGemm(problem, *routing, size.tokens, n, k)
        gemm.warm_up(default)
        times = search(default, _space(backend, size, problem, n, k), gemm.milliseconds)
        best = _fastest_right(gemm, tuned, default, times)
        del gemm  # its operands, before the next ones are made
        yield _Result(tuned, default, times[default], best, times[best])


def _fastest_right(
    gemm: TimedGemm, size: TunedSize, default: TileConfig, times: dict[TileConfig, float]
) -> TileConfig:
    """The fastest tiles that compute what the default ones do; the others are logged."""
    expected = gemm.results(default)
    for config in sorted(times, key=times.__getitem__):
        difference = None if config == default else gemm.difference(expected, config)
        if difference is None:
            return config
        _log.warning(
            "refused tiles with another result: %s: %s", _describe(size, config), difference
        )
    return default


def _routing(size: LayerSize, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """``token_by_row`` and ``offset_by_expert`` of tokens that choose experts at random."""
    ids = torch.rand(size.tokens, size.experts, device=device).topk(size.top_k).indices.int()
    plan = build_plan(ids, size.experts)
    return plan.token_by_row, plan.offset_by_expert


def _describe(size: TunedSize, config: TileConfig) -> str:
    return (
        f"{size.problem.name}, {size.rows_per_expert} rows per expert, {size.experts} experts, "
        f"{size.n} by {size.k}: "
        f"{config.name}"
    )
