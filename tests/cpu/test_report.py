"""``benchmarks/report.py``: which results the README's tables are made of."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks import measure, report
from benchmarks.figures import (
    DEFAULT_CARD,
    EAGER,
    FOLDER,
    H100,
    HEAD_KEYS,
    NO_CARD,
    OURS,
    RESULTS,
    TILED_GEMMS,
    Figures,
    Result,
)
from benchmarks.report import regenerate
from benchmarks.shapes import NAMED_SHAPES
from tests.refusals import refusal

PROBLEM = report.BARS["A"].problem
ROOT = Path(__file__).resolve().parents[2]


def _write(directory: Path, date: str, ms: float) -> None:
    head = dict.fromkeys(HEAD_KEYS, "x") | {
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
    assert Figures(tmp_path).on("GPU").get("dead", "ms") is None
    assert "600" in report.TABLES["robustness"](Figures(tmp_path))
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


def _timed(path: Path, date: str, time: str | None, commit: str, rows: list[tuple]) -> None:
    head = {"device": DEFAULT_CARD, "driver": "1.2", "date": date, "commit": commit}
    head |= {} if time is None else {"time": time}
    result = Result(dict.fromkeys(HEAD_KEYS, "x") | head)
    for row in rows:
        result.add(*row)
    result.write(path)


def test_of_one_day_the_later_time_counts_whatever_the_name(tmp_path: Path) -> None:
    row = "experts/backward", 1.0, "ms", PROBLEM
    for name, time, ms in (("z", None, 1.0), ("y", "09:30:00", 2.0), ("a", "18:05:00", 3.0)):
        _timed(tmp_path / f"{name}.json", "2026-01-01", time, "c", [(row[0], ms, *row[2:])])
        assert Figures(tmp_path).on(DEFAULT_CARD).get(row[0], "ms", PROBLEM) == ms
    _timed(tmp_path / "b.json", "2026-01-02", None, "c", [(row[0], 4.0, *row[2:])])
    assert Figures(tmp_path).on(DEFAULT_CARD).get(row[0], "ms", PROBLEM) == 4.0
    assert Result.read(tmp_path / "a.json").head["time"] == "18:05:00"
    assert "time" not in Result.read(tmp_path / "z.json").head
    assert len(measure.environment(torch.device("cpu"))["time"]) == 8


def test_a_table_of_two_commits_says_what_is_of_which(tmp_path: Path) -> None:
    first, second = (report.BARS[letter].problem for letter in "AB")

    def rows(gemms: str, *problems: list[int]) -> list[tuple]:
        every = [(f"tiles/{gemm}", problem) for gemm in gemms.split() for problem in problems]
        return [(metric, 1.0, "times the best", problem) for metric, problem in every]

    _timed(tmp_path / "a.json", "2026-01-01", "01:00:00", "1" * 40, rows("up dh", first, second))
    assert report.TABLES["tiles"](Figures(tmp_path)).endswith("(benchmarks/results/a.json)")
    _timed(tmp_path / "b.json", "2026-01-01", "02:00:00", "1" * 40, rows("dh", first))
    assert "b.json)" in report.TABLES["tiles"](Figures(tmp_path)).splitlines()[-1]
    _timed(tmp_path / "b.json", "2026-01-01", "02:00:00", "2" * 40, rows("dh", first))
    *_, of_a, of_b = report.TABLES["tiles"](Figures(tmp_path)).splitlines()
    assert of_a.endswith("a.json): the others  ")
    assert of_b.endswith("b.json): tiles/dh; at A")
    _timed(tmp_path / "b.json", "2026-01-01", "02:00:00", "2" * 40, rows("dh", first, second))
    *_, of_a, of_b = report.TABLES["tiles"](Figures(tmp_path)).splitlines()
    assert of_a.endswith("a.json): tiles/up  ") and of_b.endswith("b.json): tiles/dh")


def test_few_tokens_name_who_was_not_there_and_mark_other_runs(tmp_path: Path) -> None:
    problem = [16, *report.DECODE_SHAPE]

    def rows(*providers: str) -> list[tuple]:
        metrics = ("small/graph", 10.25), ("small/host", 90.0), ("small/host, fastest tenth", 80.0)
        return [(m, us, "us", problem, name) for name in providers for m, us in metrics]

    _timed(tmp_path / "a.json", "2026-01-01", None, "1", rows(OURS, "sonicmoe"))
    table = report.TABLES["small"](Figures(tmp_path))
    assert "| 16 | 10.2 | 10.2 | – |" in table and "| 16 | 90 / 80 | 90 / 80 |" in table
    assert "triton_kernels was not timed, and was not installed, in these runs." in table
    assert "\\*" not in table
    _timed(tmp_path / "b.json", "2026-01-02", None, "2", rows(OURS, "triton_kernels"))
    table = report.TABLES["small"](Figures(tmp_path))
    assert "| T | sonic µs | SonicMoE µs | triton_kernels µs |" in table
    assert "| 16 | 90 / 80 | 90 / 80 \\* | 90 / 80 |" in table
    assert "\\* Of another run than what it stands beside." in table
    assert "triton_kernels was" not in table and "grouped_mm was not timed" in table


def test_the_table_of_routers_has_both_sides_or_a_dash(tmp_path: Path) -> None:
    problem = report.BARS["B"].problem
    result = Result(dict.fromkeys(HEAD_KEYS, "x"))
    assert "No figures" in report.TABLES["routers"](Figures(tmp_path))
    for provider, ms, launches in (("", 0.05, 4), (EAGER, 0.4, 59)):
        for name in ("softmax/forward", "softmax/backward", "deepseek/forward"):
            result.add(f"router {name}", ms, "ms", problem, provider)
            result.add(f"router {name}/launches", launches, "count", problem, provider)
    result.write(tmp_path / "x.json")
    table = report.TABLES["routers"](Figures(tmp_path))
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
    for path in RESULTS.glob("*.json"):
        head = Result.read(path).head
        assert head["device"] and head["commit"] and head["command"], path
        assert head["driver"] or " CPU" in head["device"], f"{path} would be of no card"
        assert path.name.startswith(head["date"]), path


# --- several cards --------------------------------------------------------------------------------


def _measured(
    path: Path, device: str, figures: dict[tuple[str, str], float], driver: str | None = "1.2"
) -> None:
    """A result file of ``device``: figures of shape A by metric and unit."""
    head = {"device": device, "driver": driver, "date": path.name[:10], "commit": "c" * 40}
    result = Result(dict.fromkeys(HEAD_KEYS, "x") | head)
    for (metric, unit), value in figures.items():
        result.add(metric, value, unit, PROBLEM)
    result.write(path)


def _committed(directory: Path) -> Figures:
    """The committed results but those of an H100."""
    for path in RESULTS.glob("*.svg"):
        (directory / path.name).touch()
    for path in RESULTS.glob("*.json"):
        if Result.read(path).card != H100:
            (directory / path.name).write_text(path.read_text())
    return Figures(directory)


def _repeated(directory: Path, factor: float = 1.0) -> Figures:
    """Those of the default card there once more, later, as of an H100."""
    for path in sorted(directory.glob("*.json")):
        result = Result.read(path)
        if result.card != DEFAULT_CARD:
            continue
        again = Result(result.head | {"device": H100, "date": "2099-01-01"})
        for row in result.rows:
            value = math.nan if row.value is None else factor * row.value
            again.add(row.metric, value, row.unit, row.problem, row.provider)
        again.write(directory / f"2099-01-01-{path.name}")
    return Figures(directory)


@pytest.mark.parametrize("later", [DEFAULT_CARD, H100])
def test_the_same_figure_of_two_cards_is_two_figures(later: str, tmp_path: Path) -> None:
    earlier = ({DEFAULT_CARD, H100} - {later}).pop()
    known = {("compare/none/forward", "ms"): 2.0}
    _measured(tmp_path / "2026-01-02-x.json", later, {("compare/none/forward", "ms"): 3.0})
    _measured(tmp_path / "2026-01-01-x.json", earlier, known)
    _measured(tmp_path / "2026-01-01-w.json", earlier, {("compare/none/forward", "ms"): 1.0})
    figures = Figures(tmp_path)
    found = [
        figures.on(card).get("compare/none/forward", "ms", PROBLEM) for card in (earlier, later)
    ]
    assert found == [2.0, 3.0]
    assert figures.on("another").get("compare/none/forward", "ms", PROBLEM) is None
    sizes = [figures.on(card).problems("compare/none/forward") for card in (later, "another")]
    assert sizes == [[tuple(PROBLEM)], []]
    assert figures.cards() == sorted((earlier, later))


def test_results_of_another_card_change_no_table_of_the_default_one(tmp_path: Path) -> None:
    alone, both = _committed(tmp_path), _repeated(tmp_path, factor=3.0)
    for name, table in report.TABLES.items():
        if name != "support" and not name.endswith("on H100"):
            assert table(both) == table(alone), name
    seen = report.TABLES["support"](both)
    assert "executed on " in seen and H100 in seen and DEFAULT_CARD in seen


def test_tiles_of_a_layer_are_weighed_by_the_time_of_its_gemms(tmp_path: Path) -> None:
    best = dict.fromkeys(TILED_GEMMS, 1.0) | {"up": 5.0}
    ratios = dict.fromkeys(TILED_GEMMS, 1.0) | {"up": 1.04, "dx": 1.1}
    figures = {(f"tiles/{gemm}", "times the best"): value for gemm, value in ratios.items()}
    _measured(tmp_path / "2026-01-01-x.json", DEFAULT_CARD, figures)
    assert report.TABLES["tiles"](Figures(tmp_path)).count("| 1.100 | 1.000 | 1.000 | – |") == 3
    figures = {(f"tiles/{gemm}/best", "ms"): value for gemm, value in best.items()}
    _measured(tmp_path / "2026-01-02-x.json", DEFAULT_CARD, figures)
    # (5 * 1.04 + 1.1 + 4) / 10
    assert report.TABLES["tiles"](Figures(tmp_path)).count("| 1.000 | 1.030 |") == 3


@pytest.mark.parametrize("name", ["peers", "skew", "tiles"])
def test_the_tables_of_an_h100_are_those_of_the_h200_with_its_results(
    name: str, tmp_path: Path
) -> None:
    _committed(tmp_path)
    figures = _repeated(tmp_path)
    table = report.TABLES[f"{name} on H100"](figures)
    assert DEFAULT_CARD not in table and table.count("| A |") == 1
    ours = [line for line in report.TABLES[name](figures).splitlines() if line.startswith("|")]
    assert [line for line in table.splitlines() if line.startswith("|")] == ours
    assert f"{H100}, driver" in table.splitlines()[-1]


def test_a_result_of_an_h100_is_all_that_its_table_needs(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results"
    results.mkdir()
    page.write_text("<!-- generated: peers on H100 -->\n<!-- end of generated part -->\n")
    figures = {("compare/none/forward", "ms"): 12.5}
    _measured(results / "2026-11-27-compare.json", DEFAULT_CARD, figures)
    write = ["--write", str(page), "--results", str(results)]
    assert report.main(write) == 0
    assert page.read_text().splitlines()[1] == f"No comparisons on {H100} have been committed yet."
    path = results / "2026-11-28-compare-h100.json"
    _measured(path, H100, {("compare/none/forward", "ms"): 14.5})
    assert report.main(write) == 0
    made = page.read_text()
    assert "| 14.500 |" in made and "12.500" not in made and "No comparisons" not in made
    assert f"]({FOLDER}{path.name})" in made and "![" not in made
    path.with_suffix(".svg").touch()
    assert report.main(write) == 0
    assert f"on {H100}]({FOLDER}2026-11-28-compare-h100.svg)\n\n|" in page.read_text()


def test_no_ratio_is_of_two_cards(tmp_path: Path) -> None:
    """The share of routing in a forward pass, of which each card has one part."""
    whole, part = ("token rounding/nr/q128/forward", "ms"), "token rounding/nr/q128/forward/routing"
    _measured(tmp_path / "2026-01-01-x.json", DEFAULT_CARD, {whole: 2.0})
    _measured(tmp_path / "2026-01-02-x.json", H100, {(part, "ms"): 0.5})
    table = report.TABLES["rounding"](Figures(tmp_path))
    assert "2.000 / –" in table and "25.0" not in table and H100 not in table
    _measured(tmp_path / "2026-01-01-y.json", DEFAULT_CARD, {(part, "ms"): 0.5})
    assert "| 25.0 |" in report.TABLES["rounding"](Figures(tmp_path))


def test_what_one_card_alone_has_stands_under_its_name(tmp_path: Path) -> None:
    hot, zipf = (f"compare/{skew}/forward" for skew in ("hot", "zipf"))
    _measured(tmp_path / "2026-01-01-x.json", DEFAULT_CARD, {(zipf, "x uniform"): 1.125})
    _measured(
        tmp_path / "2026-01-02-x.json", H100, {(zipf, "x uniform"): 1.25, (hot, "x uniform"): 1.5}
    )
    for_both, _, for_one = report.TABLES["skew"](Figures(tmp_path)).partition(
        f"\n\nMeasured on {H100}, not on {DEFAULT_CARD}:\n\n"
    )
    assert "1.125" in for_both and "1.500" not in for_both and H100 not in for_both
    assert "1.500" in for_one and f"\n{H100}, driver" in for_one and DEFAULT_CARD not in for_one
    assert "1.250" not in for_both + for_one


def test_a_table_without_the_default_card_is_of_each_other(tmp_path: Path) -> None:
    """And a card does not stand in where a table names another one."""
    names = "NVIDIA GH200 480GB", H100
    for place, card in enumerate(names):
        figures = {("experts/forward + backward", "ms"): 1.5 + place}
        _measured(tmp_path / f"2026-01-0{place + 1}-x.json", card, figures)
    figures = Figures(tmp_path)
    table = report.TABLES["performance"](figures)
    first, second = (f"Measured on {card}, not on {DEFAULT_CARD}:" for card in names)
    places = [table.index(text) for text in (first, "| 1.500 |", second, "| 2.500 |")]
    assert places == sorted(places) and table.startswith(first)
    assert (
        report.TABLES["peers"](figures) == "No comparisons on NVIDIA H200 have been committed yet."
    )
    assert report.TABLES["tiles on H100"](figures).startswith(f"No sweeps of tiles on {H100} have")


def test_results_of_a_cpu_are_of_no_card(tmp_path: Path) -> None:
    """The later one counts, whatever it ran on, and no table of a GPU has them."""
    metric, other = "experts/forward + backward", "experts/backward"
    _measured(tmp_path / "2026-01-01-x.json", DEFAULT_CARD, {(metric, "ms"): 1.5})
    later = {(metric, "ms"): 99.5, (other, "ms"): 98.5, ("correctness/run", "count"): 1}
    _measured(tmp_path / "2026-01-03-x.json", "x86_64 CPU, 2 threads", later, driver=None)
    _measured(tmp_path / "2026-01-02-x.json", "x86_64 CPU, 1 threads", {(metric, "ms"): 97.5}, None)
    figures = Figures(tmp_path)
    assert figures.cards() == [DEFAULT_CARD] and not figures.cards("correctness/run")
    assert figures.on(NO_CARD).get(metric, "ms", PROBLEM, OURS) == 99.5
    table = report.TABLES["performance"](figures)
    assert "1.500" in table and "99.5" not in table and "98.5" not in table


def test_support_names_the_commit_that_was_validated(tmp_path: Path) -> None:
    rows = [("correctness/run", 12, "count", [])]
    _timed(tmp_path / "a.json", "2026-01-01", "01:00:00", "1" * 40, rows)
    _timed(tmp_path / "b.json", "2026-01-01", "02:00:00", "2" * 40, [("x", 1.0, "ms", [])])
    seen = f"executed on {DEFAULT_CARD} (commit `{'1' * 12}`, 2026-01-01: [a.json]"
    assert seen in report.TABLES["support"](Figures(tmp_path))


def test_peak_memory_stands_beside_the_peers(tmp_path: Path) -> None:
    mib = 2**20
    figures = (("saved", 100.25, 200), ("above_saved", 40, 60))
    rows = [
        (f"compare/none/{what}", size * mib, "B", PROBLEM, provider)
        for what, *sizes in figures
        for provider, size in zip((OURS, "sonicmoe"), sizes, strict=True)
    ]
    _timed(tmp_path / "a.json", "2026-01-01", None, "1", rows)
    assert "| 100 | 200 | 40 | 60 | 1.50 |" in report.TABLES["peak memory"](Figures(tmp_path))
    _timed(tmp_path / "a.json", "2026-01-01", None, "1", rows[::2])
    assert "| 100 | – | 40 | – | – |" in report.TABLES["peak memory"](Figures(tmp_path))
