"""Product-key router: n^2 experts chosen by 2n keys."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sonic import checks
from sonic.nn.routers.base import LossWeights, Router, RouterOutput
from sonic.plan import build_plan
from sonic.reference.routers import count_winners
from sonic.routing.balancing import RoutingStatistics
from sonic.routing.logits import router_logits
from sonic.routing.product_key import product_key_routing
from sonic.runtime.errors import ArgumentError


class ProductKeyRouter(Router):
    """Expert ``i * n + j`` has the logit ``x @ weight[0, i] + x @ weight[1, j]``.

    The product costs 2n columns for n^2 experts. Balancing looks at the keys: the switch loss is
    the mean of the two halves' own, the z-loss that of all n^2 logits. There is no sequence-wise
    and no global-batch loss.

    Args:
        hidden_size: H. num_experts: E = n^2, a square up to 65,536. top_k: 1 to min(64, n).
        renormalize: weights are the softmax over the winners, else over all experts.
        losses: factors of ``switch`` and ``z``.
        float32_logits, std, device, dtype: as in :class:`sonic.nn.routers.TopKRouter`.

    Parameters: ``weight`` (2, n, H).

    Source: PEER (arXiv 2407.04153), section 2.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        renormalize: bool = True,
        losses: LossWeights | Mapping[str, float] | None = None,
        float32_logits: bool = False,
        std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, losses=losses)
        size = math.isqrt(num_experts)
        if size * size != num_experts:
            raise ArgumentError(
                checks.message(
                    "ProductKeyRouter",
                    f"num_experts={num_experts} is not a square",
                    "n * n experts, of n keys per half, for n from 1 to 256",
                    f"Take {size**2} (n={size}) or {(size + 1) ** 2} (n={size + 1}).",
                )
            )
        checks.check_int("ProductKeyRouter", "top_k", top_k, 1, size, f"at most n={size}")
        if self.losses.sequence or self.losses.global_batch:
            raise ArgumentError(
                checks.message(
                    "ProductKeyRouter",
                    f"losses={self.losses!r}",
                    "factors of switch and z",
                    "Leave sequence and global_batch at 0.",
                )
            )
        flags = {"renormalize": renormalize, "float32_logits": float32_logits}
        checks.check_bools("ProductKeyRouter", **flags)
        checks.check_parameters("ProductKeyRouter", std, device, dtype)
        self.num_keys = size
        self.renormalize = renormalize
        self.float32_logits = float32_logits
        self.std = std
        self.weight = nn.Parameter(torch.empty(2, size, hidden_size, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, std) weight."""
        nn.init.normal_(self.weight, std=self.std)

    def forward(self, hidden_states: Tensor, *, balance: bool = True) -> RouterOutput:
        """Route ``hidden_states`` (..., H); ``logits`` of the result are (T, 2, n)."""
        tokens = self.tokens(hidden_states)
        logits = router_logits(tokens, self.weight.flatten(0, 1), in_float32=self.float32_logits)
        logits = logits.view(-1, 2, self.num_keys)
        scores, ids = product_key_routing(logits, self.top_k, renormalize=self.renormalize)
        plan = build_plan(ids, self.num_experts)
        statistics = None
        losses: dict[str, Tensor] = {}
        if balance:
            losses = self._losses(logits, ids)
            statistics = RoutingStatistics(plan.expert_frequency(), None, self.num_experts, plan)
        return RouterOutput(ids, scores, plan, logits, losses, self.losses, statistics, None)

    def _losses(self, logits: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """In torch, and only what has a factor: these are sums over 2n columns, not n^2."""
        losses = {}
        tokens = max(1, logits.shape[0])
        values = logits if logits.dtype == torch.float64 else logits.float()
        if self.losses.switch:
            prob = torch.softmax(values, dim=-1).sum(dim=0)
            keys = torch.stack([ids // self.num_keys, ids % self.num_keys])
            load = count_winners(keys, self.num_keys, 2).to(prob.dtype)
            share = self.num_keys / (self.top_k * tokens**2)
            losses["switch"] = 0.5 * share * (load * prob).sum()
        if self.losses.z:
            losses["z"] = torch.logsumexp(values, dim=-1).sum(dim=-1).square().sum() / tokens
        return losses
