"""NorMuon: output neurons with updates of equal size, after the orthogonalization.

With O an orthogonalized matrix n_in x n_out, and v one number for each of its outputs:

    v ← β₂ v + (1 − β₂) mean over inputs of O²
    Ô = O / √(v + ε)
    update = Ô ‖O‖_F / ‖Ô‖_F

Source: Li et al. 2025, arXiv 2510.05491. The last line makes a bias correction of v unnecessary.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._common.dtypes import accumulator, widened
from muonclip_jax._common.resharding import placed_like
from muonclip_jax._common.settings import NUMBERS, check_settings
from muonclip_jax._common.types import ArrayTree, Scalar
from muonclip_jax._muon.chains import check_match, check_state
from muonclip_jax._muon.injection import injectable
from muonclip_jax._muon.per_head import PER_HEAD_RULES, PerHead, with_heads
from muonclip_jax._orthogonalize.dimension_numbers import DimensionNumbersOrFn
from muonclip_jax._orthogonalize.matrices import Axes
from muonclip_jax._orthogonalize.split import Split, splits_of
from muonclip_jax._sharding.parts import map_matrices

NEURON_EPS = 1e-10  # ε of `muon`


class NormalizeNeuronsState(NamedTuple):
    """State of `normalize_neurons`; no setting is in it.

    Attributes:
      nu: Average square of the update of each output: a pytree like the parameters, with the axes
        of the inputs of size 1, sharded as the outputs, in float32 at least.
    """

    nu: ArrayTree


def _check(arguments: Mapping[str, Any]) -> None:
    """Raises for settings of `normalize_neurons` that are not allowed."""
    check_settings("normalize_neurons", arguments, rules=PER_HEAD_RULES)


@injectable(NUMBERS, _check)
def normalize_neurons(
    b2: Scalar = 0.95,
    eps: Scalar = NEURON_EPS,
    weight_dimension_numbers: DimensionNumbersOrFn | None = None,
    *,
    per_head: PerHead = None,
) -> optax.GradientTransformationExtraArgs:
    """Divides the orthogonalized update of each output neuron by its recent size: NorMuon.

    It follows `scale_by_muon` and precedes `scale_by_shape`. `muon(neuron_b2=0.95)` puts it there.
    The Frobenius norm of every matrix stays what it is.

    Args:
      b2: β₂, decay of the second moment, in [0, 1).
      eps: ε, added to the second moment. 0 is allowed.
      weight_dimension_numbers: See `scale_by_muon`.
      per_head: See `muon`: the norm of every head stays what it is.

    Returns:
      An optax transformation, which ignores extra arguments. Updates keep their dtypes and are
      computed in float32 at least. Outputs without an update stay without one.

    Raises:
      TypeError: when built, for settings of a wrong type.
      ValueError: when built, for settings out of range; at `init` and while tracing, for leaves
        that are no matrices.

    Example:
      >>> import muonclip_jax as mc, jax.numpy as jnp
      >>> tx = mc.normalize_neurons()
      >>> params = {"w": jnp.array([[3.0, 0.0], [0.0, 1.0]])}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> print(updates["w"].round(3), state.nu["w"].shape)
      [[2.236 0.   ]
       [0.    2.236]] (1, 2)

    References:
      Li et al. 2025, arXiv 2510.05491.
    """
    _check(locals())
    return neurons_normalized(
        b2, eps, with_heads("normalize_neurons", weight_dimension_numbers, per_head)
    )


def neurons_normalized(
    b2: Scalar, eps: Scalar, numbers: DimensionNumbersOrFn | None
) -> optax.GradientTransformationExtraArgs:
    """Builds `normalize_neurons`; dimension numbers may be `Split`s."""

    def init_fn(params):
        leaves, structure = jax.tree.flatten(params)
        splits = splits_of("normalize_neurons", params, numbers) if leaves else []
        zeros = [
            _mean_square(jnp.zeros_like(p, accumulator(p.dtype)), split)
            for p, split in zip(leaves, splits, strict=True)
        ]
        return NormalizeNeuronsState(structure.unflatten(zeros))

    def update_fn(updates, state, params=None, **extra_args):
        del params, extra_args
        check_state("normalize_neurons", state, NormalizeNeuronsState)
        updates = jax.tree.map(jnp.asarray, updates)
        splits = splits_of("normalize_neurons", updates, numbers)
        leaves, structure = jax.tree.flatten(updates)
        wide = [widened(o) for o in leaves]
        try:
            before = structure.flatten_up_to(state.nu)
        except ValueError:
            paths = (jax.tree.map(lambda _: 0.0, tree) for tree in (updates, state.nu))
            check_match("normalize_neurons", *paths)
            raise
        nu = [_second_moment(*leaf, b2) for leaf in zip(before, wide, splits, strict=True)]
        scaled = [_scaled(o, v, eps) for o, v in zip(wide, nu, strict=True)]
        found = _with_norms_of(structure.unflatten(wide), structure.unflatten(scaled), splits)
        found = jax.tree.map(lambda o, u: o.astype(u.dtype), found, updates)
        return found, NormalizeNeuronsState(structure.unflatten(nu))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _second_moment(v: jax.Array, O: jax.Array, split: Split, b2: Scalar) -> jax.Array:  # noqa: E741
    """β₂ v + (1 − β₂) mean over inputs of O²."""
    b2 = jnp.asarray(b2).astype(v.dtype)
    return b2 * v + (1 - b2) * placed_like(_mean_square(O, split), v).astype(v.dtype)


def _mean_square(O: jax.Array, split: Split) -> jax.Array:  # noqa: E741
    """The mean of |O|² over the inputs, whose axes stay with size 1."""
    return jnp.mean(jnp.abs(O) ** 2, axis=_input_axes(split), keepdims=True)


def _input_axes(split: Split) -> tuple[int, ...]:
    """The axes of a leaf that are inputs, which are equal in all parts of a split leaf."""
    reduction, end, found = split.parts[0].axes.reduction, 0, []
    for axis, sizes in enumerate(split.sizes):
        if {*range(end, end + len(sizes))} <= {*reduction}:
            found.append(axis)
        end += len(sizes)
    return tuple(found)


def _scaled(O: jax.Array, v: jax.Array, eps: Scalar) -> jax.Array:  # noqa: E741
    """O / √(v + ε); 0 / 0 is 0."""
    root = jnp.sqrt(v + jnp.asarray(eps).astype(v.dtype))
    return O / jnp.where(root == 0, 1, root).astype(O.dtype)


def _with_norms_of(O: ArrayTree, scaled: ArrayTree, splits: list[Split]) -> ArrayTree:  # noqa: E741
    """Ô ‖O‖_F / ‖Ô‖_F of every matrix."""

    def with_norm(axes, o, x):
        norm = _norm(x, axes)
        return x * (_norm(o, axes) / jnp.where(norm == 0, 1, norm)).astype(x.dtype)

    return map_matrices("normalize_neurons", with_norm, splits, O, scaled)


def _norm(X: jax.Array, axes: Axes) -> jax.Array:
    sides = axes.reduction + axes.output
    return jnp.sqrt(jnp.sum(jnp.abs(X) ** 2, axis=sides, keepdims=True))
