"""A small transformer, its training step and its batch, for the tests on several devices."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc

# Of the 18 heads, untrained, 14 are above it.
TAU = 5.0


class Block(nn.Module):
    """Residual causal attention: `heads` query heads of width 4 on `key_heads` key heads."""

    heads: int
    key_heads: int

    @nn.compact
    def __call__(self, x, _=None):
        query = nn.DenseGeneral((self.heads, 4), name="query")(x)
        # Softmax ignores a key bias: its gradient is rounding noise, which Adam makes a full step.
        key = nn.DenseGeneral((self.key_heads, 4), use_bias=False, name="key")(x)
        value = nn.DenseGeneral((self.key_heads, 4), name="value")(x)
        maxima = mc.max_attention_logit(query, key, is_causal=True)
        mc.linen.sow_max_logits(self, maxima)
        out = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        small = nn.initializers.variance_scaling(0.1, "fan_in", "normal")
        out = nn.DenseGeneral(x.shape[-1], axis=(-2, -1), kernel_init=small, name="out")(out)
        return x + out, None


class Transformer(nn.Module):
    """Grouped queries, then another number of heads, then three equal layers under `nn.scan`."""

    @nn.compact
    def __call__(self, x):
        x, _ = Block(4, 2, name="grouped")(x)
        x, _ = Block(2, 2, name="plain")(x)
        stack = nn.scan(
            Block,
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=3,
        )
        return stack(4, 4, name="stack")(x)[0]


def batch_of(rows: int) -> np.ndarray:
    """Makes a batch `[rows, t, d]`, the last row larger: the largest logits of most heads."""
    x = np.random.default_rng(0).standard_normal((rows, 6, 8)).astype(np.float32)
    x[-1] *= 2
    return x


@jax.jit
def init(x: jax.Array) -> Any:
    """Makes the parameters, the same on every device and in every process."""
    return Transformer().init(jax.random.key(0), x)["params"]


def apply(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """Gives the output and the statistics."""
    result: Any = Transformer().apply({"params": params}, x, mutable=["intermediates"])
    out, state = result
    return out, state["intermediates"]


def loss_fn(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
    """Asks for the token before; gives the statistics too."""
    out, stats = apply(params, x)
    return jnp.mean((out - 2 * jnp.roll(x, 1, axis=1)) ** 2), stats


def train(
    optimizer: optax.GradientTransformation,
    params: Any,
    x: jax.Array,
    steps: int,
    loss_fn: Callable[[Any, jax.Array], tuple[jax.Array, Any]] = loss_fn,
) -> Any:
    """Trains; gives the parameters and what each clip saw."""

    @jax.jit
    def step(params, state, x):
        (_, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, x)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        params, info = mc.qk_clip(params, stats, threshold=TAU)
        return params, state, info

    state, infos = jax.jit(optimizer.init)(params), []
    for _ in range(steps):
        params, state, info = step(params, state, x)
        infos.append(info)
    return params, infos


def divided(params: Any, mesh: Mesh) -> Any:
    """Divides each kernel along the first axis that all devices divide, but stacks of layers."""

    def place(path, leaf):
        start = path[0].key == "stack"
        axes = [a for a in range(start, leaf.ndim) if leaf.shape[a] % mesh.size == 0]
        spec = [None] * leaf.ndim
        if path[-1].key == "kernel":
            spec[axes[0]] = mesh.axis_names[0]
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(place, params)


def muon_of(shardings: Any = None) -> optax.GradientTransformation:
    """Makes the Muon of these tests."""
    return mc.muon(0.01, consistent_rms=0.2, adam_learning_rate=1e-3, shardings=shardings)


def named_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Names every leaf by its path, as a file of arrays wants it."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
