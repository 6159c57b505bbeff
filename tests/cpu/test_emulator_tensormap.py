"""The tensor-map format: 176 encodings that the driver made on an H200, with their arguments."""

import ctypes
import json
import subprocess
from pathlib import Path

import pytest

from tests.emulator import host, tensormap

ENCODINGS = json.loads((Path(host.HERE) / "data" / "tensormap_bytes.json").read_text())
NAMES = [
    "u8",
    "u16",
    "u32",
    "s32",
    "u64",
    "s64",
    "f16",
    "f32",
    "f64",
    "bf16",
    "f32_ftz",
    "f32",
    "f32_ftz",
]


def raw_of(encoding):
    return b"".join(int(w, 16).to_bytes(8, "little") for w in encoding["words"]) + bytes(64)


def test_decoder():
    decoded = 0
    for e in ENCODINGS:
        if e["status"]:
            continue
        t = tensormap.decode(raw_of(e))
        assert (t.base, t.rank, t.dtype) == (e["addr"], e["rank"], NAMES[e["dtype"]])
        assert (t.dims, t.strides[1:]) == (tuple(e["dims"]), tuple(e["strides"]))
        assert (t.box, t.elem_strides) == (tuple(e["box"]), tuple(e["element_strides"]))
        assert t.swizzle == tensormap.SWIZZLE[e["swizzle"]]
        assert (t.interleave, t.oob_nan) == (e["interleave"], bool(e["oob"]))
        decoded += 1
    assert decoded > 150


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    library = tmp_path_factory.mktemp("shim") / "shim.so"
    source = Path(host.HERE) / "shim.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
    return ctypes.CDLL(str(library))


def encode(shim, e):
    """(status, words) of the shim's cuTensorMapEncodeTiled."""
    block = (ctypes.c_uint64 * 32)()
    at = -(-ctypes.addressof(block) // 64) * 64

    def array(ctype, values):
        return (ctype * max(len(values), 1))(*values)

    status = shim._cuTensorMapEncodeTiled(
        ctypes.c_void_p(at),
        e["dtype"],
        e["rank"],
        ctypes.c_void_p(e["addr"]),
        array(ctypes.c_uint64, e["dims"]),
        array(ctypes.c_uint64, e["strides"]),
        array(ctypes.c_uint32, e["box"]),
        array(ctypes.c_uint32, e["element_strides"]),
        e["interleave"],
        e["swizzle"],
        e["l2"],
        e["oob"],
    )
    words = [f"{x:016x}" for x in (ctypes.c_uint64 * 8).from_address(at)]
    return status, words


def test_encoder_makes_the_drivers_bytes(shim):
    for e in ENCODINGS:
        status, words = encode(shim, e)
        assert bool(status) == bool(e["status"])
        assert status or words == e["words"]


@pytest.mark.parametrize(
    "change",
    [
        {"addr": 8},
        {"strides": [1 << 40]},
        {"strides": [24]},
        {"dims": [0, 8]},
        {"box": [257, 8]},
        {"box": [12, 8]},
        {"box": [128, 8], "swizzle": 3},
        {"rank": 6},
    ],
)
def test_encoder_refuses(shim, change):
    good = dict(
        dtype=9, rank=2, addr=1 << 20, dims=[128, 8], strides=[256], box=[64, 8],
        element_strides=[1, 1], interleave=0, swizzle=3, l2=0, oob=0,
    )  # fmt: skip
    assert encode(shim, good)[0] == 0
    assert encode(shim, good | change)[0] != 0
