"""MuonClip in the trainer of EasyDeL (https://github.com/erfanzar/EasyDeL): language models.

    from muonclip_jax.integrations.easydel import with_qk_clip

    arguments = ed.TrainingArguments(optimizer="muonclip", learning_rate=2e-4, weight_decay=0.1)
    with_qk_clip(ed.Trainer)(arguments=arguments, model=model, dataset_train=dataset).train()

The program of EasyDeL's own training step is read: the row maxima that its softmaxes compute anyway
are the max logits. They are no gradients, so neither `clip_grad` nor the mean over micro-batches
changes them.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import optax

import muonclip_jax as mc

_NAME = "muonclip"
_TRAINER = "easydel.trainers.trainer.trainer:Trainer"
# Objects of EasyDeL 0.3.0 and eformer 0.0.99.12 that are used, and their attributes or fields.
_USED = {
    _TRAINER: (
        "configure_functions",
        "configure_model",
        "_train_shared_fn_static_args",
        "_eval_shared_fn_static_args",
    ),
    "easydel.trainers.trainer_protocol:TrainerConfigureFunctionOutput": (
        "sharded_training_step_function",
        "sharded_evaluation_step_function",
    ),
    "easydel.infra.base_state:EasyDeLState": ("graphstate", "replace"),
    "easydel.infra.loss_utils:LossMetrics": ("other_metrics", "replace"),
    "eformer.optimizers:OptimizerBuilder": (),
    "eformer.optimizers:register_optimizer": (),
}
# Arguments of `mc.muonclip` that `extra_optimizer_kwargs` does not have: arguments of the clip, and
# the ones that EasyDeL passes. In EasyDeL's chain, its own weight decay follows the optimizer.
_TAKEN = ("learning_rate", "layout", "threshold", "alpha", "shared_key", "ignore", "weight_decay")
_DEFAULTS = {"adam_weight_decay": 0.0, "ns_dtype": None}  # EasyDeL reads "auto" as a dtype


def _settings() -> Iterator[tuple[str, Any, Any]]:
    """Yields name, type and default of what `extra_optimizer_kwargs` may have."""
    for name, parameter in inspect.signature(mc.muonclip).parameters.items():
        if name not in _TAKEN:
            default = _DEFAULTS.get(name, parameter.default)
            yield name, Any, dataclasses.field(default=default)
    yield "muon_weight_decay", Any, dataclasses.field(default=0.0)


MuonClipConfig = dataclasses.make_dataclass("MuonClipConfig", _settings())
MuonClipConfig.__doc__ = "The arguments of `mc.muonclip`, except for the clip."


def optimizer(config: Any, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Builds what the builder registered as `muonclip` returns: Muon, without the clip.

    Args:
      config: A `MuonClipConfig`. `muon_weight_decay` is the `weight_decay` of `mc.muonclip`, a name
        that EasyDeL takes for itself.
      learning_rate: Number or schedule.

    Returns:
      An optax transformation.

    Raises:
      TypeError: for settings of a wrong type.
      ValueError: for settings out of range.

    Example:
      >>> from muonclip_jax.integrations.easydel import MuonClipConfig, optimizer
      >>> tx = optimizer(MuonClipConfig(consistent_rms=0.18), 1e-3)
    """
    names = (field.name for field in dataclasses.fields(config))
    settings = {name: getattr(config, name) for name in names}
    settings["weight_decay"] = settings.pop("muon_weight_decay")
    if settings["ns_dtype"] is None:
        settings["ns_dtype"] = "auto"
    return mc.muonclip(learning_rate, threshold=None, **settings)


@functools.cache
def register() -> None:
    """Registers the optimizer, so that `TrainingArguments(optimizer="muonclip")` finds it.

    `with_qk_clip` calls it. Call it yourself to train with Muon and without the clip.

    Raises:
      ImportError: if EasyDeL is not installed, or has other names than the ones used here.
    """
    _check_release()
    optimizers = importlib.import_module("eformer.optimizers")

    @optimizers.register_optimizer(_NAME)
    @dataclasses.dataclass
    class MuonClip(optimizers.OptimizerBuilder):
        config: MuonClipConfig  # pyright: ignore[reportInvalidTypeForm]

        def build(self, scheduler: optax.Schedule) -> optax.GradientTransformation:
            return optimizer(self.config, scheduler)


def with_qk_clip(
    trainer: type,
    *,
    expect: int | None = None,
    kernels: Mapping[str, Callable[..., Any]] | None = None,
    ignore_kernels: Sequence[str] = (),
    layout: Any = None,
    **clip: Any,
) -> type:
    """Makes a trainer of EasyDeL clip queries and keys after each update.

    EasyDeL's training step does not change: loss, gradients and update equal `trainer` bit for bit.
    The max logits of its micro-batches are joined by their maximum. `mc.qk_clip_metrics` are added
    to the metrics, and logged as `train/qk_clip/…`. Any optimizer works.

    Args:
      trainer: `easydel.Trainer`, `easydel.SFTTrainer` or a subclass with the same training step.
      expect: How many attentions the program has, see `mc.with_max_logits`. None: one for each of
        `config.num_hidden_layers`.
      kernels: See `mc.with_max_logits`. Needed where attention is a Pallas, cuDNN or FFI kernel.
      ignore_kernels: The argument `ignore` of `mc.with_max_logits`.
      layout: Head layout for `mc.qk_clip`. None: the heads that the program shows. Kernels that
        cannot be read need one.
      **clip: Further arguments of `mc.qk_clip`: `threshold`, `alpha`, `shared_key`, `ignore`.

    Returns:
      A subclass of `trainer`.

    Raises:
      ImportError: if EasyDeL is not installed, or has other names than the ones used here.
      TypeError: if `trainer` is no trainer of EasyDeL or has a training step of its own, and for
        unknown arguments of `mc.qk_clip`.
      ValueError: from the trainer, if `extra_optimizer_kwargs` has an unknown name, if both weight
        decays are set, or if the model does not have `num_hidden_layers`; in its first step, for
        everything that `mc.with_max_logits` and `mc.qk_clip` raise.
    """
    register()
    _check_arguments(trainer, clip)

    class QKClipTrainer(trainer):
        def configure_model(self) -> Any:
            if self.arguments.optimizer == _NAME:
                _check_settings(self.arguments)
            return super().configure_model()

        def configure_functions(self) -> Any:
            functions = super().configure_functions()
            read = functools.partial(
                mc.with_max_logits,
                expect=_number_of_layers(self.model.config) if expect is None else expect,
                kernels=kernels,
                ignore=ignore_kernels,
            )
            # EasyDeL jits its functions; these are the functions inside.
            train = inspect.unwrap(functions.sharded_training_step_function)
            evaluate = inspect.unwrap(functions.sharded_evaluation_step_function)
            forward = functools.partial(_call, evaluate, self._eval_shared_fn_static_args)
            step = functools.partial(_clipped_step, train, forward, read, layout, clip)
            same = jax.sharding.NamedSharding(self.model.mesh, jax.sharding.PartitionSpec())
            functions.sharded_training_step_function = jax.jit(
                step,
                static_argnums=tuple(range(2, 2 + len(self._train_shared_fn_static_args))),
                in_shardings=(self.state_shardings, same),
                out_shardings=(self.state_shardings, same),
                donate_argnums=(0,),
            )
            return functions

    return QKClipTrainer


def _clipped_step(
    train: Callable[..., Any],
    forward: Callable[..., Any],
    read: Callable[..., Any],
    layout: Any,
    clip: Mapping[str, Any],
    state: Any,
    batch: Mapping[str, jax.Array],
    *static: Any,
) -> tuple[Any, Any]:
    """One training step of EasyDeL, then the clip.

    Args:
      train: EasyDeL's training step: `(state, batch, *static)` to a state and metrics.
      forward: A forward pass: `(params, state, batch)` to anything.
      read: `mc.with_max_logits` with its settings.
      layout: A head layout, or None for the heads that the program shows.
      clip: Arguments of `mc.qk_clip`.
      state: EasyDeL's state, with the parameters in `graphstate`.
      batch: The batch, all micro-batches together.
      *static: Further arguments of `train`.

    Returns:
      The new state and its metrics.
    """
    params = state.graphstate
    if layout is None:
        layout = mc.analyze(forward, params, state, batch)
    step = read(functools.partial(_call, train, static))
    (state, metrics), stats = step(params, state, batch)
    params, info = mc.qk_clip(state.graphstate, stats, layout, **clip)
    others = {**(metrics.other_metrics or {}), **mc.qk_clip_metrics(info)}
    return state.replace(graphstate=params), metrics.replace(other_metrics=others)


def _call(
    fn: Callable[..., Any], static: Sequence[Any], params: Any, state: Any, batch: Any
) -> Any:
    """Calls a step function of EasyDeL with its parameters as the first argument."""
    return fn(state.replace(graphstate=params), batch, *static)


def _check_arguments(trainer: Any, clip: Mapping[str, Any]) -> None:
    """Raises for trainers with another training step, and for unknown arguments of `qk_clip`."""
    base = _load(_TRAINER)
    if not (isinstance(trainer, type) and issubclass(trainer, base)):
        raise TypeError(f"with_qk_clip: got {trainer!r}, expected easydel.Trainer or a subclass.")
    if trainer.configure_functions is not base.configure_functions:
        raise TypeError(
            f"with_qk_clip: {trainer.__name__} has a training step of its own, expected the one of "
            "easydel.Trainer. Pass easydel.Trainer or easydel.SFTTrainer."
        )
    known = {*inspect.signature(mc.qk_clip).parameters} - {"params", "max_logits", "layout"}
    if unknown := sorted({*clip} - known):
        raise TypeError(
            f"with_qk_clip: got {unknown}, expected arguments of qk_clip: {sorted(known)}."
        )


def _number_of_layers(config: Any) -> int:
    if (layers := getattr(config, "num_hidden_layers", None)) is None:
        raise ValueError(
            f"with_qk_clip: {type(config).__name__} has no num_hidden_layers. Pass expect=, the "
            "number of attentions."
        )
    return layers


def _check_settings(arguments: Any) -> None:
    """Raises for settings that EasyDeL drops without a message, and for two weight decays."""
    extra = arguments.extra_optimizer_kwargs or {}
    known = {field.name for field in dataclasses.fields(MuonClipConfig)}
    if unknown := sorted({*extra} - known - {"exponent"}):
        raise ValueError(
            f"extra_optimizer_kwargs: the optimizer {_NAME!r} has no settings {unknown}, expected "
            f"names of {sorted(known)}. Pass the arguments of the clip to with_qk_clip, and "
            "weight_decay, learning_rate and clip_grad to TrainingArguments."
        )
    own = [name for name in ("muon_weight_decay", "adam_weight_decay") if extra.get(name)]
    if arguments.weight_decay and own:
        raise ValueError(
            f"TrainingArguments has weight_decay={arguments.weight_decay}, and "
            f"extra_optimizer_kwargs has {' and '.join(own)}: the weights would decay twice. Set "
            "weight_decay=0.0, or drop the others."
        )


def _check_release() -> None:
    """Raises one error that lists everything that is used here and that EasyDeL does not have."""
    missing = []
    for place, names in _USED.items():
        try:
            owner = _load(place)
        except (ImportError, AttributeError):
            missing.append(place)
        else:
            fields = getattr(owner, "__dataclass_fields__", ())
            missing += [
                f"{place}.{name}"
                for name in names
                if not hasattr(owner, name) and name not in fields
            ]
    if missing:
        raise ImportError(
            f"muonclip_jax.integrations.easydel: EasyDeL {_version()} does not have "
            f"{', '.join(missing)}; expected a release like 0.3.0. Install easydel==0.3.0, or a "
            "newer muonclip-jax."
        )


def _load(place: str) -> Any:
    module, name = place.split(":")
    return getattr(importlib.import_module(module), name)


def _version() -> str:
    try:
        return importlib.metadata.version("easydel")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"
