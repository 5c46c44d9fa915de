"""Head layout of multi-head latent attention, whose heads have a rotary and a nope part.

    logit = scale · (q_nope · k_nope + q_rope · k_rope)

All heads share k_rope, so it keeps its weights. The first product is scaled by γ on both sides, by
γᵃ and γ¹⁻ᵃ; the second by all of γ on the query (Kimi K2, arXiv 2507.20534, section 2.1).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from muonclip_jax._head_layouts.head_layout import Children, HeadLayout, Leaf
from muonclip_jax._head_layouts.kernel_pattern import Columns
from muonclip_jax._head_layouts.layout_evidence import (
    confirmation,
    other_latent_sizes,
    out_without_heads,
)
from muonclip_jax._head_layouts.sections import Section, Sections


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class MLALayout(HeadLayout):
    """Multi-head latent attention (MLA), as in DeepSeek-V3 and Kimi K2.

    Each head of the query projection is `[nope, rope]`, each head of the key and value projection
    `[nope of the key, value]`. The clip scales the nope columns of both and the rope columns of the
    query. Values, the shared rotary key, the projections into the latent space and their norms keep
    their weights. Clip before weights are absorbed, as some inference code does. Immutable and
    hashable.

    Attributes:
      nope_dim: Columns of a head without rotation.
      rope_dim: Columns of a query head that are multiplied with the key that all heads share,
        rotated as in DeepSeek-V3 or not as in Kimi K3; 0 for attention without a shared key.
      value_dim: Columns of a value head; 0 if keys have a projection of their own.
      query: Name of the module that computes the queries: the up-projection from the latent query,
        or, without a latent query, the only projection, such as `"q"`.
      key_value: Name of the up-projection to keys and values.
      rope_first: Whether a query head is `[rope, nope]`.
      kernel: Pattern of one layer's kernels, of names `inputs`, `heads` and `head_dim`, such as
        `"inputs heads head_dim"`, `"inputs (heads head_dim)"` or `"(heads head_dim) inputs"`;
        `head_dim` is the sum of the widths of a head.
      qk_norm: See `MultiHeadLayout`. None recognizes norms of keys by name. `q_norm`, `kv_norm`
        and norms with an ambiguous name normalize the latent vectors in MLA, before the
        up-projection, which does not cancel a clip.
      stack_axis: This and all others: see `MultiHeadLayout`.

    Raises:
      ValueError: if a pattern, a width or an axis is impossible.

    Example:
      >>> import jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> flat = "inputs (heads head_dim)"
      >>> layout = mc.MLALayout(nope_dim=2, rope_dim=1, value_dim=2, kernel=flat)
      >>> params = {"q_b": {"kernel": jnp.ones((1, 3))}, "kv_b": {"kernel": jnp.ones((1, 4))}}
      >>> new, _ = mc.qk_clip(params, {"max_logits": jnp.array([400.0])}, layout)
      >>> new["q_b"]["kernel"].tolist(), new["kv_b"]["kernel"].tolist()
      ([[0.5, 0.5, 0.25]], [[0.5, 0.5, 1.0, 1.0]])

    References:
      Kimi K2, arXiv 2507.20534, section 2.1 and algorithm 1, lines 8 to 17; DeepSeek-V2, arXiv
      2405.04434, section 2.1.
    """

    module_fields: ClassVar[tuple[str, ...]] = ("query", "key_value")

    nope_dim: int
    rope_dim: int
    value_dim: int
    query: str = "q_b"
    key_value: str = "kv_b"
    rope_first: bool = False

    def __post_init__(self):
        super().__post_init__()
        self._check_int("nope_dim", 1)
        self._check_int("rope_dim", 0)
        self._check_int("value_dim", 0)

    def normalizes(self, child: str) -> str | None:
        """Returns only norms of keys. Arguments: see `HeadLayout`."""
        letters = super().normalizes(child)
        return letters if letters and "k" in letters else None

    def faults(
        self, kernels: Mapping[str, Leaf], stack: int, heads: int, children: Children
    ) -> Iterator[str]:
        """Lists mismatches. Arguments: see `HeadLayout`."""
        widths = {
            self.query: (("nope_dim", self.nope_dim), ("rope_dim", self.rope_dim)),
            self.key_value: (("nope_dim", self.nope_dim), ("value_dim", self.value_dim)),
        }
        ranks = []
        for name, parts in widths.items():
            kernel, width = kernels[name], sum(size for _, size in parts)
            sizes = self.sizes(name, kernel, stack, head_dim=width)
            if sizes is None:
                terms = " + ".join(f"{part} {size}" for part, size in parts)
                yield f"{kernel} does not have heads of {terms} = {width} columns."
            elif sizes["heads"] != heads:
                yield f"{kernel} has {sizes['heads']} heads, but its {self.stat} has {heads}."
            else:
                ranks.append(sizes["inputs"])
        if len(ranks) == len(widths):
            yield from self._contradictions((ranks[0], ranks[1]), stack, heads, children)

    def _contradictions(
        self, ranks: tuple[int, int], stack: int, heads: int, children: Children
    ) -> Iterator[str]:
        """Describes children that contradict widths whose sums fit; `ranks`: inputs of both."""
        kept, value = self.kept_leaves, self.value_dim
        if value and (out := out_without_heads(self, children, stack, heads, value)):
            yield (
                f"{heads} heads of value_dim {value}, but the output projection {out[0]!r} {out[1]}"
                f" has no axis of {heads * value}; {confirmation(kept, out[0])}"
            )
        for name, text in other_latent_sizes(children, kept, stack, ranks, self.rope_dim):
            yield (
                f"{self.query!r} has {ranks[0]} inputs, {self.key_value!r} {ranks[1]}, and rope_dim"
                f" is {self.rope_dim}, but {text}; {confirmation(kept, name)}"
            )

    def num_heads(self, kernels: Mapping[str, Leaf], stack: int) -> int:
        """Infers the number of heads. Arguments: see `HeadLayout`."""
        width = self.nope_dim + self.rope_dim
        sizes = self.sizes(self.query, kernels[self.query], stack, head_dim=width)
        return 1 if sizes is None else sizes["heads"]

    def sections(self, kernels: Mapping[str, Leaf], stack: int) -> dict[str, Sections]:
        """Describes the matrices of each kernel. Arguments: see `HeadLayout`.

        The nope and rope columns of a query head are one matrix; the nope key and the value of a
        head are two.
        """
        widths = {
            self.query: (("queries", self.nope_dim + self.rope_dim, True),),
            self.key_value: (
                ("keys", self.nope_dim, True),
                ("values", self.value_dim, self.split_values),
            ),
        }
        found = {}
        for name, parts in widths.items():
            if name in kernels:
                present = tuple(Section(*part) for part in parts if part[1])
                total = sum(section.size for section in present)
                sizes = self.sizes(name, kernels[name], stack, head_dim=total) or {}
                along = "head_dim" if len(present) > 1 else ""
                found[name] = Sections(self.patterns[name].axes, sizes, present, along)
        return found

    def key_heads(self, kernels: Mapping[str, Leaf], stack: int, heads: int) -> int:
        """Returns the number of heads: every head has its own nope key."""
        return heads

    def columns(
        self,
        kernels: Mapping[str, Leaf],
        gamma: Float[Array, "*stack heads"],
        query: Float[Array, "*stack heads"],
        key: Float[Array, "*stack heads"],
    ) -> dict[str, Columns]:
        """Gives each part of a head its factor. Arguments: see `HeadLayout`."""
        nope, rope = _repeat(query, self.nope_dim), _repeat(gamma, self.rope_dim)
        parts = {
            self.query: (rope, nope) if self.rope_first else (nope, rope),
            self.key_value: (
                _repeat(key, self.nope_dim),
                _repeat(jnp.ones_like(gamma), self.value_dim),
            ),
        }
        return {
            name: Columns(
                jnp.concatenate(factors, axis=-1), ("heads", "head_dim"), self.patterns[name]
            )
            for name, factors in parts.items()
        }


def _repeat(factor: Float[Array, "*stack heads"], width: int) -> Float[Array, "*stack heads width"]:
    """Repeats the factor of each head for the columns of one part."""
    return jnp.broadcast_to(factor[..., None], (*factor.shape, width))
