"""Loads and matrix multiplies of the Hopper grouped GEMM (mixin of ``GroupedGemmSm90``)."""

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import warpgroup

from kernels_sm90.accumulator import saved_accumulator
from kernels_sm90.tiles import BLOCK_K, WARPGROUP, pieces_alternate
from sonic.device.gather import GatherMajorColumns, GatherMajorRows
from sonic.device.ptx import elect_one_lane, tma_load
from sonic.device.scheduler import start_cursor
from sonic.device.tensormap import ragged_coordinates, weight_coordinates

SWIZZLE_ROW_BYTES = 128
_PAUSE_OF_COLUMNS, _PAUSE_OF_ROWS = 16, 8  # nanoseconds: see ``sonic.device.gather``
TURN_NAMED_BARRIER = 3  # and 4: one per math warpgroup; 1 and 2 belong to the epilogue


class MainloopMixin:
    """The producer's and the math warpgroups' side of the A/B ring."""

    @cute.jit
    def produce(
        self,
        a_map,
        b_map,
        gathered,
        gather,
        offset_by_expert: cute.Tensor,
        tile_counter: cute.Tensor,
        sizes,
        smem,
        warp: Int32,
    ):
        """Producer warpgroup: fills A/B stages tile after tile."""
        operands = (a_map, b_map, gathered, gather)
        if cutlass.const_expr(self.problem.gather is not None):
            self._produce_tiles(operands, offset_by_expert, tile_counter, sizes, smem, warp)
        elif warp == 0:
            self._produce_tiles(operands, offset_by_expert, tile_counter, sizes, smem, warp)

    @cute.jit
    def _produce_tiles(
        self, operands, offset_by_expert: cute.Tensor, tile_counter: cute.Tensor, sizes, smem,
        warp: Int32,
    ):  # fmt: skip
        a_map, b_map, gathered, gather = operands
        plan = self.smem
        num_experts = Int32(offset_by_expert.shape[0] - 1)
        tile, _ = self.cluster_position()
        loader = self._make_loader(gathered, gather, sizes)
        stage, phase = Int32(0), Int32(1)
        turn, taken = Int32(0), Int32(0)
        if cutlass.const_expr(self.dynamic):
            if warp == 0:
                taken = self.take_tile(tile_counter)
        ahead = self._decode(tile, start_cursor(), offset_by_expert, sizes, loader)
        while ahead[0][0] < num_experts:
            cursor, row, col, state = ahead
            expert, _, _, begin, end = cursor
            k_tiles = self.k_tiles(cursor, sizes)
            height = self.tile_height(cursor, self.tile_counts(sizes))
            if k_tiles == 0:
                tile, turn, taken, ahead = self._look_ahead(
                    (tile, turn, taken), tile_counter, cursor, offset_by_expert, sizes, loader,
                    smem, warp,
                )  # fmt: skip
            if cutlass.const_expr(loader is not None):
                state = loader.begin_tile(state)
            for k_tile in cutlass.range(k_tiles, unroll=1):
                k = k_tile * BLOCK_K
                full = self.barrier(smem, plan.full, stage)
                if cutlass.const_expr(loader is not None):
                    state = loader.prepare(state, k)
                cute.arch.mbarrier_wait(self.barrier(smem, plan.empty, stage), phase)
                if warp == 0:
                    if elect_one_lane():
                        cute.arch.mbarrier_arrive_and_expect_tx(full, self._tma_bytes(height))
                        self.load_a(a_map, smem, stage, full, begin, end, row, k, height)
                        self._load_b(b_map, smem, stage, full, expert, begin, end, col, k)
                if cutlass.const_expr(loader is not None):
                    destination = smem + self._gathered_offset(stage)
                    loader.load(state, destination, k, height)
                    cute.arch.cp_async_mbarrier_arrive_noinc(full)
                stage = stage + 1
                if stage == self.stages:
                    stage = Int32(0)
                    phase = phase ^ 1
                if k_tile == 0:
                    # Decoding the next tile reads memory: here it hides behind a full ring.
                    tile, turn, taken, ahead = self._look_ahead(
                        (tile, turn, taken), tile_counter, cursor, offset_by_expert, sizes, loader,
                        smem, warp,
                    )  # fmt: skip

    @cute.jit
    def _look_ahead(
        self, queue, tile_counter, cursor, offset_by_expert: cute.Tensor, sizes, loader, smem,
        warp: Int32,
    ):  # fmt: skip
        """The next tile of this CTA: ``(tile, turn, tile taken after it, its decoding)``."""
        tile, turn, taken = queue
        if cutlass.const_expr(self.dynamic):
            if warp == 0:
                taken = self.publish_tile(tile_counter, taken, turn, smem)
        _, tile_step = self.cluster_position()
        tile, turn = self.next_tile(tile, tile_step, turn, smem)
        return tile, turn, taken, self._decode(tile, cursor, offset_by_expert, sizes, loader)

    @cute.jit
    def _decode(self, tile: Int32, cursor, offset_by_expert: cute.Tensor, sizes, loader):
        """``(cursor, first row, first column, loader state)`` of a tile that is not started yet."""
        counts = self.tile_counts(sizes)
        cursor = self.seek(tile, cursor, offset_by_expert, sizes)
        row, col = self.locate(tile, cursor, counts)
        state = ()
        if cutlass.const_expr(loader is not None):
            state = loader.look_ahead(cursor[3], cursor[4], row if self.gather_a else col)
        return cursor, row, col, state

    def _gathered_offset(self, stage):
        plan = self.smem
        if self.gather_a:
            return plan.a + stage * plan.a_bytes
        return plan.b + stage * plan.b_bytes

    def _make_loader(self, gathered, gather, sizes):
        """The cp.async loader of the gathered operand, or ``None``."""
        if self.problem.gather is None:
            return None
        extent = self.config.tile_m if self.gather_a else self.config.tile_n
        thread = cute.arch.thread_idx()[0]
        # Beside the long epilogue of dH they cost more than they gain.
        paused = self.overlapped and not self.epilogue.c_blocks
        if self.ragged_rows:
            pause = _PAUSE_OF_COLUMNS if paused else 0
            return GatherMajorColumns(gathered, gather, thread, WARPGROUP, extent, sizes[2], pause)
        columns = sizes[0] if self.gather_a else sizes[1]
        pause = _PAUSE_OF_ROWS if paused else 0
        return GatherMajorRows(gathered, gather, thread, WARPGROUP, extent, BLOCK_K, columns, pause)

    def _tma_bytes(self, height):
        """Bytes that TMA brings to this CTA per stage, its peers' shares included."""
        a_bytes = 0 if self.gather_a else self.a_bytes(height)
        b_bytes = 0 if self.gather_b else self.smem.b_bytes
        return a_bytes + b_bytes

    def a_bytes(self, height):
        """Bytes of a stage of A, however many rows the tile has."""
        return self.smem.a_bytes

    def tile_height(self, cursor, counts):
        """Rows of a tile of the cursor's expert, of the last one at most."""
        return self.config.tile_m

    def rows_per_load(self) -> int:
        """Rows of A, one of several CTAs' share, that a TMA instruction loads."""
        return self.config.tile_m // self.config.cluster_n

    def _share(self, ctas: int):
        """``(this CTA's share of a multicast operand, CTA mask)`` for ``ctas`` receivers."""
        if ctas == 1:
            return Int32(0), None
        return cute.arch.block_idx_in_cluster(), cutlass.Int16((1 << ctas) - 1)

    @cute.jit
    def load_a(self, a_map, smem, stage, full, begin, end, row, k, height):
        if cutlass.const_expr(not self.gather_a):
            config = self.config
            share, mask = self._share(config.cluster_n)
            base = smem + (self.smem.a + stage * self.smem.a_bytes)
            if cutlass.const_expr(self.ragged_rows):
                rows = self.rows_per_load()
                tma_load(
                    base + share * (rows * SWIZZLE_ROW_BYTES),
                    a_map,
                    [k, begin + row + share * rows],
                    full,
                    mask,
                )
            else:
                self._load_slabs(a_map, base, full, config.tile_m, share, mask, begin, end, row, k,
                                 config.cluster_n)  # fmt: skip

    @cute.jit
    def _load_b(self, b_map, smem, stage, full, expert, begin, end, col, k):
        if cutlass.const_expr(not self.gather_b):
            config = self.config
            gated = self.problem.gated_rows
            share, mask = self._share(config.cluster_m)
            base = smem + (self.smem.b + stage * self.smem.b_bytes)
            if cutlass.const_expr(not self.ragged_rows):
                self._load_slabs(b_map, base, full, config.tile_n, share, mask, begin, end, col, k,
                                 config.cluster_m)  # fmt: skip
            elif cutlass.const_expr(self.b_is_k_major):
                rows = config.tile_n // config.cluster_m
                tma_load(
                    base + share * (rows * SWIZZLE_ROW_BYTES),
                    b_map,
                    weight_coordinates(k, col + share * rows, expert, gated),
                    full,
                    mask,
                )
            else:
                rows = BLOCK_K // config.cluster_m
                for slab in cutlass.range_constexpr(config.tile_n // BLOCK_K):
                    tma_load(
                        base + (slab * BLOCK_K + share * rows) * SWIZZLE_ROW_BYTES,
                        b_map,
                        weight_coordinates(col + slab * BLOCK_K, k + share * rows, expert, gated),
                        full,
                        mask,
                    )

    def _load_slabs(self, tensor_map, base, full, extent, share, mask, begin, end, first, k, ctas):
        """A column-contiguous operand of a ragged reduction: slabs of 64 columns by 64 rows."""
        rows = BLOCK_K // ctas
        for slab in range(extent // BLOCK_K):
            column = first + slab * BLOCK_K
            coordinates = ragged_coordinates(column, k + share * rows, begin, end)
            offset = (slab * BLOCK_K + share * rows) * SWIZZLE_ROW_BYTES
            tma_load(base + offset, tensor_map, coordinates, full, mask)

    @cute.jit
    def consume(
        self, maps, vectors, offset_by_expert: cute.Tensor, sizes, bias_strides, smem, warp: Int32,
        group: Int32,
    ):  # fmt: skip
        """Math warpgroup: multiplies its tiles and stores them.

        :param maps: descriptors ``(C, D, Aux)``. :param vectors: ``(bias, score, row_sum)``.
        """
        if cutlass.const_expr(self.overlapped):
            self._consume_overlapped(
                maps, vectors, offset_by_expert, sizes, bias_strides, smem, warp, group
            )
        else:
            self._consume_in_order(
                maps, vectors, offset_by_expert, sizes, bias_strides, smem, warp, group
            )
        self.drain_stores(warp)

    @cute.jit
    def _consume_in_order(
        self, maps, vectors, offset_by_expert: cute.Tensor, sizes, bias_strides, smem, warp: Int32,
        group: Int32,
    ):  # fmt: skip
        """Stores each tile before the next one is multiplied."""
        counts = self.tile_counts(sizes)
        num_experts = Int32(offset_by_expert.shape[0] - 1)
        tile, tile_step = self.cluster_position()
        operands, accumulator = self.make_mma(smem, group)
        position = Int32(0)  # stages that earlier tiles consumed, the other warpgroup's too
        chunk, turn = Int32(0), Int32(0)
        cursor = self.seek(tile, start_cursor(), offset_by_expert, sizes)
        if cutlass.const_expr(self.pingpong):
            if group == 1:
                self._pass_turn(group)
                position = self.k_tiles(cursor, sizes)
                if cursor[0] < num_experts:
                    tile, turn = self.next_tile(tile, tile_step, turn, smem)
                    cursor = self.seek(tile, cursor, offset_by_expert, sizes)
        while cursor[0] < num_experts:
            row, col = self.locate(tile, cursor, counts)
            context = self.own_share((cursor, row, col, sizes), group)
            self.prefetch_c(maps[0], context, smem, warp, group, chunk)
            k_tiles = self.k_tiles(cursor, sizes)
            if cutlass.const_expr(self.seeks_early):
                tile, turn, following, consumed = self._seek_next(
                    (tile, turn, cursor), tile_step, k_tiles, offset_by_expert, sizes, smem
                )
            if cutlass.const_expr(self.pingpong):
                # A stage's barrier tells even from odd fills only, so a warpgroup may wait on one
                # no earlier than the other has seen all fills before its own.
                self._take_turn(group)
            self.multiply_tile(operands, accumulator, k_tiles, position, smem, context, group)
            if cutlass.const_expr(not self.seeks_early):
                tile, turn, following, consumed = self._seek_next(
                    (tile, turn, cursor), tile_step, k_tiles, offset_by_expert, sizes, smem
                )
            self._finish_multiply(k_tiles, position, smem)
            position = position + consumed
            chunk = self.store_tile(
                accumulator, maps, vectors, context, bias_strides, smem, warp, group, chunk
            )
            cursor = following

    @cute.jit
    def _seek_next(
        self, queue, tile_step: Int32, k_tiles: Int32, offset_by_expert: cute.Tensor, sizes, smem
    ):
        """What this warpgroup multiplies next: ``(tile, turn, cursor, stages until then)``.

        Decoding a tile reads memory. It hides behind the last wgmma group or, in turns, behind the
        other warpgroup; where a main loop ends with none in flight, it comes before that loop. In
        turns it must not: the next tile but one is handed on when the next one's first stage is
        loaded, and that may wait for a stage that this tile frees.

        :param queue: ``(tile, turn, cursor)`` of the current one, which has ``k_tiles`` stages.
        """
        tile, turn, cursor = queue
        tile, turn = self.next_tile(tile, tile_step, turn, smem)
        following = self.seek(tile, cursor, offset_by_expert, sizes)
        consumed = k_tiles
        if cutlass.const_expr(self.pingpong):
            # That one belongs to the other warpgroup.
            consumed = k_tiles + self.k_tiles(following, sizes)
            if following[0] < Int32(offset_by_expert.shape[0] - 1):
                tile, turn = self.next_tile(tile, tile_step, turn, smem)
                following = self.seek(tile, following, offset_by_expert, sizes)
        return tile, turn, following, consumed

    @cute.jit
    def _consume_overlapped(
        self, maps, vectors, offset_by_expert: cute.Tensor, sizes, bias_strides, smem, warp: Int32,
        group: Int32,
    ):  # fmt: skip
        """Stores a copy of each tile chunk by chunk while the next one is multiplied."""
        counts = self.tile_counts(sizes)
        num_experts = Int32(offset_by_expert.shape[0] - 1)
        tile, tile_step = self.cluster_position()
        operands, accumulator = self.make_mma(smem, group)
        saved = saved_accumulator(self.rows_per_group, self.config.tile_n, self.stored_unchanged())
        rows = self.make_row_state()
        chunk, turn = Int32(0), Int32(0)
        cursor = self.seek(tile, start_cursor(), offset_by_expert, sizes)
        row, col = self.locate(tile, cursor, counts)
        valid = cursor[0] < num_experts
        k_tiles = self.k_tiles(cursor, sizes) if valid else Int32(0)
        self.start_c(maps[0], (cursor, row, col, sizes), valid, smem, warp, group)
        accumulator.fill(0.0)
        self._multiply(operands, accumulator, k_tiles, self._start_ring(Int32(0)), smem)
        following = cursor
        if valid:
            tile, turn = self.next_tile(tile, tile_step, turn, smem)
            following = self.seek(tile, cursor, offset_by_expert, sizes)
        self._finish_multiply(k_tiles, Int32(0), smem)
        position = k_tiles
        self.save_accumulator(
            saved, accumulator, vectors[0], (cursor, row, col, sizes), bias_strides
        )
        while valid:
            done = (cursor, row, col, sizes)
            self.begin_rows(vectors, rows, done, warp, group)
            next_row, next_col = self.locate(tile, following, counts)
            valid = following[0] < num_experts
            k_tiles = self.k_tiles(following, sizes) if valid else Int32(0)
            coming = ((following, next_row, next_col, sizes), valid)
            accumulator.fill(0.0)
            ring = self._start_ring(position)
            # The last piece comes before the last main-loop steps, so that those hide it too.
            hiding = cutlass.max(k_tiles - 2, 0)
            pieces = self.pieces(saved)
            late = self._late(k_tiles, group)
            done_steps = Int32(0)
            for piece in cutlass.range_constexpr(pieces):
                steps = hiding * (2 * piece + 1 + late) // (2 * pieces) - done_steps
                ring = self._multiply(operands, accumulator, steps, ring, smem)
                done_steps = done_steps + steps
                self.store_piece(
                    saved, piece, maps, vectors, rows, done, coming, bias_strides, smem, warp,
                    group, chunk,
                )  # fmt: skip
            self._multiply(operands, accumulator, k_tiles - done_steps, ring, smem)
            self.store_row_sums(vectors, rows, done, warp, group)
            chunk = chunk + self._chunks()
            cursor, row, col = following, next_row, next_col
            if valid:
                tile, turn = self.next_tile(tile, tile_step, turn, smem)
                following = self.seek(tile, cursor, offset_by_expert, sizes)
            self._finish_multiply(k_tiles, position, smem)
            position = position + k_tiles
            self.save_accumulator(
                saved, accumulator, vectors[0], (cursor, row, col, sizes), bias_strides
            )

    @cute.jit
    def _late(self, k_tiles: Int32, group: Int32):
        """When a piece comes: halves of the main-loop steps between two pieces, counted from half
        of them after the piece before. 1 for both math warpgroups, or, of long pieces, 0 and 1: the
        tensor cores are one's while the other stores. SMs then keep together by a counter only.
        """
        late = Int32(1)
        if cutlass.const_expr(self.epilogue.c_blocks > 0 and self.dynamic):
            if pieces_alternate(k_tiles):
                late = group
        return late

    def own_share(self, context, group):
        """What of a tile's context this warpgroup multiplies and stores."""
        return context

    @cute.jit
    def multiply_tile(
        self, operands, accumulator, k_tiles: Int32, position, smem, context, group: Int32
    ):
        """The tile's main loop, issued but for its end, and the turn passed."""
        accumulator.fill(0.0)
        self._multiply(operands, accumulator, k_tiles, self._start_ring(position), smem)
        if cutlass.const_expr(self.pingpong):
            self._pass_turn(group)

    @cute.jit
    def make_mma(self, smem, group: Int32):
        """``((tiled MMA, A and B descriptors of all stages), accumulator)`` of one warpgroup."""
        config, plan = self.config, self.smem
        mma = sm90.make_trivial_tiled_mma(
            self.dtype, self.dtype, self.major(self.a_is_k_major), self.major(self.b_is_k_major),
            Float32, (1, 1, 1), (64, config.tile_n),
        )  # fmt: skip
        rows = self.rows_per_group
        a_base = smem + plan.a
        if cutlass.const_expr(not self.pingpong):
            # Both majors store 64 elements of the other axis per row or column.
            a_base = a_base + group * (rows * SWIZZLE_ROW_BYTES)
        thread_mma = mma.get_slice(0)
        swizzle, layout = self.smem_layout(rows, config.tile_m, self.a_is_k_major)
        a_tile = cute.make_tensor(cute.recast_ptr(a_base, swizzle, dtype=self.dtype), layout)
        swizzle, layout = self.smem_layout(config.tile_n, config.tile_n, self.b_is_k_major)
        b_tile = cute.make_tensor(cute.recast_ptr(smem + plan.b, swizzle, dtype=self.dtype), layout)
        a_fragments = mma.make_fragment_A(thread_mma.partition_A(a_tile))
        b_fragments = mma.make_fragment_B(thread_mma.partition_B(b_tile))
        shape = thread_mma.partition_shape_C((rows, config.tile_n))
        mma.set(warpgroup.Field.ACCUMULATE, True)
        return (mma, a_fragments, b_fragments), cute.make_rmem_tensor(shape, Float32)

    def _start_ring(self, position):
        """Consumer state at the start of a tile: stage, phase, stage before it, steps so far."""
        stage = position % self.stages
        return stage, (position // self.stages) & 1, stage, Int32(0)

    @cute.jit
    def _multiply(self, operands, accumulator, steps: Int32, ring, smem):
        """Issues accumulator += A @ B for ``steps`` stages; returns the new ``ring``.

        One wgmma group stays in flight; :meth:`_finish_multiply` awaits the tile's last.
        """
        plan = self.smem
        mma, a_fragments, b_fragments = operands
        stage, phase, previous, step = ring
        for _ in cutlass.range(steps, unroll=1):
            cute.arch.mbarrier_wait(self.barrier(smem, plan.full, stage), phase)
            if cutlass.const_expr(self.problem.gather is not None):
                # cp.async wrote through the generic proxy; wgmma reads through the async proxy.
                cute.arch.fence_view_async_shared()
            warpgroup.fence()
            for k_block in cutlass.range_constexpr(BLOCK_K // 16):
                cute.gemm(
                    mma,
                    accumulator,
                    a_fragments[None, None, k_block, stage],
                    b_fragments[None, None, k_block, stage],
                    accumulator,
                )
            warpgroup.commit_group()
            warpgroup.wait_group(1)
            if step > 0:
                self._release(smem, previous)
            previous = stage
            step = step + 1
            stage = stage + 1
            if stage == self.stages:
                stage = Int32(0)
                phase = phase ^ 1
        return stage, phase, previous, step

    @cute.jit
    def _finish_multiply(self, k_tiles: Int32, position: Int32, smem):
        """Awaits the tile's last wgmma group and frees its stage."""
        warpgroup.wait_group(0)
        if k_tiles > 0:
            self._release(smem, (position + k_tiles - 1) % self.stages)

    def _take_turn(self, group):
        """Waits until the other math warpgroup has issued its tile (ping-pong)."""
        cute.arch.barrier(
            barrier_id=TURN_NAMED_BARRIER + group, number_of_threads=self.math_groups * WARPGROUP
        )

    def _pass_turn(self, group):
        """Lets the other math warpgroup issue its tile."""
        cute.arch.barrier_arrive(
            barrier_id=TURN_NAMED_BARRIER + 1 - group,
            number_of_threads=self.math_groups * WARPGROUP,
        )

    @cute.jit
    def _release(self, smem, stage: Int32):
        """Tells every CTA that writes to this stage that one warp is done with it."""
        empty = self.barrier(smem, self.smem.empty, stage)
        lane = cute.arch.lane_idx()
        if cutlass.const_expr(self.cluster_size > 1):
            if lane < self.cluster_size:
                cute.arch.mbarrier_arrive(empty, lane)
        elif lane == 0:
            cute.arch.mbarrier_arrive(empty)
