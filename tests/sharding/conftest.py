"""Fixtures of the tests on meshes."""

import pytest

from muonclip_jax._sharding import strategies
from tests.support.sharding_cases import DEAR


@pytest.fixture
def dear_work(monkeypatch):
    """Makes FLOPs dearer than bytes, so that small matrices too are shared by all devices."""
    monkeypatch.setattr(strategies, "FLOPS_PER_BYTE", DEAR)
