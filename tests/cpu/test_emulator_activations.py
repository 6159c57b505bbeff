"""Activations in the epilogues, element by element, in the emulator."""

import pytest
import torch

pytest.importorskip("cutlass", reason="nvidia-cutlass-dsl is not installed")

from sonic.enums import ActivationType
from tests.activation_checks import check_grid, check_nan
from tests.emulator.layer import emulated_layer


@pytest.mark.parametrize("activation", ActivationType, ids=lambda a: a.value)
def test_nan_stays_nan(activation):
    with emulated_layer(seed=0, sms=1):
        check_nan(activation, torch.bfloat16, "cpu")


@pytest.mark.parametrize("activation", ["swiglu_oai", "geglu", "relu_sq"])
def test_value_and_gradient(activation):
    with emulated_layer(seed=1, sms=1):
        check_grid(ActivationType(activation), torch.float16, "cpu")
