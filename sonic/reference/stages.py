"""The stages of the layer in torch: same names and signatures as the kernels, and their rounding
points but for two that :mod:`sonic.stages` names.

Sizes: T tokens, H hidden, I intermediate, E experts, R rows (the static bound on routed rows).
Rows are grouped by expert: expert e owns ``[offset_by_expert[e], offset_by_expert[e + 1])``. Rows
from ``offset_by_expert[E]`` on belong to no expert: no stage reads them, and what an output holds
there is undefined.

Rounding: bfloat16 and float16 operands are summed in float32, float32 and float64 in themselves,
and every output is rounded once. The forward activation is computed from the pre-activation before
that is rounded; the backward from the rounded one, since that is what is saved.

Stages loop over experts on the host and read ``offset_by_expert`` there, which synchronises.

Source: SonicMoE, arXiv 2512.14080: the kernels of its forward and backward pass.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sonic.enums import ActivationType, GateUpLayout
from sonic.reference.activations import activation_grad, activation_value
from sonic.reference.numerics import accumulator_dtype
from sonic.runtime.layout import (
    gate_up_rows,
    merge_gate_up_rows,
    pack_gate_up,
    split_gate_up,
)


def _busy_experts(offset_by_expert: Tensor) -> Iterator[tuple[int, slice]]:
    """Experts that own at least one row, each with its row range."""
    bounds = offset_by_expert.tolist()
    for expert, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        if stop > start:
            yield expert, slice(start, stop)


def _gather(source: Tensor, token_by_row: Tensor | None, rows: slice) -> Tensor:
    return source[rows if token_by_row is None else token_by_row[rows]]


def up_forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    token_by_row: Tensor,
    offset_by_expert: Tensor,
    *,
    activation: ActivationType,
    layout: GateUpLayout,
    store_preact: bool,
) -> tuple[Tensor | None, Tensor]:
    """``h = gather(x) w1[e]^T + b1[e]`` and ``a = act(h)``.

    Args:
        x: (T, H).
        w1: (E, 2I, H) gated or (E, I, H).
        b1: (E, 2I) or (E, I), or ``None``.
        token_by_row: (R,) int32.
        offset_by_expert: (E + 1,) int32.
        activation: decides whether the layer is gated.
        layout: order of gate and up rows in ``w1`` and ``b1``; ignored if not gated.
        store_preact: whether ``h`` is wanted.

    Returns:
        ``h`` (R, 2I) in alternating blocks of eight (:func:`~sonic.runtime.layout.pack_gate_up`),
        (R, I) if not gated, None without ``store_preact``; and ``a`` (R, I). Dtype of ``x``.
    """
    activation = ActivationType(activation)
    acc = accumulator_dtype(x.dtype)
    num_rows, width = token_by_row.shape[0], w1.shape[1]
    h = x.new_zeros((num_rows, width)) if store_preact else None
    a = x.new_zeros((num_rows, width // 2 if activation.is_gated else width))
    for expert, rows in _busy_experts(offset_by_expert):
        x_e = x[token_by_row[rows]].to(acc)
        preact = x_e @ w1[expert].to(acc).T
        if b1 is not None:
            preact = preact + b1[expert].to(acc)
        if activation.is_gated:
            gate, up = gate_up_rows(preact, layout)
            a[rows] = activation_value(activation, gate, up).to(x.dtype)
            preact = pack_gate_up(gate, up) if h is not None else preact
        else:
            a[rows] = activation_value(activation, preact).to(x.dtype)
        if h is not None:
            h[rows] = preact.to(x.dtype)
    return h, a


def down_forward(a: Tensor, w2: Tensor, b2: Tensor | None, offset_by_expert: Tensor) -> Tensor:
    """``y = a w2[e]^T + b2[e]``.

    Args:
        a: (R, I); w2: (E, H, I); b2: (E, H) or ``None``; offset_by_expert: (E + 1,) int32.

    Returns:
        (R, H) in the dtype of ``a``.
    """
    acc = accumulator_dtype(a.dtype)
    y = a.new_zeros((a.shape[0], w2.shape[1]))
    for expert, rows in _busy_experts(offset_by_expert):
        y_e = a[rows].to(acc) @ w2[expert].to(acc).T
        if b2 is not None:
            y_e = y_e + b2[expert].to(acc)
        y[rows] = y_e.to(a.dtype)
    return y


def combine(
    rows: Tensor,
    row_by_slot: Tensor,
    scores: Tensor | None,
    offset_by_token: Tensor | None,
    slot_by_position: Tensor | None,
    num_tokens: int,
    top_k: int,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """``out[t] = sum over the slots of t of scores[slot] * rows[row_by_slot[slot]]``.

    Summed in ascending slot order. Dropped slots are skipped; a token without a live slot gets
    zeros.

    Args:
        rows: (R, H).
        row_by_slot: (R,) int32, -1 for a dropped slot.
        scores: R in slot order, in any shape, or ``None`` for a plain sum.
        offset_by_token: (T + 1,) int32, or ``None`` if token t owns ``top_k`` slots from
            ``t * top_k``.
        slot_by_position: (R,) int32, slots grouped by token; ``None`` with ``offset_by_token``,
            or where slots lie by token.
        num_tokens: T.
        top_k: slots per token; not read when ``offset_by_token`` is given.
        out: (T, H) to write into, or ``None`` for a new tensor.

    Returns:
        (T, H) in the dtype of ``rows``.
    """
    acc = accumulator_dtype(rows.dtype)
    total = torch.zeros((num_tokens, rows.shape[1]), dtype=acc, device=rows.device)
    if num_tokens == 0 or row_by_slot.shape[0] == 0:
        return total.to(rows.dtype) if out is None else out.copy_(total)
    if offset_by_token is None:
        offset_by_token = torch.arange(num_tokens + 1, device=rows.device) * top_k
    if slot_by_position is None:
        slot_by_position = torch.arange(row_by_slot.shape[0], device=rows.device)
    last = slot_by_position.shape[0] - 1
    begin, end = offset_by_token[:-1], offset_by_token[1:]
    for step in range(int((end - begin).max())):
        position = begin + step
        slot = slot_by_position[position.clamp(max=last)]
        row = row_by_slot[slot.clamp(min=0)]
        live = (position < end) & (row >= 0)
        term = rows[row.clamp(min=0)].to(acc)
        if scores is not None:
            term = term * scores.view(-1)[slot.clamp(min=0)].to(acc)[:, None]
        total += torch.where(live[:, None], term, torch.zeros_like(term))
    return total.to(rows.dtype) if out is None else out.copy_(total)


def gather_scores(scores: Tensor, slot_by_row: Tensor) -> Tensor:
    """Scores in row order: ``scores[slot_by_row]``, and zero where ``slot_by_row`` is -1.

    Args:
        scores: R in slot order, in any shape; slot_by_row: (R,) int32.

    Returns:
        (R,) in the dtype of ``scores``.
    """
    gathered = scores.view(-1)[slot_by_row.clamp(min=0)]
    return torch.where(slot_by_row >= 0, gathered, torch.zeros_like(gathered))


def down_backward_act(
    dout: Tensor,
    w2: Tensor,
    h: Tensor,
    score_by_row: Tensor,
    token_by_row: Tensor,
    offset_by_expert: Tensor,
    *,
    activation: ActivationType,
    overwrite_h: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Backward through the down-projection and the activation.

    With ``P = gather(dout) w2[e]`` (not scaled by the score) and ``a = act(h)`` rebuilt from the
    saved ``h``: ``dh = act'(h) (score P)``, ``a_scaled = score a`` and the score's gradient
    ``<P, a>``, which spares both keeping and reading the expert outputs.

    Args:
        dout: (T, H); w2: (E, H, I); h: as from :func:`up_forward`.
        score_by_row: (R,); token_by_row: (R,) int32; offset_by_expert: (E + 1,) int32.
        overwrite_h: whether ``dh`` takes the memory of ``h``.

    Returns:
        ``dh`` like ``h``; ``a_scaled`` (R, I) in the dtype of ``dout``; ``ds_partial`` (1, R) in
        the accumulator dtype, summing over its first axis to ``<P, a>``. Kernels return more parts.
    """
    activation = ActivationType(activation)
    acc = accumulator_dtype(dout.dtype)
    num_rows = token_by_row.shape[0]
    # Unseen by autograd, as a kernel does: who owns h says what a second pass is told.
    dh = h.data if overwrite_h else torch.zeros_like(h)
    a_scaled = dout.new_zeros((num_rows, w2.shape[2]))
    ds_partial = torch.zeros((1, num_rows), dtype=acc, device=dout.device)
    for expert, rows in _busy_experts(offset_by_expert):
        p = dout[token_by_row[rows]].to(acc) @ w2[expert].to(acc)
        score = score_by_row[rows].to(acc)[:, None]
        h_e = h[rows].to(acc)
        gate, up = split_gate_up(h_e) if activation.is_gated else (h_e, None)
        a = activation_value(activation, gate, up)
        dgate, dup = activation_grad(activation, score * p, gate, up)
        dh[rows] = (dgate if dup is None else pack_gate_up(dgate, dup)).to(h.dtype)
        a_scaled[rows] = (score * a).to(dout.dtype)
        ds_partial[0, rows] = (p * a).sum(dim=-1)
    return dh, a_scaled, ds_partial


def down_backward_weight(
    dout: Tensor,
    a_scaled: Tensor,
    token_by_row: Tensor | None,
    offset_by_expert: Tensor,
    *,
    accumulate_into: Tensor | None = None,
) -> Tensor:
    """``dw2[e] = sum over rows of e of outer(dout[token], a_scaled)``.

    Args:
        dout: (T, H); a_scaled: (R, I); offset_by_expert: (E + 1,) int32.
        token_by_row: (R,) int32, or ``None`` if the rows of ``dout`` are those of ``a_scaled``.
        accumulate_into: float32 (E, H, I) that the unrounded gradient is added to, or ``None``.

    Returns:
        (E, H, I) in the dtype of ``dout``, zero for an expert without rows; or ``accumulate_into``.
    """
    acc = accumulator_dtype(dout.dtype)
    num_experts = offset_by_expert.shape[0] - 1
    target = accumulate_into
    if target is None:
        target = dout.new_zeros((num_experts, dout.shape[1], a_scaled.shape[1]))
    for expert, rows in _busy_experts(offset_by_expert):
        dw = _gather(dout, token_by_row, rows).to(acc).T @ a_scaled[rows].to(acc)
        target[expert] += dw.to(target.dtype)
    return target


def up_backward_act(
    dh: Tensor,
    w1: Tensor,
    offset_by_expert: Tensor,
    *,
    layout: GateUpLayout,
    gated: bool,
    hidden_size: int | None = None,
) -> Tensor:
    """``dx_rows = dh w1[e]``, one row per routed row.

    Args:
        dh: (R, 2I) in blocks of eight, or (R, I); w1: (E, 2I, H) or (E, I, H);
        offset_by_expert: (E + 1,) int32.
        layout: order of ``w1``'s rows; ignored if not gated.
        hidden_size: not read; the kernels prepare for all slices of so many columns.

    Returns:
        (R, H) in the dtype of ``dh``.
    """
    acc = accumulator_dtype(dh.dtype)
    dx_rows = dh.new_zeros((dh.shape[0], w1.shape[2]))
    for expert, rows in _busy_experts(offset_by_expert):
        dh_e = dh[rows].to(acc)
        if gated:
            dh_e = merge_gate_up_rows(*split_gate_up(dh_e), layout)
        dx_rows[rows] = (dh_e @ w1[expert].to(acc)).to(dh.dtype)
    return dx_rows


def up_backward_weight(
    x: Tensor,
    dh: Tensor,
    token_by_row: Tensor | None,
    offset_by_expert: Tensor,
    *,
    layout: GateUpLayout,
    gated: bool,
    accumulate_into: Tensor | None = None,
) -> Tensor:
    """``dw1[e] = sum over rows of e of outer(dh, x[token])``, in the row order of ``w1``.

    Args:
        x: (T, H); dh: (R, 2I) in blocks of eight, or (R, I); offset_by_expert: (E + 1,) int32.
        token_by_row: (R,) int32, or ``None`` if the rows of ``x`` are those of ``dh``.
        layout: order of ``w1``'s rows; ignored if not gated.
        accumulate_into: float32 tensor like ``w1`` that the unrounded gradient is added to, or
            ``None``.

    Returns:
        (E, 2I, H) or (E, I, H) in the dtype of ``x``, zero for an expert without rows; or
        ``accumulate_into``.
    """
    acc = accumulator_dtype(x.dtype)
    num_experts = offset_by_expert.shape[0] - 1
    target = accumulate_into
    if target is None:
        target = x.new_zeros((num_experts, dh.shape[1], x.shape[1]))
    for expert, rows in _busy_experts(offset_by_expert):
        dh_e = dh[rows].to(acc)
        if gated:
            dh_e = merge_gate_up_rows(*split_gate_up(dh_e), layout)
        x_e = _gather(x, token_by_row, rows).to(acc)
        dw = dh_e.T @ x_e
        target[expert] += dw.to(target.dtype)
    return target


def score_grad(
    ds_partial: Tensor,
    row_by_slot: Tensor,
    dout: Tensor | None = None,
    b2: Tensor | None = None,
    token_by_row: Tensor | None = None,
    offset_by_expert: Tensor | None = None,
) -> Tensor:
    """Gradient of the scores in slot order.

    ``ds[slot] = sum_n ds_partial[n, row] (+ <dout[token], b2[e]>)`` with the slot's row; zero for a
    dropped slot. The second term stands only if ``b2`` is given, and needs the last four arguments.

    Args:
        ds_partial: (n, R) from :func:`down_backward_act`.
        row_by_slot: (R,) int32.
        dout: (T, H); b2: (E, H); token_by_row: (R,) int32; offset_by_expert: (E + 1,) int32.

    Returns:
        (R,) in the dtype of ``ds_partial``.
    """
    ds_by_row = ds_partial.sum(dim=0)
    if b2 is not None:
        if dout is None or token_by_row is None or offset_by_expert is None:
            raise TypeError("score_grad: b2 needs dout, token_by_row and offset_by_expert as well")
        acc = ds_by_row.dtype
        for expert, rows in _busy_experts(offset_by_expert):
            dout_e = dout[token_by_row[rows]].to(acc)
            ds_by_row[rows] += (dout_e * b2[expert].to(acc)).sum(dim=-1)
    return gather_scores(ds_by_row, row_by_slot)


def bias_grad_rows(
    dh: Tensor, offset_by_expert: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """``db[e] = sum of the rows of e``, zero for an expert without rows.

    Args:
        dh: (R, N); offset_by_expert: (E + 1,) int32; dtype: of the result, default that of ``dh``.

    Returns:
        (E, N). Columns stay in the order of ``dh``;
        :func:`~sonic.runtime.layout.packed_to_rows` turns them into that of ``b1``.
    """
    acc = accumulator_dtype(dh.dtype)
    db = torch.zeros(
        (offset_by_expert.shape[0] - 1, dh.shape[1]), dtype=dtype or dh.dtype, device=dh.device
    )
    for expert, rows in _busy_experts(offset_by_expert):
        db[expert] = dh[rows].to(acc).sum(dim=0).to(db.dtype)
    return db


def bias_grad_gathered(
    dout: Tensor,
    token_by_row: Tensor,
    score_by_row: Tensor,
    offset_by_expert: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """``db2[e] = sum over rows of e of score * dout[token]``, zero for an expert without rows.

    Args:
        dout: (T, H); token_by_row: (R,) int32; score_by_row: (R,);
        offset_by_expert: (E + 1,) int32; dtype: of the result, default that of ``dout``.

    Returns:
        (E, H).
    """
    acc = accumulator_dtype(dout.dtype)
    db = torch.zeros(
        (offset_by_expert.shape[0] - 1, dout.shape[1]),
        dtype=dtype or dout.dtype,
        device=dout.device,
    )
    for expert, rows in _busy_experts(offset_by_expert):
        dout_e = dout[token_by_row[rows]].to(acc)
        db[expert] = (dout_e * score_by_row[rows].to(acc)[:, None]).sum(dim=0).to(db.dtype)
    return db
