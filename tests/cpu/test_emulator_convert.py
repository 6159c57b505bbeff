"""Conversions to and from narrow floats, and packed arithmetic, against torch and by search."""

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
    steps = m * 2 ** (1 - bias) if e == 0 else (2**mantissa + m) * 2 ** (e - bias)
    return sign * steps / 2**mantissa


SMALL = {
    "e2m1": [minifloat(c, 2, 1, 1) for c in range(16)],
    "e2m3": [minifloat(c, 2, 3, 1) for c in range(64)],
    "e3m2": [minifloat(c, 3, 2, 3) for c in range(64)],
}
TORCH = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LIMIT = {"e4m3": 448.0, "e5m2": 57344.0}


def nearest(x, name):
    """The code that `cvt.rn.satfinite` gives."""
    if name in TORCH:
        if np.isnan(x):
            return 0x7F
        y = torch.tensor(float(np.clip(x, -LIMIT[name], LIMIT[name])))
        return int(y.to(TORCH[name]).view(torch.uint8))
    positive = SMALL[name][: len(SMALL[name]) // 2]
    if np.isnan(x):
        return len(positive) - 1
    size = min(abs(float(x)), 1e9)
    code = min(range(len(positive)), key=lambda c: (abs(size - positive[c]), c & 1))
    return code | (len(positive) if np.signbit(x) else 0)


def floats(dtype=np.float32):
    """Values of every size, ties of all the formats, and the extremes."""
    x = RNG.standard_normal(16 * LANES) * 2.0 ** RNG.integers(-20, 20, 16 * LANES)
    ties = [(a + b) / 2 for v in SMALL.values() for a, b in zip(v, v[1:], strict=False)]
    ties += [17.0, 19.0, 0.0009765625, 2.0**-17, 3 * 2.0**-17, 2.0**-10, 3 * 2.0**-10]
    x = np.concatenate([x, ties, [0.0, -0.0, np.inf, -np.inf, np.nan, 464.0, 1e30, 61440.0, 448.0]])
    x = np.resize(x, -(-len(x) // LANES) * LANES)
    return x.astype(dtype)


def run(instruction, *inputs):
    """`instruction` on the words %r1 and %r2 of every lane; the word it leaves in %r9."""
    words = [np.ascontiguousarray(x).view(np.uint32) for x in inputs]
    n = len(words[0])
    out = np.zeros(n, np.uint32)
    body = "mov.u32 %r3, %ctaid.x; mad.lo.u32 %r0, %r3, 32, %r0;\n"
    for i in range(1, len(words) + 1):
        body += f"mad.wide.u32 %d8, %r0, 4, %d{i}; ld.global.u32 %r{i}, [%d8];\n"
    body += ".reg .b8 %b<4>;\n" + instruction
    body += "mad.wide.u32 %d9, %r0, 4, %d0; st.global.u32 [%d9], %r9;"
    run_ptx(body, out, *words, grid=(n // LANES, 1, 1), target="sm_100a")
    return out


TO_WORD = {"e2m1": "mov.b16 %h1, {{%b1, 0}}; cvt.u32.u16 %r9, %h1;"}


def narrow(name, source):
    """The PTX that converts %r1 (and %r2) to a pair and leaves its bits in %r9."""
    target = "%b1" if name == "e2m1" else "%h1"
    operands = "%r1, %r2" if source == "f32" else "%r1"
    convert = f"cvt.rn.satfinite{{relu}}.{name}x2.{source} {target}, {operands};"
    return convert + TO_WORD.get(name, "cvt.u32.u16 %r9, %h1;")


def pair(upper, lower, name):
    return upper << 4 | lower if name == "e2m1" else upper << 8 | lower


NAMES = ["e4m3", "e5m2", "e2m3", "e3m2", "e2m1"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("relu", [False, True])
def test_from_float(name, relu):
    a, b = floats(), RNG.permutation(floats())
    got = run(narrow(name, "f32").format(relu=".relu" * relu), a, b)
    for x, y, z in zip(a, b, got, strict=True):
        x, y = (np.float32(0) if relu and not v > 0 and not np.isnan(v) else v for v in (x, y))
        assert z == pair(nearest(x, name), nearest(y, name), name), (x, y)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("source", ["f16x2", "bf16x2"])
def test_from_pairs(name, source):
    dtype = torch.float16 if source == "f16x2" else torch.bfloat16
    x = torch.from_numpy(np.resize(floats(), (len(floats()) // 64 * 64))).to(dtype)
    got = run(narrow(name, source).format(relu=""), x.view(torch.int16).numpy())
    values = x.float().numpy().reshape(-1, 2)
    for (low, high), z in zip(values, got, strict=True):
        assert z == pair(nearest(high, name), nearest(low, name), name)


@pytest.mark.parametrize("name", NAMES)
def test_to_half(name):
    """Every code, as upper and as lower element."""
    width = 4 if name == "e2m1" else 8
    code = RNG.permutation(np.arange(256)) & (0x3F if name in ("e2m3", "e3m2") else 2**width - 1)
    word = (code << width | code[::-1]).astype(np.uint32)
    source = "%h1" if width == 8 else "%b1"
    unpack = "cvt.u16.u32 %h1, %r1;" + ("" if width == 8 else "mov.b16 {%b1, %b2}, %h1;")
    got = run(unpack + f"cvt.rn.f16x2.{name}x2 %r9, {source};", word).view(np.float16)
    if name in TORCH:
        values = torch.from_numpy(code.astype(np.uint8)).view(TORCH[name]).float().numpy()
    else:
        values = np.array(SMALL[name])[code]
    np.testing.assert_array_equal(got.reshape(-1, 2)[:, 1], values.astype(np.float16))
    np.testing.assert_array_equal(got.reshape(-1, 2)[:, 0], values[::-1].astype(np.float16))


def exponent(x, up):
    """ue8m0 by search: the power of two at or below (`up`: at or above) the magnitude."""
    if np.isnan(x):
        return 255
    powers = [2.0 ** (c - 127) for c in range(255)]
    if up:
        return next((c for c in range(255) if powers[c] >= abs(float(x))), 254)
    return max((c for c in range(255) if powers[c] <= abs(float(x))), default=0)


@pytest.mark.parametrize("rounding", ["rz", "rp"])
def test_scale_factors(rounding):
    a, b = np.abs(floats()), np.abs(RNG.permutation(floats()))
    convert = f"cvt.{rounding}.satfinite.ue8m0x2.f32 %h1, %r1, %r2; cvt.u32.u16 %r9, %h1;"
    got = run(convert, a, b)
    for x, y, z in zip(a, b, got, strict=True):
        assert z == exponent(x, rounding == "rp") << 8 | exponent(y, rounding == "rp")
    code = np.arange(256, dtype=np.uint32) << 8 | 127
    back = run("cvt.u16.u32 %h1, %r1; cvt.rn.bf16x2.ue8m0x2 %r9, %h1;", code)
    values = (back & np.uint32(0xFFFF0000)).view(np.float32)
    np.testing.assert_array_equal(values[:255], np.ldexp(np.float32(1), np.arange(255) - 127))
    assert np.isnan(values[255]) and (back & 0xFFFF == 0x3F80).all()


def test_tf32_roundings():
    x = floats()[:-LANES]
    x = x[np.isfinite(x)][: 8 * LANES]
    step = (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(float)
    after = (step.astype(np.float32).view(np.uint32) + np.uint32(0x2000)).view(np.float32)
    middle = (step + after) / 2
    odd = (step.astype(np.float32).view(np.uint32) >> 13) & 1
    up = {
        "rz": np.zeros(len(x), bool),
        "rna": np.abs(x) >= np.abs(middle),
        "rn": np.where(x == middle, odd == 1, np.abs(x) > np.abs(middle)),
    }
    for rounding, bigger in up.items():
        got = run(f"cvt.{rounding}.tf32.f32 %r9, %r1;", x).view(np.float32)
        np.testing.assert_array_equal(got, np.where(bigger, after, step))


@pytest.mark.parametrize("form", ["rz", "rn.satfinite", "rz.relu", "rn.relu"])
@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_half_precision_modifiers(name, form):
    a, b = floats(), RNG.permutation(floats())
    got = run(f"cvt.{form}.{name}x2.f32 %r9, %r1, %r2;", a, b)
    dtype = torch.float16 if name == "f16" else torch.bfloat16
    top = torch.finfo(dtype).max
    for x, z in [*zip(a, got >> 16, strict=True), *zip(b, got & 0xFFFF, strict=True)]:
        value = float(torch.tensor(int(z), dtype=torch.int32).to(torch.int16).view(dtype))
        x = 0.0 if "relu" in form and x <= 0 else float(x)
        if np.isnan(x):
            assert np.isnan(value)
            continue
        want = float(torch.tensor(x, dtype=torch.float32).to(dtype))
        if "satfinite" in form:
            want = float(np.clip(want, -top, top))
        elif "rz" in form and abs(want) > abs(x):
            bits = torch.tensor(want, dtype=dtype).view(torch.int16) - 1
            want = float(bits.view(dtype))
        assert value == want, x


PACKED = {
    "fma.rn.bf16x2": lambda a, b: a * b + a,
    "fma.rn.relu.bf16x2": lambda a, b: np.maximum(a * b + a, 0),
    "add.bf16x2": lambda a, b: a + b,
    "mul.bf16x2": lambda a, b: a * b,
    "min.NaN.bf16x2": np.minimum,
    "max.bf16x2": np.fmax,
    "tanh.approx.bf16x2": lambda a, b: np.tanh(a),
    "ex2.approx.ftz.bf16x2": lambda a, b: np.exp2(a),
}


@pytest.mark.parametrize("instruction", PACKED)
def test_bf16_pairs(instruction):
    a, b = (torch.randn(512).to(torch.bfloat16) for _ in "ab")
    a[3] = float("nan")
    operands = ", ".join(["%r1", "%r2", "%r1"][: {"f": 3, "t": 1, "e": 1}.get(instruction[0], 2)])
    got = run(
        f"{instruction} %r9, {operands};", a.view(torch.int16).numpy(), b.view(torch.int16).numpy()
    )
    want = PACKED[instruction](a.double().numpy(), b.double().numpy())
    got = torch.from_numpy(got.view(np.int16)).view(torch.bfloat16).double().numpy()
    np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize("instruction", ["fma.rn.f32x2", "add.rn.f32x2", "mul.rn.f32x2"])
def test_float_pairs(instruction):
    a, b = (RNG.standard_normal(256).astype(np.float32) for _ in "ab")
    body = "mov.b64 %d5, {%r1, %r2}; mov.b64 %d6, {%r2, %r1};\n"
    operands = ["%d5", "%d6", "%d5"][: 3 if "fma" in instruction else 2]
    body += f"{instruction} %d7, {', '.join(operands)}; mov.b64 {{%r9, %r8}}, %d7;"
    f = {"f": lambda x, y, z: x * y + z, "a": lambda x, y, z: x + y, "m": lambda x, y, z: x * y}
    want = f[instruction[0]](a.astype(float), b.astype(float), a.astype(float)).astype(np.float32)
    np.testing.assert_array_equal(run(body, a, b).view(np.float32), want)


@pytest.mark.parametrize(
    "text",
    [
        "cvt.rn.e4m3x2.f32 %h1, %r1, %r2;",
        "cvt.rn.satfinite.ue8m0x2.f32 %h1, %r1, %r2;",
        "cvt.rs.satfinite.e4m3x4.f32 %r1, {%r1, %r2, %r3, %r4}, %r5;",
        "cvt.rz.f32.f64 %r1, %d1;",
        "add.rp.f32 %r1, %r1, %r2;",
        "add.satfinite.f32 %r1, %r1, %r2;",
    ],
)
def test_other_forms_are_refused(text):
    with pytest.raises(PtxError, match="line 12"):
        run_ptx(text, target="sm_100a")
