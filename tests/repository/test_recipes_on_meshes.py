"""The training steps of the guides, on one device and on meshes."""

import functools
import types

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from tests.support import clip_recipes as recipes
from tests.support.by_day import at_night
from tests.support.pages import run_page

TAU = recipes.TAU
# Kernels as small as these could be stacks of matrices, by their shapes.
MUON = mc.muon(0.02, overrides={"*/kernel": mc.MuonDimensionNumbers(-3, (-2, -1))})
BATCHES = np.random.default_rng(0).standard_normal((4, 4, 5, 8)).astype(np.float32)


def assert_equal_up_to_rounding(got, expected):
    chex.assert_trees_all_close(*jax.tree.map(np.asarray, (got, expected)), rtol=1e-4, atol=1e-5)


def init(heads=4):
    rng = np.random.default_rng(1)
    shape = (8, heads, 4)
    kernels = {
        name: {"kernel": rng.standard_normal(shape).astype(np.float32)} for name in ("query", "key")
    }
    return {"attn": kernels}


def accumulate_then_clip(accumulate, params, batches):
    grads, stats = accumulate(params, batches)
    params = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
    return mc.qk_clip(params, stats, threshold=TAU)


def step_of_the_guide(params, batches):
    """`train_step` of the guide to micro-batches, on the model and threshold of these tests."""
    step = _guide()["train_step"].__wrapped__

    def gradient(params, x):
        grads, stats = recipes.gradient(params, x)
        return (jnp.zeros(()), stats), grads

    def clip(params, stats, threshold):
        return mc.qk_clip(params, stats, threshold=TAU)

    clips = types.SimpleNamespace(
        merge_max_logits=mc.merge_max_logits, qk_clip=clip, qk_clip_metrics=mc.qk_clip_metrics
    )
    tx = optax.sgd(0.01)
    names = step.__globals__ | {"loss_and_grads": gradient, "mc": clips, "tx": tx}
    run = types.FunctionType(step.__code__, names)
    params, _, metrics = run(params, tx.init(params), batches)
    return params, metrics


@functools.cache
def _guide():
    return run_page("guides/scan_remat_microbatches.md")


def multi_steps(params, batches):
    tx = optax.MultiSteps(MUON, every_k_schedule=4)
    stats = jax.eval_shape(recipes.gradient, params, batches[0])[1]

    def step(carry, x):
        params, state, running = carry
        grads, stats = recipes.gradient(params, x)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        running = mc.merge_max_logits(running, stats)
        emit = tx.has_updated(state)
        params, info = mc.qk_clip(params, running, where=jnp.asarray(emit), threshold=TAU)
        return (params, state, jax.tree.map(lambda s: jnp.where(emit, -jnp.inf, s), running)), info

    carry = params, tx.init(params), recipes.nothing_yet(stats)
    (params, _, _), infos = jax.lax.scan(step, carry, batches)
    return params, jax.tree.map(lambda x: x[-1], infos)


def steps_in_a_scan(tx, params, batches):
    """Several steps in one program, with `muonclip` or with a clip after the update."""

    def step(carry, x):
        params, state = carry
        grads, stats = recipes.gradient(params, x)
        updates, state = tx.update(grads, state, params, max_logits=stats)
        return (optax.apply_updates(params, updates), state), stats

    (params, _), stats = jax.lax.scan(step, (params, tx.init(params)), batches)
    return params, stats


def skipped(params, batches):
    tx = optax.apply_if_finite(MUON, max_consecutive_errors=5)
    grads, stats = recipes.gradient(params, batches[0])
    updates, state = tx.update(grads, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    return mc.qk_clip(params, stats, where=state.last_finite, threshold=TAU)


def rematerialized(params, batches):
    gradient = jax.grad(jax.checkpoint(recipes.loss_fn), has_aux=True)
    return accumulate_then_clip(lambda params, x: gradient(params, x[0]), params, batches)


def scheduled(params, batches):
    tx = mc.muonclip(0.02, threshold=optax.linear_schedule(2 * TAU, TAU, 3))
    return steps_in_a_scan(tx, params, batches)


RECIPES = {
    "guide": step_of_the_guide,
    "from the first batch": functools.partial(accumulate_then_clip, recipes.accumulated),
    "from nothing": functools.partial(accumulate_then_clip, recipes.accumulated_from_nothing),
    "multi_steps": multi_steps,
    "muonclip": functools.partial(steps_in_a_scan, mc.muonclip(0.02, threshold=TAU)),
    "scheduled": scheduled,
    "skipped": skipped,
    "rematerialized": rematerialized,
}
# Axis types, kernels (inputs, heads, head_dim), batch [A, B, T, D].
MESHES = {
    "explicit fsdp": (AxisType.Explicit, P("data"), P(None, "data")),
    "explicit tensor": (AxisType.Explicit, P(None, "model"), P(None, "data")),
    "auto": (AxisType.Auto, P("data", "model"), P(None, "data")),
}


@functools.cache
def on_one_device(recipe):
    if recipe == "guide":
        _guide()  # its blocks run outside of jit
    return jax.jit(RECIPES[recipe])(init(), BATCHES)


# Every recipe on one mesh, those that carry arrays from batch to batch on all.
CASES = [(recipe, "explicit fsdp") for recipe in RECIPES if recipe != "guide"]
CASES += [("multi_steps", name) for name in ("explicit tensor", "auto")]
CASES += at_night(*(("guide", name) for name in MESHES))


@pytest.mark.parametrize(("recipe", "name"), CASES)
def test_recipe(recipe, name):
    kind, kernel, batch = MESHES[name]
    expected = on_one_device(recipe)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        params = jax.device_put(init(), NamedSharding(mesh, kernel))
        batches = jax.device_put(BATCHES, NamedSharding(mesh, batch))
        got = jax.jit(RECIPES[recipe])(params, batches)
    assert_equal_up_to_rounding(got, expected)
    if kind == AxisType.Explicit:
        for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(got[0]), strict=True):
            assert jax.typeof(new).sharding == jax.typeof(old).sharding


class Layers(nn.Module):
    """Two layers under `nn.scan`, each rematerialized."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=2,
        )
        return stack(name="layers")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        attn = nn.MultiHeadDotProductAttention(
            4, attention_fn=mc.linen.attention_fn, use_bias=False, name="attn"
        )
        return x + attn(x, sow_weights=True), None


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_scanned_layers_of_flax_with_remat(kind):
    model, x = Layers(), 3 * BATCHES[0]
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    tx = mc.muon(0.02)

    def step(params, x):
        def loss_fn(params):
            out, sown = model.apply({"params": params}, x, mutable=["intermediates"])
            return jnp.mean(out**2), sown["intermediates"]

        grads, stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return mc.qk_clip(optax.apply_updates(params, updates), stats, threshold=0.5)

    expected = jax.jit(step)(params, x)
    assert expected[1].clipped_heads > 0
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, NamedSharding(mesh, P()))
        got = jax.jit(step)(sharded, jax.device_put(x, NamedSharding(mesh, P("data"))))
    assert_equal_up_to_rounding(got, expected)
