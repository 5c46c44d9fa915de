"""Shows, before anything is trained, how `muon` divides its work among the devices of a mesh."""

from typing import Any

import jax
import optax
from jax.sharding import NamedSharding

from muonclip_jax._coefficients import JORDAN, Coefficients, is_single_row
from muonclip_jax._layout import DimensionNumbersOrFn, matrix_axes
from muonclip_jax._newton_schulz import orthogonaliser
from muonclip_jax._paths import path_string
from muonclip_jax._placements import placements, shardings_by_path
from muonclip_jax._routing import route
from muonclip_jax._settings import check_settings
from muonclip_jax._sharded import plan_for
from muonclip_jax._sharding_plan import Plan
from muonclip_jax._types import ArrayTree


def sharding_plan(
    params: ArrayTree,
    muon_weight_dimension_numbers: DimensionNumbersOrFn | None = None,
    *,
    shardings: ArrayTree = None,
    ns_coeffs: Coefficients = JORDAN,
    ns_steps: int = 5,
    ns_method: str = "auto",
    ns_dtype: Any = "auto",
) -> Plan:
    """Tells which device orthogonalises which matrix, at what cost: print the result.

    Args:
      params: Sharded parameters, or their `jax.ShapeDtypeStruct`s with shardings.
      muon_weight_dimension_numbers: As for `muon`.
      shardings: As for `muon`. None takes those of `params`.
      ns_coeffs: As for `muon`.
      ns_steps: As for `muon`.
      ns_method: As for `muon`.
      ns_dtype: As for `muon`.

    Returns:
      The plan, a named tuple; `str` of it has one line for each group of matrices: how many, their
      sides with the mesh axes that divide them, what happens, and FLOPs and megabytes sent of each
      device and step. Without groups where there is nothing to divide: one device, or no matrix.

    Raises:
      ValueError: if a matrix cannot be planned, naming its path.

    Example:
      >>> import muonclip_jax as mc, jax, jax.numpy as jnp, numpy as np
      >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
      >>> mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
      >>> kernel = jax.device_put(jnp.ones((4, 256, 512)), NamedSharding(mesh, P(None, "fsdp")))
      >>> print(mc.sharding_plan({"up": {"kernel": kernel}}))
      mesh fsdp=4; per device and step 7.05e+08 FLOPs, 0.8 MB sent
      matrices  rows        columns  on each device  FLOPs     MB sent  leaves
      4         256 / fsdp  512      move: 1 whole   7.05e+08  0.8      up/kernel
    """
    numbers = route(params, muon_weight_dimension_numbers, caller="sharding_plan").numbers
    structure = jax.tree.structure(params)
    check_settings("sharding_plan", locals())
    steps = ns_steps if is_single_row(ns_coeffs) else None
    orthogonalise = orthogonaliser(ns_coeffs, steps, ns_method, ns_dtype, "frobenius", 0.0)
    said = _own_shardings(params) if shardings is None else shardings_by_path(shardings)
    plans = []

    def look(params):
        masked = (
            x if n else optax.MaskedNode()
            for x, n in zip(jax.tree.leaves(params), numbers, strict=True)
        )
        matrices = structure.unflatten(masked)
        axes = matrix_axes(
            "sharding_plan", matrices, structure.unflatten(n or optax.MaskedNode() for n in numbers)
        )
        where = placements("sharding_plan", matrices, axes, said)
        if where is not None:
            platform = orthogonalise._replace(platform=where.platform)
            plans.append(plan_for(where, platform))

    jax.eval_shape(look, params)
    return plans[0] if plans else Plan({}, (), ())


def _own_shardings(params: ArrayTree) -> dict[str, NamedSharding]:
    """Lists the shardings that arrays, or their shapes, say they have."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    named = ((path_string(path), getattr(x, "sharding", None)) for path, x in flat)
    return {path: sharding for path, sharding in named if isinstance(sharding, NamedSharding)}
