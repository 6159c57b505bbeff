"""The configurations: what is compiled, and the problem each is run on."""

import hashlib
from dataclasses import dataclass

OBJECT_NAME = "calibration"  # of the function in every object file
ARCHITECTURES = ("sm_90a", "sm_100a", "sm_120a")


@dataclass(frozen=True)
class Configuration:
    """A GEMM D = epilogue(A @ B^T) of quack and one problem for it.

    kind: "dense": A (l, m, k), B (l, n, k), D (l, m, n); "varlen_m": A (rows, k), B (l, n, k),
        D (rows, n), in l segments of `lengths` rows; "varlen_k": A (m, columns), B (n, columns),
        D (l, m, n), in l segments of `lengths` columns.
    majors: the contiguous dimension of A ("k" or "m"), B ("k" or "n") and D ("n" or "m").
    gather: A's rows (columns for varlen_k) are read through an index.
    epilogue: "linear", a name of `problems.ACTIVATIONS` (with an output act(D)) or of
        `problems.GATED`, or "d" + such a gated name, its derivative.
    alpha, beta, row, col: D = alpha A B^T + beta C + row + col; C is there if beta is not 0.
    add: D += instead of D =.
    dynamic: tiles from a counter in memory (sm_90a) or by cluster launch control.
    clusters: persistent clusters launched, few so that each takes several tiles.
    """

    name: str
    arch: str
    kind: str
    m: int
    n: int
    k: int
    lengths: tuple = ()
    batch: int = 1
    dtype: str = "bfloat16"
    out: str = "bfloat16"
    majors: str = "kkn"
    tile: tuple = (128, 128)
    cluster: tuple = (1, 1)
    pingpong: bool = False
    persistent: bool = True
    dynamic: bool = False
    gather: bool = False
    tma_gather: bool = False
    epilogue: str = "linear"
    alpha: float = 1.0
    beta: float = 0.0
    row: bool = False
    col: bool = False
    add: bool = False
    split: int = 1
    clusters: int = 2

    @property
    def two_cta(self):
        """Whether a pair of CTAs shares an MMA, as quack chooses it."""
        return self.arch == "sm_100a" and self.cluster[0] % 2 == 0 and self.tile[0] in (128, 256)

    @property
    def key(self):
        """Names the compiled kernel on disk."""
        return f"{self.name}-{hashlib.sha256(repr(self).encode()).hexdigest()[:12]}"


def _hopper():
    dense = {"arch": "sm_90a", "kind": "dense", "m": 300, "n": 264, "k": 328}
    rows = {"arch": "sm_90a", "kind": "varlen_m", "m": 0, "n": 272, "k": 200}
    depth = {"arch": "sm_90a", "kind": "varlen_k", "m": 200, "n": 264, "k": 0, "majors": "mnn"}
    return [
        Configuration("h-dense", **dense),
        Configuration("h-dense-pingpong", **dense, pingpong=True, cluster=(2, 1)),
        Configuration("h-rows", **rows, lengths=(130, 0, 77, 200), cluster=(2, 1)),
        Configuration("h-rows-gather", **rows, lengths=(130, 0, 77), gather=True),
        Configuration("h-rows-swiglu", **rows, lengths=(130, 0, 77), epilogue="swiglu"),
        Configuration("h-depth", **depth, lengths=(130, 0, 77, 200), cluster=(2, 1)),
    ]


def _blackwell():
    dense = {"arch": "sm_100a", "kind": "dense", "m": 300, "n": 264, "k": 328}
    rows = {"arch": "sm_100a", "kind": "varlen_m", "m": 0, "n": 272, "k": 200}
    depth = {"arch": "sm_100a", "kind": "varlen_k", "m": 200, "n": 264, "k": 0, "majors": "mnn"}
    return [
        Configuration("b-dense", **dense),
        Configuration("b-dense-2cta", **dense, tile=(256, 128), cluster=(2, 1)),
        Configuration("b-rows-2cta", **rows, lengths=(130, 0, 77), tile=(256, 128), cluster=(2, 1)),
        Configuration("b-rows-gather", **rows, lengths=(130, 0, 77), gather=True),
        Configuration("b-rows-swiglu", **rows, lengths=(130, 0, 77), epilogue="swiglu"),
        Configuration("b-depth", **depth, lengths=(130, 0, 77, 200), cluster=(2, 1)),
    ]


def _geforce():
    dense = {"arch": "sm_120a", "kind": "dense", "m": 200, "n": 136, "k": 200}
    rows = {"arch": "sm_120a", "kind": "varlen_m", "m": 0, "n": 144, "k": 136}
    depth = {"arch": "sm_120a", "kind": "varlen_k", "m": 136, "n": 136, "k": 0, "majors": "mnn"}
    return [
        Configuration("g-dense", **dense),
        Configuration("g-dense-pingpong", **dense, pingpong=True),
        Configuration("g-rows", **rows, lengths=(130, 0, 77)),
        Configuration("g-rows-gather", **rows, lengths=(130, 0, 77), gather=True),
        Configuration("g-rows-swiglu", **rows, lengths=(130, 0, 77), epilogue="swiglu"),
        Configuration("g-depth", **depth, lengths=(130, 77)),
    ]


CONFIGURATIONS = {c.name: c for c in [*_hopper(), *_blackwell(), *_geforce()]}
