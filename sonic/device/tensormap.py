"""TMA descriptors of the layer's tensors, built on the host at launch. Strides are in elements.

Three kinds cover every operand:

* ``rows_map``    a plain ``(rows, cols)`` matrix.
* ``ragged_map``  the same matrix, addressed by *expert segment*: rows at or past the segment's
  end read as zero and are not written, with one descriptor for all experts. The segment's end is
  moved onto the descriptor's bound: with ``BIG = 2**30`` and row stride ``s`` bytes, two more
  dimensions have strides ``2**34 - s`` and ``s``. At coordinates ``(col, BIG - length + i, BIG,
  end)`` the address is ``col + s (BIG - length + i) + BIG (2**34 - s) + s end = col + s (begin + i)
  + 2**64``, and the row coordinate leaves ``[0, BIG)`` exactly when ``i >= length``.
* ``weight_map``  one matrix per expert ``(E, rows, cols)``; with gated rows, the row axis is seen
  as ``(8, 2, I/8)``: eight gate rows, then the eight up rows that belong to them. Interleaved and
  concatenated parameters differ in two strides only.
"""

from cutlass import Int32, Int64
from cutlass.experimental.cuda import (
    TensorMapL2Promotion,
    TensorMapSwizzle,
    create_tensor_map_tiled,
)

RAGGED_EXTENT = 1 << 30
_UNBOUNDED = (1 << 31) - 1
_SWIZZLE_BY_BYTES = {
    32: TensorMapSwizzle.s32b,
    64: TensorMapSwizzle.s64b,
    128: TensorMapSwizzle.s128b,
}


def _encode(tensor, dims, strides, box):
    element_bytes = tensor.element_type.width // 8
    return create_tensor_map_tiled(
        tensor.iterator.toint(),
        tensor.element_type,
        [Int32(d) for d in dims],
        [Int64(s) for s in strides],
        list(box),
        swizzle=_SWIZZLE_BY_BYTES[box[0] * element_bytes],
        l2_promotion=TensorMapL2Promotion.l2_256b,
    )


def _in_16_bytes(tensor, stride):
    return Int64(stride) * (tensor.element_type.width // 8) // 16


def rows_map(tensor, box_cols: int, box_rows: int):
    """Descriptor of ``tensor (rows, cols)``, contiguous rows."""
    rows, cols = tensor.shape
    return _encode(tensor, (cols, rows), (_in_16_bytes(tensor, cols),), (box_cols, box_rows))


def ragged_map(tensor, box_cols: int, box_rows: int):
    """Descriptor of ``tensor (rows, cols)`` addressed through :func:`ragged_coordinates`."""
    stride = _in_16_bytes(tensor, tensor.shape[1])
    return _encode(
        tensor,
        (tensor.shape[1], RAGGED_EXTENT, _UNBOUNDED, _UNBOUNDED),
        (stride, Int64((1 << 34) // 16) - stride, stride),
        (box_cols, box_rows, 1, 1),
    )


def ragged_coordinates(col, row_in_segment, begin, end):
    """Coordinates of a box at ``row_in_segment`` of the segment ``[begin, end)``."""
    return [col, RAGGED_EXTENT - (end - begin) + row_in_segment, RAGGED_EXTENT, end]


def weight_map(tensor, box_cols: int, box_rows: int, gated_rows: bool, pair_stride, unit_stride):
    """Descriptor of ``tensor (E, rows, cols)``, with any strides of experts and rows.

    Gated rows ``2i`` and ``2i + 1`` of unit ``i`` lie ``pair_stride`` elements apart, units
    ``unit_stride``.
    """
    experts, rows, cols = tensor.shape
    expert_stride = _in_16_bytes(tensor, tensor.stride[0])
    if not gated_rows:
        return _encode(
            tensor,
            (cols, rows, experts),
            (_in_16_bytes(tensor, tensor.stride[1]), expert_stride),
            (box_cols, box_rows, 1),
        )
    return _encode(
        tensor,
        (cols, 8, 2, rows // 16, experts),
        (
            _in_16_bytes(tensor, unit_stride),
            _in_16_bytes(tensor, pair_stride),
            _in_16_bytes(tensor, unit_stride * 8),
            expert_stride,
        ),
        (box_cols, 8, 2, box_rows // 16, 1),
    )


def weight_coordinates(col, row, expert, gated_rows: bool):
    """Coordinates of a :func:`weight_map` box; ``row`` is a multiple of 16 if rows are gated."""
    if not gated_rows:
        return [col, row, expert]
    return [col, 0, 0, row // 16, expert]
