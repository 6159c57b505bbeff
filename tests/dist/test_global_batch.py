"""The script that compares processes with one, as torchrun starts it; NCCL where there are GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import global_batch
from tests.refusals import refusal

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed"
)


def test_two_processes_of_torchrun(tmp_path):
    path = tmp_path / "ranks.json"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    device = "cuda" if torch.cuda.device_count() >= 2 else "cpu"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "benchmarks/global_batch.py", "--device", device, "--json", str(path)]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    values = {
        row["metric"].split("/")[-1]: row["value"] for row in json.loads(path.read_text())["rows"]
    }
    assert values["entries of the bias that differ"] == 0 and values["processes agree"] == 1
    assert 0 <= values["loss"] < 1e-5


def test_logits_are_exact_whatever_the_order():
    data, weight = global_batch.exact_inputs(torch.device("cpu"))
    tokens = data[0, 0, :50]
    exact = tokens.double() @ weight.double().T
    assert torch.equal(torch.nn.functional.linear(tokens, weight).double(), exact)
    backwards = (tokens.flip(1) @ weight.flip(1).T).double()
    assert torch.equal(backwards, exact) and exact.std() > 0.3


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_the_whole_and_unequal(size):
    parts = global_batch.shares(size)
    assert sum(parts) == global_batch.TOKENS and len(set(parts)) == len(parts) == size
    assert min(parts) > 0


def test_more_processes_than_gpus_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    says = "--device cuda, one for each process: no cuda:2: torch sees 2. Allowed: cuda:0 to"
    assert says in refusal(global_batch.main, [], capsys)


def test_without_torchrun_it_says_so(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="torchrun --nproc-per-node 2"):
        global_batch.main([])
