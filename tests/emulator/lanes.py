"""Instructions across the lanes of a warp (PTX ISA 9.7.9.6, 9.7.13.9-12)."""

import random

import numpy as np

from .builder import BLOCK, converged, first, instruction, member_lanes, set_reg
from .ptx import Pair
from .values import LANE_IDS, LANES, NP, UINT

ALL = np.arange(LANES)


@instruction("shfl.sync", "up down bfly idx")
def shfl(b, ins):
    d, value, lane, clamp, members = ins.operands
    d, pred = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    gv, gl, gc, gm = (b.get(x, "u4") for x in (value, lane, clamp, members))
    mode = ins.parts[2]

    def run(M, w, frag, m):
        if not converged(w, frag, member_lanes(first(gm(w.r), m))):
            return BLOCK
        by, c = gl(w.r).astype(np.int64), gc(w.r).astype(np.int64)
        segment, limit = (c >> 8) & 31, c & 31
        low = ALL & segment
        top = low | (limit & ~segment)
        j = {
            "idx": low | (by & 31 & ~segment),
            "up": ALL - (by & 31),
            "down": ALL + (by & 31),
            "bfly": ALL ^ (by & 31),
        }[mode]
        ok = j >= top if mode == "up" else j <= top
        j = np.where(ok, j, ALL) & 31
        set_reg(w, d, gv(w.r)[j], m)
        if pred is not None:
            set_reg(w, pred, ok, m)

    return run


def leader_of(M, w, members, active):
    """The active lane that a warp elects among `members`: any, by the seed, but the same one
    every time."""
    order = w.leaders.get(members)
    if order is None:
        drawn = random.Random(f"{M.policy.seed} {w.cta.rank} {w.index} {members}")
        order = drawn.sample(range(LANES), LANES) if M.any_leader else range(LANES)
        w.leaders[members] = order
    return next(lane for lane in order if active[lane])


@instruction("elect.sync")
def elect(b, ins):
    """9.7.13.14: code that works with the lowest lane alone is found to."""
    d, members = ins.operands
    gm = b.get(members, "u4")

    def run(M, w, frag, m):
        members = first(gm(w.r), m)
        need = member_lanes(members)
        if not converged(w, frag, need):
            return BLOCK
        active = w.live & need if m is None else m & need
        leader = leader_of(M, w, members, active)
        set_reg(w, d.first, np.full(LANES, leader, np.uint32), m)
        set_reg(w, d.second, np.arange(LANES) == leader, m)

    return run


@instruction("vote.sync", "any all uni ballot")
def vote(b, ins):
    d, p, members = ins.operands
    gp, gm = b.get(p, "?"), b.get(members, "u4")
    mode = ins.parts[2]

    def run(M, w, frag, m):
        need = member_lanes(first(gm(w.r), m))
        if not converged(w, frag, need):
            return BLOCK
        values, active = gp(w.r), need & w.live
        if mode == "ballot":
            bits = int(np.packbits(values & active, bitorder="little").view(np.uint32)[0])
            set_reg(w, d, np.full(LANES, bits, np.uint32), m)
        else:
            v = values[active]
            set_reg(
                w,
                d,
                np.full(
                    LANES, {"any": v.any(), "all": v.all(), "uni": v.all() or not v.any()}[mode]
                ),
                m,
            )

    return run


@instruction("match.any.sync")
@instruction("match.all.sync")
def match(b, ins):
    d, value, members = ins.operands
    d, pred = (d.first, d.second) if isinstance(d, Pair) else (d, None)
    gv, gm = b.get(value, f"u{b.type_of(ins)[2]}"), b.get(members, "u4")
    everyone = "all" in ins.parts

    def run(M, w, frag, m):
        need = member_lanes(first(gm(w.r), m))
        if not converged(w, frag, need):
            return BLOCK
        v, active = gv(w.r), need & w.live
        same = (v[:, None] == v[None, :]) & active[None, :]
        bits = (same * (np.uint64(1) << LANE_IDS.astype(np.uint64))).sum(1).astype(np.uint32)
        if everyone:
            equal = bool((v[active] == v[active][0]).all())
            bits = bits if equal else np.zeros(LANES, np.uint32)
            if pred is not None:
                set_reg(w, pred, np.full(LANES, equal), m)
        set_reg(w, d, bits, m)

    return run


@instruction("redux.sync", "add min max and or xor abs NaN")
def redux(b, ins):
    d, value, members = ins.operands
    _, kind, size = b.type_of(ins)
    if "abs" in ins.parts or "NaN" in ins.parts:
        raise b.unsupported(ins)
    gv, gm = b.get(value, kind), b.get(members, "u4")
    f = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[ins.parts[2]]

    def run(M, w, frag, m):
        need = member_lanes(first(gm(w.r), m))
        if not converged(w, frag, need):
            return BLOCK
        out = f.reduce(gv(w.r)[need & w.live], dtype=NP[kind])
        set_reg(w, d, np.full(LANES, out, NP[kind]).view(UINT[size]), m)

    return run


@instruction("activemask")
def activemask(b, ins):
    (d,) = ins.operands

    def run(M, w, frag, m):
        active = w.live if frag.mask is None else frag.mask & w.live
        set_reg(
            w,
            d,
            np.full(
                LANES, int(np.packbits(active, bitorder="little").view(np.uint32)[0]), np.uint32
            ),
            m,
        )

    return run
