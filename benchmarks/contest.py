"""Contenders of ``benchmarks.peers`` measured in turns: times and memory.

All of them run in one process, one iteration each, round after round, in an order that is drawn
anew for each round from a fixed seed: clocks, power and temperature are then the same for all, none
follows the same one in every round, and a ratio is one of equals.
The GPU is never idle between the first untimed round and the last timed one.
"""

import contextlib
import gc
import math
import random
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from benchmarks.measure import LOAD_SECONDS, TIMED_SECONDS, synchronize
from benchmarks.peers import FORWARD_ONLY, Contender

MIN_ROUNDS = 5
PASSES = ("inference", "forward", "backward", "forward + backward")

Times = dict[str, dict[str, float]]  # contender -> pass -> milliseconds


class OutOfTime(Exception):
    """The block of :func:`time_limit` was not done in time."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTime` in the block after ``seconds``; main thread only, not nested."""

    def expired(*_: object) -> None:
        raise OutOfTime(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class _Clock:
    """Marks of the device's time: events on its stream, or the wall clock of a CPU."""

    def __init__(self, device: torch.device):
        self.is_cuda = device.type == "cuda"

    def mark(self) -> "torch.cuda.Event | float":
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: "torch.cuda.Event | float", stop: "torch.cuda.Event | float") -> float:
        if isinstance(start, float) or isinstance(stop, float):
            return 1e3 * (stop - start)  # type: ignore[operator]
        return start.elapsed_time(stop)


def take_turns(
    functions: Mapping[str, Callable[[_Clock], tuple]],
    device: torch.device,
    load_seconds: float = LOAD_SECONDS,
    timed_seconds: float = TIMED_SECONDS,
) -> dict[str, list[float]]:
    """Medians of what lies between consecutive marks that each function returns, by its name; where
    there are more than two, also of what lies between the first and the last.

    ``timed_seconds`` is per function, as if it ran alone.
    """
    clock, names = _Clock(device), list(functions)
    if not names:
        return {}
    gc.collect()
    gc.disable()  # a collection inside a turn would be that contender's time
    try:
        start, rounds = time.perf_counter(), 0
        while rounds < 2 or time.perf_counter() - start < load_seconds:
            for name in names:
                functions[name](clock)
            rounds += 1
            synchronize(device)
        seconds = (time.perf_counter() - start) / rounds
        marks: dict[str, list[tuple]] = {name: [] for name in names}
        wanted = math.ceil(timed_seconds * len(names) / seconds)
        order = random.Random(0)
        for _ in range(max(MIN_ROUNDS, wanted)):
            for name in order.sample(names, len(names)):
                marks[name].append(functions[name](clock))
        synchronize(device)
    finally:
        gc.enable()
    medians = {}
    for name, runs in marks.items():
        pairs = [(index, index + 1) for index in range(len(runs[0]) - 1)]
        if len(pairs) > 1:
            pairs.append((0, len(pairs)))
        medians[name] = [
            statistics.median(clock.ms(run[first], run[last]) for run in runs)
            for first, last in pairs
        ]
    return medians


def race(contenders: Mapping[str, Contender], device: torch.device, seconds: float) -> Times:
    """Milliseconds of ``PASSES``. Forward, backward and both are of the same iterations;
    ``inference``, without gradients, is a race of its own."""

    def inference(contender: Contender) -> Callable[[_Clock], tuple]:
        def turn(clock: _Clock) -> tuple:
            start = clock.mark()
            contender.inference()
            return start, clock.mark()

        return turn

    def training(contender: Contender) -> Callable[[_Clock], tuple]:
        def turn(clock: _Clock) -> tuple:
            start = clock.mark()
            out = contender.forward()
            middle = clock.mark()
            contender.backward(out)
            stop = clock.mark()
            return start, middle, stop

        return turn

    trained = {name: c for name, c in contenders.items() if name not in FORWARD_ONLY}
    times: Times = {name: {} for name in contenders}
    for group, make, passes in (
        (contenders, inference, PASSES[:1]),
        (trained, training, PASSES[1:]),
    ):
        turns = {name: make(contender) for name, contender in group.items()}
        for name, medians in take_turns(turns, device, timed_seconds=seconds).items():
            scale = getattr(contenders[name], "scale", 1.0)
            times[name] |= {p: scale * ms for p, ms in zip(passes, medians, strict=True)}
    return times


@dataclass(frozen=True)
class Memory:
    """Bytes of one forward and backward above inputs, weights and what else was there before.

    ``saved`` lies between the two passes, the output not counted; ``gradients`` are the results;
    ``peak`` is the most there was. ``above_saved`` is what a backward pass has to find room for
    besides what was kept and what it returns.
    """

    saved: int
    peak: int
    gradients: int

    @property
    def above_saved(self) -> int:
        return self.peak - self.saved - self.gradients


def memory_of(contender: Contender, device: torch.device) -> Memory:
    """Counted by torch's allocator; CUDA only."""
    contender.backward(contender.forward())
    gc.collect()
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = contender.forward()
    synchronize(device)
    saved = torch.cuda.memory_allocated(device) - before - out.untyped_storage().nbytes()
    gradients = contender.backward(out)
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    return Memory(saved, peak, sum(g.untyped_storage().nbytes() for g in gradients))
