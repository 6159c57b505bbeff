"""Runs the host half of a compiled CuTeDSL function and captures its launches.

`cute.compile(..., options="--enable-tvm-ffi ...")` followed by `export_to_c` gives an object file
whose undefined symbols are all in shim.c. Linked together they make a shared library whose entry
point `__tvm_ffi_<name>` is called here through ctypes, with plain host pointers standing for device
pointers; neither CUDA nor libtvm_ffi is loaded.
"""

import ctypes as C
import os
import subprocess
from dataclasses import dataclass

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
LAUNCH = C.CFUNCTYPE(
    C.c_int,
    C.c_char_p,
    C.POINTER(C.c_uint32),
    C.POINTER(C.c_uint32),
    C.POINTER(C.c_uint32),
    C.c_uint64,
    C.c_int,
    C.c_int,
    C.POINTER(C.c_void_p),
)
DL_CUDA = 2
# TVM-FFI type indices
FFI_NONE, FFI_INT, FFI_BOOL, FFI_FLOAT, FFI_POINTER, FFI_DLTENSOR, FFI_ARRAY = 0, 1, 2, 3, 4, 7, 71
# DLPack (type code, bits) by element type name
DTYPES = {
    "bfloat16": (4, 16), "float16": (2, 16), "float32": (2, 32), "float64": (2, 64), "int8": (0, 8),
    "int16": (0, 16), "int32": (0, 32), "int64": (0, 64), "uint8": (1, 8), "uint16": (1, 16),
    "uint32": (1, 32), "uint64": (1, 64), "bool": (6, 8), "float8_e4m3fn": (10, 8),
    "float8_e5m2": (12, 8), "float8_e8m0fnu": (14, 8),
}  # fmt: skip


class Stream:
    """A stream argument; kernels run at once, so there is only the null stream."""


STREAM = Stream()


class DLTensor(C.Structure):
    _fields_ = [
        ("data", C.c_void_p), ("device_type", C.c_int32), ("device_id", C.c_int32),
        ("ndim", C.c_int32), ("code", C.c_uint8), ("bits", C.c_uint8), ("lanes", C.c_uint16),
        ("shape", C.POINTER(C.c_int64)), ("strides", C.POINTER(C.c_int64)),
        ("byte_offset", C.c_uint64),
    ]  # fmt: skip


class FFIAny(C.Structure):
    _fields_ = [("type_index", C.c_int32), ("pad", C.c_uint32), ("value", C.c_uint64)]


class FFIArray(C.Structure):
    """A TVMFFIObject header and the TVMFFISeqCell behind it (tvm/ffi/c_api.h)."""

    _fields_ = [
        ("references", C.c_uint64), ("type_index", C.c_int32), ("pad", C.c_uint32),
        ("deleter", C.c_void_p), ("data", C.POINTER(FFIAny)), ("size", C.c_int64),
        ("capacity", C.c_int64), ("data_deleter", C.c_void_p),
    ]  # fmt: skip


@dataclass(frozen=True)
class Pointer:
    """An argument that is the address of `array`, where the signature has a pointer."""

    array: object


@dataclass
class Buffer:
    """An array argument: type name, shape, strides in elements, address, the bytes behind it."""

    dtype: str
    shape: tuple
    strides: tuple
    address: int
    base: int
    data: np.ndarray
    keep: object

    @classmethod
    def of(cls, array):
        """Of a torch CPU tensor or a numpy array, without a copy."""
        if hasattr(array, "untyped_storage"):
            if array.device.type != "cpu":
                raise TypeError(
                    f"the emulator takes CPU tensors, not one on {array.device}: use .cpu()"
                )
            storage = array.untyped_storage()
            base, nbytes = storage.data_ptr(), storage.nbytes()
            dtype = str(array.dtype).removeprefix("torch.")
            strides, address = tuple(array.stride()), array.data_ptr()
        else:
            owner = array
            while isinstance(owner.base, np.ndarray):
                owner = owner.base
            base, nbytes, dtype = owner.ctypes.data, owner.nbytes, array.dtype.name
            strides, address = tuple(s // array.itemsize for s in array.strides), array.ctypes.data
        if dtype not in DTYPES:
            raise TypeError(f"the emulator takes no {dtype} arrays; it takes {', '.join(DTYPES)}")
        view = (
            np.ctypeslib.as_array(C.cast(base, C.POINTER(C.c_uint8)), (nbytes,))
            if nbytes
            else np.zeros(0, np.uint8)
        )
        return cls(dtype, tuple(array.shape), strides, address, base, view, array)

    def dltensor(self):
        """A DLTensor of it, with the arrays that must outlive it."""
        n = len(self.shape)
        shape, strides = (C.c_int64 * n)(*self.shape), (C.c_int64 * n)(*self.strides)
        code, bits = DTYPES[self.dtype]
        return (
            DLTensor(self.address, DL_CUDA, 0, n, code, bits, 1, shape, strides, 0),
            shape,
            strides,
        )


@dataclass
class Launch:
    """A captured launch; `args` are pointers to the kernel's parameters.

    programmatic: it has the attribute programmatic stream serialization. non_portable: the kernel
    has the attribute that allows clusters of more than eight CTAs.
    """

    name: str
    grid: tuple
    block: tuple
    cluster: tuple
    smem: int
    programmatic: bool
    non_portable: bool
    args: object


def is_array(x):
    return isinstance(x, np.ndarray) or hasattr(x, "untyped_storage")


def buffers_of(value, found):
    """`value` with its arrays, also those in tuples, as Buffers, which are appended to `found`."""
    if isinstance(value, tuple):
        return tuple(buffers_of(v, found) for v in value)
    if isinstance(value, Pointer):
        return Pointer(buffers_of(value.array, found))
    if not is_array(value):
        return value
    found.append(Buffer.of(value))
    return found[-1]


def pack(slot, value, keep):
    """Fills one argument slot from a Buffer, number, None, STREAM, Pointer or tuple of these."""
    if isinstance(value, Buffer):
        parts = value.dltensor()
        keep.append(parts)
        slot.type_index, slot.value = FFI_DLTENSOR, C.addressof(parts[0])
    elif isinstance(value, (bool, np.bool_)):
        slot.type_index, slot.value = FFI_BOOL, int(value)
    elif isinstance(value, (int, np.integer)):
        slot.type_index, slot.value = FFI_INT, int(value) & (2**64 - 1)
    elif isinstance(value, (float, np.floating)):
        slot.type_index, slot.value = FFI_FLOAT, int(np.float64(value).view(np.uint64))
    elif isinstance(value, Stream):
        slot.type_index, slot.value = FFI_POINTER, 0
    elif isinstance(value, Pointer):
        slot.type_index, slot.value = FFI_POINTER, value.array.address
    elif isinstance(value, tuple):
        items = (FFIAny * len(value))()
        for item, v in zip(items, value, strict=True):
            pack(item, v, keep)
        array = FFIArray(1, FFI_ARRAY, 0, None, items, len(value), len(value), None)
        keep.append((items, array))
        slot.type_index, slot.value = FFI_ARRAY, C.addressof(array)
    elif value is None:
        slot.type_index, slot.value = FFI_NONE, 0
    else:
        raise TypeError(f"no TVM-FFI argument from {type(value).__name__}")


class HostFunction:
    """The entry point `name` of an object file, linked with the shim into `workdir`."""

    def __init__(self, object_file, name, workdir):
        library = os.path.join(workdir, name + ".so")
        shim = os.path.join(HERE, "shim.c")
        subprocess.run(
            [
                "gcc",
                "-O1",
                "-shared",
                "-Wl,-Bsymbolic",
                "-fPIC",
                "-w",
                "-o",
                library,
                shim,
                object_file,
            ],
            check=True,
        )
        self.lib = C.CDLL(library)
        self.lib.emulator_error.restype = C.c_char_p
        self.entry = getattr(self.lib, "__tvm_ffi_" + name)
        self.entry.restype = C.c_int
        self.entry.argtypes = [C.c_void_p, C.POINTER(FFIAny), C.c_int32, C.POINTER(FFIAny)]

    def __call__(self, args, on_launch, smem_optin, sm_count):
        """Calls the function; `on_launch(Launch)` runs at once for every kernel it launches."""
        failure = []

        def callback(name, grid, block, cluster, smem, programmatic, wide, kernel_args):
            try:
                on_launch(
                    Launch(
                        name.decode(),
                        tuple(grid[:3]),
                        tuple(block[:3]),
                        tuple(cluster[:3]),
                        smem,
                        bool(programmatic),
                        bool(wide),
                        kernel_args,
                    )
                )
                return 0
            except BaseException as e:  # must not unwind through C
                failure.append(e)
                return 1

        keep, packed = [], (FFIAny * len(args))()
        for slot, a in zip(packed, args, strict=True):
            pack(slot, a, keep)
        reference = LAUNCH(callback)
        self.lib.emulator_set_launch(reference)
        self.lib.emulator_set_device(smem_optin, sm_count)
        self.lib.emulator_clear_error()
        status = self.entry(None, packed, len(args), C.byref(FFIAny()))
        if failure:
            raise failure[0]
        if status:
            raise RuntimeError("host function failed: " + self.lib.emulator_error().decode())
