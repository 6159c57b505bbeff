"""``benchmarks/report.py``: which results the README's tables are made of."""

from pathlib import Path

import pytest

from benchmarks import measure, report
from benchmarks.report import Figures, Result, regenerate
from benchmarks.shapes import NAMED_SHAPES
from tests.refusals import refusal

ROOT = Path(__file__).resolve().parents[2]


def _write(directory: Path, date: str, ms: float) -> None:
    head = dict.fromkeys(report.HEAD_KEYS, "x") | {
        "date": date,
        "device": "GPU",
        "commit": "c" * 40,
    }
    result = Result(head)
    for name in measure.PASSES:
        result.add(f"experts/{name}", ms, "ms", NAMED_SHAPES[0].shape.problem)
    result.add("random problems/run", 600, "count", [])
    result.add("dead", float("nan"), "ms", [])
    result.write(directory / f"{date}-x.json")


def test_tables_come_from_the_latest_results(tmp_path: Path) -> None:
    _write(tmp_path, "2026-01-02", 7.0)
    _write(tmp_path, "2026-01-01", 9.0)
    text = "before\n<!-- generated: performance -->\nold\n<!-- end of generated part -->\nafter\n"
    made = regenerate(text, Figures(tmp_path))
    assert "7.000" in made and "9.000" not in made and "old" not in made
    assert "2026-01-02-x.json" in made and "2026-01-01-x.json" not in made
    assert made.startswith("before\n") and made.endswith("after\n")
    assert regenerate(made, Figures(tmp_path)) == made
    assert Figures(tmp_path).get("dead", "ms") is None
    assert "600" in report.robustness_table(Figures(tmp_path))
    with pytest.raises(ValueError, match="not closed"):
        regenerate("<!-- generated: memory -->", Figures(tmp_path))


def test_checking_tables_finds_missing_and_unknown_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _write(tmp_path, "2026-01-01", 9.0)
    page, results = tmp_path / "page.md", ["--results", str(tmp_path)]
    every = [
        f"<!-- generated: {name} -->\n<!-- end of generated part -->" for name in report.TABLES
    ]
    page.write_text("\n".join(every))
    assert report.main(["--write", str(page), *results]) == 0
    assert report.main(["--check", str(page), *results]) == 0
    whole = page.read_text()
    page.write_text(whole.replace("9.000", "8.000"))
    assert report.main(["--check", str(page), *results]) == 1
    assert "out of date" in capsys.readouterr().out
    page.write_text(whole.replace("generated: memory", "removed"))
    assert report.main(["--check", str(page), *results]) == 1
    assert "lacks <!-- generated: memory -->" in capsys.readouterr().out
    for text, says in (
        (
            whole.replace("generated: memory", "generated: memories"),
            "no table is called 'memories'",
        ),
        (whole + every[0], "more than once"),
    ):
        page.write_text(text)
        for flag in ("--check", "--write"):
            assert says in refusal(report.main, [flag, str(page), *results], capsys)
        assert page.read_text() == text


@pytest.mark.parametrize("folder", ["empty", "none", "broken"])
def test_tables_are_not_made_of_no_results(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.json").write_text("{")
    page = tmp_path / "page.md"
    page.write_text("<!-- generated: memory -->\nkept\n<!-- end of generated part -->")
    flags = ["--write", str(page), "--results", str(tmp_path / folder)]
    says = "x.json is no result file" if folder == "broken" else "no directory with"
    assert says in refusal(report.main, flags, capsys)
    assert "kept" in page.read_text()
    flags = ["--check", str(tmp_path / "no_page.md")]
    assert "No such file" in refusal(report.main, flags, capsys)


def test_the_table_of_routers_has_both_sides_or_a_dash(tmp_path: Path) -> None:
    problem = report.BARS["B"].problem
    result = Result(dict.fromkeys(report.HEAD_KEYS, "x"))
    assert "No figures" in report.router_table(Figures(tmp_path))
    for provider, ms, launches in (("", 0.05, 4), (report.EAGER, 0.4, 59)):
        for name in ("softmax/forward", "softmax/backward", "deepseek/forward"):
            result.add(f"router {name}", ms, "ms", problem, provider)
            result.add(f"router {name}/launches", launches, "count", problem, provider)
    result.write(tmp_path / "x.json")
    table = report.router_table(Figures(tmp_path))
    assert "| softmax | 50 / 400 | 4 / 59 | 50 / 400 | 4 / 59 |" in table
    assert "| deepseek | 50 / 400 | 4 / 59 | – | – |" in table
    assert "| A |" not in table


def test_a_file_that_is_no_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"device": "GPU"}')
    with pytest.raises(ValueError, match="driver, versions, commit, command, date, rows missing"):
        Result.read(path)


def test_the_readme_tables_are_those_of_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    for name in report.TABLES:
        assert f"<!-- generated: {name} -->" in text
    assert regenerate(text, Figures()) == text, "run python benchmarks/report.py --write README.md"


def test_committed_results_name_their_commit_and_device() -> None:
    for path in report.RESULTS.glob("*.json"):
        head = Result.read(path).head
        assert head["device"] and head["commit"] and head["command"], path
        assert path.name.startswith(head["date"]), path
