"""Other forms of attention, and mixtures of experts."""

import jax
import jax.numpy as jnp

from tests.support.program_families import (
    flat_attention,
    group,
)
from tests.support.program_models import (
    MEMORY,
    hidden,
    layers,
    loss_of,
    no_tap,
    norm,
)

HEADS = (4, 4, 8, 1)
sparse, experts = group("other attention"), group("mixture of experts")


@sparse(
    emb="vd:looked up", head="dv:d>v output head", q="dhk:d>hk", k="dhk:d>hk", v="dhk:d>hk",
    o="hkd:hk>d", sites={"": HEADS},
)  # fmt: skip
def windows_with_the_window_before(p, tokens, tap=no_tap):
    """Keys of a window and of the one before it."""
    x = p["emb"][tokens]
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]).reshape(2, 5, 2, 4, 8) for n in "qkv")

    def both(u):
        before = jnp.pad(u, ((0, 0), (1, 0), (0, 0), (0, 0), (0, 0)))[:, :-1]
        return jnp.concatenate([before, u], axis=2)

    logits = jnp.einsum("bnthk,bnshk->bnhts", q, both(k)) * 0.3
    mask = jnp.ones((5, 2, 4), bool).at[0, :, :2].set(False) & jnp.tri(2, 4, 2, dtype=bool)
    mask = mask[None, :, None]
    tap("", jnp.where(mask, logits, -jnp.inf).swapaxes(1, 2).reshape(2, 4, 10, 4))
    weights = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1)
    out = jnp.einsum("bnhts,bnshk->bnthk", weights, both(v)).reshape(2, 10, 4, 8)
    return loss_of((x + jnp.einsum("bthk,hkd->btd", out, p["o"])) @ p["head"])


@sparse(
    emb="vd:looked up", head="dv:d>v output head", q="dnhk:d>nhk", k="dnhk:d>nhk", v="dhk:d>hk",
    o="hkd:hk>d", lam="nk:reduced", sites={"": (8, 8, 8, 1)},
)  # fmt: skip
def differential(p, tokens, tap=no_tap):
    """The difference of two softmaxes, with a learned factor."""
    x = p["emb"][tokens]
    q, k = (jnp.einsum("btd,dnhk->bnhtk", norm(x), p[n]) for n in "qk")
    v = jnp.einsum("btd,dhk->bhtk", norm(x), p["v"])
    weights = jax.nn.softmax(hidden(jnp.einsum("bnhtk,bnhsk->bnhts", q, k) * 0.3, tap, ""), axis=-1)
    lam = jnp.exp(jnp.sum(p["lam"][0] * p["lam"][1]))
    weights = weights[:, 0] - lam * weights[:, 1]
    out = norm(jnp.einsum("bhts,bhsk->bthk", weights, v)) * 0.2
    return loss_of((x + jnp.einsum("bthk,hkd->btd", out, p["o"])) @ p["head"])


@sparse(
    emb="vd:looked up", head="dv:d>v output head", u="df:d>f", v="df:d>f", z="dk:d>k",
    gamma="nk:elementwise", beta="nk:elementwise", o="fd:f>d",
)  # fmt: skip
def gated_attention_unit(p, tokens, tap=no_tap):
    """Squared positive parts instead of a softmax; queries and keys are scaled copies."""
    x = p["emb"][tokens]
    u, v, z = (jax.nn.silu(norm(x) @ p[n]) for n in "uvz")
    q, k = jnp.moveaxis(z[..., None, :] * p["gamma"] + p["beta"], -2, 0)
    weights = jnp.square(jax.nn.relu(q @ k.swapaxes(-1, -2) / 10)) * jnp.tri(10)
    return loss_of((x + (u * (weights.astype(v.dtype) @ v)) @ p["o"]) @ p["head"])


@sparse(
    emb="vd:looked up", head="dv:d>v output head", q="dhk:d>hk", k="dhk:d>hk", v="dhk:d>hk",
    o="hkd:hk>d",
)  # fmt: skip
def linear_attention(p, tokens, tap=no_tap):
    """Positive features and running sums."""
    x = p["emb"][tokens]
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]) for n in "qkv")
    q, k = jax.nn.elu(q) + 1, jax.nn.elu(k) + 1
    memory = jnp.cumsum(jnp.einsum("bshk,bshj->bshkj", k, v), axis=1)
    total = jnp.einsum("bthk,bthk->bth", q, jnp.cumsum(k, axis=1))
    out = jnp.einsum("bthk,bthkj->bthj", q, memory) / total[..., None]
    return loss_of((x + jnp.einsum("bthk,hkd->btd", out, p["o"])) @ p["head"])


@experts(
    emb="vd:looked up", head="dv:d>v output head", h__attn__wq="ldy:d>y", h__attn__wk="ldy:d>y",
    h__attn__wv="ldy:d>y", h__attn__wo="lyd:y>d", h__moe__gate="lde:d>e router",
    h__moe__w1="ledf:d>f", h__moe__w3="ledf:d>f", h__moe__w2="lefd:f>d",
    sites={"h/attn": (4, 4, 8, 3)},
)  # fmt: skip
def mixtral(p, tokens, tap=no_tap):
    """A scan over layers whose experts are groups of a ragged product."""

    def moe(x, w):
        rows = x.reshape(-1, 16)
        gates, chosen = jax.lax.top_k(rows @ w["gate"], 2)
        gates, chosen = jax.nn.softmax(gates), chosen.reshape(-1)
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=4).astype(jnp.int32)
        taken = jnp.take(rows, order // 2, axis=0)
        h = jax.nn.silu(jax.lax.ragged_dot(taken, w["w1"], sizes))
        h = h * jax.lax.ragged_dot(taken, w["w3"], sizes)
        y = jax.lax.ragged_dot(h, w["w2"], sizes)[jnp.argsort(order)]
        return (y.reshape(-1, 2, 16) * gates[..., None]).sum(1).reshape(x.shape)

    def step(x, w):
        x = x + flat_attention(norm(x), w["attn"], tap, "h/attn")
        return x + moe(norm(x), w["moe"])

    return loss_of(layers(step, p["emb"][tokens], p["h"], tap) @ p["head"])


@experts(
    args=(MEMORY,), gate_w="de:d>e router", w1="edf:d>f", w2="efd:f>d", head="dv:d>v output head",
)  # fmt: skip
def experts_choose_tokens(p, x, **_):
    """Each expert selects the tokens with the largest gates."""
    rows = x.reshape(-1, 16)
    gates, index = jax.lax.top_k(jax.nn.softmax(rows @ p["gate_w"]).T, 3)
    taken = rows[index]
    y = jnp.einsum("ecf,efd->ecd", jax.nn.gelu(jnp.einsum("ecd,edf->ecf", taken, p["w1"])), p["w2"])
    rows = rows.at[index.reshape(-1)].add((y * gates[..., None]).reshape(-1, 16))
    return loss_of(rows @ p["head"])


@experts(
    args=(MEMORY,), phi="dez:d>ez", w1="edf:d>f", b1="ef:elementwise", w2="efd:f>d",
    head="dv:d>v output head",
)  # fmt: skip
def soft_experts(p, x, **_):
    """Slots are weighted means of tokens; the experts are a `vmap`."""
    logits = jnp.einsum("bsd,dez->bsez", x, p["phi"])
    slots = jnp.einsum("bsez,bsd->ebzd", jax.nn.softmax(logits, axis=1), x)
    y = jax.vmap(lambda s, w1, b1, w2: jax.nn.gelu(s @ w1 + b1) @ w2)(
        slots, p["w1"], p["b1"], p["w2"]
    )
    combine = jax.nn.softmax(logits.reshape(2, 6, 12), axis=-1).reshape(2, 6, 4, 3)
    return loss_of(jnp.einsum("bsez,ebzd->bsd", combine, y) @ p["head"])


@experts(
    args=(MEMORY,), q="dhu:d>hu", keys="znF:F>n router", values="jd:looked up",
    head="dv:d>v output head", sizes=dict(n=5, j=25, z=2),
)  # fmt: skip
def memory_layer(p, x, **_):
    """Product keys choose rows of a table of values."""
    q = jnp.einsum("bsd,dhu->bshu", x, p["q"]).reshape(2, 6, 4, 2, 8)
    scores = jnp.einsum("bshzF,znF->bshzn", q, p["keys"])
    top, index = jax.lax.top_k(scores, 2)
    total = top[..., 0, :, None] + top[..., 1, None, :]
    index = index[..., 0, :, None] * 5 + index[..., 1, None, :]
    weights = jax.nn.softmax(total.reshape(2, 6, 4, 4), axis=-1)
    values = p["values"][index.reshape(2, 6, 4, 4)]
    return loss_of((x + jnp.einsum("bshm,bshmd->bsd", weights, values)) @ p["head"])


@experts(
    args=(MEMORY,), pick="d:contracted", wq="dy:d>y", wk="dy:d>y", wv="dy:d>y", wo="yd:y>d",
    head="dv:d>v output head", sites={"": HEADS},
)  # fmt: skip
def mixture_of_depths(p, x, tap=no_tap):
    """Only the chosen tokens pass the layer."""
    scores = jnp.einsum("bsd,d->bs", x, p["pick"])
    top, index = jax.lax.top_k(scores, 4)
    taken = jnp.take_along_axis(x, index[..., None], axis=1)
    y = flat_attention(taken, p, tap, "", causal=False) * jax.nn.sigmoid(top)[..., None]
    x = jax.vmap(lambda x, i, y: x.at[i].add(y))(x, index, y)
    return loss_of(x @ p["head"])
