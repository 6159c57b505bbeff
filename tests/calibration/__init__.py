"""Calibration of the emulator: GEMMs of quack-kernels, known good on hardware. See README.md."""

from .kernels import CalibrationKernel, calibration_kernel

__all__ = ["CalibrationKernel", "calibration_kernel"]
