"""The train step, the same for every optimizer: gradients, update, QK-clip, metrics."""

import functools
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
# Of the biases of experts. DeepSeek-V3, arXiv 2412.19437, section 4.2, moves them by 0.001 a step,
# too slowly for a run of a few hundred: the default of --model moe then turned 20 % of all that
# tokens asked for away, and 34 % at step 50. In runs of 200 steps, 0.01: 7 %, 0.03: 4 %, and the
# same loss.
BALANCE_RATE = 0.01


class TrainState(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      params: Weights.
      opt_state: State of the optimizer, its step count included.
      ever_clipped: By path of an attention module, which heads QK-clip has ever scaled [L N].
      balance: Biases that balance the load of experts, [L E] each; empty without experts.
    """

    params: Any
    opt_state: Any
    ever_clipped: dict[str, jax.Array]
    balance: Any


class Seen(NamedTuple):
    """What a forward pass leaves behind, besides the loss.

    Attributes:
      max_logits: The sown largest attention logits.
      loads: For each expert, how many tokens asked for it, and how many of them in vain: [L 2 E].
    """

    max_logits: Any
    loads: Any


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


def make_loss(model: nn.Module) -> Callable[..., tuple[jax.Array, Seen]]:
    """Builds (params, text [B, T + 1], balance) -> mean nats per byte, and what was seen."""

    def loss_fn(params, text, balance):
        text = text.astype(jnp.int32)
        variables = {"params": params, "balance": balance}
        logits, sown = model.apply(variables, text[:, :-1], mutable=["intermediates", "loads"])
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
        return loss.mean(), Seen(sown["intermediates"], sown.get("loads", {}))

    return loss_fn


def initial_state(model: nn.Module, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """Draws the weights from the seed; no head has been clipped, no expert is preferred."""
    text = jnp.zeros((1, 2), jnp.int32)  # no weight depends on the length
    variables = nn.unbox(model.init(jax.random.key(seed), text))
    params, balance = variables["params"], variables.get("balance", {})

    def clipped():
        _, seen = make_loss(model)(params, text, balance)
        _, info = mc.qk_clip(params, seen.max_logits, model.layout, threshold=math.inf)
        return mc.heads_ever_clipped(info)

    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(clipped))
    return TrainState(params, tx.init(params), none, balance)


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    shared_key: str = "query",
) -> Callable[[TrainState, jax.Array, jax.typing.ArrayLike], tuple[TrainState, dict[str, Any]]]:
    """Builds the train step, the same for every optimizer.

    Args:
      model: Maps tokens [B, T] to logits [B, T, V] and sows its largest attention logits; its
        `layout` says where QK-clip finds the heads.
      tx: Optimizer.
      shared_key: Of QK-clip; how query heads that share a key head are clipped.

    Returns:
      A function from a state, text [A, B / A, T + 1] and the threshold of QK-clip, of which
      infinity only records, to the next state and its metrics. One program for all thresholds:
      without clips it does bit for bit what it does without a threshold.
    """
    loss_fn = make_loss(model)

    def train_step(state, text, threshold):
        micro_loss = functools.partial(loss_fn, balance=state.balance)
        loss, seen, grads = accumulate(micro_loss, state.params, text)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, info = mc.qk_clip(
            params, seen.max_logits, model.layout, threshold=threshold, shared_key=shared_key
        )
        ever_clipped = mc.heads_ever_clipped(info, state.ever_clipped)
        balance = jax.tree.map(rebalance, state.balance, seen.loads)
        clips = mc.qk_clip_metrics(info, ever_clipped)
        metrics = {"loss": loss, "max_logits": info.max_logits, **clips, **load_metrics(seen.loads)}
        return TrainState(params, opt_state, ever_clipped, balance), metrics

    return train_step


def rebalance(bias: jax.Array, loads: jax.Array) -> jax.Array:
    """Moves the biases [L E] towards equal loads: b + rate · sign(mean load - load).

    DeepSeek-V3, arXiv 2412.19437, section 2.1.2: an overloaded expert becomes less likely to be
    chosen for the next batch. The gates do not change, so that nothing competes with the loss.
    """
    asked = loads[..., 0, :]
    return bias + BALANCE_RATE * jnp.sign(asked.mean(-1, keepdims=True) - asked)


def load_metrics(loads: Any) -> dict[str, jax.Array]:
    """Says how uneven the experts are loaded.

    Args:
      loads: Tree of `Seen.loads`.

    Returns:
      `moe/max_load`, the tokens that asked for an expert, in units of the mean of its layer, at the
      worst; and `moe/dropped`, the share that asked in vain. Nothing without experts.
    """
    leaves = jax.tree.leaves(loads)
    if not leaves:
        return {}
    asked, dropped = jnp.split(jnp.concatenate(leaves), 2, axis=-2)  # [L 1 E]
    worst = jnp.max(asked / asked.mean(-1, keepdims=True))
    return {"moe/max_load": worst, "moe/dropped": dropped.sum() / asked.sum()}


def accumulate(
    loss_fn: Callable[..., tuple[jax.Array, Any]], params: Any, text: jax.Array
) -> tuple[jax.Array, Any, Any]:
    """Goes through the micro-batches of one step.

    Args:
      loss_fn: Maps (params, text [B, T + 1]) to a loss and a `Seen`.
      params: Weights.
      text: Micro-batches of one size, [A, B / A, T + 1].

    Returns:
      Mean loss, element-wise largest statistics with the sum of the loads, mean gradients.
    """

    def add(total, micro):
        (loss, seen), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, micro)
        means = jax.tree.map(lambda s, x: s + x / len(text), total[0], (loss, grads))
        max_logits = mc.merge_max_logits(total[1].max_logits, seen.max_logits)
        loads = jax.tree.map(jnp.add, total[1].loads, seen.loads)
        return (means, Seen(max_logits, loads)), None

    loss, seen = jax.eval_shape(loss_fn, params, text[0])
    zeros = (jnp.zeros(loss.shape, loss.dtype), jax.tree.map(jnp.zeros_like, params))
    # -inf is to a maximum what 0 is to a sum
    lowest = jax.tree.map(lambda s: jnp.full(s.shape, -jnp.inf, s.dtype), seen.max_logits)
    nothing = Seen(lowest, jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), seen.loads))
    ((loss, grads), seen), _ = jax.lax.scan(add, (zeros, nothing), text)
    return loss, seen, grads
