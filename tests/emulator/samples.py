"""Small Hopper kernels for the emulator's tests; each can be built with one mistake in it.

`GatheredGemm`: `out[r] = x[index[r]] @ w^T` for the rows r of one segment, K-tile after K-tile:
cp.async gathers rows into 128-byte-swizzled shared memory, TMA loads the weight, wgmma multiplies,
stmatrix and a ragged TMA store write. `PairCopy`: a cluster of two CTAs; each loads half of a tile
for both (multicast) and adds it to the output (TMA reduce).
"""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import BFloat16, Float32, GridConstant, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.experimental import primitives as prims
from cutlass.experimental.cuda import TensorMap, TensorMapSwizzle, create_tensor_map_tiled

BIG = 1 << 30
TILE = 64  # rows, columns and depth of the tile, and elements of a 128-byte row
ROW_BYTES = 128
TILE_BYTES = TILE * ROW_BYTES
BARRIERS, A, B, D = 0, 1024, 1024 + TILE_BYTES, 1024 + 2 * TILE_BYTES
SMEM_BYTES = D + TILE_BYTES
THREADS = 128


def matrix_map(tensor, box_rows=TILE):
    """Descriptor of a (rows, cols) matrix, boxes of 64 columns."""
    rows, cols = tensor.shape
    width = tensor.element_type.width // 8
    return create_tensor_map_tiled(
        tensor.iterator.toint(),
        tensor.element_type,
        [Int32(cols), Int32(rows)],
        [Int64(cols) * width // 16],
        [ROW_BYTES // width, box_rows],
        swizzle=TensorMapSwizzle.s128b,
    )


def segment_map(tensor):
    """Descriptor of a (rows, cols) matrix whose row bound can be any segment's end.

    Two more dimensions of strides 2**34 - s and s (s: bytes of a row) cancel modulo 2**64 at the
    coordinates (column, BIG - length + i, BIG, end), and the row coordinate is inside exactly if i
    < length.
    """
    rows, cols = tensor.shape
    stride = Int64(cols) * 2 // 16
    return create_tensor_map_tiled(
        tensor.iterator.toint(),
        tensor.element_type,
        [Int32(cols), Int32(BIG), Int32(2 * BIG - 1), Int32(2 * BIG - 1)],
        [stride, Int64((1 << 34) // 16) - stride, stride],
        [TILE, TILE, 1, 1],
        swizzle=TensorMapSwizzle.s128b,
    )


def tma_load(pointer, tensor_map, coordinates, barrier, mask=None):
    prims.cp_async_bulk_tensor_shared_cluster_global(
        pointer, tensor_map.get_ptr(), coordinates, barrier, [], multicast_mask=mask
    )


class GatheredGemm:
    """One CTA of 128 threads a 64-column slice of the output; `mistake` names what to get wrong."""

    MISTAKES = (
        "no gather fence",
        "no zero fill",
        "too few bytes",
        "no store fence",
        "no buffer wait",
        "no barrier wait",
        "wrong swizzle",
        "no mma wait",
    )

    def __init__(self, mistake=None):
        if mistake not in (None, *self.MISTAKES):
            raise ValueError(mistake)
        self.mistake = mistake

    @cute.jit
    def __call__(
        self,
        x: cute.Tensor,
        index: cute.Tensor,
        w: cute.Tensor,
        out: cute.Tensor,
        begin: Int32,
        end: Int32,
        stream,
    ):
        self.kernel(matrix_map(w), segment_map(out), x, index, begin, end).launch(
            grid=[cute.ceil_div(end - begin, TILE), cute.ceil_div(w.shape[0], TILE), 1],
            block=[THREADS, 1, 1],
            smem=SMEM_BYTES,
            stream=stream,
        )

    @cute.kernel
    def kernel(
        self,
        w_map: GridConstant[TensorMap],
        out_map: GridConstant[TensorMap],
        x: cute.Tensor,
        index: cute.Tensor,
        begin: Int32,
        end: Int32,
    ):
        thread = cute.arch.thread_idx()[0]
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        row0, col0 = cute.arch.block_idx()[0] * TILE, cute.arch.block_idx()[1] * TILE
        smem = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024)
        full = cute.recast_ptr(smem + BARRIERS, dtype=Int64)
        if thread == 0:
            cute.arch.mbarrier_init(full, THREADS + 1)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()

        mma = sm90.make_trivial_tiled_mma(
            BFloat16,
            BFloat16,
            OperandMajorMode.K,
            OperandMajorMode.K,
            Float32,
            (1, 1, 1),
            (TILE, TILE),
        )
        acc = cute.make_rmem_tensor(mma.get_slice(0).partition_shape_C((TILE, TILE)), Float32)
        acc.fill(0.0)
        mma.set(warpgroup.Field.ACCUMULATE, True)
        a_operand = mma.make_fragment_A(mma.get_slice(0).partition_A(self.operand(smem + A)))
        b_operand = mma.make_fragment_B(mma.get_slice(0).partition_B(self.operand(smem + B)))

        depth = x.shape[1]
        phase = Int32(0)
        for k_tile in cutlass.range(cute.ceil_div(depth, TILE), unroll=1):
            k = k_tile * TILE
            if warp == 0:
                if prims.elect_sync():
                    bytes_ = TILE_BYTES - (1024 if self.mistake == "too few bytes" else 0)
                    cute.arch.mbarrier_arrive_and_expect_tx(full, bytes_)
                    tma_load(smem + B, w_map, [k, col0], full)
            self.gather(x, index, smem + A, begin + row0, end, k, thread)
            cute.arch.cp_async_mbarrier_arrive_noinc(full)
            if cutlass.const_expr(self.mistake != "no barrier wait"):
                cute.arch.mbarrier_wait(full, phase)
            phase = phase ^ 1
            if cutlass.const_expr(self.mistake != "no gather fence"):
                cute.arch.fence_view_async_shared()
            warpgroup.fence()
            for block in cutlass.range_constexpr(TILE // 16):
                cute.gemm(mma, acc, a_operand[None, None, block], b_operand[None, None, block], acc)
            warpgroup.commit_group()
            if cutlass.const_expr(self.mistake != "no mma wait"):
                warpgroup.wait_group(0)
            if cutlass.const_expr(self.mistake != "no buffer wait"):
                cute.arch.sync_threads()
        if cutlass.const_expr(self.mistake == "no mma wait"):
            warpgroup.wait_group(0)
        self.store(acc, smem + D, thread)
        if cutlass.const_expr(self.mistake != "no store fence"):
            cute.arch.fence_view_async_shared()
        cute.arch.sync_threads()
        if warp == 0:
            if prims.elect_sync():
                coordinates = [col0, BIG - (end - begin) + row0, BIG, end]
                prims.cp_async_bulk_tensor_global_shared_cta(
                    out_map.get_ptr(), smem + D, coordinates
                )
                cute.arch.cp_async_bulk_commit_group()
                cute.arch.cp_async_bulk_wait_group(0, read=True)

    def operand(self, pointer):
        """A 64 x 64 K-major operand in 128-byte-swizzled shared memory."""
        atom = warpgroup.make_smem_layout_atom(warpgroup.SmemLayoutAtomKind.K_SW128, BFloat16)
        layout = cute.tile_to_shape(atom, (TILE, TILE), (0, 1))
        return cute.make_tensor(
            cute.recast_ptr(pointer, layout.inner, dtype=BFloat16), layout.outer
        )

    @cute.jit
    def gather(self, x, index, pointer, first, end, k, thread):
        """Each thread copies 16 bytes of four rows, zeros past the segment and the matrix."""
        piece = thread % 8
        for i in cutlass.range_constexpr(TILE // 16):
            row = thread // 8 + 16 * i
            valid = (first + row < end) & (k + piece * 8 < x.shape[1])
            token = Int32(0)
            if first + row < end:
                token = index[first + row]
            size = Int32(16) if valid else Int32(0)
            if cutlass.const_expr(self.mistake == "no zero fill"):
                size = Int32(16)
            chunk = (
                piece if cutlass.const_expr(self.mistake == "wrong swizzle") else piece ^ (row & 7)
            )
            prims.cp_async_shared_global(
                pointer + (row * ROW_BYTES + (chunk << 4)),
                x.iterator + (Int64(token) * x.stride[0] + k + piece * 8),
                16,
                prims.LoadCacheModifier.CG,
                cp_size=size,
            )

    @cute.jit
    def store(self, acc, pointer, thread):
        """Accumulators to swizzled shared memory, four 8x8 matrices a stmatrix."""
        lane, warp = thread % 32, thread // 32
        row = warp * 16 + lane % 16
        for i in cutlass.range_constexpr(TILE // 16):
            words = []
            for j in cutlass.range_constexpr(4):
                pair = [acc[8 * i + 2 * j], acc[8 * i + 2 * j + 1]]
                words.append(
                    cute.arch.inline_ptx(
                        "cvt.rn.bf16x2.f32 {$w0}, {$r0}, {$r1};",
                        write_only_types=[Int32],
                        read_only_args=[pair[1], pair[0]],
                    )
                )
            chunk = (2 * i + lane // 16) ^ (row & 7)
            prims.stmatrix(pointer + (row * ROW_BYTES + (chunk << 4)), words, prims.MMALayout.ROW)


class PairCopy:
    """`out += src` of (rows, 32) float32 matrices by clusters of two CTAs and 64-row tiles.

    CTA r of a pair loads its half of tile 2*i for both, then of tile 2*i+1; it adds tile 2*i + r to
    the output. Before a CTA loads the second tile into the buffer, both must have said that they
    are done with the first.
    """

    def __init__(self, mistake=None):
        self.mistake = mistake

    @cute.jit
    def __call__(self, src: cute.Tensor, out: cute.Tensor, stream):
        tiles = cute.ceil_div(src.shape[0], TILE)
        self.kernel(matrix_map(src, TILE // 2), matrix_map(out, TILE)).launch(
            grid=[(tiles + 1) // 2 * 2, 1, 1],
            block=[64, 1, 1],
            cluster=[2, 1, 1],
            smem=1024 + TILE_BYTES,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, src_map: GridConstant[TensorMap], out_map: GridConstant[TensorMap]):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        rank = cute.arch.block_idx_in_cluster()
        first = cute.arch.block_idx()[0] // 2 * 2
        smem = cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024)
        full = cute.recast_ptr(smem, dtype=Int64)
        empty = cute.recast_ptr(smem + 8, dtype=Int64)
        if cute.arch.thread_idx()[0] == 0:
            cute.arch.mbarrier_init(full, 1)
            cute.arch.mbarrier_init(empty, 2)
        cute.arch.mbarrier_init_fence()
        cute.arch.cluster_arrive_relaxed()
        cute.arch.cluster_wait()
        half = TILE_BYTES // 2
        if warp == 0:
            for turn in cutlass.range_constexpr(2):
                if cutlass.const_expr(turn == 1 and self.mistake != "no empty wait"):
                    cute.arch.mbarrier_wait(empty, 0)
                if prims.elect_sync():
                    cute.arch.mbarrier_arrive_and_expect_tx(full, TILE_BYTES)
                    row = (first + turn) * TILE + rank * (TILE // 2)
                    mask = cutlass.Int16(3)
                    tma_load(smem + 1024 + rank * half, src_map, [0, row], full, mask)
        else:
            for turn in cutlass.range_constexpr(2):
                cute.arch.mbarrier_wait(full, turn)
                if rank == turn:
                    if prims.elect_sync():
                        at = [0, (first + turn) * TILE]
                        prims.cp_async_bulk_tensor_reduce(out_map.get_ptr(), smem + 1024, "add", at)
                        cute.arch.cp_async_bulk_commit_group()
                        if cutlass.const_expr(turn == 1 or self.mistake != "no read wait"):
                            cute.arch.cp_async_bulk_wait_group(0, read=True)
                if cutlass.const_expr(turn == 0):
                    cute.arch.sync_warp()
                    if cute.arch.lane_idx() < 2:
                        cute.arch.mbarrier_arrive(empty, cute.arch.lane_idx())
        # No last cluster barrier: a CTA that has seen both phases of `full` and the one of `empty`
        # has everything that its peer sends it.
