"""Tensor memory of a CTA: 128 lanes of 512 columns of 32 bits, and what is ordered in it.

PTX ISA 9.7.16.1 (allocation) and 9.7.16.6 (order). The columns are an SM's: CTAs that share one get
different ones, though each has its own data here. Each group of 16 lanes of a column remembers who
wrote and read it last, as shared memory does (see `ordering`). MMAs and copies of a thread are an
own component of the clocks, its Engine, whose time counts the thread's commits: who has waited for
a commit's mbarrier is ordered after them, whoever has merely heard from the warp, or waited for
another lane's commit, is not. A
`tcgen05.ld` is over at `wait::ld`, a `tcgen05.st` at `wait::st`, and until then its stamp is
PENDING.

What the ISA leaves undefined is a Fault. Two things work on hardware and are done by kernels known
to be good, and are a warning of the machine: a load ordered by the use of its registers instead of
`wait::ld`, and order between threads without `tcgen05.fence`.
"""

import numpy as np

from .memory import Fault, line_of
from .ordering import before_writes
from .values import POISON32

COLUMNS = 512
HALVES = 8  # groups of 16 lanes; a warp owns two


def name_of(ins):
    return ".".join(ins.parts[:2])


def known(w, write):
    """What is ordered before a warp's tcgen05 operations (those that write: `write`); relaxed
    arrivals count after a fence.
    """
    clock = w.clock if w.tmem_heard is None else np.maximum(w.clock, w.tmem_clock)
    return before_writes(clock) if write else clock


class Engine:
    """The asynchronous tcgen05 operations of one thread: their `component` of the clocks, whose
    time counts the thread's commits, and those that came after the last one, `open`."""

    def __init__(self, component):
        self.component, self.commits, self.open = component, 0, []

    @property
    def time(self):
        """When operations that the thread issues now are over."""
        return self.commits + 1


def engine_of(w, lane):
    """The Engine of a thread."""
    if lane not in w.engines:
        w.engines[lane] = Engine(w.cta.cluster.new_component())
    return w.engines[lane]


def begin_read(w, smem, units, ins, what):
    """The (memory, access) of an operand's read, checked."""
    smem.check_async(w, units, what, write=False)
    access = smem.begin(f"{ins.parts[0]}.{ins.parts[1]} read", units, ins, w)
    w.engine_reads[access] = smem
    return smem, access


def end_reads(w, ops, time):
    """The reads of operations are over for those who know of the warp's `time`. Others of the
    same warp go on, perhaps of the same units."""
    for op in ops:
        for smem, access in op.reads:
            smem.read_over_at(w, access, time)
            del w.engine_reads[access]
    for access, smem in w.engine_reads.items():
        if smem.check:
            smem.history.begin_read(w, access.units, access.ins.line)


def free_columns(memories, columns):
    """The first column of a range that is free on the SMs of these, first fit; or None."""
    at = 0
    for start, n in sorted(x for memory in memories for x in memory.taken_on_sm().items()):
        if start - at >= columns:
            break
        at = max(at, start + n)
    return at if at + columns <= COLUMNS else None


class TensorMemory:
    """The data, the allocations (first column -> columns), and stamps by (half, column)."""

    def __init__(self, cta, check):
        self.cta, self.check = cta, check
        self.data = np.full((128, COLUMNS), POISON32, np.uint32)
        self.taken, self.last, self.relinquished = {}, COLUMNS, False
        self.calls, self.waiters, self.done = 0, [], {}  # of tcgen05.alloc
        self.warned = set()
        self.version, self.checked = 0, None  # of the stamps, but an engine's own; see `mma_order`
        shape = (HALVES, COLUMNS)
        self.writer = np.zeros(shape, np.int16)
        self.written = np.zeros(shape, np.int32)
        self.write_fence = np.zeros(shape, np.int32)
        self.write_line = np.zeros(shape, np.int32)
        # loads, by the number of the reader's warpgroup; the last slot: reads of an engine
        slots = -(-len(cta.warps) // 4) + 1
        self.reader = np.zeros((*shape, slots), np.int16)
        self.read = np.zeros((*shape, slots), np.int32)
        self.read_fence = np.zeros((*shape, slots), np.int32)
        self.read_line = np.zeros((*shape, slots), np.int32)
        self.by_registers = np.zeros((*shape, slots), bool)

    # ---- allocation ----
    def on_sm(self):
        """The TensorMemory of every CTA that shares the SM, this one among them."""
        ctas = (cluster.ctas[self.cta.rank] for cluster in self.cta.cluster.sharing)
        return [cta.tmem for cta in ctas if cta.tmem]

    def taken_on_sm(self):
        """The allocations of all these CTAs."""
        return {at: n for memory in self.on_sm() for at, n in sorted(memory.taken.items())}

    def take(self, at, columns):
        self.taken[at] = columns
        self.data[:, at : at + columns] = POISON32

    def check_columns(self, column, n):
        """Columns must lie in one allocation."""
        for start, columns in self.taken.items():
            if start <= column and column + n <= start + columns:
                return
        raise Fault(
            f"TMEM columns {column}..{column + n - 1} are not in an allocation {self.taken}"
        )

    # ---- order ----
    def after_writes(self, machine, w, halves, columns, ins, engine=None, write=None):
        """An access by warp `w` (asynchronous: by `engine`) must come after earlier writes.

        write: whether it writes; by default, that of an engine does.
        """
        write = engine is not None if write is None else write
        at = halves, columns
        writer, written = self.writer[at], self.written[at]
        late = written > known(w, write)[writer]
        if engine is not None:
            late &= writer != engine.component
        if late.any():
            raise self.unordered(w, at, late, ins, self.write_line, "write by")
        stamps = writer, self.write_fence[at], self.write_line[at]
        self.after_fence(machine, w, *stamps, ins, engine, write)

    def after_reads(self, machine, w, halves, columns, ins, engine=None):
        """A write by warp `w` (asynchronous: by `engine`) must come after earlier reads."""
        at = halves, columns
        reader, read = self.reader[at], self.read[at]
        late = read > known(w, True)[reader]
        if engine is not None:
            late &= reader != engine.component
        if late.any():
            raise self.unordered(w, at, late, ins, self.read_line, "read by")
        soft = self.by_registers[at]
        if soft.any():
            line = int(self.read_line[at][soft][0])
            what = f"{name_of(ins)} overwrites what a tcgen05.ld read that no tcgen05.wait::ld "
            self.warn(machine, w, what + "follows, only uses of its registers: {}; {}", line, ins)
        stamps = reader, self.read_fence[at], self.read_line[at]
        self.after_fence(machine, w, *stamps, ins, engine, True)

    def after_fence(self, machine, w, who, fenced, lines, ins, engine, write):
        """Warns of order that holds without the fences of 9.7.16.6.3."""
        foreign = (fenced != 0) & (who != w.id)
        if engine is not None:
            foreign &= who != engine.component
        if not foreign.any():
            return
        fences = before_writes(w.tmem_clock) if write else w.tmem_clock
        for missing, clock in (("before", known(w, write)), ("after", fences)):
            late = foreign & (fenced > clock[who])
            if late.any():
                what = f"no tcgen05.fence::{missing}_thread_sync between {{}} and {{}}"
                self.warn(machine, w, what, int(lines[late][0]), ins)
                return

    def warn(self, machine, w, what, line, ins):
        """Adds a warning that names an earlier PTX line and an instruction, once."""
        key = what, line, ins.line
        if key not in self.warned:
            self.warned.add(key)
            machine.warnings.add(what.format(line_of(w, line), ins.where()))

    def unordered(self, w, at, late, ins, lines, who):
        """The Fault for an access that nothing orders after an earlier one."""
        line = int(lines[at][late][0])
        where = line_of(w, line)
        kind = next((k for k in ("ld", "st") if f"tcgen05.{k}" in where), None)
        why = "whose commit's mbarrier nothing here has waited for"
        if kind:
            why = f"which a tcgen05.wait::{kind} (and between warps a barrier) must order before it"
        columns = f"TMEM columns {at[1].start}..{at[1].stop - 1}"
        return Fault(f"race: {name_of(ins)} of {columns}, after the {who} {where}, {why}")

    def idle(self, w, columns, ins):
        """Nothing may be using columns that warp `w` is about to free."""
        at = slice(None), columns
        for who, times, lines, kind in (
            (self.writer, self.written, self.write_line, "write by"),
            (self.reader, self.read, self.read_line, "read by"),
        ):
            late = times[at] > before_writes(w.clock)[who[at]]
            if late.any():
                raise self.unordered(w, at, late, ins, lines, kind)

    def mma_order(self, machine, w, halves, columns, ins, engine):
        """An MMA's accumulators must come after earlier accesses; repeats are checked once."""
        key = engine.component, halves, columns, self.version
        if self.checked == key:
            return
        self.after_writes(machine, w, halves, columns, ins, engine)
        self.after_reads(machine, w, halves, columns, ins, engine)
        self.checked = key

    def stamp_write(self, halves, columns, component, time, line):
        at = halves, columns
        self.writer[at], self.written[at] = component, time
        self.write_fence[at], self.write_line[at] = time, line

    def stamp_read(self, halves, columns, slot, component, time, line):
        at = halves, columns, slot
        self.reader[at], self.read[at] = component, time
        self.read_fence[at], self.read_line[at] = time, line
        self.by_registers[at] = False
