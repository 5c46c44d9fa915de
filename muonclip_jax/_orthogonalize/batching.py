"""Matrices of equal shape, from any leaves, orthogonalized in one call.

Every matrix is laid on its short side first, so that the up and down projections of an MLP meet. A
program then has one Newton-Schulz iteration for each distinct shape, however many layers there are.
"""

import itertools
from collections.abc import Callable, Hashable, Iterator, Sequence

import jax
import jax.numpy as jnp

# Bytes of the matrices that are worked on at once. Their temporaries are two to four times as many.
MOST_BYTES = 2**30


def in_groups(
    orthogonalize: Callable[[jax.Array], jax.Array], matrices: Sequence[jax.Array]
) -> list[jax.Array]:
    """Orthogonalizes batches of matrices with one call for all that have a shape in common.

    Args:
      orthogonalize: Takes and returns arrays of shape (*batch, n, m) with n <= m, and treats every
        matrix on its own.
      matrices: Arrays of shape (*batch, n_in, n_out).

    Returns:
      Each of `matrices` orthogonalized, in its shape.

    Example:
      >>> up, down = in_groups(lambda x: 2 * x, [jnp.ones((2, 3)), jnp.ones((4, 3, 2))])
      >>> up.shape, down.shape
      ((2, 3), (4, 3, 2))
    """
    oriented = [_oriented(x) for x in matrices]
    results: dict[int, jax.Array] = {}
    for members in groups_of(matrices):
        if len(members) == 1:  # as it is: to join its batch axes could move it between devices
            results[members[0]] = orthogonalize(oriented[members[0]])
            continue
        stacks = [oriented[i].reshape(-1, *oriented[i].shape[-2:]) for i in members]
        ends = list(itertools.accumulate(len(stack) for stack in stacks))
        parts = jnp.split(orthogonalize(jnp.concatenate(stacks)), ends[:-1])
        for i, part in zip(members, parts, strict=True):
            results[i] = part.reshape(oriented[i].shape)
    return [results[i].mT if _is_tall(x) else results[i] for i, x in enumerate(matrices)]


def groups_of(matrices: Sequence[jax.Array]) -> Iterator[list[int]]:
    """Yields the indices of the batches that belong together, no more than `MOST_BYTES` of them.

    A batch that is larger has a group of its own.

    Args:
      matrices: Arrays of shape (*batch, n_in, n_out).

    Returns:
      One list of indices for each call of Newton-Schulz.

    Example:
      >>> list(groups_of([jnp.ones((2, 3)), jnp.ones((4, 3, 2)), jnp.ones((5, 5))]))
      [[0, 1], [2]]
    """
    by_kind: dict[Hashable, list[int]] = {}
    for i, x in enumerate(map(_oriented, matrices)):
        by_kind.setdefault((x.shape[-2:], x.dtype, _layout(x)), []).append(i)
    for members in by_kind.values():
        group, held = [], 0
        for i in members:
            if group and held + matrices[i].nbytes > MOST_BYTES:
                yield group
                group, held = [], 0
            group.append(i)
            held += matrices[i].nbytes
        yield group


def _layout(x: jax.Array) -> Hashable:
    """Tells how an explicit mesh lays out an array; what differs in this cannot be joined."""
    spec = jax.typeof(x).sharding.spec
    return tuple(axis for axis in spec[:-2] if axis is not None), spec[-2:]


def _oriented(x: jax.Array) -> jax.Array:
    return x.mT if _is_tall(x) else x


def _is_tall(x: jax.Array) -> bool:
    return x.shape[-2] > x.shape[-1]
