"""Runs the configurations and writes what came out.

python -m tests.calibration.run [--json FILE] [--arch sm_100a] [--seeds 3] [--only PART_OF_A_NAME]
    [--jobs 2]

Every configuration runs with `--seeds` seeds of "mixed" timing and one each of "eager" and "lazy",
on a problem of its own for each. A configuration is right if each run's values are within the bound
and nothing is reported; it is refused if its PTX has an instruction that is not there yet. One with
Findings runs without the checks that report these, and a few times more for each with its check:
then a report must be one that the Finding names. Exit status 1 if any is not right.
"""

import argparse
import json
import multiprocessing
import re
import shlex
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from itertools import repeat
from pathlib import Path

import torch

from benchmarks.figures import EMULATOR, Row
from benchmarks.measure import environment
from benchmarks.options import not_negative, output_file, positive
from tests.emulator import Fault, Policy, PtxError
from tests.emulator.report import kind_of

from .configurations import ARCHITECTURES, CONFIGURATIONS
from .kernels import about, calibration_kernel, compile_missing, is_compiled

SINGLE = ("eager", "lazy")
REPORT_SEEDS = 4  # one of which must show a Finding
STEPS_ALLOWED = 8  # times those of a run without a report


def policies(seeds):
    """(seed, timing mode) of each run."""
    return [(s, "mixed") for s in range(seeds)] + [(seeds + i, m) for i, m in enumerate(SINGLE)]


def describe(c):
    """What a row says of a configuration beside its results."""
    sizes = {"m": c.m, "n": c.n, "k": c.k, "lengths": list(c.lengths)}
    sizes["batch"] = c.batch if c.batch > 1 else 0
    schedule = ["ping-pong" if c.pingpong else "cooperative"] if c.arch != "sm_100a" else []
    schedule.append("persistent" if c.persistent else "a CTA a tile")
    if c.dynamic:
        schedule.append("tiles from a counter" if c.arch == "sm_90a" else "launch control")
    if c.split > 1:
        schedule.append(f"{c.split} splits of k")
    operation = [c.epilogue, *(w for w in ("row", "col", "add") if getattr(c, w))]
    if c.gather:
        operation.append("gather by TMA" if c.tma_gather else "gather by cp.async")
    if (c.alpha, c.beta) != (1, 0):
        operation.append(f"{c.alpha:g} AB + {c.beta:g} C")
    return {
        "name": c.name, "arch": c.arch, "kernel": c.kind, "operation": ", ".join(operation),
        "problem": {name: value for name, value in sizes.items() if value},
        "dtype": c.blocks or c.dtype, "out": c.out, "majors": c.majors, "tile": list(c.tile),
        "cluster": list(c.cluster), "ctas_per_mma": 2 if c.two_cta else 1,
        "schedule": ", ".join(schedule),
    }  # fmt: skip


def calibrate(c, seeds):
    """The row of a configuration."""
    row = describe(c)
    began = time.perf_counter()
    try:
        row |= run_all(c, seeds)
    except PtxError as e:
        row |= {"verdict": "refused", "report": str(e)[:500]}
    except (Fault, RuntimeError) as e:
        row |= {"verdict": "not right", "report": f"{type(e).__name__}: {e}"[:2000]}
    row["seconds"] = round(time.perf_counter() - began, 2)
    return row


def run_all(c, seeds):
    """What the runs of a configuration add to its row; Fault if anything else is found."""
    kernel = calibration_kernel(c.name)
    options = kernel.options()
    relative, share, steps, warnings, covered = [], [], [], Counter(), set()
    runs = policies(seeds)
    for seed, mode in runs:
        policy = Policy(seed, mode)
        (r, s), machine = kernel.run(policy, seed, **options)
        relative.append(r)
        share.append(s)
        steps.append(machine.steps)
        covered |= machine.executed
        warnings.update({kind_of(w) for w in machine.warnings})
    (program,) = kernel.emulator.programs.values()
    nodes = sum(n is not None for n in program.nodes)
    row = {
        "policies": [f"{mode} {seed}" for seed, mode in runs],
        "max_relative_error": float(f"{max(relative):.3g}"),
        "share_of_bound": float(f"{max(share):.3g}"),
        "steps": steps,
        "coverage": round(len(covered) / nodes, 3),
        "warnings": dict(sorted(warnings.items())),
        "verdict": "right" if max(share) <= 1 else "not right",
    }
    if c.findings:
        row["findings"] = [
            {"why": f.why, "report": report_of(kernel, kernel.options(but=f), max(steps))}
            for f in c.findings
        ]
        for finding, said in zip(c.findings, row["findings"], strict=True):
            if not re.search(finding.report, said["report"]):
                row["verdict"] = "not right"
    return row


def report_of(kernel, options, steps):
    """The first line of what a few runs report, or ""; `steps`: of runs without a report."""
    for seed in range(REPORT_SEEDS):
        try:
            kernel.run(Policy(seed), seed, max_steps=STEPS_ALLOWED * steps, **options)
        except Fault as e:
            return str(e).partition(": ")[2].splitlines()[0]
    return ""


def summary(rows):
    """Figures as rows of a result file."""
    out = []
    for arch in ARCHITECTURES:
        mine = [r for r in rows if r["arch"] == arch]
        right = [r for r in mine if r["verdict"] == "right"]
        figures = {
            "configurations": (len(mine), "tried"), "right": (len(right), "configurations"),
            "runs": (sum(len(r["steps"]) for r in right), "right"),
            "reported rightly": (sum("findings" in r for r in right), "configurations"),
            "seconds": (round(sum(r["seconds"] for r in mine), 1), "s"),
        }  # fmt: skip
        for metric, (value, unit) in figures.items():
            name = f"calibration/{arch}/{metric}"
            out.append(asdict(Row(EMULATOR, [], name, value, unit)))
    return out


def start():
    """The head of the result file, taken before that file changes the tree."""
    command = shlex.join(["python", "-m", "tests.calibration.run", *sys.argv[1:]])
    return environment(torch.device("cpu")) | {"command": command}


def write(path, head, rows, versions):
    """The head that benchmark results have, their figures, and a row a configuration."""
    known = {name: version for name, version in head["versions"].items() if version}
    head = head | {"versions": {**head["versions"], **versions, **known}}
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    for name, values in (("rows", summary(rows)), ("configurations", rows)):
        body = ",\n".join(f"    {json.dumps(v, allow_nan=False)}" for v in values)
        lines.append(f'  "{name}": [\n{body}\n  ]' + ("," if name == "rows" else ""))
    Path(path).write_text("\n".join(["{", *lines, "}"]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=output_file)
    parser.add_argument("--arch", choices=ARCHITECTURES)
    parser.add_argument("--seeds", type=not_negative, default=3)
    parser.add_argument("--only", default="")
    parser.add_argument("--jobs", type=positive, default=1, help="processes")
    args = parser.parse_args()
    chosen = [
        c for c in CONFIGURATIONS.values() if args.only in c.name and args.arch in (None, c.arch)
    ]
    if not chosen:
        parser.error(f"no configuration of {args.arch or 'any architecture'} has {args.only!r} in "
                     "its name; tests/calibration/configurations.py has the names")  # fmt: skip
    head = start()
    compile_missing(chosen)
    rows, versions = [], {}
    pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"))
    for c, row in zip(chosen, pool.map(calibrate, chosen, repeat(args.seeds)), strict=True):
        rows.append(row)
        if is_compiled(c):
            versions |= about(c)["versions"]
        print(
            f"{c.name:32} {row['verdict']:10} {row['seconds']:7.2f} s  "
            + (f"{row['max_relative_error']:.2g}" if "steps" in row else row["report"][:200]),
            flush=True,
        )
        if args.json:
            write(args.json, head, rows, versions)
    bad = [r["name"] for r in rows if r["verdict"] != "right"]
    print(f"{len(rows) - len(bad)} of {len(rows)} right" + (f"; not: {bad}" if bad else ""))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
