"""float64 NumPy oracles for attention logits and QK-clip, written from the paper with plain loops.

Kimi K2, arXiv 2507.20534, section 2.1 and algorithm 1. Imports nothing of the package.
"""

import math

import numpy as np


def logits(query, key, *, scale=None, bias=None, **rules):
    """All logits, `[batch, heads, t, s]`, with -inf where a pair may not attend."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    batch, t, heads, width = query.shape
    s, key_heads = key.shape[1:3]
    scale = 1 / math.sqrt(width) if scale is None else scale
    result = np.empty((batch, heads, t, s))
    for b in range(batch):
        for h in range(heads):
            result[b, h] = scale * query[b, :, h] @ key[b, :, h * key_heads // heads].T
    if bias is not None:
        result = result + np.asarray(bias, np.float64)
    return np.where(visible(result.shape, **rules), result, -np.inf)


def max_logits(query, key, **settings):
    """Largest logit of each batch row and head."""
    return logits(query, key, **settings).max((2, 3))


def attention(query, key, value, **settings):
    """Output of attention, for queries that see at least one key."""
    x = logits(query, key, **settings)
    weights = np.exp(x - x.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    value = np.repeat(np.asarray(value, np.float64), x.shape[1] // np.shape(value)[2], axis=2)
    return np.einsum("bhts,bshv->bthv", weights, value)


def visible(
    shape,
    *,
    mask=None,
    is_causal=False,
    ids=None,
    key_ids=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
    local_window_size=None,
):
    """The pairs that may attend, as `[batch, heads, t, s]`."""
    seen = np.broadcast_to(True if mask is None else np.asarray(mask), shape).copy()
    i, j = np.arange(shape[2])[:, None], np.arange(shape[3])[None, :]
    if is_causal:
        seen &= j <= i
    if local_window_size is not None:
        both = (local_window_size, local_window_size)
        left, right = both if isinstance(local_window_size, int) else local_window_size
        seen &= (j >= i - left) & (j <= i + right)
    for b in range(shape[0]):
        if ids is not None:
            seen[b] &= np.asarray(ids)[b][:, None] == np.asarray(key_ids)[b][None, :]
        if query_seq_lengths is not None:
            seen[b, :, int(query_seq_lengths[b]) :] = False
        if key_value_seq_lengths is not None:
            seen[b, :, :, int(key_value_seq_lengths[b]) :] = False
    return seen


def gamma(s, tau):
    """Factor on the logits of one head."""
    return tau / s if math.isfinite(s) and s > tau else 1.0


def query_and_key_factors(gammas, key_heads, alpha, rule):
    """Factors of each query head and of each key head, head by head."""
    group = len(gammas) // key_heads
    least = [min(gammas[k * group : (k + 1) * group]) for k in range(key_heads)]
    if group == 1:
        return [g**alpha for g in gammas], [g ** (1 - alpha) for g in gammas]
    if rule == "query":
        return list(gammas), [1.0] * key_heads
    queries = {
        "group": lambda g, low: low**alpha,
        "exact": lambda g, low: g / low ** (1 - alpha),
    }[rule]
    query = [queries(g, least[h // group]) for h, g in enumerate(gammas)]
    return query, [low ** (1 - alpha) for low in least]


def split_heads(kernel, heads, head_axis=-2):
    """The `(d, width)` matrices of the heads: of `(d, heads * width)` or of a rank-3 kernel."""
    kernel = np.asarray(kernel, np.float64)
    if kernel.ndim == 2:
        width = kernel.shape[1] // heads
        return [kernel[:, h * width : (h + 1) * width] for h in range(heads)]
    return [kernel[:, h] if head_axis == -2 else kernel[h] for h in range(heads)]


def project(x, kernel, heads, bias=None, head_axis=-2):
    """Projects `[batch, t, d]` to `[batch, t, heads, width]`."""
    matrices = split_heads(kernel, heads, head_axis)
    out = np.stack([np.asarray(x, np.float64) @ matrix for matrix in matrices], axis=2)
    if bias is not None:
        out = out + np.asarray(bias, np.float64).reshape(heads, -1)
    return out
