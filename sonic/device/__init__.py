"""Traced CuTeDSL code that every architecture's kernels share."""
