"""The logical names of axes, and the rules from these names to the axes of a mesh."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from flax.linen import spmd
from jax.sharding import PartitionSpec as P

# Those of kernels are in the boxes of `model.init`.
AXES = {
    "vocab": "vocabulary, V",
    "embed": "residual stream, D",
    "heads": "query heads, N; or N times the columns of a head, head by head, in a flat kernel",
    "kv_heads": "key and value heads, K",
    "head_dim": "columns of a head, H",
    "latent": "latent queries, or keys and values, of MLA",
    "rope": "the rotary key that all heads share",
    "mlp": "hidden units of an MLP or of an expert, F",
    "experts": "routed experts, E",
    "router": "scores of the router, one for each expert",
    "layers": "layers of a scanned stack, L",
    # Of activations only.
    "batch": "sequences, B",
    "expert_batch": "sequences, in arrays that are sharded over expert too",
    "embed_batch": "sequences, after the embedding, while D is sharded as in the embedding",
}

# Logical axis and mesh axes. An array follows the rules from the top, uses each mesh axis once, and
# skips rules whose mesh axes do not divide its size: a later rule for the same name is the second
# choice. Names without a rule are not sharded: a sharded axis of layers would be gathered at every
# layer of the scan.
RULES = (
    ("batch", ("data", "fsdp", "expert")),  # attention is sharded over the experts' devices too
    ("batch", ("data", "fsdp")),
    ("batch", ("fsdp", "expert")),
    ("batch", ("data",)),
    ("batch", ("fsdp",)),
    ("embed_batch", ("data",)),
    ("experts", ("expert",)),
    ("expert_batch", ("data", "fsdp")),
    ("expert_batch", ("data",)),
    ("expert_batch", ("fsdp",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("mlp", ("tensor",)),
    ("vocab", ("tensor",)),
    ("embed", ("fsdp", "expert")),
    ("embed", ("fsdp",)),
    ("latent", ("fsdp", "expert")),
    ("latent", ("fsdp",)),
)


def partition(
    names: Iterable[str | None], shape: Sequence[int], mesh: Any
) -> tuple[P, tuple[str, ...]]:
    """Finds the partition spec of an array.

    Args:
      names: Logical names of its axes; None, or no name, for an axis that is not sharded.
      shape: Its sizes.
      mesh: Mesh, or abstract mesh.

    Returns:
      The spec, without mesh axes of one device, and a note for each axis to which the first of its
      rules does not apply because of its size.
    """
    padded = (*names, *[None] * len(shape))[: len(shape)]
    sizes = dict(zip(padded, shape, strict=True))
    short = [(name, tuple(axis for axis in axes if mesh.shape[axis] > 1)) for name, axes in RULES]
    rules = [(name, axes) for name, axes in short if axes and name in sizes]
    fitting = [(name, axes) for name, axes in rules if sizes[name] % _count(axes, mesh) == 0]
    best, real = (spmd.logical_to_mesh_axes(padded, some) or () for some in (rules, fitting))
    notes = tuple(
        f"{name}: size {sizes[name]} is not divisible by {_text(wanted, mesh)};"
        f" {'sharded over ' + _text(got, mesh) if got else 'replicated'} instead"
        for name, wanted, got in zip(padded, best, real, strict=True)
        if wanted and wanted != got
    )
    return P(*real), notes


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains the sharding of an activation on the mesh of `jax.set_mesh`.

    Not `flax.linen.with_logical_constraint`: the rules that it reads from its context also apply to
    the kernels inside `flax.linen.DenseGeneral`, where they have fewer axes than names.

    Args:
      x: Activation.
      names: Logical names of its axes.

    Returns:
      `x`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition(names, x.shape, mesh)[0])


def _count(axes: Iterable[str], mesh: Any) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _text(axes: str | tuple[str, ...], mesh: Any) -> str:
    names = (axes,) if isinstance(axes, str) else axes  # a spec unpacks a tuple of one
    return ",".join(f"{name}={mesh.shape[name]}" for name in names)
