"""AdamW for the parameters that are not orthogonalized, in any dtype.

`optax.adamw` keeps its second moment V in the dtype of the parameters. In float16 and bfloat16 that
loses updates: in float16, ε = 1e-8 is 0 and a leaf without a gradient gives 0 / 0; in bfloat16,
0.999 V + 0.001 G² rounds to V for every G. Source: optax, `scale_by_adam`, with the same state.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._common.dtypes import cast, widened
from muonclip_jax._common.types import Scalar
from muonclip_jax._muon.chains import add_decayed_weights, in_float32, with_sharding_of_mu
from muonclip_jax._muon.family.cautious_decay import add_cautious_weight_decay


def adamw(
    *,
    learning_rate: optax.ScalarOrSchedule,
    eps: Scalar,
    mu_dtype: Any,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    cautious_weight_decay: bool = False,
    **settings: Any,
) -> optax.GradientTransformation:
    """Builds `optax.adamw`, whose arguments these are.

    Args:
      learning_rate: Number or schedule.
      eps: Added to the root. With 0, a leaf that never had a gradient has an update of 0.
      mu_dtype: Dtype of the first moment of real leaves. None: the dtype of the parameters.
      weight_decay: Number or schedule.
      cautious_weight_decay: See `add_cautious_weight_decay`.
      **settings: Passed to `optax.scale_by_adam`.

    Returns:
      A transformation with the state of `optax.adamw`. Its `nu` is float32 for parameters in
      bfloat16 and float16. Updates have the dtype of the gradients.

    Example:
      >>> tx = adamw(learning_rate=0.1, eps=1e-8, mu_dtype=None)
      >>> state = tx.init({"scale": jnp.ones(2, jnp.bfloat16)})
      >>> state[0].mu["scale"].dtype, state[0].nu["scale"].dtype
      (dtype(bfloat16), dtype('float32'))
    """
    decay = add_cautious_weight_decay if cautious_weight_decay else add_decayed_weights
    tx = optax.chain(
        optax.scale_by_adam(eps=_not_zero(eps), **settings),
        decay(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    wide = with_sharding_of_mu(in_float32(tx))

    def init_fn(params):
        def with_dtypes(state):
            if not isinstance(state, optax.ScaleByAdamState):
                return state
            mu = jax.tree.map(lambda x: x if jnp.iscomplexobj(x) else cast(x, mu_dtype), state.mu)
            return state._replace(mu=mu, nu=jax.tree.map(widened, state.nu))

        is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)  # noqa: E731
        return jax.tree.map(with_dtypes, tx.init(params), is_leaf=is_adam)

    return optax.GradientTransformation(init_fn, wide.update)


def _not_zero(eps: Scalar) -> Scalar:
    """Replaces 0, and a number that is 0 in float16, by 1e-30.

    The root of a second moment in float32 is 0 or above 1e-19, so that nothing else changes.
    """
    if isinstance(eps, jax.Array):
        return jnp.maximum(widened(eps), 1e-30)
    return max(eps, 1e-30)
