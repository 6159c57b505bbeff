"""Sizes at which an index, an offset or a grid could leave 32 or 16 bits.

The float64 oracle is too slow for the whole of these. So the output's gradient is zero except for
a few tokens, whose results and gradients are those of a layer of these tokens and their experts
alone; everything else must be zero.
"""

import pytest
import torch

from sonic.testing import LayerInputs, assert_layer_close, layer_references, run_layer
from tests.layers import DEVICE, PROBLEM, experts

pytestmark = pytest.mark.gpu
GIB = 2**30


def needs_memory(amount):
    free, _ = torch.cuda.mem_get_info()
    if free < amount:
        pytest.skip(f"needs {amount / GIB:.0f} GiB of free GPU memory, {free / GIB:.0f} are")


def large_inputs(problem, picked):
    """Made on the GPU: the generator of ``sonic.testing`` would take minutes on the host."""
    generator = torch.Generator(DEVICE).manual_seed(problem.seed)
    tokens, hidden, width = problem.num_tokens, problem.hidden_size, problem.intermediate_size

    def normal(*size, std=1.0):
        drawn = torch.empty(size, dtype=problem.dtype, device=DEVICE)
        return drawn.normal_(std=std, generator=generator)

    ids = torch.randint(
        problem.num_experts, (tokens, problem.top_k), generator=generator, device=DEVICE
    )
    ids[picked[0], 0], ids[picked[-1], -1] = 0, problem.num_experts - 1
    weights = torch.rand(tokens, problem.top_k, generator=generator, device=DEVICE)
    dout = torch.zeros(tokens, hidden, dtype=problem.dtype, device=DEVICE)
    dout[picked] = normal(len(picked), hidden)
    return LayerInputs(
        hidden_states=normal(tokens, hidden),
        topk_ids=ids.to(problem.ids_dtype),
        topk_weights=weights / weights.sum(dim=1, keepdim=True),
        w1=normal(problem.num_experts, 2 * width, hidden, std=hidden**-0.5),
        w2=normal(problem.num_experts, hidden, width, std=width**-0.5),
        b1=None,
        b2=None,
        dout=dout,
    )


def check_picked(problem, picked):
    picked = torch.tensor(picked, device=DEVICE)
    inputs = large_inputs(problem, picked)
    actual = run_layer(experts, problem, inputs)
    ids = inputs.topk_ids[picked].long()
    used = ids.unique()
    by_token = {"out", "dhidden_states", "dtopk_weights"}
    part = type(actual)(
        **{
            name: None if value is None else value[picked if name in by_token else used]
            for name, value in vars(actual).items()
        }
    )
    for name in ("dhidden_states", "dtopk_weights", "dw1", "dw2"):
        whole, some = (torch.count_nonzero(getattr(result, name)) for result in (actual, part))
        assert whole == some, f"{name} is not zero where no gradient leads to"
    small = LayerInputs(
        hidden_states=inputs.hidden_states[picked],
        topk_ids=torch.searchsorted(used, ids),
        topk_weights=inputs.topk_weights[picked],
        w1=inputs.w1[used],
        w2=inputs.w2[used],
        b1=None,
        b2=None,
        dout=inputs.dout[picked],
    )
    assert actual.out.isfinite().all()
    del inputs, actual
    smaller = problem.with_changes(num_tokens=len(picked), num_experts=len(used))
    assert_layer_close(part, *layer_references(smaller, small), smaller)


def spread(tokens, count=96):
    """The first and the last tokens, and some in between; ascending."""
    third = count // 3
    middle = [tokens * (i + 1) // (third + 2) for i in range(third)]
    return sorted({*range(third), *middle, *range(tokens - third, tokens)})


PLAIN = PROBLEM.with_changes(has_bias=False, drop_fraction=0.0)


def test_more_than_2_to_the_32_elements_of_expert_outputs():
    needs_memory(48 * GIB)
    tokens = 131_072 + 128
    assert tokens * 8 * 4096 > 2**32
    problem = PLAIN.with_changes(
        num_tokens=tokens, top_k=8, hidden_size=4096, intermediate_size=64, num_experts=8
    )
    check_picked(problem, spread(tokens))


def test_65536_experts():
    needs_memory(8 * GIB)
    problem = PLAIN.with_changes(
        num_tokens=70_000, top_k=2, hidden_size=64, intermediate_size=8, num_experts=65_536
    )
    check_picked(problem, spread(70_000))


def test_hidden_size_65536():
    needs_memory(8 * GIB)
    problem = PLAIN.with_changes(
        num_tokens=300, top_k=2, hidden_size=65_536, intermediate_size=64, num_experts=4
    )
    check_picked(problem, list(range(300)))
