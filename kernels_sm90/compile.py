"""Compiles one kernel for sm_90a; needs no GPU."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass.cute.runtime import make_fake_compact_tensor, make_fake_stream, make_fake_tensor

from kernels_sm90.gemm import GroupedGemmSm90
from kernels_sm90.tiles import supports_config
from sonic.runtime.errors import UnsupportedError
from sonic.runtime.problem import EpilogueKind, Operand, Problem, Ragged, TileConfig


def _fake(dtype, shape, align=16):
    order = tuple(reversed(range(len(shape))))
    return make_fake_compact_tensor(dtype, shape, stride_order=order, assumed_align=align)


def _fake_weight(dtype, shape):
    """``(E, rows, cols)`` with contiguous rows at any 16-byte-aligned strides."""
    strides = (cute.sym_int64(divisibility=8), cute.sym_int64(divisibility=8), 1)
    return make_fake_tensor(dtype, shape, strides, assumed_align=16)


def fake_arguments(problem: Problem, gemm: GroupedGemmSm90) -> tuple:
    """Symbolic tensors with the ranks, dtypes and alignments that ``GroupedGemmSm90`` takes."""
    rows, tokens, experts_plus_1 = cute.sym_int(), cute.sym_int(), cute.sym_int()
    eight = [cute.sym_int(divisibility=8) for _ in range(6)]
    experts = cute.sym_int()
    dtype = gemm.dtype
    kind = problem.epilogue
    a_rows = tokens if problem.gather is Operand.A else rows
    b_rows = tokens if problem.gather is Operand.B else rows
    if problem.ragged is Ragged.ROWS:
        a = _fake(dtype, (a_rows, eight[0]))
        b = _fake_weight(dtype, (experts, eight[1], eight[2]))
        has_d = kind is not EpilogueKind.ACTIVATION or problem.store_preact
        d = _fake(dtype, (rows, eight[3])) if has_d else None
    else:
        a = _fake(dtype, (a_rows, eight[0]))
        b = _fake(dtype, (b_rows, eight[1]))
        d = _fake_weight(gemm.d_dtype, (experts, eight[2], eight[3]))
    has_aux = kind in (EpilogueKind.ACTIVATION, EpilogueKind.ACTIVATION_GRAD)
    is_grad = kind is EpilogueKind.ACTIVATION_GRAD
    aux = _fake(dtype, (rows, eight[4])) if has_aux else None
    if gemm.config.split:
        aux = _fake_weight(dtype, (cute.sym_int(), eight[2], eight[3]))
    c = _fake(dtype, (rows, eight[3])) if is_grad else None
    bias = None
    if problem.has_bias:
        bias = make_fake_tensor(dtype, (experts, eight[1]), (cute.sym_int64(), 1), assumed_align=2)
    score = _fake(cutlass.Float32, (rows,), align=4) if is_grad else None
    row_sum = _fake(cutlass.Float32, (cute.sym_int(), rows), align=4) if is_grad else None
    gather = _fake(Int32, (rows,), align=4) if problem.gather is not None else None
    offsets = _fake(Int32, (experts_plus_1,), align=4)
    counter = _fake(Int32, (1,), align=4) if gemm.dynamic else None
    stream = make_fake_stream(use_tvm_ffi_env_stream=True)
    return (
        a, b, d, aux, c, bias, score, row_sum, gather, offsets, counter,
        Int64(0), Int64(0), Int32(0), stream,
    )  # fmt: skip


def compile_kernel(problem: Problem, config: TileConfig, extra_options: str = ""):
    """Compiled host function of ``GroupedGemmSm90(problem, config)``; call it without the stream.

    :raises UnsupportedError: the tiles do not fit the problem.
    """
    refusal = supports_config(problem, config)
    if refusal is not None:
        raise UnsupportedError(f"sm90 kernels do not support {refusal.reason}; {refusal.remedy}")
    gemm = GroupedGemmSm90(problem, config)
    GroupedGemmSm90.kernel.set_name_prefix(f"sonic_{problem.name}_sm90")
    options = f"--gpu-arch sm_90a --enable-tvm-ffi {extra_options}".strip()
    return cute.compile(gemm, *fake_arguments(problem, gemm), options=options)
