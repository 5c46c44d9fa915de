"""The train step, the same for every optimizer: gradients, update, QK-clip, metrics."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import muonclip_jax as mc

# Of the expert biases. DeepSeek-V3, arXiv 2412.19437, section 4.2, moves them by 0.001 a step, too
# slowly for a run of a few hundred steps: with it, the default of --model moe dropped 20 % of all
# assignments, and 34 % at step 50. In runs of 200 steps, 0.01: 7 %, 0.03: 4 %, and the same loss.
BALANCE_RATE = 0.01


class TrainState(NamedTuple):
    """The content of a checkpoint.

    Attributes:
      params: Parameters.
      opt_state: State of the optimizer, including its step count.
      ever_clipped: By path of an attention module, which heads QK-clip has ever scaled [L N].
      balance: Biases that balance the load of experts, [L E] each; empty without experts.
    """

    params: Any
    opt_state: Any
    ever_clipped: dict[str, jax.Array]
    balance: Any


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


# How micro-batches are merged, by collection, and the neutral element: the max logits of attention,
# and for each expert the number of tokens routed to it, and the number of dropped ones [L 2 E].
MERGE = {"intermediates": (mc.merge_max_logits, -math.inf), "loads": (_add, 0.0)}


def make_loss(model: nn.Module) -> Callable[..., tuple[jax.Array, Mapping[str, Any]]]:
    """Builds (params, text [B, T + 1], balance) -> mean nats per byte, and what the model sowed."""

    def loss_fn(params, text, balance):
        text = text.astype(jnp.int32)
        variables = {"params": params, "balance": balance}
        logits, sown = model.apply(variables, text[:, :-1], mutable=list(MERGE))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
        return loss.mean(), sown

    return loss_fn


def initial_state(model: nn.Module, tx: optax.GradientTransformation, seed: int) -> TrainState:
    """Initializes parameters from the seed; no head has been clipped, and all biases are 0."""
    text = jnp.zeros((1, 2), jnp.int32)  # no parameter depends on the length
    variables = nn.unbox(model.init(jax.random.key(seed), text))
    params, balance = variables["params"], variables.get("balance", {})

    def clipped():
        _, sown = make_loss(model)(params, text, balance)
        _, info = mc.qk_clip(params, sown, model.layout, threshold=math.inf)
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
      model: Maps tokens [B, T] to logits [B, T, V] and sows its max logits; its `layout` is the
        head layout of QK-clip.
      tx: Optimizer.
      shared_key: Of QK-clip; how query heads that share a key head are clipped.

    Returns:
      A function from a state, text [A, B / A, T + 1] and the threshold of QK-clip to the next state
      and its metrics. With an infinite threshold it records and does not clip. One compiled program
      serves all thresholds, and a step without clips is bitwise identical to one without a
      threshold.
    """
    loss_fn = make_loss(model)

    def train_step(state, text, threshold):
        micro_loss = functools.partial(loss_fn, balance=state.balance)
        loss, sown, grads = accumulate(micro_loss, state.params, text)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, info = mc.qk_clip(
            params, sown, model.layout, threshold=threshold, shared_key=shared_key
        )
        ever_clipped = mc.heads_ever_clipped(info, state.ever_clipped)
        loads = sown.get("loads", {})
        balance = jax.tree.map(rebalance, state.balance, loads)
        clips = mc.qk_clip_metrics(info, ever_clipped)
        metrics = {"loss": loss, "max_logits": info.max_logits, **clips, **load_metrics(loads)}
        return TrainState(params, opt_state, ever_clipped, balance), metrics

    return train_step


def rebalance(bias: jax.Array, loads: jax.Array) -> jax.Array:
    """Moves the biases [L E] towards equal loads: b + rate · sign(mean load - load).

    DeepSeek-V3, arXiv 2412.19437, section 2.1.2: an overloaded expert becomes less likely to be
    chosen for the next batch. The gates do not change, so no term competes with the loss.
    """
    asked = loads[..., 0, :]
    return bias + BALANCE_RATE * jnp.sign(asked.mean(-1, keepdims=True) - asked)


def load_metrics(loads: Any) -> dict[str, jax.Array]:
    """Measures how evenly the experts are loaded.

    Args:
      loads: Pytree of assignments to each expert and dropped ones, [L 2 E].

    Returns:
      `moe/max_load`, the largest load of an expert in units of the mean of its layer, and
      `moe/dropped`, the dropped share of all assignments. Empty without experts.
    """
    leaves = jax.tree.leaves(loads)
    if not leaves:
        return {}
    asked, dropped = jnp.split(jnp.concatenate(leaves), 2, axis=-2)  # [L 1 E]
    largest = jnp.max(asked / asked.mean(-1, keepdims=True))
    return {"moe/max_load": largest, "moe/dropped": dropped.sum() / asked.sum()}


def accumulate(
    loss_fn: Callable[..., tuple[jax.Array, Mapping[str, Any]]], params: Any, text: jax.Array
) -> tuple[jax.Array, dict[str, Any], Any]:
    """Computes the gradients of one step, one micro-batch after the other.

    Args:
      loss_fn: Maps (params, text [B, T + 1]) to a loss and the sown collections of `MERGE`.
      params: Parameters.
      text: Micro-batches of equal size, [A, B / A, T + 1].

    Returns:
      Mean loss, merged collections, mean gradients.
    """

    def add(carry, micro):
        means, merged = carry
        (loss, sown), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, micro)
        means = jax.tree.map(lambda mean, x: mean + x / len(text), means, (loss, grads))
        return (means, {name: MERGE[name][0](merged[name], sown[name]) for name in sown}), None

    loss, sown = jax.eval_shape(loss_fn, params, text[0])
    zeros = jnp.zeros(loss.shape, loss.dtype), jax.tree.map(jnp.zeros_like, params)
    neutral = {
        name: jax.tree.map(lambda s, fill=MERGE[name][1]: jnp.full(s.shape, fill, s.dtype), shapes)
        for name, shapes in sown.items()
    }
    ((loss, grads), sown), _ = jax.lax.scan(add, (zeros, neutral), text)
    return loss, sown, grads
