"""Every kernel of the layer compiles for its GPU on a machine without one, hardly spilling, and
waits for earlier launches before it touches memory."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed")

from sonic.runtime.backend import load_backend
from sonic.runtime.errors import UnsupportedError
from sonic.runtime.launch import kernel_for
from sonic.runtime.problem import (
    Arch,
    Operand,
    Schedule,
    TileConfig,
    weight_grad_problem,
)
from tests.cpu.compile_worker import kernels
from tests.waits import START, WAIT, fault_of_wait

_ROOT = Path(__file__).parents[2]
_PARTS = 16
_OVERLAPPED_SPILLS = 128
_SWAPPED_SPILLS = 384
_REPORT = {"CUTE_DSL_COMPILER_OPT": "remarks{ptx}"}  # registers and spills, on stderr
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill")
_REGISTERS = re.compile(r"Used (\d+) registers")
_WAIT = re.compile(r"WAIT ([^;]+);")


def _allowed_spills(kernel: str) -> int:
    """Bytes of spill stores that are accepted, of overlapped kernels by measurements.

    A math thread of an overlapped kernel holds a tile's accumulator and a copy of the one before,
    and the loader of gathered rows leaves it 224 registers. What spills is read once per tile.
    Of tiles that fit their expert those with long epilogues spill registers that are read once per
    16 rows, outside the main loops.
    """
    if "_swap" in kernel and "gather" in kernel:
        return _SWAPPED_SPILLS
    return _OVERLAPPED_SPILLS if "overlapped" in kernel and "gather" in kernel else 0


def _compile_part(part: int) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tests.cpu.compile_worker", str(part), str(_PARTS)],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT), "CUDA_VISIBLE_DEVICES": "", **_REPORT},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def compilations():
    """A compilation per part, one at a time for each core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield [pool.submit(_compile_part, part) for part in range(_PARTS)]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(_PARTS))
def test_kernels_compile_with_hardly_a_spill_and_wait_first(part, compilations):
    expected = kernels(Arch.SM90)[part::_PARTS]
    run = compilations[part].result()
    assert run.returncode == 0, run.stdout[-4000:]
    reports = run.stdout.split("KERNEL ")[1:]
    assert len(reports) == len(expected)
    faults = []
    for report in reports:
        name = report.splitlines()[0]
        # Colour codes and line wrapping of the remark must not hide a number.
        text = re.sub(r"\s+", " ", re.sub(r"\x1b\[[0-9;]*m", "", report))
        spills, registers = set(_SPILL.findall(text)), set(_REGISTERS.findall(text))
        stores = max(int(stores) for _, stores, _ in spills)
        if stores > _allowed_spills(name) or registers != {"168"}:  # setmaxnreg needs 168 at entry
            faults.append(
                f"{name}: stack frame, spill stores, loads {spills}, registers {registers}"
            )
        (wait,) = _WAIT.findall(text)
        if wait != "first":
            faults.append(f"{name}: {wait}")
    assert not faults, "\n".join(faults)


def _begins(*instructions: str) -> str:
    return ".entry kernel(.param .b64 p)\n{\n" + "\n".join(instructions) + "\nret;\n}"


_INIT = "@%p1 bra $L1;", "mbarrier.init.shared.b64 [b], 1;", "$L1:", "ld.param.b64 %rd1, [p];"
_LOAD = "ld.global.b32 %r1, [%rd1];"


@pytest.mark.parametrize(
    ("instructions", "fault"),
    [
        ((*_INIT, f"{WAIT};", _LOAD), None),
        ((*_INIT, _LOAD, f"{WAIT};"), "ld.global.b32 comes"),
        ((*_INIT, "@%p2 st.b32 [%rd1], 0;", f"{WAIT};"), "st.b32 comes"),
        ((*_INIT, "{ atom.global.add.u32 %r1, [%rd1], 1; }", f"{WAIT};"), "atom"),
        ((*_INIT, "cp.async.cg.shared.global [b], [%rd1], 16;", f"{WAIT};"), "cp.async"),
        (
            (*_INIT, "cp.async.bulk.tensor.2d.shared::cluster.global.tile [b], [m];", f"{WAIT};"),
            "cp.async.bulk",
        ),
        ((*_INIT, _LOAD), "0 places"),
        ((*_INIT, f"{WAIT};", f"{WAIT};"), "2 places"),
        ((*_INIT, f"@%p1 {WAIT};"), "do not wait"),
        (("@%p1 bra $L2;", f"{WAIT};", "$L2:", _LOAD), "pass by"),
        (("@%p1 ret;", f"{WAIT};", _LOAD), "pass by"),
        ((*_INIT, f"{WAIT};", f"{START};"), "start early"),
    ],
)
def test_a_late_wait_is_noticed(instructions, fault):
    found = fault_of_wait(_begins(*instructions))
    assert found is None if fault is None else fault in found


def test_inventory_is_not_empty():
    names = [problem.name for problem, _ in kernels(Arch.SM90)]
    assert len(names) > 100
    assert any("swiglu_oai" in name for name in names)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (TileConfig(96, 128), "tile_m=96"),
        (TileConfig(128, 320), "tile_n=320"),
        (TileConfig(256, 192, schedule=Schedule.OVERLAPPED), "overlapped epilogue"),
        (TileConfig(128, 128, cluster_m=4), "cluster 4x1"),
        (TileConfig(128, 128, cluster_n=2), "multicast"),
        (TileConfig(256, 256), "accumulators"),
        (TileConfig(256, 192, epilogue_stages=4), "stages"),
    ],
)
def test_unfit_tiles_are_refused_before_compiling(config, reason):
    problem = weight_grad_problem("bfloat16", Operand.A, gated=False, accumulate=False)
    with pytest.raises(UnsupportedError, match=reason):
        load_backend(Arch.SM90).compile(problem, config)


def test_a_refusal_of_tiles_is_not_called_a_compiler_failure():
    problem = weight_grad_problem("bfloat16", None, gated=False, accumulate=False)
    with pytest.raises(UnsupportedError, match="tile_m=96"):
        kernel_for(load_backend(Arch.SM90), problem, TileConfig(96, 128))
