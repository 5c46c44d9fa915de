"""The functions of MaxText that are replaced or called, and one error if any is missing."""

import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import muonclip_jax as mc

RUN_WITH = "0.2.5"  # the release with which the tests trained
OPTIMIZERS, TRAIN = "maxtext.optimizers.optimizers", "maxtext.trainers.pre_train.train"
ATTENTION, QK_CLIP = "maxtext.layers.attention_op", "maxtext.utils.qk_clip_utils"


class Point(NamedTuple):
    """A function of MaxText.

    Attributes:
      module: Its module.
      name: Its name in the module.
      arguments: Arguments that it has to have.
      caller: Function of the same module that has to look up the name.
    """

    module: str
    name: str
    arguments: tuple[str, ...] = ()
    caller: str = ""


POINTS = (
    Point(OPTIMIZERS, "get_optimizer", ("config", "learning_rate_schedule", "model")),
    Point(OPTIMIZERS, "optax_muon", ("muon_weight_dimension_numbers",), "get_optimizer"),
    Point(ATTENTION, "AttentionOp.__call__", ("model_mode", "record_max_logits")),
    Point(TRAIN, "train_step", ("model", "config"), "train_loop"),
    Point(TRAIN, "gradient_accumulation_loss_and_grad", ("_loss_fn", "data"), "train_step"),
    Point(TRAIN, "qk_clip_utils", (), "train_step"),
    Point(QK_CLIP, "apply_qk_clip_nnx", ("state", "intermediate_outputs", "config")),
)


def import_points(points: tuple[Point, ...] = POINTS) -> dict[str, Any]:
    """Imports the modules of MaxText by name.

    Args:
      points: The attributes that they must have.

    Returns:
      The modules.

    Raises:
      ModuleNotFoundError: if MaxText is not installed.
      ImportError: if a point is missing; it lists all of them.
    """
    if importlib.util.find_spec("maxtext") is None:
        raise ModuleNotFoundError("MaxText is not installed: pip install 'maxtext[tpu]'.")
    modules: dict[str, Any] = {}
    missing: dict[str, None] = {}
    for point in points:
        try:
            module = modules[point.module] = importlib.import_module(point.module)
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("maxtext"):
                raise
            missing[f"{point.module}: no such module"] = None
        else:
            missing |= dict.fromkeys(_faults(module, point))
    if missing:
        found = importlib.metadata.version("maxtext")
        raise ImportError(
            f"muonclip_jax {mc.__version__} does not fit MaxText {found}:\n  "
            + "\n  ".join(missing)
            + f"\nInstall maxtext=={RUN_WITH}, or a muonclip_jax that fits MaxText {found}."
        )
    return modules


def _faults(module: Any, point: Point) -> Iterator[str]:
    """Yields what a module lacks of a point."""
    path = f"{point.module}.{point.name}"
    found = functools.reduce(lambda x, n: getattr(x, n, None), point.name.split("."), module)
    if found is None:
        yield f"{path}: no such name"
    elif point.arguments:
        arguments = inspect.signature(found).parameters
        yield from (f"{path}: no argument {a}" for a in point.arguments if a not in arguments)
    if point.caller:
        caller = inspect.unwrap(getattr(module, point.caller, lambda: None))
        if point.name not in caller.__code__.co_names:
            yield f"{path}: {point.caller} does not use it"
