"""Which kernel package serves a device; nothing else names the ``kernels_smXX`` packages."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from sonic.runtime.devices import missing_gpu
from sonic.runtime.errors import (
    ArgumentError,
    DeviceError,
    MissingPackageError,
    UnsupportedError,
)
from sonic.runtime.problem import Arch, Problem, TileConfig, Unsupported


class Backend(Protocol):
    """The one interface of a kernel package."""

    arch: Arch
    gpus: tuple[str, ...]
    """The kinds of GPU that tiles are chosen for."""
    gpu: str
    """The kind that this object chooses for."""

    def __hash__(self) -> int:
        """A package has one object for each kind of GPU, so identity will do."""

    def for_gpu(self, gpu: str) -> Backend:
        """What chooses tiles for this GPU: one of ``gpus``, or a name as the driver has it."""

    def supports(self, problem: Problem) -> Unsupported | None:
        """Why ``problem`` cannot run, or ``None``."""

    def supports_config(self, problem: Problem, config: TileConfig) -> Unsupported | None:
        """Why ``problem`` cannot run with these tiles, or ``None``."""

    def default_config(
        self, problem: Problem, rows_per_expert: int, n: int, k: int, experts: int
    ) -> TileConfig:
        """Tiles for an output of ``n`` columns, ``k`` the weight's other axis; pure, no GPU."""

    def default_configs(self, problem: Problem, n: int, k: int, experts: int) -> list[TileConfig]:
        """All that :meth:`default_config` chooses for these and any rows per expert."""

    def candidates(self, problem: Problem) -> list[TileConfig]:
        """The tiles that :meth:`default_config` chooses from, whatever the size."""

    def search_space(self, problem: Problem) -> list[TileConfig]:
        """The tiles that an explicit search tries."""

    def compile(self, problem: Problem, config: TileConfig) -> Any:
        """Compiled launcher; needs no GPU and never launches."""


@dataclass(frozen=True)
class Availability:
    """Whether the kernels can run here, and if not, why. True in a boolean context if they can."""

    ok: bool
    reason: str

    def __bool__(self) -> bool:
        return self.ok


_ARCH_BY_MAJOR = {9: Arch.SM90, 10: Arch.SM100, 12: Arch.SM120}
_READY = frozenset({Arch.SM90})
_REFERENCE_HINT = 'pass impl="reference" to run the torch reference on this device'


@functools.cache
def load_backend(arch: Arch, instead: str | None = _REFERENCE_HINT) -> Backend:
    """Imports the kernel package of ``arch``.

    :param instead: what an error offers as another way; ``None`` for commands, which have none.
    :raises UnsupportedError: the package has no kernels yet.
    :raises MissingPackageError: CuTeDSL or Triton is not installed, or cannot be imported.
    """
    if arch not in _READY:
        ready = ", ".join(sorted(a.value for a in _READY))
        raise UnsupportedError(
            f"kernels for {arch.value} are not in this release (ready: {ready}); "
            f"{instead or 'choose one that is'}"
        )
    otherwise = f", or {instead}" if instead else ""
    for package, distribution in (
        ("cutlass", "nvidia-cutlass-dsl"),
        ("tvm_ffi", "apache-tvm-ffi"),
        ("triton", "triton"),
    ):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(
                f"the {arch.value} kernels need the package {distribution}, which is not "
                f"installed: pip install {distribution}{otherwise}"
            )
    try:
        # CuTeDSL is imported when a kernel has to be compiled, and not before.
        for package in ("tvm_ffi", "triton"):
            importlib.import_module(package)
        backend: Backend = importlib.import_module(f"kernels_{arch.value}").BACKEND
    except ImportError as error:
        raise MissingPackageError(
            f"the {arch.value} kernels need a package that is installed but cannot be imported: "
            f"{error}. Allowed: working installations of nvidia-cutlass-dsl, apache-tvm-ffi and "
            f"triton. Reinstall it{otherwise}"
        ) from error
    return backend


@functools.cache
def _arch_of_device(index: int) -> Arch | None:
    _check_device_exists(torch.device("cuda", index))
    return _ARCH_BY_MAJOR.get(torch.cuda.get_device_capability(index)[0])


@functools.cache
def _for_device(backend: Backend, index: int) -> Backend:
    return backend.for_gpu(torch.cuda.get_device_name(index))


def _check_device_exists(device: torch.device, instead: str | None = _REFERENCE_HINT) -> None:
    missing = missing_gpu(device, instead or "run it where there is one")
    if missing is not None:
        raise DeviceError(missing)


def _current_index(instead: str | None = _REFERENCE_HINT) -> int:
    _check_device_exists(torch.device("cuda"), instead)
    return torch.cuda.current_device()


def backend_for(device: torch.device, instead: str | None = _REFERENCE_HINT) -> Backend:
    """Kernel package for ``device``.

    :param instead: as for :func:`load_backend`.
    :raises DeviceError: not a CUDA device, or one that does not exist here.
    :raises UnsupportedError: a GPU generation without kernels.
    :raises MissingPackageError: CuTeDSL or Triton is not installed, or cannot be imported.
    """
    if device.type != "cuda":
        raise DeviceError(
            f"the kernels run on CUDA tensors, got a tensor on {device}: move it to a Hopper GPU, "
            'or pass impl="reference"'
        )
    index = device.index if device.index is not None else _current_index(instead)
    arch = _arch_of_device(index)
    if arch is None:
        major, minor = torch.cuda.get_device_capability(index)
        raise UnsupportedError(
            f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}; kernels "
            "exist for 9.0 (Hopper), and 10.x and 12.x follow. To go on, "
            f"{instead or 'choose one of these'}"
        )
    return _for_device(load_backend(arch, instead), index)


def is_available(device: torch.device | str | int | None = None) -> Availability:
    """Whether the CuTeDSL kernels can run on ``device`` (default: the current CUDA device).

    :param device: a device, its name, or the index of a CUDA device. One that is not there gives
        an answer, not an error.
    :raises ArgumentError: ``device`` names no device at all.
    """
    try:
        backend = backend_for(_device(device))
    except (DeviceError, UnsupportedError, MissingPackageError) as error:
        return Availability(False, str(error))
    return Availability(True, f"{backend.arch.value} kernels")


def _device(device: torch.device | str | int | None) -> torch.device:
    if device is None:
        return torch.device("cuda", _current_index())
    try:
        if isinstance(device, int) and not isinstance(device, bool):
            return torch.device("cuda", device)
        if isinstance(device, (str, torch.device)):
            return torch.device(device)
    except (RuntimeError, ValueError):
        pass
    raise ArgumentError(
        f"is_available: device={device!r} names no device. Allowed: a torch.device, a name such as "
        '"cuda" or "cuda:1", the index of a CUDA device, or None for the current one. Pass one of '
        "these."
    )
