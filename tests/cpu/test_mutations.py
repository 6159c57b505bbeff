"""Planted mistakes on the reference: a comparison that accepts one would be too loose."""

import pytest
import torch

from tests.layers import PROBLEM
from tests.mutation_checks import ENTRIES, check_entry, check_grouped_mm, uniform


@pytest.mark.parametrize("entry", ENTRIES)
def test_mistakes_are_noticed(entry):
    check_entry(entry, uniform(PROBLEM), "cpu", "reference")


def test_mistakes_of_grouped_mm_are_noticed():
    check_grouped_mm("cpu", "reference", torch.bfloat16)
