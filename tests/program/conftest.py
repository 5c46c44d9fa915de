"""The models of these tests are written as public code is, with rank promotion."""

import pytest


@pytest.fixture(autouse=True)
def as_public_code(rank_promotion):
    """Rank promotion in every test of this folder."""
