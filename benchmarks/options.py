"""Types of command line options, which refuse what could only fail after the work."""

import argparse
import os
from pathlib import Path

import torch

from benchmarks.shapes import Shape


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


def shape(text: str) -> Shape:
    """The size of a layer, ``T,H,I,E,top_k``."""
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def device(text: str) -> torch.device:
    """The name of a CUDA device or of the CPU; whether it is there is not asked."""
    try:
        chosen = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected cuda or cpu, got {text!r}") from None
    if chosen.type not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"expected cuda or cpu, got {text!r}")
    return chosen


def output_file(text: str) -> Path:
    """A file that can be written; directories that are missing are made with it."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory, expected a file")
    place = path.absolute()
    while not place.exists():
        place = place.parent
    if not os.access(place, os.W_OK) or not (place.is_dir() or place == path.absolute()):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {place}")
    return path
