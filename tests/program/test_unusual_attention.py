"""Attention written in unusual ways: exact max logits and a clip to the threshold, or an error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support.by_day import by_day
from tests.support.program_attention import array, found

BATCH, LENGTH, WIDTH, HEADS, HEAD_DIM = 2, 6, 16, 4, 8
X = array(BATCH, LENGTH, WIDTH)
KERNEL = array(WIDTH, HEADS, HEAD_DIM)
PARAMS = {"q": KERNEL, "k": array(*KERNEL.shape), "v": array(*KERNEL.shape)}
GROUPED = {"q": KERNEL, "k": array(WIDTH, 2, HEAD_DIM), "v": array(WIDTH, 2, HEAD_DIM)}
SQUARE = {name: array(4, 4, 4) for name in "qkv"}, array(4, 4, 4)
CAUSAL = np.tri(LENGTH, dtype=bool)


def project(p, x):
    return (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")


def plain(p, x, tap):
    q, k, v = project(p, x)
    u = jnp.einsum("bthk,bshk->bhts", q, k)
    tap(u)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(u), v).sum()


def axes_in_other_orders(p, x, tap):
    q = jnp.einsum("btd,dhk->khbt", x, p["q"])
    k = jnp.einsum("btd,dhk->hbkt", x, p["k"])
    u = jnp.einsum("khbt,hbks->tbsh", q, k)
    tap(u.transpose(1, 3, 0, 2))
    v = jnp.einsum("btd,dhk->bhtk", x, p["v"])
    return jnp.einsum("tbsh,bhsk->bthk", jax.nn.softmax(u, 2), v).sum()


def heads_behind_the_batch(p, x, tap):
    b, t, *_ = x.shape
    q, k, v = (u.transpose(0, 2, 1, 3).reshape(-1, t, u.shape[-1]) for u in project(p, x))
    u = q @ k.swapaxes(1, 2)
    tap(u.reshape(b, -1, t, t))
    return (jax.nn.softmax(u) @ v).sum()


def heads_before_the_batch(p, x, tap):
    b, t, *_ = x.shape
    q, k, v = (u.transpose(2, 0, 1, 3).reshape(-1, t, u.shape[-1]) for u in project(p, x))
    u = q @ k.swapaxes(1, 2)
    tap(u.reshape(-1, b, t, t).swapaxes(0, 1))
    return (jax.nn.softmax(u) @ v).sum()


def keys_first_and_repeated_groups(p, x, tap):
    q, k, v = project(p, x)
    k, v = (jnp.tile(u, (1, 1, 2, 1)) for u in (k, v))  # head h uses key head h % 2
    u = jnp.einsum("bshk,bthk->bhst", k, q)
    tap(u.swapaxes(2, 3))
    return jnp.einsum("bhst,bshk->bthk", jax.nn.softmax(u, 2), v).sum()


def key_heads_by_index(p, x, tap):
    q, k, v = project(p, x)
    k, v = (u[:, :, np.array([0, 1, 1, 0])] for u in (k, v))
    u = jnp.einsum("bthk,bshk->bhts", q, k)
    tap(u)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(u), v).sum()


def queries_in_checkpointed_chunks(p, x, tap):
    q, k, v = project(p, x)
    tap(jnp.einsum("bthk,bshk->bhts", q, k))

    @jax.checkpoint
    def chunk(q):
        u = jnp.einsum("bthk,bshk->bhts", q, k)
        return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(u), v)

    q = q.reshape(BATCH, 3, 2, HEADS, HEAD_DIM).swapaxes(0, 1)
    return jax.lax.map(chunk, q).sum()


def windows_of_blocks(p, x, tap):
    """Each block of two attends to itself and to the block before."""
    q, k, v = (u.reshape(BATCH, 3, 2, HEADS, HEAD_DIM) for u in project(p, x))
    before = [jnp.pad(u[:, :-1], ((0, 0), (1, 0), *[(0, 0)] * 3)) for u in (k, v)]
    k, v = (jnp.concatenate(pair, 2) for pair in zip(before, (k, v), strict=True))
    u = jnp.einsum("bcthk,bcshk->bchts", q, k)
    there = (np.arange(3) > 0)[:, None] | (np.arange(4) >= 2)
    u = jnp.where(there[:, None, None], u, -1e9)
    tap(u.swapaxes(1, 2).reshape(BATCH, HEADS, LENGTH, 4))
    return jnp.einsum("bchts,bcshk->bcthk", jax.nn.softmax(u), v).sum()


def complex_rotations(p, x, tap):
    q, k, v = project(p, x)
    angle = np.arange(LENGTH)[:, None, None] / (1.0 + np.arange(4))

    def rotated(u):
        pairs = u.reshape(*u.shape[:-1], 4, 2)
        turned = jax.lax.complex(pairs[..., 0], pairs[..., 1])
        turned = turned * jnp.exp(1j * angle).astype(turned.dtype)
        return jnp.stack([turned.real, turned.imag], -1).reshape(u.shape)

    u = jnp.einsum("bthk,bshk->bhts", rotated(q), rotated(k))
    tap(u)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(u), v).sum()


def multiplied_by_a_mask(p, x, tap):
    q, k, v = project(p, x)
    mask = CAUSAL.astype(x.dtype)
    u = jnp.einsum("bthk,bshk->bhts", q, k) * mask - 1e9 * (1 - mask)
    tap(u)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(u), v).sum()


def dropout_of_logits_and_queries(p, x, tap):
    q, k, v = project(p, x)
    rng = np.random.default_rng(0)
    q = jnp.where(rng.uniform(size=q.shape) < 0.7, q / 0.7, 0)
    u = jnp.einsum("bthk,bshk->bhts", q, k)
    u = jnp.where(rng.uniform(size=u.shape) < 0.7, u, -1e9)
    tap(u)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(u), v).sum()


def gated_logits(p, x, tap):
    q, k, v = project(p, x)
    u = jnp.einsum("bthk,bshk->bhts", q, k) * jax.nn.sigmoid(x.sum(-1))[:, None, :, None]
    tap(u)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(u), v).sum()


CASES = {
    "equal sizes": (plain, *SQUARE),
    "axes in other orders": (axes_in_other_orders, *SQUARE),
    "heads behind the batch": (heads_behind_the_batch, PARAMS, X),
    "heads before a batch of equal size": (heads_before_the_batch, *SQUARE),
    "keys first, repeated groups": (keys_first_and_repeated_groups, GROUPED, X),
    "key heads by index": (key_heads_by_index, GROUPED, X),
    "queries in checkpointed chunks": (queries_in_checkpointed_chunks, PARAMS, X),
    "windows of blocks": (windows_of_blocks, PARAMS, X),
    "complex rotations": (complex_rotations, PARAMS, X),
    "multiplied by a mask": (multiplied_by_a_mask, PARAMS, X),
    "dropout of logits and queries": (dropout_of_logits_and_queries, PARAMS, X),
    "gated logits": (gated_logits, PARAMS, X),
}
BY_DAY = "axes in other orders", "heads before a batch of equal size", "key heads by index"


def recorded(fn, params, x):
    """Records the max logits of each head in float64."""
    with jax.enable_x64(True):
        tops = []
        fn(jax.tree.map(np.float64, params), np.float64(x), lambda u: tops.append(u.max((0, 2, 3))))
        return np.asarray(tops[0])


@pytest.mark.parametrize("name", by_day([*CASES], *BY_DAY))
def test_max_logits_are_exact_and_the_clip_reaches_the_threshold(name):
    fn, params, x = CASES[name]
    run = lambda p, x: fn(p, x, lambda u: None)  # noqa: E731
    with_stats = mc.with_max_logits(run, expect=1)
    (loss, stats), grads = jax.jit(jax.value_and_grad(with_stats, has_aux=True))(params, x)
    expected = jax.jit(jax.value_and_grad(run))(params, x)
    jax.tree.map(np.testing.assert_array_equal, (loss, grads), expected)
    before = recorded(fn, params, x)
    (top,) = jax.tree.leaves(stats)
    np.testing.assert_allclose(top.reshape(-1, before.size).max(0), before, rtol=2e-5)
    threshold = float(0.7 * np.median(before))
    clipped, _ = mc.qk_clip(params, stats, mc.analyze(run, params, x), threshold=threshold)
    after = recorded(fn, clipped, x)
    np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=2e-5)


def norms(u):
    return jnp.linalg.norm(u, axis=-1).swapaxes(1, 2)


REFUSED = {
    "cosines": (
        lambda q, k, u, x: u / norms(q)[..., None] / norms(k)[:, :, None],
        "scaled by what its queries or keys decide",
    ),
    "normalized": (
        lambda q, k, u, x: u / jnp.std(u, -1, keepdims=True),
        "scaled by what its queries or keys decide",
    ),
    "squared": (lambda q, k, u, x: u**2, "integer_pow is applied to its logits"),
    "times themselves": (lambda q, k, u, x: u * jnp.abs(u), "abs is applied to its logits"),
    "an input added": (
        lambda q, k, u, x: jnp.einsum("bthk,bshk->bhts", q + x[:, :, None, :8], k),
        "an input of the model is added",
    ),
    "a constant added": (
        lambda q, k, u, x: jnp.einsum("bthk,bshk->bhts", q + 1.0, k),
        "a constant is added",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_logits_that_kernels_do_not_scale_are_not_clipped(name):
    change, text = REFUSED[name]

    def fn(p, x):
        q, k, v = project(p, x)
        u = change(q, k, jnp.einsum("bthk,bshk->bhts", q, k), x)
        return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(u), v).sum()

    analysis = mc.analyze(fn, PARAMS, X)
    stats = {"max_logits": jnp.ones((BATCH, HEADS))}
    with pytest.raises(ValueError, match=text):
        mc.qk_clip(PARAMS, stats, analysis)
    mc.qk_clip(PARAMS, stats, analysis, threshold=float("inf"))


def test_kernels_without_their_mean_are_not_clipped():
    """The mean over heads changes with the factor of one head."""

    def fn(p, x):
        return plain(p | {"q": p["q"] - p["q"].mean(1, keepdims=True)}, x, lambda u: None)

    with pytest.raises(ValueError, match="a mean is applied"):
        mc.qk_clip(PARAMS, {"max_logits": jnp.ones(HEADS)}, mc.analyze(fn, PARAMS, X))


@pytest.mark.parametrize(
    ("soft", "text"),
    [
        (lambda u: jax.nn.softmax(jnp.arctan(u)), "atan is applied to its logits"),
        (lambda u: masked_twice(u, CAUSAL & ~np.tri(LENGTH, k=-3, dtype=bool)), "not understood"),
    ],
    ids=["bounded by another function", "hidden by a second mask"],
)
def test_max_logits_that_would_be_others_are_an_error(soft, text):
    def fn(p, x):
        q, k, v = project(p, x)
        return jnp.einsum("bhts,bshk->bthk", soft(jnp.einsum("bthk,bshk->bhts", q, k)), v).sum()

    with pytest.raises(ValueError, match=text):
        found(fn, PARAMS, X)


def masked_twice(u, mask):
    u = jnp.where(CAUSAL, u, -1e30)
    weights = jnp.exp(u - u.max(-1, keepdims=True)) * mask
    return weights / weights.sum(-1, keepdims=True)


def test_attention_between_columns_is_an_error():
    """As in XCiT: queries times keys is a sum over tokens, so that columns are no columns."""

    def fn(p, x):
        q, k, v = project(p, x)
        mix = jax.nn.softmax(jnp.einsum("bthk,bthj->bhkj", q, k))
        return jnp.einsum("bhkj,bthj->bthk", mix, v).sum()

    with pytest.raises(ValueError, match="not summed over their columns"):
        found(fn, PARAMS, X)
