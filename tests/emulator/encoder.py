"""Tensor maps for hand-written PTX: the shim's cuTensorMapEncodeTiled, called from Python."""

import ctypes
import functools
import os
import subprocess
import tempfile

from .host import HERE

TYPES = (
    "u8", "u16", "u32", "s32", "u64", "s64", "f16", "f32", "f64", "bf16", "f32_ftz", "tf32",
    "tf32_ftz", "b4x16", "b4x16_p64", "b6x16_p32",
)  # fmt: skip
SWIZZLES = ("none", "32B", "64B", "128B", "128B_atom_32B", "128B_atom_32B_flip_8B", "128B_atom_64B")


@functools.cache
def shim():
    with tempfile.TemporaryDirectory(prefix="emulator_") as folder:
        library = os.path.join(folder, "shim.so")
        source = os.path.join(HERE, "shim.c")
        subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
        lib = ctypes.CDLL(library)
    lib.emulator_error.restype = ctypes.c_char_p
    return lib


def tensor_map(dtype, address, dims, strides, box, *, swizzle="none", steps=None, nan_fill=False):
    """The 128 bytes of a tiled tensor map; sizes in elements, innermost first, `strides` in bytes
    from dimension 1 on. Raises ValueError where the driver would refuse.
    """
    block = (ctypes.c_uint64 * 32)()
    at = -(-ctypes.addressof(block) // 64) * 64

    def array(ctype, values):
        return (ctype * max(len(values), 1))(*values)

    lib = shim()
    lib.emulator_clear_error()
    status = lib._cuTensorMapEncodeTiled(
        ctypes.c_void_p(at),
        TYPES.index(dtype),
        len(dims),
        ctypes.c_void_p(address),
        array(ctypes.c_uint64, dims),
        array(ctypes.c_uint64, strides),
        array(ctypes.c_uint32, box),
        array(ctypes.c_uint32, steps or [1] * len(dims)),
        0,
        SWIZZLES.index(swizzle),
        0,
        int(nan_fill),
    )
    if status:
        raise ValueError(lib.emulator_error().decode())
    return ctypes.string_at(at, 128)
