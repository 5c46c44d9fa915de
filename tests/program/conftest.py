"""The models of these tests are written as public code is, with rank promotion."""

import jax
import pytest


@pytest.fixture(autouse=True)
def rank_promotion():
    with jax.numpy_rank_promotion("allow"):
        yield
