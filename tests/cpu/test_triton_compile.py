"""Every Triton kernel compiles for every architecture, on a machine without a GPU.

The launchers run on CPU tensors with Triton's driver replaced by one that names a target, and
launches replaced by compilation. So what is compiled is what a GPU would run: the same block sizes
and the same specialisation on alignment and on sizes.
"""

import contextlib
import importlib
import pkgutil
import re
import subprocess

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import sonic.triton
from sonic.enums import ScoreOrder
from sonic.plan import build_plan, build_plan_flat
from sonic.runtime.route import Route
from sonic.triton import bias_grad, combine, parts, score_grad, tail, topk
from sonic.triton.launch import Launcher

# By walking the package, so that a kernel that no function below launches makes the test fail.
MODULES = {
    info.name: importlib.import_module(f"{sonic.triton.__name__}.{info.name}")
    for info in pkgutil.iter_modules(sonic.triton.__path__)
}

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
    """Every kernel compiled in the test, by name; each once."""
    kernels: dict[str, list] = {}
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        variants = kernels.setdefault(self.__name__, [])
        if not any(kernel is known for known in variants):
            variants.append(kernel)
        return kernel

    monkeypatch.setattr(JITFunction, "run", compile_only)
    # A launch that is only compiled must not be remembered as one that can run.
    monkeypatch.setattr(MODULES["launch"], "is_interpreted", lambda: True)
    monkeypatch.setattr(MODULES["plan"], "RUNS_ON_CPU", True)
    for module in MODULES.values():
        if hasattr(module, "device_of"):
            monkeypatch.setattr(module, "device_of", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver(getattr(request, "param", 90)))
    return kernels


every_architecture = pytest.mark.parametrize(
    "compiled", [90, 100, 120], indirect=True, ids="sm_{}".format
)


def _ids(*shape, dtype=torch.int32):
    return torch.zeros(shape, dtype=dtype)


def _launch_token_rounding(module) -> None:
    for tokens, experts in ((300, 128), (40_000, 128), (300, 8192)):
        scores = torch.zeros(tokens, experts)
        for rule in ("nr", "up", "down", "sr", "nr-s", "balance-f"):
            rounded = module.round_tokens(scores, torch.zeros(experts), 8, 128, rule, 4096)
        module.round_tokens_grad(*rounded[:3], tokens, experts, torch.bfloat16)
    for logits in (torch.zeros(64, 128), torch.zeros(64, 4096, dtype=torch.bfloat16)):
        scores = MODULES["rounding_winners"].winner_softmax(logits, 8, False)
        MODULES["rounding_winners"].winner_softmax_grad(scores, scores, 8, False, logits.dtype)
    for tokens, experts, top_k, dtype, full in (
        (300, 16, 8, torch.bfloat16, False),
        (300, 256, 8, torch.bfloat16, False),
        (300, 512, 8, torch.float32, True),
        (300, 4096, 8, torch.float16, False),
        # A table of keys with summaries, written by one warp and by several.
        (16384, 16, 2, torch.bfloat16, False),
        (16384, 64, 8, torch.bfloat16, False),
        (8200, 50, 4, torch.float32, True),
        # Without a table of keys; the last group of tokens is whole, and is not.
        (16384, 512, 8, torch.bfloat16, False),
        (8200, 300, 64, torch.float16, True),
    ):
        logits = torch.zeros(tokens, experts, dtype=dtype)
        assert MODULES["rounding_summaries"].are_summarized(logits) == (
            tokens > 300 and experts > 64
        )
        slots = top_k * tokens + 64 * experts
        rounded, _, *winners = module.round_logits(logits, None, top_k, 128, "nr", slots, full)
        module.round_logits_grad(
            rounded.weights, rounded.weights, rounded.expert_ids, rounded.offset_by_token,
            *winners, logits if full else None, experts, dtype,
        )  # fmt: skip


def _launch_routers(module) -> None:
    balance, grad = MODULES["balance"], MODULES["router_grad"]
    tokens, experts, top_k, sequences = 4096, 256, 8, 2
    logits, bias = torch.zeros(tokens, experts, dtype=torch.bfloat16), torch.zeros(experts)
    for score, groups, given in (("softmax", 1, None), ("sigmoid", 8, bias)):
        route = Route(top_k, score, True, 2.5, groups, 4 if groups > 1 else 1, 2, experts,
                      experts, sequences, True)  # fmt: skip
        result = module.route_fused(logits, given, None, route)
        scores, ids, lse, norm, _ = module.route_rows(logits, given, None, None, route)
        balance.column_sums(logits, None, lse, norm, route)
        one = torch.zeros(())
        weight, dz_sum = balance.loss_weights(
            result.prob_sum, one, one, one, result.load, result.live, route
        )
        grad.route_grad(scores, weight, dz_sum, logits, None, scores, ids, lse, route)


def _launch_product_key(module) -> None:
    logits = torch.zeros(64, 2, 128, dtype=torch.bfloat16)
    for renormalize in (True, False):
        scores, ids, lse = module.product_key(logits, 8, renormalize)
        module.product_key_grad(scores, logits, scores, ids, lse, renormalize)


def _launch_switch_loss(module) -> None:
    for tokens in (300, 32768):
        for experts, dtype in ((128, torch.bfloat16), (5, torch.float32), (8192, torch.float16)):
            logits = torch.zeros(tokens, experts, dtype=dtype)
            loss, *saved = module.switch_loss(logits, _ids(experts), 0.5)
            module.switch_loss_grad(loss, logits, _ids(experts), *saved, 0.5)


_LAUNCHES = {
    "product_key": _launch_product_key,
    "router": _launch_routers,
    "switch_loss": _launch_switch_loss,
    "token_rounding": _launch_token_rounding,
}


def _launch_all() -> None:
    for name, launch in _LAUNCHES.items():
        if name in MODULES:
            launch(MODULES[name])
    for rows in (torch.zeros(300, 4096, dtype=torch.bfloat16), torch.zeros(300, 100)):
        tail.zero_tail(rows, _ids(9))
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
    for experts in (4, 128, 4096):
        out = torch.zeros(experts, 16, 8, dtype=torch.bfloat16)
        parts.add_parts(out, out[:3], _ids(experts + 1), 999)
    combine.combine(rows, slots, scores, None, None, 2, 32)
    score_grad.gather_scores(scores, slots)
    score_grad.score_grad(torch.zeros(3, 64), slots)
    bias_grad.bias_grad_rows(torch.zeros(2048, 256, dtype=torch.bfloat16), offset)


@every_architecture
def test_every_kernel_compiles(compiled):
    _launch_all()
    kernels = {
        name
        for module in MODULES.values()
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert len(kernels) > 10 and set(compiled) == kernels
    for name, variants in compiled.items():
        for kernel in variants:
            # The order in which atomics land would decide the result.
            assert not re.search(r"\b(atom|red)\.(global|shared|relaxed|gpu)", kernel.asm["ptx"]), (
                name
            )


def test_no_kernel_spills(compiled, tmp_path):
    """On the architecture that sonic has kernels for."""
    _launch_all()
    spilled = [
        f"{name}, {kernel.metadata.num_warps} warps"
        for name, variants in compiled.items()
        for kernel in variants
        if _spills(kernel, tmp_path)
    ]
    assert compiled and not spilled


# Launched by Triton itself, when the launch before is over.
_APART = {
    "_column_sums_kernel", "_keys_kernel", "_product_key_grad_kernel", "_product_key_kernel",
}  # fmt: skip
_GLOBAL = r"\b(?:ld|st|atom|red|cp)\b[\w.:]*\.global"
_BRANCH = r"\bbra\b|^\$L__BB"


def _waits_first(text: str) -> bool:
    """Whether all threads of a kernel wait for earlier launches before any branch and any access of
    memory."""
    wait = text.find("griddepcontrol.wait")
    first = re.search(f"{_GLOBAL}|{_BRANCH}", text, re.MULTILINE)
    assert first is not None
    return 0 <= wait < first.start()


@every_architecture
def test_launches_that_overlap_wait_before_anything_else(compiled):
    """And of the plan alone it is known what comes behind its kernels, which may start early."""
    _launch_all()
    let_next_start = {"_rank_kernel", "_scan_tiles_kernel", "_scan_experts_kernel"}
    waiting = set()
    for name, variants in compiled.items():
        for kernel in variants:
            text, overlaps = kernel.asm["ptx"], bool(kernel.metadata.launch_pdl)
            assert _waits_first(text) == overlaps, name
            waiting |= {name} if overlaps else set()
            lets = "griddepcontrol.launch_dependents" in text
            assert lets == (name in let_next_start), name
    launchers = [
        value
        for module in MODULES.values()
        for value in vars(module).values()
        if isinstance(value, Launcher)
    ]
    assert waiting == {launcher.kernel.__name__ for launcher in launchers if launcher._overlapping}
    assert waiting > let_next_start and set(compiled) - waiting == _APART


def test_a_late_wait_is_noticed(compiled):
    _launch_token_rounding(MODULES["token_rounding"])
    text = compiled["_emit_kernel"][0].asm["ptx"]
    without = text.replace("griddepcontrol.wait", "")
    assert _waits_first(text) and not _waits_first(without)
    for later in (_GLOBAL, _BRANCH):
        at = re.search(later, without, re.MULTILINE).end()
        assert not _waits_first(f"{without[:at]} griddepcontrol.wait; {without[at:]}")


@triton.jit
def _greedy_kernel(x, N: tl.constexpr):
    address = x + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    value = tl.load(address)
    tl.store(address, value * tl.sum(value, axis=0)[None, :])


def test_a_spill_is_noticed(compiled, tmp_path):
    _greedy_kernel[(1,)](torch.zeros(1), N=256, num_warps=4)
    assert _spills(compiled["_greedy_kernel"][0], tmp_path)


def _spills(kernel, folder) -> bool:
    """Whether registers that do not fit are kept in a thread's local memory."""
    path = folder / "kernel.cubin"
    path.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    ((stack, local),) = re.findall(r"REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if stack == local == "0":
        return False
    # A stack frame need not be used; disassembling takes ten times as long as the question above.
    return bool(re.search(r"\b(STL|LDL)\b", kernel.asm["sass"]))


def _vector_loads(kernels) -> int:
    return len(re.findall(r"ld\.global[\w.:]*\.v4", kernels[0].asm["ptx"]))


def test_rows_move_in_16_byte_pieces(compiled):
    """A model's hidden size must not fall back to element-wise loads."""
    slots, scores, offset = _ids(64), torch.zeros(64), _ids(9)
    rows = torch.zeros(64, 2880, dtype=torch.bfloat16)
    combine.combine(rows, slots, scores, None, None, 8, 8)
    combine.combine(rows, slots, scores, offset, slots, 8, 0)
    bias_grad.bias_grad_rows(rows, offset)
    score_grad.score_grad(torch.zeros(3, 64), slots, rows, rows[:8], slots, offset)
    topk.topk_scores(torch.zeros(4, 128, dtype=torch.bfloat16), 8, ScoreOrder.SOFTMAX_OVER_TOPK)
    part = torch.zeros(8, 3 * 2880, dtype=torch.bfloat16)[:, 2880:5760]
    combine.combine(rows, slots, scores, None, None, 8, 8, out=part)
    for kernel in compiled["_combine_kernel"]:
        assert re.search(r"st\.global[\w.:]*\.v4", kernel.asm["ptx"])
    assert _vector_loads(compiled["_combine_kernel"]) == 8
    assert _vector_loads(compiled["_combine_ragged_kernel"]) == 8  # slots of a token, on average
    assert _vector_loads(compiled["_segment_sum_kernel"]) == 4
    assert _vector_loads(compiled["_score_grad_kernel"]) >= 8
    assert _vector_loads(compiled["_topk_kernel"]) >= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("with_scores", [True, False], ids=["scores", "plain"])
def test_rows_are_under_way_together(with_scores, dtype, compiled):
    """No row waits for the sum of another one of its round."""
    slots, offset = _ids(64), _ids(33)
    scores = torch.zeros(64) if with_scores else None
    rows = torch.zeros(64, 3072 // dtype.itemsize, dtype=dtype)
    combine.combine(rows, slots, scores, None, None, 32, 2)
    combine.combine(rows, slots, scores, None, None, 8, 8)
    combine.combine(rows, slots, scores, offset, None, 32, 0)
    combine.combine(rows, slots, scores, offset[:9], slots, 8, 0)
    # Two slots of one block of columns, or where tokens have any number of three; and eight of one.
    for name, loads in (("_combine_kernel", 2), ("_combine_ragged_kernel", 6)):
        few, many = (_loads_and_sums(kernel) for kernel in compiled[name])
        assert few.startswith("l" * loads + "s") and few.count("l") == loads
        assert many.startswith("l" * 8 + "s") and many.count("l") == 8


def _loads_and_sums(kernel) -> str:
    """The order of 16-byte loads and floating-point sums, as ``l`` and ``s``."""
    found = re.finditer(r"\bLDG\.\S*128\b|\b(FFMA|FADD)\b", kernel.asm["sass"])
    return "".join("s" if match[1] else "l" for match in found)


def test_the_number_of_tokens_does_not_recompile_the_switch_loss(compiled):
    module = MODULES["switch_loss"]
    for tokens in (1024, 1025, 4000):
        logits = torch.zeros(tokens, 16)
        loss, *saved = module.switch_loss(logits, _ids(16), 0.5 / tokens)
        module.switch_loss_grad(loss, logits, _ids(16), *saved, 0.5 / tokens)
    assert len(compiled) == 3 and all(len(variants) == 1 for variants in compiled.values())


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
    for name, variants in compiled.items():
        assert len(variants) == 1, name
