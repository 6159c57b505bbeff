"""Runs ``triton_interpreted.py`` in a process whose Triton interprets kernels on the CPU."""

from pathlib import Path

import pytest

from tests.interpreter import LONGEST, run_interpreted

pytest.importorskip("triton")


@pytest.mark.timeout(LONGEST)
def test_kernels_in_the_interpreter():
    run_interpreted(Path(__file__).with_name("triton_interpreted.py"))
