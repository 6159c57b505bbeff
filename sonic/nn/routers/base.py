"""What routers share: their result, the weights of their losses, their linear map.

Symbols: T tokens, H hidden size, E experts, C columns of the logits (experts, then identity
experts, then null experts).
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from sonic import checks
from sonic.plan import RoutingPlan
from sonic.routing.balancing import RoutingStatistics
from sonic.runtime.errors import ArgumentError


@dataclass(frozen=True)
class LossWeights:
    """Factors of the balancing losses in :attr:`RouterOutput.aux_loss`. A loss of 0 is left out.

    Attributes:
        switch: loads and probabilities of this process's tokens (Switch Transformer).
        sequence: the same within each sequence, averaged (DeepSeek-V2).
        global_batch: loads of all processes and micro-batches of a step (arXiv 2501.11873).
        z: mean squared logsumexp of the logits (ST-MoE); 1e-3 is usual.
    """

    switch: float = 0.0
    sequence: float = 0.0
    global_batch: float = 0.0
    z: float = 0.0


@dataclass(frozen=True)
class RouterOutput:
    """What a router decided about T tokens.

    Attributes:
        topk_ids: (T, top_k) int32. Ids from E on, and -1, belong to no expert: they cost nothing.
        topk_weights: (T, top_k) fp32 (fp64 from fp64 logits or weights), differentiable.
        plan: the plan of these ids.
        logits: (T, C), or None where the router has none.
        losses: unweighted losses by the names of :class:`LossWeights`, ``sequence`` and
            ``global_batch`` if they have a factor; empty without balancing.
        loss_weights: their factors.
        statistics: loads and entropies, or None without balancing.
        identity_weight: (T,) fp32, the weight of a token's own hidden state in the layer's output,
            or None where there are no identity experts.
    """

    topk_ids: Tensor
    topk_weights: Tensor
    plan: RoutingPlan
    logits: Tensor | None
    losses: Mapping[str, Tensor]
    loss_weights: LossWeights
    statistics: RoutingStatistics | None
    identity_weight: Tensor | None

    @property
    def aux_loss(self) -> Tensor | None:
        """() sum of the losses times their factors; None without balancing."""
        if self.statistics is None:
            return None
        total = None
        for name, loss in self.losses.items():
            weight = getattr(self.loss_weights, name)
            if weight != 0:
                part = loss if weight == 1 else weight * loss
                total = part if total is None else total + part
        return self.topk_weights.new_zeros(()) if total is None else total


class Router(nn.Module):
    """Base class: sizes, and the check of the input.

    Args:
        hidden_size: H. num_experts: E. top_k: winners per token, 1 to min(64, columns).
        losses: factors of the balancing losses.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        num_columns: int | None = None,
        losses: LossWeights | Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        columns = num_experts if num_columns is None else num_columns
        checks.check_int(op, "hidden_size", hidden_size, 1, 2**31 - 1, "a size")
        checks.check_int(op, "num_experts", num_experts, 1, checks.MAX_EXPERTS, "16-bit ids")
        checks.check_int(op, "the number of columns", columns, 1, checks.MAX_EXPERTS, "16-bit ids")
        checks.check_top_k(op, top_k, columns, "columns", "C")
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = top_k
        self.losses = loss_weights(op, losses)

    def tokens(self, hidden_states: Tensor) -> Tensor:
        """``hidden_states`` (..., H) as (T, H)."""
        op = type(self).__name__
        todo = "Build the router with the hidden size of its input."
        checks.check_hidden_size(op, hidden_states, self.hidden_size, todo)
        return hidden_states.reshape(-1, self.hidden_size)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"


def loss_weights(op: str, losses: LossWeights | Mapping[str, float] | None) -> LossWeights:
    """``losses`` as a :class:`LossWeights`; a mapping names some of its fields."""
    if losses is None:
        return LossWeights()
    known = [field.name for field in fields(LossWeights)]
    if isinstance(losses, LossWeights):
        losses = {name: getattr(losses, name) for name in known}
    if not isinstance(losses, Mapping) or set(losses) - set(known):
        raise ArgumentError(
            checks.message(
                op,
                f"losses={losses!r} is not known",
                "a LossWeights, or a mapping with keys among " + ", ".join(known),
                'Pass for instance losses={"switch": 0.01, "z": 1e-3}.',
            )
        )
    for name, factor in losses.items():
        checks.check_number(op, f"losses[{name!r}]", factor, "Pass 0 to leave the loss out.")
    return LossWeights(**losses)


def num_sequences(hidden_states: Tensor) -> int:
    """B for (B, n, H), otherwise 1: what sequence-wise losses are averaged over."""
    return hidden_states.shape[0] if hidden_states.dim() == 3 and hidden_states.numel() else 1


class SharedReference:
    """Holds what a deep copy of a module must share rather than copy (a process group)."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedReference":
        return self

    def __reduce__(self) -> tuple[type, tuple[Any]]:
        if self.value is not None:
            raise ArgumentError(
                checks.message(
                    "pickle",
                    "a router with a process group was to be pickled",
                    "routers without one: a group is of one process",
                    "Keep router.state_dict() instead, or set router.group = None before and the "
                    "group again behind.",
                )
            )
        return SharedReference, (None,)
