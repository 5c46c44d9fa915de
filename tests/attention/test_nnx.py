"""Max logits of `flax.nnx` modules, from a forward pass to the clip."""

import functools
from typing import Any

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import muonclip_jax as mc
from tests.support import reference_attention as reference
from tests.support.attention_cases import draw, same_bits
from tests.support.flax_cases import X, capture, nnx_attention, recomputed
from tests.support.strict import needs_capture

sown = functools.partial(capture, sow_weights=True)


@pytest.mark.parametrize("caller", ["sow_max_logits", "attention_fn"])
def test_older_flax_raises_on_use_and_not_at_import(monkeypatch, caller):
    monkeypatch.delattr(nnx, "capture", raising=False)
    module = nnx_attention()
    module(X)  # without max logits nothing is missing
    use = {
        "sow_max_logits": lambda: mc.nnx.sow_max_logits(module, jnp.ones((3, 2))),
        "attention_fn": lambda: module(X, sow_weights=True),
    }
    with pytest.raises(ImportError) as error:
        use[caller]()
    assert str(error.value).startswith(f"nnx.{caller}: Flax {flax.__version__} has no nnx.capture")
    assert "pip install 'flax>=0.12.6'" in str(error.value)
    assert "nnx.pop(model, nnx.Intermediate)" in str(error.value)


# Newer Flax suggests nnx.capture instead.
@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_max_logits_popped_from_intermediates_clip_with_any_flax():
    class Attention(nnx.Module):
        def __init__(self, rngs):
            self.query = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
            self.key = nnx.LinearGeneral(8, (2, 4), rngs=rngs)

        def __call__(self, x):
            max_logits = mc.max_attention_logit(self.query(x), self.key(x))
            self.sow(nnx.Intermediate, "max_logits", max_logits)
            return max_logits

    model = Attention(nnx.Rngs(0))
    before = np.max(model(X), axis=0)
    stats = nnx.pop(model, nnx.Intermediate)
    threshold = float(np.sort(before)[0] + 1e-3)
    params, info = mc.qk_clip(nnx.state(model, nnx.Param), stats, threshold=threshold)
    nnx.update(model, params)
    assert info.clipped_heads == 1
    after = np.max(model(X), axis=0)
    np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=1e-5)


flax_attention = functools.partial(nnx_attention, attention_fn=nnx.dot_product_attention)


def weights(module):
    """The parameters as nested dicts of arrays."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


class Direct(nnx.Module):
    """Hands queries, keys and values to the attention function as they are."""

    def __call__(self, *args, **settings):
        return mc.nnx.attention_fn(*args, module=self, **settings)


MASKS = {
    "none": None,
    "causal, float32": nnx.make_causal_mask(X[..., 0]),
    "boolean": nnx.make_causal_mask(X[..., 0], dtype=jnp.bool_),
}


@pytest.mark.parametrize("mask", MASKS)
def test_output_and_gradients_equal_flax_bit_for_bit(mask):
    def loss(module, **settings):
        out = module(X, mask=MASKS[mask], **settings)
        return jnp.sum(out**2), out

    def with_capture(module):
        (loss_, out), stats = sown(lambda m, **settings: loss(m, **settings), module)
        return loss_, (out, stats)

    grads, (out, stats) = nnx.grad(with_capture, has_aux=True)(nnx_attention())
    expected_grads, expected = nnx.grad(loss, has_aux=True)(flax_attention())
    np.testing.assert_array_equal(out, expected)
    chex.assert_trees_all_equal(nnx.to_pure_dict(grads), nnx.to_pure_dict(expected_grads))
    assert list(stats) == ["max_logits"]  # not attention_weights


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("block_size", [512, 3])
def test_max_logits_equal_float64(mask, block_size):
    attention_fn = functools.partial(mc.nnx.attention_fn, block_size=block_size)
    module = nnx_attention(attention_fn=attention_fn)
    _, stats = sown(module, X, mask=MASKS[mask])
    visible = None if MASKS[mask] is None else np.asarray(MASKS[mask], bool)
    (max_logits,) = stats["max_logits"].get_value()
    np.testing.assert_allclose(max_logits, recomputed(weights(module), X, mask=visible), rtol=2e-6)


def test_is_causal_equals_flax():
    q, k, v = draw(1, 3, 7, 2, 8), draw(2, 3, 5, 2, 8), draw(3, 3, 5, 2, 8)
    k = k.at[:, -1].multiply(9)  # the last key, which few queries see
    out, stats = capture(Direct(), q, k, v, is_causal=True)
    np.testing.assert_array_equal(out, nnx.dot_product_attention(q, k, v, is_causal=True))
    expected = reference.max_logits(q, k, is_causal=True)
    assert np.any(expected < reference.max_logits(q, k))
    np.testing.assert_allclose(stats["max_logits"][0], expected, rtol=2e-6)


def test_dropout_equals_flax_and_keeps_max_logits():
    settings = {"dropout_rate": 0.5, "deterministic": False}
    module = nnx_attention(nnx.Rngs(0, dropout=1), **settings)
    out, stats = sown(module, X)
    np.testing.assert_array_equal(out, flax_attention(nnx.Rngs(0, dropout=1), **settings)(X))
    np.testing.assert_allclose(stats["max_logits"][0], recomputed(weights(module), X), rtol=2e-6)


def test_bfloat16_computation_gives_float32_max_logits():
    module = nnx_attention(dtype=jnp.bfloat16)
    out, stats = sown(module, X)
    np.testing.assert_array_equal(out, flax_attention(dtype=jnp.bfloat16)(X))
    (max_logits,) = stats["max_logits"].get_value()
    assert max_logits.dtype == jnp.float32
    # 8 bits in queries and keys; measured 6e-3.
    np.testing.assert_allclose(max_logits, recomputed(weights(module), X), rtol=2e-2)


def test_max_logits_use_the_given_promotion():
    def to_bfloat16(arrays, *, dtype=None):
        del dtype
        return tuple(x.astype(jnp.bfloat16) for x in arrays)

    q = draw(1, 3, 7, 2, 8)
    out, stats = capture(Direct(), q, q, q, promote_dtype=to_bfloat16)
    np.testing.assert_array_equal(out, nnx.dot_product_attention(q, q, q, dtype=jnp.bfloat16))
    narrow = q.astype(jnp.bfloat16)
    expected = reference.max_logits(narrow, narrow)
    np.testing.assert_allclose(stats["max_logits"][0], expected, rtol=2e-6)


def test_several_batch_axes_become_one():
    x = draw(1, 2, 3, 5, 8)
    mask = np.asarray(draw(2, 2, 3, 1, 5, 5)) > 0
    module = nnx_attention()
    out, stats = sown(module, x, mask=jnp.asarray(mask))
    np.testing.assert_array_equal(out, flax_attention()(x, mask=jnp.asarray(mask)))
    expected = recomputed(weights(module), x.reshape(6, 5, 8), mask=mask.reshape(6, 1, 5, 5))
    np.testing.assert_allclose(stats["max_logits"][0], expected, rtol=2e-6)


def test_shared_keys_and_bias_equal_flax():
    q, k, v = draw(1, 3, 7, 4, 8), draw(2, 3, 7, 2, 8), draw(3, 3, 7, 2, 8)
    bias = 10 * draw(4, 1, 4, 7, 7)
    out, stats = capture(Direct(), q, k, v, bias=bias)
    np.testing.assert_array_equal(out, nnx.dot_product_attention(q, k, v, bias=bias))
    expected = reference.max_logits(q, k, bias=bias)
    np.testing.assert_allclose(stats["max_logits"][0], expected, rtol=2e-6)


def test_clip_raises_without_sow_weights():
    module = nnx_attention()
    _, stats = capture(module, X)
    with pytest.raises(ValueError, match=r"in NNX, when no `nnx[.]capture"):
        mc.qk_clip(nnx.state(module, nnx.Param), stats)


@needs_capture
@pytest.mark.parametrize("types", [(), (nnx.Intermediate,)])
def test_without_a_capture_nothing_is_stored(types):
    class Model(nnx.Module):
        def __init__(self):
            self.attn = nnx_attention()
            self.stored = None

        def __call__(self, x):
            self.stored = mc.nnx.sow_max_logits(self, jnp.ones((3, 2)))
            return self.attn(x, sow_weights=True)

    model = Model()
    before = jax.tree.structure(nnx.state(model))
    out = nnx.capture(model, *types)(X) if types else model(X)
    assert not jax.tree.leaves(out[1] if types else ())
    assert model.stored is False
    assert jax.tree.structure(nnx.state(model)) == before


@needs_capture
def test_capture_beside_intermediates():
    class Model(nnx.Module):
        def __call__(self, x):
            self.sow(nnx.Intermediate, "features", x)
            return mc.nnx.sow_max_logits(self, x)

    forward: Any = nnx.capture(Model(), mc.nnx.MaxLogits, nnx.Intermediate)
    _, stats, others = forward(jnp.ones((3, 2)))
    assert (list(stats), list(others)) == (["max_logits"], ["features"])


@pytest.mark.parametrize("name", ["max_logits", "s_max"])
def test_sow_uses_the_given_name(name):
    class Sower(nnx.Module):
        def __call__(self, x):
            return mc.nnx.sow_max_logits(self, x, name=name)

    stored, stats = capture(Sower(), jnp.ones((3, 2)))
    assert stored
    assert stats[name][0].shape == (3, 2)


def test_qk_norm_of_flax_raises():
    module = nnx_attention(normalize_qk=True)
    _, stats = sown(module, X)
    with pytest.raises(ValueError, match="'query_ln' normalizes queries or keys"):
        mc.qk_clip(nnx.state(module, nnx.Param), stats)


@pytest.mark.parametrize("pure", [False, True])
def test_update_accepts_the_clipped_state(pure):
    module = nnx_attention()
    _, stats = sown(module, X)
    params = nnx.state(module, nnx.Param)
    before = weights(module)
    if pure:
        new, info = mc.qk_clip(before, nnx.to_pure_dict(stats), threshold=0.1)
    else:
        new, info = mc.qk_clip(params, stats, threshold=0.1)
        assert jax.tree.structure(new) == jax.tree.structure(params)
        assert isinstance(new, nnx.State)
    assert info.clipped_heads == 2
    chex.assert_trees_all_equal(weights(module), before)  # nothing changes in place
    nnx.update(module, new)
    chex.assert_trees_all_equal(weights(module), new if pure else nnx.to_pure_dict(new))
    assert same_bits(module.value.kernel[...], before["value"]["kernel"])
    root = np.sqrt(0.1 / np.max(recomputed(before, X), axis=0))[:, None]
    expected = np.asarray(before["query"]["kernel"]) * root
    np.testing.assert_allclose(module.query.kernel[...], expected, rtol=1e-6)


def test_a_leaf_named_value_is_no_variable():
    """`value` is the attribute of a variable and a name of value projections."""

    class Attention(nnx.Module):
        def __init__(self):
            self.query, self.key, self.value = (nnx.Param(draw(i, 8, 2, 4)) for i in range(3))

        def __call__(self, x):
            query, key = (jnp.einsum("btd,dnh->btnh", x, w[...]) for w in (self.query, self.key))
            mc.nnx.sow_max_logits(self, mc.max_attention_logit(query, key))

    module = Attention()
    _, stats = capture(module, X)
    layout = mc.MultiHeadLayout(query="value", key="key", kept_leaves=("lora_a", "query"))
    for params in (nnx.state(module), nnx.to_pure_dict(nnx.state(module))):
        new, info = mc.qk_clip(params, stats, layout, threshold=0.1)
        assert info.clipped_heads == 2
        assert not same_bits(jax.tree.leaves(new["value"])[0], module.value[...])
        assert same_bits(jax.tree.leaves(new["query"])[0], module.query[...])


TAU, OPTIMIZER = 4.0, optax.adamw(0.015)


def loss_fn(model):
    """Rewards queries and keys that agree."""
    _, stats = sown(model, X)
    query, key = (jnp.einsum("btd,dnh->btnh", X, m.kernel[...]) for m in (model.query, model.key))
    return -jnp.mean(jnp.sum(query * key, axis=-1)), stats


def with_optax(model):
    """The step on a split model."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, opt_state, clip):
        def loss(params):
            return loss_fn(nnx.merge(graphdef, params, rest))

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        params, info = mc.qk_clip(params, stats, threshold=TAU, where=clip)
        return params, opt_state, info.max_logit

    opt_state = OPTIMIZER.init(params)

    def run(clip):
        nonlocal params, opt_state
        params, opt_state, largest_logit = step(params, opt_state, clip)
        return largest_logit

    return run


def clip_in_place(model, stats, clip):
    params, info = mc.qk_clip(nnx.state(model, nnx.Param), stats, threshold=TAU, where=clip)
    nnx.update(model, params)
    return info.max_logit


def with_optimizer(model):
    """The step with `nnx.Optimizer`."""

    @nnx.jit
    def step(model, optimizer, clip):
        grads, stats = nnx.grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads)
        return clip_in_place(model, stats, clip)

    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)
    return lambda clip: step(model, optimizer, clip)


def with_model_and_optimizer(model):
    """The step with `nnx.ModelAndOptimizer`."""

    @nnx.jit
    def step(optimizer, clip):
        grads, stats = nnx.grad(loss_fn, has_aux=True)(optimizer.model)
        optimizer.update(grads)
        return clip_in_place(optimizer.model, stats, clip)

    optimizer = nnx.ModelAndOptimizer(model, OPTIMIZER, wrt=nnx.Param)
    return lambda clip: step(optimizer, clip)


@pytest.mark.parametrize("recipe", [with_optax, with_optimizer, with_model_and_optimizer])
def test_clip_bounds_the_logits_under_adamw(recipe):
    def largest_of_20_steps(clip):
        step = recipe(nnx_attention(qkv_features=16))
        return max(float(step(jnp.asarray(clip))) for _ in range(20))

    assert largest_of_20_steps(clip=False) > 2 * TAU
    assert TAU < largest_of_20_steps(clip=True) < 1.2 * TAU
