"""Planted mistakes in every public function, each of which the comparison must notice.

Shared by the reference's tests on a CPU and the kernels' tests on a GPU.
"""

import pytest
import torch
import torch.nn.functional as F

import sonic
from sonic import functional
from sonic.reference import (
    experts_flat_low_precision,
    experts_flat_reference,
    experts_low_precision,
    experts_reference,
    grouped_mm_reference,
    moe_reference,
)
from sonic.testing import (
    Routing,
    assert_close,
    assert_mutations_fail,
    drop_plan_row,
    make_inputs,
    omit_scores,
    shift_offsets,
    shift_plan_offsets,
    swap_experts,
)

TENSORS = ("hidden_states", "w1", "w2", "b1", "b2")


def _with_w1(operands, change):
    (x, w1, *rest), *others = operands
    return ((x, change(w1), *rest), *others)


# What ``functional._run`` is called with: operands, routing weights, plan.
MISTAKES = {
    "a row dropped": lambda o, w, plan: (o, w, drop_plan_row(plan)),
    "offsets shifted": lambda o, w, plan: (o, w, shift_plan_offsets(plan)),
    "scores omitted": lambda o, w, plan: (o, omit_scores(w), plan),
    "experts swapped": lambda o, w, plan: (
        _with_w1(o, lambda w1: swap_experts(w1, 0, w1.shape[0] - 1)),
        w,
        plan,
    ),
}


def _experts(inputs, impl, dtype):
    weights = inputs.topk_weights.to(torch.float64 if dtype == torch.float64 else torch.float32)

    def run(function, **options):
        def call(hidden_states, w1, w2, b1, b2):
            args = hidden_states, inputs.topk_ids, weights, w1, w2
            return function(*args, b1=b1, b2=b2, **options)

        return call

    return run(sonic.experts, impl=impl), run(experts_reference), run(experts_low_precision)


def _experts_flat(inputs, impl, dtype):
    weights = inputs.topk_weights.to(torch.float64 if dtype == torch.float64 else torch.float32)
    tokens, top_k = inputs.topk_ids.shape
    token_ids = torch.arange(tokens, device=weights.device).repeat_interleave(top_k).flip(0)
    expert_ids, weights = inputs.topk_ids.flatten().flip(0), weights.flatten().flip(0)

    def run(function, **options):
        def call(hidden_states, w1, w2, b1, b2):
            args = hidden_states, token_ids, expert_ids, weights, w1, w2
            return function(*args, b1=b1, b2=b2, **options)

        return call

    functions = experts_flat_reference, experts_flat_low_precision
    return run(sonic.experts_flat, impl=impl), *map(run, functions)


def _moe(inputs, impl, dtype):
    experts, hidden = inputs.w1.shape[0], inputs.w1.shape[2]
    generator = torch.Generator().manual_seed(2)
    router = torch.randn(experts, hidden, generator=generator) / hidden**0.5
    router = router.to(inputs.hidden_states)
    # Of the dtype under test: in another one near ties would fall otherwise.
    _, ids = sonic.topk_routing(F.linear(inputs.hidden_states, router), 3)

    def run(function, **options):
        def call(hidden_states, w1, w2, b1, b2):
            args = hidden_states, router.to(dtype), w1, w2
            return function(*args, top_k=3, b1=b1, b2=b2, **options)[0]

        return call

    return (
        run(sonic.moe, impl=impl),
        run(moe_reference, topk_ids=ids),
        run(moe_reference, topk_ids=ids, low_precision=True),
    )


ENTRIES = {"experts": _experts, "experts_flat": _experts_flat, "moe": _moe}


def check_entry(name: str, problem, device: str, impl: str) -> None:
    """Result and gradients of ``name`` are accepted, and none of the mistakes is.

    ``problem`` has biases, every expert of it has rows, and its layout is interleaved.
    """
    inputs = make_inputs(problem, device)

    def run(index, dtype):
        leaves = {n: getattr(inputs, n).detach().to(dtype).requires_grad_() for n in TENSORS}
        out = ENTRIES[name](inputs, impl, dtype)[index](**leaves)
        dout = inputs.dout.to(dtype)
        gradients = torch.autograd.grad(out, list(leaves.values()), dout)
        return dict(zip(("out", *TENSORS), (out.detach(), *gradients), strict=True))

    exact, low = run(1, torch.float64), run(2, problem.dtype)

    def compare(key):
        return lambda t: assert_close(t, exact[key], low[key], name=f"{key} of {name}")

    actual = run(0, problem.dtype)
    for key, value in actual.items():
        swapped = ("swap_experts",) if key in ("w1", "w2", "b1", "b2") else ()
        assert_mutations_fail(compare(key), value, expected=("zero_output", *swapped))
    original = functional._run
    for mistake, change in MISTAKES.items():
        with pytest.MonkeyPatch.context() as patch:
            # An eager call that needs no dispatcher does not pass through ``_run``.
            patch.setattr(functional, "needs_dispatcher", lambda _: True)
            patch.setattr(functional, "_run", lambda *a, c=change: original(*c(*a)))
            with torch.no_grad():
                leaves = {n: getattr(inputs, n) for n in TENSORS}
                wrong = ENTRIES[name](inputs, impl, problem.dtype)[0](**leaves)
        with pytest.raises(AssertionError):
            compare("out")(wrong)
            pytest.fail(f"accepted: {mistake}", pytrace=False)


def check_grouped_mm(device: str, impl: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(*size, std=1.0):
        return (std * torch.randn(size, generator=generator)).to(device, dtype)

    offset = torch.tensor([0, 70, 70, 200, 201, 280], dtype=torch.int32, device=device)
    rows, weight, bias = normal(300, 136), normal(5, 72, 136, std=136**-0.5), normal(5, 72)
    dout = normal(300, 72)

    def run(function, cast=dtype, offset=offset, **options):
        leaves = [t.to(cast).detach().requires_grad_() for t in (rows, weight, bias)]
        out = function(leaves[0], leaves[1], offset, bias=leaves[2], **options)
        return out.detach(), *torch.autograd.grad(out, leaves, dout.to(cast))

    actual = run(sonic.grouped_mm, impl=impl)
    exact = run(grouped_mm_reference, torch.float64)
    low = run(sonic.grouped_mm, impl="reference")
    by_row = "zero_output", "drop_last_row", "swap_experts"
    for index, key in enumerate(("out", "drows", "dweight", "dbias")):
        offsets = offset if index < 2 else None
        assert_mutations_fail(
            lambda t, i=index, k=key, o=offsets: assert_close(
                t, exact[i], low[i], per_expert_rows=o, name=k
            ),
            actual[index],
            offsets,
            expected=by_row if index < 2 else ("zero_output", "swap_experts"),
        )
    shifted = run(sonic.grouped_mm, offset=shift_offsets(offset), impl=impl)
    for got, expected, rounded in zip(shifted, exact, low, strict=True):
        with pytest.raises(AssertionError):
            assert_close(got, expected, rounded)


def uniform(problem):
    """``problem`` with every slot live, the form that :func:`check_entry` takes."""
    return problem.with_changes(drop_fraction=0.0, routing=Routing.UNIFORM, has_bias=True)
