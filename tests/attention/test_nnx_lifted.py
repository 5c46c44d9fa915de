"""Max logits under NNX's transforms and in its containers, and the clip by them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import muonclip_jax as mc
from tests.support.attention_cases import draw
from tests.support.by_day import at_night
from tests.support.flax_cases import X, capture, largest, nnx_attention


class Block(nnx.Module):
    """One residual attention block."""

    def __init__(self, rngs):
        self.attn = nnx_attention(rngs)

    def __call__(self, x):
        return x + self.attn(x, sow_weights=True)


def pure(tree):
    return nnx.to_pure_dict(tree)


class Layers(nnx.Module):
    """Blocks one after the other, each with `call` around it."""

    def __init__(self, call=Block.__call__):
        self.blocks = nnx.List([Block(nnx.Rngs(i)) for i in range(2)])
        self.call = call

    def __call__(self, x):
        for block in self.blocks:
            x = self.call(block, x)
        return x


def in_nnx_jit(model, x):
    return nnx.jit(capture)(model, x)


def around_nnx_jit(model, x):
    return capture(nnx.jit(lambda model, x: model(x)), model, x)


def in_jax_jit(model, x):
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, x: capture(nnx.merge(graphdef, state), x))(state, x)


def in_gradient(model, x):
    def loss(model, x):
        out, stats = capture(model, x)
        return jnp.sum(out**2), (out, stats)

    return nnx.value_and_grad(loss, has_aux=True)(model, x)[0][1]


def in_jit_of_gradient(model, x):
    return nnx.jit(in_gradient)(model, x)


@pytest.mark.parametrize(
    "forward", [in_nnx_jit, around_nnx_jit, in_jax_jit, in_gradient, in_jit_of_gradient]
)
@pytest.mark.parametrize("call", [Block.__call__, nnx.remat(Block.__call__)])
def test_transforms_keep_max_logits(forward, call):
    model = Layers(call)
    before = jax.tree.structure(nnx.state(model))
    expected_out, expected = capture(Layers(), X)
    assert list(expected["blocks"]) == [0, 1]
    out, stats = forward(model, X)
    chex.assert_trees_all_close(pure(stats), pure(expected), rtol=1e-6)
    # Fused otherwise under jit; measured 6e-7.
    np.testing.assert_allclose(out, expected_out, rtol=1e-5, atol=1e-6)
    assert jax.tree.structure(nnx.state(model)) == before


def test_remat_leaves_gradients_alone():
    def loss(model):
        out, stats = capture(model, X)
        return jnp.sum(out**2), stats

    grads, _ = nnx.grad(loss, has_aux=True)(Layers(nnx.remat(Block.__call__)))
    expected, _ = nnx.grad(loss, has_aux=True)(Layers())
    # The gradient of a key bias is exactly zero, since softmax ignores it: noise of 8e-7.
    chex.assert_trees_all_close(pure(grads), pure(expected), rtol=1e-5, atol=2e-6)


def stacked(count=3):
    """Blocks stacked on axis 0."""
    return nnx.split_rngs(splits=count)(nnx.vmap(Block))(nnx.Rngs(0))


def members(params, count=3):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(count)]


class Model(nnx.Module):
    """Stacked blocks, with a function that runs them."""

    def __init__(self, call):
        self.blocks = stacked()
        self.call = call

    def __call__(self, x):
        return self.call(self.blocks, x)


def one(x, block):
    return block(x)


BY_TYPE = nnx.StateAxes({(nnx.Param, mc.nnx.MaxLogits): 0, ...: nnx.Carry})


def scan(blocks, x):
    return nnx.scan(one, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, blocks)


def scan_by_type(blocks, x):
    return nnx.scan(one, in_axes=(nnx.Carry, BY_TYPE), out_axes=nnx.Carry)(x, blocks)


def scan_of_remat(blocks, x):
    return nnx.scan(nnx.remat(one), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, blocks)


def capture_in_nnx_scan():
    def body(x, block):
        return capture(block, x)

    scanned = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    out, stats = scanned(X, stacked())
    return out, {"blocks": stats}


def capture_in_jax_scan():
    graphdef, state = nnx.split(stacked())

    def body(x, state):
        return capture(nnx.merge(graphdef, state), x)

    out, stats = jax.lax.scan(body, X, state)
    return out, {"blocks": stats}


@pytest.mark.parametrize(
    ("forward", "jit"),
    [
        (lambda: capture(Model(scan), X), True),
        (lambda: capture(Model(scan_by_type), X), False),
        (capture_in_jax_scan, False),
        *at_night(
            (lambda: capture(Model(scan), X), False),
            (lambda: capture(Model(scan_of_remat), X), False),
            (capture_in_nnx_scan, False),
            (capture_in_jax_scan, True),
        ),
    ],
)
def test_scanned_layers_equal_a_loop_over_layers(forward, jit):
    params = nnx.state(Model(scan), nnx.Param)
    _, stats = jax.jit(forward)() if jit else forward()
    layers, x, maxima = members(pure(params)["blocks"]), X, []
    for layer in layers:
        block = Block(nnx.Rngs(0))
        nnx.update(block, layer)
        x, sown = capture(block, x)
        maxima.append(sown["attn"]["max_logits"][0].max(0))
    tau = float(np.median(np.asarray(maxima)))
    new, info = mc.qk_clip(params, stats, threshold=tau)
    assert isinstance(new, nnx.State)
    np.testing.assert_allclose(info.max_logits["blocks/attn"], maxima, rtol=1e-5)
    assert 0 < info.clipped_heads < 6
    for layer, after, s in zip(layers, members(pure(new)["blocks"]), maxima, strict=True):
        expected, _ = mc.qk_clip(layer, {"attn": {"max_logits": s}}, threshold=tau)
        chex.assert_trees_all_close(after, expected, rtol=1e-6)


def test_scan_that_drops_max_logits_raises():
    def drops(blocks, x):
        graphdef, state = nnx.split(blocks)
        return jax.lax.scan(lambda x, s: (nnx.merge(graphdef, s)(x), None), x, state)[0]

    model = Model(drops)
    _, stats = capture(model, X)
    with pytest.raises(ValueError, match="blocks/attn: has no max_logits"):
        mc.qk_clip(nnx.state(model, nnx.Param), stats)


def test_vmapped_members_equal_a_loop_over_members():
    x = draw(6, 3, 2, 7, 8)
    model = Model(nnx.vmap(lambda block, x: block(x)))
    _, stats = capture(model, x)
    params = nnx.state(model, nnx.Param)
    layers = members(pure(params)["blocks"])
    maxima = [largest(layer["attn"], x[i]) for i, layer in enumerate(layers)]
    tau = float(np.median(maxima))
    new, info = mc.qk_clip(params, stats, threshold=tau)
    np.testing.assert_allclose(info.max_logits["blocks/attn"], maxima, rtol=1e-5)
    assert 0 < info.clipped_heads < 6
    for layer, after, s in zip(layers, members(pure(new)["blocks"]), maxima, strict=True):
        expected, _ = mc.qk_clip(layer, {"attn": {"max_logits": s}}, threshold=tau)
        chex.assert_trees_all_close(after, expected, rtol=1e-5)


@pytest.mark.parametrize("inside", [False, True])
def test_vmap_over_the_batch_alone_counts_the_whole_batch(inside):
    x, block = draw(6, 3, 2, 7, 8), Block(nnx.Rngs(0))
    if inside:
        _, stats = nnx.vmap(capture, in_axes=(None, 0))(block, x)
    else:
        axes = nnx.StateAxes({mc.nnx.MaxLogits: 0, ...: None})
        mapped = nnx.vmap(lambda block, x: block(x), in_axes=(axes, 0))
        _, stats = capture(mapped, block, x)
    params = nnx.state(block, nnx.Param)
    _, info = mc.qk_clip(params, stats)
    expected = largest(pure(params)["attn"], x.reshape(6, 7, 8))
    np.testing.assert_allclose(info.max_logits["attn"], expected, rtol=1e-5)


def test_modules_in_lists_and_dicts_keep_their_own_max_logits():
    class Nested(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx_attention(nnx.Rngs(i)) for i in range(11)])
            self.towers = nnx.Dict(left=nnx_attention(nnx.Rngs(11)))

        def __call__(self, x):
            for i, layer in enumerate([*self.layers, self.towers["left"]]):
                layer((i + 1) * x, sow_weights=True)

    model = Nested()
    _, stats = capture(model, X)
    params = nnx.state(model, nnx.Param)
    _, info = mc.qk_clip(params, stats)
    tree = pure(params)
    paths = {f"layers/{i}": tree["layers"][i] for i in range(11)}
    paths["towers/left"] = tree["towers"]["left"]
    assert info.max_logits.keys() == paths.keys()
    for i, (path, layer) in enumerate(paths.items()):
        expected = largest(layer, (i + 1) * X)
        np.testing.assert_allclose(info.max_logits[path], expected, rtol=1e-5)


def test_a_shared_module_counts_all_its_calls():
    class Tied(nnx.Module):
        def __init__(self):
            attn = nnx_attention()
            # The path that counts is the first in order of names, for parameters and max logits.
            self.second, self.first = attn, nnx.List([attn])

        def __call__(self, x):
            return self.second(10 * x, sow_weights=True) + self.first[0](x, sow_weights=True)

    model = Tied()
    _, stats = capture(model, X)
    params = nnx.state(model, nnx.Param)
    new, info = mc.qk_clip(params, stats, threshold=1.0)
    assert len(stats["first"][0]["max_logits"].get_value()) == 2
    attn = pure(params)["first"][0]
    expected = np.maximum(largest(attn, 10 * X), largest(attn, X))
    np.testing.assert_allclose(info.max_logits["first/0"], expected, rtol=1e-5)
    nnx.update(model, new)
    assert model.second is model.first[0]


def test_max_logits_of_micro_batches_merge():
    block = Block(nnx.Rngs(0))
    (_, a), (_, b) = capture(block, X), capture(block, 10 * X)
    _, info = mc.qk_clip(nnx.state(block, nnx.Param), mc.merge_max_logits(a, b))
    expected = largest(pure(nnx.state(block, nnx.Param))["attn"], 10 * X)
    np.testing.assert_allclose(info.max_logits["attn"], expected, rtol=1e-5)
