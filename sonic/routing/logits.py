"""The router's matrix product."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from sonic import checks


def router_logits(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, *, in_float32: bool = False
) -> Tensor:
    """``hidden_states @ weight.T + bias`` in their wider dtype.

    Args:
        hidden_states: (T, H). weight: (C, H). bias: (C,) or None.
        in_float32: at least in float32. Under autocast that is always so: a router's choice is not
            to depend on an enclosing region.

    Returns:
        (T, C).

    Raises:
        DeviceError: the tensors are not on one device.
    """
    checks.check_same_device("router", "hidden_states", hidden_states, weight=weight, bias=bias)
    kind = hidden_states.device.type
    has_autocast = kind in ("cuda", "cpu") and torch.is_autocast_enabled(kind)
    dtype = torch.promote_types(hidden_states.dtype, weight.dtype)
    if in_float32 or has_autocast:
        dtype = torch.promote_types(dtype, torch.float32)
    with torch.autocast(kind, enabled=False) if has_autocast else nullcontext():
        bias = None if bias is None else bias.to(dtype)
        return F.linear(hidden_states.to(dtype), weight.to(dtype), bias)
