"""On a mesh without `shardings=`, updates are the same, and keep their shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from tests.support import reference

SHARDED = {
    "attn": {"query": {"kernel": P("x", "y", None)}, "out": {"kernel": P("y", None, "x")}},
    "bias": P("x"),
    "stack": P(None, "x", "y"),
    "w": P("x", "y"),
}
REPLICATED = jax.tree.map(lambda _: P(), SHARDED, is_leaf=lambda x: isinstance(x, P))


def _params():
    rng = np.random.default_rng(0)

    def make(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "attn": {"query": {"kernel": make(8, 2, 8)}, "out": {"kernel": make(2, 8, 8)}},
        "bias": make(8),
        "stack": make(2, 8, 16),
        "w": make(8, 16),
    }


@pytest.mark.parametrize("specs", [SHARDED, REPLICATED], ids=["sharded", "replicated"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_mesh_changes_no_update_and_no_sharding(kind, specs):
    params, tx = _params(), mc.muon(0.1, weight_decay=0.1)
    expected, _ = tx.update(params, tx.init(params), params)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )
    with jax.set_mesh(mesh):
        params = jax.device_put(params, shardings)
        state = tx.init(params)
        updates, new_state = jax.jit(tx.update)(params, state, params)
    for u, p, e in zip(*map(jax.tree.leaves, (updates, params, expected)), strict=True):
        assert u.sharding.is_equivalent_to(p.sharding, u.ndim)
        assert reference.relative_error(u, e) < 1e-5  # measured: 7e-7
    assert jax.tree.map(jax.typeof, new_state) == jax.tree.map(jax.typeof, state)
