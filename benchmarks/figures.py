"""Result files, and the figures of all that are committed, by card.

Result files are JSON: a head that says where, when and of which commit, and rows. Of two files that
name the same figure of the same card the later one counts: by date, then by time of day (UTC), and
by name only where neither has one. The time of a file that was written before heads had one is that
of the commit that brought its rows.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.shapes import BARS

RESULTS = Path(__file__).resolve().parent / "results"
HEAD_KEYS = ("device", "driver", "versions", "commit", "command", "date")
OPTIONAL_KEYS = ("time", "tuning")  # of the day, UTC; what a peer's tuner could choose from
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
        head = {key: self.head[key] for key in HEAD_KEYS} | _optional(self.head)
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
        return cls({key: content[key] for key in HEAD_KEYS} | _optional(content), rows)


def _optional(head: dict[str, Any]) -> dict[str, Any]:
    return {key: head[key] for key in OPTIONAL_KEYS if key in head}


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


def _when(head: dict[str, Any], path: Path) -> tuple[str, str, str]:
    """What files are put in order by; "" is earlier than any time."""
    return head["date"], head.get("time", ""), path.name


class Figures:
    """All committed rows; of two that name the same figure of the same card, the one of the later
    file counts."""

    def __init__(self, directory: Path = RESULTS):
        files = [(path, Result.read(path)) for path in directory.glob("*.json")]
        files.sort(key=lambda item: _when(item[1].head, item[0]))
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
    used: dict[Path, set[_Key]] = field(default_factory=dict)

    def get(
        self, metric: str, unit: str, problem: Sequence[int] = (), provider: str = OURS
    ) -> float | None:
        key = _Key(self.card, provider, tuple(problem), metric, unit)
        found = self.rows.get(key)
        if found is None:
            return None
        self.used.setdefault(found[1], set()).add(key)
        return found[0]

    def file_of(
        self, metric: str, unit: str, problem: Sequence[int] = (), provider: str = OURS
    ) -> Path | None:
        """The file that holds a figure."""
        found = self.rows.get(_Key(self.card, provider, tuple(problem), metric, unit))
        return None if found is None else found[1]

    def problems(self, metric: str) -> list[tuple[int, ...]]:
        """The sizes of which this figure of ours is known, in order."""
        known = (key for key in self.rows if (key.provider, key.metric) == (OURS, metric))
        return sorted({key.problem for key in known})

    def pictures(self, what: str) -> list[str]:
        """The pictures that lie beside the files of the figures that were asked for."""
        paths = [path.with_suffix(".svg") for path in sorted(self.used)]
        return [f"![{what}]({FOLDER}{path.name})" for path in paths if path.is_file()]

    def sources(self) -> str:
        """Where the figures that were asked for came from; of several commits, what of each."""
        mixed = len({self.heads[path]["commit"] for path in self.used}) > 1
        lines = []
        for path in sorted(self.used):
            head = self.heads[path]
            commit = str(head["commit"])[:12]
            driver = f", driver {head['driver']}" if head["driver"] else ""
            lines.append(
                f"{head['device']}{driver}, commit `{commit}`, {head['date']}: "
                f"[{path.name}]({FOLDER}{path.name})" + (f": {self._share(path)}" if mixed else "")
            )
        return "  \n".join(lines)

    def _share(self, path: Path) -> str:
        """Which contenders, metrics and sizes of a table are of this file, as far as that is not
        all of them."""
        own, every = self.used[path], set().union(*self.used.values())
        providers = {key.provider for key in own}
        said = []
        if providers != {key.provider for key in every}:
            said.append(", ".join(PROVIDERS.get(name, name) for name in sorted(providers)))
        comparable = {key.metric for key in every if key.provider in providers}
        metrics = {key.metric for key in own}
        if metrics != comparable:
            said.append(", ".join(_shortest(metrics, comparable)))
        problems = {key.problem for key in own}
        if problems != {key.problem for key in every}:
            letters = sorted(_LETTERS[problem] for problem in problems if problem in _LETTERS)
            others = sorted(problem for problem in problems if problem not in _LETTERS)
            said.append("at " + ", ".join([*letters, *map(str, others)]))
        return "; ".join(said) or "the others"


PROVIDERS = {"sonicmoe": "SonicMoE", "torch": "torch grouped_mm"}  # as tables call them
_LETTERS = {tuple(shape.problem): letter for letter, shape in BARS.items()}


def _shortest(metrics: set[str], every: set[str]) -> list[str]:
    """``metrics`` by the shortest beginnings under which there are no others of ``every``."""
    found = set()
    for metric in metrics:
        parts = metric.split("/")
        for length in range(1, len(parts) + 1):
            beginning = parts[:length]
            under = {other for other in every if other.split("/")[:length] == beginning}
            if under <= metrics:
                found.add("/".join(beginning))
                break
        else:
            found.add(metric)
    return sorted(found)
