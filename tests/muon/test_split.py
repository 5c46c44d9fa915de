"""A split leaf equals its parts: the recipes of docs/choosing.md beside one leaf for each matrix.

The functions of the page are used as they stand there.
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
from tests.support.pages import run_page
from tests.support.training_cases import assert_same_way, gradients

PAGE = run_page("choosing.md")
STEPS = 3
# The preset takes every singular value near one, so that the scale of an update can be read off it.
SETTINGS = {"learning_rate": 1.0, "ns_coeffs": "polar_express_6"}

LAST_TWO = HEAD_OF_OUT = mc.MuonDimensionNumbers(-2, -1)
HEAD = mc.MuonDimensionNumbers(-3, -1)
PROJECTION = mc.MuonDimensionNumbers(-3, (-2, -1))
FILTER = mc.MuonDimensionNumbers((-4, -3, -2), -1)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One leaf, how it is read, and the matrices that it then is.

    Attributes:
      path: Where the leaf is.
      shape: Its shape.
      parts: Takes a leaf apart into its matrices, inputs x outputs.
      numbers: Dimension numbers of the recipe; None for what routing by role does.
      views: Views and inverses of the recipe, for flat kernels.
      whole: Dimension numbers that take the leaf for something else, which must make a difference.
    """

    path: str
    shape: tuple[int, ...]
    parts: Callable[[np.ndarray], list[np.ndarray]]
    numbers: mc.MuonDimensionNumbers | None = None
    views: tuple[dict[str, Any], dict[str, Any]] | None = None
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
        tx = mc.muon(**settings)
        return tx if self.views is None else PAGE["through"](*self.views, tx)


def _slices(axes):
    """Takes a leaf apart along some axes, in which each position is a matrix of what is left."""
    return lambda x: list(np.moveaxis(x, axes, range(len(axes))).reshape(-1, *_left(x, axes)))


def _left(x, axes):
    return [n for axis, n in enumerate(x.shape) if axis not in axes]


def _fused(x):
    return [x[:, i].reshape(len(x), -1) for i in range(3)]


def _flat_fused(x):
    """Query, key and value of 8 query heads and 2 key heads, 16 wide."""
    return [x[:, :128], x[:, 128:160], x[:, 160:]]


def _flat_heads(width):
    return lambda x: [x[:, i : i + width] for i in range(0, x.shape[1], width)]


def _view_of_heads(path, width):
    """The page's view of `q_b`, for a kernel of another name and width."""
    heads_apart = lambda x: jnp.moveaxis(x.reshape(*x.shape[:-1], -1, width), -2, -3)  # noqa: E731
    return {path: heads_apart}, {path: PAGE["inverses"]["q_b/kernel"]}


# Widths are such that the scale of a part is not that of the whole.
RECIPES = {
    "query per head": Recipe("attn/query/kernel", (6, 3, 8), _slices((1,)), HEAD, whole=PROJECTION),
    "key per head, fewer heads": Recipe(
        "attn/key/kernel", (6, 2, 8), _slices((1,)), HEAD, whole=PROJECTION
    ),
    "value per head, scanned": Recipe(
        "attn/value/kernel", (2, 6, 3, 8), _slices((0, 2)), HEAD, whole=PROJECTION
    ),
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
    "fused, per head": Recipe(
        "attn/qkv/kernel",
        (6, 3, 2, 8),
        _slices((1, 2)),
        mc.MuonDimensionNumbers(-4, -1),
        whole=mc.MuonDimensionNumbers(-4, (-2, -1)),
    ),
    "fused gate and up": Recipe(
        "wi/kernel",
        (6, 2, 16),
        _slices((1,)),
        mc.MuonDimensionNumbers(-3, -1),
        whole=PROJECTION,
    ),
    "flat fused, grouped queries": Recipe(
        "attn/qkv/kernel", (24, 192), _flat_fused, views=(PAGE["views"], PAGE["inverses"])
    ),
    "flat per head": Recipe(
        "attn/q_proj/kernel",
        (6, 24),
        _flat_heads(8),
        LAST_TWO,
        views=_view_of_heads("q_proj/kernel", 8),
    ),
    "up-projection of MLA": Recipe("attn/kv_b/kernel", (6, 3, 8), _slices((1,)), HEAD),
    "flat up-projection of MLA": Recipe(
        "attn/q_b/kernel",
        (12, 96),
        _flat_heads(24),
        LAST_TWO,
        views=(PAGE["views"], PAGE["inverses"]),
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
    got = _together(dataclasses.replace(recipe, numbers=recipe.whole, views=None))
    assert _largest_error(got, _alone(name)) > 0.1


@pytest.mark.parametrize("name", ["query per head", "flat fused, grouped queries"])
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
