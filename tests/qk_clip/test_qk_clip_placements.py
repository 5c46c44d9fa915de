"""QK-clip with kernels and max logits sharded differently: equal to one device."""

import functools

import chex
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compiled import collectives

KINDS = {
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "auto": (AxisType.Auto, AxisType.Auto),
    "mixed": (AxisType.Auto, AxisType.Explicit),
}
INPUTS, HEADS, HEAD_DIM, ROWS = 16, 8, 4, 8
TREE = {"attn": {"query": {"kernel": 0}, "key": {"kernel": 0}}}


def mesh_of(kind):
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=KINDS[kind])


def draw(key_heads, stack, flat, seed=0):
    """Query and key kernels, and max logits `[*stack, rows, heads]` on both sides of 100."""
    rng = np.random.default_rng(seed)
    kernels = [
        rng.standard_normal((*stack, INPUTS, heads, HEAD_DIM)).astype(np.float32)
        for heads in (HEADS, key_heads)
    ]
    if flat:
        kernels = [k.reshape(*k.shape[:-2], -1) for k in kernels]
    maxima = np.exp(2 * rng.standard_normal((*stack, ROWS, HEADS))).astype(np.float32)
    return kernels, 15 * maxima


def clip_of(flat, shared_key):
    pattern = "inputs (heads head_dim)" if flat else "inputs heads head_dim"
    layout = mc.MultiHeadLayout(kernel=pattern, head_dim=HEAD_DIM)

    def clip(query, key, max_logits):
        params = {"attn": {"query": {"kernel": query}, "key": {"kernel": key}}}
        stats = {"attn": {"max_logits": max_logits}}
        params, info = mc.qk_clip(params, stats, layout, shared_key=shared_key)
        return params["attn"]["query"]["kernel"], params["attn"]["key"]["kernel"], info

    return clip


@functools.cache
def on_one_device(key_heads, stack, flat, shared_key):
    kernels, maxima = draw(key_heads, stack, flat)
    return jax.tree.map(np.asarray, jax.jit(clip_of(flat, shared_key))(*kernels, maxima))


def check(kind, specs, key_heads=HEADS, stack=(), *, flat=False, shared_key="query"):
    """Clips with `specs` of query kernel, key kernel and max logits."""
    mesh = mesh_of(kind)
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    kernels, maxima = draw(key_heads, stack, flat)
    with jax.set_mesh(mesh):
        inputs = jax.device_put((*kernels, maxima), tuple(shardings))
        compiled = jax.jit(clip_of(flat, shared_key)).lower(*inputs).compile()
        *new, info = compiled(*inputs)
    expected = on_one_device(key_heads, stack, flat, shared_key)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, (*new, info)), expected, rtol=1e-6)
    assert 0 < info.clipped_heads < info.gamma["attn"].size
    for array, sharding in zip(new, shardings, strict=False):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
    for array in jax.tree.leaves(info):
        assert array.sharding.is_fully_replicated
    # Heads and rows of max logits move, kernels never.
    shard = min(array.addressable_shards[0].data.nbytes for array in new)
    assert all(c.bytes < shard for c in collectives(compiled))


# Query and key kernels, then max logits: rows, heads.
PLACEMENTS = [
    (P(), P(), P("fsdp", "tp")),  # heads on an axis that the kernels lack
    (P("fsdp"), P("fsdp"), P("fsdp", "tp")),
    (P(("fsdp", "tp")), P(("fsdp", "tp")), P(None, "tp")),  # ... that they use for inputs
    (P(None, None, "tp"), P("tp"), P("fsdp", "tp")),  # ... or for the width of a head
    (P("fsdp", "tp"), P("fsdp", "tp"), P()),  # kernels are sharded, max logits are not
    (P(None, ("fsdp", "tp")), P(None, "fsdp"), P("tp", "fsdp")),
    (P("tp", "fsdp"), P(), P(("fsdp", "tp"))),
]


@pytest.mark.parametrize("specs", PLACEMENTS, ids=str)
def test_explicit_mesh(specs):
    check("explicit", specs)


@pytest.mark.parametrize("number", [2, 5])
def test_auto_mesh(number):
    check("auto", PLACEMENTS[number])


# JAX itself drops an Auto axis from an array axis that an Explicit one shards too.
@pytest.mark.parametrize("number", [1, 3])
def test_mesh_with_axes_of_both_kinds(number):
    check("mixed", PLACEMENTS[number])


# Eight query heads over four or eight devices; fewer key heads, sharded or not.
@pytest.mark.parametrize(
    ("shared_key", "key_heads", "specs"),
    [
        ("query", 2, (P(None, "fsdp"), P(), P(None, "fsdp"))),
        ("group", 2, (P(None, "fsdp"), P(), P(None, "fsdp"))),
        ("exact", 2, (P(None, ("fsdp", "tp")), P("fsdp", "tp"), P("tp", "fsdp"))),
        ("exact", 1, (P("tp", "fsdp"), P("tp"), P(None, ("fsdp", "tp")))),
        ("exact", 4, (P(None, ("fsdp", "tp")), P(None, "fsdp"), P(None, ("fsdp", "tp")))),
    ],
    ids=str,
)
def test_fewer_key_heads_than_devices(shared_key, key_heads, specs):
    check("explicit", specs, key_heads, shared_key=shared_key)


@pytest.mark.parametrize(
    "specs",
    [
        (P(None, ("fsdp", "tp")), P(None, "fsdp"), P(None, "tp")),
        (P("tp", "fsdp"), P("tp"), P("fsdp", "tp")),
    ],
    ids=str,
)
def test_heads_merged_with_their_width(specs):
    check("explicit", specs, 4, flat=True)


# Layers, then the axes of one kernel; layers, rows, heads.
@pytest.mark.parametrize(
    "specs",
    [
        (P("fsdp", None, "tp"), P("fsdp", "tp"), P(None, "fsdp", "tp")),
        (P(None, "fsdp", "tp"), P(None, "fsdp"), P("fsdp", None, "tp")),
        (P(("fsdp", "tp")), P("tp", "fsdp"), P("tp", "fsdp")),
    ],
    ids=str,
)
def test_stacked_layers(specs):
    check("explicit", specs, 4, (8,))
