"""The train step, the same for every optimizer: gradients, update, QK-clip, metrics."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import muonclip_jax as mc
from lm.config import Config

WARMUP_SHARE = 0.05  # of all steps
WEIGHT_DECAY = 0.1  # times the learning rate; Kimi K2, arXiv 2507.20534, section 2.5
ADAM_B2 = 0.95  # a short run needs a short memory; the value of most language-model recipes


class TrainState(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      params: Weights.
      opt_state: State of the optimizer, its step count included.
      ever_clipped: By path of an attention module, which heads QK-clip has ever scaled [L N].
    """

    params: Any
    opt_state: Any
    ever_clipped: dict[str, jax.Array]


def make_schedule(config: Config) -> optax.Schedule:
    """Builds the learning rate: a line up, then a line that reaches 0 after the last step."""
    warmup = max(1, round(WARMUP_SHARE * config.steps))
    rise = optax.linear_schedule(config.peak / warmup, config.peak, warmup)
    fall = optax.linear_schedule(config.peak, 0.0, max(1, config.steps - warmup))
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(config: Config, shardings: Any = None) -> optax.GradientTransformation:
    """Builds the optimizer that the settings name, without the clip.

    Args:
      config: Settings.
      shardings: Of the weights, where several devices divide them.

    Returns:
      The optimizer.
    """
    schedule = make_schedule(config)
    if config.optimizer == "adamw":
        return optax.adamw(schedule, b2=ADAM_B2, weight_decay=WEIGHT_DECAY)
    # Algorithm 1 of Kimi K2 but for the clip: as a function of the parameters after the update, it
    # can also say which heads it scaled.
    return mc.muonclip(
        schedule,
        weight_decay=WEIGHT_DECAY,
        adam_b2=ADAM_B2,
        threshold=None,
        shardings=shardings,
    )


def make_loss(model: nn.Module) -> Callable[..., tuple[jax.Array, Any]]:
    """Builds (params, text [B, T + 1]) -> mean nats per byte, and the sown largest logits."""

    def loss_fn(params, text):
        text = text.astype(jnp.int32)
        logits, sown = model.apply({"params": params}, text[:, :-1], mutable=["intermediates"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
        return loss.mean(), sown["intermediates"]

    return loss_fn


def initial_state(model: nn.Module, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """Draws the weights from the seed; no head has been clipped."""
    text = jnp.zeros((1, 2), jnp.int32)  # no weight depends on the length
    params = model.init(jax.random.key(seed), text)["params"]
    stats = make_loss(model)(params, text)[1]
    _, info = mc.qk_clip(params, stats, threshold=math.inf)
    return TrainState(params, tx.init(params), mc.heads_ever_clipped(info))


def make_train_step(
    model: nn.Module, tx: optax.GradientTransformation, threshold: float
) -> Callable[[TrainState, jax.Array], tuple[TrainState, dict[str, Any]]]:
    """Builds the train step, the same for every optimizer.

    Args:
      model: Maps byte values [B, T] to logits [B, T, V] and sows its largest attention logits.
      tx: Optimizer.
      threshold: Of QK-clip; infinity only records.

    Returns:
      A function from a state and text [A, B / A, T + 1] to the next state and its metrics.
    """
    loss_fn = make_loss(model)

    def train_step(state, text):
        loss, stats, grads = accumulate(loss_fn, state.params, text)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, info = mc.qk_clip(params, stats, threshold=threshold)
        ever_clipped = mc.heads_ever_clipped(info, state.ever_clipped)
        clips = mc.qk_clip_metrics(info, ever_clipped)
        metrics = {"loss": loss, "max_logits": info.max_logits, **clips}
        return TrainState(params, opt_state, ever_clipped), metrics

    return train_step


def accumulate(
    loss_fn: Callable[..., tuple[jax.Array, Any]], params: Any, text: jax.Array
) -> tuple[jax.Array, Any, Any]:
    """Goes through the micro-batches of one step.

    Args:
      loss_fn: Maps (params, text [B, T + 1]) to a loss and the statistics.
      params: Weights.
      text: Micro-batches of one size, [A, B / A, T + 1].

    Returns:
      Mean loss, element-wise largest statistics, mean gradients.
    """

    def add(total, micro):
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, micro)
        sums = jax.tree.map(lambda s, x: s + x / len(text), total[0], (loss, grads))
        return (sums, mc.merge_max_logits(total[1], stats)), None

    loss, stats = jax.eval_shape(loss_fn, params, text[0])
    zeros = (jnp.zeros(loss.shape, loss.dtype), jax.tree.map(jnp.zeros_like, params))
    # -inf is to a maximum what 0 is to a sum
    lowest = jax.tree.map(lambda s: jnp.full(s.shape, -jnp.inf, s.dtype), stats)
    ((loss, grads), stats), _ = jax.lax.scan(add, (zeros, lowest), text)
    return loss, stats, grads
