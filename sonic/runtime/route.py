"""What a router computes from its logits, as plain data: options and results."""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from torch import Tensor


class ScoreFunction(str, Enum):
    """How a logit ``v`` becomes a score ``s``, before winners are picked and weighted."""

    SOFTMAX = "softmax"  # exp(v_e) / sum_i exp(v_i)
    SIGMOID = "sigmoid"  # 1 / (1 + exp(-v)), DeepSeek-V3
    SQRT_SOFTPLUS = "sqrt_softplus"  # sqrt(log(1 + exp(v))), DeepSeek-V4


@dataclass(frozen=True)
class Route:
    """Options of one routing pass. Sizes: T tokens, E columns of the logits.

    Attributes:
        top_k: winners per token.
        score: a value of :class:`ScoreFunction`.
        renormalize: divide the winners' scores by their sum.
        scale: factor of the weights, after that; positive.
        num_groups, topk_groups: the columns fall into ``num_groups`` equal runs, and winners come
            from the ``topk_groups`` best of them only.
        group_best: how many of a group's best choices its rank sums up (DeepSeek-V3: 2, V2: 1).
        num_working: columns from this one on are null experts: winners of weight zero that the
            renormalisation does not see.
        num_experts: E of the plan; 0 for none.
        num_sequences: the tokens are this many runs of equal length.
        balance: whether sums for losses and statistics are made.
    """

    top_k: int
    score: str
    renormalize: bool
    scale: float
    num_groups: int
    topk_groups: int
    group_best: int
    num_working: int
    num_experts: int
    num_sequences: int
    balance: bool


class RouteTensors(NamedTuple):
    """Results of one routing pass, in the order of the operator ``sonic::route``.

    Floats are fp32 (fp64 for fp64 logits), integers int32. Without ``Route.balance`` the fields
    from ``prob_sum`` to ``z`` and from ``load`` to ``entropy`` are empty; without
    ``Route.num_experts`` those of the plan are.

    Attributes:
        scores: (T, top_k) weights of the winners.
        prob_sum: (S, E) sum over a sequence's tokens of the scores scaled to sum to one.
        switch, sequence, z: () losses, see :func:`sonic.reference.routers.balance_losses`.
        ids: (T, top_k) columns of the winners; -1 where nothing was left to choose.
        lse: (T,) logsumexp of the logits; -inf for a token that may go nowhere.
        load: (S, E) winners of each column.
        live: (S,) tokens that may go somewhere.
        entropy: () mean entropy of the scores scaled to sum to one.
        offset_by_expert, token_by_row, slot_by_row, row_by_slot: of :class:`sonic.RoutingPlan`.
    """

    scores: Tensor
    prob_sum: Tensor
    switch: Tensor
    sequence: Tensor
    z: Tensor
    ids: Tensor
    lse: Tensor
    load: Tensor
    live: Tensor
    entropy: Tensor
    offset_by_expert: Tensor
    token_by_row: Tensor
    slot_by_row: Tensor
    row_by_slot: Tensor
