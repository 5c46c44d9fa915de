"""A signature that makes `optax.inject_hyperparams` work without `static_args`.

`optax.inject_hyperparams` treats every function among the arguments as a schedule and calls it with
the step: a mask, dimension numbers given as a function, `jnp.bfloat16`. It also casts every number
to the dtype of the parameters: in bfloat16, 0.999 is 1, and an axis is no longer an integer of
Python. It reads the arguments with `inspect.signature(factory).bind`. Our signature returns them in
a form that avoids both.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class _Held:
    """A function or class that is no schedule, or an integer that stays one.

    It is not callable, as optax calls schedules, and no number, as optax makes arrays of numbers.
    """

    value: Any


class _Number(jax.Array):
    """A number that `jnp.asarray` makes an array of, with the default dtype of floats.

    Optax does so in `init`. An array made before would start the backend, and would not be on the
    mesh. Optax casts no array whose type is not weak.
    """

    def __init__(self, value: float) -> None:
        self.value = value

    @property
    def dtype(self) -> Any:
        return jax.dtypes.canonicalize_dtype(float)

    @property
    def weak_type(self) -> bool:
        return False

    def __jax_array__(self) -> jax.Array:
        return jnp.asarray(self.value, self.dtype)

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return repr(self.value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Number, (self.value,)

    def __deepcopy__(self, memo: Any) -> "_Number":
        return self


class _Signature(inspect.Signature):
    """A signature whose `bind` returns arguments that `optax.inject_hyperparams` keeps."""

    __slots__ = ("_check", "_numbers")

    def bind(self, /, *args: Any, **kwargs: Any) -> inspect.BoundArguments:
        bound = super().bind(*args, **kwargs)
        bound.apply_defaults()
        is_schedule = {n: callable(x) and n in self._numbers for n, x in bound.arguments.items()}
        self._check({n: x for n, x in bound.arguments.items() if not is_schedule[n]})
        for name, value in bound.arguments.items():
            is_static = name not in self._numbers and type(value) is int
            if is_static or (callable(value) and not is_schedule[name]):
                bound.arguments[name] = _Held(value)
            elif isinstance(value, float):
                bound.arguments[name] = _Number(value)
        return bound

    def replace(self, **changes: Any) -> "_Signature":  # functools.partial of a factory
        return _signature(super().replace(**changes), self._check, self._numbers)


def injectable(
    numbers: frozenset[str], check: Callable[[Mapping[str, Any]], None]
) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Makes `optax.inject_hyperparams(factory)` work for all arguments of a factory.

    Args:
      numbers: Names of the arguments that are numbers, for which a function is a schedule.
      check: Raises for wrong arguments; called before the first step, with all arguments that are
        no schedules.

    Returns:
      A decorator.

    Example:
      >>> @injectable(frozenset({"rate"}), check=lambda arguments: None)
      ... def factory(rate, mask=len):
      ...     return mask("abc") * rate
      >>> bound = inspect.signature(factory).bind(2.0)
      >>> callable(bound.arguments["mask"]), factory(**bound.arguments)
      (False, 6.0)
    """

    def decorate(factory: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(factory)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            arguments: Any = [_released(x) for x in args]
            return factory(*arguments, **{name: _released(x) for name, x in kwargs.items()})

        call.__signature__ = _signature(inspect.signature(factory), check, numbers)  # pyright: ignore[reportAttributeAccessIssue]
        return call

    return decorate


def _signature(plain: inspect.Signature, check: Any, numbers: frozenset[str]) -> _Signature:
    signature = _Signature(
        list(plain.parameters.values()), return_annotation=plain.return_annotation
    )
    signature._check, signature._numbers = check, numbers
    return signature


def _released(x: Any) -> Any:
    return x.value if isinstance(x, _Held | _Number) else x
