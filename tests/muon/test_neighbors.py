"""The behavior of optax that docs/comparison.md describes; it must follow a newer optax."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import muonclip_jax as mc

pytestmark = pytest.mark.skipif(
    optax.__version__ != "0.2.8", reason="docs/comparison.md is about optax 0.2.8"
)
G = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, size=(8, 16)), jnp.float32)


def _update(muon, g):
    tx = muon(1.0)
    return np.asarray(tx.update({"w": g}, tx.init({"w": g}), {"w": g})[0]["w"])


def test_a_large_gradient_stops_optax_and_not_muon():
    assert not np.any(_update(contrib.muon, G * 1e19))
    np.testing.assert_allclose(
        _update(mc.muon, G * 1e19), _update(mc.muon, G), rtol=1e-4, atol=1e-5
    )


def test_one_nan_spoils_its_matrix_in_both():
    for muon in (contrib.muon, mc.muon):
        assert np.all(np.isnan(_update(muon, G.at[0, 0].set(jnp.nan))))


def _muon_leaves(muon, params):
    mu = muon(0.1).init(params).inner_states["muon"].inner_state[0].mu
    return {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(mu)}


def test_optax_assigns_embeddings_and_stacked_layers_by_rank():
    params = {"embed": {"embedding": jnp.ones((9, 4))}, "up": {"kernel": jnp.ones((2, 4, 8))}}
    assert _muon_leaves(contrib.muon, params) == {"['embed']['embedding']"}
    assert _muon_leaves(mc.muon, params) == {"['up']['kernel']"}


@pytest.mark.parametrize("tree", [{"w": G}, [G]])
def test_scale_by_muon_of_optax_fails_on_pytrees(tree):
    with pytest.raises(ValueError, match=r"structure|Expected"):
        contrib.scale_by_muon().update(tree, contrib.scale_by_muon().init(tree))
    mc.scale_by_muon().update(tree, mc.scale_by_muon().init(tree))
