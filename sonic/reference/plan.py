"""The routing plan spelled out slot by slot: the oracle for the fast constructions.

Plain Python lists, one decision per line; meant to be read and compared with, not to be fast.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class PlanTensors(NamedTuple):
    """The integer tensors of a routing plan, int32, on the device of the ids.

    A slot is an entry of the flat list of (token, expert) pairs; R of them. A row is a slot's place
    once live slots are grouped by expert, ascending by slot within an expert.
    """

    offset_by_expert: Tensor  # (E + 1,) expert e owns rows [offset[e], offset[e + 1])
    token_by_row: Tensor  # (R,) -1 past the last live row
    slot_by_row: Tensor  # (R,) -1 past the last live row
    row_by_slot: Tensor  # (R,) -1 for a dropped slot
    offset_by_token: Tensor | None  # (T + 1,) into slot_by_position; None for fixed top-k
    slot_by_position: Tensor | None  # (R,) slots of valid tokens by token, then -1; None likewise
    num_tokens: int
    top_k: int  # 0 if the pairs are not a (T, top_k) table


def plan_oracle(topk_ids: Tensor, num_experts: int) -> PlanTensors:
    """Plan of a (T, top_k) table of expert ids; ids outside ``[0, num_experts)`` are dropped."""
    num_tokens, top_k = topk_ids.shape
    tokens = [slot // top_k for slot in range(num_tokens * top_k)]
    experts = topk_ids.flatten().tolist()
    grouped = _group_rows(tokens, experts, num_tokens, num_experts, topk_ids.device)
    return PlanTensors(*grouped, None, None, num_tokens, top_k)


def plan_oracle_flat(
    token_ids: Tensor, expert_ids: Tensor, num_tokens: int, num_experts: int
) -> PlanTensors:
    """Plan of flat lists (R,) of token and expert ids in any order.

    A pair whose expert is outside ``[0, num_experts)`` or whose token is outside
    ``[0, num_tokens)`` is dropped; the latter has no place in ``slot_by_position`` either.
    """
    device = expert_ids.device
    tokens, experts = token_ids.tolist(), expert_ids.tolist()
    grouped = _group_rows(tokens, experts, num_tokens, num_experts, device)
    slots_by_token: list[list[int]] = [[] for _ in range(num_tokens)]
    for slot, token in enumerate(tokens):
        if 0 <= token < num_tokens:
            slots_by_token[token].append(slot)
    offsets, positions = _flatten(slots_by_token, len(tokens))
    return PlanTensors(
        *grouped, _int32(offsets, device), _int32(positions, device), num_tokens, top_k=0
    )


def _group_rows(
    tokens: list[int], experts: list[int], num_tokens: int, num_experts: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots_by_expert: list[list[int]] = [[] for _ in range(num_experts)]
    for slot, (token, expert) in enumerate(zip(tokens, experts, strict=True)):
        if 0 <= token < num_tokens and 0 <= expert < num_experts:
            slots_by_expert[expert].append(slot)
    offsets, slot_by_row = _flatten(slots_by_expert, len(tokens))
    row_by_slot = [-1] * len(tokens)
    for row, slot in enumerate(slot_by_row[: offsets[-1]]):
        row_by_slot[slot] = row
    token_by_row = [tokens[slot] if slot >= 0 else -1 for slot in slot_by_row]
    return (
        _int32(offsets, device),
        _int32(token_by_row, device),
        _int32(slot_by_row, device),
        _int32(row_by_slot, device),
    )


def _flatten(groups: list[list[int]], length: int) -> tuple[list[int], list[int]]:
    """Group boundaries, and the groups joined and padded with -1 to ``length``."""
    offsets, joined = [0], []
    for group in groups:
        joined.extend(group)
        offsets.append(len(joined))
    return offsets, joined + [-1] * (length - len(joined))


def _int32(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
