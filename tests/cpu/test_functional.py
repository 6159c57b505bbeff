"""The public functions on the reference, against the oracle written from the equations."""

import copy
import inspect
from functools import partial

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import sonic
from sonic.enums import ActivationType, GateUpLayout, ScoreOrder
from sonic.reference import (
    experts_flat_reference,
    experts_low_precision,
    grouped_mm_reference,
    moe_reference,
    stages,
)
from sonic.runtime.errors import ArgumentError, UnsupportedError
from sonic.testing import (
    assert_close,
    assert_layer_close,
    assert_mutations_fail,
    layer_references,
    make_inputs,
    random_problem,
    run_layer,
)

T, H, I, E, K = 7, 8, 6, 4, 2  # noqa: E741 (the names of sizes throughout)
IDS = torch.tensor([[0, 1], [2, 4], [-1, 99], [1, 1], [2, 0], [0, 2], [1, 0]])  # 3 stays empty
CASES = [
    pytest.param(activation, layout, id=f"{activation.value}-{layout.value}")
    for activation in ActivationType
    for layout in (GateUpLayout if activation.is_gated else [GateUpLayout.INTERLEAVED])
]
NAMES = ("hidden_states", "topk_weights", "w1", "w2", "b1", "b2")


def make_tensors(dtype=torch.float32, activation=ActivationType.SWIGLU, tokens=T, bias=True):
    """Leaves by name, unit-scaled."""
    width = 2 * I if activation.is_gated else I
    sizes = {"hidden_states": (tokens, H), "w1": (E, width, H), "w2": (E, H, I)}
    if bias:
        sizes |= {"b1": (E, width), "b2": (E, H)}
    tensors = {name: torch.randn(size, dtype=dtype) for name, size in sizes.items()}
    tensors["topk_weights"] = torch.rand(tokens, K)
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def call(tensors, ids=IDS, **options):
    return sonic.experts(topk_ids=ids, **tensors, **options)


def gradients(out, tensors, dout=None, names=NAMES):
    wanted = [tensors[name] for name in names if name in tensors]
    return torch.autograd.grad(out, wanted, torch.ones_like(out) if dout is None else dout)


def assert_same_bits(first, second):
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and a.any()


# ---------------------------------------------------------------------- against the oracle


@pytest.mark.parametrize(("activation", "layout"), CASES)
def test_experts_equals_the_oracle_in_float64(activation, layout):
    problem = random_problem(3).with_changes(
        num_tokens=9,
        hidden_size=8,
        intermediate_size=11,  # the reference takes any size
        num_experts=5,
        top_k=3,
        activation=activation,
        layout=layout,
        has_bias=True,
        drop_fraction=0.2,
        ids_dtype=torch.int64,
        contiguous=False,
    )
    inputs = make_inputs(problem).to(torch.float64)

    def experts(x, ids, weights, w1, w2, b1, b2, activation, layout):
        options = {"b1": b1, "b2": b2, "activation": activation.value, "layout": layout.value}
        return sonic.experts(x, ids, weights, w1, w2, **options)

    actual = run_layer(experts, problem, inputs)
    expected, _ = layer_references(problem, inputs)
    for name, value in vars(expected).items():
        assert value.any(), name
        torch.testing.assert_close(getattr(actual, name), value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("seed", range(8))
def test_experts_is_as_exact_as_its_rounding_points_allow(seed):
    problem = random_problem(seed, max_tokens=70, max_hidden_size=64, max_intermediate_size=64)
    inputs = make_inputs(problem)

    def experts(x, ids, weights, w1, w2, b1, b2, activation, layout):
        options = {"activation": activation, "layout": layout, "impl": "reference"}
        return sonic.experts(x, ids, weights, w1, w2, b1=b1, b2=b2, **options)

    actual = run_layer(experts, problem, inputs)
    assert_layer_close(actual, *layer_references(problem, inputs), problem)


def test_the_comparison_would_notice_a_wrong_result():
    tensors = make_tensors(torch.float64)
    expected = call(tensors)
    assert_mutations_fail(lambda t: torch.testing.assert_close(t, expected), expected.detach())
    for name, mutate in {
        "topk_weights": torch.ones_like,
        "w1": lambda t: t.flip(0),
        "b2": torch.zeros_like,
    }.items():
        wrong = call(tensors | {name: mutate(tensors[name])})
        assert not torch.allclose(wrong, expected), name


def test_experts_flat_takes_pairs_in_any_order():
    tensors = make_tensors(torch.float64)
    del tensors["topk_weights"]
    tokens = torch.tensor([5, 0, 0, 3, 3, 3, 1, 7, 2, 4, -1, 5, 2])  # token 6 has no slot
    experts = torch.tensor([0, 1, 1, 2, 9, 0, 2, 1, -1, 0, 1, 2, 0])
    weights = torch.rand(13, dtype=torch.float64, requires_grad=True)
    out = sonic.experts_flat(tensors["hidden_states"], tokens, experts, weights, **rest(tensors))
    x, others = tensors["hidden_states"], rest(tensors)
    expected = experts_flat_reference(x, tokens, experts, weights, **others)
    torch.testing.assert_close(out, expected)
    assert not out[6].any() and out[2].any()
    leaves = [x, weights, *others.values()]
    dout = torch.randn_like(out)
    actual = torch.autograd.grad(out, leaves, dout)
    for a, b in zip(actual, torch.autograd.grad(expected, leaves, dout), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(
        actual[1] == 0, (tokens < 0) | (tokens >= T) | (experts < 0) | (experts >= E)
    )


def rest(tensors):
    return {name: tensors[name] for name in ("w1", "w2", "b1", "b2") if name in tensors}


def test_flat_and_topk_agree():
    tensors = make_tensors()
    x, weights = tensors["hidden_states"], tensors["topk_weights"]
    tokens = torch.arange(T).repeat_interleave(K)
    flat = sonic.experts_flat(x, tokens, IDS.flatten(), weights.flatten(), **rest(tensors))
    assert_same_bits([flat], [call(tensors)])


@pytest.mark.parametrize("order", list(ScoreOrder))
def test_moe_equals_the_oracle(order):
    tensors = make_tensors(torch.float64)
    x = tensors.pop("hidden_states")
    del tensors["topk_weights"]
    router = torch.randn(E, H, dtype=torch.float64, requires_grad=True)
    options = {"top_k": K, "score_order": order}
    actual = sonic.moe(x, router, **tensors, **options)
    expected = moe_reference(x, router, **tensors, **options)
    leaves = [x, router, *tensors.values()]
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert actual[2].dtype == torch.int32 and actual[2].sum() == T * K
    losses = [(out.sin().sum() + logits.square().sum()) for out, logits, _ in (actual, expected)]
    pairs = zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True)
    for a, b in pairs:
        assert b.any()
        torch.testing.assert_close(a, b)


def test_moe_keeps_a_float32_router_float32():
    tensors = make_tensors(torch.bfloat16)
    del tensors["topk_weights"]
    router = torch.randn(E, H, requires_grad=True)
    out, logits, _ = sonic.moe(router_weight=router, top_k=K, **tensors)
    assert (out.dtype, logits.dtype) == (torch.bfloat16, torch.float32)
    out.sum().backward()
    assert router.grad.dtype == torch.float32 and router.grad.any()


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_grouped_mm_equals_the_oracle(bias):
    offset = torch.tensor([0, 4, 4, 7, 9], dtype=torch.int32)
    rows, weight = (torch.randn(size).requires_grad_() for size in [(12, H), (E, I, H)])
    b = torch.randn(E, I, requires_grad=True) if bias else None
    out = sonic.grouped_mm(rows, weight, offset, bias=b)
    expected = grouped_mm_reference(rows, weight, offset, b)
    torch.testing.assert_close(out, expected)
    leaves = [rows, weight] + ([b] if bias else [])
    dout = torch.randn_like(out)
    pairs = zip(*(torch.autograd.grad(o, leaves, dout) for o in (out, expected)), strict=True)
    for a, b in pairs:
        assert b.any()
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------- strides


@pytest.fixture
def contiguous_to_stages(monkeypatch):
    """Names of the stages that ran. The kernels' ones take contiguous routing tensors only, and
    with this fixture the reference's ones do too."""
    seen = set()

    def strict(name, stage):
        signature = inspect.signature(stage)

        def run(*args, **options):
            seen.add(name)
            arguments = signature.bind(*args, **options).arguments
            for key in ("scores", "offset_by_expert"):
                value = arguments.get(key)
                assert value is None or value.is_contiguous(), f"{key} of {name}"
            return stage(*args, **options)

        return run

    for name, stage in inspect.getmembers(stages, inspect.isfunction):
        if stage.__module__ == stages.__name__:
            monkeypatch.setattr(stages, name, strict(name, stage))
    return seen


def test_strided_routing_weights(contiguous_to_stages):
    """The first column of (T, E) scores, and every other entry of a flat list."""
    tensors = make_tensors()
    del tensors["topk_weights"]
    x, ids = tensors["hidden_states"], IDS[:, :1]
    column, spaced = torch.rand(T, E)[:, :1], torch.rand(2 * T)[::2]
    for weights, run in (
        (column, lambda w: sonic.experts(x, ids, w, **rest(tensors))),
        (spaced, lambda w: sonic.experts_flat(x, torch.arange(T), ids[:, 0], w, **rest(tensors))),
    ):
        assert not weights.is_contiguous()
        packed = weights.contiguous().requires_grad_()
        weights.requires_grad_()
        results = [
            (out := run(w), *torch.autograd.grad(out.sum(), [w, x])) for w in (weights, packed)
        ]
        assert_same_bits(*results)
    assert {"combine", "gather_scores"} <= contiguous_to_stages


def test_strided_offsets(contiguous_to_stages):
    rows, weight = torch.randn(9, H, requires_grad=True), torch.randn(E, I, H, requires_grad=True)
    offset = torch.tensor([0, -1, 4, -1, 4, -1, 7, -1, 9], dtype=torch.int32)[::2]
    assert not offset.is_contiguous()
    results = []
    for offsets in (offset, offset.contiguous()):
        out = sonic.grouped_mm(rows, weight, offsets)
        results.append((out, *torch.autograd.grad(out.sum(), [rows, weight])))
    assert_same_bits(*results)
    assert {"down_forward", "up_backward_act", "up_backward_weight"} <= contiguous_to_stages


@pytest.mark.parametrize(
    ("offsets", "says"),
    [
        ([1, 4, 4, 7, 9], "from 1 to 9 for 9 rows"),
        ([-2, 4, 4, 7, 9], "from -2 to 9 for 9 rows"),
        ([0, 4, 3, 7, 9], "expert 1 owns rows 4 to 3"),
        ([0, 4, 4, 7, 10], "from 0 to 10 for 9 rows"),
        ([0, 4, 4, 7, -1], "expert 3 owns rows 7 to -1"),
    ],
)
def test_the_reference_refuses_offsets_that_are_none(offsets, says):
    rows, weight = torch.randn(9, H), torch.randn(4, I, H)
    with pytest.raises(ArgumentError, match=f"grouped_mm: .*{says}.*Allowed: .*start at 0.*cumsum"):
        sonic.grouped_mm(rows, weight, torch.tensor(offsets, dtype=torch.int32))


def test_the_reference_checks_offsets_without_rows():
    weight = torch.randn(2, I, H)
    offsets = torch.zeros(3, dtype=torch.int32)
    assert sonic.grouped_mm(torch.randn(0, H), weight, offsets).shape == (0, I)
    with pytest.raises(ArgumentError, match="from 0 to 1 for 0 rows"):
        sonic.grouped_mm(torch.randn(0, H), weight, torch.tensor([0, 0, 1], dtype=torch.int32))


# ------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("flat", [False, True], ids=["topk", "flat"])
def test_no_tokens(flat):
    tensors = make_tensors(tokens=0)
    if flat:
        nothing = torch.zeros(0, dtype=torch.int32)
        weights = tensors["topk_weights"]
        x = tensors["hidden_states"]
        out = sonic.experts_flat(x, nothing, nothing, weights.flatten(), **rest(tensors))
    else:
        out = call(tensors, IDS[:0])
    assert out.shape == (0, H)
    for name, gradient in zip(NAMES, gradients(out, tensors), strict=True):
        assert gradient.shape == tensors[name].shape and not gradient.any()


def test_tokens_without_any_slot():
    """An empty list of pairs, and a table whose every slot is dropped, both give zeros."""
    tensors = make_tensors()
    nothing = torch.zeros(0, dtype=torch.int64)
    x = tensors["hidden_states"]
    flat = sonic.experts_flat(x, nothing, nothing, torch.zeros(0), **rest(tensors))
    dropped = call(tensors, torch.full((T, K), -1))
    for out in (flat, dropped):
        assert out.shape == (T, H) and not out.any()
        for gradient in gradients(out, tensors, names=("hidden_states", "w1", "w2", "b1", "b2")):
            assert not gradient.any()


def test_ids_of_either_width_and_far_out_of_range():
    tensors = make_tensors()
    far = torch.where(IDS == 99, 2**32 + 1, IDS)  # would be expert 1 if it were truncated
    assert_same_bits([call(tensors, far)], [call(tensors, IDS.int())])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_another_dtype_get_a_gradient_of_their_own(dtype):
    tensors = make_tensors()
    rounded = tensors["topk_weights"].detach().to(dtype).requires_grad_()
    (actual,) = gradients(call(tensors | {"topk_weights": rounded}), {"topk_weights": rounded})
    same_in_float = rounded.detach().float().requires_grad_()
    mixed = tensors | {"topk_weights": same_in_float}
    (expected,) = gradients(call(mixed), {"topk_weights": same_in_float})
    assert actual.dtype == dtype
    assert_same_bits([actual], [expected.to(dtype)])


def test_strided_input_and_expanded_gradient():
    tensors = make_tensors()
    padded = torch.full((T, 2 * H), float("nan"))
    padded[:, ::2] = tensors["hidden_states"].detach()
    strided = tensors | {"hidden_states": padded[:, ::2].requires_grad_()}
    ones = torch.ones(()).expand(T, H)
    expected = gradients(call(tensors), tensors, ones.contiguous())
    assert_same_bits(gradients(call(strided), strided, ones), expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_a_single_leaf(name):
    """Everything else frozen: the same bits as when everything is trained."""
    tensors = make_tensors()
    expected = dict(zip(NAMES, gradients(call(tensors), tensors), strict=True))
    frozen = {key: t.detach().requires_grad_(key == name) for key, t in tensors.items()}
    assert_same_bits(gradients(call(frozen), frozen, names=[name]), [expected[name]])


def test_repeated_runs_give_the_same_bits():
    tensors = make_tensors()
    first = gradients(call(tensors), tensors)
    for _ in range(3):
        assert_same_bits(gradients(call(tensors), tensors), first)


# ---------------------------------------------------------------------- main gradients


def main_grads(tensors):
    return tuple(torch.zeros(tensors[name].shape) for name in ("w1", "w2"))


def test_main_grads_accumulate_unrounded():
    tensors = make_tensors(torch.bfloat16)
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    expected = gradients(call(exact), exact, names=("w1", "w2"))
    rounded = gradients(call(tensors), tensors, names=("w1", "w2"))
    once, accumulators = main_grads(tensors), main_grads(tensors)
    call(tensors, main_grads=once).sum().backward()
    assert tensors["w1"].grad is None and tensors["w2"].grad is None
    assert tensors["b1"].grad.any() and tensors["hidden_states"].grad.any()
    for main, low in zip(once, rounded, strict=True):
        assert torch.equal(main.to(torch.bfloat16), low)
        assert not torch.equal(main, low.float())
    for _ in range(2):
        call(tensors, main_grads=accumulators).sum().backward()
    x, *others = (tensors[name] for name in NAMES)
    lows = gradients(experts_low_precision(x, IDS, *others), tensors, names=("w1", "w2"))
    for main, double, wide, low in zip(once, accumulators, expected, lows, strict=True):
        torch.testing.assert_close(double, 2 * main)
        is_close = partial(assert_close, ref64=wide, ref_low=low.float(), band_dtype=low.dtype)
        is_close(main)
        assert_mutations_fail(is_close, main)


def test_main_grads_for_one_weight_only():
    tensors = make_tensors()
    (dw1, dw2) = gradients(call(tensors), tensors, names=("w1", "w2"))
    accumulator = torch.ones_like(dw2)
    call(tensors, main_grads=(None, accumulator)).sum().backward()
    assert tensors["w2"].grad is None
    assert_same_bits([tensors["w1"].grad, accumulator], [dw1, 1 + dw2])


def test_main_grads_of_a_frozen_weight_are_left_alone():
    tensors = make_tensors()
    tensors["w1"].requires_grad_(False)
    accumulators = main_grads(tensors)
    call(tensors, main_grads=accumulators).sum().backward()
    assert not accumulators[0].any() and accumulators[1].any()


def test_main_grads_may_be_shared_by_calls_in_flight():
    tensors = make_tensors()
    accumulators = main_grads(tensors)
    first, second = (call(tensors, main_grads=accumulators) for _ in range(2))
    second.sum().backward()
    once = [main.clone() for main in accumulators]
    first.sum().backward()
    assert_same_bits(accumulators, [2 * main for main in once])


# ------------------------------------------------------------------- what autograd keeps


def saved_storages(function):
    """Distinct saved tensors by address, as (bytes)."""
    seen = {}

    def pack(tensor):
        seen[tensor.data_ptr(), tensor.numel()] = tensor.numel() * tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    return out, seen


@pytest.mark.parametrize("activation", ["swiglu", "relu_sq"])
@pytest.mark.parametrize("flat", [False, True], ids=["topk", "flat"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_saved_bytes_equal_the_formula(activation, flat, frozen):
    tensors = make_tensors(torch.bfloat16, ActivationType(activation))
    tensors["w1"].requires_grad_(not frozen)
    x, weights = tensors["hidden_states"], tensors["topk_weights"]
    by_reference = {t.data_ptr() for t in rest(tensors).values()}

    def run():
        if flat:
            tokens = torch.arange(T).repeat_interleave(K).flip(0)
            flat_weights = weights.flatten()
            return sonic.experts_flat(
                x, tokens, IDS.flatten(), flat_weights, **rest(tensors), activation=activation
            )
        return call(tensors, activation=activation)

    out, saved = saved_storages(run)
    routing = {"num_slots": T * K} if flat else {"top_k": K}
    expected = sonic.saved_bytes(
        T, H, I, E, **routing, activation=activation, weights_frozen=frozen
    )
    kept = sum(size for (address, _), size in saved.items() if address not in by_reference)
    assert kept == expected
    assert out.requires_grad


def test_memory_estimate_is_the_published_formula():
    estimate = sonic.memory_estimate(24576, 1536, 256, 128, 8)
    rows = 24576 * 8
    assert estimate.saved == 2 * 24576 * 1536 + 4 * rows * 256 + 16 * rows + 4 * 129
    assert estimate.weights == 6 * 1536 * 256 * 128
    assert estimate.backward_peak > estimate.forward_peak > estimate.saved - 2 * 24576 * 1536


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_gradients(context):
    tensors = make_tensors()
    expected = call(tensors)
    stored = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is torch.ops.sonic.experts_forward.default:
                stored.append(result[1].numel())
            return result

    with context(), Watch():
        out = call(tensors)
    assert stored == [0]
    assert not out.requires_grad
    assert_same_bits([out], [expected.detach()])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(use_reentrant):
    tensors = make_tensors()
    expected = gradients(call(tensors), tensors)

    def run(*leaves):
        return call(dict(zip(NAMES, leaves, strict=True)))

    leaves = [tensors[name] for name in NAMES]
    checkpoint(run, *leaves, use_reentrant=use_reentrant).sum().backward()
    assert_same_bits([leaf.grad for leaf in leaves], expected)


def test_second_derivative_is_refused():
    tensors = make_tensors()
    (dx,) = torch.autograd.grad(call(tensors).sum(), tensors["hidden_states"], create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative.*Allowed: first.*reference"):
        dx.square().sum().backward()
    out = call(tensors, main_grads=main_grads(tensors)).sum()
    with pytest.raises(UnsupportedError, match="main_grads.*Allowed: create_graph=False"):
        torch.autograd.grad(out, tensors["hidden_states"], create_graph=True)


# ----------------------------------------------------------------------------- autocast


def test_autocast_casts_everything_but_the_scores():
    tensors = make_tensors()
    low = {
        name: t if name == "topk_weights" else t.detach().bfloat16().requires_grad_()
        for name, t in tensors.items()
    }
    expected = gradients(call(low), low)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(tensors)
    assert out.dtype == torch.bfloat16
    actual = gradients(out, tensors)
    assert all(gradient.dtype == torch.float32 for gradient in actual)
    assert_same_bits(actual, [gradient.float() for gradient in expected])


def test_autocast_leaves_the_router_and_float64_alone():
    tensors = make_tensors(torch.float64)
    del tensors["topk_weights"]
    router = torch.randn(E, H)
    x = tensors.pop("hidden_states")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, logits, _ = sonic.moe(x, router, **tensors, top_k=K)
        single = {name: t.float() for name, t in tensors.items()}
        single_out, single_logits, _ = sonic.moe(x.float(), router, **single, top_k=K)
    assert out.dtype == torch.float64
    assert (single_out.dtype, single_logits.dtype) == (torch.bfloat16, torch.float32)
    assert_same_bits([single_logits], [F.linear(x.float(), router)])


# ------------------------------------------------------------------------------ compile


@pytest.fixture
def compiled():
    torch._dynamo.reset()

    def compile_(function, **options):
        return torch.compile(function, backend="aot_eager", fullgraph=True, **options)

    yield compile_
    torch._dynamo.reset()


def test_compiled_experts_equal_eager(compiled):
    tensors = make_tensors()
    run = compiled(lambda tensors: call(tensors, activation=ActivationType.GEGLU))
    expected = call(tensors, activation="geglu")
    out = run(tensors)
    assert_same_bits([out], [expected])
    assert_same_bits(gradients(out, tensors), gradients(expected, tensors))
    with torch.no_grad():
        assert_same_bits([run(tensors)], [expected.detach()])


def test_compiled_under_autocast(compiled):
    tensors = make_tensors()
    run = compiled(call)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = run(tensors), call(tensors)
    assert_same_bits([out], [expected])
    assert_same_bits(gradients(out, tensors), gradients(expected, tensors))


def test_compiled_checkpoint_equals_eager(compiled):
    tensors = make_tensors()
    run = compiled(lambda tensors: checkpoint(call, tensors, use_reentrant=False))
    assert_same_bits(gradients(run(tensors), tensors), gradients(call(tensors), tensors))


def test_number_of_tokens_does_not_recompile(compiled):
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(call, backend=frames, fullgraph=True, dynamic=True)
    for tokens in (7, 5, 6, 3):
        torch.manual_seed(tokens)
        tensors = make_tensors(tokens=tokens)
        ids = IDS[:tokens].clone()
        out, expected = run(tensors, ids), call(tensors, ids)
        assert_same_bits(gradients(out, tensors), gradients(expected, tensors))
    assert frames.frame_count == 1


def test_compiled_main_grads(compiled):
    tensors = make_tensors()
    expected, actual = main_grads(tensors), main_grads(tensors)
    run = compiled(lambda tensors, main: call(tensors, main_grads=main))
    for _ in range(2):
        call(tensors, main_grads=expected).sum().backward()
        run(tensors, actual).sum().backward()
    assert_same_bits(actual, expected)


def test_compiled_flat_moe_and_grouped_mm(compiled):
    tensors = make_tensors()
    weights, x = tensors.pop("topk_weights"), tensors.pop("hidden_states")
    tokens = torch.arange(T).repeat_interleave(K)
    offset = torch.tensor([0, 2, 2, 5, 6], dtype=torch.int32)
    router = torch.randn(E, H, requires_grad=True)

    def run(x, router, weights, tensors):
        first = sonic.experts_flat(x, tokens, IDS.flatten(), weights.flatten(), **tensors)
        second, logits, frequency = sonic.moe(first, router, **tensors, top_k=K)
        rows = sonic.grouped_mm(second, tensors["w1"], offset, bias=tensors["b1"])
        return rows.sum() + logits.sum(), frequency

    leaves = [x, router, weights, *tensors.values()]
    results = [f(x, router, weights, tensors) for f in (run, compiled(run))]
    assert torch.equal(results[0][1], results[1][1])
    assert_same_bits(*(torch.autograd.grad(loss, leaves) for loss, _ in results))


# ----------------------------------------------------------------- names known to users


@pytest.mark.parametrize("concat", [False, True])
@pytest.mark.parametrize(("over_topk", "norm"), [(True, False), (False, False), (False, True)])
def test_softmax_topk_layer_takes_upstream_arguments(concat, over_topk, norm):
    tensors = make_tensors()
    x, w1, b1, w2, b2 = (tensors[name] for name in ("hidden_states", "w1", "b1", "w2", "b2"))
    router = torch.randn(E, H)
    permuted = (w1.permute(1, 2, 0), b1, w2.permute(1, 2, 0), b2)
    actual = sonic.moe_TC_softmax_topk_layer(
        x, router, *permuted, K, 0, ActivationType.SWIGLU, False, over_topk, norm, concat
    )
    order = "softmax_over_topk" if over_topk else "topk_over_softmax" + "_norm" * norm
    layout = "concatenated" if concat else "interleaved"
    options = {"top_k": K, "score_order": order, "layout": layout}
    expected = sonic.moe(x, router, w1, w2, b1=b1, b2=b2, **options)
    assert_same_bits(actual, expected)
    (dw1,) = torch.autograd.grad(actual[0].sum(), w1)
    assert dw1.shape == w1.shape and dw1.any()
    inference = sonic.moe_TC_softmax_topk_layer(x, router, *permuted, K, None, "swiglu", True)
    assert not inference[0].requires_grad


def test_general_routing_takes_upstream_arguments():
    tensors = make_tensors()
    x, w1, b1, w2, b2 = (tensors[name] for name in ("hidden_states", "w1", "b1", "w2", "b2"))
    tokens, scores = torch.arange(T).repeat_interleave(K), tensors["topk_weights"].flatten()
    out, frequency = sonic.moe_general_routing_inputs(
        x, scores, tokens, IDS.flatten(), w1.permute(1, 2, 0), b1, w2.permute(1, 2, 0), b2, E,
        None, ActivationType.SWIGLU, is_inference_mode_enabled=False, concat_layout=True,
    )  # fmt: skip
    expected = call(tensors, layout="concatenated")
    assert_same_bits([out], [expected])
    assert frequency.tolist() == [(IDS == expert).sum() for expert in range(E)]
    assert_same_bits(gradients(out, tensors), gradients(expected, tensors))


def test_module_state_is_not_needed_for_copies():
    """A deep copy of parameters and a second call give the same bits: no hidden state."""
    tensors = make_tensors()
    again = {name: copy.deepcopy(t) for name, t in tensors.items()}
    assert_same_bits(gradients(call(again), again), gradients(call(tensors), tensors))
