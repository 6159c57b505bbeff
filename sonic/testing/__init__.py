"""Test kit: tolerances, awkward problems, poisoned memory, guard bands and deliberate mistakes.

Public, so that a package that calls sonic can hold its integration to the same standard. Needs
torch only.
"""

from sonic.testing.compare import BlockErrors, CloseReport, assert_close, relative_error
from sonic.testing.layer import (
    Experts,
    LayerResult,
    assert_layer_close,
    layer_references,
    run_layer,
)
from sonic.testing.memory import (
    GuardedAllocator,
    poison_,
    poison_dead_rows_,
    poison_like,
    poison_value,
    poisoned_empty,
)
from sonic.testing.mutations import (
    assert_mutations_fail,
    drop_last_row,
    drop_plan_row,
    omit_scores,
    output_mutations,
    shift_offsets,
    shift_plan_offsets,
    swap_experts,
    zero_output,
)
from sonic.testing.problems import (
    LayerInputs,
    LayerProblem,
    Routing,
    make_inputs,
    random_problem,
)

__all__ = [
    "BlockErrors",
    "CloseReport",
    "Experts",
    "GuardedAllocator",
    "LayerInputs",
    "LayerProblem",
    "LayerResult",
    "Routing",
    "assert_close",
    "assert_layer_close",
    "assert_mutations_fail",
    "drop_last_row",
    "drop_plan_row",
    "layer_references",
    "make_inputs",
    "omit_scores",
    "output_mutations",
    "poison_",
    "poison_dead_rows_",
    "poison_like",
    "poison_value",
    "poisoned_empty",
    "random_problem",
    "relative_error",
    "run_layer",
    "shift_offsets",
    "shift_plan_offsets",
    "swap_experts",
    "zero_output",
]
