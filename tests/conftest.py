"""What every test shares: seeds, the GPU marker, poisoned memory, and a table of skips."""

import os
import random
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import sonic
from sonic.testing import GuardedAllocator, poisoned_empty

# A test's sizes are its own: kernels of others would be compiled for nobody.
os.environ["SONIC_COMPILE"] = "needed"

_GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in tests/gpu, and skip what is marked where the kernels cannot run."""
    for item in items:
        if _GPU_TESTS in item.path.parents:
            item.add_marker("gpu")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    available = sonic.is_available()
    if not available.ok:
        skip = pytest.mark.skip(reason=f"needs a supported GPU: {available.reason}")
        for item in marked:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """The same numbers in every run of a test, whatever ran before it."""
    seed = zlib.crc32(request.node.nodeid.encode())
    random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _synchronized(request: pytest.FixtureRequest) -> Iterator[None]:
    """A kernel's failure belongs to the test that launched it."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory from ``torch.empty`` holds NaN (integers: far out of range) until it is written."""
    with poisoned_empty():
        yield


@pytest.fixture
def guarded() -> Iterator[GuardedAllocator]:
    """As ``poisoned``, and between guard bands that are checked when the test ends."""
    allocator = GuardedAllocator()
    with allocator.allocations():
        yield allocator
    allocator.check()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests were skipped for each reason."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        _, _, reason = report.longrepr if isinstance(report.longrepr, tuple) else ("", 0, "")
        reasons[reason.removeprefix("Skipped: ")] += 1
    if reasons:
        terminalreporter.section("skipped, by reason")
        for reason, count in reasons.most_common():
            terminalreporter.line(f"{count:5}  {reason}")
