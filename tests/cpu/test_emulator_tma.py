"""TMA: tiles of every rank, type and swizzle; gathered rows; tensor maps changed in place."""

import numpy as np
import pytest

from tests.emulator import Fault, Policy, tensormap
from tests.emulator.encoder import SWIZZLES, tensor_map
from tests.emulator.snippet import run_ptx

# Thread 0 loads a box and waits; all threads then copy the bytes of shared memory to array 1.
LOAD = """
mov.u32 %r9, dynamic; setp.ne.u32 %p0, %r0, 0;
@%p0 bra READY;
mbarrier.init.shared::cta.b64 [%r9], 1; fence.mbarrier_init.release.cluster;
{before}
mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r9], {nbytes};
{load}
READY: bar.sync 0;
WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r9], 0;
@!%p1 bra WAIT;
mul.wide.u32 %d8, %r0, 4; add.s64 %d8, %d1, %d8; shl.b32 %r8, %r0, 2; add.u32 %r8, %r8, %r9;
mov.u32 %r7, 0;
COPY: ld.shared.u32 %r6, [%r8+1024]; st.global.u32 [%d8], %r6;
add.u32 %r8, %r8, 128; add.s64 %d8, %d8, 128; add.u32 %r7, %r7, 128;
setp.lt.u32 %p2, %r7, {nbytes}; @%p2 bra COPY;
"""
TENSOR = "cp.async.bulk.tensor.{rank}d.shared::cta.global.{mode}.mbarrier::complete_tx::bytes"


def load(memory, raw, at, nbytes, mode="tile", before="", seed=0, target="sm_100a", where="%d2"):
    """What a load of the box at coordinates `at` brings: bytes."""
    out = np.full(-(-nbytes // 128) * 32, 0xEEEEEEEE, np.uint32)
    rank = 2 if mode != "tile" else len(at)
    listed = ", ".join(map(str, at))
    issue = TENSOR.format(rank=rank, mode=mode)
    issue += f" [%r9+1024], [{where}, {{{listed}}}], [%r9];"
    body = LOAD.format(load=issue, nbytes=nbytes, before=before)
    run_ptx(
        body, memory, out, params=[raw], smem=1024 + -(-nbytes // 128) * 128, target=target,
        policy=Policy(seed),
    )  # fmt: skip
    return out.view(np.uint8)[:nbytes]


def aligned(shape, dtype, seed=0):
    """Random numbers at an address that is a multiple of 128."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    store = np.random.default_rng(seed).integers(0, 256, count + 128, np.uint8)
    at = -store.ctypes.data % 128
    return store[at : at + count].view(dtype).reshape(shape)


def box_of(x, at, box, steps=None):
    """The box of array x (slowest dimension first) at coordinates (fastest first), with zeros."""
    steps = steps or [1] * len(box)
    out = np.zeros([-(-b // s) for b, s in zip(box, steps, strict=True)][::-1], x.dtype)
    for index in np.ndindex(*out.shape):
        where = [a + s * i for a, s, i in zip(at[::-1], steps[::-1], index, strict=True)]
        if all(0 <= p < n for p, n in zip(where, x.shape, strict=True)):
            out[index] = x[tuple(where)]
    return out


def strides_of(x):
    return list(x.strides[::-1][1:])


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["u8", "f16", "u32", "f64"])
def test_boxes_of_every_rank(rank, dtype):
    typ = {"u8": np.uint8, "f16": np.uint16, "u32": np.uint32, "f64": np.uint64}[dtype]
    inner = 64 // np.dtype(typ).itemsize
    x = aligned((3, 4, 5, 6, 2 * inner)[5 - rank :], typ)
    box = [inner, 3, 2, 2, 2][:rank]
    raw = tensor_map(dtype, x.ctypes.data, x.shape[::-1], strides_of(x), box)
    for at in ([0] * rank, [inner + 4, 2, 1, 3, 2][:rank], [-8, -1, 4, -1, 1][:rank]):
        want = box_of(x, at, box)
        np.testing.assert_array_equal(load(x, raw, at, want.nbytes), want.view(np.uint8).ravel())


def test_traversal_strides_skip_rows():
    x = aligned((20, 32), np.float32)
    raw = tensor_map("f32", x.ctypes.data, (32, 20), [128], [16, 9], steps=[1, 2])
    want = box_of(x, [4, 3], [16, 9], [1, 2])
    got = load(x, raw, [4, 3], want.nbytes)
    np.testing.assert_array_equal(got, want.view(np.uint8).ravel())


def test_nan_fill():
    x = aligned((4, 8), np.float32)
    x[:] = 1
    raw = tensor_map("f32", x.ctypes.data, (8, 4), [32], [8, 8], nan_fill=True)
    got = load(x, raw, [0, 2], 256).view(np.float32).reshape(8, 8)
    assert (got[:2] == 1).all() and np.isnan(got[2:]).all()
    with pytest.raises(ValueError, match="NaN fill"):
        tensor_map("u32", x.ctypes.data, (8, 4), [32], [8, 8], nan_fill=True)


def swizzled(flat, kind):
    """Bytes as TMA lays them out in shared memory whose address is a multiple of 1024."""
    out = np.zeros_like(flat)
    for i, value in enumerate(flat):
        row, chunk, byte = i // 128, i % 128 // 16, i % 16
        if kind == "32B":
            chunk ^= row & 1
        elif kind == "64B":
            chunk ^= row & 3
        elif kind == "128B":
            chunk ^= row & 7
        elif kind.startswith("128B_atom_32B"):
            chunk ^= (row & 3) << 1
            if kind.endswith("flip_8B") and row & 1:
                byte ^= 8
        elif kind == "128B_atom_64B":
            chunk ^= (row & 1) << 2
        out[row * 128 + chunk * 16 + byte] = value
    return out


@pytest.mark.parametrize("kind", SWIZZLES)
def test_swizzles(kind):
    span = {"none": 128, "32B": 32, "64B": 64}.get(kind, 128)
    x = aligned((32, 64), np.uint32)
    raw = tensor_map("u32", x.ctypes.data, (64, 32), [256], [span // 4, 16], swizzle=kind)
    want = np.ascontiguousarray(x[3:19, 8 : 8 + span // 4]).view(np.uint8).ravel()
    got = load(x, raw, [8, 3], len(want))
    np.testing.assert_array_equal(got, swizzled(want, kind))


def test_packed_types():
    x = aligned((8, 128), np.uint8)  # 256 elements of 4 bits a row
    raw = tensor_map("b4x16", x.ctypes.data, (256, 8), [128], [64, 4])
    want = x[2:6, 16:48]
    np.testing.assert_array_equal(load(x, raw, [32, 2], 128), want.ravel())
    raw = tensor_map("b4x16_p64", x.ctypes.data, (256, 8), [128], [128, 4], swizzle="none")
    got = load(x, raw, [128, 2], 512).reshape(4, 8, 16)
    np.testing.assert_array_equal(got[..., :8], x[2:6, 64:].reshape(4, 8, 8))
    six = aligned((8, 192), np.uint8)  # 256 elements of 6 bits a row
    raw = tensor_map("b6x16_p32", six.ctypes.data, (256, 8), [192], [128, 4])
    got = load(six, raw, [128, 3], 512).reshape(4, 8, 16)
    np.testing.assert_array_equal(got[..., :12], six[3:7, 96:].reshape(4, 8, 12))
    with pytest.raises(ValueError, match="padded type"):
        tensor_map("b4x16_p64", x.ctypes.data, (256, 8), [128], [64, 4])


# ---- gathered and scattered rows ----
@pytest.mark.parametrize("kind", ["none", "128B"])
def test_gather4(kind):
    x = aligned((40, 64), np.uint16)
    raw = tensor_map("f16", x.ctypes.data, (64, 40), [128], [32, 1], swizzle=kind)
    rows = [7, 39, 0, 7]
    want = np.ascontiguousarray(x[rows, 16:48]).view(np.uint8).ravel()
    got = load(x, raw, [16, *rows], 256, "tile::gather4")
    np.testing.assert_array_equal(got, swizzled(want, kind))
    outside = load(x, raw, [16, 40, -1, 3, 1 << 20], 256, "tile::gather4").reshape(4, 64)
    assert not outside[[0, 1, 3]].any()
    assert outside[2].any()


def test_gather4_needs_a_box_of_one_row():
    x = aligned((40, 64), np.uint16)
    raw = tensor_map("f16", x.ctypes.data, (64, 40), [128], [32, 4])
    with pytest.raises(Fault, match="must have one row, not 4"):
        load(x, raw, [16, 1, 2, 3, 4], 256, "tile::gather4")


STORE = """
mov.u32 %r9, dynamic; shl.b32 %r8, %r0, 2; add.u32 %r8, %r8, %r9;
mul.wide.u32 %d8, %r0, 4; add.s64 %d8, %d1, %d8; mov.u32 %r7, 0;
COPY: ld.global.u32 %r6, [%d8]; st.shared.u32 [%r8], %r6;
add.u32 %r8, %r8, 128; add.s64 %d8, %d8, 128; add.u32 %r7, %r7, 128;
setp.lt.u32 %p2, %r7, {nbytes}; @%p2 bra COPY;
fence.proxy.async.shared::cta; bar.sync 0;
setp.ne.u32 %p0, %r0, 0; @%p0 bra DONE;
{store}
cp.async.bulk.commit_group; cp.async.bulk.wait{wait};
DONE: {after}
"""


def store(memory, raw, at, data, form, wait="_group 0", after="", seed=0):
    """Stores the box `data` (bytes as they lie in shared memory) at coordinates."""
    rank = 2 if "scatter4" in form else len(at)
    listed = ", ".join(map(str, at))
    issue = form.format(rank=rank) + f" [%d2, {{{listed}}}], [%r9];"
    source = np.frombuffer(data.tobytes(), np.uint32).copy()
    body = STORE.format(store=issue, nbytes=data.nbytes, wait=wait, after=after)
    run_ptx(
        body, memory, source, params=[raw], smem=data.nbytes, target="sm_100a",
        policy=Policy(seed),
    )  # fmt: skip


TILE = "cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group"
SCATTER = "cp.async.bulk.tensor.{rank}d.global.shared::cta.tile::scatter4.bulk_group"
REDUCE = "cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.%s.tile.bulk_group"


@pytest.mark.parametrize("kind", SWIZZLES)
def test_stores(kind):
    span = {"none": 128, "32B": 32, "64B": 64}.get(kind, 128)
    x = aligned((24, 64), np.uint32)
    before = x.copy()
    raw = tensor_map("u32", x.ctypes.data, (64, 24), [256], [span // 4, 16], swizzle=kind)
    new = aligned((16, span // 4), np.uint32, seed=1)
    store(x, raw, [-4, 12], swizzled(new.view(np.uint8).ravel(), kind), TILE)
    before[12:, : span // 4 - 4] = new[:12, 4:]  # the rest lies outside the tensor
    np.testing.assert_array_equal(x, before)


def test_scatter4():
    x = aligned((40, 64), np.uint16)
    before = x.copy()
    raw = tensor_map("f16", x.ctypes.data, (64, 40), [128], [32, 1], swizzle="64B")
    new = aligned((4, 32), np.uint16, seed=1)
    flat = new.view(np.uint8).ravel()
    store(x, raw, [16, 9, 40, 0, 3], swizzled(flat, "64B"), SCATTER)
    for row, values in zip((9, 0, 3), new[[0, 2, 3]], strict=True):
        before[row, 16:48] = values
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("op", ["add", "min", "max", "and", "or", "xor", "inc", "dec"])
def test_reductions(op):
    x = aligned((8, 32), np.uint32) >> np.uint32(20)
    old, new = x.copy(), aligned((8, 32), np.uint32, seed=1) >> np.uint32(20)
    raw = tensor_map("u32", x.ctypes.data, (32, 8), [128], [32, 8])
    store(x, raw, [0, 0], new, REDUCE % op)
    want = {
        "add": old + new, "min": np.minimum(old, new), "max": np.maximum(old, new),
        "and": old & new, "or": old | new, "xor": old ^ new,
        "inc": np.where(old >= new, 0, old + 1),
        "dec": np.where((old == 0) | (old > new), new, old - 1),
    }  # fmt: skip
    np.testing.assert_array_equal(x, want[op])


def test_a_reduction_by_every_lane_is_reported():
    """Each thread reduces the tile once more; that each stores it makes no difference."""

    def run(form):
        x, new = aligned((8, 32), np.uint32), aligned((8, 32), np.uint32, seed=1)
        raw = tensor_map("u32", x.ctypes.data, (32, 8), [128], [32, 8])
        issue = form.format(rank=2) + " [%d2, {0, 0}], [%r9];"
        body = STORE.format(store=issue, nbytes=1024, wait="_group 0", after="")
        body = body.replace("@%p0 bra DONE;", "")
        source = np.frombuffer(new.tobytes(), np.uint32).copy()
        run_ptx(body, x, source, params=[raw], smem=1024, target="sm_100a")
        np.testing.assert_array_equal(x, new)

    run(TILE)
    with pytest.raises(Fault, match="TMA reduction of the same tile by 32 lanes"):
        run(REDUCE % "add")


@pytest.mark.parametrize("seed", range(4))
def test_a_read_after_only_the_source_was_waited_for_is_a_race(seed):
    def run(wait, after):
        x, new = aligned((8, 32), np.uint32), aligned((8, 32), np.uint32, seed=1)
        raw = tensor_map("u32", x.ctypes.data, (32, 8), [128], [32, 8])
        store(x, raw, [0, 0], new, TILE, wait, after, seed)

    read = "ld.global.u32 %r1, [%d0];"
    run("_group 0", "@!%p0 " + read)
    run("_group 0", "bar.warp.sync -1;" + read)
    for wait, after in (("_group.read 0", "@!%p0 " + read), ("_group 0", read)):  # other lanes
        with pytest.raises(Fault, match="race: load of array 0 .* TMA store .*nothing has waited"):
            run(wait, after)


def test_a_load_of_what_the_kernel_stored_needs_a_proxy_fence():
    x = aligned((8, 32), np.uint32)
    raw = tensor_map("u32", x.ctypes.data, (32, 8), [128], [32, 8])
    write = "mov.u32 %r20, 5; st.global.u32 [%d0+128], %r20;"
    got = load(x, raw, [0, 0], 1024, before=write + "fence.proxy.async.global;")
    assert got.view(np.uint32)[32] == 5
    load(x, raw, [0, 0], 1024, before=write + "fence.proxy.async;")
    with pytest.raises(Fault, match="not followed by a fence.proxy.async"):
        load(x, raw, [0, 0], 1024, before=write)


# ---- maps changed by the kernel ----
FIELDS = [
    ("global_address", "b64", None, "address", "base"),
    ("rank", "b32", None, 2, "rank"),
    ("box_dim", "b32", 1, 16, "box"),
    ("global_dim", "b32", 0, 1000, "dims"),
    ("global_stride", "b64", 0, 4096, "strides"),
    ("element_stride", "b32", 1, 3, "elem_strides"),
    ("elemtype", "b32", None, 6, "dtype"),
    ("swizzle_mode", "b32", None, 2, "swizzle"),
    ("swizzle_atomicity", "b32", None, 3, "atom"),
    ("fill_mode", "b32", None, 1, "oob_nan"),
]


@pytest.mark.parametrize(("field", "typ", "ordinal", "value", "name"), FIELDS)
def test_every_field_can_be_replaced(field, typ, ordinal, value, name):
    x = aligned((8, 32), np.float32)
    store_at = aligned((256,), np.uint8)
    store_at[:128] = np.frombuffer(
        tensor_map("f32", x.ctypes.data, (32, 8), [128], [32, 8]), np.uint8
    )
    before = tensormap.decode(store_at[:128].tobytes())
    value = x.ctypes.data + 256 if value == "address" else value
    register = "%d9" if typ == "b64" else "%r9"
    place = "" if ordinal is None else f"{ordinal}, "
    immediate = field in ("elemtype", "swizzle_mode", "swizzle_atomicity", "fill_mode")
    source = value if immediate else register
    body = f"""
    mov.{typ} {register}, {value}; setp.ne.u32 %p0, %r0, 0; @%p0 bra DONE;
    tensormap.replace.tile.{field}.global.b1024.{typ} [%d0], {place}{source};
    DONE:
    """
    run_ptx(body, store_at, target="sm_100a")
    after = tensormap.decode(store_at[:128].tobytes())
    if field == "rank":
        assert after.rank == 3
        return
    changed = {
        "base": value, "box": (32, 16), "dims": (1000, 8), "strides": (4, 4096),
        "elem_strides": (1, 3), "dtype": "f16", "swizzle": 64, "atom": "64B", "oob_nan": True,
    }[name]  # fmt: skip
    assert getattr(after, name) == changed
    for other in ("base", "box", "dims", "elem_strides", "dtype", "swizzle", "atom", "oob_nan"):
        assert other == name or getattr(after, other) == getattr(before, other)


# Array 2 is the map's copy in global memory: changed in shared memory, copied and fenced, used.
IN_SHARED = """
mov.u32 %r9, dynamic; add.s64 %d20, %d0, 1024;
shl.b32 %r1, %r0, 2; add.u32 %r2, %r9, %r1; cvt.u64.u32 %d9, %r1; add.s64 %d10, %d3, %d9;
ld.u32 %r3, [%d10]; st.shared.u32 [%r2+128], %r3; bar.warp.sync -1;
setp.ne.u32 %p0, %r0, 0;
@!%p0 tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%r9+128], %d20;
bar.warp.sync -1;
{copy}
{acquire}
"""
COPY = (
    "tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned "
    "[%d2], [%r9+128], 128;"
)
ACQUIRE = "fence.proxy.tensormap::generic.acquire.gpu [%d2], 128;"


def replaced(copy, acquire, seed):
    x = aligned((16, 32), np.uint32)
    raw = tensor_map("u32", x.ctypes.data, (32, 8), [128], [32, 8])
    out, place = np.zeros(256, np.uint32), aligned((128,), np.uint8)
    issue = TENSOR.format(rank=2, mode="tile") + " [%r9+1024], [%d2, {0, 0}], [%r9];"
    body = IN_SHARED.format(copy=copy, acquire=acquire)
    body += LOAD.format(load=issue, nbytes=1024, before="")
    run_ptx(body, x, out, place, params=[raw], smem=2048, policy=Policy(seed))
    return x, out


@pytest.mark.parametrize("seed", range(4))
def test_a_map_changed_in_shared_memory(seed):
    x, out = replaced(COPY, ACQUIRE, seed)
    np.testing.assert_array_equal(out, x[8:].ravel())
    with pytest.raises(Fault, match=r"without a\s+fence.proxy.tensormap::generic.acquire"):
        replaced(COPY, "", seed)


IN_GLOBAL = """
add.s64 %d20, %d0, 1024; setp.ne.u32 %p0, %r0, 0;
@!%p0 tensormap.replace.tile.global_address.global.b1024.b64 [%d2], %d20;
{release}
{acquire}
"""
RELEASE = "fence.proxy.tensormap::generic.release.gpu;"


def replaced_in_place(release, acquire, seed=0):
    x = aligned((16, 32), np.uint32)
    raw = tensor_map("u32", x.ctypes.data, (32, 8), [128], [32, 8])
    out, place = np.zeros(256, np.uint32), aligned((128,), np.uint8)
    place[:] = np.frombuffer(raw, np.uint8)
    issue = TENSOR.format(rank=2, mode="tile") + " [%r9+1024], [%d2, {0, 0}], [%r9];"
    body = IN_GLOBAL.format(release=release, acquire=acquire)
    body += LOAD.format(load=issue, nbytes=1024, before="")
    run_ptx(body, x, out, place, smem=2048, policy=Policy(seed))
    np.testing.assert_array_equal(out, x[8:].ravel())


def test_a_map_changed_in_global_memory():
    replaced_in_place(RELEASE, ACQUIRE)
    for release, acquire in ((RELEASE, ""), ("", ACQUIRE), ("", ""), (ACQUIRE, RELEASE)):
        with pytest.raises(Fault, match=r"without a\s+fence.proxy.tensormap"):
            replaced_in_place(release, acquire)


def test_a_map_that_the_driver_would_refuse_is_reported():
    x = aligned((16, 32), np.uint32)
    raw = bytearray(tensor_map("u32", x.ctypes.data, (32, 8), [128], [32, 8], swizzle="128B"))
    raw[0] |= 8  # the address
    with pytest.raises(Fault, match="illegal tensor map: its address is not 16-byte aligned"):
        load(x, bytes(raw), [0, 0], 1024)
