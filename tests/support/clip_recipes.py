"""A model of one attention module whose logits training drives up, and its micro-batches."""

import functools

import jax
import jax.numpy as jnp

import muonclip_jax as mc
from tests.support.attention_cases import draw

TAU = 4.0
X = draw(0, 4, 5, 8)


def init():
    kernel = {"kernel": draw(1, 8, 2, 4)}
    return {"attn": {"query": kernel, "key": {"kernel": draw(2, 8, 2, 4)}}}


def loss_fn(params, x):
    """Rewards queries and keys that agree: every optimizer drives the logits up."""
    query, key = (
        jnp.einsum("btd,dnh->btnh", x, params["attn"][name]["kernel"]) for name in ("query", "key")
    )
    stats = {"attn": {"max_logits": (mc.max_attention_logit(query, key),)}}
    return -jnp.mean(jnp.sum(query * key, axis=-1)), stats


gradient = jax.grad(loss_fn, has_aux=True)


def max_logits_of(s):
    """Max logits of a batch of one, `s` in the first head."""
    return {"attn": {"max_logits": (jnp.asarray([[s, 0.0]]),)}}


def nothing_yet(stats):
    """Max logits of an empty batch."""
    return jax.tree.map(lambda s: jnp.full_like(s, -jnp.inf), stats)


def zeros(params):
    return jax.tree.map(jnp.zeros_like, params)


def with_another(params, carry, x):
    """Merges one more micro-batch: gradients are added, max logits are not."""
    grads, stats = carry
    more_grads, more_stats = gradient(params, x)
    return jax.tree.map(jnp.add, grads, more_grads), mc.merge_max_logits(stats, more_stats)


def accumulated(params, batches):
    """Starts from the first micro-batch."""
    start = gradient(params, batches[0])
    add = functools.partial(with_another, params)
    return jax.lax.scan(lambda carry, x: (add(carry, x), None), start, batches[1:])[0]


def accumulated_from_nothing(params, batches):
    """Compiles the forward pass once: starts from zero and from -inf."""
    grads, stats = jax.eval_shape(gradient, params, batches[0])
    add = functools.partial(with_another, params)
    start = zeros(grads), nothing_yet(stats)
    return jax.lax.scan(lambda carry, x: (add(carry, x), None), start, batches)[0]
