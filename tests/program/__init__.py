"""Tests of `muonclip_jax._program`."""
