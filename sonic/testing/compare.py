"""One tolerance policy: an error is judged against the error that low precision makes anyway.

``actual`` is accepted if its distance to a float64 result is at most twice that of a run in the
same dtype with the same rounding points (``ref_low``), plus a small band of ulps. That is asked of
the largest error and of the root mean square, over the whole tensor and over every block of rows
(every expert where experts are known), so that one bad tile among thousands cannot hide.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

FACTOR = 2.0
_ROWS_PER_BLOCK = 128
_ELEMENTS_PER_BLOCK = 4096  # of a vector
# Kept small for large blocks; a block of a few elements estimates the RMS too poorly for that.
_RMS_BAND_ULPS = 0.125


class _Block(NamedTuple):
    label: str
    start: int
    stop: int


@dataclass(frozen=True)
class BlockErrors:
    """Errors of one block of rows and the bounds that they were held to."""

    label: str
    start: int
    stop: int
    max_error: float
    max_bound: float
    rms_error: float
    rms_bound: float

    @property
    def excess(self) -> float:
        """How many times over its bound the worse of the two errors is; at most 1 if accepted."""
        return max(_ratio(self.max_error, self.max_bound), _ratio(self.rms_error, self.rms_bound))

    def __str__(self) -> str:
        return (
            f"{self.label} [rows {self.start}:{self.stop}]: "
            f"max {self.max_error:.3e} (allowed {self.max_bound:.3e}), "
            f"rms {self.rms_error:.3e} (allowed {self.rms_bound:.3e})"
        )


@dataclass(frozen=True)
class CloseReport:
    """Outcome of a passed :func:`assert_close`: the whole tensor and its worst block."""

    name: str
    whole: BlockErrors
    worst: BlockErrors


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """RMS of ``actual - expected`` over RMS of ``expected``, in float64; 0 if both are zero."""
    expected64 = expected.detach().double()
    error = torch.linalg.vector_norm(actual.detach().double().to(expected64.device) - expected64)
    return _ratio(error.item(), torch.linalg.vector_norm(expected64).item())


def assert_close(
    actual: Tensor,
    ref64: Tensor,
    ref_low: Tensor,
    *,
    per_expert_rows: Tensor | None = None,
    name: str = "tensor",
    factor: float = FACTOR,
    ulps: float = 1.0,
    band_dtype: torch.dtype | None = None,
    magnitude: float = 0.0,
    allow_zero_reference: bool = False,
) -> CloseReport:
    """Raise AssertionError unless ``actual`` is about as close to ``ref64`` as ``ref_low`` is.

    Args:
        actual: the tensor under test.
        ref64: the float64 oracle's result, same shape.
        ref_low: the low-precision reference's result, same shape and dtype as ``actual``.
        per_expert_rows: (E + 1,) ``offset_by_expert`` of a tensor whose rows are grouped by expert;
            rows from its last entry on are undefined and not looked at. Without it a block is one
            entry of the first axis of a tensor of rank 3 or more (an expert's weight), 128 rows of
            a matrix, or 4096 elements of a vector.
        name: what to call the tensor in the report.
        factor: allowed multiple of the error of ``ref_low``.
        ulps: width of the additional band, in units of ``band_dtype``'s epsilon times the largest
            (for the RMS: an eighth of epsilon times the RMS, more for tiny blocks) reference value.
        band_dtype: default ``actual.dtype``. For a float32 result that descends from rounded
            bfloat16 intermediates, such as the gradient of the scores: ``torch.bfloat16``.
        magnitude: lower limit of the reference value that the band is made of. For sums whose terms
            cancel, their typical size; otherwise a block that cancels to nearly nothing would be
            held to a band of nearly nothing.
        allow_zero_reference: accept a reference that is zero everywhere. Off by default, because a
            test that an all-zero output passes shows nothing.

    Returns:
        The errors and bounds, of the whole and of the worst block.
    """
    _check_comparable(actual, ref64, ref_low, name)
    band_dtype = band_dtype or actual.dtype
    device = ref64.device
    actual, ref64, ref_low = (t.detach().to(device) for t in (actual, ref64, ref_low))
    if ref64.ndim == 0:
        actual, ref64, ref_low = actual[None], ref64[None], ref_low[None]
    blocks = _blocks(ref64, per_expert_rows)
    if not blocks:
        empty = BlockErrors("nothing to compare", 0, 0, 0.0, 0.0, 0.0, 0.0)
        return CloseReport(name, empty, empty)
    sums = torch.stack([_block_sums(actual, ref64, ref_low, block, name) for block in blocks])
    if not allow_zero_reference and not sums[:, _REF_MAX].any():
        raise AssertionError(
            f"{name}: the reference is zero everywhere, so this comparison cannot tell a correct "
            "result from an empty one. Change the problem, or pass allow_zero_reference=True."
        )
    tolerance = _Tolerance(factor, ulps * torch.finfo(band_dtype).eps, magnitude)
    errors = [tolerance.judge(block, row) for block, row in zip(blocks, sums.tolist(), strict=True)]
    whole_sums = torch.where(_IS_MAXIMUM.to(device), sums.amax(dim=0), sums.sum(dim=0))
    span = _Block("whole tensor", blocks[0].start, blocks[-1].stop)
    whole = tolerance.judge(span, whole_sums.tolist())
    worst = max(errors, key=lambda block: block.excess)
    if max(whole.excess, worst.excess) > 1.0:
        raise AssertionError(_failure(name, actual, ref64, ref_low, whole, errors))
    return CloseReport(name, whole, worst)


# Columns of the per-block statistics.
_ERROR_MAX, _LOW_MAX, _REF_MAX, _ERROR_SQ, _LOW_SQ, _REF_SQ, _COUNT = range(7)
_IS_MAXIMUM = torch.tensor([True, True, True, False, False, False, False])


@dataclass(frozen=True)
class _Tolerance:
    factor: float
    band: float  # relative
    magnitude: float

    def judge(self, block: _Block, sums: list[float]) -> BlockErrors:
        count = max(sums[_COUNT], 1.0)
        low_rms = (sums[_LOW_SQ] / count) ** 0.5
        ref_rms = max((sums[_REF_SQ] / count) ** 0.5, self.magnitude)
        ref_max = max(sums[_REF_MAX], self.magnitude)
        rms_band = self.band * min(1.0, _RMS_BAND_ULPS + count**-0.5)
        return BlockErrors(
            *block,
            max_error=sums[_ERROR_MAX],
            max_bound=self.factor * sums[_LOW_MAX] + self.band * ref_max,
            rms_error=(sums[_ERROR_SQ] / count) ** 0.5,
            rms_bound=self.factor * low_rms + rms_band * ref_rms,
        )


def _check_comparable(actual: Tensor, ref64: Tensor, ref_low: Tensor, name: str) -> None:
    shapes = [tuple(t.shape) for t in (actual, ref64, ref_low)]
    if shapes[0] != shapes[1] or shapes[0] != shapes[2]:
        raise AssertionError(
            f"{name}: shapes differ: actual {shapes[0]}, ref64 {shapes[1]}, ref_low {shapes[2]}"
        )
    if actual.dtype != ref_low.dtype:
        raise AssertionError(
            f"{name}: actual is {actual.dtype}, but the low-precision reference {ref_low.dtype}"
        )
    if ref64.dtype != torch.float64:
        raise AssertionError(f"{name}: ref64 must be float64; got {ref64.dtype}")


def _blocks(reference: Tensor, per_expert_rows: Tensor | None) -> list[_Block]:
    length = reference.shape[0]
    if reference.numel() == 0:
        return []
    if per_expert_rows is not None:
        bounds = per_expert_rows.tolist()
        pairs = enumerate(zip(bounds[:-1], bounds[1:], strict=True))
        return [_Block(f"expert {e}", start, stop) for e, (start, stop) in pairs if stop > start]
    if reference.ndim >= 3:
        return [_Block(f"expert {e}", e, e + 1) for e in range(length)]
    size = _ELEMENTS_PER_BLOCK if reference.ndim == 1 else _ROWS_PER_BLOCK
    starts = enumerate(range(0, length, size))
    return [_Block(f"block {i}", start, min(start + size, length)) for i, start in starts]


def _block_sums(actual: Tensor, ref64: Tensor, ref_low: Tensor, block: _Block, name: str) -> Tensor:
    """Statistics of one block, float64, on the reference's device."""
    got, want, low = (t[block.start : block.stop].double() for t in (actual, ref64, ref_low))
    finite = torch.isfinite(want)
    same_special = torch.where(finite, torch.isfinite(got), _same_non_finite(got, want))
    if not bool(same_special.all()):
        where = _first(~same_special, block.start)
        raise AssertionError(
            f"{name}: {int((~same_special).sum())} element(s) of {block.label} are not finite "
            f"where the reference is, or not the same infinity or NaN; first at {list(where)}: "
            f"{actual[where].item()} instead of {ref64[where].item()}"
        )
    if not bool(torch.isfinite(low[finite]).all()):
        raise AssertionError(
            f"{name}: the low-precision reference itself is not finite in {block.label}; "
            "scale the problem down"
        )
    zero = torch.zeros_like(want)
    error = torch.where(finite, got - want, zero).abs()
    low_error = torch.where(finite, low - want, zero).abs()
    size = torch.where(finite, want, zero).abs()
    maxima = [t.max() for t in (error, low_error, size)]
    squares = [t.square().sum() for t in (error, low_error, size)]
    return torch.stack([*maxima, *squares, finite.sum().double()])


def _same_non_finite(got: Tensor, want: Tensor) -> Tensor:
    return (got == want) | (torch.isnan(got) & torch.isnan(want))


def _first(mask: Tensor, row_offset: int) -> tuple[int, ...]:
    index = torch.nonzero(mask)[0].tolist()
    return (index[0] + row_offset, *index[1:])


def _failure(
    name: str,
    actual: Tensor,
    ref64: Tensor,
    ref_low: Tensor,
    whole: BlockErrors,
    errors: list[BlockErrors],
) -> str:
    failed = sorted(
        (block for block in errors if block.excess > 1.0), key=lambda b: b.excess, reverse=True
    )
    worst = failed[0] if failed else max(errors, key=lambda block: block.excess)
    got, want = (t[worst.start : worst.stop].double() for t in (actual, ref64))
    error = torch.nan_to_num((got - want).abs(), nan=0.0, posinf=0.0)
    where = _first(error == error.max(), worst.start)
    lines = [
        f"{name} {tuple(actual.shape)} {actual.dtype} is further from float64 than low precision "
        "explains.",
        f"  {whole}",
        f"  worst: {worst}, {worst.excess:.2f} times what is allowed",
        f"  its largest error is at {list(where)}: {actual[where].item():.6g}, "
        f"float64 {ref64[where].item():.6g}, low precision {ref_low[where].item():.6g}",
        f"  {len(failed)} of {len(errors)} blocks fail",
    ]
    lines += [f"    {block}" for block in failed[1:6]]
    if not bool(actual.any()):
        lines.append("  the tensor is zero everywhere")
    return "\n".join(lines)


def _ratio(numerator: float, denominator: float) -> float:
    if numerator == 0.0:
        return 0.0
    return numerator / denominator if denominator > 0.0 else float("inf")
