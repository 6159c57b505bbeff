"""Where the reference rounds: one rule for the dtype in which sums are formed."""

import torch

_NARROW = (torch.bfloat16, torch.float16)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over ``dtype`` operands are kept in.

    float32 for bfloat16 and float16, otherwise ``dtype`` itself, so that a float64 call is float64
    throughout. bfloat16 and float16 operands are exact in TF32 too, hence PyTorch's TF32 switch
    changes the reference for float32 operands only.
    """
    return torch.float32 if dtype in _NARROW else dtype
