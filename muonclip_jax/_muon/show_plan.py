"""Plans, before training, how `muon` shards its work over the devices of a mesh."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import optax

from muonclip_jax._common.dtypes import accumulator
from muonclip_jax._common.paths import path_string
from muonclip_jax._common.settings import check_settings
from muonclip_jax._common.types import ArrayTree
from muonclip_jax._muon.overrides import ROLE_RULES
from muonclip_jax._muon.per_head import LAYOUT_RULES, PER_HEAD_RULES, PerHead
from muonclip_jax._muon.roles.decision import Overrides
from muonclip_jax._muon.routing import role_settings, route
from muonclip_jax._muon.settings import newton_schulz_of
from muonclip_jax._orthogonalize.coefficients import JORDAN, Coefficients
from muonclip_jax._orthogonalize.dimension_numbers import DimensionNumbersOrFn
from muonclip_jax._orthogonalize.matrices import Axes, groups_of, is_tall, to_matrices
from muonclip_jax._orthogonalize.newton_schulz import Orthogonalizer
from muonclip_jax._orthogonalize.settings import COEFFICIENT_RULES
from muonclip_jax._orthogonalize.split import splits_of
from muonclip_jax._sharding.parts import take_apart
from muonclip_jax._sharding.placement import PlacedLeaf, shardings_by_path
from muonclip_jax._sharding.plan import Group, Member, Plan, plan_for


def sharding_plan(
    params: ArrayTree,
    muon_weight_dimension_numbers: DimensionNumbersOrFn | None = None,
    *,
    shardings: ArrayTree = None,
    ns_coeffs: Coefficients = JORDAN,
    ns_steps: int = 5,
    ns_method: str = "auto",
    ns_dtype: Any = "auto",
    ns_products: str = "auto",
    per_head: PerHead = None,
    overrides: Overrides | None = None,
    outputs_first: bool | None = None,
    layout: PerHead = None,
) -> Plan:
    """Plans which devices of a mesh orthogonalize which matrices, as `muon` does.

    Args:
      params: Parameters, or their `jax.ShapeDtypeStruct`s, with shardings if there are several
        devices.
      muon_weight_dimension_numbers: See `muon`.
      shardings: See `muon`. An Explicit mesh needs none; without them on an Auto mesh XLA
        decides, and the plan prints that.
      ns_coeffs: See `muon`.
      ns_steps: See `muon`.
      ns_method: See `muon`.
      ns_dtype: See `muon`.
      ns_products: See `muon`.
      per_head: See `muon`. `muonclip(..., per_head=True)` has `per_head=layout` here.
      overrides: See `muon`.
      outputs_first: See `muon`.
      layout: See `muon`.

    Returns:
      The plan, a named tuple; `str` of it has one line for each group of matrices: how many, their
      sides with the mesh axes that shard them, what happens, and FLOPs and megabytes sent of each
      device and step. On one device, and where XLA decides, a line is one Newton-Schulz call.

    Raises:
      ValueError: if a matrix cannot be planned, naming its path.

    Example:
      >>> import muonclip_jax as mc, jax, jax.numpy as jnp, numpy as np
      >>> from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
      >>> mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
      >>> kernel = jax.device_put(jnp.ones((4, 256, 512)), NamedSharding(mesh, P(None, "fsdp")))
      >>> params = {"up": {"kernel": kernel}}
      >>> print(mc.sharding_plan(params, shardings=jax.tree.map(lambda x: x.sharding, params)))
      mesh fsdp=4; per device and step 7.05e+08 FLOPs, 0.8 MB sent
      matrices  rows        columns  on each device    FLOPs     MB sent  leaves
      4         256 / fsdp  512      exchange: 1 full  7.05e+08  0.8      up/kernel
    """
    arguments = locals()
    rules = {**COEFFICIENT_RULES, **ROLE_RULES, **PER_HEAD_RULES, **LAYOUT_RULES}
    check_settings("sharding_plan", arguments, optional=("outputs_first",), rules=rules)
    roles = role_settings(arguments, per_head, layout)
    numbers = route("sharding_plan", params, roles).numbers
    structure = jax.tree.structure(params)
    passed = shardings_by_path("sharding_plan", shardings)
    orthogonalize = newton_schulz_of(
        ns_coeffs, ns_steps, "frobenius", ns_method, ns_dtype, ns_products
    )
    plans = []

    def look(params):
        # The dtype of the momentum while it is computed, which is what is orthogonalized.
        masked = (
            x.astype(accumulator(x.dtype)) if n else optax.MaskedNode()
            for x, n in zip(jax.tree.leaves(params), numbers, strict=True)
        )
        matrices = structure.unflatten(masked)
        unmasked = structure.unflatten(n or optax.MaskedNode() for n in numbers)
        splits = splits_of("sharding_plan", matrices, unmasked)
        tree, axes, placed = take_apart("sharding_plan", matrices, splits, passed)
        plan = plan_for("sharding_plan", tree, axes, placed, orthogonalize)
        plans.append(plan or _without_plan(tree, axes, orthogonalize))

    jax.eval_shape(look, params)
    return plans[0]


def _without_plan(matrices: ArrayTree, axes: list[Axes], orthogonalize: Orthogonalizer) -> Plan:
    """Describes the calls on one device, and on an Auto mesh with unknown shardings."""
    flat = jax.tree_util.tree_leaves_with_path(matrices)
    leaves = tuple(
        PlacedLeaf(path_string(path), x.shape, x.dtype, a, ((),) * x.ndim)
        for (path, x), a in zip(flat, axes, strict=True)
    )
    batches = [to_matrices(x, a, is_tall(x.shape, a)) for (_, x), a in zip(flat, axes, strict=True)]
    meshes = (jax.typeof(x).sharding.mesh for _, x in flat)
    mesh = next((dict(m.shape) for m in meshes if math.prod(m.shape.values()) > 1), {})
    groups = tuple(_call(leaves, batches, indices, orthogonalize) for indices in groups_of(batches))
    return Plan(mesh, leaves, groups, by_xla=bool(mesh))


def _call(
    leaves: Sequence[PlacedLeaf],
    batches: Sequence[jax.Array],
    indices: Sequence[int],
    orthogonalize: Orthogonalizer,
) -> Group:
    """Describes one call of Newton-Schulz."""
    members = tuple(
        Member(i, is_tall(leaves[i].shape, leaves[i].axes), math.prod(batches[i].shape[:-2]))
        for i in indices
    )
    count, first = sum(member.count for member in members), batches[indices[0]]
    m, n = first.shape[-2:]
    flops = count * orthogonalize.flops(m, n, first.dtype)
    return Group(members, m, n, (), (), (), count, count, 0, 1, False, flops, 0.0)
