"""What a function launches on the GPU, and how long each launch takes."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

_CALLS = 10


@dataclass(frozen=True)
class Launches:
    """Launches of one call and microseconds spent in them, by kernel; copies and fills count."""

    count: dict[str, float]
    microseconds: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.count.values())


def launches_of(function: Callable[[], object]) -> Launches:
    """Mean over a few calls, as torch's profiler sees them; CUDA only."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(_CALLS):
            function()
        torch.cuda.synchronize()
    count: Counter[str] = Counter()
    microseconds: Counter[str] = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            count[event.name] += 1
            microseconds[event.name] += event.device_time
    return Launches(
        {name: number / _CALLS for name, number in count.items()},
        {name: total / _CALLS for name, total in microseconds.items()},
    )


def captured(function: Callable[[], object], repeats: int = 1) -> Callable[[], None]:
    """``repeats`` calls of ``function`` as a CUDA graph, so that no call waits for the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            function()
    return graph.replay


def captured_results(
    function: Callable[[], Iterable[torch.Tensor]],
) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """One call of ``function`` as a CUDA graph, and the results that each replay writes anew."""
    results: list[torch.Tensor] = []

    def kept() -> None:
        results[:] = [tensor.detach() for tensor in function()]

    return captured(kept), results


if __name__ == "__main__":
    raise SystemExit("A module of the other benchmarks; run moe-router.py --kernels, for instance.")
