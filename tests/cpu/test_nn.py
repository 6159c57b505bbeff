"""The modules: construction, state dict, initialisation, forward on the reference."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import sonic
from sonic import ActivationType, Experts, KernelBackendMoE, MoE
from sonic.nn import ExpertLinear
from sonic.nn.routers import SharedExperts, TopKRouter
from sonic.reference import load_balancing_loss, merge_gate_up_rows, moe_reference
from sonic.runtime.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    ShapeError,
    UnsupportedError,
)

T, H, I, E, K = 10, 16, 12, 6, 2  # noqa: E741 (the names of sizes throughout)
TORCH = KernelBackendMoE.torch


def make(activation="swiglu", bias=True, std=0.3, **options):
    module = MoE(E, K, H, I, activation, bias, std, **options)
    if bias:
        nn.init.normal_(module.c_fc.bias)
        nn.init.normal_(module.c_proj.bias)
    return module


def oracle(module, x):
    flat = x.reshape(-1, H)
    return moe_reference(
        flat,
        module.router.weight,
        module.c_fc.weight,
        module.c_proj.weight,
        top_k=K,
        score_order=module.score_order,
        b1=module.c_fc.bias,
        b2=module.c_proj.bias,
        activation=module.activation_function,
        layout=module.layout,
    )


@pytest.mark.parametrize("activation", list(ActivationType))
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_output_loss_and_gradients_equal_the_oracle(activation, bias):
    module = make(activation, bias, dtype=torch.float64)
    x = torch.randn(2, T // 2, H, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    out, loss = module(x, TORCH)
    expected_out, logits, frequency = oracle(module, x)
    expected_loss = load_balancing_loss(logits, frequency)
    torch.testing.assert_close(out, expected_out.view_as(x))
    torch.testing.assert_close(loss, expected_loss)
    actual = torch.autograd.grad(out.sin().sum() + loss, leaves)
    expected = torch.autograd.grad(expected_out.sin().sum() + expected_loss, leaves)
    for a, b in zip(actual, expected, strict=True):
        assert b.any()
        torch.testing.assert_close(a, b)


def test_loss_is_the_published_formula():
    module = make()
    x = torch.randn(T, H)
    _, loss = module(x, TORCH)
    logits = F.linear(x, module.router.weight)
    probability = logits.softmax(-1).sum(0)
    frequency = torch.bincount(logits.topk(K).indices.flatten(), minlength=E).float()
    shares = (probability / probability.sum()) * (frequency / frequency.sum())
    torch.testing.assert_close(loss, E * shares.sum())


@pytest.mark.parametrize("shape", [(T, H), (2, 5, H), (1, 2, 5, H), (H,), (0, H)])
def test_leading_axes_are_kept(shape):
    module = make()
    out, loss = module(torch.randn(shape), TORCH)
    assert out.shape == shape and loss.shape == () and loss.isfinite()


def test_input_may_have_any_strides():
    module = make()
    x = torch.randn(5, 2, H)
    out, _ = module(x.transpose(0, 1), TORCH)
    expected, _ = module(x.transpose(0, 1).contiguous(), TORCH)
    assert torch.equal(out, expected) and out.any()


def test_inference_mode_keeps_nothing():
    module = make()
    x = torch.randn(T, H, requires_grad=True)
    out, loss = module(x, TORCH, is_inference_mode=True)
    assert loss is None and not out.requires_grad
    assert torch.equal(out, module(x, TORCH)[0])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["swiglu", "relu_sq"])
def test_state_dict_has_the_names_and_shapes_users_know(activation, bias):
    width = 2 * I if activation == "swiglu" else I
    expected = {
        "router.weight": (E, H),
        "c_fc.weight": (E, width, H),
        "c_proj.weight": (E, H, I),
    }
    if bias:
        expected |= {"c_fc.bias": (E, width), "c_proj.bias": (E, H)}
    module = make(activation, bias)
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == expected
    other = make(activation, bias)
    other.load_state_dict(module.state_dict())
    x = torch.randn(T, H)
    assert torch.equal(other(x, TORCH)[0], module(x, TORCH)[0])


def is_drawn_with(std, weight):
    """Whether mean and standard deviation are those of normal numbers, to five of their standard
    errors: less than one draw in a million is further away."""
    count = weight.numel()
    return (
        abs(weight.mean().item()) < 5 * std / count**0.5
        and abs(weight.std().item() - std) < 5 * std / (2 * count) ** 0.5
    )


def test_initialisation():
    module = MoE(64, 2, 64, 64, "swiglu", True, 0.02)
    for weight in (module.router.weight, module.c_fc.weight, module.c_proj.weight):
        assert is_drawn_with(0.02, weight)
        assert not is_drawn_with(0.022, weight) and not is_drawn_with(0.02, weight + 0.002)
    assert not module.c_fc.bias.any() and not module.c_proj.bias.any()


def test_meta_construction_and_materialisation():
    module = MoE(E, K, H, I, "swiglu", True, 0.02, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in module.parameters())
    out, loss = module(torch.empty(3, T, H, device="meta", dtype=torch.bfloat16), TORCH)
    assert out.is_meta and out.shape == (3, T, H) and loss.shape == ()
    module.to_empty(device="cpu")
    module.c_fc.reset_parameters()
    assert module.c_fc.weight.any() and not module.c_fc.bias.any()


@pytest.mark.parametrize("recipe", ["each submodule", "the layer"])
def test_a_layer_made_on_meta_is_initialised_like_any_other(recipe):
    module = MoE(64, 2, 64, 64, "swiglu", True, 0.02, device="meta")
    names = list(module.state_dict())
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.constant_(parameter, float("nan"))
    weights = module.router.weight, module.c_fc.weight, module.c_proj.weight
    if recipe == "the layer":
        module.reset_parameters()
    else:  # as FSDP does
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    assert all(is_drawn_with(0.02, weight) for weight in weights)
    assert not module.c_fc.bias.any() and not module.c_proj.bias.any()
    assert list(module.state_dict()) == names
    assert isinstance(module.router, nn.Linear) and module.router.bias is None
    with torch.no_grad():
        module.router.weight.fill_(5.0)
    module.router.reset_parameters()
    assert is_drawn_with(0.02, module.router.weight)


def test_the_gate_of_shared_experts_is_reset_too():
    module = SharedExperts(1024, 8, gated=True, std=0.02, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    assert is_drawn_with(0.02, module.gate.weight)


def test_experts_reset_too():
    module = Experts(8, 32, 32, "relu", True, 0.02, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    assert is_drawn_with(0.02, module.c_fc.weight) and not module.c_proj.bias.any()


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"std": -0.1}, ArgumentError, "std=-0.1"),
        ({"std": float("nan")}, ArgumentError, "std=nan"),
        ({"std": float("inf")}, ArgumentError, "std=inf"),
        ({"std": "0.02"}, ArgumentError, "std='0.02'"),
        ({"std": None}, ArgumentError, "std=None"),
        ({"add_bias": "no"}, ArgumentError, "add_bias='no'"),
        ({"dtype": torch.int8}, DTypeError, "dtype=torch.int8"),
        ({"dtype": torch.complex64}, DTypeError, "dtype=torch.complex64"),
        ({"dtype": "bfloat16"}, DTypeError, "dtype='bfloat16'"),
        ({"device": "banana"}, DeviceError, "device='banana'"),
        ({"device": 1.5}, DeviceError, "device=1.5"),
        ({"hidden_size": 0}, ArgumentError, "hidden_size=0"),
        ({"intermediate_size": -4}, ArgumentError, "intermediate_size=-4"),
        ({"hidden_size": 64.0}, ArgumentError, "hidden_size=64.0"),
        ({"num_experts": True}, ArgumentError, "num_experts=True"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("cls", [MoE, Experts])
def test_constructors_refuse(cls, changes, error, says):
    options = {
        "num_experts": E,
        "hidden_size": H,
        "intermediate_size": I,
        "activation_function": "swiglu",
        "add_bias": False,
        "std": 0.02,
    }
    if cls is MoE:
        options["num_experts_per_tok"] = K
    cls(**options)
    with pytest.raises(error, match=f"{cls.__name__}: {says}.*Allowed: "):
        cls(**{**options, **changes})


@pytest.mark.parametrize("version", [None, "13.0"])
def test_parameters_on_a_gpu_that_is_not_there_are_refused(version, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", version)
    says = "VISIBLE" if version else "torch .* is built without CUDA.*Install a torch with CUDA"
    with pytest.raises(DeviceError, match=f"MoE: device: no cuda: .*{says}.*on the CPU"):
        make(device="cuda")
    with pytest.raises(DeviceError, match="TopKRouter: device: no cuda: .*on the CPU"):
        TopKRouter(H, E, K, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(DeviceError, match="no cuda:2: torch sees 2.*cuda:1.*Choose one"):
        make(device="cuda:2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize("default", ["cuda", "cuda:1"])
def test_a_default_device_that_is_not_there_is_refused(default):
    says = ": no device is given, and .* default .*CUDA.*Allowed: .*or pass device="
    with torch.device(default):
        with pytest.raises(DeviceError, match="MoE" + says):
            make()
        with pytest.raises(DeviceError, match="Experts" + says):
            Experts(E, H, I, "swiglu", False, 0.02)
        with pytest.raises(DeviceError, match="TopKRouter" + says):
            TopKRouter(H, E, K)
        assert make(bias=False, device="cpu").c_fc.weight.device.type == "cpu"
    with torch.device("meta"):
        assert make(bias=False).c_fc.weight.is_meta


def test_fake_parameters_need_no_gpu():
    with FakeTensorMode():
        assert make(device="cuda").c_fc.weight.is_cuda
        with torch.device("cuda"):
            assert make().c_fc.weight.is_cuda


def test_errors_of_the_experts_are_in_names_of_the_layer():
    module, x = make(), torch.randn(3, H).half()
    with pytest.raises(DTypeError) as caught:
        module(x, TORCH)
    text = str(caught.value)
    assert text.startswith("MoE: c_fc.weight is float32 and hidden_states float16. Allowed: ")
    x = torch.randn(3, H, device="meta")
    with pytest.raises(DTypeError) as caught:
        module.to("meta")(x)
    text = str(caught.value)
    assert 'MoE: hidden_states is float32 with kernel_backend_moe="sonicmoe"' in text
    assert 'or pass kernel_backend_moe="torch".' in text and "impl" not in text


def test_expert_linear_refuses_sizes_and_std():
    for sizes in ((0, 4, 4), (4, 0, 4), (4, 4, 0), (4, 4.0, 4)):
        with pytest.raises(ArgumentError, match="ExpertLinear: .*Allowed: "):
            ExpertLinear(*sizes, False, 0.02)
    with pytest.raises(ArgumentError, match="std=-1"):
        ExpertLinear(4, 4, 4, False, -1)


def test_construction_touches_no_gpu(monkeypatch):
    def touched(*args, **kwargs):
        raise AssertionError("a GPU was touched")

    monkeypatch.setattr(torch.cuda, "_lazy_init", touched)
    monkeypatch.setattr(torch.cuda, "current_stream", touched)
    module = make()
    assert not any(isinstance(value, torch.Stream) for value in vars(module).values())
    assert not hasattr(module, "stream_id")


def test_concatenated_layout_reads_hugging_face_weights():
    interleaved, concatenated = make(), make(layout="concatenated")
    concatenated.load_state_dict(interleaved.state_dict())
    with torch.no_grad():
        for name in ("weight", "bias"):
            source = getattr(interleaved.c_fc, name)
            halves = merge_gate_up_rows(source[:, 0::2], source[:, 1::2], "concatenated")
            getattr(concatenated.c_fc, name).copy_(halves)
    x = torch.randn(T, H)
    torch.testing.assert_close(concatenated(x, TORCH)[0], interleaved(x, TORCH)[0])
    concatenated.load_state_dict(interleaved.state_dict())
    assert not torch.allclose(concatenated(x, TORCH)[0], interleaved(x, TORCH)[0])


def test_score_order_is_used():
    first, second = make(), make(score_order="topk_over_softmax")
    second.load_state_dict(first.state_dict())
    x = torch.randn(T, H)
    assert not torch.allclose(first(x, TORCH)[0], second(x, TORCH)[0])
    torch.testing.assert_close(second(x, TORCH)[0], oracle(second, x)[0])


def test_experts_module_is_the_function():
    module = Experts(E, H, I, "geglu", True, 0.3, layout="concatenated")
    x, ids, weights = torch.randn(T, H), torch.randint(0, E, (T, K)), torch.rand(T, K)
    expected = sonic.experts(
        x,
        ids,
        weights,
        module.c_fc.weight,
        module.c_proj.weight,
        b1=module.c_fc.bias,
        b2=module.c_proj.bias,
        activation="geglu",
        layout="concatenated",
    )
    assert torch.equal(module(x, ids, weights), expected) and expected.any()


def test_expert_linear_is_a_grouped_mm():
    module = ExpertLinear(3, H, I, True, 0.3)
    nn.init.normal_(module.bias)
    rows, offset = torch.randn(9, H), torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    out = module(rows, offset)
    torch.testing.assert_close(out[:4], F.linear(rows[:4], module.weight[0], module.bias[0]))
    torch.testing.assert_close(out[4:], F.linear(rows[4:], module.weight[2], module.bias[2]))


@pytest.mark.parametrize("routed", ["linear", "router"])
def test_compiled_module_takes_any_number_of_tokens(routed):
    """The second number makes it dynamic, and from then on nothing is compiled."""
    torch._dynamo.reset()
    options = {} if routed == "linear" else {"router": TopKRouter(H, E, K)}
    module = MoE(E, K, H, I, "swiglu", False, 0.1, **options)
    counted = CompileCounter()
    compiled = torch.compile(module, backend=counted, fullgraph=True)
    for tokens in (64, 40, 33, 50, 17, 21, 22):
        compiled(torch.randn(tokens, H), TORCH)
    assert counted.frame_count <= 2


def test_a_router_on_another_device_is_refused():
    module = MoE(E, K, H, I, "swiglu", False, 0.1, router=TopKRouter(H, E, K, device="meta"))
    with pytest.raises(DeviceError, match="weight is on meta and hidden_states on cpu"):
        module(torch.randn(4, H), TORCH)


def test_compiled_module_equals_eager():
    torch._dynamo.reset()
    module = make()
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, H)
    for function, target in ((module, module), (compiled, twin)):
        out, loss = function(x, TORCH)
        (out.sum() + loss).backward()
        assert all(p.grad is not None for p in target.parameters())
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad) and p.grad.any()


def test_autocast():
    module = make()
    x = torch.randn(T, H)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, loss = module(x, TORCH)
    assert (out.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), module(x, TORCH)[0], atol=0.1, rtol=0.1)
    (out.float().sum() + loss).backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in module.parameters())


def test_training_step_lowers_the_loss():
    module = make()
    x, target = torch.randn(64, H), torch.randn(64, H)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        out, aux = module(x, TORCH)
        loss = F.mse_loss(out, target) + 0.01 * aux
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_representation_names_every_option():
    text = repr(make(layout="concatenated", score_order="topk_over_softmax_norm"))
    for part in ("num_experts=6", "'swiglu'", "'concatenated'", "'topk_over_softmax_norm'"):
        assert part in text
    assert "num_experts_per_tok=2" in text and "bias=True" in text


# ------------------------------------------------------------------------------ refusals


def test_kernels_are_not_replaced_by_the_reference_on_a_cpu():
    with pytest.raises(DeviceError, match=r"sonicmoe.*cpu.*CUDA.*KernelBackendMoE\.torch"):
        make()(torch.randn(T, H))


def test_scattermoe_is_refused():
    with pytest.raises(UnsupportedError, match=r"scattermoe.*Allowed.*sonicmoe"):
        make()(torch.randn(T, H), "scattermoe")


def test_unknown_backend_is_refused():
    with pytest.raises(ArgumentError, match="kernel_backend_moe='triton'.*'torch'"):
        make()(torch.randn(T, H), "triton")


def test_wrong_hidden_size_is_refused():
    with pytest.raises(ShapeError, match=rf"\(3, 7\).*\(\.\.\., {H}\)"):
        make()(torch.randn(3, 7), TORCH)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((0, 1, H, I, "swiglu", False, 0.1), "num_experts=0 is out of range. Allowed: 1 to 65536"),
        ((E, E + 1, H, I, "swiglu", False, 0.1), "num_experts_per_tok=7 is out of range"),
        ((E, K, H, 0, "swiglu", False, 0.1), "intermediate_size=0 is out of range"),
        ((E, K, H, 2.5, "swiglu", False, 0.1), "intermediate_size=2.5 is of type float"),
        ((E, K, H, I, "swish", False, 0.1), "activation_function='swish' is not known"),
    ],
)
def test_wrong_construction_is_refused(arguments, text):
    with pytest.raises(ArgumentError) as error:
        MoE(*arguments)
    assert text in str(error.value) and "Allowed" in str(error.value)
