"""Compiling and exporting a CuTeDSL function with no GPU; imports the DSL lazily."""

import contextlib
import os
import re
import tempfile

from .host import Buffer, is_array

OPTIONS = "--enable-tvm-ffi --keep-ptx --generate-line-info"
ALIGNMENT = 16
EXAMPLES = ("sm_90a", "sm_100a", "sm_103a", "sm_120a")  # of architectures


def fake_tensor(array, static=False):
    """A fake tensor like `array`: its dtype, symbolic sizes and strides, a static stride of 1.

    Strides are promised to be multiples of 16 bytes if they are now. `static` fixes all sizes.
    """
    import cutlass
    import cutlass.cute as cute
    from cutlass.cute.runtime import make_fake_tensor

    names = {
        "bfloat16": "BFloat16", "float16": "Float16", "float32": "Float32", "float64": "Float64",
        "int8": "Int8", "int16": "Int16", "int32": "Int32", "int64": "Int64", "uint8": "Uint8",
        "uint16": "Uint16", "uint32": "Uint32", "uint64": "Uint64", "bool": "Boolean",
        "float8_e4m3fn": "Float8E4M3FN", "float8_e5m2": "Float8E5M2",
    }  # fmt: skip
    b = Buffer.of(array)
    if b.dtype not in names:
        raise TypeError(f"no CuTe tensor for dtype {b.dtype}; there are {', '.join(names)}")
    dtype = getattr(cutlass, names[b.dtype])
    if static:
        return make_fake_tensor(dtype, b.shape, b.strides, assumed_align=ALIGNMENT)
    contiguous = next((i for i in reversed(range(len(b.shape))) if b.strides[i] == 1), None)
    per = max(ALIGNMENT * 8 // dtype.width, 1)
    outer = [s for i, s in enumerate(b.strides) if i != contiguous]
    aligned = b.address % ALIGNMENT == 0 and all(s % per == 0 for s in outer)
    strides = tuple(
        1 if i == contiguous else cute.sym_int64(divisibility=per if aligned else 1)
        for i in range(len(b.shape))
    )
    shape = tuple(cute.sym_int32() for _ in b.shape)
    align = ALIGNMENT if aligned else dtype.width // 8
    return make_fake_tensor(dtype, shape, strides, assumed_align=align)


def fake_argument(value, static=False):
    """What stands for an argument when compiling; numbers stand for themselves."""
    from .host import Stream

    if is_array(value):
        return fake_tensor(value, static)
    if isinstance(value, Stream):
        from cutlass.cute.runtime import make_fake_stream

        return make_fake_stream()
    return value


@contextlib.contextmanager
def needed_options():
    """Compile options that the emulator needs, with a folder for what --keep-ptx writes.

    The compiled object holds the text, so the folder goes away.
    """
    with tempfile.TemporaryDirectory(prefix="emulator_") as folder:
        yield f"{OPTIONS} --dump-dir {folder}"


def compile_function(function, fakes, gpu_arch, options=""):
    """`cute.compile` of a @cute.jit function with the needed options."""
    import cutlass.cute as cute

    if not re.fullmatch(r"sm_\d+[af]?", gpu_arch):
        raise ValueError(f"gpu_arch {gpu_arch!r}: expected one such as {', '.join(EXAMPLES)}")
    with needed_options() as needed:
        return cute.compile(function, *fakes, options=f"--gpu-arch {gpu_arch} {needed} {options}")


def ptx_of(compiled):
    """The PTX text of a compiled object."""
    text = compiled.__ptx__
    if text is None:
        raise ValueError("the compiled object kept no PTX: compile with --keep-ptx")
    if isinstance(text, (list, tuple)):
        text = "\n".join(text)
    return text


def export(compiled, workdir, name):
    """Writes the object file of a compiled object; returns its path."""
    path = os.path.join(workdir, name + ".o")
    compiled.export_to_c(path, function_name=name)
    return path
