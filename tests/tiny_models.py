"""Tiny transformers models with random weights, and a comparison of two runs of one of them.

Weights are drawn with unit signal size (standard deviation 1/sqrt(fan in)), so that the experts
contribute to every logit and a wrong expert cannot hide below a tolerance. A fifth of gpt-oss's
gates and ups get biases far beyond its clamp, so that the clamp acts; close to it, where the
gradient jumps, a comparison in low precision would measure nothing but luck.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig

HIDDEN, INTERMEDIATE, VOCAB = 128, 96, 256

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def _qwen3_moe() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **_COMMON,
        intermediate_size=160,
        moe_intermediate_size=INTERMEDIATE,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        output_router_logits=True,  # adds the balancing loss
    )


def _mixtral() -> MixtralConfig:
    return MixtralConfig(
        **_COMMON,
        intermediate_size=INTERMEDIATE,
        num_key_value_heads=2,
        num_local_experts=8,
        num_experts_per_tok=2,
    )


def _deepseek_v3() -> DeepseekV3Config:
    return DeepseekV3Config(
        **_COMMON,
        intermediate_size=160,
        moe_intermediate_size=INTERMEDIATE,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
        num_nextn_predict_layers=0,
    )


def _gpt_oss() -> GptOssConfig:
    return GptOssConfig(
        **_COMMON,
        intermediate_size=INTERMEDIATE,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=16,
        num_local_experts=8,
        num_experts_per_tok=4,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
}


def make_model(name: str, experts_implementation: str, seed: int = 0) -> Any:
    """A float32 CPU model in training mode; its weights depend on ``name`` and ``seed`` alone."""
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name](),
        attn_implementation="eager",
        experts_implementation=experts_implementation,
        dtype=torch.float32,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in sorted(model.named_parameters()):
            parameter.copy_(_random_parameter(parameter_name, parameter, name, generator))
    return model.train()


def _random_parameter(name: str, like: Tensor, model: str, generator: torch.Generator) -> Tensor:
    noise = torch.randn(like.shape, generator=generator)
    if "norm" in name:
        return 1.0 + 0.1 * noise
    if name.endswith("gate_up_proj_bias"):
        choice = torch.rand(like.shape, generator=generator)
        return 0.2 * noise + 12.0 * ((choice > 0.9).float() - (choice < 0.1).float())
    if like.ndim == 1 or name.endswith("bias"):
        return 0.2 * noise
    if "embed" in name:
        return noise
    transposed = model == "gpt_oss" and ".experts." in name
    scale = like.shape[-2 if transposed else -1] ** -0.5
    if name.endswith(("mlp.gate.weight", "mlp.router.weight")):
        scale *= 2.0
    return scale * noise


def make_tokens(seed: int = 0, batch: int = 2, length: int = 20) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def experts_modules(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "is_transposed")]


@dataclass(frozen=True)
class Run:
    """What one forward and backward pass gave: float64 copies on CPU."""

    logits: Tensor
    loss: Tensor
    grad_by_name: dict[str, Tensor | None]
    expert_ids: list[Tensor]  # one (T, top_k) per experts module, in the order of their calls


def run(model: Any, tokens: Tensor) -> Run:
    """Forward with labels and backward. Gradients start from none."""
    expert_ids: list[Tensor] = []

    def record(_module: nn.Module, args: tuple[Any, ...]) -> None:
        expert_ids.append(args[1].detach().cpu())

    handles = [m.register_forward_pre_hook(record) for _, m in experts_modules(model)]
    model.zero_grad(set_to_none=True)
    try:
        output = model(tokens, labels=tokens)
        output.loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return Run(
        _float64(output.logits),
        _float64(output.loss),
        {
            name: None if parameter.grad is None else _float64(parameter.grad)
            for name, parameter in model.named_parameters()
        },
        expert_ids,
    )


def same_routing(*runs: Run) -> bool:
    """True if all runs sent every token to the same experts, in any order of the slots.

    Rounding can turn a near tie in a router, and errors of runs that route differently say nothing
    about the experts; low-precision comparisons take the first seed without such a tie.
    """
    first = [ids.sort(dim=-1).values for ids in runs[0].expert_ids]
    return all(
        torch.equal(ids.sort(dim=-1).values, wanted)
        for other in runs[1:]
        for ids, wanted in zip(other.expert_ids, first, strict=True)
    )


def _float64(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``|actual - expected| / |expected|`` in L2; infinite if anything is not finite."""
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    difference, size = (actual - expected).norm(), expected.norm()
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / size)


def errors(actual: Run, expected: Run) -> dict[str, float]:
    """Relative error of the logits, the loss and every gradient, by name.

    A stack of expert weights or biases is judged by each expert's own slice, so that one wrong
    expert among many is as visible as it is alone; ``name[e]`` is expert e's.
    """
    result = {
        "logits": relative_error(actual.logits, expected.logits),
        "loss": relative_error(actual.loss, expected.loss),
    }
    assert actual.grad_by_name.keys() == expected.grad_by_name.keys()
    for name, wanted in expected.grad_by_name.items():
        got = actual.grad_by_name[name]
        if wanted is None:
            result[name] = 0.0 if got is None else float("inf")
            continue
        if got is None:
            got = torch.full_like(wanted, float("nan"))
        if ".experts." in name:
            for expert, (a, b) in enumerate(zip(got, wanted, strict=True)):
                result[f"{name}[{expert}]"] = relative_error(a, b)
        else:
            result[name] = relative_error(got, wanted)
    return result
