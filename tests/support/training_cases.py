"""Gradients, a short training, and the comparison of two of them."""

import jax
import numpy as np
import optax


def gradients(shape, steps=6, seed=0):
    """Gradients whose size changes from step to step, at times to almost nothing.

    Momentum only shows where a step does not look like the one before.
    """
    rng = np.random.default_rng(seed)
    sizes = (1.0, 30.0, 1e-3, 1e-6, 0.3, 7.0)
    return [
        (sizes[i % len(sizes)] * rng.normal(size=shape)).astype(np.float32) for i in range(steps)
    ]


def train(tx, params, gradients):
    """Parameters after each gradient."""
    state, trajectory = tx.init(params), []
    update = jax.jit(tx.update)
    for g in gradients:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory


def assert_same_way(got, expected, start, tolerance=1e-3):
    """The distance between two ways is small against the way gone."""
    for a, b in zip(got, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b - start)
