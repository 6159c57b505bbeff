"""Result files, tables for the terminal, and the README's tables made from committed results.

python benchmarks/report.py --write README.md    replace every generated block
python benchmarks/report.py --check README.md    exit 1 if a block differs or is missing

A table is of one card: of ``DEFAULT_CARD``, for which the bars are, or of the one its block names.
What was measured on other cards only follows as tables of their own, under the names of these.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import (
    BARS,
    DECODE_SHAPE,
    DECODE_TOKENS,
    EXTRA_SHAPES,
    NAMED_SHAPES,
    NamedShape,
)

RESULTS = Path(__file__).resolve().parent / "results"
HEAD_KEYS = ("device", "driver", "versions", "commit", "command", "date")
OURS = "sonic"
REFERENCE = "sonic_reference"  # the package's torch implementation: never shown as ours
CUBLAS = "cublas_bmm"
TILED_GEMMS = ("up", "down", "dh", "dx", "dw2", "dw1")
NARROW = "torch_rounded"  # torch with the same rounding points
EAGER = "torch_eager"  # a router in torch's own kernels
EMULATOR = "emulator"  # of PTX, tests/emulator
DEFAULT_CARD, H100 = "NVIDIA H200", "NVIDIA H100 80GB HBM3"  # as their drivers call them
NO_CARD = ""  # what ran on a CPU
CEILING_UNIT = "% of cuBLAS"
ERROR_UNIT = "relative L2"
FOLDER = "benchmarks/results/"  # in links of the README
_BEGIN, _END = "<!-- generated: {} -->", "<!-- end of generated part -->"


@dataclass(frozen=True)
class Row:
    """One figure; ``value`` is None if it was not finite.

    ``problem`` is [T, H, I, E, top_k], or empty where no single size belongs to the figure.
    """

    provider: str
    problem: list[int]
    metric: str
    value: float | None
    unit: str


@dataclass
class Result:
    """A result file: the head that :func:`benchmarks.measure.environment` makes, and rows."""

    head: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    provider: str = OURS

    @property
    def card(self) -> str:
        """The GPU that was measured, by its name, or ``NO_CARD``."""
        return str(self.head["device"]) if self.head["driver"] else NO_CARD

    def add(
        self, metric: str, value: float, unit: str, problem: list[int], provider: str = ""
    ) -> None:
        finite = value if math.isfinite(value) else None
        self.rows.append(Row(provider or self.provider, problem, metric, finite, unit))

    def write(self, path: Path) -> None:
        """Write the whole file anew, one row a line, so that a diff of two results reads well."""
        head = {key: self.head[key] for key in HEAD_KEYS}
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
        rows = ",\n".join(f"    {json.dumps(asdict(row), allow_nan=False)}" for row in self.rows)
        text = "\n".join(["{", *lines, '  "rows": [', rows, "  ]", "}"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")

    @classmethod
    def read(cls, path: Path) -> "Result":
        """Raises ``ValueError`` naming what is missing when the file is not a result file."""
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no result file: {error}") from None
        missing = [key for key in (*HEAD_KEYS, "rows") if key not in content]
        if missing:
            raise ValueError(f"{path} is no result file: {', '.join(missing)} missing")
        rows = [Row(**row) for row in content["rows"]]
        return cls({key: content[key] for key in HEAD_KEYS}, rows)


def provider_of(impl: str) -> str:
    """Whose figures those of ``impl`` are."""
    return REFERENCE if impl == "reference" else OURS


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first two flush left, figures flush right."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class _Key(NamedTuple):
    """What a figure is of."""

    card: str
    provider: str
    problem: tuple[int, ...]
    metric: str
    unit: str


class Figures:
    """All committed rows; of two that name the same figure of the same card, the one of the later
    file counts."""

    def __init__(self, directory: Path = RESULTS):
        files = [(path, Result.read(path)) for path in directory.glob("*.json")]
        files.sort(key=lambda item: (item[1].head["date"], item[0].name))
        self.heads = {path: result.head for path, result in files}
        self.rows: dict[_Key, tuple[float | None, Path]] = {}
        for path, result in files:
            for row in result.rows:
                of = row.provider, tuple(row.problem), row.metric, row.unit
                self.rows[_Key(result.card, *of)] = (row.value, path)

    def on(self, card: str, without: str | None = None) -> "CardFigures":
        """The figures of ``card``, or only those whose metric has none of the card ``without``."""
        known = {key.metric for key in self.rows if key.card == without}
        rows = {
            key: found
            for key, found in self.rows.items()
            if key.card == card and key.metric not in known
        }
        return CardFigures(card, rows, self.heads)

    def cards(self, metric: str | None = None) -> list[str]:
        """GPUs with a committed row, or with one of this metric of ours, in order."""
        keys = [key for key in self.rows if key.card != NO_CARD]
        if metric is not None:
            keys = [key for key in keys if (key.provider, key.metric) == (OURS, metric)]
        return sorted({key.card for key in keys})


@dataclass
class CardFigures:
    """What a table is made of: figures of one card, so that what is taken of two is of it too."""

    card: str
    rows: dict[_Key, tuple[float | None, Path]]
    heads: dict[Path, dict[str, Any]]
    used: set[Path] = field(default_factory=set)

    def get(
        self, metric: str, unit: str, problem: Sequence[int] = (), provider: str = OURS
    ) -> float | None:
        found = self.rows.get(_Key(self.card, provider, tuple(problem), metric, unit))
        if found is None:
            return None
        self.used.add(found[1])
        return found[0]

    def problems(self, metric: str) -> list[tuple[int, ...]]:
        """The sizes of which this figure of ours is known, in order."""
        known = (key for key in self.rows if (key.provider, key.metric) == (OURS, metric))
        return sorted({key.problem for key in known})

    def pictures(self, what: str) -> list[str]:
        """The pictures that lie beside the files of the figures that were asked for."""
        paths = [path.with_suffix(".svg") for path in sorted(self.used)]
        return [f"![{what}]({FOLDER}{path.name})" for path in paths if path.is_file()]

    def sources(self) -> str:
        """Where the figures that were asked for came from."""
        lines = []
        for path in sorted(self.used):
            head = self.heads[path]
            commit = str(head["commit"])[:12]
            driver = f", driver {head['driver']}" if head["driver"] else ""
            lines.append(
                f"{head['device']}{driver}, commit `{commit}`, {head['date']}: "
                f"[{path.name}]({FOLDER}{path.name})"
            )
        return "  \n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _named() -> tuple[NamedShape, ...]:
    return (*NAMED_SHAPES, *EXTRA_SHAPES)


def performance_table(figures: CardFigures) -> str:
    """Times of the experts from given ids and weights, at every named shape."""
    rows = []
    for named in _named():
        problem = named.shape.problem
        cells = []
        for name in ("forward inference", "forward training", "forward + backward", "backward"):
            ms = figures.get(f"experts/{name}", "ms", problem)
            tflops = figures.get(f"experts/{name}", "TFLOPS", problem)
            percent = figures.get(f"experts/{name}", CEILING_UNIT, problem)
            cells += [_cell(ms, ".3f"), f"{_cell(tflops, '.0f')} ({_cell(percent, '.0f')} %)"]
        if any(cell[0] != "–" for cell in cells):
            size = ", ".join(map(str, problem))
            rows.append([named.letter, named.model, size, *cells])
    if not rows:
        return ""
    header = ["", "model", "T, H, I, E, top_k"]
    for name in ("inference fwd", "training fwd", "fwd + bwd", "bwd"):
        header += [f"{name} ms", "TFLOPS (of cuBLAS)"]
    return markdown_table(header, rows)


_PASSES = ("inference", "forward", "backward", "forward + backward")


def peers_table(figures: CardFigures) -> str:
    """Times of ours, and how many times as long SonicMoE and the balanced-GEMM bound take."""
    shapes = [(letter, tuple(shape.problem)) for letter, shape in BARS.items()]
    return _beside_peers(figures, shapes)


def random_peers_table(figures: CardFigures) -> str:
    """The same of the other sizes that were compared, drawn at random."""
    bars = {tuple(shape.problem) for shape in BARS.values()}
    drawn = [p for p in figures.problems("compare/none/forward + backward") if p not in bars]
    return _beside_peers(figures, [("", problem) for problem in drawn])


def _beside_peers(figures: CardFigures, shapes: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    rows = []
    for letter, problem in shapes:
        cells: list[str] = []
        for name in _PASSES:
            metric = f"compare/none/{name}"
            cells.append(_cell(figures.get(metric, "ms", problem), ".3f"))
            for provider in ("sonicmoe", "bound"):
                cells.append(_cell(figures.get(metric, "x ours", problem, provider), ".3f"))
        if any(cell != "–" for cell in cells):
            rows.append([letter, ", ".join(map(str, problem)), *cells])
    if not rows:
        return ""
    header = ["", "T, H, I, E, top_k"]
    for name in _PASSES:
        header += [f"{name} ms", "SonicMoE ×", "bound ×"]
    what = f"TFLOPS of sonic, its peers and the bound on {figures.card}"
    return "\n\n".join([*figures.pictures(what), markdown_table(header, rows)])


def skew_table(figures: CardFigures) -> str:
    """Times with skewed routing over those with uniform routing."""
    rows = []
    for letter, shape in BARS.items():
        cells = [
            _cell(figures.get(f"compare/{skew}/{name}", "x uniform", shape.problem), ".3f")
            for skew in ("zipf", "hot")
            for name in _PASSES
        ]
        if any(cell != "–" for cell in cells):
            rows.append([letter, ", ".join(map(str, shape.problem)), *cells])
    if not rows:
        return ""
    header = ["", "T, H, I, E, top_k"]
    header += [f"{skew}: {name}" for skew in ("Zipf", "hot expert") for name in _PASSES]
    return markdown_table(header, rows)


def _weighted_mean(values: Sequence[float | None], weights: Sequence[float | None]) -> float | None:
    """``None`` where one of the values or weights is not known."""
    known = [
        (v, w) for v, w in zip(values, weights, strict=True) if v is not None and w is not None
    ]
    if len(known) < len(values):
        return None
    return sum(v * w for v, w in known) / sum(w for _, w in known)


def tiles_table(figures: CardFigures) -> str:
    """What the tiles that follow from the sizes cost, beside the best of a sweep over all."""
    bars = {tuple(shape.problem): letter for letter, shape in BARS.items()}
    problems = figures.problems("tiles/up")
    rows = []
    for problem in sorted(problems, key=lambda p: (bars.get(p, "drawn"), p)):
        ratios = [figures.get(f"tiles/{gemm}", "times the best", problem) for gemm in TILED_GEMMS]
        best = [figures.get(f"tiles/{gemm}/best", "ms", problem) for gemm in TILED_GEMMS]
        total = _weighted_mean(ratios, best)
        size = ", ".join(map(str, problem))
        cells = (_cell(ratio, ".3f") for ratio in (*ratios, total))
        rows.append([bars.get(problem, ""), size, *cells])
    if not rows:
        return ""
    for what, of in (("mean", statistics.mean), ("worst", max)):
        columns = zip(*(row[2:] for row in rows), strict=True)
        known = [[float(cell) for cell in column if cell != "–"] for column in columns]
        rows.append(["", what, *(_cell(of(values) if values else None, ".3f") for values in known)])
    return markdown_table(["", "T, H, I, E, top_k", *TILED_GEMMS, "all six"], rows)


def small_table(figures: CardFigures) -> str:
    """Few tokens: one forward inference in a CUDA graph, from given ids."""
    rows = []
    for tokens in DECODE_TOKENS:
        problem = (tokens, *DECODE_SHAPE)
        floor = _cell(figures.get("small/floor", "us", problem, "bound"), ".1f")
        ours, *others = (
            _cell(figures.get("small/graph", "us", problem, provider), ".1f")
            for provider in (OURS, "sonicmoe", "torch")
        )
        if ours != "–":
            rows.append([str(tokens), ours, *others, floor])
    if not rows:
        return ""
    header = ["T", "sonic µs", "SonicMoE µs", "torch grouped_mm µs", "weights read once µs"]
    return markdown_table(header, rows)


def rounding_table(figures: CardFigures) -> str:
    """Token rounding beside plain top-k, router GEMM and routing included; where that was measured,
    also as CUDA graphs."""
    problems = figures.problems("token rounding/nr/q128/forward")
    if not problems:
        return ""
    suffixes, names = ("",), ("nr / top-k ms",)
    if figures.problems("token rounding/nr/q128/forward/graph"):
        suffixes, names = ("/graph", ""), ("nr / top-k ms as graphs", "eager ms")
    rows = []
    for problem in problems:

        def ms(
            metric: str, provider: str = OURS, problem: tuple[int, ...] = problem
        ) -> float | None:
            return figures.get(f"token rounding/{metric}", "ms", problem, provider)

        cells = [", ".join(map(str, problem))]
        for name in ("forward", "forward + backward"):
            for suffix in suffixes:
                pair = (ms(f"{rule}/q128/{name}{suffix}") for rule in ("nr", "top_k"))
                cells.append(" / ".join(_cell(value, ".3f") for value in pair))
            cells.append(_cell(ms(f"top_k/{name}", "sonicmoe"), ".3f"))
        routing, whole = ms("nr/q128/forward/routing"), ms(f"nr/q128/forward{suffixes[0]}")
        share = 100 * routing / whole if routing and whole else None
        rows.append([*cells, _cell(share, ".1f")])
    header = ["T, H, I, E, top_k"]
    for name in ("forward", "forward + backward"):
        header += [f"{name}: {names[0]}", *names[1:], "SonicMoE top-k ms"]
    header.append("routing, % of forward")
    return markdown_table(header, rows)


def router_table(figures: CardFigures) -> str:
    """What lies between router GEMM and experts, beside torch's eager kernels, and the launches."""
    rows = []
    for letter, shape in BARS.items():
        problem = tuple(shape.problem)
        for router in ("softmax", "deepseek"):
            cells = [letter, ", ".join(map(str, problem)), router]
            for name in ("forward", "backward"):
                metric = f"router {router}/{name}"
                for suffix, unit, factor in (("", "ms", 1000), ("/launches", "count", 1)):
                    pair = [
                        figures.get(metric + suffix, unit, problem, provider)
                        for provider in (OURS, EAGER)
                    ]
                    cells.append(_beside(pair, factor))
            if cells[3] != "–":
                rows.append(cells)
    if not rows:
        return ""
    header = ["", "T, H, I, E, top_k", "router"]
    for name in ("forward", "backward"):
        header += [f"{name}: sonic / torch µs", "launches"]
    return markdown_table(header, rows)


def _beside(pair: Sequence[float | None], factor: float) -> str:
    """Two figures, times ``factor``; a dash unless both are there."""
    known = [value for value in pair if value is not None]
    return " / ".join(f"{factor * v:.0f}" for v in known) if len(known) == len(pair) else "–"


def accuracy_table(figures: CardFigures) -> str:
    """Relative L2 errors at full size, ours beside torch with the same rounding points."""
    tensors = ("out", "dx", "dw1", "dw2", "db1", "db2", "dtopk_weights", "drouter_w")
    rows = []
    for named in _named():
        for layout in ("interleaved", "concatenated"):
            cells = []
            for tensor in tensors:
                run = "moe" if tensor == "drouter_w" else "experts"
                metric = f"{layout}/{run}/{tensor}"
                ours = figures.get(metric, ERROR_UNIT, named.shape.problem)
                torch_error = figures.get(metric, ERROR_UNIT, named.shape.problem, NARROW)
                both = f"{_cell(ours, '.6f')} / {_cell(torch_error, '.6f')}"
                cells.append("–" if ours is None else both)
            if any(cell != "–" for cell in cells):
                rows.append([named.letter, layout, *cells])
    if not rows:
        return ""
    return markdown_table(["", "layout", *tensors], rows)


def memory_table(figures: CardFigures) -> str:
    """Bytes saved for backward beside the formula."""
    rows = []
    for named in _named():
        problem = named.shape.problem
        total = figures.get("saved bytes", "B", problem)
        formula = figures.get("saved bytes formula", "B", problem)
        if total is not None and formula is not None:
            cells = [f"{value / 1e6:.1f}" for value in (total, formula, total - formula)]
            rows.append([named.letter, named.model, ", ".join(map(str, problem)), *cells])
    if not rows:
        return ""
    header = ["", "model", "T, H, I, E, top_k", "saved MB", "2TH + 4RI MB", "metadata MB"]
    return markdown_table(header, rows)


def robustness_table(figures: CardFigures) -> str:
    """Counts of the randomised and repeated checks."""
    rows = []
    for metric, what in (
        ("random problems", "random problems, buffers poisoned with NaN, guard bands"),
        ("mutations", "deliberate mistakes that the checks must catch"),
        ("repeats", "repeats that must be bitwise equal"),
    ):
        run = figures.get(f"{metric}/run", "count")
        failed = figures.get(f"{metric}/failed", "count")
        if run is not None:
            rows.append([what, _cell(run, ".0f"), _cell(failed, ".0f")])
    if not rows:
        return ""
    return markdown_table(["check", "run", "failed"], rows)


def support_table(figures: Figures) -> str:
    """What has been seen of each architecture, from committed correctness results."""
    hopper = figures.cards("correctness/run")
    seen = f"executed on {', '.join(hopper)}" if hopper else "compiled; no executed run committed"
    header = ["GPU", "kernels", "evidence"]
    rows = [
        ["Hopper, compute capability 9.0 (H100, H200, GH200)", "forward and backward", seen],
        ["Blackwell, 10.x (B200, B300)", "none in this release", "refused with an error"],
        ["Blackwell, 12.x (RTX 5090, RTX PRO 6000)", "none in this release", "refused likewise"],
        ["any other device, CPU included", 'none; `impl="reference"`', "the test suite, on a CPU"],
    ]
    return markdown_table(header, rows)


def emulator_table(figures: CardFigures) -> str:
    """What speaks for the emulator that CPU tests run kernels in, by architecture."""
    architectures = ("sm_90a", "sm_100a", "sm_120a")

    def of(part: str, unit: str, tried: str) -> str:
        found = figures.get(part, unit, provider=EMULATOR)
        whole = figures.get(tried, "tried", provider=EMULATOR)
        return "–" if found is None or whole is None else f"{found:.0f} of {whole:.0f}"

    def figure(metric: str, unit: str, form: str) -> str:
        return _cell(figures.get(metric, unit, provider=EMULATOR), form)

    def found(prefix: str) -> str:
        cell = of(f"{prefix}/caught", "mutants", f"{prefix}/mutants")
        for name in ("without effect", "refused"):
            count = figure(f"{prefix}/{name}", "mutants", ".0f")
            cell += "" if count in ("–", "0") else f"; {count} {name}"
        return cell

    calibrated = [
        of(f"calibration/{arch}/right", "configurations", f"calibration/{arch}/configurations")
        for arch in architectures
    ]
    rows = [
        ["GEMMs of quack-kernels: results right, no report without a known reason", *calibrated],
        [
            "single mistakes planted in right kernels: found",
            *(found(f"mutations/{arch}") for arch in architectures),
        ],
    ]
    draws = max(
        int(figures.get(f"mutations/{arch}/draws", "count", provider=EMULATOR) or 1)
        for arch in architectures
    )
    if draws > 1:
        rows += [
            [
                f"of these, draw {draw}",
                *(found(f"mutations/{arch}/draw {draw}") for arch in architectures),
            ]
            for draw in range(1, draws + 1)
        ]
    unlike = ["–", "–"]
    hardware = "hardware/{}".format
    same = of(hardware("exact/bitwise equal"), "outputs", hardware("exact/defined"))
    agree = of(hardware("agree"), "cases", hardware("cases"))
    share = figure(hardware("normal/bitwise equal"), "%", ".2f")
    rows += [
        ["our GEMMs, same inputs on a Hopper GPU: agree", agree, *unlike],
        ["of these, outputs with defined bits: bitwise equal", same, *unlike],
        ["of these, 16-bit elements on random inputs: bitwise equal", f"{share} %", *unlike],
    ]
    known = [row for row in rows if any(cell.strip(" %") != "–" for cell in row[1:])]
    if not known:
        return ""
    table = markdown_table(["", *architectures], known)
    return "\n\n".join([table, *sampled(figures, architectures)])


def sampled(figures: CardFigures, architectures: Sequence[str]) -> list[str]:
    """A sentence that says how large samples the planted mistakes are.

    Raises ``ValueError`` if the size of one is not known.
    """
    said = []
    units = {"mutants": "tried", "places": "places", "kinds": "count", "a kind": "mutants"}
    units["draws"] = "count"
    for arch in architectures:
        values = {
            metric: figures.get(f"mutations/{arch}/{metric}", unit, provider=EMULATOR)
            for metric, unit in units.items()
        }
        missing = [metric for metric, value in values.items() if value is None]
        if len(missing) == len(units):
            continue  # nothing was planted there
        if missing:
            raise ValueError(
                f"the mistakes planted in kernels of {arch} have no figure for "
                f"{', '.join(missing)}; python -m tests.emulator.evidence --explain --json FILE "
                "writes the figures of a result file anew"
            )
        drawn, places, kinds, most, draws = (f"{value:.0f}" for value in values.values())
        of_each = f"up to {most} of each" + ("" if draws == "1" else f" in each of {draws} draws")
        said.append(f"{drawn} of {places} places on {arch} ({kinds} kinds, {of_each})")
    if not said:
        return []
    return [
        "The mistakes are samples: " + ", ".join(said) + ". The file names the commit of each "
        "architecture's run, the mistakes drawn, and the places that rules left out."
    ]


Table = Callable[[CardFigures], str]  # "" of a card of which nothing is known


def _on(card: str, table: Table, what: str) -> Callable[[Figures], str]:
    """The table of ``card``. Until it has figures, a sentence says that there are no ``what``."""

    def block(figures: Figures) -> str:
        return _sourced(table, figures.on(card)) or _nothing(card, what)

    return block


def _on_default_card(table: Table, what: str) -> Callable[[Figures], str]:
    """The table of ``DEFAULT_CARD``, then one of each other card for the metrics that have no
    figure of that one."""

    def block(figures: Figures) -> str:
        parts = [_sourced(table, figures.on(DEFAULT_CARD))]
        for card in figures.cards():
            other = _sourced(table, figures.on(card, without=DEFAULT_CARD))
            if other:
                parts.append(f"Measured on {card}, not on {DEFAULT_CARD}:\n\n{other}")
        return "\n\n".join(filter(None, parts)) or _nothing(DEFAULT_CARD, what)

    return block


def _sourced(table: Table, figures: CardFigures) -> str:
    text = table(figures)
    return f"{text}\n\n{figures.sources()}" if text else ""


def _nothing(card: str, what: str) -> str:
    return f"No {what}{card and ' on '}{card} have been committed yet."


TABLES: dict[str, Callable[[Figures], str]] = {
    "support": support_table,
    "performance": _on_default_card(performance_table, "times"),
    "peers": _on_default_card(peers_table, "comparisons"),
    "peers on H100": _on(H100, peers_table, "comparisons"),
    "random peers": _on_default_card(random_peers_table, "comparisons of random sizes"),
    "skew": _on_default_card(skew_table, "times with skewed routing"),
    "skew on H100": _on(H100, skew_table, "times with skewed routing"),
    "tiles": _on_default_card(tiles_table, "sweeps of tiles"),
    "tiles on H100": _on(H100, tiles_table, "sweeps of tiles"),
    "small": _on_default_card(small_table, "figures of small batches"),
    "rounding": _on_default_card(rounding_table, "figures of token rounding"),
    "routers": _on_default_card(router_table, "figures of routers"),
    "accuracy": _on_default_card(accuracy_table, "errors"),
    "memory": _on_default_card(memory_table, "sizes"),
    "robustness": _on_default_card(robustness_table, "counts"),
    "emulator": _on(NO_CARD, emulator_table, "runs of the emulator"),
}


def blocks_of(text: str) -> list[str]:
    """Names of the generated blocks in ``text``.

    Raises ``ValueError`` if there is no such table, or a block is there twice.
    """
    names = re.findall(_BEGIN.format("(.*?)"), text)
    for name in names:
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}; there are {', '.join(TABLES)}")
        if names.count(name) > 1:
            raise ValueError(f"the block {_BEGIN.format(name)} is there more than once")
    return names


def regenerate(text: str, figures: Figures) -> str:
    """``text`` with each generated block replaced; raises ``ValueError`` on an unclosed block and
    where :func:`blocks_of` does."""
    blocks_of(text)
    for name, table in TABLES.items():
        begin = _BEGIN.format(name)
        if begin not in text:
            continue
        before, rest = text.split(begin, 1)
        if _END not in rest:
            raise ValueError(f"the block {begin} is not closed by {_END}")
        after = rest.split(_END, 1)[1]
        text = f"{before}{begin}\n{table(figures)}\n{_END}{after}"
    return text


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--write", metavar="FILE", type=Path, help="replace the generated blocks")
    group.add_argument("--check", metavar="FILE", type=Path, help="only compare them")
    parser.add_argument("--results", metavar="DIRECTORY", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    path = arguments.write or arguments.check
    try:
        figures = Figures(arguments.results)
    except (OSError, ValueError) as error:
        parser.error(f"--results {arguments.results}: {error}")
    if not figures.heads:  # every table would become empty
        parser.error(f"--results {arguments.results} is no directory with result files (*.json)")
    try:
        before = path.read_text()
        after = regenerate(before, figures)
        if arguments.write:
            path.write_text(after)
            return 0
    except OSError as error:
        parser.error(f"{path}: {error.strerror}")
    except ValueError as error:
        parser.error(f"{path}: {error}")
    present = blocks_of(before)
    missing = [_BEGIN.format(name) for name in TABLES if name not in present]
    if missing:
        print(f"{path} lacks {', '.join(missing)}; add each where its table belongs, and {_END}")
    elif before != after:
        print(f"{path} is out of date; run python benchmarks/report.py --write {path}")
    return 1 if missing or before != after else 0


if __name__ == "__main__":
    raise SystemExit(main())
