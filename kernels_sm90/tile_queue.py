"""Which tile a CTA takes next (mixin of ``GroupedGemmSm90``).

Tiles that read the same weights are neighbours in the linear order, and the second level cache
serves all but the first of them if they run at about the same time. With a fixed stride per CTA,
faster SMs get ahead by whole tiles, and where one expert's weights do not fit the cache every CTA
then reads them from memory. So CTAs take tiles from a counter: what runs at one time is a window
of the linear order.

The counter is a word of global memory, zero when the kernel starts: tiles taken, beside the first
one of each CTA, which is its own index. One warp takes a tile ahead of need and hands it to the
others through a ring in shared memory.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from kernels_sm90.tiles import TILE_SLOTS


class TileQueueMixin:
    """The sequence of tiles of one CTA, or of one cluster with a fixed stride."""

    @cute.jit
    def take_tile(self, counter: cute.Tensor):
        """Starts taking a tile; the value is on its way until it is used."""
        taken = Int32(0)
        if cute.arch.lane_idx() == 0:
            old = cute.arch.atomic_add(counter.iterator, Int32(1), sem="relaxed", scope="gpu")
            taken = Int32(old)
        return taken

    @cute.jit
    def publish_tile(self, counter: cute.Tensor, taken: Int32, turn: Int32, smem) -> Int32:
        """Hands the tile taken before to all that ask, as number ``turn``; takes the next."""
        slot = turn % TILE_SLOTS
        empty = self.barrier(smem, self.smem.tile_empty, slot)
        cute.arch.mbarrier_wait(empty, ((turn // TILE_SLOTS) & 1) ^ 1)
        if cute.arch.lane_idx() == 0:
            blocks, _, _ = cute.arch.grid_dim()
            entry = self._tile_slot(smem, slot)
            entry[0] = blocks + taken
            cute.arch.mbarrier_arrive(self.barrier(smem, self.smem.tile_full, slot))
        return self.take_tile(counter)

    @cute.jit
    def next_tile(self, tile: Int32, tile_step: Int32, turn: Int32, smem):
        """``(tile after this one, its turn + 1)``; all loading and math warps ask for each turn."""
        if cutlass.const_expr(self.dynamic):
            slot = turn % TILE_SLOTS
            full = self.barrier(smem, self.smem.tile_full, slot)
            cute.arch.mbarrier_wait(full, (turn // TILE_SLOTS) & 1)
            tile = self._tile_slot(smem, slot)[0]
            cute.arch.sync_warp()
            if cute.arch.lane_idx() == 0:
                cute.arch.mbarrier_arrive(self.barrier(smem, self.smem.tile_empty, slot))
        else:
            tile = tile + tile_step
        return tile, turn + 1

    def _tile_slot(self, smem, slot):
        pointer = cute.recast_ptr(smem + (self.smem.tile_ring + slot * 4), dtype=Int32)
        return cute.make_tensor(pointer, cute.make_layout(1))
