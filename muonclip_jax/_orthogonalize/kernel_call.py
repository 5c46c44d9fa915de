"""Calls a kernel of products: on stacks, under `jax.vmap`, compiled or interpreted.

A kernel has no derivative. On a CPU it is interpreted.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax._orthogonalize.tiles import Tiles

_NO_DERIVATIVE = (
    "newton_schulz: the kernel of products='pallas' has no derivative. Pass products='xla' "
    "(ns_products='xla' to an optimizer) to differentiate."
)


class Form(NamedTuple):
    """The product that a kernel computes.

    Attributes:
      tiles: How the result is cut.
      kind: The function of the kernel's module.
      dtype: Dtype of the result.
    """

    tiles: Tiles
    kind: str
    dtype: Any

    @property
    def is_gram(self) -> bool:
        return self.kind == "gram_matrix"

    @property
    def is_symmetric(self) -> bool:
        return self.kind != "full_product"

    def places(self, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
        """Lists i and j of all positions."""
        rows, columns = self.tiles.on_side(n), self.tiles.on_side(m)
        i, j = np.triu_indices(rows) if self.is_symmetric else np.indices((rows, columns))
        return i.reshape(-1).astype(np.int32), j.reshape(-1).astype(np.int32)


class Kernel(NamedTuple):
    """A kernel of one platform, and the symmetric products that it computes, if it does.

    Attributes:
      platform: The platform that it is compiled for, as `jax.lax.platform_dependent` calls it.
      run: `run(form, interpret, numbers, *arrays)` with numbers `[count, 1 to 3]` and arrays
        `[count, ...]`. It returns a tuple of arrays.
    """

    platform: str
    run: Callable[..., tuple[jax.Array, ...]]

    def gram_matrix(self, X: jax.Array, r: Any, tiles: Tiles, dtype: Any = None) -> jax.Array:
        """Computes X Xᵀ − r I.

        Args:
          X: `[..., n, m]`, bfloat16 or float32.
          r: A number, or one for each matrix, `[..., 1, 1]`.
          tiles: How the result is cut.
          dtype: Dtype of the result; None for the dtype of X.

        Returns:
          `[..., n, n]`, summed in float32 and rounded once.
        """
        form = Form(tiles, "gram_matrix", jnp.dtype(dtype or X.dtype))
        return call(self, form, (r,), (X, X))[0]

    def product(
        self, a: Any, A: jax.Array, b: Any, B: jax.Array, c: Any, tiles: Tiles
    ) -> jax.Array:
        """Computes a A + b B + c A B for symmetric matrices that commute.

        Args:
          a: A number, or one for each matrix, `[..., 1, 1]`; so are b and c.
          A: `[..., n, n]`, bfloat16 or float32.
          b: See a.
          B: Like A. If it is A itself, its tiles are fetched once.
          c: See a.
          tiles: How the result is cut.

        Returns:
          Shape and dtype of A, summed in float32 and rounded once.
        """
        form = Form(tiles, "product", A.dtype)
        if A is B:
            return call(self, form, (a + b, c), (A, A, A))[0]
        return call(self, form, (a, b, c), (A, B, A, B))[0]


def call(
    kernel: Kernel, form: Form, numbers: Sequence[Any], arrays: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """Runs a kernel on stacks of any number of axes.

    Args:
      kernel: The kernel.
      form: What it computes.
      numbers: r, or the factor of each matrix that is added and then the factor of the product;
        each a number, or one for each matrix, `[..., 1, 1]`.
      arrays: Both factors, and the matrices that are added.

    Returns:
      The results of the kernel, each a stack.
    """
    stack = arrays[0].shape[:-2]
    count = math.prod(stack)
    each = [jnp.broadcast_to(jnp.asarray(x, jnp.float32), (*stack, 1, 1)) for x in numbers]
    numbers_of_each = jnp.concatenate([x.reshape(count, 1) for x in each], axis=1)
    flat = tuple(x.reshape(count, *x.shape[-2:]) for x in arrays)
    results = run_on_stack(kernel, form, numbers_of_each, flat)
    return tuple(x.reshape(*stack, *x.shape[1:]) for x in results)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def run_on_stack(
    kernel: Kernel, form: Hashable, numbers: jax.Array, arrays: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Runs a kernel on a stack, the first axis of all arrays, also under `jax.vmap`."""

    @jax.custom_batching.custom_vmap
    def run(numbers, arrays):
        # Chosen when the program is lowered, which may be for a device that is not attached.
        branches = {
            kernel.platform: functools.partial(kernel.run, form, False),
            "cpu": functools.partial(kernel.run, form, True),
        }
        return tuple(jax.lax.platform_dependent(numbers, *arrays, **branches))

    @run.def_vmap
    def _(size, is_batched, numbers, arrays):
        """Makes one stack of all members."""

        def stacked(x, batched):
            x = x if batched else jnp.broadcast_to(x, (size, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        results = run(*jax.tree.map(stacked, (numbers, arrays), tuple(is_batched)))
        return tuple(x.reshape(size, -1, *x.shape[1:]) for x in results), (True,) * len(results)

    return run(numbers, arrays)


@run_on_stack.defjvp
def _(kernel, form, primals, tangents):
    del kernel, form, primals, tangents
    raise ValueError(_NO_DERIVATIVE)
