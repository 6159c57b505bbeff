"""The order that a load, store or atomic operation asks for (PTX ISA 8.4-8.7, 9.7.9.8, 9.7.9.11).

`.weak` orders nothing; `.volatile` and `.mmio` count as `.relaxed.sys`; atomics without a modifier
are `.relaxed.gpu`.
"""

from .races import GPU, WEAK, observe, publish, scope_of, snapshot

STRONG = ("relaxed", "acquire", "release", "acq_rel", "volatile", "mmio")


class Semantics:
    """Of one instruction (without one: a plain access); `strength` as in `races`."""

    def __init__(self, ins=None, what="access"):
        self.what = what
        parts = ins.parts if ins else ()
        given = next((p for p in parts[1:] if p in STRONG), None)
        if given is None:
            given = "relaxed" if what == "atomic" else "weak"
        self.strength = {"weak": WEAK, "volatile": GPU, "mmio": GPU}.get(given, scope_of(parts))
        self.acquires, self.releases = (
            given in ("acquire", "acq_rel"),
            given in ("release", "acq_rel"),
        )
        self.constant = "nc" in parts

    def load(self, w, ins, track, off, nbytes):
        """Before a load of `nbytes` at each offset of a buffer."""
        if self.constant:
            track.check_constant(w, ins, off, nbytes)
        track.read(w, ins, off, nbytes, "load", self.strength)
        if self.strength and track.releases:
            self.observe(w, track.releases, off)

    def store(self, w, ins, track, off, nbytes, same):
        """Before a store; `same()`: whether it changes nothing."""
        track.write(w, ins, off, nbytes, "store", self.strength, same=same)
        if self.strength:
            self.publish(w, track.releases, off, keep=False)

    def modify(self, w, ins, track, off, nbytes):
        """Before an atomic operation."""
        track.write(w, ins, off, nbytes, "atomic", self.strength)
        self.observe(w, track.releases, off)
        self.publish(w, track.releases, off, keep=True)

    # `releases`: what was released at each offset of a buffer, or of a CTA's shared memory
    def observe(self, w, releases, off):
        for x in set(off.tolist()):
            observe(w, releases, x, self.strength, self.acquires)

    def publish(self, w, releases, off, keep):
        known = snapshot(w) if self.releases else None
        if known is None and not w.fences and (keep or not releases):
            return
        for x in set(off.tolist()):
            publish(w, releases, x, self.strength, known, keep)


PLAIN = Semantics()
