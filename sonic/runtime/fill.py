"""The first use of a layer whose kernels nobody has compiled: all of them at once, side by side.

CuTeDSL compiles one kernel at a time in a process, for seconds each, and a layer has twenty. So the
command ``sonic compile`` runs, which compiles in processes of its own and leaves the kernels on
disk. It is a process of its own too, because those that it starts would otherwise import the
caller's main module again.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from sonic.runtime.backend import backend_for
from sonic.runtime.cache import KernelKey, kernel_cache, turn
from sonic.runtime.problem import Problem, TileConfig
from sonic.runtime.settings import CompileMode

_log = logging.getLogger("sonic")


def usable_cpus() -> int:
    """CPUs that this process may run on; a container or a job may own few of the machine's."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fill_cache(
    up: Problem,
    config: TileConfig,
    device: torch.device,
    *,
    hidden: int,
    width: int,
    experts: int,
) -> None:
    """Compile what a layer may need if its up-projection, ``up`` with ``config``, is missing.

    Only where the cache keeps kernels, without ``SONIC_COMPILE=needed``, and where more than one
    CPU can compile. Of several processes one compiles, and the others wait. If that fails, each
    kernel is left to the call that needs it.

    Args:
        hidden: H. width: rows of an expert's ``w1``. experts: E.
    """
    if up.activation is None:
        raise ValueError(f"{up.name} is no up-projection")
    arch, cache = backend_for(device).arch, kernel_cache()
    key = KernelKey(arch, up, config)
    if cache.settings.compile is CompileMode.NEEDED or not cache.keeps(arch) or cache.holds(key):
        return
    folder = cache.folder(arch, create=True) if usable_cpus() > 1 else None
    if folder is None:
        return
    intermediate = width // 2 if up.activation.is_gated else width
    command = [
        *(sys.executable, "-m", "sonic", "compile", "--arch", arch.value),
        *("--thiek", f"1,{hidden},{intermediate},{experts},1"),
        *("--activation", up.activation.value, "--dtype", up.dtype),
        *(["--add_bias"] if up.has_bias else []),
    ]
    with turn(folder / ".fill.lock"):
        if not cache.holds(key):
            _run(command, folder)


def _run(command: list[str], folder: Path) -> None:
    _log.info("compiling the kernels of a layer: %s", " ".join(command))
    start = time.perf_counter()
    # sonic is found where this process found it, and no module of the current directory, which
    # "python -m" looks into first.
    search = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = os.environ | {"PYTHONPATH": search}
    try:
        subprocess.run(
            command,
            cwd=folder,
            env=environment,
            check=True,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").strip()
        reasons = "; ".join([str(error), *said.splitlines()[-1:]])
        _log.warning("kernels are compiled one after another now: %s", reasons)
        return
    _log.info("compiled them in %.1f s", time.perf_counter() - start)
