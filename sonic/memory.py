"""Activation memory of one layer, as a formula.

Symbols: T tokens, H hidden size, I intermediate size, E experts, R routed rows (T * top_k, or the
length of the flat list). Source: SonicMoE (arXiv 2512.14080), section 3, memory.
"""

from dataclasses import dataclass

import torch

from sonic import checks
from sonic.enums import ActivationType
from sonic.runtime.errors import ArgumentError

_INT32 = 4
_FP32 = 4


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one call of the experts.

    Attributes:
        saved: kept from the forward to the backward pass; see the table in ``sonic.autograd``.
        forward_peak: largest sum of tensors alive at once during the forward pass, the saved ones
            and the output included, the input and the weights not.
        backward_peak: the same for the backward pass with all gradients, those of the weights
            included, where ``dh`` takes the memory of ``h`` (``sonic.autograd`` says when).
        weights: ``w1`` and ``w2``.
    """

    saved: int
    forward_peak: int
    backward_peak: int
    weights: int


def saved_bytes(
    num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int | None = None,
    *,
    num_slots: int | None = None,
    activation: str | ActivationType = "swiglu",
    dtype: torch.dtype = torch.bfloat16,
    weights_frozen: bool = False,
    rounding: str | None = None,
    tile: int | str = "auto",
) -> int:
    """Bytes that one call of the experts keeps for its backward pass, weights not counted.

    ``2TH + 4RI`` for a gated activation and 2-byte dtypes (``2TH + 2RI`` if not gated), plus 16
    bytes per slot for scores and permutations and ``4 (E + 1)`` for the offsets.

    Args:
        num_tokens, hidden_size, intermediate_size, num_experts: T, H, I, E.
        top_k: slots per token, for :func:`sonic.experts`; or
        num_slots: length of the flat list, for :func:`sonic.experts_flat`.
        activation: decides between 2I and I columns of pre-activation.
        dtype: working dtype.
        weights_frozen: True if ``w1`` requires no gradient; the input is then not kept.
        rounding, tile: of :func:`sonic.moe`, with ``top_k``. How many pairs are kept is known on
            the device only, so that R is the bound :func:`sonic.routing.max_pairs`.

    Raises:
        ArgumentError: a size is no int or too small, neither or both of ``top_k`` and ``num_slots``
            are given, or ``activation``, ``rounding`` or ``tile`` is unknown.
        DTypeError: ``dtype`` is none that the layer computes in.
    """
    op = "saved_bytes"
    checks.check_bool(op, "weights_frozen", weights_frozen)
    _check_tile(op, tile)
    rows = _rows(op, num_tokens, top_k, num_slots)
    _check(op, num_tokens, hidden_size, intermediate_size, num_experts, dtype)
    if rounding is not None:
        rows = _rounded_rows(op, num_tokens, num_experts, top_k, rounding, tile)
    width = _preact_width(op, intermediate_size, activation)
    total = rows * width * dtype.itemsize
    if not weights_frozen:
        total += num_tokens * hidden_size * dtype.itemsize
    score_bytes = 8 if dtype == torch.float64 else _FP32
    total += rows * (score_bytes + 3 * _INT32) + (num_experts + 1) * _INT32
    if top_k is None or rounding is not None:
        total += (num_tokens + 1) * _INT32
    if top_k is None:  # the pairs of token rounding lie by token
        total += rows * _INT32
    return total


def memory_estimate(
    num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    top_k: int,
    *,
    activation: str | ActivationType = "swiglu",
    dtype: torch.dtype = torch.bfloat16,
    rounding: str | None = None,
    tile: int | str = "auto",
) -> MemoryEstimate:
    """Bytes of one training step through :func:`sonic.experts`, without the allocator's rounding.

    With ``rounding`` and ``tile`` of :func:`sonic.moe`, of its experts on the rounded pairs: their
    buffers have the R rows of :func:`sonic.routing.max_pairs`, of which the kernels touch those
    that hold a pair. What the router keeps is not counted.

    The peaks follow the order in which ``sonic.ops`` allocates and frees: the post-activation and
    the expert outputs live in the forward pass only; the scaled post-activation, and after it the
    rows of ``dx``, in the backward pass. Where ``dh`` has memory of its own, the rows of ``dx`` of
    a large layer are made in slices of columns (:mod:`sonic.runtime.columns`), so that a slice and
    ``dh`` need no more than all of the rows do alone; but not in a backward pass that a CUDA graph
    captures, where ``dh`` comes on top. Not counted: where few tiles make up an expert's weight
    gradient, sums over parts of its rows, at most 140 MB, which are free again before the rows
    of ``dx`` are made.

    Example:
        >>> import sonic
        >>> estimate = sonic.memory_estimate(32768, 4096, 1024, 128, 8)
        >>> f"{estimate.saved / 2**30:.2f} GiB"
        '1.25 GiB'
    """
    op = "memory_estimate"
    rows = _rows(op, num_tokens, top_k, None)
    _check(op, num_tokens, hidden_size, intermediate_size, num_experts, dtype)
    if rounding is not None:
        rows = _rounded_rows(op, num_tokens, num_experts, top_k, rounding, tile)
    width = _preact_width(op, intermediate_size, activation)
    size = dtype.itemsize
    saved = saved_bytes(
        num_tokens,
        hidden_size,
        intermediate_size,
        num_experts,
        top_k,
        activation=activation,
        dtype=dtype,
        rounding=rounding,
        tile=tile,
    )
    tokens_by_hidden = num_tokens * hidden_size * size
    rows_by_hidden = rows * hidden_size * size
    rows_by_intermediate = rows * intermediate_size * size
    kept = saved - tokens_by_hidden  # the input belongs to the caller
    forward = kept + max(rows_by_intermediate + rows_by_hidden, rows_by_hidden + tokens_by_hidden)
    w1 = num_experts * width * hidden_size * size
    w2 = num_experts * hidden_size * intermediate_size * size
    scores = 2 * rows * _FP32
    steps = (rows_by_intermediate, w1 + rows_by_hidden + tokens_by_hidden)
    backward = kept + scores + w2 + max(steps)
    return MemoryEstimate(saved, forward, backward, w1 + w2)


def _preact_width(op: str, intermediate_size: int, activation: str | ActivationType) -> int:
    act = checks.choice(op, "activation", activation, ActivationType)
    return (2 if act.is_gated else 1) * intermediate_size


def _check(
    op: str,
    num_tokens: int,
    hidden_size: int,
    intermediate_size: int,
    num_experts: int,
    dtype: torch.dtype,
) -> None:
    _check_count(op, "num_tokens", num_tokens, 0)
    _check_count(op, "hidden_size", hidden_size, 1)
    _check_count(op, "intermediate_size", intermediate_size, 1)
    checks.check_num_experts(op, "num_experts", num_experts)
    checks.check_dtype_option(op, dtype, optional=False)


def _check_count(op: str, name: str, value: int, low: int) -> None:
    checks.check_int(op, name, value, low, 2**63 - 1, "a count")


def _rows(op: str, num_tokens: int, top_k: int | None, num_slots: int | None) -> int:
    if num_slots is None and top_k is not None:
        _check_count(op, "top_k", top_k, 1)
        _check_count(op, "num_tokens", num_tokens, 0)
        return num_tokens * top_k
    if num_slots is not None and top_k is None:
        _check_count(op, "num_slots", num_slots, 0)
        return num_slots
    raise ArgumentError(
        f"{op}: top_k={top_k} and num_slots={num_slots} came together. Allowed: exactly one of "
        "them. Pass top_k for sonic.experts, num_slots for sonic.experts_flat."
    )


def _check_tile(op: str, tile: int | str) -> None:
    from sonic.routing.token_rounding import resolve_tile

    resolve_tile(op, tile)


def _rounded_rows(
    op: str, num_tokens: int, num_experts: int, top_k: int | None, rounding: str, tile: int | str
) -> int:
    from sonic.routing.token_rounding import RULES, most_pairs, resolve_tile

    if rounding not in RULES or top_k is None:
        raise ArgumentError(
            f"{op}: rounding={rounding!r} came with top_k={top_k}. Allowed: one of "
            f"{', '.join(map(repr, RULES))}, with top_k. Pass both, or leave rounding out."
        )
    checks.check_top_k(op, top_k, num_experts)
    return most_pairs(num_tokens, num_experts, top_k, resolve_tile(op, tile), rounding)
