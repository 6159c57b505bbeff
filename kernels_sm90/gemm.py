"""Grouped GEMM for Hopper: wgmma fed by TMA and cp.async, one persistent warp-specialised kernel.

    Ragged.ROWS        D[r, n] = sum_k A[row(r), k] W[e, n, k]        for the rows r of expert e
    Ragged.REDUCTION   D[e, m, n] = sum_r A[row(r), m] B[row(r), n]   over the rows r of expert e

where ``row`` is the identity or, for the gathered operand, an index read from memory. The six GEMMs
of the layer (arXiv 2512.14080, section 4) are instances; ``sonic.device.epilogue`` says what
happens to the accumulator.

            warpgroup 0 (producer)                  warpgroups 1, 2 (math)
    tile -> TMA / cp.async -> [ A | B ] x stages -> wgmma -> registers -> epilogue -> smem -> TMA
                                                     C tile (pre-activation) -> smem ^

``swap_ab`` exchanges wgmma's operands, so that a tile has as many rows as its expert needs
(``kernels_sm90.swapped``); roles and barriers are the same.

Nothing is padded: rows past an expert's end are clipped by the store descriptor (``ragged_map``),
columns past the matrix by its bounds, and a ragged reduction reads zeros past its end.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, GridConstant, Int32, Int64
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup
from cutlass.experimental.cuda import TensorMap

from kernels_sm90.epilogue import EpilogueMixin
from kernels_sm90.mainloop import MainloopMixin
from kernels_sm90.swapped import SwappedMixin
from kernels_sm90.tile_queue import TileQueueMixin
from kernels_sm90.tiles import BLOCK_K, TILE_SLOTS, WARPGROUP, SharedMemoryPlan
from sonic.device import tensormap
from sonic.device.epilogue import make_epilogue
from sonic.device.scheduler import (
    TileOrder,
    seek_ragged_reduction,
    seek_ragged_rows,
    seek_split_reduction,
)
from sonic.runtime.problem import EpilogueKind, Operand, Problem, Ragged, Schedule, TileConfig

_DTYPES = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}


class GroupedGemmSm90(SwappedMixin, TileQueueMixin, MainloopMixin, EpilogueMixin):
    """One grouped GEMM, specialised by ``Problem`` and ``TileConfig``; sizes are run-time values.

    Roles: warpgroup 0 loads (warp 0 issues TMA; if it gathers, all four warps issue cp.async);
    warpgroups 1 and 2 multiply and run the epilogue. Every warp decodes its tiles itself, and with
    a dynamic tile order reads their numbers from a ring that warp 0 fills (``TileQueueMixin``).

    Pipelines (mbarriers in shared memory):

    ========  ==========================================  =========================================
    name      full when                                   empty when
    ========  ==========================================  =========================================
    ``ab``    1 arrival with the stage's TMA bytes, plus  1 arrival per math warp that reads it,
              1 per producer thread if it gathers         from each CTA of the cluster
    ``c``     1 arrival with the chunk's TMA bytes        the D store from the same slot has read it
    ``tile``  1 arrival of the warp that took the tile,   1 arrival per math warp and loading warp
              with a dynamic tile order only
    ========  ==========================================  =========================================

    Timeline of a CTA, tiles 1, 2, ... of an overlapped schedule (cooperative: each epilogue comes
    before the next main loop; ping-pong: tiles alternate between the two math warpgroups)::

        producer  load 1 | decode 2 | load 2 | decode 3 | load 3 ...
        math             multiply 1 | copy 1 | multiply 2, store 1 in pieces | copy 2 | multiply 3

    Registers: 168 per thread at launch; ``setmaxnreg`` then moves them from the producer to math.
    Constraints: see ``kernels_sm90.tiles.supports``.
    """

    def __init__(self, problem: Problem, config: TileConfig):
        self.problem = problem
        self.config = config
        self.epilogue = make_epilogue(problem)
        self.dtype = _DTYPES[problem.dtype]
        self.d_dtype = Float32 if self.epilogue.accumulates else self.dtype
        self.ragged_rows = problem.ragged is Ragged.ROWS
        self.gather_a = problem.gather is Operand.A
        self.gather_b = problem.gather is Operand.B
        self.a_is_k_major = self.ragged_rows
        self.b_is_k_major = self.ragged_rows and not problem.transposed_weight
        self.pingpong = config.schedule is Schedule.PINGPONG
        self.math_groups = 2
        self.overlapped = config.schedule is Schedule.OVERLAPPED
        self.rows_per_group = config.tile_m if self.pingpong else config.tile_m // self.math_groups
        self.cluster_size = config.cluster_size
        self.dynamic = config.dynamic
        self.swapped = config.swap_ab
        self.seeks_early = self.swapped and not self.pingpong
        self.smem = SharedMemoryPlan(problem, config, self.epilogue)
        self.stages = self.smem.stages
        self.threads = (1 + self.math_groups) * WARPGROUP
        self.producer_registers, self.math_registers = self._register_split()

    def _register_split(self) -> tuple[int, int]:
        """Registers per thread of the producer and of math; ``p + 2 m`` is at most 504."""
        if self.problem.gather is None:
            return 40, 232
        accumulators = self.rows_per_group * self.config.tile_n // WARPGROUP
        light = accumulators <= 128 and self.epilogue.c_blocks == 0
        return (72, 216) if light else (56, 224)

    @cute.jit
    def __call__(
        self,
        a: cute.Tensor,
        b: cute.Tensor,
        d: cute.Tensor,
        aux: cute.Tensor,
        c: cute.Tensor,
        bias: cute.Tensor,
        score: cute.Tensor,
        row_sum: cute.Tensor,
        gather: cute.Tensor,
        offset_by_expert: cute.Tensor,
        tile_counter: cute.Tensor,
        pair_stride: Int64,
        unit_stride: Int64,
        num_ctas: Int32,
        stream,
    ):
        """Builds the descriptors and launches; absent tensors are ``None``.

        :param a, b, d: operands and output as :class:`Problem` describes them.
        :param aux: ``(R, I)`` second output; of a split reduction ``(P, rows, cols)`` like ``d``:
        a part of an expert has at most ``ceil(R / (P + 1))`` rows, the first one is stored to
        ``d``, and one that begins in the block ``i`` of so many rows to ``aux[i - 1]``.
        :param c: ``(R, N)`` pre-activation that the epilogue
        reads.
        :param bias: ``(E, rows of the weight)``. :param score: ``(R,)`` float32.
        :param row_sum: ``(ceil(N / row_sum_columns), R)`` float32 partial sums.
        :param gather: ``(R,)`` int32. :param offset_by_expert: ``(E + 1,)`` int32.
        :param pair_stride, unit_stride: element strides of gate -> up and of unit -> next unit.
        :param num_ctas: grid size, a multiple of the cluster size.
        """
        config, problem = self.config, self.problem
        gated = problem.gated_rows
        rows_box, d_box, aux_box = self.output_boxes()
        a_map, b_map, c_map, d_map, aux_map = None, None, None, None, None
        if cutlass.const_expr(self.ragged_rows):
            if cutlass.const_expr(not self.gather_a):
                a_map = tensormap.rows_map(a, BLOCK_K, self.rows_per_load())
            b_box_rows = (config.tile_n if self.b_is_k_major else BLOCK_K) // config.cluster_m
            b_map = tensormap.weight_map(b, BLOCK_K, b_box_rows, gated, pair_stride, unit_stride)
            if cutlass.const_expr(self.epilogue.d_blocks > 0):
                d_map = tensormap.ragged_map(d, d_box, rows_box)
            if cutlass.const_expr(self.epilogue.aux_blocks > 0):
                aux_map = tensormap.ragged_map(aux, aux_box, rows_box)
            if cutlass.const_expr(self.epilogue.c_blocks > 0):
                c_map = tensormap.ragged_map(c, d_box, rows_box)
        else:
            if cutlass.const_expr(not self.gather_a):
                a_map = tensormap.ragged_map(a, BLOCK_K, BLOCK_K // config.cluster_n)
            if cutlass.const_expr(not self.gather_b):
                b_map = tensormap.ragged_map(b, BLOCK_K, BLOCK_K // config.cluster_m)
            d_map = tensormap.weight_map(d, d_box, rows_box, gated, pair_stride, unit_stride)
            if cutlass.const_expr(config.split):
                aux_map = tensormap.weight_map(
                    aux, d_box, rows_box, gated, pair_stride, unit_stride
                )
        gathered = a if cutlass.const_expr(self.gather_a) else b
        if cutlass.const_expr(problem.gather is None):
            gathered = None
        if cutlass.const_expr(self.ragged_rows):
            m, k = Int32(0), Int32(a.shape[1])
            n = Int32(b.shape[1] if self.b_is_k_major else b.shape[2])
        else:
            m, n, k = Int32(a.shape[1]), Int32(b.shape[1]), Int32(0)
            if cutlass.const_expr(config.split):
                rows = (b if cutlass.const_expr(self.gather_a) else a).shape[0]
                k = Int32(cute.ceil_div(rows, aux.shape[0] + 1))
        bias_unit = Int32(0)
        bias_pair = Int32(0)
        if cutlass.const_expr(problem.has_bias and gated):
            bias_unit = Int32(unit_stride // b.stride[1])
            bias_pair = Int32(pair_stride // b.stride[1])
        self.kernel(
            a_map, b_map, c_map, d_map, aux_map, gathered, gather, bias, score, row_sum,
            offset_by_expert, tile_counter, m, n, k, bias_unit, bias_pair,
        ).launch(
            grid=[num_ctas, 1, 1],
            block=[self.threads, 1, 1],
            cluster=[self.cluster_size, 1, 1],
            smem=self.smem.total_bytes,
            min_blocks_per_mp=1,
            stream=stream,
            use_pdl=True,
        )  # fmt: skip

    @cute.kernel
    def kernel(
        self,
        a_map: GridConstant[TensorMap],
        b_map: GridConstant[TensorMap],
        c_map: GridConstant[TensorMap],
        d_map: GridConstant[TensorMap],
        aux_map: GridConstant[TensorMap],
        gathered: cute.Tensor,
        gather: cute.Tensor,
        bias: cute.Tensor,
        score: cute.Tensor,
        row_sum: cute.Tensor,
        offset_by_expert: cute.Tensor,
        tile_counter: cute.Tensor,
        m: Int32,
        n: Int32,
        k: Int32,
        bias_unit: Int32,
        bias_pair: Int32,
    ):
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        group = warp // 4
        smem = self._allocate()
        self._init_barriers(smem, warp)
        self._wait_for_earlier_launches()
        sizes = (m, n, k)
        if group == 0:
            cute.arch.setmaxregister_decrease(self.producer_registers)
            self.produce(
                a_map, b_map, gathered, gather, offset_by_expert, tile_counter, sizes, smem, warp
            )
        else:
            cute.arch.setmaxregister_increase(self.math_registers)
            self.consume(
                (c_map, d_map, aux_map), (bias, score, row_sum), offset_by_expert, sizes,
                (bias_unit, bias_pair), smem, warp, group - 1,
            )  # fmt: skip
        if cutlass.const_expr(self.cluster_size > 1):
            # A peer may still send bytes and arrivals to this CTA's shared memory until it is done
            # too.
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    def _wait_for_earlier_launches(self):
        """Waits until all launches ahead in the stream have ended and their memory can be read.

        The launch may overlap the one before it (programmatic dependent launch): what precedes this
        runs while that one ends, and so touches parameters and shared memory only. Nearly every
        warp goes on to access global memory, so all threads wait, before the roles part. Offsets,
        gather indices and the zeroed counter are outputs of earlier launches as operands are, and
        outputs may take memory of a tensor that an earlier launch still reads: the caching
        allocator hands it on in the order of the stream. Of the launches ahead, each has waited
        likewise or was not started until the one before it had ended, so the last one is enough.

        No CTA lets the next launch start (``griddepcontrol.launch_dependents``). That one, even if
        it is a kernel of others that stores before it waits, starts once all CTAs of this one have
        exited, and takes no SM from those that are still to come. Starts any earlier lost up to 3%
        of a layer (README).
        """
        cute.arch.griddepcontrol_wait()

    def stored_unchanged(self):
        """The output's type if the epilogue stores accumulator plus bias, else ``None``."""
        return self.dtype if self.problem.epilogue is EpilogueKind.LINEAR else None

    def _allocate(self):
        """Base of the shared memory; :class:`SharedMemoryPlan` has the offsets."""
        return cute.arch.get_dyn_smem(cutlass.Uint8, alignment=1024)

    def barrier(self, smem, offset, index):
        """Pointer to the mbarrier ``index`` of the array at byte ``offset``."""
        return cute.recast_ptr(smem + (offset + index * 8), dtype=Int64)

    @cute.jit
    def _init_barriers(self, smem, warp: Int32):
        """Arrival counts of the class docstring's table."""
        plan = self.smem
        if warp == 0:
            with cute.arch.elect_one():
                full_arrivals = 1 + (WARPGROUP if self.problem.gather is not None else 0)
                reading_warps = 4 if self.pingpong else 4 * self.math_groups
                for stage in cutlass.range_constexpr(self.stages):
                    cute.arch.mbarrier_init(self.barrier(smem, plan.full, stage), full_arrivals)
                    cute.arch.mbarrier_init(
                        self.barrier(smem, plan.empty, stage), reading_warps * self.cluster_size
                    )
                for slot in cutlass.range_constexpr(plan.c_slots):
                    cute.arch.mbarrier_init(self.barrier(smem, plan.c_full, slot), 1)
                if cutlass.const_expr(self.dynamic):
                    warps = 4 * self.math_groups + (4 if self.problem.gather is not None else 1)
                    for slot in cutlass.range_constexpr(TILE_SLOTS):
                        cute.arch.mbarrier_init(self.barrier(smem, plan.tile_full, slot), 1)
                        cute.arch.mbarrier_init(self.barrier(smem, plan.tile_empty, slot), warps)
        cute.arch.mbarrier_init_fence()
        if cutlass.const_expr(self.cluster_size > 1):
            cute.arch.cluster_arrive_relaxed()
            cute.arch.cluster_wait()
        else:
            cute.arch.sync_threads()

    def tile_counts(self, sizes):
        """Cluster tiles of one expert, or of one of its parts, along M (ragged reduction only) and
        along N."""
        m, n, _ = sizes
        config = self.config
        tiles_n = cute.ceil_div(n, config.tile_n * config.cluster_n)
        if self.ragged_rows:
            return Int32(0), tiles_n
        return cute.ceil_div(m, config.tile_m * config.cluster_m), tiles_n

    @cute.jit
    def seek(self, tile: Int32, cursor, offset_by_expert: cute.Tensor, sizes):
        """Cursor at ``tile``; see ``sonic.device.scheduler``."""
        counts = self.tile_counts(sizes)
        num_experts = Int32(offset_by_expert.shape[0] - 1)
        if cutlass.const_expr(self.ragged_rows):
            rows = self.config.tile_m * self.config.cluster_m
            result = seek_ragged_rows(tile, cursor, offset_by_expert, num_experts, counts[1], rows)
        elif cutlass.const_expr(self.config.split):
            tiles = counts[0] * counts[1]
            result = seek_split_reduction(
                tile, cursor, offset_by_expert, num_experts, tiles, sizes[2]
            )
        else:
            result = seek_ragged_reduction(
                tile, cursor, offset_by_expert, num_experts, counts[0] * counts[1]
            )
        return result

    @cute.jit
    def locate(self, tile: Int32, cursor, counts):
        """``(first row, first column)`` of this CTA's tile inside its expert."""
        config = self.config
        _, first, tiles, _, _ = cursor
        height = self.tile_height(cursor, counts)
        tiles_m = counts[0]
        if cutlass.const_expr(self.ragged_rows):
            tiles_m = tiles // counts[1]
        m, n = TileOrder(config.raster_along_m).coordinates(tile - first, tiles_m, counts[1])
        rank = cute.arch.block_idx_in_cluster()
        if cutlass.const_expr(config.cluster_m > 1):
            m = m * config.cluster_m + rank
        if cutlass.const_expr(config.cluster_n > 1):
            n = n * config.cluster_n + rank
        return m * height, n * config.tile_n

    @cute.jit
    def k_tiles(self, cursor, sizes) -> Int32:
        """Number of pipeline stages that one tile of the cursor's expert consumes."""
        extent = sizes[2]
        if cutlass.const_expr(not self.ragged_rows):
            extent = cursor[4] - cursor[3]
        return (extent + BLOCK_K - 1) // BLOCK_K

    def cluster_position(self):
        """``(index of this cluster, number of clusters)``."""
        block, _, _ = cute.arch.block_idx()
        blocks, _, _ = cute.arch.grid_dim()
        return block // self.cluster_size, blocks // self.cluster_size

    def major(self, is_k_major):
        return OperandMajorMode.K if is_k_major else OperandMajorMode.MN

    def smem_layout(self, extent: int, stage_extent: int, is_k_major: bool):
        """Layout ``(extent, BLOCK_K, stages)`` of a 128-byte-swizzled operand.

        Slabs of 64 contiguous elements by 64 of the other axis; a stage holds ``stage_extent`` rows
        or columns, of which a warpgroup may read ``extent``.
        """
        kinds = warpgroup.SmemLayoutAtomKind
        kind = kinds.K_SW128 if is_k_major else kinds.MN_SW128
        atom = warpgroup.make_smem_layout_atom(kind, self.dtype)
        order = (0, 1) if is_k_major else (1, 0)
        tile = cute.tile_to_shape(atom, (extent, BLOCK_K), order)
        staged = cute.append(
            tile.outer, cute.make_layout(self.stages, stride=stage_extent * BLOCK_K)
        )
        return tile.inner, staged
