"""Queries and keys that are written in parts, as `x.at[..., :3].set(y)` does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.program.test_hard_cases import check, logits64, project, tops
from tests.support.program_attention import PARAMS, X


def at_set(q, start):
    new = jnp.zeros_like(q).at[..., :3].set(q[..., :3])
    return new.at[..., start:].set(q[..., start:])


def update_slice(q, start):
    new = jax.lax.dynamic_update_slice(jnp.zeros_like(q), q[..., :3], (0, 0, 0, 0))
    return jax.lax.dynamic_update_slice(new, q[..., start:], (0, 0, 0, start))


def overwritten(q, start):
    return q.at[..., start:].set(0.0)


def model(write, start):
    def fn(p, x):
        q, k, v = project(p, x)
        logits = jnp.einsum("bthk,bshk->bhts", write(q, start), k)
        return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits), v).sum()

    return fn


@pytest.mark.parametrize(
    ("write", "start", "columns"),
    [(at_set, 3, range(8)), (update_slice, 5, (0, 1, 2, 5, 6, 7)), (overwritten, 6, range(6))],
)
def test_queries_written_in_parts(write, start, columns):
    fn = model(write, start)
    kept = np.isin(np.arange(8), columns)
    exact = PARAMS | {"q": PARAMS["q"] * kept}
    check(fn, PARAMS, (X,), tops(logits64(exact, X, False)), grads=write is at_set)
    analysis = mc.analyze(fn, PARAMS, X)
    (site,) = analysis.attention
    assert (site.num_heads, site.query, site.faults) == (4, ("q",), ())
    _, stats = mc.with_max_logits(fn, expect=1)(PARAMS, X)
    clipped, _ = mc.qk_clip(PARAMS, stats, analysis, threshold=0.1)
    exact = clipped | {"q": clipped["q"] * kept}
    np.testing.assert_allclose(tops(logits64(exact, X, False)), 0.1, rtol=1e-5)


def test_a_write_at_an_index_that_is_data_raises():
    def fn(p, x, start):
        return model(update_slice, start)(p, x)

    def update_slice(q, start):
        return jax.lax.dynamic_update_slice(q, q[..., :3], (0, 0, 0, start))

    with pytest.raises(ValueError, match="dynamic_update_slice, which has no rule"):
        mc.with_max_logits(fn, expect=1)(PARAMS, X, jnp.int32(2))


def test_a_function_that_is_applied_to_a_part_raises():
    fn = model(lambda q, start: q.at[..., start:].apply(jnp.sin), 3)
    with pytest.raises(ValueError, match="scatter, which has no rule"):
        mc.with_max_logits(fn, expect=1)(PARAMS, X)
