"""Global buffers of the host; a CTA's shared memory, its two proxies (PTX ISA 5.1, 8.7).

Shared memory is kept twice: as the generic proxy sees it and as the async proxy (TMA, wgmma,
    tcgen05) sees it. A generic store reaches the second copy only by a `fence.proxy.async` of a
    warp that is ordered after the store. What asynchronous operations are reading and writing is
    tracked, so that an access that races with one is reported whatever the data.
"""

import bisect

import numpy as np

from .ordering import Fault, History
from .races import CTA, WEAK, GlobalOrder, Track
from .values import POISON32, UINT

SHARED_WINDOW = 1 << 56  # where shared memory appears in the generic address space
LOCAL_WINDOW = 1 << 57  # and local memory
SMEM_BYTES = 1 << 18  # what the 14-bit address field of a matrix descriptor can reach
MARKED = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF, 8: 0xFFFFFFFFFFFFFFFF, 16: 0xFF}
BY_WORDS = ("cp.async", "st.async", "red.async")
SMEM_RESERVED = 1024  # the system part at the start of a CTA's shared memory


def misaligned(what, addresses, align):
    """The Fault for the first address that is no multiple of `align`."""
    wrong = next(x for x in addresses.tolist() if x % align)
    return Fault(f"{what} misaligned for {align} bytes: {wrong:#x}")


class Region:
    """A buffer: the uint8 array `data` at host address `base`; `track`: its accesses, or None."""

    __slots__ = ("base", "size", "data", "name", "track")

    def __init__(self, base, data, name, track):
        self.base, self.size, self.data, self.name, self.track = base, len(data), data, name, track


class GlobalMemory:
    """The registered host buffers; an access outside all of them is a fault."""

    def __init__(self):
        self.bases, self.regions, self.order = [], [], GlobalOrder()

    def add(self, base, data, name="", track=True):
        """Registers the bytes of the uint8 array `data`, which lie at host address `base`.

        track: report races on them.
        """
        i = bisect.bisect(self.bases, base)
        self.bases.insert(i, base)
        watch = Track(self.order, name or "a buffer", len(data)) if track else None
        self.regions.insert(i, Region(base, data, name, watch))

    def remove(self, base):
        i = self.bases.index(base)
        if self.regions[i].track:
            self.order.tracks.remove(self.regions[i].track)
        del self.bases[i], self.regions[i]

    def region(self, addr, what="access"):
        """The buffer that holds the address."""
        i = bisect.bisect_right(self.bases, addr) - 1
        if i >= 0:
            found = self.regions[i]
            if addr < found.base + found.size:
                return found
        raise Fault(f"global {what} at {addr:#x}: {self.nearest(addr)}")

    def find(self, addr, what="access"):
        """(base, size, bytes) of the buffer that holds the address."""
        r = self.region(addr, what)
        return r.base, r.size, r.data

    def nearest(self, addr):
        """Where an address lies relative to the closest buffer, for a message."""
        if not self.regions:
            return "no buffer is registered"
        r = min(self.regions, key=lambda r: min(abs(addr - r.base), abs(addr - r.base - r.size)))
        base, size, name = r.base, r.size, r.name
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
        """[(selector, Region, offsets)] for lanes' addresses by buffer, bounds checked."""
        if (addrs % np.uint64(align or nbytes)).any():
            raise misaligned(f"global {what}", addrs, align or nbytes)
        r = self.region(int(addrs[0]), what)
        off = (addrs - np.uint64(r.base)).view(np.int64)
        if off.min() >= 0 and off.max() + nbytes <= r.size:
            return [(slice(None), r, off)]
        out, left = [], np.ones(len(addrs), bool)
        while left.any():
            one = int(addrs[left][0])
            r = self.region(one, what)
            off = (addrs - np.uint64(r.base)).view(np.int64)
            sel = left & (off >= 0) & (off + nbytes <= r.size)
            if not sel.any():
                raise Fault(
                    f"global {what} of {nbytes} bytes at {one:#x} runs past its buffer of {r.size} "
                    f"bytes at {r.base:#x}"
                )
            out.append((sel, r, off[sel]))
            left &= ~sel
        return out


class Dirty:
    """Generic-proxy stores that no proxy fence has published to the async proxy yet.

    They are of one warp, between two of its releases.
    """

    __slots__ = ("smem", "index", "size", "flushed", "origin", "when")

    def __init__(self, smem, index, size, origin, when):
        self.smem, self.index, self.size = smem, index, size
        self.flushed, self.origin, self.when = False, origin, when

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
    """One CTA's shared memory, allocated up to offset `end`.

    foreign: which warps of the cluster are other CTAs' (bools). check: report races.
    """

    def __init__(self, name, end, foreign, check=True):
        self.name, self.end, self.check = name, end, check
        self.history = History(end if check else 16, foreign)
        self.mbarriers = {}  # by offset, those that are initialised
        self.releases = {}  # by offset, see `races`
        self.reduced = set()  # words that red.async works on
        data = np.full(SMEM_BYTES // 4, POISON32, np.uint32).view(np.uint8)
        self.generic = self._views(data)
        self.asynchronous = self._views(data.copy())
        self.reading = np.zeros(
            SMEM_BYTES // 16, np.int16
        )  # counts of async operations on each unit
        self.writing = np.zeros(SMEM_BYTES // 16, np.int16)
        self.copying = np.zeros(SMEM_BYTES // 4, np.uint8)  # counts of cp.async on each word
        self.copying_unit = self.copying.view(np.uint32)
        # nonzero where the async proxy does not see what was stored yet, by size of the access
        self.unfenced = self._views(np.zeros(SMEM_BYTES, np.uint8))
        self.inflight, self.copies, self.accesses, self.stores = 0, 0, {}, {}
        self.version = 0  # of the async copy, for caches of what was read from it

    @staticmethod
    def _views(data):
        views = {n: data.view(t) for n, t in UINT.items()}
        views[16] = data.reshape(-1, 16)
        return views

    # ---- asynchronous operations in flight ----
    def begin(self, kind, units, ins, who):
        """Marks units as read ("... read"), written or copied to by an operation until `end`.

        cp.async, st.async and red.async work on words instead.
        """
        access = Access(kind, units, ins, who)
        self.accesses[access] = None
        h = self.history
        if kind in BY_WORDS:
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
        if access.kind in BY_WORDS:
            np.subtract.at(self.copying, access.units, np.uint8(1))
            self.copies -= 1
        else:
            counts = self.writing if access.kind == "TMA write" else self.reading
            counts[access.units] -= 1
            self.inflight -= 1

    def written_by(self, access, mbarrier):
        """A copy has completed and its bytes are about to be counted on an mbarrier."""
        if self.check and access.kind in BY_WORDS:
            self.history.end_copy(access.units, mbarrier.id, mbarrier.now)
        elif self.check:
            self.history.end_write(access.units, mbarrier.id, mbarrier.now)

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
            own = set((a.units >> 2 if a.kind in BY_WORDS else a.units).reshape(-1).tolist())
            if a.kind.endswith(kinds) and wanted & own:
                at = min(wanted & own) * 16
                return Fault(f"race: {what} of {self.name}+{at:#x} while in flight: {a}")
        return Fault(f"race: {what} of {self.name}")

    def check_generic(self, w, ins, off, nbytes, write, strength=WEAK, what=None, enter=True):
        """A generic load or store of `nbytes` at each offset: reports races, leaves stamps.

        strength: of the access, as in `races`; an atomic operation is a strong store. enter: leave
        stamps.
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
        if self.copies:
            words = (off >> np.uint32(2)).astype(np.int64)
            if nbytes > 4:
                words = (words[:, None] + np.arange(nbytes // 4)).reshape(-1)
            if self.copying[words].any():
                raise self.conflict(what, words >> 2, BY_WORDS)
        if strength == CTA and w.cta.smem is not self:
            strength = WEAK  # the scope does not include the CTA whose memory this is
        h = self.history
        at = h.granules(off, nbytes)
        found = h.conflict(w, at, write, strength)
        if found is not None:
            raise self.unordered(w, what, *found)
        if enter:
            h.stamp(w, at, write, strength, ins.line)

    def unordered(self, w, what, kind, granule, warps):
        """The Fault for an access that nothing orders after an earlier one."""
        h = self.history
        mb = self.mbarriers.get(granule * h.granule & ~7)
        if mb is not None:
            return Fault(f"{what} of {mb}, which is initialised: mbarrier.inval first")
        by = f" by warp {', '.join(map(str, warps))} of the cluster" if warps else ""
        return Fault(
            f"race: {what} of {self.name}+{granule * h.granule:#x}, which nothing orders after the "
            f"{kind}{by}, {line_of(w, h.line_of(kind, granule))}"
        )

    def begin_mbarrier(self, w, ins, off):
        """An mbarrier.init: until its inval, only mbarrier operations may touch the eight bytes.

        9.7.13.15.3-4: they count as being written all the while.
        """
        at = np.array([off], np.uint32)
        self.check_generic(w, ins, at, 8, True, what="mbarrier.init", enter=False)
        if self.check:
            self.history.begin_copy(w, np.array([off // 4, off // 4 + 1]), ins.line)

    def end_mbarrier(self, w, off):
        if self.check:
            words = np.array([off // 4, off // 4 + 1])
            self.history.end_copy(words, w.id, w.clock[w.id])

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
            raise self.conflict(what, units, BY_WORDS)
        found = self.history.unit_conflict(w, units, write)
        if found:
            raise self.unordered(w, what, *found)
        if write:
            self.check_reads(w, units, what)
        stale = self.unfenced[16][units]
        if stale.any():
            at = int(np.asarray(units)[stale.any(1)].min())
            raise Fault(
                f"{what} of {self.name}+{at * 16:#x}, where a generic-proxy store was not followed "
                f"by a fence.proxy.async ordered before it; stored by {self.origin_of(at)}"
            )

    def check_reads(self, w, units, what):
        """Warns of an async-proxy write that generic reads precede without a proxy fence.

        The memory model asks for one (PTX ISA 8.7, 9.7.9.25.2); some known kernels go without.
        """
        if line := self.history.unfenced_read(w, units):
            here = w.cta.program.kernel.instrs[w.frags[0].pc].where()
            w.cta.cluster.grid.machine.warnings.add(
                f"no fence.proxy.async between the generic read, {line_of(w, line)}, and the "
                f"{what} over it, {here}"
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
        self.unfenced[size][index] = 0

    def note_store(self, index, size, origin):
        """The Dirty of a generic store, which replaces what an earlier one to the same places left
        to be fenced.
        """
        key, warp = (size, index.tobytes()), origin[0]
        when = warp, int(warp.clock[warp.id])
        d = self.stores.get(key)
        if d is None or d.flushed or d.when != when:
            if d is not None:
                d.flushed = True
            d = self.stores[key] = Dirty(self, index, size, origin, when)
        self.unfenced[size][index] = MARKED[size]
        return d

    def write_async(self, units, data):
        """An async-proxy write of 16-byte units: both proxies see it once it is complete."""
        self.generic[16][units] = data
        self.asynchronous[16][units] = data
        self.version += 1
