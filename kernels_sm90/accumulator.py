"""Where an epilogue takes the values of a finished tile from: this thread's registers.

A wgmma accumulator of 64 rows gives each thread two rows, and in each block of eight columns a pair
of neighbours. It is read where it lies, or, so that the next tile can be multiplied meanwhile, from
a copy in half as many registers.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Float16, Float32, Int32

from sonic.device.blocks import BLOCK
from sonic.device.ptx import bits_of_float, float_of_bits, maximum_magnitude, pack_pair, unpack_pair

_EXPONENT_SHIFT = 23
_LARGEST_EXPONENT = 14  # of a scaled value: half precision reaches 2**15.99
_EXPONENT_BIAS = 127
_ROWS_PER_MMA = 64


@dataclass(frozen=True)
class AccumulatorRegisters:
    """The accumulator itself, ``((2, 2, N / 8), rows / 64, 1)`` float32.

    ``is_output``: values are already what the epilogue stores. ``has_bias``: they include the bias.
    """

    accumulator: cute.Tensor
    is_output, has_bias = False, False

    def pair(self, m, half, block):
        """Columns ``8 block + 2 (lane % 4) + (0, 1)`` of row ``half`` of row block ``m``."""
        return tuple(self.accumulator[(j, half, block), m, 0] for j in range(2))


@dataclass(frozen=True)
class RoundedOutput:
    """A copy rounded to the output's type, for an epilogue that only stores the accumulator."""

    words: cute.Tensor
    dtype: type
    blocks: int
    is_output, has_bias = True, True

    def save(self, accumulator):
        """Copies the accumulator."""
        live = AccumulatorRegisters(accumulator)
        for i in range(cute.size(self.words)):
            m, half, block = i // (2 * self.blocks), i // self.blocks % 2, i % self.blocks
            low, high = live.pair(m, half, block)
            self.words[i] = pack_pair(low, high, self.dtype)

    def word(self, m, half, block):
        """The pair of :meth:`AccumulatorRegisters.pair` in one register, as it is stored."""
        return self.words[(2 * m + half) * self.blocks + block]


@dataclass(frozen=True)
class ScaledHalves:
    """A copy in half precision, with one power of two per thread and row as the scale.

    The scale puts the largest of the thread's values of a row between 2**14 and 2**15. Rounding
    costs 2**-11 of a value, an eighth of what bfloat16 costs, down to 2**-28 of the largest one.
    An infinity in a row is the largest: its scale flushes the thread's finite values of that row to
    zero, so that beside an Inf they are not what float32 would give.
    """

    words: cute.Tensor
    scales: cute.Tensor  # what a value of each row is multiplied by to get it back
    blocks: int
    is_output, has_bias = False, True

    def save(self, accumulator):
        """Copies the accumulator."""
        live = AccumulatorRegisters(accumulator)
        for row in range(cute.size(self.scales)):
            pairs = [live.pair(row // 2, row % 2, block) for block in range(self.blocks)]
            largest = Float32(0.0)
            for pair in pairs:
                largest = maximum_magnitude(maximum_magnitude(largest, pair[0]), pair[1])
            exponent = cutlass.max(
                bits_of_float(largest) >> _EXPONENT_SHIFT, Int32(_LARGEST_EXPONENT + 1)
            )
            self.scales[row] = float_of_bits((exponent - _LARGEST_EXPONENT) << _EXPONENT_SHIFT)
            inverse = 2 * _EXPONENT_BIAS + _LARGEST_EXPONENT - exponent
            scale = float_of_bits(inverse << _EXPONENT_SHIFT)
            for block, (low, high) in enumerate(pairs):
                word = pack_pair(low * scale, high * scale, Float16)
                self.words[row * self.blocks + block] = word

    def pair(self, m, half, block):
        """As :meth:`AccumulatorRegisters.pair`."""
        row = 2 * m + half
        pair = unpack_pair(self.words[row * self.blocks + block], Float16)
        return tuple(value * self.scales[row] for value in pair)


def saved_accumulator(rows: int, columns: int, output_dtype):
    """Registers for a copy of a ``rows x columns`` accumulator of one warpgroup.

    :param output_dtype: the type of the output if the accumulator is stored unchanged, else
    ``None``.
    """
    blocks = columns // BLOCK
    words = cute.make_rmem_tensor(2 * rows // _ROWS_PER_MMA * blocks, Int32)
    if output_dtype is not None:
        return RoundedOutput(words, output_dtype, blocks)
    scales = cute.make_rmem_tensor(2 * rows // _ROWS_PER_MMA, Float32)
    return ScaledHalves(words, scales, blocks)
