"""tcgen05.mma of every kind and tcgen05.cp in the emulator, against numpy and torch."""

import numpy as np
import pytest
import torch

from tests.emulator import Fault, Policy, PtxError
from tests.emulator.snippet import run_ptx

RNG = np.random.default_rng(0)
N, SIZE, OPERANDS = 16, 32768, 1024
SMALL = {"e2m1": (2, 1, 1), "e2m3": (2, 3, 1), "e3m2": (3, 2, 3)}
CODES = {"e4m3": 0, "e5m2": 1, "e2m3": 3, "e3m2": 4, "e2m1": 5}


def minifloat(code, exponent, mantissa, bias):
    """The value of a 4- or 6-bit code, from its definition."""
    sign = -1 if code >> (exponent + mantissa) & 1 else 1
    e, m = code >> mantissa & ((1 << exponent) - 1), code & ((1 << mantissa) - 1)
    steps = m * 2 ** (1 - bias) if e == 0 else (2**mantissa + m) * 2 ** (e - bias)
    return sign * steps / 2**mantissa


def pack(codes, bits):
    """Codes of a row to its bytes, the first in the lowest bits."""
    number = sum(int(c) << (bits * i) for i, c in enumerate(codes))
    return np.frombuffer(number.to_bytes(len(codes) * bits // 8, "little"), np.uint8)


def operand(dtype, rows, packed=False):
    """(32 bytes a row as in shared memory, values): 4 and 6 bits padded to 16 codes in 16 bytes."""
    if dtype in SMALL:
        width = 1 + sum(SMALL[dtype][:2])
        codes = RNG.integers(0, 1 << width, (rows, 64 if packed else 32))
        values = np.array([minifloat(c, *SMALL[dtype]) for c in range(1 << width)])[codes]
        if packed:
            return np.stack([pack(row, 4) for row in codes]), values
        out = np.full((rows, 2, 16), 0xFF, np.uint8)
        for row, units in zip(codes.reshape(rows, 2, 16), out, strict=True):
            for half, unit in zip(row, units, strict=True):
                unit[: 2 * width] = pack(half, width)
        return out.reshape(rows, 32), values
    if dtype in ("s8", "u8"):
        x = RNG.integers(*((-128, 128) if dtype == "s8" else (0, 256)), (rows, 32))
        return x.astype(np.uint8), x
    k = {"f16": 16, "bf16": 16, "tf32": 8}.get(dtype, 32)
    x = torch.from_numpy(RNG.standard_normal((rows, k)).astype(np.float32))
    if dtype == "tf32":
        bits = x.numpy().view(np.uint32) & np.uint32(0xFFFFE000)
        return bits.view(np.uint8), bits.view(np.float32).astype(float)
    kinds = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
    x = x.to(kinds.get(dtype, torch.float8_e5m2))
    return x.view(torch.uint8).numpy(), x.double().numpy()


def descriptor(start):
    """K-major without swizzle: 8 rows of 16 bytes in a row, the second 16 bytes 8 KiB on."""
    return (1024 + OPERANDS + start) >> 4 | (8192 >> 4) << 16 | (128 >> 4) << 32 | 1 << 46


def image(**parts):
    """Words of shared memory: a and b as their descriptors say, others as they are."""
    memory = np.zeros(SIZE, np.uint8)
    for name, x in parts.items():
        start = OPERANDS + {"a": 0, "b": 4096, "raw": 16384}[name]
        if name == "raw":
            memory[start : start + x.size] = x.reshape(-1)
            continue
        for half in (0, 1):
            rows = x[:, 16 * half : 16 * half + 16]
            memory[start + 8192 * half :][: rows.size] = rows.reshape(-1)
    return memory.view(np.uint32)


# Thread 0 is %p1, warp 0 is %p4; array 1 goes to shared memory, from byte 1024 on.
BEGIN = """
mov.b32 %r2, dynamic;
setp.eq.u32 %p1, %r0, 0;
setp.lt.u32 %p4, %r0, 32;
{first}
mov.b32 %r3, %r0;
FILL: mad.wide.u32 %d8, %r3, 4, %d1;
ld.global.u32 %r4, [%d8];
mad.lo.u32 %r5, %r3, 4, %r2;
setp.gt.u32 %p5, %r3, 255;
@%p5 st.shared.u32 [%r5], %r4;
add.u32 %r3, %r3, 128;
setp.lt.u32 %p6, %r3, 8192;
@%p6 bra FILL;
@%p1 mbarrier.init.shared::cta.b64 [%r2], 1;
@%p1 fence.mbarrier_init.release.cluster;
@!%p4 bra FILLED;
tcgen05.alloc.cta_group::{ctas}.sync.aligned.shared::cta.b32 [%r2+16], {allocated};
FILLED:
fence.proxy.async.shared::cta;
"""
BODY = """
{begin}bar.sync 0;
ld.shared.u32 %r6, [%r2+16];
and.b32 %r7, %r0, 96;
shl.b32 %r7, %r7, 16;
add.u32 %r7, %r7, %r6;
{before}
tcgen05.fence::before_thread_sync;
bar.sync 0;
tcgen05.fence::after_thread_sync;
setp.ne.u32 %p3, 0, 0;
setp.ne.u32 %p5, 0, 1;
@!%p1 bra ISSUED;
{issue}
{commit}
ISSUED:
WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;
@!%p2 bra WAIT;
tcgen05.fence::after_thread_sync;
tcgen05.ld.sync.aligned.32x32b.x{columns}.b32 {{{registers}}}, [%r7];
tcgen05.wait::ld.sync.aligned;
mad.wide.u32 %d9, %r0, {width}, %d0;
{save}
bar.sync 0;
@!%p4 bra END;
tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r6, 128;
END:
"""


COMMIT = "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r2];"


def names(first, n):
    return ", ".join(f"%r{first + i}" for i in range(n))


def run(issue, memory, before="", columns=N, seed=0, arrays=(), commit=COMMIT):
    """The first columns of tensor memory after `issue`, (128 lanes, columns) words."""
    out = np.zeros((128, columns), np.uint32)
    save = "".join(f"st.global.u32 [%d9+{4 * i}], %r{20 + i};\n" for i in range(columns))
    body = BODY.format(
        begin=BEGIN.format(first="", ctas=1, allocated=128), before=before, issue=issue,
        commit=commit,
        columns=columns, registers=names(20, columns),
        width=4 * columns, save=save,
    )  # fmt: skip
    options = {"block": (128, 1, 1), "smem": SIZE, "target": "sm_100a", "policy": Policy(seed)}
    machine = run_ptx(body, out, memory, *arrays, **options)
    assert not machine.warnings
    return out


def idesc(a, b, d=1, m=128, n=N, extra=0):
    return d << 4 | a << 7 | b << 10 | (n >> 3) << 17 | (m >> 4) << 24 | extra


A, B = descriptor(0), descriptor(4096)


def multiply(kind, shape, enable, a=A, tail=""):
    return f"tcgen05.mma.cta_group::1.kind::{kind} [%r6], {a}, {B}, {shape}, {enable}{tail};\n"


KINDS = [
    ("f16", "f16", "f16", 0, 0), ("f16", "bf16", "bf16", 1, 1), ("tf32", "tf32", "tf32", 2, 2),
    *(("f8f6f4", a, b, CODES[a], CODES[b])
      for a, b in zip(CODES, ["e2m1", "e4m3", "e3m2", "e5m2", "e2m3"], strict=True)),
]  # fmt: skip


@pytest.mark.parametrize("kind, ta, tb, ca, cb", KINDS)
def test_kinds(kind, ta, tb, ca, cb):
    """2 A B^T with float accumulators."""
    (abits, a), (bbits, b) = operand(ta, 128), operand(tb, N)
    shape = idesc(ca, cb)
    issue = multiply(kind, shape, "%p3") + multiply(kind, shape, "%p5")
    for seed in range(2):
        got = run(issue, image(a=abits, b=bbits), seed=seed).view(np.float32)
        np.testing.assert_allclose(got, 2 * a @ b.T, rtol=1e-5, atol=1e-4)


# Lanes 0 and 1 of warp 0 come to the issue; %p8 is lane 0 and %p9 lane 1.
TWO_LANES = "setp.lt.u32 %p1, %r0, 2; setp.eq.u32 %p8, %r0, 0; setp.eq.u32 %p9, %r0, 1;\n"


@pytest.mark.parametrize(
    "issuer, committer", [("%p8", "%p8"), ("%p9", "%p9"), ("%p8", "%p9"), ("%p9", "%p8")]
)
@pytest.mark.parametrize("operation", ["mma", "cp"])
def test_a_commit_counts_what_its_own_thread_issued(issuer, committer, operation):
    (abits, a), (bbits, b) = operand("bf16", 128), operand("bf16", N)
    issue = multiply("f16", idesc(1, 1), "%p3")
    if operation == "cp":
        issue = f"tcgen05.cp.cta_group::1.128x256b [%r6], {A};\n"
    for seed in range(3):
        arguments = {"before": TWO_LANES, "seed": seed, "commit": f"@{committer} {COMMIT}"}
        arguments["columns"] = N if operation == "mma" else 8
        memory = image(a=abits, b=bbits)
        if issuer == committer:
            got = run(f"@{issuer} {issue}", memory, **arguments)
            if operation == "mma":
                np.testing.assert_allclose(got.view(np.float32), a @ b.T, rtol=1e-5, atol=1e-5)
            else:
                np.testing.assert_array_equal(got, abits.view(np.uint32))
            continue
        with pytest.raises(Fault, match="race: tcgen05.ld .*whose commit's mbarrier nothing here"):
            run(f"@{issuer} {issue}", memory, **arguments)


def test_operations_of_two_lanes_have_no_order():
    """Those of one thread run in the order of their issue (9.7.16.6.2)."""
    memory = image(a=operand("bf16", 128)[0], b=operand("bf16", N)[0])
    first, second = (multiply("f16", idesc(1, 1), enable) for enable in ("%p3", "%p5"))
    for seed in range(3):
        arguments = {"before": TWO_LANES, "seed": seed, "commit": f"@%p8 {COMMIT}"}
        run(f"@%p8 {first}@%p8 {second}", memory, **arguments)
        with pytest.raises(Fault, match="race: tcgen05.mma of .* after the write by .*tcgen05.mma"):
            run(f"@%p9 {first}@%p8 {second}", memory, **arguments)


@pytest.mark.parametrize("order", ["committed last", "issued after the commit", "of another lane"])
def test_an_operand_is_read_until_its_own_commit(order):
    """Two MMAs read the same operands; a commit whose mbarrier counts the first frees none."""
    memory = image(a=operand("bf16", 128)[0], b=operand("bf16", N)[0])
    first = multiply("f16", idesc(1, 1), "%p3")
    second = multiply("f16", idesc(1, 1), "%p3").replace("[%r6]", "[%r9]")
    texts = {
        "committed last": f"@%p8 {first}@%p8 {second}@%p8 {COMMIT}\n",
        "issued after the commit": f"@%p8 {first}@%p8 {COMMIT}\n@%p8 {second}",
        "of another lane": f"@%p9 {second}@%p8 {first}@%p8 {COMMIT}\n",
    }
    # lane 0 overwrites a word of B once the mbarrier's phase is over
    done = "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;\n@!%p2 bra AGAIN;\n"
    done += f"@%p8 st.shared.u32 [%r2+{OPERANDS + 4096}], 0;\n"
    issue = "add.u32 %r9, %r6, 64;\n" + texts[order]
    for seed in range(4):
        arguments = {"before": TWO_LANES, "seed": seed, "commit": done}
        if order == "committed last":
            run(issue, memory, **arguments)
            continue
        with pytest.raises(Fault, match="race: generic store"):
            run(issue, memory, **arguments)


@pytest.mark.parametrize("kind, dtype, code", [("f16", "f16", 0), ("f8f6f4", "e4m3", 0)])
def test_half_accumulators(kind, dtype, code):
    """An accumulator takes the low half of a column."""
    (abits, a), (bbits, b) = operand(dtype, 128), operand(dtype, N)
    got = run(multiply(kind, idesc(code, code, d=0), "%p3"), image(a=abits, b=bbits))
    values = (got & 0xFFFF).astype(np.uint16).view(np.float16)
    np.testing.assert_allclose(values, a @ b.T, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("saturate", [False, True])
def test_integers(saturate):
    (abits, a), (bbits, b) = operand("u8", 128), operand("s8", N)
    start = RNG.choice([2**31 - 1, -(2**31), 7], (128, N)).astype(np.int32)
    before = f"mad.wide.u32 %d10, %r0, {4 * N}, %d2;\n"
    before += "".join(f"ld.global.u32 %r{60 + i}, [%d10+{4 * i}];\n" for i in range(N))
    before += f"tcgen05.st.sync.aligned.32x32b.x{N}.b32 [%r7], {{{names(60, N)}}};\n"
    before += "tcgen05.wait::st.sync.aligned;\n"
    shape = idesc(0, 1, d=2, extra=saturate << 3)
    got = run(multiply("i8", shape, "%p5"), image(a=abits, b=bbits), before, arrays=[start])
    want = a @ b.T + start.astype(np.int64)
    want = np.clip(want, -(2**31), 2**31 - 1) if saturate else want
    assert (got.view(np.int32) == want.astype(np.int32)).all()


def test_negation_and_scaled_input():
    (abits, a), (bbits, b) = operand("bf16", 128), operand("bf16", N)
    first = multiply("f16", idesc(1, 1), "%p3")
    second = multiply("f16", idesc(1, 1, extra=1 << 13), "%p5", tail=", 2")
    got = run(first + second, image(a=abits, b=bbits)).view(np.float32)
    np.testing.assert_allclose(got, (1 / 4 - 1) * (a @ b.T), rtol=1e-4, atol=1e-5)


def test_disabled_lanes_keep_what_they_had():
    (abits, a), (bbits, b) = operand("bf16", 128), operand("bf16", N)
    masks = [0x5, 0, 0xFFFFFFFF, 0x80000000]
    tail = "{" + ", ".join(f"%r{70 + i}" for i in range(4)) + "}, %p5"
    moves = "".join(f"mov.b32 %r{70 + i}, {m};\n" for i, m in enumerate(masks))
    first = multiply("f16", idesc(1, 1), "%p3")
    got = run(moves + first + multiply("f16", idesc(1, 1), tail), image(a=abits, b=bbits))
    off = np.array([masks[lane // 32] >> (lane % 32) & 1 for lane in range(128)], bool)
    want = np.where(off[:, None], 1, 2) * (a @ b.T)
    np.testing.assert_allclose(got.view(np.float32), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("m", [64, 128])
@pytest.mark.parametrize("kind, dtype, code", [("f16", "bf16", 1), ("f8f6f4", "e5m2", 1)])
def test_a_in_tensor_memory(m, kind, dtype, code):
    """A takes eight columns; for M=64 both it and D have 16 rows in each warp's lanes."""
    (abits, a), (bbits, b) = operand(dtype, m), operand(dtype, N)
    lanes = np.arange(m) if m == 128 else np.arange(64) // 16 * 32 + np.arange(64) % 16
    words = np.zeros((128, 8), np.uint32)
    words[lanes] = abits.view(np.uint32)
    before = "mad.wide.u32 %d10, %r0, 32, %d2;\n"
    before += "".join(f"ld.global.u32 %r{60 + i}, [%d10+{4 * i}];\n" for i in range(8))
    before += (
        f"add.u32 %r8, %r7, 64;\ntcgen05.st.sync.aligned.32x32b.x8.b32 [%r8], {{{names(60, 8)}}};\n"
    )
    before += "tcgen05.wait::st.sync.aligned;\n"
    issue = "add.u32 %r9, %r6, 64;\n" + multiply(kind, idesc(code, code, m=m), "%p3", "[%r9]")
    got = run(issue, image(b=bbits), before, arrays=[words]).view(np.float32)
    np.testing.assert_allclose(got[lanes], a @ b.T, rtol=1e-5, atol=1e-4)


SCALED = [
    ("mxf8f6f4", "block32", "e4m3", "e2m1", 1), ("mxf4", "scale_vec::2X", "e2m1", "e2m1", 1),
    ("mxf4nvf4", "block32", "e2m1", "e2m1", 1), ("mxf4nvf4", "block16", "e2m1", "e2m1", 0),
]  # fmt: skip


def scale_values(codes, power):
    if power:
        return 2.0 ** (codes.astype(float) - 127)
    return torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()


def scale_copies(spoil=""):
    """tcgen05.cp of both scale operands: A's to columns 32.. 35, B's to 40.. 43."""
    text = "add.u32 %r10, %r6, 32; add.u32 %r11, %r6, 40;\n"
    for register, start in ((10, 16384), (11, 16384 + 512)):
        text += f"tcgen05.cp.cta_group::1.32x128b.warpx4 [%r{register}], {descriptor(start)};\n"
    return text + spoil


@pytest.mark.parametrize("kind, size, ta, tb, power", SCALED)
@pytest.mark.parametrize("pick", [0, 1])
def test_block_scaling(kind, size, ta, tb, power, pick):
    """Row r's scale word: lane r % 32, column r // 32; the ID is its first byte."""
    packed = kind != "mxf8f6f4"
    (abits, a), (bbits, b) = operand(ta, 128, packed), operand(tb, N, packed)
    n = {"mxf8f6f4": 1, "mxf4": 2}.get(kind, 2 if size == "block32" else 4)
    first = {1: 3, 2: 2, 4: 0}[n] * pick
    words = RNG.integers(*((122, 132) if power else (1, 0x60)), (2, 32, 4, 4)).astype(np.uint8)
    scales = [
        np.stack([scale_values(w[r % 32, r // 32, first : first + n], power) for r in range(rows)])
        for w, rows in zip(words, (128, N), strict=True)
    ]
    codes = (1, 1) if packed else (CODES[ta], CODES[tb])
    shape = idesc(*codes, d=0, extra=power << 23 | first << 29 | first << 4)
    issue = scale_copies() + (
        f"tcgen05.mma.cta_group::1.kind::{kind}.block_scale.{size} [%r6], {A}, {B}, {shape}, "
        "[%r10], [%r11], %p3;\n"
    )
    got = run(issue, image(a=abits, b=bbits, raw=words)).view(np.float32)
    k = a.shape[1]
    wide = [np.repeat(s, k // n, axis=1) for s in scales]
    want = (a * wide[0]) @ (b * wide[1]).T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_scale_factors_must_be_in_all_four_partitions():
    (abits, _), (bbits, _) = operand("e4m3", 128), operand("e4m3", N)
    before = "add.u32 %r8, %r7, 32;\nmov.b32 %r60, %r0;\n"
    before += "tcgen05.st.sync.aligned.32x32b.x8.b32 [%r8], {" + ", ".join(["%r60"] * 8) + "};\n"
    before += "tcgen05.wait::st.sync.aligned;\n"
    issue = "add.u32 %r10, %r6, 32;\ntcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.block32 "
    issue += f"[%r6], {A}, {B}, {idesc(0, 0, d=0, extra=1 << 23)}, [%r10], [%r10], %p3;\n"
    with pytest.raises(Fault, match="scale factors of row 0 differ between lane partitions 0 and"):
        run(issue, image(a=abits, b=bbits), before)


EACH = """
mov.u32 %r90, %cluster_ctarank;
setp.eq.u32 %p7, %r90, 0;
mad.wide.u32 %d1, %r90, 32768, %d1;
mad.wide.u32 %d0, %r90, {stride}, %d0;
"""
PAIR = """
{begin}{meet}
ld.shared.u32 %r6, [%r2+16];
setp.ne.u32 %p3, 0, 0;
mov.b16 %h1, {mask};
@!%p7 bra ISSUED;
@!%p1 bra ISSUED;
tcgen05.mma.cta_group::2.kind::f16 [%r6], {a}, {b}, {shape}, %p3;
tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%r2], %h1;
ISSUED:
{wait}
tcgen05.fence::after_thread_sync;
and.b32 %r7, %r0, 96;
shl.b32 %r7, %r7, 16;
add.u32 %r7, %r7, %r6;
tcgen05.ld.sync.aligned.32x32b.x{columns}.b32 {{{registers}}}, [%r7];
tcgen05.wait::ld.sync.aligned;
mad.wide.u32 %d9, %r0, {width}, %d0;
{save}
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
@!%p4 bra END;
tcgen05.dealloc.cta_group::2.sync.aligned.b32 %r6, 32;
END:
"""
MEET = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"
WAIT = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;\n@!%p2 bra WAIT;\n"


def run_pair(m, seed=0, meet=MEET, mask=3, wait=WAIT):
    """One MMA of two CTAs, 32 columns: (result by CTA, lane and column; A; B)."""
    (abits, a), (bbits, b) = operand("bf16", m), operand("bf16", 32)
    columns = 32 if m == 256 else 16
    out = np.zeros((2, 128, columns), np.uint32)
    memory = np.stack(
        [image(a=abits[m // 2 * i :][: m // 2], b=bbits[16 * i :][:16]) for i in range(2)]
    )
    save = "".join(f"st.global.u32 [%d9+{4 * i}], %r{20 + i};\n" for i in range(columns))
    each = EACH.format(stride=512 * columns)
    body = PAIR.format(
        begin=BEGIN.format(first=each, ctas=2, allocated=32), meet=meet, mask=mask, a=A, b=B,
        shape=idesc(1, 1, m=m, n=32),
        wait=wait, columns=columns, registers=names(20, columns), width=4 * columns, save=save,
    )  # fmt: skip
    options = {"block": (128, 1, 1), "grid": (2, 1, 1), "cluster": (2, 1, 1), "smem": SIZE}
    run_ptx(body, out, memory, target="sm_100a", policy=Policy(seed), **options)
    return out.view(np.float32), a, b


@pytest.mark.parametrize("m", [128, 256])
def test_two_ctas(m):
    """M=256: lane = row of the CTA's half. M=128: lanes 64.. hold the second half of N."""
    for seed in range(3):
        out, a, b = run_pair(m, seed)
        want = (a @ b.T).reshape(2, m // 2, 32)
        if m == 128:
            out = np.concatenate([out[:, :64], out[:, 64:]], axis=2)
        np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "missing, message",
    [
        ({"mask": 1}, "deadlock"),
        (
            {"wait": ""},
            r"race: tcgen05\.(ld of .*whose commit's mbarrier|mma of .* the read by)",
        ),
        (
            {"meet": "bar.sync 0;"},
            "never fenced|nothing orders after|has allocated no TMEM|no init",
        ),
    ],
)
def test_mistakes_of_two_ctas(missing, message):
    for seed in range(3):
        with pytest.raises(Fault, match=message):
            run_pair(256, seed, **missing)


ALL = np.arange(128)
COPIES = {
    "128x256b": (128, 32, [(ALL, ALL)]),
    "128x128b": (128, 16, [(ALL, ALL)]),
    "4x256b": (4, 32, [(32 * np.arange(4), np.arange(4))]),
    "64x128b.warpx2::02_13": (64, 16, [(ALL, ALL % 64)]),
    "64x128b.warpx2::01_23": (64, 16, [(ALL, ALL // 64 * 32 + ALL % 32)]),
    "32x128b.warpx4": (32, 16, [(ALL, ALL % 32)]),
}  # rows, bytes of a row, (lanes, source row of each)


@pytest.mark.parametrize("form", COPIES)
def test_copies(form):
    rows, width, placed = COPIES[form]
    data = RNG.integers(0, 256, (rows, width), dtype=np.uint8)
    padded = np.zeros((128, 32), np.uint8)
    padded[:rows, :width] = data
    columns = width // 4
    got = run(f"tcgen05.cp.cta_group::1.{form} [%r6], {A};\n", image(a=padded), columns=columns)
    for lanes, source in placed:
        assert (got[lanes] == data.view(np.uint32)[source]).all()


@pytest.mark.parametrize(
    "shape, message",
    [
        (idesc(1, 1, m=96), "M=96 N=16; M may be 64 or 128"),
        (idesc(1, 1, n=24), "N=24.* N a multiple of 16 up to 256"),
        (idesc(3, 1), "its types are none of kind::f16"),
        (idesc(1, 1, extra=4), "sparsity is not supported"),
    ],
)
def test_shapes_that_do_not_exist(shape, message):
    with pytest.raises(Fault, match=message):
        run(multiply("f16", shape, "%p3"), image())


@pytest.mark.parametrize(
    "text",
    [
        "tcgen05.mma.cta_group::1.kind::f16.ashift [%r6], [%r7], 0, 0, %p1;",
        "tcgen05.mma.ws.cta_group::1.kind::f16 [%r6], 0, 0, 0, %p1;",
        "tcgen05.mma.cta_group::1.kind::mxf4nvf4.block_scale [%r6], 0, 0, 0, [%r7], [%r8], %p1;",
        "tcgen05.mma.cta_group::1.kind::mxf8f6f4 [%r6], 0, 0, 0, [%r7], [%r8], %p1;",
        "tcgen05.mma.cta_group::1.kind::f8f6f4 [%r6], 0, 0, 0, %p1, 3;",
        "tcgen05.mma.cta_group::2.kind::f16 [%r6], 0, 0, 0, {%r1, %r2, %r3, %r4}, %p1;",
        "tcgen05.cp.cta_group::1.32x128b [%r6], 0;",
        "tcgen05.cp.cta_group::1.128x128b.b8x16.b4x16_p64 [%r6], 0;",
        "tcgen05.shift.cta_group::1.down [%r6];",
    ],
)
def test_other_forms_are_refused(text):
    with pytest.raises(PtxError, match="line 12"):
        run_ptx(text, target="sm_100a")


@pytest.mark.parametrize(
    ("a", "message"),
    [
        (descriptor(SIZE), r"tcgen05.mma: operand at .* is outside the allocation"),
        (A | 1 << 53, "bits outside its fields are set"),
        (A & ~(7 << 46), "version bits are not 0b001"),
    ],
)
def test_descriptors_that_are_not_legal(a, message):
    with pytest.raises(Fault, match=message):
        run(multiply("f16", idesc(1, 1), "%p3", a), image())
