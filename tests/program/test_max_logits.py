"""`with_max_logits` against logits recorded in float64, and against the plain function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support import program_models_more  # noqa: F401 - adds families
from tests.support.program_models import FAMILIES

NAMES = [name for name in sorted(FAMILIES) if FAMILIES[name].sites]


def recorded(family):
    """Records the logits of a model in float64, and reduces them to `[layers * heads]` by path."""

    @jax.jit
    def run(params, *args):
        found = {}

        def tap(path, logits):
            assert logits.dtype == jnp.float64
            top = jnp.max(logits, axis=(0, -2, -1)).reshape(-1)
            found.setdefault(path, []).append(top)

        family.fn(params, *args, tap=tap)
        return {path: jnp.concatenate(tops) for path, tops in found.items()}

    with jax.enable_x64(True):
        wide = [a if a.dtype.kind == "i" else np.float64(a) for a in family.args]
        return run(jax.tree.map(np.float64, family.params()), *wide)


def by_path(stats, path):
    for part in path.split("/") if path else ():
        stats = stats[part]
    return stats["max_logits"]


@pytest.mark.parametrize("name", NAMES)
def test_max_logits_loss_and_gradients(name):
    family = FAMILIES[name]
    params = family.params()
    count = sum(site[3] for site in family.sites.values())
    fn = mc.with_max_logits(family.fn, expect=count)
    (loss, stats), grads = jax.jit(jax.value_and_grad(fn, has_aux=True))(params, *family.args)
    plain = jax.jit(jax.value_and_grad(family.fn))(params, *family.args)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), (loss, grads), plain))
    expected = recorded(family)
    assert expected.keys() == family.sites.keys()
    for path, (heads, _, _, num_layers, *_) in family.sites.items():
        x = by_path(stats, path)
        assert x.dtype == jnp.float32
        assert x.shape[-1] == heads
        stack = x.shape[:1] if num_layers > 1 else ()
        x = np.asarray(x).reshape(*stack, -1, heads).max(-2).reshape(-1)
        np.testing.assert_allclose(x, expected[path], rtol=2e-5, atol=1e-5)
