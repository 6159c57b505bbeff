"""The grouped GEMMs of one layer, stage by stage, and the bounds that their results are held to."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sonic.enums import ActivationType, GateUpLayout
from sonic.plan import build_plan
from sonic.testing import assert_close, relative_error

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 1500, 328, 200, 6, 2
FEW = 4  # the expert of two rows
ROW_STAGES = ("up", "down", "down_backward_act", "up_backward_act")
WEIGHT_STAGES = ("down_backward_weight", "up_backward_weight")
# Kernel and twin round once from float32 sums, so they differ in few elements, by one ulp.
BOUND = 3e-4


def make_case(layout: GateUpLayout, device: str) -> dict[str, Any]:
    """Operands of every stage: an empty expert, one of two rows, dropped slots, NaN where nothing
    may be read."""
    torch.manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device).to(torch.bfloat16)

    ids = torch.randint(EXPERTS, (TOKENS, TOP_K), device=device, dtype=torch.int32)
    ids[ids == 2] = 3
    ids[ids == FEW] = 5
    ids[:2, 1] = FEW
    ids[::7, 0] = EXPERTS
    plan = build_plan(ids, EXPERTS)
    rows = TOKENS * TOP_K
    dead = torch.arange(rows, device=device) >= plan.offset_by_expert[-1]
    values = {
        "x": normal(TOKENS, HIDDEN),
        "dout": normal(TOKENS, HIDDEN),
        "w1": normal(EXPERTS, 2 * WIDTH, HIDDEN) / HIDDEN**0.5,
    }
    values |= {
        "w2": normal(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5,
        "a": normal(rows, WIDTH),
        "h": normal(rows, 2 * WIDTH),
    }
    for name in ("a", "h"):
        values[name][dead] = float("nan")
    score = torch.rand(rows, device=device).masked_fill(dead, float("nan"))
    return {**values, "score": score, "plan": plan, "layout": layout}


def in_float64(case: dict[str, Any]) -> dict[str, Any]:
    """The same numbers."""
    return {n: v.double() if isinstance(v, Tensor) else v for n, v in case.items()}


def run(module: ModuleType, stage: str, case: dict[str, Any]) -> tuple[Tensor, ...]:
    """The outputs of a stage of ``module``; of ragged rows those that belong to an expert."""
    outputs = _run(module, stage, case)
    live = int(case["plan"].offset_by_expert[-1])
    return tuple(t[:live] for t in outputs) if stage in ROW_STAGES else outputs


def _run(module: ModuleType, stage: str, case: dict[str, Any]) -> tuple[Tensor, ...]:
    plan, layout = case["plan"], case["layout"]
    token, offset = plan.token_by_row, plan.offset_by_expert
    act = ActivationType.SWIGLU
    if stage == "up":
        return module.up_forward(
            case["x"], case["w1"], None, token, offset,
            activation=act, layout=layout, store_preact=True,
        )  # fmt: skip
    if stage == "down":
        return (module.down_forward(case["a"], case["w2"], None, offset),)
    if stage == "down_backward_act":
        dh, a_scaled, ds = module.down_backward_act(
            case["dout"], case["w2"], case["h"], case["score"], token, offset, activation=act
        )
        return dh, a_scaled, ds.sum(0)
    if stage == "up_backward_act":
        return (module.up_backward_act(case["h"], case["w1"], offset, layout=layout, gated=True),)
    if stage == "down_backward_weight":
        return (module.down_backward_weight(case["dout"], case["a"], token, offset),)
    return (
        module.up_backward_weight(case["x"], case["h"], token, offset, layout=layout, gated=True),
    )


def check_output(
    stage: str, case: dict[str, Any], got: Tensor, twin: Tensor, exact: Tensor
) -> None:
    """One output of a stage beside its torch twin's, as a whole, and beside that in float64, by
    expert: in the whole, the few rows of one would hardly count."""
    assert torch.isfinite(got).all()
    assert twin.abs().max() > 0
    assert relative_error(got, twin) < BOUND
    is_score = twin.ndim == 1
    assert_close(
        got,
        exact,
        twin,
        per_expert_rows=case["plan"].offset_by_expert if stage in ROW_STAGES else None,
        name=stage,
        ulps=0.5,  # twice the error of one rounding is the ulp that they may be apart
        # A score's gradient is a float32 sum over I of products with what bfloat16 approximates.
        band_dtype=torch.bfloat16 if is_score else None,
        magnitude=WIDTH**0.5 if is_score else 0.0,
    )
