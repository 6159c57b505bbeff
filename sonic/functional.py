"""The layer as functions: :func:`moe`, :func:`experts`, :func:`experts_flat`, :func:`grouped_mm`.

Symbols: T tokens, H hidden size, I intermediate size, E experts, top_k experts per token, S slots
of a flat list, R rows. Shared conventions:

* ``w1`` is (E, 2I, H) for a gated activation and (E, I, H) otherwise, ``w2`` is (E, H, I).
* ``layout`` is the order of the gate and up rows of ``w1`` and ``b1``: ``"interleaved"``
  (g0 u0 g1 u1 ...) or ``"concatenated"`` (gates, then ups; Hugging Face). Neither is copied.
* ``impl="auto"`` runs the kernels on CUDA tensors and the torch reference on CPU tensors. It never
  falls back: a GPU without kernels raises :class:`UnsupportedError` and names ``"reference"``.
* The kernels take bfloat16 and float16, H and I multiples of 8, weights whose rows are contiguous
  and start at 16-byte steps, and at most 2^30 slots, live or dropped, since one expert may get all
  of them; the reference any floating dtype, size and strides, and 2^31 - 1 slots.
* Under ``torch.autocast`` activations, weights and biases are cast to its dtype. Scores stay fp32,
  and the router is evaluated in fp32.
* No function reads a device value on the host; all run on the current stream, can be captured in a
  CUDA graph (after a first call, forward and backward, with the same sizes: it compiles the
  kernels) and traced with ``torch.compile(fullgraph=True)``, and give the same bits on every run.
* What is saved for the backward pass is listed in ``sonic.autograd``; in a region without gradients
  nothing is.
* Reverse-mode first derivatives only. A second one, forward mode and the derivatives of
  ``torch.func`` raise :class:`UnsupportedError`; :mod:`sonic.reference` has all of them.
  ``torch.vmap`` and ``is_grads_batched`` run as loops, gradients included.

Source: SonicMoE (arXiv 2512.14080), section 3.
"""

import re
from typing import Any

import torch
from torch import Tensor

from sonic import autograd, checks
from sonic.enums import ActivationType, GateUpLayout, ScoreOrder
from sonic.plan import RoutingPlan, build_plan, build_plan_flat, plan_of_topk, rows_of_topk
from sonic.routing.logits import router_logits
from sonic.routing.rounded_routing import rounded_routing
from sonic.routing.token_rounding import check_generator, check_rule, resolve_tile
from sonic.routing.topk import topk_routing
from sonic.runtime.eager import autocast_may_be_on, needs_dispatcher, remembered, unbatched
from sonic.runtime.errors import ArgumentError, ShapeError, SonicError

MainGrads = tuple[Tensor | None, Tensor | None]
_PLAN_IMPL = {"cute": "triton", "reference": "torch"}
# (x, w1, b1, w2, b2), (activation, layout, impl), main_grads
_Operands = tuple[tuple[Any, ...], tuple[str, str, str], MainGrads]


def experts(
    hidden_states: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str | ActivationType = "swiglu",
    layout: str | GateUpLayout = "interleaved",
    impl: str = "auto",
    main_grads: MainGrads | None = None,
) -> Tensor:
    """``out[t] = sum_k weight[t, k] * (act(x[t] @ w1[e].T + b1[e]) @ w2[e].T + b2[e])``.

    The expert ``e`` is ``topk_ids[t, k]``.

    Args:
        hidden_states: (T, H), floating point; any strides.
        topk_ids: (T, top_k) int32 or int64. An id outside ``[0, E)`` drops its slot: it adds
            nothing to the output and receives a zero gradient.
        topk_weights: (T, top_k), floating point of any dtype and strides; used as fp32. Its
            gradient has its dtype.
        w1: (E, 2I, H) gated, (E, I, H) otherwise; dtype of ``hidden_states``.
        w2: (E, H, I), likewise.
        b1: (E, 2I) or (E, I), or None. b2: (E, H), or None. Dtype of the weights.
        activation: a value of :class:`sonic.ActivationType`.
        layout: a value of :class:`sonic.GateUpLayout`; not read if the activation is not gated.
        impl: ``"auto"``, ``"cute"`` or ``"reference"``.
        main_grads: ``(for w1, for w2)``, float32 tensors shaped like the weights, or None. The
            backward pass adds the weight's gradient, not rounded to the weight's dtype, and leaves
            ``.grad`` of that weight alone. Ignored for a weight that requires no gradient.
            Every backward pass adds, also one that was asked for other gradients only
            (``torch.autograd.grad(out, x)``): autograd does not tell.
            Under torch.compile, calls that share accumulators must not overlap (the backward pass
            of one has to run before the forward pass of the next); autograd raises otherwise.

    Returns:
        (T, H) in the dtype of ``hidden_states`` (of autocast, under autocast). A token whose slots
        are all dropped gets zeros.

    Raises:
        ShapeError, DTypeError, DeviceError, LayoutError, ArgumentError: an argument is none of the
            above.
        UnsupportedError: no kernels for this GPU.
        MissingPackageError: triton or cutlass is missing.

    Numerics:
        fp32 accumulation; the pre-activation, post-activation, expert output and result are each
        rounded once to the working dtype; slots are summed in ascending order. On the kernels, the
        activation and its gradient may see the sums with eleven significant bits (relative 2**-11
        at most, as fp16 has; bf16 has eight), with a scale for each row. Weight gradients are
        rounded once too, but for an expert with more than twice its share of the rows: where its
        gradient is small, it is summed in parts, which are rounded each and added in fp32.

    Memory:
        2TH + 4RI bytes (2RI not gated) for 2-byte dtypes and R = T * top_k, plus integers:
        :func:`sonic.saved_bytes`.

    Example:
        >>> import torch, sonic
        >>> x, ids = torch.randn(3, 16), torch.tensor([[0, 1], [1, 0], [2, -1]])
        >>> w1, w2 = torch.randn(3, 16, 16), torch.randn(3, 16, 8)
        >>> sonic.experts(x, ids, torch.full((3, 2), 0.5), w1, w2).shape
        torch.Size([3, 16])
    """
    op, x = "experts", hidden_states
    if torch.compiler.is_compiling() or autocast_may_be_on():
        impl = _check_experts(x, topk_ids, topk_weights, impl)
        operands = _operands(op, x, w1, b1, w2, b2, activation, layout, impl, main_grads)
        return _run(operands, topk_weights, plan_of_topk(topk_ids, w1.shape[0], _PLAN_IMPL[impl]))
    # What most calls are, in one look at the arguments.
    how = _check_all(x, topk_ids, topk_weights, w1, b1, w2, b2, activation, layout, impl)
    tensors, into = (x, w1, b1, w2, b2), _main_grads(op, main_grads, w1, w2)
    choice = topk_ids, w1.shape[0], _PLAN_IMPL[how[2]]
    if needs_dispatcher((*tensors, topk_ids, topk_weights, *into)):
        return _run((tensors, how, into), topk_weights, plan_of_topk(*choice))
    differentiable, store_preact = _differentiable(tensors, topk_weights)
    options = topk_ids.shape[1], *how, store_preact, *into
    return autograd.experts_direct(*differentiable, *rows_of_topk(*choice), None, None, *options)


@remembered
def _check_experts(hidden_states: Any, topk_ids: Any, topk_weights: Any, impl: Any) -> str:
    """The implementation that will run, if these arguments are right."""
    op = "experts"
    checks.check_hidden_states(op, hidden_states)
    impl = checks.resolve_impl(op, impl, hidden_states.device)
    checks.check_topk(op, hidden_states, topk_ids, topk_weights, impl)
    return str(impl)


@remembered
def _check_all(
    hidden_states: Any,
    topk_ids: Any,
    topk_weights: Any,
    w1: Any,
    b1: Any,
    w2: Any,
    b2: Any,
    activation: Any,
    layout: Any,
    impl: Any,
) -> tuple[str, str, str]:
    """Values of activation, layout and implementation, if these arguments are right as they are."""
    impl = _check_experts(hidden_states, topk_ids, topk_weights, impl)
    parameters = w1, b1, w2, b2
    act, order = _check_operands("experts", hidden_states, *parameters, activation, layout, impl)
    return act, order, impl


def experts_flat(
    hidden_states: Tensor,
    token_ids: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str | ActivationType = "swiglu",
    layout: str | GateUpLayout = "interleaved",
    impl: str = "auto",
    main_grads: MainGrads | None = None,
) -> Tensor:
    """:func:`experts` for any list of (token, expert) pairs, in any order, any number per token.

    Args:
        hidden_states: (T, H), floating point.
        token_ids: (S,) int32 or int64, the token of each slot. An id outside ``[0, T)`` drops it.
        expert_ids: (S,) int32 or int64, the expert of each slot. An id outside ``[0, E)`` drops it.
        weights: (S,), floating point of any dtype and stride; used as fp32.
        w1, w2, b1, b2, activation, layout, impl, main_grads: as in :func:`experts`.

    Returns:
        (T, H); a token without a live slot gets zeros.

    Raises:
        As :func:`experts`.

    Memory:
        As :func:`experts` with R = S, plus 4 (T + 1) + 4 S bytes.
    """
    out, _ = _experts_flat(
        "experts_flat",
        hidden_states,
        (token_ids, expert_ids, weights),
        (w1, b1, w2, b2),
        (activation, layout, impl, main_grads),
    )
    return out


def experts_planned(
    hidden_states: Tensor,
    weights: Tensor,
    plan: RoutingPlan,
    w1: Tensor,
    w2: Tensor,
    *,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str | ActivationType = "swiglu",
    layout: str | GateUpLayout = "interleaved",
    impl: str = "auto",
    main_grads: MainGrads | None = None,
) -> Tensor:
    """:func:`experts` by a plan that was made before, such as a router's.

    Args:
        hidden_states: (T, H), floating point.
        weights: (T, top_k) for a plan of fixed top-k, (S,) for one of flat lists.
        plan: of :func:`sonic.build_plan` or :func:`sonic.build_plan_flat`, for T tokens and E
            experts. Its contents are trusted.
        w1, w2, b1, b2, activation, layout, impl, main_grads: as in :func:`experts`.

    Returns:
        (T, H), as :func:`experts`.

    Raises:
        As :func:`experts`; ShapeError also for a plan of other sizes.
    """
    op = "experts_planned"
    checks.check_hidden_states(op, hidden_states)
    impl = checks.resolve_impl(op, impl, hidden_states.device)
    operands = _operands(op, hidden_states, w1, b1, w2, b2, activation, layout, impl, main_grads)
    if not isinstance(plan, RoutingPlan):
        todo = "Make it with sonic.build_plan(topk_ids, num_experts)."
        came = f"plan is of type {type(plan).__name__}"
        raise ArgumentError(checks.message(op, came, "a sonic.RoutingPlan", todo))
    top_k = plan.top_k if plan.offset_by_token is None else None
    _check_slot_weights(op, hidden_states, weights, plan.token_by_row, plan.num_tokens, top_k)
    sizes = plan.num_tokens, plan.num_experts
    if sizes != (hidden_states.shape[0], w1.shape[0]):
        raise ShapeError(
            checks.message(
                op,
                f"a plan of {sizes[0]} tokens and {sizes[1]} experts came with "
                f"{hidden_states.shape[0]} tokens and {w1.shape[0]} experts",
                "equal sizes",
                "Build the plan from the ids of these tokens, with num_experts=w1.shape[0].",
            )
        )
    checks.check_num_slots(op, plan.num_rows, impl)
    return _run(operands, weights, plan)


@remembered
def _check_slot_weights(
    op: str,
    hidden_states: Tensor,
    weights: Any,
    token_by_row: Tensor,
    num_tokens: int,
    top_k: int | None,
) -> None:
    """``weights`` are those of a plan's slots; ``top_k`` is None if they are a flat list."""
    todo = "Pass one weight for each slot of the plan, laid out as its ids were."
    if top_k is None:
        axes = {"S": token_by_row.shape[0]}
    else:
        axes = {"T": num_tokens, "top_k": top_k}
    checks.check_tensor(op, "weights", weights, tuple(axes), todo)
    checks.check_float(op, "weights", weights)
    checks.check_shape(op, "weights", weights, axes, todo)
    others = {"weights": weights, "plan": token_by_row}
    checks.check_same_device(op, "hidden_states", hidden_states, **others)


def moe(
    hidden_states: Tensor,
    router_weight: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    top_k: int,
    score_order: str | ScoreOrder = "softmax_over_topk",
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str | ActivationType = "swiglu",
    layout: str | GateUpLayout = "interleaved",
    impl: str = "auto",
    main_grads: MainGrads | None = None,
    rounding: str | None = None,
    tile: int | str = "auto",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The whole layer: router, top-k or token rounding, experts.

    Args:
        hidden_states: (T, H), floating point.
        router_weight: (E, H). If its dtype differs from that of ``hidden_states``, the logits are
            computed in the wider of the two, so that a float32 router stays float32.
        w1, w2, b1, b2, activation, layout, impl, main_grads: as in :func:`experts`.
        top_k: experts per token, 1 to min(64, E).
        score_order: a value of :class:`sonic.ScoreOrder`.
        rounding: a rule of :func:`sonic.token_rounding`, for training, or None for top-k. Pairs
            that rounding adds are weighted as ``score_order`` weights the winners, see
            :func:`sonic.routing.rounding_scores`. With ``"nr"`` an expert of less than half a tile
            of rows loses them all: where T ``top_k`` / E is below that, the output is mostly zero,
            and the package's logger warns once. Pass a smaller tile, more tokens or ``"up"``.
        tile: rows that each expert's count becomes a multiple of; ``"auto"`` for 128, the kernels'
            own. Used with ``rounding`` only.
        generator: as in :func:`sonic.token_rounding`.

    Returns:
        ``out (T, H)``, ``router_logits (T, E)`` and ``expert_frequency (E,)`` int32, the number of
        rows of each expert. Gradients flow through the first two.

    Raises:
        As :func:`experts`.

    Memory:
        As :func:`experts`, plus the logits and what the router's own operators keep. With
        ``rounding`` R is :func:`sonic.routing.max_pairs`.
    """
    op = "moe"
    checks.check_hidden_states(op, hidden_states)
    impl = checks.resolve_impl(op, impl, hidden_states.device)
    order = checks.choice(op, "score_order", score_order, ScoreOrder)
    operands = _operands(op, hidden_states, w1, b1, w2, b2, activation, layout, impl, main_grads)
    checks.check_router(op, hidden_states, router_weight, w1.shape[0], top_k, impl)
    tile = resolve_tile(op, tile)
    check_generator(op, "hidden_states", hidden_states, generator)
    if rounding is not None:
        check_rule(op, rounding, "rounding")
    logits = router_logits(hidden_states, router_weight)
    if rounding is None:
        scores, ids = topk_routing(logits, top_k, order=order)
        plan = build_plan(ids, w1.shape[0], impl=_PLAN_IMPL[impl])
    else:
        scores, plan = rounded_routing(logits, top_k, tile, rounding, generator, order=order)
        checks.check_num_slots(op, plan.num_rows, impl)
    return _run(operands, scores, plan), logits, plan.expert_frequency()


def grouped_mm(
    rows: Tensor,
    weight: Tensor,
    offset_by_expert: Tensor,
    *,
    bias: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """``out[r] = rows[r] @ weight[e].T + bias[e]`` for each row r in the range of expert e.

    For callers that dispatch tokens themselves (expert parallelism) and hold grouped rows.

    Args:
        rows: (R, K), floating point; any strides.
        weight: (E, N, K); dtype of ``rows``.
        offset_by_expert: (E + 1,) int32 on the device of ``rows``; starts at 0, never decreases;
            expert e owns rows ``[offset[e], offset[e + 1])``, which may be empty. ``offset[E]`` may
            be less than R. The reference checks the values. The kernels do not, since that would
            synchronise: with other offsets their result is undefined, and they may read and write
            outside of the tensors.
        bias: (E, N) or None.
        impl: as in :func:`experts`; the kernels take K and N that are multiples of 8.

    Returns:
        (R, N) in the dtype of ``rows``; zero for the rows from ``offset[E]`` on, whose gradient is
        zero too.

    Raises:
        As :func:`experts`.

    Memory:
        ``rows`` (if ``weight`` requires a gradient) and references.
    """
    op = "grouped_mm"
    checks.check_tensor(op, "rows", rows, ("R", "K"), "Flatten it to one row per routed token.")
    checks.check_float(op, "rows", rows)
    impl = checks.resolve_impl(op, impl, rows.device)
    if _autocast_dtype(rows) is not None:
        rows, weight, bias = _autocast(rows, weight, bias)
    checks.check_grouped_mm(op, rows, weight, offset_by_expert, bias, impl)
    offsets = offset_by_expert.contiguous()
    return autograd.grouped_mm(rows, weight, bias, offsets, impl)


# ------------------------------------------------------------------- names known to users


def moe_TC_softmax_topk_layer(
    x: Tensor,
    router_w: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    K: int,
    stream_id: int | None = None,
    activation_type: str | ActivationType = ActivationType.SWIGLU,
    is_inference_mode_enabled: bool = False,
    is_softmax_over_topk: bool = True,
    norm_topk_probs: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`moe` under the name and argument order of the ``sonicmoe`` package.

    Args:
        x: (T, H). router_w: (E, H).
        w1: (2I, H, E) or (I, H, E), the view ``W1.permute(1, 2, 0)`` of a (E, 2I, H) tensor.
        w2: (H, I, E), the permuted view of a (E, H, I) tensor.
        b1: (E, 2I) or (E, I), or None. b2: (E, H), or None.
        K: experts per token.
        stream_id: not read; the current stream is used.
        is_inference_mode_enabled: if True, nothing is kept for a backward pass.
        is_softmax_over_topk, norm_topk_probs: the two flags of :class:`sonic.ScoreOrder`;
            ``norm_topk_probs`` is for ``is_softmax_over_topk=False`` only.
        concat_layout: True for gate rows followed by up rows, False for interleaved.

    Returns:
        ``(out (T, H), router_logits (T, E), expert_frequency (E,))``.
    """
    op = "moe_TC_softmax_topk_layer"
    checks.check_bools(
        op,
        is_inference_mode_enabled=is_inference_mode_enabled,
        is_softmax_over_topk=is_softmax_over_topk,
        norm_topk_probs=norm_topk_probs,
        concat_layout=concat_layout,
    )
    if is_softmax_over_topk and norm_topk_probs:
        raise ArgumentError(
            checks.message(
                op,
                "norm_topk_probs=True came with is_softmax_over_topk=True",
                "norm_topk_probs with is_softmax_over_topk=False",
                "Drop norm_topk_probs: a softmax over the winners sums to one already.",
            )
        )
    order = ScoreOrder.SOFTMAX_OVER_TOPK
    if not is_softmax_over_topk:
        order = ScoreOrder.TOPK_OVER_SOFTMAX
        if norm_topk_probs:
            order = ScoreOrder.TOPK_OVER_SOFTMAX_NORM
    w1, w2 = _unpermuted(op, w1, w2)
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_inference_mode_enabled):
            return moe(
                x,
                router_w,
                w1,
                w2,
                top_k=K,
                score_order=order,
                b1=b1,
                b2=b2,
                activation=activation_type,
                layout=_layout(concat_layout),
            )
    except SonicError as error:
        raise _in_names_of(op, error, _TC_NAMES) from error


def moe_general_routing_inputs(
    x: Tensor,
    router_scores: Tensor,
    token_indices: Tensor,
    expert_indices: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    E: int,
    stream_id: int | None = None,
    activation_type: str | ActivationType = ActivationType.SWIGLU,
    is_inference_mode_enabled: bool = False,
    concat_layout: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`experts_flat` under the name and argument order of the ``sonicmoe`` package.

    Args:
        x: (T, H). router_scores: (S,). token_indices, expert_indices: (S,); in any order.
        w1, b1, w2, b2: as in :func:`moe_TC_softmax_topk_layer`.
        E: number of experts, that of the weights.
        stream_id: not read; the current stream is used.
        is_inference_mode_enabled: if True, nothing is kept for a backward pass.
        concat_layout: True for gate rows followed by up rows, False for interleaved.

    Returns:
        ``(out (T, H), expert_frequency (E,))``.
    """
    op = "moe_general_routing_inputs"
    w1, w2 = _unpermuted(op, w1, w2)
    if w1.shape[0] != E:
        raise ShapeError(
            checks.message(
                op,
                f"E={E} came with weights of {w1.shape[0]} experts",
                "E equal to the last axis of w1 and w2",
                "Pass E=w1.shape[-1], and the weights as W.permute(1, 2, 0) of (E, rows, columns).",
            )
        )
    try:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not is_inference_mode_enabled):
            out, plan = _experts_flat(
                op,
                x,
                (token_indices, expert_indices, router_scores),
                (w1, b1, w2, b2),
                (activation_type, _layout(concat_layout), "auto", None),
            )
    except SonicError as error:
        raise _in_names_of(op, error, _GENERAL_NAMES) from error
    return out, plan.expert_frequency()


# --------------------------------------------------------------------------------- shared


def _layout(concat_layout: bool) -> GateUpLayout:
    return GateUpLayout.CONCATENATED if concat_layout else GateUpLayout.INTERLEAVED


_COMMON_NAMES = {"hidden_states": "x", "activation=": "activation_type="}
_TC_NAMES = {**_COMMON_NAMES, "router_weight": "router_w", "top_k": "K"}
_GENERAL_NAMES = {
    **_COMMON_NAMES,
    "token_ids": "token_indices",
    "expert_ids": "expert_indices",
    "weights has": "router_scores has",
    "weights is": "router_scores is",
    "weights have": "router_scores have",
    "weights.reshape": "router_scores.reshape",
    "weights.float": "router_scores.float",
}


def _in_names_of(op: str, error: SonicError, names: dict[str, str]) -> SonicError:
    """``error`` of a function below, by the names of the arguments that ``op`` was called with."""
    text = str(error).removeprefix("moe: ").removeprefix(f"{op}: ")
    for name, theirs in names.items():
        text = re.sub(rf"\b{re.escape(name)}", theirs, text)
    if re.search(r"\bw[12]\b.*\(\d+, \d+, \d+\)", text):
        text += " Shapes of w1 and w2 are those before W.permute(1, 2, 0): (E, rows, columns)."
    return type(error)(f"{op}: {text}")


def _unpermuted(op: str, w1: Any, w2: Any) -> tuple[Tensor, Tensor]:
    """Weights (rows, columns, E) as (E, rows, columns); no copy."""
    todo = "Pass the weight as W.permute(1, 2, 0) of a contiguous (E, rows, columns) tensor."
    checks.check_tensor(op, "w1", w1, ("2I or I", "H", "E"), todo)
    checks.check_tensor(op, "w2", w2, ("H", "I", "E"), todo)
    return w1.permute(2, 0, 1), w2.permute(2, 0, 1)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that an enclosing autocast region asks for, or None. float64 is left alone."""
    kind = x.device.type
    if kind not in ("cuda", "cpu") or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _autocast(anchor: Any, *others: Any) -> tuple[Any, ...]:
    """``anchor`` and ``others`` in autocast's dtype, if such a region encloses the call."""
    dtype = _autocast_dtype(anchor)
    if dtype is None:
        return anchor, *others
    return tuple(
        x.to(dtype) if isinstance(x, Tensor) and x.dtype in checks.FLOAT_DTYPES else x
        for x in (anchor, *others)
    )


def _operands(
    op: str,
    hidden_states: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str | ActivationType,
    layout: str | GateUpLayout,
    impl: str,
    main_grads: MainGrads | None,
) -> _Operands:
    """Cast, check and bundle what one call of the experts reads besides its routing."""
    x, w1, b1, w2, b2 = _autocast(hidden_states, w1, b1, w2, b2)
    act, order = _check_operands(op, x, w1, b1, w2, b2, activation, layout, impl)
    return (x, w1, b1, w2, b2), (act, order, impl), _main_grads(op, main_grads, w1, w2)


def _main_grads(op: str, main_grads: MainGrads | None, w1: Tensor, w2: Tensor) -> MainGrads:
    if main_grads is None:
        return None, None
    checks.check_main_grads(op, main_grads, w1, w2)
    return main_grads


@remembered
def _check_operands(
    op: str,
    x: Tensor,
    w1: Any,
    b1: Any,
    w2: Any,
    b2: Any,
    activation: Any,
    layout: Any,
    impl: str,
) -> tuple[str, str]:
    """Values of the activation and of the layout, if these arguments are right."""
    act = checks.choice(op, "activation", activation, ActivationType)
    order = checks.choice(op, "layout", layout, GateUpLayout)
    checks.check_weights(op, x, w1, b1, w2, b2, act, impl)
    return act.value, order.value


def _differentiable(tensors: tuple[Any, ...], weights: Tensor) -> tuple[tuple[Any, ...], bool]:
    """(x, w1, b1, w2, b2) and the scores, and whether one of them will want its gradient."""
    # float64 only in the reference, where it lets gradcheck see the scores exactly.
    dtype = torch.float64 if tensors[0].dtype is torch.float64 else torch.float32
    scores = weights if weights.dtype is dtype else weights.to(dtype)
    differentiable = (*tensors, scores.contiguous())
    asked = differentiable
    if torch._C._are_functorch_transforms_active():
        asked = tuple(unbatched(value) for value in differentiable)
    return differentiable, torch.is_grad_enabled() and autograd.any_requires_grad(asked)


def _run(operands: _Operands, weights: Tensor, plan: RoutingPlan) -> Tensor:
    tensors, options, main_grads = operands
    differentiable, store_preact = _differentiable(tensors, weights)
    return autograd.experts_forward(
        *differentiable,
        plan.offset_by_expert,
        plan.token_by_row,
        plan.slot_by_row,
        plan.row_by_slot,
        plan.offset_by_token,
        plan.slot_by_position,
        plan.top_k,
        *options,
        store_preact,
        *main_grads,
    )


def _experts_flat(
    op: str,
    hidden_states: Tensor,
    routing: tuple[Tensor, Tensor, Tensor],
    parameters: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    options: tuple[str | ActivationType, str | GateUpLayout, str, MainGrads | None],
) -> tuple[Tensor, RoutingPlan]:
    token_ids, expert_ids, weights = routing
    activation, layout, impl, main_grads = options
    checks.check_hidden_states(op, hidden_states)
    impl = checks.resolve_impl(op, impl, hidden_states.device)
    checks.check_flat(op, hidden_states, token_ids, expert_ids, weights, impl)
    operands = _operands(op, hidden_states, *parameters, activation, layout, impl, main_grads)
    num_experts = parameters[0].shape[0]
    plan = build_plan_flat(
        token_ids, expert_ids, hidden_states.shape[0], num_experts, impl=_PLAN_IMPL[impl]
    )
    return _run(operands, weights, plan), plan
