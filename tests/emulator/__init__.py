"""Runs compiled CuTeDSL kernels on a CPU, host code and all. See README.md."""

from .host import STREAM
from .memory import Fault
from .policy import Policy
from .ptx import PtxError
from .run import Const, Emulator, run_kernel

__all__ = ["STREAM", "Const", "Emulator", "Fault", "Policy", "PtxError", "run_kernel"]
