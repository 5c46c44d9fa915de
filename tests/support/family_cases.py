"""Updates of the transforms of the Muon family, and their comparison with equations in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.by_day import by_day

DTYPES = by_day([jnp.float32, jnp.bfloat16, jnp.float16], jnp.float32, jnp.bfloat16)
# Half a unit in the last place of the result, beside 1e-5 of float32.
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2.0**-8, jnp.float16: 2.0**-11 + 1e-4}
SHAPES = {"wide": (3, 7), "tall": (7, 3), "stacked": (2, 4, 5)}


def draw(shape, seed, dtype=jnp.float32):
    # Rounded by NumPy: JAX would compile a conversion for each shape.
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(dtype), dtype)


def gradients(shape, dtype=jnp.float32, steps=3):
    return [draw(shape, seed, dtype) for seed in range(steps)]


def run(tx, updates, params=None):
    """Returns the updates of a transform in order."""
    state, found = tx.init(params if params is not None else updates[0]), []
    update = jax.jit(tx.update)
    for u in updates:
        u, state = update(u, state, params)
        found.append(u)
    return found


def assert_equal(got, expected, dtype=jnp.float32):
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(g, np.float64), e, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
        )


def each_matrix(oracle, updates, **settings):
    """Applies an oracle of one matrix to every matrix of stacked leaves."""
    stacks = [np.array(u, dtype=np.float64).reshape(-1, *u.shape[-2:]) for u in updates]
    found = [oracle([s[i] for s in stacks], **settings) for i in range(len(stacks[0]))]
    return [np.stack(step).reshape(updates[0].shape) for step in zip(*found, strict=True)]
