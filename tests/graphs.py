"""CUDA graphs of what the tests run."""

from collections.abc import Callable
from typing import TypeVar

import torch

_Result = TypeVar("_Result")


def warm_up(function: Callable[[], _Result], times: int = 2) -> _Result:
    """The last result of a few calls on a side stream, as a capture wants them before it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            result = function()
    torch.cuda.current_stream().wait_stream(side)
    return result


def record(function: Callable[[], _Result]) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """A graph of a function that is warm, and the results, which a replay writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph, results


def capture(function: Callable[[], _Result]) -> tuple[torch.cuda.CUDAGraph, _Result]:
    """:func:`record` after :func:`warm_up`."""
    warm_up(function)
    return record(function)
