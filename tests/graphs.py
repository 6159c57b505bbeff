"""CUDA graphs of what the tests run, and that it does not wait for the device."""

import contextlib
from collections.abc import Callable, Iterator
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


@contextlib.contextmanager
def no_synchronization() -> Iterator[None]:
    """Any wait of the host for the device that torch knows of is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels_of(function) -> list[str]:
    """Names of what the GPU ran, memory operations included."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    on_gpu = torch.autograd.DeviceType.CUDA
    return [event.name for event in profile.events() if event.device_type == on_gpu]
