"""Presets, spectra of every kind, and what a program multiplies."""

import jax
import numpy as np

PRESETS = (
    "jordan",
    "standard",
    "you",
    "dion",
    "polar_express",
    "polar_express_6",
    "deepseek_v4",
    "cubic5",
)
# Two are optax's names of others.
DISTINCT = tuple(name for name in PRESETS if name not in ("standard", "dion"))


def spectra(m, n, seed=0):
    """Gaussian, singular values 1 .. 1e-4, rank 8, and rank one with noise."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.normal(size=(m, min(m, n))))[0]
    v = np.linalg.qr(rng.normal(size=(n, min(m, n))))[0]
    decaying = (u * np.geomspace(1, 1e-4, min(m, n))) @ v.T
    rank_8 = rng.normal(size=(m, 8)) @ rng.normal(size=(8, n))
    rank_1 = rng.normal(size=(m, 1)) @ rng.normal(size=(1, n)) + 1e-3 * rng.normal(size=(m, n))
    return [x.astype(np.float32) for x in (rng.normal(size=(m, n)), decaying, rank_8, rank_1)]


def products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from products(value.jaxpr)
            elif hasattr(value, "eqns"):
                yield from products(value)


def count_flops(f, x):
    """FLOPs of all products of a program."""
    total = 0
    for product in products(jax.make_jaxpr(f)(x).jaxpr):
        (left, _), _ = product.params["dimension_numbers"]
        shape = product.invars[0].aval.shape
        contracted = np.prod([shape[axis] for axis in left])
        total += 2 * contracted * np.prod(product.outvars[0].aval.shape)
    return total
