"""The comparison with other packages, as far as a machine without a GPU has it."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import compare, launches, peers, plot, small
from benchmarks.contest import OutOfTime, take_turns, time_limit
from benchmarks.figures import HEAD_KEYS, RESULTS, Result
from benchmarks.layer import Layer, LayerOptions, make_layer
from benchmarks.problems import HOT_SHARE, random_shapes, skewed_ids, with_skew
from benchmarks.shapes import BARS, NAMED_SHAPES, Shape
from tests.refusals import as_typed, refusal

TINY = Shape(48, 64, 32, 8, 2)
CPU = torch.device("cpu")
CPU_ONLY = LayerOptions(device=CPU, impl="reference")


@pytest.fixture
def layer() -> Layer:
    return make_layer(TINY, LayerOptions(device=CPU, impl="reference"))


# --- problems -------------------------------------------------------------------------------------


def test_the_bars_are_the_named_sizes_and_twice_the_tokens_of_d() -> None:
    named = {shape.letter: shape.shape for shape in NAMED_SHAPES}
    named["D"] = replace(named["D"], T=2 * named["D"].T)
    assert named == BARS


def test_random_sizes_are_in_range_and_a_function_of_the_seed() -> None:
    shapes = random_shapes(40, seed=3)
    assert shapes == random_shapes(40, seed=3) != random_shapes(40, seed=4)
    for shape in shapes:
        assert 1024 <= shape.T <= 32768 and 1024 <= shape.H <= 8192 and 128 <= shape.I <= 4096
        assert 8 <= shape.E <= 512 and 1 <= shape.top_k <= min(16, shape.E)
        assert shape.H % 8 == shape.I % 8 == 0
        assert 6 * shape.E * shape.H * shape.I <= 12 * 2**30


def test_skews_are_what_they_say() -> None:
    shape = Shape(4096, 64, 64, 128, 8)
    zipf = skewed_ids(shape, "zipf", torch.Generator().manual_seed(0))
    counts = zipf.flatten().bincount(minlength=shape.E).sort(descending=True).values
    assert zipf.dtype == torch.int32 and zipf.shape == (shape.T, shape.top_k)
    assert all(row.unique().numel() == shape.top_k for row in zipf)
    assert 20 < counts[0] / counts[-1].clamp_min(1) < 128
    hot = skewed_ids(shape, "hot", torch.Generator().manual_seed(0))
    share = hot.flatten().bincount().max() / hot.numel()
    assert abs(float(share) - HOT_SHARE) < 0.02
    with pytest.raises(ValueError, match="no skew 'cold'"):
        skewed_ids(shape, "cold", torch.Generator())


def test_skew_changes_the_ids_only(layer: Layer) -> None:
    assert with_skew(layer, "none") is layer
    skewed = with_skew(layer, "zipf")
    assert skewed.x is layer.x and not torch.equal(skewed.topk_ids, layer.topk_ids)


# --- contenders -----------------------------------------------------------------------------------


def test_the_bound_multiplies_what_the_layer_does(layer: Layer) -> None:
    with FlopCounterMode(display=False) as counter:
        bound = peers.Bound(layer)
        bound.backward(bound.forward())
    flops = TINY.forward_flops(gated=True) + TINY.backward_flops(gated=True)
    assert counter.get_total_flops() * bound.scale == pytest.approx(flops)


def test_a_missing_peer_is_a_reason() -> None:
    assert peers.obstacle("sonic") is None
    reason = peers.obstacle("triton_kernels")
    assert reason is None or "triton_kernels.matmul_ogs cannot be imported" in reason


# --- measuring ------------------------------------------------------------------------------------


def test_turns_are_taken_and_told_apart() -> None:
    order = []

    def turn(name: str, seconds: float):
        def timed(clock) -> tuple:
            order.append(name)
            start = clock.mark()
            time.sleep(seconds)
            middle = clock.mark()
            return start, middle, clock.mark()

        return timed

    functions = {"slow": turn("slow", 0.006), "fast": turn("fast", 0.001)}
    medians = take_turns(functions, CPU, load_seconds=0.01, timed_seconds=0.03)
    assert 6 <= medians["slow"][0] < 30 and 1 <= medians["fast"][0] < 5
    assert medians["slow"][2] >= medians["slow"][0] + medians["slow"][1] - 0.1
    assert order.count("slow") == order.count("fast")
    rounds = {tuple(order[index : index + 2]) for index in range(0, len(order), 2)}
    assert rounds == {("slow", "fast"), ("fast", "slow")}, "rounds differ in their order"


def test_a_time_limit_interrupts() -> None:
    with pytest.raises(OutOfTime, match="not done after 0"), time_limit(0.05):
        time.sleep(5)
    with time_limit(5):
        pass


def test_a_peer_that_fails_or_hangs_is_left_out(layer: Layer, monkeypatch, capsys) -> None:
    def broken(_: Layer):
        raise RuntimeError("no such kernel\nat all")

    def hanging(_: Layer):
        time.sleep(5)

    monkeypatch.setitem(peers.CONTENDERS, "torch", broken)
    monkeypatch.setitem(peers.CONTENDERS, "bound", hanging)
    found = compare.prepare(["torch", "bound", "sonic"], layer, 0.5, lambda name, c: None)
    assert list(found) == ["sonic"]
    text = capsys.readouterr().out
    assert "torch left out: RuntimeError: no such kernel" in text
    assert "bound left out: not done after" in text


def test_host_time_is_that_of_the_call() -> None:
    found = small.host_microseconds(lambda: time.sleep(0.001), CPU)
    assert 900 < found.fast <= found.median < 5000


def test_the_fastest_tenth_of_few_calls_is_one_of_them(monkeypatch) -> None:
    monkeypatch.setattr(small, "_call_times", lambda *_: [100.0, 900.0])
    assert 100 <= small.host_microseconds(lambda: None, CPU).fast <= 900


def test_the_profile_names_functions(capsys) -> None:
    small.print_profile(lambda: time.sleep(0), CPU)
    assert "sleep" in capsys.readouterr().out


def test_rotations_name_different_experts(layer: Layer) -> None:
    layers = small.rotations(layer)
    assert len({tuple(each.topk_ids.flatten().tolist()) for each in layers}) == small.ROUTINGS
    weights = (layer.w1[0].numel() + layer.w2[0].numel()) * 2
    assert TINY.top_k * weights <= small.touched_bytes(layers) <= TINY.E * weights


# --- the script -----------------------------------------------------------------------------------


def test_a_whole_run_writes_what_the_plot_reads(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(small, "_HOST_CALLS", 2)
    monkeypatch.setattr(small, "_HOST_SECONDS", 0.01)
    path = tmp_path / "compare.json"
    command = ["--device", "cpu", "--thiek", "48,64,32,8,2", "--seconds", "0.01", "--host"]
    assert compare.main([*command, "--peers", "torch,bound", "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "sonic is right: errors" in text and "torch is right: errors" in text
    result = Result.read(path)
    units = {(row.provider, row.metric, row.unit) for row in result.rows}
    for name in ("sonic", "torch", "bound"):
        assert (name, "compare/none/forward + backward", "x ours") in units
    for name in ("sonic", "torch"):
        for metric in ("inference/out", "training/out", "training/dw1", "training/dtopk_weights"):
            for area in ("compare/none", "host"):
                assert (name, f"{area}/{metric}", "relative L2") in units
                assert (name, f"{area}/{metric}", "of what is allowed") in units
    assert ("torch", "host/forward + backward", "us") in units
    assert all(row["value"] is not None for row in json.loads(path.read_text())["rows"])
    figures = plot.collect(result)
    assert {(name, what) for _, name, what in figures} == {
        (name, what) for name in ("sonic", "torch", "bound") for what in plot.PANELS
    }


@pytest.mark.parametrize(
    ("flags", "tuning"),
    [
        (["--shapes", "A"], "good"),
        (["--random", "1"], "full"),
        (["--thiek", "48,64,32,8,2"], "full"),
        (["--random", "1", "--tuning", "good"], "good"),
        (["--small"], "good"),
    ],
    ids=as_typed,
)
def test_a_peer_chooses_among_all_its_tiles_at_sizes_that_were_not_searched(
    flags: list[str], tuning: str, monkeypatch
) -> None:
    monkeypatch.setattr(compare, "missing_gpu", lambda _: None)
    assert compare.parse_arguments(flags).tuning == tuning


def test_the_result_says_what_the_peer_could_choose_from(tmp_path: Path, monkeypatch) -> None:
    asked = []
    monkeypatch.setitem(peers.CONTENDERS, "sonicmoe", peers.CONTENDERS["torch"])
    monkeypatch.setattr(compare, "obstacle", lambda _: None)
    monkeypatch.setattr(compare, "shorten_tuning", lambda **options: asked.append(options))
    path = tmp_path / "result.json"
    command = ["--device", "cpu", "--host", "--peers"]
    monkeypatch.setattr(
        compare, "compare_host", lambda *args: compare._write(args[2], args[1]) or True
    )
    assert compare.main([*command, "sonicmoe", "--json", str(path)]) == 0
    assert Result.read(path).head["tuning"] == "sonicmoe: good"
    assert asked == [{"good_tiles_only": True}]
    assert compare.main([*command, "torch", "--json", str(path)]) == 0
    assert "tuning" not in Result.read(path).head


def test_skewed_routing_is_raced_with_uniform(tmp_path: Path) -> None:
    path = tmp_path / "skew.json"
    command = ["--device", "cpu", "--thiek", "48,64,32,8,2", "--seconds", "0.01"]
    assert compare.main([*command, "--peers", "torch", "--skew", "hot", "--json", str(path)]) == 0
    rows = Result.read(path).rows
    assert {row.provider for row in rows} == {"sonic", "torch"}
    ratios = [row for row in rows if row.unit == "x uniform"]
    assert {row.metric for row in ratios} == {f"compare/hot/{name}" for name in compare.PASSES}
    assert all(row.provider == "sonic" for row in ratios)
    checked = {row.metric for row in rows if row.unit == "of what is allowed"}
    assert {"compare/hot/training/dw1", "compare/hot/uniform/training/dw1"} <= checked


@pytest.mark.parametrize("wrong", ["sonic", "torch", "sonic with uniform routing"])
def test_what_is_wrong_is_not_recorded(wrong: str, tmp_path: Path, monkeypatch, capsys) -> None:
    """Alone with a skew, too; the exit status says so."""
    name, _, of = wrong.partition(" with ")
    make, skew = peers.CONTENDERS[name], "zipf" if name == "sonic" else "none"
    skewed = []

    def broken(layer: Layer):
        contender = make(layer)
        skewed.append(layer)
        if not of or len(skewed) == 2:
            right = contender.backward
            contender.backward = lambda out: tuple(1.05 * gradient for gradient in right(out))
        return contender

    monkeypatch.setitem(peers.CONTENDERS, name, broken)
    path = tmp_path / "result.json"
    command = ["--device", "cpu", "--thiek", "48,64,32,8,2", "--seconds", "0.01", "--skew", skew]
    with_peers = ["--peers", "sonic" if name == "sonic" else "torch,bound"]
    assert compare.main([*command, *with_peers, "--json", str(path)]) == 1
    assert "FAILED: results were wrong" in capsys.readouterr().out
    providers = {row.provider for row in Result.read(path).rows}
    assert providers == (set() if name == "sonic" else {"sonic", "bound"})


def test_wrong_calls_have_no_host_time(tmp_path: Path, monkeypatch) -> None:
    make = peers.CONTENDERS["sonic"]

    def broken(layer: Layer):
        contender = make(layer)
        right = contender.inference
        contender.inference = lambda: right().roll(1, 0)
        return contender

    monkeypatch.setitem(peers.CONTENDERS, "sonic", broken)
    path = tmp_path / "result.json"
    command = ["--device", "cpu", "--host", "--peers", "sonic", "--json", str(path)]
    assert compare.main(command) == 1
    assert not Result.read(path).rows


@pytest.mark.parametrize("wrong", ["nothing", "graph of torch", "graph of sonic", "eager sonic"])
def test_few_tokens_are_checked_in_graphs_and_eager(
    wrong: str, monkeypatch, tmp_path: Path
) -> None:
    """With calls in place of graphs, which a CPU has not."""
    monkeypatch.setattr(launches, "captured", lambda function: function)
    monkeypatch.setattr(small, "DECODE_SHAPE", TINY.problem[1:])
    monkeypatch.setattr(small, "_COPY_BYTES", 2**12)
    monkeypatch.setattr(small, "_HOST_SECONDS", 0.01)
    monkeypatch.setattr(compare, "DECODE_TOKENS", (4, 16))
    path = tmp_path / "result.json"
    arguments = compare.parse_arguments(["--host", "--device", "cpu", "--json", str(path)])
    where, _, name = wrong.partition(" of ") if "graph" in wrong else wrong.partition(" ")
    calls = []

    def broken(layer: Layer):
        contender = make(layer)
        calls.append(contender)
        return contender

    def inference(self):
        out = right(self)
        first = any(self is contender for contender in calls)  # not a copy, of which graphs are
        return out.roll(1, 1) if first == (where == "eager") else out

    if where in ("graph", "eager"):
        make, kind = (
            peers.CONTENDERS[name],
            type(peers.CONTENDERS[name](make_layer(TINY, CPU_ONLY))),
        )
        right = kind.inference
        monkeypatch.setattr(kind, "inference", inference)
        monkeypatch.setitem(peers.CONTENDERS, name, broken)
    result = Result(dict.fromkeys(HEAD_KEYS))
    assert compare.compare_small(["sonic", "torch"], arguments, result) == (wrong == "nothing")
    timed = {(row.provider, row.metric) for row in result.rows if row.unit == "us"}
    names = {"nothing": {"sonic", "torch"}, "graph of torch": {"sonic"}}.get(wrong, set())
    metrics = {"small/graph", "small/host", "small/host, fastest tenth"}
    expected = {(name, metric) for name in names for metric in metrics}
    assert timed == (expected | {("bound", "small/floor")} if names else set())
    checked = {(row.provider, row.metric) for row in result.rows if row.unit == "relative L2"}
    parts = "small/eager/inference/out", "small/graph/inference/out"
    assert checked == {(name, part) for name in names for part in parts}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--shapes", "A,Z"], "no shape 'Z'"),
        (["--peers", "megatron"], "no contender 'megatron'"),
        (["--thiek", "1,2"], "five positive integers"),
        (["--plot-from", "x.json"], "--plot-from needs --plot"),
        (["--profile"], "--profile is of the calls that --host times"),
        ([], "Nothing to compare"),
        (["--seconds", "nan"], "more than 0"),
        (["--seconds", "inf"], "at most 86400"),
        (["--shapes", "A", "--skew", "hot", "--plot", "a.svg"], "--plot draws uniform routing"),
        (["--shapes", "A", "--plot", "a.txt"], "does not end with .svg"),
        (["--host", "--plot", "a.svg"], "there are none"),
        (["--host", "--skew", "hot"], "--skew is of the sizes that"),
        (["--host", "--json", "/proc/x.json"], "cannot be written"),
        (["--small", "--device", "cpu"], "--small takes CUDA graphs"),
        (["--shapes", "A", "--device", "cpu"], "is too large for the reference implementation"),
        (["--plot-from", "x.json", "--plot", "a.svg", "--small"], "leave out sizes"),
    ],
    ids=as_typed,
)
def test_options_that_cannot_work_are_refused(flags, says, capsys) -> None:
    assert says in refusal(compare.main, flags, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_a_missing_gpu_is_said(capsys) -> None:
    assert "torch sees no CUDA device" in refusal(compare.main, ["--shapes", "A"], capsys)


def test_a_file_without_a_comparison_is_refused(tmp_path: Path, capsys) -> None:
    flags = ["--plot", str(tmp_path / "a.svg"), "--plot-from"]
    assert compare.main([*flags, str(tmp_path / "nosuch.json")]) == 2
    said = capsys.readouterr().err
    assert "nosuch.json" in said and "that --json wrote" in said
    other = tmp_path / "other.json"
    other.write_text("{}")
    assert compare.main([*flags, str(other)]) == 2
    assert "is no result file" in capsys.readouterr().err


def test_a_run_without_ours_has_failed(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr(compare, "prepare", lambda *arguments: {})
    command = ["--device", "cpu", "--thiek", "48,64,32,8,2", "--peers", "sonic"]
    assert compare.main([*command, "--json", str(tmp_path / "result.json")]) == 1
    assert "ours are missing" in capsys.readouterr().out


def test_a_picture_that_cannot_be_drawn_is_a_failure(monkeypatch, capsys, tmp_path: Path) -> None:
    source, target = RESULTS / "2026-11-28-compare.json", tmp_path / "a.svg"
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert compare.main(["--plot-from", str(source), "--plot", str(target)]) == 1
    assert "install matplotlib" in capsys.readouterr().out and not target.exists()
