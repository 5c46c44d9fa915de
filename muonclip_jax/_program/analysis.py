"""The result of `analyze`: the roles of parameters and the attention layers of a program."""

import dataclasses
import json
import warnings
from collections.abc import Iterator
from typing import Any

import jax
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._common.folding import fold
from muonclip_jax._common.paths import aligned, leaf_paths
from muonclip_jax._common.types import ArrayTree
from muonclip_jax._program.describe import AttentionSite
from muonclip_jax._program.head_map import SiteSource
from muonclip_jax._program.roles import Role
from muonclip_jax._program.storage import (
    tree_from_json,
    tree_to_json,
    view_from_json,
    view_to_json,
)

_VERSION = 2  # with the groups of convolutions
# Roles by name that keep AdamW where the program shows a matrix like any other.
_KEPT = ("embedding", "router", "output head", "head ")


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The role of each parameter of a model, and its attention layers.

    Print it for a table. Pass it wherever a head layout is accepted: `qk_clip(params, stats,
    analysis)`, `muonclip(lr, layout=analysis)`.

    Attributes:
      roles: The role that the program shows, by path of the parameter.
      shapes: Shape of each parameter.
      names: The role that its name and shape suggest.
      attention: The attention layers.
      warnings: Warnings to check.
      tree: The structure of the parameters, with paths as leaves; None if it is unknown.
    """

    roles: dict[str, Role]
    shapes: dict[str, tuple[int, ...]]
    names: dict[str, Role]
    attention: tuple[AttentionSite, ...]
    warnings: tuple[str, ...] = ()
    tree: ArrayTree = dataclasses.field(default=None, repr=False, compare=False)

    def decision(self, path: str) -> Role:
        """Returns the role that the optimizer uses for a parameter.

        It is the role in the program. If the program does not decide, it is the role
        that the name suggests. A parameter named as an embedding, a router or an output head stays
        with AdamW where the program shows a matrix.

        Args:
          path: Path of the parameter, components joined by slashes.

        Returns:
          The role; its reason begins with `by name` where the name decided.
        """
        role, name = self.roles[path], self.names.get(path)
        if name is None:
            return role
        if role.optimizer == "unknown":
            return name._replace(reason=f"by name: {name.reason} (program: {role.reason})")
        if role.optimizer == "muon" and name.optimizer == "adamw" and name.reason.startswith(_KEPT):
            return Role("adamw", None, role.heads, f"by name: {name.reason} (program: a matrix)")
        return role

    @property
    def dimension_numbers(self) -> ArrayTree:
        """A pytree like the parameters, for `muon_weight_dimension_numbers`.

        `MuonDimensionNumbers` for each parameter that Muon updates, None for the others. They
        cannot express the groups of a convolution, which is a warning. Raises
        ValueError if the analysis was read from JSON without the parameters, and these were no
        nested dicts, lists and tuples.
        """
        if self.tree is None:
            raise ValueError(
                "analysis.dimension_numbers: the structure of the parameters is not in the JSON "
                "text. Pass the parameters or their shapes: Analysis.from_json(text, params)."
            )
        if grouped := [path for path in self.roles if self.decision(path).groups]:
            warnings.warn(
                "analysis.dimension_numbers: dimension numbers cannot express the groups of these "
                f"convolutions: {', '.join(grouped)}. Pass the analysis itself: mc.muon(..., "
                "muon_weight_dimension_numbers=analysis).",
                UserWarning,
                stacklevel=2,
            )
        return jax.tree.map(self._numbers, self.tree)

    def _numbers(self, path: str) -> MuonDimensionNumbers | None:
        role = self.decision(path) if path in self.roles else None
        return role.dimension_numbers if role and role.optimizer == "muon" else None

    def __str__(self) -> str:
        """Formats the roles, then the attention layers, the names that differ, and warnings."""
        lines = [*self._role_lines(), *self._attention_lines()]
        for one, many, found in (
            (
                "name that suggests another role",
                "names that suggest another role",
                [*self._differing()],
            ),
            ("warning", "warnings", self.warnings),
        ):
            if found:
                title = one if len(found) == 1 else many
                lines += [f"{len(found)} {title}:", *(f"  {text}" for text in found)]
        return "\n".join(lines)

    def _role_lines(self) -> Iterator[str]:
        rows = [("path", "shape", "optimizer", "inputs -> outputs", "heads", "why")]
        cells = [(self.shapes[path], self.decision(path)) for path in self.roles]
        for path, indices in fold([path.split("/") for path in self.roles], cells):
            shape, role = cells[indices[0]]
            heads = str(role.heads) if role.heads else "-"
            row = ("/".join(path), str(shape), role.optimizer, _axes(role), heads, role.reason)
            rows.append(row)
        yield aligned(rows)
        optimizers = [role.optimizer for _, role in cells]
        yield ", ".join(f"{name}: {optimizers.count(name)}" for name in ("muon", "adamw"))

    def _attention_lines(self) -> Iterator[str]:
        count = sum(site.num_layers for site in self.attention)
        yield f"{count} attention{'s' * (count > 1)}:" if count else "no attention"
        for path, indices in fold(
            [site.path.split("/") for site in self.attention],
            [_without_numbers(site) for site in self.attention],
        ):
            times = f" ({len(indices)} of them)" if len(indices) > 1 else ""
            name = "/".join(path) or "(root)"
            yield f"  {name}{times}: {self.attention[indices[0]]}"

    def _differing(self) -> Iterator[str]:
        """Yields the parameters for which the name suggests another role than the program."""
        paths = [
            path
            for path, role in self.roles.items()
            if role.optimizer != "unknown"
            and (name := self.names.get(path))
            and _differ(role, name)
        ]
        cells = [(self.roles[p], self.names[p], self.shapes[p]) for p in paths]
        for path, indices in fold([path.split("/") for path in paths], cells):
            role, name, shape = cells[indices[0]]
            used = self.decision(paths[indices[0]])
            yield (
                f"{'/'.join(path)} {shape}: {_short(role)} by the program ({role.reason}), "
                f"{_short(name)} by name ({name.reason}); used: {_short(used)}"
            )

    def diff(self, other: "Analysis") -> str:
        """Lists what differs from another analysis, one line each; empty if nothing does.

        Args:
          other: The other analysis, such as one from the start of a run.

        Returns:
          The text.
        """
        lines = []
        for path in dict.fromkeys((*self.roles, *other.roles)):
            a, b = (_entry(one, path) for one in (self, other))
            if a != b:
                lines.append(f"{path}: {a} -> {b}")
        mine, others = ({(s.path, str(s)) for s in one.attention} for one in (self, other))
        lines += [f"attention {path}: only before: {text}" for path, text in sorted(mine - others)]
        lines += [f"attention {path}: only after: {text}" for path, text in sorted(others - mine)]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Returns a text from which `from_json` makes an equal analysis."""
        data = {
            "version": _VERSION,
            "roles": {path: list(role) for path, role in self.roles.items()},
            "names": {path: list(role) for path, role in self.names.items()},
            "shapes": self.shapes,
            "attention": [_site_to_json(site) for site in self.attention],
            "warnings": self.warnings,
            "tree": None if self.tree is None else tree_to_json(self.tree),
        }
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str, params: ArrayTree = None) -> "Analysis":
        """Reads what `to_json` returned.

        Args:
          text: The text.
          params: The parameters or their shapes. Needed only for `dimension_numbers` of parameters
            that are in other containers than dicts, lists and tuples.

        Returns:
          The analysis.

        Raises:
          ValueError: if the text is none of `to_json`, or `params` has other parameters.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("version") != _VERSION:
            raise ValueError(f"Analysis.from_json: text is no analysis of version {_VERSION}.")
        tree = None if data["tree"] is None else tree_from_json(data["tree"])
        shapes = {path: tuple(shape) for path, shape in data["shapes"].items()}
        if params is not None:
            tree = paths_like(params, shapes)
        return cls(
            {path: _role_from_json(role) for path, role in data["roles"].items()},
            shapes,
            {path: _role_from_json(role) for path, role in data["names"].items()},
            tuple(map(_site_from_json, data["attention"])),
            tuple(data["warnings"]),
            tree,
        )


def paths_like(params: ArrayTree, shapes: dict[str, tuple[int, ...]]) -> ArrayTree:
    """Returns a pytree like the parameters with paths as leaves; empty where it has no array.

    Args:
      params: The parameters.
      shapes: The shapes that they must have.

    Returns:
      The pytree.

    Raises:
      ValueError: if a parameter of `shapes` is missing or has another shape.
    """
    leaves, treedef = jax.tree.flatten(params)
    paths = ["/".join(path) for path in leaf_paths(params)]
    found = {p: tuple(getattr(x, "shape", ())) for p, x in zip(paths, leaves, strict=True)}
    wrong = [f"{p}: {found.get(p)}, expected {n}" for p, n in shapes.items() if found.get(p) != n]
    if wrong:
        raise ValueError("the parameters do not match the analysis: " + "; ".join(wrong[:5]))
    return jax.tree.unflatten(treedef, [path if path in shapes else "" for path in paths])


def _entry(analysis: Analysis, path: str) -> str:
    if path not in analysis.roles:
        return "absent"
    role = analysis.decision(path)
    return f"{analysis.shapes[path]} {role.optimizer} {_axes(role)} {role.heads} {role.reason}"


def _axes(role: Role) -> str:
    if role.dimension_numbers is None:
        return "-"
    return " -> ".join(map(str, role.dimension_numbers))


def _short(role: Role) -> str:
    return f"Muon {_axes(role)}" if role.optimizer == "muon" else "AdamW"


def _differ(a: Role, b: Role) -> bool:
    if a.optimizer != b.optimizer:
        return True
    return a.optimizer == "muon" and _sides(a) != _sides(b)


def _sides(role: Role) -> tuple[frozenset[int], ...]:
    sides = role.dimension_numbers or ()
    return tuple(frozenset((s,) if isinstance(s, int) else s) for s in sides)


def _without_numbers(site: AttentionSite) -> Any:
    """Returns what equal layers have in common."""
    return dataclasses.replace(site, path="", query=(), key=(), sources=())


def _role_from_json(data: Any) -> Role:
    optimizer, numbers, heads, reason, groups = data
    if numbers is not None:
        sides = (tuple(side) if isinstance(side, list) else side for side in numbers)
        numbers = MuonDimensionNumbers(*sides)
    return Role(optimizer, numbers, heads, reason, groups and tuple(groups))


def _site_to_json(site: AttentionSite) -> dict[str, Any]:
    data = {field.name: getattr(site, field.name) for field in dataclasses.fields(site)}
    data["sources"] = [
        [s.side, s.path, s.shape, view_to_json(s.view), s.is_inner] for s in site.sources
    ]
    return data


def _site_from_json(data: dict[str, Any]) -> AttentionSite:
    sources = [
        SiteSource(side, path, tuple(shape), view_from_json(view), is_inner)
        for side, path, shape, view, is_inner in data.pop("sources")
    ]
    dims = tuple(map(tuple, data.pop("dims")))
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
    }
    return AttentionSite(**fields, dims=dims, sources=tuple(sources))
