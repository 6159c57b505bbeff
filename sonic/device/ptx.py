"""Single PTX instructions behind typed names, and the CuTeDSL names that move between releases."""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32
from cutlass.experimental import primitives as prims


@cute.jit
def pack_pair(low: Float32, high: Float32, dtype: cutlass.Constexpr) -> Int32:
    """Rounds two floats to nearest even and packs them in one register, ``low`` first."""
    suffix = "bf16x2" if cutlass.const_expr(dtype is BFloat16) else "f16x2"
    return cute.arch.inline_ptx(
        f"cvt.rn.{suffix}.f32 {{$w0}}, {{$r0}}, {{$r1}};",
        write_only_types=[Int32],
        read_only_args=[high, low],
    )


@cute.jit
def unpack_pair(word: Int32, dtype: cutlass.Constexpr):
    """Inverse of :func:`pack_pair`: two floats out of one register."""
    if cutlass.const_expr(dtype is BFloat16):
        low = cute.arch.inline_ptx(
            "shl.b32 {$w0}, {$r0}, 16;", write_only_types=[Float32], read_only_args=[word]
        )
        high = cute.arch.inline_ptx(
            "and.b32 {$w0}, {$r0}, 0xffff0000;", write_only_types=[Float32], read_only_args=[word]
        )
    else:
        low, high = cute.arch.inline_ptx(
            "{ .reg .b16 l, h; mov.b32 {l, h}, {$r0};"
            " cvt.f32.f16 {$w0}, l; cvt.f32.f16 {$w1}, h; }",
            write_only_types=[Float32, Float32],
            read_only_args=[word],
        )
    return low, high


@cute.jit
def exp2_approx(x: Float32) -> Float32:
    """2**x, relative error about 2**-22."""
    return cute.arch.inline_ptx(
        "ex2.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x]
    )


@cute.jit
def maximum(x: Float32, y: Float32) -> Float32:
    """max(x, y); NaN if either is NaN."""
    return cute.arch.inline_ptx(
        "max.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[x, y]
    )


@cute.jit
def minimum(x: Float32, y: Float32) -> Float32:
    """min(x, y); NaN if either is NaN."""
    return cute.arch.inline_ptx(
        "min.NaN.f32 {$w0}, {$r0}, {$r1};", write_only_types=[Float32], read_only_args=[x, y]
    )


@cute.jit
def maximum_magnitude(x: Float32, y: Float32) -> Float32:
    """max(x, |y|); the other one if one is NaN."""
    return cute.arch.inline_ptx(
        "{ .reg .f32 t; abs.f32 t, {$r1}; max.f32 {$w0}, {$r0}, t; }",
        write_only_types=[Float32],
        read_only_args=[x, y],
    )


@cute.jit
def bits_of_float(x: Float32) -> Int32:
    """The bit pattern of a float."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Int32], read_only_args=[x]
    )


@cute.jit
def float_of_bits(bits: Int32) -> Float32:
    """Inverse of :func:`bits_of_float`."""
    return cute.arch.inline_ptx(
        "mov.b32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[bits]
    )


@cute.jit
def tanh_approx(x: Float32) -> Float32:
    """tanh(x), relative error up to 2**-11."""
    return cute.arch.inline_ptx(
        "tanh.approx.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x]
    )


@cute.jit
def reciprocal_approx(x: Float32) -> Float32:
    """1/x to 1 ulp; 1/inf = 0."""
    return cute.arch.inline_ptx(
        "rcp.approx.ftz.f32 {$w0}, {$r0};", write_only_types=[Float32], read_only_args=[x]
    )


@cute.jit
def count_trailing_zeros(mask: Int32) -> Int32:
    """Index of the lowest set bit of a non-zero mask."""
    return cute.arch.inline_ptx(
        "{ .reg .b32 t; brev.b32 t, {$r0}; clz.b32 {$w0}, t; }",
        write_only_types=[Int32],
        read_only_args=[mask],
    )


@cute.jit
def keep_in_register(value):
    """The same value, in the hope that it is computed here: the part of the compiler that makes PTX
    moves nothing past it, and ptxas followed where this is used."""
    dtype = type(value)
    bits = "b64" if cutlass.const_expr(dtype.width == 64) else "b32"
    return cute.arch.inline_ptx(
        f"mov.{bits} {{$w0}}, {{$r0}};", write_only_types=[dtype], read_only_args=[value]
    )


def store_matrix_x4(pointer, words) -> None:
    """``stmatrix.x4``: four 8x8 matrices of 16-bit elements.

    Lane ``l`` addresses row ``l % 8`` of matrix ``l / 8``.
    """
    prims.stmatrix(pointer, words, prims.MMALayout.ROW)


def load_matrix_x4(pointer):
    """``ldmatrix.x4``, the inverse of :func:`store_matrix_x4`: a tuple of four registers."""
    words = prims.ldmatrix(pointer.to_llvm_ptr(), 4, prims.MMALayout.ROW)
    return tuple(words[i] for i in range(4))


def store_transposed_x4(pointer, words) -> None:
    """As :func:`store_matrix_x4`, with rows and columns of each matrix exchanged in memory."""
    prims.stmatrix(pointer, words, prims.MMALayout.COL)


def load_transposed_x4(pointer):
    """The inverse of :func:`store_transposed_x4`: a tuple of four registers."""
    words = prims.ldmatrix(pointer.to_llvm_ptr(), 4, prims.MMALayout.COL)
    return tuple(words[i] for i in range(4))


def copy_bytes_or_zero(smem_pointer, gmem_pointer, size) -> None:
    """``cp.async`` of ``size`` bytes, 0 to 16; the rest of 16 is zeros. Without any it reads
    nothing."""
    prims.cp_async_shared_global(
        smem_pointer, gmem_pointer, 16, prims.LoadCacheModifier.CG, cp_size=size
    )


def sleep(nanoseconds: int) -> None:
    """Suspends the warp for at most twice as long."""
    prims.nanosleep(nanoseconds)


def tma_load(smem_pointer, tensor_map, coordinates, barrier, multicast_mask=None) -> None:
    """Tiled TMA load; the bytes are counted on ``barrier`` of every destination CTA."""
    prims.cp_async_bulk_tensor_shared_cluster_global(
        smem_pointer, tensor_map.get_ptr(), coordinates, barrier, [], multicast_mask=multicast_mask
    )


def tma_prefetch(tensor_map, coordinates) -> None:
    """Starts bringing a tile to L2."""
    prims.cp_async_bulk_tensor_prefetch(tensor_map.get_ptr(), coordinates, [])


def tma_store(tensor_map, smem_pointer, coordinates) -> None:
    """Tiled TMA store; elements outside the tensor are dropped."""
    prims.cp_async_bulk_tensor_global_shared_cta(tensor_map.get_ptr(), smem_pointer, coordinates)


def tma_reduce_add(tensor_map, smem_pointer, coordinates) -> None:
    """Tiled TMA reduction: adds the shared-memory tile to global memory."""
    prims.cp_async_bulk_tensor_reduce(tensor_map.get_ptr(), smem_pointer, "add", coordinates)


def elect_one_lane():
    """True in exactly one lane of a converged warp."""
    return prims.elect_sync()
