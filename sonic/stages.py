"""The layer's stages on a GPU: six grouped GEMMs in CuTeDSL and the row kernels in Triton.

Same names, signatures, rounding points and layout of ``h`` as :mod:`sonic.reference.stages`, which
is the specification, but for two more roundings: large tiles hand a copy of their float32 sums,
with the eleven significant bits of half precision, to the activation and its gradient, and the
weight gradient of an expert with many rows may be summed in parts (:mod:`sonic.triton.parts`).

Symbols: T tokens, H hidden, I intermediate, E experts, R rows (static bound). Rows at or past
``offset_by_expert[E]`` of any ``(R, *)`` output are undefined and never read.
"""

from __future__ import annotations

import functools

import torch

from sonic.enums import ActivationType, GateUpLayout
from sonic.runtime.columns import slice_widths
from sonic.runtime.fill import fill_cache
from sonic.runtime.launch import GroupedGemm, compile_ahead, config_for, grouped_gemm, prepared
from sonic.runtime.problem import (
    Operand,
    Problem,
    down_backward_act_problem,
    down_problem,
    up_backward_act_problem,
    up_problem,
    weight_grad_problem,
)
from sonic.triton import parts
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


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row_strides(
    layout: GateUpLayout, gated: bool, shape: torch.Size, strides: tuple[int, ...]
) -> tuple[int, int]:
    """Element strides (gate -> up, unit -> next unit) of a gated ``(E, rows, cols)`` weight."""
    if not gated:
        return 0, 0
    row = strides[1]
    if layout == GateUpLayout.INTERLEAVED:
        return row, 2 * row
    return shape[1] // 2 * row, row


def _with_expert_stride(weight: torch.Tensor) -> torch.Tensor:
    """``weight``, with a legal stride if it has one expert: torch leaves that one undefined."""
    if weight.shape[0] != 1:
        return weight
    row = weight.stride(1)
    return weight.as_strided(weight.shape, (weight.shape[1] * row, row, 1))


# Each stage below prepares its GEMM by one of these, from what decides it: how its tensors look.


def _gemm(
    problem: Problem,
    device: torch.device,
    *,
    rows: int,
    experts: int,
    n: int,
    k: int,
    m: int = 0,
    strides: tuple[int, int] = (0, 0),
    widths: tuple[int, ...] = (),
) -> GroupedGemm:
    """For this size, and compiled for all others that come with other numbers of tokens.

    :param n, k: columns of the output, and the weight's other axis.
    :param widths: each ``n`` that may come, if there is more than this one.
    """
    config = config_for(problem, device, rows, experts, n, k)
    gemm = grouped_gemm(
        problem, config, device, rows=rows, experts=experts, m=m, n=n, strides=strides
    )
    compile_ahead(problem, device, widths or (n,), k, experts)
    return gemm


def _up_gemm(
    activation: ActivationType,
    layout: GateUpLayout,
    has_bias: bool,
    store_preact: bool,
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
    w1_shape: torch.Size,
    w1_strides: tuple[int, ...],
) -> GroupedGemm:
    problem = up_problem(activation, _name(dtype), has_bias, store_preact)
    experts, width, hidden = w1_shape
    fill_cache(problem, device, hidden=hidden, width=width, experts=experts)
    strides = _row_strides(layout, activation.is_gated, w1_shape, w1_strides)
    return _gemm(problem, device, rows=rows, experts=experts, n=width, k=hidden, strides=strides)


def _down_gemm(
    has_bias: bool, dtype: torch.dtype, device: torch.device, rows: int, w2_shape: torch.Size
) -> GroupedGemm:
    problem = down_problem(_name(dtype), has_bias)
    experts, hidden, width = w2_shape
    return _gemm(problem, device, rows=rows, experts=experts, n=hidden, k=width)


def _down_backward_act_gemm(
    activation: ActivationType,
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
    w2_shape: torch.Size,
) -> GroupedGemm:
    problem = down_backward_act_problem(activation, _name(dtype))
    experts, hidden, width = w2_shape
    return _gemm(problem, device, rows=rows, experts=experts, n=width, k=hidden)


def _up_backward_act_gemm(
    layout: GateUpLayout,
    gated: bool,
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
    w1_shape: torch.Size,
    w1_strides: tuple[int, ...],
    hidden_size: int | None,
) -> GroupedGemm:
    problem = up_backward_act_problem(_name(dtype), gated)
    experts, width, columns = w1_shape
    return _gemm(
        problem,
        device,
        rows=rows,
        experts=experts,
        n=columns,
        k=width,
        strides=_row_strides(layout, gated, w1_shape, w1_strides),
        widths=() if hidden_size is None else slice_widths(hidden_size, width),
    )


def _weight_grad_gemm(
    gather: Operand | None,
    layout: GateUpLayout,
    gated: bool,
    accumulate: bool,
    dtype: torch.dtype,
    device: torch.device,
    rows: int,
    shape: torch.Size,
    strides: tuple[int, ...],
) -> GroupedGemm:
    problem = weight_grad_problem(_name(dtype), gather, gated, accumulate)
    experts, m, n = shape
    return _gemm(
        problem,
        device,
        rows=rows,
        experts=experts,
        m=m,
        n=n,
        k=m,
        strides=_row_strides(layout, gated, shape, strides),
    )


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
    rows, width = token_by_row.shape[0], w1.shape[1]
    h = x.new_empty(rows, width) if store_preact else None
    a = x.new_empty(rows, width // 2 if activation.is_gated else width)
    if rows == 0:
        return h, a
    how = activation, layout, b1 is not None, store_preact
    gemm = prepared(_up_gemm, *how, x.dtype, x.device, rows, w1.shape, w1.stride())
    w1 = _with_expert_stride(w1)
    gemm(x, w1, offset_by_expert, d=h, aux=a, bias=b1, gather=token_by_row)
    return h, a


def down_forward(
    a: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor | None, offset_by_expert: torch.Tensor
) -> torch.Tensor:
    """``y = a w2_e^T + b2_e``, shape ``(R, H)``."""
    rows = a.shape[0]
    y = a.new_empty(rows, w2.shape[1])
    if rows == 0:
        return y
    gemm = prepared(_down_gemm, b2 is not None, a.dtype, a.device, rows, w2.shape)
    gemm(a, _with_expert_stride(w2), offset_by_expert, d=y, bias=b2)
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
    rows, width = h.shape[0], w2.shape[2]
    dh = h if overwrite_h else torch.empty_like(h)
    a_scaled = h.new_empty(rows, width)
    if rows == 0:
        return dh, a_scaled, h.new_empty((1, 0), dtype=torch.float32)
    gemm = prepared(_down_backward_act_gemm, activation, h.dtype, h.device, rows, w2.shape)
    ds_partial = score_by_row.new_empty(-(-width // gemm.config.row_sum_columns), rows)
    gemm(
        dout,
        _with_expert_stride(w2),
        offset_by_expert,
        d=dh,
        aux=a_scaled,
        c=h,
        score=score_by_row,
        row_sum=ds_partial,
        gather=token_by_row,
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
    """``D_e = a_e^T b_e`` over the rows of each expert; zero, or unchanged, for an empty one.

    A split reduction stores the sums over later parts of an expert's rows beside the output,
    rounded as it is, and adds them.
    """
    experts, m, n = offset_by_expert.shape[0] - 1, a.shape[1], b.shape[1]
    rows = (b if gather is Operand.A else a).shape[0]
    accumulate = accumulate_into is not None
    d = a.new_empty(experts, m, n) if accumulate_into is None else accumulate_into
    if rows == 0:
        return d if accumulate else d.zero_()
    out, how = _with_expert_stride(d), (gather, layout, gated, accumulate)
    gemm = prepared(_weight_grad_gemm, *how, a.dtype, a.device, rows, out.shape, out.stride())
    partial = d.new_empty(gemm.parts, m, n) if gemm.parts else None
    gemm(a, b, offset_by_expert, d=out, aux=partial, gather=token_by_row)
    if partial is not None:
        parts.add_parts(d, partial, offset_by_expert, rows)
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
    hidden_size: int | None = None,
) -> torch.Tensor:
    """``dx_row = dh w1_e``, shape ``(R, H)``, not yet summed over the experts of a token.

    :param hidden_size: H, of which ``w1`` and the result are a slice now and then.
    """
    rows, columns = dh.shape[0], w1.shape[2]
    dx = dh.new_empty(rows, columns)
    if rows == 0:
        return dx
    look = dh.dtype, dh.device, rows, w1.shape, w1.stride(), hidden_size
    gemm = prepared(_up_backward_act_gemm, layout, gated, *look)
    gemm(dh, _with_expert_stride(w1), offset_by_expert, d=dx)
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
