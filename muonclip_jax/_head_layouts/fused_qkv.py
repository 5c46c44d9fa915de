"""Head layout of attention with one kernel for queries, keys and values."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from muonclip_jax._head_layouts.head_layout import Children, HeadLayout, Leaf
from muonclip_jax._head_layouts.kernel_pattern import Columns
from muonclip_jax._head_layouts.layout_evidence import (
    confirmation,
    out_without_heads,
    values_beside_qkv,
)
from muonclip_jax._head_layouts.sections import Section, Sections

_ORDERS = ("sectioned", "interleaved")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class FusedQKVLayout(HeadLayout):
    """Attention with one module for queries, keys and values: MHA, GQA, MQA.

    Without a literal number in `kernel`, its `heads` are `N + 2K` heads of `head_dim` for N query
    heads and K key heads. With a 3, they are N heads, and the 3 is the axis of queries, keys and
    values. Values are never scaled. Immutable and hashable.

    Attributes:
      head_dim: Width of a head.
      num_kv_heads: Number of key heads, K; None is one for each query head.
      qkv: Name of the module inside the attention module.
      order: `"sectioned"` is all queries, all keys, all values. `"interleaved"` is, for each key
        head, its N / K queries, its key, its value: the order of Megatron-LM, and with K = N the
        order of GPT-NeoX. If `kernel` has a 3, the position of the 3 is the order.
      kernel: Pattern of one layer's kernel, of names `inputs`, `heads`, `head_dim` and a literal 3:
        `"inputs (heads head_dim)"`, `"(heads head_dim) inputs"`, `"inputs heads head_dim"`,
        `"inputs 3 heads head_dim"`, `"inputs heads 3 head_dim"`, `"3 heads inputs head_dim"`,
        `"inputs (heads head_dim 3)"`, or any other order.
      stack_axis: This and all others: see `MultiHeadLayout`.

    Raises:
      ValueError: if a pattern, a width, an axis or the order is impossible.

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
    literals: ClassVar[tuple[str, ...]] = ("3",)

    head_dim: int
    num_kv_heads: int | None = None
    qkv: str = "qkv"
    order: str = "sectioned"
    kernel: str = "inputs (heads head_dim)"

    def __post_init__(self):
        super().__post_init__()
        self._check_int("head_dim", 1)
        if self.num_kv_heads is not None:
            self._check_int("num_kv_heads", 1)
        if self.order not in _ORDERS:
            raise ValueError(f"{self}: order must be one of {', '.join(map(repr, _ORDERS))}.")
        names = self.patterns[self.qkv].names
        if self.order == "interleaved" and "3" in names and names.index("3") < names.index("heads"):
            raise ValueError(f"{self}: a 3 before the heads is not interleaved.")

    def faults(
        self, kernels: Mapping[str, Leaf], stack: int, heads: int, children: Children
    ) -> Iterator[str]:
        """Lists mismatches. Arguments: see `HeadLayout`."""
        kernel, key_heads = kernels[self.qkv], self.num_kv_heads or heads
        pattern = self.patterns[self.qkv]
        sizes = self.sizes(self.qkv, kernel, stack, head_dim=self.head_dim)
        each = pattern.literal == 3
        total = heads if each else heads + 2 * key_heads
        if heads % key_heads:
            yield f"{kernel}: num_kv_heads={key_heads} does not divide the {heads} of {self.stat}."
        elif each and key_heads != heads:
            yield f"{kernel}: a pattern with a 3 has {heads} key heads, not {key_heads}."
        elif sizes is None:
            yield f"{kernel} does not divide into {str(pattern)!r} with head_dim={self.head_dim}."
        elif sizes["heads"] != total:
            parts = (
                "queries, of keys and of values" if each else f"queries and 2 x {key_heads} others"
            )
            yield (
                f"{kernel} has {sizes['heads']} heads of head_dim {self.head_dim}, not {total}: "
                f"{heads} of {parts}, by its {self.stat}."
            )
        else:
            yield from self._contradictions(kernels, sizes["inputs"], stack, heads, children)

    def _contradictions(
        self, kernels: Mapping[str, Leaf], n_in: int, stack: int, heads: int, children: Children
    ) -> Iterator[str]:
        """Describes children that contradict numbers of columns that fit."""
        kept, width = self.kept_leaves, self.head_dim
        if out := out_without_heads(self, children, stack, heads, width):
            yield (
                f"{heads} heads of head_dim {width}, but the output projection {out[0]!r} {out[1]} "
                f"has no axis of {heads * width}; {confirmation(kept, out[0])}"
            )
        if value := values_beside_qkv(self, kernels, children, n_in):
            yield (
                f"{kernels[self.qkv]} has columns of values, but {value!r} has a name of values; "
                f"{confirmation(kept, value)}"
            )

    def num_heads(self, kernels: Mapping[str, Leaf], stack: int) -> int:
        """Infers the number of query heads. Arguments: see `HeadLayout`."""
        kernel = kernels[self.qkv]
        sizes = self.sizes(self.qkv, kernel, stack, head_dim=self.head_dim)
        if sizes is None or self.patterns[self.qkv].literal == 3:
            return 1 if sizes is None else sizes["heads"]
        total = sizes["heads"]
        others = 2 * total // 3 if self.num_kv_heads is None else 2 * self.num_kv_heads
        heads = total - others
        if heads < 1 or heads % (others // 2 or 1) or (self.num_kv_heads is None and total % 3):
            keys = self.num_kv_heads or "an equal number of"
            raise ValueError(
                f"{kernel} has {total} heads of head_dim {self.head_dim}, expected queries, {keys} "
                f"keys and {keys} values."
            )
        return heads

    def sections(self, kernels: Mapping[str, Leaf], stack: int) -> dict[str, Sections]:
        """Describes the matrices of the kernel. Arguments: see `HeadLayout`."""
        heads, pattern = self.num_heads(kernels, stack), self.patterns[self.qkv]
        key_heads = self.num_kv_heads or heads
        sizes = self.sizes(self.qkv, kernels[self.qkv], stack, head_dim=self.head_dim) or {}
        axes, along, counts = pattern.axes, "heads", (heads, key_heads, key_heads)
        if pattern.literal == 3:
            sizes, along, counts = {**sizes, "3": 3}, "3", (1, 1, 1)
        elif self.order == "interleaved":  # by key head: its queries, itself, its value
            along, counts = "groups", (heads // key_heads, 1, 1)
            sizes = {**sizes, "kv_heads": key_heads, "groups": sum(counts)}
            axes = tuple(
                tuple(" ".join(axis).replace("heads", "kv_heads groups").split()) for axis in axes
            )
        names = ("queries", True), ("keys", True), ("values", self.split_values)
        parts = [Section(n, c, each) for (n, each), c in zip(names, counts, strict=True)]
        return {self.qkv: Sections(axes, sizes, tuple(parts), along)}

    def key_heads(self, kernels: Mapping[str, Leaf], stack: int, heads: int) -> int:
        """Returns the number of key heads. Arguments: see `HeadLayout`."""
        return self.num_kv_heads or heads

    def columns(
        self,
        kernels: Mapping[str, Leaf],
        gamma: Float[Array, "*stack heads"],
        query: Float[Array, "*stack heads"],
        key: Float[Array, "*stack key_heads"],
    ) -> dict[str, Columns]:
        """Orders the factors of all heads as the kernel does. Arguments: see `HeadLayout`."""
        value, pattern, names = jnp.ones_like(key), self.patterns[self.qkv], ("heads", "head_dim")
        if pattern.literal == 3:
            heads, names = jnp.stack((query, key, value), axis=-2), ("3", *names)
        elif self.order == "interleaved":
            # By key head: its queries, itself, its value.
            groups = query.reshape(*key.shape, -1), key[..., None], value[..., None]
            heads = jnp.concatenate(groups, axis=-1).reshape(*key.shape[:-1], -1)
        else:
            heads = jnp.concatenate((query, key, value), axis=-1)
        factors = jnp.broadcast_to(heads[..., None], (*heads.shape, self.head_dim))
        return {self.qkv: Columns(factors, names, pattern)}
