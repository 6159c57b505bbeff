"""The first use of a layer whose kernels nobody has compiled: all of them at once, side by side.

CuTeDSL compiles one kernel at a time in a process, for seconds each, and a layer has some 25. So
the command ``sonic compile`` runs, which compiles in processes of its own and leaves the kernels on
disk. It is a process of its own too, because those that it starts would otherwise import the
caller's main module again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Hashable
from pathlib import Path

import torch

from sonic.runtime.backend import backend_for
from sonic.runtime.cache import KernelKey, kernel_cache, turn
from sonic.runtime.problem import Problem
from sonic.runtime.settings import CompileMode

_log = logging.getLogger("sonic")

_MOST_JOBS = 8  # that nobody asked for: each takes about a gigabyte
_MOST_SECONDS = 1800.0
_CLOCKS = 5.0  # seconds by which the clock of the cache's disk may be behind
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_tried: set[Hashable] = set()  # layers whose kernels this process has looked for


def usable_cpus() -> int:
    """CPUs that this process may use, of which a container or a job may have few: by affinity, and
    by the quota of its control group (version 2)."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        return max(1, min(count, int(quota) // int(period)))
    except (OSError, ValueError):  # there is none, or it is "max"
        return count


def fill_cache(
    up: Problem,
    device: torch.device,
    *,
    hidden: int,
    width: int,
    experts: int,
) -> None:
    """Compile what a layer may need on this kind of GPU if a kernel of ``up``, its up-projection,
    is missing: for inference where ``up`` is of inference, else for training too.

    Only where the cache keeps kernels, without ``SONIC_COMPILE=needed``, and where more than one
    CPU can compile; once in a process for each layer, and by one of several processes, while the
    others wait. If that fails, which is logged, each kernel is left to the call that needs it.

    Args:
        hidden: H. width: rows of an expert's ``w1``. experts: E.
    """
    if up.activation is None:
        raise ValueError(f"{up.name} is no up-projection")
    backend, cache = backend_for(device), kernel_cache()
    arch = backend.arch
    if cache.settings.compile is CompileMode.NEEDED or not cache.keeps(arch):
        return
    how = up.activation, up.dtype, up.has_bias, up.store_preact
    layer = arch, backend.gpu, *how, hidden, width, experts
    if layer in _tried:
        return
    _tried.add(layer)
    # Another kind of GPU, for which a shared cache may have been filled, has other tiles.
    configs = backend.default_configs(up, width, hidden, experts)
    keys = [KernelKey(arch, up, config) for config in configs]

    def is_filled() -> bool:
        return all(map(cache.holds, keys))

    jobs = min(usable_cpus(), _MOST_JOBS)
    # A frozen program's executable is the program.
    if is_filled() or jobs < 2 or not sys.executable or getattr(sys, "frozen", False):
        return
    folder = cache.folder(arch, create=True)
    if folder is None or not os.access(folder, os.W_OK):
        return
    intermediate = width // 2 if up.activation.is_gated else width
    command = [
        *(sys.executable, "-m", "sonic", "compile", "--arch", arch.value, "--gpu", backend.gpu),
        *("--jobs", str(jobs)),
        *("--thiek", f"1,{hidden},{intermediate},{experts},1"),
        *("--activation", up.activation.value, "--dtype", up.dtype),
        *(["--add_bias"] if up.has_bias else []),
        *([] if up.store_preact else ["--inference"]),
    ]
    failed = _mark_of_failure(folder, backend.gpu, keys[0], (hidden, width, experts))
    start = time.time()
    with turn(folder / f".fill-{backend.gpu}.lock"):
        # Whoever had its turn before compiled these kernels, or others, or could not.
        if is_filled() or _changed_since(failed, start - _CLOCKS):
            return
        _run(command, folder)
        if is_filled():
            with contextlib.suppress(OSError):
                failed.unlink(missing_ok=True)
        else:
            with contextlib.suppress(OSError):  # without the mark another process tries as well
                failed.touch(mode=0o600)
            _log.warning("sonic compile left some %s missing here", up.name)


def _mark_of_failure(folder: Path, gpu: str, key: KernelKey, sizes: tuple[int, ...]) -> Path:
    """The file whose time says when the kernels of a layer could not all be compiled last."""
    return folder / f".fill-{gpu}-{key.stem}-{'-'.join(map(str, sizes))}.failed"


def _changed_since(path: Path, moment: float) -> bool:
    try:
        return path.stat().st_mtime >= moment
    except OSError:
        return False


def _run(command: list[str], folder: Path) -> None:
    """Run ``command``, which finds sonic where this process found it, and no module of the current
    directory, which ``python -m`` looks into first."""
    _log.info("compiling the kernels of a layer: %s", " ".join(command))
    start = time.perf_counter()
    try:
        search = [os.path.abspath(path) for path in sys.path if isinstance(path, str)]
        # That process never does this in turn, whatever it is.
        environment = {"PYTHONPATH": os.pathsep.join(search), "SONIC_COMPILE": "needed"}
        status, said = _wait_for(command, folder, os.environ | environment)
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("kernels are compiled one after another now: %s", error)
        return
    _log.info("it took %.1f s", time.perf_counter() - start)
    if status != 0:
        failures = [line for line in said.splitlines() if "failed:" in line] or said.splitlines()
        _log.warning(
            "sonic compile, exit status %d; what is missing is compiled when needed: %s",
            status,
            "; ".join(failures[-3:]) or "it said nothing",
        )


def _wait_for(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str]:
    """Exit status and output. Whatever ends the wait early, an interrupt too, ends the command and
    the processes that it started."""
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=_MOST_SECONDS)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, said
