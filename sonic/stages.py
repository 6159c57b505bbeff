"""The layer's stages on a GPU: six grouped GEMMs in CuTeDSL and the row kernels in Triton.

Same names, signatures, rounding points and layout of ``h`` as :mod:`sonic.reference.stages`, which
is the specification. Symbols: T tokens, H hidden, I intermediate, E experts, R rows (static bound).
Rows at or past ``offset_by_expert[E]`` of any ``(R, *)`` output are undefined and never read.
"""

from __future__ import annotations

import functools

import torch

from sonic.enums import ActivationType, GateUpLayout
from sonic.runtime.launch import config_for, grouped_gemm
from sonic.runtime.problem import (
    Operand,
    down_backward_act_problem,
    down_problem,
    up_backward_act_problem,
    up_problem,
    weight_grad_problem,
)
from sonic.triton.bias_grad import bias_grad_gathered, bias_grad_rows
from sonic.triton.combine import combine
from sonic.triton.score_grad import gather_scores, score_grad

__all__ = [
    "bias_grad_gathered",
    "bias_grad_rows",
    "combine",
    "down_backward_act",
    "down_backward_weight",
    "down_forward",
    "gather_scores",
    "score_grad",
    "up_backward_act",
    "up_backward_weight",
    "up_forward",
]


# One object for each: a Problem takes longer to make than to look up.
_up_problem = functools.cache(up_problem)
_down_problem = functools.cache(down_problem)
_down_backward_act_problem = functools.cache(down_backward_act_problem)
_up_backward_act_problem = functools.cache(up_backward_act_problem)
_weight_grad_problem = functools.cache(weight_grad_problem)


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row_strides(layout: GateUpLayout, gated: bool, weight: torch.Tensor) -> tuple[int, int]:
    """Element strides (gate -> up, unit -> next unit) of a gated ``(E, rows, cols)`` weight."""
    if not gated:
        return 0, 0
    row = weight.stride(1)
    if layout == GateUpLayout.INTERLEAVED:
        return row, 2 * row
    return weight.shape[1] // 2 * row, row


def _with_expert_stride(weight: torch.Tensor) -> torch.Tensor:
    """``weight``, with a legal stride if it has one expert: torch leaves that one undefined."""
    if weight.shape[0] != 1:
        return weight
    row = weight.stride(1)
    return weight.as_strided(weight.shape, (weight.shape[1] * row, row, 1))


def up_forward(
    x: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor | None,
    token_by_row: torch.Tensor,
    offset_by_expert: torch.Tensor,
    *,
    activation: ActivationType,
    layout: GateUpLayout,
    store_preact: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """``h = x[token] w1_e^T + b1_e`` and ``a = act(h)``.

    :returns: ``h (R, 2I | I)``, or None without ``store_preact``, and ``a (R, I)``.
    """
    rows, (experts, width, hidden) = token_by_row.shape[0], w1.shape
    gated = activation.is_gated
    h = x.new_empty((rows, width)) if store_preact else None
    a = x.new_empty((rows, width // 2 if gated else width))
    if rows == 0:
        return h, a
    problem = _up_problem(activation, _name(x.dtype), b1 is not None, store_preact)
    grouped_gemm(
        problem,
        config_for(problem, x.device, rows, experts, width, hidden),
        a=x,
        b=_with_expert_stride(w1),
        d=h,
        aux=a,
        bias=b1,
        gather=token_by_row,
        offset_by_expert=offset_by_expert,
        rows=rows,
        strides=_row_strides(layout, gated, w1),
    )
    return h, a


def down_forward(
    a: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor | None, offset_by_expert: torch.Tensor
) -> torch.Tensor:
    """``y = a w2_e^T + b2_e``, shape ``(R, H)``."""
    rows, (experts, hidden, width) = a.shape[0], w2.shape
    y = a.new_empty((rows, hidden))
    if rows == 0:
        return y
    problem = _down_problem(_name(a.dtype), b2 is not None)
    grouped_gemm(
        problem,
        config_for(problem, a.device, rows, experts, hidden, width),
        a=a,
        b=_with_expert_stride(w2),
        d=y,
        bias=b2,
        offset_by_expert=offset_by_expert,
        rows=rows,
    )
    return y


def down_backward_act(
    dout: torch.Tensor,
    w2: torch.Tensor,
    h: torch.Tensor,
    score_by_row: torch.Tensor,
    token_by_row: torch.Tensor,
    offset_by_expert: torch.Tensor,
    *,
    activation: ActivationType,
    overwrite_h: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient through the down-projection and the activation (paper, algorithm 5).

    With ``P = dout[token] w2_e``: ``dh = score * P * act'(h)``, ``a' = score * act(h)``, and the
    score gradient ``<P, act(h)>`` as partial sums over column tiles. With ``overwrite_h``, ``dh``
    takes the memory of ``h``: the warps that store a piece of ``dh``, and no others, have loaded
    that piece of ``h`` before.

    :returns: ``dh`` like ``h``, ``a' (R, I)``, partial sums ``(n, R)`` float32.
    """
    rows, (experts, hidden, width) = h.shape[0], w2.shape
    problem = _down_backward_act_problem(activation, _name(h.dtype))
    dh = h if overwrite_h else torch.empty_like(h)
    a_scaled = h.new_empty((rows, width))
    if rows == 0:
        return dh, a_scaled, h.new_empty((1, 0), dtype=torch.float32)
    config = config_for(problem, h.device, rows, experts, width, hidden)
    ds_partial = h.new_empty((-(-width // config.tile_n), rows), dtype=torch.float32)
    grouped_gemm(
        problem,
        config,
        a=dout,
        b=_with_expert_stride(w2),
        d=dh,
        aux=a_scaled,
        c=h,
        score=score_by_row,
        row_sum=ds_partial,
        gather=token_by_row,
        offset_by_expert=offset_by_expert,
        rows=rows,
    )
    return dh, a_scaled, ds_partial


def _weight_grad(
    a: torch.Tensor,
    b: torch.Tensor,
    gather: Operand | None,
    token_by_row: torch.Tensor | None,
    offset_by_expert: torch.Tensor,
    accumulate_into: torch.Tensor | None,
    layout: GateUpLayout,
    gated: bool,
) -> torch.Tensor:
    """``D_e = a_e^T b_e`` over the rows of each expert; zero, or unchanged, for an empty one."""
    experts, m, n = offset_by_expert.shape[0] - 1, a.shape[1], b.shape[1]
    rows = (b if gather is Operand.A else a).shape[0]
    accumulate = accumulate_into is not None
    d = a.new_empty((experts, m, n)) if accumulate_into is None else accumulate_into
    if rows == 0:
        return d if accumulate else d.zero_()
    problem = _weight_grad_problem(_name(a.dtype), gather, gated, accumulate)
    grouped_gemm(
        problem,
        config_for(problem, a.device, rows, experts, n, m),
        a=a,
        b=b,
        d=_with_expert_stride(d),
        gather=token_by_row,
        offset_by_expert=offset_by_expert,
        rows=rows,
        strides=_row_strides(layout, gated, d),
    )
    return d


def down_backward_weight(
    dout: torch.Tensor,
    a_scaled: torch.Tensor,
    token_by_row: torch.Tensor | None,
    offset_by_expert: torch.Tensor,
    *,
    accumulate_into: torch.Tensor | None = None,
) -> torch.Tensor:
    """``dw2_e = dout[token]^T a'``, shape ``(E, H, I)``, or added to a float32 tensor."""
    gather = None if token_by_row is None else Operand.A
    return _weight_grad(
        dout,
        a_scaled,
        gather,
        token_by_row,
        offset_by_expert,
        accumulate_into,
        GateUpLayout.INTERLEAVED,
        False,
    )


def up_backward_act(
    dh: torch.Tensor,
    w1: torch.Tensor,
    offset_by_expert: torch.Tensor,
    *,
    layout: GateUpLayout,
    gated: bool,
) -> torch.Tensor:
    """``dx_row = dh w1_e``, shape ``(R, H)``, not yet summed over the experts of a token."""
    rows, (experts, width, hidden) = dh.shape[0], w1.shape
    dx = dh.new_empty((rows, hidden))
    if rows == 0:
        return dx
    problem = _up_backward_act_problem(_name(dh.dtype), gated)
    grouped_gemm(
        problem,
        config_for(problem, dh.device, rows, experts, hidden, width),
        a=dh,
        b=_with_expert_stride(w1),
        d=dx,
        offset_by_expert=offset_by_expert,
        rows=rows,
        strides=_row_strides(layout, gated, w1),
    )
    return dx


def up_backward_weight(
    x: torch.Tensor,
    dh: torch.Tensor,
    token_by_row: torch.Tensor | None,
    offset_by_expert: torch.Tensor,
    *,
    layout: GateUpLayout,
    gated: bool,
    accumulate_into: torch.Tensor | None = None,
) -> torch.Tensor:
    """``dw1_e = dh^T x[token]``, shape ``(E, 2I | I, H)`` in ``layout``, or added likewise."""
    gather = None if token_by_row is None else Operand.B
    return _weight_grad(
        dh, x, gather, token_by_row, offset_by_expert, accumulate_into, layout, gated
    )
