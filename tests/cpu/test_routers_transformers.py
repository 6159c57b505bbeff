"""Routers and losses against transformers' own, values and gradients, over random inputs."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

pytest.importorskip("transformers.models")

from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import (
    MixtralTopKRouter,
    load_balancing_loss_func,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from sonic.nn.routers import SigmoidRouter, SoftmaxRouter, SqrtSoftplusRouter, TopKRouter

T, H = 37, 24
SEEDS = range(8)
every_seed = pytest.mark.parametrize("seed", SEEDS)


def config(num_experts, top_k, **options):
    names = {"num_experts": num_experts, "num_local_experts": num_experts}
    return SimpleNamespace(hidden_size=H, num_experts_per_tok=top_k, **(names | options))


def dense(ids, weights, num_columns):
    """(T, C): the weights at their columns. Winners may come in any order."""
    out = weights.new_zeros(ids.shape[0], num_columns)
    live = ids >= 0
    return out.scatter_add(1, ids.clamp(min=0).long(), torch.where(live, weights, 0.0))


def assert_near(actual, expected, name="tensor"):
    """Equal up to the rounding of fp32 sums of T terms, taken in another order."""
    assert expected.any(), name
    band = 4 * torch.finfo(torch.float32).eps * T**0.5 * expected.detach().abs().max().item()
    torch.testing.assert_close(
        actual, expected, rtol=2e-5, atol=band, msg=lambda text: f"{name}: {text}"
    )


def assert_same_router(theirs: nn.Module, ours: TopKRouter, seed: int, call=None) -> None:
    """Same weights and same gradients of input and matrix, from one random draw of both."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=H**-0.5)
        for name, buffer in theirs.named_buffers():
            assert name == "e_score_correction_bias"
            buffer.normal_(std=0.1)
            ours.correction_bias.copy_(buffer)
    ours.load_state_dict(
        {name: value for name, value in theirs.state_dict().items() if "correction" not in name},
        strict=False,
    )
    x = torch.randn(T, H)
    columns, weighting = ours.num_columns, torch.randn(T, ours.num_columns)
    results = []
    for module in (theirs, ours):
        leaf = x.clone().requires_grad_()
        if module is ours:
            out = ours(leaf)
            ids, weights, logits = out.topk_ids, out.topk_weights, out.logits
        else:
            logits, weights, ids = (call or theirs)(leaf)
        matrix = dense(ids, weights.float(), columns)
        (matrix * weighting).sum().backward()
        grads = [leaf.grad, *(p.grad for p in module.parameters())]
        results.append((logits, matrix, *grads))
    names = ["logits", "weights", "dx", *(name for name, _ in ours.named_parameters())]
    assert len(results[0]) == len(results[1]) == len(names)
    for name, expected, actual in zip(names, *results, strict=True):
        assert_near(actual, expected, name)


@every_seed
def test_mixtral(seed):
    theirs = MixtralTopKRouter(config(8, 2))
    assert_same_router(theirs, SoftmaxRouter(H, 8, 2), seed)


@every_seed
@pytest.mark.parametrize("renormalize", [True, False], ids=["norm", "plain"])
@pytest.mark.parametrize("router", [Qwen3MoeTopKRouter, OlmoeTopKRouter])
def test_qwen3_moe_and_olmoe(router, renormalize, seed):
    theirs = router(config(64, 8, norm_topk_prob=renormalize))
    assert_same_router(theirs, SoftmaxRouter(H, 64, 8, renormalize=renormalize), seed)


@every_seed
def test_gpt_oss(seed):
    theirs = GptOssTopKRouter(config(32, 4))
    assert_same_router(theirs, SoftmaxRouter(H, 32, 4, add_bias=True), seed)


@every_seed
@pytest.mark.parametrize("groups", [(1, 1), (8, 4), (8, 1), (5, 3)], ids=str)
@pytest.mark.parametrize("renormalize", [True, False], ids=["norm", "plain"])
def test_deepseek_v3(renormalize, groups, seed):
    columns, top_k = (40, 6) if groups == (5, 3) else (64, 6)
    options = {"n_group": groups[0], "topk_group": groups[1], "norm_topk_prob": renormalize}
    theirs = DeepseekV3TopkRouter(config(columns, top_k, routed_scaling_factor=2.5, **options))
    ours = SigmoidRouter(
        H,
        columns,
        top_k,
        scale=2.5,
        renormalize=renormalize,
        num_groups=groups[0],
        topk_groups=groups[1],
        float32_logits=True,
    )
    assert_same_router(theirs, ours, seed)


@every_seed
@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_deepseek_v2(method, seed):
    """Its groups are ranked by their best expert, and its weights are not renormalised."""
    theirs = DeepseekV2TopkRouter(
        config(40, 4, topk_method=method, n_group=8, topk_group=3, routed_scaling_factor=16.0)
    )
    groups = {"num_groups": 8, "topk_groups": 3, "group_best": 1}
    ours = SoftmaxRouter(
        H, 40, 4, renormalize=False, scale=16.0, **(groups if method != "greedy" else {})
    )
    assert_same_router(theirs, ours, seed)


@every_seed
def test_deepseek_v4(seed):
    module = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    options = {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5}
    theirs = module.DeepseekV4TopKRouter(config(32, 4, **options))
    assert_same_router(theirs, SqrtSoftplusRouter(H, 32, 4, scale=1.5), seed)


@every_seed
def test_deepseek_v4_with_a_table_of_ids(seed):
    module = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    options = {"scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "vocab_size": 50}
    theirs = module.DeepseekV4HashRouter(config(32, 4, **options))
    torch.manual_seed(seed)
    table = torch.rand(50, 32).topk(4).indices
    words, x = torch.randint(50, (T,)), torch.randn(T, H)
    theirs.tid2eid = table
    ours = SqrtSoftplusRouter(H, 32, 4, scale=1.5)
    nn.init.normal_(theirs.weight, std=H**-0.5)
    ours.weight.data.copy_(theirs.weight)
    _, expected, ids = theirs(x, words)
    out = ours(x, ids=table[words])
    assert torch.equal(out.topk_ids.long(), ids)
    torch.testing.assert_close(out.topk_weights, expected)
    weighting = torch.randn_like(expected)
    grads = [
        torch.autograd.grad((weights * weighting).sum(), module.weight)[0]
        for module, weights in ((theirs, expected), (ours, out.topk_weights))
    ]
    assert_near(*reversed(grads))


@every_seed
def test_minimax_m2(seed):
    module = pytest.importorskip("transformers.models.minimax_m2.modeling_minimax_m2")
    theirs = module.MiniMaxM2TopKRouter(config(32, 8))
    ours = SigmoidRouter(H, 32, 8)
    bias = torch.randn(32, generator=torch.Generator().manual_seed(seed)) * 0.1
    ours.correction_bias.copy_(bias)
    assert_same_router(theirs, ours, seed, call=lambda x: theirs(x, bias))


@every_seed
def test_longcat_flash(seed):
    """Softmax scores, a bias on them, and identity experts among the columns."""
    module = pytest.importorskip("transformers.models.longcat_flash.modeling_longcat_flash")
    theirs = module.LongcatFlashTopkRouter(
        config(24, 4, n_routed_experts=24, zero_expert_num=8, routed_scaling_factor=6.0)
    )
    ours = TopKRouter(
        H,
        24,
        4,
        renormalize=False,
        scale=6.0,
        correction_bias=True,
        num_identity=8,
        float32_logits=True,
    )
    torch.manual_seed(seed)
    nn.init.normal_(theirs.classifier.weight, std=H**-0.5)
    theirs.e_score_correction_bias.normal_(std=0.02)
    ours.weight.data.copy_(theirs.classifier.weight)
    ours.correction_bias.copy_(theirs.e_score_correction_bias)
    x, weighting = torch.randn(T, H), torch.randn(T, 32)
    *_, weights, ids = theirs(x)  # newer releases return the logits first
    out = ours(x)
    pair = dense(ids, weights, 32), dense(out.topk_ids, out.topk_weights, 32)
    assert_near(*reversed(pair))
    assert_near(out.identity_weight, pair[0][:, 24:].sum(1))
    grads = [
        torch.autograd.grad((matrix * weighting).sum(), leaf)[0]
        for matrix, leaf in zip(pair, (theirs.classifier.weight, ours.weight), strict=True)
    ]
    assert_near(*reversed(grads))


@every_seed
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("case", [(8, 2), (64, 8), (60, 4), (128, 1)], ids=str)
def test_load_balancing_loss(case, padded, seed):
    """Theirs is ``top_k`` for an even load, ours one. Padding is a mask of -inf here."""
    num_experts, top_k = case
    torch.manual_seed(seed)
    logits = torch.randn(48, num_experts)
    keep = torch.rand(48) < 0.7 if padded else None
    router = SoftmaxRouter(num_experts, num_experts, top_k, losses={"switch": top_k})
    nn.init.eye_(router.weight)
    leaves = [logits.clone().requires_grad_() for _ in range(2)]
    expected = load_balancing_loss_func(
        (leaves[0],), num_experts, top_k, keep.view(4, 12).long() if padded else None
    )
    mask = None
    if padded:
        mask = torch.where(keep, 0.0, -torch.inf)[:, None].expand(48, num_experts)
    out = router(leaves[1], mask=mask)
    torch.testing.assert_close(out.aux_loss, expected)
    expected.backward()
    out.aux_loss.backward()
    assert_near(leaves[1].grad, leaves[0].grad)


@every_seed
def test_load_balancing_loss_of_several_layers(seed):
    """Theirs pools the tokens of all layers; so does a joined batch here."""
    torch.manual_seed(seed)
    layers = [torch.randn(20, 16) for _ in range(3)]
    expected = load_balancing_loss_func(tuple(layers), 16, 4)
    router = SoftmaxRouter(16, 16, 4)
    nn.init.eye_(router.weight)
    out = router(torch.cat(layers))
    torch.testing.assert_close(4 * out.losses["switch"], expected)
