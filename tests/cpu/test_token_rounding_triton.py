"""Token rounding's Triton kernels: in the interpreter, and compiled for sm_90."""

import contextlib
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.runtime.jit import JITFunction

from sonic.routing import max_pairs
from sonic.routing.token_rounding import RULES
from sonic.triton import rounding_keys, rounding_select, rounding_summaries, rounding_winners
from sonic.triton import token_rounding as kernels
from tests.cpu.test_triton_compile import compiled  # noqa: F401
from tests.interpreter import LONGEST, run_interpreted

_MODULES = rounding_keys, rounding_select, rounding_summaries, rounding_winners

compiles = pytest.mark.skipif(
    bool(triton.knobs.runtime.interpret), reason="TRITON_INTERPRET is set: nothing compiles"
)


@pytest.mark.timeout(LONGEST)
def test_kernels_in_the_interpreter():
    run_interpreted(Path(__file__).with_name("token_rounding_interpreted.py"))


@pytest.fixture(autouse=True)
def _without_device(monkeypatch):
    for module in (kernels, rounding_winners):
        monkeypatch.setattr(module, "device_of", lambda tensor: contextlib.nullcontext())


def _round(tokens, experts, top_k, rule, dtype=torch.float32):
    slots = max_pairs(tokens, experts, top_k, 128, rule)
    scores = torch.zeros(tokens, experts, dtype=dtype)
    return kernels.round_tokens(scores, torch.zeros(experts), top_k, 128, rule, slots)


def _round_logits(tokens, experts, top_k, rule, dtype=torch.bfloat16, full=False):
    slots = max_pairs(tokens, experts, top_k, 128, rule)
    logits, uniform = torch.zeros(tokens, experts, dtype=dtype), torch.zeros(experts)
    rounded, _, *winners = kernels.round_logits(logits, uniform, top_k, 128, rule, slots, full)
    kernels.round_logits_grad(
        rounded.weights,
        rounded.weights,
        rounded.expert_ids,
        rounded.offset_by_token,
        *winners,
        logits if full else None,
        experts,
        dtype,
    )


def _texts(compiled, name):  # noqa: F811
    """Distinct PTX of a kernel's variants."""
    return {kernel.asm["ptx"] for kernel in compiled[name]}


@compiles
def test_every_kernel_compiles(compiled):  # noqa: F811
    for rule in RULES:
        _round(16384, 256, 4, rule)
    _round(40960, 64, 8, "nr-s", torch.bfloat16)  # columns in chunks
    _round(100, 5000, 8, "nr", torch.float16)  # rows in blocks
    _round(24576, 1, 1, "sr")
    for dtype in (torch.float32, torch.bfloat16):
        scores = rounding_winners.winner_softmax(
            torch.zeros(64, 256, dtype=dtype), 8, dtype is torch.float32
        )
        rounding_winners.winner_softmax_grad(scores, scores, 8, dtype is torch.float32, dtype)
        _round_logits(16384, 512, 8, "nr", dtype, full=dtype is torch.float32)
        ids = torch.zeros(64, dtype=torch.int32)
        kernels.round_tokens_grad(torch.zeros(64), ids, ids, 64, 256, dtype)
    own = {
        name
        for module in (kernels, *_MODULES)
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert len(own) == 10 and own <= set(compiled)
    for name in own:
        for text in _texts(compiled, name):
            # The order in which atomics land would decide the result.
            assert not re.search(r"\b(atom|red)\.(global|shared|relaxed|gpu)", text), name


@compiles
def test_the_number_of_tokens_compiles_anew_once_per_power_of_two(compiled):  # noqa: F811
    for tokens in (1025, 1111, 2048):
        for rule in ("nr", "balance-f"):
            outputs = _round(tokens, 16, 2, rule)
        ids, weights = outputs[1], outputs[0]
        kernels.round_tokens_grad(weights, ids, ids, tokens, 16, torch.float32)
        scores = rounding_winners.winner_softmax(torch.zeros(tokens, 16), 2, False)
        rounding_winners.winner_softmax_grad(scores, scores, 2, False, torch.float32)
    for name in compiled:
        variants = 2 if name == "_select_kernel" else 1  # one for each of the two rules
        assert len(_texts(compiled, name)) == variants, name


@compiles
def test_a_column_moves_in_16_byte_pieces(compiled):  # noqa: F811
    """Keys are read as many times as there are passes; element by element that would show."""
    _round(16384, 128, 8, "nr")
    (text,) = _texts(compiled, "_select_kernel")
    assert len(re.findall(r"ld\.global[\w.:]*\.v4", text)) >= 4  # 16 keys a thread
