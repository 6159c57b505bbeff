"""Launching Triton kernels at little host time.

``kernel[grid](...)`` binds and classifies all arguments and assembles Triton's own key at every
call: 17 us for a kernel of 13 arguments (triton 3.9), of which the launch proper is 1 us plus the
driver's. A :class:`Launcher` remembers what was compiled by facts that it reads faster, and then
launches that as Triton does, with addresses in place of tensors: Triton asks the driver about every
tensor that it is given, and about no address.

Launches of a sequence may overlap (programmatic dependent launch): the programs of one start when
those of the launch before have ended, and not only when that launch is over, or earlier where its
kernel permits it. They wait, see :func:`wait_for_earlier_launches`.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import cuda_capability_geq
from triton.runtime.jit import JITFunction

from sonic.runtime.eager import current_device
from sonic.triton.common import device_of, is_interpreted

# Those whose launcher takes addresses and no hooks: 3.6 runs so on a GPU, of 3.9 it was read and is
# tested. Others launch their own way, which takes longer.
_TESTED = ("3.6", "3.9")
_TAKES_ADDRESSES = ".".join(triton.__version__.split(".")[:2]) in _TESTED
_REMEMBERED = 1024  # compiled kernels of one Launcher; a training run needs a handful


_UNALIGNED = object()
_COMPILED = tl.constexpr(not is_interpreted())
_OVERLAPS = tl.constexpr(9)  # the least major compute capability whose launches do


@triton.jit
def wait_for_earlier_launches():
    """Wait until all launches ahead in the stream have ended and what they wrote can be read.

    The first thing that each program of an overlapping kernel does, ahead of any load, as data may
    not be there, and of any store, as the memory may have been that of something which an earlier
    launch still reads: the caching allocator hands memory on in the order of the stream. Of
    launches of which every program waits, the end of one is that of all before it; a kernel of
    others that comes behind starts no earlier than that all programs have ended.
    """
    if _COMPILED and cuda_capability_geq(_OVERLAPS, 0):
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_launch_start():
    """Allow the programs of the next launch to start and wait once all of this launch run.

    Only where that was measured to gain: programs then take places as these get free, presumably
    not evenly, and SMs that hold more of them end later. Of the plan's tiled sort the last three
    launches gain 1.0 to 1.6 us together, token rounding with 256 experts lost 3 of 33 (2026-11-28).
    Not before kernels of others, which may store before they wait.
    """
    if _COMPILED and cuda_capability_geq(_OVERLAPS, 0):
        tl.extra.cuda.gdc_launch_dependents()


class Launcher:
    """A ``triton.jit`` kernel, called with its grid first.

    The facts that decide what is launched are at least as fine as those that Triton compiles for:
    dtype and 16-byte alignment of each tensor, presence of each optional one, every constant, the
    device, and of each integer its width and, unless it is named in ``do_not_specialize``, whether
    it is 1 or a multiple of 16.

    Kernels take their arguments by position, the first one a tensor on the current device, and
    after them their ``tl.constexpr`` parameters, which are given by name like Triton's own options.

    ``overlapping``: programs may start before earlier launches have ended, and the kernel begins
    with :func:`wait_for_earlier_launches`.
    """

    def __init__(self, kernel: Any, overlapping: bool = False):
        self.kernel, self._overlapping = kernel, overlapping
        self._bound: dict[tuple, Bound] = {}

    def __call__(self, programs: int, *arguments: Any, **constants: Any) -> None:
        """Launch ``programs`` programs on the current stream of the current device."""
        self.bind(**constants)(programs, *arguments)

    def bind(self, **constants: Any) -> "Bound":
        """The kernel with these constants, which a hot path keeps: called with the rest, it looks
        at that only."""
        # 1, 1.0 and True are equal, and make different kernels.
        key = tuple([(name, type(value), value) for name, value in constants.items()])
        bound = self._bound.get(key)
        if bound is None:
            if len(self._bound) >= _REMEMBERED:
                self._bound.clear()
            bound = self._bound[key] = Bound(self.kernel, constants, self._overlapping)
        return bound


class Bound:
    """A kernel and its constants, see :meth:`Launcher.bind`."""

    def __init__(self, kernel: Any, constants: dict[str, Any], overlapping: bool = False):
        self.kernel, self._constants, self._overlapping = kernel, constants, overlapping
        self._compiled: dict[tuple, tuple[Any, tuple]] = {}
        # Interpreted kernels have no parameters to look at, and are never remembered.
        self._by_width = [bool(p.do_not_specialize) for p in getattr(kernel, "params", ())]

    def fix(self, programs: int, *integers: int) -> "Fixed":
        """The launch of a grid with the integers behind the tensors, which a hot path keeps."""
        return Fixed(self, programs, integers)

    def __call__(self, programs: int, *arguments: Any) -> tuple[Any, tuple] | None:
        """As :meth:`Launcher.__call__`.

        Returns:
            The compiled kernel and the constants behind its arguments; None where Triton decided.
        """
        device = arguments[0].get_device()
        values: list[Any] = []
        facts: list[Any] = [device]
        for argument, by_width in zip(arguments, self._by_width, strict=False):
            if isinstance(argument, Tensor):
                address = argument.data_ptr()
                values.append(address)
                facts.append(argument.dtype)
                if address & 15:
                    facts.append(_UNALIGNED)
            else:
                values.append(argument)
                facts.append(_look(argument, by_width))
        key = tuple(facts)
        found = self._compiled.get(key)
        if found is None or is_observed(self.kernel):
            self._launch_first(key, programs, arguments)
            return self._compiled.get(key)
        compiled, trailing = found
        stream = triton.runtime.driver.active.get_current_stream(device)
        compiled.run(
            programs, 1, 1, stream, compiled.function, compiled.packed_metadata,
            None, None, None, *values, *trailing,
        )  # fmt: skip
        return found

    def _launch_first(self, key: tuple, programs: int, arguments: tuple) -> None:
        """Let Triton compile and launch, and remember the kernel that it launched."""
        constants = self._constants
        options = {"launch_pdl": True} if self._overlapping and _can_overlap(self.kernel) else {}
        compiled = self.kernel[(programs,)](*arguments, **constants, **options)
        if not _TAKES_ADDRESSES or is_interpreted():
            return
        if not isinstance(compiled, triton.compiler.CompiledKernel):
            return
        names = self.kernel.arg_names[len(arguments) :]
        if any(name not in constants for name in names):
            return  # left to a default: Triton fills it in
        if len(self._compiled) >= _REMEMBERED:
            self._compiled.clear()
        self._compiled[key] = compiled, tuple(constants[name] for name in names)


class Fixed:
    """A launch of one grid, with the same integers at every call, see :meth:`Bound.fix`.

    Called with the tensors, or None, that come before the integers. Where they have the dtypes and
    the device of the call before, which most calls have, only addresses are looked at.
    """

    def __init__(self, bound: Bound, programs: int, integers: tuple[int, ...]):
        self._bound, self._programs, self._integers = bound, programs, integers
        self._kernel = bound.kernel
        # Replaced as a whole: threads may share a launch.
        self._known: tuple[Any, ...] = (None, (), None, None, None)

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on the current stream of the device of the first tensor."""
        device, dtypes, stream_of, compiled, trailing = self._known
        addresses: list[int | None] = []
        bits = 0
        for tensor, dtype in zip(tensors, dtypes, strict=False):
            if tensor is None or tensor.dtype is not dtype:
                if tensor is not dtype:  # None where there was a tensor, or another dtype
                    break
                addresses.append(None)
            else:
                address = tensor.data_ptr()
                bits |= address
                addresses.append(address)
        else:
            if (
                device is not None
                and not bits & 15
                and tensors[0].get_device() == device == current_device()  # type: ignore[union-attr]
                and not is_observed(self._kernel)
            ):
                compiled.run(
                    self._programs, 1, 1, stream_of(device), compiled.function,
                    compiled.packed_metadata, None, None, None, *addresses, *trailing,
                )  # fmt: skip
                return
        self._launch_anew(tensors)

    def _launch_anew(self, tensors: tuple[Any, ...]) -> None:
        """By facts, and remember the kernel if it is one for aligned tensors."""
        with device_of(tensors[0]):
            found = self._bound(self._programs, *tensors, *self._integers)
        if found is None or any(t is not None and t.data_ptr() & 15 for t in tensors):
            return
        compiled, constants = found
        dtypes = tuple([None if tensor is None else tensor.dtype for tensor in tensors])
        stream_of = triton.runtime.driver.active.get_current_stream
        trailing = *self._integers, *constants
        self._known = tensors[0].get_device(), dtypes, stream_of, compiled, trailing


def _can_overlap(kernel: Any) -> bool:
    """Whether the current device lets launches overlap, and it is one that ``kernel`` runs on."""
    if not isinstance(kernel, JITFunction):
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= 10 * _OVERLAPS.value


def _look(argument: Any, by_width: bool) -> Any:
    """What Triton compiles for in an argument that is no tensor."""
    kind = type(argument)
    if kind is not int:
        return kind
    width = 0 if -(2**31) <= argument < 2**31 else 4 if argument < 2**63 else 8
    return width if by_width else width + (argument == 1) + 2 * (argument % 16 == 0)


def is_observed(kernel: Any) -> bool:
    """Whether someone asked Triton to be told of the launches of ``kernel``."""
    if kernel.pre_run_hooks:
        return True
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Chains of them; None or one callable before triton 3.5.
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
