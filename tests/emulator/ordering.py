"""What is ordered in shared memory, whatever the interleaving: vector clocks (PTX ISA 8).

Every warp of a cluster is a component of a clock, and so is every mbarrier. A warp's clock holds,
per component, the latest
time that is ordered before what the warp does next: barriers, arrivals and waits pass clocks on. A
    write is stamped with the warp's own time or, if an asynchronous copy made it, with the mbarrier
    and the phase that count it; a read with the reader's own time. An asynchronous access is
    stamped PENDING from its issue until the wait that its issuer must make. An access to a word
    whose stamps the warp's clock does not cover is a race, in this run or in another.

Accesses of less than a word are compared with what is pending only, since neighbours may share a
word.
"""

import numpy as np

PENDING = np.int32(2**31 - 1)
COMPONENTS = 1024


def new_clock():
    return np.zeros(COMPONENTS, np.int32)


class History:
    """Stamps of the words of one CTA's shared memory, for a cluster of `warps` warps."""

    def __init__(self, words, warps):
        words = -(-words // 4) * 4
        self.writer = np.zeros(words, np.int16)
        self.written = np.zeros(words, np.int32)
        self.write_line = np.zeros(words, np.int32)
        self.read = np.zeros((words, warps), np.int32)
        self.read_line = np.zeros(words, np.int32)
        self.unit_writer, self.unit_written = (
            self.writer.reshape(-1, 4),
            self.written.reshape(-1, 4),
        )
        self.unit_write_line = self.write_line.reshape(-1, 4)
        self.unit_read = self.read.reshape(-1, 4, warps)
        self.unit_read_line = self.read_line.reshape(-1, 4)

    # ---- generic accesses of words ----
    def unordered_write(self, clock, words):
        """The first word whose last write is not ordered before, or None."""
        late = self.written[words] > clock[self.writer[words]]
        return int(words[late][0]) if late.any() else None

    def unordered_read(self, clock, words):
        late = (self.read[words] > clock[: self.read.shape[1]]).any(-1)
        return int(words[late][0]) if late.any() else None

    def pending(self, words):
        late = (self.written[words] == PENDING) | (self.read[words] == PENDING).any(-1)
        return int(words[late][0]) if late.any() else None

    def stamp_write(self, w, words, line):
        self.writer[words] = w.id
        self.written[words] = w.clock[w.id]
        self.write_line[words] = line

    def stamp_read(self, w, words, line):
        self.read[words, w.id] = w.clock[w.id]
        self.read_line[words] = line

    # ---- asynchronous accesses of 16-byte units ----
    def unordered_unit_write(self, clock, units):
        late = self.unit_written[units] > clock[self.unit_writer[units]]
        return int(units[late.any(1)][0]) if late.any() else None

    def unordered_unit_read(self, clock, units):
        late = (self.unit_read[units] > clock[: self.read.shape[1]]).any((1, 2))
        return int(units[late][0]) if late.any() else None

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
        self.writer[words], self.written[words] = w.id, PENDING
        self.write_line[words] = line

    def end_copy(self, words, component, time):
        self.writer[words], self.written[words] = component, time

    def readers(self, word, clock):
        """The warps whose reads of a word are not ordered before."""
        return np.flatnonzero(self.read[word] > clock[: self.read.shape[1]]).tolist()
