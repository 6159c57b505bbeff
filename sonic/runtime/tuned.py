"""Tiles that ``sonic tune`` found, kept beside the compiled kernels.

One file for a GPU model, ``<cache>/<arch>-<toolchain>/tiles-<model>.json``: other sources or
versions look into another folder, since what was fastest among other kernels need not be. A size
that is not in it gets the tiles that its extents call for.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sonic.enums import ActivationType
from sonic.runtime.cache import kernel_cache, read_own, turn
from sonic.runtime.problem import (
    Arch,
    EpilogueKind,
    Operand,
    Problem,
    Ragged,
    Schedule,
    TileConfig,
)

_log = logging.getLogger("sonic")
_FieldsT = TypeVar("_FieldsT", Problem, TileConfig)
_ENUMS = {
    "ragged": Ragged,
    "epilogue": EpilogueKind,
    "gather": Operand,
    "activation": ActivationType,
    "schedule": Schedule,
}


class TunedSize(NamedTuple):
    """What tiles are chosen for; ``n`` and ``k`` as for ``default_config``."""

    problem: Problem
    rows_per_expert: int
    n: int
    k: int
    experts: int


@functools.cache
def tuned_tiles(arch: Arch, gpu: str) -> Mapping[TunedSize, TileConfig]:
    """What the file for this GPU model holds, read once; nothing if there is none to use."""
    path = tuned_file(arch, gpu)
    try:
        return {} if path is None else _read(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        _log.warning("did not use the tuned tiles in %s: %s", path, error)
        return {}


def tuned_file(arch: Arch, gpu: str) -> Path | None:
    """Where tiles for this GPU model are kept; ``None`` if the cache is off or cannot be used."""
    folder = kernel_cache().folder(arch)
    return None if folder is None else folder / f"tiles-{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}.json"


def keep_tuned(path: Path, found: Mapping[TunedSize, TileConfig]) -> None:
    """Write ``found`` over what the file has for these sizes, in one step.

    Processes take turns, so that none loses what another one found. Who keeps tiles calls
    :func:`sonic.runtime.launch.forget_tiles` then.

    :raises OSError: the file cannot be read or written.
    """
    with turn(path.with_name(f".{path.stem}.lock")):
        try:
            earlier = _read(path)
        except FileNotFoundError:
            earlier = {}
        except (ValueError, TypeError, KeyError) as error:
            _log.warning("begins anew the tuned tiles in %s: %s", path, error)
            earlier = {}
        _write(path, earlier | dict(found))


def _write(path: Path, entries: Mapping[TunedSize, TileConfig]) -> None:
    lines = [
        json.dumps({**size._asdict(), "problem": asdict(size.problem), "tiles": asdict(config)})
        for size, config in entries.items()
    ]
    descriptor, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write("[\n" + ",\n".join(lines) + "\n]\n")
        os.replace(name, path)
    finally:
        with contextlib.suppress(FileNotFoundError):  # renamed
            os.unlink(name)


def _read(path: Path) -> dict[TunedSize, TileConfig]:
    found = {}
    for entry in json.loads(read_own(path)):
        problem = _from_fields(Problem, entry["problem"])
        size = (int(entry[name]) for name in ("rows_per_expert", "n", "k", "experts"))
        found[TunedSize(problem, *size)] = _from_fields(TileConfig, entry["tiles"])
    return found


def _from_fields(kind: type[_FieldsT], fields: dict[str, Any]) -> _FieldsT:
    values = {
        name: _ENUMS[name](value) if name in _ENUMS and value is not None else value
        for name, value in fields.items()
    }
    return kind(**values)
