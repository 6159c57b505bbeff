"""Tasks in worker processes, so that a crash or a hang costs one task and not the whole run.

A GPU error poisons its process: every later call fails too. Hence one process per worker, replaced
when it dies, hangs past the task's time, or reports that its device is lost.
"""

import contextlib
import gc
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

START_SECONDS = 120  # imports and the GPU context of a new process


@dataclass(frozen=True)
class Task:
    """``function(argument)`` to be run in a worker.

    ``affinity``: tasks that share compiled kernels; a worker prefers to stay with what it has.
    ``memory``: bytes of device memory it needs, to keep the sum of what runs within the budget.
    """

    name: str
    function: Callable[[Any], dict[str, Any]]
    argument: Any
    affinity: str = ""
    memory: int = 0


@dataclass(frozen=True)
class Outcome:
    """``value`` is what the task returned; ``error`` is empty unless it raised, died or hung."""

    task: Task
    seconds: float
    value: dict[str, Any] = field(default_factory=dict)
    error: str = ""


class _Worker:
    def __init__(self, context: multiprocessing.context.SpawnContext):
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.task: Task | None = None
        self.affinity = ""
        self.deadline = 0.0
        self.started = 0.0
        self.fresh = True

    def give(self, task: Task, seconds: float) -> None:
        self.task, self.affinity = task, task.affinity
        self.started = time.monotonic()
        self.deadline = self.started + seconds + (START_SECONDS if self.fresh else 0)
        self.fresh = False
        self.connection.send((task.function, task.argument))

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Pool:
    """Up to ``jobs`` workers that run tasks within a budget of device memory."""

    def __init__(self, jobs: int, memory_budget: int, task_seconds: float):
        self._context = multiprocessing.get_context("spawn")
        self._jobs, self._budget, self._seconds = jobs, memory_budget, task_seconds
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def run(
        self,
        tasks: Sequence[Task],
        seconds: float,
        report: Callable[[Outcome], None],
        jobs: int | None = None,
    ) -> int:
        """Run ``tasks``; no new one starts after ``seconds``. Returns how many never started."""
        pending = list(tasks)
        end = time.monotonic() + seconds
        while True:
            if time.monotonic() < end:
                self._dispatch(pending, self._jobs if jobs is None else jobs)
            busy = [worker for worker in self._workers if worker.task is not None]
            if not busy:
                return len(pending)
            wait([worker.connection for worker in busy], timeout=0.5)
            for worker in busy:
                self._collect(worker, report)

    def _dispatch(self, pending: list[Task], jobs: int) -> None:
        while pending:
            busy = [worker for worker in self._workers if worker.task is not None]
            if len(busy) >= jobs:
                return
            idle = next((worker for worker in self._workers if worker.task is None), None)
            room = self._budget - sum(worker.task.memory for worker in busy if worker.task)
            # A task larger than the whole budget still runs, alone.
            fitting = [task for task in pending if task.memory <= room or not busy]
            if not fitting:
                return
            if idle is None:
                idle = _Worker(self._context)
                self._workers.append(idle)
            task = _next(fitting, idle.affinity, {worker.affinity for worker in busy})
            pending.remove(task)
            idle.give(task, self._seconds)

    def _collect(self, worker: _Worker, report: Callable[[Outcome], None]) -> None:
        task = worker.task
        assert task is not None
        error, value, lost = "", {}, True
        if worker.connection.poll():
            try:
                value, error, lost = worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join(timeout=10)
                error = f"the worker process died (exit code {worker.process.exitcode})"
        elif not worker.process.is_alive():
            error = f"the worker process died (exit code {worker.process.exitcode})"
        elif time.monotonic() > worker.deadline:
            error = f"no result after {time.monotonic() - worker.started:.0f} s"
        else:
            return
        worker.task = None
        if lost:
            worker.stop()
            self._workers.remove(worker)
        report(Outcome(task, time.monotonic() - worker.started, value, error))


def _next(fitting: Sequence[Task], mine: str, others: set[str]) -> Task:
    """One of the worker's own affinity, else of the largest group that nobody works on."""
    sizes = Counter(task.affinity for task in fitting)
    return max(
        fitting,
        key=lambda task: (
            task.affinity == mine,
            task.affinity not in others,
            sizes[task.affinity],
        ),
    )


def _serve(connection: Connection) -> None:
    """What a worker does: tasks until the pipe closes, or until the device is lost."""
    while True:
        try:
            function, argument = connection.recv()
        except (EOFError, OSError):
            return
        value: dict[str, Any] = {}
        error, lost = "", False
        try:
            value = function(argument)
        except BaseException as exception:  # whatever it is, it is this task's result
            error = "".join(traceback.format_exception(exception))
            lost = _device_is_lost() or not isinstance(exception, Exception)
        _release_memory()
        connection.send((value, error, lost))
        if lost:
            return


def _release_memory() -> None:
    """Give cached device memory back: the budget counts what runs, not what idle workers keep."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with contextlib.suppress(Exception):  # a lost device is reported by whoever finds it
            torch.cuda.empty_cache()


def _device_is_lost() -> bool:
    import torch

    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1).item()
    except Exception:
        return True
    return False
