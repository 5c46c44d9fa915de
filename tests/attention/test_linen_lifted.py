"""Max logits under Linen's lifted transforms, boxes and sharding, and the clip by them."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze, unfreeze
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compiled import collectives
from tests.support.attention_cases import draw
from tests.support.by_day import at_night
from tests.support.flax_cases import X, largest, linen_attention, run


class Block(nn.Module):
    """One residual attention block, in the form that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _=None):
        return x + linen_attention(name="attn")(x, sow_weights=True), None


def scanned(block, length=3, *, params=0, **variable_axes):
    return nn.scan(
        block,
        variable_axes={"params": params, **variable_axes},
        split_rngs={"params": True},
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def layers_of(params, axis=0, length=3):
    return [jax.tree.map(lambda x, i=i: jnp.take(x, i, axis), params) for i in range(length)]


def looped(layers, x):
    """Runs blocks one after the other; returns the max logits of each."""
    maxima = []
    for layer in layers:
        (x, _), sown = run(Block(), {"params": layer}, x)
        maxima.append(sown["attn"]["max_logits"][0].max(0))
    return jnp.stack(maxima)


def clipped(layers, maxima, **settings):
    """Clips blocks one by one."""
    stats = [{"attn": {"max_logits": x}} for x in maxima]
    return [mc.qk_clip(layer, s, **settings)[0] for layer, s in zip(layers, stats, strict=True)]


@pytest.mark.parametrize(
    ("block", "axis", "stat_axis"),
    [(Block, 0, 1), (Block, 1, 0), *at_night((Block, 0, 0), (nn.remat(Block), 0, 0))],
)
def test_scanned_layers_equal_a_loop_over_layers(block, axis, stat_axis):
    model = scanned(block, params=axis, intermediates=stat_axis)()
    params = model.init(jax.random.key(0), X)["params"]
    _, stats = run(model, {"params": params}, X)
    layout = mc.MultiHeadLayout(stack_axis=axis, stat_stack_axis=stat_axis)
    layers = layers_of(params, axis)
    maxima = looped(layers, X)
    tau = float(jnp.median(maxima))
    new, info = mc.qk_clip(params, stats, layout, threshold=tau)
    np.testing.assert_allclose(info.max_logits["attn"], maxima, rtol=1e-5)
    expected = clipped(layers, maxima, threshold=tau)
    chex.assert_trees_all_close(layers_of(new, axis), expected, rtol=1e-6)
    assert 0 < info.clipped_heads < 6


def test_scan_of_a_scan_keeps_two_stack_axes():
    inner = scanned(Block, 2, intermediates=0)
    model = scanned(inner, 3, intermediates=0)()
    params = model.init(jax.random.key(0), X)["params"]
    _, stats = run(model, {"params": params}, X)
    _, info = mc.qk_clip(params, stats)
    assert info.gamma["attn"].shape == (3, 2, 2)
    layers = [layer for outer in layers_of(params) for layer in layers_of(outer, length=2)]
    expected = looped(layers, X).reshape(3, 2, 2)
    np.testing.assert_allclose(info.max_logits["attn"], expected, rtol=1e-5)


def test_shared_weights_of_a_scan_use_the_maximum_of_its_steps():
    model = nn.scan(
        Block,
        variable_broadcast="params",
        variable_axes={"intermediates": 0},
        split_rngs={"params": False},
        length=3,
    )()
    params = model.init(jax.random.key(0), X)["params"]
    _, stats = run(model, {"params": params}, X)
    _, info = mc.qk_clip(params, stats)
    expected = looped([params] * 3, X).max(0)
    np.testing.assert_allclose(info.max_logits["attn"], expected, rtol=1e-5)


def mapped(params, **variable_axes):
    """Maps a block over the first axis of its input."""
    return nn.vmap(
        Block,
        variable_axes={"params": params, **variable_axes},
        split_rngs={"params": params == 0},
        in_axes=0,
        out_axes=0,
    )


def test_vmapped_members_equal_a_loop_over_members():
    x, model = draw(6, 3, 2, 7, 8), mapped(params=0, intermediates=0)()
    params = model.init(jax.random.key(0), x)["params"]
    _, stats = run(model, {"params": params}, x)
    members = layers_of(params)
    maxima = [largest(p["attn"], x[i]) for i, p in enumerate(members)]
    tau = float(np.median(maxima))
    new, info = mc.qk_clip(params, stats, threshold=tau)
    np.testing.assert_allclose(info.max_logits["attn"], maxima, rtol=1e-5)
    expected = clipped(members, maxima, threshold=tau)
    chex.assert_trees_all_close(layers_of(new), expected, rtol=1e-5)
    assert 0 < info.clipped_heads < 6


def test_vmap_over_the_batch_alone_counts_the_whole_batch():
    x, model = draw(6, 3, 2, 7, 8), mapped(params=None, intermediates=0)()
    params = model.init(jax.random.key(0), x)["params"]
    _, stats = run(model, {"params": params}, x)
    _, info = mc.qk_clip(params, stats)
    expected = largest(params["attn"], x.reshape(6, 7, 8))
    np.testing.assert_allclose(info.max_logits["attn"], expected, rtol=1e-5)


@pytest.mark.parametrize("lifted", [scanned(Block), mapped(params=0)])
def test_transforms_that_drop_max_logits_raise(lifted):
    x = draw(6, 3, 2, 7, 8)
    variables = lifted().init(jax.random.key(0), x)
    _, state = lifted().apply(variables, x, mutable=["intermediates"])
    with pytest.raises(ValueError, match=r"`variable_axes` of `nn\.scan` or `nn\.vmap`"):
        mc.qk_clip(variables["params"], state.get("intermediates", {}))


def test_a_module_called_twice_counts_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            attn = linen_attention(name="attn")
            return attn(10 * x, sow_weights=True) + attn(x, sow_weights=True)

    model = Twice()
    params = model.init(jax.random.key(0), X)["params"]
    _, stats = run(model, {"params": params}, X)
    assert len(stats["attn"]["max_logits"]) == 2
    _, info = mc.qk_clip(params, stats)
    expected = [largest(params["attn"], scale * np.asarray(X)) for scale in (10, 1)]
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


def boxed_attention():
    """Attention with named axes in every leaf."""
    return linen_attention(
        kernel_init=nn.with_logical_partitioning(
            nn.initializers.normal(1.0), ("embed", "heads", "kv")
        ),
        bias_init=nn.with_partitioning(nn.initializers.normal(1.0), ("heads", "kv")),
        name="attn",
    )


class BoxedBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + boxed_attention()(x, sow_weights=True), None


@pytest.mark.parametrize("model", [BoxedBlock(), scanned(BoxedBlock, intermediates=0)()])
def test_boxes_stay_and_do_not_change_numbers(model):
    boxed = model.init(jax.random.key(0), X)["params"]
    _, stats = run(model, {"params": boxed}, X)
    new, info = mc.qk_clip(boxed, stats, threshold=1.0)
    assert info.clipped_heads > 0
    assert jax.tree.structure(new) == jax.tree.structure(boxed)
    kernel, old = new["attn"]["query"]["kernel"], boxed["attn"]["query"]["kernel"]
    assert isinstance(kernel, nn.LogicallyPartitioned)
    assert kernel.names == old.names == ("layers", "embed", "heads", "kv")[-old.value.ndim :]
    plain, _ = mc.qk_clip(nn.unbox(boxed), stats, threshold=1.0)
    chex.assert_trees_all_equal(nn.unbox(new), plain)


def test_frozen_dicts_stay_frozen():
    variables = Block().init(jax.random.key(0), X)
    _, stats = run(Block(), variables, X)
    expected, _ = mc.qk_clip(variables["params"], stats, threshold=0.1)
    frozen = freeze(variables["params"])
    new, _ = mc.qk_clip(frozen, freeze(stats), threshold=0.1)
    assert isinstance(new, FrozenDict)
    chex.assert_trees_all_equal(unfreeze(new), expected)


@pytest.mark.parametrize("model", [Block(), scanned(Block, intermediates=0)()])
def test_jit_gives_the_same_clip_with_one_trace(model):
    params = model.init(jax.random.key(0), X)["params"]

    def clip(params):
        _, stats = run(model, {"params": params}, X)
        return mc.qk_clip(params, stats, threshold=1.0)

    chex.clear_trace_counter()
    jitted = jax.jit(chex.assert_max_traces(clip, n=1))
    jitted(params)
    chex.assert_trees_all_close(jitted(params), clip(params), rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_batch_gives_the_same_clip_with_one_all_reduce(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    model = scanned(Block, intermediates=0)()
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
        compiled = jax.jit(clip).lower(replicated, sharded).compile()
    chex.assert_trees_all_close(new, expected, rtol=1e-5)
    chex.assert_trees_all_close(info, expected_info, rtol=1e-5)
    for leaf in jax.tree.leaves(new):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len({shard.tobytes() for shard in shards}) == 1
    assert [c.kind for c in collectives(compiled)] == ["all-reduce"]
