"""One module for the queries and one for the keys."""

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from muonclip_jax._head_layouts import layout_evidence
from muonclip_jax._head_layouts.head_layout import Children, HeadLayout, Leaf
from muonclip_jax._head_layouts.kernel_pattern import NAMES, Columns, KernelPattern, kernel_pattern
from muonclip_jax._head_layouts.sections import Section, Sections, one_section

_KEY_NAMES = ("inputs", "heads", "kv_heads", "head_dim")
_IF_GATE = "; query heads that hold a gate too need query_dim="


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class MultiHeadLayout(HeadLayout):
    """Attention with one module for the queries and one for the keys: MHA, GQA, MQA.

    `kernel` names the axes of one layer's query kernel. Its names are `inputs`, `heads` and
    `head_dim`, or `kv_heads` and `groups` in place of `heads`; parentheses hold names that one axis
    flattens. The number of query heads is the last axis of the max logits. The number of key heads
    follows from the key kernel. Query head h uses key head
    `h // (heads // key_heads)`, and head `kv_head * groups + group` is h. Biases have the axes of
    the kernel without `inputs`. The defaults are the names and axes of
    `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`. Immutable and
    hashable.

    Attributes:
      query: Name of the query module inside the attention module; or of an array, as `self.param`
        creates it.
      key: Name of the key module, or of the module of keys and values.
      value: Name of the value module, which `per_head` then splits too. A clip never scales it. The
        name shows that the key module holds no values.
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
        `variable_axes={"params": stack_axis}`. Axes beyond the axes of the pattern are stack axes.
      stat_stack_axis: The same for the max logits.
      stat: Name of the max logits.
      scaled_leaves: Leaves that carry the columns of the heads. The first name is the kernel. An
        array beside the modules, such as `bq` or `k_bias`, is scaled too if it is listed here.
      kept_leaves: Leaves that are known and not scaled. Lists also children whose names look like
        queries, keys or their biases, and are none.
      qk_norm: Children that normalize queries or keys, which cancels a clip. None recognizes them
        by name, and raises for a norm with an ambiguous name. A tuple names all norms of queries
        and keys; `()` declares that there are none.
      split_values: For `per_head` only: whether values in the kernel of the keys, or of queries
        and keys, are split by head too. A `value` module that is named is split.
      heads_per_matrix: For `per_head` only: number of adjacent heads that are one matrix, such as 2
        for pairs. None: all heads, so that only queries, keys and values are split.

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
        """Lists mismatches. Arguments: see `HeadLayout`."""
        fault = self._query_fault(kernels[self.query], stack, heads)
        fault = fault or self._key_fault(kernels, stack, heads)
        if fault is None and self.value not in (None, *children):
            fault = f"no child {self.value!r}, which is value; there are {_listed(children)}."
        if fault is None and self.key_kernel is None:
            fault = self._contradiction(kernels, stack, heads, children)
        if fault is not None:
            yield fault

    def _query_fault(self, query: Leaf, stack: int, heads: int) -> str | None:
        """Describes a mismatch between query kernel and number of heads."""
        pattern, sizes = self.patterns[self.query], self._query_sizes(query, stack, heads)
        by_width = pattern.is_flat and not self.query_dim
        hint = "" if self.query_dim else _IF_GATE
        if sizes is None:
            given = f"head_dim={self.head_dim}" if by_width else f"{heads} heads"
            return f"{query} does not divide into {str(pattern)!r} with {given}."
        found, width = _heads(sizes), sizes["head_dim"]
        if found != heads:
            of = f" of head_dim {self.head_dim}" if by_width else ""
            hint = hint if by_width and found > heads else ""
            if sizes.get("groups") == heads:
                hint = "; flatten its last two axes (kv_heads, groups) to one, in this order"
            return f"{query} has {found} heads{of}, but its {self.stat} has {heads}{hint}."
        if width < (self.query_dim or 0):
            return f"{query} has heads of {width} columns, fewer than query_dim={self.query_dim}."
        if self.head_dim and not self.query_dim and width != self.head_dim:
            return f"{query} has heads of {width} columns, not head_dim={self.head_dim}{hint}."
        return None

    def _key_fault(self, kernels: Mapping[str, Leaf], stack: int, heads: int) -> str | None:
        """Describes a mismatch between the key kernel and a query kernel that fits."""
        query, key, pattern = kernels[self.query], kernels[self.key], self.patterns[self.key]
        width = self._key_width(query, stack, heads)
        known = {"head_dim": width} if pattern.is_flat else {}
        sizes = self.sizes(self.key, key, stack, **known)
        if sizes is None:
            return f"{key} does not divide into {str(pattern)!r} with head_dim={width}."
        if sizes["head_dim"] != width:
            hint = "" if self.query_dim else _IF_GATE
            return f"{key} has heads of {sizes['head_dim']} columns, {query} has {width}{hint}."
        found, groups = _heads(sizes), self._query_sizes(query, stack, heads) or {}
        if not found or heads % found or groups.get("kv_heads", found) != found:
            return f"{key} has {found} key heads, which do not fit the {heads} heads of {query}."
        return None

    def _contradiction(
        self, kernels: Mapping[str, Leaf], stack: int, heads: int, children: Children
    ) -> str | None:
        """Describes evidence against a layout whose sizes fit."""
        query, key = kernels[self.query], kernels[self.key]
        width, fault = self._key_width(query, stack, heads), None
        if not self.query_dim:
            fault = layout_evidence.swapped_axes(self, kernels, stack, heads, width)
        if self.value is None:
            fault = fault or layout_evidence.values_in_key_kernel(self.modules, key, children)
        if self.value is None and not self.query_dim:
            heads_of = (self, query, stack, heads, width)
            fault = fault or layout_evidence.gate_in_query_heads(*heads_of, key, children)
        return fault

    def key_heads(self, kernels: Mapping[str, Leaf], stack: int, heads: int) -> int:
        """Returns the number of key heads of kernels that fit. Arguments: see `HeadLayout`."""
        width = self._key_width(kernels[self.query], stack, heads)
        return _heads(self.sizes(self.key, kernels[self.key], stack, head_dim=width) or {})

    def columns(
        self,
        kernels: Mapping[str, Leaf],
        gamma: Float[Array, "*stack heads"],
        query: Float[Array, "*stack heads"],
        key: Float[Array, "*stack key_heads"],
    ) -> dict[str, Columns]:
        """Repeats the factor of each head for its columns. Arguments: see `HeadLayout`."""
        *_, heads = gamma.shape
        sizes = self._query_sizes(kernels[self.query], gamma.ndim - 1, heads) or {}
        width = self._key_width(kernels[self.query], gamma.ndim - 1, heads)
        # The columns beyond the width of a key, such as a gate, keep their weights.
        queries = jnp.where(jnp.arange(sizes["head_dim"]) < width, query[..., None], 1)
        names = ("heads", "head_dim")
        if "kv_heads" in self.patterns[self.query].names:
            queries = queries.reshape(*key.shape, -1, sizes["head_dim"])
            names = ("kv_heads", "groups", "head_dim")
        keys = jnp.broadcast_to(key[..., None], (*key.shape, width))
        pattern = self.patterns[self.key]
        key_names = ("heads" if "heads" in pattern.names else "kv_heads", "head_dim")
        if pattern.literal == 2:  # keys, then values
            keys, key_names = jnp.stack([keys, jnp.ones_like(keys)], axis=-3), ("2", *key_names)
        return {
            self.query: Columns(queries, names, self.patterns[self.query]),
            self.key: Columns(keys, key_names, pattern),
        }

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the children that `per_head` splits: the modules, and values if named."""
        return self.modules if self.value is None else (*self.modules, self.value)

    def num_heads(self, kernels: Mapping[str, Leaf], stack: int) -> int:
        """Infers the number of query heads. Arguments: see `HeadLayout`."""
        query = kernels[self.query]
        if self.query_dim and self.patterns[self.query].is_flat:
            raise ValueError(
                f"{query}: a flat kernel with query_dim={self.query_dim} does not show its number "
                "of heads, expected an axis of heads."
            )
        sizes = self._query_sizes(query, stack, 0)
        return 1 if sizes is None else _heads(sizes)

    def sections(self, kernels: Mapping[str, Leaf], stack: int) -> dict[str, Sections]:
        """Describes the matrices of each kernel. Arguments: see `HeadLayout`."""
        found = {}
        if self.query in kernels:
            heads = self.num_heads(kernels, stack)
            sizes = self._query_sizes(kernels[self.query], stack, heads) or {}
            axes, width = self.patterns[self.query].axes, self.query_dim or sizes["head_dim"]
            found[self.query] = one_section(axes, sizes, "queries")
            if gate := sizes["head_dim"] - width:
                parts = Section("queries", width, True), Section("gates", gate, False)
                found[self.query] = Sections(axes, sizes, parts, "head_dim")
        if self.key in kernels:
            found[self.key] = self._key_sections(kernels[self.key], stack)
        if self.value in kernels:
            found[self.value] = self._value_sections(kernels, stack)
        return found

    def _key_sections(self, key: Leaf, stack: int) -> Sections:
        """Describes the keys, and the values in the same kernel."""
        pattern = self.patterns[self.key]
        known = {"head_dim": self.head_dim or 0} if pattern.is_flat else {}
        sizes = self.sizes(self.key, key, stack, **known) or {}
        if pattern.literal != 2:
            return one_section(pattern.axes, sizes, "keys")
        parts = Section("keys", 1, True), Section("values", 1, self.split_values)
        return Sections(pattern.axes, {**sizes, "2": 2}, parts, "2")

    def _value_sections(self, kernels: Mapping[str, Leaf], stack: int) -> Sections:
        """Describes the values of a separate module, with the same number of heads as keys."""
        value: Leaf = kernels[self.value or ""]
        pattern = self.patterns[self.key]
        pattern = self.patterns[self.query].key() if pattern.literal == 2 else pattern
        known: dict[str, int] = {}
        if pattern.is_flat and self.key not in kernels:
            raise ValueError(f"{value}: values need the keys, which show the number of heads.")
        if pattern.is_flat:
            known = {"heads": _heads(self._key_sections(kernels[self.key], stack).sizes)}
        sizes = pattern.sizes(self.split(value.shape, stack)[1], known)
        if sizes is None:
            text = f"{str(pattern)!r} with {known['heads']} heads, as its keys have"
            raise ValueError(f"{value} does not divide into {text}.")
        return one_section(pattern.axes, sizes, "values")

    def _query_sizes(self, query: Leaf, stack: int, heads: int) -> dict[str, int] | None:
        """Returns the sizes of the axes of the query kernel; None if they do not fit."""
        known: dict[str, int] = {}
        if self.patterns[self.query].is_flat and self.head_dim:
            # Heads of a query and a gate are wider than head_dim: the number of heads is known.
            known = {"heads": heads} if self.query_dim else {"head_dim": self.head_dim}
        return self.sizes(self.query, query, stack, **known)

    def _key_width(self, query: Leaf, stack: int, heads: int) -> int:
        """Returns the width of a key head, for a query kernel that fits."""
        sizes = self._query_sizes(query, stack, heads) or {}
        return self.query_dim or self.head_dim or sizes["head_dim"]


def _heads(sizes: Mapping[str, int]) -> int:
    """Returns the number of heads under either of their names."""
    return sizes["heads"] if "heads" in sizes else sizes["kv_heads"] * sizes.get("groups", 1)


def _listed(children: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(children)))
