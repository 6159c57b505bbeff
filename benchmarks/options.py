"""Types of command line options, which refuse what could only fail after the work."""

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import NamedShape, Shape
from benchmarks.shapes import named_shape as _named_shape
from sonic.runtime import devices

# Of a layer's size as an option: the name of its value, and what to say of it.
THIEK = "T,H,I,E,K"
THIEK_HELP = (
    "tokens, hidden size, expert intermediate size, experts, and K: top_k, experts of a token"
)
_MOST_SECONDS = 86_400.0


def positive(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def not_negative(text: str) -> int:
    """An integer of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A time of more than nothing and at most a day."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= _MOST_SECONDS:  # not a number neither
        message = f"expected seconds, more than 0 and at most {_MOST_SECONDS:.0f}, got {text!r}"
        raise argparse.ArgumentTypeError(message)
    return value


def named_shape(text: str) -> NamedShape:
    """A shape by its letter."""
    try:
        return _named_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def shape(text: str) -> Shape:
    """The size of a layer, of which :data:`THIEK` is the name."""
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def device(text: str) -> torch.device:
    """The name of a CUDA device that torch sees, or of the CPU."""
    try:
        chosen = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected cuda or cpu, got {text!r}") from None
    if chosen.type not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"expected cuda or cpu, got {text!r}")
    if chosen.type == "cpu" and chosen.index is not None:
        message = f"expected cuda or cpu, got {text!r}: CPUs have no number. Pass cpu"
        raise argparse.ArgumentTypeError(message)
    missing = missing_gpu(chosen)
    if missing is not None:
        raise argparse.ArgumentTypeError(missing)
    return chosen


def missing_gpu(chosen: torch.device) -> str | None:
    """What to say if torch sees no such device."""
    return devices.missing_gpu(chosen, "pass cpu")


class EachOnce(argparse.Action):
    """Several values, none of them twice."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        repeated = repetition(values)
        if repeated is not None:
            raise argparse.ArgumentError(self, repeated)
        setattr(namespace, self.dest, values)


def repetition(values: Sequence[Any]) -> str | None:
    """What to say of values one of which comes twice."""
    for index, value in enumerate(values):
        if value in values[:index]:
            first = values.index(value) + 1
            return (
                f"value {index + 1} is value {first} once more. Give each once: figures of equal "
                "runs would be mixed"
            )
    return None


def output_file(text: str) -> Path:
    """A file that can be written, which is tried; directories that are missing are made with it."""
    path = Path(text)
    if not text:
        raise argparse.ArgumentTypeError("expected the name of a file, got none")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory, expected a file")
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if not (place.is_dir() or place == path.absolute()):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {place} is no directory")
    if not _takes_writing(place):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {place} refuses it")
    return path


def _takes_writing(place: Path) -> bool:
    """Whether this file can be changed, or a file be made in this directory. Permissions alone do
    not say so: root has them everywhere, also in file systems that make no files."""
    if not os.access(place, os.W_OK):
        return False
    try:
        if place.is_dir():
            with tempfile.TemporaryFile(dir=place):
                pass
        elif place.is_file():
            with place.open("ab"):
                pass
    except OSError:
        return False
    return True
