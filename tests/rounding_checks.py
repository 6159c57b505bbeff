"""Checks of token rounding against its oracle, on any device; shared by CPU and GPU tests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sonic import KernelBackendMoE, MoE
from sonic.enums import ScoreOrder
from sonic.plan import RoutingPlan
from sonic.reference import (
    experts_flat_low_precision,
    experts_flat_reference,
    load_balancing_loss,
    plan_oracle_flat,
)
from sonic.reference.token_rounding import token_rounding_oracle
from sonic.routing import max_pairs, rounding_scores
from sonic.routing.rounded_routing import _backward_torch as logit_gradient_in_torch
from sonic.routing.token_rounding import (
    RULES,
    _backward_torch,
    _forward_torch,
    _winner_softmax_grad_torch,
    _winner_softmax_torch,
    flat_plan,
    resolve_tile,
    round_winners,
    weight_dtype,
    winners_of,
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
    return flat_plan(outputs[3:], num_tokens)


def pairs_of(plan: RoutingPlan) -> tuple[Tensor, Tensor]:
    """Token and expert of each slot of a plan of token rounding; T and E behind the last pair."""
    slots = plan.num_rows
    token_ids = torch.full((slots,), plan.num_tokens, dtype=torch.int32)
    expert_ids = torch.full((slots,), plan.num_experts, dtype=torch.int32)
    slot_by_row, token_by_row = plan.slot_by_row.cpu(), plan.token_by_row.cpu()
    live = slot_by_row >= 0
    counts = plan.expert_frequency().cpu().long()
    token_ids[slot_by_row[live].long()] = token_by_row[live]
    experts = torch.repeat_interleave(torch.arange(plan.num_experts, dtype=torch.int32), counts)
    expert_ids[slot_by_row[live].long()] = experts
    device = plan.token_by_row.device
    return token_ids.to(device), expert_ids.to(device)


def assert_equals_oracle(outputs: tuple[Tensor, ...], case: Case, scores: Tensor, uniform: Tensor):
    """Pairs, weights, tail and plan of the operator's eight outputs, exactly."""
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
    """All eight outputs equal those of the torch twin on the same device."""
    expected = _forward_torch(scores, uniform, case.top_k, case.tile, case.rule)
    assert len(outputs) == len(expected) == 8
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


def check_logits(logits: Tensor, uniform: Tensor, case: Case, full: bool) -> None:
    """The fused kernels on (T, E) logits: scores and winners to rounding, then pairs, weights and
    plan exactly those that the twin makes of these scores, then the gradient to rounding."""
    from sonic.triton.rounding_winners import keys_of_logits
    from sonic.triton.token_rounding import round_logits, round_logits_grad

    options = (case.top_k, case.tile, case.rule, case.num_pairs, full)
    rounded, load, winner_scores, winner_ids, lse = round_logits(logits, uniform, *options)
    keys, *_ = keys_of_logits(logits, case.top_k, full)
    scores = (keys.table[:, : case.tokens] & (2**31 - 1)).view(torch.float32).t().contiguous()
    exact, low = (
        _winner_softmax_torch(kind, case.top_k, full) for kind in (logits.double(), logits)
    )
    assert_close(scores, exact, low, ulps=8.0, name="scores")

    winners = winners_of(logits.float(), case.top_k)
    assert torch.equal(winner_ids.long(), winners)
    assert torch.equal(load.long(), winners.flatten().bincount(minlength=case.experts))
    torch.testing.assert_close(winner_scores, scores.gather(1, winners), rtol=1e-5, atol=0)
    expected = round_winners(scores, winners, uniform, case.tile, case.rule)
    assert rounded.token_ids is None
    actual = (rounded.weights, expected[1], *rounded[2:])
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), f"output {index}"

    dweights = torch.randn_like(rounded.weights)
    saved = (rounded.weights, rounded.expert_ids, rounded.offset_by_token)
    saved = (*saved, winner_scores, winner_ids, lse, logits if full else None)
    gradient = round_logits_grad(dweights, *saved, case.experts, logits.dtype)
    twins = []
    for dtype in (torch.float64, torch.float32):
        wide = [value.to(dtype) if value.is_floating_point() else value for value in saved[:6]]
        result = logits.dtype if dtype is torch.float32 else dtype
        arguments = (dweights.to(dtype), *wide, saved[6], case.experts, result)
        twins.append(logit_gradient_in_torch(*arguments))
    assert gradient.dtype == logits.dtype
    # The only expert has score one and gradient zero.
    trivial = case.experts == 1 or not twins[0].any()
    assert_close(
        gradient, *twins, ulps=8.0, allow_zero_reference=trivial, magnitude=1.0, name="dlogits"
    )


def summaries_of(keys: Tensor, tokens: int) -> Tensor:
    """Summaries (E, groups, 4) of keys (E, stride), see :mod:`sonic.triton.rounding_summaries`."""
    groups = keys.view(keys.shape[0], -1, 32)
    is_token = (torch.arange(keys.shape[1]) < tokens).view(-1, 32)
    chosen, rank = groups >= 0, groups & (2**31 - 1)
    word = (chosen.long() << torch.arange(32)).sum(-1)
    to_add = torch.where(~chosen & is_token, rank, -1)
    to_drop = torch.where(chosen, 2**31 - 1 - rank, -1).amax(-1)
    # Of parts that tie the last one is first; a part has no rank to add if all its tokens chose.
    by_part = (rank.long() - chosen.long() * 2**31).unflatten(-1, (4, 8)).amax(-1)
    first = 3 - by_part.flip(-1).argmax(-1)
    others = by_part.scatter(-1, first[..., None], 0).amax(-1)
    second = others // 4 * 4 + first
    signed = word - ((word >= 2**31).long() << 32)
    numbers = signed, to_add.amax(-1), second, to_drop
    return torch.stack(numbers, dim=-1).int()


def check_winner_softmax(logits: Tensor, top_k: int, full: bool) -> None:
    """Scores of all experts and the gradient of the logits, to rounding."""
    from sonic.triton.rounding_winners import winner_softmax, winner_softmax_grad

    actual = winner_softmax(logits, top_k, full)
    low = _winner_softmax_torch(logits, top_k, full)
    exact = _winner_softmax_torch(logits.double(), top_k, full)
    assert actual.dtype == low.dtype == torch.float32
    # Hardware exp is good to about two units in the last place.
    assert_close(actual, exact, low, ulps=4.0, name="scores")

    dscores = torch.randn_like(low)
    gradient = winner_softmax_grad(dscores, low, top_k, full, logits.dtype)
    assert gradient.dtype == logits.dtype
    twins = [
        _winner_softmax_grad_torch(dscores.to(scores.dtype), scores, top_k, full, dtype)
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


def check_switch_loss(logits: Tensor, top_k: int) -> None:
    """The loss of the tokens' choices and its gradient, by the kernels, against its formula."""
    from sonic.triton.switch_loss import switch_loss, switch_loss_grad

    tokens, experts = logits.shape
    load = winners_of(logits.float(), top_k).flatten().bincount(minlength=experts).int()
    scale = experts / (top_k * tokens**2)
    loss, lse, mean = switch_loss(logits, load, scale)
    dloss = torch.full_like(loss, 0.5 * tokens)  # entries are then as large as probabilities
    gradient = switch_loss_grad(dloss, logits, load, lse, mean, scale)
    losses, gradients = [], []
    for dtype in (torch.float64, logits.dtype):
        leaf = logits.detach().to(dtype).requires_grad_()
        losses.append(load_balancing_loss(leaf, load))
        gradients.append(torch.autograd.grad(losses[-1], leaf, dloss.to(losses[-1].dtype))[0])
    assert loss.dtype == lse.dtype == mean.dtype == torch.float32
    assert gradient.dtype == logits.dtype and gradient.is_contiguous()
    assert_close(loss, *(value.detach() for value in losses), ulps=8.0, name="loss")
    assert_close(
        gradient,
        *gradients,
        ulps=16.0,
        allow_zero_reference=experts == top_k,
        magnitude=1.0 if logits.dtype is torch.float32 else 1e-4,
        name="dlogits",
    )


# --- the module -----------------------------------------------------------------------------------

MODULE_SIZES = [(300, 16), (1000, "auto")]  # tokens, tile
_MODULE_SEED = 6  # of random rules
# Of the loss in a module's step, for each token: its gradients are then about as large as those of
# the output.
_LOSS_WEIGHT = 50.0


def make_module(
    device: torch.device | str, dtype: torch.dtype, tile: int | str, rule: str, **options
) -> MoE:
    """A layer that rounds, whose router is uneven, with biases that are not zero."""
    sizes = (8, 2, 136, 72)
    layer = MoE(*sizes, "swiglu", True, 0.1, routing="token_rounding", rounding=rule, tile=tile,
                device=device, dtype=dtype, **options)  # fmt: skip
    with torch.no_grad():
        layer.router.weight.mul_(torch.linspace(0.3, 3.0, 8, device=device)[:, None])
        for bias in (layer.c_fc.bias, layer.c_proj.bias):
            bias.normal_()
    return layer


def module_step(
    layer: MoE, x: Tensor, dout: Tensor, backend: KernelBackendMoE = KernelBackendMoE.sonicmoe
) -> dict[str, Tensor]:
    """Output, balancing loss, and every gradient of both, by name."""
    leaf = x.detach().requires_grad_()
    out, loss = layer(leaf, backend)
    leaves = {"x": leaf, **dict(layer.named_parameters())}
    weight = torch.full_like(loss, _LOSS_WEIGHT * len(x))
    gradients = torch.autograd.grad((out, loss), list(leaves.values()), (dout, weight))
    return {"out": out.detach(), "loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def _module_reference(
    layer: MoE, x: Tensor, dout: Tensor, pairs: tuple[Tensor, Tensor], winners: Tensor, exact: bool
) -> dict[str, Tensor]:
    """:func:`module_step` from the formulas, for given pairs and top-k experts: in float64, or in
    the layer's dtype and rounded where the kernels round."""
    dtype = torch.float64 if exact else x.dtype
    leaves = {"x": x, **dict(layer.named_parameters())}
    leaves = {name: leaf.detach().to(dtype).requires_grad_() for name, leaf in leaves.items()}
    logits = torch.nn.functional.linear(leaves["x"], leaves["router.weight"])
    # The gradients of either's logits are rounded, then added.
    for_scores, for_loss = (logits.to(weight_dtype(dtype)) for _ in range(2))
    over_all = layer.score_order is ScoreOrder.TOPK_OVER_SOFTMAX
    scale = for_scores if over_all else for_scores.gather(1, winners)
    scores = torch.exp(for_scores - scale.logsumexp(dim=1, keepdim=True))
    token_ids, expert_ids = pairs
    weights = ("c_fc.weight", "c_proj.weight", "c_fc.bias", "c_proj.bias")
    experts = experts_flat_reference if exact else experts_flat_low_precision
    out = experts(
        leaves["x"], *pairs, scores[token_ids.long(), expert_ids.long()],
        *(leaves[name] for name in weights), layer.activation_function, layer.layout,
    )  # fmt: skip
    counts = winners.flatten().bincount(minlength=layer.num_experts).to(for_loss.dtype)
    shares = layer.num_experts * counts / counts.sum()
    loss = (shares * for_loss.softmax(dim=1).mean(dim=0)).sum()
    weight = torch.full_like(loss, _LOSS_WEIGHT * len(x))
    gradients = torch.autograd.grad((out, loss), list(leaves.values()), (dout.to(dtype), weight))
    return {"out": out.detach(), "loss": loss.detach(), **dict(zip(leaves, gradients, strict=True))}


def check_module(
    layer: MoE, x: Tensor, backend: KernelBackendMoE = KernelBackendMoE.sonicmoe
) -> dict[str, Tensor]:
    """Output, balancing loss and every gradient of a layer that rounds, for the pairs that the
    oracle keeps of the scores of its logits. They are shown to be neither top-k nor none."""
    dout = torch.randn_like(x)
    torch.manual_seed(_MODULE_SEED)
    actual = module_step(layer, x, dout, backend)
    with torch.no_grad():
        logits = torch.nn.functional.linear(x, layer.router.weight)
        scores = rounding_scores(logits, layer.top_k, order=layer.score_order)
    torch.manual_seed(_MODULE_SEED)
    is_random = layer.rounding in ("sr", "nr-s")
    uniform = torch.rand(layer.num_experts, device=x.device).cpu() if is_random else None
    tile = resolve_tile("test", layer.tile)
    arguments = (scores.cpu(), layer.top_k, tile, layer.rounding, uniform)
    pairs = tuple(ids.to(x.device) for ids in token_rounding_oracle(*arguments)[:2])
    winners = winners_of(logits.to(scores.dtype), layer.top_k)
    kept = pairs[1].long().bincount(minlength=layer.num_experts)
    chosen = winners.flatten().bincount(minlength=layer.num_experts)
    assert kept.any() and not torch.equal(kept, chosen) and (kept % tile == 0).all()
    exact, low = (
        _module_reference(layer, x, dout, pairs, winners, is_exact) for is_exact in (True, False)
    )
    assert actual["loss"].dtype == torch.float32 and actual["loss"].item() > 1.05
    for name, tensor in actual.items():
        ulps = {"ulps": 8.0} if name == "loss" else {}
        assert_close(tensor, exact[name], low[name], name=name, **ulps)
    return actual
