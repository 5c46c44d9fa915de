"""AdamW of optax, with the arithmetic in float32 at least for parameters and gradients in 16 bits.

In float16, ε = 1e-8 is 0 and a gradient without ε gives 0 / 0; in bfloat16, 0.999 V + 0.001 G²
is V again, whatever G is. Source: optax, `scale_by_adam`, whose state this is.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._common.resharding import where_moments_are
from muonclip_jax._common.types import ArrayTree, Scalar


def adamw(
    *, learning_rate: optax.ScalarOrSchedule, eps: Scalar, mu_dtype: Any, **settings: Any
) -> optax.GradientTransformation:
    """Builds `optax.adamw`, whose arguments these are.

    Args:
      learning_rate: Number or schedule.
      eps: Added to the root. 0 gives no update where there has been no gradient.
      mu_dtype: Dtype of the first moment of real leaves. None: the dtype of the parameters.
      **settings: Passed to `optax.adamw`.

    Returns:
      A transformation with the state of `optax.adamw`. Its `nu` is float32 for parameters in
      bfloat16 and float16. Updates have the dtype of the gradients.

    Example:
      >>> tx = adamw(learning_rate=0.1, eps=1e-8, mu_dtype=None)
      >>> state = tx.init({"scale": jnp.ones(2, jnp.bfloat16)})
      >>> state[0].mu["scale"].dtype, state[0].nu["scale"].dtype
      (dtype(bfloat16), dtype('float32'))
    """
    tx = optax.adamw(learning_rate, eps=_not_zero(eps), **settings)
    wide = where_moments_are(in_float32(tx))

    def init_fn(params):
        def with_dtypes(state):
            if not isinstance(state, optax.ScaleByAdamState):
                return state
            mu = jax.tree.map(lambda x: x if jnp.iscomplexobj(x) else _cast(x, mu_dtype), state.mu)
            return state._replace(mu=mu, nu=jax.tree.map(_widened, state.nu))

        is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)  # noqa: E731
        return jax.tree.map(with_dtypes, tx.init(params), is_leaf=is_adam)

    return optax.GradientTransformation(init_fn, wide.update)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs a transform on float32 copies of gradients and parameters in 16 bits.

    Args:
      tx: A transform without extra arguments.

    Returns:
      A transform whose updates have the dtypes of the gradients, and whose state keeps its dtypes.

    Example:
      >>> tx = in_float32(optax.scale(1 / 3))
      >>> tx.update(jnp.ones((), jnp.bfloat16), tx.init(0.0))[0]
      Array(0.333984, dtype=bfloat16)
    """

    def update_fn(updates, state, params=None):
        wide = jax.tree.map(_widened, (updates, params))
        new, new_state = tx.update(wide[0], state, wide[1])
        return _cast_like(new, updates), _cast_like(new_state, state)

    return optax.GradientTransformation(tx.init, update_fn)


def _widened(x: Any) -> Any:
    """Casts 16-bit floats to float32; everything else is returned as it is."""
    dtype = getattr(x, "dtype", None)
    narrow = (
        dtype is not None and jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    )
    return jnp.asarray(x, jnp.float32) if narrow else x


def _cast(x: Any, dtype: Any) -> Any:
    return x if dtype is None or x.dtype == dtype else jnp.asarray(x).astype(dtype)


def _cast_like(new: ArrayTree, old: ArrayTree) -> ArrayTree:
    return jax.tree.map(lambda a, b: _cast(a, getattr(b, "dtype", None)), new, old)


def _not_zero(eps: Scalar) -> Scalar:
    """Replaces 0, and a number that has become 0 in float16, by 1e-30.

    The root of a second moment is 0 or above 1e-19 in float32, so that nothing else changes.
    """
    if isinstance(eps, jax.Array):
        return jnp.maximum(_widened(eps), 1e-30)
    return max(eps, 1e-30)
