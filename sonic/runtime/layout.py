"""Orders of gate and up: as columns of ``h`` and as rows of ``w1`` and ``b1``.

``h`` and its gradient keep gate and up in alternating blocks of eight columns,
``h[:, 16 b + 8 j + i] = (gate if j == 0 else up)[:, 8 b + i]``, whatever order ``w1`` has. If the
intermediate size is not a multiple of eight (the reference takes any), the last block is shorter:
its gate columns, then as many up columns.
"""

import torch
from torch import Tensor

from sonic.enums import GateUpLayout

BLOCK = 8


def pack_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """``(..., I)`` and ``(..., I)`` to ``(..., 2I)`` in blocks of eight along the last axis."""
    whole = gate.shape[-1] // BLOCK * BLOCK
    blocks = (whole // BLOCK, BLOCK)
    pair = [half[..., :whole].unflatten(-1, blocks) for half in (gate, up)]
    packed = torch.stack(pair, dim=-2).flatten(-3)
    if whole == gate.shape[-1]:
        return packed
    return torch.cat([packed, gate[..., whole:], up[..., whole:]], dim=-1)


def split_gate_up(h: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`pack_gate_up`: ``(..., 2I)`` to ``gate (..., I)`` and ``up (..., I)``."""
    intermediate = h.shape[-1] // 2
    whole = intermediate // BLOCK * BLOCK
    pair = h[..., : 2 * whole].unflatten(-1, (whole // BLOCK, 2, BLOCK))
    gate, up = pair[..., 0, :].flatten(-2), pair[..., 1, :].flatten(-2)
    if whole == intermediate:
        return gate, up
    gate_tail, up_tail = h[..., 2 * whole :].chunk(2, dim=-1)
    return torch.cat([gate, gate_tail], dim=-1), torch.cat([up, up_tail], dim=-1)


def gate_up_rows(weight: Tensor, layout: GateUpLayout, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Views of the gate rows and the up rows of ``w1 (E, 2I, H)`` or ``b1 (E, 2I)``.

    Args:
        weight: tensor whose axis ``dim`` has length ``2I``.
        layout: order of that axis.
        dim: the ``2I`` axis; 1 for ``w1`` and ``b1``, 0 for one expert's slice of them.

    Returns:
        ``(gate, up)``, views of ``weight`` with length ``I`` along ``dim``.
    """
    if GateUpLayout(layout) is GateUpLayout.CONCATENATED:
        gate, up = weight.chunk(2, dim)
    else:
        gate, up = weight.unflatten(dim, (weight.shape[dim] // 2, 2)).unbind(dim + 1)
    return gate, up


def merge_gate_up_rows(gate: Tensor, up: Tensor, layout: GateUpLayout, dim: int = 1) -> Tensor:
    """Inverse of :func:`gate_up_rows`: one tensor with length ``2I`` along ``dim``."""
    if GateUpLayout(layout) is GateUpLayout.CONCATENATED:
        return torch.cat([gate, up], dim)
    return torch.stack([gate, up], dim + 1).flatten(dim, dim + 1)


def rows_to_packed(weight: Tensor, layout: GateUpLayout, dim: int = 1) -> Tensor:
    """Reorder axis ``dim`` from ``layout`` to the column order of ``h``."""
    gate, up = gate_up_rows(weight, layout, dim)
    return pack_gate_up(gate.movedim(dim, -1), up.movedim(dim, -1)).movedim(-1, dim)


def packed_to_rows(packed: Tensor, layout: GateUpLayout, dim: int = 1) -> Tensor:
    """Inverse of :func:`rows_to_packed` (column sums of ``dh`` to ``db1``)."""
    gate, up = split_gate_up(packed.movedim(dim, -1))
    return merge_gate_up_rows(gate.movedim(-1, dim), up.movedim(-1, dim), layout, dim)
