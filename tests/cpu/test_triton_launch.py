"""`sonic.triton.launch` launches what Triton would have launched, on a driver that only records."""

import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from sonic.triton.launch import Launcher

pytestmark = pytest.mark.skipif(
    bool(triton.knobs.runtime.interpret), reason="TRITON_INTERPRET is set: nothing compiles"
)


@triton.jit(do_not_specialize=["size"])
def _scale_kernel(source, other, target, stride, size, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + index * stride, mask=index < size, other=0.0)
    if other is not None:
        value += tl.load(other + index, mask=index < size, other=0.0)
    tl.store(target + index, value * FACTOR, mask=index < size)


@dataclass
class _Driver:
    """Hands out a number for every kernel that is loaded, and records launches."""

    launches: list[tuple] = field(default_factory=list)
    overlapping: list[bool] = field(default_factory=list)  # of each launch
    arch: int = 90

    def __post_init__(self) -> None:
        self.utils, loaded, launches = self, itertools.count(1), self.launches
        overlapping = self.overlapping

        class RecordingLauncher:
            def __init__(self, source: Any, metadata: Any) -> None:
                self.overlaps = metadata.launch_pdl

            def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any):
                launches.append(((x, y, z), stream, function, rest))
                overlapping.append(self.overlaps)

        self.launcher_cls = RecordingLauncher
        self.load_binary = lambda *_: (1, next(loaded), 32, 0, 1024)
        self.unload_module = lambda module: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object = None) -> int:
        return 7

    def get_device_properties(self, device: object) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536}


@pytest.fixture
def driver(monkeypatch) -> _Driver:
    recording = _Driver()
    monkeypatch.setattr(triton.runtime.driver, "_active", recording)
    monkeypatch.setattr(_scale_kernel, "device_caches", type(_scale_kernel.device_caches)(
        _scale_kernel.create_binder
    ))  # fmt: skip
    return recording


_GLOBALS = Launcher.__call__.__globals__  # other tests import the package anew


@pytest.fixture
def on_a_gpu(monkeypatch) -> None:
    """Tensors of the CPU, whose device is -1, count as those of the current GPU."""
    monkeypatch.setitem(_GLOBALS, "current_device", lambda: -1)
    monkeypatch.setitem(_GLOBALS, "device_of", lambda tensor: contextlib.nullcontext())


def _tensor(dtype: torch.dtype = torch.float32, offset: int = 0) -> torch.Tensor:
    return torch.zeros(64, dtype=dtype)[offset:]


# Each line is a launch that Triton compiles, or may compile, a kernel of its own for.
CALLS = {
    "plain": ((_tensor(), _tensor(), _tensor(), 3, 40), {}),
    "other sizes": ((_tensor(), _tensor(), _tensor(), 3, 41), {}),
    "many": ((_tensor(), _tensor(), _tensor(), 3, 2**33), {}),
    "bf16": ((_tensor(torch.bfloat16), _tensor(), _tensor(), 3, 40), {}),
    "unaligned": ((_tensor(offset=1), _tensor(), _tensor(), 3, 40), {}),
    "absent": ((_tensor(), None, _tensor(), 3, 40), {}),
    "stride of one": ((_tensor(), _tensor(), _tensor(), 1, 40), {}),
    "stride of sixteen": ((_tensor(), _tensor(), _tensor(), 16, 40), {}),
    "long stride": ((_tensor(), _tensor(), _tensor(), 2**40, 40), {}),
    "factor": ((_tensor(), _tensor(), _tensor(), 3, 40), {"FACTOR": 3}),
    "warps": ((_tensor(), _tensor(), _tensor(), 3, 40), {"num_warps": 8}),
}


def _constants(changes: dict) -> dict:
    return {"FACTOR": 2, "BLOCK": 64, "num_warps": 4} | changes


def _address(argument: Any) -> Any:
    """Triton takes an address in place of a tensor."""
    return argument.data_ptr() if isinstance(argument, torch.Tensor) else argument


def test_launches_are_those_of_triton(driver: _Driver) -> None:
    launcher = Launcher(_scale_kernel)
    expected = {}
    for name, (arguments, changes) in CALLS.items():
        _scale_kernel[(5,)](*arguments, **_constants(changes))
        expected[name] = driver.launches[-1]
    assert len({launch[2] for launch in expected.values()}) >= len(CALLS) - 1
    # The second time around every launch is a remembered one.
    for _ in range(2):
        for name, (arguments, changes) in CALLS.items():
            count = len(driver.launches)
            launcher(5, *arguments, **_constants(changes))
            assert len(driver.launches) == count + 1
            grid, stream, function, rest = driver.launches[-1]
            assert (grid, stream, function) == expected[name][:3], name
            assert len(rest) == len(expected[name][3])
            for ours, theirs in zip(rest, expected[name][3], strict=True):
                if theirs is None or isinstance(theirs, (int, torch.Tensor)):
                    assert _address(ours) == _address(theirs), name


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_a_launch_overlaps_where_the_device_can(driver: _Driver, on_a_gpu, arch: int) -> None:
    driver.arch = arch
    arguments, _ = CALLS["plain"]
    for overlapping in (False, True):
        launcher = Launcher(_scale_kernel, overlapping=overlapping)
        fixed = launcher.bind(**_constants({})).fix(5, *arguments[3:])
        driver.overlapping.clear()
        for _ in range(3):
            launcher(5, *arguments, **_constants({}))
            fixed(*arguments[:3])
        assert driver.overlapping == [overlapping and arch >= 90] * 6


def _fixed(integers: tuple[int, ...] = (3, 40), **changes: Any) -> Any:
    return Launcher(_scale_kernel).bind(**_constants(changes)).fix(5, *integers)


def test_fixed_launches_are_those_of_triton(driver: _Driver, on_a_gpu) -> None:
    for name, (arguments, changes) in CALLS.items():
        _scale_kernel[(5,)](*arguments, **_constants(changes))
        expected = driver.launches[-1]
        launch = _fixed(arguments[3:], **changes)
        for _ in range(3):
            count = len(driver.launches)
            launch(*arguments[:3])
            assert len(driver.launches) == count + 1
            found = driver.launches[-1]
            assert found[:3] == expected[:3], name
            for ours, theirs in zip(found[3], expected[3], strict=True):
                if theirs is None or isinstance(theirs, (int, torch.Tensor)):
                    assert _address(ours) == _address(theirs), name


def test_a_fixed_launch_looks_at_nothing_but_its_tensors(
    driver: _Driver, on_a_gpu, monkeypatch
) -> None:
    launch = _fixed()
    launch(_tensor(), None, _tensor())

    def call(*_: Any) -> None:
        raise AssertionError("all facts were looked at")

    monkeypatch.setattr(type(launch._bound), "__call__", call)
    target = _tensor()
    launch(_tensor(), None, target)
    assert target.data_ptr() in driver.launches[-1][3]


@pytest.mark.parametrize(
    "other",
    [
        (_tensor(torch.bfloat16), None, _tensor()),
        (_tensor(), _tensor(), _tensor()),
        (_tensor(offset=1), None, _tensor()),
        (_tensor(), None, _tensor(torch.float16)),
    ],
    ids=["dtype", "no longer absent", "unaligned", "dtype of the last"],
)
def test_a_fixed_launch_of_other_tensors_is_another_kernel(
    driver: _Driver, on_a_gpu, other: tuple
) -> None:
    launch, usual = _fixed(), (_tensor(), None, _tensor())
    for tensors in (usual, other, usual, other, other, usual):
        launch(*tensors)
        found = driver.launches[-1]
        _scale_kernel[(5,)](*tensors, 3, 40, **_constants({}))
        assert found[:3] == driver.launches[-1][:3]


def test_a_fixed_launch_follows_the_current_device(driver: _Driver, on_a_gpu, monkeypatch) -> None:
    entered = []

    def device_of(tensor: torch.Tensor) -> Any:
        entered.append(tensor)
        return contextlib.nullcontext()

    monkeypatch.setitem(_GLOBALS, "device_of", device_of)
    launch, tensors = _fixed(), (_tensor(), None, _tensor())
    for _ in range(3):
        launch(*tensors)
    assert len(entered) == 1
    monkeypatch.setitem(_GLOBALS, "current_device", lambda: 1)
    launch(*tensors)
    assert len(entered) == 2 and len(driver.launches) == 4


def test_a_fixed_launch_is_seen_by_hooks(driver: _Driver, on_a_gpu, monkeypatch) -> None:
    launch, tensors = _fixed(), (_tensor(), None, _tensor())
    launch(*tensors)
    seen = []
    monkeypatch.setattr(
        _scale_kernel, "pre_run_hooks", [lambda *args, **kwargs: seen.append(kwargs["BLOCK"])]
    )
    launch(*tensors)
    assert seen == [64]


def test_threads_share_a_fixed_launch(driver: _Driver, on_a_gpu) -> None:
    launch = _fixed()
    kinds = [(_tensor(dtype), None, _tensor()) for dtype in (torch.float32, torch.bfloat16)]
    for tensors in kinds:
        launch(*tensors)
    functions = {}
    for tensors in kinds:
        launch(*tensors)
        functions[tensors[0].data_ptr()] = driver.launches[-1][2]
    driver.launches.clear()
    with ThreadPoolExecutor(4) as pool:
        done = [pool.submit(launch, *kinds[number % 2]) for number in range(400)]
    assert [future.result() for future in done] == [None] * 400
    assert len(driver.launches) == 400
    for _, _, function, rest in driver.launches:
        (source,) = functions.keys() & set(map(_address, rest))
        assert functions[source] == function


def test_a_remembered_launch_does_not_ask_triton(driver: _Driver, monkeypatch) -> None:
    launcher = Launcher(_scale_kernel)
    arguments, _ = CALLS["plain"]
    launcher(5, *arguments, **_constants({}))

    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("Triton was asked again")

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    launcher(9, *arguments, **_constants({}))
    assert driver.launches[-1][0] == (9, 1, 1)
    with pytest.raises(AssertionError, match="asked again"):
        launcher(9, *CALLS["absent"][0], **_constants({}))


def test_sizes_that_triton_does_not_tell_apart_are_one_entry(driver: _Driver) -> None:
    launcher = Launcher(_scale_kernel)
    source, other, target, _, size = CALLS["plain"][0]
    for strides, entries in (((3, 5, 7), 1), ((1, 1), 2), ((16, 32), 3), ((2**40, 2**41 + 16), 5)):
        for stride in strides:
            launcher(5, source, other, target, stride, size, **_constants({}))
            (bound,) = launcher._bound.values()
        assert len(bound._compiled) <= entries
    assert len({launch[2] for launch in driver.launches}) == len(bound._compiled)


def test_constants_of_other_types_are_other_kernels() -> None:
    launcher = Launcher(_scale_kernel)
    assert len({id(launcher.bind(FACTOR=factor)) for factor in (1, 1.0, True, 1)}) == 3


def test_another_triton_launches_its_own_way(driver: _Driver, monkeypatch) -> None:
    monkeypatch.setitem(Launcher.__call__.__globals__, "_TAKES_ADDRESSES", False)
    launcher = Launcher(_scale_kernel)
    arguments, _ = CALLS["plain"]
    for _ in range(2):
        launcher(5, *arguments, **_constants({}))
        assert any(argument is arguments[0] for argument in driver.launches[-1][3])


def test_hooks_of_triton_still_run(driver: _Driver, monkeypatch) -> None:
    launcher = Launcher(_scale_kernel)
    arguments, _ = CALLS["plain"]
    launcher(5, *arguments, **_constants({}))
    seen = []
    monkeypatch.setattr(
        _scale_kernel, "pre_run_hooks", [lambda *args, **kwargs: seen.append(kwargs["BLOCK"])]
    )
    launcher(5, *arguments, **_constants({}))
    assert seen == [64]


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_launch_hooks_of_triton_get_what_triton_gives_them(
    driver: _Driver, monkeypatch, name: str
) -> None:
    launcher = Launcher(_scale_kernel)
    arguments, _ = CALLS["plain"]
    launcher(5, *arguments, **_constants({}))
    hook = triton.knobs.runtime.__class__.__dict__[name].__class__()
    hook.add(lambda metadata: None)
    monkeypatch.setattr(triton.knobs.runtime, name, hook)
    launcher(5, *arguments, **_constants({}))
    assert hook in driver.launches[-1][3]
    hook.remove(hook.calls[0])
    launcher(5, *arguments, **_constants({}))
    assert hook not in driver.launches[-1][3]


def test_what_is_remembered_is_bounded(driver: _Driver, monkeypatch) -> None:
    # Other tests import the package anew, so its attributes need not lead to this module.
    monkeypatch.setitem(Launcher.__call__.__globals__, "_REMEMBERED", 3)
    launcher = Launcher(_scale_kernel)
    for arguments, changes in CALLS.values():
        launcher(5, *arguments, **_constants(changes))
        remembered = [len(bound._compiled) for bound in launcher._bound.values()]
        assert len(remembered) <= 3 and max(remembered) <= 3
    assert len(driver.launches) == len(CALLS)


def test_arguments_may_be_given_by_name(driver: _Driver) -> None:
    launcher = Launcher(_scale_kernel)
    source, other, target, stride, size = CALLS["plain"][0]
    for _ in range(2):
        launcher(5, source, other, target, stride=stride, size=size, **_constants({}))
    first, second = driver.launches
    assert first[2] == second[2]
    assert [*map(_address, first[3][-7:])] == [*map(_address, second[3][-7:])]
