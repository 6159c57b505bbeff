"""The routing operator and the router modules on the CPU."""

import copy
import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sonic
from sonic import KernelBackendMoE, MoE
from sonic.nn import routers
from sonic.nn.routers import (
    LossWeights,
    NoisyTopKRouter,
    PrecomputedRouter,
    ProductKeyRouter,
    SharedExperts,
    SigmoidRouter,
    SoftmaxRouter,
    SqrtSoftplusRouter,
    Top1Router,
    TopKRouter,
)
from sonic.plan import build_plan
from sonic.reference.routers import balance_losses, route_reference
from sonic.routing.product_key import product_key_routing
from sonic.routing.route import plan_of, route
from sonic.runtime.errors import ArgumentError, DeviceError, DTypeError, ShapeError, SonicError
from sonic.runtime.route import Route
from tests.router_checks import option_grid

H, E, K = 16, 8, 2
TORCH = KernelBackendMoE.torch


def float64_case(options, bias, mask):
    logits = torch.randn(12, 24, dtype=torch.float64, requires_grad=True)
    added = torch.zeros(1 if mask == "row" else 12, 24, dtype=torch.float64)
    added[-1, 3:7] = -torch.inf
    if mask == "token":
        added[4] = -torch.inf
        added[5, 2:] = -torch.inf
    given = 0.2 * torch.randn(24, dtype=torch.float64) if bias else None
    return logits, given, added if mask else None


@pytest.mark.parametrize("case", list(option_grid()), ids=str)
def test_gradient_is_that_of_autograd(case):
    """Every output's gradient against autograd through the plain formulas, in float64."""
    options, bias, mask, null = case
    logits, given, added = float64_case(options, bias, mask)
    rest = {"num_null": null, "num_experts": 20, "num_sequences": 3}
    actual = route(logits, 4, bias=given, mask=added, **options, **rest)
    flat = Route(
        top_k=4, num_working=24 - null, num_experts=20, num_sequences=3, balance=True, **options
    )
    routed = route_reference(logits, given, added, None, flat)
    losses = balance_losses(*routed[3:], flat)
    expected = routed.scores, routed.prob_sum, losses.switch, losses.sequence, losses.z
    assert torch.equal(actual.ids, routed.ids)
    for ours, theirs in zip(actual[:5], expected, strict=True):
        torch.testing.assert_close(ours, theirs)
        weighting = torch.randn_like(ours)
        grads = [
            torch.autograd.grad((t * weighting).sum(), logits, retain_graph=True)[0]
            for t in (ours, theirs)
        ]
        assert grads[1].any()
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_gradcheck(score, renormalize):
    torch.manual_seed(0)
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)

    def outputs(values):
        return route(values, 3, score=score, renormalize=renormalize, num_sequences=2)[:5]

    assert torch.autograd.gradcheck(outputs, logits)


def test_weights_do_not_see_the_bias():
    logits = torch.randn(50, 12)
    bias = torch.randn(12)
    plain = torch.sigmoid(logits)
    out = route(logits, 3, score="sigmoid", renormalize=False, bias=bias)
    torch.testing.assert_close(out.scores, plain.gather(1, out.ids.long()))
    best = (plain + bias).topk(3).indices
    assert torch.equal(out.ids.long().sort().values, best.sort().values)
    assert not torch.equal(best, plain.topk(3).indices)
    grad = torch.ones(12).requires_grad_()
    assert not route(logits, 3, score="sigmoid", bias=grad).scores.requires_grad


def test_masked_groups_lose_even_to_negative_choices():
    """Groups outside of the best ones are at -inf, not at zero, where they could win."""
    logits = torch.full((1, 8), -6.0)
    bias = torch.tensor([-0.1, -0.2, -5, -5, -0.3, -0.3, -0.05, -9])
    out = route(
        logits, 2, score="sigmoid", bias=bias, num_groups=4, topk_groups=1, renormalize=False
    )
    assert out.ids.tolist() == [[0, 1]]


def test_barred_columns_and_tokens():
    logits = torch.randn(4, 6)
    mask = torch.zeros(4, 6)
    mask[1] = -torch.inf
    mask[2, :5] = -torch.inf
    out = route(logits, 2, mask=mask, num_experts=6)
    assert out.ids[1].tolist() == [-1, -1] and out.scores[1].tolist() == [0, 0]
    assert out.ids[2].tolist() == [5, -1] and out.scores[2].tolist() == [1, 0]
    assert out.live.tolist() == [3] and out.load.sum() == 5
    plan = plan_of(out)
    assert plan.offset_by_expert[-1] == 5
    by_row = route(logits, 2, mask=mask[2])
    assert (by_row.ids[:, 0] == 5).all()


def test_recorded_ids_are_weighted_anew():
    logits = torch.randn(9, 6)
    ids = torch.randint(-1, 8, (9, 3))
    out = route(logits, 3, ids=ids, renormalize=False, num_experts=6)
    inside = (ids >= 0) & (ids < 6)
    expected = torch.softmax(logits, -1).gather(1, ids.clamp(0, 5)) * inside
    torch.testing.assert_close(out.scores, expected)
    assert torch.equal(out.ids.long(), ids)
    assert out.load.sum() == inside.sum()
    again = route(logits, 3)
    assert torch.equal(route(logits, 3, ids=again.ids).scores, again.scores)


def test_ids_beyond_int32_are_dropped():
    """A cast would make experts of them: 2^32 + 1 is 1 in int32."""
    wide = torch.tensor([[2**32 + 1, 0], [2**31, 2**63 - 1], [-(2**32), -(2**63) + 3]])
    x, weights = torch.randn(3, H), torch.rand(3, K)
    out = route(torch.randn(3, E), K, ids=wide, num_experts=E)
    routed = [
        (out.ids, out.scores, plan_of(out)),
        *(
            (r.topk_ids, r.topk_weights, r.plan)
            for r in (
                TopKRouter(H, E, K)(x, ids=wide),
                PrecomputedRouter(H, E, K)(x, topk_ids=wide, topk_weights=weights),
            )
        ),
    ]
    for ids, _, plan in routed:
        inside = (ids >= 0) & (ids < E)
        assert ids.dtype == torch.int32 and inside.tolist() == [[False, True], *[[False] * 2] * 2]
        assert plan.offset_by_expert[-1] == 1
    assert all(scores[0, 1] > 0 and scores.count_nonzero() == 1 for _, scores, _ in routed[:2])
    assert out.load.sum() == 1


def test_null_experts_weigh_nothing_and_are_averaged_in_the_loss():
    logits = torch.randn(64, 12)
    out = route(logits, 4, num_null=4, num_experts=8)
    null = out.ids >= 8
    assert null.any() and not out.scores[null].any()
    real = torch.where(null, -torch.inf, logits.gather(1, out.ids.long()))
    torch.testing.assert_close(out.scores, torch.softmax(real, 1).nan_to_num())
    assert plan_of(out).offset_by_expert[-1] == (~null).sum()
    load = torch.bincount(out.ids.flatten(), minlength=12).float()
    load[8:] = load[8:].mean()
    prob = torch.softmax(logits, 1).sum(0)
    torch.testing.assert_close(out.switch, 12 * (load / load.sum() * prob / 64).sum())


def test_no_tokens():
    logits = torch.randn(0, 6, requires_grad=True)
    out = route(logits, 2, num_experts=6)
    assert out.scores.shape == out.ids.shape == (0, 2)
    assert out.offset_by_expert.tolist() == [0] * 7
    losses = out.switch, out.sequence, out.z, out.entropy
    assert [loss.item() for loss in losses] == [0] * 4
    (out.scores.sum() + out.switch + out.z).backward()
    assert logits.grad.shape == (0, 6)


def test_without_balance_there_are_no_sums():
    logits = torch.randn(5, 6, requires_grad=True)
    out = route(logits, 2, balance=False)
    assert out.prob_sum.numel() == out.load.numel() == out.switch.numel() == 0
    assert plan_of(out) is None
    full = route(logits, 2)
    assert torch.equal(out.scores, full.scores)
    grads = [
        torch.autograd.grad((o.scores * torch.arange(2.0)).sum(), logits)[0] for o in (out, full)
    ]
    assert grads[0].any() and torch.equal(*grads)


@pytest.mark.parametrize("balance", [True, False])
def test_route_saves_what_its_docstring_says(balance):
    saved = []
    logits = torch.randn(30, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        routed = route(logits, 2, num_sequences=5, balance=balance)
    expected = logits.nbytes + 8 * 30 * 2 + 4 * 30 + (4 * 5 * 6 + 4 * 5 if balance else 0)
    assert sum(tensor.nbytes for tensor in saved) == expected and routed.scores.requires_grad


def test_low_precision_logits_score_in_float32():
    logits = torch.randn(30, 40).bfloat16()
    out = route(logits, 4, score="sigmoid", bias=torch.randn(40))
    exact = route(logits.float(), 4, score="sigmoid", bias=torch.zeros(40))
    assert out.scores.dtype == out.switch.dtype == torch.float32
    assert exact.scores.dtype == torch.float32
    torch.testing.assert_close(exact.prob_sum, out.prob_sum)


WRONG = [
    (dict(logits=torch.randn(4)), ShapeError, "shape (4,). Allowed: 2 axes, (T, E). Pass one row"),
    (dict(logits=torch.randn(1, 4, 6)), ShapeError, "Allowed: 2 axes, (T, E). Flatten the leading"),
    (dict(logits=torch.ones(4, 6, dtype=torch.int64)), DTypeError, "logits is int64. Allowed: bfl"),
    (
        dict(logits=torch.ones(4, 0)),
        ShapeError,
        "logits of 0 experts. Allowed: 1 to 65536. Give one column",
    ),
    (dict(top_k=7), ArgumentError, "top_k=7 came with 6 experts. Allowed: 1 to 6"),
    (dict(score="tanh"), ArgumentError, "score='tanh' is not known. Allowed: 'softmax'"),
    (dict(scale=0.0), ArgumentError, "scale=0.0"),
    (dict(bias=torch.zeros(5)), ShapeError, "bias has shape (5,). Allowed: (6,). Pass one number"),
    (dict(mask=torch.zeros(3, 6)), ShapeError, "mask has shape (3, 6). Allowed: (6,), (1, 6) and"),
    (dict(mask=torch.zeros(4, 6, dtype=torch.bool)), DTypeError, "mask is bool. Allowed: bfloat16"),
    (
        dict(mask=torch.zeros(4, 6).int()),
        DTypeError,
        "pass torch.where(mask.bool(), 0.0, -torch.inf) if True means allowed",
    ),
    (dict(bias=torch.zeros(6).int()), DTypeError, "Cast it: bias.float()."),
    (dict(ids=torch.zeros(4, 3).long()), ShapeError, "Allowed: (4, 2). Pass top_k ids"),
    (dict(ids=torch.zeros(4, 2)), DTypeError, "ids is float32. Allowed: int32, int64. Cast it"),
    (
        dict(ids=torch.zeros(4, 2, device="meta").long()),
        DeviceError,
        "ids is on meta. Allowed",
    ),
    (
        dict(num_groups=4),
        ArgumentError,
        "num_groups=4 came with logits of shape (4, 6)",
    ),
    (dict(num_groups=3, topk_groups=4), ArgumentError, "topk_groups=4"),
    (dict(num_groups=3, topk_groups=1, top_k=3), ArgumentError, "hold top_k=3 columns together, 2"),
    (dict(num_groups=3, topk_groups=1, group_best=3), ArgumentError, "group_best=3"),
    (
        dict(num_null=6),
        ArgumentError,
        "num_null=6 came with logits of shape (4, 6)",
    ),
    (dict(num_experts=7), ArgumentError, "num_experts=7 came with logits of shape (4, 6). Allowed"),
    (dict(num_experts=0), ArgumentError, "num_experts=0 is out of range. Allowed: 1 to 65536"),
    (dict(num_groups=1.0), ArgumentError, "num_groups=1.0 is of type float. Allowed: an int"),
    (dict(num_null="1"), ArgumentError, "num_null='1' is of type str"),
    (dict(balance=1), ArgumentError, "balance=1. Allowed: True or False"),
    (dict(score=["softmax"]), ArgumentError, "score=['softmax'] is not known"),
    (dict(logits=[1.0]), ArgumentError, "logits is of type list"),
    (dict(mask=[0.0]), ArgumentError, "mask is of type list"),
    (dict(num_sequences=3), ArgumentError, "Allowed: divisors of the 4 tokens. Pass the number"),
]


@pytest.mark.parametrize(("change", "error", "text"), WRONG, ids=[w[2][:24] for w in WRONG])
def test_what_route_refuses(change, error, text):
    arguments = {"logits": torch.randn(4, 6), "top_k": 2} | change
    with pytest.raises(error, match=re.escape(text)):
        route(**arguments)


def test_opcheck():
    logits = torch.randn(8, 6, requires_grad=True)
    options = ("sigmoid", True, 2.0, 2, 1, 2, 5, 4, 2)
    for balance in (True, False):
        inputs = (logits, torch.zeros(6), torch.zeros(8, 6), None, 2, *options, balance)
        torch.library.opcheck(torch.ops.sonic.route.default, inputs)
    pairs = torch.randn(8, 2, 5, requires_grad=True)
    for renormalize in (True, False):
        torch.library.opcheck(torch.ops.sonic.product_key_routing.default, (pairs, 3, renormalize))


# ------------------------------------------------------------------------------ product keys


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("size", "top_k"), [(1, 1), (5, 2), (16, 16), (40, 9)])
def test_product_keys_equal_a_search_of_all_pairs(size, top_k, renormalize):
    logits = torch.randn(20, 2, size, dtype=torch.float64, requires_grad=True)
    scores, ids = product_key_routing(logits, top_k, renormalize=renormalize)
    pairs = (logits[:, 0, :, None] + logits[:, 1, None, :]).flatten(1)
    best, where = pairs.topk(top_k)
    assert torch.equal(ids.long(), where)
    expected = best.softmax(1) if renormalize else pairs.softmax(1).gather(1, where)
    torch.testing.assert_close(scores, expected)
    weighting = torch.randn_like(scores)
    grads = [torch.autograd.grad((t * weighting).sum(), logits)[0] for t in (scores, expected)]
    torch.testing.assert_close(*grads)
    assert torch.autograd.gradcheck(lambda v: product_key_routing(v, top_k)[0], logits[:3])


def test_product_keys_take_ties_in_order():
    _, ids = product_key_routing(torch.zeros(1, 2, 4), 4)
    assert ids.tolist() == [[0, 1, 2, 3]]


def test_product_key_router():
    router = ProductKeyRouter(H, 36, 4, losses={"switch": 0.5, "z": 0.25}, std=0.5)
    x = torch.randn(3, 5, H)
    out = router(x)
    halves = x.view(15, H) @ router.weight.transpose(1, 2)
    torch.testing.assert_close(out.logits, halves.transpose(0, 1), rtol=1e-4, atol=1e-5)
    pairs = (halves[0][:, :, None] + halves[1][:, None, :]).flatten(1)
    torch.testing.assert_close(out.losses["z"], pairs.logsumexp(1).square().mean())
    switch = 0
    for half, keys in zip(halves, (out.topk_ids // 6, out.topk_ids % 6), strict=True):
        load = torch.bincount(keys.flatten(), minlength=6) / 60
        switch += 0.5 * 6 * (load * half.softmax(1).mean(0)).sum()
    torch.testing.assert_close(out.losses["switch"], switch)
    torch.testing.assert_close(out.aux_loss, 0.5 * switch + 0.25 * out.losses["z"])
    out.aux_loss.backward()
    assert router.weight.grad.any()
    for wrong in (dict(num_experts=35), dict(top_k=7), dict(losses={"sequence": 1.0})):
        with pytest.raises(ArgumentError):
            ProductKeyRouter(**({"hidden_size": H, "num_experts": 36, "top_k": 4} | wrong))


# ----------------------------------------------------------------------------------- modules

EVERY = [
    lambda: SoftmaxRouter(H, E, K),
    lambda: SoftmaxRouter(H, E, K, renormalize=False, add_bias=True),
    lambda: SigmoidRouter(H, E, K, num_groups=4, topk_groups=2, scale=2.5, float32_logits=True),
    lambda: SqrtSoftplusRouter(H, E, K),
    lambda: NoisyTopKRouter(H, E, K),
    lambda: ProductKeyRouter(H, 9, K),
    lambda: TopKRouter(H, E, K, num_identity=2, num_null=2),
]


@pytest.mark.parametrize("make", EVERY)
def test_moe_with_a_router_equals_experts_by_its_ids(make):
    torch.manual_seed(1)
    router = make().eval()
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=0.5)
    layer = MoE(router.num_experts, K, H, 8, "swiglu", True, 0.3, router=router)
    x = torch.randn(2, 7, H)
    out, aux_loss = layer(x, TORCH)
    routed = router(x)
    flat = x.view(14, H)
    expected = sonic.experts(
        flat,
        routed.topk_ids,
        routed.topk_weights,
        layer.c_fc.weight,
        layer.c_proj.weight,
        b1=layer.c_fc.bias,
        b2=layer.c_proj.bias,
    )
    if routed.identity_weight is not None:
        assert routed.identity_weight.any()
        expected = expected + routed.identity_weight[:, None] * flat
    torch.testing.assert_close(out.view(14, H), expected)
    assert out.any() and aux_loss.shape == ()
    out.sin().sum().backward()
    for name, parameter in layer.named_parameters():
        if "noise" not in name:
            assert parameter.grad is not None and parameter.grad.any(), name
    assert layer(x, TORCH, is_inference_mode=True)[1] is None
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x, TORCH)[0], layer(x, TORCH)[0])


def test_moe_with_the_softmax_router_is_the_moe_without():
    plain = MoE(E, K, H, 8, "swiglu", True, 0.3)
    router = SoftmaxRouter(H, E, K, losses={"switch": 1.0})
    layer = MoE(E, K, H, 8, "swiglu", True, 0.3, router=router)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(11, H)
    for ours, theirs in zip(layer(x, TORCH), plain(x, TORCH), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_moe_passes_inputs_on_and_refuses_other_sizes():
    router = SoftmaxRouter(H, E, K)
    layer = MoE(E, K, H, 8, "swiglu", False, 0.3, router=router)
    x, mask = torch.randn(5, H), torch.zeros(5, E)
    mask[2] = -torch.inf
    out, _ = layer(x, TORCH, router_inputs={"mask": mask})
    assert not out[2].any() and out[[0, 1, 3, 4]].any(dim=1).all()
    for change in (dict(num_experts=E + 1), dict(hidden_size=H + 8), dict(num_experts_per_tok=1)):
        sizes = {"num_experts": E, "num_experts_per_tok": K, "hidden_size": H} | change
        with pytest.raises(ArgumentError, match="router"):
            MoE(**sizes, intermediate_size=8, activation_function="swiglu", add_bias=False, std=1,
                router=router)  # fmt: skip
    with pytest.raises(ArgumentError, match="came with a router"):
        MoE(E, K, H, 8, "swiglu", False, 0.3, router=router, routing="token_rounding")


@pytest.mark.parametrize("gated", [True, False])
def test_shared_experts(gated):
    shared = SharedExperts(H, 24, gated=gated, std=0.3, layout="concatenated")
    layer = MoE(E, K, H, 8, "swiglu", False, 0.3, router=SoftmaxRouter(H, E, K))
    x = torch.randn(3, 4, H)
    before, _ = layer(x, TORCH)
    layer.shared_experts = shared
    after, _ = layer(x, TORCH)
    gate, up = (x @ shared.c_fc.weight[0].T).chunk(2, dim=-1)
    dense = (F.silu(gate) * up) @ shared.c_proj.weight[0].T
    if gated:
        dense = torch.sigmoid(x @ shared.gate.weight.T) * dense
    assert dense.any()
    torch.testing.assert_close(after - before, dense, rtol=1e-4, atol=1e-5)
    after.sin().sum().backward()
    assert all(p.grad.any() for p in shared.parameters())


def layer_of(**options):
    return MoE(E, K, H, 8, "swiglu", False, 0.3, **options)


def refused(error, texts):
    """That an error of this kind comes, with these parts of a text in this order."""
    return pytest.raises(error, match=".*".join(texts))


class Narrow(nn.Module):
    def forward(self, x):
        return x[..., :1]


def test_shared_experts_of_another_shape_are_refused():
    """(4, 2H) has the elements of (8, H): reshaping would mix tokens."""
    shared = SharedExperts(H, 24)
    with refused(
        ShapeError, ["SharedExperts: ", r"\(4, 32\)", "Allowed: ", r"\.\.\., 16", "Build"]
    ):
        shared(torch.randn(4, 2 * H))
    for shared, name in (
        (SharedExperts(24, 24), "hidden_size=24"),
        (nn.Linear(24, H), "in_features=24"),
        (nn.Linear(H, 24), "out_features=24"),
        (nn.Sequential(nn.Linear(H, 8), nn.ReLU(), nn.Linear(8, 24)), "out_features=24"),
    ):
        with refused(ShapeError, [f"MoE: {name} of shared_experts", "Allowed: .*=16", "Build"]):
            layer_of(shared_experts=shared)
    branch = nn.Sequential(nn.Linear(H, 8), nn.ReLU(), nn.Linear(8, H))
    for shared in (nn.Linear(H, H), nn.LazyLinear(H), nn.Sequential(), branch):
        layer_of(shared_experts=shared)
    with refused(ArgumentError, ["shared_experts is of type function", "a module", "Pass"]):
        layer_of(shared_experts=lambda x: x)
    with refused(ArgumentError, ["gated='yes'", "True or False"]):
        SharedExperts(H, 24, gated="yes")
    x = torch.randn(4, H)
    with refused(
        ShapeError, ["output of shared_experts", r"\(4, 1\)", r"Allowed: .*\(4, 16\)", "Let"]
    ):
        layer_of(shared_experts=Narrow())(x, TORCH)
    layer = layer_of(shared_experts=nn.Identity())
    layer(x, TORCH)
    layer.shared_experts.forward = lambda x: x.double()
    with refused(DTypeError, ["output of shared_experts is float64", "one dtype", "Cast"]):
        layer(x, TORCH)


def test_what_is_no_router_is_refused():
    for router in (nn.Linear(H, E), "softmax", SoftmaxRouter):
        with refused(
            ArgumentError, ["MoE: router is of type", "Allowed: .*sonic.nn.routers", "Wrap"]
        ):
            layer_of(router=router)


class Bare(routers.Router):
    def forward(self, x):
        return x


class Returning(routers.Router):
    def forward(self, x, *, balance=True):
        return x


def test_routers_of_ones_own_are_told_what_is_missing():
    with refused(ArgumentError, ["Bare.forward takes x", "balance=True", "Add the keyword"]):
        layer_of(router=Bare(H, E, K))
    layer = layer_of(router=Returning(H, E, K))
    with refused(ArgumentError, ["Returning returned a Tensor", "RouterOutput with a plan"]):
        layer(torch.randn(5, H), TORCH)


def test_a_mask_that_would_learn_is_refused():
    mask = torch.zeros(E, requires_grad=True)
    router, x = TopKRouter(H, E, K), torch.randn(5, H)
    with refused(ArgumentError, ["mask requires a gradient", "without gradient", "mask.detach"]):
        router(x, mask=mask)
    with torch.no_grad():
        router(x, mask=mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("gated", [False, True])
def test_shared_experts_of_another_dtype_are_refused(gated, dtype):
    with refused(DTypeError, ["one dtype for activations, weights"]):
        SharedExperts(H, 16, gated=gated)(torch.randn(5, H).to(dtype))


def test_router_inputs_that_are_missing_are_asked_for():
    layer, x = layer_of(router=PrecomputedRouter(H, E, K)), torch.randn(5, H)
    ids = {"topk_ids": torch.zeros(5, K, dtype=torch.int32)}
    for given, came in ((None, "no input"), ({}, "no input"), (ids, "topk_ids")):
        with refused(ArgumentError, [f"came with {came}", "topk_ids and topk_weights", "Pass"]):
            layer(x, TORCH, router_inputs=given)


def test_router_inputs_that_nobody_reads_are_refused():
    x, mask = torch.randn(5, H), torch.zeros(5, E)
    with refused(ArgumentError, ["router_inputs came with mask", "given as router", "Leave"]):
        layer_of()(x, TORCH, router_inputs={"mask": mask})
    layer = layer_of(router=SoftmaxRouter(H, E, K))
    layer(x, TORCH, router_inputs={"mask": mask})
    with refused(ArgumentError, ["came with mask, masks", "SoftmaxRouter: mask, ids", "Rename"]):
        layer(x, TORCH, router_inputs={"mask": mask, "masks": mask})
    with refused(ArgumentError, ["came with Tensor", "a mapping", "Pass"]):
        layer(x, TORCH, router_inputs=mask)
    with refused(ArgumentError, ["is_inference_mode=1", "True or False"]):
        layer(x, TORCH, is_inference_mode=1)


def test_precomputed_routing():
    router = PrecomputedRouter(H, E, K)
    layer = MoE(E, K, H, 8, "swiglu", False, 0.3, router=router)
    x, ids = torch.randn(6, H), torch.randint(-1, E + 1, (6, K))
    weights = torch.rand(6, K, requires_grad=True)
    out, loss = layer(x, TORCH, router_inputs={"topk_ids": ids, "topk_weights": weights})
    expected = sonic.experts(x, ids, weights, layer.c_fc.weight, layer.c_proj.weight)
    assert torch.equal(out, expected) and out.any() and loss == 0
    out.sum().backward()
    assert weights.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_precomputed_weights_are_passed_on_as_fp32(dtype):
    """fp64 stays what it is; the gradient is of the dtype that came, with its values."""
    weights = torch.rand(6, K, dtype=dtype).requires_grad_()
    ids = torch.randint(0, E, (6, K))
    out = PrecomputedRouter(H, E, K)(torch.randn(6, H), topk_ids=ids, topk_weights=weights)
    assert out.topk_weights.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert torch.equal(out.topk_weights, weights.to(out.topk_weights.dtype))
    out.topk_weights.square().sum().backward()
    assert weights.grad.dtype == dtype and torch.equal(weights.grad, 2 * weights.detach())


def test_top1_keeps_the_router_in_the_gradient():
    router = Top1Router(H, E, std=0.5)
    x = torch.randn(20, H)
    out = router(x)
    prob = torch.softmax(x @ router.weight.T, dim=1)
    best, where = prob.max(dim=1)
    assert torch.equal(out.topk_ids[:, 0].long(), where)
    torch.testing.assert_close(out.topk_weights[:, 0], best)
    out.topk_weights.sum().backward()
    assert router.weight.grad.any()


def test_noise_is_there_in_training_only():
    router = NoisyTopKRouter(H, E, K, std=0.5)
    x = torch.randn(400, H)
    nn.init.normal_(router.noise_weight, std=0.3)
    clean = x @ router.weight.T
    noise = router(x).logits - clean
    spread = F.softplus(x @ router.noise_weight.T)
    assert abs((noise / spread).std().item() - 1) < 0.05 and abs((noise / spread).mean()) < 0.05
    out = router(x)
    (out.topk_weights * torch.randn(400, K)).sum().backward()
    assert router.noise_weight.grad.any() and router.weight.grad.any()
    router.eval()
    torch.testing.assert_close(router(x).logits, clean)


def test_a_router_without_logits_has_no_losses():
    for losses in ({"switch": 1.0, "z": 1.0}, LossWeights(sequence=0.1)):
        with refused(ArgumentError, ["PrecomputedRouter: losses=", "Allowed: no losses", "Leave"]):
            PrecomputedRouter(H, E, K, losses=losses)
    assert PrecomputedRouter(H, E, K, losses={"z": 0.0}).losses == LossWeights()


@pytest.mark.parametrize(
    ("num_experts", "says"),
    [(8, "Take 4 (n=2) or 9 (n=3)."), (10, "Take 9 (n=3) or 16 (n=4)."), (65535, "65536 (n=256)")],
)
def test_squares_next_to_a_number_of_experts_are_named(num_experts, says):
    with pytest.raises(ArgumentError, match="ProductKeyRouter: .*n keys per half") as caught:
        ProductKeyRouter(H, num_experts, 2)
    assert says in str(caught.value)


def test_what_the_error_says_of_a_boolean_mask_bars_experts():
    logits, allowed = torch.randn(4, 6), torch.rand(4, 6).argsort(1) < 3
    with pytest.raises(DTypeError, match=r"torch\.where\(mask, 0\.0, -torch\.inf\)"):
        route(logits, 2, mask=allowed)
    out = route(logits, 2, mask=torch.where(allowed, 0.0, -torch.inf))
    assert allowed.gather(1, out.ids.long()).all()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(num_groups=3), "num_groups=3 came with num_experts=8."),
        (dict(num_groups=4, topk_groups=5), "topk_groups=5 came with num_experts=8."),
        (dict(group_best=9), "group_best=9 came with num_experts=8."),
        (dict(num_null=1, num_groups=2), "num_experts=8, num_identity=0 and num_null=1."),
        (dict(score="tanh"), "score='tanh' is not known."),
        (dict(scale=0.0), "scale=0.0."),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_are_refused_by_what_the_router_was_given(wrong, says):
    for cls in (TopKRouter, NoisyTopKRouter):
        with refused(ArgumentError, [f"{cls.__name__}: ", says, "Allowed: "]):
            cls(H, E, K, **wrong)


def test_options_are_refused_when_a_router_is_made():
    for wrong in (
        dict(score="tanh"),
        dict(num_groups=3),
        dict(capacity_drop="random"),
        dict(capacity_factor=0.0),
        dict(losses={"swich": 1.0}),
        dict(top_k=9),
        dict(num_null=-1),
    ):
        with pytest.raises(ArgumentError):
            TopKRouter(**({"hidden_size": H, "num_experts": E, "top_k": K} | wrong))
    with pytest.raises(ShapeError, match=r"\(\.\.\., 16\)"):
        SoftmaxRouter(H, E, K)(torch.randn(3, 8))
    with pytest.raises(DTypeError, match="hidden_states is int64.*Allowed: .*Cast"):
        SoftmaxRouter(H, E, K)(torch.ones(3, H).long())


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "scale": (INF, NAN, "x", None, True, -1.0),
        "std": (NAN, -1.0, "x"),
        "renormalize": (1, "yes", None),
        "correction_bias": (1, "no"),
        "add_bias": (1, "no"),
        "float32_logits": (1, "no"),
        "capacity_factor": (INF, NAN, 1e300, "x", -1.0),
        "eval_capacity_factor": (INF, NAN, 1e300, "x"),
        "num_groups": (2.0, "2", None, True),
        "topk_groups": (1.0, "1"),
        "group_best": (2.0, "2"),
        "num_identity": (1.0, "1"),
        "num_null": (1.0, "1"),
        "group": (0, "world", object()),
        "losses": ({"z": NAN}, {"z": -1.0}, {"z": "x"}, LossWeights(z=NAN)),
        "device": ("banana",),
        "dtype": (torch.int32, "bfloat16"),
    }.items(),
)
def test_every_argument_of_a_router_is_looked_at(name, values):
    for value in values:
        with pytest.raises(SonicError, match=rf"{name}.*Allowed: .*\. [A-Z0]") as caught:
            TopKRouter(H, E, K, **{name: value})
        assert "router" in str(caught.value) or str(caught.value).startswith("TopKRouter: ")


def test_routers_refuse_what_their_name_decides():
    for cls in (SoftmaxRouter, SigmoidRouter, SqrtSoftplusRouter):
        with refused(
            ArgumentError, [f"{cls.__name__}: score='softmax'", "Allowed: ", "TopKRouter"]
        ):
            cls(H, E, K, score="softmax")
    for wrong in ({"top_k": 2}, {"renormalize": True}):
        with refused(ArgumentError, ["Top1Router: ", "Allowed: ", "Leave"]):
            Top1Router(H, E, **wrong)


@pytest.mark.parametrize(
    "wrong", [dict(renormalize=1), dict(float32_logits=1), dict(std=NAN), dict(dtype=torch.int8)]
)
def test_the_product_key_router_refuses(wrong):
    (name,) = wrong
    with pytest.raises(SonicError, match=f"ProductKeyRouter: {name}=.*Allowed: "):
        ProductKeyRouter(H, 16, K, **wrong)


def test_meta_and_state_dict():
    router = SigmoidRouter(H, E, K, device="meta", losses={"global_batch": 1.0})
    assert {name: tuple(t.shape) for name, t in router.state_dict().items()} == {
        "weight": (E, H),
        "correction_bias": (E,),
    }
    router.to_empty(device="cpu")
    router.reset_parameters()
    assert router.weight.any() and not router.correction_bias.any()
    assert not router.step_load.any() and not router.batch_load.any()


def test_the_correction_bias_stays_in_float32():
    router = SigmoidRouter(H, E, K)
    value = torch.rand(E)
    router.correction_bias.copy_(value)
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.correction_bias.dtype == torch.float32
    assert torch.equal(router.correction_bias, value)


@pytest.mark.parametrize("name", routers.__all__)
def test_everything_is_documented(name):
    assert len(getattr(routers, name).__doc__) > 40


def test_router_under_compile():
    torch.manual_seed(0)
    router = SigmoidRouter(H, E, K, losses={"switch": 1.0, "sequence": 0.5}).eval()
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, H)
    ours, eager = compiled(x), router(x)
    assert torch.equal(ours.topk_ids, eager.topk_ids)
    torch.testing.assert_close(ours.topk_weights, eager.topk_weights)
    torch.testing.assert_close(ours.aux_loss, eager.aux_loss)
    assert torch.equal(ours.plan.row_by_slot, build_plan(eager.topk_ids, E).row_by_slot)


def test_a_router_in_training_under_compile():
    """With the loss of a whole batch, and a capacity, for several numbers of tokens."""
    torch.manual_seed(0)
    options = {"losses": {"global_batch": 1.0}, "capacity_factor": 1.1, "std": 0.5}
    router = TopKRouter(H, E, K, **options)
    compiled = torch.compile(router, fullgraph=True, dynamic=True, backend="aot_eager")
    results = []
    for run in (compiled, router):
        router.reset_counts()
        for tokens in (8, 20, 13):
            x = torch.linspace(-1, 1, tokens * H).view(tokens, H).sin()
            out = run(x)
            (out.aux_loss + out.topk_weights.square().sum()).backward()
        results.append((out.topk_ids, out.aux_loss, router.batch_load.clone(), router.weight.grad))
        router.zero_grad()
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_benchmark_compares_like_with_like(grouped):
    """Its eager path and ours give the same winners, plan, losses and gradient."""
    path = Path(__file__).parents[2] / "benchmarks" / "moe-router.py"
    spec = importlib.util.spec_from_file_location("moe_router", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    logits = torch.randn(100, 64, requires_grad=True)
    bias = 0.05 * torch.randn(64) if grouped else None
    weighting = torch.randn(100, 6)
    results = []
    for function in (benchmark.sonic_path, benchmark.eager_path):
        out = function(logits, 6, bias)
        total = (out.scores * weighting).sum() + out.switch + out.z
        results.append([*out, torch.autograd.grad(total, logits)[0]])
    for ours, theirs in zip(*results, strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_logits_do_not_follow_autocast():
    router = SoftmaxRouter(H, E, K)
    x = torch.randn(4, H)
    with torch.autocast("cpu", torch.bfloat16):
        inside = router(x)
    assert inside.logits.dtype == torch.float32
    assert torch.equal(inside.logits, router(x).logits)
