"""Launching Triton kernels at little host time.

``kernel[grid](...)`` binds and classifies all arguments and assembles Triton's own key at every
call: 17 us for a kernel of 13 arguments (triton 3.9), of which the launch proper is 1 us plus the
driver's. A :class:`Launcher` remembers what was compiled by facts that it reads faster, and then
launches that as Triton does, with addresses in place of tensors: Triton asks the driver about every
tensor that it is given, and about no address.
"""

from typing import Any

import triton
from torch import Tensor
from torch.nn import Parameter

from sonic.triton.common import is_interpreted

_REMEMBERED = 1024  # compiled kernels of one Launcher; a training run needs a handful
_INT32 = 2**31


class Launcher:
    """A ``triton.jit`` kernel, called with its grid first.

    The facts that decide what is launched are at least as fine as those that Triton compiles for:
    dtype and 16-byte alignment of each tensor, presence of each optional one, the value of each
    integer (its width only, if it is named in ``do_not_specialize``), every constant, the device.

    Kernels take their arguments by position, the first one a tensor on the current device, and
    after them their ``tl.constexpr`` parameters, which are given by name like Triton's own options.
    """

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self._compiled: dict[tuple, tuple[Any, tuple]] = {}
        # Interpreted kernels have no parameters to look at, and are never remembered.
        self._by_width = [bool(p.do_not_specialize) for p in getattr(kernel, "params", ())]

    def __call__(self, programs: int, *arguments: Any, **constants: Any) -> None:
        """Launch ``programs`` programs on the current stream of the current device."""
        device = arguments[0].get_device()
        facts: list[Any] = [device, *constants, *constants.values()]
        values = []
        for argument, by_width in zip(arguments, self._by_width, strict=False):
            kind = type(argument)
            if kind is Tensor or kind is Parameter:
                address = argument.data_ptr()
                values.append(address)
                facts.append(argument.dtype)
                facts.append(address & 15 == 0)
            else:
                values.append(argument)
                facts.append(-_INT32 <= argument < _INT32 if by_width else argument)
        key = tuple(facts)
        found = self._compiled.get(key)
        if found is None or _is_observed(self.kernel):
            self._launch_first(key, programs, arguments, constants)
            return
        compiled, trailing = found
        stream = triton.runtime.driver.active.get_current_stream(device)
        compiled.run(
            programs, 1, 1, stream, compiled.function, compiled.packed_metadata,
            None, None, None, *values, *trailing,
        )  # fmt: skip

    def _launch_first(self, key: tuple, programs: int, arguments: tuple, constants: dict) -> None:
        """Let Triton compile and launch, and remember the kernel that it launched."""
        compiled = self.kernel[(programs,)](*arguments, **constants)
        if is_interpreted() or not isinstance(compiled, triton.compiler.CompiledKernel):
            return
        names = self.kernel.arg_names[len(arguments) :]
        if any(name not in constants for name in names):
            return  # left to a default: Triton fills it in
        if len(self._compiled) >= _REMEMBERED:
            self._compiled.clear()
        self._compiled[key] = compiled, tuple(constants[name] for name in names)


def _is_observed(kernel: Any) -> bool:
    """Whether someone asked Triton to be told of the launches of ``kernel``."""
    if kernel.pre_run_hooks:
        return True
    runtime = triton.knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if getattr(hook, "calls", hook):  # a chain of them; None or one callable before triton 3.5
            return True
    return False
