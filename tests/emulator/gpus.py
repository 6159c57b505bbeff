"""What a GPU offers, and what a launch or an instruction may ask of it.

Limits: CUDA C++ Programming Guide, "Compute Capabilities". Instructions by target: the "Target ISA
Notes" of the PTX ISA, as ptxas 13.0 enforces them.
"""

import math
from dataclasses import dataclass

from .memory import SMEM_RESERVED, Fault
from .ptx import PtxError

REGISTERS = 65536  # of an SM, and of a CTA
PORTABLE_CLUSTER = 8


@dataclass(frozen=True)
class Gpu:
    """target: what its code is compiled for; smem_block, smem_sm: bytes of shared memory a CTA may
    opt in to, and of an SM with the reserved KiB of every CTA; cluster: CTAs, if it may be more
    than the portable 8.
    """

    name: str
    target: str
    sms: int
    smem_block: int
    smem_sm: int
    threads_sm: int
    ctas_sm: int
    cluster: int
    tensor_columns: int = 0


GPUS = {
    g.name: g
    for g in (
        Gpu("H100", "sm_90a", 132, 232448, 233472, 2048, 32, 16),
        Gpu("H200", "sm_90a", 132, 232448, 233472, 2048, 32, 16),
        Gpu("B200", "sm_100a", 148, 232448, 233472, 2048, 32, 16, 512),
        Gpu("B300", "sm_103a", 160, 232448, 233472, 2048, 32, 16, 512),
        Gpu("RTX 5090", "sm_120a", 170, 101376, 102400, 1536, 24, 8),
    )
}
DEFAULT = {"sm_90": "H200", "sm_100": "B200", "sm_103": "B300", "sm_120": "RTX 5090"}


def gpu_for(target, name=None):
    """The GPU of that name, or the usual one for a PTX target; PtxError if it cannot run it."""
    base = target.rstrip("af")
    if name is None:
        return GPUS[DEFAULT.get(base, "H200")]
    if name not in GPUS:
        raise ValueError(f"unknown GPU {name!r}; known are {', '.join(GPUS)}")
    gpu = GPUS[name]
    if base != gpu.target.rstrip("af"):
        raise PtxError(f"PTX for {target} does not run on {name}, which takes {gpu.target}")
    return gpu


# ---- instructions ----
TENSOR_CORE_5 = ("sm_100", "sm_103")  # targets with tcgen05
BLACKWELL = (*TENSOR_CORE_5, "sm_120", "sm_121")


def needed(parts):
    """The targets that have an instruction, or None if all here have it; as (targets, suffix)."""
    head = parts[0]
    if head == "wgmma":
        return ("sm_90",), True
    if head == "tcgen05" or "cta_group::1" in parts or "cta_group::2" in parts:
        return TENSOR_CORE_5, True
    if "tile::scatter4" in parts or ("tile::gather4" in parts and "shared::cluster" in parts):
        return TENSOR_CORE_5, True
    if "tile::gather4" in parts or head == "clusterlaunchcontrol" or "cp_mask" in parts:
        return BLACKWELL, "multicast::cluster::all" in parts
    if "swizzle_atomicity" in parts:
        return BLACKWELL, True
    if head == "setmaxnreg" or parts[:2] == ("tensormap", "replace"):
        return ("sm_90", *BLACKWELL), True
    return None


def check_instruction(ins, target):
    """PtxError if the target lacks an instruction."""
    need = needed(ins.parts)
    if need is None:
        return
    bases, suffix = need
    if target.rstrip("af") not in bases or (suffix and target[-1] not in "af"):
        listed = ", ".join(b + "a" * suffix for b in bases)
        raise PtxError(f"line {ins.line}: {target} has no {ins.text}; it needs {listed}")


# ---- launches ----
def check_launch(gpu, grid, dynamic, non_portable=True):
    """Fault if a launch asks for more than the GPU has, or for what the kernel's directives deny.

    dynamic: bytes of dynamic shared memory. non_portable: the kernel has the attribute that allows
    clusters of more than eight CTAs.
    """
    kernel, block, cluster = grid.kernel, grid.block, grid.cluster_dim
    smem, size = grid.smem_end - SMEM_RESERVED, grid.ctas_per_cluster
    directives = kernel.directives
    most = directives.get("maxnreg", (0,))[0]
    allowed = gpu.cluster if non_portable else min(gpu.cluster, PORTABLE_CLUSTER)
    rules = [
        (min(*grid.dims, *block, *cluster) < 1,
         f"grid {grid.dims}, block {block}, cluster {cluster}", "at least 1 along each axis"),
        (smem > gpu.smem_block, f"{smem} bytes of shared memory ({dynamic} of them dynamic)",
         f"{gpu.smem_block} a CTA"),
        (grid.threads > 1024 or block[2] > 64, f"blocks of {block} threads",
         "1024 threads, 64 along z"),
        (grid.dims[0] >= 1 << 31 or max(grid.dims[1:]) > 65535, f"a grid of {grid.dims}",
         "2**31 - 1, 65535 and 65535"),
        (most * grid.threads > REGISTERS, f"{most} registers a thread for {grid.threads} threads",
         f"{REGISTERS} a CTA"),
        (size > allowed, f"clusters of {size} CTAs", f"{allowed}"),
    ]  # fmt: skip
    for wrong, asked, limit in rules:
        if wrong:
            raise Fault(f"launch of {grid.name} on {gpu.name}: {asked}, but the limit is {limit}")

    def three(numbers):
        return (*numbers, 1, 1)[:3]

    demands = [
        ("reqntid", block, lambda want: three(want) == block),
        ("maxntid", block, lambda want: grid.threads <= math.prod(want)),
        ("reqnctapercluster", cluster, lambda want: three(want) == cluster),
        ("maxclusterrank", cluster, lambda want: size <= want[0]),
    ]  # fmt: skip
    for name, given, fits in demands:
        if name in directives and not fits(directives[name]):
            said = ", ".join(map(str, directives[name]))
            raise Fault(f"launch of {grid.name} with {given}, but the kernel says .{name} {said}")


def ctas_per_sm(gpu, grid):
    """How many CTAs an SM holds, by shared memory, threads and `.maxnreg` registers."""
    smem = grid.smem_end  # with the reserved KiB
    most = grid.kernel.directives.get("maxnreg", (0,))[0]
    by_registers = REGISTERS // (most * grid.threads) if most else gpu.ctas_sm
    return min(gpu.ctas_sm, gpu.smem_sm // smem, gpu.threads_sm // grid.threads, by_registers)


def check_residency(gpu, grid):
    """A sentence if the kernel's `.minnctapersm` cannot be met, or None."""
    wanted = grid.kernel.directives.get("minnctapersm", (0,))[0]
    fit = ctas_per_sm(gpu, grid)
    if fit < wanted:
        return f"{grid.name} says .minnctapersm {wanted}, but {gpu.name} holds {fit} of its CTAs"
    return None
