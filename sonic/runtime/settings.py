"""What the environment sets. Read when first needed, parsed strictly, never changed by sonic."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from sonic.runtime.errors import ArgumentError

_PREFIX = "SONIC_"


class CacheMode(str, Enum):
    """What may be done with compiled kernels on disk."""

    READ_WRITE = "rw"
    READ_ONLY = "ro"
    OFF = "off"


@dataclass(frozen=True)
class Settings:
    """Values of the ``SONIC_*`` variables.

    Attributes:
        cache: ``SONIC_CACHE``, one of ``rw`` (default), ``ro`` and ``off``.
        cache_dir: ``SONIC_CACHE_DIR``, an absolute path or one below ``~``; by default ``sonic`` in
            ``XDG_CACHE_HOME``, or else in ``~/.cache``. ``None`` if there is no home directory.
    """

    cache: CacheMode = CacheMode.READ_WRITE
    cache_dir: Path | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Settings:
        """Settings of a process with these environment variables.

        :raises ArgumentError: a variable is set to a value that it does not take.
        """
        return cls(_cache_mode(environment), _cache_dir(environment))


VARIABLES = ("SONIC_CACHE", "SONIC_CACHE_DIR")


def unknown_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Variables that look like settings of sonic and are none, such as misspelt ones."""
    return sorted(n for n in environment if n.startswith(_PREFIX) and n not in VARIABLES)


def _cache_mode(environment: Mapping[str, str]) -> CacheMode:
    value = environment.get("SONIC_CACHE", CacheMode.READ_WRITE.value)
    try:
        return CacheMode(value)
    except ValueError:
        allowed = ", ".join(mode.value for mode in CacheMode)
        raise ArgumentError(
            f"SONIC_CACHE is {value!r}; allowed are {allowed}. Set one of them, or unset it to get "
            f"{CacheMode.READ_WRITE.value}"
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
