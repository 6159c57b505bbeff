"""transformers models in bfloat16 whose experts run through the CUDA kernels.

The yardstick is transformers itself: its eager experts in bfloat16 differ from its own float32 run
by some error, and ours may differ from that float32 run by at most twice as much. The error of a
tensor is its relative L2 error, root mean square over several inputs and weights: a gradient of
four elements, such as gpt-oss's attention sinks, has an error too random to compare from one run.
"""

import math
from typing import Any

import pytest
import torch

pytest.importorskip("transformers.integrations.moe")

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from sonic.integrations import transformers as adapter
from tests.graphs import no_synchronization
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

DEVICE = "cuda"
SEEDS, RUNS = 60, 6
BAND = 2.0**-9  # bfloat16's unit roundoff, for the values whose eager error happens to be zero

models = pytest.mark.parametrize("name", sorted(CONFIGS))


@pytest.fixture(autouse=True)
def registered() -> Any:
    adapter.register(impl="cute")  # never the reference
    yield
    adapter.register()


def low_precision_model(name: str, experts_implementation: str, seed: int) -> Any:
    """bfloat16 parameters; buffers, such as rotary frequencies, stay float32 as they are loaded."""
    model = make_model(name, experts_implementation, seed).to(DEVICE)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def float32_model(name: str, seed: int) -> Any:
    """The same weights, that is rounded to bfloat16, in a float32 eager model."""
    model = make_model(name, "eager", seed).to(DEVICE)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    return model


def mean_errors(
    name: str, experts_implementation: str
) -> tuple[dict[str, float], dict[str, float]]:
    """Errors of eager bfloat16 and of ``experts_implementation``, by tensor.

    Over the first RUNS seeds whose three runs route alike.
    """
    squares: list[dict[str, tuple[float, float]]] = []
    for seed in range(SEEDS):
        tokens = make_tokens(seed, batch=2, length=16).to(DEVICE)
        exact = run(float32_model(name, seed), tokens)
        eager = run(low_precision_model(name, "eager", seed), tokens)
        if not same_routing(exact, eager):
            continue
        ours = run(low_precision_model(name, experts_implementation, seed), tokens)
        if not same_routing(exact, ours):
            continue
        theirs, mine = errors(eager, exact), errors(ours, exact)
        squares.append({what: (theirs[what] ** 2, mine[what] ** 2) for what in theirs})
        if len(squares) == RUNS:
            break
    else:
        pytest.fail(f"only {len(squares)} of {SEEDS} seeds were routed alike by the three runs")
    eager_errors, our_errors = (
        {what: math.sqrt(sum(run[what][who] for run in squares) / RUNS) for what in squares[0]}
        for who in (0, 1)
    )
    return eager_errors, our_errors


def failures(
    eager_errors: dict[str, float], our_errors: dict[str, float]
) -> dict[str, tuple[float, float]]:
    return {
        what: (error, eager_errors[what])
        for what, error in our_errors.items()
        if error > 2 * eager_errors[what] + BAND
    }


@models
def test_model_is_as_exact_as_eager(name: str) -> None:
    eager_errors, our_errors = mean_errors(name, "sonic")
    assert failures(eager_errors, our_errors) == {}
    # The bound means something: zeros and foreign experts have errors of 1 and more.
    assert 0 < eager_errors["logits"] < 0.05
    assert max(eager_errors.values()) < 0.25


@models
def test_comparison_catches_zeros(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def zeros(self: Any, x: Any, ids: Any, weights: Any) -> Any:
        return torch.zeros_like(adapter.experts_forward(self, x, ids, weights))

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS._global_mapping, "mutated", zeros)
    tokens = make_tokens(batch=2, length=16).to(DEVICE)
    exact = run(float32_model(name, 0), tokens)
    eager = run(low_precision_model(name, "eager", 0), tokens)
    mutated = run(low_precision_model(name, "mutated", 0), tokens)
    failed = failures(errors(eager, exact), errors(mutated, exact))
    assert "logits" in failed
    assert any(".experts." in what for what in failed)


@models
def test_gradient_checkpointing_is_bitwise_equal(name: str) -> None:
    tokens = make_tokens().to(DEVICE)
    model = low_precision_model(name, "sonic", 0)
    plain = run(model, tokens)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = run(model, tokens)
    assert len(again.expert_ids) == 2 * len(plain.expert_ids)
    assert torch.equal(plain.logits, again.logits)
    for parameter, grad in plain.grad_by_name.items():
        other = again.grad_by_name[parameter]
        # transformers' own backward passes may use atomics; the experts' gradients may not differ.
        if ".experts." in parameter:
            assert grad is not None and other is not None and grad.norm() > 0
            assert torch.equal(grad, other), parameter


@models
def test_generate(name: str) -> None:
    """Greedy decoding picks what a forward pass over the finished text ranks first."""
    model = low_precision_model(name, "sonic", 0).eval()
    model.config.output_router_logits = False
    prompt = make_tokens(batch=3, length=5).to(DEVICE)
    text = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert text.shape == (3, 13)
    assert torch.equal(text[:, :5], prompt)
    with torch.no_grad():
        logits = model(text).logits[:, 4:-1].float()
    chosen = logits.gather(-1, text[:, 5:, None])[..., 0]
    best = logits.max(dim=-1).values
    # Decoding and the full pass round differently, so a near tie may fall either way.
    assert bool((chosen >= best - 0.5 * logits.std()).all())


@models
def test_experts_do_not_synchronise(name: str) -> None:
    _, module = experts_modules(low_precision_model(name, "sonic", 0))[0]
    x = torch.randn(40, HIDDEN, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.randint(8, (40, 2), device=DEVICE)
    weights = torch.rand(40, 2, device=DEVICE)
    module(x, ids, weights).sum().backward()  # compiles and recognises
    expected, x.grad = x.grad, None
    torch.cuda.synchronize()
    with no_synchronization():
        module(x, ids, weights).sum().backward()
    assert expected.norm() > 0
    assert torch.equal(x.grad, expected)
