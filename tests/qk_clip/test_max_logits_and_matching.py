"""Max logits of all shapes and sources, and parameters in all containers."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import muonclip_jax as mc
from tests.support.attention_cases import N, attention, draw, same_bits


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_all_calls_of_a_module_count(order):
    calls = jnp.asarray([[50.0, 400.0]]), jnp.asarray([[200.0, 50.0], [10.0, 20.0], [0.0, 0.0]])
    params = attention(2)
    stats = {"max_logits": tuple(calls[i] for i in order)}
    _, info = mc.qk_clip(params, stats)
    np.testing.assert_array_equal(info.max_logits[""], [200, 400])


@pytest.mark.parametrize("entry", [(N,), (3, N), (N, N), (2, 3, N), (0, N)])
def test_every_axis_but_the_heads_is_reduced(entry):
    stat = draw(7, *entry)
    _, info = mc.qk_clip(attention(), {"max_logits": stat})
    expected = np.max(np.asarray(stat).reshape(-1, N), axis=0, initial=-np.inf)
    np.testing.assert_array_equal(info.max_logits[""], expected)


def test_nan_in_one_row_of_the_batch_leaves_that_head_alone():
    stat = jnp.asarray([[400.0, 400.0], [jnp.nan, 1.0]])
    params = attention(2)
    new, info = mc.qk_clip(params, {"max_logits": stat})
    np.testing.assert_array_equal(info.gamma[""], [1, 0.25])
    assert same_bits(new["query"]["kernel"][:, 0], params["query"]["kernel"][:, 0])
    assert info.nonfinite_heads == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_bfloat16_and_float16_max_logits_are_read(dtype, strict_promotion):
    _, info = mc.qk_clip(attention(2), {"max_logits": jnp.asarray([[200, 50]], dtype)})
    np.testing.assert_array_equal(info.gamma[""], [0.5, 1])
    assert info.gamma[""].dtype == jnp.float32


def test_two_layers_keep_their_own_max_logits():
    params = {
        "layers_1": attention(1),
        "layers_10": attention(1),
        "enc": {"layers_1": attention(1)},
    }
    stats = {
        "enc": {"layers_1": {"max_logits": jnp.asarray([200.0])}},
        "layers_10": {"max_logits": jnp.asarray([400.0])},
        "layers_1": {"max_logits": jnp.asarray([100.0])},
    }
    new, info = mc.qk_clip(params, stats)
    assert {path: float(g[0]) for path, g in info.gamma.items()} == {
        "layers_1": 1.0,
        "layers_10": 0.25,
        "enc/layers_1": 0.5,
    }
    np.testing.assert_array_equal(
        new["layers_10"]["query"]["kernel"], params["layers_10"]["query"]["kernel"] / 2
    )


def test_micro_batches_merge_by_the_maximum():
    batches = [{"max_logits": (jnp.asarray([s, 50.0]),)} for s in (50.0, 400.0, 50.0, 50.0)]
    joined = batches[0]
    for batch in batches[1:]:
        joined = mc.merge_max_logits(joined, batch)
    _, info = mc.qk_clip(attention(2), joined)
    np.testing.assert_array_equal(info.gamma[""], [0.25, 1])  # a sum would be 550 and 200


def test_micro_batches_merge_under_a_scan():
    stacked = {"max_logits": (jnp.asarray([[50.0, 1.0], [400.0, jnp.nan], [50.0, 3.0]]),)}
    first = jax.tree.map(lambda x: x[0], stacked)
    rest = jax.tree.map(lambda x: x[1:], stacked)
    joined, _ = jax.lax.scan(lambda a, b: (mc.merge_max_logits(a, b), None), first, rest)
    np.testing.assert_array_equal(joined["max_logits"][0], [400, np.nan])


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("s", [400.0, np.nan])
def test_where_false_changes_no_bit(traced, s):
    params, stats = attention(1), {"max_logits": jnp.asarray([s])}
    if traced:
        new, info = jax.jit(lambda where: mc.qk_clip(params, stats, where=where))(
            jnp.asarray(False)
        )
    else:
        new, info = mc.qk_clip(params, stats, where=False)
    assert all(map(same_bits, jax.tree.leaves(params), jax.tree.leaves(new)))
    assert info.min_gamma == 1
    assert info.clipped_heads == 0
    np.testing.assert_array_equal(info.max_logits[""], [s])


def test_equal_max_logits_twice_clip_twice():
    old, stats = attention(1), {"max_logits": jnp.asarray([400.0])}
    new, _ = mc.qk_clip(mc.qk_clip(old, stats)[0], stats)
    np.testing.assert_array_equal(new["query"]["kernel"], old["query"]["kernel"] / 4)


@pytest.mark.parametrize("wrap_params", [False, True])
@pytest.mark.parametrize("wrap_stats", [False, True])
def test_root_keys_are_kept(wrap_params, wrap_stats):
    params, stats = {"attn": attention(1)}, {"attn": {"max_logits": (jnp.asarray([400.0]),)}}
    plain, _ = mc.qk_clip(params, stats)
    wrapped = {"params": params, "batch_stats": {"x": jnp.ones(3)}} if wrap_params else params
    stats = {"intermediates": stats, "losses": jnp.ones(2)} if wrap_stats else stats
    new, info = mc.qk_clip(wrapped, stats)
    assert list(info.gamma) == ["attn"]
    chex.assert_trees_all_equal(new["params"] if wrap_params else new, plain)
    assert not same_bits(plain["attn"]["key"]["kernel"], params["attn"]["key"]["kernel"])
    assert jax.tree.structure(new) == jax.tree.structure(wrapped)


def test_other_collections_are_neither_read_nor_changed():
    params, stats = {"attn": attention(1)}, {"attn": {"max_logits": jnp.asarray([400.0])}}
    variables = {"params": params, "average": params}
    old = {"attn": {"max_logits": jnp.asarray([1e6])}}
    new, info = mc.qk_clip(variables, {"intermediates": stats, "earlier": old})
    np.testing.assert_array_equal(info.gamma["attn"], [0.25])
    assert all(map(same_bits, jax.tree.leaves(new["average"]), jax.tree.leaves(params)))


def test_containers_keep_their_types():
    layers = [{"attn": attention(1)}, ({"attn": attention(1)}, {"norm": {"scale": jnp.ones(3)}})]
    params = freeze({"layers": layers})
    calls = [{"attn": {"max_logits": jnp.asarray([s])}} for s in (400.0, 200.0)]
    stats = {"layers": {"0": calls[0], "1": {"0": calls[1]}}}
    new, info = mc.qk_clip(params, stats)
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert {path: float(g[0]) for path, g in info.gamma.items()} == {
        "layers/0/attn": 0.25,
        "layers/1/0/attn": 0.5,
    }


def test_boxes_keep_their_names():
    params: dict[str, Any] = attention(2)
    params["query"]["kernel"] = nn.LogicallyPartitioned(params["query"]["kernel"], ("d", "n", "h"))
    new, _ = mc.qk_clip(params, {"max_logits": jnp.asarray([400.0, 400.0])})
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert new["query"]["kernel"].names == ("d", "n", "h")
    np.testing.assert_array_equal(new["query"]["kernel"].value, params["query"]["kernel"].value / 2)


def test_nnx_state_stays_nnx_state():
    class Model(nnx.Module):
        def __init__(self):
            attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
            self.layers = nnx.List([attn])

    state = nnx.state(Model(), nnx.Param)
    new, info = mc.qk_clip(state, {"layers": {"0": {"max_logits": jnp.asarray([400.0, 1.0])}}})
    assert jax.tree.structure(new) == jax.tree.structure(state)
    np.testing.assert_array_equal(info.gamma["layers/0"], [0.25, 1])
    pure, pure_new = nnx.to_pure_dict(state), nnx.to_pure_dict(new)
    key, new_key = (tree["layers"][0]["key"]["kernel"] for tree in (pure, pure_new))
    np.testing.assert_array_equal(new_key[:, 0], key[:, 0] / 2)


def test_other_modules_need_no_max_logits():
    params = {
        "attn": attention(1),
        "router": {"query": {"kernel": jnp.ones((3, 4))}},
        "mamba": {"in": {"kernel": jnp.ones((3, 4))}, "key": jnp.ones(3)},
    }
    stats = {"attn": {"max_logits": jnp.asarray([1.0]), "attention_weights": jnp.ones((2, 2))}}
    new, _ = mc.qk_clip(params, {**stats, "mlp": {"activations": jnp.ones(3)}})
    chex.assert_trees_all_equal(new, params)
