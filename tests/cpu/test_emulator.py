"""The emulator on small CuTeDSL kernels: right answers, and every planted mistake found."""

import re
from typing import NamedTuple

import numpy as np
import pytest
import torch

cutlass = pytest.importorskip("cutlass")
import cutlass.cute as cute  # noqa: E402
from cutlass.cute.runtime import make_ptr  # noqa: E402

from tests.emulator import (  # noqa: E402
    STREAM,
    Const,
    Emulator,
    Fault,
    Policy,
    PtxError,
    run_kernel,
)
from tests.emulator.compiled import compile_function, fake_argument  # noqa: E402
from tests.emulator.host import Pointer  # noqa: E402
from tests.emulator.samples import GatheredGemm, PairCopy  # noqa: E402

NAN = float("nan")


@cute.kernel
def scale_kernel(x: cute.Tensor, y: cute.Tensor, factor: cutlass.Float32, extra: cutlass.Constexpr):
    i = cute.arch.block_idx()[0] * 128 + cute.arch.thread_idx()[0]
    if i < cute.size(y) + extra:
        y[i] = (x[i].to(cutlass.Float32) * factor).to(y.element_type)
    if i == 7:
        cute.printf("i {} y {}", i, y[i].to(cutlass.Float32))


@cute.jit
def scale(
    x: cute.Tensor, y: cute.Tensor, factor: cutlass.Float32, extra: cutlass.Constexpr, stream
):
    grid = [cute.ceil_div(cute.size(x), 128), 1, 1]
    scale_kernel(x, y, factor, extra).launch(grid=grid, block=[128, 1, 1], stream=stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_torch_tensors_are_used_in_place(dtype):
    x, y = torch.randn(300).to(dtype), torch.full((300,), NAN).to(dtype)
    (a, b), machine = run_kernel(scale, [x, y, 2.0, Const(0), STREAM], seed=1)
    assert a is x and b is y
    assert torch.equal(y, x * 2)
    (line,) = machine.output
    assert line.startswith("i 7 y ") and float(line.split()[-1]) == pytest.approx(y[7].item(), 1e-3)


def test_numpy_arrays_and_strided_views():
    storage = np.full((50, 4), np.nan, np.float32)
    x = np.arange(50, dtype=np.float32)
    run_kernel(scale, [x, storage[:, 2], 3.0, Const(0), STREAM])
    np.testing.assert_array_equal(storage[:, 2], x * 3)
    assert np.isnan(storage[:, [0, 1, 3]]).all()


class Pair(NamedTuple):
    x: cute.Tensor
    factor: cutlass.Float32


@cute.jit
def scale_pair(pair: Pair, y: cute.Pointer, stream):
    out = cute.make_tensor(y, cute.make_layout(128))
    scale_kernel(pair.x, out, pair.factor, 0).launch(grid=[1, 1, 1], block=[128, 1, 1])


def test_tuples_and_pointers():
    x, y = torch.randn(128), torch.full((128,), NAN)
    pointer = make_ptr(cutlass.Float32, 0, cute.AddressSpace.gmem, assumed_align=4)
    fakes = [Pair(fake_argument(x), cutlass.Float32(1.0)), pointer, fake_argument(STREAM)]
    emulator = Emulator(compile_function(scale_pair, fakes, "sm_90a"))
    emulator([(x, 4.0), Pointer(y), STREAM])
    assert torch.equal(y, x * 4)
    with pytest.raises(RuntimeError, match="expected tuple size=2"):
        emulator([(x,), Pointer(y), STREAM])


def test_access_past_a_tensor_names_it_and_the_line():
    x, y = torch.randn(128), torch.zeros(64)
    with pytest.raises(
        Fault, match=r"past the end of the nearest buffer, argument 1 float32\[64\]"
    ) as e:
        run_kernel(scale, [x, y, 1.0, Const(1), STREAM])
    assert "test_emulator.py:" in str(e.value)


class GatherProblem:
    """Inputs and the expected rows of a GatheredGemm."""

    def __init__(self, tokens, depth, columns, begin, end, rows):
        generator = torch.Generator().manual_seed(tokens)
        padded = torch.randn(tokens, depth + 8, generator=generator).bfloat16()
        padded[:, depth:] = NAN  # what a copy without zero-fill brings in
        self.x = padded[:, :depth]
        self.w = torch.randn(columns, depth, generator=generator).bfloat16()
        self.index = torch.randint(0, tokens, (rows,), generator=generator, dtype=torch.int32)
        self.begin, self.end, self.shape = begin, end, (rows, columns)
        self.want = self.x[self.index[begin:end].long()].float() @ self.w.float().T

    def compile(self, mistake=None):
        arrays = [self.x, self.index, self.w, torch.zeros(self.shape).bfloat16()]
        fakes = [*map(fake_argument, arrays), 0, 1, fake_argument(STREAM)]
        return Emulator(compile_function(GatheredGemm(mistake), fakes, "sm_90a"))

    def run(self, emulator, policy, **options):
        out = torch.full(self.shape, NAN).bfloat16()
        args = [self.x, self.index, self.w, out, self.begin, self.end, STREAM]
        emulator(args, policy, **options)
        inside = out[self.begin : self.end].float()
        out[self.begin : self.end] = NAN
        assert out.isnan().all(), "wrote outside the segment"
        return inside

    def wrong(self, inside):
        """Whether the result differs from the reference by more than the rounding to bfloat16."""
        error = (inside - self.want).abs()
        return not (error <= self.want.abs() * 2**-8 + 1e-3).all()


@pytest.fixture(scope="module")
def gather_problem():
    return GatherProblem(tokens=90, depth=136, columns=72, begin=37, end=150, rows=200)


@pytest.fixture(scope="module")
def gather_emulator(gather_problem):
    return gather_problem.compile()


@pytest.mark.parametrize("seed", range(6))
def test_gathered_gemm(gather_problem, gather_emulator, seed):
    assert not gather_problem.wrong(gather_problem.run(gather_emulator, Policy(seed)))
    assert gather_emulator.machine.stats["cp.async"] and not gather_emulator.machine.warnings


@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
def test_gathered_gemm_of_another_size(gather_emulator, mode):
    problem = GatherProblem(tokens=40, depth=320, columns=8, begin=0, end=65, rows=65)
    assert not problem.wrong(problem.run(gather_emulator, Policy(3, mode)))


EXPECTED = {
    "no gather fence": r"wgmma operand read .* not followed by a fence.proxy.async.*\n?.*cp\.async",
    "no zero fill": "global cp.async read|wrong",
    "too few bytes": r"deadlock[\s\S]*pending arrivals 0/129, pending bytes -1024",
    "no store fence": r"bulk store .* not followed by a fence.proxy.async[\s\S]*stmatrix",
    "no buffer wait": "race: ",
    "no barrier wait": "race: wgmma operand read",
    "wrong swizzle": "wrong",
    "no mma wait": "race: ",
}


@pytest.mark.parametrize("mistake", GatheredGemm.MISTAKES)
def test_mistakes_in_the_gathered_gemm_are_found(gather_problem, mistake):
    emulator = gather_problem.compile(mistake)
    for seed in range(2):
        try:
            found = (
                "wrong" if gather_problem.wrong(gather_problem.run(emulator, Policy(seed))) else ""
            )
        except Fault as e:
            found = str(e)
            assert "PTX line" in found
        assert re.search(EXPECTED[mistake], found), found


def test_copies_may_be_let_through_without_a_proxy_fence(gather_problem):
    emulator = gather_problem.compile("no gather fence")
    for seed in range(3):
        inside = gather_problem.run(emulator, Policy(seed), copy_fence=False)
        assert not gather_problem.wrong(inside)


def compile_pair(mistake=None):
    fakes = [fake_argument(torch.zeros(300, 32)) for _ in range(2)]
    return Emulator(compile_function(PairCopy(mistake), [*fakes, fake_argument(STREAM)], "sm_90a"))


@pytest.mark.parametrize("rows", [128, 300])
def test_multicast_and_reduction_in_a_cluster(rows):
    emulator = compile_pair()
    src = torch.randn(rows, 32)
    for seed in range(4):
        out = torch.ones(rows, 32)
        emulator([src, out, STREAM], Policy(seed))
        torch.testing.assert_close(out, src + 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "mistake, report",
    [("no empty wait", "arrivals, more than"), ("no read wait", "race: TMA load")],
)
def test_mistakes_in_the_cluster_are_found(mistake, report):
    emulator = compile_pair(mistake)
    found = []
    for seed in range(4):
        try:
            emulator([torch.randn(300, 32), torch.ones(300, 32), STREAM], Policy(seed))
        except Fault as e:
            found.append(str(e))
    assert found and all(report in f for f in found)


def test_same_seed_same_run(gather_problem, gather_emulator):
    def run(seed):
        gather_problem.run(gather_emulator, Policy(seed))
        machine = gather_emulator.machine
        return machine.steps, machine.tick, machine.rng.random()

    assert run(5) == run(5) != run(6)


def test_illegal_tensor_map_is_refused_as_by_the_driver():
    problem = GatherProblem(tokens=8, depth=16, columns=8, begin=0, end=4, rows=4)
    problem.w = torch.zeros(8 * 16 + 1).bfloat16()[1:].view(8, 16)
    with pytest.raises(RuntimeError, match="the address is not 16-byte aligned"):
        problem.run(problem.compile(), Policy(0))


def test_wrong_dtype_is_refused_by_the_host_code(gather_emulator):
    problem = GatherProblem(tokens=8, depth=16, columns=8, begin=0, end=4, rows=4)
    problem.x = problem.x.half()
    with pytest.raises(RuntimeError, match="dtype"):
        problem.run(gather_emulator, Policy(0))


@pytest.mark.parametrize(
    "pattern, replacement",
    [
        (r"(mbarrier\.init\.shared\.b64\s+\[[^,]*,\s*)%r\d+", r"\g<1>130"),
        (r"cp\.async\.mbarrier\.arrive\.noinc[^;]*;", ""),
        (r"fence\.mbarrier_init[^;]*;", ""),
    ],
)
def test_changed_ptx_behind_the_same_host_code(gather_problem, pattern, replacement):
    emulator = gather_problem.compile()
    changed = re.sub(pattern, replacement, emulator.ptx_text)
    assert changed != emulator.ptx_text
    emulator.load(changed)
    with pytest.raises(Fault, match="deadlock|never fenced"):
        gather_problem.run(emulator, Policy(0))


def test_text_without_the_kernel_is_refused(gather_problem):
    with pytest.raises(ValueError, match="ptx_text and object_file"):
        Emulator(ptx_text="")
    emulator = gather_problem.compile()
    right = emulator.ptx_text
    with pytest.raises(PtxError, match="no kernel"):
        emulator.load("garbage")
    assert emulator.ptx_text == right
    emulator.load(right.replace(".entry ", ".entry other_"))
    with pytest.raises(PtxError, match="the host code launches .*, the PTX text has other_"):
        gather_problem.run(emulator, Policy(0))


def test_an_architecture_that_is_none_is_refused():
    arguments = [torch.ones(8), torch.ones(8), 2.0, Const(0), STREAM]
    with pytest.raises(ValueError, match="'hopper': expected one such as sm_90a, sm_100a"):
        run_kernel(scale, arguments, gpu_arch="hopper")
