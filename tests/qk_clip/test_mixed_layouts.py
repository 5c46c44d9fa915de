"""One model with every layout, layers without attention, stacks and boxes; also inside muonclip."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.support.attention_cases import attention, draw, same_bits

D, N = 6, 4
MLA = mc.MLALayout(nope_dim=3, rope_dim=2, value_dim=4)
LAYOUTS = {
    "three axes": mc.MultiHeadLayout(),
    "flat": mc.MultiHeadLayout(
        query="q_proj", key="k_proj", kernel="inputs (heads head_dim)", head_dim=2
    ),
    "latent": MLA,
    "latent, direct": dataclasses.replace(MLA, query="q", kernel="inputs (heads head_dim)"),
    "fused": mc.FusedQKVLayout(head_dim=2, num_kv_heads=2, order="interleaved"),
}


def kernel(seed, *shape):
    return {"kernel": draw(seed, *shape), "bias": draw(seed + 50, *shape[1:])}


def modules(seed=0):
    """One attention module of each layout, by its name."""
    return {
        "three axes": attention(N, 2, seed=seed),
        "flat": {"q_proj": kernel(seed, D, N * 2), "k_proj": kernel(seed + 1, D, 2 * 2)},
        "latent": {
            "q_a": kernel(seed, D, 3),
            "q_b": kernel(seed + 1, 3, N, 5),
            "kv_b": kernel(seed + 2, 3, N, 7),
        },
        "latent, direct": {"q": kernel(seed, D, N * 5), "kv_b": kernel(seed + 1, 3, N * 7)},
        "fused": {"qkv": kernel(seed, D, 8 * 2)},
    }


OTHERS = {
    "embed": {"embedding": draw(90, 7, D)},
    "mamba": {"in_proj": kernel(91, D, D), "key": kernel(92, D, D)},
    "moe": {"router": {"query": kernel(93, D, 2)}, "experts": kernel(94, 2, D, D)},
}
STATS = {
    name: {"max_logits": jnp.asarray([400.0 + i, 10.0, 150.0, -3.0])[None]}
    for i, name in enumerate(LAYOUTS)
}
ALL = tuple(LAYOUTS.values())


def alone(name, tree, stat):
    return mc.qk_clip(tree, {"max_logits": stat}, LAYOUTS[name])[0]


def test_mixed_layouts_clip_each_module_as_alone():
    params = {**modules(), **OTHERS}
    new, info = mc.qk_clip(params, STATS, ALL)
    for name, module in modules().items():
        chex.assert_trees_all_equal(new[name], alone(name, module, STATS[name]["max_logits"]))
    assert all(
        map(same_bits, jax.tree.leaves({n: new[n] for n in OTHERS}), jax.tree.leaves(OTHERS))
    )
    assert sorted(info.gamma) == sorted(LAYOUTS)
    assert info.clipped_heads == 2 * len(LAYOUTS)


def test_stacked_and_single_layers_of_every_layout_mix():
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(modules(seed) for seed in (0, 200)))
    params = {"params": {"first": modules(400), "blocks": {"layer": stacked}, **OTHERS}}
    twice = {name: {"max_logits": jnp.stack([s["max_logits"]] * 2)} for name, s in STATS.items()}
    stats = {"intermediates": {"first": STATS, "blocks": {"layer": twice}}}
    new, info = jax.jit(lambda p, s: mc.qk_clip(p, s, ALL))(params, stats)
    for i, seed in enumerate((0, 200)):
        for name, module in modules(seed).items():
            layer = jax.tree.map(lambda x, i=i: x[i], new["params"]["blocks"]["layer"][name])
            expected = alone(name, module, STATS[name]["max_logits"])
            chex.assert_trees_all_close(layer, expected, rtol=2e-7)
    assert info.clipped_heads == 2 * 3 * len(LAYOUTS)


def test_boxes_keep_their_names_under_every_layout():
    boxed = jax.tree.map(
        lambda x: nn.LogicallyPartitioned(x, (None, *["heads"] * (x.ndim - 1))), modules()
    )
    new, _ = mc.qk_clip(boxed, STATS, ALL)
    assert jax.tree.structure(new) == jax.tree.structure(boxed)
    plain, _ = mc.qk_clip(modules(), STATS, ALL)
    assert all(map(same_bits, jax.tree.leaves(new), jax.tree.leaves(plain)))
    assert new["fused"]["qkv"]["kernel"].names == (None, "heads")


@pytest.mark.filterwarnings("ignore:muonclip. check the optimizer of these parameters:UserWarning")
@pytest.mark.nightly
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_muonclip_equals_muon_then_qk_clip(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), {**modules(), **OTHERS})
    grads = jax.tree.map(jnp.ones_like, params)
    settings: dict = {"layout": ALL, "weight_decay": 0.0}
    updates = {}
    for threshold in (100.0, None):
        tx = mc.muonclip(0.01, threshold=threshold, **settings)
        extra = {} if threshold is None else {"max_logits": STATS}
        update = jax.jit(tx.update)
        updates[threshold], _ = update(grads, tx.init(params), params, **extra)
    actual = optax.apply_updates(params, updates[100.0])
    expected, _ = mc.qk_clip(optax.apply_updates(params, updates[None]), STATS, ALL)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, params)
    # One rounding of the sum of weight and difference, in the dtype of the weight.
    tolerance = float(jnp.finfo(dtype).eps)
    chex.assert_trees_all_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_error_lists_all_layouts_if_none_fits():
    with pytest.raises(ValueError, match="nothing to clip") as error:
        mc.qk_clip(OTHERS, {}, ALL)
    assert str(error.value).startswith("qk_clip: 1 module does not fit the layouts Multi")
    for text in ("'query' and 'key'", "'q_b' and 'kv_b'", "no module has", "or 'qkv'"):
        assert text in str(error.value)


# Upper bounds.


def test_a_bound_clips_and_is_counted():
    module = modules()["three axes"]
    exact, _ = mc.qk_clip(module, {"max_logits": STATS["flat"]["max_logits"]})
    bound, info = mc.qk_clip(module, {"max_logits_bound": (STATS["flat"]["max_logits"],)})
    assert all(map(same_bits, jax.tree.leaves(exact), jax.tree.leaves(bound)))
    assert info.bound_modules == 1


def test_a_bound_and_a_maximum_combine():
    params = {"a": modules()["three axes"], "b": modules()["three axes"]}
    stats = {
        "a": {
            "max_logits": (jnp.asarray([400.0, 1, 1, 1]),),
            "max_logits_bound": (jnp.asarray([1.0, 200, 1, 1]),),
        },
        "b": {"max_logits": (jnp.asarray([1.0, 1, 1, 1]),)},
    }
    _, info = jax.jit(mc.qk_clip)(params, stats)
    np.testing.assert_array_equal(info.max_logits["a"], [400, 200, 1, 1])
    assert info.bound_modules == 1


def test_a_bound_has_the_suffix_of_its_stat():
    module = modules()["three axes"]
    layout = mc.MultiHeadLayout(stat="s_max")
    _, info = mc.qk_clip(module, {"s_max_bound": jnp.full(N, 400.0)}, layout)
    assert (info.bound_modules, info.clipped_heads) == (1, N)
    with pytest.raises(ValueError, match="has no s_max"):
        mc.qk_clip(module, {"max_logits_bound": jnp.full(N, 400.0)}, layout)
