"""What the models share: names of axes, projections, rotation, the MLP, and the stack of layers.

Axis letters of all models: B batch, T position, V vocabulary, D width of the residual stream, N
query heads, K key and value heads, H width of a head, F hidden width of an MLP, L layer, E expert.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm.presets import ROTARY_BASE
from lm.rules import constrain

VOCABULARY = 256  # every byte value, V

# Logical names of axes. Those of kernels are in the boxes of `model.init`; a mesh divides an array
# by rules from these names to its own.
AXES = {
    "vocab": "vocabulary, V",
    "embed": "residual stream, D",
    "heads": "query heads, N; or N times the columns of a head, head by head, in a flat kernel",
    "kv_heads": "key and value heads, K",
    "head_dim": "columns of a head, H",
    "latent": "latent queries, or keys and values, of MLA",
    "rope": "the rotary key that all heads share",
    "mlp": "hidden units of an MLP or of an expert, F",
    "experts": "routed experts, E",
    "router": "scores of the router, one for each expert",
    "layers": "layers of a scanned stack, L",
    # Of activations only.
    "batch": "sequences, B",
    "expert_batch": "sequences, in arrays that are divided by expert too",
    "embed_batch": "sequences, as they come out of the embedding, divided along D as it is",
}

# Unit rows: at first the residual stream is the embedding alone, and RMSNorm then changes little.
embed_init = nn.initializers.normal(1.0)
kernel_init = nn.initializers.lecun_normal()
zeros_init = nn.initializers.zeros_init()  # each residual branch, and the head, starts as nothing


def rotate(x: jax.Array, base: float = ROTARY_BASE) -> jax.Array:
    """Turns the pair (x[h], x[h + H/2]) at position t by the angle t · base^(-2h/H).

    Args:
      x: Queries or keys, [B T N H].
      base: Of the angles.

    Returns:
      The same shape and dtype. Inner products now depend on the distance of two positions only.
    """
    _, length, _, width = x.shape
    frequency = base ** (-jnp.arange(0, width, 2) / width)
    angle = (jnp.arange(length)[:, None] * frequency[None, :])[None, :, None, :]  # [1 T 1 H/2]
    sin, cos = jnp.sin(angle), jnp.cos(angle)  # f32: bf16 cannot tell 256 from 257
    left, right = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return turned.astype(x.dtype)


def linear(
    features: int | Sequence[int],
    axes: Sequence[str],
    *,
    name: str,
    dtype: Any,
    axis: int | Sequence[int] = -1,
    init: nn.initializers.Initializer = kernel_init,
) -> nn.DenseGeneral:
    """Builds a product with a kernel whose axes have names.

    Args:
      features: Output axes.
      axes: Names of the axes of the kernel, inputs first; of `AXES`.
      name: Of the module.
      dtype: To compute in; the kernel is float32.
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
      hidden: Width between, F.
      dtype: To compute in.
    """

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B T D] to [B T D]."""
        into, back = ("embed", "mlp"), ("mlp", "embed")
        gate = linear(self.hidden, into, name="gate", dtype=self.dtype)(x)
        up = linear(self.hidden, into, name="up", dtype=self.dtype)(x)
        down = linear(x.shape[-1], back, name="down", dtype=self.dtype, init=zeros_init)
        return down(constrain(nn.silu(gate) * up, "batch", None, "mlp"))


def embed(vocabulary: int, width: int, dtype: Any) -> nn.Embed:
    """Builds the embedding of the vocabulary, [V D]."""
    init = nn.with_logical_partitioning(embed_init, ("vocab", "embed"))
    return nn.Embed(vocabulary, width, dtype=dtype, embedding_init=init, name="embed")


def to_sequences(x: jax.Array) -> jax.Array:
    """Sends what the embedding gives, [B T D] and divided along D, to where its sequences are."""
    return constrain(constrain(x, "embed_batch", None, "embed"), "batch", None, None)


def head(vocabulary: int) -> nn.DenseGeneral:
    """Builds the product that gives the logits; float32, as is all that follows it."""
    axes = ("embed", "vocab")
    return linear(vocabulary, axes, name="lm_head", dtype=jnp.float32, init=zeros_init)


def stack(block: type[nn.Module], layers: int, keep_products: bool = True) -> Callable[..., Any]:
    """Builds a stack of equal layers as one scanned block, each parameter with a leading axis L.

    Args:
      block: Maps (x, None) to (x, None).
      layers: How many, L.
      keep_products: Whether the backward pass finds the products with weights, which are most of
        the work, and recomputes only what is cheap; else it finds the input of each layer only.

    Returns:
      What builds the module from the arguments of `block`.
    """
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if keep_products else None
    return nn.scan(
        nn.remat(block, prevent_cse=False, policy=policy),
        variable_axes={"params": 0, "intermediates": 0, "balance": 0, "loads": 0},
        split_rngs={"params": True},
        length=layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
