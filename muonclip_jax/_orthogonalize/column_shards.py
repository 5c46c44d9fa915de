"""The devices that share a matrix: each has a shard of its columns, and they iterate together."""

from typing import NamedTuple

import jax


class ColumnShards(NamedTuple):
    """How the columns of a matrix are sharded, seen from one device inside `jax.shard_map`.

    The mesh may be cut into several groups of devices. Each group shares a matrix of its own.

    Attributes:
      mesh_axes: The mesh axes from which the groups are cut, major to minor.
      devices: Number of devices that share a matrix.
      groups: The devices of each group, numbered over `mesh_axes`; None for one group of all.
    """

    mesh_axes: tuple[str, ...]
    devices: int
    groups: tuple[tuple[int, ...], ...] | None

    def sum(self, x: jax.Array) -> jax.Array:
        """Adds up the partial sums of the devices."""
        return jax.lax.psum(x, self.mesh_axes, axis_index_groups=self._groups)

    def max(self, x: jax.Array) -> jax.Array:
        """Returns the largest value on any of the devices."""
        return jax.lax.pmax(x, self.mesh_axes, axis_index_groups=self._groups)

    def own_rows(self, x: jax.Array) -> jax.Array:
        """Returns this device's share of the rows of a replicated matrix.

        If the number of rows is not a multiple of the number of devices, that is all rows.
        """
        if x.shape[-2] % self.devices:
            return x
        height = x.shape[-2] // self.devices
        position = jax.lax.axis_index(self.mesh_axes) % self.devices
        return jax.lax.dynamic_slice_in_dim(x, position * height, height, axis=-2)

    def all_rows(self, own_rows: jax.Array, height: int) -> jax.Array:
        """Gathers what `own_rows` returned on each device, for a matrix of `height` rows."""
        if height % self.devices:
            return own_rows
        return jax.lax.all_gather(
            own_rows,
            self.mesh_axes,
            axis=own_rows.ndim - 2,
            tiled=True,
            axis_index_groups=self._groups,
        )

    @property
    def _groups(self) -> list[list[int]] | None:
        return None if self.groups is None else [list(group) for group in self.groups]
