"""The layer on the kernels against the float64 oracle, judged by the error of equal rounding."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import sonic
from sonic import ops
from sonic.enums import ActivationType, GateUpLayout, KernelBackendMoE, ScoreOrder
from sonic.reference import (
    experts_flat_low_precision,
    experts_flat_reference,
    grouped_mm_reference,
    moe_reference,
)
from sonic.runtime.errors import LayoutError
from sonic.testing import (
    Routing,
    assert_close,
    assert_layer_close,
    assert_mutations_fail,
    layer_references,
    random_problem,
    run_layer,
)
from sonic.triton import parts
from tests.graphs import no_synchronization
from tests.layers import (
    DEVICE,
    IMPL,
    PROBLEM,
    assert_same_bits,
    call,
    experts,
    gradients,
    inputs_of,
    leaves_of,
    module_references,
    step,
)

pytestmark = pytest.mark.gpu

ACTIVATIONS = [
    pytest.param(activation, layout, id=f"{activation.value}-{layout.value}")
    for activation in ActivationType
    for layout in (GateUpLayout if activation.is_gated else [GateUpLayout.INTERLEAVED])
]


def check(problem):
    inputs = inputs_of(problem)
    actual = run_layer(experts, problem, inputs)
    references = layer_references(problem, inputs)
    assert_layer_close(actual, *references, problem)
    return actual, references


# ------------------------------------------------------------------------------- values


@pytest.mark.parametrize(("activation", "layout"), ACTIVATIONS)
def test_activation(activation, layout):
    check(PROBLEM.with_changes(activation=activation, layout=layout))


@pytest.mark.parametrize("activation", [ActivationType.SWIGLU, ActivationType.RELU_SQ])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_float16(activation, bias):
    check(PROBLEM.with_changes(activation=activation, has_bias=bias, dtype=torch.float16))


@pytest.mark.parametrize("routing", list(Routing))
@pytest.mark.parametrize("tokens", [0, 1, 63, 129, 500])
def test_routing_and_number_of_tokens(routing, tokens):
    check(PROBLEM.with_changes(routing=routing, num_tokens=tokens, drop_fraction=0.0))


@pytest.mark.parametrize(
    "sizes",
    [(8, 8, 1, 1), (64, 64, 2, 2), (264, 8, 5, 1), (8, 520, 3, 3), (128, 256, 64, 8)],
    ids=str,
)
def test_sizes(sizes):
    hidden, intermediate, experts_, top_k = sizes
    check(
        PROBLEM.with_changes(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_experts=experts_,
            top_k=top_k,
        )
    )


def test_weight_gradients_of_an_expert_with_many_rows(monkeypatch):
    """Its rows are reduced in four parts, of which the last three are added by a kernel."""
    problem = PROBLEM.with_changes(
        num_tokens=5000, num_experts=16, routing=Routing.HOT, drop_fraction=0.0
    )
    check(problem)
    monkeypatch.setattr(parts, "add_parts", lambda *_: None)
    with pytest.raises(AssertionError, match="dw"):
        check(problem)


@pytest.mark.parametrize("fraction", [0.9, 1.0])
def test_dropped_slots(fraction):
    actual, _ = check(PROBLEM.with_changes(drop_fraction=fraction))
    if fraction == 1.0:
        assert not any(t.any() for t in vars(actual).values())


@pytest.mark.parametrize("layout", list(GateUpLayout))
def test_strided_operands(layout):
    """Padded input rows, transposed ids and gradient, every other expert of a larger tensor."""
    check(PROBLEM.with_changes(contiguous=False, layout=layout))


def test_strided_operands_of_one_expert_per_token():
    check(PROBLEM.with_changes(contiguous=False, top_k=1))


@pytest.mark.parametrize("seed", range(24))
def test_random_problem(seed):
    check(random_problem(seed))


def test_unwritten_memory_is_never_read(poisoned):
    actual, _ = check(PROBLEM.with_changes(drop_fraction=0.5))
    assert all(t.isfinite().all() for t in vars(actual).values())


def test_the_comparison_notices_mistakes():
    problem = PROBLEM.with_changes(drop_fraction=0.0)
    actual, (ref64, ref_low) = check(problem)
    for name in ("out", "dw1", "dw2", "dhidden_states"):
        tensors = (getattr(reference, name) for reference in (ref64, ref_low))
        pair = tuple(tensors)
        assert_mutations_fail(lambda t, p=pair: assert_close(t, *p), getattr(actual, name))
    inputs = inputs_of(problem)
    without_scores = experts(
        inputs.hidden_states, inputs.topk_ids, torch.ones_like(inputs.topk_weights),
        inputs.w1, inputs.w2, inputs.b1, inputs.b2, problem.activation, problem.layout,
    )  # fmt: skip
    with pytest.raises(AssertionError):
        assert_close(without_scores, ref64.out, ref_low.out)


def test_two_layers_of_different_sizes_in_one_process():
    for intermediate in (72, 200, 72):
        check(PROBLEM.with_changes(intermediate_size=intermediate))


def flat_routing(tokens, num_experts, slots):
    generator = torch.Generator().manual_seed(3)
    token_ids = torch.randint(-1, tokens + 1, (slots,), generator=generator)
    expert_ids = torch.randint(-1, num_experts + 1, (slots,), generator=generator)
    weights = torch.rand(slots, generator=generator)
    return token_ids.to(DEVICE), expert_ids.to(DEVICE), weights.to(DEVICE)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("slots", [0, 1, 700])
def test_flat_routing(slots, strided):
    inputs = inputs_of(PROBLEM)
    routing = flat_routing(PROBLEM.num_tokens, PROBLEM.num_experts, slots * (1 + strided))
    token_ids, expert_ids, weights = (t[:: 1 + strided] for t in routing)
    parameters = (inputs.w1, inputs.w2, inputs.b1, inputs.b2)
    results = []
    for function, dtype in (
        (None, torch.bfloat16),
        (experts_flat_reference, torch.float64),
        (experts_flat_low_precision, torch.bfloat16),
    ):
        leaves = [t.to(dtype) for t in (inputs.hidden_states, *parameters)]
        leaves.append(weights.double() if dtype == torch.float64 else weights)
        x, w1, w2, b1, b2, w = (t.detach().requires_grad_() for t in leaves)
        if function is None:
            out = sonic.experts_flat(x, token_ids, expert_ids, w, w1, w2, b1=b1, b2=b2, impl=IMPL)
        else:
            out = function(x, token_ids, expert_ids, w, w1, w2, b1, b2)
        wanted = (x, w1, w2, b1, b2, w)
        results.append((out, *torch.autograd.grad(out, wanted, inputs.dout.to(dtype))))
    names = ("out", "dx", "dw1", "dw2", "db1", "db2", "dweights")
    for name, *tensors in zip(names, *results, strict=True):
        is_score = name == "dweights"
        assert_close(
            *tensors,
            name=name,
            band_dtype=torch.bfloat16 if is_score else None,
            magnitude=PROBLEM.hidden_size**0.5 if is_score and slots else 0.0,
            allow_zero_reference=slots < 2,
        )


@pytest.mark.parametrize("order", list(ScoreOrder))
def test_moe_with_its_router(order):
    inputs = inputs_of(PROBLEM)
    router = (torch.randn(PROBLEM.num_experts, PROBLEM.hidden_size) / 12).to(DEVICE, torch.bfloat16)
    names = ("hidden_states", "w1", "w2", "b1", "b2")

    def run(function, dtype, **options):
        leaves = {name: getattr(inputs, name).to(dtype).requires_grad_() for name in names}
        leaves["router_weight"] = router.to(dtype).requires_grad_()
        x, router_leaf = leaves["hidden_states"], leaves["router_weight"]
        rest = {name: leaves[name] for name in names[1:]}
        out, logits, frequency = function(
            x, router_leaf, **rest, top_k=3, score_order=order, **options
        )
        loss = (out * inputs.dout.to(dtype)).sum() + logits.square().sum()
        return (out, logits, *torch.autograd.grad(loss, list(leaves.values()))), frequency

    actual, frequency = run(sonic.moe, torch.bfloat16, impl=IMPL)
    ids = actual[1].float().topk(3).indices  # a near tie may fall otherwise in another dtype
    exact, expected_frequency = run(moe_reference, torch.float64, topk_ids=ids)
    low, _ = run(moe_reference, torch.bfloat16, topk_ids=ids, low_precision=True)
    assert torch.equal(frequency, expected_frequency)
    names = ("out", "logits", "dx", "dw1", "dw2", "db1", "db2", "drouter")
    for name, *tensors in zip(names, actual, exact, low, strict=True):
        assert_close(*tensors, name=name)


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_grouped_mm(bias, strided):
    generator = torch.Generator().manual_seed(1)

    def normal(*size, std=1.0):
        return (std * torch.randn(size, generator=generator)).to(DEVICE, torch.bfloat16)

    offset = torch.tensor([0, 70, 70, 200, 201, 280], dtype=torch.int32, device=DEVICE)
    if strided:
        offset = torch.stack([offset, torch.full_like(offset, -1)], dim=1)[:, 0]
    tensors = [normal(300, 136), normal(5, 72, 136, std=136**-0.5)]
    tensors += [normal(5, 72)] if bias else []
    dout = normal(300, 72)
    results = []
    for dtype in (None, torch.float64, torch.bfloat16):
        leaves = [t.to(dtype or torch.bfloat16).detach().requires_grad_() for t in tensors]
        b = leaves[2] if bias else None
        if dtype == torch.float64:
            out = grouped_mm_reference(leaves[0], leaves[1], offset, b)
        else:
            impl = "reference" if dtype else IMPL
            out = sonic.grouped_mm(leaves[0], leaves[1], offset, bias=b, impl=impl)
        results.append((out, *torch.autograd.grad(out, leaves, dout.to(out.dtype))))
    for name, *three in zip(("out", "drows", "dweight", "dbias"), *results, strict=False):
        assert_close(*three, name=name)
    assert not results[0][0][280:].any() and not results[0][1][280:].any()


# ----------------------------------------------------------------- what callers may vary


def test_inference_equals_training():
    leaves, inputs = leaves_of(PROBLEM)
    expected = call(leaves, inputs.topk_ids).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert_same_bits([call(leaves, inputs.topk_ids)], [expected])


def test_ten_runs_give_the_same_bits():
    leaves, inputs = leaves_of(PROBLEM.with_changes(num_tokens=1000, routing=Routing.HOT))
    first = step(leaves, inputs.topk_ids, inputs.dout)
    for _ in range(10):
        assert_same_bits(step(leaves, inputs.topk_ids, inputs.dout), first)


def test_ids_of_either_width_and_far_out_of_range():
    leaves, inputs = leaves_of(PROBLEM)
    outside = (inputs.topk_ids < 0) | (inputs.topk_ids >= PROBLEM.num_experts)
    far = torch.where(outside, 2**32 + 1, inputs.topk_ids)
    expected = step(leaves, inputs.topk_ids.int(), inputs.dout)
    assert outside.any()
    assert_same_bits(step(leaves, far, inputs.dout), expected)


@pytest.mark.parametrize("name", ["hidden_states", "topk_weights", "w1", "w2", "b1", "b2"])
def test_gradient_of_a_single_leaf(name):
    leaves, inputs = leaves_of(PROBLEM)
    everything = gradients(call(leaves, inputs.topk_ids), leaves, inputs.dout)
    expected = dict(zip(leaves, everything, strict=True))[name]
    frozen = {key: leaf.detach().requires_grad_(key == name) for key, leaf in leaves.items()}
    out = call(frozen, inputs.topk_ids)
    actual = torch.autograd.grad(out, frozen[name], inputs.dout)
    assert_same_bits(actual, [expected])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_another_dtype(dtype):
    leaves, inputs = leaves_of(PROBLEM)
    leaves["topk_weights"] = leaves["topk_weights"].detach().to(dtype).requires_grad_()
    exact = leaves | {"topk_weights": leaves["topk_weights"].detach().float().requires_grad_()}
    actual, expected = (step(t, inputs.topk_ids, inputs.dout) for t in (leaves, exact))
    assert actual[2].dtype == dtype
    assert_same_bits(actual, [t.to(a.dtype) for a, t in zip(actual, expected, strict=True)])


def test_expanded_gradient():
    leaves, inputs = leaves_of(PROBLEM)
    ones = torch.ones((), dtype=PROBLEM.dtype, device=DEVICE).expand(inputs.dout.shape)
    expected = step(leaves, inputs.topk_ids, ones.contiguous())
    assert_same_bits(step(leaves, inputs.topk_ids, ones), expected)


def test_misaligned_input_is_packed_and_misaligned_weight_refused():
    leaves, inputs = leaves_of(PROBLEM)
    expected = step(leaves, inputs.topk_ids, inputs.dout)

    def misaligned(tensor):
        buffer = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=DEVICE)
        view = buffer[1:].view(tensor.shape)
        view.copy_(tensor.detach())
        return view.requires_grad_()

    moved = leaves | {"hidden_states": misaligned(leaves["hidden_states"])}
    assert_same_bits(step(moved, inputs.topk_ids, inputs.dout), expected)
    with pytest.raises(LayoutError, match="w1 starts 2 bytes past"):
        call(leaves | {"w1": misaligned(leaves["w1"])}, inputs.topk_ids)


def test_main_grads_accumulate_in_float32():
    problem = PROBLEM.with_changes(drop_fraction=0.0)
    leaves, inputs = leaves_of(problem)
    ref64, _ = layer_references(problem, inputs)

    def accumulate(impl, times):
        main = tuple(torch.zeros(leaves[name].shape, device=DEVICE) for name in ("w1", "w2"))
        for _ in range(times):
            call(leaves, inputs.topk_ids, main_grads=main, impl=impl).backward(inputs.dout)
        return main

    once, twice, low = accumulate(IMPL, 1), accumulate(IMPL, 2), accumulate("reference", 1)
    assert leaves["w1"].grad is None and leaves["w2"].grad is None
    rounded = gradients(call(leaves, inputs.topk_ids), leaves, inputs.dout)
    for index, exact in enumerate((ref64.dw1, ref64.dw2)):
        assert_close(once[index], exact, low[index], band_dtype=torch.bfloat16)
        assert_same_bits([once[index].bfloat16()], [rounded[2 + index]])
        assert not torch.equal(once[index], rounded[2 + index].float())
        torch.testing.assert_close(twice[index], 2 * once[index])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_bits(use_reentrant):
    leaves, inputs = leaves_of(PROBLEM)
    expected = gradients(call(leaves, inputs.topk_ids), leaves, inputs.dout)

    def run(*tensors):
        return call(dict(zip(leaves, tensors, strict=True)), inputs.topk_ids)

    out = checkpoint(run, *leaves.values(), use_reentrant=use_reentrant)
    out.backward(inputs.dout)
    assert_same_bits([leaf.grad for leaf in leaves.values()], expected)


def test_autocast_equals_a_cast_by_hand():
    leaves, inputs = leaves_of(PROBLEM)
    expected = step(leaves, inputs.topk_ids, inputs.dout)
    single = {name: leaf.detach().float().requires_grad_() for name, leaf in leaves.items()}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = call(single, inputs.topk_ids)
    assert out.dtype == torch.bfloat16
    actual = (out.detach(), *gradients(out, single, inputs.dout))
    assert all(gradient.dtype == torch.float32 for gradient in actual[1:])
    assert_same_bits(actual, [t.to(a.dtype) for a, t in zip(actual, expected, strict=True)])


def test_module_runs_and_trains():
    layer = sonic.MoE(8, 2, 64, 64, "swiglu", True, 0.1, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(2, 50, 64, device=DEVICE, dtype=torch.bfloat16)
    backend = KernelBackendMoE.sonicmoe if IMPL == "cute" else KernelBackendMoE.torch
    out, loss = layer(x, backend)
    _, reference_loss = layer(x, KernelBackendMoE.torch)
    torch.testing.assert_close(loss, reference_loss)
    (exact, *_), (low, *_) = module_references(layer, x)
    assert_close(out.flatten(0, 1), exact, low, name="out")
    (out.float().square().sum() + loss).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


# ------------------------------------------------------------------------ stream, memory


def test_no_host_synchronisation():
    leaves, inputs = leaves_of(PROBLEM)
    router = torch.randn(7, 136, device=DEVICE, dtype=PROBLEM.dtype, requires_grad=True)
    flat = flat_routing(PROBLEM.num_tokens, PROBLEM.num_experts, 300)
    parameters = {name: leaves[name] for name in ("w1", "w2", "b1", "b2")}

    def run():
        step(leaves, inputs.topk_ids, inputs.dout)
        x = leaves["hidden_states"]
        out = sonic.experts_flat(x, *flat, **parameters, impl=IMPL)
        out.backward(inputs.dout)
        out, logits, _ = sonic.moe(x, router, **parameters, top_k=3, impl=IMPL)
        (out.sum() + logits.sum()).backward()
        offset = torch.arange(8, dtype=torch.int32, device=DEVICE)
        sonic.grouped_mm(x, parameters["w1"], offset, impl=IMPL).sum().backward()

    run()  # compiles
    with no_synchronization():
        run()


def test_current_stream_is_used():
    """The input arrives late on a side stream: work on any other stream would read zeros."""
    leaves, inputs = leaves_of(PROBLEM)
    expected = step(leaves, inputs.topk_ids, inputs.dout)
    values = leaves["hidden_states"].detach().clone()
    late = leaves | {"hidden_states": torch.zeros_like(values).requires_grad_()}
    late_dout = torch.zeros_like(inputs.dout)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        with torch.no_grad():
            late["hidden_states"].copy_(values)
        late_dout.copy_(inputs.dout)
        actual = step(late, inputs.topk_ids, late_dout)
    stream.synchronize()
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("activation", [ActivationType.SWIGLU, ActivationType.GELU])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_slices_and_an_overwritten_preactivation_change_no_bit(monkeypatch, activation, bias):
    problem = PROBLEM.with_changes(activation=activation, has_bias=bias, hidden_size=520)
    leaves, inputs = leaves_of(problem)
    ids = inputs.topk_ids
    out = call(leaves, ids, activation=activation)
    kept = torch.autograd.grad(out, list(leaves.values()), inputs.dout, retain_graph=True)
    expected = [out.detach(), *kept]
    assert_same_bits(step(leaves, ids, inputs.dout, activation=activation), expected)
    monkeypatch.setattr(ops, "column_slices", lambda *_: ((0, 256), (256, 192), (448, 72)))
    out = call(leaves, ids, activation=activation)
    kept = torch.autograd.grad(out, list(leaves.values()), inputs.dout, retain_graph=True)
    assert_same_bits([out.detach(), *kept], expected)


def test_memory_between_forward_and_backward_is_the_formula():
    problem = PROBLEM.with_changes(num_tokens=4096, hidden_size=512, intermediate_size=256)
    leaves, inputs = leaves_of(problem)
    ids = inputs.topk_ids.int()
    step(leaves, ids, inputs.dout)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = call(leaves, ids)
    held = torch.cuda.memory_allocated() - before - out.numel() * out.itemsize
    rows = problem.num_rows
    sizes = (problem.num_tokens, problem.hidden_size, problem.intermediate_size)
    formula = sonic.saved_bytes(*sizes, problem.num_experts, problem.top_k)
    new = formula - leaves["hidden_states"].numel() * 2 - 4 * rows  # input and scores are ours
    assert new <= held <= new + 16 * 512  # the allocator rounds each tensor up to 512 bytes
    # What is asked of the allocator, before it rounds.
    allocated = torch.cuda.memory_stats()["requested_bytes.all.current"]
    torch.cuda.reset_peak_memory_stats()
    gradients(out, leaves, inputs.dout)
    more = torch.cuda.memory_stats()["requested_bytes.all.peak"] - allocated
    estimate = sonic.memory_estimate(*sizes, problem.num_experts, problem.top_k).backward_peak
    estimate -= formula - leaves["hidden_states"].numel() * 2  # what was kept
    # The estimate leaves out the gradients of the biases and the counter of dynamic tiles.
    biases = sum(leaves[name].numel() * leaves[name].itemsize for name in ("b1", "b2"))
    assert estimate <= more <= estimate + biases + 4
