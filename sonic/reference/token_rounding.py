"""Token rounding spelled out expert by expert: the oracle for the fast constructions.

Plain Python numbers and a full sort of every column, one decision per line; meant to be read and
compared with, not to be fast. Source: SonicMoE (arXiv 2512.14080), algorithms 4 and 6.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Reachable(NamedTuple):
    """What one expert's count may become: the multiples of the tile next to it, at most T."""

    frequency: int
    lower: int
    upper: int


def token_rounding_oracle(
    scores: Tensor, top_k: int, tile: int, rule: str = "nr", uniform: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept (token, expert) pairs and their scores, by ascending token, then expert.

    Args:
        scores: (T, E) floating point; a negative score ranks as zero.
        top_k: experts that a token chooses, at most E; equal scores go to the lower expert.
        tile: at least 1.
        rule: ``"nr"``, ``"sr"``, ``"nr-s"``, ``"balance-f"``, ``"up"`` or ``"down"``.
        uniform: (E,) numbers in [0, 1), for ``"sr"`` and ``"nr-s"``.

    Returns:
        ``token_ids`` and ``expert_ids`` int32, and the kept entries of ``scores``: lists of exactly
        as many entries as pairs are kept.
    """
    table = scores.detach().double().clamp(min=0).tolist()
    num_experts = scores.shape[1]
    chosen = {(t, e) for t, row in enumerate(table) for e in _largest(row, top_k)}
    draws = [0.0] * num_experts if uniform is None else uniform.double().tolist()
    kept: list[tuple[int, int]] = []
    error = 0  # rows added so far, less rows dropped
    for e in range(num_experts):
        column = [row[e] for row in table]
        # The paper subtracts one from the scores of tokens that did not choose the expert. A pair
        # of keys orders alike and keeps every bit of a small score; ties go to the lower token.
        order = sorted(range(len(table)), key=lambda t: ((t, e) not in chosen, -column[t], t))
        frequency = sum((t, e) in chosen for t in range(len(table)))
        counts = _reachable(frequency, tile, len(table))
        ranked = [column[t] for t in order]
        count = _rounded(counts, tile, rule, error, draws[e], ranked)
        error += count - frequency
        kept += [(t, e) for t in order[:count]]
    kept.sort()
    pairs = torch.tensor(kept, dtype=torch.int64, device=scores.device).view(-1, 2)
    tokens, experts = pairs.unbind(dim=1)
    return tokens.to(torch.int32), experts.to(torch.int32), scores[tokens, experts]


def _largest(row: list[float], top_k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:top_k]


def _reachable(frequency: int, tile: int, num_tokens: int) -> Reachable:
    if frequency == num_tokens:
        return Reachable(frequency, frequency, frequency)
    lower = frequency // tile * tile
    upper = lower if lower == frequency else min(lower + tile, num_tokens)
    return Reachable(frequency, lower, upper)


def _rounded(
    counts: Reachable, tile: int, rule: str, error: int, draw: float, ranked: list[float]
) -> int:
    """The count that ``rule`` chooses; ``ranked`` are the column's scores in order of preference,
    ``error`` the sum of ``count - frequency`` over the experts before this one."""
    frequency, lower, upper = counts
    if lower == upper or rule == "down":
        return lower
    if rule == "up":
        return upper
    if rule == "nr":
        up, down = upper - frequency, frequency - lower
        # Half way, the even multiple of the tile, as round() does.
        goes_up = up < down or (up == down and lower // tile % 2 == 1)
    elif rule == "balance-f":
        goes_up = abs(upper - frequency + error) < abs(lower - frequency + error)
    elif rule == "sr":
        goes_up = draw * (upper - lower) < frequency - lower
    elif rule == "nr-s":
        goes_up = draw * sum(ranked[lower:upper]) < sum(ranked[lower:frequency])
    else:
        raise ValueError(f"unknown rule {rule!r}")
    return upper if goes_up else lower
