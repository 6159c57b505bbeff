"""Launching Triton kernels at little host time.

``kernel[grid](...)`` binds and classifies all arguments and assembles Triton's own key at every
call: 17 us for a kernel of 13 arguments (triton 3.9), of which the launch proper is 1 us plus the
driver's. A :class:`Launcher` remembers what was compiled by facts that it reads faster, and then
launches that (``CompiledKernel.__getitem__``, as in Triton's own tutorials).
"""

from typing import Any

import triton
from torch import Tensor

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
        self._by_value = [not p.do_not_specialize for p in getattr(kernel, "params", ())]

    def __call__(self, programs: int, *arguments: Any, **constants: Any) -> None:
        """Launch ``programs`` programs on the current stream of the current device."""
        facts = [
            (argument.dtype, argument.data_ptr() & 15 == 0)
            if isinstance(argument, Tensor)
            else argument
            if argument is None or by_value
            else -_INT32 <= argument < _INT32
            for argument, by_value in zip(arguments, self._by_value, strict=False)
        ]
        key = (arguments[0].get_device(), *constants, *constants.values(), *facts)
        found = self._compiled.get(key)
        if found is None or self.kernel.pre_run_hooks:
            self._launch_first(key, programs, arguments, constants)
            return
        compiled, trailing = found
        compiled[programs, 1, 1](*arguments, *trailing)

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
