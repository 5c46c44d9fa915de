"""The splash attention kernel of tokamax, which returns the largest logit of each query.

For TPUs. It is a private part of tokamax; only `_kernel` uses its names.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Integer

from muonclip_jax._attention.visible import Pair, Window, band
from muonclip_jax._common.types import Scalar

# The logit of a masked pair, in jax.nn and in tokamax.
# Source: jax 0.10 and 0.12, jax/_src/nn/functions.py, `_get_large_negative`.
MASKED = -0.7 * float(np.finfo(np.float32).max)

# Queries, and keys, of one block: the largest that fits; a TPU has 128 lanes. Keys are computed
# at most 512 at a time. Source: tokamax 0.0.17, splash_attention/pallas_mosaic_tpu.py and
# pallas_mosaic_tpu_vjp.py, `_get_heuristics_config` (1024 or 128, and 512); 512 and 256 are ours.
_BLOCKS = (1024, 512, 256, 128)
_LARGEST_COMPUTED = 512

_MODULES = "tokamax._src.ops.experimental.tpu.splash_attention."


def splash_attention(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b s k h"],
    value: Float[Array, "b s k v"],
    bias: Array | None,
    mask: Array | None,
    *,
    scale: Scalar,
    is_causal: bool,
    query_seq_lengths: Integer[Array, " b"] | None,
    key_value_seq_lengths: Integer[Array, " b"] | None,
    local_window_size: Window | None,
    implementation: str | None,
) -> tuple[Float[Array, "b t n v"], Float[Array, "b t n"], Float[Array, "b n"]]:
    """Computes attention, its log-sum-exp, and the largest logit of each head, by one kernel.

    Args:
      query: Queries.
      key: Keys.
      value: Values, of any width.
      bias: Raises unless None.
      mask: Raises unless None.
      scale: Factor on `q . k`.
      is_causal: Whether query i sees only keys j <= i.
      query_seq_lengths: Number of queries of each row without padding.
      key_value_seq_lengths: The same for keys.
      local_window_size: As in `jax.nn.dot_product_attention`.
      implementation: Raises unless None.

    Returns:
      Output, log-sum-exp in the dtype of the keys, and largest logits.

    Raises:
      ValueError: with all arguments that the kernel does not support.
      ImportError: if tokamax is missing, or has other names.
    """
    t, s = query.shape[1], key.shape[1]
    within = band(t, s, is_causal, local_window_size)
    unsupported = {"bias": bias, "mask": mask, "implementation": implementation}
    _check([name for name, x in unsupported.items() if x is not None], query, key, value, within)
    # The kernel has no scale. One rounding, and none if the scale is a power of two.
    query = (query.astype(jnp.float32) * jnp.asarray(scale, jnp.float32)).astype(query.dtype)
    segments = _segments(t, s, query_seq_lengths, key_value_seq_lengths)
    try:
        out, lse, row_max = _kernel(query, key, value, within, segments)
    except (ImportError, AttributeError, KeyError, TypeError) as error:
        raise ImportError(
            'dot_product_attention: max_logit="tokamax" needs the splash attention kernel of '
            f"tokamax 0.0.17 (Python 3.12 or later, jax 0.11.1 or later): {error}. Install it with "
            '`pip install tokamax==0.0.17`, or use max_logit="exact".'
        ) from error
    # The maximum of a kernel may drop a NaN; the sum of exponentials does not.
    row_max = jnp.where(jnp.isnan(lse) & (row_max < jnp.inf), jnp.nan, row_max)
    empty = row_max <= MASKED / 2
    # The output of a row without a key is undefined, as in jax.nn. Zero has no gradient.
    out = jnp.where(jnp.swapaxes(empty, 1, 2)[..., None], 0, out)
    lse = jnp.swapaxes(jnp.where(empty, MASKED, lse), 1, 2).astype(key.dtype)
    return out, lse, jnp.max(jnp.where(empty, -jnp.inf, row_max), axis=-1)


def _kernel(
    query: Array,
    key: Array,
    value: Array,
    within: Pair | None,
    segments: tuple[Array, Array] | None,
) -> tuple[Float[Array, "b t n v"], Float[Array, "b n t"], Float[Array, "b n t"]]:
    """Runs the kernel, by names of tokamax 0.0.17: output, log-sum-exp, largest logit by row."""
    splash = importlib.import_module(_MODULES + "splash_attention_kernel")
    masks = importlib.import_module(_MODULES + "splash_attention_mask")
    t, s = query.shape[1], key.shape[1]
    q_block, k_block = (next(size for size in _BLOCKS if n % size == 0) for n in (t, s))
    computed = min(k_block, _LARGEST_COMPUTED)
    config = splash.SplashConfig(
        **{"block_q": q_block, "block_kv": k_block, "block_kv_compute": computed},
        # The same backwards: then both passes skip the blocks of keys that no query sees.
        **{"block_q_dkv": q_block, "block_kv_dkv": k_block, "block_kv_dkv_compute": computed},
        # Otherwise one gradient of the queries is kept for every block of keys.
        dq_reduction_steps=3 if s > 3 * k_block else None,
        # Powers of 2 need queries times log2 e, which rounds bfloat16.
        use_base2_exp=False,
    )
    if within is None:
        mask = masks.FullMask((t, s))
    else:
        mask = masks.LocalMask((t, s), window_size=(-within[0], within[1]), offset=0)
    attend = splash.make_splash_mha_single_device(
        mask, config=config, mask_value=MASKED, save_residuals=True
    )
    ids = None if segments is None else splash.SegmentIds(*segments)
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (query, key, value)]
    out, residuals = jax.vmap(attend)(*heads_first, ids)
    return jnp.swapaxes(out, 1, 2), residuals["logsumexp"], residuals["max_logits"]


def _segments(t: int, s: int, *lengths: Array | None) -> tuple[Array, Array] | None:
    """Assigns the padding of queries and the padding of keys to segments of their own."""
    if lengths == (None, None):
        return None
    batch = next(length.shape[0] for length in lengths if length is not None)

    def ids(size: int, length: Array | None, padding: int) -> Integer[Array, "b size"]:
        length = jnp.full(batch, size) if length is None else length
        return jnp.where(jnp.arange(size)[None] < length[:, None], 0, padding).astype(jnp.int32)

    return ids(t, lengths[0], 1), ids(s, lengths[1], 2)


def _check(unsupported: list[str], query: Any, key: Any, value: Any, within: Pair | None) -> None:
    """Raises one error with all arguments that the kernel does not support."""
    t, s = query.shape[1], key.shape[1]
    faults = [f"{name} is set; leave it out." for name in unsupported]
    if t % _BLOCKS[-1] or s % _BLOCKS[-1]:
        faults.append(f"there are {t} queries and {s} keys; pad to multiples of {_BLOCKS[-1]}.")
    if not query.dtype == key.dtype == value.dtype:
        dtypes = f"{query.dtype}, {key.dtype}, {value.dtype}"
        faults.append(f"query, key and value have dtypes {dtypes}; cast them to one.")
    lo, hi = within or (1 - t, s - 1)
    # The kernel does not write the output of queries that are masked a whole block at a time.
    if lo > hi or hi < 0 or t - 1 + lo > s - 1:
        faults.append("local_window_size leaves a query without a key.")
    if faults:
        head = 'dot_product_attention: max_logit="tokamax" does not support this.'
        raise ValueError("\n  ".join([head, *faults]) + '\nOr use max_logit="exact".')
