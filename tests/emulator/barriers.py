"""Barriers, fences and the dependence of launches (PTX ISA 9.7.13.1-5, 9.7.13.14, 8.7)."""

import numpy as np

from .builder import BLOCK, converged, first, instruction
from .memory import Fault
from .ordering import proxy_fence
from .races import CLUSTER, learn, live, scope_of
from .races import fence as order_fence
from .sync import NamedBarrier
from .values import LANES


@instruction("bar.warp.sync")
def bar_warp(b, ins):
    def meet(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        w.meet()
        return None

    return meet


def named_barrier(b, ins):
    """`bar.sync a{, n}` and `bar.arrive a, n`: whole warps take part, as 32 threads each."""
    ids = [b.get(x, "u4") for x in ins.operands]
    arrive_only = "arrive" in ins.parts

    def bar(M, w, frag, m):
        if not converged(w, frag):
            return BLOCK
        i = first(ids[0](w.r), m)
        if i > 15:
            raise Fault(f"named barrier {i}: a CTA has 16, numbered 0 to 15")
        barrier = w.cta.bars.get(i)
        if barrier is None:
            barrier = w.cta.bars[i] = NamedBarrier(i)
        w.why = barrier
        if frag.token is not None:
            if barrier.generation == frag.token:
                barrier.waiters.append(w)
                return BLOCK
            frag.token = None
            return None
        if len(ids) > 1:
            n = first(ids[1](w.r), m)
            if n == 0 or n % LANES or barrier.expected not in (0, n):
                raise Fault(f"{barrier}: this warp expects {n} threads")
            barrier.expected = n
        if not arrive_only:
            w.meet()
        barrier.arrived += LANES
        barrier.warps.append(w)
        barrier.dirty |= w.dirty
        w.release(barrier.clock)
        if not arrive_only:
            barrier.joined.append(w)
        generation = barrier.generation
        barrier.settle(M, w.cta)
        if arrive_only or barrier.generation != generation:
            return None
        frag.token = generation
        barrier.waiters.append(w)
        return BLOCK

    return bar


for _name in ("bar", "barrier"):
    for _form in ("sync", "arrive", "cta.sync", "cta.arrive"):
        instruction(f"{_name}.{_form}", "aligned")(named_barrier)


@instruction("barrier.cluster.arrive", "release relaxed aligned")
def cluster_arrive(b, ins):
    """9.7.13.4: once a thread, before it waits; a relaxed arrival releases what fences did."""
    relaxed = "relaxed" in ins.parts

    def arrive(M, w, frag, m):
        barrier, lanes = w.cta.cluster.barrier, np.ones(LANES, bool) if m is None else m
        if (w.cluster_arrived & lanes).any():
            raise Fault("barrier.cluster.arrive of threads that have not waited since their last")
        w.cluster_arrived = w.cluster_arrived | lanes
        if relaxed:
            release_fenced(w, barrier)
        else:
            publish_inits(w, m)
            barrier.dirty |= w.dirty
            w.release(barrier.clock)
        w.cluster_target = barrier.phase
        barrier.arrived += int(lanes.sum())
        barrier.settle(M)

    return arrive


def release_fenced(w, barrier):
    """A relaxed arrival: with a fence before it a release pattern (8.8), of what that fence orders.

    A fence.mbarrier_init orders initialisations of the warp's mbarriers, nothing else (9.7.13.5).
    """
    for component in w.inits:
        barrier.clock[component] = max(int(barrier.clock[component]), 1)
    for scope, known in w.fences.items():
        if scope >= CLUSTER:
            clock = known.clocks[w.cta.cluster.serial]
            np.maximum(barrier.clock, clock, out=barrier.clock)
            barrier.dirty |= known.dirty


@instruction("barrier.cluster.wait", "acquire aligned")
def cluster_wait(b, ins):
    def wait(M, w, frag, m):
        barrier, lanes = w.cta.cluster.barrier, np.ones(LANES, bool) if m is None else m
        if (lanes & ~w.cluster_arrived).any():
            raise Fault("barrier.cluster.wait of threads that have not arrived since their last")
        if barrier.phase > w.cluster_target:
            w.cluster_arrived = w.cluster_arrived & ~lanes
            w.dirty |= live(barrier.visible)
            w.meet()
            w.acquire(barrier.seen)
            return None
        w.why = barrier
        barrier.waiters.append(w)
        return BLOCK

    return wait


def publish_inits(w, lanes, met=True):
    """Lets other CTAs and asynchronous units use the mbarriers that these lanes of the warp
    initialised (None: all), and with `met` the others' before the lanes last met; gives them.
    """
    published = []
    for mb in w.cta.mbars.values():
        if mb.init_warp is w and (
            lanes is None or lanes[mb.init_lane] or (met and mb.init_meeting < w.meetings)
        ):
            mb.published = True
            published.append(mb)
    return published


@instruction("fence.proxy.async", "global shared::cta shared::cluster")
def fence_proxy_async(b, ins):
    """Publishes generic stores to the async proxy: those to all memory, or to one space.

    `.shared::cta` is the memory of the executing CTA; that of the others of its cluster is in
    `.shared::cluster` alone (5.1.7, 9.7.13.5).
    """
    to_shared, own = "global" not in ins.parts, "shared::cta" in ins.parts
    to_global = b.program.mixes_proxies and not any("shared" in p for p in ins.parts)

    def fence(M, w, frag, m):
        if to_shared:
            smem = w.cta.smem
            reached = [d for d in w.dirty if d.smem is smem or not own]
            fenced = {d for d in reached if w.fence_store(d, m)}
            for d in fenced:
                d.flush()
            w.dirty = w.dirty - fenced
            publish_inits(w, m)
            if w.fence_reads(m):
                proxy_fence(w)
        if to_global:
            M.memory.order.add_fence(w, M.memory.order.proxy_fences, ins)

    return fence


@instruction("fence.proxy.async::generic", "*")
def fence_async_generic(b, ins):
    """`.release` hands reads over to the async proxy; `.acquire` is that of the other side."""
    release = "release" in ins.parts
    return lambda M, w, frag, m: proxy_fence(w) if release else None


@instruction("fence.mbarrier_init", "release cluster")
def fence_mbarrier_init(b, ins):
    """9.7.13.5: about the mbarrier.inits of the same thread before it."""

    def fence(M, w, frag, m):
        w.inits.update(mb.id for mb in publish_inits(w, m, met=False))

    return fence


@instruction("fence.proxy.alias")
def fence_proxy_alias(b, ins):
    return lambda M, w, frag, m: None


@instruction(
    "fence",
    "sc acq_rel acquire release cta cluster gpu sys sync_restrict::shared::cta "
    "sync_restrict::shared::cluster",
)
def fence(b, ins):
    """Also `sync_restrict`, which promises less: here it is a fence of all memory."""
    scope = scope_of(ins.parts)
    acquire, release = "release" not in ins.parts, "acquire" not in ins.parts
    return lambda M, w, frag, m: order_fence(w, scope, acquire, release)


@instruction("membar", "cta gl sys")
def membar(b, ins):
    scope = scope_of(ins.parts)
    return lambda M, w, frag, m: order_fence(w, scope)


@instruction("griddepcontrol.launch_dependents")
def launch_dependents(b, ins):
    """The next launch of the stream may start once every CTA has issued this or has exited."""
    return lambda M, w, frag, m: w.cta.cluster.grid.speaks(w.cta)


@instruction("griddepcontrol.wait")
def grid_wait(b, ins):
    """Until the launch before is complete and its memory visible; nothing else orders the two."""

    def wait(M, w, frag, m):
        grid = w.cta.cluster.grid
        before = grid.previous
        if before is None or before.complete:
            learn(w, grid.before())
            return None
        w.why = f"the end of {before}"
        before.waiters.append(w)
        return BLOCK

    return wait
