"""Programs whose clip could be silently wrong: exact, or an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.program.test_hard_cases import logits64, project, tops
from tests.support.program_attention import PARAMS, X, array, attend, found


def clip_error(fn, params, *args):
    analysis = mc.analyze(fn, params, *args)
    _, stats = found(fn, params, *args, expect=sum(s.num_layers for s in analysis.attention))
    with pytest.raises(ValueError, match="do not fit") as error:
        mc.qk_clip(params, stats, analysis, threshold=0.01)
    return str(error.value)


def test_queries_and_keys_of_one_kernel():
    def fn(p, x):
        return attend(p | {"q": p["k"]}, x)

    assert "queries and keys share its elements" in clip_error(fn, {n: PARAMS[n] for n in "kvo"}, X)


def test_keys_of_two_attentions():
    def fn(p, x):
        return attend(p | p["a"], x) + attend(p | p["b"], x * 0.5)

    params = {n: PARAMS[n] for n in "kvo"} | {"a": {"q": array(16, 4, 8)}, "b": {"q": PARAMS["q"]}}
    assert "shares elements of k" in clip_error(fn, params, X)


def test_normalized_kernels():
    def fn(p, x):
        return attend(p | {"q": p["q"] / jnp.linalg.norm(p["q"])}, x)

    assert "div is applied to queries, keys or their kernels" in clip_error(fn, PARAMS, X)


def test_one_module_called_twice_is_clipped_once():
    def fn(p, x):
        return attend(p, x) + attend(p, 2.0 * x)

    analysis = mc.analyze(fn, PARAMS, X)
    _, stats = found(fn, PARAMS, X, expect=2)
    clipped, info = mc.qk_clip(PARAMS, stats, analysis, threshold=0.1)
    assert len(info.gamma) == 1
    top = tops(logits64(clipped, 2.0 * np.float64(X), False))
    np.testing.assert_allclose(top, 0.1, rtol=1e-5)


def test_adapters_added_to_a_kernel():
    params = PARAMS | {"a": array(16, 3), "b": array(3, 4, 8)}

    def merged(p):
        return p | {"q": p["q"] + jnp.einsum("dr,rhk->dhk", p["a"], p["b"])}

    def fn(p, x):
        return attend(merged(p), x)

    analysis = mc.analyze(fn, params, X)
    _, stats = found(fn, params, X)
    clipped, _ = mc.qk_clip(params, stats, analysis, threshold=0.1)
    np.testing.assert_allclose(tops(logits64(merged(clipped), X, False)), 0.1, rtol=1e-4)
    assert (clipped["a"] == params["a"]).all()


def test_positions_that_heads_share():
    params = PARAMS | {"pos": array(6, 8)}

    def keys(p, x, einsum=jnp.einsum):
        return einsum("btd,dhk->bthk", x, p["k"]) + p["pos"][None, :, None]

    def fn(p, x):
        q, _, v = project(p, x)
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, keys(p, x)))
        return jnp.einsum("bhts,bshk->bthk", weights, v).sum()

    analysis = mc.analyze(fn, params, X)
    _, stats = found(fn, params, X)
    clipped, info = mc.qk_clip(params, stats, analysis, threshold=0.1)
    q = np.einsum("btd,dhk->bthk", np.float64(X), np.float64(clipped["q"]))
    logits = np.einsum("bthk,bshk->bhts", q, np.asarray(keys(clipped, X)))
    np.testing.assert_allclose(tops(logits), 0.1, rtol=1e-4)
    assert (clipped["pos"] == params["pos"]).all()
    assert info.clipped_heads == 4


@pytest.mark.parametrize(
    "normalize",
    [
        lambda u: 0.3 * u / jnp.sqrt((u**2).mean(-1, keepdims=True)),
        lambda u: u / jnp.linalg.norm(u, axis=-1, keepdims=True),
        lambda u: u / jnp.maximum(jnp.abs(u).max(-1, keepdims=True), 1e-6),
        lambda u: jax.nn.standardize(u),
        lambda u: u * (1.0 / (jnp.sqrt((u.astype(jnp.float32) ** 2).sum(-1)) + 1e-6))[..., None],
    ],
    ids=["rms", "l2", "max", "standardized", "reciprocal"],
)
def test_queries_that_are_normalized(normalize):
    def fn(p, x):
        q, k, v = project(p, x)
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", normalize(q) * 2.0, k))
        return jnp.einsum("bhts,bshk->bthk", weights, v).sum()

    params = {n: PARAMS[n] for n in "qkv"}
    assert mc.analyze(fn, params, X).attention[0].qk_norm
    assert "normalized after their projection" in clip_error(fn, params, X)


def test_queries_that_gate_themselves():
    def fn(p, x):
        q, k, v = project(p, x)
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", jax.nn.silu(q), k))
        return jnp.einsum("bhts,bshk->bthk", weights, v).sum()

    assert "mul is applied to queries" in clip_error(fn, {n: PARAMS[n] for n in "qkv"}, X)


def test_scales_by_position_are_no_norm():
    def fn(p, x, positions):
        q, k, v = project(p, x)
        q = q * jnp.cos(positions)[..., None, None]
        q = q * jnp.log(positions + 2.0)[..., None, None]
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        return jnp.einsum("bhts,bshk->bthk", weights, v).sum()

    positions = jnp.broadcast_to(jnp.arange(6.0), (2, 6))
    (site,) = mc.analyze(fn, {n: PARAMS[n] for n in "qkv"}, X, positions).attention
    assert not site.faults
    assert not site.qk_norm
