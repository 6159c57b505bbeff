"""Routing plan: the stable counting sort of slots by expert.

With ``e[s]`` the expert of slot ``s`` (a slot is dropped if its expert or its token is out of
range)::

    offset[x]   = #{s : e[s] < x}                                   x = 0 .. E
    row_by_slot[s] = offset[e[s]] + #{r < s : e[r] == e[s]}         the inverse gives slot_by_row
    and token_by_row

Three ways to the same integers; all are stable and none uses an atomic:

direct   S <= 4096: one launch, every program counts against all keys.
tiled    rank within a tile of slots -> scan over the tiles of an expert -> scan over experts ->
scatter. sorted   where the (E, tiles) counters would be too big: ``torch.sort`` (see
:mod:`sonic.plan`).
"""

import functools

import torch
import triton
import triton.language as tl

from sonic.triton.common import cdiv, is_interpreted, power_of_2
from sonic.triton.launch import Fixed, Launcher, let_next_launch_start, wait_for_earlier_launches

RUNS_ON_CPU = is_interpreted()

# A key above every expert id, so that a dropped slot precedes nobody.
DROPPED = tl.constexpr(2**31 - 1)

# With E <= 2^16 an expert and a slot share an int32.
SLOT_BITS = tl.constexpr(12)

_DIRECT_BLOCK = 32
_DIRECT_MAX_SLOTS = 2**12
_DIRECT_MAX_PAIRS = 2**25
_COUNTER_BYTES_PER_TILE_SLOT = 2**17
_TILES = (64, 128, 256, 512)


@triton.jit
def _load_expert(
    expert_ids, token_ids, slot, num_slots, num_experts, num_tokens, TOP_K: tl.constexpr
):
    expert = tl.load(expert_ids + slot, mask=slot < num_slots, other=-1)
    live = (expert >= 0) & (expert < num_experts)
    if TOP_K == 0:
        token = tl.load(token_ids + slot, mask=slot < num_slots, other=-1)
        live = live & (token >= 0) & (token < num_tokens)
    return tl.where(live, expert.to(tl.int32), DROPPED)


@triton.jit
def _token_of_slot(token_ids, slot, mask, TOP_K: tl.constexpr):
    if TOP_K == 0:
        return tl.load(token_ids + slot, mask=mask, other=-1).to(tl.int32)
    else:
        return slot.to(tl.int32) // TOP_K


@triton.jit
def _load_key(expert_ids, token_ids, slot, limit, num_experts, num_tokens, TOP_K: tl.constexpr):
    """(expert, slot) as one integer that sorts alike; DROPPED from slot ``limit`` on."""
    expert = _load_expert(expert_ids, token_ids, slot, limit, num_experts, num_tokens, TOP_K)
    return tl.where(expert == DROPPED, DROPPED, (expert << SLOT_BITS) | slot)


@triton.jit(do_not_specialize=["num_slots", "num_tokens", "slot_programs"])
def _direct_kernel(
    expert_ids,
    token_ids,
    offset_by_expert,
    token_by_row,
    slot_by_row,
    row_by_slot,
    num_slots,
    num_experts,
    num_tokens,
    slot_programs,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """The first ``slot_programs`` programs place a block of slots each, the others find a block of
    offsets each: either is a count of the keys below a bound."""
    wait_for_earlier_launches()
    is_slots = tl.program_id(0) < slot_programs
    block = tl.where(is_slots, tl.program_id(0), tl.program_id(0) - slot_programs)
    index = block * BLOCK + tl.arange(0, BLOCK)
    slot_limit = tl.where(is_slots, num_slots, 0)
    key = _load_key(expert_ids, token_ids, index, slot_limit, num_experts, num_tokens, TOP_K)
    bound = tl.where(is_slots, key, index << SLOT_BITS)
    below = tl.zeros([BLOCK_KEYS, BLOCK], tl.int32)
    live_keys = tl.zeros([BLOCK_KEYS], tl.int32)
    for start in range(0, num_slots, BLOCK_KEYS):
        other = start + tl.arange(0, BLOCK_KEYS)
        keys = _load_key(expert_ids, token_ids, other, num_slots, num_experts, num_tokens, TOP_K)
        below += (keys[:, None] < bound[None, :]).to(tl.int32)
        live_keys += (keys != DROPPED).to(tl.int32)
    count = tl.sum(below, axis=0)
    live = key != DROPPED
    tl.store(row_by_slot + index, tl.where(live, count, -1), mask=index < slot_limit)
    token = _token_of_slot(token_ids, index, live, TOP_K)
    tl.store(slot_by_row + count, index, mask=live)
    tl.store(token_by_row + count, token, mask=live)
    # The same indices read as rows: those past the last live row have no slot.
    tail = (index >= tl.sum(live_keys, axis=0)) & (index < slot_limit)
    tl.store(slot_by_row + index, -1, mask=tail)
    tl.store(token_by_row + index, -1, mask=tail)
    offset_limit = tl.where(is_slots, 0, num_experts + 1)
    tl.store(offset_by_expert + index, count, mask=index < offset_limit)


@triton.jit(do_not_specialize=["num_slots", "num_tokens"])
def _rank_kernel(
    expert_ids,
    token_ids,
    count,
    row_by_slot,
    num_slots,
    num_experts,
    num_tokens,
    stride,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
):
    """Per tile: rank of a slot among the tile's slots of its expert (-> row_by_slot), and the
    counts (E, tiles)."""
    wait_for_earlier_launches()
    let_next_launch_start()
    tile = tl.program_id(0)
    first = tile.to(tl.int64) * TILE
    local = tl.arange(0, TILE)
    slot = first + local
    expert = _load_expert(expert_ids, token_ids, slot, num_slots, num_experts, num_tokens, TOP_K)
    # Keys run along axis 0, which the default layout keeps inside a thread: both sums need no
    # exchange.
    same = expert[:, None] == expert[None, :]
    rank = tl.sum((same & (local[:, None] < local[None, :])).to(tl.int32), axis=0)
    total = tl.sum(same.to(tl.int32), axis=0)
    live = expert != DROPPED
    tl.store(row_by_slot + slot, tl.where(live, rank, -1), mask=slot < num_slots)
    # The last slot of an expert in this tile writes its count; counters nobody writes were zeroed
    # before.
    tl.store(count + expert.to(tl.int64) * stride + tile, total, mask=live & (rank == total - 1))


@triton.jit
def _scan_tiles_kernel(
    count, total, num_experts, stride, BLOCK_E: tl.constexpr, BLOCK_TILES: tl.constexpr
):
    """In place: count[e, :] becomes its exclusive prefix sum; total[e] its sum."""
    wait_for_earlier_launches()
    let_next_launch_start()
    expert = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    base = count + expert.to(tl.int64)[:, None] * stride
    carry = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, stride, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        mask = (expert[:, None] < num_experts) & (tile[None, :] < stride)
        value = tl.load(base + tile[None, :], mask=mask, other=0)
        tl.store(base + tile[None, :], carry[:, None] + tl.cumsum(value, axis=1) - value, mask=mask)
        carry += tl.sum(value, axis=1)
    tl.store(total + expert, carry, mask=expert < num_experts)


@triton.jit
def _scan_experts_kernel(total, offset_by_expert, num_experts, BLOCK: tl.constexpr):
    wait_for_earlier_launches()
    let_next_launch_start()
    lane = tl.arange(0, BLOCK)
    tl.store(offset_by_expert + lane, 0, mask=lane < 1)
    carry = 0
    for start in range(0, num_experts, BLOCK):
        expert = start + lane
        value = tl.load(total + expert, mask=expert < num_experts, other=0)
        tl.store(
            offset_by_expert + 1 + expert,
            carry + tl.cumsum(value, axis=0),
            mask=expert < num_experts,
        )
        carry += tl.sum(value, axis=0)


@triton.jit(do_not_specialize=["num_slots"])
def _scatter_kernel(
    expert_ids,
    token_ids,
    count,
    offset_by_expert,
    token_by_row,
    slot_by_row,
    row_by_slot,
    num_slots,
    num_experts,
    stride,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """row_by_slot holds ranks within tiles and becomes rows; the inverse maps and their tails are
    written."""
    wait_for_earlier_launches()
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < num_slots
    rank = tl.load(row_by_slot + slot, mask=inside, other=-1)
    live = rank >= 0
    expert = tl.load(expert_ids + slot, mask=live, other=0).to(tl.int64)
    row = rank + tl.load(offset_by_expert + expert, mask=live, other=0)
    row += tl.load(count + expert * stride + slot // TILE, mask=live, other=0)
    tl.store(row_by_slot + slot, row, mask=live)
    token = _token_of_slot(token_ids, slot, live, TOP_K)
    tl.store(slot_by_row + row, slot.to(tl.int32), mask=live)
    tl.store(token_by_row + row, token, mask=live)
    # The same indices read as rows: those past the last live row have no slot.
    tail = inside & (slot >= tl.load(offset_by_expert + num_experts))
    tl.store(slot_by_row + slot, -1, mask=tail)
    tl.store(token_by_row + slot, -1, mask=tail)


_direct = Launcher(_direct_kernel, overlapping=True)
_rank = Launcher(_rank_kernel, overlapping=True)
_scan_tiles = Launcher(_scan_tiles_kernel, overlapping=True)
_scan_experts = Launcher(_scan_experts_kernel, overlapping=True)
_scatter = Launcher(_scatter_kernel, overlapping=True)


def method_for(num_slots: int, num_experts: int) -> str:
    """Which of ``"empty"``, ``"direct"``, ``"tiled"``, ``"sorted"`` serves this size."""
    if num_slots == 0:
        return "empty"
    if (
        num_slots <= _DIRECT_MAX_SLOTS
        and num_slots * (num_slots + num_experts) <= _DIRECT_MAX_PAIRS
    ):
        return "direct"
    return "tiled" if _tile_for(num_slots, num_experts) else "sorted"


def _count_stride(num_slots: int, tile: int) -> int:
    """Tiles, rounded up so that every expert's counters start at a vector."""
    return cdiv(cdiv(num_slots, tile), 16) * 16


def _tile_for(num_slots: int, num_experts: int) -> int:
    """The smallest tile whose counters stay small, 0 if none.

    Work per slot grows with the tile, the counters shrink: 8 MiB are granted to a tile of 64 slots,
    64 MiB to one of 512.
    """
    for tile in _TILES:
        if 4 * num_experts * _count_stride(num_slots, tile) <= tile * _COUNTER_BYTES_PER_TILE_SLOT:
            return tile
    return 0


def sort_slots_by_expert(
    expert_ids: torch.Tensor,
    token_ids: torch.Tensor | None,
    num_experts: int,
    num_tokens: int,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stable counting sort of the flat slots by expert; ``method_for`` must not say ``"sorted"``.

    Args:
        expert_ids: S of int32 or int64, contiguous, in any shape.
        token_ids: (S,) int32 or int64, contiguous, or None: slot ``s`` belongs to token ``s //
            top_k``.

    Returns:
        ``offset_by_expert (E+1,)``, ``token_by_row (S,)``, ``slot_by_row (S,)``, ``row_by_slot
        (S,)``, all int32.
    """
    num_slots = expert_ids.numel()
    empty = functools.partial(torch.empty, dtype=torch.int32, device=expert_ids.device)
    offset_by_expert = empty(num_experts + 1)
    outputs = offset_by_expert, empty(num_slots), empty(num_slots), empty(num_slots)
    direct = _direct_launch(num_slots, num_experts, num_tokens, top_k)
    if direct is not None:
        direct(expert_ids, token_ids, *outputs)
    elif num_slots == 0:
        offset_by_expert.zero_()
    else:
        tile, stride, rank, scan_tiles, scan_experts = _tiled_launches(
            num_slots, num_experts, num_tokens, top_k
        )
        count = empty((num_experts, stride)).zero_()
        total = empty(num_experts)
        rank(expert_ids, token_ids, count, outputs[3])
        scan_tiles(count, total)
        scan_experts(total, offset_by_expert)
        place_slots(expert_ids, count, outputs, tile=tile, top_k=top_k, token_ids=token_ids)
    return outputs


@functools.lru_cache(maxsize=4096)
def _direct_launch(num_slots: int, num_experts: int, num_tokens: int, top_k: int) -> Fixed | None:
    """None where the method is another one."""
    if method_for(num_slots, num_experts) != "direct":
        return None
    slot_programs = cdiv(num_slots, _DIRECT_BLOCK)
    kernel = _direct.bind(TOP_K=top_k, BLOCK=_DIRECT_BLOCK, BLOCK_KEYS=256, num_warps=4)
    programs = slot_programs + cdiv(num_experts + 1, _DIRECT_BLOCK)
    return kernel.fix(programs, num_slots, num_experts, num_tokens, slot_programs)


@functools.lru_cache(maxsize=4096)
def _tiled_launches(
    num_slots: int, num_experts: int, num_tokens: int, top_k: int
) -> tuple[int, int, Fixed, Fixed, Fixed]:
    """Slots of a tile, counters of an expert, and all launches but the last one."""
    tile = _tile_for(num_slots, num_experts)
    stride = _count_stride(num_slots, tile)
    rank = _rank.bind(TOP_K=top_k, TILE=tile, num_warps=tile // 32)
    # Few choices: every one is a kernel to compile while the number of tokens varies.
    block_tiles = 64 if stride <= 64 else 512 if stride <= 512 else 4096
    block_e = max(1, 1024 // block_tiles)
    num_warps = 4 if block_tiles <= 1024 else 8
    scan_tiles = _scan_tiles.bind(BLOCK_E=block_e, BLOCK_TILES=block_tiles, num_warps=num_warps)
    block = min(power_of_2(num_experts), 8192)
    scan_experts = _scan_experts.bind(BLOCK=block, num_warps=8 if block > 1024 else 4)
    return (
        tile,
        stride,
        rank.fix(cdiv(num_slots, tile), num_slots, num_experts, num_tokens, stride),
        scan_tiles.fix(cdiv(num_experts, block_e), num_experts, stride),
        scan_experts.fix(1, num_experts),
    )


@functools.lru_cache(maxsize=4096)
def _scatter_launch(num_slots: int, num_experts: int, stride: int, top_k: int, tile: int) -> Fixed:
    block = 512
    kernel = _scatter.bind(TOP_K=top_k, TILE=tile, BLOCK=block, num_warps=4)
    return kernel.fix(cdiv(num_slots, block), num_slots, num_experts, stride)


def place_slots(
    expert_ids: torch.Tensor,
    prefix: torch.Tensor,
    plan: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    tile: int,
    top_k: int,
    token_ids: torch.Tensor | None = None,
) -> None:
    """Last step of the tiled sort: from ranks within tiles to rows and their inverse.

    Args:
        expert_ids: (S,) contiguous, S at least 1.
        prefix: (E, stride) int32, slots of an expert in earlier tiles; ``stride`` at least S /
            tile.
        plan: ``offset_by_expert (E+1,)``, read; ``token_by_row``, ``slot_by_row`` (S,), written;
            ``row_by_slot`` (S,), holding the rank of a slot among its tile's slots of its expert,
            -1 for a dropped one, and overwritten with rows.
        tile: slots per tile.
    """
    sizes = expert_ids.numel(), plan[0].shape[0] - 1, prefix.shape[1]
    _scatter_launch(*sizes, top_k, tile)(expert_ids, token_ids, prefix, *plan)
