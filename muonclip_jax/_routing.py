"""Which leaf gets which optimizer: by role, told by the names in its path, then by rank."""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._layout import (
    LAST_TWO_AXES,
    DimensionNumbersOrFn,
    axes_of,
    per_leaf,
    sides,
    update_scale,
)
from muonclip_jax._paths import aligned, components
from muonclip_jax._settings import check_settings
from muonclip_jax._types import ArrayTree

# Roles that stay with AdamW, and the path components that tell them: lower-cased, whole, without
# the number that Flax or a list appends. Rank does not matter: scan-stacking makes a norm's gain
# two-dimensional.
_ADAMW_ROLES = {
    "embedding": r"embed|embedder|embeddings?|wte|wpe|pos_embed\w*"
    r"|(tok|token|word|position|type|input|shared)_embed\w*",
    "output head": r"lm_head|unembed(ding)?|output_head|logits_dense",
    "router": r"router|moe_gate",
    "norm": r"(\w*_)?ln(_\w*)?|\w*norm(_\w*)?",
    "depthwise convolution": r"depthwise\w*|dw_?conv",
}
# The same for the last component, the name of the leaf.
_ADAMW_LEAVES = r"bias|scale"

# A convolution with one input channel a group, (..., 1, channels), mixes no channels.
_CONVOLUTION = r"\w*conv\w*"

# `gate` is the router of a mixture of experts where a sibling holds the experts, and an ordinary
# matrix of a gated MLP elsewhere.
_GATE, _EXPERTS = r"gate", r"(shared_)?experts?(_\w*)?"

# Projections of flax.linen.MultiHeadDotProductAttention and their matrices: d x (heads, head_dim),
# and back.
_INTO_HEADS = MuonDimensionNumbers(reduction_axis=-3, output_axis=(-2, -1))
_OUT_OF_HEADS = MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=-1)
_ATTENTION = {
    "query": _INTO_HEADS,
    "key": _INTO_HEADS,
    "value": _INTO_HEADS,
    "out": _OUT_OF_HEADS,
}

_Shapes = Mapping[tuple[str, ...], tuple[int, ...]]


class Route(NamedTuple):
    """What happens to one leaf.

    Attributes:
      path: Where the leaf is.
      shape: Its shape.
      optimizer: `"muon"` or `"adamw"`.
      batch: Number of matrices that are orthogonalised, each on its own; 0 under AdamW.
      rows: Rows of each, the reduced side n_in; 0 under AdamW.
      columns: Columns of each, the output side n_out; 0 under AdamW.
      scale: Factor on the orthogonalised matrix, see `scale_by_shape`; 1 under AdamW.
      reason: Why.
      dimension_numbers: Which axes are the rows and columns; None under AdamW.
    """

    path: str
    shape: tuple[int, ...]
    optimizer: str
    batch: int
    rows: int
    columns: int
    scale: float
    reason: str
    dimension_numbers: MuonDimensionNumbers | None


@dataclasses.dataclass(frozen=True)
class RoutingTable:
    """What `muon` does with each leaf of a tree; `str` of it is an aligned table.

    Attributes:
      rows: One `Route` a leaf, in the order of `jax.tree.leaves`.
    """

    rows: tuple[Route, ...]

    def __str__(self) -> str:
        """Aligns the rows under a head."""
        lines = [("path", "shape", "optimizer", "matrices", "scale", "why")]
        for r in self.rows:
            matrices = f"{r.batch} x {r.rows} x {r.columns}" if r.optimizer == "muon" else "-"
            scale = f"{r.scale:.4g}" if r.optimizer == "muon" else "-"
            lines.append((r.path, str(r.shape), r.optimizer, matrices, scale, r.reason))
        return aligned(lines)


def routing_table(
    params: ArrayTree,
    muon_weight_dimension_numbers: DimensionNumbersOrFn | None = None,
    *,
    consistent_rms: float | None = None,
) -> RoutingTable:
    """Shows which optimizer `muon` and `muonclip` give to each leaf, and why.

    Args:
      params: Parameters, or their shapes as `jax.eval_shape` gives them.
      muon_weight_dimension_numbers: As for `muon`.
      consistent_rms: As for `muon`; the scale depends on it.

    Returns:
      The table: print it.

    Raises:
      ValueError: if a leaf fits no optimizer, naming its path.

    Example:
      >>> import muonclip_jax as mc, jax.numpy as jnp
      >>> params = {"up": {"kernel": jnp.ones((4, 16)), "bias": jnp.ones(16)}}
      >>> print(mc.routing_table(params))
      path       shape    optimizer  matrices    scale  why
      up/bias    (16,)    adamw      -           -      leaf name 'bias'
      up/kernel  (4, 16)  muon       1 x 4 x 16  2      last two axes
    """
    check_settings("routing_table", locals(), optional=("consistent_rms",))
    rows = []
    for path, shape, numbers, reason in _routes(params, muon_weight_dimension_numbers):
        if numbers is None:
            rows.append(Route("/".join(path), shape, "adamw", 0, 0, 0, 1.0, reason, None))
            continue
        axes = axes_of(numbers, len(shape))
        n_in, n_out = sides(shape, axes)
        batch = int(np.prod([shape[a] for a in axes.batch], dtype=np.int64))
        scale = float(update_scale(n_in, n_out, consistent_rms))
        matrices = (batch, n_in, n_out, scale, reason, numbers)
        rows.append(Route("/".join(path), shape, "muon", *matrices))
    return RoutingTable(tuple(rows))


def leaf_numbers(
    params: ArrayTree, muon_weight_dimension_numbers: DimensionNumbersOrFn | None = None
) -> list[MuonDimensionNumbers | None]:
    """Decides for each leaf which axes are its matrices, None for a leaf of AdamW.

    Args:
      params: Parameters, gradients, or their shapes.
      muon_weight_dimension_numbers: As for `muon`; None decides by role and rank.

    Returns:
      One entry for each leaf, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: if a leaf fits no optimizer, naming its path.

    Example:
      >>> leaf_numbers({"up": jnp.ones((2, 8)), "wte": jnp.ones((3, 2))})
      [MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), None]
    """
    return [numbers for _, _, numbers, _ in _routes(params, muon_weight_dimension_numbers)]


def _routes(
    params: ArrayTree, given: DimensionNumbersOrFn | None
) -> list[tuple[tuple[str, ...], tuple[int, ...], MuonDimensionNumbers | None, str]]:
    """Path, shape, dimension numbers (None: AdamW) and reason of each leaf."""
    leaves = [(components(p), x) for p, x in jax.tree_util.tree_leaves_with_path(params)]
    shapes = {path: tuple(np.shape(x)) for path, x in leaves}
    if given is not None:
        return [
            (path, shapes[path], numbers, "given")
            for (path, _), numbers in zip(leaves, per_leaf(given, params), strict=True)
        ]
    wrong = [
        f"  {'/'.join(path)}: {jnp.result_type(x)}{list(shapes[path])}."
        for path, x in leaves
        if not jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    ]
    if wrong:
        raise ValueError(
            f"muon: {len(wrong)} of {len(leaves)} leaves are neither floating nor complex.\n"
            + "\n".join(wrong)
            + "\nKeep them out of the optimizer with `optax.masked` or `optax.partition`."
        )
    return [(path, shapes[path], *_by_role(path, shapes)) for path, _ in leaves]


def _by_role(path: tuple[str, ...], shapes: _Shapes) -> tuple[MuonDimensionNumbers | None, str]:
    for role, pattern in _ADAMW_ROLES.items():
        if name := _any_matches(pattern, path):
            return None, f"{role} '{name}'"
    if _any_matches(_ADAMW_LEAVES, path[-1:]):
        return None, f"leaf name '{path[-1]}'"
    for depth, name in enumerate(path):
        if _matches(_GATE, name) and _has_sibling(path[:depth], _EXPERTS, shapes):
            return None, f"router '{name}' beside experts"
    if len(shapes[path]) < 2:
        return None, "fewer than two axes"
    if len(shapes[path]) > 2 and shapes[path][-2] == 1 and _any_matches(_CONVOLUTION, path):
        return None, "depthwise convolution"
    if len(shapes[path]) > 2 and (numbers := _attention_projection(path, shapes)):
        return numbers, f"attention '{path[-2]}'"
    return LAST_TWO_AXES, "last two axes"


def _matches(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"({pattern})(_?\d+)?", name.lower()) is not None


def _any_matches(pattern: str, path: tuple[str, ...]) -> str | None:
    return next((name for name in path if _matches(pattern, name)), None)


def _has_sibling(parent: tuple[str, ...], pattern: str, shapes: _Shapes) -> bool:
    n = len(parent)
    return any(p[:n] == parent and len(p) > n and _matches(pattern, p[n]) for p in shapes)


def _attention_projection(path: tuple[str, ...], shapes: _Shapes) -> MuonDimensionNumbers | None:
    """Dimension numbers of a three-axis attention kernel of Flax; None for any other leaf.

    A scan-stacked two-axis kernel has three axes too. Where both ends are there, they tell:
    `query` ends in the (heads, head_dim) with which `out` begins.
    """
    if len(path) < 2 or path[-1] != "kernel" or path[-2] not in _ATTENTION:
        return None
    query, out = (shapes.get((*path[:-2], name, "kernel")) for name in ("query", "out"))
    if path[-2] == "out" and query is None:
        return None
    if query is not None and out is not None and query[-2:] != out[-3:-1]:
        return None
    return _ATTENTION[path[-2]]
