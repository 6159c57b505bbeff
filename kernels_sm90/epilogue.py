"""Register-to-memory side of the Hopper grouped GEMM (mixin of ``GroupedGemmSm90``).

A warpgroup owns ``rows_per_group`` rows of a tile (of swapped operands columns: ``SwappedMixin``)
and stores them chunk by chunk: registers -> stmatrix -> swizzled shared memory -> TMA store. Each
warpgroup has its own slots and its own named barrier, so the two never wait for each other. A
loaded tile C shares its slot with D: the same warps read and then overwrite the same 8x8 matrices.
"""

import itertools

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from kernels_sm90.accumulator import AccumulatorRegisters
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
from sonic.device.scheduler import is_first_part
from sonic.device.tensormap import ragged_coordinates, weight_coordinates

_FIRST_NAMED_BARRIER = 1
_ROWS_PER_MMA = 64  # rows of one wgmma; 16 per warp, 8 per half
_UNITS_PER_PIECE = 2  # the least that fills stmatrix.x4 of every tensor


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

    def _has_spare_slot(self) -> bool:
        """Whether a chunk never writes where the store of the chunk before it may still read."""
        plan = self.smem
        return (plan.aux_stages if self.epilogue.aux_blocks else plan.epilogue_stages) > 1

    def output_boxes(self):
        """Rows, columns of D and columns of Aux that one TMA instruction stores."""
        return self.rows_per_group, self.epilogue.d_chunk, self.epilogue.aux_chunk

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
    def start_c(self, c_map, context, valid, smem, warp: Int32, group: Int32):
        """First C loads of an overlapped epilogue; :meth:`_refill_c` keeps the ring filled."""
        if cutlass.const_expr(self.epilogue.c_blocks > 0):
            if warp % 4 == 0 and valid:
                if elect_one_lane():
                    for i in cutlass.range_constexpr(self.smem.epilogue_stages - 1):
                        self._load_c(c_map, context, smem, group, Int32(i), i)

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
        return ragged_coordinates(column, self._first_row(row, group), cursor[3], cursor[4])

    def _c_barrier(self, smem, group, chunk):
        stages = self.smem.epilogue_stages
        return self.barrier(smem, self.smem.c_full, group * stages + chunk % stages)

    @cute.jit
    def store_tile(
        self, accumulator, maps, vectors, context, bias_strides, smem,
        warp: Int32, group: Int32, chunk: Int32,
    ) -> Int32:  # fmt: skip
        """Runs the epilogue over the tile; returns the number of chunks stored so far."""
        source = AccumulatorRegisters(accumulator)
        rows = self.make_row_state()
        self.begin_rows(vectors, rows, context, warp, group)
        for piece in cutlass.range_constexpr(self.pieces(source)):
            self.store_piece(
                source, piece, maps, vectors, rows, context, None, bias_strides, smem, warp, group,
                chunk,
            )  # fmt: skip
        self.store_row_sums(vectors, rows, context, warp, group)
        return chunk + self._chunks()

    def _pieces_per_chunk(self, source):
        return 1 if source.is_output else self.epilogue.units_per_chunk // _UNITS_PER_PIECE

    def pieces(self, source):
        """Number of pieces of a tile, each of them short beside a main-loop step."""
        return self._chunks() * self._pieces_per_chunk(source)

    @cute.jit
    def store_piece(
        self, source, piece: cutlass.Constexpr, maps, vectors, rows, context, following,
        bias_strides, smem, warp: Int32, group: Int32, chunk: Int32,
    ):  # fmt: skip
        """Epilogue of the tile's part number ``piece``.

        :param following: ``(context, whether it is a tile)`` of the tile whose C is loaded when
        this one's is through, or ``None`` if that tile loads its own.
        :param chunk: chunks that this warpgroup stored before the tile.
        """
        c_map, d_map, aux_map = maps
        per_chunk = self._pieces_per_chunk(source)
        index, part = piece // per_chunk, piece % per_chunk
        now = chunk + index
        d_slot, aux_slot = self._slot(smem, group, now)
        if cutlass.const_expr(part == 0):
            self._begin_chunk(smem, warp, group, now)
        units = self.epilogue.units_per_chunk // per_chunk
        for m in cutlass.range_constexpr(self.rows_per_group // _ROWS_PER_MMA):
            self._store_fragments(
                source, m, index, range(part * units, (part + 1) * units), d_slot, aux_slot,
                vectors[0], context, bias_strides, rows, warp,
            )  # fmt: skip
        if cutlass.const_expr(part == per_chunk - 1):
            self._end_chunk(warp, group)
            if warp % 4 == 0:
                if elect_one_lane():
                    self._store_chunk(d_map, aux_map, context, group, index, d_slot, aux_slot)
                    cute.arch.cp_async_bulk_commit_group()
                    self._refill_c(c_map, context, following, smem, group, index, now)

    @cute.jit
    def _begin_chunk(self, smem, warp: Int32, group: Int32, now: Int32):
        """Waits until the slots of chunk number ``now`` may be written, and for its C."""
        if cutlass.const_expr(not self._has_spare_slot()):
            self._await_stores(warp)
            # Orders that store's reads of the slot before this chunk's writes.
            self._sync_group(group)
        if cutlass.const_expr(self.epilogue.c_blocks > 0):
            full = self._c_barrier(smem, group, now)
            cute.arch.mbarrier_wait(full, (now // self.smem.epilogue_stages) & 1)

    @cute.jit
    def _end_chunk(self, warp: Int32, group: Int32):
        """Between a chunk's last write to shared memory and its TMA store."""
        # Makes this thread's shared-memory writes visible to the TMA store.
        cute.arch.fence_view_async_shared()
        if cutlass.const_expr(self._has_spare_slot()):
            self._await_stores(warp)
        # Orders all threads' writes of the chunk before the TMA store that one of them issues,
        # and, with a spare slot, that slot's earlier store before the next chunk's writes.
        self._sync_group(group)

    @cute.jit
    def _await_stores(self, warp: Int32):
        """Waits until the stores issued so far have read their slots.

        With a spare slot this comes before the barrier at a chunk's end, which then tells all
        threads that the next chunk's slots are free: one barrier a chunk instead of two.
        """
        if warp % 4 == 0:
            if elect_one_lane():
                cute.arch.cp_async_bulk_wait_group(0, read=True)

    @cute.jit
    def _refill_c(self, c_map, context, following, smem, group: Int32, index, now: Int32):
        """Loads C into the slot before this chunk's, which the store there has read."""
        stages, chunks = self.smem.epilogue_stages, self._chunks()
        load = index - 1 + stages
        if cutlass.const_expr(self.epilogue.c_blocks > 0):
            if cutlass.const_expr(load < chunks and (index >= 1 or following is not None)):
                self._load_c(c_map, context, smem, group, now - 1 + stages, load)
            elif cutlass.const_expr(load >= chunks and following is not None):
                next_context, valid = following
                if valid:
                    self._load_c(c_map, next_context, smem, group, now - 1 + stages, load - chunks)

    def _sync_group(self, group):
        cute.arch.barrier(barrier_id=_FIRST_NAMED_BARRIER + group, number_of_threads=WARPGROUP)

    def save_accumulator(self, saved, accumulator, bias, context, bias_strides):
        """Copies the accumulator, and before that adds the bias to it.

        Added to a rounded copy, a bias that nearly cancels it could change the sum's sign, and with
        it a ReLU's gradient.
        """
        lane = cute.arch.lane_idx()
        width = self.epilogue.acc_blocks
        for first in range(0, self.config.tile_n // BLOCK if self.problem.has_bias else 0, width):
            pairs = self._bias_pairs(bias, context, bias_strides, first, lane)
            for m in range(self.rows_per_group // _ROWS_PER_MMA):
                for block, j, half in itertools.product(range(width), range(2), range(2)):
                    index = ((j, half, first + block), m, 0)
                    accumulator[index] = accumulator[index] + pairs[block][j]
        saved.save(accumulator)

    def make_row_state(self):
        """Registers ``(scores, sums)`` of this thread's rows, two per 64 rows; or ``None``."""
        if not self.epilogue.has_row_sum:
            return None
        rows = 2 * self.rows_per_group // _ROWS_PER_MMA
        return cute.make_rmem_tensor(rows, Float32), cute.make_rmem_tensor(rows, Float32)

    @cute.jit
    def begin_rows(self, vectors, rows, context, warp: Int32, group: Int32):
        """Reads the scores of this thread's rows, 0 past the segment's end; clears their sums."""
        if cutlass.const_expr(rows is not None):
            score = vectors[1]
            scores, sums = rows
            sums.fill(0.0)
            cursor = context[0]
            for i in cutlass.range_constexpr(cute.size(scores)):
                r = self._score_row(context, warp, group, i)
                value = Float32(0.0)
                if r < cursor[4]:
                    value = score[r]
                scores[i] = value

    def _score_row(self, context, warp, group, index):
        """Global row of this thread's row ``index``: two per 64 rows."""
        cursor, row, _, _ = context
        row_in_group = (warp % 4) * 16 + cute.arch.lane_idx() // 4
        offset = index // 2 * _ROWS_PER_MMA + index % 2 * 8
        return cursor[3] + self._first_row(row, group) + row_in_group + offset

    def _store_fragments(
        self, source, m, chunk, units, d_slot, aux_slot, bias, context, bias_strides, rows, warp
    ):
        """Some units of a chunk of 64 rows: epilogue on registers, then shared memory; unrolled."""
        epilogue = self.epilogue
        lane = cute.arch.lane_idx()
        row_base = m * _ROWS_PER_MMA + (warp % 4) * 16
        c_words, d_words, aux_words = [], [], []
        for unit in units:
            first = (chunk * epilogue.units_per_chunk + unit) * epilogue.acc_blocks
            if source.is_output:
                d_words += [source.word(m, half, first) for half in range(2)]
                continue
            if epilogue.c_blocks and len(c_words) < (unit - units[0] + 1) * epilogue.c_blocks * 2:
                c_words += load_matrix_x4(
                    self._matrix_pointer(
                        d_slot, row_base, unit * epilogue.c_blocks, epilogue.d_chunk, lane
                    )
                )
            bias_pairs = None
            if not source.has_bias:
                bias_pairs = self._bias_pairs(bias, context, bias_strides, first, lane)
            d_rows, aux_rows = [], []
            for half in range(2):
                acc = [source.pair(m, half, first + i) for i in range(epilogue.acc_blocks)]
                c = [
                    unpack_pair(
                        c_words[2 * ((unit - units[0]) * epilogue.c_blocks + block) + half],
                        self.dtype,
                    )
                    for block in range(epilogue.c_blocks)
                ]
                row_score = (rows[0][2 * m + half],) * 2 if rows else None
                d_pairs, aux_pairs, increment = epilogue.unit(acc, c, bias_pairs, row_score)
                d_rows.append(d_pairs)
                aux_rows.append(aux_pairs)
                if increment is not None:
                    rows[1][2 * m + half] = rows[1][2 * m + half] + (increment[0] + increment[1])
            if epilogue.accumulates:
                self._store_float_pairs(d_slot, d_rows, row_base, unit, lane)
                continue
            d_words += self._pack(d_rows, epilogue.d_blocks)
            aux_words += self._pack(aux_rows, epilogue.aux_blocks)
        first = units[0]
        self._store_matrices(
            d_slot, d_words, row_base, first * epilogue.d_blocks, epilogue.d_chunk, lane
        )
        self._store_matrices(
            aux_slot, aux_words, row_base, first * epilogue.aux_blocks, epilogue.aux_chunk, lane
        )

    def _pack(self, rows, blocks):
        """16-bit words of one unit in stmatrix order: by block, upper then lower eight rows."""
        return [
            pack_pair(rows[half][block][0], rows[half][block][1], self.dtype)
            for block in range(blocks)
            for half in range(2)
        ]

    def _store_matrices(self, slot, words, row_base, first_block, columns, lane):
        for i in range(0, len(words), 4):
            pointer = self._matrix_pointer(slot, row_base, first_block + i // 2, columns, lane)
            store_matrix_x4(pointer, words[i : i + 4])

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
        # A copy is saved after the last tile too.
        expert = cutlass.min(cursor[0], bias.shape[0] - 1)
        base = cutlass.Int64(expert) * bias.stride[0]
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
                elif cutlass.const_expr(self.config.split):
                    self._store_part(d_map, aux_map, context, d_slot, column, first_row)
                else:
                    tma_store(d_map, d_slot, coordinates)
        if cutlass.const_expr(epilogue.aux_blocks > 0):
            column = col // epilogue.acc_blocks + index * epilogue.aux_chunk
            tma_store(aux_map, aux_slot, ragged_coordinates(column, first_row, begin, end))

    @cute.jit
    def _store_part(self, d_map, parts_map, context, d_slot, column, first_row):
        """A piece of the output, or of the sum over a later part of the expert's rows."""
        cursor, _, _, sizes = context
        expert, _, which, begin, _ = cursor
        gated = self.problem.gated_rows
        if is_first_part(which):
            tma_store(d_map, d_slot, weight_coordinates(column, first_row, expert, gated))
        else:
            block = begin // sizes[2] - 1
            tma_store(parts_map, d_slot, weight_coordinates(column, first_row, block, gated))

    @cute.jit
    def store_row_sums(self, vectors, rows, context, warp: Int32, group: Int32):
        """Adds the four lanes that share a row and writes the tile's partial sums."""
        if cutlass.const_expr(rows is not None):
            row_sum, sums = vectors[2], rows[1]
            cursor, _, col, sizes = context
            for i in cutlass.range_constexpr(cute.size(sums)):
                total = sums[i]
                total = total + cute.arch.shuffle_sync_bfly(total, 1)
                total = total + cute.arch.shuffle_sync_bfly(total, 2)
                r = self._score_row(context, warp, group, i)
                if cute.arch.lane_idx() % 4 == 0 and r < cursor[4] and col < sizes[1]:
                    row_sum[col // self.config.tile_n, r] = total

    @cute.jit
    def drain_stores(self, warp: Int32):
        """Waits until the last stores have left shared memory."""
        if warp % 4 == 0:
            if elect_one_lane():
                cute.arch.cp_async_bulk_wait_group(0)
