"""The recipes of docs/recipes.md, on trees with the names and shapes that the frameworks have."""

import math

import jax
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support.pages import OPTIONAL, run_page

PAGE = "recipes.md"
D, L, N, K, H, F, V, E = 16, 3, 4, 2, 8, 24, 32, 5  # width, layers, heads, key heads, ...
Q_RANK, KV_RANK = 12, 7


def tree(shapes):
    """Nested dicts of arrays out of {path: shape}."""
    result, rng = {}, np.random.default_rng(0)
    for path, shape in shapes.items():
        *folders, name = path.split("/")
        place = result
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = rng.normal(size=shape).astype(np.float32)
    return result


def matrices(params, numbers=None, **arguments):
    """By path, "adamw" or the matrices of a leaf: how many, inputs, outputs."""
    rows = mc.routing_table(params, numbers, **arguments).rows
    return {r.path: r.optimizer if r.optimizer == "adamw" else tuple(r)[3:6] for r in rows}


def clipped_heads(params, stats, layout):
    _, info = jax.jit(lambda p, s: mc.qk_clip(p, s, layout))(params, stats)
    return info.clipped_heads




# --- Loops of one's own ---------------------------------------------------------------------------


def test_the_loops_of_the_page_train_and_see_every_head():
    page = run_page(PAGE)
    metrics = page["metrics"]
    assert 4.0 < metrics["loss"] < 7.0  # random bytes: log 256 is 5.5
    assert math.isfinite(metrics["qk_clip/max_logit"])
    assert metrics["qk_clip/clipped_heads"] == metrics["qk_clip/skipped_modules"] == 0


@pytest.mark.parametrize("package", OPTIONAL)
def test_the_loops_of_other_libraries_train_and_see_every_head(package):
    pytest.importorskip(package)
    metrics = run_page(PAGE)[f"{package}_metrics"]
    assert 4.0 < metrics["loss"] < 7.0
    assert math.isfinite(metrics["qk_clip/max_logit"])
    assert metrics["qk_clip/clipped_heads"] == metrics["qk_clip/skipped_modules"] == 0
