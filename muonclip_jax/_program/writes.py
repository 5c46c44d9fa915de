"""Writes at constant indices: `x.at[..., 2:5].set(y)` is a concatenation of `x` and `y`."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_UPDATE = {"scatter": 2, "dynamic_update_slice": 1}  # which operand is written


class Write(NamedTuple):
    """A range of one axis that is overwritten.

    Attributes:
      update: Index of the operand that is written; operand 0 is written to.
      axis: The axis.
      start: The beginning of the range.
    """

    update: int
    axis: int
    start: int


def written(eqn: Any, inputs: Sequence[Any]) -> Write | None:
    """Reads a `scatter` or a `dynamic_update_slice`.

    Args:
      eqn: An equation.
      inputs: The nodes of its operands.

    Returns:
      What it writes; None if it is another primitive, or does not write a range of one axis at an
      index that the program holds.
    """
    position = _UPDATE.get(eqn.primitive.name)
    if position is None:
        return None
    array, update = inputs[0].shape, inputs[position].shape
    starts = {}
    if position == 1:
        sizes = enumerate(zip(array, update, strict=True))
        starts = {d: inputs[2 + d] for d, (n, m) in sizes if n != m}
    elif eqn.params["update_jaxpr"] is None:  # otherwise `x.at[...].apply(f)`
        numbers = eqn.params["dimension_numbers"]
        if numbers.update_window_dims == tuple(range(len(array))):
            starts = dict.fromkeys(numbers.scatter_dims_to_operand_dims, inputs[1])
    if len(starts) != 1:
        return None
    ((axis, index),) = starts.items()
    start = _number(index)
    if start is None or not 0 <= start <= array[axis] - update[axis]:
        return None
    return Write(position, int(axis), start)


def _number(node: Any) -> int | None:
    """Returns the one number that a node is; None if the program does not hold it."""
    while node.op in ("broadcast_in_dim", "reshape", "convert_element_type"):
        node = node.inputs[0]
    if node.op != "literal" or np.size(node.value) != 1:
        return None
    return int(np.reshape(node.value, ()))
