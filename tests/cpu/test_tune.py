"""``sonic tune``: what it tries, keeps, shows and forgets, with times that are made up."""

import json

import pytest
import torch

from sonic import cli, tune
from sonic.enums import ActivationType
from sonic.runtime import launch
from sonic.runtime.cache import kernel_cache
from sonic.runtime.problem import TileConfig
from sonic.runtime.tuned import TunedSize, tuned_file, tuned_tiles
from sonic.runtime.tuning import search

pytest.importorskip("cutlass")

from kernels_sm90 import BACKEND

SIZE = cli.LayerSize(1024, 2048, 768, 16, 4)
THIEK = ["--thiek", "1024,2048,768,16,4"]
GPU = "NVIDIA Test 200"


class Times:
    """Stands for the GPU: milliseconds by tiling, one where nothing else is said."""

    def __init__(self):
        self.by_tiling = {}
        self.measured = []

    def gemm(self, problem, *_):
        return _TimedGemm(self, problem)


class _TimedGemm:
    def __init__(self, times, problem):
        self.times, self.problem = times, problem

    def warm_up(self, config):
        pass

    def milliseconds(self, config):
        self.times.measured.append((self.problem, config))
        return self.times.by_tiling.get(config, 1.0)


@pytest.fixture
def times(tmp_path, monkeypatch):
    """A GPU whose times the test says, and an empty cache."""
    tmp_path.chmod(0o700)
    monkeypatch.setenv("SONIC_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.delenv("SONIC_CACHE", raising=False)
    times = Times()
    monkeypatch.setattr(tune, "backend_for", lambda device: BACKEND)
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
    tuned_tiles.cache_clear()
    launch._config.cache_clear()


def chosen(size=SIZE):
    """The tiles that a layer of this size would be launched with."""
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


def a_tiling_of_all():
    """One that every problem of the layer can have, and none has by its size."""
    spaces = [
        set(BACKEND.search_space(problem))
        for problem, _, _ in cli.layer_launches(SIZE, ActivationType.SWIGLU, "bfloat16", False)
    ]
    common = set.intersection(*spaces) - set(by_size())
    return min(common, key=lambda config: (config.name, config.raster_along_m))


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


def test_every_legal_tiling_and_the_default_are_tried(times):
    assert cli.main(["tune", *THIEK]) == 0
    for problem, n, k in cli.layer_launches(SIZE, ActivationType.SWIGLU, "bfloat16", False):
        default = BACKEND.default_config(problem, SIZE.rows_per_expert, n, k)
        tried = {config for measured, config in times.measured if measured == problem}
        assert tried == {default, *BACKEND.search_space(problem)}


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
    assert "torch sees no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--show", *THIEK], ["--show", "--clear"]])
def test_one_thing_at_a_time(flags, capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune", *flags])
    assert "--show" in capsys.readouterr().err


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

    def measure(config):
        measured.append(config)
        return float(config.tile_n)

    found = search(configs[-1], configs, measure)
    assert min(found, key=found.__getitem__) == configs[0]
    assert set(found) == set(configs)
    often = {config for config in configs if measured.count(config) > 2}
    assert often == {configs[0], configs[-1]}


def test_clocks_that_fall_reach_all_tilings_alike():
    configs = [TileConfig(128, n) for n in (64, 128, 192, 256)]
    seconds = {config: 1 + config.tile_n / 1000 for config in configs}
    clock = iter(range(10**6))
    found = search(configs[3], configs, lambda config: seconds[config] * (1 + next(clock) / 1000))
    assert sorted(found, key=found.__getitem__) == configs
