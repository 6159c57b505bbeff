"""What every kernel must compute, in torch, on any device and up to float64.

``layer`` states the equations and is what tests trust; ``stages`` breaks the same layer into the
steps that the kernels perform, with their rounding points; ``low_precision`` chains those steps.
"""

from sonic.reference.activations import activation_grad, activation_value
from sonic.reference.layer import (
    experts_flat_reference,
    experts_reference,
    grouped_mm_reference,
    moe_reference,
)
from sonic.reference.low_precision import experts_flat_low_precision, experts_low_precision
from sonic.reference.numerics import accumulator_dtype
from sonic.reference.plan import PlanTensors, plan_oracle, plan_oracle_flat
from sonic.reference.routing import load_balancing_loss, scores_of, topk_scores, topk_scores_grad
from sonic.reference.token_rounding import token_rounding_oracle
from sonic.runtime.layout import (
    gate_up_rows,
    merge_gate_up_rows,
    pack_gate_up,
    packed_to_rows,
    rows_to_packed,
    split_gate_up,
)

__all__ = [
    "PlanTensors",
    "accumulator_dtype",
    "activation_grad",
    "activation_value",
    "experts_flat_low_precision",
    "experts_flat_reference",
    "experts_low_precision",
    "experts_reference",
    "gate_up_rows",
    "grouped_mm_reference",
    "load_balancing_loss",
    "merge_gate_up_rows",
    "moe_reference",
    "pack_gate_up",
    "packed_to_rows",
    "plan_oracle",
    "plan_oracle_flat",
    "rows_to_packed",
    "scores_of",
    "split_gate_up",
    "token_rounding_oracle",
    "topk_scores",
    "topk_scores_grad",
]
