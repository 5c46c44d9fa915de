"""Matrices of equal shape, from any leaves, orthogonalized in one call.

All matrices are oriented wide first, so that the up and down projections of an MLP share a call. A
program then has one Newton-Schulz iteration for each distinct shape, for any number of layers.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence

import jax
import jax.numpy as jnp

from muonclip_jax._orthogonalize.choices import MAX_BATCH_BYTES
from muonclip_jax._orthogonalize.matrix_axes import Axes, from_matrices, is_tall, to_matrices


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
        stacks = [matrices[i].reshape(-1, *matrices[i].shape[-2:]) for i in members]
        ends = list(itertools.accumulate(len(stack) for stack in stacks))
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
