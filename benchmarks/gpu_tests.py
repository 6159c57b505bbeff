"""Runs the GPU tests side by side (pytest-xdist) and writes how many passed to a result file.

    python benchmarks/gpu_tests.py --jobs 6 --json benchmarks/results/<date>-gpu-tests.json

Exit status 1 if a test failed, the run did not finish, or no test ran. A run that is not finished
in time is interrupted: the tests that had ended are counted, and the rest are one failure.
"""

import argparse
import importlib.util
import os
import signal
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

from benchmarks.figures import Result
from benchmarks.measure import environment
from benchmarks.options import EachOnce, output_file, positive, seconds

TESTS = ROOT / "tests" / "gpu"
NOT_FINISHED = "not finished"
OUTCOMES = ("passed", "failed", "skipped")
PRINTED = 20_000  # characters of a failed run
_SECONDS_TO_STOP = 30.0  # for pytest and its workers, once interrupted


def run(paths: list[Path], processes: int, report: Path, limit: float) -> tuple[str, bool]:
    """Run the tests side by side; the JUnit report goes to ``report``. Returns what was printed
    (nothing is captured in the workers, so that an abort is seen), and whether the run finished."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(processes), "--dist", "worksteal"]
    command += ["--capture=sys", "-p", "no:cacheprovider", f"--junitxml={report}"]
    process = subprocess.Popen(
        [*command, *map(str, paths)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # workers that hang are ended with it
        # Of a script in the background it is ignored, and so by what that starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        return process.communicate(timeout=limit)[0], True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then writes its report
        try:
            printed = process.communicate(timeout=_SECONDS_TO_STOP)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            printed = process.communicate()[0]
        return f"{printed}\n{NOT_FINISHED} after {limit:.0f} s", False
    finally:
        if process.returncode is None:  # this script itself is interrupted
            os.killpg(process.pid, signal.SIGKILL)


def count(report: Path, finished: bool = True) -> dict[str, Counter[str]]:
    """Tests of every file by outcome. A run that did not finish is one failure more, and so is a
    missing or unreadable report."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
        whole = {} if finished else {NOT_FINISHED: Counter(failed=1)}
    except (OSError, ElementTree.ParseError):
        return {"no report" if finished else NOT_FINISHED: Counter(failed=1)}
    files: dict[str, Counter[str]] = defaultdict(Counter)
    for case in cases:
        tags = {part.tag for part in case}
        outcome = "failed" if tags & {"failure", "error"} else "passed"
        # tests.gpu.test_layer, or tests.gpu.test_layer.TestClass, perhaps in a folder named test_*.
        parts = case.get("classname", "").split(".")
        name = next((part for part in reversed(parts) if part.startswith("test_")), "a worker")
        if name == "a worker" and outcome == "passed":
            continue  # it had begun when the run was ended; a worker that dies leaves an error
        files[name]["skipped" if "skipped" in tags else outcome] += 1
    return files | whole


def main(argv: list[str] | None = None) -> int:
    known = {path.stem.removeprefix("test_"): path for path in sorted(TESTS.glob("test_*.py"))}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=positive, default=4, help="processes")
    parser.add_argument("--limit", type=seconds, default=900.0, help="seconds for all")
    parser.add_argument(
        "--files",
        nargs="+",
        action=EachOnce,
        choices=list(known),
        metavar="NAME",
        help=f"some of them: {' '.join(known)}",
    )
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write a result file")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("Needs a CUDA GPU: without one every test would be skipped.", file=sys.stderr)
        return 2
    if importlib.util.find_spec("xdist") is None:
        print("Needs pytest-xdist: pip install 'pytest-xdist>=3.6'", file=sys.stderr)
        return 2
    result = Result(environment(torch.device("cuda")))
    files = [known[name] for name in arguments.files or known]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        printed, finished = run(files, arguments.jobs, report, arguments.limit)
        counts = count(report, finished)
    total: Counter[str] = Counter()
    for name, outcomes in sorted(counts.items()):
        print(f"{name}: " + ", ".join(f"{outcomes[o]} {o}" for o in OUTCOMES))
        total += outcomes
        for outcome in OUTCOMES:
            label = f"{name}.py" if name.startswith("test_") else name
            result.add(f"{label}/{outcome}", outcomes[outcome], "tests", [])
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
