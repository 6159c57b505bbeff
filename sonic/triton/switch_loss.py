"""The Switch loss of given choices: two launches, and one for the logits' gradient.

With p a token's softmax and c the counts, the loss is a sum over tokens of ``<p, c>``, so that no
sum by expert is needed. T tokens, E experts.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from sonic.triton.common import cdiv, check_float, check_shape, device_of, power_of_2, row_major
from sonic.triton.launch import Launcher, wait_for_earlier_launches

_ELEMENTS = 2048  # of a block of logits
_MOST_ROWS = 64
_PARTS = 1024  # sums of programs that are added at once


@triton.jit
def _load_block(logits, load, token, is_token, expert, num_experts, stride):
    """fp32 logits (ROWS, BLOCK), -inf outside, and counts (1, BLOCK)."""
    is_expert = expert < num_experts
    address = logits + token.to(tl.int64)[:, None] * stride + expert[None, :]
    inside = is_token[:, None] & is_expert[None, :]
    value = tl.load(address, mask=inside, other=float("-inf")).to(tl.float32)
    count = tl.load(load + expert, mask=is_expert, other=0).to(tl.float32)
    return value, count[None, :]


@triton.jit(do_not_specialize=["num_tokens"])
def _switch_rows_kernel(
    logits,
    load,
    lse_by_token,
    mean_by_token,
    partial,
    num_tokens,
    num_experts,
    stride,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """By token the logsumexp and <p, c>, by program the sum of the latter."""
    wait_for_earlier_launches()
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_token = token < num_tokens
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    product = tl.zeros([ROWS], tl.float32)
    shift = tl.zeros([ROWS], tl.float32)
    for start in range(0, num_experts, BLOCK):
        expert = start + tl.arange(0, BLOCK)
        value, count = _load_block(logits, load, token, is_token, expert, num_experts, stride)
        higher = tl.maximum(top, tl.max(value, axis=1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        earlier = tl.exp(top - shift)
        term = tl.exp(value - shift[:, None])
        total = total * earlier + tl.sum(term, axis=1)
        product = product * earlier + tl.sum(term * count, axis=1)
        top = higher
    lse = shift + tl.log(total)
    mean = tl.where(is_token, product / tl.where(total == 0.0, 1.0, total), 0.0)
    tl.store(lse_by_token + token, lse, mask=is_token)
    tl.store(mean_by_token + token, mean, mask=is_token)
    one = tl.arange(0, 1)
    tl.store(partial + tl.program_id(0) + one, tl.sum(mean, axis=0))


@triton.jit(do_not_specialize=["num_parts"])
def _switch_sum_kernel(partial, loss, num_parts, scale, PARTS: tl.constexpr):
    """One program: the sum of the parts times ``scale``."""
    wait_for_earlier_launches()
    total = tl.zeros([PARTS], tl.float32)
    for start in range(0, num_parts, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.load(partial + part, mask=part < num_parts, other=0.0)
    tl.store(loss + tl.arange(0, 1), tl.sum(total, axis=0) * scale)


@triton.jit(do_not_specialize=["num_tokens"])
def _switch_grad_kernel(
    logits,
    load,
    lse_by_token,
    mean_by_token,
    dloss,
    dlogits,
    num_tokens,
    num_experts,
    stride,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``scale dloss p (c - <p, c>)``; a program for each block of each so many tokens."""
    wait_for_earlier_launches()
    blocks = tl.cdiv(num_experts, BLOCK)
    token = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    expert = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    is_token = token < num_tokens
    lse = tl.load(lse_by_token + token, mask=is_token, other=0.0)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    mean = tl.load(mean_by_token + token, mask=is_token, other=0.0)
    factor = tl.load(dloss) * scale
    value, count = _load_block(logits, load, token, is_token, expert, num_experts, stride)
    result = tl.exp(value - lse[:, None]) * (count - mean[:, None]) * factor
    offset = token.to(tl.int64)[:, None] * num_experts + expert[None, :]
    inside = is_token[:, None] & (expert < num_experts)[None, :]
    tl.store(dlogits + offset, result.to(dlogits.dtype.element_ty), mask=inside)


# --- launchers ------------------------------------------------------------------------------------


_switch_rows = Launcher(_switch_rows_kernel, overlapping=True)
_switch_sum = Launcher(_switch_sum_kernel, overlapping=True)
_switch_grad = Launcher(_switch_grad_kernel, overlapping=True)


def _block(num_experts: int) -> tuple[int, int]:
    """Tokens and experts of a block."""
    block = min(power_of_2(num_experts), _ELEMENTS)
    return min(_MOST_ROWS, _ELEMENTS // block), block


def switch_loss(
    logits: torch.Tensor, load: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``scale`` times the sum over tokens of ``<softmax(logits), load>``, fp32.

    Args:
        logits: (T, E) bf16, fp16 or fp32, T at least 1. load: (E,) int32.

    Returns:
        The loss (), and what :func:`switch_loss_grad` needs: ``lse (T,)`` and ``mean (T,)``, the
        tokens' terms.
    """
    check_float("switch_loss", logits=logits)
    num_tokens, num_experts = logits.shape
    check_shape("switch_loss", "load", load, (num_experts,))
    logits = row_major(logits)
    rows, block = _block(num_experts)
    programs = cdiv(num_tokens, rows)
    options: dict[str, Any] = {"dtype": torch.float32, "device": logits.device}
    lse, mean = (torch.empty(num_tokens, **options) for _ in range(2))
    partial, loss = torch.empty(programs, **options), torch.empty((), **options)
    with device_of(logits):
        _switch_rows(
            programs,
            logits,
            load,
            lse,
            mean,
            partial,
            num_tokens,
            num_experts,
            logits.stride(0),
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
        )
        _switch_sum(1, partial, loss, programs, scale, PARTS=_PARTS, num_warps=4)
    return loss, lse, mean


def switch_loss_grad(
    dloss: torch.Tensor,
    logits: torch.Tensor,
    load: torch.Tensor,
    lse: torch.Tensor,
    mean: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """(T, E) gradient of the logits of :func:`switch_loss`, rounded once; ``dloss`` is () fp32."""
    logits = row_major(logits)
    num_tokens, num_experts = logits.shape
    dlogits = torch.empty(num_tokens, num_experts, dtype=logits.dtype, device=logits.device)
    rows, block = _block(num_experts)
    with device_of(logits):
        _switch_grad(
            cdiv(num_tokens, rows) * cdiv(num_experts, block),
            logits,
            load,
            lse,
            mean,
            dloss,
            dlogits,
            num_tokens,
            num_experts,
            logits.stride(0),
            scale,
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
        )
    return dlogits
