"""QK-clip on several devices: equal to one device, equal on all, one reduction for the model."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compiled import collectives
from tests.support.attention_cases import attention, draw
from tests.support.by_day import at_night
from tests.support.device_cases import apply, batch_of, init, loss_fn, train

MESHES = {"data": ((8,), ("data",)), "data and model": ((4, 2), ("data", "model"))}
each_kind = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
each_mesh = pytest.mark.parametrize("mesh", MESHES)


def make_mesh(mesh, kind):
    shape, names = MESHES[mesh]
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


def put(mesh, tree, spec_of):
    def place(path, leaf):
        names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return jax.device_put(leaf, NamedSharding(mesh, spec_of(names, leaf)))

    return jax.tree_util.tree_map_with_path(place, tree)


def replicated(*_):
    return P()


def heads_over_model(path, leaf):
    """Tensor parallel attention; the output kernel is `(heads, width, d)`."""
    after = 2 if path[-2] == "out" else 1
    if path[-2:] == ["out", "bias"]:
        return P()
    return P(*[None] * (leaf.ndim - 1 - after), "model")


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


def assert_replicas_agree(tree):
    for leaf in jax.tree.leaves(tree):
        parts = {}
        for shard in leaf.addressable_shards:
            parts.setdefault(str(shard.index), set()).add(np.asarray(shard.data).tobytes())
        assert [len(bits) for bits in parts.values()] == [1] * len(parts)


def communication(function, *args):
    """Names the collectives in a compiled function; a combined one counts once."""
    return [c.kind for c in collectives(jax.jit(function).lower(*args).compile())]


# Training.

OPTIMIZERS = {"adamw": lambda: optax.adamw(0.01), "muon": lambda: mc.muon(0.01)}


@pytest.fixture(scope="module")
def start():
    """Parameters and a batch of 8."""
    x = jnp.asarray(batch_of(8))
    return init(x), x


@functools.cache
def trained_on_one_device(name):
    x = jnp.asarray(batch_of(8))
    params, infos = on_host(train(OPTIMIZERS[name](), init(x), x, steps=3))
    assert all(0 < info.clipped_heads < 18 for info in infos)
    return params, infos


@pytest.mark.parametrize(
    ("name", "mesh", "kind", "spec_of"),
    [
        ("adamw", "data and model", AxisType.Auto, heads_over_model),
        ("muon", "data", AxisType.Explicit, replicated),
        *at_night(
            ("adamw", "data", AxisType.Auto, replicated),
            ("adamw", "data and model", AxisType.Explicit, replicated),
            ("muon", "data and model", AxisType.Auto, replicated),
        ),
    ],
)
def test_training_on_a_sharded_batch_equals_one_device(start, name, mesh, kind, spec_of):
    params, x = start
    mesh = make_mesh(mesh, kind)
    with jax.set_mesh(mesh):
        params = put(mesh, params, spec_of)
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        actual = train(OPTIMIZERS[name](), params, x, steps=3)
    assert_replicas_agree(actual)
    params, infos = on_host(actual)
    expected, expected_infos = trained_on_one_device(name)
    # Gradients are summed in another order: measured 7e-7, in gamma and maxima and in weights.
    chex.assert_trees_all_close(infos, expected_infos, rtol=1e-5)
    chex.assert_trees_all_close(params, expected, rtol=0, atol=1e-5)


# One reduction.

# Layer c carries its stack before the batch, layer d after it.
LAYOUTS = (
    mc.MultiHeadLayout(),
    mc.MultiHeadLayout(query="q", key="k", stat_stack_axis=1),
)
clip = functools.partial(mc.qk_clip, layout=LAYOUTS)


def mixed_model():
    """Layers of two sizes, stacked and not, one called twice, with max logits of a batch of 8."""
    d = attention(2, stack=(2,))
    params = {
        "a": attention(4),
        "b": attention(2),
        "c": attention(4, 2, stack=(3,)),
        "d": {"q": d["query"], "k": d["key"]},
    }
    stats = {
        "a": {"max_logits": (200 * draw(1, 8, 4), 200 * draw(2, 8, 4))},
        "b": {"max_logits": (200 * draw(3, 8, 2),)},
        "c": {"max_logits": (200 * draw(4, 3, 8, 4),)},
        "d": {"max_logits": (200 * draw(5, 8, 2, 2),)},
    }
    return params, stats


def batch_over_data(path, _):
    return P(None, "data") if path[0] == "c" else P("data")


@each_kind
@each_mesh
def test_replicas_stay_equal_bit_for_bit(mesh, kind):
    params, stats = mixed_model()
    expected = on_host(jax.jit(clip)(params, stats))
    mesh = make_mesh(mesh, kind)
    with jax.set_mesh(mesh):
        actual = jax.jit(clip)(put(mesh, params, replicated), put(mesh, stats, batch_over_data))
    chex.assert_trees_all_equal(on_host(actual), expected)
    assert_replicas_agree(actual)


@each_kind
@each_mesh
def test_one_all_reduce_for_the_whole_model(mesh, kind):
    params, stats = mixed_model()
    mesh = make_mesh(mesh, kind)
    with jax.set_mesh(mesh):
        inputs = put(mesh, params, replicated), put(mesh, stats, batch_over_data)
        assert communication(clip, *inputs) == ["all-reduce"]


@each_kind
@each_mesh
def test_forward_pass_and_clip_cost_one_all_reduce(start, mesh, kind):
    params, x = start
    mesh = make_mesh(mesh, kind)
    with jax.set_mesh(mesh):
        inputs = put(mesh, params, replicated), jax.device_put(x, NamedSharding(mesh, P("data")))
        assert communication(lambda p, x: mc.qk_clip(p, apply(p, x)[1]), *inputs) == ["all-reduce"]


def test_one_reduction_for_equal_leading_axes():
    # XLA may combine several all-reduces, so that the tests above would not see them.
    equations = jax.make_jaxpr(clip)(*mixed_model()).eqns
    over_batch = [
        e for e in equations if e.primitive.name == "reduce_max" and e.invars[0].aval.shape[0] == 8
    ]
    assert len(over_batch) == 1


@each_kind
def test_sharded_kernels_and_heads_keep_their_sharding(kind):
    mesh = make_mesh("data and model", kind)
    params, stats = mixed_model()
    params = {
        name: {n: {"kernel": layer[n]["kernel"]} for n in ("query", "key", "q", "k") if n in layer}
        for name, layer in params.items()
    }
    expected = on_host(jax.jit(clip)(params, stats))

    def of_max_logits(path, _):
        # The heads of b are not sharded: arrays of different sharding cannot be concatenated.
        specs = {"a": P("data", "model"), "b": P("data"), "c": P(None, "data", "model")}
        return specs.get(path[0], P("data", None, "model"))

    with jax.set_mesh(mesh):
        inputs = put(mesh, params, heads_over_model), put(mesh, stats, of_max_logits)
        actual = jax.jit(clip)(*inputs)
    for old, new in zip(jax.tree.leaves(inputs[0]), jax.tree.leaves(actual[0]), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, new.ndim)
    chex.assert_trees_all_close(on_host(actual), expected, rtol=1e-6)


# `shard_map`, where each device sees its own part of the batch.


def clip_each(params, stats):
    return mc.qk_clip(params, stats)


def clip_joined(params, stats):
    return mc.qk_clip(params, jax.lax.pmax(stats, "data"))


def in_shard_map(function, **settings):
    mesh = make_mesh("data", AxisType.Auto)
    specs = {"in_specs": (P(), P("data")), "out_specs": P(), **settings}
    return jax.jit(jax.shard_map(function, mesh=mesh, **specs))


def two_layers():
    params = {"a": attention(4), "b": attention(2)}
    stats = {name: {"max_logits": 200 * draw(1, 8, n)} for name, n in (("a", 4), ("b", 2))}
    return params, stats


def test_pmax_of_max_logits_keeps_replicas_equal():
    actual = in_shard_map(clip_joined)(*two_layers())
    assert_replicas_agree(actual)
    chex.assert_trees_all_equal(on_host(actual), on_host(jax.jit(clip_each)(*two_layers())))


def test_jax_rejects_max_logits_of_single_devices():
    with pytest.raises(ValueError, match="out_specs which require replication"):
        in_shard_map(clip_each)(*two_layers())


def test_without_the_check_of_jax_replicas_diverge():
    params, _ = in_shard_map(clip_each, check_vma=False)(*two_layers())
    with pytest.raises(AssertionError):
        assert_replicas_agree(params)


def test_training_under_shard_map_equals_one_device(start):
    mesh = make_mesh("data", AxisType.Auto)

    def global_loss(params, x):
        # Of replicated parameters the gradient is the sum over devices: jax inserts it.
        loss, stats = loss_fn(params, x)
        return jax.lax.pmean(loss, "data"), jax.lax.pmax(stats, "data")

    sharded = jax.shard_map(global_loss, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
    params, infos = on_host(train(optax.adamw(0.01), *start, steps=3, loss_fn=sharded))
    expected, expected_infos = trained_on_one_device("adamw")
    chex.assert_trees_all_close(infos, expected_infos, rtol=1e-5)  # measured 4e-7
    chex.assert_trees_all_close(params, expected, rtol=0, atol=1e-5)  # measured 4e-7


@each_kind
def test_sharded_heads_cost_one_small_all_gather_more(kind):
    params, stats = mixed_model()
    params = {
        name: {n: {"kernel": layer[n]["kernel"]} for n in ("query", "key", "q", "k") if n in layer}
        for name, layer in params.items()
    }
    mesh = make_mesh("data and model", kind)

    def of_max_logits(path, leaf):
        return P(
            *(None, "data", "model")
            if path[0] == "c"
            else ("data", *[None] * (leaf.ndim - 2), "model")
        )

    with jax.set_mesh(mesh):
        inputs = put(mesh, params, heads_over_model), put(mesh, stats, of_max_logits)
        assert communication(clip, *inputs) == ["all-reduce", "all-gather"]
