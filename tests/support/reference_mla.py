"""float64 NumPy oracle for multi-head latent attention, written from DeepSeek-V2 and Kimi K2.

DeepSeek-V2, arXiv 2405.04434, equations 9 to 19; Kimi K2, arXiv 2507.20534, section 2.1. Imports
nothing of the package.
"""

import math

import numpy as np

from tests.support import reference_attention


def rotate(x):
    """Turns each pair (x[h], x[h + H / 2]) at position t by t · 100^(-2h / H)."""
    half = x.shape[-1] // 2
    frequency = 100.0 ** (-np.arange(half) / max(half, 1))
    angle = np.arange(x.shape[1])[None, :, None, None] * frequency
    left, right = x[..., :half], x[..., half:]
    sin, cos = np.sin(angle), np.cos(angle)
    return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


def latent(x, module):
    """Projects to the latent vector: a product, and a norm if the module has one."""
    c = np.asarray(x, np.float64) @ np.asarray(module["kernel"], np.float64)
    return c / np.sqrt(np.mean(c**2, axis=-1, keepdims=True))


def queries_and_keys(x, params, *, heads, nope, rope, query, key_value, rope_first, head_axis):
    """Queries and keys [batch, t, heads, nope + rope] of a module with flat or 3-axis kernels."""

    def project(inputs, module):
        bias = module.get("bias")
        return reference_attention.project(inputs, module["kernel"], heads, bias, head_axis)

    q = project(latent(x, params["q_a"]) if "q_a" in params else x, params[query])
    q_rope, q_nope = (
        (q[..., :rope], q[..., rope:]) if rope_first else (q[..., nope:], q[..., :nope])
    )
    k_nope = project(latent(x, params["kv_a"]), params[key_value])[..., :nope]
    shared = np.asarray(x, np.float64) @ np.asarray(params["k_rope"]["kernel"], np.float64)
    k_rope = np.broadcast_to(rotate(shared[:, :, None]), (*k_nope.shape[:3], rope))
    queries = np.concatenate([q_nope, rotate(q_rope)], axis=-1)
    return queries, np.concatenate([k_nope, k_rope], axis=-1)


def max_logits(x, params, *, nope, rope, **names):
    """Largest causal logit of each batch row and head."""
    q, k = queries_and_keys(x, params, nope=nope, rope=rope, **names)
    return reference_attention.max_logits(q, k, scale=1 / math.sqrt(nope + rope), is_causal=True)
