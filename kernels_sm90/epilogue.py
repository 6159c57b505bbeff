"""Register-to-memory side of the Hopper grouped GEMM (mixin of ``GroupedGemmSm90``).

A warpgroup owns ``rows_per_group`` rows of a tile and stores them chunk by chunk: registers ->
stmatrix -> swizzled shared memory -> TMA store. Each warpgroup has its own slots and its own named
barrier, so the two never wait for each other. A loaded tile C shares its slot with D: the same
warps read and then overwrite the same 8x8 matrices.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from kernels_sm90.tiles import WARPGROUP
from sonic.device.blocks import BLOCK
from sonic.device.ptx import (
    elect_one_lane,
    load_matrix_x4,
    pack_pair,
    store_matrix_x4,
    tma_load,
    tma_prefetch,
    tma_reduce_add,
    tma_store,
    unpack_pair,
)
from sonic.device.tensormap import ragged_coordinates, weight_coordinates

_FIRST_NAMED_BARRIER = 1
_ROWS_PER_MMA = 64  # rows of one wgmma; 16 per warp, 8 per half


class EpilogueMixin:
    """Epilogue of one warpgroup: prefetch of C, chunk loop, TMA stores."""

    def _slot(self, smem, group, chunk):
        """Shared memory of D (and C) and of Aux for chunk number ``chunk`` of this warpgroup."""
        plan = self.smem
        base = plan.epilogue + group * plan.group_bytes
        d = smem + (base + chunk % plan.epilogue_stages * plan.d_bytes)
        base = base + plan.epilogue_stages * plan.d_bytes
        aux = smem + (base + chunk % plan.aux_stages * plan.aux_bytes)
        return d, aux

    def _stores_in_flight(self) -> int:
        """Stores that may still read shared memory when a chunk starts to overwrite its slots."""
        plan = self.smem
        return (plan.aux_stages if self.epilogue.aux_blocks else plan.epilogue_stages) - 1

    def _chunks(self) -> int:
        return self.config.tile_n // self.epilogue.acc_chunk

    def _first_row(self, row, group):
        """First row, inside the expert, of this warpgroup's share of the tile."""
        return row if self.pingpong else row + group * self.rows_per_group

    @cute.jit
    def prefetch_c(self, c_map, context, smem, warp: Int32, group: Int32, chunk: Int32):
        """Starts the loads of the tile's first C chunks before the main loop, the rest up to L2."""
        if cutlass.const_expr(self.epilogue.c_blocks > 0):
            if warp % 4 == 0:
                if elect_one_lane():
                    for i in cutlass.range_constexpr(self.smem.epilogue_stages, self._chunks()):
                        tma_prefetch(c_map, self._c_coordinates(context, group, i))
                    # The previous tile's stores must have read these slots.
                    cute.arch.cp_async_bulk_wait_group(0, read=True)
                    for i in cutlass.range_constexpr(
                        min(self._chunks(), self.smem.epilogue_stages)
                    ):
                        self._load_c(c_map, context, smem, group, chunk + i, i)

    @cute.jit
    def _load_c(self, c_map, context, smem, group: Int32, chunk: Int32, index: cutlass.Constexpr):
        full = self._c_barrier(smem, group, chunk)
        cute.arch.mbarrier_arrive_and_expect_tx(full, self.smem.d_bytes)
        d_slot, _ = self._slot(smem, group, chunk)
        tma_load(d_slot, c_map, self._c_coordinates(context, group, index), full)

    def _c_coordinates(self, context, group, index):
        """Column and row of chunk ``index`` of this warpgroup's C tile."""
        cursor, row, col, _ = context
        ratio = self.epilogue.c_blocks // self.epilogue.acc_blocks
        column = col * ratio + index * self.epilogue.d_chunk
        return [column, cursor[3] + self._first_row(row, group)]

    def _c_barrier(self, smem, group, chunk):
        stages = self.smem.epilogue_stages
        return self.barrier(smem, self.smem.c_full, group * stages + chunk % stages)

    @cute.jit
    def store_tile(
        self, accumulator, c_map, d_map, aux_map, bias, score, row_sum, context, bias_strides, smem,
        warp: Int32, group: Int32, chunk: Int32,
    ) -> Int32:  # fmt: skip
        """Runs the epilogue over the tile; returns the number of chunks stored so far."""
        epilogue, stages = self.epilogue, self.smem.epilogue_stages
        cursor, row, col, sizes = context
        lane = cute.arch.lane_idx()
        row_in_group = (warp % 4) * 16 + lane // 4
        scores = self._row_scores(score, context, group, row_in_group)
        sums = [[Float32(0.0), Float32(0.0)] for _ in range(self.rows_per_group // _ROWS_PER_MMA)]
        chunks = self._chunks()
        for i in cutlass.range_constexpr(chunks):
            now = chunk + i
            d_slot, aux_slot = self._slot(smem, group, now)
            if warp % 4 == 0:
                if elect_one_lane():
                    cute.arch.cp_async_bulk_wait_group(self._stores_in_flight(), read=True)
            # Orders that store's reads of the slot before this chunk's writes.
            self._sync_group(group)
            if cutlass.const_expr(epilogue.c_blocks > 0):
                full = self._c_barrier(smem, group, now)
                cute.arch.mbarrier_wait(full, (now // stages) & 1)
            for m in cutlass.range_constexpr(self.rows_per_group // _ROWS_PER_MMA):
                self._store_fragments(
                    accumulator, m, i, d_slot, aux_slot, bias, context, bias_strides, scores, sums,
                    warp, lane,
                )  # fmt: skip
            # Makes this thread's shared-memory writes visible to the TMA store.
            cute.arch.fence_view_async_shared()
            self._sync_group(group)
            if warp % 4 == 0:
                if elect_one_lane():
                    self._store_chunk(d_map, aux_map, context, group, i, d_slot, aux_slot)
                    cute.arch.cp_async_bulk_commit_group()
                    if cutlass.const_expr(
                        epilogue.c_blocks > 0 and i >= 1 and i - 1 + stages < chunks
                    ):
                        # The store before this one has read its slot: refill it.
                        cute.arch.cp_async_bulk_wait_group(1, read=True)
                        self._load_c(c_map, context, smem, group, now - 1 + stages, i - 1 + stages)
        self._store_row_sums(row_sum, sums, context, group, row_in_group, lane)
        return chunk + chunks

    def _sync_group(self, group):
        cute.arch.barrier(barrier_id=_FIRST_NAMED_BARRIER + group, number_of_threads=WARPGROUP)

    @cute.jit
    def _row_scores(self, score, context, group: Int32, row_in_group: Int32):
        """Scores of this thread's rows: two per 64 rows; 0 past the segment's end."""
        scores = []
        if cutlass.const_expr(self.epilogue.has_row_sum):
            cursor, row, _, _ = context
            for m in cutlass.range_constexpr(self.rows_per_group // _ROWS_PER_MMA):
                pair = []
                for half in cutlass.range_constexpr(2):
                    r = cursor[3] + self._first_row(row, group) + row_in_group
                    r = r + m * _ROWS_PER_MMA + half * 8
                    value = Float32(0.0)
                    if r < cursor[4]:
                        value = score[r]
                    pair.append(value)
                scores.append(pair)
        return scores

    def _store_fragments(
        self, accumulator, m, chunk, d_slot, aux_slot, bias, context, bias_strides, scores, sums,
        warp, lane,
    ):  # fmt: skip
        """One chunk of 64 rows: epilogue on registers, then shared memory; unrolled."""
        epilogue = self.epilogue
        row_base = m * _ROWS_PER_MMA + (warp % 4) * 16
        c_words, d_words, aux_words = [], [], []
        for unit in range(epilogue.units_per_chunk):
            if epilogue.c_blocks and unit * epilogue.c_blocks % 2 == 0:
                c_words += load_matrix_x4(
                    self._matrix_pointer(
                        d_slot, row_base, unit * epilogue.c_blocks, epilogue.d_chunk, lane
                    )
                )
            first = (chunk * epilogue.units_per_chunk + unit) * epilogue.acc_blocks
            bias_pairs = self._bias_pairs(bias, context, bias_strides, first, lane)
            d_rows, aux_rows = [], []
            for half in range(2):
                acc = [
                    tuple(accumulator[(j, half, first + block), m, 0] for j in range(2))
                    for block in range(epilogue.acc_blocks)
                ]
                c = [
                    unpack_pair(c_words[2 * (unit * epilogue.c_blocks + block) + half], self.dtype)
                    for block in range(epilogue.c_blocks)
                ]
                row_score = scores[m][half] if scores else None
                d_pairs, aux_pairs, increment = epilogue.unit(acc, c, bias_pairs, row_score)
                d_rows.append(d_pairs)
                aux_rows.append(aux_pairs)
                if increment is not None:
                    sums[m][half] = sums[m][half] + increment
            if epilogue.accumulates:
                self._store_float_pairs(d_slot, d_rows, row_base, unit, lane)
                continue
            d_words += self._pack(d_rows, epilogue.d_blocks)
            aux_words += self._pack(aux_rows, epilogue.aux_blocks)
        self._store_matrices(d_slot, d_words, row_base, epilogue.d_chunk, lane)
        self._store_matrices(aux_slot, aux_words, row_base, epilogue.aux_chunk, lane)

    def _pack(self, rows, blocks):
        """16-bit words of one unit in stmatrix order: by block, upper then lower eight rows."""
        return [
            pack_pair(rows[half][block][0], rows[half][block][1], self.dtype)
            for block in range(blocks)
            for half in range(2)
        ]

    def _store_matrices(self, slot, words, row_base, columns, lane):
        for i in range(0, len(words), 4):
            store_matrix_x4(
                self._matrix_pointer(slot, row_base, i // 2, columns, lane), words[i : i + 4]
            )

    def _matrix_pointer(self, slot, row_base, block, columns, lane):
        """This lane's row address in the 16x16 elements at ``(row_base, 8 * block)``, even block.

        Lanes 0-7 and 8-15 address the upper and lower eight rows of the left block, 16-31 those of
        the right one. Rows are ``2 * columns`` bytes with the swizzle of that span.
        """
        row_bytes = columns * 2
        row = row_base + lane % 16
        swizzle = (row * row_bytes // 128) % (row_bytes // 16)
        piece = (block + lane // 16) ^ swizzle
        return slot + (row * row_bytes + piece * 16)

    def _store_float_pairs(self, slot, rows, row_base, unit, lane):
        """float32 pairs of one block of eight columns, 128-byte rows."""
        for half in range(2):
            row = row_base + lane // 4 + half * 8
            piece = (unit * 2 + lane % 4 // 2) ^ (row % 8)
            pointer = cute.recast_ptr(slot + (row * 128 + piece * 16 + lane % 2 * 8), dtype=Float32)
            pair = cute.make_tensor(pointer, cute.make_layout(2))
            pair[0], pair[1] = rows[half][0]

    def _bias_pairs(self, bias, context, bias_strides, first, lane):
        """Bias of the accumulator blocks of one unit, or ``None``; zero past the last column."""
        if not self.problem.has_bias:
            return None
        cursor, _, col, sizes = context
        base = cutlass.Int64(cursor[0]) * bias.stride[0]
        pairs = []
        for block in range(self.epilogue.acc_blocks):
            column = col + first * BLOCK + block * BLOCK + lane % 4 * 2
            if self.problem.gated_rows:
                i = (col + first * BLOCK) // 2 + lane % 4 * 2
                offsets = [(i + j) * bias_strides[0] + block * bias_strides[1] for j in range(2)]
            else:
                offsets = [column + j for j in range(2)]
            pairs.append(tuple(self._load_bias(bias, base, o, column < sizes[1]) for o in offsets))
        return pairs

    @cute.jit
    def _load_bias(self, bias, base, offset, inside):
        value = Float32(0.0)
        if inside:
            value = cute.make_tensor(bias.iterator + (base + offset), cute.make_layout(1))[0].to(
                Float32
            )
        return value

    @cute.jit
    def _store_chunk(
        self, d_map, aux_map, context, group: Int32, index: cutlass.Constexpr, d_slot, aux_slot
    ):
        """Issues the TMA stores of one chunk of this warpgroup's rows."""
        epilogue = self.epilogue
        cursor, row, col, _ = context
        expert, _, _, begin, end = cursor
        first_row = self._first_row(row, group)
        if cutlass.const_expr(epilogue.d_blocks > 0):
            column = col * epilogue.d_blocks // epilogue.acc_blocks + index * epilogue.d_chunk
            if cutlass.const_expr(self.ragged_rows):
                tma_store(d_map, d_slot, ragged_coordinates(column, first_row, begin, end))
            else:
                coordinates = weight_coordinates(column, first_row, expert, self.problem.gated_rows)
                if cutlass.const_expr(epilogue.accumulates):
                    tma_reduce_add(d_map, d_slot, coordinates)
                else:
                    tma_store(d_map, d_slot, coordinates)
        if cutlass.const_expr(epilogue.aux_blocks > 0):
            column = col // epilogue.acc_blocks + index * epilogue.aux_chunk
            tma_store(aux_map, aux_slot, ragged_coordinates(column, first_row, begin, end))

    @cute.jit
    def _store_row_sums(
        self, row_sum, sums, context, group: Int32, row_in_group: Int32, lane: Int32
    ):
        """Adds the four lanes that share a row and writes the tile's partial sums."""
        if cutlass.const_expr(self.epilogue.has_row_sum):
            cursor, row, col, sizes = context
            for m in cutlass.range_constexpr(self.rows_per_group // _ROWS_PER_MMA):
                for half in cutlass.range_constexpr(2):
                    total = sums[m][half]
                    total = total + cute.arch.shuffle_sync_bfly(total, 1)
                    total = total + cute.arch.shuffle_sync_bfly(total, 2)
                    r = cursor[3] + self._first_row(row, group) + row_in_group
                    r = r + m * _ROWS_PER_MMA + half * 8
                    if lane % 4 == 0 and r < cursor[4] and col < sizes[1]:
                        row_sum[col // self.config.tile_n, r] = total

    @cute.jit
    def drain_stores(self, warp: Int32):
        """Waits until the last stores have left shared memory."""
        if warp % 4 == 0:
            if elect_one_lane():
                cute.arch.cp_async_bulk_wait_group(0)
