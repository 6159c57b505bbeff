"""Tensors of a configuration's problem, and the fp64 reference with an error bound."""

import math

import torch

NAN = float("nan")
PAD = 16  # NaN columns behind each row: what a load or store past the end meets
# half the spacing of the format at 1
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-24}


def _silu(x):
    return x * torch.sigmoid(x)


def _silu_slope(x):
    s = torch.sigmoid(x)
    return s + x * s * (1 - s)


def _gelu_slope(x):
    z = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    t = torch.tanh(z)
    return (1 + t) / 2 + x / 2 * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)


def _gelu(x):
    return torch.nn.functional.gelu(x, approximate="tanh")


# name: (function of x, its slope)
ACTIVATIONS = {
    "relu": (torch.relu, lambda x: (x > 0).double()),
    "gelu_tanh_approx": (_gelu, _gelu_slope),
    "silu": (_silu, _silu_slope),
}
# name: the activation of the gate
GATED = {"swiglu": "silu", "geglu": "gelu_tanh_approx", "reglu": "relu"}


def is_gated(configuration):
    return configuration.epilogue in GATED


def is_gated_derivative(configuration):
    return configuration.epilogue.removeprefix("d") in GATED and configuration.epilogue[0] == "d"


def matrix(rows, columns, dtype, major_last, batch=None, fill=None, generator=None):
    """A (batch, rows, columns) matrix with one dimension contiguous, in a storage padded with NaN.

    fill: a constant; by default random normal values.
    """
    a, b = (rows, columns) if major_last else (columns, rows)
    lead = () if batch is None else (batch,)
    storage = torch.full((*lead, a, -(-b // PAD) * PAD + PAD), NAN).to(dtype)
    inner = storage[..., :b]
    inner.copy_(
        torch.full(inner.shape, fill)
        if fill is not None
        else torch.randn(inner.shape, generator=generator)
    )
    return inner if major_last else inner.mT


def starts(lengths):
    """(segments + 1,) int32 offsets of segments."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def make_tensors(c, seed=0):
    """The named tensors of a problem; outputs hold NaN."""
    g = torch.Generator().manual_seed(1000 + seed)
    dtype, out = getattr(torch, c.dtype), getattr(torch, c.out)
    a_last, b_last, d_last = (x == y for x, y in zip(c.majors, "kkn", strict=True))
    rows = {"varlen_m": sum(c.lengths)}.get(c.kind, c.m)
    depth = {"varlen_k": sum(c.lengths)}.get(c.kind, c.k)
    batch = len(c.lengths) if c.lengths else c.batch
    ab, bb, db = {
        "dense": (batch,) * 3, "varlen_m": (None, batch, None), "varlen_k": (None, None, batch),
    }[c.kind]  # fmt: skip
    a_rows, a_depth = rows, depth
    t = {}
    if c.lengths:
        t["cu_seqlens"] = starts(c.lengths)
    if c.gather:
        many = rows if c.kind == "varlen_m" else depth
        source = many // 2 + 24
        t["index"] = torch.randint(0, source, (many,), generator=g, dtype=torch.int32)
        a_rows, a_depth = (source, depth) if c.kind == "varlen_m" else (rows, source)
    t["A"] = matrix(a_rows, a_depth, dtype, a_last, ab, generator=g)
    t["B"] = matrix(c.n, depth, dtype, b_last, bb, generator=g)
    if c.blocks:
        for name, count in (("A", c.m), ("B", c.n)):
            t[f"scale_{name}"] = scale_factors(count, c.k, batch, g)
    wide = 2 if is_gated_derivative(c) else 1
    if c.beta or wide == 2:
        t["C"] = matrix(rows, wide * c.n, out, d_last, db, generator=g)
    t["D"] = matrix(rows, wide * c.n, out, d_last, db, fill=None if c.add else NAN, generator=g)
    if c.add:
        t["D_before"] = t["D"].clone()
    if c.epilogue != "linear":
        columns = c.n // 2 if is_gated(c) else c.n
        t["act"] = matrix(rows, columns, out, d_last, db, fill=NAN)
    if c.row:
        t["row"] = torch.randn(batch, c.n, generator=g)
    if c.col:
        t["col"] = torch.randn(*(() if c.kind == "varlen_m" else (batch,)), rows, generator=g)
    if c.split > 1:
        t |= split_buffers(c, batch)
    if c.dynamic and c.arch == "sm_90a":
        t["semaphore"] = torch.zeros(1, dtype=torch.int32)
    return t


def scale_factors(rows, depth, batch, generator):
    """Powers of two, one for 32 values along k.

    (batch, row tiles of 128, k tiles of 128, 32, 4, 4): in a tile, row r and block b are at
    [r % 32, r // 32, b].
    """
    shape = (batch, -(-rows // 128), depth // 128, 32, 4, 4)
    bits = torch.randint(127 - 3, 127 + 4, shape, generator=generator, dtype=torch.uint8)
    return bits.view(torch.float8_e8m0fnu)


def scaled(values, factors):
    """fp64 values times their scale factors."""
    f = factors.double().permute(0, 1, 4, 3, 2, 5)  # batch, row tile, r // 32, r % 32, k tile, b
    f = f.reshape(values.shape[0], -1, values.shape[2] // 32)[:, : values.shape[1]]
    return values * f.repeat_interleave(32, dim=2)


def split_buffers(c, batch):
    """What the splits of K share: a flag a tile, and their sums, a CTA's tile of them a flag."""
    tile = (c.tile[0] // 2 if c.two_cta else c.tile[0], c.tile[1])
    counts = [-(-n // (t * p)) * p for n, t, p in zip((c.m, c.n), tile, c.cluster, strict=True)]
    return {
        "flags": torch.zeros(batch, *counts, dtype=torch.int32),
        "partials": torch.full((batch, *counts, tile[0] * tile[1]), NAN),
    }


def _segments(c):
    ends = starts(c.lengths).tolist()
    return [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]


def _products(c, t, magnitude=False):
    """A @ B^T in fp64, of the absolute values if `magnitude`."""
    a, b = t["A"].double(), t["B"].double()
    if c.blocks:
        a, b = scaled(a, t["scale_A"]), scaled(b, t["scale_B"])
    if magnitude:
        a, b = a.abs(), b.abs()
    if c.kind == "dense":
        return a @ b.mT
    if c.kind == "varlen_m":
        a = a[t["index"].long()] if c.gather else a
        return torch.cat([a[s] @ b[e].T for e, s in enumerate(_segments(c))])
    a = a[:, t["index"].long()] if c.gather else a
    return torch.stack([a[:, s] @ b[:, s].T for s in _segments(c)])


def _row_of(c, t):
    """The row vector in the shape of D."""
    if c.kind != "varlen_m":
        return t["row"].double()[:, None, :]
    return torch.cat(
        [t["row"][e].double().expand(s.stop - s.start, c.n) for e, s in enumerate(_segments(c))]
    )


def expected(c, t):
    """{output name: (fp64 value, bound of the error)}.

    The bound: one rounding to the output's format, plus fp32 rounding of each product and of its
    sum in any order, carried through the epilogue with its slope, plus 2**-20 of the epilogue's own
    terms for its fp32 arithmetic.
    """
    depth = max(c.lengths) if c.kind == "varlen_k" else c.k
    x = c.alpha * _products(c, t)
    size = abs(c.alpha) * _products(c, t, magnitude=True)
    terms = []
    if c.beta:
        terms.append(c.beta * t["C"].double())
    if c.row:
        terms.append(_row_of(c, t))
    if c.col:
        terms.append(t["col"].double()[..., None])
    for term in terms:
        x, size = x + term, size + term.abs()
    error = (depth + 8) * 2**-24 * size
    if is_gated_derivative(c):
        results = _gated_derivative(c, t, x, error)
    else:
        results = {"D": (x, error)}
        if is_gated(c):
            results["act"] = _gated(c, x, error)
        elif c.epilogue != "linear":
            f, slope = ACTIVATIONS[c.epilogue]
            # tangents are followed by a chord where |x| is small against its error
            results["act"] = (f(x), 1.2 * slope(x).abs() * error + error / 4 + 2**-20 * x.abs())
    if c.add:
        y, e = results["D"]
        # the reduction rounds each operand to the format, and their sum
        before = t["D_before"].double()
        e = e + ROUNDING[t["D"].dtype] * y.abs()
        results["D"] = (y + before, e)
    return {name: (y, e + _rounding(t[name].dtype, y)) for name, (y, e) in results.items()}


def _rounding(dtype, y):
    tiny = 2**-25 if dtype == torch.float16 else 0.0  # half the spacing of its subnormal numbers
    return 1.01 * ROUNDING[dtype] * y.abs() + tiny


def _gated(c, x, error):
    f, slope = ACTIVATIONS[GATED[c.epilogue]]
    gate, up, gate_error, up_error = x[..., ::2], x[..., 1::2], error[..., ::2], error[..., 1::2]
    value = f(gate) * up
    bound = (slope(gate).abs() + 0.25) * up.abs() * gate_error + f(gate).abs() * up_error
    return value, bound + gate_error * up_error + 2**-20 * (gate * up).abs()


def _gated_derivative(c, t, x, error):
    """D = (d gate, d up) interleaved and act, from the packed gate and up in C; linear in x."""
    f, slope = ACTIVATIONS[GATED[c.epilogue[1:]]]
    gate, up = t["C"].double()[..., ::2], t["C"].double()[..., 1::2]
    by_gate, by_up = slope(gate) * up, f(gate)
    size = (1 + gate.abs()) * (1 + up.abs())
    d = torch.stack([by_gate * x, by_up * x], -1).flatten(-2)
    own = 2**-20 * size * x.abs()
    e = torch.stack([by_gate.abs() * error + own, by_up.abs() * error + own], -1).flatten(-2)
    return {"D": (d, e), "act": (by_up * up, 2**-20 * size)}


def compare(c, t):
    """(largest error over the largest value, largest share of the bound used) over the outputs.

    A value that is not finite, or a change to the padding of an output, gives infinity.
    """
    relative = share = 0.0
    for name, (want, bound) in expected(c, t).items():
        got = t[name].double()
        if not got.isfinite().all() or not _padding_untouched(t[name]):
            return math.inf, math.inf
        error = (got - want).abs()
        if error.numel():
            relative = max(relative, (error.max() / want.abs().max()).item())
            share = max(share, (error / bound.clamp_min(1e-30)).max().item())
    return relative, share


def _padding_untouched(view):
    """Whether the NaN columns behind each row of a `matrix` are still NaN."""
    last = view if view.stride(-1) == 1 else view.mT
    row = last.stride(-2)
    lead = last.shape[:-1]
    storage = torch.as_strided(view, (*lead, row), (*last.stride()[:-1], 1), 0)
    return bool(storage[..., last.shape[-1] :].float().isnan().all())
