"""Activations and their gradients, element by element, as the epilogues compute them."""

import pytest
import torch

pytest.importorskip("sonic.stages", reason="needs Triton")

from sonic.enums import ActivationType
from tests.activation_checks import check_grid, check_nan

DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ActivationType, ids=lambda a: a.value)
def test_value_and_gradient(activation, dtype):
    check_grid(activation, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ActivationType, ids=lambda a: a.value)
def test_nan_stays_nan(activation, dtype):
    check_nan(activation, dtype, "cuda")
