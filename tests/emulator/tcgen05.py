"""tcgen05: allocation, fences, loads and stores of tensor memory (PTX ISA 9.7.16.7-8, 9.7.16.6).

A load reads at its issue or as late as it may, by chance: at `tcgen05.wait::ld` or when one of its
registers is used, since 9.7.16.6.4.5 has a true register dependency respected; a mov of one hands
that on to its destination. A store is a later event, over at the latest at `tcgen05.wait::st`.
`tmem` checks what is ordered.
"""

import numpy as np

from .accesses import store_shared
from .builder import BLOCK, converged, first, instruction, set_reg
from .memory import Fault
from .ordering import PENDING
from .ptx import Sink
from .tmem import COLUMNS, TensorMemory, free_columns
from .values import LANE_IDS

GROUPS = "cta_group::1 cta_group::2 sync aligned"
LAYOUTS = "sync aligned 32x32b 16x32bx2 16x64b 16x128b 16x256b x1 x2 x4 x8 x16 x32 x64 x128"
LATE = 0.5  # how often a load waits for its registers' first use


def tensor_memory(cta):
    """A CTA's TensorMemory."""
    if cta.tmem is None:
        cta.tmem = TensorMemory(cta, cta.smem.check)
    return cta.tmem


def cta_group(b, ins):
    """1 or 2; 9.7.16.5 wants the same in all instructions of a kernel."""
    mine = next(p for p in ins.parts if p.startswith("cta_group::"))
    for other in b.program.kernel.instrs:
        if other.parts[0] == "tcgen05" and {"cta_group::1", "cta_group::2"} & set(other.parts):
            if mine not in other.parts:
                raise b.unsupported(ins)
    return int(mine[-1])


# ---- allocation ----
def allocate_pair(M, w, frag, n):
    """Collective over the CTA pair: (whether both have asked, the address or None)."""
    cta, peer = w.cta, w.cta.cluster.ctas[w.cta.rank ^ 1]
    mine, other = tensor_memory(cta), tensor_memory(peer)
    if frag.token is None:
        frag.token = mine.calls = mine.calls + 1
        mine.waiters.append(w)
    if other.calls < frag.token:
        w.why = "tcgen05.alloc of the peer CTA"
        return False, None
    if frag.token not in mine.done:
        at = free_columns((mine, other), n)
        for memory in (mine, other):
            memory.done[frag.token] = at
            if at is not None:
                memory.take(at, n)
    for x in other.waiters:
        M.wake(x)
    other.waiters.clear()
    at = mine.done[frag.token]
    if at is None:  # both try again after a deallocation
        mine.done.pop(frag.token), other.done.pop(frag.token)
        mine.waiters.append(w)
        taken = f"{mine.taken_on_sm()} and {other.taken_on_sm()}"
        w.why = f"tcgen05.alloc of {n} columns: {taken} of the SMs are taken"
        return False, None
    frag.token = None
    return True, at


def check_columns(n, what):
    if n < 32 or n > COLUMNS or n & (n - 1):
        raise Fault(f"{what} of {n} columns: a power of two from 32 to {COLUMNS} is allowed")


@instruction("tcgen05.alloc", GROUPS + " shared::cta")
def alloc(b, ins):
    """9.7.16.7.1: blocks until there is room; later allocations may not be larger."""
    addr, columns = b.shared_address(ins.operands[0]), b.get(ins.operands[1], "u4")
    pair = cta_group(b, ins) == 2

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        n, memory = first(columns(w.r), m), tensor_memory(w.cta)
        check_columns(n, "tcgen05.alloc")
        if memory.relinquished:
            raise Fault("tcgen05.alloc after relinquish_alloc_permit")
        if n > memory.last:
            raise Fault(
                f"tcgen05.alloc of {n} columns after one of {memory.last}: sizes must not increase"
            )
        if pair:
            ready, at = allocate_pair(M, w, frag, n)
            if not ready:
                return BLOCK
        else:
            at = free_columns((memory,), n)
            if at is None:
                w.why = f"tcgen05.alloc of {n} columns: {memory.taken_on_sm()} of the SM are taken"
                memory.waiters.append(w)
                return BLOCK
            memory.take(at, n)
        memory.last = n
        M.progress = M.tick
        store_shared(w, addr(w.r)[:1], 4, [np.array([at], np.uint32)], ins)

    return run


@instruction("tcgen05.dealloc", GROUPS)
def dealloc(b, ins):
    addr, columns = b.get(ins.operands[0], "u4"), b.get(ins.operands[1], "u4")
    cta_group(b, ins)

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        at, n = first(addr(w.r), m) & 0xFFFF, first(columns(w.r), m)
        check_columns(n, "tcgen05.dealloc")
        memory = tensor_memory(w.cta)
        if memory.taken.get(at) != n:
            raise Fault(
                f"tcgen05.dealloc of {n} columns at {at}: not an allocation, those are "
                f"{memory.taken}"
            )
        if memory.check:
            memory.idle(w, slice(at, at + n), ins)
        del memory.taken[at]
        for neighbour in memory.on_sm():
            for x in neighbour.waiters:
                M.wake(x)
            neighbour.waiters.clear()

    return run


@instruction("tcgen05.relinquish_alloc_permit", GROUPS)
def relinquish(b, ins):
    cta_group(b, ins)

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        tensor_memory(w.cta).relinquished = True

    return run


# ---- fences and waits ----
@instruction("tcgen05.fence::before_thread_sync")
def fence_before(b, ins):
    """9.7.16.6.3: earlier tcgen05 operations come before what follows, for other threads too."""

    return lambda M, w, frag, m: fence_before_sync(w)


def fence_before_sync(w):
    for fenced, at in w.tmem_unfenced.values():
        fenced[at] = w.clock[w.id]
    w.tmem_unfenced.clear()
    w.tmem_fenced = w.clock.copy()
    w.clock[w.id] += 1


@instruction("tcgen05.fence::after_thread_sync")
def fence_after(b, ins):
    def run(M, w, frag, m):
        np.maximum(w.tmem_clock, w.clock, out=w.tmem_clock)
        if w.tmem_heard is not None:
            np.maximum(w.tmem_clock, w.tmem_heard, out=w.tmem_clock)

    return run


@instruction("tcgen05.wait::ld", "sync aligned")
def wait_ld(b, ins):
    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        for load in w.tmem_loads:
            load.waited(w)
        w.tmem_loads.clear()

    return run


@instruction("tcgen05.wait::st", "sync aligned")
def wait_st(b, ins):
    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        for store in w.tmem_stores:
            store.fire()
            store.over(w)
        w.tmem_stores.clear()

    return run


# ---- loads and stores ----
class Shape:
    """9.7.16.8.2: where register j of thread t lies, from the start of an access.

    `lanes`, `columns`: (registers, 32) offsets; `ranges`: (first column, columns) that it covers;
    `packed`: a register holds the low halves of two columns, the second in `columns + 1`.
    """

    def __init__(self, shape, count, packed, split):
        t = LANE_IDS.astype(np.int64)
        one = {
            "32x32b": [(t, 0 * t)],
            "16x32bx2": [(t % 16, 0 * t)],
            "16x64b": [(t // 4 + 8 * (t & 1), (t >> 1) & 1)],
            "16x128b": [(t // 4 + 8 * h, t % 4) for h in (0, 1)],
            "16x256b": [(t // 4 + 8 * h, 2 * (t % 4) + j) for h in (0, 1) for j in (0, 1)],
        }[shape]
        per = 2 if packed else 1
        width = {"16x64b": 2, "16x128b": 4, "16x256b": 8}.get(shape, 1)
        self.lanes = np.stack([lane for _ in range(count) for lane, _ in one])
        self.columns = np.stack([per * (c + width * i) for i in range(count) for _, c in one])
        self.ranges = [(0, per * width * count)]
        if shape == "16x32bx2":
            self.columns = self.columns + np.where(t < 16, 0, split)
            self.ranges.append((split, per * count))
        self.packed, self.whole = packed, shape == "32x32b"

    def read(self, data, lane, column):
        """The registers, (registers, 32) words."""
        at = lane + self.lanes, column + self.columns
        if not self.packed:
            return data[at]
        low, high = data[at], data[at[0], at[1] + 1]
        return (low & np.uint32(0xFFFF)) | (high << np.uint32(16))

    def write(self, data, lane, column, values):
        at = lane + self.lanes, column + self.columns
        if not self.packed:
            data[at] = values
            return
        data[at] = values & np.uint32(0xFFFF)
        data[at[0], at[1] + 1] = values >> np.uint32(16)


def shape_of(b, ins, registers, split):
    """The Shape of a tcgen05.ld or .st with that many registers."""
    name = next(p for p in ins.parts if p[0].isdigit())
    count = int(next(p for p in ins.parts if p[0] == "x" and p[1:].isdigit())[1:])
    each = {"32x32b": 1, "16x32bx2": 1, "16x64b": 1, "16x128b": 2, "16x256b": 4}.get(name)
    if each is None or each * count != registers or registers > 128:
        raise b.unsupported(ins)
    return Shape(name, count, ins.parts[-2] in ("pack::16b", "unpack::16b"), split)


def place(w, address, shape, what):
    """(memory, lane, column, cells) of a warp's access, checked; a cell: (halves, columns)."""
    lane, column = address >> 16, address & 0xFFFF
    quarter = 32 * (w.index % 4)
    if lane != quarter and (shape.whole or lane != quarter + 16):
        raise Fault(
            f"{what} of TMEM lane {lane} by warp {w.index}, which may access lanes "
            f"{quarter}..{quarter + 31}"
        )
    memory = tensor_memory(w.cta)
    halves = slice(lane // 16, lane // 16 + (2 if shape.whole else 1))
    cells = []
    for start, n in shape.ranges:
        memory.check_columns(column + start, n)
        cells.append((halves, slice(column + start, column + start + n)))
    return memory, lane, column, cells


def unfenced(w, times, at):
    """Notes an access whose stamp in `times` waits for a fence::before_thread_sync."""
    times[at] = PENDING
    w.tmem_unfenced[id(times), str(at)] = times, at


class Load:
    """A tcgen05.ld of warp `w`: `take()` gives its registers' values, `out` has where they go."""

    def __init__(self, w, memory, cells, out, mask, take, ins):
        self.w, self.memory, self.cells, self.out, self.mask = w, memory, cells, out, mask
        self.take, self.slot, self.done = take, w.index // 4, False
        self.time = None  # when its registers were first used
        self.stamp(w, PENDING, ins.line)
        if memory.check:
            for at in cells:
                unfenced(w, memory.read_fence, (*at, self.slot))
        memory.version += 1

    def stamp(self, w, time, line=None, by_registers=False):
        if not self.memory.check:
            return
        for halves, columns in self.cells:
            at = halves, columns, self.slot
            self.memory.reader[at], self.memory.read[at] = w.id, time
            self.memory.by_registers[at] = by_registers
            if line is not None:
                self.memory.read_line[at] = line

    def finish(self, w):
        """Delivers the registers."""
        if self.done:
            return
        self.done = True
        for d, v in zip(self.out, self.take(), strict=True):
            if not isinstance(d, Sink):
                if w.late.get(d.index) is self:
                    del w.late[d.index]
                set_reg(w, d, v, self.mask)

    def touched(self, M, w, ins, register):
        """An instruction is about to use one of the registers: so the load is over."""
        self.finish(w)
        self.forget(w)
        self.time = int(w.clock[w.id])
        self.stamp(w, self.time, by_registers=True)

    def moved(self, M, w, ins, register, targets):
        """A mov copies a register: the use of `targets` will tell that the load is over."""
        self.finish(w)
        for target in targets:
            other = w.late.get(target)
            if other not in (None, self):
                other.touched(M, w, ins, target)
            w.late[target] = self

    def forget(self, w):
        """No register tells of the load any more."""
        for register in [r for r, op in w.late.items() if op is self]:
            del w.late[register]

    def waited(self, w):
        """A wait::ld orders the read, unless others may rely on the registers' use already."""
        self.finish(w)
        self.forget(w)
        if self.time is None or self.time == w.clock[w.id]:
            self.stamp(w, int(w.clock[w.id]))


def reduction(ins):
    """`.red` of tcgen05.ld: a function of the (registers, 32) words to 32, or None."""
    if "red" not in ins.parts:
        return None
    f = np.maximum if "max" in ins.parts else np.minimum
    kind = {"f32": np.float32, "s32": np.int32, "u32": np.uint32}[ins.parts[-1]]
    if kind is np.float32 and "NaN" not in ins.parts:
        f = np.fmax if "max" in ins.parts else np.fmin
    magnitude = np.abs if "abs" in ins.parts else lambda x: x
    return lambda words: f.reduce(magnitude(words.view(kind)), axis=0).view(np.uint32)


@instruction("tcgen05.ld", LAYOUTS + " pack::16b red min max abs NaN")
def load(b, ins):
    d, *rest = ins.operands
    out = list(b.vector(d))
    reduce = reduction(ins)
    red = [rest.pop(0)] if reduce else []
    split = rest[1].bits if len(rest) > 1 else 0
    shape, addr = shape_of(b, ins, len(out), split), b.address(rest[0], "u4")
    if reduce and (shape.packed or not {"32x32b", "16x32bx2"} & set(ins.parts)):
        raise b.unsupported(ins)

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        memory, lane, column, cells = place(w, first(addr(w.r), m), shape, "tcgen05.ld")
        if memory.check:
            for halves, columns in cells:
                memory.after_writes(M, w, halves, columns, ins)

        def take():
            words = shape.read(memory.data, lane, column)
            return [*words, reduce(words)] if reduce else words

        op = Load(w, memory, cells, [*out, *red], m, take, ins)
        w.tmem_loads.append(op)
        for x in op.out:
            if not isinstance(x, Sink):
                w.late[x.index] = op
        if M.rng.random() > LATE:
            words = take()
            op.take = lambda: words

    return run


class Store:
    """A tcgen05.st of warp `w`."""

    def __init__(self, w, memory, cells, write, ins):
        self.memory, self.cells, self.write, self.done = memory, cells, write, False
        if memory.check:
            for at in cells:
                memory.stamp_write(*at, w.id, PENDING, ins.line)
                unfenced(w, memory.write_fence, at)
        memory.version += 1

    def fire(self):
        if not self.done:
            self.done = True
            self.write()

    def over(self, w):
        if self.memory.check:
            for at in self.cells:
                self.memory.written[at] = w.clock[w.id]


@instruction("tcgen05.st", LAYOUTS + " unpack::16b")
def store(b, ins):
    mem, *rest = ins.operands
    split = rest.pop(0).bits if len(rest) > 1 else 0
    get = [b.get(x, "u4") for x in b.vector(rest[0])]
    shape, addr = shape_of(b, ins, len(get), split), b.address(mem, "u4")

    def run(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        memory, lane, column, cells = place(w, first(addr(w.r), m), shape, "tcgen05.st")
        if memory.check:
            for halves, columns in cells:
                memory.after_writes(M, w, halves, columns, ins, write=True)
                memory.after_reads(M, w, halves, columns, ins)
        data = np.stack([g(w.r) for g in get])
        op = Store(w, memory, cells, lambda: shape.write(memory.data, lane, column, data), ins)
        w.tmem_stores.append(op)
        M.later("mma", op.fire, cause=(w, ins))

    return run
