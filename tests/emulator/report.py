"""What everything was doing when a launch failed; kinds of warnings."""

import re

_FIRST_PLACE = re.compile(r"[:,;]?( between| before| after)? PTX line")


def short(name):
    """A kernel's name without what the compiler adds to the function's."""
    name = name.removeprefix("kernel_cutlass_").partition("_object_at_")[0]
    name = name.partition("_tensorptr")[0].strip("_")
    return name if len(name) <= 60 else name[:57] + "..."


def kind_of(warning):
    """The words of a warning before the first place in the code that it names."""
    return _FIRST_PLACE.split(warning, maxsplit=1)[0]


def waits_for(w):
    """What a sleeping warp waits for."""
    why = w.why
    if isinstance(why, tuple):
        return f"parity {why[1]} of {why[0]}"
    return str(why) if why is not None else "?"


def position(w, code):
    """Where each fragment of a warp is."""
    parts = []
    for f in w.frags:
        if f.pc < len(code):
            lanes = "" if f.mask is None else f" ({int(f.mask.sum())} lanes)"
            parts.append(code[f.pc].where() + lanes)
    return "; ".join(parts)


def cta_report(cta, code):
    """Warps in the same state share a line; then the barriers that are not at rest."""
    groups = {}
    for w in cta.warps:
        if w.frags:
            state = "ready" if w.ready else f"waits for {waits_for(w)}"
            groups.setdefault((state, position(w, code)), []).append(w.index)
    out = [
        f"  cta{cta.ctaid} rank {cta.rank} warps {warps}: {state}\n      at {where}"
        for (state, where), warps in groups.items()
    ]
    done = [w.index for w in cta.warps if not w.frags]
    if done:
        out.append(f"  cta{cta.ctaid} rank {cta.rank} warps {done}: exited")
    out += [f"    {mb}" for _, mb in sorted(cta.mbars.items())]
    out += [f"    {b}" for b in cta.bars.values() if b.arrived]
    out += [f"    in flight: {a}" for a in list(cta.smem.accesses)[:8]]
    return out


def report(machine, failed=None):
    """Every warp of two clusters, what it waits for, and the state of the barriers.

    failed: the cluster whose warp failed, if one did; it comes first.
    """
    out = [
        f"[{machine.policy}; step {machine.steps}, "
        f"{len(machine.events)} asynchronous operations pending]"
    ]
    several = len({cluster.grid for cluster in machine.active}) > 1
    for cluster in sorted(machine.active, key=lambda c: c is not failed)[:2]:
        if several:
            out.append(f"  of launch {cluster.grid.serial}, {short(cluster.grid.name)}:")
        for cta in cluster.ctas:
            out += cta_report(cta, cta.program.kernel.instrs)
        if cluster.barrier.arrived:
            out.append(f"    {cluster.barrier}")
    return "\n".join(out)
