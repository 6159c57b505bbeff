"""What the emulator rightly reports of kernels that give right values on hardware."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.emulator.ptx import Not


@dataclass(frozen=True)
class Finding:
    """report: a pattern in the message. options: of the Machine, from the kernel's `ptx.Kernel`,
    that leave out the check that reports it; the values and all other checks remain."""

    report: str
    options: Callable[[Any], dict[str, Any]]
    why: str


COPY_FENCE = Finding(
    "was not followed by a fence.proxy.async",
    lambda kernel: {"copy_fence": False},
    "A's rows are copied by cp.async, which writes in the generic proxy, and read by wgmma or "
    "tcgen05.mma, in the async proxy, with an mbarrier but no fence.proxy.async between.",
)
LOWEST_LEADER = Finding(
    "deadlock|no progress|step limit",
    lambda kernel: {"any_leader": False},
    "The epilogue's warps free a buffer of C by an arrival of the lane that is both the lowest and "
    "the one that elect.sync takes, which may be any, but is the lowest on hardware.",
)


def first_loads(kernel):
    """(PTX lines of the main loop's first ldmatrix, before its first step; the predicate register
    under which the wait before them is left out, as the tile has no steps)."""
    instrs = kernel.instrs
    first = next(i for i, ins in enumerate(instrs) if ins.parts[0] == "ldmatrix")
    end = next(i for i in range(first, len(instrs)) if instrs[i].parts[0] == "bra")
    lines = {ins.line for ins in instrs[first:end] if ins.parts[0] == "ldmatrix"}
    skips = [ins for ins in instrs[:first] if ins.parts[0] == "bra" and ins.guard is not None]
    start = max(ins.target for ins in skips if ins.target <= first)
    guard = next(ins.guard for ins in skips if ins.target == start)
    if isinstance(guard, Not):
        raise ValueError(f"the tile without steps is left by a negated guard, {guard}, not a guard")
    return lines, guard


def unused_loads(kernel):
    """The Machine option by which those loads give NaN where the tile has no steps."""
    lines, no_steps = first_loads(kernel)
    return lambda w, ins: ins.line in lines and bool(w.r[no_steps.index].all())


EMPTY_SEGMENT = Finding(
    "race: TMA load of",
    lambda kernel: {"unused": unused_loads(kernel)},
    "For a segment without columns the mainloop's first ldmatrix reads a stage that it has not "
    "waited for, while TMA fills it for the next segment; what it reads is not used: NaN in its "
    "place changes nothing.",
)
