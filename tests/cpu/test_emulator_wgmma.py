"""wgmma of every type, and its registers while it runs, in the emulator."""

import numpy as np
import pytest
import torch

from tests.emulator import Fault, Policy, PtxError
from tests.emulator.snippet import run_ptx

RNG = np.random.default_rng(0)
N, SIZE = 16, 16384
FILL = """
mov.b32 %r2, dynamic;
mov.b32 %r3, %r0;
FILL: mad.wide.u32 %d8, %r3, 4, %d1;
ld.global.u32 %r4, [%d8];
mad.lo.u32 %r5, %r3, 4, %r2;
st.shared.u32 [%r5], %r4;
add.u32 %r3, %r3, 128;
setp.lt.u32 %p6, %r3, 4096;
@%p6 bra FILL;
fence.proxy.async.shared::cta;
bar.sync 0;
setp.ne.u32 %p2, 0, 1;
setp.ne.u32 %p3, 0, 0;
"""
WAIT = "wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;\n"
FENCE = "wgmma.fence.sync.aligned;\n"


def operand(dtype, rows):
    """(bytes, 32 a row; values) of a random matrix."""
    if dtype in ("s8", "u8"):
        x = RNG.integers(*((-128, 128) if dtype == "s8" else (0, 256)), (rows, 32))
        return x.astype(np.uint8), x
    k = {"f16": 16, "bf16": 16, "tf32": 8}.get(dtype, 32)
    x = torch.from_numpy(RNG.standard_normal((rows, k)).astype(np.float32))
    if dtype == "tf32":
        bits = x.numpy().view(np.uint32) & np.uint32(0xFFFFE000)
        return bits.view(np.uint8), bits.view(np.float32)
    kinds = {"f16": torch.float16, "bf16": torch.bfloat16, "e4m3": torch.float8_e4m3fn}
    x = x.to(kinds.get(dtype, torch.float8_e5m2))
    return x.view(torch.uint8).numpy(), x.double().numpy()


def image(a, b):
    """K-major without swizzle: 8 rows of 16 bytes in a row, the second 16 bytes 8 KiB on."""
    memory = np.zeros(SIZE, np.uint8)
    for start, x in ((0, a), (4096, b)):
        for half in (0, 1):
            rows = x[:, 16 * half : 16 * half + 16]
            memory[start + 8192 * half :][: rows.size] = rows.reshape(-1)
    return memory.view(np.uint32)


def descriptor(start):
    return (1024 + start) >> 4 | (8192 >> 4) << 16 | (128 >> 4) << 32


A, B = descriptor(0), descriptor(4096)


def names(first, n):
    return "{" + ", ".join(f"%r{first + i}" for i in range(n)) + "}"


def result(body, registers, memory, **options):
    out = np.zeros((128, registers), np.uint32)
    text = FILL + body + f"mad.wide.u32 %d9, %r0, {4 * registers}, %d0;"
    text += "".join(f"st.global.u32 [%d9+{4 * i}], %r{20 + i};" for i in range(registers))
    run_ptx(text, out, memory, block=(128, 1, 1), smem=SIZE, **options)
    return out


def matrix(out):
    """64 x N words from thread and register: figure of 9.7.15.5.1.1."""
    d = np.zeros((64, N), out.dtype)
    for t in range(128):
        for i in range(N // 2):
            row = t // 32 * 16 + t % 32 // 4 + 8 * (i // 2 % 2)
            d[row, 8 * (i // 4) + t % 4 * 2 + i % 2] = out[t, i]
    return d


def half_matrix(out):
    """64 x N halves: register 2 j + h of a thread has row t / 4 + 8 h of columns 8 j.. ."""
    halves = out.view(np.float16).reshape(128, N // 4, 2)
    d = np.zeros((64, N))
    for t in range(128):
        for i in range(N // 4):
            row, column = t // 32 * 16 + t % 32 // 4 + 8 * (i % 2), 8 * (i // 2) + t % 4 * 2
            d[row, column : column + 2] = halves[t, i]
    return d


TYPES = [
    ("f32", "e4m3", "e5m2", 32), ("f32", "e5m2", "e5m2", 32), ("f16", "e4m3", "e4m3", 32),
    ("f16", "f16", "f16", 16), ("f32", "f16", "f16", 16), ("f32", "tf32", "tf32", 8),
    ("s32", "s8", "u8", 32), ("s32", "u8", "s8", 32),
]  # fmt: skip


def multiply(td, ta, tb, k, a, scale="%p2"):
    signs = "" if td == "s32" else ", 1, 1"
    trans = ", 0" * (0 if k != 16 else 2 if isinstance(a, int) else 1)
    registers = N // 4 if td == "f16" else N // 2
    head = f"wgmma.mma_async.sync.aligned.m64n{N}k{k}.{td}.{ta}.{tb} {names(20, registers)}"
    return f"{head}, {a}, {B}, {scale}{signs}{trans};\n"


@pytest.mark.parametrize("td, ta, tb, k", TYPES)
@pytest.mark.parametrize("source", ["shared", "registers"])
def test_types(td, ta, tb, k, source):
    """2 A B^T."""
    (abits, a), (bbits, b) = operand(ta, 64), operand(tb, N)
    load, operand_a = "", A
    if source == "registers":  # thread t: rows t/4, t/4 + 8, bytes 4 (t%4).., then 16 on
        operand_a = names(60, 4)
        load = "shr.u32 %r50, %r0, 5; and.b32 %r51, %r0, 31; shr.u32 %r52, %r51, 2;"
        load += "mad.lo.u32 %r52, %r50, 16, %r52; and.b32 %r53, %r51, 3; shl.b32 %r53, %r53, 2;"
        load += "mad.lo.u32 %r52, %r52, 16, %r53; add.u32 %r52, %r52, %r2;"
        for i, at in enumerate((0, 128, 8192, 8192 + 128)):
            load += f"ld.shared.u32 %r{60 + i}, [%r52+{at}];"
    first, again = (multiply(td, ta, tb, k, operand_a, p) for p in ("%p3", "%p2"))
    registers = N // 4 if td == "f16" else N // 2
    for seed in range(2):
        body = load + "\n" + FENCE + first + again + WAIT
        out = result(body, registers, image(abits, bbits), policy=Policy(seed))
        if td == "f16":
            np.testing.assert_allclose(half_matrix(out), 2 * a @ b.T, rtol=4e-3, atol=4e-2)
        elif td == "s32":
            assert (matrix(out).view(np.int32) == 2 * a @ b.T).all()
        else:
            got = matrix(out).view(np.float32)
            np.testing.assert_allclose(got, 2 * a @ b.T, rtol=1e-5, atol=1e-4)


MMA = multiply("f32", "e4m3", "e4m3", 32, A, "%p3")
OTHER = MMA.replace(names(20, 8), names(24, 8))
FROM_REGISTERS = multiply("f32", "e4m3", "e4m3", 32, names(60, 4), "%p3")


@pytest.mark.parametrize(
    "body, message",
    [
        (MMA + "add.u32 %r9, %r23, 1;", "uses %r23, accumulator of a wgmma that no wgmma.wait"),
        (MMA + "mov.b32 %r20, 0;", "uses %r20, accumulator of a wgmma that no wgmma.wait_group"),
        (FROM_REGISTERS + "mov.b32 %r62, 0;", "uses %r62, A operand of a wgmma that no wgmma.wait"),
        (MMA + OTHER, "uses accumulators as accumulators of another shape or other registers"),
        (MMA + FROM_REGISTERS.replace("60", "20"), "uses accumulators as its A operand|accumulato"),
        (MMA + "wgmma.commit_group.sync.aligned;\nadd.u32 %r9, %r23, 1;", "uses %r23, accumulator"),
    ],
)
@pytest.mark.parametrize("mode", ["eager", "lazy"])
def test_registers_of_a_wgmma_in_flight(body, message, mode):
    with pytest.raises(Fault, match=message):
        result(FENCE + body + WAIT, 8, np.zeros(SIZE // 4, np.uint32), policy=Policy(0, mode))


def test_only_the_newest_groups_are_in_flight():
    """wait_group 1 ends the first group; its accumulators may be used, those of the second not."""
    second = MMA.replace(names(20, 8), names(30, 8))
    commit = "wgmma.commit_group.sync.aligned;\n"
    body = FENCE + MMA + commit + second + commit + "wgmma.wait_group.sync.aligned 1;\n"
    memory = np.zeros(SIZE // 4, np.uint32)
    result(body + "add.f32 %r20, %r20, %r21;" + WAIT, 8, memory)
    with pytest.raises(Fault, match="uses %r30, accumulator"):
        result(body + "add.f32 %r20, %r20, %r30;" + WAIT, 8, memory)


def warnings_of(body):
    out, memory = np.zeros(1, np.uint32), np.zeros(SIZE // 4, np.uint32)
    return run_ptx(FILL + body, out, memory, block=(128, 1, 1), smem=SIZE).warnings


def test_accumulators_are_fenced_after_other_accesses():
    """9.7.15.7.1; none is needed between wgmmas of one shape."""
    again = multiply("f32", "e4m3", "e4m3", 32, A)
    read = "add.f32 %r9, %r20, %r21;"
    assert not warnings_of(FENCE + MMA + WAIT + again + WAIT)
    assert not warnings_of(FENCE + MMA + WAIT + read + FENCE + again + WAIT)
    for second in (again, MMA):
        (warning,) = warnings_of(FENCE + MMA + WAIT + read + second + WAIT)
        assert warning.startswith("no wgmma.fence between an access to accumulators, PTX line")
        assert read[:-1] in warning


def test_a_wait_orders_the_warp_that_waits_alone():
    """What warp 1 stored before the wgmma is not ordered before what warp 0 reads after it."""
    body = "setp.eq.u32 %p7, %r0, 32; @%p7 st.shared.u32 [%r2+16000], 1;" + FENCE + MMA + WAIT
    read = "setp.eq.u32 %p7, %r0, 0; @%p7 ld.shared.u32 %r4, [%r2+16000];"
    warnings_of(body + "bar.sync 0;" + read)
    with pytest.raises(Fault, match="race: generic load .* write by warp 1 of the cluster"):
        warnings_of(body + read)


@pytest.mark.parametrize("bit", [14, 31, 47, 55])
def test_descriptors_with_bits_outside_their_fields(bit):
    with pytest.raises(Fault, match="bits outside its fields are set"):
        warnings_of(FENCE + multiply("f32", "e4m3", "e4m3", 32, A | 1 << bit, "%p3") + WAIT)


def form(types, accumulators, tail):
    return f"{types} {names(20, accumulators)}, {A}, {B}, %p2, {tail};"


@pytest.mark.parametrize(
    "text",
    [
        form("m64n16k16.f16.bf16.bf16", 4, "1, 1, 0, 0"),
        form("m64n16k32.f32.e4m3.e4m3", 8, "1, 1, 0, 1"),
        form("m64n16k32.s32.s8.s8", 8, "1, 1"),
        form("m64n16k16.f32.f16.f16", 4, "1, 1, 0, 0"),
    ],
)
def test_forms_that_do_not_exist_are_refused(text):
    with pytest.raises(PtxError, match="line 12"):
        run_ptx("wgmma.mma_async.sync.aligned." + text)


def test_warpgroups_overtake_each_other():
    """What the second has waited for says nothing of what the first issued before."""
    (abits, a), (bbits, b) = operand("f16", 64), operand("f16", N)
    mma = FENCE + multiply("f32", "f16", "f16", 16, A, "%p3") + "wgmma.commit_group.sync.aligned;"
    body = FILL + "setp.lt.u32 %p5, %r0, 128; @%p5 bra FIRST; bar.sync 1, 256;" + mma
    body += "wgmma.wait_group.sync.aligned 0; bar.sync 2, 128; sub.u32 %r3, %r0, 128;"
    body += "shl.b32 %r3, %r3, 4; add.u32 %r3, %r3, %r2; mov.b32 %r4, 0; "
    body += "st.shared.v4.b32 [%r3], {%r4, %r4, %r4, %r4};"
    body += "st.shared.v4.b32 [%r3+8192], {%r4, %r4, %r4, %r4}; fence.proxy.async; bra END; FIRST:"
    body += mma + "bar.arrive 1, 256; wgmma.wait_group.sync.aligned 0;"
    body += "mad.wide.u32 %d9, %r0, 32, %d0;"
    body += "".join(f"st.global.u32 [%d9+{4 * i}], %r{20 + i};" for i in range(8)) + "END:"
    right = []
    for seed in range(12):
        out = np.zeros((128, 8), np.uint32)
        run_ptx(
            body, out, image(abits, bbits), block=(256, 1, 1), smem=SIZE, race_check=False,
            policy=Policy(seed, "random"),
        )  # fmt: skip
        right.append(np.allclose(matrix(out.view(np.float32)), a @ b.T, atol=1e-3))
    assert any(right) and not all(right)
