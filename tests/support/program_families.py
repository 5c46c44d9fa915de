"""Programs of more families, written in the style of public code: what they share.

The letters of axes and the words of roles are from `tests.support.program_models`. Each module
`program_families_*` holds some families; `MORE` has all of them once these are imported.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.program_models import SIZES, Family, family as add_family, hidden

SIZES |= dict(a=5, b=7, i=9, w=11, q=14, j=20, p=48)
SIZES |= dict(A=80, B=96, C=15, D=39, E=27, F=8, G=18, H=17, I=56)

MORE: dict[str, Family] = {}
_random = np.random.default_rng(7)
TIMES = _random.uniform(size=2).astype(np.float32)
LABELS = np.array([3, 17])
SENDERS, RECEIVERS = _random.integers(0, 6, (2, 20))


def floats(*shape):
    return _random.normal(size=shape).astype(np.float32)


def group(name):
    """Returns a decorator like `family` for programs of one group of families."""

    def family(**settings):
        add = add_family(into=MORE, **settings)

        def named(fn):
            add(fn)
            MORE[fn.__name__].group = name
            return fn

        return named

    return family


def layer_norm(x, gain=None, bias=None):
    x = x - x.mean(-1, keepdims=True)
    x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    x = x if gain is None else x * gain
    return x if bias is None else x + bias


def split_heads(x, count):
    """`[B, T, heads * columns]` to `[B, heads, T, columns]`."""
    return x.reshape(*x.shape[:-1], count, -1).swapaxes(-2, -3)


def merge_heads(x):
    x = x.swapaxes(-2, -3)
    return x.reshape(*x.shape[:-2], -1)


def attend(q, k, v, tap, path, causal=True, scale=0.3):
    """Attention of arrays `[B, heads, T, columns]`."""
    logits = hidden(jnp.matmul(q, k.swapaxes(-1, -2)) * scale, tap, path, causal)
    return jnp.matmul(jax.nn.softmax(logits, axis=-1), v)


def flat_attention(x, p, tap, path, heads=4, memory=None, causal=True):
    """Flat projections `wq`, `wk`, `wv`, `wo` without biases."""
    y = x if memory is None else memory
    q, k, v = (split_heads(u @ p[n], heads) for u, n in ((x, "wq"), (y, "wk"), (y, "wv")))
    return merge_heads(attend(q, k, v, tap, path, causal)) @ p["wo"]


def flat_specs(prefix, width="d", inner="y"):
    """Roles of the projections of `flat_attention`."""
    rows: dict[str, str] = dict.fromkeys(("wq", "wk", "wv"), f"{width}{inner}:{width}>{inner}")
    rows["wo"] = f"{inner}{width}:{inner}>{width}"
    return {f"{prefix}__{name}": text for name, text in rows.items()}


def conv(x, w, stride=1, padding: Any = "SAME", groups=1, numbers=("NHWC", "HWIO", "NHWC")):
    strides = (stride,) * (x.ndim - 2)
    return jax.lax.conv_general_dilated(
        x, w, strides, padding, dimension_numbers=numbers, feature_group_count=groups
    )


def cross_entropy(logits, labels):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)
    return -picked.mean()
