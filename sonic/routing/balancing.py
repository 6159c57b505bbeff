"""Balancing beyond one process and one pass: global-batch loss, correction bias, capacity, numbers.

Switch, sequence-wise and z-loss come out of :func:`sonic.routing.route.route` itself. What is here
works on its sums, on tensors of E elements; nothing waits for the device.

Sizes: T tokens, E columns of the logits, S sequences, ``top_k`` winners.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sonic import checks
from sonic.plan import RoutingPlan, build_plan
from sonic.reference.routers import load_shares
from sonic.runtime.errors import ArgumentError, DTypeError, UnsupportedError
from sonic.runtime.route import RouteTensors

DROP_RULES = ("position", "score")


def all_reduced(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum of ``tensor`` over the processes of ``group``, in place; itself without a group."""
    if group is not None:
        dist.all_reduce(tensor, group=group)
    return tensor


def check_group(op: str, group: Any) -> None:
    """``group`` is a process group or None."""
    if group is None or (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        return
    raise ArgumentError(
        checks.message(
            op,
            f"group is of type {type(group).__name__}",
            "a torch.distributed.ProcessGroup, or None for this process alone",
            "Make one with torch.distributed.new_group, or take mesh.get_group().",
        )
    )


# ------------------------------------------------------------------------ global-batch loss


def local_load(tensors: RouteTensors) -> Tensor:
    """(E + 1,) int64: winners of each column, and the number of tokens, of one pass."""
    return torch.cat([tensors.load.sum(dim=0), tensors.live.sum()[None]])


def global_batch_loss(
    tensors: RouteTensors,
    *,
    top_k: int,
    num_null: int = 0,
    group: dist.ProcessGroup | None = None,
    earlier_load: Tensor | None = None,
) -> Tensor:
    """Switch loss whose loads are those of the whole batch, not of this process's share.

    ``E / (top_k N T) * sum_e load_e prob_e`` with ``load`` and ``N`` summed over processes and
    earlier micro-batches, ``prob`` and ``T`` over processes. On every process the value is that of
    the joined batch. Its gradient is this process's part times the number of processes: averaged
    over processes, as data-parallel training does, it is the gradient of the joined batch, even
    where processes hold different numbers of tokens.

    Args:
        tensors: results of one pass with ``balance``.
        top_k: of that pass. num_null: of that pass.
        group: the processes that share the batch; None for this one alone.
        earlier_load: (E + 1,) sum of :func:`local_load` over this process's earlier micro-batches
            of the same step, or None.

    Returns:
        () fp32, one for an even load.

    Raises:
        ArgumentError: ``tensors`` are of no pass with balance, ``top_k`` or ``num_null`` does not
            fit their columns, ``group`` is no process group, or ``earlier_load`` no tensor.
        ShapeError, DeviceError: ``earlier_load`` is not (E + 1,), or lies on another device.
    """
    op = "global_batch_loss"
    if not isinstance(tensors, RouteTensors) or tensors.switch.dim() != 0:
        came = type(tensors).__name__
        if isinstance(tensors, RouteTensors):
            came += " of a pass with balance=False"
        raise ArgumentError(
            checks.message(
                op,
                f"tensors is {came}",
                "the results of sonic.routing.route.route with balance",
                "Pass what route(logits, top_k, balance=True) returned.",
            )
        )
    num_columns = tensors.load.shape[1]
    checks.check_int(op, "top_k", top_k, 1, num_columns, "at most the columns")
    checks.check_int(op, "num_null", num_null, 0, num_columns - 1, "fewer than the columns")
    check_group(op, group)
    if earlier_load is not None:
        checks.check_is_tensor(op, "earlier_load", earlier_load)
        sizes = {"E + 1": num_columns + 1}
        checks.check_shape(op, "earlier_load", earlier_load, sizes, "Pass a sum of local_load.")
        checks.check_same_device(op, "tensors", tensors.load, earlier_load=earlier_load)
    now = local_load(tensors)
    load = now if earlier_load is None else now + earlier_load
    prob = tensors.prob_sum.sum(dim=0)
    # float64 holds every count exactly, so that one exchange serves counts and probabilities.
    shared = torch.cat([load.double(), prob.detach().double(), now[-1:].double()])
    shared = all_reduced(shared, group).to(prob.dtype)
    load, prob_all = shared[:num_columns], shared[num_columns + 1 : -1]
    tokens, tokens_now = shared[num_columns].clamp(min=1), shared[-1].clamp(min=1)
    load = load_shares(load, num_columns - num_null, prob.dtype)
    weight = load * (num_columns / (top_k * tokens * tokens_now))
    size = 1 if group is None else dist.get_world_size(group)
    mine = size * _weighted_sum(prob, weight)
    return (weight * prob_all).sum() + (mine - mine.detach())


class _WeightedSum(torch.autograd.Function):
    """The weight is an attribute rather than a saved tensor: checkpointing that repeats a pass for
    its saved tensors would replace it by that of the repetition, which knows later counts."""

    @staticmethod
    def forward(ctx: Any, prob: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return (weight * prob).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.weight, None


def _weighted_sum(prob: Tensor, weight: Tensor) -> Tensor:
    """() sum of ``weight * prob``, differentiable in ``prob``."""
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and prob.requires_grad):
        return (weight * prob).sum()
    total: Tensor = _WeightedSum.apply(prob, weight)
    return total


# -------------------------------------------------------------------------- correction bias


def corrected_bias(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """``bias + rate * sign(mean(load) - load)``: an overloaded expert loses, an idle one gains.

    Args:
        bias: (E,) fp32. load: (E,) winners of a step, over all processes. rate: 1e-3 is usual.

    Returns:
        (E,), ``bias`` itself where there was no load at all.

    Raises:
        ArgumentError: ``bias`` or ``load`` is no tensor, or ``rate`` no finite number from 0 on.
        DTypeError: ``bias`` is not floating point, or ``load`` complex.
        DeviceError: the two are on two devices.
        ShapeError: the two are not vectors of one length.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
    """
    op = "corrected_bias"
    checks.check_tensor(op, "bias", bias, ("E",), "Pass one bias per expert.")
    checks.check_tensor(op, "load", load, ("E",), "Sum it over sequences: load.sum(dim=0).")
    checks.check_float(op, "bias", bias)
    checks.check_same_device(op, "bias", bias, load=load)
    if load.is_complex():
        todo = "Count the winners of each expert."
        raise DTypeError(checks.message(op, f"load is {load.dtype}", "real numbers", todo))
    checks.check_shape(op, "load", load, {"E": bias.shape[0]}, "Count the winners of each expert.")
    checks.check_number(op, "rate", rate, "1e-3 is usual.")
    load = load.to(torch.float64)
    return bias + rate * torch.sign(load.mean() - load).to(bias.dtype)


def refuse_capture(op: str, tensor: Tensor) -> None:
    """A step's update must not become part of a CUDA graph, which would repeat it."""
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise UnsupportedError(
            f"{op}: called while a CUDA graph is being captured. Allowed: outside of a capture, "
            "once per optimiser step. Capture forward and backward only, and call it between "
            "replays."
        )


# ---------------------------------------------------------------------------------- capacity


def capacity_of(num_tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """Rows an expert takes at most: ``ceil(factor * T * top_k / E)``, at least 1.

    The factor is the decimal number that it prints as: 1.1 is 11/10. However small it is, an expert
    keeps one row.

    Raises:
        ArgumentError: ``num_tokens``, ``top_k`` or ``num_experts`` is no int in its range, or
            ``factor`` is not a number above 0 and up to 65,536.
    """
    op = "capacity_of"
    checks.check_int(op, "num_tokens", num_tokens, 0, checks.MAX_SLOTS, "row indices are int32")
    checks.check_int(op, "top_k", top_k, 1, checks.MAX_SLOTS, "row indices are int32")
    checks.check_num_experts(op, "num_experts", num_experts)
    check_factor(op, "factor", factor)
    return capacity_of_ratio(num_tokens, top_k, num_experts, exact_ratio(factor))


def exact_ratio(factor: float) -> tuple[int, int]:
    """Numerator and denominator of the shortest decimal number that is ``factor``."""
    return Fraction(str(float(factor))).as_integer_ratio()


def capacity_of_ratio(num_tokens: int, top_k: int, num_experts: int, ratio: tuple[int, int]) -> int:
    """:func:`capacity_of` of checked sizes. A product of floats would be rounded up twice."""
    numerator, denominator = ratio
    rows = -(-numerator * num_tokens * top_k // (denominator * num_experts))
    return min(checks.MAX_SLOTS, max(1, rows))


def check_factor(op: str, name: str, factor: Any) -> None:
    """A capacity factor: a number up to the one at which no expert can be full."""
    todo = "Pass a factor such as 1.25, or None where the limit is optional."
    if isinstance(factor, (int, float)) and checks.MAX_EXPERTS < factor < math.inf:
        raise ArgumentError(
            checks.message(
                op,
                f"{name}={factor!r} limits nothing",
                f"at most {checks.MAX_EXPERTS}, the most experts: E times the mean load is all "
                "slots",
                todo,
            )
        )
    checks.check_number(op, name, factor, todo, positive=True)


def limit_capacity(
    ids: Tensor, scores: Tensor, num_experts: int, capacity: int, *, drop: str = "position"
) -> Tensor:
    """Ids with the slots beyond each expert's capacity replaced by -1.

    Args:
        ids: (T, top_k) int32 or int64; ids outside ``[0, num_experts)`` are kept as they are.
        scores: (T, top_k), read for ``drop="score"``.
        capacity: rows per expert, at least 0.
        drop: ``"position"`` drops an expert's last slots, ``"score"`` those of lowest score (of
            equal scores, the last).

    Returns:
        (T, top_k), of the dtype of ``ids``.

    Raises:
        ArgumentError: ``ids`` or ``scores`` is no tensor, ``num_experts`` or ``capacity`` no int in
            its range, or ``drop`` unknown.
        DTypeError: ``ids`` are not int32 or int64, or ``scores`` not floating point.
        ShapeError, DeviceError: ``ids`` is no matrix, or ``scores`` differs from it in shape or
            device.
    """
    op = "limit_capacity"
    checks.check_tensor(op, "ids", ids, ("T", "top_k"), "Pass one row of expert ids per token.")
    checks.check_ids(op, "ids", ids)
    checks.check_is_tensor(op, "scores", scores)
    checks.check_float(op, "scores", scores)
    sizes = {"T": ids.shape[0], "top_k": ids.shape[1]}
    checks.check_shape(op, "scores", scores, sizes, "Pass one score per id.")
    checks.check_same_device(op, "ids", ids, scores=scores)
    checks.check_num_experts(op, "num_experts", num_experts)
    checks.check_int(op, "capacity", capacity, 0, checks.MAX_SLOTS, "rows of an expert")
    checks.check_known(op, "drop", drop, DROP_RULES)
    flat = ids.reshape(-1)
    if drop == "position":
        beyond = _rank_in_expert(flat, num_experts) >= capacity
    else:
        order = torch.sort(scores.detach().reshape(-1), descending=True, stable=True).indices
        late = _rank_in_expert(flat[order], num_experts) >= capacity
        beyond = torch.empty_like(late).scatter_(0, order, late)
    return torch.where(beyond, -1, flat).to(ids.dtype).view(ids.shape)


def _rank_in_expert(flat: Tensor, num_experts: int) -> Tensor:
    """(S,) how many earlier slots name the same expert; -1 for ids out of range."""
    plan = build_plan(flat[:, None], num_experts)
    row, inside = plan.row_by_slot, plan.row_by_slot >= 0
    first = plan.offset_by_expert[torch.where(inside, flat, 0).long()]
    return torch.where(inside, row - first, -1)


# -------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class RoutingStatistics:
    """Numbers to watch, as tensors on the device; each property is a few small kernels.

    Attributes:
        load: (E,) int32 winners of each column, null experts included, before any capacity limit.
        token_entropy: () mean entropy of a token's scores, or None from a router that scores none
            (PrecomputedRouter) or has no score of each expert (ProductKeyRouter).
        num_experts: columns that are experts; the rest are identity and null experts.
        plan: the plan that the experts run, or None.
    """

    load: Tensor
    token_entropy: Tensor | None
    num_experts: int
    plan: RoutingPlan | None

    def __post_init__(self) -> None:
        op = "RoutingStatistics"
        checks.check_tensor(op, "load", self.load, ("E",), "Sum it over sequences.")
        most = self.load.shape[0]
        checks.check_int(op, "num_experts", self.num_experts, 1, most, "columns of the load")

    @property
    def load_entropy(self) -> Tensor:
        """() entropy of the experts' shares of the load; ``log(E)`` if it is even."""
        load = self.load[: self.num_experts].double()
        share = load / load.sum().clamp(min=1)
        return -torch.special.xlogy(share, share).sum().float()

    @property
    def max_violation(self) -> Tensor:
        """() by how much the busiest expert exceeds the mean load; 0 if it is even."""
        load = self.load[: self.num_experts].double()
        mean = load.mean()
        return torch.where(mean > 0, load.max() / mean.clamp(min=1e-9) - 1, 0.0).float()

    @property
    def idle_experts(self) -> Tensor:
        """() int64: experts that no token chose."""
        return (self.load[: self.num_experts] == 0).sum()

    @property
    def dropped(self) -> Tensor | None:
        """() share of the slots that no expert's row serves: barred, null, identity, or beyond
        the capacity."""
        if self.plan is None:
            return None
        slots = max(1, self.plan.num_rows)
        return 1 - self.plan.offset_by_expert[-1].float() / slots
