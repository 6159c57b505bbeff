"""Runs the GPU tests, one process per file, and writes how many passed to a result file.

    python benchmarks/gpu_tests.py --jobs 6 --json benchmarks/results/<date>-gpu-tests.json

Exit status 1 if a test failed, a file did not finish, or no test ran.
"""

import argparse
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from benchmarks.measure import environment
from benchmarks.report import Result

OUTCOMES = ("passed", "failed", "skipped")


def run_file(path: Path, report: Path, limit: float) -> str:
    """Run one file's tests; the JUnit report goes to ``report``. Returns what pytest printed."""
    command = [sys.executable, "-m", "pytest", "-q", str(path), f"--junitxml={report}"]
    try:
        run = subprocess.run(
            command, cwd=ROOT, timeout=limit, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired as expired:
        printed = expired.stdout or b""
        return f"not finished after {limit:.0f} s\n{printed.decode(errors='replace')}"
    return run.stdout + run.stderr


def count(report: Path) -> dict[str, int]:
    """Tests by outcome; a report that is missing or unreadable counts as one failure."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return {"passed": 0, "failed": 1, "skipped": 0}
    failed = sum(any(part.tag in ("failure", "error") for part in case) for case in cases)
    skipped = sum(any(part.tag == "skipped" for part in case) for case in cases)
    return {"passed": len(cases) - failed - skipped, "failed": failed, "skipped": skipped}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=4, help="files at a time")
    parser.add_argument("--limit", type=float, default=900, help="seconds for each file")
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
    total = dict.fromkeys(OUTCOMES, 0)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        running = {}
        for path in files:
            report = Path(folder) / f"{path.stem}.xml"
            running[pool.submit(run_file, path, report, arguments.limit)] = (path, report)
        for done in as_completed(running):
            path, report = running[done]
            counts = count(report)
            print(f"{path.name}: " + ", ".join(f"{counts[o]} {o}" for o in OUTCOMES), flush=True)
            if counts["failed"]:
                print(done.result()[-4000:], flush=True)
            for outcome in OUTCOMES:
                total[outcome] += counts[outcome]
                result.add(f"{path.name}/{outcome}", counts[outcome], "tests", [])
    for outcome in OUTCOMES:
        result.add(f"all/{outcome}", total[outcome], "tests", [])
    print(", ".join(f"{total[o]} {o}" for o in OUTCOMES), f"{time.perf_counter() - start:.0f} s")
    if arguments.json:
        result.write(arguments.json)
    return 1 if total["failed"] or not total["passed"] else 0


if __name__ == "__main__":
    sys.exit(main())
