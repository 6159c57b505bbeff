"""Adapters to other packages. Each is optional and imports its package only when it is used."""

import importlib
from typing import Any

_MODULES = ("transformers",)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
