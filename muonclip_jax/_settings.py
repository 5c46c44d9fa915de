"""The range of every numeric setting, in one table, checked when a transform is built."""

import numbers
from collections.abc import Callable
from typing import Any

# What the message says, and the test it stands for. NaN fails every comparison.
_FRACTION = ("in [0, 1)", lambda v: 0 <= v < 1)
_NOT_NEGATIVE = ("at least 0", lambda v: v >= 0)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "learning_rate": _NOT_NEGATIVE,
    "adam_learning_rate": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "adam_weight_decay": _NOT_NEGATIVE,
    "eps": _NOT_NEGATIVE,
    "adam_eps_root": _NOT_NEGATIVE,
    "beta": _FRACTION,
    "adam_b1": _FRACTION,
    "adam_b2": _FRACTION,
    "consistent_rms": ("above 0", lambda v: v > 0),
    "threshold": ("above 0", lambda v: v > 0),
    "alpha": ("in [0, 1]", lambda v: 0 <= v <= 1),
}


def check_settings(where: str, **values: Any) -> None:
    """Refuses numbers out of range, all of them in one error.

    Only Python and NumPy numbers are checked: a traced value (`optax.inject_hyperparams` makes one
    of every default) and a schedule cannot be, and None means that the setting is not in use.

    Args:
      where: Name of the public function that was called.
      **values: Settings by their public names.

    Raises:
      ValueError: if a number is outside its range, or NaN.

    Example:
      >>> check_settings("muon", beta=0.95, eps=1e-8)
    """
    bad = [
        f"{name} must be {_RANGES[name][0]}, got {value!r}"
        for name, value in values.items()
        if isinstance(value, numbers.Real) and not _RANGES[name][1](float(value))
    ]
    if bad:
        raise ValueError(f"{where}: {'; '.join(bad)}.")


def check_choice(where: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuses a name that is not among the choices, and lists them.

    Args:
      where: Name of the public function that was called.
      name: Name of the argument.
      value: What was given.
      choices: What may be given.

    Raises:
      ValueError: if `value` is not one of `choices`.

    Example:
      >>> check_choice("newton_schulz", "method", "standard", ("auto", "standard"))
    """
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{where}: {name} must be one of {listed}; got {value!r}.")
