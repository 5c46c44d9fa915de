"""The cost of `analyze` and `with_max_logits`: time, operations, memory, collectives."""

import functools
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import muonclip_jax as mc
from benchmarks.compiled import collectives, compiled_cost
from tests.support.program_models import FAMILIES

LENGTH, DEPTH, HEADS = 512, 2, 4


@pytest.mark.nightly
@pytest.mark.parametrize(("scan", "limit"), [(False, 5.0), (True, 1.0)], ids=["loop", "scan"])
def test_sixty_layers_are_read_in_seconds_of_the_processor(scan, limit, no_typecheck):
    family = FAMILIES["gpt_scanned"]
    shape = lambda x: jax.ShapeDtypeStruct((60, *x.shape[1:]), x.dtype)  # noqa: E731
    params = jax.eval_shape(family.params)
    params["h"] = jax.tree.map(shape, params["h"])
    tap = {} if scan else {"tap": lambda path, logits: None}
    start = time.process_time()
    found = mc.analyze(family.fn, params, *family.args, **tap)
    assert time.process_time() - start < limit
    assert sum(site.num_layers for site in found.attention) == 60


def loss_fn(params, x, *, scan, remat):
    """Layers of attention and MLP, and a head."""

    def layer(x, p):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]) for n in "qkv")
        logits = jnp.einsum("bthk,bshk->bhts", q, k) * 0.2
        logits = jnp.where(jnp.tri(x.shape[1], dtype=bool), logits, -1e30)
        out = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits), v)
        x = x + jnp.einsum("bthk,hkd->btd", out, p["o"])
        return x + jax.nn.relu(x @ p["up"]) @ p["down"]

    layer = jax.checkpoint(layer) if remat else layer
    if scan:
        x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), x, params["layers"])
    else:
        for i in range(DEPTH):
            x = layer(x, jax.tree.map(lambda w, i=i: w[i], params["layers"]))
    return -jax.nn.log_softmax(x @ params["head"])[..., 3].mean()


def shapes(width):
    n, size = width // HEADS, jax.ShapeDtypeStruct
    kernels = {
        **dict.fromkeys("qkv", (DEPTH, width, HEADS, n)),
        "o": (DEPTH, HEADS, n, width),
        "up": (DEPTH, width, 4 * width),
        "down": (DEPTH, 4 * width, width),
    }
    layers = {name: size(shape, jnp.float32) for name, shape in kernels.items()}
    return {"layers": layers, "head": size((width, 256), jnp.float32)}


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("width", "scan", "remat", "most"),
    [
        (64, True, True, 1e-4),
        pytest.param(64, True, False, 1e-4, marks=pytest.mark.nightly),
        pytest.param(64, False, True, 1e-4, marks=pytest.mark.nightly),
        pytest.param(256, False, False, 1e-3, marks=pytest.mark.nightly),
    ],
    ids=["scan and checkpoint", "scan", "checkpoint", "neither"],
)
def test_max_logits_add_few_operations_and_no_memory(width, scan, remat, most):
    fn = functools.partial(loss_fn, scan=scan, remat=remat)
    x = jax.ShapeDtypeStruct((2, LENGTH, width), jnp.float32)
    plain, more = (
        jax.jit(jax.value_and_grad(f, has_aux=aux)).lower(shapes(width), x).compile()
        for f, aux in ((fn, False), (mc.with_max_logits(fn, expect=DEPTH), True))
    )
    before, after = ((c.cost_analysis() or {})["flops"] for c in (plain, more))
    assert before < after < (1 + most) * before
    before, after = (compiled_cost(c).temporary_bytes for c in (plain, more))
    assert before is not None
    assert after is not None
    assert after <= before


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("scan", [True, False])
def test_one_more_all_reduce_over_the_batch(axis_type, scan):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    fn = functools.partial(loss_fn, scan=scan, remat=False)

    def place(x, *spec):
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )

    x = jax.ShapeDtypeStruct((16, 8, 16), jnp.float32)
    analysis = mc.analyze(fn, shapes(16), x)
    params, x = jax.tree.map(place, shapes(16)), place(x, "data")

    def plain(params, x):
        loss, grads = jax.value_and_grad(fn)(params, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    def clipped(params, x):
        with_stats = mc.with_max_logits(fn, expect=DEPTH)
        (loss, stats), grads = jax.value_and_grad(with_stats, has_aux=True)(params, x)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return mc.qk_clip(params, stats, analysis)[0], loss

    with jax.set_mesh(mesh):
        before, after = (
            [c.kind for c in collectives(jax.jit(step).lower(params, x).compile())]
            for step in (plain, clipped)
        )
    assert sorted(after) == sorted([*before, "all-reduce"])
