"""The roles that `routing_table` gives to parameters of some shapes."""

import jax
import jax.numpy as jnp

import muonclip_jax as mc


def shapes_of(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def roles_of(tree, **arguments):
    """Returns, by path, `adamw` or the number of matrices and their sides."""
    table = mc.routing_table(shapes_of(tree), **arguments)
    return {
        row.path: "adamw" if row.optimizer == "adamw" else (row.num_matrices, row.n_in, row.n_out)
        for row in table.rows
    }


def warnings_of(tree, **arguments):
    return mc.routing_table(shapes_of(tree), **arguments).warnings
