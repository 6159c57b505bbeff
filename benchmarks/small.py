"""What is not the GPU's arithmetic: few tokens under a CUDA graph, and the host's time."""

import copy
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from benchmarks.contest import take_turns
from benchmarks.launches import captured_results
from benchmarks.layer import Layer
from benchmarks.measure import synchronize
from benchmarks.peers import FORWARD_ONLY, Contender, with_routing_logits
from benchmarks.shapes import DECODE_SHAPE, Shape

ROUTINGS = 8  # in rotation: one routing's weights would stay in the L2 cache
HOST_SHAPE = Shape(64, 256, 128, 8, 2)  # the GPU is done before the host is
_HOST_CALLS = 10  # between two waits: far fewer launches than a stream queues
_HOST_SECONDS = 1.0  # of measurement, and of load before: others use the cores now and then
_COPY_BYTES = 2**31


def decode_shape(tokens: int) -> Shape:
    """``DECODE_SHAPE`` with this many tokens."""
    return Shape(tokens, *DECODE_SHAPE)


def rotations(layer: Layer) -> list[Layer]:
    """The layer with ``ROUTINGS`` different draws of distinct experts for its tokens."""
    generator = torch.Generator(device=layer.options.device).manual_seed(layer.options.seed)
    found = []
    for _ in range(ROUTINGS):
        logits = torch.rand(
            layer.shape.T, layer.shape.E, generator=generator, device=generator.device
        )
        ids = logits.topk(layer.shape.top_k, dim=1).indices.int()
        found.append(with_routing_logits(replace(layer, topk_ids=ids)))
    return found


def touched_bytes(layers: list[Layer]) -> float:
    """Mean bytes of the weights of the experts that a routing names."""
    per_expert = sum(w[0].numel() * w.element_size() for w in (layers[0].w1, layers[0].w2))
    named = [layer.topk_ids.unique().numel() for layer in layers]
    return per_expert * statistics.mean(named)


def read_seconds(size: float, device: torch.device) -> float:
    """Seconds in which this device moves ``size`` bytes, by a copy measured now."""
    source = torch.empty(_COPY_BYTES // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def turn(clock) -> tuple:
        start = clock.mark()
        target.copy_(source)
        return start, clock.mark()

    (ms,) = take_turns({"copy": turn}, device, timed_seconds=0.2)["copy"]
    return 1e-3 * ms * size / _COPY_BYTES


class Graph(NamedTuple):
    """A CUDA graph of one inference per routing, and the outputs that its replay writes."""

    replay: Callable[[], None]
    outputs: list[torch.Tensor]


def capture_graphs(
    contenders: Mapping[str, Contender], layers: list[Layer], device: torch.device
) -> tuple[dict[str, Graph], dict[str, str]]:
    """The graph of each contender, replayed once; and the reason of every one that could not be
    captured."""
    graphs, failures = {}, {}
    for name, contender in contenders.items():
        try:
            others = [_with_layer(contender, layer) for layer in layers]
            graphs[name] = Graph(*captured_results(lambda own=others: [c.inference() for c in own]))
            graphs[name].replay()
        except Exception as error:  # a peer that synchronises cannot be captured
            failures[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        synchronize(device)
    return graphs, failures


def graph_ms(graphs: Mapping[str, Graph], device: torch.device) -> dict[str, float]:
    """Milliseconds of one inference of each graph's, taken in turns."""

    def turn(graph: Graph) -> Callable:
        def timed(clock) -> tuple:
            start = clock.mark()
            graph.replay()
            return start, clock.mark()

        return timed

    medians = take_turns({name: turn(graph) for name, graph in graphs.items()}, device)
    return {name: ms / len(graphs[name].outputs) for name, (ms,) in medians.items()}


def _with_layer(contender: Contender, layer: Layer) -> Contender:
    """The contender on other ids: whatever it made of the weights is shared."""
    other = copy.copy(contender)
    other.layer = layer  # type: ignore[attr-defined]
    return other


class HostTime(NamedTuple):
    """Microseconds of host time of a call: the median, and the fastest tenth's limit, which other
    users of the same cores hardly touch."""

    median: float
    fast: float


def host_microseconds(function: Callable[[], object], device: torch.device) -> HostTime:
    """Host time of one call: ``_HOST_CALLS`` are enqueued on an idle device without waiting.

    The first second does not count: with cores and GPU that were idle before, a call took 114 us in
    it and 85 us from then on (a development run on an H200, 2026-11-27).
    """
    _call_times(function, device)
    times = _call_times(function, device)
    # Inclusive: the exclusive method extrapolates below the fastest of few times.
    fast = statistics.quantiles(times, n=10, method="inclusive")[0]
    return HostTime(statistics.median(times), fast)


def _call_times(function: Callable[[], object], device: torch.device) -> list[float]:
    """Microseconds of a call, of each ``_HOST_CALLS``, for ``_HOST_SECONDS``."""
    times: list[float] = []
    until = time.perf_counter() + _HOST_SECONDS
    while time.perf_counter() < until or len(times) < 2:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(_HOST_CALLS):
            function()
        times.append(1e6 * (time.perf_counter() - start) / _HOST_CALLS)
    synchronize(device)
    return times


def host_times(
    contenders: Mapping[str, Contender], device: torch.device
) -> dict[str, dict[str, HostTime]]:
    """Host microseconds of an inference, a forward pass, and one with its backward pass."""
    found: dict[str, dict[str, HostTime]] = {}
    for name, contender in contenders.items():
        passes: dict[str, Callable[[], object]] = {"inference": contender.inference}
        if name not in FORWARD_ONLY:
            passes["forward"] = contender.forward
            passes["forward + backward"] = _both(contender)
        found[name] = {p: host_microseconds(f, device) for p, f in passes.items()}
    return found


def print_profile(function: Callable[[], object], device: torch.device) -> None:
    """The Python functions in which 200 calls spend the most time of their own. The profiler slows
    Python down, so shares count, not microseconds."""
    function()
    synchronize(device)
    profile = cProfile.Profile()
    for _ in range(20):
        profile.enable()
        for _ in range(_HOST_CALLS):
            function()
        profile.disable()
        synchronize(device)
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


def _both(contender: Contender) -> Callable[[], object]:
    return lambda: contender.backward(contender.forward())
