"""Runs hand-written PTX: a kernel body with its parameters, for tests of single instructions."""

import numpy as np

from . import ptx
from .machine import Machine
from .memory import GlobalMemory
from .policy import Policy
from .program import Program

HEADER = """.version 8.7
.target {target}
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry snippet({params})
{{
.reg .pred %p<32>;
.reg .b16 %h<32>;
.reg .b32 %r<128>;
.reg .b64 %d<64>;
{setup}
{body}
ret;
}}
"""


def program_of(body, arrays, params=0, target="sm_90a"):
    """The Program of a kernel with `body`; see `run_ptx`."""
    setup = ["mov.u32 %r0, %tid.x;"]
    declared = [f".param .u64 a{i}" for i in range(arrays)]
    declared += [f".param .align 64 .b8 m{i}[128]" for i in range(params)]
    setup += [f"ld.param.u64 %d{i}, [a{i}];" for i in range(arrays)]
    setup += [f"mov.b64 %d{arrays + i}, m{i};" for i in range(params)]
    text = HEADER.format(
        target=target, params=", ".join(declared), setup="\n".join(setup), body=body
    )
    (kernel,) = ptx.parse(text).values()
    return Program(kernel)


def machine_for(arrays, policy=None, **machine_options):
    """A Machine whose global memory holds the numpy arrays."""
    memory = GlobalMemory()
    for i, a in enumerate(arrays):
        memory.add(a.ctypes.data, a.reshape(-1).view(np.uint8), f"array {i}")
    return Machine(memory, policy or Policy(0), **machine_options)


def snippet_text(body, arrays=0, target="sm_90a", params=0):
    """PTX of a kernel with `body`: the text around it, parameters and registers of `run_ptx`."""
    setup = ["mov.u32 %r0, %tid.x;"]
    declared = [f".param .u64 a{i}" for i in range(arrays)]
    declared += [f".param .align 64 .b8 m{i}[128]" for i in range(params)]
    setup += [f"ld.param.u64 %d{i}, [a{i}];" for i in range(arrays)]
    setup += [f"mov.b64 %d{arrays + i}, m{i};" for i in range(params)]
    return HEADER.format(
        target=target, params=", ".join(declared), setup="\n".join(setup), body=body
    )


def launch_ptx(
    program,
    *arrays,
    grid=(1, 1, 1),
    block=(32, 1, 1),
    cluster=(1, 1, 1),
    smem=0,
    policy=None,
    params=(),
    **machine_options,
):
    """Runs the Program of a `snippet_text`; returns the Machine."""
    memory = GlobalMemory()
    for i, a in enumerate(arrays):
        memory.add(a.ctypes.data, a.reshape(-1).view(np.uint8), f"array {i}")
    machine = Machine(memory, policy or Policy(0), **machine_options)
    raw = [np.uint64(a.ctypes.data).tobytes() for a in arrays] + [bytes(p) for p in params]
    machine.launch(program, grid, block, cluster, smem, raw)
    return machine


def run_ptx(body, *arrays, target="sm_90a", params=(), **options):
    """Runs `body` in a kernel; returns the Machine.

    The address of numpy array i is in %d<i>; %r0 holds %tid.x. Registers: %p predicates, %h 16-bit,
    %r 32-bit, %d 64-bit. `dynamic` names the dynamic shared memory (`smem` bytes). `params`:
    128-byte parameters (tensor maps), whose generic addresses follow those of the arrays.
    options: see `launch_ptx`.
    """
    text = snippet_text(body, len(arrays), target, len(params))
    (kernel,) = ptx.parse(text).values()
    return launch_ptx(Program(kernel), *arrays, params=params, **options)
