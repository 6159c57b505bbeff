"""The command ``sonic``: compile kernels ahead of time, and say what works on this machine."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from sonic.enums import ActivationType
from sonic.runtime.columns import column_slices, slice_widths
from sonic.runtime.errors import SonicError
from sonic.runtime.fill import usable_cpus
from sonic.runtime.problem import (
    Arch,
    Operand,
    Problem,
    TileConfig,
    down_backward_act_problem,
    down_problem,
    up_backward_act_problem,
    up_problem,
    weight_grad_problem,
)

if TYPE_CHECKING:
    from sonic.runtime.backend import Backend
    from sonic.runtime.settings import CacheMode

_ELEMENT_BYTES = 2  # of bfloat16 and float16


@dataclass(frozen=True)
class LayerSize:
    """T tokens, H hidden, I intermediate, E experts, ``top_k`` experts per token."""

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    @property
    def rows_per_expert(self) -> int:
        return self.tokens * self.top_k // self.experts

    @classmethod
    def parse(cls, text: str) -> LayerSize:
        """Reads ``T,H,I,E,K``."""
        try:
            size = cls(*(int(part) for part in text.split(",")))
        except (TypeError, ValueError):
            size = None
        if size is None or min(size.tokens, size.hidden, size.intermediate, size.experts) < 1:
            raise argparse.ArgumentTypeError(f"expected five positive numbers, got {text!r}")
        if not 1 <= size.top_k <= size.experts:
            raise argparse.ArgumentTypeError(f"K={size.top_k} is not from 1 to E={size.experts}")
        return size


def check_sizes(sizes: Sequence[LayerSize]) -> None:
    """Refuse, before anything is compiled, layers that the kernels would refuse.

    :raises SonicError: with the text of the call that would fail.
    """
    from sonic import checks

    for size in sizes:
        op = "--thiek " + ",".join(str(number) for number in astuple(size))
        checks.check_aligned(op, "hidden_size", size.hidden, is_call=False)
        checks.check_aligned(op, "intermediate_size", size.intermediate, is_call=False)
        checks.check_num_experts(op, "the number of experts", size.experts)
        checks.check_int(op, "top_k", size.top_k, 1, checks.MAX_TOP_K, "winners of a token")
        checks.check_num_slots(op, size.tokens * size.top_k, "cute", is_call=False)


def layer_launches(
    size: LayerSize, activation: ActivationType, dtype: str, add_bias: bool
) -> list[tuple[Problem, int, int]]:
    """Problems that a layer of this size launches, with the ``n`` and ``k`` that tiles depend on:
    inference, training, accumulated gradients."""
    gated = activation.is_gated
    width = size.intermediate * (2 if gated else 1)
    launches: list[tuple[Problem, int, int]] = [
        (up_problem(activation, dtype, add_bias, True), width, size.hidden),
        (up_problem(activation, dtype, add_bias, False), width, size.hidden),
        (down_problem(dtype, add_bias), size.hidden, size.intermediate),
        (down_backward_act_problem(activation, dtype), size.intermediate, size.hidden),
        (up_backward_act_problem(dtype, gated), size.hidden, width),
    ]
    for accumulate in (False, True):
        down = weight_grad_problem(dtype, Operand.A, False, accumulate)
        up = weight_grad_problem(dtype, Operand.B, gated, accumulate)
        launches += [(down, size.intermediate, size.hidden), (up, size.hidden, width)]
    return launches


def all_launches(
    size: LayerSize, activation: ActivationType, dtype: str, add_bias: bool
) -> list[tuple[Problem, int, int]]:
    """:func:`layer_launches` and those of slices of columns, each once."""
    launches = layer_launches(size, activation, dtype, add_bias)
    return list(dict.fromkeys(launches + _sliced_launches(size, activation, dtype)))


def layer_kernels(
    default_config: Callable[[Problem, int, int, int, int], TileConfig],
    size: LayerSize,
    activation: ActivationType,
    dtype: str,
    add_bias: bool,
) -> list[tuple[Problem, TileConfig]]:
    """The same with the tiles of each, slices of columns included."""
    rows = size.rows_per_expert
    return [
        (problem, default_config(problem, rows, n, k, size.experts))
        for problem, n, k in all_launches(size, activation, dtype, add_bias)
    ]


def layer_kernels_of_any_tokens(
    default_configs: Callable[[Problem, int, int, int], list[TileConfig]],
    size: LayerSize,
    activation: ActivationType,
    dtype: str,
    add_bias: bool,
) -> list[tuple[Problem, TileConfig]]:
    """:func:`layer_kernels` of a layer of this size with every number of tokens, each once."""
    width = size.intermediate * (2 if activation.is_gated else 1)
    slices = up_backward_act_problem(dtype, activation.is_gated)
    launches = layer_launches(size, activation, dtype, add_bias)
    launches += [(slices, columns, width) for columns in slice_widths(size.hidden, width)]
    kernels = {
        (problem, config): None
        for problem, n, k in launches
        for config in default_configs(problem, n, k, size.experts)
    }
    return list(kernels)


def _sliced_launches(
    size: LayerSize, activation: ActivationType, dtype: str
) -> list[tuple[Problem, int, int]]:
    """What a large layer launches where the rows of its dX are made in slices of columns."""
    rows, width = size.tokens * size.top_k, size.intermediate * (2 if activation.is_gated else 1)
    slices = column_slices(rows, size.hidden, _ELEMENT_BYTES, rows * width * _ELEMENT_BYTES)
    problem = up_backward_act_problem(dtype, activation.is_gated)
    return [(problem, columns, width) for columns in sorted({columns for _, columns in slices})]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parsed = _parser().parse_args(arguments)
    try:
        status: int = parsed.run(parsed)
    except SonicError as error:
        print(f"sonic {parsed.command}: {error}", file=sys.stderr)
        return 2
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sonic", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    compiling = commands.add_parser(
        "compile", help="fill the cache of compiled kernels; needs no GPU"
    )
    compiling.set_defaults(run=_compile)
    compiling.add_argument("--arch", choices=[a.value for a in Arch], default=Arch.SM90.value)
    compiling.add_argument(
        "--gpu",
        metavar="KIND",
        type=str.upper,
        action="append",
        help="only the tiles of this kind of GPU, H100 or H200; may be repeated; default: of all",
    )
    _add_layer_arguments(compiling, compiling)
    compiling.add_argument(
        "--these_tokens",
        action="store_true",
        help="only what T tokens need, of use with SONIC_COMPILE=needed; "
        "otherwise what any number of tokens may need",
    )
    compiling.add_argument(
        "--inference", action="store_true", help="only what a layer without gradients needs"
    )
    tuning = commands.add_parser(
        "tune", help="search for the fastest tiles of a layer on this GPU, and keep them"
    )
    tuning.set_defaults(run=_tune)
    what = tuning.add_mutually_exclusive_group(required=True)
    what.add_argument("--show", action="store_true", help="print the tiles that are kept")
    what.add_argument("--clear", action="store_true", help="forget them")
    _add_layer_arguments(tuning, what)
    doctor = commands.add_parser("doctor", help="what is installed, what runs here, and why not")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_layer_arguments(
    parser: argparse.ArgumentParser, sizes: argparse._ActionsContainer
) -> None:
    """Layers, and how many kernels are compiled at once; ``sizes`` is where ``--thiek`` goes."""
    sizes.add_argument(
        "--thiek",
        type=LayerSize.parse,
        metavar="T,H,I,E,K",
        action="append",
        required=sizes is parser,
        help="tokens, hidden size, expert intermediate size, experts, and K: top_k, experts of a "
        "token; may be repeated",
    )
    parser.add_argument("--activation", choices=[a.value for a in ActivationType], default="swiglu")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16"], type=str.lower, default="bfloat16"
    )
    parser.add_argument("--add_bias", action="store_true", help="the layer has biases")
    parser.add_argument(
        "-j",
        "--jobs",
        type=_positive,
        default=usable_cpus(),
        help="kernels compiled at once (default: one per CPU, here %(default)s)",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def _compile(parsed: argparse.Namespace) -> int:
    from sonic.runtime.backend import load_backend

    check_sizes(parsed.thiek)
    arch = Arch(parsed.arch)
    backend = load_backend(arch, None)
    folder = folder_to_fill(arch)
    how = ActivationType(parsed.activation), parsed.dtype, parsed.add_bias
    kernels: dict[tuple[Problem, TileConfig], None] = {}
    for chosen_for, size in itertools.product(_asked_gpus(backend, parsed.gpu), parsed.thiek):
        if parsed.these_tokens:
            kernels |= dict.fromkeys(layer_kernels(chosen_for.default_config, size, *how))
        else:
            configs = chosen_for.default_configs
            kernels |= dict.fromkeys(layer_kernels_of_any_tokens(configs, size, *how))
    if parsed.inference:
        kernels = {kernel: None for kernel in kernels if kernel[0].is_of_inference}
    jobs = min(parsed.jobs, len(kernels))
    print(f"{len(kernels)} kernels for {arch.value} into {folder}, {jobs} at a time")
    return compile_kernels(arch, list(kernels), jobs)


def _asked_gpus(backend: Backend, kinds: list[str] | None) -> list[Backend]:
    """``backend`` for each kind of GPU that is asked for.

    :raises ArgumentError: there is no such kind.
    """
    from sonic.runtime.errors import ArgumentError

    for kind in kinds or ():
        if kind not in backend.gpus:
            raise ArgumentError(
                f"--gpu {kind!r}: {backend.arch.value} kernels choose tiles for "
                f"{' and '.join(backend.gpus)}; give one of these, or leave it out for all"
            )
    return [backend.for_gpu(kind) for kind in dict.fromkeys(kinds or backend.gpus)]


def folder_to_fill(arch: Arch) -> Path:
    """Where kernels of ``arch`` are kept.

    :raises ArgumentError: none would be.
    """
    from sonic.runtime.cache import kernel_cache
    from sonic.runtime.errors import ArgumentError
    from sonic.runtime.settings import CacheMode

    cache = kernel_cache()
    if cache.settings.cache is not CacheMode.READ_WRITE:
        raise ArgumentError(
            f"SONIC_CACHE is {cache.settings.cache.value}, so that no kernel would be kept; "
            "unset it, or set it to rw"
        )
    obstacle = cache.obstacle(arch, create=True)
    folder = cache.folder(arch, create=True)
    if obstacle is not None or folder is None:
        raise ArgumentError(f"the cache cannot be filled: {obstacle}")
    return folder


def compile_kernels(arch: Arch, kernels: list[tuple[Problem, TileConfig]], jobs: int) -> int:
    """Compiles in processes of their own, because CuTeDSL compiles one kernel at a time in each."""
    start, failures = time.perf_counter(), 0
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_hide_gpus) as pool:
        futures = {pool.submit(_compile_one, arch, *kernel): kernel for kernel in kernels}
        for done, future in enumerate(as_completed(futures), 1):
            problem, config = futures[future]
            try:
                outcome = future.result()
            # Also a process that died: the other kernels are still wanted.
            except (SonicError, OSError, RuntimeError) as error:
                outcome = f"failed: {error}"
                failures += 1
            print(f"[{done}/{len(kernels)}] {problem.name} {config.name}: {outcome}", flush=True)
    compiled = len(kernels) - failures
    print(f"{compiled} of {len(kernels)} in the cache after {time.perf_counter() - start:.1f} s")
    return 1 if failures else 0


def _hide_gpus() -> None:
    """Compiling needs no GPU, and a context in every process would take its memory."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _compile_one(arch: Arch, problem: Problem, config: TileConfig) -> str:
    """In a process of its own: what happened to one kernel."""
    from sonic.runtime.backend import load_backend
    from sonic.runtime.cache import KernelKey, kernel_cache
    from sonic.runtime.errors import CompileError
    from sonic.runtime.launch import kernel_for

    cache, key = kernel_cache(), KernelKey(arch, problem, config)
    if cache.load(key) is not None:
        return "was there"
    start = time.perf_counter()
    kernel_for(load_backend(arch), problem, config)
    if cache.load(key) is None:
        raise CompileError("compiled, but could not be kept; see the warning above")
    return f"compiled in {time.perf_counter() - start:.1f} s"


def _tune(parsed: argparse.Namespace) -> int:
    from sonic import tune

    return tune.run(parsed)


def _doctor(parsed: argparse.Namespace) -> int:
    """Prints a report; the status is 1 if something in it needs repair."""
    problems: list[str] = []
    for title, section in (
        ("packages", _packages),
        ("devices", _devices),
        ("compiled kernels", _cache),
    ):
        print(title)
        for line in section(problems):
            print(f"  {line}")
    print("to repair" if problems else "nothing to repair")
    for line in problems:
        print(f"  {line}")
    return 1 if problems else 0


def _packages(problems: list[str]) -> list[str]:
    import sonic
    from sonic.runtime import objects

    lines = [f"sonic {sonic.__version__}"]
    lines.append(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    required = ("torch", "triton", "nvidia-cutlass-dsl", "apache-tvm-ffi")
    for name in required:
        version = _version(name)
        if version is None:
            problems.append(f"{name} is not installed: pip install {name}")
        lines.append(f"{name} {version or 'is not installed'}")
    toolkits = ", ".join(objects.toolkits()) or "none found"
    lines.append(f"CuTeDSL toolkits: {toolkits}; used here: {objects.toolkit() or 'none'}")
    driver = objects.driver_version()
    supported = f"supports CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "none"
    lines.append(f"NVIDIA driver: {supported}")
    linker = objects.linker()
    fallback = "none: loading a kernel from disk imports CuTeDSL; install a C compiler"
    lines.append(f"linker: {linker[0] if linker else fallback}")
    return lines


def _devices(problems: list[str]) -> list[str]:
    try:
        import torch
    except ImportError:
        return ["unknown without torch"]
    import sonic

    lines = [f"torch is built for CUDA {torch.version.cuda or 'none'}"]
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        major, minor = torch.cuda.get_device_capability(device)
        name = f"GPU {index}: {torch.cuda.get_device_name(device)}, capability {major}.{minor}"
        lines.append(f"{name}: {sonic.is_available(device).reason}")
    if len(lines) == 1:
        lines.append(f"no kernel runs here: {sonic.is_available().reason}")
    lines.append('impl="reference" runs on every device')
    return lines


def _cache(problems: list[str]) -> list[str]:
    from sonic.runtime.cache import describe_toolchain, kernel_cache
    from sonic.runtime.settings import VARIABLES, CacheMode, unknown_variables

    for name in unknown_variables():
        problems.append(f"{name} is set, and no setting: there are {', '.join(VARIABLES)}")
    try:
        cache = kernel_cache()
    except SonicError as error:
        problems.append(str(error))
        return ["settings cannot be read"]
    arch = Arch.SM90
    mode = cache.settings.cache
    lines = [f"mode {mode.value}, directory {cache.settings.cache_dir}"]
    if mode is CacheMode.OFF:
        return lines
    obstacle = cache.obstacle(arch) or _missing_directory(cache.settings.cache_dir, mode)
    if obstacle is not None:
        problems.append(obstacle)
        return [*lines, "not used"]
    for name, value in describe_toolchain(arch).items():
        lines.append(f"key: {name} {value or 'none'}")
    report = cache.report(arch)
    lines.append(f"of this installation: {_amount(report.current, report.current_bytes)}")
    lines.append(f"of others: {_amount(report.other, report.other_bytes)}")
    for path in report.damaged:
        problems.append(
            f"damaged, and not used: {path}; remove it, and the kernel is compiled anew"
        )
    return lines


def _missing_directory(root: Path | None, mode: CacheMode) -> str | None:
    """What keeps a cache directory that is not there from being of use."""
    if root is None or root.exists():
        return None
    if mode.value == "ro":
        return (
            f"SONIC_CACHE is ro and {root} does not exist, so that every process compiles anew; "
            "fill it by sonic compile with SONIC_CACHE=rw, or name another in SONIC_CACHE_DIR"
        )
    place = root
    while not place.exists():
        place = place.parent
    if place.is_dir() and os.access(place, os.W_OK):
        return None
    return (
        f"{root} cannot be created, since {place} is no directory that can be written; "
        "set SONIC_CACHE_DIR to another"
    )


def _amount(entries: int, size: int) -> str:
    return f"{entries} kernels, {size / 1e6:.1f} MB"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
