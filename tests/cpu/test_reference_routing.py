"""Top-k scores, their gradient, the balancing loss and the plan oracle."""

import pytest
import torch

from sonic.enums import ScoreOrder
from sonic.reference import (
    load_balancing_loss,
    plan_oracle,
    plan_oracle_flat,
    scores_of,
    topk_scores,
    topk_scores_grad,
)

every_order = pytest.mark.parametrize("order", ScoreOrder, ids=lambda o: o.value)
SHAPES = [(5, 7, 3), (4, 4, 4), (3, 1, 1), (2, 33, 1)]


def logits_of(tokens, experts, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(tokens * 1000 + experts)
    return (scale * torch.randn(tokens, experts, generator=generator)).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_order
def test_scores_one_token_at_a_time(order, shape):
    tokens, experts, top_k = shape
    logits = logits_of(tokens, experts)
    scores, ids = topk_scores(logits, top_k, order)
    assert ids.dtype == torch.int32 and scores.shape == ids.shape == (tokens, top_k)
    for token in range(tokens):
        row = logits[token].tolist()
        winners = sorted(range(experts), key=lambda e: -row[e])[:top_k]
        assert ids[token].tolist() == winners
        power = logits[token].exp()
        pool = power if order is ScoreOrder.TOPK_OVER_SOFTMAX else power[winners]
        torch.testing.assert_close(scores[token], power[winners] / pool.sum())


@every_order
def test_ties_go_to_the_lower_expert(order):
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, 0.0], [0.0] * 6, [-0.0, 0.0, -0.0, 0.0, 5, 5]])
    _, ids = topk_scores(logits.bfloat16(), 4, order)
    assert ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [4, 5, 0, 1]]


@pytest.mark.parametrize(
    "dtype, expected",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
@every_order
def test_score_and_gradient_dtypes(order, dtype, expected):
    logits = logits_of(6, 9, dtype)
    scores, ids = topk_scores(logits, 3, order)
    assert scores.dtype == expected
    assert topk_scores_grad(torch.ones_like(scores), logits, scores, ids, order).dtype == dtype


@every_order
def test_no_tokens(order):
    logits = torch.empty(0, 5)
    scores, ids = topk_scores(logits, 2, order)
    assert scores.shape == ids.shape == (0, 2)
    assert topk_scores_grad(scores, logits, scores, ids, order).shape == (0, 5)
    assert load_balancing_loss(logits, torch.zeros(5)).item() == 0.0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_order
def test_scores_gradcheck(order, shape):
    tokens, experts, top_k = shape
    logits = logits_of(tokens, experts).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: topk_scores(x, top_k, order)[0], [logits])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_order
def test_written_gradient_is_autograds(order, shape):
    tokens, experts, top_k = shape
    logits = logits_of(tokens, experts).requires_grad_()
    scores, ids = topk_scores(logits, top_k, order)
    dscores = torch.randn(scores.shape, dtype=torch.float64)
    (expected,) = torch.autograd.grad(scores, logits, dscores)
    if order is ScoreOrder.TOPK_OVER_SOFTMAX or top_k > 1:
        assert expected.abs().max() > 1e-3 or experts == 1
    got = topk_scores_grad(dscores, logits.detach(), scores.detach(), ids, order)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


def test_renormalised_scores_are_the_softmax_of_the_winners():
    logits = logits_of(20, 16)
    norm, _ = topk_scores(logits, 5, ScoreOrder.TOPK_OVER_SOFTMAX_NORM)
    over_topk, _ = topk_scores(logits, 5, ScoreOrder.SOFTMAX_OVER_TOPK)
    torch.testing.assert_close(norm, over_topk, rtol=1e-13, atol=0)
    plain, _ = topk_scores(logits, 5, ScoreOrder.TOPK_OVER_SOFTMAX)
    assert (plain.sum(1) < 0.999).all()


@every_order
def test_scores_of_other_winners(order):
    logits = logits_of(4, 6)
    ids = torch.tensor([[5, 0], [1, 2], [3, 0], [4, 5]])
    power = logits.exp()
    chosen = power.gather(1, ids)
    pool = power if order is ScoreOrder.TOPK_OVER_SOFTMAX else chosen
    torch.testing.assert_close(scores_of(logits, ids, order), chosen / pool.sum(1, keepdim=True))


def test_balancing_loss():
    logits = logits_of(12, 4)
    frequency = torch.tensor([10, 0, 2, 12], dtype=torch.int32)
    probability = torch.softmax(logits, 1).mean(0)
    expected = 4 * sum(probability[e] * frequency[e] / 24 for e in range(4))
    torch.testing.assert_close(load_balancing_loss(logits, frequency), expected)
    even = load_balancing_loss(torch.zeros(8, 4), torch.full((4,), 6))
    assert even.item() == pytest.approx(1.0)
    assert torch.autograd.gradcheck(
        lambda x: load_balancing_loss(x, frequency), [logits.requires_grad_()]
    )


def test_plan_of_a_small_table():
    ids = torch.tensor([[2, 0], [2, 7], [-1, 2]])
    plan = plan_oracle(ids, 4)
    assert plan.offset_by_expert.tolist() == [0, 1, 1, 4, 4]
    assert plan.slot_by_row.tolist() == [1, 0, 2, 5, -1, -1]
    assert plan.token_by_row.tolist() == [0, 0, 1, 2, -1, -1]
    assert plan.row_by_slot.tolist() == [1, 0, 2, -1, -1, 3]
    assert plan.offset_by_token is None and plan.slot_by_position is None
    assert (plan.num_tokens, plan.top_k) == (3, 2)
    assert all(t.dtype == torch.int32 for t in plan[:4])


def test_plan_of_flat_lists():
    tokens = torch.tensor([1, 0, 3, 1, -1, 0])
    experts = torch.tensor([0, 1, 1, 9, 0, 0])
    plan = plan_oracle_flat(tokens, experts, 3, 2)
    assert plan.offset_by_expert.tolist() == [0, 2, 3]
    assert plan.slot_by_row.tolist() == [0, 5, 1, -1, -1, -1]
    assert plan.token_by_row.tolist() == [1, 0, 0, -1, -1, -1]
    assert plan.row_by_slot.tolist() == [0, 2, -1, -1, -1, 1]
    assert plan.offset_by_token.tolist() == [0, 2, 4, 4]
    assert plan.slot_by_position.tolist() == [1, 5, 0, 3, -1, -1]


def test_plan_without_tokens():
    plan = plan_oracle(torch.empty(0, 3, dtype=torch.int32), 2)
    assert plan.offset_by_expert.tolist() == [0, 0, 0]
    assert plan.token_by_row.shape == plan.row_by_slot.shape == (0,)
