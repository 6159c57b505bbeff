"""A router that does not choose: ids and weights come with the call."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sonic import checks
from sonic.nn.routers.base import LossWeights, Router, RouterOutput
from sonic.plan import build_plan, int32_ids
from sonic.routing.balancing import RoutingStatistics
from sonic.runtime.errors import ArgumentError


class PrecomputedRouter(Router):
    """Passes decided ids and weights on, with their plan and statistics.

    For routing that another network made, or that was recorded. To weight recorded ids anew from
    this layer's logits, pass ``ids`` to a :class:`sonic.nn.routers.TopKRouter` instead.

    Args:
        hidden_size: H. num_experts: E. top_k: ids per token.
        losses: no factor but 0: there are no logits to balance.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        losses: LossWeights | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, losses=losses)
        if self.losses != LossWeights():
            raise ArgumentError(
                checks.message(
                    type(self).__name__,
                    f"losses={losses!r} came to a router without logits",
                    "no losses, or factors of 0",
                    "Leave them out, or pass the ids to a TopKRouter, which weights them from its "
                    "own logits and has the losses of these.",
                )
            )

    def forward(
        self,
        hidden_states: Tensor,
        *,
        topk_ids: Tensor,
        topk_weights: Tensor,
        balance: bool = True,
    ) -> RouterOutput:
        """Pass ids and weights on.

        Args:
            hidden_states: (..., H), T tokens; read for its shape and device only.
            topk_ids: (T, top_k) int32 or int64; ids outside ``[0, E)`` are dropped.
            topk_weights: (T, top_k) floating point; passed on as fp32, fp64 as it is.
            balance: False leaves the statistics out; there are no losses.
        """
        tokens = self.tokens(hidden_states)
        op = "PrecomputedRouter"
        checks.check_bool(op, "balance", balance)
        checks.check_topk(op, tokens, topk_ids, topk_weights, "reference")
        checks.check_int(op, "top_k", topk_ids.shape[1], self.top_k, self.top_k, "of this router")
        plan = build_plan(topk_ids, self.num_experts)
        statistics = None
        if balance:
            statistics = RoutingStatistics(plan.expert_frequency(), None, self.num_experts, plan)
        ids = int32_ids(topk_ids)
        weights = topk_weights.to(torch.promote_types(topk_weights.dtype, torch.float32))
        return RouterOutput(ids, weights, plan, None, {}, LossWeights(), statistics, None)
