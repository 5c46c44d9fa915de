"""A leaf of many matrices equals its parts: docs/choosing.md beside one leaf for each matrix.

Heads are in `test_per_head.py`.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.support import reference
from tests.support.training_cases import assert_same_way, gradients

STEPS = 3
# The preset maps every singular value to nearly one, so an update shows its scale.
SETTINGS = {"learning_rate": 1.0, "ns_coeffs": "polar_express_6"}

LAST_TWO = HEAD_OF_OUT = mc.MuonDimensionNumbers(-2, -1)
PROJECTION = mc.MuonDimensionNumbers(-3, (-2, -1))
FILTER = mc.MuonDimensionNumbers((-4, -3, -2), -1)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One leaf, how it is read, and the matrices that it then is.

    Attributes:
      path: The path of the leaf.
      shape: Its shape.
      parts: Takes a leaf apart into its matrices, inputs x outputs.
      numbers: Dimension numbers of the recipe; None for what routing by role does.
      whole: Dimension numbers that take the leaf for something else, which must make a difference.
    """

    path: str
    shape: tuple[int, ...]
    parts: Callable[[np.ndarray], list[np.ndarray]]
    numbers: mc.MuonDimensionNumbers | None = None
    whole: mc.MuonDimensionNumbers = LAST_TWO

    def tree(self, leaf: Any) -> Any:
        """Puts the leaf where it is."""
        for name in reversed(self.path.split("/")):
            leaf = {name: leaf}
        return leaf

    def optimizer(self, **settings: Any) -> optax.GradientTransformationExtraArgs:
        """Builds Muon with the recipe, as the page does."""
        if self.numbers is not None:
            settings["overrides"] = {self.path: self.numbers}
        return mc.muon(**settings)


def _slices(axes):
    """Takes a leaf apart along some axes, in which each position is a matrix of what is left."""
    return lambda x: list(np.moveaxis(x, axes, range(len(axes))).reshape(-1, *_left(x, axes)))


def _left(x, axes):
    return [n for axis, n in enumerate(x.shape) if axis not in axes]


def _fused(x):
    return [x[:, i].reshape(len(x), -1) for i in range(3)]


# Widths are such that a part and the full matrix have different scales.
RECIPES = {
    "output per head": Recipe(
        "attn/out/kernel",
        (3, 4, 24),
        _slices((0,)),
        HEAD_OF_OUT,
        whole=mc.MuonDimensionNumbers((-3, -2), -1),
    ),
    "projection of another name, whole": Recipe(
        "attn/q_proj/kernel", (6, 3, 8), lambda x: [x.reshape(6, 24)], PROJECTION
    ),
    "scan-stacked": Recipe(
        "up/kernel", (3, 6, 16), _slices((0,)), whole=mc.MuonDimensionNumbers((0, 1), 2)
    ),
    "experts": Recipe(
        "experts/down",
        (2, 3, 8, 16),
        _slices((0, 1)),
        whole=mc.MuonDimensionNumbers((0, 1, 2), 3),
    ),
    "convolution by position": Recipe(
        "Conv_0/kernel", (3, 2, 6, 16), _slices((0, 1)), LAST_TWO, whole=FILTER
    ),
    "convolution by filter": Recipe(
        "Conv_0/kernel", (3, 2, 6, 16), lambda x: [x.reshape(36, 16)], FILTER
    ),
    "fused": Recipe(
        "attn/qkv/kernel",
        (12, 3, 4, 5),
        _fused,
        mc.MuonDimensionNumbers(-4, (-2, -1)),
        whole=mc.MuonDimensionNumbers(-4, (-3, -2, -1)),
    ),
    "fused gate and up": Recipe(
        "wi/kernel",
        (6, 2, 16),
        _slices((1,)),
        mc.MuonDimensionNumbers(-3, -1),
        whole=PROJECTION,
    ),
}

every_recipe = pytest.mark.parametrize("name", RECIPES)


def _updates(tx, params, trees):
    """Updates of each step, jitted."""
    state, found, update = tx.init(params), [], jax.jit(tx.update)
    for g in trees:
        u, state = update(g, state, params)
        found.append(u)
    return found


def _together(recipe):
    """Updates of the leaf in each step, taken apart."""
    params = recipe.tree(jnp.ones(recipe.shape))
    trees = [recipe.tree(g) for g in gradients(recipe.shape, STEPS)]
    found = _updates(recipe.optimizer(**SETTINGS), params, trees)
    return [recipe.parts(np.asarray(jax.tree.leaves(u)[0])) for u in found]


@functools.cache
def _alone(name):
    """Updates of the parts in each step, each part a leaf of its own."""
    recipe = RECIPES[name]
    trees = [dict(enumerate(recipe.parts(g))) for g in gradients(recipe.shape, STEPS)]
    params = jax.tree.map(jnp.ones_like, trees[0])
    found = _updates(mc.muon(**SETTINGS), params, trees)
    return [[np.asarray(u[i]) for i in sorted(u)] for u in found]


def _largest_error(got, expected):
    """Of all parts in all steps; relative Frobenius."""
    return max(
        reference.relative_error(a, b)
        for a_step, b_step in zip(got, expected, strict=True)
        for a, b in zip(a_step, b_step, strict=True)
    )


@every_recipe
def test_a_split_leaf_equals_its_parts_as_leaves_in_direction_and_scale(name):
    got = _together(RECIPES[name])
    # Measured: 0 on CPU, where every matrix is worked on alone.
    assert _largest_error(got, _alone(name)) < 1e-5
    for part in itertools.chain.from_iterable(got):
        n_in, n_out = part.shape
        largest = np.linalg.svd(part, compute_uv=False)[0]
        # Singular values of 1e-3 of the norm and more arrive in 0.950 .. 1.001.
        np.testing.assert_allclose(largest, np.sqrt(max(1.0, n_out / n_in)), rtol=0.02)


@every_recipe
def test_other_dimension_numbers_give_another_update(name):
    """The mutant of the test above: a leaf that is not split, or not so, does not pass it."""
    recipe = RECIPES[name]
    got = _together(dataclasses.replace(recipe, numbers=recipe.whole))
    assert _largest_error(got, _alone(name)) > 0.1


@pytest.mark.parametrize("name", ["experts", "fused"])
def test_a_split_leaf_follows_the_float64_reference(name):
    recipe = RECIPES[name]
    leaves = gradients(recipe.shape, STEPS)
    tx = recipe.optimizer(learning_rate=0.1, weight_decay=0.3, consistent_rms=0.2)
    start = np.random.default_rng(9).normal(size=recipe.shape).astype(np.float32)
    params, state, update = recipe.tree(start), tx.init(recipe.tree(start)), jax.jit(tx.update)
    got = []
    for g in leaves:
        updates, state = update(recipe.tree(g), state, params)
        params = optax.apply_updates(params, updates)
        got.append(recipe.parts(np.asarray(jax.tree.leaves(params)[0])))
    columns = zip(recipe.parts(start), *map(recipe.parts, leaves), strict=True)
    for i, (w, *g) in enumerate(columns):
        expected = reference.muon(w, g, learning_rate=0.1, weight_decay=0.3, consistent_rms=0.2)
        assert_same_way([step[i] for step in got], expected, w)
