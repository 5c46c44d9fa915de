"""Reads dimension numbers: which axes of each leaf are the inputs and outputs of its matrices."""

from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._common.folding import differences, fold_faults
from muonclip_jax._common.paths import leaf_paths, path_string
from muonclip_jax._common.types import ArrayTree
from muonclip_jax._orthogonalize.matrices import Axes

# A pytree, or a prefix of one, of MuonDimensionNumbers and None; or a function from the parameters
# to such a pytree.
DimensionNumbersOrFn: TypeAlias = ArrayTree | Callable[[ArrayTree], ArrayTree]

# The matrices of a leaf without dimension numbers.
LAST_TWO_AXES = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)


_BUILD = "Build it from these parameters: {{argument}}=jax.tree.map(lambda p: {}, params)."
# How to build an argument that is of another model.
_FIXES = {
    "muon_weight_dimension_numbers": (
        "Build it from these parameters; or leave it out, so that roles are found by names and "
        "shapes, and change single parameters with overrides=. mc.routing_table(params) shows them."
    ),
    "weight_dimension_numbers": _BUILD.format("mc.MuonDimensionNumbers(-2, -1)"),
    "token_axis": _BUILD.format("-2"),
    "mask": _BUILD.format("p.ndim > 1"),
}


def axes_of(dimension_numbers: MuonDimensionNumbers, ndim: int) -> Axes:
    """Sorts the axes of a leaf into batch, inputs and outputs.

    Args:
      dimension_numbers: Reduction and output axes; may be negative.
      ndim: Number of axes of the leaf.

    Returns:
      The axes.

    Raises:
      ValueError: if an axis is named twice or does not exist, or a side has none.

    Example:
      >>> axes_of(MuonDimensionNumbers(-3, (-2, -1)), 4)
      Axes(batch=(0,), reduction=(1,), output=(2, 3))
    """
    sides = []
    for axis in dimension_numbers:
        named = (axis,) if isinstance(axis, int) else tuple(axis)
        sides.append(tuple(a + ndim if a < 0 else a for a in named))
    reduction, output = sides
    used = reduction + output
    if not reduction or not output or len(set(used)) < len(used) or not set(used) <= {*range(ndim)}:
        raise ValueError(
            f"{dimension_numbers} does not name axes of a leaf with {ndim}: each side needs at "
            "least one axis, and no axis may be named twice"
        )
    return Axes(tuple(a for a in range(ndim) if a not in used), reduction, output)


def is_function(value: Any, tree: ArrayTree = None) -> bool:
    """Returns whether a value is a function of the parameters, and not a pytree that is callable.

    Equinox and NNX modules and `flax.struct` classes with `__call__` are pytrees. A
    `jax.tree_util.Partial` is a pytree if the parameters are a `Partial` of the same function.

    Args:
      value: A pytree or a function that returns one.
      tree: The parameters.

    Returns:
      True for functions and methods, and for the two kinds of `partial`.

    Example:
      >>> is_function(lambda params: params), is_function({"w": True})
      (True, False)
    """
    if isinstance(value, jax.tree_util.Partial):
        return not isinstance(tree, jax.tree_util.Partial) or value.func != tree.func
    return callable(value) and jax.tree.structure(value) == jax.tree.structure(0)


def spread(
    name: str, given: Any, tree: ArrayTree, is_leaf: Callable[[Any], bool] | None = None
) -> list[Any]:
    """Spreads a pytree, a prefix of one, or a function that returns one over the leaves of another.

    If the structures differ, as those of an `nnx.State` of booleans and of the updates that
    `nnx.Optimizer` passes do, leaves are matched by path.

    Args:
      name: Public function and argument, such as `muon: weight_decay_mask`, for errors.
      given: The pytree, prefix or function.
      tree: Parameters or gradients, or their shapes.
      is_leaf: As for `jax.tree.leaves`, for `given`.

    Returns:
      One value for each leaf of `tree`, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: if neither the structures nor the paths match, with the paths that differ.

    Example:
      >>> spread("muon: weight_decay_mask", {"a": True, "b": False}, {"a": [1.0, 2.0], "b": 3.0})
      [True, True, False]
    """
    if is_function(given, tree):
        given = given(tree)
    values, structure = jax.tree.flatten(given, is_leaf=is_leaf)
    try:
        subtrees = structure.flatten_up_to(tree)
    except ValueError as error:
        return _by_path(name, given, values, tree, is_leaf, error)
    return [v for v, t in zip(values, subtrees, strict=True) for _ in jax.tree.leaves(t)]


def _by_path(
    name: str,
    given: Any,
    values: list[Any],
    tree: ArrayTree,
    is_leaf: Callable[[Any], bool] | None,
    error: ValueError,
) -> list[Any]:
    """Finds for each leaf the value at the longest prefix of its path; raises if one has none."""
    at = dict(zip(leaf_paths(given, is_leaf), values, strict=True))
    paths, used = leaf_paths(tree), dict[tuple[str, ...], tuple[str, ...]]()
    for path in paths:
        ends = (path[:end] for end in range(len(path), -1, -1))
        if (end := next((end for end in ends if end in at), None)) is not None:
            used[path] = end
    hidden = leaf_paths(tree, lambda x: x is None or isinstance(x, optax.MaskedNode))
    hidden_ends = {path[:end] for path in hidden for end in range(len(path) + 1)}
    unused = [end for end in at if end not in {*used.values(), *hidden_ends}]
    if unused or len(used) < len(paths):
        got = dict.fromkeys((*used, *unused), "an entry")
        lines = differences(got, dict.fromkeys(paths, "an entry"), ("entry", "entries"))
        head = f"{name} does not match the parameters."
        raise ValueError("\n".join([head, *lines, _fix(name, at, paths)])) from error
    return [at[used[path]] for path in paths]


def _fix(name: str, given: Collection[tuple[str, ...]], paths: Collection[tuple[str, ...]]) -> str:
    """Returns how to build an argument for the parameters."""
    argument, root = name.rpartition(" ")[2], {("params",)}
    roots = [{path[:1] for path in one} for one in (given, paths)]
    if root in roots and roots[0] != roots[1]:
        below = "it has" if roots[0] == root else "the parameters have"
        fixed = f"{argument}['params']" if roots[0] == root else f"{{'params': {argument}}}"
        return f"Only {below} a root key 'params': pass {argument}={fixed}."
    return _FIXES.get(argument, _FIXES["mask"]).format(argument=argument)


def per_leaf(
    name: str, dimension_numbers: DimensionNumbersOrFn | None, tree: ArrayTree
) -> list[Any]:
    """Finds the dimension numbers of each leaf.

    Args:
      name: See `spread`.
      dimension_numbers: Pytree or prefix of one of `MuonDimensionNumbers` and None, or a function
        that makes one from `tree`; `split.Split`s are leaves too. None as a whole stands for
        `LAST_TWO_AXES` everywhere.
      tree: Parameters or gradients, or their shapes.

    Returns:
      One entry for each leaf of `tree`, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: if `dimension_numbers` is not a prefix of `tree`.

    Example:
      >>> numbers = {"a": None, "b": LAST_TWO_AXES}
      >>> per_leaf("muon: numbers", numbers, {"a": jnp.ones(3), "b": jnp.ones((2, 3))})
      [None, MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)]
    """
    if dimension_numbers is None:
        return [LAST_TWO_AXES] * len(jax.tree.leaves(tree))
    return spread(
        name,
        dimension_numbers,
        tree,
        lambda x: x is None or isinstance(x, MuonDimensionNumbers),
    )


def matrix_axes(
    caller: str, tree: ArrayTree, dimension_numbers: DimensionNumbersOrFn | None
) -> list[Axes]:
    """Finds the axes of each leaf; raises one error for all leaves that are no matrices.

    Args:
      caller: Name of the public function that was called.
      tree: Parameters or gradients, or their shapes.
      dimension_numbers: See `per_leaf`; None as a leaf stands for `LAST_TWO_AXES`.

    Returns:
      One entry for each leaf of `tree`.

    Raises:
      ValueError: if a leaf has fewer than two axes, is neither floating nor complex, or does not
        have the axes that its dimension numbers name.

    Example:
      >>> matrix_axes("muon", {"w": jnp.ones((4, 2, 3))}, None)
      [Axes(batch=(0,), reduction=(1,), output=(2,))]
    """
    found, faults = [], []
    paths_and_leaves = jax.tree_util.tree_leaves_with_path(tree)
    entries = per_leaf(f"{caller}: weight_dimension_numbers", dimension_numbers, tree)
    for (path, leaf), numbers in zip(paths_and_leaves, entries, strict=True):
        try:
            if leaf.ndim < 2 or not jnp.issubdtype(leaf.dtype, jnp.inexact):
                raise ValueError("a matrix needs two axes or more and a floating or complex dtype")
            found.append(axes_of(numbers or LAST_TWO_AXES, leaf.ndim))
        except ValueError as error:
            faults.append((path_string(path), f"{leaf.dtype}{list(leaf.shape)}: {error}."))
    if faults:
        raise ValueError(
            f"{caller}: {len(faults)} of {len(paths_and_leaves)} leaves cannot be orthogonalized.\n"
            + "\n".join(fold_faults(faults))
            + "\nAssign them to another optimizer: use `muon`, pass None for them in "
            "muon_weight_dimension_numbers, or wrap this transform in `optax.masked`."
        )
    return found
