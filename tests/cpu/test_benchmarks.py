"""The benchmark scripts themselves: what they check, what they refuse to print, what they write."""

import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import sonic
from benchmarks import cold_start, gpu_tests, measure, options, workers
from benchmarks import layer as benchmark_layer
from benchmarks.check import Finding, check_layer, findings_table
from benchmarks.figures import Result
from benchmarks.layer import (
    Layer,
    LayerOptions,
    Run,
    gradient_inputs,
    make_layer,
    run_experts,
    run_moe,
)
from benchmarks.shapes import EXTRA_SHAPES, NAMED_SHAPES, SMALL_SHAPE, Shape, named_shape
from benchmarks.workers import Outcome, Pool, Task
from sonic.enums import ActivationType, GateUpLayout, ScoreOrder
from sonic.reference import experts_reference
from tests.refusals import as_typed, refusal

ROOT = Path(__file__).resolve().parents[2]
TINY = Shape(48, 24, 16, 5, 2)
CPU = torch.device("cpu")


def _tiny_layer(shape: Shape = TINY, **options: Any) -> Layer:
    return make_layer(shape, LayerOptions(device=CPU, impl="reference", **options))


def _failed(findings: list[Finding]) -> set[tuple[str, str]]:
    return {(finding.run, finding.tensor) for finding in findings if not finding.passed}


# --- arithmetic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_flops_and_bytes_follow_the_formulas(gated: bool) -> None:
    for named in NAMED_SHAPES:
        shape = named.shape
        unit = shape.T * shape.top_k * shape.I * shape.H
        assert shape.forward_flops(gated) == (6 if gated else 4) * unit
        assert shape.backward_flops(gated) == (12 if gated else 8) * unit
        rows_by_width = shape.T * shape.top_k * shape.I
        expected = 2 * shape.T * shape.H + (4 if gated else 2) * rows_by_width
        assert shape.saved_bytes(gated) == expected


def test_named_shapes_are_those_of_the_goal() -> None:
    assert [named.shape.problem for named in NAMED_SHAPES] == [
        [32768, 4096, 1024, 128, 8],
        [24576, 1536, 256, 128, 8],
        [32768, 2048, 768, 128, 8],
        [8192, 7168, 2048, 256, 8],
        [16384, 2048, 512, 512, 10],
        [8192, 2880, 2880, 128, 4],
    ]
    assert named_shape("F").add_bias and named_shape("F").activation == "swiglu_oai"
    assert named_shape("D2") is EXTRA_SHAPES[0]
    with pytest.raises(ValueError, match="there are A, B, C"):
        named_shape("Z")


@pytest.mark.parametrize("text", ["", "1,2,3,4", "1,2,3,4,x", "1,2,3,4,0", "8,8,8,2,3"])
def test_malformed_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=repr(text)):
        Shape.parse(text)


def test_the_ceiling_has_the_layers_gemms(monkeypatch: pytest.MonkeyPatch) -> None:
    """The FLOPs of the six products, counted from their operands, are those of the layer."""
    products: list[int] = []

    def count(function: Any, *_: Any) -> float:
        left, right = function.args
        product = torch.bmm(left, right)
        products.append(2 * product.numel() * left.shape[2])
        return 1.0

    monkeypatch.setattr(measure, "sustained_ms", count)
    shape = Shape(40, 24, 16, 5, 2)
    for gated in (True, False):
        products.clear()
        times = measure.ceiling_times(shape, gated, torch.float32, CPU)
        assert products == [shape.gemm_flops(gemm, gated) for gemm in times]
        assert measure.pass_ceiling(times, "forward + backward") == 6


# --- the check ------------------------------------------------------------------------------------

VARIANTS = [
    *(
        (activation, GateUpLayout.INTERLEAVED, ScoreOrder.SOFTMAX_OVER_TOPK, True)
        for activation in ActivationType
    ),
    (ActivationType.SWIGLU, GateUpLayout.CONCATENATED, ScoreOrder.TOPK_OVER_SOFTMAX, False),
    (ActivationType.GEGLU, GateUpLayout.CONCATENATED, ScoreOrder.TOPK_OVER_SOFTMAX_NORM, True),
]


@pytest.mark.parametrize(
    ("activation", "layout", "order", "bias"),
    VARIANTS,
    ids=[
        "-".join([a.value, n.value, o.value, "bias" if b else "plain"]) for a, n, o, b in VARIANTS
    ],
)
def test_the_streamed_reference_is_the_layer(
    activation: ActivationType, layout: GateUpLayout, order: ScoreOrder, bias: bool
) -> None:
    """It agrees with the package's fp64 oracle, which shares no code with it, to fp64 rounding."""
    layer = _tiny_layer(activation=activation, layout=layout, score_order=order, add_bias=bias)
    leaves = gradient_inputs(layer, with_router=False)
    wide = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    out = experts_reference(
        wide["dx"],
        layer.topk_ids,
        wide["dtopk_weights"],
        wide["dw1"],
        wide["dw2"],
        wide.get("db1"),
        wide.get("db2"),
        activation,
        layout,
    )
    gradients = torch.autograd.grad(out, tuple(wide.values()), layer.dout.double())
    tensors = {"out": out.detach(), **dict(zip(wide, gradients, strict=True))}
    findings = check_layer(layer, [Run("oracle", tensors, with_router=False)])
    found = {finding.tensor: finding for finding in findings if finding.run == "oracle"}
    assert set(found) == set(tensors)
    for finding in found.values():
        assert finding.error < 1e-12, finding
        assert 1e-4 < finding.yardstick < 1e-2, finding  # rounding to bf16 is visible in each


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_reference_implementation_passes(dtype: torch.dtype) -> None:
    for layout in GateUpLayout:
        findings = check_layer(_tiny_layer(dtype=dtype, layout=layout, add_bias=True))
        assert not _failed(findings), findings_table(findings)
        compared = {(finding.run, finding.tensor) for finding in findings}
        gradients = {"dx", "dw1", "dw2", "db1", "db2"}
        for run, own in (("experts", "dtopk_weights"), ("moe", "drouter_w")):
            assert {(run, name) for name in gradients | {"out", own}} <= compared
            assert (f"{run} inference", "out") in compared


MISTAKES = {
    "zero": lambda tensor: torch.zeros_like(tensor),
    "one row zero": lambda tensor: tensor.clone().index_fill_(0, torch.tensor([1]), 0),
    "two rows swapped": lambda tensor: tensor[[1, 0, *range(2, len(tensor))]],
    "two percent too large": lambda tensor: tensor * 1.02,
    "one element": lambda tensor: tensor.clone().put_(torch.tensor(7), tensor.float().max() + 1),
    "not a number": lambda tensor: tensor.clone().put_(torch.tensor(7), torch.tensor(torch.nan)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_in_every_tensor_is_found(mistake: str) -> None:
    layer = _tiny_layer(add_bias=True)
    right = (run_experts(layer), run_moe(layer))
    for index, run in enumerate(right):
        for name, tensor in run.tensors.items():
            if name in ("logits", "frequency"):
                continue
            change = MISTAKES[mistake]
            if mistake in ("one element", "not a number"):
                wrong = change(tensor.float()).to(tensor.dtype)
            else:
                wrong = change(tensor)
            runs = list(right)
            runs[index] = replace(run, tensors=run.tensors | {name: wrong})
            assert _failed(check_layer(layer, runs)) == {(run.name, name)}


def test_wrong_routing_is_found() -> None:
    layer = _tiny_layer()
    run = run_moe(layer)
    logits = run.tensors["logits"].clone()
    logits[0, 0] += 1
    frequency = run.tensors["frequency"].roll(1)
    wrong = replace(run, tensors=run.tensors | {"logits": logits, "frequency": frequency})
    failed = _failed(check_layer(layer, [wrong]))
    assert failed == {("moe", "router_logits"), ("moe", "expert_frequency")}
    swapped = replace(layer, topk_ids=layer.topk_ids.flip(1))
    assert ("router", "topk_ids") in _failed(check_layer(swapped, [run]))
    weights = (layer.topk_weights.detach() * 1.001).requires_grad_()
    rescaled = replace(layer, topk_weights=weights)
    assert ("router", "topk_weights") in _failed(check_layer(rescaled, [run]))


def test_the_worst_expert_is_named() -> None:
    layer = _tiny_layer()
    run = run_experts(layer)
    dw2 = run.tensors["dw2"].clone()
    dw2[3] *= 1.1
    (finding,) = (
        finding
        for finding in check_layer(layer, [replace(run, tensors=run.tensors | {"dw2": dw2})])
        if not finding.passed
    )
    assert finding.expert == 3 and finding.tensor == "dw2"
    assert "FAILED" in findings_table([finding])


def test_an_expert_without_tokens_must_get_a_zero_gradient() -> None:
    layer = _tiny_layer()
    moved = torch.where(layer.topk_ids == 2, (layer.topk_ids + 1) % 5, layer.topk_ids)
    layer = replace(layer, topk_ids=moved)
    run = run_experts(layer)
    assert not run.tensors["dw1"][2].any()
    assert _failed(check_layer(layer, [run])) == {("router", "topk_ids")}
    dw1 = run.tensors["dw1"].clone()
    dw1[2, 0, 0] = 1e-6
    wrong = replace(run, tensors=run.tensors | {"dw1": dw1})
    assert ("experts", "dw1") in _failed(check_layer(layer, [wrong]))


# --- bytes and times ------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", [ActivationType.SWIGLU, ActivationType.RELU])
def test_saved_bytes_are_counted_and_equal_the_formula(activation: ActivationType) -> None:
    layer = _tiny_layer(activation=activation, add_bias=True)
    saved = measure.saved_bytes(layer)
    listed = sonic.saved_bytes(TINY.T, TINY.H, TINY.I, TINY.E, TINY.top_k, activation=activation)
    assert saved.total == listed
    assert saved.formula == TINY.saved_bytes(activation.is_gated)
    assert saved.metadata == listed - saved.formula > 0
    assert saved.total == sum(size for _, _, size in saved.tensors)


def test_times_are_medians_of_single_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def sleep() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.004)

    ms = measure.sustained_ms(sleep, CPU, load_seconds=0.02, timed_seconds=0.03)
    assert 3.9 < ms < 40
    assert calls >= 2 + measure.MIN_ITERATIONS


# --- the script -----------------------------------------------------------------------------------


def _load(name: str) -> ModuleType:
    path = ROOT / "benchmarks" / name
    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def moe_cute(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with a clock that does not wait."""

    def once(function: Any, *_: Any) -> float:
        function()
        return next(times)

    times = itertools.count(1.0, 0.25)
    monkeypatch.setattr(measure, "sustained_ms", once)
    return _load("moe-cute.py")


TINY_FLAGS = ["--thiek", "24,16,8,4,2", "--device", "cpu"]


@pytest.mark.parametrize(
    "flags",
    [
        *(["--activation", activation.value] for activation in ActivationType),
        ["--dtype", "Float16", "--add_bias"],
        ["--topk_over_softmax"],
        ["--topk_over_softmax", "--norm_topk_probs"],
        ["--norm_topk_probs"],
        ["--concat_layout", "--add_bias", "--activation", "swiglu_oai"],
        ["--impl", "reference"],
    ],
    ids=" ".join,
)
def test_every_flag_runs_checked_and_timed(
    moe_cute: ModuleType, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert moe_cute.main([*TINY_FLAGS, *flags]) == 0
    printed = capsys.readouterr().out
    for expected in ("dtopk_weights", "drouter_w", "forward + backward", "TFLOPS", "saved for"):
        assert expected in printed
    assert ("db2" in printed) == ("--add_bias" in flags)


def test_skipping_the_test_still_times(
    moe_cute: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moe_cute.main([*TINY_FLAGS, "--skip_test"]) == 0
    printed = capsys.readouterr().out
    assert "drouter_w" not in printed and "TFLOPS" in printed


def test_a_pass_without_a_figure_is_a_dash(
    moe_cute: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nan = float("nan")
    figures = [
        measure.PassFigures("experts", "forward training", 1.5, 2.0, 50.0),
        measure.PassFigures("experts", "backward", nan, nan, nan),
    ]
    monkeypatch.setattr(moe_cute, "speed_table", lambda layer: (figures, {"up": 1.0}))
    assert moe_cute.main([*TINY_FLAGS, "--skip_test"]) == 0
    printed = capsys.readouterr().out
    assert "nan" not in printed and "1.500" in printed
    assert "-: forward + backward measured no longer than forward" in printed


def test_the_result_file_has_the_agreed_form(
    moe_cute: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SONIC_COMMIT", "0123abc")
    path = tmp_path / "new" / "result.json"
    assert moe_cute.main([*TINY_FLAGS, "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    head = ["device", "driver", "versions", "commit", "command", "date", "time"]
    assert list(content) == [*head, "rows"]
    assert content["commit"] == "0123abc"
    assert content["versions"]["torch"] == torch.__version__
    for row in content["rows"]:
        assert list(row) == ["provider", "problem", "metric", "value", "unit"]
        assert row["problem"] == [24, 16, 8, 4, 2]
    rows = {(row["provider"], row["metric"], row["unit"]): row["value"] for row in content["rows"]}
    ms = {name: rows["sonic_reference", f"experts/{name}", "ms"] for name in measure.PASSES}
    assert ms["backward"] == ms["forward + backward"] - ms["forward training"]
    flops = 18 * 24 * 2 * 8 * 16
    tflops = rows["sonic_reference", "experts/forward + backward", "TFLOPS"]
    assert tflops == pytest.approx(flops / ms["forward + backward"] * 1e-9)
    gemms = sum(rows["cublas_bmm", gemm, "ms"] for gemm in ("dh", "dw2", "dx", "dw1"))
    percent = rows["sonic_reference", "experts/backward", "% of cuBLAS"]
    assert percent == pytest.approx(100 * gemms / ms["backward"])
    assert Result.read(path).rows[0].problem == [24, 16, 8, 4, 2]


def test_no_time_is_printed_after_a_failed_check(
    moe_cute: ModuleType,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        return 1.02 * right(*arguments, **options)

    right = sonic.experts
    monkeypatch.setattr(sonic, "experts", wrong)
    monkeypatch.setattr(moe_cute, "speed_table", lambda _: pytest.fail("a wrong layer was timed"))
    path = tmp_path / "result.json"
    assert moe_cute.main([*TINY_FLAGS, "--json", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "FAILED" in printed and "nothing was timed" in printed
    for forbidden in (" ms", "TFLOPS", "forward"):
        assert forbidden not in printed
    assert not [row for row in Result.read(path).rows if row.unit in ("ms", "TFLOPS")]


def test_bad_flags_are_refused(moe_cute: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--thiek", "1,2"], ["--dtype", "Float8"], ["--activation", "swish"]):
        said = refusal(moe_cute.parse_arguments, flags, capsys)
        assert flags[0] in said and repr(flags[1]) in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_what_it_runs_instead(
    moe_cute: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    shape, device, impl = moe_cute.choose(moe_cute.parse_arguments([]))
    assert (shape, device.type, impl) == (SMALL_SHAPE, "cpu", "reference")
    printed = capsys.readouterr().out
    assert "No kernels for this machine" in printed and "not the kernels" in printed
    with pytest.raises(SystemExit, match="No kernels"):
        moe_cute.choose(moe_cute.parse_arguments(["--impl", "cute"]))
    with pytest.raises(SystemExit, match="too large"):
        moe_cute.choose(moe_cute.parse_arguments(["--thiek", "32768,4096,1024,128,8"]))


# --- workers and the whole validation -------------------------------------------------------------


def test_workers_survive_crashes_and_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "START_SECONDS", 10)
    outcomes: list[Outcome] = []
    tasks = [
        Task("fine", dict, {"ok": True}),
        Task("raises", json.loads, "no JSON"),
        Task("dies", os._exit, 3),
        Task("hangs", time.sleep, 300),
        Task("fine again", dict, {"ok": True}),
        Task("larger than the budget", dict, {"ok": True}, memory=10**9),
    ]
    with Pool(jobs=2, memory_budget=10**6, task_seconds=1) as pool:
        assert pool.run(tasks, 60, outcomes.append) == 0
        assert pool.run([tasks[0]], 0, outcomes.append) == 1  # no time left: never started
    by_name = {outcome.task.name: outcome for outcome in outcomes}
    assert len(outcomes) == len(tasks)
    for name in ("fine", "fine again", "larger than the budget"):
        assert by_name[name].value == {"ok": True} and not by_name[name].error
    assert "JSONDecodeError" in by_name["raises"].error
    assert "exit code 3" in by_name["dies"].error
    assert "no result after" in by_name["hangs"].error


def test_the_whole_validation_runs(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "validate.py"), "--device", "cpu"]
    command += ["--impl", "reference", "--shapes", "24,16,8,4,2", "--problems", "4", "--jobs", "1"]
    command += ["--mutation_problems", "1", "--output", str(tmp_path), "--name", "smoke"]
    command += ["--parts", "correctness", "random", "mutations", "repeats", "memory"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*-smoke.json")
    counts = {row.metric: row.value for row in Result.read(path).rows if row.unit == "count"}
    parts = ("correctness", "random problems", "mutations", "repeats", "memory")
    for part in parts:
        assert counts[f"{part}/run"] > 0
        assert counts[f"{part}/failed"] == counts[f"{part}/not started"] == 0


def test_inputs_of_a_layer_are_seeded() -> None:
    first, second = _tiny_layer(), _tiny_layer()
    assert torch.equal(first.x, second.x) and torch.equal(first.w1, second.w1)
    assert not torch.equal(first.x, _tiny_layer(seed=2).x)
    assert first.x.detach().float().std().item() == pytest.approx(1, abs=0.1)
    assert benchmark_layer.experts_forward(first).std() > 0.1


# --- options that are refused before any work ---------------------------------------------------


def _refused(script: str, *flags: str) -> str:
    """What the script says, which has to be quick and no traceback."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--json", "."], "is a directory"),
        (["--json", "LICENSE/result.json"], "cannot be written"),
        (["--json="], "expected the name of a file"),
        (["--thiek", "8,8,8,128,65"], "top_k=65 exceeds 64"),
        (["--thiek", "8,8,8,70000,2"], "E=70000 exceeds 65536"),
        (["--thiek", "2147483647,8,8,4,2"], "T * top_k=4294967294 exceeds"),
        (["--thiek", "8,8,1073741824,4,2"], "2 I=2147483648 exceeds"),
        (["--device", "banana"], "expected cuda or cpu"),
        (["--device", "meta"], "expected cuda or cpu"),
    ],
    ids=as_typed,
)
def test_the_layer_script_refuses(flags: list[str], says: str) -> None:
    assert says in _refused("moe-cute.py", *flags)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--thiek", "1"], "five positive integers"),
        (["--processes", "0"], "positive integer"),
        (["--caches", "LICENSE"], "is no folder"),
        (["--json", "."], "is a directory"),
    ],
    ids=as_typed,
)
def test_the_cold_start_script_refuses(
    flags: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    assert says in refusal(cold_start.main, flags, capsys)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--jobs", "0"], "positive integer"),
        (["--problems", "-3"], "at least 0"),
        (["--limit", "nan"], "more than 0"),
        (["--device", "banana"], "expected cuda or cpu"),
        (["--device", "cpu", "--impl", "reference"], "A, B, C, D, E, F are too large"),
    ],
    ids=as_typed,
)
def test_the_validation_script_refuses(flags: list[str], says: str) -> None:
    assert says in _refused("validate.py", *flags)


@pytest.mark.parametrize(
    "script", ["cold_start.py", "compare.py", "moe-cute.py", "moe-token-rounding.py", "tiles.py"]
)
def test_the_help_says_what_k_is(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _load(script).main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert options.THIEK_HELP in text and options.THIEK in text
    assert "K: top_k, experts of a token" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
@pytest.mark.parametrize("script", ["cold_start.py", "tiles.py", "moe-router.py", "gpu_tests.py"])
def test_what_only_a_gpu_runs_says_so(script: str) -> None:
    printed = _refused(script)
    assert printed.startswith("Needs a CUDA GPU") and printed.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
@pytest.mark.parametrize("impl", ["auto", "cute", "reference"])
@pytest.mark.parametrize("script", ["moe-cute.py", "validate.py"])
def test_a_missing_gpu_is_a_sentence(script: str, impl: str) -> None:
    assert "torch sees no CUDA device" in _refused(script, "--device", "cuda", "--impl", impl)


@pytest.mark.parametrize(
    "script", ["compare.py", "moe-cute.py", "moe-token-rounding.py", "validate.py"]
)
def test_a_numbered_cpu_is_refused(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(_load(script).parse_arguments, ["--device", "cpu:1"], capsys)
    assert "--device: expected cuda or cpu, got 'cpu:1': CPUs have no number" in said


@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        ("compare.py", ["--shapes", "A,B,A"], "value 3 is value 1 once more"),
        (
            "compare.py",
            ["--shapes", "B", "--thiek", "24576,1536,256,128,8"],
            "--shapes and --thiek",
        ),
        ("compare.py", ["--peers", "sonicmoe,sonicmoe"], "--peers: value 2 is value 1"),
        ("validate.py", ["--shapes", "A", "A"], "--shapes: value 2 is value 1 once more"),
        ("validate.py", ["--parts", "speed", "speed"], "--parts: value 2 is value 1 once more"),
        ("moe-router.py", ["--shapes", "A", "D2", "A"], "--shapes: value 3 is value 1 once more"),
        ("moe-router.py", ["--routers", "softmax", "softmax"], "--routers: value 2 is value 1"),
    ],
)
def test_what_comes_twice_is_refused(
    script: str, flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refusal(_load(script).parse_arguments, flags, capsys)


@pytest.mark.parametrize(
    ("count", "device", "says"),
    [
        (0, "cuda:1", "no cuda:1: torch sees no CUDA device"),
        (1, "cuda:1", "no cuda:1: torch sees 1. Allowed: cuda:0. Choose one"),
        (2, "cuda:2", "no cuda:2: torch sees 2. Allowed: cuda:0 to cuda:1. Choose one"),
    ],
)
@pytest.mark.parametrize(
    "script", ["compare.py", "moe-cute.py", "moe-token-rounding.py", "validate.py"]
)
def test_a_gpu_that_is_not_there_is_refused(
    script: str,
    count: int,
    device: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parse = _load(script).parse_arguments
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    said = refusal(parse, ["--device", device], capsys)
    assert f"--device: {says}" in said and ", or pass cpu" in said
    flags = ["--thiek", "48,64,32,8,2"] if script == "compare.py" else []
    for there in ["cpu"] + (["cuda", f"cuda:{count - 1}"] if count else []):
        assert parse([*flags, "--device", there]).device == torch.device(there)


# --- the GPU tests' runner ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--files", "layer", "no_such"], "invalid choice: 'no_such' (choose from"),
        (["--jobs", "0"], "positive integer"),
        (["--limit", "nan"], "more than 0"),
        (["--json", "."], "is a directory"),
        (["--json", "/proc/result.json"], "cannot be written"),
    ],
    ids=as_typed,
)
def test_the_runner_of_gpu_tests_refuses(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refusal(gpu_tests.main, flags, capsys)


def test_tests_that_ended_before_the_limit_are_counted(tmp_path: Path) -> None:
    """The second test begins when the first has ended, and outlasts the limit."""
    pytest.importorskip("xdist")
    source, written = tmp_path / "test_two.py", tmp_path / "report.xml"
    source.write_text("import time\ndef test_a(): pass\ndef test_b(): time.sleep(300)\n")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a job in the background
    try:
        printed, finished = gpu_tests.run([source], 1, written, limit=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not finished and "not finished after 60 s" in printed
    counts = gpu_tests.count(written, finished)
    assert counts[gpu_tests.NOT_FINISHED] == {"failed": 1}
    assert counts["test_two"]["passed"] == 1, printed
    assert sum(outcomes["passed"] for outcomes in counts.values()) == 1
    assert gpu_tests.count(tmp_path / "none.xml") == {"no report": {"failed": 1}}
