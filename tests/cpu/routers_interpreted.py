"""The router kernels run by Triton's interpreter on CPU tensors.

Not collected on its own: ``test_routers_interpreter.py`` runs it in a process of its own with
``TRITON_INTERPRET=1``, which must be set before triton is first imported.
"""

import pytest
import torch

import sonic.triton.product_key as product_key_module
from sonic.reference import product_key as product_key_twin
from sonic.runtime.route import RouteTensors
from sonic.testing import assert_close
from sonic.triton import router as router_module
from tests import router_checks as checks
from tests.cpu.triton_interpreted import _interpreter_works

if not _interpreter_works():
    pytest.skip("this Triton's interpreter does not run on this NumPy", allow_module_level=True)

CPU = torch.device("cpu")
both_paths = pytest.mark.parametrize("fused", [True, False], ids=["fused", "rows"])
every_score = pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])


@both_paths
@pytest.mark.parametrize("case", list(checks.option_grid()), ids=str)
def test_every_option(case, fused, poisoned):
    options, bias, mask, null = case
    inputs = checks.make_inputs(21, 24, torch.float32, CPU, bias=bias, mask=mask)
    route = checks.make_route(24, 4, **options, num_working=24 - null, num_experts=20)
    checks.check_route(inputs, route, fused=fused)


@both_paths
@every_score
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "columns", "top_k"), [(1, 8, 2), (70, 6, 5), (33, 60, 7), (9, 1, 1)]
)
def test_sizes(tokens, columns, top_k, dtype, score, fused, guarded):
    logits, bias, mask = checks.make_inputs(tokens, columns, dtype, CPU)
    route = checks.make_route(columns, top_k, score=score, renormalize=top_k > 1)
    checks.check_route((guarded.copy_of(logits), bias, mask), route, fused=fused)


@both_paths
@pytest.mark.parametrize("sequences", [2, 3, 6])
def test_sequences(sequences, fused, poisoned):
    """24 tokens fall into sequences of 12, 8 and 4, so that a tile is shorter than it could be."""
    inputs = checks.make_inputs(24, 10, torch.float32, CPU, mask="token")
    inputs[2][0] = -torch.inf
    options = {"num_working": 8, "num_experts": 6, "num_sequences": sequences}
    checks.check_route(inputs, checks.make_route(10, 3, **options), fused=fused)


def test_sequences_that_no_tile_divides_are_not_fused():
    assert not router_module.is_fused(21, 10, False, checks.make_route(10, 3, num_sequences=3))
    assert router_module.is_fused(21, 10, False, checks.make_route(10, 3, num_sequences=1))
    inputs = checks.make_inputs(21, 10, torch.float32, CPU)
    checks.check_route(inputs, checks.make_route(10, 3, num_sequences=3), fused=False)


@both_paths
def test_without_balance_and_without_plan(fused, poisoned, monkeypatch):
    monkeypatch.setattr(router_module.triton_plan, "_DIRECT_MAX_SLOTS", 0)
    inputs = checks.make_inputs(40, 12, torch.float32, CPU, bias=True)
    checks.check_route(inputs, checks.make_route(12, 3, balance=False), fused=fused)
    plain = checks.make_route(12, 3, num_experts=0)
    results = checks.check_route(inputs, plain, fused=fused)
    assert results.row_by_slot.numel() == results.offset_by_expert.numel() == 0
    assert not router_module.is_fused(
        40, 12, False, checks.make_route(12, 3, num_experts=0, balance=False)
    )


def test_wide_rows(monkeypatch, poisoned):
    """Columns past one block of the backward kernel and of the column sums."""
    inputs = checks.make_inputs(5, 2500, torch.float32, CPU, bias=True, mask="token")
    for score in ("softmax", "sigmoid"):
        route = checks.make_route(2500, 4, score=score, num_working=2400, num_experts=2400)
        assert not router_module.is_fused(5, 2500, False, route)
        checks.check_route(inputs, route, fused=False)


@every_score
@pytest.mark.parametrize("renormalize", [True, False])
def test_given_winners(score, renormalize, poisoned):
    """Repeated within a token, out of range, and null."""
    inputs = checks.make_inputs(17, 9, torch.float32, CPU, mask="row")
    ids = torch.randint(-1, 11, (17, 4))
    options = {"score": score, "renormalize": renormalize, "num_working": 7, "num_experts": 6}
    checks.check_route(inputs, checks.make_route(9, 4, **options), fused=False, ids=ids)


@both_paths
def test_strided_logits_and_masks(fused):
    wide = torch.randn(40, 24)
    mask = torch.where(torch.rand(20, 1) < 0.3, -torch.inf, 0.0).expand(20, 16)
    for logits in (wide[::2, 4:20], wide.t()[4:, 1:17]):
        inputs = logits, torch.randn(32)[::2], mask
        checks.check_route(inputs, checks.make_route(16, 3, score="sigmoid"), fused=fused)


def test_ties_and_specials():
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [
            [0.0, 0, 0, 0, 0, 0],
            [-0.0, 0, -1, -1, 1, 1],
            [1, nan, 2, -nan, inf, 3],
            [-inf, -inf, 5, -inf, -inf, -inf],
            [-inf] * 6,
            [3e38, -3e38, 3e38, 1e-45, -1e-45, 1e38],
        ]
    )
    expected = [[0, 1, 2], [4, 5, 0], [1, 3, 4], [2, -1, -1], [-1, -1, -1], [0, 2, 5]]
    for score in ("softmax", "sigmoid", "sqrt_softplus"):
        route = checks.make_route(6, 3, score=score)
        fused = RouteTensors(*router_module.route_fused(logits, None, None, route))
        scores, ids, *_ = router_module.route_rows(logits, None, None, None, route)
        assert fused.ids.tolist() == ids.tolist() == expected, score
        assert torch.equal(fused.scores.nan_to_num(7.0), scores.nan_to_num(7.0))
        assert scores[4].tolist() == [0, 0, 0] and scores[3].tolist() == [1, 0, 0]
        assert scores[[0, 1, 3, 4]].isfinite().all()
        assert fused.live.tolist() == [5]
        assert fused.load[0].tolist() == [3, 2, 3, 1, 2, 2]


def test_small_scores_of_the_root_of_softplus():
    """Far below zero, log(1 + exp(v)) is exp(v) to the last bit but one."""
    logits = torch.tensor([[-8.0, -16.0, -17.0, -40.0, -80.0, 30.0]])
    route = checks.make_route(6, 6, score="sqrt_softplus", renormalize=False)
    scores, ids, *_ = router_module.route_rows(logits, None, None, None, route)
    exact = torch.nn.functional.softplus(logits.double(), threshold=1000).sqrt()
    torch.testing.assert_close(scores.double(), exact.gather(1, ids.long()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "size", "top_k"), [(1, 1, 1), (9, 5, 3), (4, 32, 16), (2, 100, 64)]
)
def test_product_keys(tokens, size, top_k, dtype, renormalize, guarded):
    logits = guarded.copy_of((2 * torch.randn(tokens, 2, size)).to(dtype))
    scores, ids, lse = product_key_module.product_key(logits, top_k, renormalize)
    low, expected_ids, low_lse = product_key_twin.product_key_reference(logits, top_k, renormalize)
    assert torch.equal(ids, expected_ids)
    pairs = logits.double()[:, 0, :, None] + logits.double()[:, 1, None, :]
    chosen = pairs.flatten(1).gather(1, ids.long())
    exact = chosen.softmax(1) if renormalize else pairs.flatten(1).softmax(1).gather(1, ids.long())
    assert_close(scores, exact, low, ulps=16.0, magnitude=0.01, name="scores")
    torch.testing.assert_close(lse, low_lse)
    dscores = torch.randn_like(scores)
    dlogits = product_key_module.product_key_grad(dscores, logits, scores, ids, lse, renormalize)
    twins = [
        product_key_twin.product_key_grad_reference(dscores.to(s.dtype), v, s, ids, renormalize)
        for v, s in ((logits.double(), exact), (logits, low))
    ]
    assert_close(
        dlogits,
        *twins,
        ulps=16.0,
        magnitude=0.1 if dtype is torch.float32 else 0.0,
        allow_zero_reference=size == 1,
        name="dlogits",
    )
