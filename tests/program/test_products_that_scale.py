"""Gains and masks that are written as products, as `einsum` writes them."""

import jax
import jax.numpy as jnp
import pytest

import muonclip_jax as mc
from tests.program.test_hard_cases import check, logits64, project, tops
from tests.program.test_hard_clips import clip_error
from tests.support.program_attention import PARAMS, X, array, attend

HEADS = jnp.arange(1.0, 5.0)


@pytest.mark.parametrize("given", [False, True], ids=["constant", "argument"])
def test_a_mask_of_heads_after_the_softmax(given):
    def fn(p, x, mask=HEADS):
        weigh = lambda u: jnp.einsum("bhts,h->bhts", jax.nn.softmax(u), mask)  # noqa: E731
        return attend(p, x, soft=weigh)

    args = (X, HEADS) if given else (X,)
    check(fn, PARAMS, args, tops(logits64(PARAMS, X, False)))


def test_a_scale_of_heads_before_the_softmax():
    def fn(p, x, scale):
        return attend(p, x, lambda u: jnp.einsum("bhts,h->bhts", u, scale))

    logits = logits64(PARAMS, X, False) * HEADS[:, None, None]
    check(fn, PARAMS, (X, HEADS), tops(logits))
    assert not mc.analyze(fn, PARAMS, X, HEADS).attention[0].faults


def test_the_gain_of_a_norm_of_queries():
    params = PARAMS | {"qn": array(8), "kn": array(8)}

    def fn(p, x):
        q, k, v = project(p, x)
        q, k = (u / jnp.linalg.norm(u, axis=-1, keepdims=True) for u in (q, k))
        q, k = (jnp.einsum("bthk,k->bthk", u, g) for u, g in ((q, p["qn"]), (k, p["kn"])))
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        return jnp.einsum("bhts,bshk->bthk", weights, v).sum()

    (site,) = mc.analyze(fn, {n: params[n] for n in ("q", "k", "v", "qn", "kn")}, X).attention
    assert (site.query, site.key, site.num_heads) == (("q",), ("k",), 4)
    assert site.qk_norm
    assert not site.faults


def test_a_query_kernel_over_its_largest_singular_value():
    u = array(8)

    def fn(p, x, u):
        v = jnp.einsum("dhk,k->dh", p["q"], u)
        size = jnp.einsum("dh,dhk,k->", v / jnp.linalg.norm(v), p["q"], u)
        return attend(p | {"q": p["q"] / size}, x)

    assert "div is applied to queries, keys or their kernels" in clip_error(fn, PARAMS, X, u)
