"""`sonic.triton.launch` launches what Triton would have launched, on a driver that only records."""

import itertools
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

    def __post_init__(self) -> None:
        self.utils, loaded, launches = self, itertools.count(1), self.launches

        class RecordingLauncher:
            def __init__(self, source: Any, metadata: Any) -> None:
                pass

            def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any):
                launches.append(((x, y, z), stream, function, rest))

        self.launcher_cls = RecordingLauncher
        self.load_binary = lambda *_: (1, next(loaded), 32, 0, 1024)
        self.unload_module = lambda module: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

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
        assert len(launcher._compiled) <= 3
    assert len(driver.launches) == len(CALLS)


def test_arguments_may_be_given_by_name(driver: _Driver) -> None:
    launcher = Launcher(_scale_kernel)
    source, other, target, stride, size = CALLS["plain"][0]
    for _ in range(2):
        launcher(5, source, other, target, stride=stride, size=size, **_constants({}))
    first, second = driver.launches
    assert first[2] == second[2]
    assert [*map(_address, first[3][-7:])] == [*map(_address, second[3][-7:])]
