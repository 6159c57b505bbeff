"""What is ordered in shared memory, whatever the interleaving: vector clocks (PTX ISA 8).

Every warp of a cluster is a component of a clock, and so is every mbarrier. A warp's clock holds,
per component, the latest time that is ordered before what the warp does next: barriers, arrivals
and waits pass clocks on. A write is stamped with the warp's own time or, if an asynchronous copy
made it, with the mbarrier and the phase that count it; a read with the reader's own time. An
asynchronous access is stamped PENDING from its issue until the wait that its issuer must make. An
access to a granule whose stamps the warp's clock does not cover is a race, in this run or in
another, unless both are strong (atomics, `.relaxed` and the like).

The second half of a clock holds, per component, the latest time that a proxy fence followed: it is
passed on like the first. A write of the async proxy wants the generic reads before it covered by
that half too.

Granules are words, until an access of less makes them all smaller.
"""

import numpy as np

PENDING = np.int32(2**31 - 1)
COMPONENTS = 1024


class Fault(Exception):
    """A program error that the emulator found."""


def new_clock():
    return np.zeros(2 * COMPONENTS, np.int32)


def proxy_fence(w):
    """What is ordered before the warp's next access is so across proxies too."""
    np.maximum(w.clock[COMPONENTS:], w.clock[:COMPONENTS], out=w.clock[COMPONENTS:])
    w.clock[w.id] += 1


class Accesses:
    """Of each granule and warp, the time of the last access of one kind; `line`: the last's."""

    def __init__(self, granules, warps):
        self.time = np.zeros((granules, warps), np.int32)
        self.line = np.zeros(granules, np.int32)

    def late(self, clock, granules):
        """(granule, warps) of the first whose accesses are not all ordered before, or None."""
        late = self.time[granules] > clock[: self.time.shape[1]]
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
    """Stamps of one CTA's shared memory of `nbytes`, for a cluster of `warps` warps."""

    def __init__(self, nbytes, warps):
        count = -(-nbytes // 16) * 4
        self.granule, self.warps = 4, warps
        self.writer = np.zeros(count, np.int16)
        self.written = np.zeros(count, np.int32)
        self.write_line = np.zeros(count, np.int32)
        self.reads = Accesses(count, warps)
        self.generic_reads = Accesses(count, warps)  # those of `reads` that no async proxy did
        self.strong = None  # (loads, stores and atomics), once there are any
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
        for accesses in (self.reads, self.generic_reads, *(self.strong or ())):
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
    def conflict(self, w, at, write, strong):
        """(kind, granule, warps) of an earlier access that nothing orders before, or None."""
        late = self.written[at] > w.clock[self.writer[at]]
        if late.any():
            return self.writer_of(int(at[late][0]))
        kinds = [("read", self.reads)] if write else []
        if self.strong and not strong:
            kinds += [("strong store", self.strong[1])]
            kinds += [("strong load", self.strong[0])] if write else []
        for kind, accesses in kinds:
            found = accesses.late(w.clock, at)
            if found:
                return kind, *found
        return None

    def writer_of(self, granule):
        """The last weak write; by an mbarrier or while pending it is no warp's."""
        by = int(self.writer[granule])
        own = self.written[granule] != PENDING and by < self.warps
        return "write", granule, [by] if own else []

    def line_of(self, kind, granule):
        if kind == "write":
            return self.write_line[granule]
        accesses = {"read": self.reads}
        if self.strong:
            accesses |= {"strong load": self.strong[0], "strong store": self.strong[1]}
        return accesses[kind].line[granule]

    def stamp(self, w, at, write, strong, line):
        time = w.clock[w.id]
        if strong:
            if self.strong is None:
                self.strong = tuple(Accesses(len(self.writer), self.warps) for _ in range(2))
            self.strong[write].stamp(w, at, time, line)
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
            return self.writer_of(int(self.of_units(units).reshape(late.shape)[late][0]))
        if write and (self.unit_read[units] > w.clock[: self.warps]).any():
            return "read", *self.reads.late(w.clock, self.of_units(units))
        if self.strong:
            for kind, accesses in zip(("strong load", "strong store"), self.strong, strict=True):
                if write or kind == "strong store":
                    found = accesses.late(w.clock, self.of_units(units))
                    if found:
                        return kind, *found
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
