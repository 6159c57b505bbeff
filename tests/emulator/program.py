"""A kernel translated for the emulator: per instruction a node (kind, function, next)."""

import importlib

import numpy as np

from .alu import Codegen
from .builder import Builder
from .memory import LOCAL_WINDOW, SHARED_WINDOW

MODULES = (
    "accesses", "barriers", "bulk", "calls", "copies", "fragments", "lanes", "launchcontrol",
    "maps", "mbarriers", "mma_sync", "registers", "remote", "tcgen05", "tcgen05_mma", "tma",
    "wgmma",
)  # fmt: skip
for _module in MODULES:  # each enters its instructions in the table
    importlib.import_module("." + _module, __package__)
IGNORED = {
    "prefetch",
    "prefetchu",
    "discard",
    "applypriority",
    "nanosleep",
    "createpolicy",
    "pmevent",
}


class Program:
    """A kernel's nodes, and the registers that stand for its special registers and symbols."""

    def __init__(self, kernel):
        self.kernel, self.sm100 = kernel, kernel.target.startswith("sm_10")
        self.extra = {}
        self.codegen = Codegen(self.symbol)
        self.codegen.names.update(
            SHARED_WINDOW=np.uint64(SHARED_WINDOW), LOCAL_WINDOW=np.uint64(LOCAL_WINDOW)
        )
        self.nodes = [None] * (len(kernel.instrs) + 1)
        self.uses = {}  # by node: the registers that its instructions name (see inflight)
        heads = {i.parts[:3] for i in kernel.instrs}
        self.mixes_proxies = bool(
            heads & {("cp", "async", "bulk"), ("cp", "reduce", "async")}
        ) and any(i.parts[0] in ("st", "atom", "red") for i in kernel.instrs)
        self.local_at, self.local_bytes = {}, 0
        for name, (size, align) in kernel.local.items():
            self.local_bytes = -(-self.local_bytes // align) * align
            self.local_at[name] = self.local_bytes
            self.local_bytes += size
        self.build()

    def symbol(self, name):
        """The register index of a special register or symbol."""
        if name not in self.extra:
            self.extra[name] = len(self.kernel.reg_widths) + len(self.extra)
        return self.extra[name]

    def build(self):
        """Fills `nodes`: generated functions for register-only runs, the table for the rest."""
        instrs = self.kernel.instrs
        targets = {i.target for i in instrs if i.target >= 0}
        builder = Builder(self)
        source, runs = [], []
        i = 0
        while i < len(instrs):
            j = i
            while (
                j < len(instrs) and (j == i or j not in targets) and self.codegen.handles(instrs[j])
            ):
                j += 1
            if j > i:
                for masked in (True, False):
                    self.codegen.masked = masked
                    lines = [line for ins in instrs[i:j] for line in self.codegen.emit(ins)]
                    source.append(
                        f"def run{i}{'m' if masked else ''}(r, m):\n"
                        + "".join(f"    {s}\n" for s in lines or ["pass"])
                    )
                runs.append((i, j))
                i = j
                continue
            ins = instrs[i]
            if ins.parts[0] == "bra":
                self.nodes[i] = ("bra", ins.guard, ins.target)
            elif ins.parts[0] in ("ret", "exit"):
                self.nodes[i] = ("ret", ins.guard, None)
            elif ins.parts[0] in IGNORED:
                self.nodes[i] = ("nop", None, None)
            else:
                self.nodes[i] = ("op", builder.build(ins), ins.guard)
            i += 1
        names = self.codegen.names
        exec(compile("\n".join(source), f"<{self.kernel.name}>", "exec"), names)
        for i, j in runs:
            self.nodes[i] = ("run", (names[f"run{i}"], names[f"run{i}m"]), j)

    def node_instructions(self, pc):
        """The instructions of the node at `pc`."""
        kind, _, end = self.nodes[pc]
        return self.kernel.instrs[pc : end if kind == "run" else pc + 1]
