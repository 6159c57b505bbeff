"""How many single mistakes in right kernels the emulator finds.

    python -m tests.emulator.evidence --arch sm_90a --json result.json

For each kernel of `subjects.py` and each kind of change of `mutations.py` a few places that the
kernel executes are drawn, the same ones in every run, among those that no rule of `redundant.py`
proves to be without effect, which the file lists; each changed kernel runs with one seed after
another until something is reported or the result is wrong. A result file keeps the entries of the
architectures that are not run. What is missed needs a sentence in `missed.json`.
"""

import argparse
import json
import random
import shlex
import sys
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import environment
from benchmarks.options import output_file, positive
from benchmarks.report import EMULATOR, Row

from .memory import Fault
from .mutations import Mutation, all_mutations, executed_lines
from .ptx import PtxError
from .redundant import Flow, why_redundant
from .report import kind_of
from .subjects import ARCHITECTURES, Subject, subjects

SEEDS = tuple(range(6))
PER_KIND = 4  # of one architecture, over all its kernels
_STEPS_ALLOWED = 8  # times those of the unchanged kernel
_EXPLANATIONS = Path(__file__).with_name("missed.json")
# How an explanation of a missed mutant begins.
WITHOUT_EFFECT, OTHER_SIZES, GAP = "No effect:", "Other sizes:", "Gap:"
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
    max_steps = _STEPS_ALLOWED * unchanged.steps + 50_000
    result: dict[str, Any] = {"caught": "missed", "seeds": len(SEEDS), "report": ""}
    try:
        subject.emulator.load(mutant.text)
    except PtxError as error:
        result |= {"caught": "refused", "seeds": 0, "report": str(error)}
        return result
    for tried, seed in enumerate(SEEDS, 1):
        try:
            wrong, warnings = subject.run(seed, max_steps)
        except Fault as fault:
            text = str(fault)
            result |= {"caught": how_caught(text), "seeds": tried, "report": shortened(text)}
            break
        except RuntimeError as error:  # of the host code
            result |= {"caught": "illegal", "seeds": tried, "report": shortened(str(error))}
            break
        if wrong:
            result |= {"caught": "values", "seeds": tried, "report": wrong}
            break
        new = sorted(w for w in warnings if kind_of(w) not in unchanged.warnings)
        if new:
            result |= {"caught": "warning", "seeds": tried, "report": new[0][:160]}
            break
    result["seconds"] = round(time.perf_counter() - start, 2)
    return result


def shortened(report: str) -> str:
    """The first line of a report, without the kernel's long name."""
    line = report.split("\n", 1)[0]
    return line.split(": ", 1)[-1][:160]


def described(subject: Subject, mutant: Mutation) -> dict[str, Any]:
    """What a result file says of a mutation of the loaded text."""
    ptx, source = instruction_at(subject, mutant)
    place = {"arch": subject.arch, "kernel": subject.name, "kind": mutant.kind}
    return place | {"detail": mutant.detail, "line": mutant.line, "ptx": ptx, "source": source}


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
    """The mutations of executed places of one kernel, by kind, in a drawn order.

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
    for kind, mutants in found.items():
        random.Random(f"{subject.name} {kind}").shuffle(mutants)
    return dict(found), left_out, not_executed


def sample(
    by_subject: list[dict[str, list[Mutation]]], per_kind: int
) -> list[list[tuple[str, Mutation]]]:
    """Up to `per_kind` mutants of each kind, one kernel after another in turn."""
    chosen: list[list[tuple[str, Mutation]]] = [[] for _ in by_subject]
    for n, kind in enumerate(sorted({kind for kinds in by_subject for kind in kinds})):
        left = per_kind
        depth = 0
        while left and any(len(kinds.get(kind, ())) > depth for kinds in by_subject):
            for offset in range(len(by_subject)):
                i = (n + offset) % len(by_subject)  # kinds begin with different kernels
                mutants = by_subject[i].get(kind, [])
                if left and len(mutants) > depth:
                    chosen[i].append((kind, mutants[depth]))
                    left -= 1
            depth += 1
    return chosen


def explanations() -> dict[str, str]:
    """Why each mutant of `missed.json` is missed, by `key_of`."""
    return json.loads(_EXPLANATIONS.read_text()) if _EXPLANATIONS.exists() else {}


def key_of(entry: dict[str, Any]) -> str:
    """What an explanation is filed under. It names the PTX, so that it falls with the code."""
    parts = [entry[name] for name in ("arch", "kernel", "kind", "detail", "ptx")]
    return " | ".join(part for part in parts if part)


def run_architecture(arch: str, per_kind: int, only: str) -> dict[str, Any]:
    """The entry of one architecture in the result file."""
    start = time.perf_counter()
    every = [make() for make in subjects(arch)]
    made = [subject for subject in every if only in subject.name]
    if not made:
        known = ", ".join(subject.name for subject in every)
        raise SystemExit(f"--only {only}: no kernel of {arch} has that in its name; it has {known}")
    by_subject, unchanged = [], []
    left_out: list[dict[str, Any]] = []
    not_executed = 0
    for subject in made:
        unchanged.append(baseline(subject))
        mutants, redundant, others = mutants_by_kind(subject, unchanged[-1].lines)
        by_subject.append(mutants)
        left_out += redundant
        not_executed += others
        count = sum(map(len, by_subject[-1].values()))
        print(f"{arch} {subject.name}: {count} places, {unchanged[-1].steps} steps", flush=True)
    entries = []
    for i, chosen in enumerate(sample(by_subject, per_kind)):
        subject, original = made[i], made[i].emulator.ptx_text
        for _, mutant in chosen:
            subject.emulator.load(original)
            entry = described(subject, mutant)
            entry |= trial(subject, mutant, unchanged[i])
            entries.append(entry)
            print(
                f"{entry['caught']:9}{entry['seeds']} {entry.get('seconds', 0):6.2f} s  "
                f"{subject.name}: {mutant.name}: {entry['ptx'][:60]}  {entry['source']}",
                flush=True,
            )
        subject.emulator.load(original)
    places = sum(len(mutants) for kinds in by_subject for mutants in kinds.values())
    by_rule = dict(Counter(place["rule"] for place in left_out))
    summary = {"places": places, "redundant_by_rule": by_rule, "not_executed": not_executed}
    summary |= {"seeds": len(SEEDS), "per_kind": per_kind}
    summary["seconds"] = round(time.perf_counter() - start, 1)
    return explained({"summary": summary, "left_out": left_out, "mutants": entries})


def explained(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry of an architecture with what `missed.json` says now, and its totals."""
    known = explanations()
    for mutant in entry["mutants"]:
        if mutant["caught"] == "missed":
            mutant["explanation"] = known.get(key_of(mutant), "")
    return entry | {"summary": entry["summary"] | totals(entry["mutants"])}


def totals(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of an architecture.

    A missed mutant is without effect if its explanation says so, or would be found at other sizes,
    or is a gap of the emulator.
    """
    missed = [entry for entry in entries if entry["caught"] == "missed"]
    without = sum(entry["explanation"].startswith(WITHOUT_EFFECT) for entry in missed)
    sizes = sum(entry["explanation"].startswith(OTHER_SIZES) for entry in missed)
    gaps = sum(entry["explanation"].startswith(GAP) for entry in missed)
    caught = len(entries) - len(missed)
    return {
        "mutants": len(entries),
        "caught": caught,
        "share_caught": round(caught / max(len(entries), 1), 4),
        "share_caught_of_those_with_effect": round(caught / max(len(entries) - without, 1), 4),
        "without_effect": without,
        "other_sizes": sizes,
        "gaps": gaps,
        "unexplained": len(missed) - without - sizes - gaps,
        "kinds": len({entry["kind"] for entry in entries}),
        "kernels": len({entry["kernel"] for entry in entries}),
        "how": dict(Counter(entry["caught"] for entry in entries).most_common()),
        "by_first_seed": sum(e["seeds"] == 1 for e in entries if e["caught"] != "missed"),
    }


def rows(architectures: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that tables are made of, as rows of a result file."""
    figures = []
    for arch, entry in architectures.items():
        summary = entry["summary"]
        figures += [
            (arch, "mutants", summary["mutants"], "tried"),
            (arch, "caught", summary["caught"], "mutants"),
            (arch, "without effect", summary["without_effect"], "mutants"),
            (arch, "places", summary["places"], "places"),
            (arch, "a kind", summary["per_kind"], "mutants"),
            (arch, "redundant by rule", sum(summary["redundant_by_rule"].values()), "places"),
            (arch, "kinds", summary["kinds"], "count"),
            (arch, "seconds", summary["seconds"], "s"),
        ]
    return [
        asdict(Row(EMULATOR, [], f"mutations/{arch}/{metric}", value, unit))
        for arch, metric, value, unit in figures
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


def explain(path: Path) -> None:
    """A result file as it was, with the explanations that `missed.json` has now."""
    made = earlier(path)
    content = json.loads(path.read_text()) | {"rows": rows(made), "architectures": made}
    path.write_text(json.dumps(content, indent=1) + "\n")


def start() -> dict[str, Any]:
    """The head of the result file, taken before that file changes the tree."""
    command = shlex.join(["python", "-m", "tests.emulator.evidence", *sys.argv[1:]])
    return environment(torch.device("cpu")) | {"command": command}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=ARCHITECTURES, action="append", help="default: all")
    parser.add_argument("--json", type=output_file, help="result file")
    parser.add_argument("--per-kind", type=positive, default=PER_KIND)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument(
        "--explain", action="store_true", help="run nothing; write what missed.json says now"
    )
    arguments = parser.parse_args()
    path = arguments.json
    if arguments.explain:
        if path is None or not path.exists():
            parser.error("--explain needs --json with a result file that is there")
        explain(path)
        return 0
    earlier(path)
    head = start()
    for arch in arguments.arch or ARCHITECTURES:
        entry = run_architecture(arch, arguments.per_kind, arguments.only)
        print(json.dumps(entry["summary"], indent=1))
        if path:
            made = earlier(path) | {arch: {"commit": head["commit"]} | entry}
            made = {arch: made[arch] for arch in ARCHITECTURES if arch in made}
            content = head | {"rows": rows(made), "architectures": made}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
