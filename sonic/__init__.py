"""Mixture-of-Experts layers that keep little and run fast.

Importing this package loads neither torch, triton nor cutlass: every name below, and the modules
``sonic.reference``, ``sonic.testing`` and so on, are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sonic import enums as enums
    from sonic import flops as flops
    from sonic import integrations as integrations
    from sonic import nn as nn
    from sonic import reference as reference
    from sonic import routing as routing
    from sonic import testing as testing
    from sonic.enums import ActivationType as ActivationType
    from sonic.enums import GateUpLayout as GateUpLayout
    from sonic.enums import KernelBackendMoE as KernelBackendMoE
    from sonic.enums import ScoreOrder as ScoreOrder
    from sonic.enums import is_glu as is_glu
    from sonic.functional import experts as experts
    from sonic.functional import experts_flat as experts_flat
    from sonic.functional import grouped_mm as grouped_mm
    from sonic.functional import moe as moe
    from sonic.functional import moe_general_routing_inputs as moe_general_routing_inputs
    from sonic.functional import moe_TC_softmax_topk_layer as moe_TC_softmax_topk_layer
    from sonic.memory import MemoryEstimate as MemoryEstimate
    from sonic.memory import memory_estimate as memory_estimate
    from sonic.memory import saved_bytes as saved_bytes
    from sonic.nn.moe import Experts as Experts
    from sonic.nn.moe import MoE as MoE
    from sonic.plan import RoutingPlan as RoutingPlan
    from sonic.plan import build_plan as build_plan
    from sonic.plan import build_plan_flat as build_plan_flat
    from sonic.routing.token_rounding import token_rounding as token_rounding
    from sonic.routing.topk import topk_routing as topk_routing
    from sonic.runtime.backend import Availability as Availability
    from sonic.runtime.backend import is_available as is_available
    from sonic.runtime.errors import ArgumentError as ArgumentError
    from sonic.runtime.errors import CompileError as CompileError
    from sonic.runtime.errors import DeviceError as DeviceError
    from sonic.runtime.errors import DTypeError as DTypeError
    from sonic.runtime.errors import LayoutError as LayoutError
    from sonic.runtime.errors import MissingPackageError as MissingPackageError
    from sonic.runtime.errors import ShapeError as ShapeError
    from sonic.runtime.errors import SonicError as SonicError
    from sonic.runtime.errors import UnsupportedError as UnsupportedError

_NAMES_BY_MODULE = {
    "sonic.enums": ("ActivationType", "GateUpLayout", "KernelBackendMoE", "ScoreOrder", "is_glu"),
    "sonic.functional": (
        "experts",
        "experts_flat",
        "grouped_mm",
        "moe",
        "moe_TC_softmax_topk_layer",
        "moe_general_routing_inputs",
    ),
    "sonic.memory": ("MemoryEstimate", "memory_estimate", "saved_bytes"),
    "sonic.nn.moe": ("Experts", "MoE"),
    "sonic.plan": ("RoutingPlan", "build_plan", "build_plan_flat"),
    "sonic.routing.token_rounding": ("token_rounding",),
    "sonic.routing.topk": ("topk_routing",),
    "sonic.runtime.backend": ("Availability", "is_available"),
    "sonic.runtime.errors": (
        "ArgumentError",
        "CompileError",
        "DTypeError",
        "DeviceError",
        "LayoutError",
        "MissingPackageError",
        "ShapeError",
        "SonicError",
        "UnsupportedError",
    ),
}
# Modules that are used by their own names, such as ``sonic.reference.moe_reference``.
_MODULES = ("enums", "flops", "integrations", "nn", "reference", "routing", "testing")
_MODULE_BY_NAME = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names}

__all__ = sorted([*_MODULE_BY_NAME, *_MODULES, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _MODULES:
        value = importlib.import_module(f"sonic.{name}")
    elif name in _MODULE_BY_NAME:
        value = getattr(importlib.import_module(_MODULE_BY_NAME[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    """The installed version; ``0+unknown`` in a checkout that was never installed."""
    from importlib import metadata

    try:
        return metadata.version("sonic")
    except metadata.PackageNotFoundError:
        return "0+unknown"
