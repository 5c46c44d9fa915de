"""Max logits of `flax.linen` modules, from a forward pass to the clip."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.support import reference_attention as reference
from tests.support.attention_cases import draw
from tests.support.flax_cases import X, apply, linen_attention, recomputed, run

MASKS = {
    "none": lambda: None,
    "causal, float32": lambda: nn.make_causal_mask(X[..., 0]),
    "boolean": lambda: nn.make_causal_mask(X[..., 0], dtype=bool),
    "two axes": lambda: jnp.tri(7),
}


@pytest.mark.parametrize("mask", MASKS)
def test_output_and_gradients_equal_flax_bit_for_bit(mask):
    mask = MASKS[mask]()
    ours, theirs = linen_attention(), nn.MultiHeadDotProductAttention(num_heads=2)
    variables = ours.init(jax.random.key(0), X)
    chex.assert_trees_all_equal(variables, theirs.init(jax.random.key(0), X))

    def loss(variables, module, **settings):
        out, state = module.apply(variables, X, mask=mask, mutable=["intermediates"], **settings)
        return jnp.sum(out**2), (out, state)

    gradient = jax.grad(loss, has_aux=True)
    grads, (out, state) = gradient(variables, ours, sow_weights=True)
    expected_grads, (expected, _) = gradient(variables, theirs)
    np.testing.assert_array_equal(out, expected)
    chex.assert_trees_all_equal(grads, expected_grads)
    assert list(state["intermediates"]) == ["max_logits"]  # not attention_weights


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("block_size", [512, 3])
def test_max_logits_equal_float64(mask, block_size):
    mask = MASKS[mask]()
    module = linen_attention()
    if block_size != 512:
        attention_fn = functools.partial(mc.linen.attention_fn, block_size=block_size)
        module = module.clone(attention_fn=attention_fn)
    variables = module.init(jax.random.key(0), X)
    _, stats = apply(module, variables, X, mask=mask)
    visible = None if mask is None else np.asarray(mask, bool)
    expected = recomputed(variables["params"], X, mask=visible)
    (max_logits,) = stats["max_logits"]
    np.testing.assert_allclose(max_logits, expected, rtol=2e-6)


def test_dropout_equals_flax_and_keeps_max_logits():
    settings = {"dropout_rate": 0.5, "deterministic": False}
    ours, theirs = (
        linen_attention(**settings),
        nn.MultiHeadDotProductAttention(num_heads=2, **settings),
    )
    variables = ours.init(jax.random.key(0), X)
    rngs = {"dropout": jax.random.key(1)}
    out, stats = apply(ours, variables, X, rngs=rngs)
    np.testing.assert_array_equal(out, theirs.apply(variables, X, rngs=rngs))
    expected = recomputed(variables["params"], X)
    np.testing.assert_allclose(stats["max_logits"][0], expected, rtol=2e-6)


def test_bfloat16_computation_gives_float32_max_logits():
    module = linen_attention(dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), X)
    out, stats = apply(module, variables, X)
    theirs = nn.MultiHeadDotProductAttention(num_heads=2, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(out, theirs.apply(variables, X))
    (max_logits,) = stats["max_logits"]
    assert max_logits.dtype == jnp.float32
    # 8 bits in queries and keys; measured 6e-3.
    np.testing.assert_allclose(max_logits, recomputed(variables["params"], X), rtol=2e-2)


def test_several_batch_axes_become_one():
    x = draw(1, 2, 3, 5, 8)
    mask = (
        jnp.asarray(np.random.default_rng(2).random((2, 1, 1, 5, 5)) < 0.5)
        | jnp.eye(5, dtype=bool)[None, None, None]
    )
    module = linen_attention()
    variables = module.init(jax.random.key(0), x)
    out, stats = apply(module, variables, x, mask=mask)
    np.testing.assert_array_equal(
        out, nn.MultiHeadDotProductAttention(num_heads=2).apply(variables, x, mask=mask)
    )
    full = np.broadcast_to(mask, (2, 3, 1, 5, 5)).reshape(6, 1, 5, 5)
    expected = recomputed(variables["params"], x.reshape(6, 5, 8), mask=full)
    np.testing.assert_allclose(stats["max_logits"][0], expected, rtol=2e-6)


def test_shared_keys_equal_jax_nn():
    query, key, value = draw(1, 3, 7, 4, 8), draw(2, 3, 7, 2, 8), draw(3, 3, 7, 2, 8)
    bias = draw(4, 1, 4, 7, 7)
    out = mc.linen.attention_fn(query, key, value, bias=bias)
    expected = jax.nn.dot_product_attention(query, key, value, bias=bias)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_bias_is_part_of_the_max_logits():
    class Biased(nn.Module):
        @nn.compact
        def __call__(self, q, bias):
            return mc.linen.attention_fn(q, q, q, bias=bias, module=self)

    q, bias = draw(1, 3, 7, 2, 8), 10 * draw(4, 1, 2, 7, 7)
    _, stats = run(Biased(), {}, q, bias)
    expected = reference.max_logits(q, q, bias=bias)
    np.testing.assert_allclose(stats["max_logits"][0], expected, rtol=2e-6)


def test_clip_raises_without_sow_weights():
    module = linen_attention()
    variables = module.init(jax.random.key(0), X)
    _, state = module.apply(variables, X, mutable=["intermediates"])
    with pytest.raises(
        ValueError, match="with `attention_fn` is called without `sow_weights=True`"
    ):
        mc.qk_clip(variables["params"], state)


def test_init_stores_no_max_logits():
    variables = linen_attention().init(jax.random.key(0), X, sow_weights=True)
    assert list(variables) == ["params"]


def test_evaluation_computes_no_max_logits():
    module = linen_attention()
    variables = module.init(jax.random.key(0), X)

    def products(**settings):
        jaxpr = jax.make_jaxpr(lambda v: module.apply(v, X, sow_weights=True, **settings))(
            variables
        )
        return str(jaxpr).count("dot_general[")

    assert products(mutable=["intermediates"]) == products() + 1


@pytest.mark.parametrize("name", ["max_logits", "s_max"])
@pytest.mark.parametrize("collection", ["intermediates", "stats"])
def test_sow_uses_the_given_name_and_collection(name, collection):
    class Sower(nn.Module):
        @nn.compact
        def __call__(self, x):
            return mc.linen.sow_max_logits(self, x, name=name, collection=collection)

    result: Any = Sower().apply({}, jnp.ones((3, 2)), mutable=[collection])
    stored, state = result
    assert stored
    assert state[collection][name][0].shape == (3, 2)
    assert not Sower().apply({}, jnp.ones((3, 2)))


def test_qk_norm_of_flax_raises():
    module = linen_attention(normalize_qk=True)
    variables = module.init(jax.random.key(0), X)
    _, stats = apply(module, variables, X)
    with pytest.raises(ValueError, match="'query_ln' normalizes queries or keys"):
        mc.qk_clip(variables["params"], stats)


def test_clip_bounds_the_logits_under_adamw():
    """The loss rewards queries and keys that agree."""
    tau = 4.0
    module = linen_attention(qkv_features=16)
    params = module.init(jax.random.key(0), X)["params"]
    optimizer = optax.adamw(0.015)

    def loss_fn(params):
        _, state = module.apply({"params": params}, X, sow_weights=True, mutable=["intermediates"])
        query, key = (jnp.einsum("btd,dnh->btnh", X, params[n]["kernel"]) for n in ("query", "key"))
        return -jnp.mean(jnp.sum(query * key, axis=-1)), state["intermediates"]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, clip):
        (_, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        params, info = mc.qk_clip(params, stats, threshold=tau, where=clip)
        return params, state, info.max_logit

    def largest_of_20_steps(clip):
        trained, state, maxima = params, optimizer.init(params), []
        for _ in range(20):
            trained, state, largest = step(trained, state, jnp.asarray(clip))
            maxima.append(float(largest))
        return max(maxima)

    assert largest_of_20_steps(clip=False) > 2 * tau
    assert tau < largest_of_20_steps(clip=True) < 1.2 * tau
