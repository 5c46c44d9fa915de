"""Reads the golden tables in tests/golden: the right optimizer of public models' parameters."""

import ast
import dataclasses
import itertools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.tree_util import GetAttrKey

FOLDER = pathlib.Path(__file__).parents[1] / "golden"


@dataclasses.dataclass(frozen=True)
class Expected:
    """One parameter of a table.

    Attributes:
      path: Its path, components joined by `/`.
      shape: Its shape.
      optimizers: The optimizers that are right.
      matrices: The right `(num_matrices, n_in, n_out)` under Muon; several if all are defensible.
      warned: True if names and shapes cannot decide: a warning that names it is right too.
    """

    path: str
    shape: tuple[int, ...]
    optimizers: tuple[str, ...]
    matrices: tuple[tuple[int, ...], ...]
    warned: bool


@dataclasses.dataclass(frozen=True)
class Table:
    """The parameters of one model.

    Attributes:
      name: Name of the file.
      container: How the pytree is built, a key of `CONTAINERS`.
      arguments: Arguments of `routing_table` that a user of the model would pass; the rows are
        right without them too.
      rows: One entry per parameter.
    """

    name: str
    container: str
    arguments: dict[str, Any]
    rows: tuple[Expected, ...]

    def params(self) -> Any:
        """Builds the model's parameters, one `jax.ShapeDtypeStruct` each."""
        return CONTAINERS[self.container](
            [(row.path, jax.ShapeDtypeStruct(row.shape, jnp.float32)) for row in self.rows]
        )

    def expected(self) -> list[Expected]:
        """Returns the rows in the order of `jax.tree.leaves` of the parameters."""
        build = CONTAINERS[self.container]
        numbers = jax.tree.leaves(build([(row.path, i) for i, row in enumerate(self.rows)]))
        return [self.rows[i] for i in numbers]


def read(name: str) -> Table:
    """Reads `tests/golden/NAME.txt`."""
    lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    start = next(i for i, line in enumerate(lines) if line.startswith("path "))
    head = dict(line.split(": ", 1) for line in lines[:start])
    arguments = ast.literal_eval(head.get("arguments", "{}"))
    rows = [row for line in lines[start + 1 :] for row in _rows(line)]
    return Table(name, head["container"], arguments, tuple(rows))


def _rows(line: str) -> list[Expected]:
    path, shape, optimizer, matrices, why = re.split(r" {2,}", line, maxsplit=4)
    if not why:
        raise ValueError(f"{path}: no justification.")
    optimizers = optimizer.removesuffix(" warned").split("|")
    sizes = [m.split(" x ") for m in matrices.split(" | ") if m != "-"]
    shared = (
        tuple(ast.literal_eval(shape)),
        tuple(optimizers),
        tuple(tuple(map(int, m)) for m in sizes),
        optimizer.endswith(" warned"),
    )
    return [Expected(name, *shared) for name in unfolded(path)]


def unfolded(path: str) -> list[str]:
    """Expands `{0,1}` and `{0…3,5}`, which fold equal layers."""
    parts = re.split(r"\{([^}]*)\}", path)
    choices = [_numbers(p) if i % 2 else [p] for i, p in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def _numbers(text: str) -> list[str]:
    ranges = [part.split("…") for part in text.replace(" ", "").split(",")]
    return [
        str(i) if len(ends) > 1 else ends[0]
        for ends in ranges
        for i in range(int(ends[0]), int(ends[-1]) + 1)
    ]


class Module:
    """A callable pytree with attributes, such as an Equinox module."""

    def __init__(self, children: dict[str, Any]):
        self.children = children

    def __call__(self, x: Any) -> Any:
        raise TypeError("The parameters were called as a function.")


jax.tree_util.register_pytree_with_keys(
    Module,
    lambda m: ([(GetAttrKey(k), v) for k, v in m.children.items()], tuple(m.children)),
    lambda names, children: Module(dict(zip(names, children, strict=True))),
)

Leaves = list[tuple[str, Any]]


def _nested(leaves: Leaves) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, leaf in leaves:
        *parents, name = path.split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return root


def _with_lists(node: Any, make: Callable[[dict[str, Any]], Any] = dict) -> Any:
    """Turns dictionaries with numbers as keys into lists, other ones by `make`; gaps are None."""
    if not isinstance(node, dict):
        return node
    children = {key: _with_lists(child, make) for key, child in node.items()}
    if all(key.isdigit() for key in children):
        return [children.get(str(i)) for i in range(max(map(int, children)) + 1)]
    return make(children)


def _haiku(leaves: Leaves) -> dict[str, Any]:
    """Two levels: the module's path with slashes, then the parameter."""
    root: dict[str, Any] = {}
    for path, leaf in leaves:
        module, name = path.rsplit("/", 1)
        root.setdefault(module, {})[name] = leaf
    return root


def _nnx_state(leaves: Leaves) -> Any:
    flat: dict[Any, Any] = {
        tuple(int(c) if c.isdigit() else c for c in path.split("/")): nnx.Param(leaf)
        for path, leaf in leaves
    }
    return nnx.from_flat_state(flat)


CONTAINERS: dict[str, Callable[[Leaves], Any]] = {
    "nested dict": _nested,
    "nested dict and lists": lambda leaves: _with_lists(_nested(leaves)),
    "callable modules and lists": lambda leaves: _with_lists(_nested(leaves), Module),
    "flat dict, dotted keys": dict,
    "flat dict, slash keys": dict,
    "haiku": _haiku,
    "nnx state": _nnx_state,
}
