"""The flags of a Python in which every warning is an error, as pytest has it for the tests."""

import importlib.metadata

STRICT = ["-W", "error"]
if importlib.metadata.version("flax") == "0.12.6":  # our lowest; it uses what jax 0.10 moved
    STRICT += ["-W", "ignore:jax.core.:DeprecationWarning"]
