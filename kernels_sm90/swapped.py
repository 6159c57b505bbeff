"""Tiles as high as their expert needs (mixin of ``GroupedGemmSm90``): the rows are wgmma's N.

wgmma's M comes in 64s, so that the rows of a tile of 256 columns come in 128s, and the last tile of
each expert is half padding on average. Here the weights are wgmma's A and the rows its B: a tile
has ``SWAP_COLUMNS`` columns for each math warpgroup that shares it, and an expert's rows are
divided into as few tiles as ``tile_m`` allows, of equal height. wgmma's N, a multiple of eight, is
part of the instruction, so there is a main loop for each height.

The accumulator is the transposed tile: a thread has two columns of every 64, and in each block of
eight rows a pair of neighbours. ``stmatrix`` transposes back. What goes through shared memory at a
time is ``SWAP_ROWS`` rows of one warpgroup's columns.
"""

import itertools

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as sm90
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import warpgroup

from kernels_sm90.mainloop import SWIZZLE_ROW_BYTES
from kernels_sm90.tiles import SWAP_COLUMNS, SWAP_ROWS
from sonic.device.blocks import BLOCK
from sonic.device.ptx import (
    elect_one_lane,
    load_transposed_x4,
    pack_pair,
    store_transposed_x4,
    tma_load,
    tma_prefetch,
    tma_store,
    unpack_pair,
)
from sonic.device.tensormap import ragged_coordinates

_COLUMNS_PER_STORE = 64  # one 128-byte swizzle span
_COLUMNS_PER_MMA = 64  # of one wgmma; 16 per warp, 8 per half
_STORE_BYTES = SWAP_ROWS * SWIZZLE_ROW_BYTES
_ROW_BLOCKS = SWAP_ROWS // BLOCK


class SwappedMixin:
    """Main loop and epilogue of tiles that fit the rows of their expert.

    Comes before the mixins that it overrides, and is theirs where operands are not swapped.
    """

    def output_boxes(self):
        if not self.swapped:
            return super().output_boxes()
        return SWAP_ROWS, _COLUMNS_PER_STORE, _COLUMNS_PER_STORE

    def rows_per_load(self) -> int:
        if not self.swapped:
            return super().rows_per_load()
        return 2 * SWAP_ROWS if self.config.tile_m % (2 * SWAP_ROWS) == 0 else SWAP_ROWS

    def a_bytes(self, height):
        if not self.swapped:
            return super().a_bytes(height)
        rows = self.rows_per_load()
        return (height + rows - 1) // rows * (rows * SWIZZLE_ROW_BYTES)

    def tile_height(self, cursor, counts):
        if not self.swapped:
            return super().tile_height(cursor, counts)
        _, _, tiles, begin, end = cursor
        tiles_m = cutlass.max(tiles // counts[1], 1) * self.config.cluster_m
        return cute.ceil_div(end - begin, tiles_m)

    def load_a(self, a_map, smem, stage, full, begin, end, row, k, height):
        if self.gather_a or not self.swapped:
            super().load_a(a_map, smem, stage, full, begin, end, row, k, height)
        else:
            base = smem + (self.smem.a + stage * self.smem.a_bytes)
            self._load_rows(a_map, base, full, begin + row, k, height)

    def own_share(self, context, group):
        if not self.swapped:
            return super().own_share(context, group)
        return self._only_own_rows(context, group)

    def prefetch_c(self, c_map, context, smem, warp, group, chunk):
        prefetch = self._prefetch_rows_of_c if self.swapped else super().prefetch_c
        prefetch(c_map, context, smem, warp, group, chunk)

    def make_mma(self, smem, group):
        return (
            self._make_swapped_mma(smem, group) if self.swapped else super().make_mma(smem, group)
        )

    def multiply_tile(self, operands, accumulator, k_tiles, position, smem, context, group):
        multiply = self._multiply_rows if self.swapped else super().multiply_tile
        multiply(operands, accumulator, k_tiles, position, smem, context, group)

    def store_tile(
        self, accumulator, maps, vectors, context, bias_strides, smem, warp, group, chunk
    ):
        store = self._store_rows if self.swapped else super().store_tile
        return store(accumulator, maps, vectors, context, bias_strides, smem, warp, group, chunk)

    def _first_column(self, col, group):
        """Of this warpgroup's columns of the tile at ``col``: half of them, or all in turns."""
        return col if self.pingpong else col + group * SWAP_COLUMNS

    @cute.jit
    def _only_own_rows(self, context, group: Int32):
        """The tile's context with the segment's end at that of this warpgroup's rows.

        Where its columns do not exist it has none. What is loaded and stored through a ragged
        descriptor then ends there.
        """
        cursor, row, col, sizes = context
        expert, first, tiles, begin, end = cursor
        height = self.tile_height(cursor, self.tile_counts(sizes))
        if self._first_column(col, group) >= sizes[1]:
            height = Int32(0)
        end = cutlass.min(end, begin + row + height)
        return (expert, first, tiles, begin, end), row, col, sizes

    def _own_rows(self, context):
        """Number of rows of :meth:`_only_own_rows`, or less than none."""
        cursor, row, _, _ = context
        return cursor[4] - cursor[3] - row

    def _heights(self) -> list[int]:
        """Of the main loops: eights, but sixteens up to half the greatest height, as no tile of an
        expert that has several is so low.
        """
        most = self.config.tile_m
        return [h for h in range(BLOCK, most + 1, BLOCK) if h % SWAP_ROWS == 0 or 2 * h > most]

    @cute.jit
    def _load_rows(self, a_map, base, full, first, k, height: Int32):
        """TMA loads of a stage of the rows, and of a few more where they do not divide."""
        rows = self.rows_per_load()
        for i in cutlass.range_constexpr(self.config.tile_m // rows):
            if i * rows < height:
                tma_load(base + i * rows * SWIZZLE_ROW_BYTES, a_map, [k, first + i * rows], full)

    def _make_swapped_mma(self, smem, group):
        """``(operands as of ``make_mma`` for each height, accumulator of the greatest)``."""
        config, plan = self.config, self.smem
        weights = smem + plan.b + self._first_column(0, group) * SWIZZLE_ROW_BYTES
        swizzle, layout = self.smem_layout(SWAP_COLUMNS, config.tile_n, self.b_is_k_major)
        weights = cute.make_tensor(cute.recast_ptr(weights, swizzle, dtype=self.dtype), layout)
        operands = []
        for height in self._heights():
            mma = sm90.make_trivial_tiled_mma(
                self.dtype, self.dtype, self.major(self.b_is_k_major), self.major(True),
                Float32, (1, 1, 1), (_COLUMNS_PER_MMA, height),
            )  # fmt: skip
            thread_mma = mma.get_slice(0)
            swizzle, layout = self.smem_layout(height, config.tile_m, True)
            rows = cute.recast_ptr(smem + plan.a, swizzle, dtype=self.dtype)
            rows = cute.make_tensor(rows, layout)
            mma.set(warpgroup.Field.ACCUMULATE, True)
            operands.append(
                (
                    mma,
                    mma.make_fragment_A(thread_mma.partition_A(weights)),
                    mma.make_fragment_B(thread_mma.partition_B(rows)),
                )
            )
        shape = ((2, 2, config.tile_m // BLOCK), SWAP_COLUMNS // _COLUMNS_PER_MMA, 1)
        return tuple(operands), cute.make_rmem_tensor(shape, Float32)

    @cute.jit
    def _multiply_rows(
        self, operands, accumulator, k_tiles: Int32, position, smem, context, group: Int32
    ):
        """The main loop of the least height that has the rows, to its end, and the turn passed;
        where there are none the lowest one, which costs fewer registers than no loop.
        """
        heights = self._heights()
        rows = cutlass.max(self._own_rows(context), 1)
        for i in cutlass.range_constexpr(len(heights)):
            lower = heights[i - 1] if i > 0 else 0
            if rows > lower and rows <= heights[i]:
                used = self._first_rows(accumulator, heights[i])
                used.fill(0.0)
                self._multiply(operands[i], used, k_tiles, self._start_ring(position), smem)
                if cutlass.const_expr(self.pingpong):
                    self._pass_turn(group)
                # Where branches meet, wgmma still in flight would make all of them run one by one.
                warpgroup.wait_group(0)

    def _first_rows(self, accumulator, rows):
        """The part of the accumulator that a lower tile uses."""
        shape = ((2, 2, rows // BLOCK), cute.size(accumulator, mode=[1]), 1)
        layout = cute.make_layout(shape, stride=((1, 2, 4), self.config.tile_m // 2, 0))
        return cute.make_tensor(accumulator.iterator, layout)

    @cute.jit
    def _prefetch_rows_of_c(self, c_map, context, smem, warp: Int32, group: Int32, chunk: Int32):
        """Starts the loads of the tile's first C chunks before the main loop, the rest up to L2."""
        if cutlass.const_expr(self.epilogue.c_blocks > 0):
            if warp % 4 == 0:
                if elect_one_lane():
                    chunks = self._chunks_of_rows(context)
                    for i in cutlass.range(self.smem.epilogue_stages, chunks, unroll=1):
                        for store in cutlass.range_constexpr(self.smem.d_bytes // _STORE_BYTES):
                            tma_prefetch(c_map, self._c_place(context, group, i, store))
                    # The previous tile's stores must have read these slots.
                    cute.arch.cp_async_bulk_wait_group(0, read=True)
                    for i in cutlass.range_constexpr(self.smem.epilogue_stages):
                        self._load_rows_of_c(c_map, context, smem, group, chunk + i, i)

    @cute.jit
    def _load_rows_of_c(
        self, c_map, context, smem, group: Int32, chunk: Int32, index: cutlass.Constexpr
    ):
        """Loads C of the tile's chunk ``index``, if it has so many."""
        if index * SWAP_ROWS < self._own_rows(context):
            full = self._c_barrier(smem, group, chunk)
            cute.arch.mbarrier_arrive_and_expect_tx(full, self.smem.d_bytes)
            slot, _ = self._slot(smem, group, chunk)
            for i in cutlass.range_constexpr(self.smem.d_bytes // _STORE_BYTES):
                place = self._c_place(context, group, index, i)
                tma_load(slot + i * _STORE_BYTES, c_map, place, full)

    def _chunks_of_rows(self, context):
        """Number of chunks of this warpgroup's rows."""
        return cutlass.max(self._own_rows(context) + SWAP_ROWS - 1, 0) // SWAP_ROWS

    def _c_place(self, context, group, index, store):
        return self._store_coordinates(context, group, index, store, self.epilogue.c_blocks)

    def _store_coordinates(self, context, group, index, store, blocks):
        """Where the columns number ``store`` of a chunk of this warpgroup lie.

        :param blocks: per unit, of the tensor.
        """
        cursor, row, col, _ = context
        column = self._first_column(col, group) * blocks // self.epilogue.acc_blocks
        column = column + store * _COLUMNS_PER_STORE
        return ragged_coordinates(column, row + index * SWAP_ROWS, cursor[3], cursor[4])

    @cute.jit
    def _store_rows(
        self, accumulator, maps, vectors, context, bias_strides, smem,
        warp: Int32, group: Int32, chunk: Int32,
    ) -> Int32:  # fmt: skip
        """Runs the epilogue over the tile; returns the number of chunks stored so far."""
        bias = self._bias_of_columns(vectors[0], context, bias_strides, warp, group)
        scores = None
        if cutlass.const_expr(self.epilogue.has_row_sum):
            scores = cute.make_rmem_tensor(2 * _ROW_BLOCKS, Float32)
        for index in cutlass.range_constexpr(self.config.tile_m // SWAP_ROWS):
            if index * SWAP_ROWS < self._own_rows(context):
                self._store_chunk_of_rows(
                    accumulator, index, maps, vectors, context, (bias, scores), smem, warp, group,
                    chunk + index,
                )  # fmt: skip
        return chunk + self._chunks_of_rows(context)

    @cute.jit
    def _store_chunk_of_rows(
        self, accumulator, index: cutlass.Constexpr, maps, vectors, context, registers, smem,
        warp: Int32, group: Int32, now: Int32,
    ):  # fmt: skip
        """Epilogue of ``SWAP_ROWS`` rows, the tile's number ``index``."""
        c_map, d_map, aux_map = maps
        d_slot, aux_slot = self._slot(smem, group, now)
        if cutlass.const_expr(self.epilogue.has_row_sum):
            # On their way while C is awaited.
            self._load_scores(vectors[1], context, registers[1], index)
        self._begin_chunk(smem, warp, group, now)
        sums = self._store_columns(accumulator, index, registers, d_slot, aux_slot, warp)
        if cutlass.const_expr(self.epilogue.has_row_sum):
            self._share_sums(sums, smem, warp, group, now)
        self._end_chunk(warp, group)
        if warp % 4 == 0:
            if elect_one_lane():
                self._store_slot(d_map, context, group, index, d_slot, self.epilogue.d_blocks)
                self._store_slot(aux_map, context, group, index, aux_slot, self.epilogue.aux_blocks)
                cute.arch.cp_async_bulk_commit_group()
                if cutlass.const_expr(self.epilogue.c_blocks > 0 and index > 0):
                    load = index - 1 + self.smem.epilogue_stages
                    if cutlass.const_expr(load * SWAP_ROWS < self.config.tile_m):
                        later = now - 1 + self.smem.epilogue_stages
                        self._load_rows_of_c(c_map, context, smem, group, later, load)
        if cutlass.const_expr(self.epilogue.has_row_sum):
            self._store_sums(vectors[2], context, smem, warp, group, index, now)

    def _store_slot(self, tensor_map, context, group, index, slot, blocks):
        columns = SWAP_COLUMNS * blocks // self.epilogue.acc_blocks
        for i in range(columns // _COLUMNS_PER_STORE):
            coordinates = self._store_coordinates(context, group, index, i, blocks)
            tma_store(tensor_map, slot + i * _STORE_BYTES, coordinates)

    def _store_columns(self, accumulator, index, registers, d_slot, aux_slot, warp):
        """The chunk's values of this warp's columns, to shared memory; its parts of the row sums.

        Blocks of eight columns of the slots count through the warps' shares of 64 columns, then
        through their units. Unrolled.
        """
        epilogue = self.epilogue
        bias, scores = registers
        units = 2 // epilogue.acc_blocks  # of 16 columns
        sums = [[Float32(0.0)] * 2 for _ in range(_ROW_BLOCKS)]
        d_words, d_places, aux_words, aux_places = [], [], [], []
        for m, unit in itertools.product(range(SWAP_COLUMNS // _COLUMNS_PER_MMA), range(units)):
            place = (m * 4 + warp % 4) * units + unit
            c_words = []
            for i in range(0, epilogue.c_blocks, 2):
                first = place * epilogue.c_blocks + i
                last = first + epilogue.c_blocks - 1
                c_words += load_transposed_x4(self._block_pointer(d_slot, first, last))
            d_rows, aux_rows = [], []
            for block in range(_ROW_BLOCKS):
                halves = [unit * epilogue.acc_blocks + i for i in range(epilogue.acc_blocks)]
                row_block = index * _ROW_BLOCKS + block
                acc = [
                    tuple(accumulator[(j, half, row_block), m, 0] for j in range(2))
                    for half in halves
                ]
                c = [
                    unpack_pair(c_words[2 * i + block], self.dtype)
                    for i in range(epilogue.c_blocks)
                ]
                pairs = [(bias[2 * m + half],) * 2 for half in halves] if bias else None
                score = None
                if scores is not None:
                    score = (scores[2 * block], scores[2 * block + 1])
                d, aux, increments = epilogue.unit(acc, c, pairs, score)
                d_rows.append(d)
                aux_rows.append(aux)
                if increments is not None:
                    sums[block] = [a + b for a, b in zip(sums[block], increments, strict=True)]
            for i in range(epilogue.d_blocks):
                d_words.append([pack_pair(*row[i], self.dtype) for row in d_rows])
                d_places.append(place * epilogue.d_blocks + i)
            for i in range(epilogue.aux_blocks):
                aux_words.append([pack_pair(*row[i], self.dtype) for row in aux_rows])
                aux_places.append(place * epilogue.aux_blocks + i)
        self._store_blocks(d_slot, d_words, d_places)
        self._store_blocks(aux_slot, aux_words, aux_places)
        return sums

    def _store_blocks(self, slot, words, places):
        """Pairs of blocks of eight columns by ``SWAP_ROWS`` rows."""
        for i in range(0, len(words), 2):
            pointer = self._block_pointer(slot, places[i], places[i + 1])
            store_transposed_x4(pointer, words[i] + words[i + 1])

    def _block_pointer(self, slot, first, second):
        """This lane's row of two blocks: lanes 0-15 that of the first one, 16-31 of the second."""
        lane = cute.arch.lane_idx()
        place = first + lane // 16 * (second - first)
        per_row = SWIZZLE_ROW_BYTES // 16
        piece = (place % per_row) ^ (lane % per_row)
        return slot + (place // per_row * _STORE_BYTES + lane % 16 * SWIZZLE_ROW_BYTES + piece * 16)

    def _bias_of_columns(self, bias, context, bias_strides, warp, group):
        """Bias of this thread's columns, two of every 64, or ``None``; zero past the last one."""
        if not self.problem.has_bias:
            return None
        cursor, _, col, sizes = context
        base = cutlass.Int64(cursor[0]) * bias.stride[0]
        values = []
        lane_row = cute.arch.lane_idx() // 4
        for first in range(0, SWAP_COLUMNS, _COLUMNS_PER_MMA):
            first = self._first_column(col, group) + first + warp % 4 * 16
            for half in range(2):
                column = first + half * BLOCK + lane_row
                offset = column
                if self.problem.gated_rows:
                    offset = (first // 2 + lane_row) * bias_strides[0] + half * bias_strides[1]
                values.append(self._load_bias(bias, base, offset, column < sizes[1]))
        return values

    @cute.jit
    def _load_scores(self, score, context, scores, index: cutlass.Constexpr):
        """Scores of this thread's rows of a chunk, 0 past the segment's end."""
        cursor, row, _, _ = context
        for i in cutlass.range_constexpr(2 * _ROW_BLOCKS):
            r = cursor[3] + row + index * SWAP_ROWS + self._row_of_pair(i // 2) + i % 2
            value = Float32(0.0)
            if r < cursor[4]:
                value = score[r]
            scores[i] = value

    def _row_of_pair(self, block):
        """First row of this thread's pair in a block of rows of a chunk."""
        return block * BLOCK + cute.arch.lane_idx() % 4 * 2

    def _sum_slot(self, smem, group, now):
        """``(warps, SWAP_ROWS)`` sums of a warpgroup; even and odd chunks alternate."""
        offset = self.smem.sums + group * self.smem.sum_bytes + now % 2 * (self.smem.sum_bytes // 2)
        pointer = cute.recast_ptr(smem + offset, dtype=Float32)
        return cute.make_tensor(pointer, cute.make_layout((4, SWAP_ROWS), stride=(SWAP_ROWS, 1)))

    @cute.jit
    def _share_sums(self, sums, smem, warp: Int32, group: Int32, now: Int32):
        """Adds the eight lanes that have the same rows; writes the warp's sums of its columns."""
        slot = self._sum_slot(smem, group, now)
        for i in cutlass.range_constexpr(2 * _ROW_BLOCKS):
            total = sums[i // 2][i % 2]
            for distance in (4, 8, 16):
                total = total + cute.arch.shuffle_sync_bfly(total, distance)
            if cute.arch.lane_idx() // 4 == i:
                slot[warp % 4, self._row_of_pair(i // 2) + i % 2] = total

    @cute.jit
    def _store_sums(
        self, row_sum, context, smem, warp: Int32, group: Int32, index: cutlass.Constexpr,
        now: Int32,
    ):  # fmt: skip
        """Adds the four warps' sums and writes the chunk's partial sums."""
        cursor, row, col, _ = context
        first = self._first_column(col, group)
        lane = cute.arch.lane_idx()
        r = cursor[3] + row + index * SWAP_ROWS + lane
        if warp % 4 == 1 and lane < SWAP_ROWS and r < cursor[4]:
            slot = self._sum_slot(smem, group, now)
            total = slot[0, lane]
            for i in cutlass.range_constexpr(1, 4):
                total = total + slot[i, lane]
            row_sum[first // SWAP_COLUMNS, r] = total
