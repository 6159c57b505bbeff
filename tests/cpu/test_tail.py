"""The kernel that clears rows without an expert, run by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
CODE = """
import torch
from sonic.testing import poison_
from sonic.triton.tail import zero_tail

for rows, width, live, dtype in [
    (1, 8, 0, torch.bfloat16),
    (63, 24, 63, torch.float16),
    (64, 256, 1, torch.bfloat16),
    (200, 264, 64, torch.float16),
    (200, 520, 137, torch.bfloat16),
    (0, 8, 0, torch.bfloat16),
]:
    buffer = poison_(torch.empty(rows + 2, width, dtype=dtype))
    body = buffer[1:-1]
    body[:live] = torch.randn(live, width)
    kept = body[:live].clone()
    offset = torch.tensor([0, live // 2, live // 2, live], dtype=torch.int32)
    assert zero_tail(body, offset) is body
    assert torch.equal(body[:live], kept)
    assert not body[live:].any()
    assert buffer[0].isnan().all() and buffer[-1].isnan().all()
print("cleared")
"""


def test_only_the_tail_is_cleared():
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "cleared", done.stderr
