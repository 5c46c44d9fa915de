"""Assigns each parameter to Muon or AdamW: roles, overrides, heads, warnings."""

import fnmatch
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._common.folding import fold, fold_faults
from muonclip_jax._common.paths import leaf_paths, path_string
from muonclip_jax._common.types import ArrayTree
from muonclip_jax._muon.family.sinkhorn import Sinkhorn
from muonclip_jax._muon.overrides import matched
from muonclip_jax._muon.per_head import PerHead, find_heads, head_patterns
from muonclip_jax._muon.roles.decision import DEFAULTS, Decision, RoleSettings
from muonclip_jax._muon.roles.rules import decide
from muonclip_jax._orthogonalize.dimension_numbers import LAST_TWO_AXES, axes_of, per_leaf
from muonclip_jax._orthogonalize.matrices import sides
from muonclip_jax._orthogonalize.split import Split
from muonclip_jax._program.analysis import Analysis

# A middle axis no longer than this may number matrices, such as gate and up.
_OUTER_AXES, _FEW = MuonDimensionNumbers(-3, -1), 4


class Routing(NamedTuple):
    """The parameters that are matrices, and their axes.

    Attributes:
      paths: Path of each parameter.
      shapes: Its shape.
      decisions: Its optimizer, with the reason.
      splits: How its heads are matrices of their own, by index.
    """

    paths: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[int, ...], ...]
    decisions: tuple[Decision, ...]
    splits: Mapping[int, Split]

    @property
    def numbers(self) -> list[MuonDimensionNumbers | Split | None]:
        """Dimension numbers of each parameter, or how it is split; None under AdamW."""
        return [self.splits.get(i, decision.numbers) for i, decision in enumerate(self.decisions)]

    @property
    def labels(self) -> list[str]:
        """The optimizer of each parameter: `"muon"`, `"adam"` or `"sinkhorn"`."""
        rest = ("sinkhorn" if d.sinkhorn else "adam" for d in self.decisions)
        return [r if n is None else "muon" for r, n in zip(rest, self.numbers, strict=True)]

    @property
    def token_axes(self) -> list[int]:
        """The axis of the tokens of each parameter, for those under `"sinkhorn"`."""
        return [d.sinkhorn.token_axis if d.sinkhorn else -2 for d in self.decisions]

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
        fixes = [(f"For {alternative}", fix), (f"To keep {what.split()[0]}", kept)]
        fixes += _other_axes(shape, decision.numbers)
        if decision.other is not None:
            fixes.append((decision.other[0], _shown(decision.other[1])))
        keys = [json.dumps(p, ensure_ascii=False) for p in patterns]  # a literal of Python too
        shown = (
            f"{when}: overrides={{" + ", ".join(f"{key}: {value}" for key in keys) + "}."
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


def _other_axes(
    shape: tuple[int, ...], numbers: MuonDimensionNumbers | None
) -> list[tuple[str, str]]:
    """Lists the other ways in which three axes or more are matrices, with their overrides."""
    if numbers is not None and not isinstance(numbers.output_axis, int):
        first, *rest = numbers.output_axis  # (inputs, few, *outputs) as one matrix
        if not isinstance(numbers.reduction_axis, int) or shape[first] > _FEW:
            return []
        each = MuonDimensionNumbers(numbers.reduction_axis, tuple(rest) if rest[1:] else rest[0])
        axes = axes_of(each, len(shape))
        n_in, n_out = sides(shape, axes)
        count = math.prod(shape[axis] for axis in axes.batch)
        return [(f"For {count} matrices of {n_in} x {n_out}", _shown(each))]
    if len(shape) < 3 or numbers not in (LAST_TWO_AXES, _OUTER_AXES):
        return []
    n_in, few, n_out = shape[-3:]
    joined = MuonDimensionNumbers(-3, (-2, -1))
    found = [(f"To join the last two axes, {n_in} x {few * n_out}", _shown(joined))]
    if numbers == LAST_TWO_AXES and few <= _FEW:
        found.append((f"For {few} matrices of {n_in} x {n_out}", _shown(_OUTER_AXES)))
    return found


def _shown(numbers: MuonDimensionNumbers) -> str:
    return f"mc.MuonDimensionNumbers{tuple(numbers)}"


def role_settings(
    arguments: Mapping[str, Any], per_head: PerHead, layout: PerHead = None
) -> RoleSettings:
    """Builds the settings of roles.

    Args:
      arguments: Arguments of a public function by name, checked.
      per_head: See `muon`.
      layout: The head layouts that are clipped.

    Returns:
      The settings.
    """
    rms = arguments.get("consistent_rms")
    numbers = arguments["muon_weight_dimension_numbers"]
    return RoleSettings(
        layout if numbers is None and isinstance(layout, Analysis) else numbers,
        arguments["overrides"],
        arguments["outputs_first"],
        rms is None or isinstance(rms, str),
        (*head_patterns(per_head), *head_patterns(layout)),
        per_head,
    )


def route(caller: str, params: ArrayTree, settings: RoleSettings = DEFAULTS) -> Routing:
    """Decides for each parameter which axes are its matrices, or that it is assigned to AdamW.

    Args:
      caller: Name of the public function that was called.
      params: Parameters, gradients, or their shapes.
      settings: The settings of the user.

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
        return Routing((), (), (), {})
    paths = leaf_paths(params)
    shapes = tuple(tuple(np.shape(x)) for x in leaves)
    if isinstance(settings.numbers, Analysis):
        decisions = _decisions_of(caller, settings.numbers, paths, shapes)
    elif settings.numbers is not None:
        name = f"{caller}: muon_weight_dimension_numbers"
        decisions = [Decision(n, "given") for n in per_leaf(name, settings.numbers, params)]
    else:
        _check_dtypes(caller, paths, leaves)
        decisions = decide(paths, shapes, settings)
    joined, hidden = ["/".join(path) for path in paths], _hidden_paths(params)
    found = matched(caller, settings.overrides, joined, hidden)
    for index, (pattern, value) in found.items():
        reason = f"override '{pattern}'"
        decisions[index] = _override(f"{caller}: {reason}", joined[index], shapes[index], value)
    is_given = settings.numbers is not None
    given = [i for i, d in enumerate(decisions) if is_given and d.numbers is None]
    hidden = [tuple(path.split("/")) for path in hidden]
    is_part = any(isinstance(x, optax.MaskedNode) for x in jax.tree.leaves(params, is_leaf=_hides))
    decided = {*found, *given}
    heads = find_heads(caller, paths, shapes, settings.per_head, decided, hidden, is_part=is_part)
    splits = {
        i: Split.in_groups(shape, axes_of(d.numbers, len(shape)), *d.groups)
        for i, (shape, d) in enumerate(zip(shapes, decisions, strict=True))
        if d.groups and d.numbers
    }
    for index, note in [
        *dict.fromkeys(heads.splits, "per head").items(),
        *heads.left_whole.items(),
    ]:
        decision = decisions[index]
        numbers = decision.numbers or (LAST_TWO_AXES if index in heads.splits else None)
        decisions[index] = Decision(numbers, f"{decision.reason}, {note}")
    return Routing(tuple(paths), shapes, tuple(decisions), {**splits, **heads.splits})


def _decisions_of(
    caller: str,
    analysis: Analysis,
    paths: Sequence[tuple[str, ...]],
    shapes: Sequence[tuple[int, ...]],
) -> list[Decision]:
    """Reads the decisions of an analysis; raises if it is of another model."""
    known = {path.removeprefix("params/"): path for path in analysis.roles}
    decisions, faults = [], []
    for path, shape in zip(paths, shapes, strict=True):
        name = "/".join(path)
        found = known.get(name.removeprefix("params/"))
        if found is None or analysis.shapes[found] != shape:
            expected = "no such parameter" if found is None else analysis.shapes[found]
            faults.append((name, f"got {shape}, expected {expected}."))
            continue
        role = analysis.decision(found)
        numbers = role.dimension_numbers if role.optimizer == "muon" else None
        groups = role.groups if numbers is not None else None
        decisions.append(Decision(numbers, role.reason, groups=groups))
    if faults:
        raise ValueError(
            f"{caller}: the analysis is of another model.\n"
            + "\n".join(fold_faults(faults))
            + "\nCall mc.analyze with these parameters, or pass a head layout as layout=."
        )
    return decisions


def _override(
    caller: str,
    path: str,
    shape: tuple[int, ...],
    value: MuonDimensionNumbers | Sinkhorn | None,
) -> Decision:
    """Makes the decision of an override; raises if the parameter does not have its axes."""
    reason = caller.partition(": ")[2]
    if isinstance(value, Sinkhorn):
        if len(shape) < 2:
            raise ValueError(f"{caller}: {path} {shape}: {value} needs a parameter with two axes.")
        return Decision(None, reason, sinkhorn=value)
    if value is not None:
        check_axes(caller, path, shape, value)
    return Decision(value, reason)


def _hidden_paths(params: ArrayTree) -> list[str]:
    """Lists the paths at and below which another optimizer has the leaves."""
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=_hides)
    return [path_string(path) for path, x in flat if _hides(x)]


def _hides(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def check_axes(
    caller: str, path: str, shape: tuple[int, ...], numbers: MuonDimensionNumbers
) -> None:
    """Raises, with the path of the parameter, if dimension numbers do not name its axes."""
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
            wrong.append(("/".join(path), f"{shown}."))
    if wrong:
        raise ValueError(
            f"{caller}: {len(wrong)} of {len(leaves)} leaves are neither floating nor complex.\n"
            + "\n".join(fold_faults(wrong))
            + "\nPass the parameters alone: of an NNX model `nnx.state(model, nnx.Param)`, of an "
            "Equinox model `eqx.filter(model, eqx.is_inexact_array)`. Keep other leaves out of the "
            "optimizer with `optax.masked` or `optax.partition`."
        )


def dtype_of(x: Any) -> Any:
    """Finds the dtype of a leaf; None for a leaf that is no array, such as a function."""
    try:
        return jnp.result_type(x)
    except TypeError:
        return None
