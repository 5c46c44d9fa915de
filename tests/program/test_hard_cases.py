"""Programs in which max logits or heads could be silently wrong: exact, or an error."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support.program_attention import PARAMS, X, array, attend, found

MASK = jnp.tri(6, dtype=bool)


def logits64(p, x, hide=True):
    q, k = (np.einsum("btd,dhk->bthk", np.float64(x), np.float64(p[n])) for n in "qk")
    logits = np.einsum("bthk,bshk->bhts", q, k)
    return np.where(MASK, logits, -np.inf) if hide else logits


def project(p, x):
    return (jnp.einsum("btd,dhk->bthk", x, p[n]) for n in "qkv")


def check(fn, params, args, expected, grads=True, **settings):
    wrapped = mc.with_max_logits(fn, expect=settings.pop("expect", 1), **settings)
    if grads:
        (out, stats), grad = jax.jit(jax.value_and_grad(wrapped, has_aux=True))(params, *args)
        plain = jax.jit(jax.value_and_grad(fn))(params, *args)
        jax.tree.map(np.testing.assert_array_equal, (out, grad), plain)
    else:
        out, stats = jax.jit(wrapped)(params, *args)
        np.testing.assert_array_equal(out, jax.jit(fn)(params, *args))
    (x,) = jax.tree.leaves(stats)
    top = np.asarray(x).reshape(-1, x.shape[-1]).max(0)
    np.testing.assert_allclose(top, np.asarray(expected), rtol=2e-5)


def tops(logits):
    return logits.max((0, 2, 3))


def masked(p, x):
    return attend(p, x, lambda u: jnp.where(MASK, u, -1e30))


# Ways to run


def test_cond():
    def fn(p, x):
        return jax.lax.cond(x[0, 0, 0] > -99, masked, lambda p, x: x.sum() * 0.0, p, x)

    check(fn, PARAMS, (X,), tops(logits64(PARAMS, X)))


def test_cond_without_attention_in_the_taken_branch():
    def fn(p, x):
        return jax.lax.cond(x[0, 0, 0] > 99, masked, lambda p, x: x.sum() * 0.0, p, x)

    _, stats = found(fn, PARAMS, X)
    assert (stats["max_logits"] == -jnp.inf).all()


def test_while():
    def fn(p, x):
        def body(state):
            return (state[0] + 1, state[1] + masked(p, x * (state[0] + 1)))

        return jax.lax.while_loop(lambda state: state[0] < 2, body, (0, 0.0))[1]

    check(fn, PARAMS, (X,), tops(logits64(PARAMS, 2 * X)), grads=False)


def test_micro_batches():
    def fn(p, x):
        return jax.lax.map(lambda part: masked(p, part), x.reshape(2, 1, 6, 16)).sum()

    check(fn, PARAMS, (X,), tops(logits64(PARAMS, X)))


def test_a_scan_of_no_steps():
    def fn(p, x):
        return jax.lax.map(lambda part: masked(p, part), x.reshape(2, 1, 6, 16)[:0]).sum()

    _, stats = found(fn, PARAMS, X)
    assert (stats["max_logits"] == -jnp.inf).all()


def test_vmap_inside_and_outside():
    def fn(p, x):
        return jax.vmap(lambda one: masked(p, one[None]))(x).sum()

    check(fn, PARAMS, (X,), tops(logits64(PARAMS, X)))
    each = jax.vmap(mc.with_max_logits(masked, expect=1), (None, 0))
    _, stats = each(PARAMS, X[:, None])
    np.testing.assert_allclose(
        stats["max_logits"].reshape(-1, 4).max(0), tops(logits64(PARAMS, X)), rtol=2e-5
    )


def test_checkpoint_keeps_its_policy():
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    fn = jax.checkpoint(masked, policy=policy)
    check(fn, PARAMS, (X,), tops(logits64(PARAMS, X)))
    jaxprs = [str(jax.make_jaxpr(f)(PARAMS, X)) for f in (fn, mc.with_max_logits(fn, expect=1))]
    before, after = (re.findall("policy=.*", text) for text in jaxprs)
    assert before == after != []


def test_custom_gradients_stay():
    @jax.custom_vjp
    def soft(logits):
        return jax.nn.softmax(logits)

    soft.defvjp(lambda u: (soft(u), soft(u)), lambda w, g: (7.0 * g * w,))

    def fn(p, x):
        return attend(p, x, lambda u: jnp.where(MASK, u, -1e30), soft)

    check(fn, PARAMS, (X,), tops(logits64(PARAMS, X)))


def test_custom_gradients_around_the_whole_attention():
    @jax.custom_vjp
    def core(q, k, v):
        weights = jax.nn.softmax(jnp.where(MASK, jnp.einsum("bthk,bshk->bhts", q, k), -1e30))
        return jnp.einsum("bhts,bshk->bthk", weights, v)

    core.defvjp(lambda q, k, v: (core(q, k, v), (q, k, v)), lambda r, g: (g, g * 2, g * 3))

    def fn(p, x):
        return core(*project(p, x)).sum()

    check(fn, {n: PARAMS[n] for n in "qkv"}, (X,), tops(logits64(PARAMS, X)))


def test_custom_jvp_softmax():
    @jax.custom_jvp
    def soft(logits):
        return jax.nn.softmax(logits)

    @soft.defjvp
    def _(primals, tangents):
        return soft(*primals), 3.0 * tangents[0]

    check(lambda p, x: attend(p, x, soft=soft), PARAMS, (X,), tops(logits64(PARAMS, X, False)))


def test_shard_map_over_the_batch():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    spec = jax.sharding.PartitionSpec

    def fn(p, x):
        def local(p, x):
            return jax.lax.psum(masked(p, x), "data")

        return jax.shard_map(local, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec())(
            p, x
        )

    check(fn, PARAMS, (X,), tops(logits64(PARAMS, X)), grads=False)


def test_arguments_that_are_no_arrays():
    def fn(p, x, scale, *, causal):
        return attend(p, x * scale, lambda u: jnp.where(MASK, u, -1e30) if causal else u)

    out, stats = mc.with_max_logits(fn, expect=1)(PARAMS, X, 2.0, causal=False)
    expected = tops(logits64(PARAMS, 2.0 * np.float64(X), False))
    np.testing.assert_allclose(stats["max_logits"].max(0), expected, rtol=2e-5)
    np.testing.assert_allclose(out, fn(PARAMS, X, 2.0, causal=False), rtol=1e-6)


# Ways to write a softmax


def test_softmax_with_where():
    def fn(p, x):
        return attend(p, x, soft=lambda u: jax.nn.softmax(u, where=MASK))

    check(fn, PARAMS, (X,), tops(logits64(PARAMS, X)))


def test_keys_that_are_not_the_last_axis():
    def fn(p, x):
        q, k, v = project(p, x)
        logits = jnp.einsum("bthk,bshk->btsh", q, k)
        return jnp.einsum("btsh,bshk->bthk", jax.nn.softmax(logits, 2), v).sum()

    check(fn, {n: PARAMS[n] for n in "qkv"}, (X,), tops(logits64(PARAMS, X, False)))


def test_log_sum_exp():
    def soft(u):
        return jnp.exp(u - jax.nn.logsumexp(u, -1, keepdims=True))

    check(lambda p, x: attend(p, x, soft=soft), PARAMS, (X,), tops(logits64(PARAMS, X, False)))


def test_base_two():
    def soft(u):
        u = u * np.log2(np.e)
        weights = jnp.exp2(u - u.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    check(lambda p, x: attend(p, x, soft=soft), PARAMS, (X,), tops(logits64(PARAMS, X, False)))


@pytest.mark.parametrize("bound", [lambda u: jnp.clip(u, -0.5, 0.5), lambda u: jnp.minimum(u, 0.5)])
def test_clamped_logits_are_those_before_the_clamp(bound):
    expected = tops(logits64(PARAMS, X, False))
    assert (expected > 0.5).any()
    check(lambda p, x: attend(p, x, bound), PARAMS, (X,), expected)


def test_jax_dot_product_attention_with_grouped_queries():
    params = PARAMS | {"k": array(16, 2, 8), "v": array(16, 2, 8)}

    def fn(p, x):
        return jax.nn.dot_product_attention(*project(p, x), is_causal=True).sum()

    params.pop("o")
    wide = {"q": params["q"], "k": np.repeat(params["k"], 2, 1)}
    check(fn, params, (X,), tops(logits64(wide, X)) * 8**-0.5)
    (site,) = mc.analyze(fn, params, X).attention
    assert (site.num_heads, site.num_kv_heads) == (4, 2)


def test_sink_in_the_first_column_and_logits_in_two_parts():
    def parts(p, x):
        q, k, v = project(p, x)
        near = jnp.einsum("bthk,bshk->bhts", q, k[:, :2])
        far = jnp.einsum("bthk,bshk->bhts", q, k[:, 2:])
        sink = jnp.full((2, 4, 6, 1), 99.0)
        weights = jax.nn.softmax(jnp.concatenate([sink, near, far], -1))[..., 1:]
        return jnp.einsum("bhts,bshk->bthk", weights, v).sum()

    params = {n: PARAMS[n] for n in "qkv"}
    check(parts, params, (X,), tops(logits64(PARAMS, X, False)))
    assert mc.analyze(parts, params, X).attention[0].sink


def test_logits_in_two_parts():
    def parts(p, x):
        q, k, v = project(p, x)
        near = jnp.einsum("bthk,bshk->bhts", q, k[:, :2])
        far = jnp.einsum("bthk,bshk->bhts", q, k[:, 2:])
        weights = jax.nn.softmax(jnp.concatenate([near, far], -1))
        return jnp.einsum("bhts,bshk->bthk", weights, v).sum()

    check(parts, {n: PARAMS[n] for n in "qkv"}, (X,), tops(logits64(PARAMS, X, False)))


@pytest.mark.parametrize(
    "soft",
    [
        lambda u: jax.nn.softmax(u, -2) / jax.nn.softmax(u, -2).sum(-1, keepdims=True),
        lambda u: _normalized(jnp.exp((u - u.max(-1, keepdims=True)) * 3.0)),
        lambda u: _normalized(jnp.exp(jnp.where(MASK, u - u.max(-1, keepdims=True), -1e9))),
        lambda u: _normalized(jnp.exp(u - u.max(-1, keepdims=True)) * MASK),
        lambda u: _normalized(jnp.exp(u - 3.0)),
        lambda u: _normalized(jnp.exp(u - u.max())),
    ],
    ids=["over queries", "scaled later", "masked later", "multiplied", "constant", "of all rows"],
)
def test_a_softmax_that_is_not_understood_is_an_error(soft):
    with pytest.raises(ValueError, match="not understood"):
        found(lambda p, x: attend(p, x, soft=soft), PARAMS, X)


def _normalized(weights):
    return weights / weights.sum(-1, keepdims=True)


def test_logits_without_a_product_primitive_are_an_error():
    def fn(p, x):
        q, k, v = project(p, x)
        logits = (q[:, :, None] * k[:, None]).sum(-1)  # batch, t, s, heads
        return jnp.einsum("btsh,bshk->bthk", jax.nn.softmax(logits, 2), v).sum()

    with pytest.raises(ValueError, match="not understood"):
        found(fn, {n: PARAMS[n] for n in "qkv"}, X, expect=0)


def test_dropout_of_weights_is_no_mask():
    def soft(u):
        keep = jax.random.bernoulli(jax.random.key(0), 0.5, u.shape)
        return jnp.where(keep, jax.nn.softmax(u) / 0.5, 0.0)

    check(lambda p, x: attend(p, x, soft=soft), PARAMS, (X,), tops(logits64(PARAMS, X, False)))
