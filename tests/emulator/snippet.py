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


def program_of(body, arrays=0, target="sm_90a", params=0):
    """The Program of a kernel with `body`; see `run_ptx`."""
    (kernel,) = ptx.parse(snippet_text(body, arrays, target, params)).values()
    return Program(kernel)


def machine_for(arrays, policy=None, **machine_options):
    """A Machine whose global memory holds the numpy arrays."""
    memory = GlobalMemory()
    for i, a in enumerate(arrays):
        memory.add(a.ctypes.data, a.reshape(-1).view(np.uint8), f"array {i}")
    return Machine(memory, policy or Policy(0), **machine_options)


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
    machine = machine_for(arrays, policy, **machine_options)
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
    program = program_of(body, len(arrays), target, len(params))
    return launch_ptx(program, *arrays, params=params, **options)


def run_stream(launches, *arrays, policy=None, target="sm_90a", **machine_options):
    """Runs several kernels on the same arrays; `launches`: (body, grid, block, programmatic)."""
    machine = machine_for(arrays, policy, **machine_options)
    raw = [np.uint64(a.ctypes.data).tobytes() for a in arrays]
    for body, grid, block, programmatic in launches:
        program = program_of(body, len(arrays), target)
        machine.enqueue(program, (grid, 1, 1), (block, 1, 1), (1, 1, 1), 1024, raw, programmatic)
    machine.synchronize()
    return machine
