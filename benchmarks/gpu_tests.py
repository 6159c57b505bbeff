"""Runs the GPU tests side by side (pytest-xdist) and writes how many passed to a result file.

    python benchmarks/gpu_tests.py --jobs 6 --json benchmarks/results/<date>-gpu-tests.json

Exit status 1 if a test failed, the run did not finish, or no test ran.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.measure import environment
from benchmarks.report import Result

OUTCOMES = ("passed", "failed", "skipped")
PRINTED = 20_000  # characters of a failed run


def run(paths: list[Path], processes: int, report: Path, limit: float) -> str:
    """Run the tests side by side; the JUnit report goes to ``report``. Returns what was printed:
    nothing is captured in the workers, so that an abort is seen."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(processes), "--dist", "worksteal"]
    command += ["--capture=sys", "-p", "no:cacheprovider", f"--junitxml={report}"]
    try:
        done = subprocess.run(
            [*command, *map(str, paths)],
            cwd=ROOT,
            timeout=limit,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired as expired:
        printed = expired.stdout or b""
        return f"{printed.decode(errors='replace')}\nnot finished after {limit:.0f} s"
    return done.stdout


def count(report: Path) -> dict[str, Counter[str]]:
    """Tests of every file by outcome; a missing or unreadable report is one failure."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {"report": Counter(failed=1)}
    files: dict[str, Counter[str]] = defaultdict(Counter)
    for case in cases:
        tags = {part.tag for part in case}
        outcome = "failed" if tags & {"failure", "error"} else "passed"
        # tests.gpu.test_layer, or tests.gpu.test_layer.TestClass; none where a worker died
        parts = case.get("classname", "").split(".")
        name = next((part for part in parts if part.startswith("test_")), "a worker")
        files[name]["skipped" if "skipped" in tags else outcome] += 1
    return dict(files)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=4, help="processes")
    parser.add_argument("--limit", type=float, default=900, help="seconds for all")
    parser.add_argument("--files", nargs="+", help="some of them, as in: layer graph compile")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("Needs a CUDA GPU: without one every test would be skipped.", file=sys.stderr)
        return 2
    result = Result(environment(torch.device("cuda")))
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    if arguments.files:
        files = [path for path in files if path.stem.removeprefix("test_") in arguments.files]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        printed = run(files, arguments.jobs, report, arguments.limit)
        counts = count(report)
    total: Counter[str] = Counter()
    for name, outcomes in sorted(counts.items()):
        print(f"{name}: " + ", ".join(f"{outcomes[o]} {o}" for o in OUTCOMES))
        total += outcomes
        for outcome in OUTCOMES:
            result.add(f"{name}.py/{outcome}", outcomes[outcome], "tests", [])
    for outcome in OUTCOMES:
        result.add(f"all/{outcome}", total[outcome], "tests", [])
    if total["failed"] or not total["passed"]:
        print(printed[-PRINTED:])
    print(", ".join(f"{total[o]} {o}" for o in OUTCOMES), f"{time.perf_counter() - start:.0f} s")
    if arguments.json:
        result.write(arguments.json)
    return 1 if total["failed"] or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
