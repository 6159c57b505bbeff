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


def run_ptx(
    body,
    *arrays,
    grid=(1, 1, 1),
    block=(32, 1, 1),
    cluster=(1, 1, 1),
    smem=0,
    target="sm_90a",
    policy=None,
    params=(),
    **machine_options,
):
    """Runs `body` in a kernel; returns the Machine.

    The address of numpy array i is in %d<i>; %r0 holds %tid.x. Registers: %p predicates, %h 16-bit,
    %r 32-bit, %d 64-bit. `dynamic` names the dynamic shared memory (`smem` bytes). `params`:
    128-byte parameters (tensor maps), whose generic addresses follow those of the arrays.
    """
    setup = ["mov.u32 %r0, %tid.x;"]
    declared = [f".param .u64 a{i}" for i in range(len(arrays))]
    declared += [f".param .align 64 .b8 m{i}[128]" for i in range(len(params))]
    setup += [f"ld.param.u64 %d{i}, [a{i}];" for i in range(len(arrays))]
    setup += [f"mov.b64 %d{len(arrays) + i}, m{i};" for i in range(len(params))]
    text = HEADER.format(
        target=target, params=", ".join(declared), setup="\n".join(setup), body=body
    )
    (kernel,) = ptx.parse(text).values()
    memory = GlobalMemory()
    for i, a in enumerate(arrays):
        memory.add(a.ctypes.data, a.reshape(-1).view(np.uint8), f"array {i}")
    machine = Machine(memory, policy or Policy(0), **machine_options)
    raw = [np.uint64(a.ctypes.data).tobytes() for a in arrays] + [bytes(p) for p in params]
    machine.launch(Program(kernel), grid, block, cluster, smem, raw)
    return machine
