"""What is ordered in global memory, whatever the interleaving (PTX ISA 8).

Every access is an Event: who, at which time of the clocks of `ordering`, how strong. Per granule of
a buffer the Stamps remember the last write and the last read since; where several unordered ones
matter (readers, atomics), a log holds them all. An access that conflicts with one that nothing
orders before it is a Fault in every interleaving, unless both are strong and of scopes that include
each other (8.7 "Morally strong operations").

A cluster's warps know of each other by their clocks. What a warp learns of other clusters, by
acquiring what they released at an address, or of the launch before it, is entered in its cluster's
`imports` at the warp's time: whoever is ordered after that time knows it too.
"""

from dataclasses import dataclass, field

import numpy as np

from .ordering import CLUSTER, CTA, GPU, PASSED, PENDING, WEAK, Fault

SCOPES = {"cta": CTA, "cluster": CLUSTER, "gpu": GPU, "sys": GPU, "gl": GPU}
SCOPE_NAMES = ("weak", "scope cta", "scope cluster", "scope gpu or sys")
SEVERAL, MIXED = -1, -2  # stamps: several strong accesses of scope gpu; several of any kind
DEFERRED = 4096  # reads of a buffer that nothing has written, kept before they are stamped


@dataclass(slots=True)
class Event:
    """An access. `time` of the cluster's `component` is when it is over (PENDING: not yet)."""

    what: str
    ins: object
    warp: tuple  # (grid's name, ctaid, rank, warp)
    grid: int
    cluster: int
    rank: int
    component: int
    time: int
    strength: int
    proxy: str = "generic"

    def before(self, clock, write):
        """Whether it is ordered before what the owner of a clock of its cluster does next.

        write: a write, which may come after what it does not see (see `ordering`).
        """
        at = self.component
        return self.time <= clock[at] or (write and self.time <= clock[PASSED][at])

    def __str__(self):
        grid, ctaid, rank, index = self.warp
        return f"{self.what} by {grid}, cta{ctaid} rank {rank} warp {index}, {self.ins.where()}"


def live(dirty):
    """Of stores to shared memory, those that no proxy fence has published yet."""
    return {d for d in dirty if not d.flushed}


@dataclass(slots=True)
class Knowledge:
    """What a release makes known: clocks by cluster, complete launches, unfenced shared stores."""

    clocks: dict
    grids: frozenset = frozenset()
    dirty: set = field(default_factory=set)

    def covers(self, event, write=False):
        clock = self.clocks.get(event.cluster)
        return event.grid in self.grids or (clock is not None and event.before(clock, write))

    def joined(self, other):
        """Both; the clocks are shared, never changed."""
        clocks = dict(self.clocks)
        for serial, clock in other.clocks.items():
            mine = clocks.get(serial)
            if mine is not clock:
                clocks[serial] = clock if mine is None else np.maximum(mine, clock)
        return Knowledge(clocks, self.grids | other.grids, self.dirty | other.dirty)


@dataclass(slots=True)
class Release:
    """What was released at an address, by a CTA of a cluster, for how wide a scope."""

    scope: int
    cluster: int
    rank: int
    known: Knowledge


def scope_of(parts, default=GPU):
    """The scope that an instruction names, which is not the space that it works on."""
    return next((SCOPES[p] for p in reversed(parts) if p in SCOPES), default)


def includes(scope, cluster, rank, w):
    """Whether a scope of that CTA includes the warp, and the same scope of the warp's that CTA."""
    own = w.cta.cluster.serial == cluster
    return scope == GPU or (own and (scope == CLUSTER or (scope == CTA and w.cta.rank == rank)))


def imported(w):
    """What the warp knows of other clusters and launches."""
    for component, entries in w.cta.cluster.imports.items():
        for time, known in reversed(entries):
            if time <= w.clock[component]:
                yield known
                break


def snapshot(w):
    """What is ordered before what the warp does next, to be released; its clock then ticks."""
    cluster = w.cta.cluster
    known = Knowledge({cluster.serial: w.clock.copy()}, dirty=live(w.dirty))
    for other in imported(w):
        known = known.joined(other)
    w.clock[w.id] += 1
    return known


def learn(w, known):
    """Orders what was released before what the warp does next."""
    if id(known) in w.learned:
        return
    if len(w.learned) > 64:
        w.learned.clear()
    w.learned[id(known)] = known
    cluster = w.cta.cluster
    own = known.clocks.get(cluster.serial)
    if own is not None:
        w.acquire(own)
    if known.dirty:
        w.hear_stores(live(known.dirty))
    if known.grids or len(known.clocks) > (own is not None):
        entries = cluster.imports.setdefault(w.id, [])
        time = int(w.clock[w.id])
        if entries:
            known = entries[-1][1].joined(known)
            if entries[-1][0] == time:
                entries.pop()
        entries.append((time, known))


# ---- synchronisation through memory: `records` holds what was released at an address ----
def observe(w, records, where, scope, acquire):
    """A strong read: learns, now or at the next fence, what the writes before it released."""
    for r in records.get(where, ()):
        both = min(scope, r.scope)
        if includes(both, r.cluster, r.rank, w):
            if acquire:
                learn(w, r.known)
            elif len(w.heard) < 256:
                w.heard.append(r)


def publish(w, records, where, scope, known, keep):
    """A strong write that releases `known` (None: only what a fence has released before it).

    keep: a read-modify-write, which continues what earlier writes released.
    """
    record = records[where] = list(records.get(where, ())) if keep else []
    released = [(min(scope, f), k) for f, k in w.fences.items()]
    if known is not None:
        released.append((scope, known))
    cluster, rank = w.cta.cluster.serial, w.cta.rank
    for s, k in released:
        for i, r in enumerate(record):
            if (r.scope, r.cluster, r.rank) == (s, cluster, rank):
                record[i] = Release(s, cluster, rank, r.known.joined(k))
                break
        else:
            record.append(Release(s, cluster, rank, k))


def fence(w, scope, acquire=True, release=True):
    """fence.acq_rel and fence.sc of a scope (9.7.13.5), or one half of them."""
    if acquire:
        for r in w.heard:
            if includes(min(scope, r.scope), r.cluster, r.rank, w):
                learn(w, r.known)
        w.heard.clear()
    if release:
        w.fences[scope] = snapshot(w)


# ---- accesses ----
class GlobalOrder:
    """The events of the launches in flight, and what a warp knows of them."""

    def __init__(self):
        self.check, self.tracks = True, []
        self.reset()

    def reset(self):
        """A launch begins with all before it complete: everything is ordered."""
        self.events = [None]
        self.proxy_fences, self.map_releases = [], []
        for track in self.tracks:
            track.reset()

    def event(self, w, ins, what, strength=WEAK):
        """The number of an access by the generic proxy; one for all of the same time."""
        time, key = int(w.clock[w.id]), (ins.line, strength)
        hit = w.stamped.get(key)
        if hit is not None and hit[0] == time:
            return hit[1]
        number = self.new(w, ins, what, w.id, time, strength)
        w.stamped[key] = time, number
        return number

    def new(self, w, ins, what, component, time=PENDING, strength=WEAK, proxy="generic"):
        cta = w.cta
        cluster = cta.cluster
        self.events.append(
            Event(
                what, ins, (cluster.grid.label, cta.ctaid, cta.rank, w.index), cluster.grid.serial,
                cluster.serial, cta.rank, component, time, strength, proxy,
            )
        )  # fmt: skip
        return len(self.events) - 1

    def knows(self, w, e, write=False):
        """Whether an event is ordered before what the warp does next (a write: `write`)."""
        cluster = w.cta.cluster
        if e.cluster == cluster.serial:
            return e.before(w.clock, write)
        if e.grid < cluster.grid.serial and e.grid not in cluster.grid.behind:
            return True
        return bool(cluster.imports) and any(k.covers(e, write) for k in imported(w))

    def compatible(self, w, e, strength, write):
        """Whether an access of the warp may come after the event: ordered, or morally strong."""
        both = min(strength, e.strength)
        return (both and includes(both, e.cluster, e.rank, w)) or self.knows(w, e, write)

    def fenced(self, w, e, fences):
        """Whether a fence stands between the event and the warp, in causality order."""
        return any(known.covers(e) and self.knows(w, f) for known, f in reversed(fences))

    def add_fence(self, w, fences, ins):
        """Notes a proxy fence: (what is ordered before it, itself)."""
        known = snapshot(w)
        fence_event = self.events[self.new(w, ins, "fence", w.id, int(w.clock[w.id]))]
        fences.append((known, fence_event))


def distinct(numbers):
    first = numbers[0]
    return [int(first)] if (numbers == first).all() else np.unique(numbers).tolist()


class Stamps:
    """Per granule of a buffer, the accesses of one kind that later ones must be compared with."""

    def __init__(self, order, granules, writes):
        self.order, self.writes, self.last = order, writes, np.zeros(granules, np.int32)
        self.log, self.logged = [], set()

    def conflict(self, w, granules, strength, write):
        """(granule, Event) of an access that one of the warp's races with, or None."""
        last = self.last[granules]
        if not last.any():
            return None
        order = self.order
        for n in distinct(last):
            if n > 0 and not order.compatible(w, order.events[n], strength, write):
                return int(granules[last == n][0]), order.events[n]
            if n == MIXED or (n == SEVERAL and strength != GPU):
                found = self.search(w, granules[last == n], strength, write)
                if found:
                    return found
        return None

    def search(self, w, granules, strength, write):
        for where, n in reversed(self.log):
            e = self.order.events[n]
            if not self.order.compatible(w, e, strength, write):
                hit = np.intersect1d(where, granules)
                if len(hit):
                    return int(hit[0]), e
        return None

    def stamp(self, w, granules, n):
        """Enters an access; earlier ones that it does not stand for go to the log.

        w: None where the access is entered late, so that only its own cluster's order is known.
        """
        last = self.last[granules]
        self.last[granules] = n
        if not last.any():
            return
        events = self.order.events
        new = events[n]
        for old in distinct(last):
            if old in (0, n) or (old > 0 and self.replaces(w, new, events[old])):
                continue
            where = granules[last == old]
            self.note(where, n)
            strong = new.strength == GPU and old != MIXED
            if old > 0:
                self.note(where, old)
                strong = strong and events[old].strength == GPU
            self.last[where] = SEVERAL if strong else MIXED

    def replaces(self, w, new, old):
        """Whether whatever races with the old access races with the new one too."""
        if new.strength not in (WEAK, old.strength) or (
            new.strength not in (WEAK, GPU) and (new.cluster, new.rank) != (old.cluster, old.rank)
        ):
            return False
        if w is not None:
            return self.order.knows(w, old, self.writes and not new.strength)
        same = (new.cluster, new.component) == (old.cluster, old.component)
        return same and old.time <= new.time != PENDING

    def note(self, where, n):
        key = n, where.tobytes()
        if key not in self.logged:
            self.logged.add(key)
            self.log.append((where, n))

    def refine(self, factor):
        self.last = np.repeat(self.last, factor)
        wide = [(expand(where, factor), n) for where, n in self.log]
        self.log, self.logged = [], set()
        for where, n in wide:
            self.note(where, n)


def expand(granules, count):
    """Each granule as `count` smaller ones."""
    return (granules[:, None] * count + np.arange(count)).reshape(-1)


class Track:
    """The accesses to one buffer since everything was last ordered.

    Granules are words until an access needs smaller ones. Reads are stamped only once something
    writes: most buffers are either read or written.
    """

    def __init__(self, order, name, size):
        self.order, self.name, self.size = order, name, size
        order.tracks.append(self)
        self.reset()

    def reset(self):
        self.granule = 4
        self.writes = self.reads = None
        self.deferred = []
        self.releases = {}  # by offset
        self.maps = {}  # by offset, (acquiring fence, writes of the tensor map that it covers)

    def granules(self, off, nbytes):
        """The granules of `nbytes` at each offset (int64)."""
        low = nbytes | int(np.bitwise_or.reduce(off)) if nbytes % 4 or self.granule < 4 else 0
        need = 4 if not low & 3 else 2 if not low & 1 else 1
        if need < self.granule:
            for s in (self.writes, self.reads):
                if s is not None:
                    s.refine(self.granule // need)
            self.granule = need
        first = off // self.granule
        count = nbytes // self.granule
        return first if count == 1 else (first[:, None] + np.arange(count)).reshape(-1)

    def made(self, writes):
        return Stamps(self.order, -(-self.size // self.granule), writes)

    def fault(self, w, what, granule, event, strength):
        where = f"race: {what} of {self.name} + {granule * self.granule:#x}"
        notes = ""
        if event.time == PENDING:
            notes = " (nothing has waited for it to complete)"
        elif strength and event.strength:
            notes = f" (their scopes, {SCOPE_NAMES[strength]} and {SCOPE_NAMES[event.strength]}, "
            notes += "do not include each other)"
        elif event.grid != w.cta.cluster.grid.serial:
            notes = " (another launch: griddepcontrol.wait orders them)"
        return Fault(f"{where}, which nothing orders after the {event}{notes}")

    def read(self, w, ins, off, nbytes, what, strength=WEAK, number=None):
        """Checks and enters a read of `nbytes` at each offset; `number`: its event, if made."""
        if not self.order.check:
            return
        if number is None:
            number = self.order.event(w, ins, what, strength)
        if self.writes is None:
            self.deferred.append((number, off, nbytes))
            if len(self.deferred) > DEFERRED:
                self.enter_deferred()
            return
        granules = self.granules(off, nbytes)
        found = self.writes.conflict(w, granules, strength, write=False)
        if found:
            raise self.fault(w, what, *found, strength)
        if self.order.events[number].proxy != "generic":
            self.check_proxy(w, granules, what)
        if self.reads is None:
            self.reads = self.made(writes=False)
        self.reads.stamp(w, granules, number)

    def enter_deferred(self):
        if self.reads is None:
            self.reads = self.made(writes=False)
        for number, off, nbytes in self.deferred:
            granules = self.granules(off, nbytes)
            self.reads.stamp(None, granules, number)
        self.deferred = []

    def write(self, w, ins, off, nbytes, what, strength=WEAK, number=None, same=None):
        """Checks and enters a write. `same()`: whether it leaves the bytes as they are, in which
        case the order of two writes does not matter.
        """
        if not self.order.check:
            return
        if self.writes is None:
            self.writes = self.made(writes=True)
        if number is None:
            number = self.order.event(w, ins, what, strength)
        granules = self.granules(off, nbytes)
        if self.deferred:
            self.enter_deferred()
        if self.reads is not None:
            found = self.reads.conflict(w, granules, strength, write=True)
            if found:
                raise self.fault(w, what, *found, strength)
        found = self.writes.conflict(w, granules, strength, write=not strength)
        if found and not (same and found[1].time != PENDING and same()):
            raise self.fault(w, what, *found, strength)
        self.writes.stamp(w, granules, number)
        if self.reads is not None and strength == WEAK:
            self.reads.last[granules] = 0  # whoever is ordered after this is ordered after them
        if self.releases and strength == WEAK:
            for x in off.tolist():
                self.releases.pop(x, None)

    # ---- proxies ----
    def unordered_writes(self, granules):
        """Numbers of the events of generic writes to granules, since everything was ordered."""
        out = set()
        for n in distinct(self.writes.last[granules]):
            if n > 0:
                out.add(n)
            elif n < 0:
                out |= {m for where, m in self.writes.log if np.isin(where, granules).any()}
        return {n for n in out if self.order.events[n].proxy == "generic"}

    def check_proxy(self, w, granules, what):
        """Generic stores reach the async proxy by a fence.proxy.async ordered after them."""
        for n in self.unordered_writes(granules):
            e = self.order.events[n]
            if self.same_era(w, e) and not self.order.fenced(w, e, self.order.proxy_fences):
                raise Fault(
                    f"{what} of {self.name}, where a generic-proxy store was not followed by a "
                    f"fence.proxy.async ordered before it: {e}"
                )

    @staticmethod
    def same_era(w, e):
        """Whether the end of a launch, which works as every fence, does not lie between."""
        grid = w.cta.cluster.grid
        return e.grid == grid.serial

    def check_constant(self, w, ins, off, nbytes):
        """`ld.global.nc` may only read what the kernel does not write (9.7.9.9)."""
        if not self.order.check or self.writes is None:
            return
        for n in self.unordered_writes(self.granules(off, nbytes)):
            e = self.order.events[n]
            if self.same_era(w, e):
                raise Fault(
                    f"ld.global.nc of {self.name}, which may read a stale value of what this "
                    f"kernel wrote: {e}"
                )
