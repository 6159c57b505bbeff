"""Compiled calibration kernels, kept outside the tree, ready to run in the emulator."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import torch

from tests.emulator import Emulator
from tests.emulator.host import Pointer

from .configurations import CONFIGURATIONS, OBJECT_NAME, Configuration
from .problems import compare, make_tensors

ROOT = Path(__file__).resolve().parents[2]


def cache_folder():
    """CALIBRATION_CACHE, or a folder for temporary files."""
    default = Path(tempfile.gettempdir()) / "sonic-calibration"
    folder = Path(os.environ.get("CALIBRATION_CACHE", default))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def interpreter():
    """A Python that has quack-kernels: this one, or CALIBRATION_PYTHON; None if there is none."""
    return sys.executable if find_spec("quack") else os.environ.get("CALIBRATION_PYTHON")


def is_compiled(configuration):
    """Whether the configuration is in the cache; its last file is."""
    return (cache_folder() / f"{configuration.key}.json").exists()


def available(name):
    """Whether `calibration_kernel(name)` can give it: compiled before, or quack is at hand."""
    return is_compiled(CONFIGURATIONS[name]) or interpreter() is not None


def compile_missing(configurations):
    """Compiles what is not in the cache, one process an architecture."""
    missing = [c for c in configurations if not is_compiled(c)]
    if missing and interpreter() is None:
        raise RuntimeError(
            "the calibration kernels need quack-kernels: run in an environment that has it, or set "
            "CALIBRATION_PYTHON to its interpreter; see tests/calibration/README.md"
        )
    for arch in sorted({c.arch for c in missing}):
        names = [c.name for c in missing if c.arch == arch]
        command = [interpreter(), "-m", "tests.calibration.quack_gemms", arch, str(cache_folder())]
        subprocess.run([*command, *names], cwd=ROOT, check=False)


@dataclass(frozen=True)
class CalibrationKernel:
    """A compiled configuration. `emulator.load(text)` puts other PTX behind the same host code."""

    configuration: Configuration
    emulator: Emulator
    about: dict

    def make_tensors(self, seed=0):
        """The problem's named tensors; "D", and "act" if there, are outputs and hold NaN."""
        return make_tensors(self.configuration, seed)

    def arguments(self, tensors):
        """What `emulator(...)` is called with."""
        return list(_build(self.about["arguments"], tensors))

    def compare(self, tensors):
        """(error over the largest value, share of the bound), see `problems.compare`; right if
        the share is at most 1."""
        return compare(self.configuration, tensors)

    def options(self, but=None):
        """The Machine options under which its Findings, all `but` one, are not reported."""
        (program,) = self.emulator.programs.values()
        found = {}
        for finding in self.configuration.findings:
            if finding is not but:
                found |= finding.options(program.kernel)
        return found

    def run(self, policy, seed=0, **options):
        """Runs it once: (`compare`'s result, the Machine). Raises Fault for what is found."""
        tensors = self.make_tensors(seed)
        machine = self.emulator(self.arguments(tensors), policy, **options)
        return self.compare(tensors), machine

    @cached_property
    def ptx(self):
        return (cache_folder() / f"{self.configuration.key}.ptx").read_text()


def about(configuration):
    """What was noted when it was compiled."""
    return json.loads((cache_folder() / f"{configuration.key}.json").read_text())


def calibration_kernel(name):
    """The kernel of the configuration `name`, compiled now if it was not before."""
    if name not in CONFIGURATIONS:
        near = get_close_matches(name, CONFIGURATIONS, 3) or list(CONFIGURATIONS)[:3]
        raise ValueError(
            f"no configuration {name!r}; configurations.py has {len(CONFIGURATIONS)}, "
            f"such as {', '.join(near)}"
        )
    c = CONFIGURATIONS[name]
    compile_missing([c])
    folder = cache_folder()
    if not is_compiled(c):
        raise RuntimeError(f"quack did not compile {name}; its message is above")
    text = (folder / f"{c.key}.ptx").read_text()
    emulator = Emulator(ptx_text=text, object_file=str(folder / f"{c.key}.o"), name=OBJECT_NAME)
    return CalibrationKernel(c, emulator, about(c))


def _build(description, tensors):
    """The argument that `quack_gemms.describe` described, over these tensors."""
    if isinstance(description, list):
        return tuple(_build(d, tensors) for d in description)
    if not isinstance(description, dict):
        return description
    if "pointer" in description:
        return Pointer(tensors[description["pointer"]])
    shape, stride, offset = description["place"]
    return torch.as_strided(tensors[description["tensor"]], shape, stride, offset)
