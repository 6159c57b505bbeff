"""RoutingPlan: the integer tensors that say which token goes where.

Symbols: T tokens, E experts, S slots. A slot is one (token, expert) pair: entry ``t * top_k + j``
of the flattened ``topk_ids``, or a position of the caller's flat lists in general routing. R rows,
one per slot, are the slots grouped by expert; R = S is a bound known on the host, and how many rows
are live is known on the device only.

Source: the grouped, gather-based formulation of SonicMoE (arXiv 2512.14080).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sonic import checks
from sonic.runtime.eager import needs_dispatcher
from sonic.runtime.errors import (
    ArgumentError,
    DeviceError,
    MissingPackageError,
    ShapeError,
)
from sonic.runtime.limits import MAX_EXPERTS, MAX_SLOTS, message

_IMPLS = ("auto", "triton", "torch")
_Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """Where every slot goes. All tensors are contiguous int32 on one device.

    A plan equals itself only, since comparing tensors would wait for the device.

    Attributes:
        offset_by_expert: (E+1,) expert ``e`` owns rows ``offset[e]`` up to ``offset[e+1]``; starts
            at zero, never decreases, ends with the number of live rows (<= R). Rows of an expert
            ascend by slot.
        token_by_row: (R,) row -> token; -1 for rows past the last live one.
        slot_by_row: (R,) row -> slot; -1 for rows past the last live one.
        row_by_slot: (R,) slot -> row; -1 for a dropped slot.
        offset_by_token: (T+1,) general routing only: token ``t`` owns positions ``offset[t]`` up to
            ``offset[t+1]`` of ``slot_by_position``. None for fixed top-k, where it owns slots
            ``t * top_k`` to ``(t + 1) * top_k``.
        slot_by_position: (R,) general routing only: slots in ascending order of (token, slot),
            those of an expert out of range included; -1 behind the last slot whose token is in
            range. None there too where every position is its slot: slots lie by token.
        top_k: experts per token, 0 in general routing.
        num_tokens: T.
    """

    offset_by_expert: torch.Tensor
    token_by_row: torch.Tensor
    slot_by_row: torch.Tensor
    row_by_slot: torch.Tensor
    offset_by_token: torch.Tensor | None
    slot_by_position: torch.Tensor | None
    top_k: int
    num_tokens: int

    @property
    def num_experts(self) -> int:
        return self.offset_by_expert.shape[0] - 1

    @property
    def num_rows(self) -> int:
        """R, the static bound on live rows."""
        return self.token_by_row.shape[0]

    def expert_frequency(self) -> torch.Tensor:
        """(E,) int32: live rows of each expert."""
        return self.offset_by_expert.diff()


def build_plan(topk_ids: torch.Tensor, num_experts: int, impl: str = "auto") -> RoutingPlan:
    """Plan of fixed top-k routing.

    Args:
        topk_ids: (T, top_k) int32 or int64, expert of each slot, any strides. Ids below 0 or at
            least ``num_experts`` drop their slot. A token may name an expert more than once.
        num_experts: E, 1 to 65,536.
        impl: ``"triton"`` (CUDA tensors), ``"torch"`` (any device) or ``"auto"`` (triton on CUDA,
            else torch). The integers are the same. One of the methods of ``"triton"`` is no kernel
            of its own: where there are so many experts that its counters would not stay small, the
            slots are ordered by ``torch.sort``, as with ``"torch"``, on the GPU.

    Returns:
        A :class:`RoutingPlan`. Nothing waits for the device, and memory depends on shapes only.

    Raises:
        ShapeError: ``topk_ids`` is not a matrix, ``top_k`` is 0, or there are more than 2^31 - 1
            slots.
        DTypeError: ids are not int32 or int64.
        ArgumentError: ``num_experts`` or ``impl`` out of range.
        DeviceError: ``impl="triton"`` with tensors that are not on a GPU.
        MissingPackageError: the Triton plan is asked for and triton is not installed.
    """
    checks.check_is_tensor("build_plan", "topk_ids", topk_ids)
    if topk_ids.dim() != 2 or topk_ids.shape[1] < 1:
        raise ShapeError(
            message(
                "build_plan",
                f"topk_ids has shape {tuple(topk_ids.shape)}",
                "(T, top_k) with top_k of at least 1",
                "Pass one row of expert ids per token, or use build_plan_flat for a list of pairs.",
            )
        )
    _check("build_plan", num_experts, impl, topk_ids=topk_ids)
    return plan_of_topk(topk_ids, num_experts, impl)


def int32_ids(ids: torch.Tensor) -> torch.Tensor:
    """``ids`` as int32. One beyond int32 becomes its end, and stays out of every range: a cast
    alone would wrap it to an expert."""
    if ids.dtype == torch.int32:
        return ids
    return ids.clamp(-(2**31), 2**31 - 1).to(torch.int32)


def plan_of_topk(topk_ids: torch.Tensor, num_experts: int, impl: str) -> RoutingPlan:
    """:func:`build_plan` of arguments that have been checked."""
    inputs = (topk_ids, num_experts, impl)
    run = torch.ops.sonic.build_plan if needs_dispatcher(inputs) else rows_of_topk
    offset_by_expert, token_by_row, slot_by_row, row_by_slot = run(*inputs)
    num_tokens, top_k = topk_ids.shape
    return RoutingPlan(
        offset_by_expert, token_by_row, slot_by_row, row_by_slot, None, None, top_k, num_tokens
    )


def build_plan_flat(
    token_ids: torch.Tensor,
    expert_ids: torch.Tensor,
    num_tokens: int,
    num_experts: int,
    impl: str = "auto",
) -> RoutingPlan:
    """Plan of general routing: any number of experts per token, pairs in any order.

    Args:
        token_ids: (S,) int32 or int64. Ids below 0 or at least ``num_tokens`` drop their slot.
        expert_ids: (S,) int32 or int64, same device. Ids below 0 or at least ``num_experts`` drop
            their slot.
        num_tokens: T, 0 to 2^31 - 2. Tokens without a slot are allowed.
        num_experts: E, 1 to 65,536.
        impl: as in :func:`build_plan`.

    Returns:
        A :class:`RoutingPlan` with ``offset_by_token`` and ``slot_by_position``.

    Raises:
        As :func:`build_plan`.
    """
    op = "build_plan_flat"
    for name, ids in (("token_ids", token_ids), ("expert_ids", expert_ids)):
        checks.check_is_tensor("build_plan_flat", name, ids)
    if token_ids.dim() != 1 or token_ids.shape != expert_ids.shape:
        raise ShapeError(
            message(
                op,
                f"token_ids has shape {tuple(token_ids.shape)} and expert_ids "
                f"{tuple(expert_ids.shape)}",
                "one shape (S,) for both, entry i saying that a token visits an expert",
                "Build both lists from the same pairs, and flatten them.",
            )
        )
    if token_ids.device != expert_ids.device:
        raise DeviceError(
            message(
                op,
                f"token_ids is on {token_ids.device} and expert_ids on {expert_ids.device}",
                "one device for both",
                f"Move expert_ids to {token_ids.device}.",
            )
        )
    checks.check_is_int(op, "num_tokens", num_tokens, 0, MAX_SLOTS - 1)
    if not 0 <= num_tokens <= MAX_SLOTS - 1:
        raise ArgumentError(
            message(
                op,
                f"num_tokens={num_tokens} is out of range",
                f"0 to {MAX_SLOTS - 1}, since token ids are int32",
                "Pass the number of rows of hidden_states, or split the tokens.",
            )
        )
    _check(op, num_experts, impl, token_ids=token_ids, expert_ids=expert_ids)
    inputs = (token_ids, expert_ids, num_tokens, num_experts, impl)
    run = torch.ops.sonic.build_plan_flat if needs_dispatcher(inputs) else _build_plan_flat
    offset_by_expert, token_by_row, slot_by_row, row_by_slot, offset_by_token, slot_by_position = (
        run(*inputs)
    )
    return RoutingPlan(
        offset_by_expert,
        token_by_row,
        slot_by_row,
        row_by_slot,
        offset_by_token,
        slot_by_position,
        top_k=0,
        num_tokens=num_tokens,
    )


def _check(op: str, num_experts: int, impl: str, **ids: torch.Tensor) -> None:
    for name, tensor in ids.items():
        checks.check_ids(op, name, tensor)
        if tensor.numel() > MAX_SLOTS:
            raise ShapeError(
                message(
                    op,
                    f"{name} has {tensor.numel()} slots",
                    f"at most {MAX_SLOTS}, since row indices are int32",
                    "Split the tokens over several plans.",
                )
            )
    checks.check_is_int(op, "num_experts", num_experts, 1, MAX_EXPERTS)
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ArgumentError(
            message(
                op,
                f"num_experts={num_experts} is out of range",
                f"1 to {MAX_EXPERTS}",
                "Pass the number of experts of the layer.",
            )
        )
    checks.check_known(op, "impl", impl, _IMPLS, checks.LET_THE_DEVICE_DECIDE)
    device = next(iter(ids.values())).device
    if (
        impl == "triton"
        and device.type == "cpu"
        and not _load_triton_plan(impl, device).RUNS_ON_CPU
    ):
        raise DeviceError(
            message(
                op,
                f"impl={impl!r} was asked for tensors on {device}",
                "CUDA tensors",
                'Move them to a CUDA device, or pass impl="torch" or "auto".',
            )
        )


def _plan_torch(
    expert_ids: torch.Tensor,
    token_ids: torch.Tensor | None,
    num_experts: int,
    num_tokens: int,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The four row tensors by a stable sort of the S expert ids; no host synchronisation."""
    expert_ids, device = expert_ids.reshape(-1), expert_ids.device
    live = (expert_ids >= 0) & (expert_ids < num_experts)
    if token_ids is not None:
        live &= (token_ids >= 0) & (token_ids < num_tokens)
    key = torch.where(live, expert_ids, num_experts).to(torch.int32)
    key, slot_by_row = torch.sort(key, stable=True)
    experts = torch.arange(num_experts + 1, dtype=torch.int32, device=device)
    offset_by_expert = torch.searchsorted(key, experts, out_int32=True)
    row = torch.arange(expert_ids.numel(), dtype=torch.int32, device=device)
    live = row < offset_by_expert[-1]
    row_by_slot = torch.empty_like(row).scatter_(0, slot_by_row, torch.where(live, row, -1))
    token = slot_by_row // top_k if token_ids is None else token_ids[slot_by_row]
    token_by_row = torch.where(live, token, -1).to(torch.int32)
    slot_by_row = torch.where(live, slot_by_row, -1).to(torch.int32)
    return offset_by_expert, token_by_row, slot_by_row, row_by_slot


def _plan_rows(
    expert_ids: torch.Tensor,
    token_ids: torch.Tensor | None,
    num_experts: int,
    num_tokens: int,
    top_k: int,
    impl: str,
) -> _Rows:
    how = _sort(impl, expert_ids.device, expert_ids.numel(), num_experts)
    return how(expert_ids, token_ids, num_experts, num_tokens, top_k)


# Routing changes the number of slots from call to call.
@functools.lru_cache(maxsize=4096)
def _sort(
    impl: str, device: torch.device, num_slots: int, num_experts: int
) -> Callable[..., _Rows]:
    """What makes the four row tensors of so many slots."""
    if impl == "torch" or (impl == "auto" and device.type != "cuda"):
        return _plan_torch
    triton_plan = _load_triton_plan(impl, device)
    if triton_plan.method_for(num_slots, num_experts) == "sorted":
        return _plan_torch
    sort: Callable[..., _Rows] = triton_plan.sort_slots_by_expert
    return sort


@functools.cache
def _load_triton_plan(impl: str, device: torch.device) -> Any:
    try:
        from sonic.triton import plan as triton_plan
    except ImportError as error:
        raise MissingPackageError(
            message(
                "build_plan",
                f"impl={impl!r} on {device} needs triton, which cannot be imported ({error})",
                'impl="torch" without triton',
                'Install or repair triton, or pass impl="torch".',
            )
        ) from error
    return triton_plan


def _group_by_token(token_ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``offset_by_token (T+1,)`` and ``slot_by_position (S,)`` of the flat (S,) token ids."""
    live = (token_ids >= 0) & (token_ids < num_tokens)
    key = torch.where(live, token_ids, num_tokens).to(torch.int32)
    key, slot = torch.sort(key, stable=True)
    tokens = torch.arange(num_tokens + 1, dtype=torch.int32, device=key.device)
    offset_by_token = torch.searchsorted(key, tokens, out_int32=True)
    return offset_by_token, torch.where(key < num_tokens, slot, -1).to(torch.int32)


def rows_of_topk(topk_ids: torch.Tensor, num_experts: int, impl: str) -> tuple[torch.Tensor, ...]:
    """The first four fields of :func:`plan_of_topk`, of plain tensors at which nobody looks."""
    num_tokens, top_k = topk_ids.shape
    return _plan_rows(topk_ids.contiguous(), None, num_experts, num_tokens, top_k, impl)


def _build_plan_flat(
    token_ids: torch.Tensor, expert_ids: torch.Tensor, num_tokens: int, num_experts: int, impl: str
) -> tuple[torch.Tensor, ...]:
    token_ids, expert_ids = token_ids.contiguous(), expert_ids.contiguous()
    rows = _plan_rows(expert_ids, token_ids, num_experts, num_tokens, 0, impl)
    return (*rows, *_group_by_token(token_ids, num_tokens))


def _fake_rows(ids: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, ...]:
    sizes = (num_experts + 1, ids.numel(), ids.numel(), ids.numel())
    return tuple(ids.new_empty(size, dtype=torch.int32) for size in sizes)


def _fake_build_plan(
    topk_ids: torch.Tensor, num_experts: int, impl: str
) -> tuple[torch.Tensor, ...]:
    return _fake_rows(topk_ids, num_experts)


def _fake_build_plan_flat(
    token_ids: torch.Tensor, expert_ids: torch.Tensor, num_tokens: int, num_experts: int, impl: str
) -> tuple[torch.Tensor, ...]:
    sizes = (num_tokens + 1, token_ids.numel())
    by_token = tuple(token_ids.new_empty(size, dtype=torch.int32) for size in sizes)
    return _fake_rows(expert_ids, num_experts) + by_token


# Operators, so that torch.compile sees one node instead of tracing into kernel launches.
_LIBRARY = torch.library.Library("sonic", "FRAGMENT")
_LIBRARY.define(
    "build_plan(Tensor topk_ids, int num_experts, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "build_plan_flat(Tensor token_ids, Tensor expert_ids, SymInt num_tokens, int num_experts,"
    " str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("build_plan", rows_of_topk, "CompositeExplicitAutograd")
_LIBRARY.impl("build_plan_flat", _build_plan_flat, "CompositeExplicitAutograd")
torch.library.register_fake("sonic::build_plan", _fake_build_plan, lib=_LIBRARY)
torch.library.register_fake("sonic::build_plan_flat", _fake_build_plan_flat, lib=_LIBRARY)
