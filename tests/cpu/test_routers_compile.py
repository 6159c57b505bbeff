"""The router kernels compiled for a GPU that is not there: variants and registers."""

import pytest
import torch

pytest.importorskip("triton")

from sonic.routing.route import _forward_unfused
from sonic.triton import balance, router, router_grad
from tests.cpu.test_triton_compile import _spills, compiled, pytestmark  # noqa: F401
from tests.router_checks import make_route


def launch(tokens, columns, top_k, dtype=torch.bfloat16, bias=None, **options):
    """Forward and backward of one pass, with every loss."""
    config = make_route(columns, top_k, **options)
    logits = torch.zeros(tokens, columns, dtype=dtype)
    if router.is_fused(tokens, columns, False, config):
        result = router.route_fused(logits, bias, None, config)
        scores, ids, lse, load, live = (
            result.scores, result.ids, result.lse, result.load, result.live
        )  # fmt: skip
    else:
        scores, ids, lse, norm, _ = router.route_rows(logits, bias, None, None, config)
        balance.column_sums(logits, None, lse, norm, config)
        load = torch.zeros(config.num_sequences, columns, dtype=torch.int32)
        live = torch.zeros(config.num_sequences, dtype=torch.int32)
    one = torch.zeros(())
    weight, dz_sum = balance.loss_weights(None, one, one, one, load, live, config)
    router_grad.route_grad(scores, weight, dz_sum, logits, None, scores, ids, lse, config)


def test_no_spills_up_to_8192_columns(compiled, tmp_path):  # noqa: F811
    bias = torch.zeros(256)
    deepseek = {"score": "sigmoid", "num_groups": 8, "topk_groups": 4, "scale": 2.5}
    launch(4096, 256, 8, torch.float32, bias, **deepseek)
    for columns, top_k in ((8, 2), (64, 64), (128, 8), (512, 10), (1024, 8), (8192, 8)):
        launch(512, columns, top_k)
        launch(512, columns, top_k, score="sqrt_softplus", renormalize=False)
    spilled = [name for name, kernels in compiled.items() for k in kernels if _spills(k, tmp_path)]
    assert len(compiled) >= 6 and not spilled


def test_the_number_of_tokens_does_not_recompile(compiled):  # noqa: F811
    for tokens in (4096, 4097, 5000, 8192):
        launch(tokens, 128, 8)
    for name, kernels in compiled.items():
        # The scan has a small block for few tiles.
        assert len(kernels) <= (2 if name == "_reduce_kernel" else 1), name


def test_the_unfused_pass_is_the_operator_for_given_winners():
    """What the interpreter's tests call is what the operator takes on a GPU."""
    assert not router.is_fused(64, 8, True, make_route(8, 2))
    assert callable(_forward_unfused)
