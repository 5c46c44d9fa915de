"""MuonClip, the optimizer of Kimi K2, for JAX: Muon for optax and QK-clip for Flax parameters.

The two modules that need Flax, `linen` and later `nnx`, load when they are first used.
"""

import importlib
from typing import Any

from optax.contrib import MuonDimensionNumbers as MuonDimensionNumbers

from muonclip_jax._coefficients import ns_coefficients as ns_coefficients
from muonclip_jax._muon import muon as muon
from muonclip_jax._newton_schulz import newton_schulz as newton_schulz
from muonclip_jax._routing import RoutingTable as RoutingTable, routing_table as routing_table
from muonclip_jax._scale_by_muon import (
    ScaleByMuonState as ScaleByMuonState,
    scale_by_muon as scale_by_muon,
    scale_by_shape as scale_by_shape,
)

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Loads the Flax modules on first use, so that importing the package does not import Flax."""
    if name == "linen":
        return importlib.import_module("muonclip_jax.linen")
    raise AttributeError(f"module 'muonclip_jax' has no attribute {name!r}")
