"""`analyze`: the roles of parameters and the attention that the program of a model shows."""

from collections.abc import Callable, Sequence
from typing import Any

from muonclip_jax._common.types import ArrayTree
from muonclip_jax._muon.roles.rules import decide
from muonclip_jax._program.analysis import Analysis
from muonclip_jax._program.analyze import analyze_program
from muonclip_jax._program.roles import Role


def analyze(fn: Callable[..., Any], params: ArrayTree, *args: Any, **kwargs: Any) -> Analysis:
    """Finds the role of each parameter, and the attention layers, in the program of a model.

    The function is traced on shapes, which computes nothing. The use of a parameter in the program
    decides its role. Names are used only if the program does not decide. If both differ, the
    printed table shows both.

    Args:
      fn: The forward pass or the loss, called as `fn(params, *args, **kwargs)`.
      params: The parameters, in any containers; arrays or `jax.ShapeDtypeStruct`.
      *args: The other arguments of `fn`. Arrays may be shapes. Use a batch of at least 2 and the
        real sequence length, so that no axis has size 1 and all parameters are used.
      **kwargs: Keyword arguments of `fn`.

    Returns:
      The analysis: print it for the table.

    Raises:
      ValueError: if `fn` computes gradients, or `params` has no arrays.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> def fn(params, tokens):
      ...     x = params["table"][tokens]
      ...     return jax.nn.relu(x @ params["up"]) @ params["out"]
      >>> shapes = {"table": (32, 8), "up": (8, 16), "out": (16, 32)}
      >>> params = {name: jnp.zeros(shape) for name, shape in shapes.items()}
      >>> analysis = mc.analyze(fn, params, jnp.zeros((2, 4), int))
      >>> [analysis.roles[name].optimizer for name in ("table", "up", "out")]
      ['adamw', 'muon', 'adamw']
      >>> analysis.dimension_numbers["up"]
      MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    """
    return analyze_program(fn, params, args, kwargs, _roles_by_name)


def _roles_by_name(
    paths: Sequence[tuple[str, ...]], shapes: Sequence[tuple[int, ...]]
) -> list[Role]:
    # A guess does not begin with `output head`: where the program differs, it keeps no AdamW.
    return [
        Role(
            "adamw" if d.numbers is None else "muon",
            d.numbers,
            0,
            f"a guess: {d.reason}, but {d.doubt}" if d.doubt else d.reason,
        )
        for d in decide(paths, shapes)
    ]
