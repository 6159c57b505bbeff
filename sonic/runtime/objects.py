"""Compiled kernels as files: written by CuTeDSL, loaded without importing it.

A kernel is exported as an object file and, where there is a linker, linked into a shared library
that needs CuTeDSL's small run-time library and TVM-FFI only: loading it takes under a millisecond
instead of the import of the compiler. Without a linker the object file itself is kept, and loading
it imports CuTeDSL.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

_log = logging.getLogger("sonic")

SUFFIXES = (".so", ".o")  # what a kept kernel may be, the better form first

_RUNTIME = "libcute_dsl_runtime.so"
# Host code is generated for the CPU it is compiled on, AVX-512 included, unless each function says
# otherwise: a cache filled on one machine must run on every other one.
_BASELINE_BY_MACHINE = {"x86_64": ("x86-64", "+sse2"), "aarch64": ("generic", "+neon")}


def write_object(compiled: Any, folder: Path, symbol: str) -> Path:
    """Writes what ``cute.compile`` returned into ``folder``, to be found as ``symbol``.

    :returns: the file, whose suffix is one of ``SUFFIXES``.
    """
    _target_baseline_cpu(compiled.ir_module)
    path = folder / "kernel.o"
    compiled.export_to_c(object_file_path=str(path), function_name=symbol)
    return _link(path) or path


def load_object(path: Path, symbol: str) -> Any:
    """The function ``symbol`` of a file of :func:`write_object`. It touches no GPU until called.

    :raises Exception: whatever a loader raises about a file that it cannot load.
    """
    runtime = runtime_library()
    if path.suffix == ".so" and runtime is not None:
        import tvm_ffi

        _keep_loaded(str(runtime))
        return tvm_ffi.load_module(str(path))[symbol]
    from cutlass.cute.runtime import load_module

    return getattr(load_module(str(path), enable_tvm_ffi=True), symbol)


def toolkits() -> dict[str, Path]:
    """CuTeDSL's run-time library of each installed toolkit (``cu12``, ``cu13``), newest first."""
    spec = importlib.util.find_spec("nvidia_cutlass_dsl")
    roots = spec.submodule_search_locations if spec is not None else None
    found = {
        int(match[1]): path
        for root in roots or ()
        for path in Path(root).glob(f"cu*/lib/{_RUNTIME}")
        if (match := re.fullmatch(r"cu(\d+)", path.parents[1].name))
    }
    return {f"cu{version}": found[version] for version in sorted(found, reverse=True)}


@functools.cache
def toolkit() -> str | None:
    """The toolkit that CuTeDSL will use here: the newest one that the driver, if any, supports."""
    driver = driver_version()
    for name in toolkits():
        if driver is None or driver // 1000 >= int(name.removeprefix("cu")):
            return name
    return None


@functools.cache
def driver_version() -> int | None:
    """CUDA version of the driver, 1000 major + 10 minor, or ``None`` without a driver."""
    version = ctypes.c_int(0)
    try:
        status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return version.value if status == 0 else None


@functools.cache
def runtime_library() -> Path | None:
    """CuTeDSL's run-time library, chosen as CuTeDSL chooses it, or ``None`` if it is not found."""
    for path in os.environ.get("CUTE_DSL_LIBS", "").split(":"):
        if path.endswith(_RUNTIME):
            return Path(path)
    name = toolkit()
    return toolkits()[name] if name is not None else None


def linker() -> list[str] | None:
    """Command that links a shared library: ``$CC``, a C compiler, or ``ld``."""
    chosen = shlex.split(os.environ.get("CC", ""))
    for command in (chosen, ["cc"], ["gcc"], ["clang"], ["ld"], ["ld.lld"]):
        path = shutil.which(command[0]) if command else None
        if path is not None:
            return [path, *command[1:]]
    return None


def _target_baseline_cpu(module: Any) -> None:
    from cutlass._mlir import ir

    cpu, features = _BASELINE_BY_MACHINE[platform.machine()]
    with module.context:
        for operation in (view.operation for view in module.body.operations):
            if operation.name == "llvm.func":
                operation.attributes["target_cpu"] = ir.StringAttr.get(cpu)
                operation.attributes["target_features"] = ir.Attribute.parse(
                    f'#llvm.target_features<["{features}"]>'
                )


def _link(object_file: Path) -> Path | None:
    """Shared library of an object file, or ``None`` where it cannot be linked."""
    command, runtime = linker(), runtime_library()
    if command is None or runtime is None:
        return None
    import tvm_ffi

    library = object_file.with_suffix(".so")
    # Both libraries are found by their name when the kernel is loaded, because they are loaded
    # already; being named, they also outlive the kernel's destructor when the process ends.
    needed = [str(runtime), str(tvm_ffi.libinfo.find_libtvm_ffi())]
    command = [*command, "-shared", "-nostdlib", "-o", str(library), str(object_file), *needed]
    try:
        subprocess.run(command, capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        _log.info("kept an object file, because %s failed: %s", command[0], error)
        return None
    return library


@functools.cache
def _keep_loaded(path: str) -> ctypes.CDLL:
    return ctypes.CDLL(path)
