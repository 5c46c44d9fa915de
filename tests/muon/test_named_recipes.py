"""Every row of "Which call" in docs/choosing.md, on all parameters, against a float64 reference."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support import reference
from tests.support.by_day import by_day
from tests.support.pages import run_page, table
from tests.support.per_head_cases import FLAT, NAMES, Kernel, as_one, both, by_head, kernel
from tests.support.training_cases import assert_same_way, gradients

STEPS, LR, HEADS = 3, 0.05, 2
DEEPSEEK = (reference.JORDAN,) * 8 + ((2.0, -1.5, 0.5),) * 2


class Recipe(NamedTuple):
    """The reference of a row.

    Attributes:
      matrix: Arguments of `reference.muon`.
      vector: Arguments of `reference.adamw`.
      split: The projections of which each head is a matrix: of `mla` or `mha`.
      clips: Whether a head above the threshold is clipped.
    """

    matrix: dict[str, Any]
    vector: dict[str, Any]
    split: str = ""
    clips: bool = False


DECAY = {"weight_decay": 0.1}
K2 = {"nesterov": None, "consistent_rms": 0.2, **DECAY}
V4 = {"nesterov": "plain", "consistent_rms": 0.18, "rows": DEEPSEEK, **DECAY}
RECIPES = {
    "optax's Muon, drop-in": Recipe({"nesterov": "optax"}, {"nesterov": True}),
    "Kimi K2": Recipe(K2, DECAY, clips=True),
    "the same without the clip": Recipe(K2, DECAY),
    "Kimi K3": Recipe(K2, DECAY, "mla", clips=True),
    "GLM-5": Recipe(K2, DECAY, "mla"),
    "Keller Jordan, exact from step 1": Recipe({"nesterov": "plain", "learning_rate": 0.02}, {}),
    "Moonlight": Recipe({"nesterov": "plain", "consistent_rms": 0.2, **DECAY}, DECAY),
    "DeepSeek-V4": Recipe(V4, DECAY),
    "DeepSeek-V4.1, matrices": Recipe(V4, DECAY, "mha"),
}
# `test_muon.py` follows the others by day.
BY_DAY = "Kimi K2", "Kimi K3", "GLM-5", "DeepSeek-V4", "DeepSeek-V4.1, matrices"
CALLS = {name: call.strip("`") for name, call, *_ in table("choosing.md", "calls")}

# The page's MLA: 128 nope, 64 rope and 128 value columns of a head.
NOPE, ROPE, VALUE = 128, 64, 128
THREE = "inputs heads head_dim"
# Path, pattern and sizes of each projection, and the parts of a head that are matrices.
PROJECTIONS = {
    "mha/query/kernel": (THREE, (6, HEADS, 3), [slice(None)]),
    "mha/key/kernel": (THREE, (6, HEADS, 3), [slice(None)]),
    "mla/q_b_proj/kernel": (FLAT, (30, HEADS, NOPE + ROPE), [slice(None)]),
    "mla/kv_b_proj/kernel": (FLAT, (24, HEADS, NOPE + VALUE), [slice(NOPE), slice(NOPE, None)]),
}
WHOLE = {
    "mha/value/kernel": kernel(THREE, NAMES, (6, HEADS, 3), as_one()),  # not in the page's layout
    "up/kernel": Kernel((6, 9), [np.arange(54).reshape(6, 9)]),
}
VECTORS = {"embed/embedding": (11, 6), "up/bias": (9,), "norm/scale": (6,)}
# The kernels that a clip with γ = 1/4 of the first head scales, and the factors.
CLIPPED = {
    "mha/query/kernel": [(slice(None), 0.5)],
    "mha/key/kernel": [(slice(None), 0.5)],
    "mla/q_b_proj/kernel": [(slice(NOPE), 0.5), (slice(NOPE, None), 0.25)],
    "mla/kv_b_proj/kernel": [(slice(NOPE), 0.5)],
}


def _kernels(split):
    """All matrix leaves by path, with the positions of their matrices."""
    found = dict(WHOLE)
    for path, (pattern, sizes, parts) in PROJECTIONS.items():
        is_split = path.split("/")[0] == split
        matrices = both(*map(by_head, parts)) if is_split else as_one()
        found[path] = kernel(pattern, NAMES, sizes, matrices)
    return found


def _factors(path, shape, module):
    """The factors of a clip of the first head of a module."""
    factors = np.ones(shape)
    if path.split("/")[0] == module and path in CLIPPED:
        pattern, sizes, _ = PROJECTIONS[path]
        for part, factor in CLIPPED[path]:
            first, *_ = kernel(pattern, NAMES, sizes, by_head(part)).matrices
            factors.ravel()[first] = factor
    return factors


def _tree(flat):
    tree: Any = {}
    for path, x in flat.items():
        node = tree
        *parents, name = path.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = x
    return tree


def _trained(call, shapes, stats):
    """Starts, gradients, and parameters after each step, by path."""
    rng = np.random.default_rng(9)
    start = {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    grads = {p: gradients(shape, STEPS, seed=i) for i, (p, shape) in enumerate(shapes.items())}
    tx = eval(call, {**run_page("choosing.md"), "lr": LR})
    params, update = _tree(start), jax.jit(tx.update)
    state, seen = tx.init(params), []
    for t in range(STEPS):
        given = _tree({path: g[t] for path, g in grads.items()})
        updates, state = update(given, state, params, **stats)
        params = optax.apply_updates(params, updates)
        leaves = jax.tree_util.tree_leaves_with_path(params)
        seen.append(
            {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in leaves}
        )
    return start, grads, seen


def _matrix_way(w, grads, matrices, factors, settings):
    """A leaf after each step: Muon of each matrix, its decay, then the clip."""
    rate, decay = settings.get("learning_rate", LR), settings.get("weight_decay", 0.0)
    others = {k: v for k, v in settings.items() if k not in ("learning_rate", "weight_decay")}
    moves = [np.zeros(w.size) for _ in range(STEPS)]
    for positions in matrices:
        g = [x.ravel()[positions] for x in grads]
        still = np.zeros(positions.shape)
        sums = [still, *reference.muon(still, g, learning_rate=rate, **others)]
        for t in range(STEPS):
            moves[t][positions] = sums[t + 1] - sums[t]
    way, w = [], w.astype(np.float64)
    for move in moves:
        w = factors * (w * (1 - rate * decay) + move.reshape(w.shape))
        way.append(w)
    return way


def test_every_row_has_a_recipe():
    assert CALLS.keys() == RECIPES.keys()


@pytest.mark.parametrize("name", by_day([*RECIPES], *BY_DAY))
def test_all_leaves_follow_the_named_recipe(name):
    recipe = RECIPES[name]
    kernels = _kernels(recipe.split)
    module = "mla" if recipe.split == "mla" else "mha"
    stats = {"max_logits": {module: {"max_logits": jnp.array([400.0, 7.0])}}}
    shapes = {**{path: k.shape for path, k in kernels.items()}, **VECTORS}
    start, grads, seen = _trained(CALLS[name], shapes, stats if recipe.clips else {})
    for path in shapes:
        if path in VECTORS:
            way = reference.adamw(start[path], grads[path], learning_rate=LR, **recipe.vector)
        else:
            factors = _factors(path, shapes[path], module if recipe.clips else None)
            matrices = kernels[path].matrices
            way = _matrix_way(start[path], grads[path], matrices, factors, recipe.matrix)
        assert_same_way([x[path] for x in seen], way, start[path])
