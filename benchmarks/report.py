"""The README's tables, made from committed results.

python benchmarks/report.py --write README.md    replace every generated block
python benchmarks/report.py --check README.md    exit 1 if a block differs or is missing

A table is of one card: of ``DEFAULT_CARD``, for which the bars are, or of the one its block names.
What was measured on other cards only follows as tables of their own, under the names of these.
"""

import argparse
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.figures import (
    CEILING_UNIT,
    DEFAULT_CARD,
    EAGER,
    EMULATOR,
    ERROR_UNIT,
    FOLDER,
    H100,
    NARROW,
    NO_CARD,
    OURS,
    PROVIDERS,
    RESULTS,
    TILED_GEMMS,
    CardFigures,
    Figures,
    markdown_table,
)
from benchmarks.shapes import (
    BARS,
    DECODE_SHAPE,
    DECODE_TOKENS,
    EXTRA_SHAPES,
    NAMED_SHAPES,
    NamedShape,
)

_BEGIN, _END = "<!-- generated: {} -->", "<!-- end of generated part -->"


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
    """Time with the tiles that follow from the sizes over that with the best of a sweep; which
    tilings a sweep had, its file's command says (``--space``)."""
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


_DECODERS = (OURS, "sonicmoe", "torch", "triton_kernels")
_DISTRIBUTIONS = {"triton_kernels": "triton-kernels", "sonicmoe": "sonic-moe"}  # in heads
_MARK = " \\*"
_MARKED = "\\* Of another run than what it stands beside."


def small_table(figures: CardFigures) -> str:
    """Few tokens: one forward inference from given ids; the device's time in a CUDA graph, and the
    host's of an eager call."""
    device = _few_tokens(figures, "small/graph", ("",), ".1f")
    if not device:
        return ""
    host = _few_tokens(figures, "small/host", ("", ", fastest tenth"), ".0f")
    parts = [device, _without_figures(figures, "small/graph")]
    if host:
        parts += ["Host time of an eager call, median / fastest tenth:", host]
    parts.append(_MARKED if any(_MARK in part for part in parts) else "")
    return "\n\n".join(filter(None, parts))


def _decoders(figures: CardFigures, metric: str) -> list[str]:
    """The contenders with a figure of few tokens, ours in any case."""
    problems = [(tokens, *DECODE_SHAPE) for tokens in DECODE_TOKENS]
    return [
        name
        for name in _DECODERS
        if name == OURS or any(figures.file_of(metric, "us", p, name) for p in problems)
    ]


def _few_tokens(figures: CardFigures, metric: str, suffixes: Sequence[str], form: str) -> str:
    """Microseconds by contender and number of tokens."""
    names, rows = _decoders(figures, metric), []
    for tokens in DECODE_TOKENS:
        problem = (tokens, *DECODE_SHAPE)
        ours = figures.file_of(metric, "us", problem)
        if ours is None:
            continue
        cells = [str(tokens)]
        for name in names:
            pair = [figures.get(metric + suffix, "us", problem, name) for suffix in suffixes]
            cell = " / ".join(_cell(us, form) for us in pair)
            file = figures.file_of(metric, "us", problem, name)
            cells.append(cell + (_MARK if file not in (None, ours) else ""))
        cells.append(_cell(figures.get("small/floor", "us", problem, "bound"), ".1f"))
        rows.append(cells if metric == "small/graph" else cells[:-1])
    if not rows:
        return ""
    header = ["T", *(f"{PROVIDERS.get(name, name)} µs" for name in names)]
    return markdown_table(header + ["weights read once µs"] * (metric == "small/graph"), rows)


def _without_figures(figures: CardFigures, metric: str) -> str:
    """Which contenders have no figures, and whether they were there at all."""
    said = []
    for name in _DECODERS:
        if name not in _decoders(figures, metric):
            package = _DISTRIBUTIONS.get(name, name)
            there = any(package in (figures.heads[path]["versions"] or "") for path in figures.used)
            why = "" if there else ", and was not installed, in these runs"
            said.append(f"{PROVIDERS.get(name, name)} was not timed{why}.")
    return " ".join(said)


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
            peer = _cell(ms(f"top_k/{name}", "sonicmoe"), ".3f")
            files = [
                figures.file_of(f"token rounding/top_k/{rest}", "ms", problem, provider)
                for rest, provider in ((name, "sonicmoe"), (f"q128/{name}", OURS))
            ]
            cells.append(peer + (_MARK if files[0] not in (None, files[1]) else ""))
        routing, whole = ms("nr/q128/forward/routing"), ms(f"nr/q128/forward{suffixes[0]}")
        share = 100 * routing / whole if routing and whole else None
        rows.append([*cells, _cell(share, ".1f")])
    header = ["T, H, I, E, top_k"]
    for name in ("forward", "forward + backward"):
        header += [f"{name}: {names[0]}", *names[1:], "SonicMoE top-k ms"]
    header.append("routing, % of forward")
    table = markdown_table(header, rows)
    return f"{table}\n\n{_MARKED}" if _MARK in table else table


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


MIB = 2**20


def peak_table(figures: CardFigures) -> str:
    """What a forward and backward pass takes besides inputs and weights, beside SonicMoE, by the
    counts of torch's allocator: what is kept between the two, and the most that lies above that and
    the gradients."""
    rows = []
    for letter, shape in BARS.items():
        kept, above = (
            [
                figures.get(f"compare/none/{what}", "B", shape.problem, provider)
                for provider in (OURS, "sonicmoe")
            ]
            for what in ("saved", "above_saved")
        )
        if kept[0] is None or above[0] is None:
            continue
        cells = [_cell(size and size / MIB, ".0f") for size in (*kept, *above)]
        ratio = above[1] / above[0] if above[1] and above[0] else None
        size = ", ".join(map(str, shape.problem))
        rows.append([letter, size, *cells, _cell(ratio, ".2f")])
    if not rows:
        return ""
    header = ["", "T, H, I, E, top_k", "kept MiB", "SonicMoE", "above it MiB", "SonicMoE", "×"]
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
    runs = []
    for card in figures.cards("correctness/run"):
        path = figures.on(card).file_of("correctness/run", "count")
        if path is not None:
            head = figures.heads[path]
            commit = f"commit `{str(head['commit'])[:12]}`, {head['date']}"
            runs.append(f"{card} ({commit}: [{path.name}]({FOLDER}{path.name}))")
    seen = f"executed on {', '.join(runs)}" if runs else "compiled; no executed run committed"
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
    "peak memory": _on_default_card(peak_table, "peaks of memory"),
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
