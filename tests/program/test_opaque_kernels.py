"""A kernel that cannot be read is an error, unless it is named with its max logits or ignored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import muonclip_jax as mc
from tests.support.program_attention import PARAMS, X, attend, found


def kernel_sum(q, k):
    def body(q_ref, k_ref, out_ref):
        out_ref[...] = q_ref[...] + k_ref[...]

    return pl.pallas_call(
        body, out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype), interpret=True, name="fused"
    )(q, k)


def with_kernel(p, x, kernel=kernel_sum):
    q, k = (jnp.einsum("btd,dhk->bthk", x, p[n]) for n in "qk")
    return kernel(q, k).sum()


def last_of_two_results(q, k):
    """As splash attention, whose first results are sums that only the kernel uses."""

    def body(q_ref, k_ref, sums_ref, out_ref):
        sums_ref[...] = q_ref[...]
        out_ref[...] = sums_ref[...] + k_ref[...]

    shape = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return pl.pallas_call(body, out_shape=(shape, shape), interpret=True, name="fused")(q, k)[1]


@pytest.mark.parametrize("kernel", [kernel_sum, last_of_two_results])
def test_an_opaque_kernel_is_an_error_by_name(kernel):
    fn = functools.partial(with_kernel, kernel=kernel)
    with pytest.raises(ValueError, match="the kernel 'fused' has two activations"):
        found(fn, PARAMS, X, expect=0)
    analysis = mc.analyze(fn, PARAMS, X)
    assert [site.opaque for site in analysis.attention] == ["fused"]
    assert analysis.attention[0].query == ("q",)


def logits64(p, x, scale=8**-0.5):
    q, k = (np.einsum("btd,dhk->bthk", np.float64(x), np.float64(p[n])) for n in "qk")
    return np.einsum("bthk,bshk->bhts", q, k) * scale


def test_a_named_kernel_gives_its_max_logits():
    out, stats = found(with_kernel, PARAMS, X, kernels={"fused": mc.max_attention_logit})
    np.testing.assert_allclose(stats["max_logits"], logits64(PARAMS, X).max((-2, -1)), rtol=1e-5)
    assert out == with_kernel(PARAMS, X)


@jax.jit
def flash(q, k, v, mask):
    return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=0.5)


def test_max_logits_of_named_kernels_in_a_scan():
    """Each layer has its own; the function gets as many operands as it takes."""
    params = {n: jnp.stack([PARAMS[n], 2 * PARAMS[n], 0.5 * PARAMS[n]]) for n in "qkv"}
    mask = jnp.tri(6, dtype=bool)[None, None]

    def fn(p, x):
        def layer(x, p):
            q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]) for n in "qkv")
            return x, flash(q, k, v, mask).sum()

        return jax.lax.scan(layer, x, p)[1].sum()

    causal = functools.partial(mc.max_attention_logit, is_causal=True, scale=0.5)
    kernels = {
        "two operands": causal,
        "all operands": lambda q, k, v, mask: mc.max_attention_logit(q, k, mask=mask, scale=0.5),
        "any operands": lambda *qkv: causal(*qkv[:2]),
    }
    layers = [{n: w[i] for n, w in params.items()} for i in range(3)]
    logits = np.stack([logits64(p, X, 0.5) for p in layers])
    expected = np.where(mask, logits, -np.inf).max((-2, -1))
    for kernel in kernels.values():
        out, stats = found(fn, params, X, expect=3, kernels={"flash": kernel})
        np.testing.assert_allclose(stats["max_logits"], expected, rtol=1e-5)
        np.testing.assert_allclose(out, fn(params, X), rtol=1e-6)


def test_max_logits_of_a_kernel_with_other_axes_are_an_error():
    def heads_first(p, x):
        q, k = (jnp.einsum("btd,dhk->bhtk", x, p[n]) for n in "qk")
        return kernel_sum(q, k).sum()

    with pytest.raises(ValueError, match=r"max logits \(2, 6\), expected \(..., 4\)"):
        found(heads_first, PARAMS, X, kernels={"fused": mc.max_attention_logit})


def test_an_ignored_kernel_is_no_attention():
    def fn(p, x):
        return attend(p, x) + with_kernel(p, x)

    _, stats = found(fn, PARAMS, X, ignore=("fused",))
    assert jax.tree.leaves(stats)[0].shape == (2, 4)
    with pytest.raises(ValueError, match="no kernel named 'other'"):
        found(fn, PARAMS, X, ignore=("fused", "other"))
