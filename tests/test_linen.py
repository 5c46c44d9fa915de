"""Statistics out of `flax.linen` modules, and the whole way from a forward pass to the clip."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
import reference_attention as reference
from attention_cases import draw

X = draw(0, 3, 7, 8)


def flax_attention(**settings):
    return nn.MultiHeadDotProductAttention(
        num_heads=2, attention_fn=mc.linen.attention_fn, **settings
    )


def recomputed(params, x, **settings):
    """The largest logits of a `nn.MultiHeadDotProductAttention`, in float64."""
    query, key = (
        reference.project(x, params[n]["kernel"], params[n]["kernel"].shape[1], params[n]["bias"])
        for n in ("query", "key")
    )
    return reference.max_logits(query, key, **settings)


def run(module, variables, *args, **settings) -> tuple[Any, Any]:
    """Applies a module; gives its output and what it sowed."""
    out, state = module.apply(variables, *args, mutable=["intermediates"], **settings)
    return out, state.get("intermediates", {})


apply = functools.partial(run, sow_weights=True)


MASKS = {
    "none": lambda: None,
    "causal, float32": lambda: nn.make_causal_mask(X[..., 0]),
    "boolean": lambda: nn.make_causal_mask(X[..., 0], dtype=bool),
    "two axes": lambda: jnp.tri(7),
}


@pytest.mark.parametrize("mask", MASKS)
def test_output_and_gradients_are_those_of_flax_bit_for_bit(mask):
    mask = MASKS[mask]()
    ours, theirs = flax_attention(), nn.MultiHeadDotProductAttention(num_heads=2)
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
def test_statistic_equals_float64(mask, block_size):
    mask = MASKS[mask]()
    module = flax_attention()
    if block_size != 512:
        attention_fn = functools.partial(mc.linen.attention_fn, block_size=block_size)
        module = module.clone(attention_fn=attention_fn)
    variables = module.init(jax.random.key(0), X)
    _, stats = apply(module, variables, X, mask=mask)
    visible = None if mask is None else np.asarray(mask, bool)
    expected = recomputed(variables["params"], X, mask=visible)
    (statistic,) = stats["max_logits"]
    np.testing.assert_allclose(statistic, expected, rtol=2e-6)


def test_dropout_is_that_of_flax_and_leaves_the_statistic_alone():
    settings = {"dropout_rate": 0.5, "deterministic": False}
    ours, theirs = (
        flax_attention(**settings),
        nn.MultiHeadDotProductAttention(num_heads=2, **settings),
    )
    variables = ours.init(jax.random.key(0), X)
    rngs = {"dropout": jax.random.key(1)}
    out, stats = apply(ours, variables, X, rngs=rngs)
    np.testing.assert_array_equal(out, theirs.apply(variables, X, rngs=rngs))
    expected = recomputed(variables["params"], X)
    np.testing.assert_allclose(stats["max_logits"][0], expected, rtol=2e-6)


def test_narrow_computation_gives_a_float32_statistic():
    module = flax_attention(dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), X)
    out, stats = apply(module, variables, X)
    theirs = nn.MultiHeadDotProductAttention(num_heads=2, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(out, theirs.apply(variables, X))
    (statistic,) = stats["max_logits"]
    assert statistic.dtype == jnp.float32
    # 8 bits in queries and keys; measured 6e-3.
    np.testing.assert_allclose(statistic, recomputed(variables["params"], X), rtol=2e-2)


def test_several_batch_axes_become_one():
    x = draw(1, 2, 3, 5, 8)
    mask = (
        jnp.asarray(np.random.default_rng(2).random((2, 1, 1, 5, 5)) < 0.5)
        | jnp.eye(5, dtype=bool)[None, None, None]
    )
    module = flax_attention()
    variables = module.init(jax.random.key(0), x)
    out, stats = apply(module, variables, x, mask=mask)
    np.testing.assert_array_equal(
        out, nn.MultiHeadDotProductAttention(num_heads=2).apply(variables, x, mask=mask)
    )
    full = np.broadcast_to(mask, (2, 3, 1, 5, 5)).reshape(6, 1, 5, 5)
    expected = recomputed(variables["params"], x.reshape(6, 5, 8), mask=full)
    np.testing.assert_allclose(stats["max_logits"][0], expected, rtol=2e-6)


def test_shared_keys_give_the_output_of_jax_nn():
    query, key, value = draw(1, 3, 7, 4, 8), draw(2, 3, 7, 2, 8), draw(3, 3, 7, 2, 8)
    bias = draw(4, 1, 4, 7, 7)
    out = mc.linen.attention_fn(query, key, value, bias=bias)
    expected = jax.nn.dot_product_attention(query, key, value, bias=bias)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_bias_counts():
    class Biased(nn.Module):
        @nn.compact
        def __call__(self, q, bias):
            return mc.linen.attention_fn(q, q, q, bias=bias, module=self)

    q, bias = draw(1, 3, 7, 2, 8), 10 * draw(4, 1, 2, 7, 7)
    _, stats = run(Biased(), {}, q, bias)
    expected = reference.max_logits(q, q, bias=bias)
    np.testing.assert_allclose(stats["max_logits"][0], expected, rtol=2e-6)


def test_without_sow_weights_nothing_is_sown_and_the_clip_says_why():
    module = flax_attention()
    variables = module.init(jax.random.key(0), X)
    _, state = module.apply(variables, X, mutable=["intermediates"])
    with pytest.raises(ValueError, match="was called without `sow_weights=True`"):
        mc.qk_clip(variables["params"], state)


def test_init_stores_no_statistic():
    variables = flax_attention().init(jax.random.key(0), X, sow_weights=True)
    assert list(variables) == ["params"]


def test_evaluation_does_not_pay_for_the_statistic():
    module = flax_attention()
    variables = module.init(jax.random.key(0), X)

    def products(**settings):
        jaxpr = jax.make_jaxpr(lambda v: module.apply(v, X, sow_weights=True, **settings))(
            variables
        )
        return str(jaxpr).count("dot_general[")

    assert products(mutable=["intermediates"]) == products() + 1


@pytest.mark.parametrize("name", ["max_logits", "s_max"])
@pytest.mark.parametrize("collection", ["intermediates", "stats"])
def test_sown_under_the_name_and_in_the_collection_that_are_asked_for(name, collection):
    class Sower(nn.Module):
        @nn.compact
        def __call__(self, x):
            return mc.linen.sow_max_logits(self, x, name=name, collection=collection)

    result: Any = Sower().apply({}, jnp.ones((3, 2)), mutable=[collection])
    stored, state = result
    assert stored
    assert state[collection][name][0].shape == (3, 2)
    assert not Sower().apply({}, jnp.ones((3, 2)))


class Block(nn.Module):
    """One residual attention block, in the form that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _=None):
        return x + flax_attention(name="attn")(x, sow_weights=True), None


def scanned(length, **variable_axes):
    return nn.scan(
        Block,
        variable_axes={"params": 0, **variable_axes},
        split_rngs={"params": True},
        length=length,
    )


@pytest.mark.parametrize("stat_axis", [0, 1])
def test_scanned_layers_equal_a_loop_over_layers(stat_axis):
    model = scanned(3, intermediates=stat_axis)()
    params = model.init(jax.random.key(0), X)["params"]
    _, state = model.apply({"params": params}, X, mutable=["intermediates"])
    layout = mc.MultiHeadLayout(stat_stack_axis=stat_axis)
    x, alone, maxima = X, [], []
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        (x, _), sown = run(Block(), {"params": layer}, x)
        maxima.append(sown["attn"]["max_logits"][0].max(0))
    tau = float(np.median(np.asarray(maxima)))
    new, info = mc.qk_clip(params, state["intermediates"], layout, threshold=tau)
    np.testing.assert_allclose(info.max_logits["attn"], maxima, rtol=1e-5)
    for i in range(3):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        alone.append(mc.qk_clip(layer, {"attn": {"max_logits": maxima[i]}}, threshold=tau)[0])
    expected = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
    chex.assert_trees_all_close(new, expected, rtol=1e-6)
    assert 0 < info.clipped_heads < 6


def test_scan_that_drops_the_statistics_is_an_error_and_not_a_silent_skip():
    model = scanned(3)()
    variables = model.init(jax.random.key(0), X)
    _, state = model.apply(variables, X, mutable=["intermediates"])
    with pytest.raises(ValueError, match=r"`variable_axes` of `nn\.scan`"):
        mc.qk_clip(variables["params"], state.get("intermediates", {}))


def test_a_module_called_twice_counts_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            attn = flax_attention(name="attn")
            return attn(10 * x, sow_weights=True) + attn(x, sow_weights=True)

    model = Twice()
    params = model.init(jax.random.key(0), X)["params"]
    _, stats = run(model, {"params": params}, X)
    assert len(stats["attn"]["max_logits"]) == 2
    _, info = mc.qk_clip(params, stats)
    expected = [recomputed(params["attn"], scale * np.asarray(X)).max(0) for scale in (10, 1)]
    np.testing.assert_allclose(info.max_logits["attn"], np.max(expected, axis=0), rtol=1e-5)


def test_remat_sows_the_same():
    class Model(nn.Module):
        block: type[nn.Module]

        @nn.compact
        def __call__(self, x):
            return self.block(name="block")(x)[0]

    plain, remat = Model(Block), Model(nn.remat(Block))
    variables = plain.init(jax.random.key(0), X)

    def loss(variables, model):
        out, state = model.apply(variables, X, mutable=["intermediates"])
        return jnp.sum(out**2), state

    chex.assert_trees_all_close(
        jax.grad(loss, has_aux=True)(variables, plain),
        jax.grad(loss, has_aux=True)(variables, remat),
        rtol=1e-5,
        # The gradient of a key bias is exactly zero, since softmax ignores it: noise of 8e-7.
        atol=2e-6,
    )


def test_qk_norm_of_flax_is_refused():
    module = flax_attention(normalize_qk=True)
    variables = module.init(jax.random.key(0), X)
    _, stats = apply(module, variables, X)
    with pytest.raises(ValueError, match="'query_ln' undoes the clip"):
        mc.qk_clip(variables["params"], stats)


def test_clip_holds_the_logits_that_adamw_drives_up():
    """The loss rewards queries and keys that agree."""
    tau = 4.0
    module = flax_attention(qkv_features=16)
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


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batch_gives_the_same_clip_with_one_all_reduce(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    model = scanned(3, intermediates=0)()
    x = draw(5, 8, 7, 8)
    params = model.init(jax.random.key(0), x)["params"]

    def clip(params, x):
        _, state = model.apply({"params": params}, x, mutable=["intermediates"])
        return mc.qk_clip(params, state, threshold=1.0)

    expected, expected_info = jax.jit(clip)(params, x)
    assert expected_info.clipped_heads > 0
    with jax.set_mesh(mesh):
        replicated = jax.device_put(params, NamedSharding(mesh, P()))
        sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
        new, info = jax.jit(clip)(replicated, sharded)
        text = str(jax.jit(clip).lower(replicated, sharded).compile().as_text())
    chex.assert_trees_all_close(new, expected, rtol=1e-5)
    chex.assert_trees_all_close(info, expected_info, rtol=1e-5)
    for leaf in jax.tree.leaves(new):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len({shard.tobytes() for shard in shards}) == 1
    assert text.count(" all-reduce(") + text.count(" all-reduce-start(") == 1
    assert "all-gather" not in text
