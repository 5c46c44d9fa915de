"""Max logits of long sequences, and of inputs on several devices."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compiled import collectives, compiled_cost
from tests.support import reference_attention as reference
from tests.support.logit_cases import SPECS, close, mesh_of_eight, sharded_inputs

LONG = 8192


def long_inputs(dtype, full):
    """Shapes for which all logits would be 1 GiB; a block of them is 4 MiB."""
    x = jax.ShapeDtypeStruct((1, LONG, 4, 64), dtype)
    square = (1, 4, LONG, LONG) if full else (1, 1, 1, 1)
    return x, x, jax.ShapeDtypeStruct(square, dtype), jax.ShapeDtypeStruct(square, jnp.bool_)


def temporaries(function, inputs):
    found = compiled_cost(jax.jit(function).lower(*inputs).compile()).temporary_bytes
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("dtype", "full", "rules"),
    [
        (jnp.float32, False, {}),
        (jnp.bfloat16, False, {"is_causal": True}),
        (jnp.float32, False, {"local_window_size": (1000, 9)}),
        (jnp.float32, True, {}),
        (jnp.bfloat16, True, {"is_causal": True, "local_window_size": (1000, 9)}),
    ],
)
def test_long_sequences_need_no_square_memory(dtype, full, rules):
    def max_logits_of(q, k, bias, mask):
        return mc.max_attention_logit(q, k, bias=bias, mask=mask, **rules)

    # Measured 8 MiB.
    assert temporaries(max_logits_of, long_inputs(dtype, full)) < 32 * 2**20


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_beside_a_differentiated_attention_it_needs_no_square_memory_either(dtype):
    def loss(q, k, bias, mask, with_max_logits):
        out = jax.nn.dot_product_attention(q, k, k, bias, mask)
        max_logits_of = mc.max_attention_logit(q, k, bias=bias, mask=mask) if with_max_logits else 0
        return jnp.sum(out.astype(jnp.float32)), max_logits_of

    used = [
        temporaries(
            jax.grad(functools.partial(loss, with_max_logits=on), (0, 1), has_aux=True),
            long_inputs(dtype, full=True),
        )
        for on in (False, True)
    ]
    # Measured 0 to 4 MiB more, of 3 to 5 GiB.
    assert used[1] - used[0] < 32 * 2**20


@pytest.mark.parametrize("block_size", [512, 4])
def test_works_inside_shard_map(block_size):
    mesh = mesh_of_eight()

    def local_maximum(arrays):
        max_logits_of = functools.partial(mc.max_attention_logit, local_window_size=6)
        return jax.lax.pmax(max_logits_of(**arrays, block_size=block_size).max(0), "data")

    specs = {name: SPECS[name] for name in sharded_inputs()}
    sharded = jax.shard_map(local_maximum, mesh=mesh, in_specs=(specs,), out_specs=P("model"))
    arrays = sharded_inputs()
    expected = reference.max_logits(**arrays, local_window_size=6)
    # Measured 3e-7.
    close(jax.jit(sharded)(arrays), expected.max(0))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("block_size", [512, 4])
def test_sharded_batch_and_heads_need_no_communication(kind, block_size):
    mesh = mesh_of_eight(kind)
    arrays = sharded_inputs()
    expected = reference.max_logits(**arrays, local_window_size=6)
    with jax.set_mesh(mesh):
        arrays = {
            name: jax.device_put(x, NamedSharding(mesh, SPECS[name])) for name, x in arrays.items()
        }
        max_logits_of = functools.partial(
            mc.max_attention_logit, local_window_size=6, block_size=block_size
        )
        compiled = jax.jit(max_logits_of).lower(**arrays).compile()
        close(compiled(**arrays), expected)
    assert collectives(compiled) == []
