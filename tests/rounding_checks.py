"""Checks of token rounding against its oracle, on any device; shared by CPU and GPU tests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sonic.plan import RoutingPlan
from sonic.reference import plan_oracle_flat
from sonic.reference.token_rounding import token_rounding_oracle
from sonic.routing import max_pairs
from sonic.routing.token_rounding import (
    RULES,
    _backward_torch,
    _forward_torch,
    _winner_softmax_grad_torch,
    _winner_softmax_torch,
)
from sonic.testing import assert_close
from tests.routing_checks import assert_same_plan


@dataclass(frozen=True)
class Case:
    """One problem; ``kind`` says what its scores look like."""

    tokens: int
    experts: int
    top_k: int
    tile: int
    rule: str
    kind: str = "softmax"

    @property
    def num_pairs(self) -> int:
        return max_pairs(self.tokens, self.experts, self.top_k, self.tile, self.rule)

    def __str__(self) -> str:
        sizes = f"T{self.tokens}-E{self.experts}-k{self.top_k}-M{self.tile}"
        return f"{sizes}-{self.rule}-{self.kind}"


def random_case(seed: int, tokens: int = 70, experts: int = 12) -> Case:
    """A small problem; every rule and kind of scores comes up."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    kinds = ("softmax", "ties", "hot", "bfloat16", "sigmoid", "negative")
    num_experts = draw(1, experts)
    return Case(
        tokens=draw(1, tokens),
        experts=num_experts,
        top_k=draw(1, num_experts + 1),
        tile=(1, 2, 3, 4, 5, 8, 16, 100)[draw(0, 8)],
        rule=RULES[seed % len(RULES)],
        kind=kinds[draw(0, len(kinds))],
    )


def scores_of(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """(T, E) seeded scores, drawn on the CPU so that every device sees the same."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(case.tokens, case.experts, generator=generator)
    if case.kind == "hot":
        logits[:, case.experts // 2] += 4
    scores = logits.softmax(dim=1)
    if case.kind == "ties":
        scores = (8 * scores).round() / 8
    elif case.kind == "bfloat16":
        scores = scores.bfloat16()
    elif case.kind == "sigmoid":
        scores = (6 * logits).sigmoid()
    elif case.kind == "negative":
        scores = logits
    return scores.to(device)


def uniform_of(case: Case, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    return torch.rand(case.experts, generator=torch.Generator().manual_seed(seed + 1)).to(device)


def plan_of(outputs: tuple[Tensor, ...], num_tokens: int) -> RoutingPlan:
    return RoutingPlan(*outputs[3:], top_k=0, num_tokens=num_tokens)


def assert_equals_oracle(outputs: tuple[Tensor, ...], case: Case, scores: Tensor, uniform: Tensor):
    """Pairs, weights, tail and plan of the operator's nine outputs, exactly."""
    weights, token_ids, expert_ids = outputs[:3]
    expected = token_rounding_oracle(scores, case.top_k, case.tile, case.rule, uniform)
    kept = expected[0].shape[0]
    assert token_ids.shape == expert_ids.shape == weights.shape == (case.num_pairs,)
    assert kept <= case.num_pairs
    for actual, wanted in zip((token_ids, expert_ids, weights), expected, strict=True):
        assert torch.equal(actual[:kept], wanted.to(actual.dtype))
    assert (token_ids[kept:] == case.tokens).all() and (expert_ids[kept:] == case.experts).all()
    assert not weights[kept:].any()
    oracle = plan_oracle_flat(token_ids, expert_ids, case.tokens, case.experts)
    assert_same_plan(plan_of(outputs, case.tokens), oracle)


def assert_equals_twin(outputs: tuple[Tensor, ...], case: Case, scores: Tensor, uniform: Tensor):
    """All nine outputs equal those of the torch twin on the same device."""
    expected = _forward_torch(scores, uniform, case.top_k, case.tile, case.rule)
    assert len(outputs) == len(expected) == 9
    for index, (actual, wanted) in enumerate(zip(outputs, expected, strict=True)):
        assert actual.dtype == wanted.dtype and torch.equal(actual, wanted), f"output {index}"


def check_gradient(
    dweights: Tensor,
    token_ids: Tensor,
    expert_ids: Tensor,
    case: Case,
    dtype: torch.dtype,
    rtol: float = 0.0,
) -> None:
    """The Triton gradient of the scores equals the twin's: bit for bit, on a GPU."""
    from sonic.triton.token_rounding import round_tokens_grad

    arguments = (dweights, token_ids, expert_ids, case.tokens, case.experts, dtype)
    actual, expected = round_tokens_grad(*arguments), _backward_torch(*arguments)
    assert actual.dtype == dtype and torch.equal(actual != 0, expected != 0) and expected.any()
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=0)


def check_winner_softmax(logits: Tensor, top_k: int) -> None:
    """Scores of all experts and the gradient of the logits, to rounding."""
    from sonic.triton.token_rounding import winner_softmax, winner_softmax_grad

    actual = winner_softmax(logits, top_k)
    low = _winner_softmax_torch(logits, top_k)
    exact = _winner_softmax_torch(logits.double(), top_k)
    assert actual.dtype == low.dtype == torch.float32
    # Hardware exp is good to about two units in the last place.
    assert_close(actual, exact, low, ulps=4.0, name="scores")

    dscores = torch.randn_like(low)
    gradient = winner_softmax_grad(dscores, low, top_k, logits.dtype)
    assert gradient.dtype == logits.dtype
    twins = [
        _winner_softmax_grad_torch(dscores.to(scores.dtype), scores, top_k, dtype)
        for scores, dtype in ((exact, torch.float64), (low, logits.dtype))
    ]
    assert_close(
        gradient,
        *twins,
        ulps=8.0,
        # The only expert has score one and gradient zero.
        allow_zero_reference=logits.shape[1] == 1,
        magnitude=1.0 if logits.dtype is torch.float32 else 0.0,
        name="dlogits",
    )
