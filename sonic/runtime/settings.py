"""What the environment sets. Read when first needed, parsed strictly, never changed by sonic."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TypeVar

from sonic.runtime.errors import ArgumentError

_PREFIX = "SONIC_"
_ChoiceT = TypeVar("_ChoiceT", bound=Enum)


class CacheMode(str, Enum):
    """What may be done with compiled kernels on disk."""

    READ_WRITE = "rw"
    READ_ONLY = "ro"
    OFF = "off"


class CompileMode(str, Enum):
    """Which kernels are compiled, and kept, when a layer first needs one of them."""

    ALL = "all"  # those of every number of tokens
    NEEDED = "needed"


@dataclass(frozen=True)
class Settings:
    """Values of the ``SONIC_*`` variables.

    Attributes:
        compile: ``SONIC_COMPILE``, ``all`` (default) or ``needed``.
        cache: ``SONIC_CACHE``, one of ``rw`` (default), ``ro`` and ``off``.
        cache_dir: ``SONIC_CACHE_DIR``, an absolute path or one below ``~``; by default ``sonic`` in
            ``XDG_CACHE_HOME``, or else in ``~/.cache``. ``None`` if there is no home directory.
    """

    cache: CacheMode = CacheMode.READ_WRITE
    cache_dir: Path | None = None
    compile: CompileMode = CompileMode.ALL

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Settings of a process with these environment variables.

        :raises ArgumentError: a variable is set to a value that it does not take.
        """
        return cls(
            _choice(environment, "SONIC_CACHE", CacheMode.READ_WRITE),
            _cache_dir(environment),
            _choice(environment, "SONIC_COMPILE", CompileMode.ALL),
        )


VARIABLES = ("SONIC_CACHE", "SONIC_CACHE_DIR", "SONIC_COMPILE")


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Variables that look like settings of sonic and are none, such as misspelt ones."""
    return sorted(n for n in environment if n.startswith(_PREFIX) and n not in VARIABLES)


def _choice(environment: Mapping[str, str], name: str, default: _ChoiceT) -> _ChoiceT:
    value = environment.get(name, default.value)
    try:
        return type(default)(value)
    except ValueError:
        allowed = ", ".join(mode.value for mode in type(default))
        raise ArgumentError(
            f"{name} is {value!r}; allowed are {allowed}. Set one of them, or unset it to get "
            f"{default.value}"
        ) from None


def _cache_dir(environment: Mapping[str, str]) -> Path | None:
    value = environment.get("SONIC_CACHE_DIR")
    if value is not None:
        path = Path(os.path.expanduser(value))
        if not value or not path.is_absolute():
            raise ArgumentError(
                f"SONIC_CACHE_DIR is {value!r}, which is no absolute path: every process would look"
                " somewhere else. Give one that starts with / or ~, or unset it"
            )
        return path
    # XDG Base Directory Specification 0.8: a relative path there is to be ignored.
    base = environment.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    return Path(base) / "sonic" if os.path.isabs(base) else None
