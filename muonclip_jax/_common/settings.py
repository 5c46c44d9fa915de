"""The rule of every setting, in one table, checked when a transform is built."""

import dataclasses
import numbers
import reprlib
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

METHODS = ("auto", "standard", "gram")
SHARED_KEY_RULES = ("query", "group", "exact")
PRODUCTS = ("auto", "xla", "pallas")
PRECONDITIONINGS = ("frobenius", "spectral", "aol", "schatten")

_REAL = ("integral", "real floating")
_FRACTION = ("in [0, 1)", lambda v: 0 <= v < 1)
_NOT_NEGATIVE = ("at least 0", lambda v: v >= 0)

# Returns what is wrong with a value, None if nothing is.
Rule: TypeAlias = Callable[[Any], Exception | None]

_NOT_A_SCHEDULE = (
    "a function; this setting has no schedule of its own, optax.inject_hyperparams gives it one"
)


@dataclasses.dataclass(frozen=True)
class _Number:
    """A number of Python or NumPy, or an array without axes, which may be traced.

    Attributes:
      interval: The allowed numbers, in words.
      holds: Whether a number is allowed. NaN fails every comparison.
      schedule: Whether a function of the step is allowed as well.
      integer: Whether the number must be an integer.
      names: Strings that are allowed as well.
    """

    interval: str
    holds: Callable[[float], bool]
    schedule: bool = False
    integer: bool = False
    names: tuple[str, ...] = ()

    def _kinds(self) -> tuple[str, ...]:
        return ("integral",) if self.integer else _REAL

    def __call__(self, value: Any) -> Exception | None:
        kind = "an integer" if self.integer else "a number"
        names = "".join(f" or {name!r}" for name in self.names)
        names += " or a schedule" if self.schedule else ""
        expected = f"{kind} {self.interval}{names}, got "
        if isinstance(value, str) and value in self.names:
            return None
        if callable(value):
            return None if self.schedule else TypeError(expected + _NOT_A_SCHEDULE)
        dtype = _dtype(value)
        if dtype is None or not jnp.isdtype(dtype, self._kinds()):
            return TypeError(expected + _wrong_kind(value, int if self.integer else float))
        if np.shape(value) != ():
            return ValueError(f"{expected}an array of shape {np.shape(value)}")
        if dtype == jnp.bfloat16 and isinstance(value, jax.Array) and self.interval == _FRACTION[0]:
            return TypeError(
                f"{expected}a bfloat16 array, which rounds 0.999 to 1: pass "
                "hyperparam_dtype=jnp.float32 to optax.inject_hyperparams"
            )
        # The value of a JAX array is not read: that would wait for the device.
        if not isinstance(value, jax.Array) and not self.holds(float(value)):
            return ValueError(expected + repr(value))
        return None


def choice(*choices: str) -> Rule:
    """Makes the rule of a setting that is one of some names.

    Args:
      *choices: The allowed names.

    Returns:
      A rule.

    Example:
      >>> choice("standard", "gram")("gramm")
      ValueError("one of 'standard', 'gram'; got 'gramm'")
    """

    def rule(value: Any) -> Exception | None:
        if isinstance(value, str) and value in choices:
            return None
        listed = ", ".join(repr(choice) for choice in choices)
        return ValueError(f"one of {listed}; got {shown(value)}")

    return rule


def flag(value: Any, *, array: bool = False) -> Exception | None:
    """Requires True or False, or with `array` a boolean array without axes as well."""
    if isinstance(value, bool | np.bool_):
        return None
    if array and _dtype(value) == np.dtype(bool) and np.shape(value) == ():
        return None
    return TypeError(f"True or False, got {shown(value)}")


def _mask(value: Any) -> Exception | None:
    if isinstance(value, str | numbers.Number) and not isinstance(value, bool):
        return TypeError(f"a pytree of booleans or a function that returns one, got {shown(value)}")
    return None


def _momentum_dtype(value: Any) -> Exception | None:
    dtype = _as_dtype(value)
    if dtype is not None and jnp.issubdtype(dtype, jnp.floating):
        return None
    got = dtype or shown(value)
    return TypeError(f"a floating dtype such as 'bfloat16' or jnp.float32, got {got}")


def _product_dtype(value: Any) -> Exception | None:
    if isinstance(value, str) and value == "auto":
        return None
    dtype = _as_dtype(value)
    if dtype is not None and jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 16:
        return None
    got = dtype or shown(value)
    return TypeError(
        f"'auto' or a floating dtype of 16 bits or more, such as jnp.bfloat16, got {got}"
    )


_POSITIVE = ("above 0", lambda v: v > 0)
COUNT = _Number("of at least 1", lambda v: v >= 1, integer=True)

_RULES: dict[str, Rule] = {
    "learning_rate": _Number(*_NOT_NEGATIVE, schedule=True),
    "adam_learning_rate": _Number(*_NOT_NEGATIVE, schedule=True),
    "weight_decay": _Number(*_NOT_NEGATIVE, schedule=True),
    "adam_weight_decay": _Number(*_NOT_NEGATIVE, schedule=True),
    "eps": _Number(*_NOT_NEGATIVE),
    "adam_eps_root": _Number(*_NOT_NEGATIVE),
    "beta": _Number(*_FRACTION),
    "adam_b1": _Number(*_FRACTION),
    "adam_b2": _Number(*_FRACTION),
    "b2": _Number(*_FRACTION),
    "neuron_b2": _Number(*_FRACTION),
    "tau": _Number(*_NOT_NEGATIVE),
    "consistent_rms": _Number(*_POSITIVE, names=("spectral",)),
    "threshold": _Number(*_POSITIVE, schedule=True),
    "alpha": _Number("in [0, 1]", lambda v: 0 <= v <= 1),
    "ns_steps": COUNT,
    "steps": COUNT,
    "ns_method": choice(*METHODS),
    "method": choice(*METHODS),
    "ns_products": choice(*PRODUCTS),
    "products": choice(*PRODUCTS),
    "ns_dtype": _product_dtype,
    "dtype": _product_dtype,
    "mu_dtype": _momentum_dtype,
    "preconditioning": choice(*PRECONDITIONINGS),
    "shared_key": choice(*SHARED_KEY_RULES),
    "nesterov": flag,
    "adam_nesterov": flag,
    "adaptive": flag,
    "strict": flag,
    "outputs_first": flag,
    "cautious_weight_decay": flag,
    "weight_decay_mask": _mask,
}

# The settings that `optax.inject_hyperparams` may compute from a schedule.
NUMBERS = frozenset(name for name, rule in _RULES.items() if isinstance(rule, _Number))


def check_settings(
    caller: str,
    settings: Mapping[str, Any],
    *,
    optional: Collection[str] = (),
    schedules: bool = True,
    rules: Mapping[str, Rule] = MappingProxyType({}),
) -> None:
    """Raises one error for all settings that are not allowed.

    Args:
      caller: Name of the public function.
      settings: Settings by their public names, such as `locals()`. Names without a rule are
        ignored.
      optional: Names of the settings that may be None.
      schedules: Whether settings may be schedules; False for a function that has no step.
      rules: Rules of more settings, by their names.

    Raises:
      TypeError: if a setting has the wrong type, such as a number given as a string.
      ValueError: if all types are right, and a setting is out of range or unknown.

    Example:
      >>> check_settings("muon", {"beta": 0.95, "eps": 1e-8})
    """
    faults = []
    for name, value in settings.items():
        rule = rules.get(name, _RULES.get(name))
        if isinstance(rule, _Number) and not schedules:
            rule = dataclasses.replace(rule, schedule=False)
        if rule is not None and not (value is None and name in optional):
            faults += [(name, fault)] if (fault := rule(value)) else []
    if faults:
        wrong_type = any(isinstance(fault, TypeError) for _, fault in faults)
        text = "; ".join(f"{name} must be {fault}" for name, fault in faults)
        raise (TypeError if wrong_type else ValueError)(f"{caller}: {text}.")


def check_choice(caller: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises if a name is not one of the choices, and lists them.

    Args:
      caller: Name of the public function.
      name: Name of the argument.
      value: The argument.
      choices: The allowed names.

    Raises:
      ValueError: if `value` is not one of `choices`.

    Example:
      >>> check_choice("newton_schulz", "method", "standard", ("auto", "standard"))
    """
    if fault := choice(*choices)(value):
        raise ValueError(f"{caller}: {name} must be {fault}.")


def shown(value: Any) -> str:
    """Prints a value in at most a line: of an array its dtype and shape alone.

    Args:
      value: Anything, such as a pytree of weights.

    Returns:
      The text.

    Example:
      >>> shown(jnp.ones((2, 3))), shown("a"), shown({"w": jnp.ones(3)})
      ('float32[2, 3]', "'a'", "{'w': float32[3]}")
    """
    return _Short().repr(value)


class _Short(reprlib.Repr):
    """`reprlib`, without the numbers in arrays."""

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, jax.Array | np.ndarray) and (np.ndim(x) or isinstance(x, Tracer)):
            return f"{x.dtype}{list(x.shape)}"
        return super().repr1(x, level)


def is_real(value: Any) -> bool:
    """Whether a value is a real number, or an array of them; booleans are not.

    Args:
      value: Anything.

    Returns:
      True for numbers and arrays of Python, NumPy and JAX, traced or not.

    Example:
      >>> is_real(1), is_real(jnp.ones(3)), is_real("1"), is_real(True)
      (True, True, False, False)
    """
    dtype = _dtype(value)
    return dtype is not None and jnp.isdtype(dtype, _REAL)


def _wrong_kind(value: Any, kind: type) -> str:
    """Describes a value that is not a number, with the fix where it is known."""
    if isinstance(value, str):
        try:
            kind(value)
        except ValueError:
            return f"the string {shown(value)}"
        yaml = " (YAML 1.1 reads 1e-4 as a string, and 1.0e-4 as a number)" if kind is float else ""
        return f"the string {value!r}: pass {kind.__name__}({value!r}){yaml}"
    return f"{shown(value)} ({type(value).__name__})"


def _dtype(value: Any) -> np.dtype | None:
    """Finds the dtype of a number or an array; None for anything else."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.dtype(value.dtype)
    return np.dtype(type(value)) if isinstance(value, numbers.Number) else None


def _as_dtype(value: Any) -> np.dtype | None:
    """Reads a dtype; None if it is not one."""
    if value is None or isinstance(value, bool | int | float | np.ndarray | np.generic | jax.Array):
        return None
    try:
        return jnp.dtype(value)
    except TypeError:
        return None
