"""FLOPs that torch's counter reports, against the arithmetic of the layer."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import sonic

ROOT = Path(__file__).resolve().parents[2]
T, H, I, E, K = 6, 16, 8, 4, 2  # noqa: E741 (the names of sizes throughout)


@pytest.fixture(autouse=True)
def known():
    sonic.flops.register()


def test_building_a_layer_makes_them_known():
    code = (
        "import sonic, torch; from sonic import MoE; from torch.utils import flop_counter as f\n"
        "layer = MoE(4, 2, 16, 8, 'swiglu', False, 0.02)\n"
        "with f.FlopCounterMode(display=False) as c: layer(torch.randn(6, 16), 'torch')\n"
        "print(c.get_flop_counts()['Global'][torch.ops.sonic.experts_forward])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == str(6 * 6 * 2 * 16 * 8), done.stderr


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(("activation", "forward"), [("swiglu", 6), ("relu", 4)])
@pytest.mark.parametrize("frozen", [False, True])
def test_experts(activation, forward, frozen):
    width = 2 * I if activation == "swiglu" else I
    x = torch.randn(T, H, requires_grad=True)
    w1 = torch.randn(E, width, H, requires_grad=not frozen)
    w2 = torch.randn(E, H, I, requires_grad=not frozen)
    ids, weights = torch.randint(0, E, (T, K)), torch.rand(T, K)
    unit = T * K * H * I
    out = []

    def run():
        out.append(sonic.experts(x, ids, weights, w1, w2, activation=activation))

    assert counted(run) == forward * unit
    backward = forward * (1 if frozen else 2) * unit
    assert counted(lambda: out[0].sum().backward()) == backward


def test_grouped_mm():
    rows, weight = torch.randn(T, H, requires_grad=True), torch.randn(E, I, H, requires_grad=True)
    offsets = torch.tensor([0, 1, 3, 3, T], dtype=torch.int32)
    out = []
    assert counted(lambda: out.append(sonic.grouped_mm(rows, weight, offsets))) == 2 * T * H * I
    assert counted(lambda: out[0].sum().backward()) == 4 * T * H * I
