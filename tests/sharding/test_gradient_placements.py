"""Gradients, momentum and parameters that are sharded in different ways on one mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from tests.support.sharding_cases import assert_close

SHAPES = {"up": (3, 16, 8), "wq": (16, 16), "bias": (16,), "embed": (8, 16)}
UNSHARDED: dict[str, P] = dict.fromkeys(SHAPES, P())
FSDP = {"up": P(None, "x"), "wq": P("x", "y"), "bias": P("y"), "embed": P("x")}
OTHER = {"up": P(None, "y", "x"), "wq": P("y"), "bias": P("x"), "embed": P(None, "y")}
TUPLES = {name: P(None, ("x", "y")) for name in SHAPES} | {"bias": P(("y", "x"))}


def draw(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def optimizer(shardings=None):
    return mc.muon(0.1, weight_decay=0.1, adam_weight_decay=0.1, shardings=shardings)


def step_of(tx, jit=True):
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), updates, state

    return jax.jit(step) if jit else step


@functools.cache
def on_one_device():
    tx = optimizer()
    return step_of(tx)(draw(1), tx.init(draw(0)), draw(0))


def check(params, grads, momentum, kinds=(AxisType.Explicit,) * 2, *, said=False, jit=True):
    """Takes a step with these specs; everything keeps its own sharding."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds)
    shardings = [
        {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
        for specs in (params, grads, momentum)
    ]
    tx = optimizer(shardings[0] if said else None)
    with jax.set_mesh(mesh):
        start = jax.device_put(draw(0), shardings[0])
        state = tx.init(jax.device_put(draw(0), shardings[2]))
        new, updates, new_state = step_of(tx, jit)(
            jax.device_put(draw(1), shardings[1]), state, start
        )
    expected = on_one_device()
    assert_close((new, updates), expected[:2], 1e-5)
    moments = [x for x in jax.tree.leaves(new_state) if x.ndim]
    assert_close(moments, [x for x in jax.tree.leaves(expected[2]) if x.ndim], 1e-5)
    for got, old in (
        (new, start),
        (updates, start),
        (new_state, state),
    ):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(old), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
            assert a.ndim == 0 or jax.typeof(a).sharding == jax.typeof(b).sharding


@pytest.mark.parametrize(
    ("params", "grads", "momentum"),
    [
        (FSDP, UNSHARDED, FSDP),
        (FSDP, OTHER, FSDP),
        (UNSHARDED, FSDP, UNSHARDED),  # added up, these two would be sharded as the gradients
        (UNSHARDED, UNSHARDED, FSDP),  # ZeRO-1: a state that is sharded more
        (TUPLES, FSDP, OTHER),
    ],
    ids=["unsharded gradients", "other", "unsharded parameters", "ZeRO-1", "all three differ"],
)
def test_everything_keeps_its_sharding_on_an_explicit_mesh(params, grads, momentum):
    check(params, grads, momentum)


def test_outside_of_jit():
    check(FSDP, OTHER, FSDP, jit=False)


def test_on_a_mesh_with_axes_of_both_kinds():
    kinds = (AxisType.Auto, AxisType.Explicit)
    check(FSDP, UNSHARDED, FSDP, kinds, said=True)


def test_16_bit_gradients_move_in_16_bits():
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    params = jax.device_put(draw(0), {n: NamedSharding(mesh, s) for n, s in FSDP.items()})
    grads = jax.device_put(draw(1), {n: NamedSharding(mesh, s) for n, s in OTHER.items()})
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), grads)
    tx = optimizer()
    with jax.set_mesh(mesh):
        state = tx.init(params)
        equations = jax.make_jaxpr(tx.update)(grads, state, params).eqns
        updates, _ = jax.eval_shape(tx.update, grads, state, params)
    assert all(u.dtype == jnp.bfloat16 for u in updates.values())
    moved = [e.invars[0].aval.dtype for e in equations if e.primitive.name == "reshard"]
    assert moved == [jnp.bfloat16] * len(SHAPES)


# Gradients whose sum over devices is still to be taken, as a type of newer JAX versions.


def test_unreduced_gradients_are_reduced():
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    try:
        unreduced = P(None, "y", unreduced=frozenset({"x"}))
    except TypeError:
        pytest.skip("this JAX has no unreduced types")
    whole = {"wq": draw(1)["wq"]}
    tx = optimizer()
    expected = tx.update(whole, tx.init(whole), whole)[0]

    def update(x, params):
        # A product over rows that are sharded, whose sum over x is left open.
        grads = jnp.einsum("ij,jk->ik", x, params["wq"], out_sharding=unreduced)
        return tx.update({"wq": grads}, tx.init(params), params)[0]

    with jax.set_mesh(mesh):
        eye = jax.device_put(jnp.eye(16), NamedSharding(mesh, P(None, "x")))
        params = jax.device_put(whole, NamedSharding(mesh, P("x", "y")))
        got = jax.jit(update)(eye, params)
    assert_close(got, expected, 1e-5)
    assert jax.typeof(got["wq"]).sharding.spec == P("x", "y")
