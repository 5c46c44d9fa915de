"""Multi-head latent attention: heads with a part that is rotated and a part that is not.

    logit = scale · (q_nope · k_nope + q_rope · k_rope)

Every head has its own q_nope, k_nope and q_rope; all share k_rope, which is left alone. So the
first product shrinks by γ on both sides, γᵃ and γ¹⁻ᵃ, the second by all of γ on the query (Kimi K2,
arXiv 2507.20534, section 2.1).
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from muonclip_jax._common.types import Scalar
from muonclip_jax._qk_clip.head_layout import Children, Columns, Layout, Leaf
from muonclip_jax._qk_clip.shared_key import query_and_key_factors


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class MLALayout(Layout):
    """Multi-head latent attention (MLA), as in DeepSeek-V3 and Kimi K2.

    Each head of the query projection is `[nope, rope]`, each head of the key and value projection
    `[nope of the key, value]`. Scaled are the nope columns of both and the rope columns of the
    query. Values, the shared rotary key, the projections into the latent space and their norms are
    never touched. Absorbed weights, as some inference code has, are another form: clip before.
    Immutable and hashable.

    Attributes:
      nope_dim: Columns of a head that are not rotated.
      rope_dim: Columns of a query head that are rotated; 0 for attention without a rotary key.
      value_dim: Columns of a value head; 0 where keys have a projection of their own.
      query: Name of the module that makes the queries: the up-projection from the latent query, or
        the only projection where there is none, such as `"q"`.
      key_value: Name of the up-projection to keys and values.
      rope_first: Whether a query head is `[rope, nope]`.
      kernel: Pattern of one layer's kernels, of names `inputs`, `heads` and `head_dim`, such as
        `"inputs heads head_dim"`, `"inputs (heads head_dim)"` or `"(heads head_dim) inputs"`;
        `head_dim` is the sum of the widths of a head.
      qk_norm: See `MultiHeadLayout`. None recognizes norms of keys by name; `q_norm`, `kv_norm`
        and norms without a telling name normalize the latent vectors here, before the
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
        """Returns what a child normalizes. Arguments: see `Layout`."""
        return found if "k" in (found := super().normalizes(child) or "") else None

    def faults(
        self, kernels: Mapping[str, Leaf], stack: int, heads: int, children: Children
    ) -> Iterator[str]:
        """Lists what does not fit. Arguments: see `Layout`."""
        widths = {
            self.query: (("nope_dim", self.nope_dim), ("rope_dim", self.rope_dim)),
            self.key_value: (("nope_dim", self.nope_dim), ("value_dim", self.value_dim)),
        }
        for name, parts in widths.items():
            kernel, width = kernels[name], sum(size for _, size in parts)
            sizes = self.sizes(name, kernel, stack, head_dim=width)
            if sizes is None:
                terms = " + ".join(f"{part} {size}" for part, size in parts)
                yield f"{kernel} does not have heads of {terms} = {width} columns."
            elif sizes["heads"] != heads:
                yield f"{kernel} has {sizes['heads']} heads, but its {self.stat} has {heads}."

    def factors(
        self,
        gamma: Float[Array, "*stack heads"],
        kernels: Mapping[str, Leaf],
        alpha: Scalar,
        shared_key: str,
    ) -> dict[str, Columns]:
        """Returns, by module name, the factor of each column of each head."""
        # Every head has its own nope key: the rules for shared keys do not apply.
        query, key = query_and_key_factors(gamma, gamma.shape[-1], alpha, shared_key)
        nope, rope = (query, self.nope_dim), (gamma, self.rope_dim)
        parts = (rope, nope) if self.rope_first else (nope, rope)
        untouched = (jnp.ones_like(gamma), self.value_dim)
        columns = {
            self.query: _columns(*parts),
            self.key_value: _columns((key, self.nope_dim), untouched),
        }
        return {
            name: Columns(factors, ("heads", "head_dim"), self.patterns[name])
            for name, factors in columns.items()
        }


def _columns(
    *parts: tuple[Float[Array, "*stack heads"], int],
) -> Float[Array, "*stack heads width"]:
    """Concatenates the parts of each head: a factor, repeated for the part's number of columns."""
    factors = [jnp.broadcast_to(f[..., None], (*f.shape, width)) for f, width in parts]
    return jnp.concatenate(factors, axis=-1)
