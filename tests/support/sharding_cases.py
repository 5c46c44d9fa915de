"""Meshes, and leaves of every kind that are sharded over them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax._orthogonalize.dimension_numbers import matrix_axes
from muonclip_jax._orthogonalize.newton_schulz import Orthogonalizer
from muonclip_jax._sharding.plan import plan_for
from tests.support import reference

NAMES = ("x", "y", "z")
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
# One step of Newton-Schulz instead of five: what is tested is what goes where.
ONE_STEP = ((1.5, -0.5, 0.1),)
DEAR = 1e-9  # FLOPs with the cost of a byte
each_kind = pytest.mark.parametrize("kind", KINDS)


def make_mesh(sizes, kind="explicit"):
    """Makes a mesh of the axes x, y, z, one per size."""
    return jax.make_mesh(sizes, NAMES[: len(sizes)], axis_types=(KINDS[kind],) * len(sizes))


def on(mesh, spec):
    """Keeps of a spec what this mesh has: P(("x", "z"), "y") is P("x") on the mesh of x alone."""
    entries = (e if isinstance(e, tuple) else (e,) for e in spec)
    kept = (tuple(name for name in names if name in mesh.axis_names) for names in entries)
    return P(*(names or None for names in kept))


@pytest.fixture(autouse=True)
def no_rematerialization(capfd):
    """XLA prints it on file descriptor 2 when it gathers an array to reshard it."""
    yield
    assert "rematerialization" not in capfd.readouterr().err


class Leaf(NamedTuple):
    """A leaf of the test trees: its shape, its sharding, and the axes of its matrices."""

    shape: tuple[int, ...]
    spec: P
    numbers: mc.MuonDimensionNumbers = mc.MuonDimensionNumbers(-2, -1)


def draw(leaves, seed=0, dtype=jnp.float32):
    """Draws an array for each leaf of a tree."""
    rng = np.random.default_rng(seed)

    def normal(leaf):
        x = rng.normal(size=leaf.shape)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            x = x + 1j * rng.normal(size=leaf.shape)
        # Rounded by NumPy: JAX would compile a conversion for each shape.
        return jnp.asarray(x.astype(dtype), dtype)

    return jax.tree.map(normal, leaves, is_leaf=is_leaf)


def shardings_of(mesh, leaves):
    """Returns the sharding of each leaf of a tree."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, on(mesh, leaf.spec)), leaves, is_leaf=is_leaf
    )


def numbers_of(leaves):
    """Returns the axes of the matrices of each leaf."""
    return jax.tree.map(lambda leaf: leaf.numbers, leaves, is_leaf=is_leaf)


def is_leaf(x):
    return isinstance(x, Leaf)


def assert_close(got, expected, tolerance):
    """Compares each leaf by the norm of its error."""
    errors = jax.tree.map(reference.relative_error, got, expected)
    flat = jax.tree_util.tree_leaves_with_path(errors)
    bad = {jax.tree_util.keystr(path): e for path, e in flat if not e < tolerance}
    assert bad == {}


def planned(leaves, mesh):
    """Plans leaves on an Explicit mesh, with the default settings."""

    def shape_of(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=sharding)

    tree = jax.tree.map(shape_of, leaves, shardings_of(mesh, leaves), is_leaf=is_leaf)
    axes = matrix_axes("test", tree, numbers_of(leaves))
    orthogonalize = Orthogonalizer(mc.ns_coefficients("jordan"))
    found = []
    jax.eval_shape(lambda tree: found.append(plan_for("test", tree, axes, {}, orthogonalize)), tree)
    return found[0]


def work(m, n, dtype):
    """Ten products of an m x m and an m x n matrix, as three steps of the standard method."""
    del dtype
    return 20.0 * m * m * n
