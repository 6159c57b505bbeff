"""Runs ``routers_interpreted.py`` in a process whose Triton interprets kernels on the CPU."""

from pathlib import Path

import pytest

from tests.interpreter import LONGEST, run_interpreted

pytest.importorskip("triton")


@pytest.mark.timeout(LONGEST)
def test_router_kernels_in_the_interpreter():
    run_interpreted(Path(__file__).with_name("routers_interpreted.py"))
