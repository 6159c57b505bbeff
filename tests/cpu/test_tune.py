"""``sonic tune``: what it tries, keeps, shows and forgets, with times that are made up."""

import json
import math
from dataclasses import replace

import filelock
import pytest
import torch

from sonic import cli, tune
from sonic.enums import ActivationType
from sonic.runtime import launch, tuned, tuning
from sonic.runtime.cache import kernel_cache
from sonic.runtime.problem import (
    EpilogueKind,
    Operand,
    Ragged,
    Schedule,
    TileConfig,
    down_backward_act_problem,
    down_problem,
    weight_grad_problem,
)
from sonic.runtime.tuned import TunedSize, keep_tuned, tuned_file, tuned_tiles
from sonic.runtime.tuning import Results, TimedGemm, search
from tests.refusals import refusal

pytest.importorskip("cutlass")

from kernels_sm90 import BACKEND

SIZE = cli.LayerSize(1024, 2048, 768, 16, 4)
THIEK = ["--thiek", "1024,2048,768,16,4"]
GPU = "NVIDIA Test 200"


class Times:
    """Stands for the GPU: milliseconds by tiling, one where nothing else is said, and the tilings
    whose results are wrong."""

    def __init__(self):
        self.by_tiling = {}
        self.wrong = set()
        self.alive = 0
        self.measured = []

    def gemm(self, problem, *_):
        return _TimedGemm(self, problem)


class _TimedGemm:
    def __init__(self, times, problem):
        self.times, self.problem = times, problem
        assert times.alive == 0, "the operands of the GEMM before are still there"
        times.alive += 1

    def __del__(self):
        self.times.alive -= 1

    def results(self, config):
        assert config not in self.times.wrong
        return Results(config, {})

    def difference(self, expected, config):
        return "d differs" if config in self.times.wrong else None

    def warm_up(self, config):
        pass

    def milliseconds(self, config, seconds):
        self.times.measured.append((self.problem, config))
        return self.times.by_tiling.get(config, 1.0)


@pytest.fixture
def times(tmp_path, monkeypatch):
    """A GPU whose times the test says, and an empty cache."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("SONIC_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.delenv("SONIC_CACHE", raising=False)
    times = Times()
    monkeypatch.setattr(tune, "backend_for", lambda device, instead: BACKEND)
    monkeypatch.setattr(launch, "backend_for", lambda device: BACKEND)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(tune, "TimedGemm", times.gemm)
    monkeypatch.setattr(tune, "_routing", lambda size, device: (None, None))
    monkeypatch.setattr(tune, "compile_kernels", lambda arch, kernels, jobs: 0)
    _forget()
    yield times
    _forget()


def _forget():
    """As in a new process."""
    kernel_cache.cache_clear()
    launch.forget_tiles()


def chosen(size=SIZE, anew=True):
    """The tiles that a layer of this size would be launched with, ``anew`` in a new process."""
    if anew:
        _forget()
    rows = size.tokens * size.top_k
    return [
        launch.config_for(problem, torch.device("cuda"), rows, size.experts, n, k)
        for problem, n, k in cli.layer_launches(size, ActivationType.SWIGLU, "bfloat16", False)
    ]


def by_size(size=SIZE):
    kernels = cli.layer_kernels(
        BACKEND.default_config, size, ActivationType.SWIGLU, "bfloat16", False
    )
    return [config for _, config in kernels]


def a_tiling_of_all(index=0):
    """One of those that every problem of the layer can have, and none has by its size."""
    spaces = [
        set(BACKEND.search_space(problem))
        for problem, _, _ in cli.layer_launches(SIZE, ActivationType.SWIGLU, "bfloat16", False)
    ]
    common = set.intersection(*spaces) - set(by_size())
    return sorted(common, key=lambda config: config.name)[index]


def test_what_is_faster_is_used_from_then_on(times, capsys):
    best = a_tiling_of_all()
    times.by_tiling[best] = 0.5
    assert chosen() == by_size()
    assert cli.main(["tune", *THIEK]) == 0
    output = capsys.readouterr().out
    assert output.count("2.000 times as fast") == 9 and "kept in" in output
    assert chosen() == [best] * 9
    other = cli.LayerSize(1024, 2048, 768, 16, 3)
    assert chosen(other) == by_size(other)
    twice = cli.LayerSize(2048, 2048, 768, 32, 4)  # as many rows per expert
    assert chosen(twice) == by_size(twice)


def test_every_legal_tiling_and_the_default_are_tried(times):
    assert cli.main(["tune", *THIEK]) == 0
    for problem, n, k in cli.layer_launches(SIZE, ActivationType.SWIGLU, "bfloat16", False):
        default = BACKEND.default_config(problem, SIZE.rows_per_expert, n, k, SIZE.experts)
        tried = {config for measured, config in times.measured if measured == problem}
        assert tried == {default, *BACKEND.search_space(problem)}


def test_reductions_stay_split(times):
    """Uniform routing, which a search sees, has no use for it."""
    small = cli.LayerSize(2048, 512, 256, 32, 4)
    assert cli.main(["tune", "--thiek", "2048,512,256,32,4"]) == 0
    for problem, _, _ in cli.layer_launches(small, ActivationType.SWIGLU, "bfloat16", False):
        stored = problem.ragged is Ragged.REDUCTION and problem.epilogue is EpilogueKind.LINEAR
        tried = [config for measured, config in times.measured if measured == problem]
        assert len(tried) > 5 and all(config.split is stored for config in tried)


def test_slices_of_columns_are_tuned_too(times):
    large = cli.LayerSize(32768, 2048, 768, 128, 8)
    times.by_tiling[a_tiling_of_all()] = 0.5
    assert cli.main(["tune", "--thiek", "32768,2048,768,128,8"]) == 0
    (dx,) = {p for p, n, _ in cli._sliced_launches(large, ActivationType.SWIGLU, "bfloat16")}
    sizes = tuned_tiles(BACKEND.arch, GPU)
    assert {size.n for size in sizes if size.problem == dx} == {512, 2048}


def test_a_tiling_with_another_result_is_refused(times, caplog):
    wrong, slower = a_tiling_of_all(), a_tiling_of_all(1)
    times.by_tiling |= {wrong: 0.25, slower: 0.5}
    times.wrong.add(wrong)
    assert cli.main(["tune", *THIEK]) == 0
    assert chosen() == [slower] * 9
    assert caplog.text.count("refused tiles with another result") == 9
    assert wrong.name in caplog.text


def test_this_process_uses_what_was_found_and_cleared(times):
    best = a_tiling_of_all()
    times.by_tiling[best] = 0.5
    assert chosen() == by_size()
    cli.main(["tune", *THIEK])
    assert chosen(anew=False) == [best] * 9
    cli.main(["tune", "--clear"])
    assert chosen(anew=False) == by_size()


def test_tiles_that_no_kernel_can_have_are_skipped(times, caplog):
    best = a_tiling_of_all()
    times.by_tiling[best] = 0.5
    cli.main(["tune", *THIEK])
    path = tuned_file(BACKEND.arch, GPU)
    entries = json.loads(path.read_text())
    entries[0]["tiles"]["tile_m"] = 100
    path.write_text(json.dumps(entries))
    assert chosen() == [by_size()[0]] + [best] * 8
    assert "tile_m=100" in caplog.text and str(path) in caplog.text


def test_a_file_that_cannot_be_read_or_written_is_left_alone(times, monkeypatch):
    times.by_tiling[a_tiling_of_all()] = 0.5
    cli.main(["tune", *THIEK])
    path = tuned_file(BACKEND.arch, GPU)
    before = path.read_bytes()

    def refuse(*_):
        raise PermissionError("not yours")

    for name in ("read_own", "os.replace"):
        with monkeypatch.context() as patch, pytest.raises(PermissionError):
            patch.setattr(f"sonic.runtime.tuned.{name}", refuse)
            keep_tuned(path, {})
        assert path.read_bytes() == before
        assert not list(path.parent.glob(".new-*"))


def test_processes_that_keep_tiles_take_turns(times, monkeypatch):
    times.by_tiling[a_tiling_of_all()] = 0.5
    cli.main(["tune", *THIEK])
    path = tuned_file(BACKEND.arch, GPU)
    entries, held = dict(tuned._read(path)), []
    write = tuned._write

    def locked(*arguments):
        lock = filelock.FileLock(path.with_name(f".{path.stem}.lock"), timeout=0)
        with pytest.raises(filelock.Timeout):
            lock.acquire()
        held.append(True)
        write(*arguments)

    monkeypatch.setattr(tuned, "_write", locked)
    keep_tuned(path, entries)
    assert held and tuned._read(path) == entries


def test_a_difference_of_chance_changes_nothing(times):
    times.by_tiling[a_tiling_of_all()] = 0.995
    assert cli.main(["tune", *THIEK]) == 0
    assert chosen() == by_size()


def test_a_second_search_replaces_the_first_and_leaves_other_sizes(times):
    best = a_tiling_of_all()
    times.by_tiling[best] = 0.5
    other = cli.LayerSize(512, 2048, 768, 16, 4)
    assert cli.main(["tune", *THIEK, "--thiek", "512,2048,768,16,4"]) == 0
    times.by_tiling.clear()
    assert cli.main(["tune", *THIEK]) == 0
    assert chosen() == by_size()
    assert chosen(other) == [best] * 9


def test_show_and_clear(times, capsys):
    assert cli.main(["tune", "--show"]) == 0
    assert capsys.readouterr().out == f"0 tuned sizes for {GPU}\n"
    best = a_tiling_of_all()
    times.by_tiling[best] = 0.5
    cli.main(["tune", *THIEK])
    capsys.readouterr()
    assert cli.main(["tune", "--show"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"9 tuned sizes for {GPU}"
    assert all(best.name in line and "256 rows per expert" in line for line in lines[:-1])
    assert cli.main(["tune", "--clear"]) == 0
    assert chosen() == by_size()
    assert cli.main(["tune", "--clear"]) == 0


def test_nothing_is_kept_if_a_kernel_does_not_compile(times, monkeypatch):
    monkeypatch.setattr(tune, "compile_kernels", lambda arch, kernels, jobs: 1)
    assert cli.main(["tune", *THIEK]) == 1
    assert not times.measured and not tuned_file(BACKEND.arch, GPU).exists()


@pytest.mark.parametrize("text", ["{", "{}", "[1]", '[{"problem": {}}]', ""])
def test_a_damaged_file_is_not_used(times, text, caplog):
    times.by_tiling[a_tiling_of_all()] = 0.5
    cli.main(["tune", *THIEK])
    path = tuned_file(BACKEND.arch, GPU)
    path.write_text(text)
    assert chosen() == by_size()
    assert (str(path) in caplog.text) == (text != "{}")
    assert cli.main(["tune", *THIEK]) == 0
    assert chosen() == [a_tiling_of_all()] * 9


def test_a_file_that_others_can_write_is_not_used(times, caplog):
    times.by_tiling[a_tiling_of_all()] = 0.5
    cli.main(["tune", *THIEK])
    tuned_file(BACKEND.arch, GPU).chmod(0o666)
    assert chosen() == by_size()
    assert "written by other users" in caplog.text


def test_another_gpu_has_tiles_of_its_own(times, monkeypatch):
    times.by_tiling[a_tiling_of_all()] = 0.5
    cli.main(["tune", *THIEK])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Test 300")
    assert chosen() == by_size()


@pytest.mark.parametrize("mode", ["ro", "off"])
@pytest.mark.parametrize("what", [THIEK, ["--clear"]])
def test_a_cache_that_keeps_nothing_is_refused(times, mode, what, monkeypatch, capsys):
    monkeypatch.setenv("SONIC_CACHE", mode)
    assert cli.main(["tune", *what]) == 2
    assert f"SONIC_CACHE is {mode}" in capsys.readouterr().err
    assert not times.measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_a_gpu_is_needed(capsys):
    assert cli.main(["tune", *THIEK]) == 2
    text = capsys.readouterr().err
    assert "torch sees no CUDA device" in text and "where there is one" in text
    assert "impl=" not in text, "no option of the command"


@pytest.mark.parametrize("flags", [[], ["--show", *THIEK], ["--show", "--clear"]])
def test_one_thing_at_a_time(flags, capsys):
    assert "--show" in refusal(cli.main, ["tune", *flags], capsys)


def test_a_file_says_what_it_means(times):
    times.by_tiling[a_tiling_of_all()] = 0.5
    cli.main(["tune", *THIEK])
    entries = json.loads(tuned_file(BACKEND.arch, GPU).read_text())
    assert {entry["n"] for entry in entries} == {2048, 1536, 768}
    assert all(set(TunedSize._fields) < set(entry) for entry in entries)


# --- the search -----------------------------------------------------------------------------------


def test_only_the_fastest_are_timed_again_and_the_default():
    configs = [TileConfig(128, 8 * n) for n in range(1, 21)]
    measured = []

    def measure(config, seconds):
        measured.append(config)
        return float(config.tile_n)

    found = search(configs[-1], configs, measure)
    assert min(found, key=found.__getitem__) == configs[0]
    assert set(found) == set(configs)
    often = {config for config in configs if measured.count(config) > 3}
    assert often == {configs[0], configs[-1]}
    assert measured.count(configs[10]) == 1, "hopeless from the first round on"


def test_clocks_that_fall_reach_all_tilings_alike():
    configs = [TileConfig(128, n) for n in (64, 128, 192, 256)]
    seconds = {config: 1 + config.tile_n / 1000 for config in configs}
    clock = iter(range(10**6))
    found = search(
        configs[3], configs, lambda config, _: seconds[config] * (1 + next(clock) / 1000)
    )
    assert sorted(found, key=found.__getitem__) == configs


def test_the_first_tilings_gain_nothing_from_clocks_that_fall_at_once():
    """The default comes first, when the GPU has just begun to work."""
    configs = [TileConfig(128, n) for n in (256, 64, 128, 192)]
    seconds = {config: 1 + config.tile_n / 1000 for config in configs}
    clock = iter([0.8] * 2 + [1.0] * 10**4)
    found = search(configs[0], configs, lambda config, _: seconds[config] * next(clock))
    assert found == pytest.approx(seconds)


# --- what it computes -----------------------------------------------------------------------------

NARROW, WIDE = TileConfig(128, 64), TileConfig(128, 128, schedule=Schedule.OVERLAPPED)


@pytest.mark.parametrize("harm", [None, "d", "aux", "row_sum", "unwritten"])
@pytest.mark.parametrize(
    "problem",
    [
        down_problem("bfloat16", True),
        down_backward_act_problem(ActivationType.SWIGLU, "bfloat16"),
        weight_grad_problem("bfloat16", Operand.B, False, True),
    ],
    ids=["linear", "gradient", "accumulated"],
)
def test_results_are_compared(monkeypatch, problem, harm):
    """One wrong element of any result is found; what rounding may change is not wrong."""
    gradient = problem.epilogue is EpilogueKind.ACTIVATION_GRAD
    values = {}

    def prepare(problem, config, *_, **sizes):
        return lambda **operands: run(config, **operands)

    def run(config, *, row_sum=None, **operands):
        for name in ("d", "aux"):
            if name not in operands:
                continue
            output = operands[name]
            right = values.setdefault(name, torch.randn_like(output))
            ulp = torch.finfo(output.dtype).eps if gradient and config is WIDE else 0
            result = right * (1 + ulp)
            if harm == name and config is WIDE:
                result[-1, -1] = -result[-1, -1] - 1
            if problem.epilogue is EpilogueKind.ACCUMULATE:
                result = output + result
            output.copy_(result)
            if harm == "unwritten" and config is WIDE:
                output[0, 0] = 1e9 if problem.epilogue is EpilogueKind.ACCUMULATE else float("nan")
        if row_sum is not None:
            right = values.setdefault("row_sum", torch.randn(row_sum.shape[1]))
            row_sum.copy_(right.expand_as(row_sum) / row_sum.shape[0])
            if harm == "row_sum" and config is WIDE:
                row_sum[0, 3] += 2 * right.abs().max()

    monkeypatch.setattr(tuning, "grouped_gemm", prepare)
    rows, offsets = torch.arange(24).int() % 8, torch.tensor([0, 10, 24]).int()
    gemm = TimedGemm(problem, rows, offsets, 8, 128, 32)
    has = {"d", "unwritten"} | ({"aux", "row_sum"} if gradient else set())
    expected = gemm.results(NARROW)
    found = gemm.difference(expected, WIDE)
    assert (found is not None) == (harm in has), found
    assert gemm.difference(expected, NARROW) is None, "it is still what NARROW computes"


# --- how it is timed ------------------------------------------------------------------------------


class _Gpu:
    """Each launch takes ``milliseconds``, or what the host takes if that is more."""

    def __init__(self, monkeypatch, milliseconds, host=0.02):
        self.milliseconds, self.host = milliseconds, host
        self.weights, self.replays = [], 0
        monkeypatch.setattr(tuning, "grouped_gemm", self.prepare)
        monkeypatch.setattr(TimedGemm, "_captured", lambda *call: self.capture(*call))
        monkeypatch.setattr(
            TimedGemm, "_timed", lambda gemm, launch, calls: self.time(launch, calls)
        )

    def prepare(self, *_, **sizes):
        return lambda b, **operands: self.weights.append(b)

    def capture(self, gemm, config, launches):
        self.captured = launches
        for turn in range(launches):
            gemm.run(config, turn)
        return self.replay

    def replay(self):
        self.replays += 1

    def time(self, launch, calls):
        for _ in range(calls):
            launch()
        graph = launch == self.replay
        return self.captured * self.milliseconds if graph else max(self.milliseconds, self.host)


def _linear():
    rows, offsets = torch.arange(24).int() % 8, torch.tensor([0, 10, 24]).int()
    return TimedGemm(down_problem("bfloat16", False), rows, offsets, 8, 128, 32)


@pytest.mark.parametrize("host", [0.02, 0.12])
@pytest.mark.parametrize("seconds", [0.0, 0.02])
def test_short_launches_are_timed_without_the_host_on_other_weights_each(
    monkeypatch, seconds, host
):
    gpu = _Gpu(monkeypatch, 0.005, host)
    assert _linear().milliseconds(NARROW, seconds) == pytest.approx(0.005)
    captured = gpu.weights[-gpu.captured :]
    assert gpu.captured > 10
    assert len({weight.data_ptr() for weight in captured}) == gpu.captured
    assert all(torch.equal(weight, captured[0]) for weight in captured)
    timed = math.ceil(seconds / 5e-6 / gpu.captured)
    assert gpu.replays == (2 + timed // 2 + timed if seconds else 2)


def test_long_launches_are_timed_as_layers_launch_them(monkeypatch):
    gpu = _Gpu(monkeypatch, 2.0)
    assert _linear().milliseconds(NARROW, 0.02) == 2.0
    assert gpu.replays == 0 and len(gpu.weights) == 2 + 5 + 10


def test_parts_are_added_behind_a_split_reduction(monkeypatch):
    launched = []

    def prepare(problem, config, *_, **sizes):
        def run(*, aux=None, **operands):
            launched.append(("gemm", None if aux is None else tuple(aux.shape)))

        run.parts = 3
        return run

    def add_parts(out, partial, offset_by_expert, rows):
        launched.append(("add", tuple(out.shape), tuple(partial.shape), rows))

    monkeypatch.setattr(tuning, "grouped_gemm", prepare)
    rows, offsets = torch.arange(24).int() % 8, torch.tensor([0, 10, 24]).int()
    problem = weight_grad_problem("bfloat16", Operand.A, False, False)
    split = replace(NARROW, split=True)
    TimedGemm(problem, rows, offsets, 8, 128, 32, add_parts).run(split)
    assert launched == [("gemm", (3, 32, 128)), ("add", (2, 32, 128), (3, 32, 128), 24)]
    launched.clear()
    TimedGemm(problem, rows, offsets, 8, 128, 32).run(split)
    TimedGemm(problem, rows, offsets, 8, 128, 32, add_parts).run(NARROW)
    assert launched == [("gemm", (3, 32, 128)), ("gemm", None)]
