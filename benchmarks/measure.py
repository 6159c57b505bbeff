"""Times, the ceiling they are held against, bytes saved for backward, and where it all ran.

One protocol for every time: load the device for ``LOAD_SECONDS`` without a pause, then time single
iterations back to back for ``TIMED_SECONDS`` with events on the stream, and take the median. A GPU
that has just been idle runs at higher clocks than one that trains, so times of other protocols do
not compare with these.
"""

import contextlib
import functools
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.figures import CEILING_UNIT, CUBLAS, Result
from benchmarks.layer import Layer, experts_forward, forward_backward, moe_forward
from benchmarks.shapes import BACKWARD_GEMMS, FORWARD_GEMMS, Shape

LOAD_SECONDS = 0.3
TIMED_SECONDS = 0.7
GEMM_LOAD_SECONDS = 0.12
GEMM_TIMED_SECONDS = 0.25
MIN_ITERATIONS = 3

PASSES = ("forward inference", "forward training", "forward + backward", "backward")
_PEERS = ("sonic-moe", "quack-kernels", "triton-kernels")  # named where they are installed
REGIONS = {
    "experts": (experts_forward, False),  # from given ids and weights
    "moe": (moe_forward, True),  # router GEMM, top-k and its backward included
}


def sustained_ms(
    function: Callable[[], object],
    device: torch.device,
    load_seconds: float = LOAD_SECONDS,
    timed_seconds: float = TIMED_SECONDS,
) -> float:
    """Median milliseconds of one call of ``function`` on a device that is kept busy."""
    function()
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    estimate = max(time.perf_counter() - start, 1e-6)
    for _ in range(math.ceil(load_seconds / estimate)):
        function()
    iterations = max(MIN_ITERATIONS, math.ceil(timed_seconds / estimate))
    if device.type != "cuda":
        return _wall_clock_ms(function, iterations)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    synchronize(device)
    pairs = zip(events, events[1:], strict=False)
    return statistics.median(before.elapsed_time(after) for before, after in pairs)


def _wall_clock_ms(function: Callable[[], object], iterations: int) -> float:
    times = []
    for _ in range(iterations):
        start = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def layer_times(layer: Layer, region: str) -> dict[str, float]:
    """Milliseconds of each of ``PASSES``; ``backward`` is the difference of two of them."""
    forward, with_router = REGIONS[region]
    device = layer.options.device

    def inference() -> torch.Tensor:
        with torch.no_grad():
            return forward(layer)

    times = {
        "forward inference": sustained_ms(inference, device),
        "forward training": sustained_ms(lambda: forward(layer), device),
        "forward + backward": sustained_ms(
            lambda: forward_backward(layer, forward, with_router), device
        ),
    }
    difference = times["forward + backward"] - times["forward training"]
    # On a machine that others use, noise can exceed the difference: then there is no figure.
    return times | {"backward": difference if difference > 0 else math.nan}


def ceiling_times(
    shape: Shape, gated: bool, dtype: torch.dtype, device: torch.device
) -> dict[str, float]:
    """Milliseconds of the six GEMMs as ``torch.bmm`` with equally many rows for every expert.

    No gather, no activation, no reduction over experts: what the same FLOPs and the same weight
    bytes cost in the vendor's library, in this run and at these clocks.
    """
    E, H, I = shape.E, shape.H, shape.I  # noqa: E741
    rows = max(1, round(shape.rows / E))
    wide = 2 * I if gated else I
    # (left, right) of each product, all with contiguous storage of the layer's own tensors
    sizes: dict[str, tuple[tuple[int, int], bool, tuple[int, int], bool]] = {
        "up": ((rows, H), False, (wide, H), True),
        "down": ((rows, I), False, (H, I), True),
        "dh": ((rows, H), False, (H, I), False),
        "dw2": ((rows, H), True, (rows, I), False),
        "dx": ((rows, wide), False, (wide, H), False),
        "dw1": ((rows, wide), True, (rows, H), False),
    }
    scale = shape.rows / (rows * E)  # the balanced problem may have a few rows more or fewer
    times = {}
    for name, (left_size, left_t, right_size, right_t) in sizes.items():
        left = torch.randn(E, *left_size, dtype=dtype, device=device)
        right = torch.randn(E, *right_size, dtype=dtype, device=device)
        product = functools.partial(
            torch.bmm, left.mT if left_t else left, right.mT if right_t else right
        )
        times[name] = scale * sustained_ms(product, device, GEMM_LOAD_SECONDS, GEMM_TIMED_SECONDS)
        del left, right, product
    return times


def pass_ceiling(gemm_ms: dict[str, float], name: str) -> float:
    """Milliseconds of the GEMMs that a pass consists of."""
    forward = sum(gemm_ms[gemm] for gemm in FORWARD_GEMMS)
    backward = sum(gemm_ms[gemm] for gemm in BACKWARD_GEMMS)
    return {"backward": backward, "forward + backward": forward + backward}.get(name, forward)


def pass_flops(shape: Shape, gated: bool, name: str) -> int:
    """FLOPs of a pass: 6, 12 or 18 R*I*H gated, 4, 8 or 12 otherwise."""
    forward, backward = shape.forward_flops(gated), shape.backward_flops(gated)
    return {"backward": backward, "forward + backward": forward + backward}.get(name, forward)


@dataclass(frozen=True)
class PassFigures:
    """One line of the speed table. ``percent`` is the share of the ceiling that was reached."""

    region: str
    name: str
    ms: float
    tflops: float
    percent: float


def speed_table(layer: Layer) -> tuple[list[PassFigures], dict[str, float]]:
    """Every pass of both regions, and the milliseconds of the ceiling's six GEMMs."""
    shape, options = layer.shape, layer.options
    gemm_ms = ceiling_times(shape, options.gated, options.dtype, options.device)
    figures = []
    for region in REGIONS:
        for name, ms in layer_times(layer, region).items():
            tflops = pass_flops(shape, options.gated, name) / ms * 1e-9
            percent = 100 * pass_ceiling(gemm_ms, name) / ms
            figures.append(PassFigures(region, name, ms, tflops, percent))
    return figures, gemm_ms


def record_speed(
    result: Result, problem: list[int], figures: list[PassFigures], gemm_ms: dict[str, float]
) -> None:
    """Add a speed table and its ceiling to a result."""
    for line in figures:
        metric = f"{line.region}/{line.name}"
        result.add(metric, line.ms, "ms", problem)
        result.add(metric, line.tflops, "TFLOPS", problem)
        result.add(metric, line.percent, CEILING_UNIT, problem)
    for gemm, ms in gemm_ms.items():
        result.add(gemm, ms, "ms", problem, provider=CUBLAS)


@dataclass(frozen=True)
class SavedBytes:
    """What autograd holds between forward and backward, parameters excluded.

    ``tensors`` are (shape, dtype, bytes), largest first; ``total`` is their sum, and ``formula`` is
    ``2TH + 4RI`` (gated, two bytes an element), which leaves the index metadata out.
    """

    total: int
    formula: int
    tensors: tuple[tuple[tuple[int, ...], str, int], ...]

    @property
    def metadata(self) -> int:
        """Bytes of everything that is not an activation: scores and index tensors."""
        return self.total - self.formula


def saved_bytes(layer: Layer, region: str = "experts") -> SavedBytes:
    """Count the distinct storages that one training forward of ``layer`` saves for backward."""
    forward, _ = REGIONS[region]
    parameters = (layer.router_weight, layer.w1, layer.w2, layer.b1, layer.b2)
    held = {tensor.untyped_storage().data_ptr() for tensor in parameters if tensor is not None}
    found: dict[int, tuple[tuple[int, ...], str, int]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held and storage.nbytes():
            dtype = str(tensor.dtype).removeprefix("torch.")
            found[storage.data_ptr()] = (tuple(tensor.shape), dtype, storage.nbytes())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward(layer)
    del out
    tensors = tuple(sorted(found.values(), key=lambda entry: -entry[2]))
    formula = layer.shape.saved_bytes(layer.options.gated, layer.x.element_size())
    return SavedBytes(sum(entry[2] for entry in tensors), formula, tensors)


def record_saved(result: Result, problem: list[int], saved: SavedBytes) -> None:
    """Add measured and predicted bytes to a result."""
    result.add("saved bytes", saved.total, "B", problem)
    result.add("saved bytes formula", saved.formula, "B", problem)


def environment(device: torch.device) -> dict[str, object]:
    """The head of a result file: device, driver, versions, commit, command, date, time (UTC)."""
    now = datetime.now(timezone.utc)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "driver": _driver() if device.type == "cuda" else None,
        "versions": _versions(),
        "commit": _commit(),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "date": now.strftime("%Y-%m-%d"),
        "time": now.strftime("%H:%M:%S"),
    }


def _versions() -> dict[str, str | None]:
    packages = ("torch", "triton", "nvidia-cutlass-dsl", "apache-tvm-ffi", "numpy")
    versions: dict[str, str | None] = {"python": platform.python_version()}
    versions["cuda"] = torch.version.cuda
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    for package in _PEERS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _commit() -> str | None:
    """``SONIC_COMMIT``, for a checkout without history, else git's; ``-dirty`` when edited."""
    if "SONIC_COMMIT" in os.environ:
        return os.environ["SONIC_COMMIT"]
    commit = _output("git", "rev-parse", "HEAD")
    if commit and _output("git", "status", "--porcelain", "--untracked-files=no"):
        return f"{commit}-dirty"
    return commit


def _output(*command: str) -> str | None:
    """First line of a command's output, or None if it is missing, fails or prints nothing."""
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            command, cwd=root, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)
