"""Picture of a comparison: TFLOPS of every contender at every size, one panel per pass."""

from pathlib import Path

from benchmarks.figures import Result
from benchmarks.peers import BOUND, CONTENDERS, FORWARD_ONLY
from benchmarks.shapes import BARS, Shape

PANELS = ("forward", "backward", "forward + backward")
_COLORS = {
    "sonic": "#1b6ca8",
    "sonicmoe": "#e07b39",
    "torch": "#8a8d91",
    "triton_kernels": "#7a9e4f",
    BOUND: "#222222",
}


def plot_comparison(result: Result, path: Path) -> None:
    """Write the bars of ``result`` (``compare/none/*``) as the format that ``path`` ends with.

    The bound is a line across a size's bars. Raises ``ImportError`` without matplotlib and
    ``ValueError`` if there is nothing to draw.
    """
    figures = collect(result)
    if not figures:
        raise ValueError("the result holds no comparison of layers (compare/none/...)")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    problems = sorted({problem for problem, _, _ in figures}, key=_order)
    names = [name for name in CONTENDERS if name != BOUND and name not in FORWARD_ONLY]
    names = [name for name in names if any(n == name for _, n, _ in figures)]
    width = max(6.0, 1.1 * len(problems) + 2)
    picture, axes = pyplot.subplots(len(PANELS), 1, figsize=(width, 7.5), sharex=True)
    for panel, axis in zip(PANELS, axes, strict=True):
        _draw(axis, panel, problems, names, figures)
    lines, words = axes[0].get_legend_handles_labels()
    where = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.965)}
    picture.legend(lines, words, ncols=len(words), fontsize=8, frameon=False, **where)
    labels = [_label(problem) for problem in problems]
    axes[-1].set_xticks(range(len(problems)), labels, fontsize=7)
    head = result.head
    picture.suptitle(f"MoE layer, bf16 SwiGLU, {head['device']}, {head['date']}", fontsize=10)
    picture.tight_layout(rect=(0, 0, 1, 0.965))
    picture.savefig(path)
    pyplot.close(picture)


Problem = tuple[int, ...]
Figures = dict[tuple[Problem, str, str], float]


def collect(result: Result) -> Figures:
    """TFLOPS by (problem, contender, pass)."""
    figures: Figures = {}
    for row in result.rows:
        area, _, rest = row.metric.partition("/")
        skew, _, name = rest.partition("/")
        if (area, skew, row.unit) != ("compare", "none", "ms") or not row.value:
            continue
        flops = _flops(Shape(*row.problem), name)
        if flops:
            figures[tuple(row.problem), row.provider, name] = flops / row.value * 1e-9
    return figures


def _flops(shape: Shape, name: str) -> int:
    forward, backward = shape.forward_flops(True), shape.backward_flops(True)
    return {"forward": forward, "backward": backward, "forward + backward": forward + backward}.get(
        name, 0
    )


def _order(problem: Problem) -> tuple[int, Problem]:
    letters = [shape.problem for shape in BARS.values()]
    known = list(problem) in letters
    return (letters.index(list(problem)) if known else len(letters), problem)


def _label(problem: Problem) -> str:
    T, H, I, E, top_k = problem  # noqa: E741
    letter = next((k for k, shape in BARS.items() if tuple(shape.problem) == problem), "")
    return f"{letter}\nT {T}\nH {H}\nI {I}\nE {E}, k {top_k}"


def _draw(axis, panel: str, problems: list[Problem], names: list[str], figures: Figures) -> None:
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        spots = [index - 0.4 + (place + 0.5) * width for index in range(len(problems))]
        heights = [figures.get((problem, name, panel), 0.0) for problem in problems]
        bars = axis.bar(spots, heights, width, label=name, color=_COLORS[name])
        axis.bar_label(bars, [f"{h:.0f}" if h else "" for h in heights], fontsize=6)
    for index, problem in enumerate(problems):
        bound = figures.get((problem, BOUND, panel))
        if bound is not None:
            label = "bound" if index == 0 else None
            axis.hlines(bound, index - 0.42, index + 0.42, color=_COLORS[BOUND], label=label)
    axis.set_ylabel(f"{panel}\nTFLOPS", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
