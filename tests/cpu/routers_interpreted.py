"""The router kernels run by Triton's interpreter on CPU tensors.

Not collected on its own: ``test_routers_interpreter.py`` runs it in a process of its own with
``TRITON_INTERPRET=1``, which must be set before triton is first imported.
"""

import pytest
import torch

from tests import router_checks as checks
from tests.cpu.triton_interpreted import _interpreter_works

if not _interpreter_works():
    pytest.skip("this Triton's interpreter does not run on this NumPy", allow_module_level=True)

CPU = torch.device("cpu")
both_paths = pytest.mark.parametrize("fused", [True, False], ids=["fused", "rows"])


@both_paths
@pytest.mark.parametrize("case", list(checks.option_grid()), ids=str)
def test_every_option(case, fused, poisoned):
    options, bias, mask, null = case
    inputs = checks.make_inputs(21, 24, torch.float32, CPU, bias=bias, mask=mask)
    route = checks.make_route(24, 4, **options, num_working=24 - null, num_experts=20)
    checks.check_route(inputs, route, fused=fused)
