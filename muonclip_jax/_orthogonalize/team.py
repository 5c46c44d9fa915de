"""Devices that hold the columns of one matrix together, each some of them, and iterate together."""

from typing import NamedTuple

import jax


class Team(NamedTuple):
    """The devices that share a matrix, seen from one of them, inside of `jax.shard_map`.

    Every team of the mesh works at the same time, on a matrix of its own.

    Attributes:
      axes: The mesh axes over which the teams are made, first the slowest.
      size: Devices in a team.
      groups: The devices of each team, by their number over `axes`; None for one team of all.
    """

    axes: tuple[str, ...]
    size: int
    groups: tuple[tuple[int, ...], ...] | None

    def sum(self, x: jax.Array) -> jax.Array:
        """Adds up the parts that the members have."""
        return jax.lax.psum(x, self.axes, axis_index_groups=self._groups)

    def max(self, x: jax.Array) -> jax.Array:
        """Finds the largest of what the members have."""
        return jax.lax.pmax(x, self.axes, axis_index_groups=self._groups)

    def rows(self, x: jax.Array) -> jax.Array:
        """Takes this member's rows of a matrix that all have; all rows if they cannot be shared."""
        if x.shape[-2] % self.size:
            return x
        height = x.shape[-2] // self.size
        position = jax.lax.axis_index(self.axes) % self.size
        return jax.lax.dynamic_slice_in_dim(x, position * height, height, axis=-2)

    def gather(self, rows: jax.Array, height: int) -> jax.Array:
        """Undoes `rows`, for a matrix of this height."""
        if height % self.size:
            return rows
        return jax.lax.all_gather(
            rows, self.axes, axis=rows.ndim - 2, tiled=True, axis_index_groups=self._groups
        )

    @property
    def _groups(self) -> list[list[int]] | None:
        return None if self.groups is None else [list(group) for group in self.groups]
