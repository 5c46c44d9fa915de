"""Leaves as batches of matrices, and all matrices of equal shape orthogonalized in one call.

The equation of a layer is x W = y: a matrix has its reduction axes first and its output axes last,
n_in x n_out. All other axes of the leaf are a batch, and are never flattened into a matrix. A
matrix that is tall is transposed on the way, here and nowhere else, so that the up and down
projections of an MLP share a call. A program then has one Newton-Schulz iteration for each distinct
shape, for any number of layers.
"""

import itertools
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from muonclip_jax._common.types import Scalar
from muonclip_jax._orthogonalize.choices import MAX_BATCH_BYTES

# The scale of an update: see `update_scale`.
ConsistentRMS: TypeAlias = Scalar | Literal["spectral"] | None


class Axes(NamedTuple):
    """The axes of a leaf as a batch of matrices, as numbers that are not negative.

    Attributes:
      batch: Axes that index the matrices, in the order of the leaf.
      reduction: Axes that are merged to the inputs, n_in.
      output: Axes that are merged to the outputs, n_out.
    """

    batch: tuple[int, ...]
    reduction: tuple[int, ...]
    output: tuple[int, ...]


def orthogonalize_leaves(
    orthogonalize: Callable[[jax.Array], jax.Array],
    leaves: Sequence[jax.Array],
    axes: Sequence[Axes],
) -> list[jax.Array]:
    """Orthogonalizes the matrices of all leaves, with one call for each distinct shape.

    Args:
      orthogonalize: Accepts and returns arrays of shape (*batch, n, m) with n <= m, in which
        matrices are independent.
      leaves: Arrays of any shape.
      axes: The axes of each leaf as a batch of matrices.

    Returns:
      Each leaf orthogonalized, in its shape.

    Example:
      >>> last_two = [Axes((), (0,), (1,)), Axes((0,), (1,), (2,))]
      >>> leaves = jnp.ones((2, 3)), jnp.ones((4, 3, 2))
      >>> up, down = orthogonalize_leaves(lambda X: 2 * X, leaves, last_two)
      >>> up.shape, down.shape
      ((2, 3), (4, 3, 2))
    """
    tall = [is_tall(x.shape, a) for x, a in zip(leaves, axes, strict=True)]
    matrices = [to_matrices(*of) for of in zip(leaves, axes, tall, strict=True)]
    results: dict[int, jax.Array] = {}
    for members in groups_of(matrices):
        if len(members) == 1:  # as it is: joining its batch axes could move it between devices
            results[members[0]] = orthogonalize(matrices[members[0]])
            continue
        sizes = [math.prod(matrices[i].shape[:-2]) for i in members]  # no -1: a side may be 0
        stacks = [
            matrices[i].reshape(n, *matrices[i].shape[-2:])
            for i, n in zip(members, sizes, strict=True)
        ]
        ends = list(itertools.accumulate(sizes))
        parts = jnp.split(orthogonalize(jnp.concatenate(stacks)), ends[:-1])
        for i, part in zip(members, parts, strict=True):
            results[i] = part.reshape(matrices[i].shape)
    return [from_matrices(results[i], axes[i], x.shape, tall[i]) for i, x in enumerate(leaves)]


def groups_of(matrices: Sequence[jax.Array]) -> Iterator[list[int]]:
    """Yields the indices of the arrays that share a call, at most `MAX_BATCH_BYTES` of them.

    A larger array has a group of its own.

    Args:
      matrices: Arrays of shape (*batch, n, m).

    Returns:
      One list of indices for each call of Newton-Schulz.

    Example:
      >>> list(groups_of([jnp.ones((2, 3)), jnp.ones((4, 2, 3)), jnp.ones((5, 5))]))
      [[0, 1], [2]]
    """
    by_kind: dict[Hashable, list[int]] = {}
    for i, x in enumerate(matrices):
        by_kind.setdefault((x.shape[-2:], x.dtype, _sharding_of(x)), []).append(i)
    for members in by_kind.values():
        group, held = [], 0
        for i in members:
            if group and held + matrices[i].nbytes > MAX_BATCH_BYTES:
                yield group
                group, held = [], 0
            group.append(i)
            held += matrices[i].nbytes
        yield group


def _sharding_of(x: jax.Array) -> Hashable:
    """Returns what must be equal for arrays to be joined on an Explicit mesh."""
    spec = jax.typeof(x).sharding.spec
    return tuple(axis for axis in spec[:-2] if axis is not None), spec[-2:]


def to_matrices(x: jax.Array, axes: Axes, transposed: bool) -> jax.Array:
    """Reshapes a leaf to a batch of matrices.

    Args:
      x: Leaf.
      axes: Its axes.
      transposed: Whether to transpose the matrices; `is_tall` makes all of them wide.

    Returns:
      (*batch, n_in, n_out), or (*batch, n_out, n_in) if transposed.

    Example:
      >>> to_matrices(jnp.ones((5, 2, 3)), Axes((), (0,), (1, 2)), transposed=True).shape
      (6, 5)
    """
    batch = tuple(x.shape[a] for a in axes.batch)
    matrices = x.transpose(sum(axes, ())).reshape(*batch, *sides(x.shape, axes))
    return matrices.mT if transposed else matrices


def from_matrices(
    matrices: jax.Array, axes: Axes, shape: Sequence[int], transposed: bool
) -> jax.Array:
    """Reshapes a batch of matrices to the leaf: the inverse of `to_matrices`.

    Args:
      matrices: Array of shape (*batch, n_in, n_out), or (*batch, n_out, n_in) if transposed.
      axes: Axes of the leaf.
      shape: Shape of the leaf.
      transposed: Whether the matrices are transposed.

    Returns:
      The leaf.

    Example:
      >>> from_matrices(jnp.ones((5, 6)), Axes((), (0,), (1, 2)), (5, 2, 3), False).shape
      (5, 2, 3)
    """
    matrices = matrices.mT if transposed else matrices
    order = sum(axes, ())
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return matrices.reshape([shape[a] for a in order]).transpose(inverse)


def is_tall(shape: Sequence[int], axes: Axes) -> bool:
    """Returns whether matrices have more rows than columns, and are iterated on transposed.

    X Xᴴ is then smaller, and Newton-Schulz of Xᵀ is the transpose of Newton-Schulz of X.

    Args:
      shape: Shape of the leaf.
      axes: Its axes.

    Returns:
      True if n_in > n_out.

    Example:
      >>> is_tall((5, 2, 3), Axes((), (0,), (1, 2)))
      False
    """
    n_in, n_out = sides(shape, axes)
    return n_in > n_out


def sides(shape: Sequence[int], axes: Axes) -> tuple[int, int]:
    """Returns the sides of the matrices of a leaf.

    Args:
      shape: Shape of the leaf.
      axes: Its axes.

    Returns:
      n_in and n_out.

    Example:
      >>> sides((5, 2, 3), Axes((), (0,), (1, 2)))
      (5, 6)
    """
    return math.prod(shape[a] for a in axes.reduction), math.prod(shape[a] for a in axes.output)


def update_scale(n_in: int, n_out: int, consistent_rms: ConsistentRMS = None) -> Scalar:
    """Returns the factor of an orthogonalized matrix, by its shape.

    None: √max(1, n_out / n_in), so that one learning rate serves all widths. A number r:
    r √max(n_in, n_out), so that the update has the root mean square r; 0.2 matches AdamW.
    `"spectral"`: √(n_out / n_in), with which a learning rate transfers over width (muP).

    Args:
      n_in: Number of inputs.
      n_out: Number of outputs.
      consistent_rms: Root mean square of the update, None or `"spectral"`.

    Returns:
      The factor.

    Example:
      >>> update_scale(4, 16), update_scale(4, 16, consistent_rms=0.25)
      (2.0, 1.0)
      >>> update_scale(16, 4), update_scale(16, 4, consistent_rms="spectral")
      (1.0, 0.5)

    References:
      Jordan et al. 2024, KellerJordan/Muon, muon.py; Liu et al. 2025, arXiv 2502.16982,
      section 2.2; Pethick et al. 2025 (Scion), arXiv 2502.07529.
    """
    if isinstance(consistent_rms, str):  # "spectral"
        return math.sqrt(n_out / max(n_in, 1))
    if consistent_rms is None:
        return math.sqrt(max(1.0, n_out / max(n_in, 1)))
    return consistent_rms * math.sqrt(max(n_in, n_out))
