"""What the operations accept, each limit stated once, and the form of an error's text. No GPU."""

from __future__ import annotations

# Of every implementation.
MAX_SLOTS = 2**31 - 1  # rows and slots are numbered in int32
MAX_EXPERTS = 65_536  # the most for which the routing kernels are tested
MAX_TOP_K = 64  # the winners of a token lie in the registers of one program

# Of the kernels only, on every architecture.
KERNEL_DTYPES = ("bfloat16", "float16")
KERNEL_ALIGNMENT = 8  # elements of 2 bytes: rows move in pieces of 16 bytes
# A descriptor of ragged rows reaches this far from an expert's last row, see
# ``sonic.device.tensormap``, and one expert may receive every row.
MAX_KERNEL_ROWS = 2**30
MAX_SPLIT_EXPERTS = 4096  # of a split reduction: one program holds their offsets


def message(op: str, got: str, allowed: str, todo: str) -> str:
    """The four-part text: the operation and what came, what is allowed, what to do."""
    return f"{op}: {got}. Allowed: {allowed}. {todo}"
