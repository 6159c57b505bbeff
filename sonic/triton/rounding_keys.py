"""Token rounding's keys: how an expert ranks the tokens, as one int32 per token and expert.

T tokens, E experts. A token chooses its ``top_k`` best experts; an expert prefers the tokens that
chose it, then high scores, then low token indices::

    key[e, t] = bits of the score, with the sign bit set if token t did not choose expert e

Keys lie in a table, column by column; or there is none, and four *marks* of each token make any key
of it from the logit. Tables of given scores are written here, those of logits, and marks, where
winners are found (:mod:`sonic.triton.rounding_winners`).
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sonic.enums import ScoreOrder
from sonic.triton.common import cdiv, is_interpreted, power_of_2
from sonic.triton.topk import HIGHEST, LOWEST, _plain_bits, topk_scores

_INTERPRETED = tl.constexpr(is_interpreted())
_LOG2_E = tl.constexpr(math.log2(math.e))

MAX_BLOCK_E = 4096  # experts of a token in one block
_ELEMENTS = 4096  # of a block, or those of one token

GROUP = tl.constexpr(32)  # tokens that have a word; tables and marks are of whole groups


@triton.jit
def _exp(value):
    """Of fp32 numbers; 0 for what is less than 2^-126, which saves three instructions of five."""
    if _INTERPRETED:
        return tl.exp(value)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;",
            "=f,f",
            [value * _LOG2_E],
            dtype=tl.float32,
            # Or Triton 3.9 spills where 16 tokens choose from 256 experts: 255 registers for 120.
            is_pure=False,
            pack=1,
        )


@triton.jit
def _rank_key(value):
    """int32 that orders like the fp32 score, negative scores as zero, any NaN highest."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value != value, HIGHEST, tl.where(value > 0.0, bits, 0))


@triton.jit
def _score_of(key):
    return (key & HIGHEST).to(tl.float32, bitcast=True)


@triton.jit
def _chosen(key, expert, TOP_K: tl.constexpr):
    """Whether a column holds one of its row's TOP_K largest keys, the first of equal ones first;
    keys are at least 0 in TOP_K columns or more, and -1 in those that do not count."""
    for _ in range(TOP_K):
        top = tl.max(key, axis=1)
        winner = tl.min(tl.where(key == top[:, None], expert[None, :], HIGHEST), axis=1)
        key = tl.where(expert[None, :] == winner[:, None], -1, key)
    return key < 0


@triton.jit
def _key_of(score, won, if_won):
    """Of a score that is at least 0 or no number, which then all of its token's scores are."""
    return (score.to(tl.int32, bitcast=True) & HIGHEST) | tl.where(won, if_won, LOWEST)


@triton.jit
def _marks_of(top, inverse, last, is_token, BITS: tl.constexpr):
    """What makes keys of a token's logits: its greatest one, the scores' factor, and of the last
    winner, packed, what turns the bits of those with its sign into its order, and a bound of the
    first expert's. Where there is no token scores are 0 and no expert is chosen."""
    turn = tl.where(last < 0, HIGHEST, 0)
    bound = tl.where(is_token, last - ((1 << BITS) - 1), 1 << 30)
    return top, tl.where(is_token, inverse, 0.0), turn, bound


@triton.jit
def _key_of_logit(value, expert, marks, BITS: tl.constexpr):
    """Keys of fp32 logits whose low BITS carry nothing."""
    top, inverse, turn, bound = marks
    # Logits of the other sign than the last winner's are in their places too.
    order = (_plain_bits(value) ^ turn) & (-1 << BITS)
    won = order >= bound + expert
    return _key_of(_exp(value - top) * inverse, won, 0)


@triton.jit
def _offset_of_four(index):
    """Of the numbers (BLOCK, 4) of the marks, or of the summaries, with these indices."""
    return 4 * index[:, None] + tl.arange(0, 4)[None, :]


@triton.jit
def _store_marks(marks, token, mask, values, ROWS: tl.constexpr):
    top, inverse, turn, bound = values
    top, inverse = top.to(tl.int32, bitcast=True), inverse.to(tl.int32, bitcast=True)
    # What is joined first lies farther apart: top, inverse, turn, bound.
    words = tl.reshape(tl.join(tl.join(top, turn), tl.join(inverse, bound)), [ROWS, 4])
    tl.store(marks + _offset_of_four(token.to(tl.int64)), words, mask=mask[:, None])


@triton.jit
def _load_marks(marks, token, mask):
    """Of a block of tokens; two of the four numbers at once, so that a thread needs no other."""
    pair = (marks + 4 * token.to(tl.int64)).to(tl.pointer_type(tl.int64), bitcast=True)
    scale = tl.load(pair, mask=mask, other=0)
    order = tl.load(pair + 1, mask=mask, other=0)
    top = scale.to(tl.int32).to(tl.float32, bitcast=True)
    inverse = (scale >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return top, inverse, order.to(tl.int32), (order >> 32).to(tl.int32)


@triton.jit
def _marks_of_one(address):
    """The four of one token, each a number that every thread has."""
    even, odd = tl.split(tl.reshape(tl.load(address + tl.arange(0, 4)), [2, 2]))
    top, turn = tl.split(even)
    inverse, bound = tl.split(odd)
    return top.to(tl.float32, bitcast=True), inverse.to(tl.float32, bitcast=True), turn, bound


@triton.jit
def _load_keys(keys, logits, marks, token, expert, mask, stride, key_stride, BITS: tl.constexpr):
    """Keys of tokens and experts: from their table (E, key_stride), or where there is none from
    logits (T, E) and the tokens' marks. LOWEST where masked."""
    if marks is None:
        address = keys + expert.to(tl.int64) * key_stride + token
        return tl.load(address, mask=mask, other=LOWEST)
    else:
        address = logits + token.to(tl.int64) * stride + expert
        value = tl.load(address, mask=mask, other=0.0).to(tl.float32)
        of_token = _load_marks(marks, token, mask)
        key = _key_of_logit(value, expert, of_token, BITS)
        return tl.where(mask, key, LOWEST)


@triton.jit
def _store_columns(keys, key, token, expert, num_experts, key_stride):
    """keys (E, key_stride) from a block (ROWS, experts)."""
    offset = expert.to(tl.int64)[:, None] * key_stride + token[None, :]
    mask = (expert[:, None] < num_experts) & (token[None, :] < key_stride)
    tl.store(keys + offset, tl.trans(key), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _keys_kernel(
    scores,
    ids,
    keys,
    num_tokens,
    num_experts,
    stride,
    key_stride,
    TOP_K: tl.constexpr,
    HAS_IDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Keys of given scores. Without ids one block holds whole rows and chooses by itself."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    mask = (token[:, None] < num_tokens) & (expert[None, :] < num_experts)
    value = tl.load(
        scores + token.to(tl.int64)[:, None] * stride + expert[None, :], mask=mask, other=0.0
    )
    key = tl.where(mask, _rank_key(value.to(tl.float32)), -1)
    if HAS_IDS:
        chosen = key < -1
        for rank in range(TOP_K):
            slot = token.to(tl.int64) * TOP_K + rank
            winner = tl.load(ids + slot, mask=token < num_tokens, other=-1)
            chosen = chosen | (expert[None, :] == winner[:, None])
    else:
        chosen = _chosen(key, expert, TOP_K)
    key = tl.where(chosen, key, key | LOWEST)
    # The least of keys from T on.
    key = tl.where(token[:, None] < num_tokens, key, LOWEST)
    _store_columns(keys, key, token, expert, num_experts, key_stride)


# --- launchers ------------------------------------------------------------------------------------


def _key_stride(num_tokens: int) -> int:
    # Whole groups, so that keys move in whole vectors, and no mask is needed.
    return cdiv(num_tokens, GROUP.value) * GROUP.value


class Keys(NamedTuple):
    """Keys, as a ``table (E, stride)`` int32 with ``stride`` at least T; or ``logits (T, E)``, of
    which so many low ``bits`` carry nothing once they are fp32, and ``marks (stride, 4)`` int32
    that make keys of them. ``summaries (E, groups, 4)`` int32 and their ``words (groups, E)``,
    which become those of the decisions, are there without a table, and may be with one."""

    table: torch.Tensor | None
    logits: torch.Tensor | None = None
    marks: torch.Tensor | None = None
    summaries: torch.Tensor | None = None
    words: torch.Tensor | None = None
    bits: int = 0

    @property
    def device(self) -> torch.device:
        return self._table_or_marks.device

    @property
    def stride(self) -> int:
        """Tokens of the table or of the marks, whole groups of them."""
        return self._table_or_marks.shape[0 if self.table is None else 1]

    @property
    def _table_or_marks(self) -> torch.Tensor:
        found = self.marks if self.table is None else self.table
        assert found is not None
        return found


def keys_of_scores(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """``keys (E, stride)`` of (T, E) scores, rows dense, T at least 1."""
    num_tokens, num_experts = scores.shape
    stride = _key_stride(num_tokens)
    keys = torch.empty(num_experts, stride, dtype=torch.int32, device=scores.device)
    block_e = power_of_2(num_experts)
    ids = None
    if block_e > MAX_BLOCK_E:
        _, ids = topk_scores(scores.clamp(min=0), top_k, ScoreOrder.SOFTMAX_OVER_TOPK)
        block_e = 128
    rows = min(64, max(1, _ELEMENTS // block_e))
    _keys_kernel[(cdiv(stride, rows), cdiv(num_experts, block_e))](
        scores,
        ids,
        keys,
        num_tokens,
        num_experts,
        scores.stride(0),
        stride,
        TOP_K=top_k,
        HAS_IDS=ids is not None,
        ROWS=rows,
        BLOCK_E=block_e,
        num_warps=4,
    )
    return keys
