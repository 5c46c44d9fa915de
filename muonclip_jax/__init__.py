"""MuonClip, the optimizer of Kimi K2, for JAX: Muon for optax and QK-clip for Flax parameters."""

__version__ = "0.1.0"
