"""``benchmarks/tiles.py``: what is timed, on which shapes, and what becomes of the times."""

from pathlib import Path

import pytest

from benchmarks import tiles
from benchmarks.report import HEAD_KEYS, RESULTS, Figures, tiles_table
from benchmarks.shapes import Shape
from benchmarks.tiles import SEED, Sweep, drawn_shapes, launches, seconds, tilings
from kernels_sm90 import BACKEND
from kernels_sm90.tiles import supports_config
from sonic.enums import ActivationType
from sonic.runtime.problem import Problem, TileConfig, layer_problems


def test_every_candidate_is_timed() -> None:
    for problem in layer_problems(ActivationType.SWIGLU, "bfloat16", False, accumulate=True):
        space = tilings(BACKEND, problem)
        assert all(supports_config(problem, config) is None for config in space)
        assert set(BACKEND.candidates(problem)) <= set(space), problem.name
        assert len(set(space)) == len(space) < 120


def test_shapes_are_drawn_by_a_seed() -> None:
    shapes = drawn_shapes(20, SEED)
    assert len(set(shapes)) == 20 and shapes == drawn_shapes(20, SEED)
    assert shapes != drawn_shapes(20, SEED + 1)
    assert all(1e-4 <= seconds(shape) <= 2.5e-3 for shape in shapes)
    by_gemm = launches(shapes[0])
    kinds = [problem.ragged.value for problem, _, _ in by_gemm.values()]
    assert kinds == [*["rows"] * 4, *["reduction"] * 2]
    assert by_gemm["dw1"][0].gated_rows and by_gemm["dh"][0].activation is not None


class _TimedGemm:
    """Stands for a GEMM on a GPU: of each problem the second tiling is the fastest."""

    def __init__(self, problem: Problem, *_: object) -> None:
        self.best = tilings(BACKEND, problem)[1]

    def warm_up(self, config: TileConfig) -> None:
        pass

    def milliseconds(self, config: TileConfig, seconds: float) -> float:
        return 1.0 if config == self.best else 1.25


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setattr(tiles, "TimedGemm", _TimedGemm)
    shapes = Shape(64, 64, 64, 8, 2), Shape(4096, 2048, 768, 8, 2)
    problems = {gemm: problem for gemm, (problem, _, _) in launches(shapes[0]).items()}
    spaces = {gemm: tilings(BACKEND, problem) for gemm, problem in problems.items()}
    sweep = Sweep(BACKEND, spaces, "cpu")
    for shape in shapes:
        sweep.add(shape)
    return sweep


def test_a_sweep_says_what_the_choice_costs(
    sweep: Sweep,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for gemm, space in sweep.spaces.items():
        chosen = [sweep.chosen(gemm, shape) for shape in sweep.shapes]
        expected = [1.0 if config == space[1] else 1.25 for config in chosen]
        assert [sweep.ratio(gemm, index) for index in range(2)] == expected
    monkeypatch.setattr(tiles, "environment", lambda device: dict.fromkeys(HEAD_KEYS, ""))
    result = tmp_path / "2026-01-01-tiles.json"
    sweep.write(result)
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["tiles.py", "--review", str(tiles.times_beside(result))])
    tiles.main()
    printed = capsys.readouterr().out
    assert sweep.summary() in printed and sweep.line("dw1", 1) in printed
    table = tiles_table(Figures(tmp_path))
    assert "| 64, 64, 64, 8, 2 | 1.250" in table and "| worst |" in table
    assert result.name in table


def test_the_choice_is_near_the_best_of_every_committed_sweep() -> None:
    """Within 3 % but for a few GEMMs: README's table has each of them."""
    committed = list(RESULTS.glob("*.times.gz"))
    if not committed:
        pytest.skip("no sweep has been committed yet")
    for path in committed:
        sweep = Sweep.read_times(path, BACKEND)
        ratios = {
            sweep.line(gemm, index): sweep.ratio(gemm, index)
            for gemm in sweep.spaces
            for index in range(len(sweep.shapes))
        }
        far = {line: ratio for line, ratio in ratios.items() if ratio > 1.03}
        assert len(far) <= 0.03 * len(ratios) and max(ratios.values()) < 1.055, "\n".join(far)
