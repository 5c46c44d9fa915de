"""Which parameter is assigned to Muon and which to AdamW: the table, its warnings, overrides."""

import dataclasses
import fnmatch
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._common.folding import fold
from muonclip_jax._common.paths import aligned, leaf_paths, path_string
from muonclip_jax._common.settings import check_settings
from muonclip_jax._common.types import ArrayTree, Scalar
from muonclip_jax._muon.overrides import ROLE_RULES, matched
from muonclip_jax._muon.roles.decision import DEFAULTS, Decision, Overrides, RoleSettings
from muonclip_jax._muon.roles.rules import decide
from muonclip_jax._orthogonalize.matrix_axes import (
    LAST_TWO_AXES,
    DimensionNumbersOrFn,
    axes_of,
    per_leaf,
    sides,
    update_scale,
)


class Route(NamedTuple):
    """The optimizer of one parameter.

    Attributes:
      path: Its path, components joined by slashes.
      shape: Its shape.
      optimizer: `"muon"` or `"adamw"`.
      num_matrices: Number of matrices, each orthogonalized on its own; 0 under AdamW.
      n_in: Inputs of each matrix, the reduced side; 0 under AdamW.
      n_out: Outputs of each matrix; 0 under AdamW.
      scale: Factor on the orthogonalized matrix, see `scale_by_shape`; 1 under AdamW.
      reason: Why.
      dimension_numbers: Which axes are the inputs and outputs; None under AdamW.
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
            is_muon = r.optimizer == "muon"
            matrices = f"{r.num_matrices} x {r.n_in} x {r.n_out}" if is_muon else "-"
            scale = f"{r.scale:.4g}" if is_muon else "-"
            lines.append(("/".join(path), str(r.shape), r.optimizer, matrices, scale, r.reason))
        return "\n".join([aligned(lines), *self._totals(), *self._warnings()])

    def _totals(self) -> list[str]:
        totals = []
        for optimizer in ("muon", "adamw"):
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


class Routing(NamedTuple):
    """Which parameters are matrices, and along which axes.

    Attributes:
      paths: Path of each parameter.
      shapes: Its shape.
      decisions: Its optimizer, with the reason.
    """

    paths: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    decisions: tuple[Decision, ...]

    @property
    def numbers(self) -> list[MuonDimensionNumbers | None]:
        """Dimension numbers of each parameter; None under AdamW."""
        return [decision.numbers for decision in self.decisions]

    @property
    def warnings(self) -> tuple[str, ...]:
        """One text for each group of equal layers that names and shapes do not decide."""
        doubtful = [index for index, d in enumerate(self.decisions) if d.doubt]
        cells = [(self.shapes[i], self.decisions[i]) for i in doubtful]
        folded = fold([self.paths[i] for i in doubtful], cells)
        return tuple(self._warning(path, [doubtful[row] for row in rows]) for path, rows in folded)

    def _warning(self, path: Sequence[str], rows: Sequence[int]) -> str:
        shape, decision = self.shapes[rows[0]], self.decisions[rows[0]]
        if decision.numbers is None:
            what, kept = "AdamW", "None"
            alternative, fix = "Muon", _shown(decision.matrix)
        else:
            axes = axes_of(decision.numbers, len(shape))
            n_in, n_out = sides(shape, axes)
            batch = np.prod([shape[axis] for axis in axes.batch], dtype=np.int64)
            what, kept = f"Muon on {batch} x {n_in} x {n_out}", _shown(decision.numbers)
            alternative, fix = "AdamW", "None"
        patterns = self._patterns(path, rows)
        also = f" ({len(rows)} parameters)" if len(rows) > 1 else ""
        fixes = [f"For {alternative}", fix], [f"To keep {what.split()[0]}", kept]
        if decision.numbers == LAST_TWO_AXES and len(shape) > 2:
            n_in, n_out = shape[-3], shape[-2] * shape[-1]
            one = MuonDimensionNumbers(-3, (-2, -1))
            fixes = *fixes, [f"To join the last two axes, {n_in} x {n_out}", _shown(one)]
        shown = (
            f"{when}: overrides={{" + ", ".join(f'"{p}": {value}' for p in patterns) + "}."
            for when, value in fixes
        )
        text = f"{'/'.join(path)} {shape}{also}: {what} ({decision.reason}), but {decision.doubt}."
        return " ".join([text, *shown])

    def _patterns(self, path: Sequence[str], rows: Sequence[int]) -> list[str]:
        """Returns one pattern that matches these parameters alone, or else the path of each."""
        parts = (part.split("{")[0] + "*" if "{" in part else part for part in path)
        pattern = "/".join(parts).replace("[", "[[]")
        joined = ["/".join(names) for names in self.paths]
        if [i for i, name in enumerate(joined) if fnmatch.fnmatchcase(name, pattern)] == [*rows]:
            return [pattern]
        return [joined[i].replace("[", "[[]") for i in rows]


def _shown(numbers: MuonDimensionNumbers) -> str:
    return f"mc.MuonDimensionNumbers{tuple(numbers)}"


def routing_table(
    params: ArrayTree,
    muon_weight_dimension_numbers: DimensionNumbersOrFn | None = None,
    *,
    consistent_rms: float | None = None,
    overrides: Overrides | None = None,
    outputs_first: bool | None = None,
) -> RoutingTable:
    """Shows which optimizer `muon` and `muonclip` use for each parameter, and why.

    Args:
      params: Parameters, or their shapes as `jax.eval_shape` returns them.
      muon_weight_dimension_numbers: See `muon`.
      consistent_rms: See `muon`; the scale depends on it.
      overrides: See `muon`.
      outputs_first: See `muon`.

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
    optional = ("consistent_rms", "outputs_first")
    check_settings("routing_table", locals(), optional=optional, rules=ROLE_RULES)
    settings = RoleSettings(
        muon_weight_dimension_numbers, overrides, outputs_first, consistent_rms is None
    )
    routing = route("routing_table", params, settings)
    rows = (_row(*entry, consistent_rms) for entry in zip(*routing, strict=True))
    return RoutingTable(tuple(rows), routing.warnings)


def _row(
    path: tuple[str, ...],
    shape: tuple[int, ...],
    decision: Decision,
    consistent_rms: Scalar | None,
) -> Route:
    numbers, reason = decision.numbers, decision.reason
    name = "/".join(path)
    if numbers is None:
        return Route(name, shape, "adamw", 0, 0, 0, 1.0, reason, None)
    _check_axes("routing_table", name, shape, numbers)
    axes = axes_of(numbers, len(shape))
    n_in, n_out = sides(shape, axes)
    count = int(np.prod([shape[axis] for axis in axes.batch], dtype=np.int64))
    scale = float(update_scale(n_in, n_out, consistent_rms))
    return Route(name, shape, "muon", count, n_in, n_out, scale, reason, numbers)


def route(caller: str, params: ArrayTree, settings: RoleSettings = DEFAULTS) -> Routing:
    """Decides for each parameter which axes are its matrices, or that it is assigned to AdamW.

    Args:
      caller: Name of the public function that was called.
      params: Parameters, gradients, or their shapes.
      settings: What the user set.

    Returns:
      The decisions, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: if a parameter fits no optimizer, naming its path; if an override matches no
        parameter.

    Example:
      >>> route("muon", {"up": jnp.ones((2, 8)), "wte": jnp.ones((3, 2))}).numbers
      [MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), None]
    """
    leaves = jax.tree.leaves(params)
    if not leaves:  # such as the placeholder of `optax.tree.map_params`
        return Routing((), (), ())
    paths = leaf_paths(params)
    shapes = tuple(tuple(np.shape(x)) for x in leaves)
    if settings.numbers is not None:
        decisions = [Decision(n, "given") for n in per_leaf(settings.numbers, params)]
    else:
        _check_dtypes(caller, paths, leaves)
        decisions = decide(paths, shapes, settings)
    if settings.overrides:
        joined = ["/".join(path) for path in paths]
        found = matched(caller, settings.overrides, joined, _hidden_paths(params))
        for index, (pattern, numbers) in found.items():
            reason = f"override '{pattern}'"
            if numbers is not None:
                _check_axes(f"{caller}: {reason}", joined[index], shapes[index], numbers)
            decisions[index] = Decision(numbers, reason)
    return Routing(tuple(paths), shapes, tuple(decisions))


def _hidden_paths(params: ArrayTree) -> list[str]:
    """Lists the paths at and below which another optimizer has the leaves."""
    is_hidden = lambda x: x is None or isinstance(x, optax.MaskedNode)  # noqa: E731
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_hidden)
    return [path_string(path) for path, x in flat if is_hidden(x)]


def _check_axes(
    caller: str, path: str, shape: tuple[int, ...], numbers: MuonDimensionNumbers
) -> None:
    try:
        axes_of(numbers, len(shape))
    except ValueError as error:
        raise ValueError(f"{caller}: {path} {shape}: {error}.") from error


def _check_dtypes(caller: str, paths: Sequence[tuple[str, ...]], leaves: Sequence[Any]) -> None:
    wrong = []
    for path, x in zip(paths, leaves, strict=True):
        dtype = dtype_of(x)
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            shown = type(x).__name__ if dtype is None else f"{dtype}{list(np.shape(x))}"
            wrong.append(f"  {'/'.join(path)}: {shown}.")
    if wrong:
        raise ValueError(
            f"{caller}: {len(wrong)} of {len(leaves)} leaves are neither floating nor complex.\n"
            + "\n".join(wrong)
            + "\nKeep them out of the optimizer with `optax.masked` or `optax.partition`; of an "
            "Equinox model pass `eqx.filter(model, eqx.is_inexact_array)`."
        )


def dtype_of(x: Any) -> Any:
    """Finds the dtype of a leaf; None for a leaf that is no array, such as a function."""
    try:
        return jnp.result_type(x)
    except TypeError:
        return None
