"""Triton kernels around the grouped matmuls: routing plan, top-k, combine, score and bias
gradients.

The same source serves every architecture. Modules here import ``triton`` at the top, so nothing
above imports them at import time. Launchers run on the device and the current stream of their
input, allocate only from shapes (no host synchronisation, capturable in a CUDA graph), pick block
sizes analytically (nothing is autotuned) and use no atomics: repeated runs agree bit for bit.
"""
