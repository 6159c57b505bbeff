"""The router as one operator: winners, weights, plan, balance sums and losses of router logits.

Sizes: T tokens, E columns of the logits, S sequences of T / S tokens, ``top_k`` winners.
"""

from typing import Any

import torch
from torch import Tensor

from sonic import checks
from sonic.plan import RoutingPlan, build_plan, int32_ids
from sonic.runtime.derivatives import differentiable_function, register_gradient
from sonic.runtime.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    MissingPackageError,
    ShapeError,
)
from sonic.runtime.limits import MAX_EXPERTS, MAX_SLOTS, MAX_TOP_K, message
from sonic.runtime.route import Route, RouteTensors, ScoreFunction

# A table rather than the enum's own call: Dynamo of torch 2.11 does not iterate enums.
_INTEGERS = ("num_groups", "topk_groups", "group_best", "num_experts", "num_sequences")
_SCORES = {member.value: member.value for member in ScoreFunction}


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    ids: Tensor | None = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_best: int = 2,
    num_null: int = 0,
    num_experts: int | None = None,
    num_sequences: int = 1,
    balance: bool = True,
) -> RouteTensors:
    """Choose and weight ``top_k`` columns per token, and sum up what balancing needs.

    With ``v = logits + mask`` in fp32 and ``s`` the score of each column, winners are the largest
    ``v``; or the largest ``s + bias`` where there is a bias, or where groups are ranked by a sum.
    Their weights are ``scale * s``, before scaling divided by their sum if ``renormalize``. The
    bias has no part in the weights.

    Args:
        logits: (T, E) bf16, fp16 or fp32, any strides, E up to 65,536; fp64 runs in torch.
        top_k: 1 to min(64, E).
        score: ``"softmax"``, ``"sigmoid"`` or ``"sqrt_softplus"``.
        renormalize: see above. With a softmax it makes the softmax of the winners' logits.
        scale: positive.
        bias: (E,) floating point, no gradient (DeepSeek-V3's correction bias).
        mask: (T, E) or (E,) floating point without gradient, added to the logits: 0 leaves a column
            open, -inf bars it. Of booleans that are True where allowed it is
            ``torch.where(allowed, 0.0, -torch.inf)``. A token that has nothing left to choose gets
            id -1 and weight zero in place of a winner.
        ids: (T, top_k) int32 or int64, winners decided elsewhere; weights come from the logits.
            Ids out of range are dropped, ids within a token may repeat.
        num_groups, topk_groups: columns fall into ``num_groups`` equal runs, and only the
            ``topk_groups`` best ones are open to a token.
        group_best: a group's rank is the sum of its so many largest choices.
        num_null: the last ``num_null`` columns are null experts: their winners have weight zero,
            and the renormalisation passes over them.
        num_experts: E of the plan, whose slots of other columns are dropped; None for no plan.
        num_sequences: divides T; the first axis of ``prob_sum`` and ``load``.
        balance: False leaves sums and losses out.

    Returns:
        :class:`~sonic.runtime.route.RouteTensors`. ``scores``, ``prob_sum``, ``switch``,
        ``sequence`` and ``z`` carry gradients to ``logits``.

    Raises:
        ShapeError: ``logits`` is not a matrix of 1 to 65,536 columns, or ``bias``, ``mask`` or
            ``ids`` does not fit it.
        DTypeError: a tensor is of another dtype.
        DeviceError: a tensor is not where the logits are.
        ArgumentError: a number, a string or a flag is none of the above, or ``mask`` requires a
            gradient.
        MissingPackageError: CUDA logits without triton.

    Numerics:
        fp32 throughout; a choice by logits is exact, one by score compares fp32 scores. Equal
        choices go to the lower column; NaN ranks above every number. Deterministic; the logits'
        gradient is rounded once.

    Memory:
        Backward keeps logits and mask, which are the caller's, and ``scores``, ``ids``, ``lse``,
        ``load`` and ``live``: 8 T top_k + 4 T + 4 S E + 4 S bytes for S sequences, without
        ``balance`` 8 T top_k + 4 T. Of fp64 logits ``scores`` and ``lse`` take twice as much.

    Example:
        >>> logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
        >>> routed = route(logits, 2, num_experts=3)
        >>> routed.ids.tolist(), routed.load.tolist(), routed.offset_by_expert.tolist()
        ([[0, 1], [2, 1]], [[1, 2, 1]], [0, 1, 3, 4])
        >>> f"{routed.scores[0, 0]:.4f} {routed.switch:.4f}"
        '0.7311 0.9335'

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2, for the sigmoid, its bias, groups and the
    sequence-wise loss; Switch Transformer (arXiv 2101.03961) for the switch loss and ST-MoE (arXiv
    2202.08906) for the z-loss. :func:`sonic.reference.routers.balance_losses` has the formulas.
    """
    checks.check_is_tensor("route", "logits", logits)
    checks.check_is_int("route", "num_null", num_null, 0, MAX_EXPERTS)
    if num_experts is not None:
        checks.check_num_experts("route", "num_experts", num_experts)
    options = Route(
        top_k=top_k,
        score=_SCORES.get(score, score) if isinstance(score, str) else score,
        renormalize=renormalize,
        scale=scale,
        num_groups=num_groups,
        topk_groups=topk_groups,
        group_best=group_best,
        num_working=(logits.shape[-1] if logits.dim() else 0) - num_null,
        num_experts=0 if num_experts is None else num_experts,
        num_sequences=num_sequences,
        balance=balance,
    )
    _check(logits, bias, mask, ids, options)
    num_tokens, num_columns = logits.shape
    check_options("route", None, num_tokens, num_columns, options)
    bias = None if bias is None else bias.detach()
    if mask is not None:
        mask = mask.detach().view(-1, mask.shape[-1])
    ids = None if ids is None else int32_ids(ids)
    results = torch.ops.sonic.route(logits, bias, mask, ids, *_flat(options))
    return RouteTensors(*results)


def plan_of(tensors: RouteTensors) -> RoutingPlan | None:
    """The plan among the results, None if none was asked for."""
    if tensors.offset_by_expert.shape[0] == 0:
        return None
    return RoutingPlan(
        tensors.offset_by_expert,
        tensors.token_by_row,
        tensors.slot_by_row,
        tensors.row_by_slot,
        offset_by_token=None,
        slot_by_position=None,
        top_k=tensors.ids.shape[1],
        num_tokens=tensors.ids.shape[0],
    )


# ------------------------------------------------------------------------------------ checks


def _check(
    logits: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    ids: Tensor | None,
    route: Route,
) -> None:
    checks.check_table("route", "logits", logits, route.top_k)
    num_tokens, num_columns = logits.shape
    for name, tensor in (("bias", bias), ("mask", mask)):
        if tensor is not None:
            checks.check_is_tensor("route", name, tensor)
            _check_dtype(name, tensor, checks.FLOAT_DTYPES)
            _check_device(name, tensor, logits)
    if bias is not None and tuple(bias.shape) != (num_columns,):
        todo = "Pass one number for each column of the logits."
        raise _shape_error("bias", bias, f"({num_columns},)", todo)
    if mask is not None and (
        mask.dim() not in (1, 2)
        or mask.shape[-1] != num_columns
        or (mask.dim() == 2 and mask.shape[0] not in (1, num_tokens))
    ):
        allowed = f"({num_columns},), (1, {num_columns}) and ({num_tokens}, {num_columns})"
        todo = "Pass one row for all tokens, or one for each token of the logits."
        raise _shape_error("mask", mask, allowed, todo)
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        allowed = "a mask without gradient, which routing would not give it"
        todo = "Pass mask.detach(), or add what is to be learned to the logits."
        raise ArgumentError(message("route", "mask requires a gradient", allowed, todo))
    _check_ids(logits, ids, route)


def _shape_error(name: str, tensor: Tensor, allowed: str, todo: str) -> ShapeError:
    return ShapeError(message("route", f"{name} has shape {tuple(tensor.shape)}", allowed, todo))


def _check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        todo = f"Cast it: {name}.{'int' if name == 'ids' else 'float'}()."
        if name == "mask":  # a cast of booleans would add 0 or 1, and bar nothing
            allowed_if = "mask" if tensor.dtype == torch.bool else "mask.bool()"
            todo = (
                f"It is added to the logits: pass torch.where({allowed_if}, 0.0, -torch.inf) if "
                f"True means allowed, torch.where({allowed_if}, -torch.inf, 0.0) if barred."
            )
        got, *allowed = (str(d).removeprefix("torch.") for d in (tensor.dtype, *dtypes))
        raise DTypeError(message("route", f"{name} is {got}", ", ".join(allowed), todo))


def _check_device(name: str, tensor: Tensor, logits: Tensor) -> None:
    if tensor.device != logits.device:
        got, allowed = f"{name} is on {tensor.device}", f"{logits.device}, where logits is"
        raise DeviceError(message("route", got, allowed, f"Move it: {name}.to(logits.device)."))


def _check_ids(logits: Tensor, ids: Tensor | None, route: Route) -> None:
    if ids is None:
        return
    checks.check_is_tensor("route", "ids", ids)
    if tuple(ids.shape) != (logits.shape[0], route.top_k):
        todo = "Pass top_k ids for each token of the logits."
        raise _shape_error("ids", ids, f"({logits.shape[0]}, {route.top_k})", todo)
    _check_dtype("ids", ids, checks.ID_DTYPES)
    _check_device("ids", ids, logits)


def check_options(
    op: str, came: str | None, num_tokens: int, num_columns: int, route: Route
) -> None:
    """Raise ArgumentError unless the options but ``top_k`` fit so many tokens and columns, which
    ``op`` was given as ``came``, None for logits."""
    num_null = num_columns - route.num_working

    def check(name: str, value: int, right: bool, allowed: str, todo: str) -> None:
        if not right:
            logits = f"logits of shape ({num_tokens}, {num_columns})"
            got = f"{name}={value} came with {logits if came is None else came}"
            raise ArgumentError(message(op, got, allowed, todo))

    def check_range(name: str, value: int, low: int, high: int, why: str) -> None:
        allowed = f"{low} to {high} ({why})"
        check(name, value, low <= value <= high, allowed, f"Pass {name} inside that range.")

    for name in _INTEGERS:
        checks.check_is_int(op, name, getattr(route, name), 1, MAX_SLOTS)
    checks.check_bool(op, "renormalize", route.renormalize)
    checks.check_bool(op, "balance", route.balance)
    checks.check_known(op, "score", route.score, tuple(_SCORES))
    todo = "Pass 1.0 to leave the weights as they are."
    checks.check_number(op, "scale", route.scale, todo, positive=True)
    check_range("num_null", num_null, 0, num_columns - 1, "columns that carry no work")
    if route.num_experts:  # else no plan was asked for
        check_range("num_experts", route.num_experts, 1, num_columns, "columns that are experts")
    groups, chosen = route.num_groups, route.topk_groups
    allowed = f"divisors of the {num_columns} columns, up to 1024"
    right = 1 <= groups <= 1024 and num_columns % groups == 0
    check("num_groups", groups, right, allowed, "Pass 1 to choose among all columns.")
    size, most = num_columns // groups, min(groups, MAX_TOP_K)
    check_range("topk_groups", chosen, 1, most, f"at most num_groups={groups} and {MAX_TOP_K}")
    if groups > 1:
        allowed = f"groups that hold top_k={route.top_k} columns together, {size} each"
        check("topk_groups", chosen, chosen * size >= route.top_k, allowed, "Pass more groups.")
    best = 8 if groups == 1 else min(8, size)
    check_range("group_best", route.group_best, 1, best, "columns that rank a group")
    sequences = route.num_sequences
    right = sequences >= 1 and num_tokens % sequences == 0
    # A text with the number in it would tie what torch.compile traces to that number.
    allowed = "divisors of the tokens" if right else f"divisors of the {num_tokens} tokens"
    check(
        "num_sequences", sequences, right, allowed, "Pass the number of sequences of equal length."
    )


# --------------------------------------------------------------------------------- operators

_Options = tuple[int, str, bool, float, int, int, int, int, int, int, bool]


def _flat(route: Route) -> _Options:
    return (
        route.top_k,
        route.score,
        route.renormalize,
        route.scale,
        route.num_groups,
        route.topk_groups,
        route.group_best,
        route.num_working,
        route.num_experts,
        route.num_sequences,
        route.balance,
    )


def _plan_tensors(ids: Tensor, route: Route, impl: str) -> tuple[Tensor, ...]:
    if route.num_experts == 0:
        return tuple(ids.new_empty(0) for _ in range(4))
    plan = build_plan(ids, route.num_experts, impl=impl)
    return plan.offset_by_expert, plan.token_by_row, plan.slot_by_row, plan.row_by_slot


def _without_balance(scores: Tensor, ids: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
    none = [scores.new_empty(0) for _ in range(4)]
    prob_sum, count, live = scores.new_empty(0, 0), ids.new_empty(0, 0), ids.new_empty(0)
    return scores, prob_sum, *none[:3], ids, lse, count, live, none[3]


def _forward_torch(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, ids: Tensor | None, *flat: Any
) -> tuple[Tensor, ...]:
    from sonic.reference.routers import balance_losses, route_reference

    route = Route(*flat)
    routed = route_reference(logits, bias, mask, ids, route)
    ids = routed.ids.clone() if routed.ids is ids else routed.ids
    plan = _plan_tensors(ids, route, "torch")
    if not route.balance:
        return *_without_balance(routed.scores, ids, routed.lse), *plan
    losses = balance_losses(*routed[3:], route)
    return (
        routed.scores,
        routed.prob_sum,
        losses.switch,
        losses.sequence,
        losses.z,
        ids,
        routed.lse,
        routed.load,
        routed.live,
        losses.entropy,
        *plan,
    )


def _forward_cuda(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, ids: Tensor | None, *flat: Any
) -> tuple[Tensor, ...]:
    route = Route(*flat)
    if logits.dtype == torch.float64 or logits.shape[0] == 0:
        return _forward_torch(logits, bias, mask, ids, *flat)
    try:
        from sonic.triton import router
    except ImportError as error:
        raise MissingPackageError(
            f"route: logits on {logits.device} need triton, which cannot be imported ({error}). "
            "Install or repair it, or route on the CPU."
        ) from error
    if router.is_fused(logits.shape[0], logits.shape[1], ids is not None, route):
        return tuple(router.route_fused(logits, bias, mask, route))
    return _forward_unfused(logits, bias, mask, ids, route)


def _forward_unfused(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, ids: Tensor | None, route: Route
) -> tuple[Tensor, ...]:
    from sonic.reference.routers import balance_losses, count_winners
    from sonic.triton import balance, router

    scores, ids, lse, *rest = router.route_rows(logits, bias, mask, ids, route)
    plan = _plan_tensors(ids, route, "triton")
    if not route.balance:
        return *_without_balance(scores, ids, lse), *plan
    norm, entropy = rest
    prob_sum = balance.column_sums(logits, mask, lse, norm, route)
    count = count_winners(ids, logits.shape[1], route.num_sequences)
    is_live = lse != -torch.inf
    live = is_live.view(route.num_sequences, -1).sum(dim=1, dtype=torch.int32)
    squares = torch.where(is_live, lse, 0.0).square().sum()
    losses = balance_losses(prob_sum, count, live, squares, entropy.sum(), route)
    return (
        scores,
        prob_sum,
        losses.switch,
        losses.sequence,
        losses.z,
        ids,
        lse,
        count,
        live,
        losses.entropy,
        *plan,
    )


def _forward_fake(
    logits: Tensor, bias: Tensor | None, mask: Tensor | None, ids: Tensor | None, *flat: Any
) -> tuple[Tensor, ...]:
    route = Route(*flat)
    num_tokens, num_columns = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    scores = logits.new_empty((num_tokens, route.top_k), dtype=dtype)
    winners = logits.new_empty((num_tokens, route.top_k), dtype=torch.int32)
    lse = logits.new_empty(num_tokens, dtype=dtype)
    slots = num_tokens * route.top_k
    sizes = (route.num_experts + 1, slots, slots, slots) if route.num_experts else (0,) * 4
    plan = tuple(winners.new_empty(size) for size in sizes)
    if not route.balance:
        return *_without_balance(scores, winners, lse), *plan
    sums = (route.num_sequences, num_columns)
    return (
        scores,
        scores.new_empty(sums),
        *(scores.new_empty(()) for _ in range(3)),
        winners,
        lse,
        winners.new_empty(sums),
        winners.new_empty(route.num_sequences),
        scores.new_empty(()),
        *plan,
    )


def _backward_torch(
    dscores: Tensor | None,
    dprob_sum: Tensor | None,
    dlosses: tuple[Tensor | None, ...],
    logits: Tensor,
    mask: Tensor | None,
    scores: Tensor,
    ids: Tensor,
    count: Tensor,
    live: Tensor,
    route: Route,
) -> Tensor:
    from sonic.reference.routers import loss_weights, route_grad_reference

    dswitch, dsequence, dz = dlosses
    weight = dprob_sum
    if dswitch is not None or dsequence is not None:
        by_switch, by_sequence = loss_weights(count, live, route, scores.dtype)
        for loss_grad, coefficient in ((dswitch, by_switch), (dsequence, by_sequence)):
            if loss_grad is not None:
                part = loss_grad * coefficient
                weight = part if weight is None else weight + part
    if dz is not None:
        dz = dz / live.sum().to(scores.dtype).clamp(min=1)
    gradient = route_grad_reference(dscores, weight, dz, logits, mask, scores, ids, route)
    return gradient.contiguous()


def _backward(
    dscores: Tensor | None,
    dprob_sum: Tensor | None,
    dswitch: Tensor | None,
    dsequence: Tensor | None,
    dz: Tensor | None,
    logits: Tensor,
    mask: Tensor | None,
    scores: Tensor,
    ids: Tensor,
    lse: Tensor,
    count: Tensor,
    live: Tensor,
    *flat: Any,
) -> Tensor:
    route = Route(*flat)
    dlosses = (dswitch, dsequence, dz)
    in_torch = logits.dtype == torch.float64 or logits.shape[0] == 0 or not logits.is_cuda
    if in_torch:
        return _backward_torch(
            dscores, dprob_sum, dlosses, logits, mask, scores, ids, count, live, route
        )
    from sonic.triton.balance import loss_weights
    from sonic.triton.router_grad import route_grad

    weight, dz_sum = None, None
    if route.balance:
        weight, dz_sum = loss_weights(dprob_sum, *dlosses, count, live, route)
    return route_grad(dscores, weight, dz_sum, logits, mask, scores, ids, lse, route)


def _backward_fake(*inputs: Any) -> Tensor:
    logits: Tensor = inputs[5]
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, _, mask, _, *flat = inputs
    results = RouteTensors(*output)
    ctx.set_materialize_grads(False)
    # Without balance sums, the four floats behind the scores are empty.
    ctx.mark_non_differentiable(*results[5 if results.switch.dim() == 0 else 1 :])
    ctx.save_for_backward(
        logits, mask, results.scores, results.ids, results.lse, results.load, results.live
    )
    ctx.flat = flat


def _autograd(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    rest = (None,) * (3 + len(ctx.flat))
    wanted = [*grads[:5]] if ctx.flat[-1] else [grads[0], None, None, None, None]
    if all(grad is None for grad in wanted):
        return None, *rest
    return torch.ops.sonic.route_backward(*wanted, *ctx.saved_tensors, *ctx.flat), *rest


_OPTIONS = (
    "int top_k, str score, bool renormalize, float scale, int num_groups, int topk_groups,"
    " int group_best, int num_working, int num_experts, SymInt num_sequences, bool balance"
)
_LIBRARY = torch.library.Library("sonic", "FRAGMENT")
_LIBRARY.define(
    f"route(Tensor logits, Tensor? bias, Tensor? mask, Tensor? ids, {_OPTIONS}) -> "
    f"({', '.join(['Tensor'] * len(RouteTensors._fields))})",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "route_backward(Tensor? dscores, Tensor? dprob_sum, Tensor? dswitch, Tensor? dsequence,"
    " Tensor? dz, Tensor logits, Tensor? mask, Tensor scores, Tensor ids, Tensor lse,"
    f" Tensor count, Tensor live, {_OPTIONS}) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("route", _forward_torch, "CPU")
_LIBRARY.impl("route", _forward_cuda, "CUDA")
_LIBRARY.impl("route_backward", _backward, "CPU")
_LIBRARY.impl("route_backward", _backward, "CUDA")
torch.library.register_fake("sonic::route", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("sonic::route_backward", _backward_fake, lib=_LIBRARY)
_ROUTE = torch.ops.sonic.route.default
register_gradient(
    _LIBRARY,
    _ROUTE,
    differentiable_function(_ROUTE, _autograd, _setup_context),
    "sonic.reference.routers.route_reference",
)
