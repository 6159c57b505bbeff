"""Memory that shows its misuse: poisoned allocations and guard bands around tensors."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FACTORIES = ("empty", "empty_like", "empty_strided", "empty_permuted")
_METHODS = ("new_empty", "new_empty_strided")
GUARD_BYTES = 65536


def poison_value(dtype: torch.dtype) -> float | int | bool:
    """What unwritten memory of ``dtype`` holds under poisoning.

    NaN for floating point, which any use spreads; half the least integer for signed integers, an
    index that is far out of bounds in either direction yet does not wrap when a little is added;
    three quarters of the range for unsigned ones; True for bool.
    """
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    if dtype is torch.bool:
        return True
    info = torch.iinfo(dtype)
    return info.min // 2 if info.min < 0 else info.max // 4 * 3


def poison_(tensor: Tensor) -> Tensor:
    """Overwrite with :func:`poison_value`, in place."""
    with torch.no_grad():
        return tensor.fill_(poison_value(tensor.dtype))


def poison_like(tensor: Tensor) -> Tensor:
    """A poisoned tensor of the same shape, dtype, strides and device."""
    return poison_(torch.empty_like(tensor))


def poison_dead_rows_(tensor: Tensor, offset_by_expert: Tensor) -> Tensor:
    """Poison the rows past the last expert, which nothing may read, in place."""
    poison_(tensor[int(offset_by_expert[-1]) :])
    return tensor


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Within the context, uninitialised allocations from Python come back poisoned.

    Covers ``torch.empty``, ``empty_like``, ``empty_strided``, ``empty_permuted`` and the methods
    ``new_empty`` and ``new_empty_strided``, looked up at call time, in all threads. A name bound
    earlier by ``from torch import empty`` is not covered.
    """
    with _empty_replaced_by(poison_):
        yield


@dataclass(frozen=True)
class _Guarded:
    name: str
    buffer: Tensor  # band, payload, band; of the payload's dtype
    band: int  # elements
    payload: int  # elements


class GuardedAllocator:
    """Hands out tensors that lie between two bands of poison, and checks the bands.

    The bands hold :func:`poison_value`, so that a read out of bounds spreads NaN, and a write out
    of bounds is found by :meth:`check`. Payloads start at 256-byte boundaries and are poisoned too.

    Args:
        guard_bytes: width of each band, a multiple of 256.
    """

    def __init__(self, guard_bytes: int = GUARD_BYTES) -> None:
        if guard_bytes <= 0 or guard_bytes % 256:
            raise ValueError(f"guard_bytes must be a positive multiple of 256; got {guard_bytes}")
        self._guard_bytes = guard_bytes
        self._allocations: list[_Guarded] = []
        # Bound now, so that it stays the real one inside `allocations()`.
        self._allocate = torch.empty

    def empty(
        self,
        size: tuple[int, ...],
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        name: str | None = None,
    ) -> Tensor:
        """A contiguous poisoned tensor between two bands."""
        payload = 1
        for length in size:
            payload *= length
        return self._carve(payload, dtype, device, name).view(size)

    def copy_of(self, tensor: Tensor, name: str | None = None) -> Tensor:
        """A contiguous copy of ``tensor`` between two bands: makes reads past an input visible."""
        return self.empty(
            tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device, name=name
        ).copy_(tensor.detach())

    @contextlib.contextmanager
    def allocations(self) -> Iterator[None]:
        """Within the context, the functions that :func:`poisoned_empty` covers allocate here."""
        with _empty_replaced_by(self._guard):
            yield

    def check(self) -> None:
        """Raise AssertionError if a band of any tensor handed out so far was written."""
        for allocation in self._allocations:
            end = allocation.band + allocation.payload
            for side, start, stop in (
                ("before", 0, allocation.band),
                ("after", end, end + allocation.band),
            ):
                damage = _not_poison(allocation.buffer[start:stop])
                if bool(damage.any()):
                    index = torch.nonzero(damage)[:, 0]
                    distance = (
                        allocation.band - int(index[-1]) if side == "before" else int(index[0]) + 1
                    )
                    raise AssertionError(
                        f"{allocation.name}: {index.numel()} element(s) {side} the tensor were "
                        f"written, the nearest {distance} element(s) out of bounds"
                    )

    def _carve(
        self, payload: int, dtype: torch.dtype, device: torch.device | str, name: str | None
    ) -> Tensor:
        band = self._guard_bytes // dtype.itemsize
        buffer = poison_(self._allocate(2 * band + payload, dtype=dtype, device=device))
        label = name or f"allocation {len(self._allocations)} ({payload} x {dtype})"
        self._allocations.append(_Guarded(label, buffer, band, payload))
        return buffer[band : band + payload]

    def _guard(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "meta" or tensor.layout is not torch.strided:
            return tensor
        spans = zip(tensor.shape, tensor.stride(), strict=True)
        extent = 0 if tensor.numel() == 0 else 1 + sum((n - 1) * step for n, step in spans)
        flat = self._carve(extent, tensor.dtype, tensor.device, None)
        guarded = flat.as_strided(tensor.shape, tensor.stride(), flat.storage_offset())
        return guarded.requires_grad_(tensor.requires_grad)


def _not_poison(band: Tensor) -> Tensor:
    """True where ``band`` differs from poison, bit for bit."""
    poison = poison_like(band)
    return (
        (band.view(torch.uint8) != poison.view(torch.uint8))
        .unflatten(0, band.shape + (-1,))
        .any(-1)
    )


@contextlib.contextmanager
def _empty_replaced_by(treat: Callable[[Tensor], Tensor]) -> Iterator[None]:
    def treated(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def replacement(*args: Any, **kwargs: Any) -> Tensor:
            return treat(allocate(*args, **kwargs))

        return replacement

    with contextlib.ExitStack() as undo:
        for owner, names in ((torch, _FACTORIES), (torch.Tensor, _METHODS)):
            for name in names:
                # Methods are inherited from a C base class: undoing means uncovering that again.
                if name in vars(owner):
                    undo.callback(setattr, owner, name, vars(owner)[name])
                else:
                    undo.callback(delattr, owner, name)
                setattr(owner, name, treated(getattr(owner, name)))
        yield
