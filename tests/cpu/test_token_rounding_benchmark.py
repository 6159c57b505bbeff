"""The token rounding benchmark: what it checks, counts, refuses and writes."""

import dataclasses
import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch

import sonic
from benchmarks import contest, launches, rounding
from benchmarks import layer as benchmark_layer
from benchmarks.figures import HEAD_KEYS, Result
from benchmarks.layer import LayerOptions, make_layer, moe_forward
from benchmarks.rounding import (
    MODULE,
    Load,
    RoundedShape,
    Rounding,
    Way,
    WayGraphs,
    check_loss,
    check_rounded_layer,
    load_of,
    module_way,
)
from benchmarks.shapes import Shape
from sonic.enums import ScoreOrder
from tests.refusals import as_typed, refusal

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
TINY = Shape(48, 24, 16, 5, 2)


@pytest.fixture
def script(monkeypatch):
    """The script, with a clock that does not wait."""
    path = ROOT / "benchmarks" / "moe-token-rounding.py"
    spec = importlib.util.spec_from_file_location("moe_token_rounding", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    clock = itertools.count(1.0, 0.25)

    def once(function, *_, **__):
        function()
        return next(clock)

    monkeypatch.setattr(rounding, "sustained_ms", once)
    monkeypatch.setattr(contest, "LOAD_SECONDS", 0.0)
    return module


def tiny_layer(**options):
    return make_layer(TINY, LayerOptions(device=CPU, impl="reference", **options))


@pytest.mark.parametrize("routing", rounding.ROUTINGS)
def test_every_routing_is_checked_timed_and_counted(script, capsys, tmp_path, routing):
    path = tmp_path / "result.json"
    flags = ["--thiekq", "48,24,16,5,2,8", "--device", "cpu", "--rep", "1", "--json", str(path)]
    assert script.main([*flags, "--routing", routing]) == 0
    printed = capsys.readouterr().out
    for expected in ("drouter_w", "forward + backward", "TFLOPS", "of which routing ms", "waste"):
        assert expected in printed
    rows = {
        (row["metric"], row["unit"]): row["value"]
        for row in json.loads(path.read_text())["rows"]
        if row["provider"] == "sonic_reference"
    }
    prefix = f"token rounding/{routing}/q8"
    routed, hardware = (
        rows[f"{prefix}/routed pairs", "count"],
        rows[f"{prefix}/hardware tokens", "count"],
    )
    ms = rows[f"{prefix}/forward", "ms"]
    assert rows[f"{prefix}/forward", "TFLOPS"] == pytest.approx(6 * routed * 24 * 16 / ms * 1e-9)
    assert rows[f"{prefix}/waste", "%"] == pytest.approx(100 * (1 - routed / hardware))
    assert rows[f"{prefix}/forward/routing", "ms"] > 0
    if routing == "top_k":
        assert routed == 96 < hardware
    else:
        assert routed == hardware and routed % 8 == 0


def test_the_tile_is_used():
    """The last number decides both the rounding and the counting."""
    layer = tiny_layer()
    loads = {q: load_of(layer, Rounding.make("up", q, CPU)) for q in (1, 4, 16)}
    assert loads[1] == Load(96, 96)
    assert 96 < loads[4].routed < loads[16].routed
    assert all(load.routed == load.hardware and load.waste == 0 for load in loads.values())
    plain = {q: load_of(layer, Rounding.make("top_k", q, CPU)) for q in (1, 16)}
    assert plain[1] == Load(96, 96) and plain[16].routed == 96 and plain[16].waste > 0


def test_several_sizes_and_flags_in_one_run(script, capsys):
    flags = ["--thiekq", "24,16,8,4,2,4", "20,16,8,3,1,8", "--routing", "nr", "top_k"]
    options = ["--dtype", "Float16", "--add_bias", "--concat_layout", "--device", "cpu"]
    assert script.main([*flags, *options]) == 0
    printed = capsys.readouterr().out
    assert printed.count("hardware tokens") == 4 and "db2" in printed
    assert script.main([*flags, *options, "--skip_test"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("hardware tokens") == 4 and "drouter_w" not in printed


@pytest.mark.parametrize("routing", ["nr", "sr", "top_k"])
def test_the_module_is_checked_and_timed_beside_the_function(script, capsys, tmp_path, routing):
    path = tmp_path / "result.json"
    flags = ["--thiekq", "48,24,16,5,2,8", "--device", "cpu", "--rep", "1", "--json", str(path)]
    assert script.main([*flags, "--routing", routing, "--module", "--add_bias"]) == 0
    printed = capsys.readouterr().out
    assert "module loss" in printed and f"{routing}{MODULE}" in printed
    rows = {(row["metric"], row["unit"]) for row in json.loads(path.read_text())["rows"]}
    for name in ("forward", "backward", "forward + backward"):
        for suffix, unit in (("", "ms"), ("", "TFLOPS"), ("/routing", "ms")):
            metric = f"{name}{suffix}"
            assert (f"token rounding/{routing}/q8/{metric}", unit) in rows
            assert (f"token rounding/{routing}{MODULE}/q8/{metric}", unit) in rows
    assert (f"interleaved/{routing}/q8/module/loss", "passed") in rows


@pytest.mark.parametrize("wrong", ["loss", "gradient", "no gradient"])
def test_a_wrong_balancing_loss_is_found(wrong):
    layer = tiny_layer()
    way = module_way(layer, Rounding.make("nr", 8, CPU))
    assert all(finding.passed for finding in check_loss(layer, way))

    def forward():
        out, loss = way.forward()
        if wrong == "loss":
            return out, 1.00001 * loss
        none = loss - loss if wrong == "no gradient" else 0.02 * (loss - loss.detach())
        return out, loss.detach() + none

    findings = check_loss(layer, Way(forward, way.leaves, way.grads))
    failed = {finding.run for finding in findings if not finding.passed}
    assert failed == ({"module"} if wrong == "loss" else {"module loss"})


@pytest.mark.parametrize("order", ScoreOrder, ids=lambda order: order.value)
def test_the_check_knows_every_score_order(order):
    layer = tiny_layer(score_order=order, add_bias=True)
    findings = check_rounded_layer(layer, Rounding.make("nr", 16, CPU), with_module=True)
    assert all(finding.passed for finding in findings), findings
    found = {(finding.run, finding.tensor) for finding in findings}
    gradients = {"out", "dx", "dw1", "dw2", "db1", "db2"}
    assert {("flat", name) for name in gradients | {"dtopk_weights"}} <= found
    for run in ("moe", "module"):
        assert {(run, name) for name in gradients | {"drouter_w"}} <= found
    assert ("routing", "pairs") in found


def test_the_check_knows_which_of_equal_logits_won():
    shape = Shape(256, 128, 64, 8, 2)
    layer = make_layer(shape, LayerOptions(device=CPU, impl="reference"))
    best = layer.logits.float().topk(3, dim=1).values
    assert (best[:, 1] == best[:, 2]).any()
    findings = check_rounded_layer(layer, Rounding.make("nr", 16, CPU))
    assert all(finding.passed for finding in findings), findings


def test_wrong_pairs_are_found_and_nothing_is_timed(script, capsys, monkeypatch):
    def shifted(*arguments, **options):
        weights, plan = right(*arguments, **options)
        return weights, dataclasses.replace(plan, token_by_row=plan.token_by_row.roll(1))

    right = sonic.routing.rounded_routing
    monkeypatch.setattr(sonic.routing, "rounded_routing", shifted)
    monkeypatch.setattr(script, "race_layers", lambda *_: pytest.fail("a wrong layer was timed"))
    flags = ["--thiekq", "48,24,16,5,2,8", "--device", "cpu", "--routing", "nr"]
    assert script.main(flags) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_rounding_that_leaves_no_pair_is_refused(script, capsys):
    flags = ["--thiekq", "16,24,16,8,1,16", "--device", "cpu", "--rep", "1"]
    assert script.main([*flags, "--routing", "down"]) == 1
    printed = capsys.readouterr().out
    assert "REFUSED: down to whole tiles of 16 leaves no pair" in printed
    assert "2 tokens on average" in printed and "smaller tile (Q)" in printed
    assert "forward" not in printed
    assert script.main([*flags, "--routing", "down", "top_k"]) == 1
    printed = capsys.readouterr().out
    assert "REFUSED: down" in printed and "top_k: routed pairs 16" in printed


def test_a_sweep_times_top_k_beside_rounding(script, capsys, monkeypatch, tmp_path):
    sizes = tuple(RoundedShape(Shape(32, 16, 8, E, 2), 8) for E in (3, 4))
    monkeypatch.setattr(script, "SWEEPS", (sizes,))
    path = tmp_path / "sweep.json"
    flags = ["--sweep", "1", "--device", "cpu", "--rep", "1", "--json", str(path)]
    assert script.main([*flags, "--thiekq", "20,16,8,3,1,8"]) == 0
    rows = json.loads(path.read_text())["rows"]
    for problem in ([32, 16, 8, 3, 2], [32, 16, 8, 4, 2], [20, 16, 8, 3, 1]):
        metrics = {row["metric"] for row in rows if row["problem"] == problem}
        for routing in ("nr", "top_k"):
            assert f"token rounding/{routing}/q8/forward + backward" in metrics
            assert f"token rounding/{routing}/q8/forward/routing" in metrics
    assert "pairs" in capsys.readouterr().out


def test_the_sweeps_are_the_papers():
    points = [size for sweep in rounding.SWEEPS for size in sweep]
    assert len(points) == 16 and all(size.tile == 128 for size in points)
    assert set(rounding.BAR_SIZES) <= set(points)


@pytest.mark.parametrize(
    "text",
    [
        "1,2,3,4,5",
        "8,8,8,4,2,0",
        "8,8,8,4,2,x",
        "8,8,8,2,3,4",
        "",
        "8,8,8,70000,1,16",
        "8,8,8,4,1,99999999999",
        "3000000000,1,1,1,1,1",
    ],
)
def test_malformed_sizes_are_refused(text):
    with pytest.raises(ValueError, match=r"six positive integers|exceeds"):
        RoundedShape.parse(text)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--device", "tpu"], "expected cuda or cpu, got 'tpu'"),
        (["--rep", "0"], "expected a positive number of milliseconds, got '0'"),
        (["--rep", "nan"], "expected a positive number"),
        (["--json", "."], "is a directory, expected a file"),
        (
            ["--routing", "nr", "up", "nr"],
            "--routing: value 3 is value 1 once more. Give each once",
        ),
        (["--thiekq", *["8,8,8,4,2,4"] * 2], "--thiekq: value 2 is value 1 once more"),
        (["--sweep", "1", "1"], "--sweep: value 2 is value 1 once more"),
        (["--device", "cpu:1"], "expected cuda or cpu, got 'cpu:1': CPUs have no number. Pass cpu"),
    ],
    ids=as_typed,
)
def test_options_that_cannot_work_are_refused(script, flags, says, capsys):
    assert says in refusal(script.parse_arguments, flags, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(script, capsys):
    said = refusal(script.main, ["--device", "cuda"], capsys)
    assert "no cuda: torch sees no CUDA device" in said


def test_too_large_for_a_cpu_is_refused(script):
    with pytest.raises(SystemExit, match="too large"):
        flags = ["--thiekq", "16384,4096,1024,256,8,128", "--device", "cpu"]
        script.main([*flags, "--impl", "reference"])


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_the_peers_results_are_checked(script, monkeypatch, factor):
    layer, result = tiny_layer(), Result(dict.fromkeys(HEAD_KEYS))
    monkeypatch.setattr(rounding, "peer_forward", lambda layer: factor * moe_forward(layer))
    findings, size = rounding.check_peer(layer), RoundedShape(TINY, 8)
    right = script.passed(result, size, rounding.PEER, findings, rounding.PEER)
    assert right == (factor == 1.0)
    errors = [
        row for row in result.rows if row.unit == "relative L2" and row.provider == "sonicmoe"
    ]
    found = {row.metric.rpartition("/")[2]: row.value for row in errors}
    assert set(found) == {"out", "dx", "dw1", "dw2", "drouter_w"}
    assert all(value == pytest.approx(factor - 1.0, abs=0.01) for value in found.values())


@pytest.mark.parametrize("mistake", ["none", "output", "gradient", "not a number"])
def test_what_a_graph_leaves_is_compared_with_the_eager_call(monkeypatch, mistake):
    layer = tiny_layer()
    (way,) = rounding.ways_of(layer, [Rounding.make("nr", 8, CPU)], False).values()
    monkeypatch.setattr(launches, "captured", lambda function: function)
    graphs = rounding.WayGraphs.of(way)
    for replay in graphs.replays:
        replay()
    kept = WayGraphs((lambda: None,) * 2, graphs.results)
    wrong = {"output": graphs.results[0][0], "gradient": graphs.results[1][2]}
    if mistake in wrong:
        wrong[mistake][1, 1] = 0.0
    elif mistake == "not a number":
        graphs.results[1][0][0, 0] = float("nan")
    findings = rounding.check_graphs(kept, way, torch.bfloat16)
    assert {finding.tensor for finding in findings} == {"out", *way.leaves}
    failed = [finding.tensor for finding in findings if not finding.passed]
    names = {"none": [], "output": ["out"], "gradient": ["dw2"], "not a number": ["dx"]}
    assert failed == names[mistake]


@pytest.mark.parametrize("wrong", [False, True])
def test_graphs_of_what_is_drawn_or_wrong_are_not_timed(script, monkeypatch, capsys, wrong):
    """With calls in place of graphs, which a CPU has not."""
    layer, size = tiny_layer(), RoundedShape(TINY, 8)
    asked = [Rounding.make(name, 8, CPU) for name in ("nr", "sr", "top_k")]
    ways = rounding.ways_of(layer, asked, with_module=True)
    made = []

    def calls(function):
        results = [tensor.detach() for tensor in function()]
        made.append(results)
        if wrong and len(made) == 1:  # the first way's output
            results[0] = torch.zeros_like(results[0])
            return lambda: None, results
        return function, results

    monkeypatch.setattr(rounding, "captured_results", calls)
    result = Result(dict.fromkeys(HEAD_KEYS))
    drawing = [name for name in ways if name.startswith("sr")]
    graphs, failed = script.sound_graphs(result, size, layer.options, ways, drawing)
    names = ["nr", f"nr{MODULE}", "top_k", f"top_k{MODULE}"]
    assert list(graphs) == names[wrong:] and failed == names[:wrong]
    assert ("FAILED" in capsys.readouterr().out) == wrong
    passed = {row.metric: row.value for row in result.rows if row.unit == "passed"}
    assert passed["interleaved/nr/q8/graph/out"] == (not wrong)
    assert passed[f"interleaved/top_k{MODULE}/q8/graph/loss"] == 1
    times = rounding.race_graphs(graphs, CPU, 0.001)
    assert set(times) == set(graphs) and set(times["top_k"]) == set(script.PASSES)


@pytest.mark.parametrize("routing", ["nr", "top_k"])
def test_a_sweep_times_no_layer_whose_gradient_is_wrong(script, capsys, monkeypatch, routing):
    right = rounding.call_moe

    def wrong(layer, **options):
        out, *others = right(layer, **options)
        if ("rounding" in options) == (routing == "nr"):
            out = out.detach() + 1.1 * (out - out.detach())
        return out, *others

    monkeypatch.setattr(rounding, "call_moe", wrong)
    monkeypatch.setattr(benchmark_layer, "call_moe", wrong)
    monkeypatch.setattr(script, "SWEEPS", ((RoundedShape(Shape(32, 16, 8, 3, 2), 8),),))
    timed = []
    race = script.race_layers
    monkeypatch.setattr(script, "race_layers", lambda w, *_: timed.extend(w) or race(w, *_))
    assert script.main(["--sweep", "1", "--device", "cpu", "--rep", "1"]) == 1
    assert "FAILED" in capsys.readouterr().out
    assert timed == [name for name in ("nr", "top_k") if name != routing]


def test_times_without_a_check_are_not_written(script, capsys):
    flags = ["--skip_test", "--json", "x.json", "--device", "cpu"]
    assert "--json records what was checked" in refusal(script.parse_arguments, flags, capsys)
