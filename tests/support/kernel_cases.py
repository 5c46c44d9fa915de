"""Small tiles for the kernels, so that small matrices have several of them; FLOPs; leakage."""

import contextlib

import numpy as np
import pytest

from muonclip_jax._orthogonalize import tiles
from muonclip_jax._orthogonalize.tiles import DEFAULT_KIND, Regions, Tiles


@contextlib.contextmanager
def small_tiles(side=128, chunk=128, smallest=130):
    """Lets the kernel run from a short side on, with tiles of one side.

    Matrices of one shape must not be computed with two settings: compiled programs are kept.
    """
    before = tiles.CHIPS[DEFAULT_KIND]
    regions = {side: Regions(chunk, *6 * [1])}
    tiles.CHIPS[DEFAULT_KIND] = before._replace(
        smallest=smallest, smallest_full=smallest, sides=regions, full_sides=regions
    )
    _clear()
    try:
        yield
    finally:
        tiles.CHIPS[DEFAULT_KIND] = before
        _clear()


@contextlib.contextmanager
def small_gpu_tiles(side=32, chunk=16):
    """The same for the kernel for GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "_GPU_TILES", dict.fromkeys((2, 4), Tiles(side, chunk, chunk)))
        patch.setattr(tiles, "_SMALLEST_ON_GPU", 33)
        _clear()
        yield
    _clear()


def _clear():
    tiles.fastest.cache_clear()
    tiles.fastest_full.cache_clear()


def kernel_flops(jaxpr, names=None) -> float:
    """FLOPs of all products and of the kernels' estimates; adds the names of the kernels."""
    total = 0.0
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "pallas_call":
            total += params["cost_estimate"].flops
            if names is not None:
                names.add(params["name"])
        elif equation.primitive.name == "dot_general":
            (left, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            contracted = np.prod([shape[axis] for axis in left])
            total += 2 * contracted * np.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name == "cond":
            total += max(kernel_flops(branch.jaxpr, names) for branch in params["branches"])
        else:
            inner = [x for x in params.values() if hasattr(x, "jaxpr") or hasattr(x, "eqns")]
            total += sum(kernel_flops(getattr(x, "jaxpr", x), names) for x in inner)
    return total


def leakage(x, y):
    """‖C - diag C‖ / ‖C‖ of C = Uᵀ y V, with x = U S Vᵀ."""
    u, _, vh = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    C = u.mT @ np.asarray(y, np.float64) @ vh.mT
    off = C * (1 - np.eye(C.shape[-1]))
    return np.linalg.norm(off, axis=(-2, -1)) / np.linalg.norm(C, axis=(-2, -1))
