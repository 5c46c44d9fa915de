"""Kernels of latent attention as one matrix per head: GLM-5's Muon Split."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

HEADS = 4
# Output columns of a head: query; key without rotary embedding and value, two separate matrices.
COLUMNS = {"q_b": (24,), "kv_b": (16, 16)}


def by_head(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Wraps an optimizer so that it sees the flat kernels split by head."""

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        update = optax.with_extra_args_support(tx).update
        viewed, state = update(split(updates), state, split(params), **extra)
        return join(viewed, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(split(params)), update_fn)


def split(params: Any) -> Any:
    """Splits [L, rank, heads * columns] into [L, heads, rank, columns] for each part."""

    def split_leaf(path: Any, x: jax.Array) -> Any:
        columns = COLUMNS.get(_module(path))
        if columns is None:
            return x
        heads = jnp.moveaxis(x.reshape(*x.shape[:-1], HEADS, sum(columns)), -2, -3)
        return tuple(jnp.split(heads, [sum(columns[:i]) for i in range(1, len(columns))], axis=-1))

    return jax.tree.map_with_path(split_leaf, params)


def join(viewed: Any, like: Any) -> Any:
    """Inverts `split`; `like` has the structure of the result."""

    def join_leaf(path: Any, x: jax.Array, parts: Any) -> jax.Array:
        if _module(path) not in COLUMNS:
            return parts
        return jnp.moveaxis(jnp.concatenate(parts, axis=-1), -3, -2).reshape(x.shape)

    return jax.tree.map_with_path(join_leaf, like, viewed)


def _module(path: Any) -> str:
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return names[-2] if names[-1] == "kernel" else ""
