"""Compiled kernels on disk, so that a second process compiles nothing.

An entry is one file, ``<cache>/<arch>-<toolchain>/<problem>-<tile>-<digest>.so`` (or ``.o``): what
:mod:`sonic.runtime.objects` wrote, and behind it a SHA-256 of that and a mark, which loaders
ignore. ``<toolchain>`` is a digest of everything that decides what the compiler makes of a problem:
the sources of the kernels, versions, machine, and CuTeDSL's own settings. Nothing expires; another
toolchain looks into another folder.

Entries appear by renaming a finished file, so a reader sees a whole one or none; a damaged one is a
miss and is replaced. Processes that miss the same entry take turns, and all but the first load it.
Loading an entry runs its code: folders and files that others can write are not used.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import logging
import os
import platform
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from sonic.runtime import objects
from sonic.runtime.problem import Arch, Problem, TileConfig
from sonic.runtime.settings import CacheMode, Settings

_log = logging.getLogger("sonic")
_MARK = b"sonic kernel 1\n\0"
_SEAL_BYTES = hashlib.sha256().digest_size + len(_MARK)
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_LOCK_SECONDS = 600.0  # longer than any compilation; after it, compile beside the other process
_DISTRIBUTIONS = ("nvidia-cutlass-dsl", "apache-tvm-ffi")
# CuTeDSL's variables that change no kernel: every compilation here names its architecture.
_HARMLESS = frozenset(
    f"CUTE_DSL_{name}"
    for name in ("ARCH", "CACHE_DIR", "DUMP_DIR", "LOG_LEVEL", "LOG_TO_CONSOLE", "LOG_TO_FILE")
)


@dataclass(frozen=True)
class KernelKey:
    """One kernel of a toolchain."""

    arch: Arch
    problem: Problem
    config: TileConfig

    @property
    def symbol(self) -> str:
        """Name of the host function in the file."""
        return f"sonic_{self.problem.name}_{self.arch.value}"

    @property
    def stem(self) -> str:
        """File name without suffix; the digest covers the fields that the names leave out."""
        fields = json.dumps([asdict(self.problem), asdict(self.config)], sort_keys=True)
        return f"{self.problem.name}-{self.config.name}-{_sha256(fields.encode())[:16]}"


@dataclass(frozen=True)
class CacheReport:
    """Number and bytes of the entries of this toolchain and of all others, and damaged files."""

    current: int
    current_bytes: int
    other: int
    other_bytes: int
    damaged: tuple[Path, ...]


def describe_toolchain(arch: Arch) -> dict[str, str]:
    """Everything but problem and tiles that decides what a compiled kernel is, by name.

    :raises ValueError: the version of a package that takes part is unknown.
    """
    described = {
        "arch": arch.value,
        "sources": _source_digest(arch),
        "toolkit": objects.toolkit() or "unknown",
        "python": str(sys.implementation.cache_tag),
        "machine": f"{sys.platform} {platform.machine()}",
        "settings": _compiler_settings(os.environ),
    }
    for name in _DISTRIBUTIONS:
        try:
            described[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise ValueError(f"the version of {name} is unknown: it has no metadata") from None
    return described


class _DamagedError(ValueError):
    """An entry that nobody can use: incomplete, changed, or not safe from others."""


class KernelCache:
    """Loads compiled kernels and, in mode ``rw``, keeps them. Not thread-safe.

    :param write: (compiled kernel, folder, symbol) -> file in the folder.
    :param load: (file, symbol) -> kernel.
    :param toolchain: arch -> description of what compiles for it.
    """

    def __init__(
        self,
        settings: Settings,
        write: Callable[[Any, Path, str], Path] = objects.write_object,
        load: Callable[[Path, str], Any] = objects.load_object,
        toolchain: Callable[[Arch], dict[str, str]] = describe_toolchain,
    ):
        self.settings = settings
        self._write = write
        self._load = load
        self._describe = toolchain
        self._toolchains: dict[Arch, dict[str, str]] = {}
        self._folders: dict[tuple[Arch, bool], Path | None] = {}
        self._writes = settings.cache is CacheMode.READ_WRITE

    def load_or_compile(self, key: KernelKey, compile_kernel: Callable[[], Any]) -> Any:
        """The kernel from disk, or else compiled and, if the mode allows, kept."""
        kernel = self.load(key)
        if kernel is not None:
            return kernel
        folder = self.folder(key.arch, create=True) if self.keeps(key.arch) else None
        if folder is None:
            return compile_kernel()
        with turn(folder / f".{key.stem}.lock"):
            kernel = self.load(key)
            return self._keep(folder, key, compile_kernel()) if kernel is None else kernel

    def keeps(self, arch: Arch) -> bool:
        """Whether a kernel of ``arch`` that is compiled now will be there for other processes."""
        return self._writes and self.folder(arch) is not None

    def holds(self, key: KernelKey) -> bool:
        """Whether there is an entry for this kernel. It is not looked at."""
        folder = self.folder(key.arch)
        return folder is not None and any(
            (folder / (key.stem + suffix)).exists() for suffix in objects.SUFFIXES
        )

    def load(self, key: KernelKey) -> Any | None:
        """The kernel from disk, or ``None``. In mode ``rw`` a damaged entry is removed."""
        folder = self.folder(key.arch)
        if folder is None:
            return None
        for suffix in objects.SUFFIXES:
            path = folder / (key.stem + suffix)
            try:
                return self._open(path, key)
            except (FileNotFoundError, NotADirectoryError):
                continue
            # Loaders raise errors of many types, and whichever it is, the answer is to compile. But
            # only what is seen to be damaged goes: other processes may not lack the memory, the
            # files or the library that this one lacks.
            except Exception as error:
                _log.warning("did not use the compiled kernel %s: %s", path, error)
                if self._writes and isinstance(error, _DamagedError):
                    with contextlib.suppress(OSError):
                        path.unlink()
        return None

    def folder(self, arch: Arch, create: bool = False) -> Path | None:
        """Where the entries of ``arch`` lie; ``None``, after one warning, if none can be used."""
        if (arch, create) not in self._folders:
            try:
                folder = self._prepare(arch, create)
            except (OSError, ValueError) as error:
                _log.warning("compiled kernels are neither loaded from disk nor kept: %s", error)
                folder = None
            self._folders[arch, create] = folder
        return self._folders[arch, create]

    def obstacle(self, arch: Arch, create: bool = False) -> str | None:
        """Why the cache cannot be used, or ``None`` if it can, or is switched off."""
        try:
            self._prepare(arch, create)
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def report(self, arch: Arch) -> CacheReport:
        """Reads every entry of ``arch``; loads none."""
        folder = self.folder(arch)
        if folder is None:
            return CacheReport(0, 0, 0, 0, ())
        current: list[Path] = []
        other: list[Path] = []
        for path in folder.parent.glob("*/*"):
            if path.suffix in objects.SUFFIXES:
                (current if path.parent == folder else other).append(path)
        return CacheReport(
            len(current),
            sum(path.stat().st_size for path in current),
            len(other),
            sum(path.stat().st_size for path in other),
            tuple(path for path in current if self._damage(path) is not None),
        )

    def _prepare(self, arch: Arch, create: bool) -> Path | None:
        if self.settings.cache is CacheMode.OFF:
            return None
        root = self.settings.cache_dir
        if root is None:
            raise ValueError("there is no home directory; set SONIC_CACHE_DIR")
        if arch not in self._toolchains:
            self._toolchains[arch] = self._describe(arch)
        folder = root / f"{arch.value}-{_digest(self._toolchains[arch])}"
        if create:
            root.parent.mkdir(parents=True, exist_ok=True)
            for path in (root, folder):
                path.mkdir(mode=0o700, exist_ok=True)
        for path in (root, folder):
            if path.exists():
                _check_folder(path, self.owners())
        return folder

    def owners(self) -> set[int]:
        """Users whose files are loaded: this one and root; in mode ``ro`` also the cache's."""
        owners = {os.geteuid(), 0}
        root = self.settings.cache_dir
        if self.settings.cache is CacheMode.READ_ONLY and root is not None:
            owners.add(root.stat().st_uid)
        return owners

    def _open(self, path: Path, key: KernelKey) -> Any:
        try:
            _check_seal(_read(path, self.owners()))
        except ValueError as error:
            raise _DamagedError(error) from error
        return self._load(path, key.symbol)

    def _damage(self, path: Path) -> str | None:
        try:
            _check_seal(_read(path, self.owners()))
        except (OSError, ValueError) as error:
            return str(error)
        return None

    def _keep(self, folder: Path, key: KernelKey, compiled: Any) -> Any:
        """The kernel as other processes will load it, or ``compiled`` if it cannot be kept."""
        try:
            if self._describe(key.arch) != self._toolchains[key.arch]:
                raise ValueError("the sources of the kernels have changed since they were imported")
            with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as scratch:
                written = self._write(compiled, Path(scratch), key.symbol)
                with written.open("ab") as file:
                    file.write(_seal(written.read_bytes()))
                written.chmod(0o600)
                path = folder / (key.stem + written.suffix)
                os.replace(written, path)
            return self._open(path, key)
        # The kernel is compiled and can run, whatever stands in the way of keeping it.
        except Exception as error:
            _log.warning("did not keep %s in %s: %s", key.problem.name, folder, error)
            return compiled


def read_own(path: Path) -> bytes:
    """Content of a file beside the entries, if nobody else can have written it.

    :raises OSError, ValueError: it cannot be read, or somebody else can.
    """
    return _read(path, kernel_cache().owners())


@functools.cache
def kernel_cache() -> KernelCache:
    """The cache of this process.

    :raises ArgumentError: a ``SONIC_*`` variable has a value that it does not take.
    """
    return KernelCache(Settings.from_environment())


@contextlib.contextmanager
def turn(path: Path) -> Iterator[None]:
    """Waits until no other process is in a block with the same path."""
    import filelock

    lock = filelock.FileLock(path, timeout=_LOCK_SECONDS, mode=0o600)
    try:
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # a time-out is an OSError
        _log.warning("went on without waiting for other processes: %s", error)
        yield
        return
    try:
        yield
    finally:
        lock.release()


def _check_folder(path: Path, owners: set[int]) -> None:
    """:raises ValueError: somebody else can put files into ``path``, or swap it for another."""
    info = path.stat()
    if not stat.S_ISDIR(info.st_mode):
        raise ValueError(f"{path} is not a directory")
    if info.st_uid not in owners:
        raise ValueError(
            f"{path} belongs to another user (uid {info.st_uid}); set SONIC_CACHE_DIR to a "
            "directory of your own, or SONIC_CACHE=ro to trust the kernels of its owner"
        )
    if info.st_mode & _OTHERS_WRITE:
        raise ValueError(f"{path} can be written by other users; run: chmod go-w {path}")
    for parent in path.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise ValueError(
                f"{parent}, above the cache, can be written by everyone; run: chmod o-w {parent}, "
                "or set SONIC_CACHE_DIR to another place"
            )


def _read(path: Path, owners: set[int]) -> bytes:
    """Content of a file of one of ``owners`` that nobody else can write."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise ValueError("it is not a regular file")
        if info.st_uid not in owners:
            raise ValueError(f"it belongs to another user (uid {info.st_uid})")
        if info.st_mode & _OTHERS_WRITE:
            raise ValueError(f"it can be written by other users (mode {info.st_mode & 0o777:o})")
        return file.read()


def _seal(content: bytes) -> bytes:
    return hashlib.sha256(content).digest() + _MARK


def _check_seal(data: bytes) -> None:
    content, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if not content or seal != _seal(content):
        raise ValueError("it is damaged or incomplete")


def _source_digest(arch: Arch) -> str:
    """Of every Python file that a kernel of ``arch`` is traced from."""
    sonic = Path(__file__).parents[1]
    digest = hashlib.sha256()
    single = [
        sonic / "enums.py",
        sonic / "runtime" / "problem.py",
        sonic / "runtime" / "objects.py",
    ]
    for root in (sonic / "device", _package_folder(f"kernels_{arch.value}"), *single):
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            content = path.read_bytes()
            name = path.relative_to(root.parent).as_posix()
            digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # a package without a parent: imports nothing
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the sources of {name} are not found")
    return Path(spec.submodule_search_locations[0])


def _compiler_settings(environment: Mapping[str, str]) -> str:
    names = sorted(n for n in environment if n.startswith("CUTE_DSL_") and n not in _HARMLESS)
    return " ".join(f"{name}={environment[name]}" for name in names)


def _digest(description: dict[str, str]) -> str:
    return _sha256(json.dumps(description, sort_keys=True).encode())[:16]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
