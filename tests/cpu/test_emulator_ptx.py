"""Single PTX instructions in the emulator, against numpy."""

import numpy as np
import pytest

from tests.emulator import Fault, Policy, PtxError
from tests.emulator.snippet import run_ptx
from tests.emulator.values import bf16_bits, bf16_float

LANES = 32
RNG = np.random.default_rng(0)
STORE = "mad.wide.u32 %d9, %r0, 4, %d0; st.global.u32 [%d9], %r9;"
LOAD = "mad.wide.u32 %d8, %r0, 4, %d1; ld.global.u32 %r1, [%d8];"
LOAD2 = LOAD + "mad.wide.u32 %d8, %r0, 4, %d2; ld.global.u32 %r2, [%d8];"
EDGES = np.array([0, 1, 2, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0x12345678], np.uint32)


def words(n=LANES):
    """Random 32-bit words with the extremes among them."""
    x = RNG.integers(0, 1 << 32, n, dtype=np.uint32)
    x[: len(EDGES)] = EDGES
    return RNG.permutation(x)


def unary(instruction, a):
    out = np.zeros(LANES, np.uint32)
    run_ptx(LOAD + instruction + STORE, out, a)
    return out


def binary(instruction, a, b):
    out = np.zeros(LANES, np.uint32)
    run_ptx(LOAD2 + instruction + STORE, out, a, b)
    return out


def bits(x):
    return int(x) & 0xFFFFFFFF


def signed(x):
    return int(np.uint32(x).view(np.int32))


INTEGER = {
    "add.s32 %r9, %r1, %r2;": lambda a, b: a + b,
    "sub.u32 %r9, %r1, %r2;": lambda a, b: a - b,
    "mul.lo.s32 %r9, %r1, %r2;": lambda a, b: a * b,
    "mul.hi.u32 %r9, %r1, %r2;": lambda a, b: a * b >> 32,
    "mul.hi.s32 %r9, %r1, %r2;": lambda a, b: signed(a) * signed(b) >> 32,
    "min.s32 %r9, %r1, %r2;": lambda a, b: min(signed(a), signed(b)),
    "max.u32 %r9, %r1, %r2;": max,
    "shl.b32 %r9, %r1, %r2;": lambda a, b: a << b if b < 32 else 0,
    "shr.u32 %r9, %r1, %r2;": lambda a, b: a >> min(b, 32),
    "shr.s32 %r9, %r1, %r2;": lambda a, b: signed(a) >> min(b, 31),
    "shf.l.wrap.b32 %r9, %r1, %r2, 5;": lambda a, b: ((b << 32 | a) << 5) >> 32,
    "shf.r.wrap.b32 %r9, %r1, %r2, 37;": lambda a, b: (b << 32 | a) >> 5,
    "shf.r.clamp.b32 %r9, %r1, %r2, 37;": lambda a, b: b,
    "lop3.b32 %r9, %r1, %r2, 0x0F0F0F0F, 0x96;": lambda a, b: a ^ b ^ 0x0F0F0F0F,
    "prmt.b32 %r9, %r1, %r2, 0x7531;": lambda a, b: int.from_bytes(
        bytes((a.to_bytes(4, "little") + b.to_bytes(4, "little"))[i] for i in (1, 3, 5, 7)),
        "little",
    ),
    "prmt.b32 %r9, %r1, %r2, 0xB654;": lambda a, b: (b & 0xFFFFFF) | (0xFF000000 if a >> 31 else 0),
    "bfi.b32 %r9, %r1, %r2, 4, 8;": lambda a, b: (b & ~0xFF0) | (a & 0xFF) << 4,
    "bfe.u32 %r9, %r1, 28, 8;": lambda a, b: a >> 28,
    "bfe.s32 %r9, %r1, 4, 8;": lambda a, b: (a >> 4 & 0xFF) - (256 if a >> 11 & 1 else 0),
    "bfe.s32 %r9, %r1, 28, 8;": lambda a, b: signed(a) >> 28,
    "popc.b32 %r9, %r1;": lambda a, b: bin(a).count("1"),
    "clz.b32 %r9, %r1;": lambda a, b: 32 - a.bit_length(),
    "brev.b32 %r9, %r1;": lambda a, b: int(f"{a:032b}"[::-1], 2),
    "bfind.u32 %r9, %r1;": lambda a, b: a.bit_length() - 1,
    "bfind.s32 %r9, %r1;": lambda a, b: (a if a < 1 << 31 else ~a & 0xFFFFFFFF).bit_length() - 1,
    "mad.lo.s32 %r9, %r1, %r2, 7;": lambda a, b: a * b + 7,
    "div.u32 %r9, %r2, 7;": lambda a, b: b // 7,
    "div.s32 %r9, %r2, 7;": lambda a, b: int(signed(b) / 7),
    "rem.s32 %r9, %r2, 7;": lambda a, b: signed(b) - int(signed(b) / 7) * 7,
    "setp.lt.s32 %p1, %r1, %r2; selp.b32 %r9, 1, 0, %p1;": lambda a, b: signed(a) < signed(b),
    "setp.lt.u32 %p1|%p2, %r1, %r2; selp.b32 %r9, 1, 0, %p2;": lambda a, b: a >= b,
    "mov.b32 {%h1, %h2}, %r1; mov.b32 %r9, {%h2, %h1};": lambda a, b: a >> 16 | a << 16,
    "mul.wide.s32 %d5, %r1, %r2; shr.u64 %d5, %d5, 13; cvt.u32.u64 %r9, %d5;": (
        lambda a, b: (signed(a) * signed(b) & (1 << 64) - 1) >> 13
    ),
    "cvt.s32.s8 %r9, %r1;": lambda a, b: (a & 0xFF) - (256 if a & 0x80 else 0),
    "cvt.u16.u32 %h1, %r1; cvt.u32.u16 %r9, %h1;": lambda a, b: a & 0xFFFF,
    "@%p3 mov.b32 %r9, 1; @!%p3 mov.b32 %r9, 2;": lambda a, b: 2,
}


@pytest.mark.parametrize("instruction", INTEGER)
def test_integer(instruction):
    a, b = words(), words()
    want = [bits(INTEGER[instruction](int(x), int(y))) for x, y in zip(a, b, strict=True)]
    assert binary(instruction, a, b).tolist() == want


def floats():
    x = (RNG.standard_normal(LANES) * 10.0 ** RNG.integers(-6, 6, LANES)).astype(np.float32)
    x[:6] = [0.0, -0.0, np.inf, -np.inf, np.nan, 1.0]
    return x


FLOAT = {
    "add.f32 %r9, %r1, %r2;": lambda a, b: a + b,
    "mul.rn.f32 %r9, %r1, %r2;": lambda a, b: a * b,
    "min.f32 %r9, %r1, %r2;": np.fmin,
    "max.NaN.f32 %r9, %r1, %r2;": np.maximum,
    "fma.rn.f32 %r9, %r1, %r2, %r1;": (
        lambda a, b: (a.astype(np.float64) * b.astype(np.float64) + a).astype(np.float32)
    ),
    "abs.f32 %r9, %r1;": lambda a, b: np.abs(a),
    "neg.f32 %r9, %r1;": lambda a, b: -a,
    "ex2.approx.ftz.f32 %r9, %r1;": lambda a, b: np.exp2(a),
    "lg2.approx.f32 %r9, %r1;": lambda a, b: np.log2(a),
    "rcp.approx.ftz.f32 %r9, %r1;": lambda a, b: 1 / a,
    "tanh.approx.f32 %r9, %r1;": lambda a, b: np.tanh(a),
    "add.sat.f32 %r9, %r1, %r2;": lambda a, b: np.clip(np.nan_to_num(a + b, nan=0.0), 0, 1),
    "cvt.rzi.f32.f32 %r9, %r1;": lambda a, b: np.trunc(a),
    "cvt.rn.f16.f32 %h1, %r1; cvt.f32.f16 %r9, %h1;": (
        lambda a, b: a.astype(np.float16).astype(np.float32)
    ),
    "cvt.rn.bf16.f32 %h1, %r1; cvt.f32.bf16 %r9, %h1;": lambda a, b: bf16_float(bf16_bits(a)),
}


@pytest.mark.parametrize("instruction", FLOAT)
def test_float(instruction):
    a, b = floats(), floats()
    got = binary(instruction, a, b).view(np.float32)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(got, FLOAT[instruction](a, b))


def test_packed_conversion_puts_the_second_operand_low():
    a, b = floats(), floats()
    got = binary("cvt.rn.bf16x2.f32 %r9, %r1, %r2;", a, b)
    np.testing.assert_array_equal(got & 0xFFFF, bf16_bits(b))
    np.testing.assert_array_equal(got >> 16, bf16_bits(a))


MIXED = {
    "add.rn.f32.bf16 %r9, %h1, %r2;": lambda a, c: a + c,
    "sub.f32.bf16 %r9, %h1, %r2;": lambda a, c: a - c,
    "add.sat.f32.bf16 %r9, %h1, %r2;": lambda a, c: np.clip(a + c, 0, 1),
    "fma.rn.f32.bf16 %r9, %h1, %h1, %r2;": lambda a, c: a * a + c,
}


@pytest.mark.parametrize("instruction", MIXED)
@pytest.mark.parametrize("narrow", ["bf16", "f16"])
def test_mixed_precision(instruction, narrow):
    x, c = RNG.standard_normal((2, LANES)).astype(np.float32)
    bits = bf16_bits(x) if narrow == "bf16" else x.astype(np.float16).view(np.uint16)
    a = bf16_float(bits) if narrow == "bf16" else bits.view(np.float16).astype(np.float32)
    text = "cvt.u16.u32 %h1, %r1;" + instruction.replace("bf16", narrow)
    out = binary(text, bits.astype(np.uint32), c.view(np.uint32)).view(np.float32)
    want = MIXED[instruction](a.astype(np.float64), c.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize(
    "compare, want",
    [
        ("lt", lambda a, b: a < b),
        ("ltu", lambda a, b: ~(a >= b)),
        ("ne", lambda a, b: (a < b) | (a > b)),
        ("neu", lambda a, b: a != b),
        ("num", lambda a, b: ~np.isnan(a + b)),
        ("eq", lambda a, b: a == b),
    ],
)
def test_float_compare_with_nan(compare, want):
    a = np.array([1, 2, np.nan, np.nan] * 8, np.float32)
    b = np.array([2, 2, 1, np.nan] * 8, np.float32)
    got = binary(f"setp.{compare}.f32 %p1, %r1, %r2; selp.b32 %r9, 1, 0, %p1;", a, b)
    np.testing.assert_array_equal(got.astype(bool), want(a, b))


def test_float_to_integer_saturates():
    a = np.array([3e9, -3e9, np.nan, 2.5, 3.5, -2.5, 0.49, -0.51] * 4, np.float32)
    got = unary("cvt.rni.s32.f32 %r9, %r1;", a).view(np.int32)
    assert got[:8].tolist() == [2**31 - 1, -(2**31), 0, 2, 4, -2, 0, -1]


def test_divergence_runs_every_lane_once():
    body = """
    mov.b32 %r9, 0;
    mov.b32 %r5, %r0;
    LOOP: setp.eq.s32 %p1, %r5, 0;
    @%p1 bra DONE;
    add.s32 %r9, %r9, %r5;
    sub.s32 %r5, %r5, 1;
    bra LOOP;
    DONE:
    """
    out = np.zeros(LANES, np.uint32)
    run_ptx(body + STORE, out)
    assert out.tolist() == [i * (i + 1) // 2 for i in range(LANES)]


SHUFFLES = {
    "shfl.sync.idx.b32 %r9|%p1, %r1, 5, 31, -1;": lambda i: 5,
    "shfl.sync.up.b32 %r9|%p1, %r1, 3, 0, -1;": lambda i: i - 3 if i >= 3 else i,
    "shfl.sync.down.b32 %r9|%p1, %r1, 4, 31, -1;": lambda i: i + 4 if i + 4 < 32 else i,
    "shfl.sync.bfly.b32 %r9|%p1, %r1, 9, 31, -1;": lambda i: i ^ 9,
    "shfl.sync.idx.b32 %r9|%p1, %r1, 2, 0x181f, -1;": lambda i: (i & ~7) | 2,
    "shfl.sync.up.b32 %r9|%p1, %r1, 1, 0x1800, -1;": lambda i: i - 1 if i % 8 else i,
}


@pytest.mark.parametrize("instruction", SHUFFLES)
def test_shuffle(instruction):
    a = words()
    assert unary(instruction, a).tolist() == [
        int(a[SHUFFLES[instruction](i)]) for i in range(LANES)
    ]


def test_vote_match_elect_redux():
    a = np.array([i % 3 for i in range(LANES)], np.uint32)
    ballot = unary("setp.eq.u32 %p1, %r1, 1; vote.sync.ballot.b32 %r9, %p1, -1;", a)
    assert set(ballot.tolist()) == {sum(1 << i for i in range(1, 32, 3))}
    any_ = unary(
        "setp.eq.u32 %p1, %r1, 7; vote.sync.any.pred %p2, %p1, -1; selp.b32 %r9, 1, 0, %p2;", a
    )
    assert not any_.any()
    match = unary("match.any.sync.b32 %r9, %r1, -1;", a)
    assert match.tolist() == [sum(1 << j for j in range(32) if j % 3 == i % 3) for i in range(32)]
    elected = unary("elect.sync %r9|%p1, -1; selp.b32 %r9, 1, 0, %p1;", a)
    assert elected.sum() == 1
    assert set(unary("redux.sync.add.u32 %r9, %r1, -1;", a).tolist()) == {int(a.sum())}


def test_guarded_elect_counts_active_lanes_only():
    body = "setp.gt.u32 %p3, %r0, 9; mov.b32 %r9, 7; @!%p3 bra OUT; elect.sync %r8|%p1, 0xfffffc00;"
    for seed in range(8):
        out = np.zeros(LANES, np.uint32)
        text = body + "selp.b32 %r9, 1, 0, %p1; OUT: bar.warp.sync -1;" + STORE
        run_ptx(text, out, policy=Policy(seed))
        assert out[:10].tolist() == [7] * 10
        assert sorted(out[10:].tolist()) == [0] * 21 + [1]


def test_elect_takes_any_lane_but_the_same_one_every_time():
    """PTX ISA 9.7.13.14: deterministic for a member mask."""
    body = "mov.b32 %r9, 0; mov.b32 %r7, 0; AGAIN: elect.sync %r8|%p1, -1; add.u32 %r7, %r7, 1;"
    body += (
        "selp.b32 %r6, 1, 0, %p1; add.u32 %r9, %r9, %r6; setp.lt.u32 %p2, %r7, 5; @%p2 bra AGAIN;"
    )
    leaders = set()
    for seed in range(12):
        out = np.zeros(LANES, np.uint32)
        run_ptx(body + STORE, out, policy=Policy(seed))
        assert sorted(out.tolist()) == [0] * 31 + [5]
        leaders.add(int(out.argmax()))
        again = np.zeros(LANES, np.uint32)
        run_ptx(body + STORE, again, policy=Policy(seed))
        assert (again == out).all()
    assert len(leaders) > 4


@pytest.mark.parametrize("op, want", [("add", 32 * 33 // 2), ("max", 32), ("or", 63)])
def test_atomics_reach_memory(op, want):
    counter, kind = np.zeros(1, np.uint32), "b32" if op == "or" else "u32"
    run_ptx(f"add.u32 %r1, %r0, 1; red.global.{op}.{kind} [%d0], %r1;", counter)
    assert counter[0] == want


def test_atomic_returns_each_old_value_once():
    counter, out = np.zeros(1, np.uint32), np.zeros(64, np.uint32)
    body = "atom.global.add.u32 %r9, [%d0], 2; mad.wide.u32 %d9, %r0, 4, %d1;"
    body += "st.global.u32 [%d9], %r9;"
    run_ptx(body, counter, out, block=(64, 1, 1))
    assert sorted(out.tolist()) == list(range(0, 128, 2)) and counter[0] == 128


def test_float_atomics():
    x = np.zeros(1, np.float32)
    run_ptx("cvt.rn.f32.u32 %r1, %r0; red.global.add.f32 [%d0], %r1;", x)
    assert x[0] == 496


def test_vector_accesses_and_signed_bytes():
    src = np.arange(-64, 64, dtype=np.int8)
    out = np.zeros((LANES, 4), np.int32)
    body = """
    mad.wide.u32 %d8, %r0, 4, %d1;
    ld.global.v4.s8 {%r1, %r2, %r3, %r4}, [%d8];
    mad.wide.u32 %d9, %r0, 16, %d0;
    st.global.v4.b32 [%d9], {%r1, %r2, %r3, %r4};
    """
    run_ptx(body, out, src)
    assert out.reshape(-1).tolist() == src.tolist()


def test_vector_registers():
    out, a = np.zeros(LANES, np.uint32), words(4 * LANES)
    body = """{ .reg .v4 .b32 quad;
        mad.wide.u32 %d8, %r0, 16, %d1; ld.global.v4.b32 quad, [%d8];
        xor.b32 quad.x, quad.x, quad.a; mov.b32 %r9, quad.r; }"""
    run_ptx(body + STORE, out, a)
    np.testing.assert_array_equal(out, a[::4] ^ a[3::4])


def test_named_barriers_order_producer_and_consumer():
    body = """
    mov.b32 %r2, dynamic;
    setp.ge.u32 %p1, %r0, 32;
    @%p1 bra CONSUMER;
    add.u32 %r3, %r0, 100;
    mad.lo.u32 %r4, %r0, 4, %r2;
    st.shared.u32 [%r4], %r3;
    bar.arrive 3, 64;
    bra END;
    CONSUMER:
    bar.sync 3, 64;
    sub.u32 %r5, 63, %r0;
    mad.lo.u32 %r4, %r5, 4, %r2;
    ld.shared.u32 %r9, [%r4];
    sub.u32 %r0, %r0, 32;
    mad.wide.u32 %d9, %r0, 4, %d0;
    st.global.u32 [%d9], %r9;
    END:
    """
    for seed in range(6):
        out = np.zeros(LANES, np.uint32)
        run_ptx(body, out, block=(64, 1, 1), smem=128, policy=Policy(seed))
        assert out.tolist() == [131 - i for i in range(LANES)]


def test_deadlock_report_names_barrier_and_warps():
    body = "setp.lt.u32 %p1, %r0, 32; @%p1 bra END; bar.sync 2, 96; END:"
    with pytest.raises(Fault, match=r"deadlock[\s\S]*waits for named barrier 2: 32 of 96 threads"):
        run_ptx(body, block=(64, 1, 1))


MBARRIER = """
mov.b32 %r2, dynamic;
setp.ne.u32 %p1, %r0, 0;
@!%p1 mbarrier.init.shared::cta.b64 [%r2], {count};
@!%p1 fence.mbarrier_init.release.cluster;
bar.sync 0;
"""
WAIT = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], {parity}; @!%p2 bra WAIT;"
CP_ASYNC = """
mad.lo.u32 %r4, %r0, {size}, %r2;
mad.wide.u32 %d8, %r0, {size}, %d1;
and.b32 %r6, %r0, 3;
mul.lo.u32 %r6, %r6, {part};
cp.async.{level}.shared.global [%r4+64], [%d8], {size}, %r6;
"""
READ_BACK = """
mad.lo.u32 %r4, %r0, {size}, %r2;
ld.shared.u32 %r9, [%r4+{at}];
"""


@pytest.mark.parametrize("size, level", [(4, "ca"), (8, "ca"), (16, "ca"), (16, "cg")])
@pytest.mark.parametrize("completion", ["group", "all", "mbarrier"])
@pytest.mark.parametrize("mode", ["eager", "lazy", "random"])
def test_cp_async_zero_fills(size, level, completion, mode):
    """Lane i copies (i % 4) * part bytes of `size`; the rest becomes zero."""
    part = size // 4
    src = RNG.integers(1, 256, LANES * size).astype(np.uint8)
    want = src.reshape(LANES, size).copy()
    for i in range(LANES):
        want[i, i % 4 * part :] = 0
    finish = {
        "group": "cp.async.commit_group; cp.async.wait_group 0;",
        "all": "cp.async.wait_all;",
        "mbarrier": "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r2];" + WAIT.format(parity=0),
    }[completion]
    body = (
        MBARRIER.format(count=LANES) + CP_ASYNC.format(size=size, level=level, part=part) + finish
    )
    for at in range(0, size, 4):
        out = np.zeros(LANES, np.uint32)
        run_ptx(
            body + READ_BACK.format(size=size, at=64 + at) + STORE,
            out,
            src,
            smem=64 + LANES * size,
            policy=Policy(1, mode),
        )
        assert (
            out.tolist()
            == np.ascontiguousarray(want[:, at : at + 4]).view(np.uint32)[:, 0].tolist()
        )


def test_a_late_copy_completes_while_another_cta_polls():
    flag, data = np.zeros(1, np.uint32), words(4 * LANES)
    body = """
    mov.b32 %r2, dynamic; mov.u32 %r5, %ctaid.x; setp.eq.u32 %p1, %r5, 1; @%p1 bra POLL;
    mad.lo.u32 %r3, %r0, 16, %r2; mad.wide.u32 %d8, %r0, 16, %d1;
    cp.async.cg.shared.global [%r3], [%d8], 16; cp.async.wait_all;
    st.release.gpu.global.u32 [%d0], 7; bra END;
    POLL: ld.acquire.gpu.global.u32 %r1, [%d0];
    setp.ne.u32 %p2, %r1, 7; @%p2 bra POLL; END:"""
    run_ptx(body, flag, data, grid=(2, 1, 1), smem=600, policy=Policy(0, "lazy"))
    assert flag[0] == 7


def test_cp_async_without_a_wait_is_a_race():
    body = MBARRIER.format(count=1) + CP_ASYNC.format(size=16, level="cg", part=4)
    body += READ_BACK.format(size=16, at=64) + STORE
    with pytest.raises(Fault, match="race: generic load .* while in flight: cp.async"):
        run_ptx(
            body,
            np.zeros(LANES, np.uint32),
            np.zeros(512, np.uint8),
            smem=600,
            policy=Policy(0, "lazy"),
        )


def test_cp_async_wait_group_leaves_uncommitted_copies():
    body = MBARRIER.format(count=1) + CP_ASYNC.format(size=16, level="cg", part=4)
    body += "cp.async.wait_group 0;" + READ_BACK.format(size=16, at=64) + STORE
    with pytest.raises(Fault, match="race: generic load"):
        run_ptx(
            body,
            np.zeros(LANES, np.uint32),
            np.zeros(512, np.uint8),
            smem=600,
            policy=Policy(0, "lazy"),
        )


@pytest.mark.parametrize(
    "text", ["cp.async.cg.shared.global [%r1], [%d0], 8;", "add.rz.f32 %r1, %r1, %r1;"]
)
def test_illegal_or_unknown_instructions_are_refused(text):
    with pytest.raises(PtxError, match="line"):
        run_ptx(text, np.zeros(4, np.uint32))


def test_an_unknown_name_is_refused_with_its_kernel():
    with pytest.raises(PtxError, match="snippet: unknown symbol or special register %nosuch"):
        run_ptx("mov.u32 %r1, %nosuch;")


def test_mbarrier_phases_and_counts():
    body = MBARRIER.format(count=64) + "mbarrier.arrive.shared::cta.b64 %d5, [%r2];"
    body += WAIT.format(parity=0) + "mbarrier.arrive.shared::cta.b64 _, [%r2];"
    body += WAIT.replace("WAIT", "AGAIN").format(parity=1) + "mov.b32 %r9, 5;" + STORE
    out = np.zeros(64, np.uint32)
    run_ptx(body, out, block=(64, 1, 1), smem=64)
    assert (out == 5).all()


@pytest.mark.parametrize(
    "fence, ordered",
    [
        ("", False),
        ("fence.acquire.sync_restrict::shared::cluster.cluster;", False),
        ("fence.release.sync_restrict::shared::cta.cluster;", True),
        ("fence.acq_rel.cta;", True),
        ("membar.cta;", True),
    ],
)
def test_relaxed_arrival_orders_what_a_release_fence_came_after(fence, ordered):
    """Thread 0 stores a word and arrives; the second warp waits and reads it (PTX ISA 8.8)."""
    body = MBARRIER.format(count=1) + "@%p1 bra OTHERS; st.shared.u32 [%r2+16], 41;" + fence
    body += "mbarrier.arrive.relaxed.cluster.shared::cta.b64 _, [%r2]; OTHERS: mov.b32 %r9, 41;"
    body += "setp.lt.u32 %p4, %r0, 32; @%p4 bra END;" + WAIT.format(parity=0)
    body += "ld.shared.u32 %r9, [%r2+16]; END:" + STORE
    out = np.zeros(64, np.uint32)
    if ordered:
        run_ptx(body, out, block=(64, 1, 1), smem=64)
        assert (out == 41).all()
    else:
        with pytest.raises(Fault, match="race: generic load"):
            run_ptx(body, out, block=(64, 1, 1), smem=64)


def test_too_many_arrivals_are_reported():
    body = MBARRIER.format(count=40) + "@!%p1 mbarrier.arrive.shared::cta.b64 _, [%r2], 41;"
    with pytest.raises(Fault, match="arrivals, more than are pending"):
        run_ptx(body + WAIT.format(parity=0), block=(128, 1, 1), smem=64)


def test_an_mbarrier_is_initialised_once():
    body = MBARRIER.format(count=1) + "@!%p1 mbarrier.init.shared::cta.b64 [%r2], 1;"
    with pytest.raises(Fault, match="mbarrier.init of a valid mbarrier at 0x400: mbarrier.inval"):
        run_ptx(body, block=(32, 1, 1), smem=64)
    run_ptx(
        MBARRIER.format(count=1)
        + "@!%p1 mbarrier.inval.shared::cta.b64 [%r2];"
        + "@!%p1 mbarrier.init.shared::cta.b64 [%r2], 1;",
        block=(32, 1, 1),
        smem=64,
    )


def test_remote_arrival_and_store_in_a_cluster():
    """CTA 1 stores a word in CTA 0's shared memory (st.async), counted on the mbarrier there."""
    body = (
        MBARRIER.format(count=1)
        + """
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    mov.u32 %r5, %cluster_ctarank;
    setp.eq.u32 %p4, %r5, 0;
    @%p4 bra OWNER;
    mapa.shared::cluster.u32 %r6, %r2, 0;
    @%p1 bra END;
    st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r6+16], 77, [%r6];
    bra END;
    OWNER:
    @!%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 4;
    """
        + WAIT.format(parity=0)
        + """
    ld.shared.u32 %r9, [%r2+16];
    """
        + STORE
        + """
    END:
    barrier.cluster.arrive.release.aligned;
    barrier.cluster.wait.acquire.aligned;
    """
    )
    for seed in range(6):
        out = np.zeros(LANES, np.uint32)
        run_ptx(body, out, grid=(2, 1, 1), cluster=(2, 1, 1), smem=64, policy=Policy(seed))
        assert (out == 77).all()


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_stmatrix_and_ldmatrix(n, trans):
    """ldmatrix reads back what stmatrix of the same form wrote; the memory holds the matrices."""
    registers = ", ".join(f"%r{20 + i}" for i in range(n))
    results = ", ".join(f"%r{30 + i}" for i in range(n))
    load = "".join(
        f"mad.wide.u32 %d8, %r0, {4 * n}, %d1; ld.global.u32 %r{20 + i}, [%d8+{4 * i}];"
        for i in range(n)
    )
    save = "".join(
        f"mad.wide.u32 %d8, %r0, {4 * n}, %d0; st.global.u32 [%d8+{4 * i}], %r{30 + i};"
        for i in range(n)
    )
    copy = "mad.lo.u32 %r5, %r0, 16, %r2; ld.shared.v4.b32 {%r40, %r41, %r42, %r43}, [%r5];"
    copy += "mad.wide.u32 %d8, %r0, 16, %d2; st.global.v4.b32 [%d8], {%r40, %r41, %r42, %r43};"
    body = f"""
    {load}
    mov.b32 %r2, dynamic;
    mad.lo.u32 %r4, %r0, 16, %r2;
    stmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 [%r4], {{{registers}}};
    bar.warp.sync -1;
    ldmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 {{{results}}}, [%r4];
    {save}
    {copy}
    """
    src = RNG.integers(0, 1 << 32, (LANES, n), dtype=np.uint32)
    out, memory = np.zeros((LANES, n), np.uint32), np.zeros((LANES, 4), np.uint32)
    run_ptx(body, out, src, memory, smem=512)
    np.testing.assert_array_equal(out, src)
    matrices = memory.view(np.uint16).reshape(4, 8, 8)[:n]
    if trans:
        matrices = matrices.transpose(0, 2, 1)
    for i in range(n):
        for lane in range(LANES):
            pair = int(src[lane, i]) & 0xFFFF, int(src[lane, i]) >> 16
            assert (
                tuple(matrices[i, lane // 4, 2 * (lane % 4) : 2 * (lane % 4) + 2].tolist()) == pair
            )


def test_local_memory_is_private_to_a_lane():
    body = """
    .local .align 16 .b8 depot[16];
    mov.u64 %d3, depot;
    cvta.local.u64 %d4, %d3;
    st.u32 [%d4+8], %r0;
    ld.local.u32 %r9, [%d3+8];
    """
    out = np.zeros(LANES, np.uint32)
    run_ptx(body + STORE, out)
    assert out.tolist() == list(range(LANES))


def test_setmaxnreg_waits_for_released_registers():
    body = """
    setp.lt.u32 %p1, %r0, 128;
    @%p1 bra PRODUCER;
    setmaxnreg.inc.sync.aligned.u32 {math};
    bra END;
    PRODUCER: setmaxnreg.dec.sync.aligned.u32 40;
    END:
    """
    run_ptx(body.format(math=232), block=(384, 1, 1))
    with pytest.raises(Fault, match=r"deadlock[\s\S]*setmaxnreg.inc to 240"):
        run_ptx(body.format(math=240), block=(384, 1, 1))
