"""Max logits from tokamax's splash attention kernel, interpreted on CPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec as P

from benchmarks.compiled import collectives
from muonclip_jax._attention.attention import dot_product_attention
from tests.support import reference_attention as reference
from tests.support.attention_cases import draw
from tests.support.logit_cases import SPECS, lengths, queries_and_keys

SPLASH = "tokamax._src.ops.experimental.tpu.splash_attention"
kernel: Any = pytest.importorskip(
    f"{SPLASH}.splash_attention_kernel",
    reason="tokamax is not installed; it needs Python 3.12 and jax 0.11.1",
)


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    """Replaces the compiled kernel, which needs a TPU."""
    config = functools.partial(kernel.SplashConfig, interpret=True)
    monkeypatch.setattr(kernel, "SplashConfig", config)
    with jax.numpy_rank_promotion("allow"):  # tokamax relies on it
        yield


CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "nothing": (256, 256, {}),
    "causal, more keys than queries": (128, 640, {"is_causal": True}),
    "window": (256, 384, {"local_window_size": (130, 7)}),
    "lengths": (
        *(256, 256),
        {"query_seq_lengths": lengths(1, 200), "key_value_seq_lengths": lengths(130, 1)},
    ),
    "all": (
        *(256, 256),
        {
            "scale": 0.3,
            "is_causal": True,
            "local_window_size": (140, 9),
            "query_seq_lengths": lengths(256, 31),
            "key_value_seq_lengths": lengths(90, 0),
        },
    ),
}


def inputs(t=256, s=256, dtype: Any = np.float32):
    q, key = queries_and_keys(t=t, s=s, k=2, h=16, dtype=dtype)
    return q, key, draw(4, *key.shape[:3], 24, dtype=dtype)


def attend(*args, **options):
    return dot_product_attention(*args, max_logit="tokamax", **options)


@functools.cache
def results(case, function=attend):
    """Output, max logits and gradients; the output of a query without keys is zero."""
    t, s, options = CASES[case]
    rules = {name: x for name, x in options.items() if name != "scale"}
    sees = reference.visible((2, 4, t, s), **rules).any(-1).swapaxes(1, 2)[..., None]

    def loss(*qkv):
        out, max_logits = function(*qkv, **options)
        out = out if function is attend else jnp.where(sees, out, 0)
        return jnp.sum(out**2) + jnp.sum(max_logits), (out, max_logits)

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, aux), grads = gradient(*inputs(t, s))
    return *aux, grads


@pytest.mark.parametrize("case", CASES)
def test_row_maxima_equal_float64(case):
    t, s, options = CASES[case]
    expected = reference.max_logits(*inputs(t, s)[:2], **options)
    # Measured 5e-7.
    np.testing.assert_allclose(results(case)[1], expected, rtol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_jax_nn(case):
    (out, _, grads), (expected, _, expected_grads) = (
        results(case, function) for function in (attend, dot_product_attention)
    )
    np.testing.assert_allclose(out, expected, atol=2e-6)
    for actual, expected in zip(grads, expected_grads, strict=True):
        # Measured 6e-5 where terms of size 50 cancel, and 3e-6 of gradients of size 1000.
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=2e-4)


def test_bfloat16_maxima_are_exact_if_the_scale_is_a_power_of_two():
    qkv = inputs(t=128, s=128, dtype=jnp.bfloat16)
    out, max_logits = jax.jit(attend)(*qkv)
    assert out.dtype == jnp.bfloat16
    # Measured 2e-7; 2e-3 with `use_base2_exp`.
    np.testing.assert_allclose(max_logits, reference.max_logits(*qkv[:2]), rtol=2e-6)


def test_bfloat16_queries_are_rounded_once_by_another_scale():
    q, key, value = inputs(t=128, s=128, dtype=jnp.bfloat16)
    scaled = (q.astype(jnp.float32) * 0.3).astype(jnp.bfloat16)
    expected = reference.max_logits(scaled, key, scale=1)
    max_logits = jax.jit(functools.partial(attend, scale=0.3))(q, key, value)[1]
    np.testing.assert_allclose(max_logits, expected, rtol=2e-6)


def test_one_kernel_forward_and_one_backward():
    qkv = inputs(t=128, s=128)

    def kernels(function):
        return str(jax.make_jaxpr(function)(*qkv)).count(" pallas_call[")

    assert kernels(attend) == 1
    assert kernels(jax.grad(lambda *qkv: attend(*qkv)[0].sum())) == 2


def test_max_logits_have_no_gradient():
    grads = jax.jit(jax.grad(lambda *qkv: attend(*qkv)[1].sum(), (0, 1, 2)))(*inputs(128, 128))
    for grad in grads:
        np.testing.assert_array_equal(grad, np.zeros(grad.shape))


def test_nan_stays_in_its_row_and_head():
    q, key, value = inputs(t=128, s=128)
    run = jax.jit(attend)
    clean, dirty = run(q, key, value), run(q, key.at[1, 12, 1, 3].set(jnp.nan), value)
    for actual, expected, head in zip(dirty, clean, (2, 1), strict=True):
        expected = np.moveaxis(np.array(expected), head, 1)
        expected[1, 2:] = np.nan
        np.testing.assert_array_equal(np.moveaxis(np.asarray(actual), head, 1), expected)


def test_residual_is_the_log_sum_exp_of_each_query():
    q, key, value = (x[0] for x in inputs(t=128, s=128))
    (_, lse), _ = jax.jit(functools.partial(attend, return_residual=True))(q, key, value)
    logits = reference.logits(q[None], key[None])[0]
    np.testing.assert_allclose(lse, np.log(np.exp(logits).sum(-1)).T, atol=2e-6)


def test_inside_shard_map_each_device_runs_its_own_kernel():
    qkv = inputs(t=128, s=128)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(SPECS["query"], SPECS["key"], SPECS["value"]),
        out_specs=(SPECS["query"], P("data", "model")),
        check_vma=False,
    )
    compiled = jax.jit(sharded).lower(*qkv).compile()
    for actual, expected in zip(compiled(*qkv), attend(*qkv), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert collectives(compiled) == []


@pytest.mark.parametrize("t", [1024, 384])
def test_compiles_to_the_kernel_for_a_tpu(t, monkeypatch):
    monkeypatch.undo()
    x = jax.ShapeDtypeStruct((2, t, 4, 192), jnp.bfloat16)
    value = jax.ShapeDtypeStruct((2, t, 4, 128), jnp.bfloat16)

    def loss(*qkv):
        return attend(*qkv, is_causal=True)[0].astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, x, value)
    assert traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call") == 2


def test_a_renamed_kernel_raises(monkeypatch):
    monkeypatch.delattr(kernel, "make_splash_mha_single_device")
    with pytest.raises(ImportError, match=r"of tokamax 0\.0\.17 .*has no attribute 'make_splash"):
        attend(*inputs(t=128, s=128))


@pytest.mark.parametrize(
    ("t", "s", "window"), [(256, 128, (100, 0)), (128, 256, (5, -6)), (128, 256, (0, -1))]
)
def test_queries_without_a_key_raise(t, s, window):
    with pytest.raises(ValueError, match="local_window_size leaves a query without a key"):
        attend(*inputs(t=t, s=s), local_window_size=window)
