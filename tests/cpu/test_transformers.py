"""transformers models whose experts run through sonic, against transformers' own eager experts.

CPU, float32, the reference: the two differ only in the order of float32 sums.
"""

import copy
import gc
import subprocess
import sys
import types
import weakref
from typing import Any

import pytest
import torch

import sonic
import sonic.functional
from sonic.enums import ActivationType
from sonic.integrations import transformers as adapter
from sonic.reference import stages
from sonic.runtime.errors import (
    ArgumentError,
    MissingPackageError,
    ShapeError,
    UnsupportedError,
)

pytest.importorskip("transformers.integrations.moe")

from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation

from tests.tiny_models import (
    CONFIGS,
    HIDDEN,
    errors,
    experts_modules,
    make_model,
    make_tokens,
    run,
    same_routing,
)

TOLERANCE = 1e-5  # of float32 runs that sum in different orders

models = pytest.mark.parametrize("name", sorted(CONFIGS))


@pytest.fixture(autouse=True)
def registered() -> None:
    adapter.register()


def failures(actual: Any, expected: Any) -> dict[str, float]:
    return {what: error for what, error in errors(actual, expected).items() if error > TOLERANCE}


# ------------------------------------------------------------------------- whole models


@models
def test_model_equals_eager(name: str) -> None:
    tokens = make_tokens()
    expected = run(make_model(name, "eager"), tokens)
    model = make_model(name, "sonic")
    assert len(experts_modules(model)) == (1 if name == "deepseek_v3" else 2)
    actual = run(model, tokens)
    assert failures(actual, expected) == {}
    # Nothing above is true of zeros only.
    assert expected.logits.norm() > 1.0
    assert all(
        grad is not None and grad.norm() > 0
        for parameter, grad in expected.grad_by_name.items()
        if ".experts." in parameter
    )


@models
def test_set_experts_implementation(name: str) -> None:
    tokens = make_tokens(seed=1)
    model = make_model(name, "eager")
    expected = run(model, tokens)
    model.set_experts_implementation("sonic")
    assert failures(run(model, tokens), expected) == {}


@pytest.mark.parametrize(
    ("name", "score_order"),
    [("qwen3_moe", "topk_over_softmax_norm"), ("mixtral", "softmax_over_topk")],
)
def test_weights_of_a_block_fit_the_module(name: str, score_order: str) -> None:
    """What the README says about checkpoints: names, layout and score order."""
    model = make_model(name, "eager")
    path, experts = experts_modules(model)[0]
    block = model.get_submodule(path.removesuffix(".experts"))
    num_experts, hidden_size, width = experts.down_proj.shape
    layer = sonic.MoE(
        num_experts,
        model.config.num_experts_per_tok,
        hidden_size,
        width,
        "swiglu",
        False,
        0.02,
        layout="concatenated",
        score_order=score_order,
    )
    layer.load_state_dict(
        {
            "router.weight": block.gate.weight,
            "c_fc.weight": experts.gate_up_proj,
            "c_proj.weight": experts.down_proj,
        }
    )
    x = torch.randn(2, 5, hidden_size)
    expected = block(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    actual, _ = layer(x, sonic.KernelBackendMoE.torch)
    assert (actual - expected).norm() <= TOLERANCE * expected.norm()
    assert expected.norm() > 0


def test_gpt_oss_clamp_acts() -> None:
    """The comparison above would not notice a missing clamp if no value reached the limit."""
    model = make_model("gpt_oss", "eager")
    seen = []
    for _, module in experts_modules(model):
        gate = module._apply_gate
        module._apply_gate = lambda rows, gate=gate: (seen.append(rows.detach()), gate(rows))[1]
    run(model, make_tokens())
    values = torch.cat([rows.flatten() for rows in seen])
    assert 0.01 < float((values.abs() > 7.0).float().mean()) < 0.5


def test_a_token_gets_the_experts_that_its_weights_belong_to() -> None:
    """Distinct weights per slot: swapped slots would show up in the logits."""
    _, module = experts_modules(make_model("qwen3_moe", "sonic"))[0]
    x = torch.randn(5, HIDDEN)
    ids = torch.tensor([[0, 7]] * 5)
    weights = torch.tensor([[0.9, 0.1]] * 5)
    module.config._experts_implementation = "eager"
    expected = module(x, ids, weights)
    swapped = module(x, ids, weights.flip(1))
    module.config._experts_implementation = "sonic"
    assert (module(x, ids, weights) - expected).norm() <= TOLERANCE * expected.norm()
    assert (swapped - expected).norm() > 0.1 * expected.norm()


MUTATIONS = ["zero_output", "experts_swapped", "weights_omitted", "token_dropped", "layout"]


def _mutated(mutation: str) -> Any:
    """``experts_forward`` with one thing wrong in it."""

    def forward(self: Any, x: Any, ids: Any, weights: Any) -> Any:
        if mutation == "experts_swapped":
            ids = torch.where(ids == 0, 1, torch.where(ids == 1, 0, ids))
        if mutation == "weights_omitted":
            weights = torch.full_like(weights, 1.0 / weights.shape[-1])
        if mutation == "token_dropped":
            ids = ids.index_fill(0, torch.tensor([3]), self.num_experts)
        if mutation == "layout":
            rows = self.gate_up_proj.shape[1]
            order = torch.arange(rows).view(2, -1).t().flatten()
            if self.is_transposed:
                rows = self.gate_up_proj.shape[2]
                order = torch.arange(rows).view(-1, 2).t().flatten()
            wrong = copy.copy(self)
            wrong._parameters = dict(self._parameters)
            axis = 2 if self.is_transposed else 1
            wrong._parameters["gate_up_proj"] = self.gate_up_proj.index_select(axis, order)
            return adapter.experts_forward(wrong, x, ids, weights)
        output = adapter.experts_forward(self, x, ids, weights)
        return torch.zeros_like(output) if mutation == "zero_output" else output

    return forward


@models
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_comparison_catches(name: str, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = make_tokens()
    expected = run(make_model(name, "eager"), tokens)
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "mutated", _mutated(mutation))
    actual = run(make_model(name, "mutated"), tokens)
    failed = failures(actual, expected)
    assert "logits" in failed and failed["logits"] > 100 * TOLERANCE
    assert any(".experts." in what for what in failed)


@models
def test_gradient_checkpointing_is_bitwise_equal(name: str) -> None:
    tokens = make_tokens()
    model = make_model(name, "sonic")
    plain = run(model, tokens)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    again = run(model, tokens)
    assert len(again.expert_ids) == 2 * len(plain.expert_ids)  # it did recompute
    assert torch.equal(plain.logits, again.logits)
    for parameter, grad in plain.grad_by_name.items():
        other = again.grad_by_name[parameter]
        assert grad is other is None or torch.equal(grad, other), parameter


@models
def test_generate(name: str) -> None:
    prompt = make_tokens(batch=2, length=5)
    model = make_model(name, "eager").eval()
    model.config.output_router_logits = False  # the balancing loss takes no left padding mask
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    model.set_experts_implementation("sonic")
    actual = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert actual.shape == (2, 13)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_autocast_runs_the_experts_in_its_dtype(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 parameters under bf16 autocast, the usual mixed-precision training."""
    seen = []

    def spy_on(name: str) -> None:
        stage = getattr(stages, name)

        def spy(*args: Any, **options: Any) -> Any:
            # activations, weight, bias
            seen.append({tensor.dtype for tensor in args[:3] if tensor is not None})
            return stage(*args, **options)

        monkeypatch.setattr(stages, name, spy)

    spy_on("up_forward")
    spy_on("down_forward")
    for seed in range(20):
        tokens = make_tokens(seed, batch=1, length=16)
        exact = run(make_model(name, "eager", seed), tokens)
        with torch.autocast("cpu", torch.bfloat16):
            eager = run(make_model(name, "eager", seed), tokens)
            ours = run(make_model(name, "sonic", seed), tokens)
        if same_routing(exact, eager, ours):
            break
    else:
        pytest.fail("no seed of 20 was routed alike in float32, eager bf16 and sonic bf16")
    assert set.union(*seen) == {torch.bfloat16}
    bound = errors(eager, exact)
    for what, error in errors(ours, exact).items():
        if what == "logits" or ".experts." in what:
            assert error <= 2 * bound[what] + 2**-9, what


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_compiles_without_a_graph_break(name: str) -> None:
    _, module = experts_modules(make_model(name, "sonic"))[0]
    x = torch.randn(6, HIDDEN)
    ids = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7], [1, 0], [3, 3]])
    weights = torch.rand(6, 2)
    torch._dynamo.reset()
    results = []
    # The compiled module comes first: recognising the activation must work while it is traced.
    for run_module in (torch.compile(module, fullgraph=True, backend="aot_eager"), module):
        module.zero_grad(set_to_none=True)
        output = run_module(x, ids, weights)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad for p in module.parameters())])
    for actual, expected in zip(*results, strict=True):
        assert expected.norm() > 0
        assert torch.equal(actual, expected)


# ------------------------------------------------------------------ one experts module


@use_experts_implementation(has_gate=False)
class PlainExperts(torch.nn.Module):
    """Ungated experts, as Nemotron-H has them."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = 4
        self.up_proj = torch.nn.Parameter(torch.randn(4, 24, 16) / 4)
        self.down_proj = torch.nn.Parameter(torch.randn(4, 16, 24) / 5)
        self.act_fn = ACT2FN[config.activation]


@use_experts_implementation
class GatedExperts(torch.nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = 4
        self.gate_up_proj = torch.nn.Parameter(torch.randn(4, 48, 16) / 4)
        self.down_proj = torch.nn.Parameter(torch.randn(4, 16, 24) / 5)
        self.act_fn = ACT2FN[config.activation]


class ClampedExperts(GatedExperts):
    """A gate of its own, with the limit that a config gives."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.alpha = config.alpha
        self.limit = config.limit

    def _apply_gate(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2, dim=-1)
        gate = gate.clamp(max=self.limit)
        up = up.clamp(min=-self.limit, max=self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)


def make_experts(cls: type, activation: str = "silu", **constants: Any) -> Any:
    torch.manual_seed(0)
    config = types.SimpleNamespace(
        activation=activation, _experts_implementation="sonic", **constants
    )
    return cls(config)


def module_inputs(num_tokens: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randn(num_tokens, 16, generator=generator),
        torch.randint(4, (num_tokens, 2), generator=generator),
        torch.rand(num_tokens, 2, generator=generator),
    )


ACTIVATIONS = [
    ("silu", ActivationType.SWIGLU, ActivationType.SILU),
    ("swish", ActivationType.SWIGLU, ActivationType.SILU),
    ("gelu", ActivationType.GEGLU, ActivationType.GELU),
    ("gelu_python", ActivationType.GEGLU, ActivationType.GELU),
    ("gelu_pytorch_tanh", ActivationType.GEGLU_TANH, ActivationType.GELU_TANH),
    ("gelu_new", ActivationType.GEGLU_TANH, ActivationType.GELU_TANH),
    ("gelu_fast", ActivationType.GEGLU_TANH, ActivationType.GELU_TANH),
    ("relu", ActivationType.REGLU, ActivationType.RELU),
    ("relu2", None, ActivationType.RELU_SQ),
    ("relu6", None, None),
    ("gelu_10", None, None),
    ("quick_gelu", None, None),
    ("tanh", None, None),
    ("linear", None, None),
    ("mish", None, None),
    ("leaky_relu", None, None),
]


@pytest.mark.parametrize(("activation", "gated", "ungated"), ACTIVATIONS)
@pytest.mark.parametrize("cls", [GatedExperts, PlainExperts])
def test_activation_is_recognised_or_refused(
    cls: type, activation: str, gated: ActivationType | None, ungated: ActivationType | None
) -> None:
    module = make_experts(cls, activation)
    wanted = gated if cls is GatedExperts else ungated
    x, ids, weights = module_inputs()
    if wanted is None:
        with pytest.raises(UnsupportedError, match=r"equals none of sonic's .*grouped_mm"):
            module(x, ids, weights)
        return
    assert adapter._activation_of(module) == wanted.value
    actual = module(x, ids, weights)
    module.config._experts_implementation = "grouped_mm"
    expected = module(x, ids, weights)
    assert (actual - expected).norm() <= TOLERANCE * expected.norm()
    assert expected.norm() > 0.1


@pytest.mark.parametrize(
    ("alpha", "limit", "recognised"),
    [
        (1.702, 7.0, True),
        (1.702, 7, True),
        (1.7, 7.0, False),
        (1.702, 7.01, False),
        (1.702, 6.99, False),
        (1.702, 1e9, False),
    ],
)
def test_own_gate_is_judged_by_its_values(alpha: float, limit: float, recognised: bool) -> None:
    module = make_experts(ClampedExperts, alpha=alpha, limit=limit)
    if recognised:
        assert adapter._activation_of(module) == ActivationType.SWIGLU_OAI.value
    else:
        with pytest.raises(UnsupportedError, match=r"ClampedExperts._apply_gate.*alpha=1.702"):
            module(*module_inputs())


def test_a_changed_constant_is_judged_again() -> None:
    module = make_experts(ClampedExperts, alpha=1.702, limit=7.0)
    module(*module_inputs())
    module.limit = 5.0
    with pytest.raises(UnsupportedError, match="limit"):
        module(*module_inputs())
    plain = make_experts(GatedExperts)
    plain(*module_inputs())
    plain.act_fn = torch.nn.Tanh()
    with pytest.raises(UnsupportedError, match="Tanh"):
        plain(*module_inputs())


def test_a_gate_that_splits_the_other_way_is_refused() -> None:
    """The layout flag and the gate have to agree; the values on the grid say whether they do."""
    module = make_experts(GatedExperts)
    module.is_concatenated = False
    with pytest.raises(UnsupportedError, match="_default_apply_gate"):
        module(*module_inputs())


def test_a_gate_that_does_not_run_is_refused() -> None:
    module = make_experts(GatedExperts)
    module.act_fn = torch.nn.Linear(3, 3)
    with pytest.raises(UnsupportedError, match="could not be compared"):
        module(*module_inputs())


def test_parts_that_sonic_would_leave_out_are_refused() -> None:
    normed = make_experts(GatedExperts)
    normed.has_post_expert_norm = True
    with pytest.raises(UnsupportedError, match="has_post_expert_norm.*leave out.*grouped_mm"):
        normed(*module_inputs())
    scaled = make_experts(GatedExperts)
    scaled.register_parameter("gate_up_proj_scale_inv", torch.nn.Parameter(torch.ones(4)))
    with pytest.raises(UnsupportedError, match="gate_up_proj_scale_inv"):
        scaled(*module_inputs())


def test_parametrized_weight_gets_its_gradient() -> None:
    """How adapters such as LoRA reach an experts weight."""

    class Doubled(torch.nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return 2.0 * weight

    module = make_experts(GatedExperts)
    module(*module_inputs())
    torch.nn.utils.parametrize.register_parametrization(module, "down_proj", Doubled())
    x, ids, weights = module_inputs()
    grads = []
    for implementation in ("sonic", "grouped_mm"):
        module.config._experts_implementation = implementation
        module.zero_grad(set_to_none=True)
        module(x, ids, weights).square().sum().backward()
        grads.append(module.parametrizations.down_proj.original.grad)
    assert grads[1].norm() > 0
    assert (grads[0] - grads[1]).norm() <= TOLERANCE * grads[1].norm()


def test_ids_beyond_the_last_expert_contribute_nothing() -> None:
    module = make_experts(GatedExperts)
    x, ids, weights = module_inputs()
    dropped = ids.clone()
    dropped[::2, 0] = 4  # transformers' mark for another rank's expert
    dropped[3] = 4
    x.requires_grad_()
    # Unlike transformers' mark the weights stay non-zero: the id alone has to drop the slot.
    output = module(x, dropped, weights)
    kept = weights * (dropped < 4)
    module.config._experts_implementation = "grouped_mm"
    expected = module(x, ids, kept)
    assert (output - expected).norm() <= TOLERANCE * expected.norm()
    assert torch.equal(output[3], torch.zeros(16))
    (grad,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(grad[3], torch.zeros(16))
    assert grad[1].norm() > 0


def test_weights_by_expert_id() -> None:
    """Routers of older models return (T, E) weights."""
    module = make_experts(GatedExperts)
    x, ids, _ = module_inputs()
    dense = torch.rand(9, 4, requires_grad=True)
    ids[5] = torch.tensor([4, 1])
    output = module(x, ids, dense)
    module.config._experts_implementation = "grouped_mm"
    slots = dense.gather(1, ids.clamp(max=3)) * (ids < 4)
    expected = module(x, ids.clamp(max=3), slots)
    assert (output - expected).norm() <= TOLERANCE * expected.norm()
    (actual,) = torch.autograd.grad(output.sum(), dense)
    (wanted,) = torch.autograd.grad(expected.sum(), dense)
    assert (actual - wanted).norm() <= TOLERANCE * wanted.norm()
    with pytest.raises(ShapeError, match=r"\(9, 3\).*\(9, 2\).*\(9, 4\)"):
        adapter.experts_forward(module, x, ids, torch.rand(9, 3))


def test_meta_tensors_give_shapes() -> None:
    module = make_experts(GatedExperts)
    adapter._activation_of(module)
    x, ids, weights = (tensor.to("meta") for tensor in module_inputs())
    output = adapter.experts_forward(module.to("meta"), x, ids, weights)
    assert output.is_meta and output.shape == x.shape


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_few_tokens(num_tokens: int) -> None:
    module = make_experts(GatedExperts)
    x, ids, weights = module_inputs(num_tokens)
    x.requires_grad_()
    output = module(x, ids, weights)
    output.sum().backward()
    assert output.shape == x.grad.shape == (num_tokens, 16)
    assert num_tokens == 0 or output.norm() > 0


def test_tokens_follow_the_dtype_of_the_weights() -> None:
    """float32 tokens with bf16 weights, as a norm in float32 hands them over."""
    module = make_experts(GatedExperts).to(torch.bfloat16)
    x, ids, weights = module_inputs()
    output = module(x, ids, weights)
    assert output.dtype is torch.float32
    expected = module(x.to(torch.bfloat16), ids, weights)
    assert expected.dtype is torch.bfloat16 and expected.norm() > 0
    assert torch.equal(output, expected.float())


def test_recognition_does_not_keep_modules_alive() -> None:
    module = make_experts(GatedExperts)
    module(*module_inputs())
    alive = weakref.ref(module)
    del module
    gc.collect()
    assert alive() is None


# ------------------------------------------------------------------------ registration


def test_register_is_idempotent_and_the_latest_impl_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def spy(x: torch.Tensor, *args: Any, impl: str, **kwargs: Any) -> torch.Tensor:
        seen.append(impl)
        return x

    monkeypatch.setattr(sonic.functional, "experts", spy)
    module = make_experts(GatedExperts)
    keys = list(ALL_EXPERTS_FUNCTIONS.keys())
    adapter.register()
    adapter.register()
    module(*module_inputs())
    adapter.register(impl="reference")
    module(*module_inputs())
    assert seen == ["auto", "reference"]
    assert list(ALL_EXPERTS_FUNCTIONS.keys()) == keys


def test_register_refuses_an_unknown_impl() -> None:
    with pytest.raises(ArgumentError, match="impl='triton'.*'auto', 'cute' and 'reference'"):
        adapter.register(impl="triton")


def test_register_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found(name: str) -> str:
        raise adapter.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(adapter.importlib.metadata, "version", not_found)
    with pytest.raises(MissingPackageError, match="not installed.*pip install"):
        adapter.register()


def test_register_with_transformers_that_has_no_interface(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(MissingPackageError, match="cannot be imported.*pip install"):
        adapter.register()


def test_register_with_transformers_that_does_not_state_the_layout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def use_experts_implementation(experts_class: Any = None, *, has_gate: bool = True) -> None:
        """The interface as it was before 5.7."""

    old = types.ModuleType("transformers.integrations.moe")
    old.ALL_EXPERTS_FUNCTIONS = ALL_EXPERTS_FUNCTIONS
    old.use_experts_implementation = use_experts_implementation
    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", old)
    with pytest.raises(MissingPackageError, match="order.*pip install"):
        adapter.register()


def test_importing_the_adapter_does_not_import_transformers() -> None:
    code = "import sys, sonic.integrations.transformers; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
