"""The router benchmark: what it compares before it times."""

import importlib.util
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import NamedShape, Shape

ROOT = Path(__file__).resolve().parents[2]
TINY = NamedShape("T", "tiny", Shape(300, 16, 8, 32, 4))
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture(scope="module")
def script():
    path = ROOT / "benchmarks" / "moe-router.py"
    spec = importlib.util.spec_from_file_location("moe_router", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def failed(case):
    return {finding.tensor for finding in case.findings() if not finding.passed}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("router", ["softmax", "deepseek"])
def test_our_router_passes(script, router, dtype):
    findings = script.Case(TINY, router, dtype, "cpu").findings()
    assert all(finding.passed for finding in findings), findings
    found = {finding.tensor for finding in findings}
    assert {"ids", "token_by_row", "scores", "switch", "z", "dlogits"} <= found
    narrow = {finding.tensor: finding.yardstick for finding in findings}
    assert 0 < narrow["scores"] < 1e-6 and narrow["dlogits"] < 4e-3


CHANGES = [
    ("ids", {"ids"}, lambda ids: ids.roll(1, dims=1)),
    ("token_by_row", {"token_by_row"}, lambda rows: rows.roll(1)),
    ("scores", {"scores"}, lambda scores: 1.00001 * scores),
    ("scores", {"dlogits"}, lambda scores: scores + 0.1 * (scores - scores.detach())),
    ("switch", {"switch"}, lambda loss: loss + 1e-5),
    ("switch", {"dlogits"}, lambda loss: loss.detach() + 0 * loss),
    ("z", {"dlogits"}, lambda loss: 0.9 * loss + 0.1 * loss.detach()),
]


@pytest.mark.parametrize(("field", "expected", "change"), CHANGES)
@pytest.mark.parametrize("router", ["softmax", "deepseek"])
def test_mistakes_are_found(script, monkeypatch, router, field, expected, change):
    case = script.Case(TINY, router, torch.bfloat16, "cpu")
    right = script.sonic_path

    def wrong(*arguments):
        passed = right(*arguments)
        return passed._replace(**{field: change(getattr(passed, field))})

    monkeypatch.setattr(script, "sonic_path", wrong)
    assert expected <= failed(case)
