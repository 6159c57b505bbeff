"""How many single mistakes in right kernels the emulator finds.

    python -m tests.emulator.evidence --arch sm_90a --json result.json

For each kernel of `subjects.py` and each kind of change of `mutations.py` a few places that the
kernel executes are drawn, the same ones in every run, among those that no rule of `redundant.py`
proves to be without effect, which the file lists; each changed kernel runs with one seed after
another until something is reported or the result is wrong. A second draw is of what the first left.
Sizes in `subjects.py` were chosen where the first had missed something, so that the second is the
fairer sample; the file has the figures of each draw and of all. It is written after every draw and
keeps the entries of the architectures that are not run.

What is missed needs a sentence in `missed.json`. The run prints the keys that have none; once they
are written, `--explain` puts them into the file without running anything.
"""

import argparse
import json
import random
import shlex
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import EMULATOR, Row
from benchmarks.measure import environment
from benchmarks.options import output_file, positive

from .memory import Fault
from .mutations import Mutation, all_mutations, executed_lines
from .ptx import PtxError
from .redundant import Flow, why_redundant
from .report import kind_of
from .subjects import ARCHITECTURES, Subject, subjects

SEEDS = tuple(range(6))
PER_KIND = 4  # of one architecture and draw, over all its kernels
DRAWS = 2
_STEPS_ALLOWED = 8  # times those of the unchanged kernel
_EXPLANATIONS = Path(__file__).with_name("missed.json")
# What is not found; and PTX that the emulator refuses, for which it finds nothing either.
MISSED, REFUSED = "missed", "refused"
# How an explanation of a missed mutant begins.
WITHOUT_EFFECT, OTHER_SIZES, GAP = REASONS = "No effect:", "Other sizes:", "Gap:"
# How a change shows, by what the report says; the first that fits.
_REPORTS = (
    ("deadlock", ("deadlock", "livelock", "step limit")),
    ("proxy", ("fence.proxy", "proxy fence")),
    ("race", ("race:", "in flight", "races with")),
)


def how_caught(report: str) -> str:
    """The class of a report: deadlock, proxy, race, or illegal for anything else."""
    headline = report.split("\n[", 1)[0]
    for name, words in _REPORTS:
        if any(word in headline for word in words):
            return name
    return "illegal"


@dataclass(frozen=True)
class Baseline:
    """The unchanged kernel: PTX lines it executes, most steps of a run, warnings it gets anyway.

    `warnings` are kinds of warnings. The places that one of a kind names vary with the schedule, so
    that another place would be no evidence.
    """

    lines: set[int]
    steps: int
    warnings: set[str]


def trial(subject: Subject, mutant: Mutation, unchanged: Baseline) -> dict[str, Any]:
    """Runs a mutant until it is caught: how, by which seed, what was said."""
    start = time.perf_counter()
    result = {"caught": MISSED, "seeds": len(SEEDS), "report": ""}
    try:
        subject.emulator.load(mutant.text)
        for tried, seed in enumerate(SEEDS, 1):
            how, report = outcome(subject, seed, unchanged)
            if how != MISSED:
                result = {"caught": how, "seeds": tried, "report": report}
                break
    except PtxError as error:
        result = {"caught": REFUSED, "seeds": 0, "report": str(error)[:160]}
    return result | {"seconds": round(time.perf_counter() - start, 2)}


def outcome(subject: Subject, seed: int, unchanged: Baseline) -> tuple[str, str]:
    """How one run of the loaded text shows that it is not the unchanged kernel's, and a report."""
    try:
        wrong, warnings = subject.run(seed, _STEPS_ALLOWED * unchanged.steps + 50_000)
    except Fault as fault:
        return how_caught(str(fault)), shortened(str(fault))
    except RuntimeError as error:  # of the host code
        return "illegal", shortened(str(error))
    if wrong:
        return "values", wrong
    new = sorted(w for w in warnings if kind_of(w) not in unchanged.warnings)
    return ("warning", new[0][:160]) if new else (MISSED, "")


def shortened(report: str) -> str:
    """The first line of a report, without the kernel's long name."""
    line = report.split("\n", 1)[0]
    return line.split(": ", 1)[-1][:160]


def described(subject: Subject, mutant: Mutation) -> dict[str, Any]:
    """What a result file says of a mutation of the loaded text."""
    ptx, source = instruction_at(subject, mutant)
    place = {"arch": subject.arch, "kernel": subject.name, "problem": subject.problem}
    change = {"kind": mutant.kind, "detail": mutant.detail, "line": mutant.line}
    return place | change | {"ptx": ptx, "source": source}


def instruction_at(subject: Subject, mutant: Mutation) -> tuple[str, str]:
    """(PTX text, Python source line) of the place that a mutation changes, in the loaded text."""
    kernel = next(iter(subject.emulator.programs.values())).kernel
    for instruction in kernel.instrs:
        if mutant.line <= instruction.line <= mutant.last:
            file, line = instruction.source[0] if instruction.source else ("", 0)
            return instruction.text[:120], f"{file.rsplit('/', 1)[-1]}:{line}" if file else ""
    return "", ""


def baseline(subject: Subject) -> Baseline:
    """Runs the unchanged kernel with every seed.

    :raises RuntimeError: it is wrong. :raises Fault: it is reported.
    """
    lines: set[int] = set()
    warnings: set[str] = set()
    steps = 0
    for seed in SEEDS:
        wrong, warned = subject.run(seed, 10**9)
        if wrong:
            raise RuntimeError(f"{subject.name}, unchanged, seed {seed}: {wrong}")
        lines |= executed_lines(subject.emulator)
        warnings |= {kind_of(warning) for warning in warned}
        steps = max(steps, subject.emulator.machine.steps)
    return Baseline(lines, steps, warnings)


def mutants_by_kind(
    subject: Subject, lines: set[int]
) -> tuple[dict[str, list[Mutation]], list[dict[str, Any]], int]:
    """The mutations of executed places of one kernel, by kind.

    Without those that change nothing by a rule of `redundant.py`, which are listed; and how many
    are of places that no run executes.
    """
    found = defaultdict(list)
    left_out = []
    not_executed = 0
    flow = Flow(next(iter(subject.emulator.programs.values())).kernel)
    for mutant in all_mutations(subject.emulator.ptx_text):
        if not lines & set(range(mutant.line, mutant.last + 1)):
            not_executed += 1
        elif rule := why_redundant(flow, mutant):
            left_out.append(described(subject, mutant) | {"rule": rule})
        else:
            found[mutant.kind].append(mutant)
    return dict(found), left_out, not_executed


def take(
    left: dict[str, dict[str, list[Mutation]]], per_kind: int, draw: int
) -> dict[str, list[Mutation]]:
    """Draws up to `per_kind` mutants of each kind, one kernel after another in turn, by kernel.

    They are taken out of `left`, mutants by kernel and kind. Each draw has an order of its own.
    """
    for kernel, kinds in left.items():
        for kind, mutants in kinds.items():
            seed = f"{kernel} {kind}" if draw == 1 else f"{kernel} {kind} {draw}"
            random.Random(seed).shuffle(mutants)
    kernels = list(left)
    chosen: dict[str, list[Mutation]] = {kernel: [] for kernel in kernels}
    for n, kind in enumerate(sorted({kind for kinds in left.values() for kind in kinds})):
        first = (n + draw - 1) % len(kernels)  # kinds, and draws, begin with different kernels
        missing = per_kind
        while missing and any(kinds.get(kind) for kinds in left.values()):
            for kernel in kernels[first:] + kernels[:first]:
                if missing and left[kernel].get(kind):
                    chosen[kernel].append(left[kernel][kind].pop(0))
                    missing -= 1
    return chosen


def explanations() -> dict[str, str]:
    """Why each mutant of `missed.json` is missed, by `key_of`."""
    return json.loads(_EXPLANATIONS.read_text())


def key_of(entry: dict[str, Any]) -> str:
    """What an explanation is filed under.

    It names the problem and the PTX, so that an explanation falls with either.
    """
    names = ("arch", "kernel", "problem", "kind", "detail", "ptx")
    return " | ".join(part for part in (entry.get(name, "") for name in names) if part)


@dataclass(frozen=True)
class Places:
    """What there is to draw from in one architecture's kernels."""

    made: dict[str, Subject]
    unchanged: dict[str, Baseline]
    mutants: dict[str, dict[str, list[Mutation]]]  # by kernel and kind; draws take them out
    left_out: list[dict[str, Any]]
    summary: dict[str, Any]


def places_of(arch: str, only: str) -> Places:
    """The kernels of an architecture whose names contain `only`, and what may be drawn of them."""
    every = [make() for make in subjects(arch)]
    made = {subject.name: subject for subject in every if only in subject.name}
    if not made:
        known = ", ".join(subject.name for subject in every)
        raise SystemExit(f"--only {only}: no kernel of {arch} has that in its name; it has {known}")
    unchanged, mutants = {}, {}
    left_out: list[dict[str, Any]] = []
    not_executed = 0
    for name, subject in made.items():
        unchanged[name] = baseline(subject)
        mutants[name], redundant, others = mutants_by_kind(subject, unchanged[name].lines)
        left_out += redundant
        not_executed += others
        count = sum(map(len, mutants[name].values()))
        print(f"{arch} {name}: {count} places, {unchanged[name].steps} steps", flush=True)
    count = sum(len(found) for kinds in mutants.values() for found in kinds.values())
    by_rule = dict(Counter(place["rule"] for place in left_out))
    summary = {"places": count, "redundant_by_rule": by_rule, "not_executed": not_executed}
    return Places(made, unchanged, mutants, left_out, summary)


def run_architecture(
    arch: str, per_kind: int, draws: int, only: str = ""
) -> Iterator[dict[str, Any]]:
    """The entry of one architecture in the result file, after each draw."""
    start = time.perf_counter()
    places = places_of(arch, only)
    entries: list[dict[str, Any]] = []
    for draw in range(1, draws + 1):
        for name, mutants in take(places.mutants, per_kind, draw).items():
            tried = [entry | {"draw": draw} for entry in trials(places, name, mutants)]
            entries += tried
        summary = places.summary | {"seeds": len(SEEDS), "per_kind": per_kind}
        summary["seconds"] = round(time.perf_counter() - start, 1)
        yield explained({"summary": summary, "left_out": places.left_out, "mutants": entries})


def trials(places: Places, name: str, mutants: list[Mutation]) -> Iterator[dict[str, Any]]:
    """What a result file says of each of some mutants of one kernel, which is loaded anew last."""
    subject, original = places.made[name], places.made[name].emulator.ptx_text
    for mutant in mutants:
        subject.emulator.load(original)
        entry = described(subject, mutant) | trial(subject, mutant, places.unchanged[name])
        print(
            f"{entry['caught']:9}{entry['seeds']} {entry['seconds']:6.2f} s  "
            f"{name}: {mutant.name}: {entry['ptx'][:60]}  {entry['source']}",
            flush=True,
        )
        yield entry
    subject.emulator.load(original)


def explained(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry of an architecture with what `missed.json` says now, and its totals."""
    known = explanations()
    mutants = [
        mutant | {"explanation": known.get(key_of(mutant), "")}
        if mutant["caught"] == MISSED
        else mutant
        for mutant in entry["mutants"]
    ]
    by_draw = defaultdict(list)
    for mutant in mutants:
        by_draw[mutant.get("draw", 1)].append(mutant)
    draws = {"draws": [{"draw": n} | totals(drawn) for n, drawn in sorted(by_draw.items())]}
    return entry | {"summary": entry["summary"] | totals(mutants) | draws, "mutants": mutants}


def unexplained(entry: dict[str, Any]) -> list[str]:
    """The keys of an architecture's missed mutants of which `missed.json` says nothing."""
    missed = (mutant for mutant in entry["mutants"] if mutant["caught"] == MISSED)
    return [key_of(m) for m in missed if not m["explanation"].startswith(REASONS)]


def totals(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of an architecture.

    A missed mutant is without effect if its explanation says so, or would be found at other sizes,
    or is a gap of the emulator. One that is refused is not caught, nor known to be without effect.
    """
    missed = [entry for entry in entries if entry["caught"] == MISSED]
    refused = sum(entry["caught"] == REFUSED for entry in entries)
    without = sum(entry["explanation"].startswith(WITHOUT_EFFECT) for entry in missed)
    sizes = sum(entry["explanation"].startswith(OTHER_SIZES) for entry in missed)
    gaps = sum(entry["explanation"].startswith(GAP) for entry in missed)
    caught = len(entries) - len(missed) - refused
    return {
        "mutants": len(entries),
        "caught": caught,
        "share_caught": round(caught / max(len(entries), 1), 4),
        "share_caught_of_those_with_effect": round(caught / max(len(entries) - without, 1), 4),
        "without_effect": without,
        "other_sizes": sizes,
        "gaps": gaps,
        "unexplained": len(missed) - without - sizes - gaps,
        "refused": refused,
        "kinds": len({entry["kind"] for entry in entries}),
        "kernels": len({entry["kernel"] for entry in entries}),
        "how": dict(Counter(entry["caught"] for entry in entries).most_common()),
        "by_first_seed": sum(e["seeds"] == 1 for e in entries if e["caught"] != MISSED),
    }


def rows(architectures: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that tables are made of, as rows of a result file."""
    figures = []
    for arch, entry in architectures.items():
        summary = entry["summary"]
        figures += [
            (f"{arch}/{metric}", value, unit)
            for metric, value, unit in (
                *counts(summary),
                ("places", summary["places"], "places"),
                ("a kind", summary["per_kind"], "mutants"),
                ("draws", len(summary["draws"]), "count"),
                ("redundant by rule", sum(summary["redundant_by_rule"].values()), "places"),
                ("kinds", summary["kinds"], "count"),
                ("seconds", summary["seconds"], "s"),
            )
        ]
        for draw in summary["draws"]:
            name = f"{arch}/draw {draw['draw']}"
            figures += [(f"{name}/{metric}", value, unit) for metric, value, unit in counts(draw)]
    return [
        asdict(Row(EMULATOR, [], f"mutations/{metric}", value, unit))
        for metric, value, unit in figures
    ]


def counts(total: dict[str, Any]) -> list[tuple[str, int, str]]:
    """(metric, value, unit) of what became of some mutants."""
    return [
        ("mutants", total["mutants"], "tried"),
        ("caught", total["caught"], "mutants"),
        ("without effect", total["without_effect"], "mutants"),
        ("refused", total["refused"], "mutants"),
    ]


def earlier(path: Path | None) -> dict[str, Any]:
    """The entries of a result file that is there already, by architecture, explained anew.

    Each says which commit it ran at, as the head speaks of the last run.
    """
    if path is None or not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        return {
            arch: {"commit": content["commit"]} | explained(entry)
            for arch, entry in content["architectures"].items()
        }
    except (ValueError, TypeError, KeyError):
        raise SystemExit(
            f"--json {path} is there and is no result of this script, whose entries would be kept: "
            "name another file, or remove it"
        ) from None


def write(path: Path, head: dict[str, Any], architectures: dict[str, Any]) -> None:
    ordered = {arch: architectures[arch] for arch in ARCHITECTURES if arch in architectures}
    content = head | {"rows": rows(ordered), "architectures": ordered}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def explain(path: Path | None) -> dict[str, Any]:
    """Puts what `missed.json` says now into a result file, and returns its entries."""
    if path is None or not path.exists():
        raise SystemExit("--explain changes a result file: name one that is there with --json")
    known = earlier(path)
    write(path, json.loads(path.read_text()), known)
    return known


def say_unexplained(entry: dict[str, Any]) -> None:
    for key in unexplained(entry):
        print(f"without a sentence in {_EXPLANATIONS.name}: {json.dumps(key)}", flush=True)


def start() -> dict[str, Any]:
    """The head of the result file, taken before that file changes the tree."""
    command = shlex.join(["python", "-m", "tests.emulator.evidence", *sys.argv[1:]])
    return environment(torch.device("cpu")) | {"command": command}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHITECTURES, action="append", help="default: all")
    parser.add_argument("--json", type=output_file, help="result file")
    parser.add_argument("--per-kind", type=positive, default=PER_KIND, help="mutants in a draw")
    parser.add_argument("--draws", type=positive, default=DRAWS, help="of mutants, without repeats")
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--explain", action="store_true", help="only read missed.json anew")
    arguments = parser.parse_args()
    path = arguments.json
    if arguments.explain:
        for entry in explain(path).values():
            say_unexplained(entry)
        return 0
    earlier(path)
    head = start()
    for arch in arguments.arch or ARCHITECTURES:
        for entry in run_architecture(arch, arguments.per_kind, arguments.draws, arguments.only):
            print(json.dumps(entry["summary"], indent=1), flush=True)
            if path:
                write(path, head, earlier(path) | {arch: {"commit": head["commit"]} | entry})
        say_unexplained(entry)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
