"""Global buffers of the host; a CTA's shared memory, its two proxies (PTX ISA 5.1, 8.7).

Shared memory is kept twice: as the generic proxy sees it and as the async proxy (TMA, wgmma,
    tcgen05) sees it. A generic store reaches the second copy only by a `fence.proxy.async` of a
    warp that is ordered after the store. What asynchronous operations are reading and writing is
    tracked, so that an access that races with one is reported whatever the data.
"""

import bisect

import numpy as np

from .ordering import PENDING, History
from .values import POISON32, UINT

SHARED_WINDOW = 1 << 56  # where shared memory appears in the generic address space
LOCAL_WINDOW = 1 << 57  # and local memory
SMEM_BYTES = 1 << 18  # what the 14-bit address field of a matrix descriptor can reach
SMEM_RESERVED = 1024  # the system part at the start of a CTA's shared memory


class Fault(Exception):
    """A program error that the emulator found."""


def misaligned(what, addresses, align):
    """The Fault for the first address that is no multiple of `align`."""
    wrong = next(x for x in addresses.tolist() if x % align)
    return Fault(f"{what} misaligned for {align} bytes: {wrong:#x}")


class GlobalMemory:
    """The registered host buffers; an access outside all of them is a fault."""

    def __init__(self):
        self.bases, self.regions = [], []

    def add(self, base, data, name="", track=True):
        """Registers the bytes of the uint8 array `data`, which lie at host address `base`.

        track: report races on them.
        """
        i = bisect.bisect(self.bases, base)
        self.bases.insert(i, base)
        self.regions.insert(i, (base, len(data), data, name))

    def remove(self, base):
        i = self.bases.index(base)
        del self.bases[i], self.regions[i]

    def find(self, addr, what="access"):
        """(base, size, bytes) of the buffer that holds the address."""
        i = bisect.bisect_right(self.bases, addr) - 1
        if i >= 0:
            base, size, data, _ = self.regions[i]
            if addr < base + size:
                return base, size, data
        raise Fault(f"global {what} at {addr:#x}: {self.nearest(addr)}")

    def nearest(self, addr):
        """Where an address lies relative to the closest buffer, for a message."""
        if not self.regions:
            return "no buffer is registered"
        base, size, _, name = min(
            self.regions, key=lambda r: min(abs(addr - r[0]), abs(addr - r[0] - r[1]))
        )
        where = (
            f"{addr - base - size} bytes past the end of"
            if addr >= base + size
            else f"{base - addr} bytes before"
        )
        return f"{where} the nearest buffer, {name or 'unnamed'} ({size} bytes at {base:#x})"

    def read(self, addr, nbytes):
        base, size, data = self.find(addr, "read")
        if addr + nbytes > base + size:
            raise Fault(f"global read of {nbytes} bytes at {addr:#x} runs past its buffer")
        return data[addr - base : addr - base + nbytes]

    def locate(self, addrs, nbytes, what, align=None):
        """[(selector, bytes, offsets)] for lanes' addresses by buffer, bounds checked."""
        if (addrs % np.uint64(align or nbytes)).any():
            raise misaligned(f"global {what}", addrs, align or nbytes)
        base, size, data = self.find(int(addrs[0]), what)
        off = (addrs - np.uint64(base)).view(np.int64)
        if off.min() >= 0 and off.max() + nbytes <= size:
            return [(slice(None), data, off)]
        out, left = [], np.ones(len(addrs), bool)
        while left.any():
            one = int(addrs[left][0])
            base, size, data = self.find(one, what)
            off = (addrs - np.uint64(base)).view(np.int64)
            sel = left & (off >= 0) & (off + nbytes <= size)
            if not sel.any():
                raise Fault(
                    f"global {what} of {nbytes} bytes at {one:#x} runs past its buffer of {size} "
                    f"bytes at {base:#x}"
                )
            out.append((sel, data, off[sel]))
            left &= ~sel
        return out


class Dirty:
    """Generic-proxy stores that no proxy fence has published to the async proxy yet."""

    __slots__ = ("smem", "index", "size", "flushed", "origin")

    def __init__(self, smem, index, size, origin):
        self.smem, self.index, self.size, self.flushed, self.origin = (
            smem,
            index,
            size,
            False,
            origin,
        )

    def flush(self):
        if not self.flushed:
            s = self.smem
            s.asynchronous[self.size][self.index] = s.generic[self.size][self.index]
            s.clean(self.index, self.size)
            self.flushed = True


class Access:
    """An asynchronous operation in flight, on 16-byte units (cp.async: 4-byte words)."""

    __slots__ = ("kind", "units", "ins", "who")

    def __init__(self, kind, units, ins, who):
        self.kind, self.units, self.ins, self.who = kind, units, ins, who

    def __str__(self):
        return f"{self.kind} issued by {self.who}, {self.ins.where()}"


def line_of(w, line):
    """The instruction at a PTX line of the warp's kernel, for a message."""
    found = next((i for i in w.cta.program.kernel.instrs if i.line == line), None)
    return found.where() if found else f"PTX line {line}"


class SharedMemory:
    """One CTA's shared memory, allocated up to offset `end`; `check`: report races."""

    def __init__(self, name, end, warps, check=True):
        self.name, self.end, self.check = name, end, check
        self.history = History(-(-end // 4) if check else 4, warps)
        data = np.full(SMEM_BYTES // 4, POISON32, np.uint32).view(np.uint8)
        self.generic = self._views(data)
        self.asynchronous = self._views(data.copy())
        self.reading = np.zeros(
            SMEM_BYTES // 16, np.int16
        )  # counts of async operations on each unit
        self.writing = np.zeros(SMEM_BYTES // 16, np.int16)
        self.copying = np.zeros(SMEM_BYTES // 4, np.uint8)  # counts of cp.async on each word
        self.copying_unit = self.copying.view(np.uint32)
        self.unfenced = np.zeros(SMEM_BYTES // 4, bool)  # words the async proxy does not see yet
        self.unfenced_unit = self.unfenced.view(np.uint32)
        self.inflight, self.copies, self.accesses, self.stores = 0, 0, {}, {}
        self.version = 0  # of the async copy, for caches of what was read from it

    @staticmethod
    def _views(data):
        views = {n: data.view(t) for n, t in UINT.items()}
        views[16] = data.reshape(-1, 16)
        return views

    # ---- asynchronous operations in flight ----
    def begin(self, kind, units, ins, who):
        """Marks units as read ("... read"), written or copied to by an operation until `end`."""
        access = Access(kind, units, ins, who)
        self.accesses[access] = None
        h = self.history
        if kind == "cp.async":
            np.add.at(self.copying, units, np.uint8(1))
            self.copies += 1
            mark = h.begin_copy
        else:
            writes = kind == "TMA write"
            (self.writing if writes else self.reading)[units] += 1
            self.inflight += 1
            mark = h.begin_write if writes else h.begin_read
        if self.check:
            mark(who, units, ins.line)
        return access

    def end_access(self, access):
        """The operation is complete; who may rely on that is another matter (see `ordering`)."""
        del self.accesses[access]
        if access.kind == "cp.async":
            np.subtract.at(self.copying, access.units, np.uint8(1))
            self.copies -= 1
        else:
            counts = self.writing if access.kind == "TMA write" else self.reading
            counts[access.units] -= 1
            self.inflight -= 1

    def written_by(self, access, mbarrier):
        """A copy has completed and its bytes are about to be counted on an mbarrier."""
        if self.check:
            self.history.end_write(access.units, mbarrier.id, mbarrier.completed + 1)

    def reads_over(self, w, finished, pending):
        """A warp has waited for its asynchronous reads `finished`, not yet for `pending`."""
        if not self.check:
            return
        for a in finished:
            self.history.end_read(w, a.units)
        for a in pending:  # of the same units, perhaps
            self.history.begin_read(w, a.units, a.ins.line)

    def read_over_at(self, w, access, time):
        """A read by warp `w` is over, for those whose clocks include that time of the warp's."""
        if self.check:
            self.history.end_read(w, access.units, time)

    def conflict(self, what, units, kinds):
        """The Fault for an access to units that an operation of one of `kinds` is using."""
        wanted = set(np.asarray(units).reshape(-1).tolist())
        for a in self.accesses:
            own = set((a.units >> 2 if a.kind == "cp.async" else a.units).reshape(-1).tolist())
            if a.kind.endswith(kinds) and wanted & own:
                at = min(wanted & own) * 16
                return Fault(f"race: {what} of {self.name}+{at:#x} while in flight: {a}")
        return Fault(f"race: {what} of {self.name}")

    def check_generic(self, w, ins, off, nbytes, write, ordered=False, what=None):
        """A generic load or store of `nbytes` at each offset: reports races, leaves stamps.

        An atomic operation passes `ordered`: it races with what is pending only.
        """
        if not self.check:
            return
        what = what or ("generic store" if write else "generic load")
        if self.inflight:
            u = off >> np.uint32(4)
            if self.writing[u].any():
                raise self.conflict(what, u, ("TMA write",))
            if write and self.reading[u].any():
                raise self.conflict(what, u, ("read",))
        words = (off >> np.uint32(2)).astype(np.int64)
        if nbytes > 4:
            words = (words[:, None] + np.arange(nbytes // 4)).reshape(-1)
        if self.copies and self.copying[words].any():
            raise self.conflict(what, words >> 2, ("cp.async",))
        h = self.history
        if nbytes < 4 or ordered:
            at = h.pending(words) if write else None
            if at is not None:
                raise self.unordered(w, what, at, h.written[at] == PENDING)
            return
        at = h.unordered_write(w.clock, words)
        if at is not None:
            raise self.unordered(w, what, at, True)
        if write:
            at = h.unordered_read(w.clock, words)
            if at is not None:
                raise self.unordered(w, what, at, False)
            h.stamp_write(w, words, ins.line)
        else:
            h.stamp_read(w, words, ins.line)

    def unordered(self, w, what, word, after_write):
        """The Fault for an access that nothing orders after an earlier write or read of a word."""
        h = self.history
        where = f"race: {what} of {self.name}+{word * 4:#x}, which nothing orders after"
        if not after_write:
            warps = ", ".join(str(x) for x in h.readers(word, w.clock))
            return Fault(
                f"{where} the read by warp {warps} of the cluster, {line_of(w, h.read_line[word])}"
            )
        by = int(h.writer[word])
        who = (
            ""
            if h.written[word] == PENDING or by >= h.read.shape[1]
            else f" by warp {by} of the cluster"
        )
        return Fault(f"{where} the write{who}, {line_of(w, h.write_line[word])}")

    def check_async(self, w, units, what, write):
        """An async-proxy read or write of 16-byte units, as warp `w` issues it."""
        if not self.check:
            return
        if self.inflight:
            if self.writing[units].any():
                raise self.conflict(what, units, ("TMA write",))
            if write and self.reading[units].any():
                raise self.conflict(what, units, ("read",))
        if self.copies and self.copying_unit[units].any():
            raise self.conflict(what, units, ("cp.async",))
        h = self.history
        at = h.unordered_unit_write(w.clock, units)
        if at is not None:
            word = 4 * at + int(np.argmax(h.unit_written[at] > w.clock[h.unit_writer[at]]))
            raise self.unordered(w, what, word, True)
        at = h.unordered_unit_read(w.clock, units) if write else None
        if at is not None:
            late = (h.unit_read[at] > w.clock[: h.read.shape[1]]).any(1)
            raise self.unordered(w, what, 4 * at + int(np.argmax(late)), False)
        stale = self.unfenced_unit[units]
        if stale.any():
            at = int(np.asarray(units)[stale != 0].min())
            raise Fault(
                f"{what} of {self.name}+{at * 16:#x}, where a generic-proxy store was not followed "
                f"by a fence.proxy.async ordered before it; stored by {self.origin_of(at)}"
            )

    def origin_of(self, unit):
        for d in self.stores.values():
            if not d.flushed and (d.index * d.size // 16 == unit).any():
                warp, ins = d.origin
                return f"{warp}, {ins.where()}"
        return "an unknown instruction"

    # ---- the two proxies ----
    def clean(self, index, size):
        self.version += 1
        if size == 16:
            self.unfenced_unit[index] = 0
        elif size == 8:
            self.unfenced[2 * index] = self.unfenced[2 * index + 1] = False
        else:
            self.unfenced[index * size >> 2] = False

    def note_store(self, index, size, origin):
        """The Dirty of a generic store; a store to the same places shares one while unfenced."""
        key = (size, index.tobytes())
        d = self.stores.get(key)
        if d is None or d.flushed:
            d = self.stores[key] = Dirty(self, index, size, origin)
        if size == 16:
            self.unfenced_unit[index] = 0x01010101
        elif size == 8:
            self.unfenced[2 * index] = self.unfenced[2 * index + 1] = True
        else:
            self.unfenced[index * size >> 2] = True
        return d

    def write_async(self, units, data):
        """An async-proxy write of 16-byte units: both proxies see it once it is complete."""
        self.generic[16][units] = data
        self.asynchronous[16][units] = data
        self.version += 1

    def write_async_bytes(self, off, data):
        self.generic[1][off : off + len(data)] = data
        self.asynchronous[1][off : off + len(data)] = data
        self.version += 1
