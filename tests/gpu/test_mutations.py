"""Planted mistakes on the kernels: a comparison that accepts one would be too loose."""

import pytest
import torch

from tests.layers import DEVICE, IMPL, PROBLEM
from tests.mutation_checks import ENTRIES, check_entry, check_grouped_mm, uniform

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("entry", ENTRIES)
def test_mistakes_are_noticed(entry):
    check_entry(entry, uniform(PROBLEM), DEVICE, IMPL)


def test_mistakes_of_grouped_mm_are_noticed():
    check_grouped_mm(DEVICE, IMPL, torch.bfloat16)
