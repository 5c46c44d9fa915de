"""Agents and recommendation."""

import jax
import jax.numpy as jnp

from tests.support.program_families import (
    cross_entropy,
    flat_attention,
    flat_specs,
    floats,
    group,
)
from tests.support.program_models import MEMORY, TOKENS, loss_of, no_tap, norm

HEADS = (4, 4, 8, 1)
agents, items = group("agent"), group("recommendation")


@agents(
    args=(MEMORY, TOKENS[:, :6]), torso1="df:d>f", torso2="ff:f>f", b1="f:elementwise",
    policy="fe:f>e output head", value="fo:output head", log_std="e:elementwise",
)  # fmt: skip
def actor_critic(p, states, actions, **_):
    """A policy and a value from one torso, with an entropy bonus."""
    h = jnp.tanh(states @ p["torso1"] + p["b1"])
    h = jnp.tanh(h @ p["torso2"])
    logits, value = h @ p["policy"], jnp.squeeze(h @ p["value"], -1)
    logp = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logp, actions[..., None] % 4, axis=-1)[..., 0]
    advantage = jax.lax.stop_gradient(1.0 - value)
    ratio = jnp.exp(chosen - jax.lax.stop_gradient(chosen) + 0.1)
    actor = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage).mean()
    mean = logits * jnp.exp(p["log_std"])
    return (
        actor + jnp.square(value - 1).mean() + (jnp.exp(logp) * logp).sum(-1).mean() + mean.mean()
    )


@agents(
    args=(MEMORY, TOKENS[:, :6]), online__w1="df:d>f", online__adv="fe:f>e output head",
    online__val="fo:output head", target__w1="df:d>f", target__adv="fe:f>e output head",
    target__val="fo:output head",
)  # fmt: skip
def double_dueling(p, states, actions, **_):
    """Actions by one network, their values by the other."""

    def values(w, x):
        h = jax.nn.relu(x @ w["w1"])
        adv = h @ w["adv"]
        return h @ w["val"] + adv - adv.mean(-1, keepdims=True)

    q = values(p["online"], states)[:, :-1]
    best = jnp.argmax(values(p["online"], states)[:, 1:], axis=-1)
    after = jnp.take_along_axis(values(p["target"], states)[:, 1:], best[..., None], axis=-1)
    taken = jnp.take_along_axis(q, actions[:, :-1, None] % 4, axis=-1)
    return jnp.square(taken - jax.lax.stop_gradient(1 + 0.9 * after)).mean()


@agents(
    args=(MEMORY, floats(2, 6, 4)), actor1="df:d>f", mean="fe:f>e", log_std="fe:f>e", q1="njf:j>f",
    q2="nfo:output head", b1="nf:elementwise",
)  # fmt: skip
def soft_actor_critic(p, states, noise, **_):
    """Two critics of what the actor does, as an ensemble."""
    h = jax.nn.relu(states @ p["actor1"])
    action = jnp.tanh(h @ p["mean"] + noise * jnp.exp(jnp.clip(h @ p["log_std"], -5, 2)))
    inputs = jnp.concatenate([states, action], axis=-1)

    def critic(w1, b1, w2):
        return (jax.nn.relu(inputs @ w1 + b1) @ w2)[..., 0]

    q = jax.vmap(critic)(p["q1"], p["b1"], p["q2"])
    return -q.min(0).mean()


@agents(
    args=(MEMORY, TOKENS[:, :6], floats(2, 6, 1)), state="dd:d>d", action="vd:looked up",
    reward="od:?one of its axes", step="wd:looked up", head="dv:d>v output head",
    **flat_specs("attn"), sites={"attn": HEADS},
)  # fmt: skip
def decision_transformer(p, states, actions, returns, tap=no_tap):
    """Returns, states and actions take turns; actions are read at the states."""
    steps = p["step"][jnp.arange(6)]
    tokens = [returns @ p["reward"], states @ p["state"], p["action"][actions]]
    x = jnp.stack([u + steps for u in tokens], axis=2).reshape(2, 18, 16)
    x = x + flat_attention(norm(x), p["attn"], tap, "attn")
    x = x.reshape(2, 6, 3, 16)[:, :, 1]
    return cross_entropy(jnp.tanh(x @ p["head"]), actions)


@agents(
    args=(MEMORY[:, 0], TOKENS[:, :3]), repr="du:d>u", dyn="jf:j>f", dyn2="fu:f>u",
    one_hot="eu:looked up", policy="ue:u>e output head", value="uc:u>c output head",
)  # fmt: skip
def learned_dynamics(p, state, actions, **_):
    """Steps of a learned model; an action is one-hot, beside the state or in a product."""
    h, loss = jnp.tanh(state @ p["repr"]), 0.0
    for t in range(3):
        action = jax.nn.one_hot(actions[:, t] % 4, 4, dtype=h.dtype)
        loss += loss_of(h @ p["policy"]) + loss_of(h @ p["value"])
        h = jax.nn.relu(jnp.concatenate([h, action], axis=-1) @ p["dyn"]) @ p["dyn2"]
        h = jnp.tanh(h + action @ p["one_hot"])
    return loss + loss_of(h @ p["policy"]) + loss_of(h @ p["value"])


@items(
    args=(MEMORY[:, 0], TOKENS[:, :3]), table__0="vk:looked up", table__1="vk:looked up",
    table__2="vk:looked up", bottom1="df:d>f", bottom2="fk:f>k", top1="qf:q>f",
    top2="fo:output head",
)  # fmt: skip
def interactions(p, dense, ids, **_):
    """Products of all pairs of features, the upper triangle of them."""
    x = jax.nn.relu(jax.nn.relu(dense @ p["bottom1"]) @ p["bottom2"])
    rows = [jnp.take(p["table"][n], ids[:, int(n)], axis=0) for n in p["table"]]
    z = jnp.stack([x, *rows], axis=1)
    pairs = jnp.einsum("bik,bjk->bij", z, z)
    i, j = jnp.triu_indices(4, k=1)
    h = jax.nn.relu(jnp.concatenate([x, pairs[:, i, j]], axis=-1) @ p["top1"])
    return jax.nn.softplus(-(h @ p["top2"])).mean()


@items(
    args=(TOKENS, TOKENS[::-1]), item="vd:looked up", pos="td:elementwise", up="df:d>f",
    down="fd:f>d", **flat_specs("attn"), sites={"attn": HEADS},
)  # fmt: skip
def next_item(p, items, negatives, tap=no_tap):
    """A transformer over items; scores are products with rows of the table."""
    x = p["item"][items] * 4.0 + p["pos"]
    x = x + flat_attention(norm(x), p["attn"], tap, "attn")
    x = norm(x + jax.nn.relu(x @ p["up"]) @ p["down"])[:, :-1]
    good, bad = ((x * p["item"][u[:, 1:]]).sum(-1) for u in (items, negatives))
    return (jax.nn.softplus(-good) + jax.nn.softplus(bad)).mean()


@items(
    args=(TOKENS[:, 0], TOKENS), user="vd:looked up", item="vk:looked up", u1="df:d>f",
    u2="fr:f>r output head", i1="kf:k>f", i2="fr:f>r output head", bag="vk:looked up",
)  # fmt: skip
def retrieval(p, user, history, **_):
    """Users and items meet in a batch; a bag of items is a product with counts."""
    u = jax.nn.relu(p["user"][user] @ p["u1"]) @ p["u2"]
    bag = jax.nn.one_hot(history, 40, dtype=u.dtype) @ p["bag"]
    i = jax.nn.relu((p["item"][history[:, 0]] + bag.mean(1)) @ p["i1"]) @ p["i2"]
    u, i = norm(u), norm(i)
    return cross_entropy(u @ i.T * 20.0, jnp.arange(2))


@items(
    args=(TOKENS, TOKENS[:, 0]), item="vd:looked up", w1="xf:x>f", w2="fo:?one of its axes",
    top="yr:y>r", out="ro:output head",
)  # fmt: skip
def interest(p, history, target, **_):
    """A softmax over the outputs of a small network of history and target."""
    k = p["item"][history]
    q = jnp.broadcast_to(p["item"][target][:, None], k.shape)
    h = jax.nn.sigmoid(jnp.concatenate([q, k, q - k, q * k], axis=-1) @ p["w1"])
    weights = jax.nn.softmax((h @ p["w2"])[..., 0], axis=-1)
    pooled = jnp.einsum("bt,btd->bd", weights, k)
    h = jax.nn.relu(jnp.concatenate([pooled, q[:, 0]], axis=-1) @ p["top"])
    return jax.nn.softplus(-(h @ p["out"])).mean()
