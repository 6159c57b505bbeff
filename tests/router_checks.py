"""Checks of the router kernels against their torch twins, on any device.

Shared by the interpreter's tests on a CPU and those on a GPU. Sizes: T tokens, E columns.
"""

import itertools

import torch
from torch import Tensor

from sonic.plan import build_plan
from sonic.reference import routers as twin
from sonic.routing.route import _backward, _forward_unfused
from sonic.runtime.route import Route, RouteTensors
from sonic.testing import assert_close
from sonic.triton import router as triton_router

PLAN = ("offset_by_expert", "token_by_row", "slot_by_row", "row_by_slot")


def make_route(num_columns: int, top_k: int, **options) -> Route:
    values = {
        "score": "softmax",
        "renormalize": True,
        "scale": 1.0,
        "num_groups": 1,
        "topk_groups": 1,
        "group_best": 2,
        "num_working": num_columns,
        "num_experts": num_columns,
        "num_sequences": 1,
        "balance": True,
    }
    return Route(top_k=top_k, **(values | options))


def make_inputs(num_tokens: int, num_columns: int, dtype, device, *, bias=False, mask=""):
    """Logits of spread 2; a bias of the size of a score; ``mask``: "", "row" or "token"."""
    logits = (2 * torch.randn(num_tokens, num_columns, device=device)).to(dtype)
    given = 0.2 * torch.randn(num_columns, device=device) if bias else None
    shape = (1 if mask == "row" else num_tokens, num_columns)
    barred = torch.rand(shape, device=device) < 0.3
    if mask == "token" and num_tokens > 1:
        barred[1] = True
    added = torch.where(barred, -torch.inf, torch.randn(shape, device=device))
    return logits, given, added if mask else None


def run_kernels(inputs, ids, route: Route, fused: bool) -> RouteTensors:
    logits, bias, mask = inputs
    if fused:
        assert triton_router.is_fused(*logits.shape, ids is not None, route)
        return RouteTensors(*triton_router.route_fused(logits, bias, mask, route))
    return RouteTensors(*_forward_unfused(logits, bias, mask, ids, route))


def assert_winners(ids: Tensor, inputs, route: Route) -> None:
    """The twin's winners; those of a choice by fp32 score may differ where scores nearly tie."""
    logits, bias, mask = inputs
    values = twin.masked_logits(logits, mask)
    choice = twin.choice_of(values, bias, route)
    expected = twin.winners(choice, route.top_k)
    if bias is None and (route.num_groups == 1 or route.group_best == 1):
        torch.testing.assert_close(ids, expected, rtol=0, atol=0)
        return
    assert torch.equal(ids < 0, expected < 0)
    live = ids >= 0
    picked = choice.gather(1, ids.clamp(min=0).long()).masked_fill(~live, 0.0)
    best = choice.gather(1, expected.clamp(min=0).long()).masked_fill(~live, 0.0)
    torch.testing.assert_close(picked, best, rtol=1e-5, atol=1e-6)
    ordered = torch.where(live, ids, -1 - torch.arange(route.top_k, device=ids.device))
    assert (ordered.sort(dim=1).values.diff(dim=1) != 0).all(), "a winner twice"


def check_route(inputs, route: Route, *, fused: bool, ids: Tensor | None = None) -> RouteTensors:
    """Winners, weights, sums, losses, plan and every gradient."""
    logits, _, mask = inputs
    actual = run_kernels(inputs, ids, route, fused)
    if ids is None:
        assert_winners(actual.ids, inputs, route)
    else:
        assert torch.equal(actual.ids, ids.to(torch.int32))
    low, exact = (
        twin.route_reference(logits.to(dtype), None, mask, actual.ids, route)
        for dtype in (logits.dtype, torch.float64)
    )
    assert actual.scores.dtype == torch.float32
    # Hardware exp, log and division are good to about two units in the last place each.
    close = {"ulps": 16.0}
    assert_close(actual.scores, exact.scores, low.scores, name="scores", magnitude=0.1, **close)
    live = exact.lse != -torch.inf
    assert torch.equal(actual.lse == -torch.inf, ~live)
    assert_close(actual.lse[live], exact.lse[live], low.lse[live], name="lse", **close)
    if route.num_experts:
        plan = build_plan(actual.ids, route.num_experts, impl="torch")
        for name in PLAN:
            ours, theirs = getattr(actual, name), getattr(plan, name)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=lambda m, n=name: n + m)
    if route.balance:
        assert torch.equal(actual.load, exact.load) and torch.equal(actual.live, exact.live)
        assert exact.load.any()
        assert_close(actual.prob_sum, exact.prob_sum, low.prob_sum, name="prob_sum", **close)
        losses = [twin.balance_losses(*routed[3:], route) for routed in (exact, low)]
        for name in ("switch", "sequence", "z", "entropy"):
            pair = [getattr(loss, name) for loss in losses]
            # A single column has no entropy.
            zero = {"allow_zero_reference": name == "entropy" and logits.shape[1] == 1}
            assert_close(getattr(actual, name), *pair, name=name, **zero, **close)
    check_gradients(inputs, actual, route)
    return actual


def check_gradients(inputs, results: RouteTensors, route: Route) -> None:
    """With each single gradient given, and with all of them."""
    logits, _, mask = inputs
    names = RouteTensors._fields[: 5 if route.balance else 1]
    # A loss is a mean over tokens: its gradient is scaled up to the size of the others.
    tokens = logits.shape[0]
    full = {name: torch.randn_like(getattr(results, name)) for name in names}
    full |= {name: full[name] * tokens for name in names[2:]}
    for given in [*([name] for name in names), list(names)]:
        grads = [full[name] if name in given else None for name in RouteTensors._fields[:5]]
        saved = results.scores, results.ids, results.lse, results.load, results.live
        flat = list(vars(route).values())
        actual = _backward(*grads, logits, mask, *saved, *flat) if logits.is_cuda else None
        if actual is None:
            actual = _interpreted_backward(grads, logits, mask, results, route)
        twins = []
        for dtype in (torch.float64, logits.dtype):
            leaf = logits.to(dtype).detach().requires_grad_()
            routed = twin.route_reference(leaf, None, mask, results.ids, route)
            losses = twin.balance_losses(*routed[3:], route)
            outputs = routed.scores, routed.prob_sum, losses.switch, losses.sequence, losses.z
            pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
            (grad,) = torch.autograd.grad(
                [o for o, _ in pairs], leaf, [g.to(o.dtype) for o, g in pairs]
            )
            twins.append(grad)
        assert actual.dtype == logits.dtype and actual.shape == logits.shape
        # A single winner of a softmax over the winners has weight one whatever its logit.
        flat_top_one = given == ["scores"] and route.top_k == 1 and route.renormalize
        # Terms of order one cancel; in fp32 that leaves a rest whatever the logits' dtype.
        magnitude = 1.0 if actual.dtype is torch.float32 else 1e-4
        assert_close(
            actual,
            *twins,
            ulps=32.0,
            magnitude=magnitude,
            allow_zero_reference=flat_top_one or logits.shape[1] == 1,
            name="dlogits of " + ", ".join(given),
        )


def _interpreted_backward(grads, logits, mask, results: RouteTensors, route: Route) -> Tensor:
    """``_backward``'s GPU half: on a CPU tensor it takes the torch half."""
    from sonic.triton.balance import loss_weights
    from sonic.triton.router_grad import route_grad

    weight = dz_sum = None
    if route.balance:
        weight, dz_sum = loss_weights(*grads[1:], results.load, results.live, route)
    saved = results.scores, results.ids, results.lse
    return route_grad(grads[0], weight, dz_sum, logits, mask, *saved, route)


def option_grid():
    """Score functions, renormalisation, groups, bias, mask and null experts, every pair once."""
    scores = ("softmax", "sigmoid", "sqrt_softplus")
    for score, renormalize in itertools.product(scores, (True, False)):
        for groups, bias, mask, null in (
            ((1, 1, 2), False, "", 0),
            ((1, 1, 2), True, "token", 3),
            ((4, 2, 2), True, "", 0),
            ((4, 2, 1), False, "row", 3),
            ((3, 2, 2), True, "row", 2),
        ):
            options = {
                "score": score,
                "renormalize": renormalize,
                "scale": 2.5 if bias else 1.0,
                "num_groups": groups[0],
                "topk_groups": groups[1],
                "group_best": groups[2],
            }
            yield options, bias, mask, null
