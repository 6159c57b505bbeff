"""Token rounding: top-k routing whose experts receive whole tiles of tokens.

A grouped GEMM works in tiles of M rows, so that an expert with one row more than a tile pays for
two. Token rounding starts from top-k and moves every expert's count to a multiple of M next to it:
up, by the best tokens that had not chosen the expert, or down, without the worst that had.

Symbols: T tokens, E experts, M the tile, f an expert's top-k count.
Source: SonicMoE (arXiv 2512.14080), section 5, algorithms 4 and 6.
"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sonic import checks
from sonic.enums import ScoreOrder
from sonic.plan import MAX_SLOTS, RoutingPlan
from sonic.runtime.derivatives import differentiable_function, register_gradient
from sonic.runtime.eager import remembered
from sonic.runtime.errors import (
    ArgumentError,
    DeviceError,
    MissingPackageError,
    ShapeError,
)
from sonic.runtime.limits import message

RULES = ("nr", "sr", "nr-s", "balance-f", "up", "down")
# Rows of a tile in every kernel here that multiplies rows by an expert's weight, but for the half
# tiles of experts with hardly any.
KERNEL_TILE = 128
_RANDOM_RULES = ("sr", "nr-s")
_log = logging.getLogger("sonic")
_warned: set[tuple[int, int, int, str]] = set()


def token_rounding(
    scores: Tensor,
    top_k: int,
    tile: int | str,
    rule: str = "nr",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs (token, expert) whose number is, for each expert, a multiple of ``tile``.

    Each token chooses its ``top_k`` best experts, f tokens choose an expert. With ``lower`` and
    ``upper`` the multiples of the tile next to f (T counts as one; both are f if f is one), the
    rule takes one of them:

    * ``"nr"``: the nearer one; half way, the even multiple, as ``round`` does;
    * ``"sr"``: ``upper`` with probability ``(f - lower) / (upper - lower)``, so that f is the
      expected count;
    * ``"nr-s"``: ``upper`` with probability ``(m(f) - m(lower)) / (m(upper) - m(lower))``, where
      ``m(n)`` is the sum of the scores of the expert's n preferred tokens; ``lower`` if these
      scores are all zero;
    * ``"balance-f"``: the one that leaves the smaller sum of ``count - f`` over this expert and
      those before it, ``lower`` if equal. The absolute sum over all experts is at most ``tile / 2``
      and each expert moves by less than ``tile`` (not, as the paper has it, by ``tile / 2``);
    * ``"up"``, ``"down"``: always that one.

    The expert keeps as many of its preferred tokens: first those that chose it, then the others,
    each by descending score, equal scores by ascending token. With ``tile`` 1 that is top-k. A
    token may end with no expert or with all of them. For training only; evaluate with top-k.

    Rounding wants batches of several tiles for each expert. With ``"nr"`` an expert of less than
    half a tile loses all of its tokens, with ``"down"`` one of less than a whole tile: 64 tokens
    that choose 2 of 8 experts are 16 rows for each, so that with a tile of 128 no pair is left. The
    package's logger warns, once for each E, ``top_k``, tile and rule, where T ``top_k`` / E is
    below that.

    Args:
        scores: (T, E) bf16, fp16 or fp32 on any device, any strides, E up to 65,536; fp64 runs in
            torch. Probabilities or other non-negative numbers: a negative score ranks as zero, NaN
            above everything.
        top_k: 1 to min(64, E).
        tile: M, at least 1, or ``"auto"`` for 128, the tile of this package's kernels.
        rule: one of the above.
        generator: of the numbers that ``"sr"`` and ``"nr-s"`` draw, one fp32 for each expert, on
            the device of ``scores``; the device's default generator if None. The other rules draw
            nothing.

    Returns:
        ``token_ids`` (S,) and ``expert_ids`` (S,) int32 and ``weights`` (S,) fp32 (fp64 for fp64
        scores), the input of :func:`sonic.experts_flat`. How many pairs are kept is known on the
        device only, so S is :func:`max_pairs`. The kept pairs come first, by ascending token, then
        expert; behind them tokens are T, experts E (dropped by :func:`sonic.build_plan_flat`) and
        weights 0. ``weights`` are ``scores`` at the pairs; their gradient goes there.

    Raises:
        ShapeError: ``scores`` is not a matrix, E is out of range, or S exceeds 2^31 - 1.
        DTypeError: ``scores`` is of another dtype.
        ArgumentError: ``top_k``, ``tile`` or ``rule`` is none of the above.
        DeviceError: ``generator`` is of another kind of device than ``scores``.
        MissingPackageError: CUDA scores without triton installed.

    Numerics:
        Scores are compared exactly; sums of scores are fp64. The same scores and random numbers
        give the same bits on every run, and nothing waits for the device. A given generator has to
        be registered with a CUDA graph that captures the call.

    Memory:
        Backward keeps ``token_ids`` and ``expert_ids``, 8 S bytes.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
        >>> token_ids, expert_ids, weights = token_rounding(scores, 1, 2, rule="up")
        >>> token_ids.tolist(), expert_ids.tolist()
        ([0, 1, 2, 2, 3, 3], [0, 0, 0, 1, 0, 1])

    Source: SonicMoE (arXiv 2512.14080), section 5, algorithm 4, and 6 for ``"balance-f"``.
    """
    weights, token_ids, expert_ids, *_ = _token_rounding(scores, top_k, tile, rule, generator)
    return token_ids, expert_ids, weights


def token_rounding_plan(
    scores: Tensor,
    top_k: int,
    tile: int | str,
    rule: str = "nr",
    generator: torch.Generator | None = None,
) -> tuple[Tensor, RoutingPlan]:
    """:func:`token_rounding` with the routing plan of its pairs, from the same kernels.

    Args:
        scores, top_k, tile, rule, generator: as in :func:`token_rounding`.

    Returns:
        ``weights`` (S,) fp32 (fp64 for fp64 scores), differentiable in the scores, and the plan
        that :func:`sonic.build_plan_flat` makes of the two lists, without ``slot_by_position``:
        slots lie by token.

    Raises, Numerics, Memory, Source: as :func:`token_rounding`.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
        >>> weights, plan = token_rounding_plan(scores, 1, 2, rule="up")
        >>> plan.offset_by_expert.tolist(), plan.offset_by_token.tolist()
        ([0, 4, 6], [0, 1, 2, 4, 6])
    """
    weights, _, _, *plan = _token_rounding(scores, top_k, tile, rule, generator)
    return weights, flat_plan(plan, scores.shape[0])


def flat_plan(tensors: Sequence[Tensor], num_tokens: int) -> RoutingPlan:
    """A plan of slots that lie by token, from its five tensors, in its order."""
    by_expert, token_by_row, slot_by_row, row_by_slot, by_token = tensors
    return RoutingPlan(
        by_expert,
        token_by_row,
        slot_by_row,
        row_by_slot,
        offset_by_token=by_token,
        slot_by_position=None,
        top_k=0,
        num_tokens=num_tokens,
    )


def max_pairs(num_tokens: int, num_experts: int, top_k: int, tile: int | str, rule: str) -> int:
    """S, the most pairs that :func:`token_rounding` can keep.

    ``T top_k`` plus what rounding can add: nothing for ``"down"``, ``tile // 2`` for each expert
    with ``"nr"`` and in all with ``"balance-f"``, ``tile - 1`` for each expert otherwise; never
    more than T E.

    Args:
        num_tokens: T. num_experts: E.
        top_k, tile, rule: as in :func:`token_rounding`.

    Raises:
        ArgumentError: an argument is none of the above.

    Example:
        >>> max_pairs(16384, 256, 8, 128, "down"), max_pairs(16384, 256, 8, 128, "nr")
        (131072, 147456)
    """
    op = "max_pairs"
    checks.check_int(op, "num_tokens", num_tokens, 0, MAX_SLOTS, "row indices are int32")
    checks.check_num_experts(op, "num_experts", num_experts)
    checks.check_top_k(op, top_k, num_experts)
    rows = resolve_tile(op, tile)
    check_rule(op, rule)
    return most_pairs(num_tokens, num_experts, top_k, rows, rule)


def most_pairs(num_tokens: int, num_experts: int, top_k: int, tile: int, rule: str) -> int:
    """:func:`max_pairs` of arguments that have been checked."""
    added = {"down": 0, "nr": num_experts * (tile // 2), "balance-f": tile // 2}
    most = num_tokens * top_k + added.get(rule, num_experts * (tile - 1))
    return min(most, num_tokens * num_experts)


def rounding_scores(
    logits: Tensor, top_k: int, *, order: ScoreOrder | str = ScoreOrder.SOFTMAX_OVER_TOPK
) -> Tensor:
    """Scores of all experts, of which those of the top-k are what :func:`topk_routing` returns.

    With ``v`` the logits of a token, expert ``e`` has ``exp(v[e])`` over the sum of ``exp(v)``:
    over all experts for ``topk_over_softmax``, over the ``top_k`` largest for the other orders. A
    layer trained with token rounding and evaluated with top-k then sees one scale of weights.

    Args:
        logits: (T, E) bf16, fp16 or fp32 on any device, any strides, E up to 65,536; T may be 0.
            fp64, and more than 4096 experts, run in torch.
        top_k: 1 to min(64, E).
        order: a :class:`~sonic.enums.ScoreOrder` or its value.

    Returns:
        (T, E) fp32 (fp64 for fp64 logits), non-negative, differentiable in the logits. A token's
        ``top_k`` winners have scores that sum to 1, and no other is above the least of them; for
        ``topk_over_softmax`` it is all E that sum to 1.

    Raises:
        ShapeError: ``logits`` is not a matrix, or E is 0 or above 65,536.
        DTypeError: ``logits`` is of another dtype.
        ArgumentError: ``top_k`` is outside 1 to min(64, E), or ``order`` is unknown.
        MissingPackageError: CUDA logits without triton installed.

    Numerics:
        fp32. Deterministic. The logits' gradient is rounded once. Nothing waits for the device.

    Memory:
        Backward keeps the result, 4 T E bytes (8 T E for fp64 logits).

    Example:
        >>> scores = rounding_scores(torch.tensor([[0.0, 2.0, 2.0, -torch.inf]]), 2)
        >>> scores[:, 1:].tolist()
        [[0.5, 0.5, 0.0]]

    Source: SonicMoE (arXiv 2512.14080), section 5: the table S of algorithm 4.
    """
    op = "rounding_scores"
    checks.check_table(op, "logits", logits, top_k)
    full = checks.choice(op, "order", order, ScoreOrder) is ScoreOrder.TOPK_OVER_SOFTMAX
    scores: Tensor = torch.ops.sonic.winner_softmax(logits, top_k, full)
    return scores


def _token_rounding(
    scores: Tensor, top_k: int, tile: int | str, rule: str, generator: torch.Generator | None
) -> tuple[Tensor, ...]:
    tile = _checked(scores, top_k, tile, rule)
    check_generator("token_rounding", "scores", scores, generator)
    uniform = draw_uniform(scores, rule, generator)
    outputs: tuple[Tensor, ...] = torch.ops.sonic.token_rounding(scores, uniform, top_k, tile, rule)
    return outputs


@remembered
def _checked(scores: Tensor, top_k: int, tile: int | str, rule: str) -> int:
    """Rows of a tile, if the arguments are right."""
    rows = resolve_tile("token_rounding", tile)
    check_rounding("token_rounding", "scores", scores, top_k, rows, rule)
    warn_of_few_rows(scores, top_k, rows, rule)
    return rows


def draw_uniform(table: Tensor, rule: str, generator: torch.Generator | None) -> Tensor | None:
    """(E,) fp32 numbers in [0, 1) for the random rules on a (T, E) table, None for the others."""
    if rule not in _RANDOM_RULES:
        return None
    # Not given at all if None: with a symbolic E, torch.compile knows no rand with a generator.
    source: dict[str, Any] = {} if generator is None else {"generator": generator}
    return torch.rand(table.shape[1], dtype=torch.float32, device=table.device, **source)


def check_rounding(
    op: str,
    name: str,
    table: Tensor,
    top_k: int,
    tile: int,
    rule: str,
) -> None:
    """Raise what :func:`token_rounding` lists unless the arguments, ``table`` by this name, fit."""
    checks.check_table(op, name, table, top_k)
    num_tokens, num_experts = table.shape
    check_rule(op, rule)
    if most_pairs(num_tokens, num_experts, top_k, tile, rule) > MAX_SLOTS:
        raise ShapeError(
            f"{op}: {num_tokens} tokens, top_k={top_k} and {num_experts} experts with tile={tile} "
            f"may keep more than {MAX_SLOTS} pairs, and rows are int32. Split the tokens."
        )


def warn_of_few_rows(table: Tensor, top_k: int, tile: int, rule: str) -> None:
    """Warn where the shapes say that the mean expert loses all of its tokens, once for each E,
    ``top_k``, tile and rule. Never while traced."""
    if torch.compiler.is_compiling() or rule not in ("nr", "down") or tile == 1:
        return  # tiles of one row round nothing
    num_tokens, num_experts = table.shape
    # T counts as a multiple of the tile.
    needed = min(tile, num_tokens) * num_experts
    pairs = num_tokens * top_k * (2 if rule == "nr" else 1)
    if pairs >= needed or type(pairs) is not int or type(num_experts) is not int:
        return
    case = num_experts, top_k, tile, rule
    if case not in _warned:
        _warned.add(case)
        _log.warning(
            "token rounding: T=%d tokens that choose top_k=%d of E=%d experts are %.4g rows for "
            "each on average, and the rule %r takes all rows from an expert of less than %s "
            "(tile=%d): most experts, or all, get no token, and tokens without an expert come out "
            'as zeros. Pass a smaller tile, more tokens at once, or the rule "up" that keeps all.',
            num_tokens,
            top_k,
            num_experts,
            num_tokens * top_k / num_experts,
            rule,
            "half a tile" if rule == "nr" else "a tile",
            tile,
        )


def check_rule(op: str, rule: Any, name: str = "rule") -> None:
    """Raise ArgumentError unless ``rule``, an argument of that name, is known."""
    checks.check_known(op, name, rule, RULES)


def check_generator(op: str, name: str, table: Tensor, generator: Any) -> None:
    """Raise unless ``generator`` is None or a generator of the kind of device of ``table``."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ArgumentError(
            message(
                op,
                f"generator is of type {type(generator).__name__}",
                "a torch.Generator, or None for the device's own",
                f"Make one: torch.Generator({table.device.type!r}).manual_seed(0).",
            )
        )
    if generator is not None and generator.device.type != table.device.type:
        raise DeviceError(
            f"{op}: generator is on {generator.device} and {name} on {table.device}; both must be "
            "on one device."
        )


def resolve_tile(op: str, tile: int | str) -> int:
    """``tile`` as a number of rows, ``"auto"`` being that of the kernels; raises ArgumentError."""
    if tile == "auto":
        return KERNEL_TILE
    if isinstance(tile, bool) or not isinstance(tile, int) or not 1 <= tile <= MAX_SLOTS:
        kind = "" if type(tile) in (int, str) else f" is of type {type(tile).__name__}"
        raise ArgumentError(
            message(
                op,
                f"tile={tile!r}{kind}",
                f'an int from 1 to {MAX_SLOTS}, or "auto"',
                f'Pass "auto" for {KERNEL_TILE}, the tile of the kernels.',
            )
        )
    return tile


# ------------------------------------------------------------------------------ in torch


def winners_of(table: Tensor, top_k: int) -> Tensor:
    """(T, top_k) columns of the largest entries, equal ones by ascending column."""
    return torch.sort(table, dim=1, descending=True, stable=True).indices[:, :top_k]


def _winner_softmax_torch(logits: Tensor, top_k: int, full: bool) -> Tensor:
    value = logits.to(weight_dtype(logits.dtype))
    best = value if full else value.gather(1, winners_of(value, top_k))
    return torch.exp(value - best.logsumexp(dim=1, keepdim=True))


def _winner_softmax_grad_torch(
    dscores: Tensor, scores: Tensor, top_k: int, full: bool, dtype: torch.dtype
) -> Tensor:
    product = dscores * scores
    projection = scores
    if not full:
        winners = winners_of(scores, top_k)
        projection = torch.zeros_like(scores).scatter(1, winners, scores.gather(1, winners))
    return (product - projection * product.sum(dim=1, keepdim=True)).to(dtype)


def _preference(scores: Tensor, winners: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each expert: its tokens in order of preference (E, T), their scores in fp64, and f."""
    value = scores.clamp(min=0)
    chosen = torch.zeros_like(value, dtype=torch.int8).scatter_(1, winners, 1).t()
    value = value.t()
    by_score = torch.sort(value, dim=1, descending=True, stable=True).indices
    regroup = torch.sort(chosen.gather(1, by_score), dim=1, descending=True, stable=True).indices
    tokens = by_score.gather(1, regroup)
    return tokens, value.gather(1, tokens).double(), chosen.sum(dim=1, dtype=torch.int64)


def _balanced(frequency: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    counts = []
    error = torch.zeros((), dtype=torch.int64, device=frequency.device)
    for f, down, up in zip(frequency, lower, upper, strict=True):
        count = torch.where((up - f + error).abs() < (down - f + error).abs(), up, down)
        error = error + count - f
        counts.append(count)
    return torch.stack(counts)


def _rounded(
    frequency: Tensor, ranked: Tensor, uniform: Tensor | None, tile: int, rule: str
) -> Tensor:
    """(E,) counts after rounding; ``ranked`` (E, T) are the scores in order of preference."""
    num_tokens = ranked.shape[1]
    lower = torch.where(frequency == num_tokens, frequency, frequency // tile * tile)
    upper = torch.where(lower == frequency, frequency, (lower + tile).clamp(max=num_tokens))
    if rule == "down":
        return lower
    if rule == "up":
        return upper
    if rule == "balance-f":
        return _balanced(frequency, lower, upper)
    if rule == "nr":
        excess = 2 * (frequency - lower) - (upper - lower)
        goes_up = (excess > 0) | ((excess == 0) & (frequency // tile % 2 == 1))
        return torch.where(goes_up, upper, lower)
    if uniform is None:
        raise ArgumentError(f"token_rounding: rule={rule!r} needs one uniform number per expert.")
    draw = uniform.double()
    if rule == "sr":
        return torch.where(draw * (upper - lower) < frequency - lower, upper, lower)
    rank = torch.arange(num_tokens, device=ranked.device)
    undecided = (rank >= lower[:, None]) & (rank < upper[:, None])
    last = undecided & (rank < frequency[:, None])
    part = torch.where(last, ranked, 0.0).sum(dim=1)
    whole = torch.where(undecided, ranked, 0.0).sum(dim=1)
    return torch.where(draw * whole < part, upper, lower)


def _forward_torch(
    scores: Tensor, uniform: Tensor | None, top_k: int, tile: int, rule: str
) -> tuple[Tensor, ...]:
    return round_winners(scores, winners_of(scores.clamp(min=0), top_k), uniform, tile, rule)


def round_winners(
    scores: Tensor, winners: Tensor, uniform: Tensor | None, tile: int, rule: str
) -> tuple[Tensor, ...]:
    """Token rounding in torch, from (T, E) scores and the (T, top_k) int64 ids of the winners.

    Returns ``weights``, ``token_ids``, ``expert_ids`` and the plan's tensors in its order.
    """
    num_tokens, num_experts = scores.shape
    num_slots = most_pairs(num_tokens, num_experts, winners.shape[1], tile, rule)
    tokens, ranked, frequency = _preference(scores, winners)
    counts = _rounded(frequency, ranked, uniform, tile, rule)
    rank = torch.arange(num_tokens, device=scores.device)
    keep = torch.zeros_like(tokens, dtype=torch.bool).scatter_(1, tokens, rank < counts[:, None])
    keep = keep.t().reshape(-1)
    # Pairs that are not kept all land in one entry behind the list.
    slot = torch.where(keep, keep.cumsum(0) - 1, num_slots)
    pair = torch.arange(keep.numel(), device=scores.device)

    def listed(values: Tensor, fill: int, dtype: torch.dtype) -> Tensor:
        out = torch.full((num_slots + 1,), fill, dtype=dtype, device=scores.device)
        return out.scatter_(0, slot, values.to(dtype))[:num_slots].clone()

    token_ids = listed(pair // num_experts, num_tokens, torch.int32)
    expert_ids = listed(pair % num_experts, num_experts, torch.int32)
    weights = listed(scores.reshape(-1), 0, weight_dtype(scores.dtype))
    # The last of the plan's tensors would say that slots lie by token already.
    *plan, _ = torch.ops.sonic.build_plan_flat(
        token_ids, expert_ids, num_tokens, num_experts, "torch"
    )
    return weights, token_ids, expert_ids, *plan


def weight_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _backward_torch(
    dweights: Tensor,
    token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens: int,
    num_experts: int,
    dtype: torch.dtype,
) -> Tensor:
    size = num_tokens * num_experts
    pair = token_ids.to(torch.int64) * num_experts + expert_ids
    pair = torch.where(token_ids < num_tokens, pair, size)
    dscores = torch.zeros(size + 1, dtype=dtype, device=dweights.device)
    dscores.scatter_(0, pair, dweights.to(dtype))
    return dscores[:size].view(num_tokens, num_experts).clone()


# ---------------------------------------------------------------------------- operators


def triton_kernels(op: str, device: torch.device) -> tuple[Any, Any]:
    """The modules :mod:`sonic.triton.rounding_winners` and :mod:`sonic.triton.token_rounding`."""
    try:
        from sonic.triton import rounding_winners, token_rounding
    except ImportError as error:
        raise MissingPackageError(
            f"{op}: tensors on {device} need triton, which cannot be imported ({error}). "
            "Install or repair it, or route on the CPU."
        ) from error
    return rounding_winners, token_rounding


def _winner_softmax_cuda(logits: Tensor, top_k: int, full: bool) -> Tensor:
    kernels, _ = triton_kernels("rounding_scores", logits.device)
    if logits.dtype == torch.float64 or logits.shape[1] > kernels.MAX_EXPERTS:
        return _winner_softmax_torch(logits, top_k, full)
    scores: Tensor = kernels.winner_softmax(logits, top_k, full)
    return scores


def _winner_softmax_grad_cuda(
    dscores: Tensor, scores: Tensor, top_k: int, full: bool, dtype: torch.dtype
) -> Tensor:
    kernels, _ = triton_kernels("rounding_scores", scores.device)
    if scores.dtype == torch.float64 or scores.shape[1] > kernels.MAX_EXPERTS:
        return _winner_softmax_grad_torch(dscores, scores, top_k, full, dtype)
    dlogits: Tensor = kernels.winner_softmax_grad(dscores, scores, top_k, full, dtype)
    return dlogits


def _winner_softmax_fake(logits: Tensor, top_k: int, full: bool) -> Tensor:
    return logits.new_empty(logits.shape, dtype=weight_dtype(logits.dtype))


def _winner_softmax_grad_fake(
    dscores: Tensor, scores: Tensor, top_k: int, full: bool, dtype: torch.dtype
) -> Tensor:
    return scores.new_empty(scores.shape, dtype=dtype)


def _winner_softmax_setup(ctx: Any, inputs: tuple[Tensor, int, bool], output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.options = (*inputs[1:], inputs[0].dtype)


def _winner_softmax_backward(ctx: Any, dscores: Tensor) -> tuple[Tensor, None, None]:
    (scores,) = ctx.saved_tensors
    return torch.ops.sonic.winner_softmax_backward(dscores, scores, *ctx.options), None, None


def _forward_cuda(
    scores: Tensor, uniform: Tensor | None, top_k: int, tile: int, rule: str
) -> tuple[Tensor, ...]:
    num_tokens, num_experts = scores.shape
    if scores.dtype == torch.float64 or num_tokens == 0:
        return _forward_torch(scores, uniform, top_k, tile, rule)
    _, kernels = triton_kernels("token_rounding", scores.device)
    num_slots = most_pairs(num_tokens, num_experts, top_k, tile, rule)
    rounded: tuple[Tensor, ...] = kernels.round_tokens(
        scores, uniform, top_k, tile, rule, num_slots
    )
    return rounded


def _backward_cuda(
    dweights: Tensor,
    token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens: int,
    num_experts: int,
    dtype: torch.dtype,
) -> Tensor:
    arguments = (dweights, token_ids, expert_ids, num_tokens, num_experts, dtype)
    if dtype == torch.float64:
        return _backward_torch(*arguments)
    _, kernels = triton_kernels("token_rounding", dweights.device)
    dscores: Tensor = kernels.round_tokens_grad(*arguments)
    return dscores


def _forward_fake(
    scores: Tensor, uniform: Tensor | None, top_k: int, tile: int, rule: str
) -> tuple[Tensor, ...]:
    num_tokens, num_experts = scores.shape
    num_slots = most_pairs(num_tokens, num_experts, top_k, tile, rule)
    sizes = [num_slots] * 2 + [num_experts + 1] + [num_slots] * 3 + [num_tokens + 1]
    token_ids, expert_ids, *plan = (scores.new_empty(size, dtype=torch.int32) for size in sizes)
    weights = scores.new_empty(num_slots, dtype=weight_dtype(scores.dtype))
    return weights, token_ids, expert_ids, *plan


def _backward_fake(
    dweights: Tensor,
    token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens: int,
    num_experts: int,
    dtype: torch.dtype,
) -> Tensor:
    return dweights.new_empty((num_tokens, num_experts), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scores = inputs[0]
    ctx.save_for_backward(output[1], output[2])
    ctx.shape, ctx.dtype = scores.shape, scores.dtype


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dweights = grads[0]
    if dweights is None:
        return None, None, None, None, None
    token_ids, expert_ids = ctx.saved_tensors
    dscores = torch.ops.sonic.token_rounding_backward(
        dweights, token_ids, expert_ids, *ctx.shape, ctx.dtype
    )
    return dscores, None, None, None, None


_LIBRARY = torch.library.Library("sonic", "FRAGMENT")
_LIBRARY.define(
    "token_rounding(Tensor scores, Tensor? uniform, int top_k, int tile, str rule)"
    f" -> ({', '.join(['Tensor'] * 8)})",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "token_rounding_backward(Tensor dweights, Tensor token_ids, Tensor expert_ids,"
    " SymInt num_tokens, SymInt num_experts, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("token_rounding", _forward_torch, "CPU")
_LIBRARY.impl("token_rounding", _forward_cuda, "CUDA")
_LIBRARY.impl("token_rounding_backward", _backward_torch, "CPU")
_LIBRARY.impl("token_rounding_backward", _backward_cuda, "CUDA")
torch.library.register_fake("sonic::token_rounding", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("sonic::token_rounding_backward", _backward_fake, lib=_LIBRARY)
_TOKEN_ROUNDING = torch.ops.sonic.token_rounding.default
register_gradient(
    _LIBRARY,
    _TOKEN_ROUNDING,
    differentiable_function(_TOKEN_ROUNDING, _backward, _setup_context),
    "a plain gather of the weights",
)

_LIBRARY.define(
    "winner_softmax(Tensor logits, int top_k, bool full) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "winner_softmax_backward(Tensor dscores, Tensor scores, int top_k, bool full, ScalarType dtype)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("winner_softmax", _winner_softmax_torch, "CPU")
_LIBRARY.impl("winner_softmax", _winner_softmax_cuda, "CUDA")
_LIBRARY.impl("winner_softmax_backward", _winner_softmax_grad_torch, "CPU")
_LIBRARY.impl("winner_softmax_backward", _winner_softmax_grad_cuda, "CUDA")
torch.library.register_fake("sonic::winner_softmax", _winner_softmax_fake, lib=_LIBRARY)
torch.library.register_fake(
    "sonic::winner_softmax_backward", _winner_softmax_grad_fake, lib=_LIBRARY
)
_WINNER_SOFTMAX = torch.ops.sonic.winner_softmax.default
register_gradient(
    _LIBRARY,
    _WINNER_SOFTMAX,
    differentiable_function(_WINNER_SOFTMAX, _winner_softmax_backward, _winner_softmax_setup),
    "torch.softmax",
)
