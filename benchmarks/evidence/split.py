"""Kernels of latent attention as one matrix for each head: GLM-5's Muon Split."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

HEADS = 4
# Columns of a head: query; key without rotary positions and value, which are matrices of their own.
COLUMNS = {"q_b": (24,), "kv_b": (16, 16)}


def by_head(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs an optimizer on a view of the parameters, where the flat kernels are split by head."""

    def update_fn(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        update = optax.with_extra_args_support(tx).update
        viewed, state = update(split(updates), state, split(params), **extra)
        return join(viewed, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(split(params)), update_fn)


def split(params: Any) -> Any:
    """Takes [L, rank, heads * columns] apart into [L, heads, rank, columns] for each part."""

    def apart(path: Any, x: jax.Array) -> Any:
        columns = COLUMNS.get(_module(path))
        if columns is None:
            return x
        heads = jnp.moveaxis(x.reshape(*x.shape[:-1], HEADS, sum(columns)), -2, -3)
        return tuple(jnp.split(heads, [sum(columns[:i]) for i in range(1, len(columns))], axis=-1))

    return jax.tree.map_with_path(apart, params)


def join(viewed: Any, like: Any) -> Any:
    """Undoes `split`; `like` has the structure that is wanted."""

    def together(path: Any, x: jax.Array, parts: Any) -> jax.Array:
        if _module(path) not in COLUMNS:
            return parts
        return jnp.moveaxis(jnp.concatenate(parts, axis=-1), -3, -2).reshape(x.shape)

    return jax.tree.map_with_path(together, like, viewed)


def _module(path: Any) -> str:
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return names[-2] if names[-1] == "kernel" else ""
