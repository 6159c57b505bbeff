"""mma.sync, ldmatrix and stmatrix of every kind in the emulator, against numpy and torch."""

import numpy as np
import pytest
import torch

from tests.emulator import PtxError
from tests.emulator.snippet import run_ptx

RNG = np.random.default_rng(0)
LANES = 32


def minifloat(code, exponent, mantissa, bias):
    """The value of a 4- or 6-bit code, from its definition."""
    sign = -1 if code >> (exponent + mantissa) & 1 else 1
    e, m = code >> mantissa & ((1 << exponent) - 1), code & ((1 << mantissa) - 1)
    return (
        sign
        * (m * 2 ** (1 - bias) if e == 0 else (2**mantissa + m) * 2 ** (e - bias))
        / (2**mantissa)
    )


NARROW = {
    "e2m1": [minifloat(c, 2, 1, 1) for c in range(16)],
    "e2m3": [minifloat(c, 2, 3, 1) for c in range(64)],
    "e3m2": [minifloat(c, 3, 2, 3) for c in range(64)],
}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def test_the_table_of_four_bits():
    assert NARROW["e2m1"][:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def operand(dtype, rows, k):
    """(codes, values) of a random matrix; fp8 without infinities and NaNs."""
    if dtype in NARROW:
        codes = RNG.integers(0, len(NARROW[dtype]), (rows, k), dtype=np.uint8)
        return codes, np.array(NARROW[dtype])[codes]
    if dtype in TORCH:
        x = torch.from_numpy(RNG.standard_normal((rows, k)).astype(np.float32)).to(TORCH[dtype])
        return x.view(torch.uint8).numpy(), x.double().numpy()
    if dtype in ("s8", "u8"):
        x = RNG.integers(*((-128, 128) if dtype == "s8" else (0, 256)), (rows, k))
        return x.astype(np.int8 if dtype == "s8" else np.uint8).view(np.uint8), x.astype(float)
    x = torch.from_numpy(RNG.standard_normal((rows, k)).astype(np.float32))
    if dtype == "tf32":
        bits = x.numpy().view(np.uint32) & np.uint32(0xFFFFE000)
        return bits, bits.view(np.float32).astype(float)
    x = x.to({"f16": torch.float16, "bf16": torch.bfloat16}[dtype])
    return x.view(torch.int16).numpy().view(np.uint16), x.double().numpy()


def fragment(codes, bits, rows):
    """A (16 rows) or B (8) as the registers of 32 lanes: the figures of 9.7.14.5."""
    per, groups = 32 // bits, rows // 8
    registers = codes.shape[1] // (4 * per) * groups
    out = np.zeros((LANES, registers), np.uint64)
    for lane in range(LANES):
        for r in range(registers):
            row = lane // 4 + 8 * (r % groups)
            for i in range(per):
                column = lane % 4 * per + i + 4 * per * (r // groups)
                out[lane, r] |= np.uint64(int(codes[row, column]) << (bits * i))
    return out.astype(np.uint32)


def accumulators(matrix):
    """16 x 8 words as registers."""
    out = np.zeros((LANES, 4), np.uint32)
    for lane in range(LANES):
        for r in range(4):
            out[lane, r] = matrix[lane // 4 + 8 * (r // 2), lane % 4 * 2 + r % 2]
    return out


def names(first, n):
    return "{" + ", ".join(f"%r{first + i}" for i in range(n)) + "}"


def run_mma(opcode, a, b, c, scales=(), target="sm_120a", results=4):
    """The result registers (32, n) of one instruction; `scales`: (words of 32 lanes, ids)."""
    out = np.zeros((LANES, results), np.uint32)
    body, arrays = "", [out]
    for first, x in (
        (20, a),
        (30, b),
        (40, c),
        *((50 + i, s[:, None]) for i, (s, _) in enumerate(scales)),
    ):
        n = x.shape[1]
        body += f"mad.wide.u32 %d20, %r0, {4 * n}, %d{len(arrays)};\n"
        body += "".join(f"ld.global.u32 %r{first + i}, [%d20+{4 * i}];\n" for i in range(n))
        arrays.append(np.ascontiguousarray(x))
    operands = [names(60, results), names(20, a.shape[1]), names(30, b.shape[1])]
    operands.append(names(40, c.shape[1]))
    for i, (_, (byte, thread)) in enumerate(scales):
        operands += [f"%r{50 + i}", f"{{{byte}, {thread}}}"]
    body += f"{opcode} {', '.join(operands)};\n"
    body += f"mad.wide.u32 %d20, %r0, {4 * results}, %d0;\n"
    body += "".join(f"st.global.u32 [%d20+{4 * i}], %r{60 + i};\n" for i in range(results))
    run_ptx(body, *arrays, target=target)
    return out


def check(out, want, **tolerance):
    got = out.view(np.float32)
    np.testing.assert_allclose(got, accumulate_like(want), **tolerance)


def accumulate_like(matrix):
    return accumulators(matrix.astype(np.float32).view(np.uint32)).view(np.float32)


WIDTH = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8}
FLOAT = [
    ("m16n8k8", "f16", "f16"), ("m16n8k16", "f16", "f16"), ("m16n8k8", "bf16", "bf16"),
    ("m16n8k16", "bf16", "bf16"), ("m16n8k4", "tf32", "tf32"), ("m16n8k8", "tf32", "tf32"),
    ("m16n8k16", "e4m3", "e5m2"), ("m16n8k32", "e4m3", "e4m3"), ("m16n8k32", "e5m2", "e4m3"),
]  # fmt: skip


@pytest.mark.parametrize("shape, ta, tb", FLOAT)
def test_float_accumulators(shape, ta, tb):
    k = int(shape[6:])
    (ac, a), (bc, b) = operand(ta, 16, k), operand(tb, 8, k)
    c = RNG.standard_normal((16, 8)).astype(np.float32)
    out = run_mma(
        f"mma.sync.aligned.{shape}.row.col.f32.{ta}.{tb}.f32",
        fragment(ac, WIDTH[ta], 16),
        fragment(bc, WIDTH[tb], 8),
        accumulators(c.view(np.uint32)),
    )
    check(out, c + a @ b.T, rtol=1e-5, atol=1e-5)


HALF = [("m16n8k8", "f16", ""), ("m16n8k16", "f16", ""), ("m16n8k32", "e4m3", "")]
HALF += [("m16n8k32", "e3m2", ".kind::f8f6f4")]


@pytest.mark.parametrize("shape, dtype, kind", HALF)
def test_half_accumulators(shape, dtype, kind):
    """Two registers of f16 pairs: rows lane/4 and lane/4 + 8."""
    k = int(shape[6:])
    (ac, a), (bc, b) = operand(dtype, 16, k), operand(dtype, 8, k)
    c = RNG.standard_normal((16, 8)).astype(np.float16)
    pairs = c.view(np.uint32).reshape(2, 8, 4).transpose(1, 2, 0).reshape(LANES, 2)
    width = WIDTH.get(dtype, 8)
    out = run_mma(
        f"mma.sync.aligned{kind}.{shape}.row.col.f16.{dtype}.{dtype}.f16",
        fragment(ac, width, 16),
        fragment(bc, width, 8),
        pairs,
        results=2,
    )
    got = out.reshape(8, 4, 2).transpose(2, 0, 1).copy().view(np.float16).reshape(16, 8)
    np.testing.assert_allclose(got, c + a @ b.T, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("shape", ["m16n8k16", "m16n8k32"])
@pytest.mark.parametrize("ta, tb, saturate", [("s8", "u8", False), ("s8", "s8", True)])
def test_integers(shape, ta, tb, saturate):
    k = int(shape[6:])
    (ac, a), (bc, b) = operand(ta, 16, k), operand(tb, 8, k)
    c = RNG.integers(-(2**31), 2**31, (16, 8))
    c[:4] = 2**31 - 1
    out = run_mma(
        f"mma.sync.aligned.{shape}.row.col{'.satfinite' * saturate}.s32.{ta}.{tb}.s32",
        fragment(ac, 8, 16),
        fragment(bc, 8, 8),
        accumulators(c.astype(np.int32).view(np.uint32)),
    )
    want = (a @ b.T).astype(np.int64) + c
    want = np.clip(want, -(2**31), 2**31 - 1) if saturate else want
    assert (out == accumulators(want.astype(np.uint64).astype(np.uint32))).all()


def contained(codes, dtype):
    """Codes of kind::f8f6f4 in their bytes: four bits sit in bits 2..5."""
    return codes << 2 if dtype == "e2m1" else codes


@pytest.mark.parametrize("ta", ["e2m1", "e2m3", "e3m2", "e4m3", "e5m2"])
@pytest.mark.parametrize("tb", ["e2m1", "e3m2", "e5m2"])
def test_mixed_narrow_types(ta, tb):
    (ac, a), (bc, b) = operand(ta, 16, 32), operand(tb, 8, 32)
    c = RNG.standard_normal((16, 8)).astype(np.float32)
    out = run_mma(
        f"mma.sync.aligned.kind::f8f6f4.m16n8k32.row.col.f32.{ta}.{tb}.f32",
        fragment(contained(ac, ta), 8, 16),
        fragment(contained(bc, tb), 8, 8),
        accumulators(c.view(np.uint32)),
    )
    check(out, c + a @ b.T, rtol=1e-5, atol=1e-4)


def power(codes):
    return 2.0 ** (codes.astype(float) - 127)


def unsigned_e4m3(codes):
    return torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()


BLOCKS = [
    ("mxf8f6f4", "scale_vec::1X", "e4m3", "e5m2", "ue8m0"),
    ("mxf8f6f4", "scale_vec::1X", "e2m1", "e3m2", "ue8m0"),
    ("mxf4", "scale_vec::2X", "e2m1", "e2m1", "ue8m0"),
    ("mxf4nvf4", "scale_vec::2X", "e2m1", "e2m1", "ue8m0"),
    ("mxf4nvf4", "scale_vec::4X", "e2m1", "e2m1", "ue4m3"),
]


@pytest.mark.parametrize("kind, size, ta, tb, scale", BLOCKS)
@pytest.mark.parametrize("pick", [0, 1])
def test_block_scaled(kind, size, ta, tb, scale, pick):
    """Row r of A: lane 4 (r % 8) + 2 thread + r / 8; column n of B: lane 4 n + thread."""
    n, k = int(size[-2]), 32 if kind == "mxf8f6f4" else 64
    byte = {1: 3, 2: 2, 4: 0}[n] * pick
    thread_a, thread_b = pick, pick
    (ac, a), (bc, b) = operand(ta, 16, k), operand(tb, 8, k)
    c = RNG.standard_normal((16, 8)).astype(np.float32)
    bytes_a, bytes_b = (
        RNG.integers(*((120, 132) if scale == "ue8m0" else (1, 0x70)), (LANES, 4)).astype(np.uint8)
        for _ in "ab"
    )
    decode = power if scale == "ue8m0" else unsigned_e4m3
    scale_a, scale_b = np.zeros((16, n)), np.zeros((8, n))
    for r in range(16):
        scale_a[r] = decode(bytes_a[4 * (r % 8) + 2 * thread_a + r // 8, byte : byte + n])
    for r in range(8):
        scale_b[r] = decode(bytes_b[4 * r + thread_b, byte : byte + n])
    packed = k == 64
    out = run_mma(
        f"mma.sync.aligned.kind::{kind}.block_scale.{size}.m16n8k{k}.row.col"
        f".f32.{ta}.{tb}.f32.{scale}",
        fragment(ac if packed else contained(ac, ta), 4 if packed else 8, 16),
        fragment(bc if packed else contained(bc, tb), 4 if packed else 8, 8),
        accumulators(c.view(np.uint32)),
        [
            (bytes_a.view(np.uint32)[:, 0], (byte, thread_a)),
            (bytes_b.view(np.uint32)[:, 0], (byte, thread_b)),
        ],
    )
    wide = [np.repeat(s, k // n, axis=1) for s in (scale_a, scale_b)]
    want = c + (a * wide[0]) @ (b * wide[1]).T
    check(out, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


REFUSED = [
    "m16n8k16.row.col.f16.bf16.bf16.f16",
    "m16n8k32.row.col.f32.e4m3.bf16.f32",
    "m16n8k32.row.col.f32.e2m1.e2m1.f32",
    "m16n8k16.row.col.f32.f16.f16.f16",
    "m8n8k4.row.col.f64.f64.f64.f64",
    "kind::mxf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue8m0",
]


@pytest.mark.parametrize("form", REFUSED)
def test_forms_that_do_not_exist_are_refused(form):
    registers = f"{names(20, 4)}, {names(30, 4)}, {names(40, 2)}, {names(50, 4)}"
    with pytest.raises(PtxError, match="line 12"):
        run_ptx(f"mma.sync.aligned.{form} {registers};", target="sm_120a")


def in_shared(memory, body, out, n):
    """Runs `body` on shared memory that holds `memory` (bytes, in units of 16), saves n words."""
    text = """
    mov.b32 %r2, dynamic;
    mad.lo.u32 %r4, %r0, 16, %r2;
    mad.wide.u32 %d8, %r0, 16, %d1;
    ld.global.v4.b32 {%r40, %r41, %r42, %r43}, [%d8];
    st.shared.v4.b32 [%r4], {%r40, %r41, %r42, %r43};
    bar.warp.sync -1;
    """
    text += body + f"mad.wide.u32 %d9, %r0, {4 * n}, %d0;"
    text += "".join(f"st.global.u32 [%d9+{4 * i}], %r{60 + i};" for i in range(n))
    run_ptx(text, out, memory, smem=512, target="sm_120a")


def padded(codes, bits):
    """Rows of 16 codes as 16-byte units that begin with them (b4x16_p64, b6x16_p32)."""
    out = np.zeros((len(codes), 16), np.uint8)
    for row, unit in zip(codes, out, strict=True):
        number = sum(int(c) << (bits * i) for i, c in enumerate(row))
        unit[: 2 * bits] = np.frombuffer(number.to_bytes(2 * bits, "little"), np.uint8)
        unit[2 * bits :] = 0xFF
    return out


@pytest.mark.parametrize("fmt, bits", [("b4x16_p64", 4), ("b6x16_p32", 6)])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ldmatrix_unpacks(fmt, bits, n):
    """m8n16: lane t has bytes 4 (t % 4).. of row t / 4 of each matrix."""
    codes = RNG.integers(0, 1 << bits, (32, 16), dtype=np.uint8)
    out = np.zeros((LANES, n), np.uint32)
    load = f"ldmatrix.sync.aligned.m8n16.x{n}.shared.b8x16.{fmt} {names(60, n)}, [%r4];"
    in_shared(padded(codes, bits), load, out, n)
    got = out.view(np.uint8).reshape(LANES, n, 4)
    for t in range(LANES):
        for i in range(n):
            assert (got[t, i] == codes[8 * i + t // 4, t % 4 * 4 : t % 4 * 4 + 4]).all()


@pytest.mark.parametrize("fmt", ["b8", "b8x16.b4x16_p64", "b8x16.b6x16_p32"])
@pytest.mark.parametrize("n", [1, 2])
def test_ldmatrix_transposes_bytes(fmt, n):
    """m16n16: register r of lane t has rows 4 (t % 4).. of column t / 4 + 8 r."""
    bits = {"b8": 8, "b8x16.b4x16_p64": 4, "b8x16.b6x16_p32": 6}[fmt]
    codes = RNG.integers(0, 1 << bits, (32, 16), dtype=np.uint8)
    memory = codes if bits == 8 else padded(codes, bits)
    out = np.zeros((LANES, 2 * n), np.uint32)
    load = f"ldmatrix.sync.aligned.m16n16.x{n}.trans.shared.{fmt} {names(60, 2 * n)}, [%r4];"
    in_shared(memory, load, out, 2 * n)
    got = out.view(np.uint8).reshape(LANES, n, 2, 4)
    for t in range(LANES):
        for i in range(n):
            for r in range(2):
                for j in range(4):
                    assert got[t, i, r, j] == codes[16 * i + t % 4 * 4 + j, t // 4 + 8 * r]


@pytest.mark.parametrize("n", [1, 2, 4])
def test_stmatrix_transposes_bytes(n):
    """m16n8: byte j of lane t is row t / 4 + 8 (j / 2), column 2 (t % 4) + j % 2, of 16 x 8."""
    src = RNG.integers(0, 1 << 32, (LANES, n), dtype=np.uint32)
    memory = np.zeros((LANES, 4), np.uint32)
    load = "".join(
        f"mad.wide.u32 %d8, %r0, {4 * n}, %d1; ld.global.u32 %r{20 + i}, [%d8+{4 * i}];"
        for i in range(n)
    )
    body = f"""
    mov.b32 %r2, dynamic;
    mad.lo.u32 %r4, %r0, 16, %r2;
    {load}
    stmatrix.sync.aligned.m16n8.x{n}.trans.shared.b8 [%r4], {names(20, n)};
    bar.warp.sync -1;
    ld.shared.v4.b32 {{%r40, %r41, %r42, %r43}}, [%r4];
    mad.wide.u32 %d9, %r0, 16, %d0;
    st.global.v4.b32 [%d9], {{%r40, %r41, %r42, %r43}};
    """
    run_ptx(body, memory, src, smem=512, target="sm_120a")
    rows, given = memory.view(np.uint8).reshape(4, 8, 16), src.view(np.uint8).reshape(LANES, n, 4)
    for t in range(LANES):
        for i in range(n):
            for j in range(4):
                assert rows[i, t % 4 * 2 + j % 2, t // 4 + 8 * (j // 2)] == given[t, i, j]


@pytest.mark.parametrize(
    "text",
    [
        "ldmatrix.sync.aligned.m8n16.x1.shared.b16 {%r1}, [%r2];",
        "ldmatrix.sync.aligned.m16n16.x1.shared.b8 {%r1, %r3}, [%r2];",
        "ldmatrix.sync.aligned.m16n16.x4.trans.shared.b8 {%r1, %r3, %r4, %r5}, [%r2];",
        "stmatrix.sync.aligned.m16n8.x1.shared.b8 [%r2], {%r1};",
    ],
)
def test_matrix_copies_that_do_not_exist_are_refused(text):
    with pytest.raises(PtxError, match="line 12"):
        run_ptx(text, smem=512, target="sm_120a")
