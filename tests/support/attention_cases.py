"""One small attention module and one clip of it, for the tests of QK-clip."""

import jax.numpy as jnp
import numpy as np

import muonclip_jax as mc

D, N, H = 3, 4, 2


def draw(seed, *shape, dtype=jnp.float32):
    # Rounded by NumPy: JAX would compile a conversion for each shape.
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype), dtype)


def attention(heads=N, key_heads=None, stack=(), dtype=jnp.float32, seed=0):
    """Parameters of one attention module, with biases, values and output."""
    key_heads = key_heads or heads
    shapes = {"query": heads, "key": key_heads, "value": key_heads}
    tree = {
        name: {
            "kernel": draw(seed + 1, *stack, D, count, H, dtype=dtype),
            "bias": draw(seed + 2, *stack, count, H, dtype=dtype),
        }
        for name, count in shapes.items()
    }
    tree["out"] = {"kernel": draw(seed + 3, *stack, heads, H, D, dtype=dtype)}
    return tree


def clip_one(maxima, key_heads=None, dtype=jnp.float32, **settings):
    """Clips one module; gives it before and after, and the info."""
    maxima = jnp.asarray(maxima, jnp.float32)
    params = attention(maxima.shape[-1], key_heads, dtype=dtype)
    new, info = mc.qk_clip({"attn": params}, {"attn": {"max_logits": maxima}}, **settings)
    return params, new["attn"], info


def same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def expected(kernel, factors, dtype=np.float32):
    """Rounds once, from float32: kernel times one factor for each head."""
    columns = np.asarray(factors, np.float32)[:, None]
    return (np.asarray(kernel, np.float32) * columns).astype(dtype)
