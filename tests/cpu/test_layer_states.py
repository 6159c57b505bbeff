"""Layers and routers that are made on meta, loaded, copied, pickled or put together wrongly."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

import sonic
from sonic.functional import experts_planned
from sonic.nn.routers import (
    PrecomputedRouter,
    SharedExperts,
    SigmoidRouter,
    TopKRouter,
    update_balance,
)
from sonic.routing.balancing import corrected_bias, limit_capacity

HIDDEN, WIDTH, EXPERTS, TOP_K = 16, 8, 4, 2
SIZES = (EXPERTS, TOP_K, HIDDEN, WIDTH, "swiglu", False, 0.3)


def counting_layer(device=None):
    options = {"losses": {"global_batch": 1.0}, "device": device}
    return sonic.MoE(*SIZES, router=SigmoidRouter(HIDDEN, EXPERTS, TOP_K, **options), device=device)


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_brings_no_counts(assign):
    """Nor does unwritten memory, or a meta tensor: they begin at zero, beside the weights."""
    source = counting_layer()
    layer = counting_layer("meta")
    if not assign:
        layer.to_empty(device="cpu")
        for counts in (layer.router.step_load, layer.router.batch_load):
            counts.fill_(10**13)
    layer.load_state_dict(source.state_dict(), assign=assign)
    x = torch.randn(2, 6, HIDDEN)
    out, loss = layer(x, "torch")
    expected, its_loss = source(x, "torch")
    assert torch.equal(out, expected) and torch.equal(loss, its_loss) and loss.item() > 0
    for name in ("step_load", "batch_load"):
        mine, its = getattr(layer.router, name), getattr(source.router, name)
        assert mine.any() and torch.equal(mine, its), name
    update_balance(layer)
    update_balance(source)
    assert torch.equal(layer.router.correction_bias, source.router.correction_bias)
    assert layer.router.correction_bias.any()
    with torch.no_grad():  # which is remembered beside the counts, for a repetition
        layer(x, "torch")
    assert layer.router._earlier_loads.num_kept == 1


def test_counts_of_other_weights_are_forgotten():
    layer = counting_layer()
    layer(torch.randn(2, 6, HIDDEN), "torch")
    assert layer.router.step_load.any() and layer.router.batch_load.any()
    layer.load_state_dict(layer.state_dict())
    assert not layer.router.step_load.any() and not layer.router.batch_load.any()


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.factor * x


def test_reset_parameters_reaches_modules_in_modules():
    inner = nn.Sequential(nn.Linear(HIDDEN, WIDTH), nn.ReLU(), nn.Linear(WIDTH, HIDDEN))
    layer = sonic.MoE(*SIZES, shared_experts=inner)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    layer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in layer.parameters())


def test_what_cannot_be_reset_is_named():
    layer = sonic.MoE(*SIZES, shared_experts=nn.Sequential(nn.ReLU(), Scale()))
    with pytest.raises(sonic.ArgumentError, match=r"shared_experts\.1 is a Scale with parameters"):
        layer.reset_parameters()


@pytest.mark.parametrize("kind", ["experts", "layer"])
def test_shared_experts_that_route(kind):
    shared = sonic.MoE(*SIZES)
    if kind == "experts":
        shared = sonic.Experts(1, HIDDEN, WIDTH, "swiglu", False, 0.3)
    with pytest.raises(sonic.ArgumentError, match=r"Pass a sonic\.nn\.routers\.SharedExperts"):
        sonic.MoE(*SIZES, shared_experts=shared)


def test_a_gate_in_float64():
    shared = SharedExperts(6, 4, gated=True, dtype=torch.float64, std=0.5)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(shared, (x,))


@pytest.mark.parametrize(
    ("router", "came"),
    [
        (nn.Linear(HIDDEN, EXPERTS), "a Linear with a bias"),
        (SigmoidRouter(HIDDEN, EXPERTS, TOP_K), "a SigmoidRouter"),
    ],
    ids=["bias", "module"],
)
def test_a_router_that_is_put_in_later(router, came):
    layer = sonic.MoE(*SIZES)
    layer.router = router
    with pytest.raises(sonic.ArgumentError, match=f"was replaced by {came}.*router="):
        layer(torch.randn(5, HIDDEN), "torch")
    layer.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
    assert layer(torch.randn(5, HIDDEN), "torch")[0].any()


def test_a_layer_on_meta_says_how_to_get_memory():
    layer = sonic.MoE(*SIZES, device="meta")
    with pytest.raises(sonic.DeviceError, match=r"^MoE: router\.weight is on meta.*to_empty"):
        layer(torch.randn(5, HIDDEN), "torch")


def test_parts_name_their_own_parameters():
    x, ids = torch.randn(5, HIDDEN), torch.zeros(5, TOP_K, dtype=torch.int64)
    layer = sonic.Experts(EXPERTS, HIDDEN, WIDTH, "swiglu", False, 0.3).double()
    with pytest.raises(sonic.DTypeError, match=r"^Experts: c_fc\.weight is float64"):
        layer(x, ids, torch.ones(5, TOP_K))
    shared = SharedExperts(HIDDEN, WIDTH, gated=True)
    shared.gate.to("meta")
    with pytest.raises(sonic.DeviceError, match=r"^SharedExperts: gate\.weight is on meta"):
        shared(x)
    with pytest.raises(sonic.DTypeError, match=r"^SharedExperts: c_fc\.weight is float64"):
        SharedExperts(HIDDEN, WIDTH).double()(x)


def test_grouped_routers_take_no_tokens():
    router = SigmoidRouter(HIDDEN, EXPERTS, TOP_K, num_groups=2, topk_groups=1)
    routed = router(torch.empty(0, HIDDEN))
    assert routed.topk_ids.shape == (0, TOP_K) and routed.plan.num_rows == 0


@pytest.mark.parametrize(
    ("weights", "error", "text"),
    [
        (torch.ones(2, 5), sonic.ShapeError, r"\(T=5, top_k=2\)"),
        (torch.ones(10), sonic.ShapeError, "2 axes"),
        (torch.ones(5, 2, dtype=torch.int64), sonic.DTypeError, "weights is int64"),
        (torch.ones(5, 2, dtype=torch.complex64), sonic.DTypeError, "weights is complex64"),
        (torch.ones(5, 2, device="meta"), sonic.DeviceError, "weights is on meta"),
        (None, sonic.ArgumentError, "weights is of type NoneType"),
    ],
    ids=["transposed", "flat", "integers", "complex", "meta", "none"],
)
def test_weights_that_do_not_fit_the_plan(weights, error, text):
    plan = sonic.build_plan(torch.zeros(5, 2, dtype=torch.int32), EXPERTS)
    x = torch.randn(5, HIDDEN)
    w1, w2 = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN), torch.randn(EXPERTS, HIDDEN, WIDTH)
    with pytest.raises(error, match=text):
        experts_planned(x, weights, plan, w1, w2)
    with pytest.raises(sonic.ArgumentError, match="plan is of type NoneType"):
        experts_planned(x, torch.ones(5, 2), None, w1, w2)


@pytest.mark.parametrize("value", [10**400, 1e39, 1e300], ids=["int", "1e39", "1e300"])
def test_numbers_that_float32_lacks(value):
    for make in (
        lambda: TopKRouter(HIDDEN, EXPERTS, TOP_K, scale=value),
        lambda: TopKRouter(HIDDEN, EXPERTS, TOP_K, losses={"z": value}),
        lambda: sonic.Experts(EXPERTS, HIDDEN, WIDTH, "swiglu", False, value),
    ):
        with pytest.raises(sonic.ArgumentError, match="that float32 has"):
            make()


def test_other_things_that_are_refused():
    ids = torch.zeros(5, 2, dtype=torch.int32)
    complex_scores = torch.ones(5, 2, dtype=torch.complex64)
    refused = {
        lambda: limit_capacity(ids, complex_scores, EXPERTS, 1, drop="score"): "complex64",
        lambda: corrected_bias(torch.zeros(4), complex_scores[:2].reshape(4), 1e-3): "complex64",
        lambda: corrected_bias(torch.zeros(4), torch.zeros(4, device="meta"), 1e-3): "on meta",
        lambda: sonic.saved_bytes(10, 8, 8, 4, 50, rounding="nr"): "top_k=50 came with 4 experts",
        lambda: sonic.saved_bytes(10, 8, 8, 4, 2, weights_frozen="yes"): "True or False",
        lambda: sonic.saved_bytes(10, 8, 8, 4, 2, tile="yes"): "tile='yes'",
        lambda: sonic.MoE(65536, 2, 8, 2**31 - 1, "swiglu", False, 0.02): "intermediate_size=21",
        lambda: sonic.MoE(*SIZES, device="mps"): "cuda, cpu and meta",
        lambda: PrecomputedRouter(HIDDEN, EXPERTS, TOP_K)(
            torch.randn(5, HIDDEN), topk_ids=ids, topk_weights=torch.ones(5, 2), balance="no"
        ): "balance='no'",
    }
    for call, text in refused.items():
        with pytest.raises(sonic.SonicError, match=text):
            call()


def test_a_router_with_a_process_group_is_not_pickled(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/at", rank=0, world_size=1)
    try:
        router = SigmoidRouter(HIDDEN, EXPERTS, TOP_K, group=dist.group.WORLD)
        with pytest.raises(sonic.ArgumentError, match=r"state_dict\(\)"):
            pickle.dumps(router)
        assert copy.deepcopy(router).group is router.group
        router.group = None
        assert pickle.loads(pickle.dumps(router)).group is None
    finally:
        dist.destroy_process_group()
