"""What is ordered in shared memory, whatever the interleaving: vector clocks (PTX ISA 8).

Every warp of a cluster is a component of a clock, and so is every mbarrier. A warp's clock holds,
per component, the latest time that is ordered before what the warp does next: barriers, arrivals
and waits pass clocks on. A write is stamped with the warp's own time or, if an asynchronous copy
made it, with the mbarrier and the phase that count it; a read with the reader's own time. An
asynchronous access is stamped PENDING from its issue until the wait that its issuer must make. An
access to a granule whose stamps the warp's clock does not cover is a race, in this run or in
another, unless both are strong (atomics, `.relaxed` and the like).

A clock has three parts, passed on together. The second holds, per component, the latest time that a
proxy fence followed: a write of the async proxy wants the generic reads before it covered by it.
The third holds what the warp's writes, but not its reads, come after: an mbarrier whose arrival and
wait have scopes that do not include each other keeps what follows the wait from being seen before
the arrival, and makes nothing visible (9.7.13.15.16, the last of the wait's guarantees but one,
which, unlike the first, is not about the threads of the CTA alone).

Granules are words, until an access of less makes them all smaller.
"""

import numpy as np

WEAK, CTA, CLUSTER, GPU = range(4)  # strength of an access: weak, or strong with that scope
PENDING = np.int32(2**31 - 1)
COMPONENTS = 1024
FENCED = slice(COMPONENTS, 2 * COMPONENTS)  # the other parts of a clock
PASSED = slice(2 * COMPONENTS, 3 * COMPONENTS)


class Fault(Exception):
    """A program error that the emulator found."""


def new_clock():
    return np.zeros(3 * COMPONENTS, np.int32)


def before_writes(clock, n=COMPONENTS):
    """Of the first n components, the times that a write of the clock's owner comes after."""
    return np.maximum(clock[:n], clock[PASSED][:n])


def pass_narrowly(clock, into):
    """What the owner of a clock did, for others whom its release makes see nothing."""
    np.maximum(into[FENCED], clock[FENCED], out=into[FENCED])
    np.maximum(into[PASSED], before_writes(clock), out=into[PASSED])


def proxy_fence(w):
    """What is ordered before the warp's next access is so across proxies too."""
    np.maximum(w.clock[FENCED], before_writes(w.clock), out=w.clock[FENCED])
    w.clock[w.id] += 1


class Accesses:
    """Of each granule and warp, the time of the last access of one kind; `line`: the last's."""

    def __init__(self, granules, warps):
        self.time = np.zeros((granules, warps), np.int32)
        self.line = np.zeros(granules, np.int32)

    def late(self, clock, granules, write, foreign=None):
        """(granule, warps) of the first whose accesses are not all ordered before, or None.

        write: before a write by the clock's owner. foreign: look at accesses by these warps only.
        """
        n = self.time.shape[1]
        late = self.time[granules] > clock[:n]
        if foreign is not None:
            late &= foreign
        if write and late.any():
            late &= self.time[granules] > before_writes(clock, n)
        if not late.any():
            return None
        at = int(np.argmax(late.any(1)))
        return int(granules[at]), np.flatnonzero(late[at]).tolist()

    def stamp(self, w, granules, time, line):
        self.time[granules, w.id] = time
        self.line[granules] = line

    def refine(self, factor):
        self.time, self.line = np.repeat(self.time, factor, 0), np.repeat(self.line, factor)


class History:
    """Stamps of one CTA's shared memory of `nbytes`; `foreign`: of each warp of the cluster,
    whether it is another CTA's.
    """

    def __init__(self, nbytes, foreign):
        count = -(-nbytes // 16) * 4
        self.granule, self.warps, self.foreign = 4, len(foreign), foreign
        self.writer = np.zeros(count, np.int16)
        self.written = np.zeros(count, np.int32)
        self.write_line = np.zeros(count, np.int32)
        self.reads = Accesses(count, self.warps)
        self.generic_reads = Accesses(count, self.warps)  # those of `reads` that no async proxy did
        # strong accesses, once there are any: of scope .cta, of wider ones
        self.narrow = self.strong = None
        self.look_at_units()

    def look_at_units(self):
        """Views of the same stamps by 16-byte units, for asynchronous accesses."""
        n = 16 // self.granule
        self.unit_writer, self.unit_written = (
            self.writer.reshape(-1, n),
            self.written.reshape(-1, n),
        )
        self.unit_write_line = self.write_line.reshape(-1, n)
        self.unit_read = self.reads.time.reshape(-1, n, self.warps)
        self.unit_read_line = self.reads.line.reshape(-1, n)
        self.unit_generic_read = self.generic_reads.time.reshape(-1, n, self.warps)

    def refine(self, granule):
        factor, self.granule = self.granule // granule, granule
        self.writer, self.written, self.write_line = (
            np.repeat(x, factor) for x in (self.writer, self.written, self.write_line)
        )
        for accesses in (*self.by_kind().values(), self.generic_reads):
            accesses.refine(factor)
        self.look_at_units()

    def granules(self, off, nbytes):
        """The granules of `nbytes` (1, 2 or a multiple of 4) at each offset."""
        if nbytes < self.granule:
            self.refine(nbytes)
        first, count = off.astype(np.int64) // self.granule, nbytes // self.granule
        return first if count == 1 else (first[:, None] + np.arange(count)).reshape(-1)

    def of_units(self, units):
        return self.granules(np.asarray(units) * 16, 16)

    # ---- generic accesses ----
    def conflict(self, w, at, write, strength):
        """(kind, granule, warps) of an earlier access that nothing orders before, or None."""
        late = self.written[at] > w.clock[self.writer[at]]
        if late.any():
            if write and not strength:
                late &= self.written[at] > before_writes(w.clock)[self.writer[at]]
            if late.any():
                return self.writer_of(int(at[late][0]))
        if write:
            found = self.reads.late(w.clock, at, write)
            if found:
                return "read", *found
        if self.strong or self.narrow:
            return self.strong_conflict(w, at, write, strength)
        return None

    def strong_conflict(self, w, at, write, strength):
        """The same among strong accesses: those conflict whose scopes do not include each other."""
        if strength == CTA:  # by a warp of this CTA: memory of another makes it weak
            groups = [(self.strong, self.foreign)]
        elif strength:
            groups = [(self.narrow, None)] if self.foreign[w.id] else []
        else:
            groups = [(self.strong, None), (self.narrow, None)]
        for accesses, by in groups:
            for kind, one in (accesses or {}).items():
                if write or "store" in kind:
                    found = one.late(w.clock, at, write and not strength, by)
                    if found:
                        return kind, *found
        return None

    def writer_of(self, granule):
        """The last weak write; by an mbarrier or while pending it is no warp's."""
        by = int(self.writer[granule])
        own = self.written[granule] != PENDING and by < self.warps
        return "write", granule, [by] if own else []

    def by_kind(self):
        """The Accesses by what messages call them."""
        return {"read": self.reads} | (self.strong or {}) | (self.narrow or {})

    def line_of(self, kind, granule):
        return self.write_line[granule] if kind == "write" else self.by_kind()[kind].line[granule]

    def strong_accesses(self, strength):
        """Those that a strong access belongs to: a dict of the Accesses of loads and stores."""
        name, scope = ("narrow", " of scope .cta") if strength == CTA else ("strong", "")
        if getattr(self, name) is None:
            kinds = (f"strong load{scope}", f"strong store{scope}")
            setattr(self, name, {k: Accesses(len(self.writer), self.warps) for k in kinds})
        return getattr(self, name)

    def stamp(self, w, at, write, strength, line):
        time = w.clock[w.id]
        if strength:
            loads, stores = self.strong_accesses(strength).values()
            (stores if write else loads).stamp(w, at, time, line)
        elif write:
            self.writer[at], self.written[at], self.write_line[at] = w.id, time, line
        else:
            self.reads.stamp(w, at, time, line)
            self.generic_reads.stamp(w, at, time, line)

    # ---- asynchronous accesses of 16-byte units ----
    def unit_conflict(self, w, units, write):
        """The same for an asynchronous access."""
        late = self.unit_written[units] > w.clock[self.unit_writer[units]]
        if late.any():
            if write:
                known = before_writes(w.clock)
                late &= self.unit_written[units] > known[self.unit_writer[units]]
            if late.any():
                return self.writer_of(int(self.of_units(units).reshape(late.shape)[late][0]))
        if write and (self.unit_read[units] > w.clock[: self.warps]).any():
            found = self.reads.late(w.clock, self.of_units(units), write)
            if found:
                return "read", *found
        if self.strong or self.narrow:
            return self.strong_conflict(w, self.of_units(units), write, WEAK)
        return None

    def unfenced_read(self, w, units):
        """The line of a generic read of the units that no proxy fence follows, or 0."""
        fenced = w.clock[COMPONENTS : COMPONENTS + self.warps]
        if not (self.unit_generic_read[units] > fenced).any():
            return 0
        granules = self.of_units(units)
        late = (self.generic_reads.time[granules] > fenced).any(1)
        return int(self.generic_reads.line[granules][late][0])

    def begin_write(self, w, units, line):
        self.unit_writer[units], self.unit_written[units] = w.id, PENDING
        self.unit_write_line[units] = line

    def end_write(self, units, component, time):
        self.unit_writer[units], self.unit_written[units] = component, time

    def begin_read(self, w, units, line):
        self.unit_read[units, :, w.id] = PENDING
        self.unit_read_line[units] = line

    def end_read(self, w, units, time=None):
        self.unit_read[units, :, w.id] = w.clock[w.id] if time is None else time

    # ---- cp.async: words, written for the generic proxy ----
    def begin_copy(self, w, words, line):
        at = self.granules(words * 4, 4)
        self.writer[at], self.written[at], self.write_line[at] = w.id, PENDING, line

    def end_copy(self, words, component, time):
        at = self.granules(words * 4, 4)
        self.writer[at], self.written[at] = component, time
