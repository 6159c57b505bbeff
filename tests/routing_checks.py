"""Checks of the Triton routing kernels against their torch twins, on any device.

Shared by the interpreter's tests on a CPU and those on a GPU. Sizes: T tokens, H hidden size, E
experts, S slots.
"""

import itertools

import torch
from torch import Tensor

from sonic.enums import ScoreOrder
from sonic.plan import RoutingPlan, build_plan, build_plan_flat
from sonic.reference import routing as routing_twin
from sonic.reference import stages as twin
from sonic.testing import assert_close, poison_dead_rows_
from sonic.triton import bias_grad, combine, parts, score_grad
from sonic.triton import topk as triton_topk

PLAN_TENSORS = (
    "offset_by_expert",
    "token_by_row",
    "slot_by_row",
    "row_by_slot",
    "offset_by_token",
    "slot_by_position",
)


def expert_ids(shape, num_experts: int, kind: str, device, dtype=torch.int32) -> Tensor:
    """Expert ids: ``uniform`` with some out of range, ``hot`` nearly all one, ``dropped`` all."""
    if kind == "dropped":
        return torch.full(shape, num_experts, dtype=dtype, device=device)
    ids = torch.randint(-1, num_experts + 1, shape, dtype=dtype, device=device)
    if kind == "hot":
        ids = torch.where(torch.rand(shape, device=device) < 0.9, num_experts // 2, ids)
    return ids.to(dtype)


def assert_same_plan(actual, expected) -> None:
    for name in PLAN_TENSORS:
        ours, theirs = getattr(actual, name), getattr(expected, name)
        if name == "slot_by_position" and ours is None and theirs is not None:
            # Slots lie by token: then the list says nothing.
            ours = torch.arange(theirs.shape[0], dtype=torch.int32, device=theirs.device)
            ours = torch.where(ours < expected.offset_by_token[-1], ours, -1)
        if theirs is None:
            assert ours is None, name
            continue
        assert ours.dtype == torch.int32 and ours.is_contiguous(), name
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def flat_plan(num_tokens: int, num_slots: int, num_experts: int, device) -> RoutingPlan:
    """A plan of general routing with ids out of range and, usually, tokens without slots."""
    tokens = torch.randint(-1, num_tokens + 1, (num_slots,), device=device)
    experts = expert_ids((num_slots,), num_experts, "uniform", device)
    return build_plan_flat(tokens, experts, num_tokens, num_experts, impl="torch")


def topk_plan(num_tokens: int, top_k: int, num_experts: int, device) -> RoutingPlan:
    ids = expert_ids((num_tokens, top_k), num_experts, "uniform", device)
    return build_plan(ids, num_experts, impl="torch")


def check_topk(logits: Tensor, top_k: int, order: ScoreOrder) -> None:
    """Winners exactly, scores and gradient to rounding."""
    scores, ids = triton_topk.topk_scores(logits, top_k, order)
    expected, expected_ids = routing_twin.topk_scores(logits, top_k, order)
    torch.testing.assert_close(ids, expected_ids, rtol=0, atol=0)
    assert scores.dtype == torch.float32
    exact, _ = routing_twin.topk_scores(logits.double(), top_k, order)
    # Hardware exp is good to about two units in the last place.
    assert_close(scores, exact, expected, ulps=4.0, name="scores")

    dscores = torch.randn_like(scores)
    dlogits = triton_topk.topk_scores_grad(dscores, logits, scores, ids, order)
    assert dlogits.dtype == logits.dtype and dlogits.shape == logits.shape
    twins = [
        routing_twin.topk_scores_grad(dscores.to(s.dtype), v, s, ids, order)
        for v, s in ((logits.double(), exact), (logits, expected))
    ]
    assert_close(
        dlogits,
        *twins,
        ulps=8.0,
        # A single winner of a softmax over winners has score one and gradient zero.
        allow_zero_reference=top_k == 1
        and (logits.shape[1] == 1 or order is not ScoreOrder.TOPK_OVER_SOFTMAX),
        magnitude=1.0 / top_k if dlogits.dtype is torch.float32 else 0.0,
        name="dlogits",
    )


def check_combine(plan: RoutingPlan, hidden_size: int, dtype, with_scores: bool) -> None:
    device = plan.row_by_slot.device
    rows = torch.randn(plan.num_rows, hidden_size, device=device).to(dtype)
    poison_dead_rows_(rows, plan.offset_by_expert)
    scores = None
    if with_scores:
        scores = torch.rand(plan.num_rows, device=device) + 0.1
        # The score of a dropped slot must not matter.
        scores = torch.where(plan.row_by_slot >= 0, scores, torch.nan)
    where = (plan.offset_by_token, plan.slot_by_position, plan.num_tokens, plan.top_k)
    out = combine.combine(rows, plan.row_by_slot, scores, *where)
    doubles = rows.double(), plan.row_by_slot, None if scores is None else scores.double()
    exact = twin.combine(*doubles, *where)
    low = twin.combine(rows, plan.row_by_slot, scores, *where)
    assert_close(out, exact, low, name="combine")
    silent = exact.abs().sum(dim=1) == 0
    assert not out[silent].any()
    # Some columns of a wider matrix, all the others left alone.
    wide = torch.full((len(out), hidden_size + 24), torch.nan, dtype=dtype, device=device)
    part = wide[:, 8 : 8 + hidden_size]
    assert combine.combine(rows, plan.row_by_slot, scores, *where, out=part) is part
    assert torch.equal(part, out)
    assert wide[:, :8].isnan().all() and wide[:, 8 + hidden_size :].isnan().all()


def check_gather_scores(plan: RoutingPlan) -> None:
    scores = torch.rand(plan.num_rows, device=plan.row_by_slot.device) + 0.1
    actual = score_grad.gather_scores(scores, plan.slot_by_row)
    expected = twin.gather_scores(scores, plan.slot_by_row)
    assert expected.any()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def check_score_grad(plan: RoutingPlan, num_partials: int, hidden_size: int, dtype) -> None:
    """``hidden_size`` 0: without the bias term."""
    device = plan.row_by_slot.device
    partial = torch.randn(num_partials, plan.num_rows, device=device)
    partial[:, int(plan.offset_by_expert[-1]) :] = torch.nan
    bias: tuple = ()
    if hidden_size:
        dout = torch.randn(plan.num_tokens, hidden_size, device=device).to(dtype)
        b2 = torch.randn(plan.num_experts, hidden_size, device=device).to(dtype)
        bias = (dout, b2, plan.token_by_row, plan.offset_by_expert)
    actual = score_grad.score_grad(partial, plan.row_by_slot, *bias)
    low = twin.score_grad(partial, plan.row_by_slot, *bias)
    doubles = (bias[0].double(), bias[1].double(), *bias[2:]) if bias else ()
    exact = twin.score_grad(partial.double(), plan.row_by_slot, *doubles)
    # The sum's terms cancel; their sum of squares sets the scale of what rounding leaves.
    assert_close(
        actual, exact, low, ulps=4.0, magnitude=(num_partials + hidden_size) ** 0.5, name="ds"
    )
    assert not actual[plan.row_by_slot < 0].any()


def check_add_parts(counts: list[int], num_parts: int, shape: tuple[int, int], dtype, device):
    """Places that belong to no part hold NaN, and outputs of one part stay as they are."""
    offset = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
    rows = sum(counts) + 5  # that belong to no expert
    size = parts.rows_per_part(rows, num_parts)
    partial = torch.full((num_parts, *shape), torch.nan, dtype=dtype, device=device)
    out = torch.randn(len(counts), *shape, device=device).to(dtype)
    expected = out.clone()
    for expert, (begin, end) in enumerate(itertools.pairwise(offset.tolist())):
        for row in range(begin + size, end, size):
            partial[row // size - 1] = torch.randn(shape, device=device).to(dtype)
        later = [partial[row // size - 1].float() for row in range(begin + size, end, size)]
        expected[expert] = sum(later, out[expert].float()).to(dtype)
    parts.add_parts(out, partial, offset, rows)
    assert torch.equal(out, expected)


def check_bias_grads(plan: RoutingPlan, width: int, dtype, out_dtype) -> None:
    device = plan.row_by_slot.device
    dh = torch.randn(plan.num_rows, width, device=device).to(dtype)
    poison_dead_rows_(dh, plan.offset_by_expert)
    offset = plan.offset_by_expert
    magnitude = (plan.num_rows / plan.num_experts) ** 0.5
    options = {"ulps": 4.0, "magnitude": magnitude}

    actual = bias_grad.bias_grad_rows(dh, offset, dtype=out_dtype)
    low = twin.bias_grad_rows(dh, offset, dtype=out_dtype)
    exact = twin.bias_grad_rows(dh.double(), offset)
    assert_close(actual, exact, low, name="db1", **options)

    dout = torch.randn(plan.num_tokens, width, device=device).to(dtype)
    score = torch.rand(plan.num_rows, device=device)
    score[int(offset[-1]) :] = torch.nan
    gathered = plan.token_by_row, score
    actual = bias_grad.bias_grad_gathered(dout, *gathered, offset, dtype=out_dtype)
    low = twin.bias_grad_gathered(dout, *gathered, offset, dtype=out_dtype)
    exact = twin.bias_grad_gathered(dout.double(), gathered[0], score.double(), offset)
    assert_close(actual, exact, low, name="db2", **options)
    empty = offset.diff() == 0
    assert not actual[empty].any()
