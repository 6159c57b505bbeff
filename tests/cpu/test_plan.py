"""RoutingPlan: the torch construction against the slot-by-slot oracle, operators and errors."""

import dataclasses

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sonic.plan import MAX_EXPERTS, build_plan, build_plan_flat
from sonic.reference import plan_oracle, plan_oracle_flat
from sonic.runtime.errors import ArgumentError, DeviceError, DTypeError, ShapeError

NAMES = ("offset_by_expert", "token_by_row", "slot_by_row", "row_by_slot")
FLAT_NAMES = (*NAMES, "offset_by_token", "slot_by_position")
every_id_dtype = pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)


def assert_same(plan, oracle, names):
    for name in names:
        ours, theirs = getattr(plan, name), getattr(oracle, name)
        assert ours.dtype == torch.int32 and ours.is_contiguous(), name
        assert torch.equal(ours, theirs), f"{name}: {ours} is not {theirs}"
    assert (plan.num_tokens, plan.top_k) == (oracle.num_tokens, oracle.top_k)


def random_ids(shape, limit, dtype):
    """Ids of which some lie just outside ``[0, limit)``, and a few far outside."""
    ids = torch.randint(-1, limit + 1, shape, dtype=dtype)
    extreme = torch.iinfo(dtype).max if dtype is torch.int64 else torch.iinfo(dtype).max - 1
    ids[torch.rand(shape) < 0.02] = extreme
    ids[torch.rand(shape) < 0.02] = torch.iinfo(dtype).min
    return ids


@every_id_dtype
@pytest.mark.parametrize(
    "case",
    [(0, 3, 4), (1, 1, 1), (63, 2, 5), (200, 8, 16), (17, 4, 300), (9, 1, MAX_EXPERTS)],
    ids=str,
)
def test_plan(case, id_dtype, poisoned):
    tokens, top_k, experts = case
    ids = random_ids((tokens, top_k), experts, id_dtype)
    plan = build_plan(ids, experts)
    assert_same(plan, plan_oracle(ids, experts), NAMES)
    assert plan.offset_by_token is None and plan.slot_by_position is None
    assert plan.num_experts == experts and plan.num_rows == tokens * top_k


@every_id_dtype
@pytest.mark.parametrize(
    "case", [(0, 0, 4), (0, 5, 2), (6, 0, 2), (1, 1, 1), (63, 150, 5), (200, 90, 40)], ids=str
)
def test_flat_plan(case, id_dtype, poisoned):
    tokens, slots, experts = case
    token_ids = random_ids((slots,), tokens, id_dtype)
    expert_ids = random_ids((slots,), experts, id_dtype)
    plan = build_plan_flat(token_ids, expert_ids, tokens, experts)
    assert_same(plan, plan_oracle_flat(token_ids, expert_ids, tokens, experts), FLAT_NAMES)


def test_rows_of_an_expert_ascend_by_slot():
    plan = build_plan(torch.tensor([[1, 0], [1, 1], [7, 0]]), 2)
    assert plan.offset_by_expert.tolist() == [0, 2, 5]
    assert plan.slot_by_row.tolist() == [1, 5, 0, 2, 3, -1]
    assert plan.token_by_row.tolist() == [0, 2, 0, 1, 1, -1]
    assert plan.row_by_slot.tolist() == [2, 0, 3, 4, -1, 1]
    assert plan.expert_frequency().tolist() == [2, 3]


def test_a_dropped_expert_keeps_its_place_among_the_slots_of_its_token():
    plan = build_plan_flat(torch.tensor([2, 0, 5, 0, 2]), torch.tensor([1, 9, 0, 0, 0]), 3, 2)
    assert plan.offset_by_token.tolist() == [0, 2, 2, 4]
    assert plan.slot_by_position.tolist() == [1, 3, 0, 4, -1]
    assert plan.row_by_slot.tolist() == [2, -1, -1, 0, 1]


def test_ids_of_any_strides():
    ids = torch.randint(0, 6, (12, 10))
    for view in (ids[:, 2:5], ids.t()[:, 3:], ids[::3, ::2], ids[:1].expand(7, 10)):
        assert_same(build_plan(view, 6), plan_oracle(view.contiguous(), 6), NAMES)


def test_plan_is_frozen():
    plan = build_plan(torch.zeros(2, 2, dtype=torch.int32), 3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.top_k = 3


def test_nothing_depends_on_values():
    """The torch construction runs on tensors without data, so it reads nothing on the host."""
    from sonic import plan as module

    with FakeTensorMode():
        ids = torch.empty(6, 2, dtype=torch.int64)
        rows = module._plan_torch(ids.view(-1), None, 5, 6, 2)
        flat = module._plan_torch(ids.view(-1), ids.view(-1), 5, 6, 0)
        by_token = module._group_by_token(ids.view(-1), 6)
    for tensors in (rows, flat):
        assert [t.shape[0] for t in tensors] == [6, 12, 12, 12]
    assert [t.shape[0] for t in by_token] == [7, 12]


def test_operators_pass_opcheck():
    ids = torch.randint(-1, 5, (6, 2))
    flat = ids.reshape(-1)
    torch.library.opcheck(torch.ops.sonic.build_plan.default, (ids, 4, "torch"))
    torch.library.opcheck(torch.ops.sonic.build_plan_flat.default, (flat, flat, 5, 4, "torch"))


def test_under_compile():
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def rows(ids):
        plan = build_plan(ids, 7)
        flat = build_plan_flat(ids[:, 0], ids[:, 1], plan.num_rows, 7)
        return plan.row_by_slot + 1, flat.slot_by_position

    for tokens in (4, 9, 13):
        ids = torch.randint(-1, 8, (tokens, 2))
        row_by_slot, slot_by_position = rows(ids)
        assert torch.equal(row_by_slot, plan_oracle(ids, 7).row_by_slot + 1)
        oracle = plan_oracle_flat(ids[:, 0], ids[:, 1], 2 * tokens, 7)
        assert torch.equal(slot_by_position, oracle.slot_by_position)


IDS = torch.zeros(4, 2, dtype=torch.int32)
META = torch.empty(2**30, 2, dtype=torch.int32, device="meta")
MAX = 2**31 - 1


@pytest.mark.parametrize(
    "error, text, call",
    [
        (ShapeError, r"\(8,\).*Allowed: \(T, top_k\)", lambda: build_plan(IDS.view(-1), 3)),
        (ShapeError, r"top_k of at least 1", lambda: build_plan(IDS[:, :0], 3)),
        (DTypeError, "float32.*Allowed: int32, int64", lambda: build_plan(IDS.float(), 3)),
        (DTypeError, "int16", lambda: build_plan(IDS.short(), 3)),
        (ArgumentError, "num_experts=0.*Allowed: 1", lambda: build_plan(IDS, 0)),
        (ArgumentError, "num_experts=65537", lambda: build_plan(IDS, 65537)),
        (ArgumentError, "impl='cuda'.*'triton'", lambda: build_plan(IDS, 3, impl="cuda")),
        (ShapeError, r"\(3,\)\. Allowed", lambda: build_plan_flat(IDS[0], IDS[0, [0, 0, 1]], 2, 3)),
        (ShapeError, "one shape", lambda: build_plan_flat(IDS, IDS, 2, 3)),
        (ArgumentError, "num_tokens=-1", lambda: build_plan_flat(IDS[0], IDS[0], -1, 3)),
        (ArgumentError, "num_tokens=2147483647", lambda: build_plan_flat(IDS[0], IDS[0], MAX, 3)),
        (DeviceError, "meta", lambda: build_plan_flat(IDS[0], META[0], 2, 3)),
        (ShapeError, "2147483648 slots", lambda: build_plan(META, 3)),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_errors(error, text, call):
    with pytest.raises(error, match=text):
        call()


def test_triton_on_a_cpu_tensor_says_what_to_do():
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("TRITON_INTERPRET is set: CPU tensors are served")
    says = "impl='triton' was asked for tensors on cpu. Allowed: CUDA tensors. .*impl=\"torch\""
    with pytest.raises(DeviceError, match=f"build_plan: {says}"):
        build_plan(IDS, 3, impl="triton")
    with pytest.raises(DeviceError, match=f"build_plan_flat: {says}"):
        build_plan_flat(IDS[0], IDS[0], 3, 3, impl="triton")
