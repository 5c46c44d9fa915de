"""Calls a TPU kernel on arrays in HBM.

XLA may place operands and results of a kernel in fast memory. The pipeline of blocks then copies
each block by loads and stores, and nothing else runs meanwhile. From HBM it fetches blocks while
the matrix units work. So all arrays stay in HBM. A kernel takes the same cycles in all programs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def call_in_hbm(
    kernel: Callable[..., None],
    scalars: Sequence[jax.Array],
    arrays: Sequence[jax.Array],
    *,
    out_shape: Sequence[jax.ShapeDtypeStruct],
    interpret: bool,
    **settings: Any,
) -> tuple[jax.Array, ...]:
    """Calls a kernel.

    Args:
      kernel: The kernel.
      scalars: Arrays that are prefetched.
      arrays: The other operands.
      out_shape: Shapes of the results.
      interpret: Whether it is interpreted, where there is one memory only.
      **settings: Other arguments of `pl.pallas_call`.

    Returns:
      The results.
    """
    shapes: Any = tuple(out_shape)
    if not interpret:
        arrays = [pltpu.with_memory_space_constraint(x, pltpu.HBM) for x in arrays]
        shapes = tuple(pltpu.HBM(x.shape, x.dtype) for x in shapes)
    run = pl.pallas_call(kernel, out_shape=shapes, interpret=interpret, **settings)
    return tuple(run(*scalars, *arrays))
