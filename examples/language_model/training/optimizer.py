"""The optimizers of the program and their learning rate schedule."""

from typing import Any

import optax

import muonclip_jax as mc
from examples.language_model.config import Config

WARMUP_SHARE = {"linear": 0.05, "cosine": 0.01}  # of all steps; Kimi K3, arXiv 2607.24653, 3.3
WEIGHT_DECAY = 0.1  # times the learning rate; Kimi K2, arXiv 2507.20534, section 2.5
ADAM_B2 = 0.95  # a short run needs a short memory; the value of most language-model recipes


def make_schedule(config: Config) -> optax.Schedule:
    """Builds the learning rate: linear warmup, then decay to 0 after the last step."""
    warmup = max(1, round(WARMUP_SHARE[config.schedule] * config.steps))
    rise = optax.linear_schedule(config.peak / warmup, config.peak, warmup)
    rest = max(1, config.steps - warmup)
    linear = optax.linear_schedule(config.peak, 0.0, rest)
    fall = optax.cosine_decay_schedule(config.peak, rest) if config.schedule == "cosine" else linear
    return optax.join_schedules([rise, fall], [warmup])


def make_optimizer(
    config: Config, layout: Any, shardings: Any = None
) -> optax.GradientTransformation:
    """Builds the optimizer of the settings, without the clip.

    Args:
      config: Settings.
      layout: Head layout of the model.
      shardings: Pytree of `NamedSharding` like the parameters; None if they are not sharded.

    Returns:
      The optimizer.
    """
    schedule = make_schedule(config)
    if config.optimizer == "adamw":
        return optax.adamw(schedule, b2=ADAM_B2, weight_decay=WEIGHT_DECAY)
    # Algorithm 1 of Kimi K2 except the clip: the train step applies it to the updated parameters,
    # where it also returns which heads it scaled.
    return mc.muonclip(
        schedule,
        weight_decay=WEIGHT_DECAY,
        adam_b2=ADAM_B2,
        threshold=None,
        layout=layout,
        per_head=config.per_head,
        shardings=shardings,
    )
