"""Every Triton kernel compiles for every architecture, on a machine without a GPU.

The launchers run on CPU tensors with Triton's driver replaced by one that names a target, and
launches replaced by compilation. So what is compiled is what a GPU would run: the same block sizes
and the same specialisation on alignment and on sizes.
"""

import contextlib
import re

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from sonic.enums import ScoreOrder
from sonic.plan import build_plan, build_plan_flat
from sonic.triton import bias_grad, combine, plan, score_grad, topk

MODULES = (bias_grad, combine, plan, score_grad, topk)

pytestmark = pytest.mark.skipif(
    bool(triton.knobs.runtime.interpret), reason="TRITON_INTERPRET is set: nothing compiles"
)


class _Driver:
    """As much of a Triton driver as compilation asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> str:
        # Compiled kernels are kept per device: a name no GPU has keeps these apart.
        return f"sm_{self._target.arch}, compile only"

    def get_current_stream(self, device: object = None) -> int:
        return 0


@pytest.fixture
def compiled(request, monkeypatch):
    """PTX of every kernel launched in the test, by kernel name."""
    texts: dict[str, list[str]] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        texts.setdefault(self.__name__, []).append(kernel.asm["ptx"])
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    for module in MODULES:
        monkeypatch.setattr(module, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver(getattr(request, "param", 90)))
    return texts


every_architecture = pytest.mark.parametrize(
    "compiled", [90, 100, 120], indirect=True, ids="sm_{}".format
)


def _ids(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


def _launch_all() -> None:
    for tokens, experts in ((64, 128), (4000, 128), (64, 1), (2000, 1), (70, 65536)):
        build_plan(_ids(tokens, 8), experts, impl="triton")
    for slots in (100, 9000):
        build_plan_flat(_ids(slots, dtype=torch.int64), _ids(slots), 10, 60, impl="triton")
    for experts, top_k, dtype in (
        (128, 8, torch.bfloat16),
        (60, 4, torch.float32),
        (4096, 64, torch.float16),
        (65536, 64, torch.bfloat16),
        (1, 1, torch.bfloat16),
    ):
        logits = torch.zeros(4, experts, dtype=dtype)
        for order in (ScoreOrder.SOFTMAX_OVER_TOPK, ScoreOrder.TOPK_OVER_SOFTMAX):
            scores, ids = topk.topk_scores(logits, top_k, order)
            topk.topk_scores_grad(scores, logits, scores, ids, order)
    slots, scores, offset = _ids(64), torch.zeros(64), _ids(9)
    for hidden, dtype in ((4096, torch.bfloat16), (100, torch.float32), (1, torch.float16)):
        rows, b2 = torch.zeros(64, hidden, dtype=dtype), torch.zeros(8, hidden, dtype=dtype)
        for weights in (scores, None):
            combine.combine(rows, slots, weights, None, None, 8, 8)
            combine.combine(rows, slots, weights, offset, slots, 8, 0)
        score_grad.score_grad(torch.zeros(3, 64), slots, rows, b2, slots, offset)
        bias_grad.bias_grad_rows(rows, offset)
        bias_grad.bias_grad_gathered(rows, slots, scores, offset, dtype=torch.float32)
    combine.combine(rows, slots, scores, None, None, 2, 32)
    score_grad.gather_scores(scores, slots)
    score_grad.score_grad(torch.zeros(3, 64), slots)
    bias_grad.bias_grad_rows(torch.zeros(2048, 256, dtype=torch.bfloat16), offset)


@every_architecture
def test_every_kernel_compiles(compiled):
    _launch_all()
    kernels = {
        name
        for module in MODULES
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert len(kernels) > 10 and set(compiled) == kernels
    for name, texts in compiled.items():
        for text in texts:
            # The order in which atomics land would decide the result.
            assert not re.search(r"\b(atom|red)\.(global|shared|relaxed|gpu)", text), name


def _vector_loads(text: str) -> int:
    return len(re.findall(r"ld\.global[\w.:]*\.v4", text))


def test_rows_move_in_16_byte_pieces(compiled):
    """A model's hidden size must not fall back to element-wise loads."""
    slots, scores, offset = _ids(64), torch.zeros(64), _ids(9)
    rows = torch.zeros(64, 2880, dtype=torch.bfloat16)
    combine.combine(rows, slots, scores, None, None, 8, 8)
    combine.combine(rows, slots, scores, offset, slots, 8, 0)
    bias_grad.bias_grad_rows(rows, offset)
    score_grad.score_grad(torch.zeros(3, 64), slots, rows, rows[:8], slots, offset)
    topk.topk_scores(torch.zeros(4, 128, dtype=torch.bfloat16), 8, ScoreOrder.SOFTMAX_OVER_TOPK)
    assert _vector_loads(compiled["_combine_kernel"][0]) == 8
    assert _vector_loads(compiled["_combine_ragged_kernel"][0]) == 4
    assert _vector_loads(compiled["_segment_sum_kernel"][0]) == 4
    assert _vector_loads(compiled["_score_grad_kernel"][0]) >= 8
    assert _vector_loads(compiled["_topk_kernel"][0]) >= 1


def test_the_number_of_tokens_does_not_recompile(compiled):
    """Sizes that change from step to step are not specialised on: one kernel serves them all."""
    for tokens in (1024, 1025, 1111, 4000):
        build_plan(_ids(tokens, 8), 16, impl="triton")
        logits = torch.zeros(tokens, 16)
        order = ScoreOrder.TOPK_OVER_SOFTMAX
        scores, ids = topk.topk_scores(logits, 8, order)
        topk.topk_scores_grad(scores, logits, scores, ids, order)
        slots = _ids(8 * tokens)
        rows = torch.zeros(8 * tokens, 16)
        combine.combine(rows, slots, slots.float(), None, None, tokens, 8)
        score_grad.score_grad(torch.zeros(2, 8 * tokens), slots)
        score_grad.gather_scores(slots.float(), slots)
        bias_grad.bias_grad_rows(rows, _ids(17))
    for name, texts in compiled.items():
        assert len(set(texts)) == 1, name
