"""The layer in low precision: the reference stages chained, hence the kernels' rounding points.

Its distance to the float64 oracle is the yardstick for the kernels' own distance.
"""

from typing import Any

import torch
from torch import Tensor

from sonic.enums import ActivationType, GateUpLayout
from sonic.reference import stages
from sonic.reference.plan import PlanTensors, plan_oracle, plan_oracle_flat
from sonic.runtime.layout import packed_to_rows


def experts_low_precision(
    x: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: ActivationType = ActivationType.SWIGLU,
    layout: GateUpLayout = GateUpLayout.INTERLEAVED,
) -> Tensor:
    """:func:`~sonic.reference.layer.experts_reference`, rounded where the kernels round.

    Differentiable; forward and backward each run the chain of :mod:`sonic.reference.stages`.
    """
    plan = plan_oracle(topk_ids, w1.shape[0])
    out: Tensor = _Experts.apply(
        x, topk_weights.flatten(), w1, w2, b1, b2, plan, activation, layout
    )
    return out


def experts_flat_low_precision(
    x: Tensor,
    token_ids: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: ActivationType = ActivationType.SWIGLU,
    layout: GateUpLayout = GateUpLayout.INTERLEAVED,
) -> Tensor:
    """:func:`~sonic.reference.layer.experts_flat_reference`, rounded where the kernels round."""
    plan = plan_oracle_flat(token_ids, expert_ids, x.shape[0], w1.shape[0])
    out: Tensor = _Experts.apply(x, weights, w1, w2, b1, b2, plan, activation, layout)
    return out


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        w1: Tensor,
        w2: Tensor,
        b1: Tensor | None,
        b2: Tensor | None,
        plan: PlanTensors,
        activation: ActivationType,
        layout: GateUpLayout,
    ) -> Tensor:
        scores = weights.to(_score_dtype(x.dtype))
        h, a = stages.up_forward(
            x,
            w1,
            b1,
            plan.token_by_row,
            plan.offset_by_expert,
            activation=activation,
            layout=layout,
            store_preact=True,
        )
        y = stages.down_forward(a, w2, b2, plan.offset_by_expert)
        ctx.save_for_backward(x, weights, w1, w2, b1, b2, h)
        ctx.plan, ctx.activation, ctx.layout = plan, activation, layout
        return _combine(y, scores, plan)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, w1, w2, b1, b2, h = ctx.saved_tensors
        plan: PlanTensors = ctx.plan
        offsets, token_by_row = plan.offset_by_expert, plan.token_by_row
        up = {"layout": ctx.layout, "gated": ActivationType(ctx.activation).is_gated}
        scores = weights.to(_score_dtype(x.dtype))
        score_by_row = stages.gather_scores(scores, plan.slot_by_row)
        dh, a_scaled, ds_partial = stages.down_backward_act(
            dout, w2, h, score_by_row, token_by_row, offsets, activation=ctx.activation
        )
        dscores = stages.score_grad(ds_partial, plan.row_by_slot, dout, b2, token_by_row, offsets)
        dw2 = stages.down_backward_weight(
            dout, a_scaled, token_by_row, offsets, accumulate_into=None
        )
        dw1 = stages.up_backward_weight(x, dh, token_by_row, offsets, accumulate_into=None, **up)
        dx = _combine(stages.up_backward_act(dh, w1, offsets, **up), None, plan)
        db1 = db2 = None
        if b1 is not None:
            db1 = stages.bias_grad_rows(dh, offsets)
            db1 = packed_to_rows(db1, ctx.layout) if up["gated"] else db1
        if b2 is not None:
            db2 = stages.bias_grad_gathered(dout, token_by_row, score_by_row, offsets)
        return dx, dscores.to(weights.dtype), dw1, dw2, db1, db2, None, None, None


def _score_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _combine(rows: Tensor, scores: Tensor | None, plan: PlanTensors) -> Tensor:
    return stages.combine(
        rows,
        plan.row_by_slot,
        scores,
        plan.offset_by_token,
        plan.slot_by_position,
        plan.num_tokens,
        plan.top_k,
    )
