"""Errors of the public API.

Each text says what was asked, what came, what is allowed and what to do.
"""


class SonicError(Exception):
    """Base of every error that sonic raises on purpose."""


class ShapeError(SonicError, ValueError):
    """A size, rank or alignment that the operation does not take."""


class ArgumentError(SonicError, ValueError):
    """An option whose value is outside the allowed set or range."""


class DTypeError(SonicError, TypeError):
    """A dtype that the operation does not take."""


class DeviceError(SonicError, ValueError):
    """A tensor on the wrong device."""


class LayoutError(SonicError, ValueError):
    """Strides or storage alignment that the operation does not take."""


class MissingPackageError(SonicError, ImportError):
    """An optional package that the request needs is not installed."""


class UnsupportedError(SonicError, NotImplementedError):
    """A valid request that no kernel here serves: an architecture, a feature or a combination."""


class CompileError(SonicError, RuntimeError):
    """A kernel failed to compile."""
