"""The router kernels and modules on a GPU."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
pytest.importorskip("triton")

from sonic import KernelBackendMoE, MoE
from sonic.nn.routers import (
    ProductKeyRouter,
    SharedExperts,
    SigmoidRouter,
    SoftmaxRouter,
    TopKRouter,
    update_balance,
)
from sonic.nn.routers import product_key as product_key_module
from sonic.nn.routers import topk as topk_module
from sonic.reference import product_key as product_key_twin
from sonic.routing.balancing import limit_capacity
from sonic.routing.product_key import product_key_routing
from sonic.routing.route import route
from sonic.testing import assert_close
from sonic.triton import router as router_module
from tests import router_checks as checks
from tests.graphs import kernels_of, no_synchronization, record, warm_up

CUDA = torch.device("cuda")
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:]
)
both_paths = pytest.mark.parametrize("fused", [True, False], ids=["fused", "rows"])


@both_paths
@pytest.mark.parametrize("case", list(checks.option_grid()), ids=str)
def test_every_option(case, fused, poisoned):
    options, bias, mask, null = case
    inputs = checks.make_inputs(1000, 120, torch.float32, CUDA, bias=bias, mask=mask)
    # Groups are runs of all columns, the null ones included.
    config = checks.make_route(120, 6, **options, num_working=120 - null, num_experts=100)
    checks.check_route(inputs, config, fused=fused)


SIZES = [
    # tokens, columns, top_k, sequences
    (1, 8, 2, 1),
    (257, 64, 64, 1),
    (1000, 60, 4, 1),
    (4097, 128, 8, 1),
    (4096, 128, 8, 4),
    (2048, 512, 10, 2),
    (513, 1000, 9, 1),
    (96, 256, 8, 8),
    (300, 5, 3, 1),
]


@both_paths
@every_dtype
@pytest.mark.parametrize("case", SIZES, ids=str)
def test_sizes(case, dtype, fused, guarded):
    tokens, columns, top_k, sequences = case
    logits, bias, mask = checks.make_inputs(tokens, columns, dtype, CUDA)
    config = checks.make_route(columns, top_k, num_sequences=sequences)
    checks.check_route((guarded.copy_of(logits), bias, mask), config, fused=fused)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("tokens", "columns", "top_k"), [(300, 2000, 8), (100, 16384, 16), (33, 65536, 64)]
)
def test_wide_rows(tokens, columns, top_k, score, poisoned):
    for dtype in (torch.bfloat16, torch.float32):
        inputs = checks.make_inputs(tokens, columns, dtype, CUDA)
        config = checks.make_route(columns, top_k, score=score)
        assert not router_module.is_fused(tokens, columns, False, config)
        checks.check_route(inputs, config, fused=False)


@pytest.mark.parametrize("columns", [256, 4096])
def test_deepseek_v3_sizes(columns, poisoned):
    groups = {"num_groups": 8, "topk_groups": 4, "scale": 2.5, "score": "sigmoid"}
    inputs = checks.make_inputs(2000, columns, torch.float32, CUDA, bias=True)
    checks.check_route(inputs, checks.make_route(columns, 8, **groups), fused=columns == 256)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_given_winners(score, poisoned):
    inputs = checks.make_inputs(700, 40, torch.float32, CUDA, mask="row")
    ids = torch.randint(-1, 42, (700, 4), device=CUDA)
    config = checks.make_route(40, 4, score=score, num_working=36, num_experts=32)
    checks.check_route(inputs, config, fused=False, ids=ids)


@pytest.mark.parametrize("columns", [16, 1000, 9000])
def test_ties_and_specials(columns, poisoned):
    """Few distinct values, so that most winners are ties, NaN and infinities among them."""
    values = torch.tensor([0.0, -0.0, 1.0, 1.0, -torch.inf, torch.inf, torch.nan], device=CUDA)
    for chosen in (values[:4], values[:5], values):
        logits = chosen[torch.randint(len(chosen), (200, columns), device=CUDA)]
        out = route(logits, 8)
        ranked = torch.sort(logits.cpu(), dim=1, descending=True, stable=True)
        expected = torch.where(ranked.values == -torch.inf, -1, ranked.indices)[:, :8]
        assert torch.equal(out.ids.cpu().long(), expected)


def weights_of_keys(logits, ids, renormalize):
    """(T, top_k) of the winners ``ids`` of (T, 2, n) logits."""
    pairs = (logits[:, 0, :, None] + logits[:, 1, None, :]).flatten(1)
    if renormalize:
        return pairs.gather(1, ids.long()).softmax(1)
    return pairs.softmax(1).gather(1, ids.long())


@pytest.mark.parametrize("renormalize", [True, False])
@every_dtype
@pytest.mark.parametrize(
    ("tokens", "size", "top_k"), [(1, 1, 1), (1000, 32, 8), (513, 100, 16), (300, 256, 64)]
)
def test_product_keys(tokens, size, top_k, dtype, renormalize, guarded):
    logits = guarded.copy_of((2 * torch.randn(tokens, 2, size, device=CUDA)).to(dtype))
    leaf = logits.detach().requires_grad_()
    scores, ids = product_key_routing(leaf, top_k, renormalize=renormalize)
    low, expected_ids, _ = product_key_twin.product_key_reference(logits, top_k, renormalize)
    assert torch.equal(ids, expected_ids)
    exact = weights_of_keys(logits.double(), ids, renormalize)
    assert_close(scores, exact, low, ulps=16.0, magnitude=0.01, name="scores")
    dscores = torch.randn_like(scores)
    scores.backward(dscores)
    twins = [
        product_key_twin.product_key_grad_reference(dscores.to(s.dtype), v, s, ids, renormalize)
        for v, s in ((logits.double(), exact), (logits, low))
    ]
    zero = {"allow_zero_reference": size == 1}
    magnitude = 0.1 if dtype is torch.float32 else 1e-4
    assert_close(leaf.grad, *twins, ulps=32.0, magnitude=magnitude, name="dlogits", **zero)


# ----------------------------------------------------------------- launches, graphs, compile


SHAPES = [(32768, 128, 8), (24576, 128, 8), (16384, 256, 8), (16384, 512, 10), (8192, 128, 4)]


@pytest.mark.parametrize(("tokens", "experts", "top_k"), SHAPES)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_launches(tokens, experts, top_k, score):
    """Scores, top-k, plan and losses in four launches, their gradient in two."""
    logits = torch.randn(tokens, experts, device=CUDA).bfloat16().requires_grad_()
    bias = torch.zeros(experts, device=CUDA) if score == "sigmoid" else None

    def forward():
        return route(logits, top_k, score=score, bias=bias, num_experts=experts)

    assert len(kernels_of(forward)) <= 4, kernels_of(forward)
    out = forward()
    outputs = out.scores, out.switch, out.z
    grads = [torch.randn_like(output) for output in outputs]

    def backward():
        torch.autograd.grad(outputs, logits, grads, retain_graph=True)

    assert len(kernels_of(backward)) <= 2, kernels_of(backward)


def test_launches_of_sequences_without_their_loss():
    """Sequences that no tile divides take the launches of flat tokens where nobody asks for their
    loss."""
    losses = {"switch": 0.01, "z": 1e-3}
    options = {"losses": losses, "device": CUDA, "dtype": torch.bfloat16}
    router = SoftmaxRouter(128, 32, 4, **options)
    x = torch.randn(4, 2047, 128, device=CUDA).bfloat16()
    flat = x.flatten(0, 1)
    assert kernels_of(lambda: router(x)) == kernels_of(lambda: router(flat))
    ours, theirs = router(x), router(flat)
    for name in losses:
        assert ours.losses[name] > 0 and torch.equal(ours.losses[name], theirs.losses[name])
    assert torch.equal(ours.plan.row_by_slot, theirs.plan.row_by_slot)
    assert len(kernels_of(lambda: route(ours.logits, 4, num_experts=32))) <= 4


def routers():
    options = {"device": CUDA, "dtype": torch.bfloat16}
    losses = {"switch": 0.01, "sequence": 0.01, "global_batch": 0.01, "z": 1e-3}
    deepseek = {"scale": 2.5, "num_groups": 4, "topk_groups": 2, "float32_logits": True}
    yield SoftmaxRouter(128, 32, 4, losses=losses, **options)
    yield SigmoidRouter(128, 32, 4, losses=losses, **deepseek, **options)
    yield TopKRouter(128, 32, 6, num_identity=4, num_null=4, losses=losses, **options)
    yield TopKRouter(128, 32, 4, capacity_factor=1.0, capacity_drop="score", **options)
    yield ProductKeyRouter(128, 64, 4, losses={"switch": 0.01, "z": 1e-3}, **options)


every_router = pytest.mark.parametrize("index", range(5))


def layer_with(index: int) -> MoE:
    torch.manual_seed(index)
    router = list(routers())[index]
    shared = SharedExperts(128, 64, gated=True, device=CUDA, dtype=torch.bfloat16)
    sizes = (router.num_experts, router.top_k, 128, 64)
    layer = MoE(*sizes, "swiglu", False, 0.05, router=router, shared_experts=shared)
    return layer.to(CUDA, torch.bfloat16)


def layer_step(layer, x, backend):
    """Loss, output and every gradient by name."""
    layer.zero_grad()
    update_balance(layer, rate=0.0)
    leaf = x.detach().requires_grad_()
    out, loss = layer(leaf, backend)
    (out.double().square().sum() + loss).backward()
    grads = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    return {"loss": loss.detach(), "out": out.detach(), "x": leaf.grad} | grads


class Winners:
    """What a router chooses and keeps, of which its copy in float64 takes the same: there near ties
    fall differently."""

    def __init__(self, monkeypatch):
        monkeypatch.setattr(topk_module, "route", self.route)
        monkeypatch.setattr(topk_module, "limit_capacity", self.limit)
        monkeypatch.setattr(product_key_module, "product_key_routing", self.product_keys)

    def route(self, logits, top_k, **options):
        if logits.dtype == torch.float64:
            return route(logits, top_k, **options | {"ids": self.ids})
        tensors = route(logits, top_k, **options)
        self.ids = tensors.ids.cpu()
        return tensors

    def limit(self, ids, scores, *sizes, drop):
        if scores.dtype == torch.float64:
            return self.kept
        kept = limit_capacity(ids, scores, *sizes, drop=drop)
        self.kept = kept.cpu()
        return kept

    def product_keys(self, logits, top_k, *, renormalize):
        if logits.dtype == torch.float64:
            return weights_of_keys(logits, self.ids, renormalize), self.ids
        scores, ids = product_key_routing(logits, top_k, renormalize=renormalize)
        self.ids = ids.cpu()
        return scores, ids


def layer_references(layer, x):
    """:func:`layer_step` in float64 on the CPU, and in bfloat16 in torch with the kernels' rounding
    points, both with the same winners."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        Winners(monkeypatch)
        exact = copy.deepcopy(layer).to("cpu", torch.float64)
        low = layer_step(layer, x, KernelBackendMoE.torch)
        return layer_step(exact, x.cpu().double(), KernelBackendMoE.torch), low


@every_router
def test_layer_against_the_reference(index):
    """The same module by kernels and by torch: output, loss, and every gradient."""
    layer = layer_with(index)
    x = torch.randn(2, 256, 128, device=CUDA).bfloat16()
    actual = layer_step(layer, x, KernelBackendMoE.sonicmoe)
    exact, low = layer_references(layer, x)
    torch.testing.assert_close(actual.pop("loss"), low["loss"])
    assert low["loss"] > 0 or index == 3, "that router has no losses"
    for name, tensor in actual.items():
        assert_close(tensor, exact[name], low[name], name=name)


@every_router
def test_layer_does_not_synchronize_and_repeats_bitwise(index):
    layer = layer_with(index)
    x = torch.randn(512, 128, device=CUDA).bfloat16()
    results = []
    for _ in range(3):
        layer.zero_grad()
        with no_synchronization():
            update_balance(layer, rate=0.0)
            out, loss = layer(x)
            (out.float().sum() + loss).backward()
            numbers = layer.router(x).statistics
            _ = numbers.max_violation, numbers.load_entropy, numbers.idle_experts, numbers.dropped
        results.append([out, loss, *(p.grad.clone() for p in layer.parameters())])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert results[0][0].any()
    for (name, _), gradient in zip(layer.named_parameters(), results[0][2:], strict=True):
        assert gradient.any(), name


def test_graph_capture_leaves_the_bias_alone_and_replays_count():
    layer = layer_with(1)
    router = layer.router
    router.correction_bias.uniform_(-0.01, 0.01)
    before = router.correction_bias.clone()
    x = torch.randn(512, 128, device=CUDA).bfloat16()

    def step():
        out, loss = layer(x)
        (out.float().sum() + loss).backward()
        return out

    def captured_step():
        out = step()
        with pytest.raises(NotImplementedError, match="captured"):
            update_balance(layer)
        return out

    eager = warm_up(step, times=3).clone()
    update_balance(layer, rate=0.0)
    layer.zero_grad(set_to_none=False)
    graph, out = record(captured_step)
    assert torch.equal(router.correction_bias, before) and not router.step_load.any()
    for replay in range(1, 4):
        graph.replay()
        assert router.step_load.sum() == 512 * router.top_k * replay
    assert torch.equal(router.correction_bias, before)
    assert torch.equal(out, eager)
    load = router.step_load.clone()
    update_balance(layer, rate=0.25)
    expected = before + 0.25 * torch.sign(load.double().mean() - load).float()
    assert torch.equal(router.correction_bias, expected)
    graph.replay()
    assert not torch.equal(out, eager), "a replay reads the bias as it is now"


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "in turn"])
def test_compiled_passes_in_a_checkpoint_count_once(at_once, reentrant, mode):
    """And have the gradient of passes without a checkpoint, in several steps of three
    micro-batches: all forward passes and then all backward ones, or each by itself."""
    torch._dynamo.reset()
    losses = {"switch": 0.5, "global_batch": 1.0}
    router = SigmoidRouter(128, 32, 4, losses=losses, std=0.5, device=CUDA)
    compiled = torch.compile(lambda x: router(x).aux_loss, mode=mode, fullgraph=True)
    batches = [torch.randn(96, 128, device=CUDA) + 0.1 * i for i in range(3)]

    def step(run):
        router.zero_grad()
        router.reset_counts()
        if mode == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        losses = []
        for x in batches:
            # Of a graph's memory, which the next replay writes.
            losses.append(run(x.sin().requires_grad_()).clone())
            if not at_once:
                losses.pop().backward()
        for loss in losses:
            loss.backward()
        return router.weight.grad, router.step_load.clone(), router.batch_load.clone()

    plain = step(lambda x: router(x).aux_loss)
    assert plain[0].any() and plain[1].sum() == 4 * 288 and plain[2][-1] == 288
    for _ in range(4):
        again = step(lambda x: checkpoint(compiled, x, use_reentrant=reentrant))
        for ours, theirs in zip(again[1:], plain[1:], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        torch.testing.assert_close(again[0], plain[0], rtol=1e-3, atol=1e-5)


@every_router
def test_layer_under_compile(index):
    layer = layer_with(index)
    layer.eval()
    x = torch.randn(2, 64, 128, device=CUDA).bfloat16()
    compiled = torch.compile(layer, fullgraph=True)
    out, loss = compiled(x)
    _, expected_loss = layer(x)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-3, atol=1e-5)
    # Not the same bits: what is fused rounds elsewhere.
    exact, low = layer_references(layer, x)
    assert_close(out, exact["out"], low["out"], name="out")
