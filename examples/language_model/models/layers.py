"""Parts that the models share: projections, rotation, the MLP, the embedding and the layer stack.

Axis letters of all models: B batch, T position, V vocabulary, D width of the residual stream, N
query heads, K key and value heads, H width of a head, F hidden width of an MLP, L layer, E expert.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from examples.language_model.models.logical_axes import constrain
from examples.language_model.models.presets import ROTARY_BASE

VOCABULARY = 256  # every byte value, V

# Unit variance: at initialization the residual stream is the embedding alone, and RMSNorm then
# changes little.
embed_init = nn.initializers.normal(1.0)
kernel_init = nn.initializers.lecun_normal()
zeros_init = nn.initializers.zeros_init()  # of every residual branch and of the head


def rotate(x: jax.Array, base: float = ROTARY_BASE) -> jax.Array:
    """Rotates the pair (x[h], x[h + H/2]) at position t by the angle t · base^(-2h/H).

    Args:
      x: Queries or keys, [B T N H].
      base: Of the frequencies.

    Returns:
      The same shape and dtype. Inner products depend on the distance between two positions only.
    """
    _, length, _, width = x.shape
    frequency = base ** (-jnp.arange(0, width, 2) / width)
    angle = (jnp.arange(length)[:, None] * frequency[None, :])[None, :, None, :]  # [1 T 1 H/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)  # float32: in bfloat16, 257 is 256
    left, right = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return rotated.astype(x.dtype)


def linear(
    features: int | Sequence[int],
    axes: Sequence[str],
    *,
    name: str,
    dtype: Any,
    axis: int | Sequence[int] = -1,
    init: nn.initializers.Initializer = kernel_init,
) -> nn.DenseGeneral:
    """Builds a linear layer whose kernel has logical axes.

    Args:
      features: Output axes.
      axes: Logical axes of the kernel, inputs first; of `logical_axes.AXES`.
      name: Of the module.
      dtype: Of the computation; the kernel is float32.
      axis: Input axes.
      init: Of the kernel.

    Returns:
      The module.
    """
    return nn.DenseGeneral(
        features,
        axis=axis,
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(init, tuple(axes)),
        name=name,
    )


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)).

    Attributes:
      hidden: Hidden units, F.
      dtype: Of the computation.
    """

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B T D] to [B T D]."""
        inner, outer = ("embed", "mlp"), ("mlp", "embed")
        gate = linear(self.hidden, inner, name="gate", dtype=self.dtype)(x)
        up = linear(self.hidden, inner, name="up", dtype=self.dtype)(x)
        down = linear(x.shape[-1], outer, name="down", dtype=self.dtype, init=zeros_init)
        return down(constrain(nn.silu(gate) * up, "batch", None, "mlp"))


def embed(vocabulary: int, width: int, dtype: Any) -> nn.Embed:
    """Builds the embedding of the vocabulary, [V D]."""
    init = nn.with_logical_partitioning(embed_init, ("vocab", "embed"))
    return nn.Embed(vocabulary, width, dtype=dtype, embedding_init=init, name="embed")


def shard_sequences(x: jax.Array) -> jax.Array:
    """Reshards the output of the embedding, [B T D], from the axis D to the batch axis."""
    return constrain(constrain(x, "embed_batch", None, "embed"), "batch", None, None)


def head(vocabulary: int) -> nn.DenseGeneral:
    """Builds the output head; float32, as the loss is."""
    axes = ("embed", "vocab")
    return linear(vocabulary, axes, name="lm_head", dtype=jnp.float32, init=zeros_init)


def stack(block: type[nn.Module], layers: int, keep_products: bool = True) -> Callable[..., Any]:
    """Builds a stack of equal layers as one scanned block; each parameter has a leading axis L.

    Args:
      block: Maps (x, None) to (x, None).
      layers: Number of layers, L.
      keep_products: Whether the backward pass keeps the products with parameters, which are most of
        the FLOPs, and recomputes the rest; otherwise it keeps the input of each layer only.

    Returns:
      A function from the arguments of `block` to the module.
    """
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if keep_products else None
    return nn.scan(
        nn.remat(block, prevent_cse=False, policy=policy),
        variable_axes={"params": 0, "intermediates": 0, "balance": 0, "loads": 0},
        split_rngs={"params": True},
        length=layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
