"""Losses, correction bias, capacity and statistics, each against its formula written out."""

import functools
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from sonic import KernelBackendMoE, MoE
from sonic.nn.routers import LossWeights, SigmoidRouter, SoftmaxRouter, TopKRouter, update_balance
from sonic.plan import build_plan
from sonic.reference import load_balancing_loss
from sonic.routing import balancing
from sonic.routing.balancing import RoutingStatistics, capacity_of, limit_capacity
from sonic.routing.counts import EarlierLoads
from sonic.routing.route import route
from sonic.runtime.errors import ArgumentError

H, E, K = 16, 8, 2


def one_hot_load(ids, num_columns):
    return torch.nn.functional.one_hot(ids.long(), num_columns).sum(dim=(0, 1)).float()


def test_switch_loss_is_the_one_of_the_layer_without_a_router():
    logits = torch.randn(50, E)
    out = route(logits, K)
    torch.testing.assert_close(out.switch, load_balancing_loss(logits, out.load[0]))


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_sequence_loss(score):
    """Shares of the scores, as in DeepSeek-V2: also for scores that do not sum to one."""
    logits = torch.randn(3 * 20, E)
    out = route(logits, K, score=score, num_sequences=3)
    function = {
        "softmax": lambda v: v.softmax(-1),
        "sigmoid": torch.sigmoid,
        "sqrt_softplus": lambda v: torch.nn.functional.softplus(v).sqrt(),
    }[score]
    losses = []
    for values, ids in zip(logits.split(20), out.ids.split(20), strict=True):
        share = function(values)
        share = share / share.sum(-1, keepdim=True)
        fraction = E / (K * 20) * one_hot_load(ids, E)
        losses.append((fraction * share.mean(0)).sum())
    torch.testing.assert_close(out.sequence, torch.stack(losses).mean())
    assert not torch.allclose(out.sequence, out.switch)
    one = route(logits, K, score=score)
    torch.testing.assert_close(one.sequence, one.switch)


def test_sequences_come_from_the_shape():
    router = SoftmaxRouter(H, E, K, std=0.5, losses={"sequence": 1.0})
    x = torch.randn(4, 10, H)
    by_sequence = [router(part).losses["switch"] for part in x]
    out = router(x)
    torch.testing.assert_close(out.losses["sequence"], torch.stack(by_sequence).mean())
    torch.testing.assert_close(router(x.view(40, H)).losses["sequence"], out.losses["switch"])


def test_without_a_sequence_loss_sequences_are_so_many_tokens(monkeypatch):
    """A pass by sequences costs more, and one of 2047 tokens each would leave the fused kernels."""
    passes = []

    def watched(logits, top_k, **options):
        passes.append(options["num_sequences"])
        return route(logits, top_k, **options)

    monkeypatch.setattr("sonic.nn.routers.topk.route", watched)
    x = torch.randn(3, 7, H)
    for losses, expected in (({"switch": 1.0, "global_batch": 0.5}, 1), ({"sequence": 1.0}, 3)):
        router = SoftmaxRouter(H, E, K, losses=losses, std=0.5)
        outputs, gradients = [], []
        for tokens in (x, x.flatten(0, 1)):
            update_balance(router)
            outputs.append(router(tokens))
            (gradient,) = torch.autograd.grad(outputs[-1].aux_loss, router.weight)
            gradients.append(gradient)
        assert passes == [expected, 1]
        passes.clear()
        ours, flat = outputs
        assert ("sequence" in ours.losses) == (expected > 1)
        assert torch.equal(ours.statistics.load, flat.statistics.load)
        assert ours.statistics.load.shape == (E,)
        assert torch.equal(ours.topk_weights, flat.topk_weights) and gradients[1].any()
        if expected == 1:
            assert torch.equal(ours.aux_loss, flat.aux_loss) and torch.equal(*gradients)
        else:
            assert not torch.equal(ours.aux_loss, flat.aux_loss)


def test_z_loss_and_entropy():
    logits = 3 * torch.randn(40, E)
    out = route(logits, K, score="sigmoid")
    torch.testing.assert_close(out.z, logits.logsumexp(-1).square().mean())
    share = torch.sigmoid(logits)
    share = share / share.sum(-1, keepdim=True)
    torch.testing.assert_close(out.entropy, -(share * share.log()).sum(-1).mean())


def test_an_even_load_has_loss_one():
    logits = torch.zeros(E, E)
    ids = torch.stack([torch.arange(E), (torch.arange(E) + 1) % E], dim=1)
    out = route(logits, K, ids=ids, num_sequences=1)
    for loss in (out.switch, out.sequence):
        torch.testing.assert_close(loss, torch.ones(()))
    assert out.entropy.item() == pytest.approx(math.log(E), rel=1e-6)


def test_weights_of_the_losses():
    router = SoftmaxRouter(H, E, K, losses=LossWeights(switch=0.5, sequence=1.0, z=0.25))
    out = router(torch.randn(2, 6, H))
    named = out.losses
    expected = 0.5 * named["switch"] + named["sequence"] + 0.25 * named["z"]
    torch.testing.assert_close(out.aux_loss, expected)
    assert SoftmaxRouter(H, E, K)(torch.randn(3, H)).aux_loss == 0
    assert router(torch.randn(3, H), balance=False).aux_loss is None


# ------------------------------------------------------------------------ global-batch loss


def test_global_batch_loss_of_micro_batches():
    """The loads of all micro-batches so far, the probabilities of this one."""
    router = SoftmaxRouter(H, E, K, losses={"global_batch": 1.0}, std=0.5)
    load, tokens = torch.zeros(E), 0
    for size in (5, 9, 2):
        x = torch.randn(size, H)
        out = router(x)
        load, tokens = load + one_hot_load(out.topk_ids, E), tokens + size
        prob = (x @ router.weight.T).softmax(-1).mean(0)
        torch.testing.assert_close(out.aux_loss, E * (load / (K * tokens) * prob).sum())
    update_balance(router)
    out = router(x)
    torch.testing.assert_close(out.aux_loss, out.losses["switch"])
    router.eval()
    router(torch.randn(30, H))
    assert router.batch_load[-1] == 2


def test_global_batch_loss_has_the_gradient_of_its_formula():
    logits = torch.randn(12, E, dtype=torch.float64, requires_grad=True)
    earlier = torch.randint(0, 9, (E + 1,))
    out = route(logits, K)
    loss = balancing.global_batch_loss(out, top_k=K, earlier_load=earlier)
    load = out.load[0] + earlier[:E]
    tokens = 12 + earlier[E]
    expected = E / (K * tokens) * (load * logits.softmax(-1).mean(0)).sum()
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)]
    assert grads[1].any()
    torch.testing.assert_close(*grads)


def gradient_of_a_schedule(schedule, repeat, same=False):
    """Gradient of the router after ``schedule``: small letters run forwards, capitals backwards.

    ``repeat`` is what runs the forward pass, ``same`` makes two of the micro-batches equal.
    """
    torch.manual_seed(4)
    router = SoftmaxRouter(H, E, K, losses={"global_batch": 1.0}, std=0.5).double()
    sizes = {"a": 3, "b": 7, "c": 7, "d": 5}
    batches = {name: torch.randn(size, H).double() for name, size in sizes.items()}
    if same:
        batches["c"] = batches["b"].clone()
    losses = {}
    for name in schedule:
        if name in batches:
            x = batches[name].requires_grad_()
            losses[name] = repeat(lambda x: router(x.sin()).aux_loss, x)
        else:
            losses[name.lower()].backward()
    assert router.batch_load[-1] == sum(sizes.values())
    return router.weight.grad


SCHEDULES = ["abcdABCD", "abcdDCBA", "abcdCADB", "abAcBdCD", "aAbBcCdD"]
REPEATS = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "not": functools.partial(checkpoint, use_reentrant=False),
    "nested": lambda f, x: checkpoint(
        lambda y: checkpoint(f, y, use_reentrant=True), x, use_reentrant=True
    ),
    "mixed": lambda f, x: checkpoint(
        lambda y: checkpoint(f, y, use_reentrant=False), x, use_reentrant=True
    ),
    "policy": functools.partial(
        checkpoint,
        use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts([torch.ops.aten.mm.default]),
    ),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("repeat", REPEATS.values(), ids=REPEATS)
@pytest.mark.parametrize("same", [False, True], ids=["", "same"])
def test_checkpointing_keeps_the_gradient_of_a_schedule(schedule, repeat, same):
    """A repeated pass has the loads of its first run, not those of the passes since."""
    plain = gradient_of_a_schedule(schedule, lambda f, x: f(x), same)
    assert plain.any()
    torch.testing.assert_close(gradient_of_a_schedule(schedule, repeat, same), plain)


def test_a_second_backward_finds_the_same_loads():
    """With a retained graph a pass is repeated once for each backward."""
    router = SoftmaxRouter(H, E, K, losses={"global_batch": 1.0}, std=0.5).double()
    batches = [torch.randn(size, H).double().requires_grad_() for size in (3, 7)]
    grads = []
    for reentrant in (None, True, False):
        router.reset_counts()
        loss = 0
        for x in batches:
            run = lambda x: router(x.sin()).aux_loss  # noqa: E731
            loss = loss + (
                run(x) if reentrant is None else checkpoint(run, x, use_reentrant=reentrant)
            )
        loss.backward(retain_graph=True)
        loss.backward()
        grads.append(router.weight.grad.clone())
        router.zero_grad()
    assert grads[0].any()
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


def compiled_in_a_checkpoint(function, x, *, use_reentrant, backend="aot_eager"):
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    return checkpoint(compiled, x, use_reentrant=use_reentrant)


def checkpoint_in_a_graph(function, x, *, backend):
    repeated = functools.partial(checkpoint, function, use_reentrant=False)
    return torch.compile(lambda x: repeated(x), backend=backend, fullgraph=True)(x)


COMPILED = {
    "reentrant": functools.partial(compiled_in_a_checkpoint, use_reentrant=True),
    "not": functools.partial(compiled_in_a_checkpoint, use_reentrant=False),
    "not-eager": functools.partial(compiled_in_a_checkpoint, use_reentrant=False, backend="eager"),
    "inside": functools.partial(checkpoint_in_a_graph, backend="aot_eager"),
    "inside-partition": functools.partial(
        checkpoint_in_a_graph, backend="aot_eager_decomp_partition"
    ),
    "inside-eager": functools.partial(checkpoint_in_a_graph, backend="eager"),
}


@pytest.mark.parametrize("schedule", ["abcdABCD", "abAcBdCD", "aAbBcCdD"])
@pytest.mark.parametrize("repeat", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("same", [False, True], ids=["", "same"])
def test_checkpointing_of_compiled_passes_keeps_the_gradient(schedule, repeat, same):
    """What is traced runs in both passes, and asks in each which one it is."""
    torch._dynamo.reset()
    plain = gradient_of_a_schedule(schedule, lambda f, x: f(x), same)
    assert plain.any()
    torch.testing.assert_close(gradient_of_a_schedule(schedule, repeat, same), plain)


@pytest.mark.parametrize("repeat", COMPILED.values(), ids=COMPILED)
def test_checkpointing_of_compiled_passes_counts_once(repeat):
    torch._dynamo.reset()
    router = SigmoidRouter(H, E, K, losses={"global_batch": 1.0}, std=0.5)
    load = torch.zeros(E)
    for size in (4, 4, 9):
        x = torch.randn(size, H, requires_grad=True)
        load += one_hot_load(router.eval()(x.sin()).topk_ids, E)
        router.train()
        repeat(lambda x: router(x.sin()).aux_loss, x).backward()
        assert torch.equal(router.step_load.float(), load)
        assert torch.equal(router.batch_load[:-1].float(), load)


def test_passes_are_kept_for_a_step_and_in_bounds():
    """Those without a graph; the counts' new start forgets them, and what they lie in stays."""
    router = SoftmaxRouter(H, E, K, losses={"global_batch": 1.0}, std=0.5)
    router(torch.randn(3, H))
    kept = router._earlier_loads
    place = kept.table.data_ptr()
    assert kept.num_kept == 0 and len(kept.table) == 256
    with torch.no_grad():
        for _ in range(258):
            router(torch.randn(1, H))
    assert kept.num_kept == 258 and kept.table.shape == (256, 2 * E + 2)
    tokens = kept.table[:, -2]
    assert tokens.tolist() == [3 + 256, 3 + 257, *range(3 + 2, 3 + 256)]
    update_balance(router)
    assert kept.num_kept == 0
    with torch.no_grad():
        router(torch.randn(1, H))
    assert kept.num_kept == 1
    router.reset_counts()
    assert kept.num_kept == 0 and not router.batch_load.any()
    assert kept.table.data_ptr() == place and router.bfloat16()._earlier_loads.table.numel()
    assert len(EarlierLoads(torch.zeros(65537, dtype=torch.int64)).table) == 32


def test_forgotten_passes_are_not_found():
    """What the table still holds of an earlier step is not what a repetition takes."""
    router = SoftmaxRouter(H, E, K, losses={"global_batch": 1.0}, std=0.5).double()
    x = torch.randn(5, H).double()
    grads = []
    for earlier, repeat in ((0, True), (3, True), (3, False)):
        router.reset_counts()
        router.batch_load.copy_(torch.arange(E + 1) * earlier)
        leaf = x.clone().requires_grad_()
        run = lambda x: router(x).aux_loss  # noqa: E731
        (checkpoint(run, leaf, use_reentrant=True) if repeat else run(leaf)).backward()
        grads.append(leaf.grad)
    first, again, plain = grads
    assert not torch.allclose(first, plain)
    torch.testing.assert_close(again, plain)


# -------------------------------------------------------------------------- correction bias


def test_bias_moves_against_the_load_by_one_step():
    router = SigmoidRouter(H, E, K, std=0.5)
    loads = torch.zeros(E)
    for _ in range(3):
        loads += one_hot_load(router(torch.randn(20, H)).topk_ids, E)
    assert not router.correction_bias.any()
    update_balance(router, rate=0.125)
    assert torch.equal(router.correction_bias, 0.125 * torch.sign(loads.mean() - loads))
    assert router.correction_bias.any() and not router.step_load.any()
    before = router.correction_bias.clone()
    update_balance(router, rate=0.125)
    assert torch.equal(router.correction_bias, before), "no load, no step"


def test_bias_evens_a_skewed_load_out():
    torch.manual_seed(0)
    router = SigmoidRouter(H, E, K, std=0.1)
    router.weight.data[0, 0] += 1.0
    x = torch.randn(500, H)
    x[:, 0] = 1.0
    first = router(x).statistics.max_violation
    for _ in range(300):
        update_balance(router, rate=0.01)
        last = router(x).statistics.max_violation
    assert first > 1.5 and last < 0.3


def test_forward_alone_never_moves_the_bias():
    router = SigmoidRouter(H, E, K)
    router.correction_bias.uniform_(-0.1, 0.1)
    before = router.correction_bias.clone()
    router(torch.randn(10, H)).topk_weights.sum().backward()
    router.eval()
    counted = router.step_load.clone()
    router(torch.randn(10, H))
    assert torch.equal(router.step_load, counted) and counted.sum() == 20
    with torch.no_grad():
        router(torch.randn(10, H), balance=False)
    assert torch.equal(router.correction_bias, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_once(reentrant):
    """The repeated forward sees the same bias and loss, and adds nothing to the counts."""
    torch.manual_seed(2)
    losses = {"switch": 0.5, "global_batch": 1.0}
    router = SigmoidRouter(H, E, K, losses=losses, std=0.5)
    layer = MoE(E, K, H, 8, "swiglu", False, 0.3, router=router)
    x = torch.randn(12, H, requires_grad=True)
    results = []
    for use in (False, True):
        router.step_load.zero_()
        router.batch_load.zero_()
        total = 0
        for part in x.split(4):
            inputs = (part, KernelBackendMoE.torch)
            out, loss = (
                checkpoint(layer, *inputs, use_reentrant=reentrant) if use else layer(*inputs)
            )
            # Each backward before the next forward, as training with micro-batches does.
            (out.sin().sum() + loss).backward(retain_graph=True)
            total = total + loss.detach()
        grads = [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
        results.append((router.step_load.clone(), router.batch_load.clone(), total, *grads))
    assert results[0][0].sum() == 24 and results[0][1][-1] == 12
    for plain, repeated in zip(*results, strict=True):
        torch.testing.assert_close(repeated, plain)


def test_update_reaches_every_router_of_a_model():
    model = torch.nn.ModuleList([SigmoidRouter(H, E, K), SoftmaxRouter(H, E, K)])
    model.append(SigmoidRouter(H, 12, 3, losses={"global_batch": 1.0}))
    x = torch.randn(40, H)
    expected = []
    for router in model:
        load = one_hot_load(router(x).topk_ids, router.num_columns)
        expected.append(0.5 * torch.sign(load.mean() - load))
    update_balance(model, rate=0.5)
    assert torch.equal(model[0].correction_bias, expected[0])
    assert model[1].correction_bias is None
    assert torch.equal(model[2].correction_bias, expected[2])
    assert not model[2].batch_load.any()


def test_update_refuses_a_capture(monkeypatch):
    router = SigmoidRouter(H, E, K)

    class Captured:
        is_cuda = True

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(NotImplementedError, match="between replays"):
        balancing.refuse_capture("update_balance", Captured())
    update_balance(router)


# --------------------------------------------------------------------------------- capacity


def test_update_refuses_rates_and_what_is_no_module():
    router = SigmoidRouter(H, E, K)
    for rate in (float("nan"), float("inf"), -1e-3, "1e-3", None, True):
        with pytest.raises(ArgumentError, match="update_balance: rate=.*Allowed: a finite number"):
            update_balance(router, rate)
    with pytest.raises(ArgumentError, match="module is of type list.*Allowed: .*Pass the model"):
        update_balance([router])


@pytest.mark.parametrize("drop", ["position", "score"])
@pytest.mark.parametrize("capacity", [0, 1, 5, 1000])
def test_capacity(capacity, drop):
    ids = torch.randint(-1, E + 3, (60, K), dtype=torch.int32)
    scores = torch.rand(60, K)
    scores[::3] = 0.5
    limited = limit_capacity(ids, scores, E, capacity, drop=drop)
    flat, flat_scores, expected = ids.flatten(), scores.flatten(), ids.flatten().clone()
    for expert in range(E):
        slots = (flat == expert).nonzero().flatten()
        if drop == "score":
            order = torch.sort(flat_scores[slots], descending=True, stable=True).indices
            slots = slots[order]
        expected[slots[capacity:]] = -1
    assert torch.equal(limited.flatten(), expected)
    assert limited.dtype == torch.int32 and limited.shape == ids.shape


def test_capacity_of_a_factor():
    assert capacity_of(1000, 2, 8, 1.0) == 250
    assert capacity_of(1001, 2, 8, 1.0) == 251
    assert capacity_of(0, 2, 8, 1.0) == 1
    assert capacity_of(1000, 2, 8, 1e-9) == 1, "rounded up"
    assert capacity_of(200, 2, 8, 1.1) == 55, "not 55.00000000000001, rounded up"
    assert capacity_of(201, 2, 8, 1.1) == 56
    assert capacity_of(10**6, 1, 1, 1e-6) == 1 and capacity_of(2000001, 1, 1, 1e-6) == 3
    assert capacity_of(7, 2, 8, 65536) == 114688
    with pytest.raises(ArgumentError, match="factor=0.*Allowed: .*Pass a factor"):
        capacity_of(8, 1, 8, 0)
    with pytest.raises(ArgumentError, match="drop='random'"):
        limit_capacity(torch.zeros(1, 1).int(), torch.ones(1, 1), 1, 1, drop="random")


@pytest.mark.parametrize("drop", ["position", "score"])
def test_router_with_a_capacity(drop):
    router = TopKRouter(H, E, K, capacity_factor=0.75, capacity_drop=drop, std=1.0)
    x = torch.randn(80, H)
    out = router(x)
    limit = capacity_of(80, K, E, 0.75)
    frequency = out.plan.expert_frequency()
    assert frequency.max() == limit and (out.topk_ids == -1).any()
    assert out.statistics.load.max() > limit, "statistics are of the choice, before the limit"
    dropped = (out.topk_ids < 0).float().mean()
    torch.testing.assert_close(out.statistics.dropped, dropped)
    layer = MoE(E, K, H, 8, "swiglu", False, 0.3, router=router)
    result, _ = layer(x, KernelBackendMoE.torch)
    silent = (out.topk_ids < 0).all(dim=1)
    assert not result[silent].any() and result[~silent].any(dim=1).all()
    router.eval()
    assert (router(x).topk_ids >= 0).all()
    router.eval_capacity_factor = 0.5
    assert router(x).plan.expert_frequency().max() == capacity_of(80, K, E, 0.5)
    with pytest.raises(ArgumentError, match="capacity_factor=-1.*Allowed: .*Pass a factor"):
        router.capacity_factor = -1
    assert (router.capacity_factor, router.eval_capacity_factor) == (0.75, 0.5)


# -------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("shape", [(12, 16), (1, 12, 16), (3, 4, 16)], ids=str)
def test_load_is_int32_of_any_number_of_sequences(shape):
    load = TopKRouter(16, 6, 2)(torch.randn(shape)).statistics.load
    assert load.dtype == torch.int32 and load.shape == (6,) and load.sum() == 24


def test_statistics():
    load = torch.tensor([6, 0, 2, 0, 9], dtype=torch.int32)
    plan = build_plan(torch.tensor([[0, 2], [0, 7], [0, -1]]), 4, impl="torch")
    numbers = RoutingStatistics(load, torch.ones(()), 4, plan)
    assert numbers.max_violation.item() == 2.0
    assert numbers.idle_experts.item() == 2
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert numbers.load_entropy.item() == pytest.approx(expected, rel=1e-6)
    assert numbers.dropped.item() == pytest.approx(2 / 6)
    nothing = RoutingStatistics(torch.zeros(4, dtype=torch.int32), None, 4, None)
    assert nothing.max_violation == 0 and nothing.load_entropy == 0 and nothing.dropped is None
