"""Host-side helpers of the Triton launchers."""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton

from sonic.runtime.eager import current_device
from sonic.runtime.errors import DeviceError, DTypeError, LayoutError, ShapeError

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_HERE = nullcontext()  # most layers are on the current device, and entering it again takes time


def cdiv(a: int, b: int) -> int:
    """``ceil(a / b)``; ``triton.cdiv`` works inside kernels too, and takes ten times as long."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least ``n``, for positive ``n``."""
    return 1 << (n - 1).bit_length()


def is_interpreted() -> bool:
    """True if Triton kernels run on CPU tensors (``TRITON_INTERPRET=1`` when triton was
    imported)."""
    return bool(triton.knobs.runtime.interpret)


def device_of(tensor: torch.Tensor) -> AbstractContextManager:
    """Make the tensor's GPU current while a kernel is launched on it."""
    if tensor.is_cuda:
        index = tensor.get_device()
        return _HERE if index == current_device() else torch.cuda.device(index)
    if is_interpreted():
        return _HERE
    raise DeviceError(
        f"Triton kernels need CUDA tensors, got one on {tensor.device}. Move it, or take the "
        "reference implementation (impl='reference', for a plan impl='torch')."
    )


def check_float(op: str, **tensors: torch.Tensor) -> None:
    """Raise :class:`DTypeError` unless every tensor is bf16, fp16 or fp32."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOAT_DTYPES:
            raise DTypeError(
                f"{op}: {name} has dtype {tensor.dtype}; the Triton kernel takes bfloat16, float16 "
                "and float32. Cast it, or use impl='reference'."
            )


def check_shape(op: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raise :class:`ShapeError` unless the tensor has exactly this shape."""
    if tensor.shape != shape:
        raise ShapeError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {shape}.")


def check_contiguous(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise :class:`LayoutError` unless every given tensor is contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise LayoutError(
                f"{op}: {name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}; it "
                "must be contiguous. Call .contiguous() on it."
            )


def row_major(tensor: torch.Tensor) -> torch.Tensor:
    """The matrix itself if its last axis is dense, else a contiguous copy."""
    if tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()
