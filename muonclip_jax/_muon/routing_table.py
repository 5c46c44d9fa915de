"""The printed table: which optimizer `muon` uses for each parameter, and why."""

import dataclasses
from typing import NamedTuple

import numpy as np
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._common.folding import fold
from muonclip_jax._common.paths import aligned
from muonclip_jax._common.settings import check_settings
from muonclip_jax._common.types import ArrayTree
from muonclip_jax._muon.overrides import ROLE_RULES
from muonclip_jax._muon.per_head import LAYOUT_RULES, PER_HEAD_RULES, PerHead
from muonclip_jax._muon.roles.decision import Overrides
from muonclip_jax._muon.routing import Routing, check_axes, role_settings, route
from muonclip_jax._orthogonalize.dimension_numbers import DimensionNumbersOrFn, axes_of
from muonclip_jax._orthogonalize.matrices import ConsistentRMS, update_scale
from muonclip_jax._orthogonalize.split import Split


class RoutePart(NamedTuple):
    """Equal matrices in one parameter.

    Attributes:
      name: A name such as `keys`; empty if the parameter is one part.
      unit: The name of one matrix, such as `heads`; empty for a matrix without a name.
      num_matrices: Number of matrices, each orthogonalized on its own.
      n_in: Inputs of each matrix, the reduced side.
      n_out: Outputs of each matrix.
      scale: Factor on the orthogonalized matrix, see `scale_by_shape`.
    """

    name: str
    unit: str
    num_matrices: int
    n_in: int
    n_out: int
    scale: float

    def __str__(self) -> str:
        """Shows number, unit and sides: `12 heads x 64 x 128`."""
        count = f"{self.num_matrices} {self.unit}".rstrip()
        return f"{count} x {self.n_in} x {self.n_out}"


class Route(NamedTuple):
    """The optimizer of one parameter.

    Attributes:
      path: Its path, components joined by slashes.
      shape: Its shape.
      optimizer: `"muon"`, `"adamw"` or `"sinkhorn"`.
      num_matrices: Number of matrices, each orthogonalized on its own; 0 under AdamW.
      n_in: Inputs of each matrix, the reduced side; 0 under AdamW. If `per_head` makes several
        parts of a parameter, such as keys and values, this and the two below are of the first.
      n_out: Outputs of each matrix; 0 under AdamW.
      scale: Factor on the orthogonalized matrix, see `scale_by_shape`; 1 under AdamW.
      reason: Why.
      dimension_numbers: The axes of inputs and outputs, without `per_head`; None under
        AdamW.
      parts: The matrices by part; empty under AdamW.
    """

    path: str
    shape: tuple[int, ...]
    optimizer: str
    num_matrices: int
    n_in: int
    n_out: int
    scale: float
    reason: str
    dimension_numbers: MuonDimensionNumbers | None
    parts: tuple[RoutePart, ...] = ()


@dataclasses.dataclass(frozen=True)
class RoutingTable:
    """The optimizer that `muon` assigns to each parameter; `str` of it is an aligned table.

    The text folds equal layers into one line, and ends with the totals of each optimizer and the
    warnings.

    Attributes:
      rows: One `Route` for each parameter, in the order of `jax.tree.leaves`.
      warnings: One text for each group of rows that names and shapes do not decide: path, shape,
        decision, the reason to doubt it, and the override that changes it.
    """

    rows: tuple[Route, ...]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Formats the rows under a header, then totals and warnings."""
        lines = [("path", "shape", "optimizer", "matrices", "scale", "why")]
        cells = [row[1:] for row in self.rows]
        for path, indices in fold([row.path.split("/") for row in self.rows], cells):
            r = self.rows[indices[0]]
            matrices = ", ".join(map(str, r.parts)) or "-"
            scale = ", ".join(dict.fromkeys(f"{part.scale:.4g}" for part in r.parts)) or "-"
            lines.append(("/".join(path), str(r.shape), r.optimizer, matrices, scale, r.reason))
        return "\n".join([aligned(lines), *self._totals(), *self._warnings()])

    def _totals(self) -> list[str]:
        totals = []
        tables = ["sinkhorn"] * any(r.optimizer == "sinkhorn" for r in self.rows)
        for optimizer in ("muon", "adamw", *tables):
            sizes = [
                np.prod(r.shape, dtype=np.int64) for r in self.rows if r.optimizer == optimizer
            ]
            totals.append(f"{optimizer}: {len(sizes):,} leaves, {sum(sizes):,} parameters")
        return totals

    def _warnings(self) -> list[str]:
        if not self.warnings:
            return []
        count = len(self.warnings)
        return [f"{count} warning{'s' * (count > 1)}:", *(f"  {text}" for text in self.warnings)]


def routing_table(
    params: ArrayTree,
    muon_weight_dimension_numbers: DimensionNumbersOrFn | None = None,
    *,
    consistent_rms: ConsistentRMS = None,
    per_head: PerHead = None,
    overrides: Overrides | None = None,
    outputs_first: bool | None = None,
    layout: PerHead = None,
) -> RoutingTable:
    """Shows which optimizer `muon` and `muonclip` use for each parameter, and why.

    Args:
      params: Parameters, or their shapes as `jax.eval_shape` returns them.
      muon_weight_dimension_numbers: See `muon`.
      consistent_rms: See `muon`; the scale depends on it.
      per_head: See `muon`.
      overrides: See `muon`.
      outputs_first: See `muon`.
      layout: See `muon`. For `muonclip`, pass its `layout`.

    Returns:
      The table: print it.

    Raises:
      ValueError: if a parameter fits no optimizer, naming its path; if an override matches no
        parameter.
      TypeError: if `overrides` is not a mapping of patterns to `MuonDimensionNumbers` or None.

    Example:
      >>> import muonclip_jax as mc, jax.numpy as jnp
      >>> params = {"up": {"kernel": jnp.ones((4, 16)), "bias": jnp.ones(16)}}
      >>> print(mc.routing_table(params))
      path       shape    optimizer  matrices    scale  why
      up/bias    (16,)    adamw      -           -      bias 'bias'
      up/kernel  (4, 16)  muon       1 x 4 x 16  2      last two axes
      muon: 1 leaves, 64 parameters
      adamw: 1 leaves, 16 parameters
    """
    arguments = locals()
    optional = ("consistent_rms", "outputs_first")
    rules = {**ROLE_RULES, **PER_HEAD_RULES, **LAYOUT_RULES}
    check_settings("routing_table", arguments, optional=optional, rules=rules)
    settings = role_settings(arguments, per_head, layout)
    routing = route("routing_table", params, settings)
    rows = (_row(routing, index, consistent_rms) for index in range(len(routing.paths)))
    return RoutingTable(tuple(rows), routing.warnings)


def _row(routing: Routing, index: int, consistent_rms: ConsistentRMS) -> Route:
    name, shape = "/".join(routing.paths[index]), routing.shapes[index]
    numbers, reason = routing.decisions[index].numbers, routing.decisions[index].reason
    if numbers is None:
        optimizer = "sinkhorn" if routing.decisions[index].sinkhorn else "adamw"
        return Route(name, shape, optimizer, 0, 0, 0, 1.0, reason, None)
    split = routing.splits.get(index)
    if split is None:
        check_axes("routing_table", name, shape, numbers)
        split = Split.whole(shape, axes_of(numbers, len(shape)))
    parts = []
    for part in split.parts:
        count, n_in, n_out = split.matrices(part)
        scale = float(update_scale(n_in, n_out, consistent_rms))
        parts.append(RoutePart(part.name, part.unit, count, n_in, n_out, scale))
    total = sum(part.num_matrices for part in parts)
    first = parts[0]
    sides_and_scale = first.n_in, first.n_out, first.scale
    return Route(name, shape, "muon", total, *sides_and_scale, reason, numbers, tuple(parts))
