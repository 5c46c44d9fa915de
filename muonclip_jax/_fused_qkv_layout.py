"""Queries, keys and values of all heads from one kernel."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from muonclip_jax._attention_layouts import Layout, Leaf, Shape
from muonclip_jax._shared_key import query_and_key_factors
from muonclip_jax._types import Scalar

_ORDERS = ("sectioned", "interleaved")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class FusedQKVLayout(Layout):
    """Attention with one module for queries, keys and values: MHA, GQA, MQA.

    Its columns, all axes after d read in order, are `N + 2K` heads of `head_dim` for N query heads
    and K key heads. Those of the values are never touched. Immutable and hashable.

    Attributes:
      head_dim: Columns of a head.
      num_kv_heads: Key heads, K; None is one for each query head.
      qkv: Name of the module inside the attention module.
      order: `"sectioned"` is all queries, all keys, all values. `"interleaved"` is, for each key
        head, its N / K queries, its key, its value: the order of Megatron-LM, and with K = N that
        of GPT-NeoX.
      kernel_ndim: Rank of one layer's kernel: 2 is flat, 3 has any two axes of columns, such as
        `(d, N + 2K, head_dim)`, 4 is `(d, 3, N, head_dim)`, or interleaved `(d, N, 3, head_dim)`.
      head_axis: This and all others: see `MultiHeadLayout`.

    Raises:
      ValueError: if a width, an axis, a rank or the order is impossible.

    Example:
      >>> import jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> layout = mc.FusedQKVLayout(head_dim=2, num_kv_heads=1)
      >>> params = {"qkv": {"kernel": jnp.ones((1, 8))}}  # two queries, one key, one value
      >>> new, _ = mc.qk_clip(params, {"max_logits": jnp.array([400.0, 7.0])}, layout)
      >>> new["qkv"]["kernel"].tolist()
      [[0.25, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]

    References:
      Kimi K2, arXiv 2507.20534, section 2.1. The interleaved order: Megatron-LM,
      `megatron/core/transformer/attention.py`, `get_query_key_value_tensors`.
    """

    module_fields: ClassVar[tuple[str, ...]] = ("qkv",)
    initials: ClassVar[tuple[str, ...]] = ("qkv",)
    kernel_ndims: ClassVar[tuple[int, ...]] = (2, 3, 4)

    head_dim: int
    num_kv_heads: int | None = None
    qkv: str = "qkv"
    order: str = "sectioned"
    kernel_ndim: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.head_dim < 1:
            raise ValueError(f"{self}: head_dim must be at least 1.")
        if self.num_kv_heads is not None and self.num_kv_heads < 1:
            raise ValueError(f"{self}: num_kv_heads must be at least 1.")
        if self.order not in _ORDERS:
            raise ValueError(f"{self}: order must be one of {', '.join(map(repr, _ORDERS))}.")

    def faults(self, kernels: Mapping[str, Leaf], stack: int, heads: int) -> Iterator[str]:
        """Says what in the kernel does not fit a statistic of so many heads."""
        kernel, key_heads = kernels[self.qkv], self.num_kv_heads or heads
        columns = self.column_shape(kernel.shape, stack)[1]
        total = heads + 2 * key_heads
        if heads % key_heads:
            yield f"{kernel}: num_kv_heads={key_heads} does not divide {heads}, as {self.stat} has."
        elif math.prod(columns) != total * self.head_dim:
            yield (
                f"{kernel} has {math.prod(columns)} columns, not the {total * self.head_dim} of "
                f"{heads} query heads, as its {self.stat} has, and 2 x {key_heads} heads of "
                f"head_dim {self.head_dim}."
            )
        elif len(columns) == 3 and columns != self._three_axes(heads):
            yield (
                f"{kernel} has columns {columns}, not {self._three_axes(heads)}, as {self.order} "
                f"ones of {heads} heads have."
            )

    def factors(
        self,
        gamma: Float[Array, "*stack heads"],
        kernels: Mapping[str, Leaf],
        alpha: Scalar,
        shared_key: str,
    ) -> dict[str, Float[Array, "*stack some_heads width"]]:
        """Gives, by module name, the factor of each column of each head."""
        key_heads = self.num_kv_heads or gamma.shape[-1]
        query, key = query_and_key_factors(gamma, key_heads, alpha, shared_key)
        value = jnp.ones_like(key)
        if self.order == "interleaved":
            # By key head: its queries, itself, its value.
            groups = query.reshape(*key.shape, -1), key[..., None], value[..., None]
            heads = jnp.concatenate(groups, axis=-1).reshape(*key.shape[:-1], -1)
        else:
            heads = jnp.concatenate((query, key, value), axis=-1)
        return {self.qkv: jnp.broadcast_to(heads[..., None], (*heads.shape, self.head_dim))}

    def _three_axes(self, heads: int) -> Shape:
        """The axes of the columns of a kernel of rank 4."""
        sizes = (3, heads) if self.order == "sectioned" else (heads, 3)
        return (*sizes, self.head_dim)
