"""Wrong results on purpose: a comparison that accepts one is too loose to mean anything."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor


def zero_output(tensor: Tensor) -> Tensor:
    """Nothing was written, onto memory that happened to be zero."""
    return torch.zeros_like(tensor)


def swap_experts(
    tensor: Tensor, first: int, second: int, offset_by_expert: Tensor | None = None
) -> Tensor:
    """Two experts mixed up.

    Args:
        tensor: (E, ...), or (R, ...) with ``offset_by_expert``.
        first, second: the experts.
        offset_by_expert: (E + 1,); as many leading rows are exchanged as the smaller expert has.
    """
    swapped = tensor.clone()
    if offset_by_expert is None:
        one, two = slice(first, first + 1), slice(second, second + 1)
    else:
        bounds = offset_by_expert.tolist()
        count = min(bounds[e + 1] - bounds[e] for e in (first, second))
        one, two = (slice(bounds[e], bounds[e] + count) for e in (first, second))
    swapped[one], swapped[two] = tensor[two], tensor[one]
    return swapped


def drop_last_row(tensor: Tensor, offset_by_expert: Tensor, expert: int) -> Tensor:
    """The last row of an expert left out: an off-by-one at the ragged edge.

    Of an output it is the row that was never computed; of an operand of a weight gradient, the
    term that the sum lacks.
    """
    start, stop = offset_by_expert[expert : expert + 2].tolist()
    if stop == start:
        raise ValueError(f"expert {expert} has no row to drop")
    dropped = tensor.clone()
    dropped[stop - 1] = 0
    return dropped


def omit_scores(scores: Tensor) -> Tensor:
    """The router weights forgotten."""
    return torch.ones_like(scores)


def shift_offsets(offset_by_expert: Tensor, by: int = 1) -> Tensor:
    """Every boundary between two experts moved by ``by`` rows; the ends stay."""
    shifted = offset_by_expert.clone()
    shifted[1:-1] = (shifted[1:-1] + by).clamp(min=0, max=int(offset_by_expert[-1]))
    return shifted


def shift_plan_offsets(plan: Any) -> Any:
    """A :class:`sonic.RoutingPlan` with every inner boundary between experts a row late."""
    return replace(plan, offset_by_expert=shift_offsets(plan.offset_by_expert))


def drop_plan_row(plan: Any) -> Any:
    """A :class:`sonic.RoutingPlan` that lacks the last row of the first busy expert."""
    expert = int(plan.offset_by_expert.diff().nonzero()[0])
    row = int(plan.offset_by_expert[expert + 1]) - 1
    row_by_slot, slot_by_row = plan.row_by_slot.clone(), plan.slot_by_row.clone()
    row_by_slot[int(slot_by_row[row])] = -1
    slot_by_row[row] = -1
    return replace(plan, row_by_slot=row_by_slot, slot_by_row=slot_by_row)


def output_mutations(tensor: Tensor, offset_by_expert: Tensor | None = None) -> dict[str, Tensor]:
    """The mutations that can be made from an output alone, by name, those without effect left out.

    Args:
        tensor: (E, ...), or (R, ...) with ``offset_by_expert``; or any tensor, for the zero alone.
        offset_by_expert: (E + 1,).
    """
    mutated = {"zero_output": zero_output(tensor)}
    if offset_by_expert is not None:
        counts = offset_by_expert.diff()
        busy = torch.nonzero(counts)[:, 0].tolist()
        if busy:
            mutated["drop_last_row"] = drop_last_row(tensor, offset_by_expert, busy[-1])
    else:
        busy = list(range(tensor.shape[0])) if tensor.ndim >= 2 else []
    if len(busy) >= 2:
        mutated["swap_experts"] = swap_experts(tensor, busy[0], busy[-1], offset_by_expert)
    live = slice(None) if offset_by_expert is None else slice(int(offset_by_expert[-1]))
    return {
        name: wrong for name, wrong in mutated.items() if not torch.equal(wrong[live], tensor[live])
    }


def assert_mutations_fail(
    check: Callable[[Tensor], object],
    actual: Tensor,
    offset_by_expert: Tensor | None = None,
    *,
    expected: tuple[str, ...] = ("zero_output",),
) -> None:
    """Raise AssertionError if ``check`` accepts a mutation of ``actual``.

    Args:
        check: raises AssertionError on a wrong tensor, as :func:`sonic.testing.assert_close` does.
        actual: a tensor that ``check`` accepts.
        offset_by_expert: as in :func:`output_mutations`.
        expected: mutations that must have been possible, so that the guard is not itself vacuous.
    """
    check(actual)
    mutations = output_mutations(actual, offset_by_expert)
    missing = set(expected) - set(mutations)
    if missing:
        raise AssertionError(f"mutations without effect on this tensor: {sorted(missing)}")
    for name, wrong in mutations.items():
        try:
            check(wrong)
        except AssertionError:
            continue
        raise AssertionError(f"the comparison accepts a wrong result: {name}")
