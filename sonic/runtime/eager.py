"""What an eager call can leave out: the dispatcher, and checks that passed before.

A custom operator with an autograd kernel costs 30 us of host time a call (torch 2.13, 2026-11),
which is as long as a small layer computes. An eager call on plain tensors, at which nobody looks,
may as well run the operator's Python function.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._device import DeviceContext

_Outcome = TypeVar("_Outcome")

_PLAIN = frozenset({Tensor, Parameter, type(None), int, str, bool, list})
_REMEMBERED = 4096  # signatures of one function


# Where there is a tensor on a GPU, CUDA is initialised, which torch.cuda makes sure of every time.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)

_KNOWN = all(
    hasattr(place, name)
    for place, name in (
        (torch._C, "_len_torch_dispatch_stack"),
        (torch._C, "_len_torch_function_stack"),
        (torch._C, "_are_functorch_transforms_active"),
        (torch._C, "_get_tracing_state"),
        (torch.autograd, "_profiler_enabled"),
        (forward_ad, "_current_level"),
    )
)


def needs_dispatcher(inputs: tuple[Any, ...]) -> bool:
    """Whether a call of an operator with ``inputs``, a tensor first, must go through torch.

    It must while it is traced, transformed, differentiated in forward mode or profiled, inside of
    any mode (fake tensors, counters, checkpointing policies) but a default device, for tensor
    subclasses and meta tensors, and where this torch cannot tell.
    """
    return (
        torch.compiler.is_compiling()
        or not _KNOWN
        or not _PLAIN.issuperset(map(type, inputs))
        or torch._C._len_torch_dispatch_stack() > 0
        or (torch._C._len_torch_function_stack() > 0 and not _only_default_device())
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
        or inputs[0].is_meta
        or torch._C._functorch.is_legacy_batchedtensor(inputs[0])  # is_grads_batched
    )


def _only_default_device() -> bool:
    """Whether the modes that are on do no more than to place new tensors: sonic places its own."""
    modes_of = getattr(torch.overrides, "_get_current_function_mode_stack", None)
    return modes_of is not None and all(type(mode) is DeviceContext for mode in modes_of())


def autocast_may_be_on() -> bool:
    """Whether a region of autocast, for any kind of device, may enclose the call."""
    ask = getattr(torch._C, "_is_any_autocast_enabled", None)
    return ask is None or bool(ask())


def unbatched(value: Any) -> Any:
    """The tensor below ``torch.vmap``, which alone knows whether a gradient is wanted."""
    while isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return value


def saved_tensors_are_hooked() -> bool:
    """Whether hooks see, and may keep, what is saved for a backward pass now."""
    ask = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return ask is None or ask(True) is not None


def graph_is_kept() -> bool:
    """Whether the backward pass that runs now leaves its graph for another one.

    If torch does not say, which its own compiler relies on too (2.9 to 2.13), it may.
    """
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


def is_being_captured() -> bool:
    """Whether a CUDA graph records what the current stream is given now."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def remembered(function: Callable[..., _Outcome]) -> Callable[..., _Outcome]:
    """``function``, which reads no more of tensors than what they look like, evaluated once for
    each look: shape, strides, dtype and device.

    Errors are not remembered. Other arguments are told apart by their value. Traced calls, tensor
    subclasses and arguments that cannot be hashed are evaluated every time.
    """
    outcomes: dict[tuple, _Outcome] = {}
    strided = torch.strided

    @functools.wraps(function)
    def look_up(*arguments: Any) -> _Outcome:
        if torch.compiler.is_compiling():
            return function(*arguments)
        key: list[Any] = []  # what an argument adds says by its first entry how much there is
        for argument in arguments:
            kind = type(argument)
            if kind is Tensor or kind is Parameter:
                if argument.layout is not strided:
                    return function(*arguments)
                key += argument.shape, argument.stride(), argument.dtype, argument.device
            elif kind is str or argument is None:
                key.append(argument)
            elif isinstance(argument, Tensor):
                return function(*arguments)
            else:
                key += kind, argument  # 1, 1.0 and True are equal, and not all of them are allowed
        look = tuple(key)
        try:
            return outcomes[look]
        except KeyError:
            pass
        except TypeError:
            return function(*arguments)
        outcome = function(*arguments)
        if len(outcomes) >= _REMEMBERED:
            outcomes.clear()
        outcomes[look] = outcome
        return outcome

    return look_up
