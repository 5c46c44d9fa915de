"""Kernels described by patterns, such as Gemma's, clipped on a mesh: equal to one device."""

import functools
import math
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc

INPUTS, HEADS, KEY_HEADS, HEAD_DIM, ROWS, LAYERS = 16, 8, 2, 4, 8, 3
W = ("w",)


class Case(NamedTuple):
    """Kernels of one attention module: head layout, then shape and sharding by name."""

    head_layout: mc.MultiHeadLayout | mc.FusedQKVLayout
    kernels: dict[str, tuple[tuple[int, ...], P]]
    stack: tuple[int, ...] = ()


GEMMA = mc.MultiHeadLayout(
    query="q_einsum",
    key="kv_einsum",
    kernel="heads inputs head_dim",
    key_kernel="2 heads inputs head_dim",
    scaled_leaves=W,
)
FUSED_GEMMA = mc.FusedQKVLayout(
    qkv="qkv_einsum", head_dim=HEAD_DIM, kernel="3 heads inputs head_dim", scaled_leaves=W
)
FLAT = mc.MultiHeadLayout(
    query="q_proj",
    key="kv_proj",
    kernel="inputs (heads head_dim)",
    key_kernel="inputs (2 heads head_dim)",
    head_dim=HEAD_DIM,
    scaled_leaves=W,
)
LEVANTER = mc.MultiHeadLayout(
    query="q_proj", key="k_proj", kernel="kv_heads groups head_dim inputs", scaled_leaves=W
)
CASES = {
    "Gemma, heads and inputs sharded": Case(
        GEMMA,
        {
            "q_einsum": ((HEADS, INPUTS, HEAD_DIM), P("tp", "fsdp")),
            "kv_einsum": ((2, KEY_HEADS, INPUTS, HEAD_DIM), P(None, None, "fsdp", "tp")),
        },
    ),
    "Gemma, scanned layers": Case(
        GEMMA,
        {
            "q_einsum": ((LAYERS, HEADS, INPUTS, HEAD_DIM), P(None, ("fsdp", "tp"))),
            "kv_einsum": ((LAYERS, 2, KEY_HEADS, INPUTS, HEAD_DIM), P(None, "fsdp", None, "tp")),
        },
        (LAYERS,),
    ),
    "Gemma, one kernel": Case(
        FUSED_GEMMA,
        {"qkv_einsum": ((3, HEADS, INPUTS, HEAD_DIM), P(None, "tp", "fsdp"))},
    ),
    "flat, keys and values in sections": Case(
        FLAT,
        {
            "q_proj": ((INPUTS, HEADS * HEAD_DIM), P("fsdp", "tp")),
            "kv_proj": ((INPUTS, 2 * KEY_HEADS * HEAD_DIM), P("tp", "fsdp")),
        },
    ),
    "Levanter": Case(
        LEVANTER,
        {
            "q_proj": ((KEY_HEADS, HEADS // KEY_HEADS, HEAD_DIM, INPUTS), P("fsdp", "tp")),
            "k_proj": ((KEY_HEADS, HEAD_DIM, INPUTS), P(None, "tp", "fsdp")),
        },
    ),
}


def draw(case):
    """Parameters, and max logits `[*stack, rows, heads]` on both sides of 100."""
    rng = np.random.default_rng(0)
    params = {
        name: {"w": rng.standard_normal(shape).astype(np.float32)}
        for name, (shape, _) in case.kernels.items()
    }
    maxima = 15 * np.exp(2 * rng.standard_normal((*case.stack, ROWS, HEADS)))
    return {"attn": params}, {"attn": {"max_logits": maxima.astype(np.float32)}}


def clip_with(head_layout, shared_key):
    return functools.partial(mc.qk_clip, layout=head_layout, shared_key=shared_key)


@pytest.mark.parametrize("shared_key", ["query", "group"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", CASES)
def test_clip_equals_one_device(name, kind, shared_key):
    case = CASES[name]
    clip = clip_with(case.head_layout, shared_key)
    params, stats = draw(case)
    expected, expected_info = jax.jit(clip)(params, stats)
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(kind, kind))
    shardings = {
        "attn": {name: {"w": NamedSharding(mesh, spec)} for name, (_, spec) in case.kernels.items()}
    }
    rows = P(*[None] * len(case.stack), "fsdp", "tp")
    with jax.set_mesh(mesh):
        sharded = jax.device_put(params, shardings)
        maxima = jax.device_put(stats, NamedSharding(mesh, rows))
        new, info = jax.jit(clip)(sharded, maxima)
    chex.assert_trees_all_close(jax.device_get(new), jax.device_get(expected), rtol=1e-6)
    chex.assert_trees_all_close(jax.device_get(info), jax.device_get(expected_info), rtol=1e-6)
    assert 0 < info.clipped_heads < math.prod((*case.stack, HEADS))
    for array, sharding in zip(jax.tree.leaves(new), jax.tree.leaves(shardings), strict=True):
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
