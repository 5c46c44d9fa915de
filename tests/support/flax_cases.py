"""Equal small attention modules of `flax.linen` and `flax.nnx`, for tests of sown max logits."""

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

import muonclip_jax as mc
from tests.support import reference_attention as reference
from tests.support.attention_cases import draw
from tests.support.strict import HAS_CAPTURE, NEEDS_CAPTURE

X = draw(0, 3, 7, 8)


def linen_attention(**settings):
    settings = {"num_heads": 2, "attention_fn": mc.linen.attention_fn} | settings
    return nn.MultiHeadDotProductAttention(**settings)


def nnx_attention(rngs=None, **settings):
    settings = {"num_heads": 2, "in_features": 8, "attention_fn": mc.nnx.attention_fn} | settings
    return nnx.MultiHeadAttention(decode=False, rngs=rngs or nnx.Rngs(0), **settings)


def run(module, variables, *args, **settings) -> tuple[Any, Any]:
    """Applies a Linen module; gives its output and what it sowed."""
    out, state = module.apply(variables, *args, mutable=["intermediates"], **settings)
    return out, state.get("intermediates", {})


apply = functools.partial(run, sow_weights=True)


def skip_without_capture():
    """Skips the test where Flax has no `nnx.capture`."""
    if not HAS_CAPTURE:
        pytest.skip(NEEDS_CAPTURE)


def capture(module, *args, **settings) -> tuple[Any, Any]:
    """Calls an NNX module, or a function of one; gives its output and what it sowed.

    Skips the test where Flax has no `nnx.capture`.
    """
    skip_without_capture()
    return nnx.capture(module, mc.nnx.MaxLogits)(*args, **settings)


def recomputed(params, x, **settings):
    """The largest logits of one attention module, in float64, from its parameters."""
    query, key = (
        reference.project(x, params[n]["kernel"], params[n]["kernel"].shape[1], params[n]["bias"])
        for n in ("query", "key")
    )
    return reference.max_logits(query, key, **settings)


def largest(params, x):
    """The same, reduced over the batch."""
    return np.max(recomputed(params, x), axis=0)


def linen_call(x, mask=None, *, kept=True, options=None, **settings) -> tuple[Any, Any]:
    """Calls Linen attention whose `attention_fn` has options; gives output and statistics."""
    attention_fn = functools.partial(mc.linen.attention_fn, **(options or {}))
    module = linen_attention(attention_fn=attention_fn, **settings)
    variables = module.init(jax.random.key(0), x)
    if kept:
        return apply(module, variables, x, mask=mask)
    return module.apply(variables, x, mask=mask, sow_weights=True), {}


def nnx_call(x, mask=None, *, kept=True, options=None, **settings) -> tuple[Any, Any]:
    """Calls NNX attention likewise, with a capture if the statistics are to be kept."""
    skip_without_capture()
    attention_fn = functools.partial(mc.nnx.attention_fn, **(options or {}))
    module = nnx_attention(attention_fn=attention_fn, **settings)
    if kept:
        return capture(module, x, mask=mask, sow_weights=True)
    return module(x, mask=mask, sow_weights=True), {}


CALLS = {"linen": linen_call, "nnx": nnx_call}
