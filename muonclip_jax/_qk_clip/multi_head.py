"""One module for the queries and one for the keys."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from muonclip_jax._common.types import Scalar
from muonclip_jax._qk_clip.child_names import is_out_projection, letters, names_keys_and_values
from muonclip_jax._qk_clip.head_layout import Children, Columns, Layout, Leaf
from muonclip_jax._qk_clip.kernel_pattern import NAMES, KernelPattern, kernel_pattern
from muonclip_jax._qk_clip.shared_key import query_and_key_factors

_KEY_NAMES = ("inputs", "heads", "kv_heads", "head_dim")
_IF_FUSED = (
    "If it holds keys and values, pass key_kernel with a 2 where they are stacked, such as "
    "key_kernel='inputs (2 heads head_dim)' (all keys, then all values) or "
    "'inputs (heads 2 head_dim)' (key and value of each head); if it holds keys alone, pass its "
    "pattern as key_kernel."
)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class MultiHeadLayout(Layout):
    """Attention with one module for the queries and one for the keys: MHA, GQA, MQA.

    `kernel` names the axes of one layer's query kernel. Its names are `inputs`, `heads` and
    `head_dim`, or `kv_heads` and `groups` in place of `heads`; parentheses hold names that are
    flattened into one axis. The number of query heads is the last axis of the max logits; the
    number of key heads follows from the key kernel. Query head h uses key head
    `h // (heads // key_heads)`, and head `kv_head * groups + group` is h. Biases have the axes of
    the kernel without `inputs`. The defaults are the names and axes of
    `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`. Immutable and
    hashable.

    Attributes:
      query: Name of the query module inside the attention module.
      key: Name of the key module, or of the module of keys and values.
      value: Name of the value module. A clip never scales it; the name only shows that the key
        module holds no values.
      kernel: Pattern of one layer's query kernel: `"inputs heads head_dim"`,
        `"inputs (heads head_dim)"`, `"(heads head_dim) inputs"`, `"heads inputs head_dim"`,
        `"heads head_dim inputs"`, `"kv_heads groups head_dim inputs"`, or any other order.
      key_kernel: Pattern of the key kernel. None is `kernel`, without `groups`. A literal 2 is the
        axis of keys and values: `"2 heads inputs head_dim"`, `"inputs (2 heads head_dim)"` (all
        keys, then all values), `"inputs (heads 2 head_dim)"` (key and value of each head).
      head_dim: Width of a key head, the dimension of the dot product. Required if a pattern
        flattens it with another axis. Checked against both kernels.
      query_dim: Leading columns of each query head that are query, where a query head is wider: the
        rest, such as an output gate, is not scaled. Equal to `head_dim`. None: all columns.
      stack_axis: Axis of the layers in every stacked parameter:
        `variable_axes={"params": stack_axis}`. Each rank above that of the pattern is a stack axis.
      stat_stack_axis: The same for the max logits.
      stat: Name of the max logits.
      scaled_leaves: Leaves that carry the columns of the heads. The first name is the kernel.
      kept_leaves: Leaves that are known and not scaled.
      qk_norm: Children that normalize queries or keys, which cancels a clip. None recognizes them
        by name, and raises for a norm whose name leaves it open. A tuple names exactly the norms
        of queries and keys; `()` declares that there are none.

    Raises:
      ValueError: if a pattern has an unknown name, or lacks one; if `head_dim` is missing; if a
        number is impossible.

    Example:
      >>> import muonclip_jax as mc
      >>> flat = "inputs (heads head_dim)"
      >>> mc.MultiHeadLayout(query="q_proj", key="k_proj", kernel=flat, head_dim=64)
      MultiHeadLayout(query='q_proj', key='k_proj', kernel='inputs (heads head_dim)', head_dim=64)
    """

    module_fields: ClassVar[tuple[str, ...]] = ("query", "key")
    axis_names: ClassVar[tuple[str, ...]] = NAMES

    query: str = "query"
    key: str = "key"
    value: str | None = None
    key_kernel: str | None = None
    head_dim: int | None = None
    query_dim: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.key_kernel is not None:
            self._parse("key_kernel", ("2",), _KEY_NAMES)
        for field in ("head_dim", "query_dim"):
            if getattr(self, field) is not None:
                self._check_int(field, 1)
        if "kv_heads" in self.patterns[self.query].names and "groups" not in self.kernel:
            raise ValueError(f"{self}: kernel needs 'groups' beside 'kv_heads'.")
        if None not in (self.head_dim, self.query_dim) and self.head_dim != self.query_dim:
            raise ValueError(f"{self}: query_dim must be equal to head_dim, the width of a key.")
        if self.query_dim and self.patterns[self.query].is_flat and "groups" in self.kernel:
            raise ValueError(f"{self}: query_dim needs 'heads' or an axis of head_dim in kernel.")
        if self.value in self.modules:
            raise ValueError(f"{self}: value must be a module of its own.")

    @property
    def patterns(self) -> dict[str, KernelPattern]:
        """The pattern of one layer's kernel, by module name."""
        query = kernel_pattern(self.kernel, (), NAMES)
        if self.key_kernel is None:
            return {self.query: query, self.key: query.key()}
        return {self.query: query, self.key: kernel_pattern(self.key_kernel, ("2",), _KEY_NAMES)}

    def faults(
        self, kernels: Mapping[str, Leaf], stack: int, heads: int, children: Children
    ) -> Iterator[str]:
        """Lists what does not fit. Arguments: see `Layout`."""
        fault = self._query_fault(kernels[self.query], stack, heads)
        fault = fault or self._key_fault(kernels, stack, heads)
        fault = fault or self._mirror_fault(kernels, stack, heads)
        if fault:
            yield fault
        elif self.value is not None:
            if self.value not in children:
                yield f"no child {self.value!r}, which is value; there are {_names(children)}."
        elif self.key_kernel is None:
            yield from self._value_faults(kernels[self.key], children)
            yield from self._gate_faults(kernels, stack, heads, children)

    def _query_fault(self, query: Leaf, stack: int, heads: int) -> str | None:
        """Says what does not fit between query kernel and number of heads."""
        pattern = self.patterns[self.query]
        known: dict[str, Any] = {}
        if pattern.is_flat:
            # A query head that is wider than head_dim has the width that the heads leave.
            known = {"heads": heads} if self.query_dim else {"head_dim": self.head_dim}
        sizes = self.sizes(self.query, query, stack, **known)
        wider = "" if self.query_dim else "; query heads that hold a gate too need query_dim="
        if sizes is None:
            given = f"head_dim={self.head_dim}" if "head_dim" in known else f"{heads} heads"
            return f"{query} does not divide into {str(pattern)!r} with {given}."
        found, width = _heads(sizes), sizes["head_dim"]
        if found != heads:
            of = f" of head_dim {self.head_dim}" if "head_dim" in known else ""
            hint = wider if of and found > heads else ""
            if sizes.get("groups") == heads:
                hint = "; flatten its last two axes (kv_heads, groups) to one, in this order"
            return f"{query} has {found} heads{of}, but its {self.stat} has {heads}{hint}."
        if width < (self.query_dim or 0):
            return f"{query} has heads of {width} columns, fewer than query_dim={self.query_dim}."
        if self.head_dim and not self.query_dim and width != self.head_dim:
            return f"{query} has heads of {width} columns, not head_dim={self.head_dim}{wider}."
        return None

    def _key_fault(self, kernels: Mapping[str, Leaf], stack: int, heads: int) -> str | None:
        """Says what does not fit between key kernel and a query kernel that fits."""
        query, key, pattern = kernels[self.query], kernels[self.key], self.patterns[self.key]
        width, groups = self._width(query, stack, heads), self._query_sizes(query, stack, heads)
        sizes = self.sizes(self.key, key, stack, **({"head_dim": width} if pattern.is_flat else {}))
        if sizes is None:
            return f"{key} does not divide into {str(pattern)!r} with head_dim={width}."
        if sizes["head_dim"] != width:
            gate = "" if self.query_dim else "; query heads that hold a gate too need query_dim="
            return f"{key} has heads of {sizes['head_dim']} columns, {query} has {width}{gate}."
        found = _heads(sizes)
        if not found or heads % found or groups.get("kv_heads", found) != found:
            return f"{key} has {found} key heads, which do not fit the {heads} heads of {query}."
        return None

    def _mirror_fault(self, kernels: Mapping[str, Leaf], stack: int, heads: int) -> str | None:
        """Says where inputs and outputs look swapped: unequal inputs that would be equal then."""
        pattern, head_dim = self.patterns[self.query], self.head_dim
        if self.key_kernel is not None or self.query_dim or not head_dim or len(pattern.axes) != 2:
            return None
        (q_in, q_out), (k_in, k_out) = (
            self.split(kernels[name].shape, stack)[1][:: 1 if pattern.input_axis == 0 else -1]
            for name in self.modules
        )
        key_heads, rest = divmod(k_in, head_dim)
        if q_in == k_in or q_out != k_out or q_in != heads * head_dim or rest or heads % key_heads:
            return None
        return (
            f"{kernels[self.query]} and {kernels[self.key]} have unequal inputs under "
            f"{self.kernel!r}, and equal ones under {str(pattern.mirrored())!r}: pass "
            "that kernel=, or key_kernel= to confirm this one."
        )

    def _value_faults(self, key: Leaf, children: Collection[str]) -> Iterator[str]:
        """Says where the key kernel seems to hold the values too."""
        others = [name for name in children if name not in self.modules]
        if names_keys_and_values(self.key):
            yield f"{key} seems to hold keys and values, so its key heads do not fit. {_IF_FUSED}"
        elif others and all(map(is_out_projection, others)):
            yield (
                f"no value module beside {_names(children)}, so {key} may hold keys and values. "
                f"{_IF_FUSED}"
            )

    def _gate_faults(
        self, kernels: Mapping[str, Leaf], stack: int, heads: int, children: Children
    ) -> Iterator[str]:
        """Says where head_dim seems to count a gate that query heads hold too.

        Where values have the shape of keys, the attention puts out heads of head_dim each, and
        these are a side of the output projection.
        """
        key, dim = kernels[self.key], self._width(kernels[self.query], stack, heads)
        values = [shape for name in children if letters(name) == {"v"} for shape in children[name]]
        outs = [shape for name in children if is_out_projection(name) for shape in children[name]]
        outs = [shape for shape in outs if len(shape) > stack + 1]
        fits = any(heads * dim in shape or {heads, dim} <= {*shape} for shape in outs)
        if self.query_dim or key.shape not in values or not outs or fits:
            return
        yield (
            f"{kernels[self.query]} gives {heads} heads of {dim} columns, but the output "
            f"projection {outs[0]} has no side of {heads * dim}; query heads that hold a gate too "
            "need query_dim=, and head_dim= is the width of a key head."
        )

    def factors(
        self,
        gamma: Float[Array, "*stack heads"],
        kernels: Mapping[str, Leaf],
        alpha: Scalar,
        shared_key: str,
    ) -> dict[str, Columns]:
        """Returns, by module name, the factor of each column of each head."""
        stack, heads = gamma.ndim - 1, gamma.shape[-1]
        sizes = self._query_sizes(kernels[self.query], stack, heads)
        dim = self._width(kernels[self.query], stack, heads)
        key_sizes = self.sizes(self.key, kernels[self.key], stack, head_dim=dim)
        key_heads = _heads(key_sizes or {})
        query, key = query_and_key_factors(gamma, key_heads, alpha, shared_key)
        is_query = jnp.arange(sizes["head_dim"]) < dim
        queries = jnp.where(is_query, query[..., None], 1)
        keys = jnp.broadcast_to(key[..., None], (*key.shape, dim))
        return {
            self.query: self._query_columns(queries, key_heads),
            self.key: self._key_columns(keys),
        }

    def _query_columns(
        self, queries: Float[Array, "*stack heads width"], key_heads: int
    ) -> Columns:
        """Names the axes of the query factors, and splits the heads where the pattern does."""
        pattern = self.patterns[self.query]
        if "kv_heads" not in pattern.names:
            return Columns(queries, ("heads", "head_dim"), pattern)
        *stack, _, width = queries.shape
        queries = queries.reshape(*stack, key_heads, -1, width)
        return Columns(queries, ("kv_heads", "groups", "head_dim"), pattern)

    def _key_columns(self, keys: Float[Array, "*stack key_heads width"]) -> Columns:
        """Names the axes of the key factors; values beside the keys have factor 1."""
        pattern = self.patterns[self.key]
        names = ("heads" if "heads" in pattern.names else "kv_heads", "head_dim")
        if pattern.literal == 2:
            keys = jnp.stack([keys, jnp.ones_like(keys)], axis=-3)
            names = ("2", *names)
        return Columns(keys, names, pattern)

    def _query_sizes(self, query: Leaf, stack: int, heads: int) -> dict[str, int]:
        """Returns the sizes of a query kernel that fits."""
        pattern = self.patterns[self.query]
        known: dict[str, Any] = {}
        if pattern.is_flat:
            flat = "heads" in pattern.names
            known = {"heads": heads} if flat else {"head_dim": self.head_dim}
        return self.sizes(self.query, query, stack, **known) or {}

    def _width(self, query: Leaf, stack: int, heads: int) -> int:
        """Returns the width of a key head."""
        return self.query_dim or self.head_dim or self._query_sizes(query, stack, heads)["head_dim"]


def _heads(sizes: Mapping[str, int]) -> int:
    """Returns the number of heads, whatever they are named."""
    return sizes["heads"] if "heads" in sizes else sizes["kv_heads"] * sizes.get("groups", 1)


def _names(children: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(children)))
