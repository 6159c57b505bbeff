"""What the GPU tests hold the stages to: a twin passes, and no expert hides behind the others."""

import pytest
from torch.linalg import vector_norm

from sonic.enums import GateUpLayout
from sonic.reference import stages
from sonic.testing import relative_error
from tests.stage_checks import (
    BOUND,
    FEW,
    ROW_STAGES,
    WEIGHT_STAGES,
    check_output,
    in_float64,
    make_case,
    run,
)


@pytest.mark.parametrize("stage", [*ROW_STAGES, *WEIGHT_STAGES])
def test_an_error_that_hides_in_the_whole_output_is_found(stage):
    case = make_case(GateUpLayout.CONCATENATED, "cpu")
    start, stop = case["plan"].offset_by_expert[FEW : FEW + 2].tolist()
    own = slice(start, stop) if stage in ROW_STAGES else FEW
    twins, exact = (run(stages, stage, c) for c in (case, in_float64(case)))
    for twin, reference in zip(twins, exact, strict=True):
        check_output(stage, case, twin, twin, reference)
        wrong = twin.clone()
        wrong[own] *= 1 + 0.9 * BOUND * vector_norm(twin.float()) / vector_norm(twin[own].float())
        assert 0 < relative_error(wrong, twin) < BOUND
        with pytest.raises(AssertionError, match=f"worst: expert {FEW} .*\n.*\n  1 of . blocks"):
            check_output(stage, case, wrong, twin, reference)
