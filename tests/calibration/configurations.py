"""The configurations: what is compiled, and the problem each is run on."""

import hashlib
from dataclasses import dataclass, fields

from .findings import COPY_FENCE, EMPTY_SEGMENT, LOWEST_LEADER, Finding

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
    blocks: quack's name of a format with a scale factor for 32 values along k; dense, k % 128 == 0.
    split: CTAs that share the sum over k of a tile, in a fixed order.
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
    blocks: str = ""
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
    def findings(self) -> list[Finding]:
        """What is rightly reported of it."""
        once = self.split > 1 and self.n <= self.tile[1]  # too few loads to use a buffer again
        loads_c = (self.beta != 0 or self.epilogue.startswith("d")) and not once
        empty = self.arch == "sm_120a" and self.kind == "varlen_k" and 0 in self.lengths
        copies = self.arch != "sm_120a" and self.gather and not self.tma_gather
        known = ((loads_c, LOWEST_LEADER), (empty, EMPTY_SEGMENT), (copies, COPY_FENCE))
        return [finding for applies, finding in known if applies]

    @property
    def key(self):
        """Names the compiled kernel on disk; fields that have their default are left out of it."""
        mine = {f.name: getattr(self, f.name) for f in fields(self)}
        said = {f.name: mine[f.name] for f in fields(self) if mine[f.name] != f.default}
        return f"{self.name}-{hashlib.sha256(repr(said).encode()).hexdigest()[:12]}"


SPLIT = (130, 0, 77, 200)  # segments: two tiles, none, a part of one, two


_BLOCKS = {"m": 200, "n": 136, "k": 384}


def _family(prefix, arch, kind, problem, configurations):
    """Configurations of one kind on one problem; each value changes fields of it."""
    return [
        Configuration(f"{prefix}-{name}", arch, kind, **{**problem, **changes})
        for name, changes in configurations.items()
    ]


def _hopper():
    dense = {
        "128x128": {},
        "128x128-m-n-m": {"majors": "mnm", "dtype": "float16", "out": "float16"},
        "128x128-m-k-n": {"majors": "mkn"},
        "128x128-k-n-n": {"majors": "knn", "m": 130, "n": 200},
        "256x128-2x1": {"tile": (256, 128), "cluster": (2, 1), "m": 600},
        "128x192-1x2": {"tile": (128, 192), "cluster": (1, 2), "n": 700},
        "128x256-f32": {"tile": (128, 256), "out": "float32", "n": 520},
        "128x128-2x2-batch": {"cluster": (2, 2), "batch": 2},
        "64x128-4x1": {"tile": (64, 128), "cluster": (4, 1), "dtype": "float16"},
        "192x128": {"tile": (192, 128), "m": 400},
        "128x128x32": {"tile": (128, 128, 32)},
        "pingpong-2x1": {"pingpong": True, "cluster": (2, 1)},
        "pingpong-128x160-1x2": {
            "pingpong": True, "tile": (128, 160), "cluster": (1, 2), "n": 480, "majors": "mkm",
        },
        "pingpong-192x128": {"pingpong": True, "tile": (192, 128), "m": 600},
        "fp8": {"dtype": "float8_e4m3fn", "m": 200},
        "fp8-pingpong": {"dtype": "float8_e5m2", "pingpong": True, "m": 520},
        "c": {"alpha": 0.75, "beta": -1.5, "majors": "kkm"},
        "c-pingpong": {"beta": 1.0, "pingpong": True, "cluster": (1, 2)},
        "bias": {"row": True, "col": True, "batch": 2, "m": 200},
        "add": {"add": True, "out": "float32", "cluster": (2, 1)},
        "one-tile-each": {"persistent": False, "cluster": (2, 1)},
        "counter": {"dynamic": True, "cluster": (2, 1)},
        "split-3": {"split": 3, "beta": 1.0, "m": 130, "n": 72},
        "gelu": {"epilogue": "gelu_tanh_approx", "beta": 1.0, "n": 272},
        "swiglu-pingpong": {"epilogue": "swiglu", "pingpong": True, "n": 272, "row": True},
        "dswiglu": {"epilogue": "dswiglu", "n": 144},
    }  # fmt: skip
    rows = {
        "2x1": {"cluster": (2, 1)},
        "1x2-n": {"cluster": (1, 2), "majors": "knn", "tile": (128, 64)},
        "pingpong": {"pingpong": True, "cluster": (2, 1)},
        "256x128": {"tile": (256, 128), "dtype": "float16", "out": "float16"},
        "swiglu": {"epilogue": "swiglu"},
        "swiglu-pingpong": {"epilogue": "swiglu", "pingpong": True, "cluster": (2, 1)},
        "dswiglu": {"epilogue": "dswiglu", "n": 136, "cluster": (2, 1)},
        "c": {"beta": 1.0, "row": True, "col": True},
        "gather": {"gather": True},
        "gather-pingpong": {"gather": True, "pingpong": True, "cluster": (2, 1)},
        "gather-geglu": {"gather": True, "epilogue": "geglu", "tile": (256, 128)},
    }
    depth = {
        "2x1": {"cluster": (2, 1)},
        "1x2-pingpong": {"cluster": (1, 2), "pingpong": True},
        "add": {"add": True, "out": "float32", "tile": (256, 128)},
        "gather": {"gather": True, "dtype": "float16", "out": "float16"},
    }
    arch = "sm_90a"
    return [
        *_family("h-dense", arch, "dense", {"m": 300, "n": 264, "k": 328}, dense),
        *_family("h-rows", arch, "varlen_m", {"m": 0, "n": 272, "k": 200, "lengths": SPLIT}, rows),
        *_family("h-depth", arch, "varlen_k", _DEPTH, depth),
    ]


_DEPTH = {"m": 200, "n": 264, "k": 0, "lengths": SPLIT, "majors": "mnn"}


def _blackwell():
    dense = {
        "128x128": {},
        "128x128-m-n-m": {"majors": "mnm", "dtype": "float16", "out": "float16"},
        "128x64-m-k-n": {"majors": "mkn", "tile": (128, 64)},
        "128x256-k-n-n-f32": {"majors": "knn", "tile": (128, 256), "out": "float32", "n": 520},
        "128x128-1x2": {"cluster": (1, 2)},
        "128x32-1x4": {"tile": (128, 32), "cluster": (1, 4)},
        "256x128-2x1": {"tile": (256, 128), "cluster": (2, 1)},
        "256x256-2x1": {"tile": (256, 256), "cluster": (2, 1), "n": 520},
        "128x128-2x1": {"tile": (128, 128), "cluster": (2, 1), "majors": "mnm"},
        "256x64-2x2": {"tile": (256, 64), "cluster": (2, 2), "batch": 2},
        "256x128-4x1": {"tile": (256, 128), "cluster": (4, 1), "m": 600},
        "64x128": {"tile": (64, 128), "m": 130},
        "128x160": {"tile": (128, 160), "n": 480},
        "fp8": {"dtype": "float8_e4m3fn"},
        "fp8-2cta": {"dtype": "float8_e5m2", "tile": (256, 128), "cluster": (2, 1)},
        "mxfp8": {**_BLOCKS, "dtype": "float8_e4m3fn", "blocks": "mxfp8_e4m3"},
        "mxfp8-2cta": {
            **_BLOCKS,
            "dtype": "float8_e5m2",
            "blocks": "mxfp8_e5m2",
            "tile": (256, 128),
            "cluster": (2, 1),
        },
        "c": {"alpha": 0.75, "beta": -1.5, "majors": "kkm"},
        "c-2cta": {"beta": 1.0, "tile": (256, 128), "cluster": (2, 1)},
        "bias": {"row": True, "col": True, "batch": 2, "m": 200},
        "add": {"add": True, "out": "float32", "tile": (256, 128), "cluster": (2, 1)},
        "split-2-2cta": {"split": 2, "tile": (256, 128), "cluster": (2, 1), "row": True},
        "launch-control": {"dynamic": True, "m": 700},  # more tiles than answers have slots
        "launch-control-2cta": {"dynamic": True, "tile": (256, 128), "cluster": (2, 1)},
        "gelu": {"epilogue": "gelu_tanh_approx", "beta": 1.0, "n": 272},
        "swiglu-2cta": {"epilogue": "swiglu", "tile": (256, 128), "cluster": (2, 1), "n": 272},
        "dswiglu": {"epilogue": "dswiglu", "n": 144},
    }
    rows = {
        "128x128": {"dtype": "float16", "out": "float16"},
        "1x2-n": {"cluster": (1, 2), "majors": "knn", "tile": (128, 64)},
        "2cta": {"tile": (256, 128), "cluster": (2, 1)},
        "swiglu": {"epilogue": "swiglu"},
        "swiglu-2cta": {"epilogue": "swiglu", "tile": (256, 128), "cluster": (2, 1)},
        "dswiglu": {"epilogue": "dswiglu", "n": 136, "tile": (256, 128), "cluster": (2, 1)},
        "c": {"beta": 1.0, "row": True, "col": True},
        "gather": {"gather": True},
        "gather-2cta": {"gather": True, "tile": (256, 128), "cluster": (2, 1)},
        "gather4": {"gather": True, "tma_gather": True},
        "gather4-2cta": {
            "gather": True,
            "tma_gather": True,
            "tile": (256, 128),
            "cluster": (2, 1),
            "lengths": (130, 0, 200, 5),  # behind the last rows there are no more indices
        },
        "launch-control": {"dynamic": True},
        "gather-geglu": {"gather": True, "epilogue": "geglu"},
    }
    depth = {
        "128x128": {},
        "2cta": {"tile": (256, 128), "cluster": (2, 1)},
        "add": {"add": True, "out": "float32", "cluster": (2, 1)},
        "gather": {"gather": True, "dtype": "float16", "out": "float16"},
        "gather4": {"gather": True, "tma_gather": True},
    }
    arch = "sm_100a"
    return [
        *_family("b-dense", arch, "dense", {"m": 300, "n": 264, "k": 328}, dense),
        *_family("b-rows", arch, "varlen_m", {"m": 0, "n": 272, "k": 200, "lengths": SPLIT}, rows),
        *_family("b-depth", arch, "varlen_k", _DEPTH, depth),
    ]


def _geforce():
    dense = {
        "128x128": {},
        "128x128-m-n-m": {"majors": "mnm", "dtype": "float16", "out": "float16"},
        "128x64-m-k-n": {"majors": "mkn", "tile": (128, 64)},
        "64x128-k-n-n-f32": {"majors": "knn", "tile": (64, 128), "out": "float32"},
        "128x160": {"tile": (128, 160), "n": 200},
        "128x192": {"tile": (128, 192), "n": 200},
        "128x128x32-batch": {"tile": (128, 128, 32), "batch": 2},
        "pingpong": {"pingpong": True},
        "pingpong-128x64": {"pingpong": True, "tile": (128, 64), "majors": "mnm"},
        "pingpong-64x128": {"pingpong": True, "tile": (64, 128), "dtype": "float16"},
        "fp8": {"dtype": "float8_e4m3fn"},
        "fp8-pingpong": {"dtype": "float8_e5m2", "pingpong": True},
        "mxfp8": {**_BLOCKS, "dtype": "float8_e4m3fn", "blocks": "mxfp8_e4m3"},
        "mxfp8-pingpong": {
            **_BLOCKS,
            "dtype": "float8_e5m2",
            "blocks": "mxfp8_e5m2",
            "pingpong": True,
        },
        "c": {"alpha": 0.75, "beta": -1.5, "majors": "kkm"},
        "c-pingpong": {"beta": 1.0, "pingpong": True},
        "bias": {"row": True, "col": True, "batch": 2, "m": 132},
        "add": {"add": True, "out": "float32"},
        "one-tile-each": {"persistent": False},
        "split-2": {"split": 2, "beta": 1.0},
        "launch-control": {"dynamic": True},
        "launch-control-pingpong": {"dynamic": True, "pingpong": True},
        "gelu": {"epilogue": "gelu_tanh_approx", "beta": 1.0},
        "swiglu-pingpong": {"epilogue": "swiglu", "pingpong": True, "n": 144, "row": True},
        "dswiglu": {"epilogue": "dswiglu", "n": 72},
    }
    rows = {
        "128x128": {"dtype": "float16", "out": "float16"},
        "128x64-n": {"majors": "knn", "tile": (128, 64)},
        "pingpong": {"pingpong": True},
        "swiglu": {"epilogue": "swiglu"},
        "dswiglu": {"epilogue": "dswiglu", "n": 72},
        "c": {"beta": 1.0, "row": True, "col": True},
        "gather": {"gather": True},
        "gather-pingpong": {"gather": True, "pingpong": True},
        "gather-geglu": {"gather": True, "epilogue": "geglu", "tile": (64, 128), "k": 184},
    }
    depth = {
        "128x128": {"lengths": (130, 77)},
        "pingpong": {"pingpong": True, "lengths": (130, 77)},
        "add": {"add": True, "out": "float32", "lengths": (40, 130)},
        "gather": {"gather": True, "lengths": (130, 77), "dtype": "float16", "out": "float16"},
        "empty": {"lengths": (130, 0, 77)},
    }
    arch, lengths = "sm_120a", SPLIT[:3]
    return [
        *_family("g-dense", arch, "dense", {"m": 200, "n": 136, "k": 200}, dense),
        *_family(
            "g-rows", arch, "varlen_m", {"m": 0, "n": 144, "k": 136, "lengths": lengths}, rows
        ),
        *_family("g-depth", arch, "varlen_k", {**_DEPTH, "m": 136, "n": 136}, depth),
    ]


CONFIGURATIONS = {c.name: c for c in [*_hopper(), *_blackwell(), *_geforce()]}
