"""Cautious weight decay: weights decay only where the update shrinks them too.

With U the update that is subtracted, W the weight, λ the decay and [·] 1 if true and 0 otherwise:

    U ← U + λ W · [U · W ≥ 0]

Source: Chen et al. 2025, arXiv 2510.12402; modded-nanogpt and nanochat for Muon.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._common.dtypes import cast
from muonclip_jax._common.settings import NUMBERS, check_settings
from muonclip_jax._common.types import ArrayTree
from muonclip_jax._muon.chains import (
    add_decayed_weights,
    check_state,
    in_float32,
    same_model,
)
from muonclip_jax._muon.injection import injectable
from muonclip_jax._orthogonalize.dimension_numbers import spread


def _check(arguments: Mapping[str, Any]) -> None:
    """Raises for settings of `add_cautious_weight_decay` that are not allowed."""
    settings = {**arguments, "weight_decay_mask": arguments["mask"]}
    check_settings("add_cautious_weight_decay", settings, optional=("weight_decay_mask",))


@injectable(NUMBERS, _check)
def add_cautious_weight_decay(
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: ArrayTree | Callable[[ArrayTree], ArrayTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds weight decay where the update and the weight agree in sign.

    It replaces `optax.add_decayed_weights`, with the same arguments and state: before
    `optax.scale_by_learning_rate`, while the update still has the sign that is subtracted. A zero
    update or a zero weight agrees with every sign. Complex numbers agree if Re(Ū W) ≥ 0.

    Args:
      weight_decay: λ, number or schedule.
      mask: Pytree or prefix of booleans, or a function of the parameters that returns one: which
        leaves decay. None: all.

    Returns:
      An optax transformation whose `update` needs the parameters. Updates keep their dtypes; the
      sum is computed in float32 at least. The state is empty, or the count of a schedule.

    Raises:
      TypeError: when built, for settings of a wrong type.
      ValueError: when built, for a negative decay; while tracing, without parameters.

    Example:
      >>> import muonclip_jax as mc, jax.numpy as jnp
      >>> tx = mc.add_cautious_weight_decay(0.5)
      >>> params, updates = {"w": jnp.array([2.0, 2.0])}, {"w": jnp.array([1.0, -1.0])}
      >>> tx.update(updates, tx.init(params), params)[0]["w"].tolist()
      [2.0, -1.0]

    References:
      Chen et al. 2025, arXiv 2510.12402; nanochat, `optim.py`.
    """
    _check(locals())
    caller = "add_cautious_weight_decay"

    def decays(params):
        spread_mask = spread(f"{caller}: mask", mask, params)
        return jax.tree.structure(params).unflatten(spread_mask)

    decay = add_decayed_weights(weight_decay, None if mask is None else decays)

    def add_decay(updates, state, params=None):
        # λ W of the leaves that decay, from the state and the mask of optax.
        decays, state = decay.update(jax.tree.map(jnp.zeros_like, updates), state, params)
        return jax.tree.map(_add_where_they_agree, updates, params, decays), state

    wide = in_float32(optax.GradientTransformation(decay.init, add_decay))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "add_cautious_weight_decay: update needs params, got None. Call "
                "tx.update(grads, state, params)."
            )
        with same_model(caller, updates, state, params):
            check_state(caller, state, type(jax.eval_shape(decay.init, params)))
            return wide.update(updates, state, params)

    return optax.GradientTransformationExtraArgs(decay.init, update_fn)


def _add_where_they_agree(U: jax.Array, W: jax.Array, decay: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(U) or jnp.iscomplexobj(W):
        agree = (jnp.conj(U) * W).real >= 0
    else:  # comparisons, because the product of small numbers is 0 in the end
        agree = ((U >= 0) & (W >= 0)) | ((U <= 0) & (W <= 0))
    return U + jnp.where(agree, cast(decay, U.dtype), jnp.zeros_like(U))
