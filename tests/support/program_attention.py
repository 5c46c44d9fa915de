"""A small attention layer as a function of parameters, which the tests of hard programs vary."""

import jax
import jax.numpy as jnp
import numpy as np

import muonclip_jax as mc

RNG = np.random.default_rng(0)


def array(*shape):
    return jnp.asarray((RNG.normal(size=shape) * 0.3).astype(np.float32), jnp.float32)


X = array(2, 6, 16)
PARAMS = {"q": array(16, 4, 8), "k": array(16, 4, 8), "v": array(16, 4, 8), "o": array(4, 8, 16)}


def attend(p, x, logits_of=lambda logits: logits, soft=jax.nn.softmax):
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]) for n in "qkv")
    logits = logits_of(jnp.einsum("bthk,bshk->bhts", q, k))
    out = jnp.einsum("bhts,bshk->bthk", soft(logits), v)
    return jnp.einsum("bthk,hkd->btd", out, p["o"]).sum()


def found(fn, params, *args, expect=1, **settings):
    return mc.with_max_logits(fn, expect=expect, **settings)(params, *args)
