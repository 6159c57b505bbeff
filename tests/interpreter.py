"""Runs a file of tests in a process whose Triton interprets kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
LONGEST = 1800  # seconds for a whole file of tests; the file's own tests have the usual limit each


def run_interpreted(path: Path) -> None:
    """A process of its own: the variable is read once, when triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(_ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-rs"]
    result = subprocess.run(
        [*command, str(path)],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    report = result.stdout[-8000:] + result.stderr[-2000:]
    if "interpreter does not run on this NumPy" in report:
        pytest.skip("this Triton's interpreter does not run on this NumPy")
    assert result.returncode == 0, report
    assert " passed" in report and " skipped" not in report, report
