"""The race of kernels of several checkouts: what it compiles, finds, compares and refuses."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed")

from benchmarks import builds
from benchmarks.builds import Built
from kernels_sm90 import BACKEND
from sonic.runtime.problem import Schedule, TileConfig
from tests.refusals import refusal

NARROW, WIDE = TileConfig(128, 128), TileConfig(128, 256, schedule=Schedule.OVERLAPPED)


def test_a_build_is_compiled_without_a_gpu_and_found_again(tmp_path):
    backend = BACKEND.for_gpu("H200")
    builds.compile_build(backend, tmp_path, ["C"], ["down"])
    found = builds.load_build(tmp_path, "C", "down")
    assert callable(found.kernel)
    assert found.config == builds.chosen_tiling(backend, "down", builds.BARS["C"])
    with pytest.raises(ValueError, match="has no up of C; it has C down: compile it there"):
        builds.load_build(tmp_path, "C", "up")


class Timed:
    """Stands for a TimedGemm; a kernel is the milliseconds that it takes."""

    def __init__(self):
        self.kernels, self.turns = {}, []

    def milliseconds(self, config, _):
        self.turns.append(self.kernels[config])
        return self.kernels[config]

    def results(self, config):
        return self.kernels[config]

    def difference(self, expected, config):
        return None if self.kernels[config] == expected else "d differs"


def test_a_race_takes_turns_and_leaves_out_the_first_round():
    """Builds with the same tiles do not get one another's kernel."""
    timed = Timed()
    race = [Built(2.0, NARROW), Built(3.0, NARROW), Built(1.0, WIDE)]
    assert builds.race(timed, race, 4) == [[2.0] * 4, [3.0] * 4, [1.0] * 4]
    rounds = [tuple(timed.turns[i : i + 3]) for i in range(0, 15, 3)]
    assert len(set(rounds)) > 2 and all(sorted(turn) == [1.0, 2.0, 3.0] for turn in rounds)


def test_results_are_held_to_those_of_the_first_build():
    builds_of = [Built(2.0, NARROW), Built(2.0, WIDE), Built(3.0, NARROW)]
    assert builds.differences(Timed(), builds_of) == {2: "d differs"}


def test_the_line_has_ratios_within_rounds():
    text = builds.line("C", "dh", [[2.0, 4.0, 3.0], [3.0, 6.0, 6.0]], [Path("a"), Path("b")])
    assert text == "C dh   a 3.0000 ms; b 1.500"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["race", "a"], "two builds or more"),
        (["race", "a", "b", "--shapes", "C", "--gemms", "dh"], "a has no dh of C; it has nothing"),
        (["race", "a", "b", "--rounds", "0"], "rounds"),
        (["compile"], "--to"),
    ],
)
def test_what_cannot_be_raced_is_refused(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert says in refusal(builds.main, flags, capsys)


def test_a_race_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(builds, "load_build", lambda *_: Built(1.0, NARROW))
    assert builds.main(["race", "a", "b", "--shapes", "C", "--gemms", "dh"]) == 2
    assert "Needs a CUDA GPU" in capsys.readouterr().err
