"""Small models of many families, with the role of each parameter and their attention.

A parameter is written as the letters of its axes and its role: `ldhk:d>hk` is a stack over `l` of
matrices with inputs `d` and outputs `h k` for Muon; `vd:looked up` is for AdamW, with the beginning
of the reason; `dv:d>v output head` is for AdamW too.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SIZES = dict(
    v=40,
    d=16,
    h=4,
    g=2,
    k=8,
    f=24,
    e=4,
    l=3,
    t=10,
    s=6,
    r=12,
    c=6,
    n=2,
    z=3,
    m=12,
    u=16,
    x=64,
    y=32,
    o=1,
)


@dataclasses.dataclass
class Family:
    """One model.

    Attributes:
      spec: Axes and role of each parameter, by path.
      fn: The function, `fn(params, *args, tap)`; `tap(path, logits)` records logits
        `[..., heads axes, queries, keys]`, minus infinity where hidden.
      args: Its arguments.
      sites: By path of an attention: heads, key heads, columns, layers, and notes.
      group: The kind of model that it is.
      sizes: Sizes of letters that differ from `SIZES`.
    """

    spec: dict[str, str]
    fn: Callable[..., Any]
    args: tuple[Any, ...]
    sites: dict[str, tuple] = dataclasses.field(default_factory=dict)
    group: str = ""
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)

    def params(self, scale=0.4):
        rng = np.random.default_rng(0)
        tree: dict[str, Any] = {}
        for path, text in self.spec.items():
            *parents, last = path.split("/")
            node = tree
            for part in parents:
                node = node.setdefault(part, {})
            shape = tuple((SIZES | self.sizes)[letter] for letter in text.split(":")[0])
            value = (rng.normal(size=shape) * scale).astype(np.float32)
            node[last] = jnp.asarray(value, jnp.float32)
        return tree


def no_tap(path, logits):
    return None


TOKENS = np.random.default_rng(1).integers(0, SIZES["v"], (2, SIZES["t"]))
IMAGES = np.random.default_rng(2).normal(size=(2, 8, 8, 3)).astype(np.float32)
MEMORY = np.random.default_rng(3).normal(size=(2, SIZES["s"], SIZES["d"])).astype(np.float32)
FAMILIES: dict[str, Family] = {}


def family(args=(TOKENS,), sites=None, into=FAMILIES, sizes=None, **spec):
    """Adds a family; `__` in the names of parameters stands for a slash."""

    def add(fn):
        names = {path.replace("__", "/"): text for path, text in spec.items()}
        into[fn.__name__] = Family(names, fn, args, sites or {}, sizes=sizes or {})
        return fn

    return add


def norm(x, gain=None, eps=1e-6):
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + eps)
    return x if gain is None else x * gain


def hidden(logits, tap, path, causal=True):
    """Hides the future, and records the logits."""
    t, s = logits.shape[-2:]
    mask = jnp.tri(t, s, dtype=bool) if causal else jnp.ones((t, s), bool)
    tap(path, jnp.where(mask, logits, -jnp.inf))
    return jnp.where(mask, logits, jnp.finfo(logits.dtype).min)


def layers(step, x, stack, tap):
    """Runs layers in a scan; one after another where logits are recorded."""
    if tap is no_tap:
        return jax.lax.scan(lambda x, w: (step(x, w), None), x, stack)[0]
    for i in range(jax.tree.leaves(stack)[0].shape[0]):
        x = step(x, jax.tree.map(lambda w, i=i: w[i], stack))
    return x


def mha(x, p, tap, path, memory=None, causal=True, scale=0.3):
    y = x if memory is None else memory
    q = jnp.einsum("btd,dhk->bthk", x, p["q"])
    k, v = (jnp.einsum("bsd,dhk->bshk", y, p[n]) for n in "kv")
    logits = hidden(jnp.einsum("bthk,bshk->bhts", q * scale, k), tap, path, causal)
    weights = jax.nn.softmax(logits, -1)
    return jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", weights, v), p["o"])


def loss_of(logits):
    return -jnp.mean(jax.nn.log_softmax(logits)[..., 3])


HEADS = (4, 4, 8)


@family(
    emb="vd:looked up", pos="td:elementwise", head="dv:d>v output head",
    h__g="ld:elementwise", h__attn__q="ldhk:d>hk", h__attn__k="ldhk:d>hk", h__attn__v="ldhk:d>hk",
    h__attn__o="lhkd:hk>d", h__up="ldf:d>f", h__up_b="lf:elementwise", h__down="lfd:f>d",
    sites={"h/attn": (*HEADS, 3)},
)  # fmt: skip
def gpt_scanned(p, tokens, tap=no_tap):
    """A scan over checkpointed layers."""

    def step(x, w):
        x = x + mha(norm(x, w["g"]), w["attn"], tap, "h/attn")
        return x + jax.nn.gelu(x @ w["up"] + w["up_b"]) @ w["down"]

    step = jax.checkpoint(step) if tap is no_tap else step
    x = layers(step, p["emb"][tokens] + p["pos"], p["h"], tap)
    return loss_of(x @ p["head"])


@family(
    emb="vd:looked up", n__g="d:elementwise",
    a__wq="dx:d>x", a__wk="dx:d>x", a__wv="dx:d>x", a__wo="xd:x>d", a__bq="x:elementwise",
    mlp="df:d>f", out="fd:f>d",
    sites={"a": (8, 8, 8, 1)},
)  # fmt: skip
def tied_flat(p, tokens, tap=no_tap):
    """Flat projections with a bias; the embedding is the head too; heads are split by a reshape."""
    x = p["emb"][tokens]
    h = norm(x, p["n"]["g"])
    q, k, v = (h @ p["a"][n] for n in ("wq", "wk", "wv"))
    q, k, v = (u.reshape(2, 10, 8, 8).transpose(0, 2, 1, 3) for u in (q + p["a"]["bq"], k, v))
    w = jax.nn.softmax(hidden(q @ k.swapaxes(-1, -2) / 8**0.5, tap, "a"), -1)
    x = x + (w @ v).transpose(0, 2, 1, 3).reshape(2, 10, 64) @ p["a"]["wo"]
    x = x + jax.nn.relu(x @ p["mlp"]) @ p["out"]
    return loss_of(x @ p["emb"].T)


def rope(x, positions):
    half = x.shape[-1] // 2
    angle = positions[:, None, None] / 100.0 ** (jnp.arange(half) / half)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


@family(
    emb="vd:looked up", head="dv:d>v output head",
    attn__q="dhk:d>hk", attn__k="dgk:d>gk", attn__v="dgk:d>gk", attn__o="hkd:hk>d",
    gate="df:d>f", up="df:d>f", down="fd:f>d",
    sites={"attn": (4, 2, 8, 1)},
)  # fmt: skip
def llama(p, tokens, tap=no_tap):
    """Grouped queries by a repeat of the keys, rotary embeddings, gated MLP."""
    x, a = p["emb"][tokens], p["attn"]
    q, k, v = (jnp.einsum("btd,dhk->bthk", norm(x), a[n]) for n in "qkv")
    q, k = (rope(u, jnp.arange(10)) for u in (q, k))
    k, v = (jnp.repeat(u, 2, 2) for u in (k, v))
    w = jax.nn.softmax(hidden(jnp.einsum("bthk,bshk->bhts", q, k) * 0.3, tap, "attn"), -1)
    x = x + jnp.einsum("bhts,bshk,hkd->btd", w, v, a["o"])
    x = x + (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]
    return loss_of(norm(x) @ p["head"])


@family(
    emb="vd:looked up", attn__q="hdk:d>hk", attn__kv="ngdk:d>gk", attn__o="hkd:hk>d",
    gating="nfd:d>f", linear="fd:f>d",
    sites={"attn": (4, 2, 8, 1, "soft_cap")},
)  # fmt: skip
def gemma(p, tokens, tap=no_tap):
    """Einsum kernels, keys and values in one, grouped queries by a reshape, soft cap, tied head."""
    x, a = p["emb"][tokens] * 4.0, p["attn"]
    h = norm(x)
    q = rope(jnp.einsum("btd,hdk->bthk", h, a["q"]), jnp.arange(10)) * 0.3
    k, v = jnp.einsum("bsd,cgdk->cbsgk", h, a["kv"])
    q = q.reshape(2, 10, 2, 2, 8)
    logits = jnp.einsum("btghk,bsgk->bghts", q, rope(k, jnp.arange(10)))
    hidden(logits, tap, "attn")
    logits = 5.0 * jnp.tanh(logits / 5.0)
    w = jax.nn.softmax(hidden(logits, no_tap, ""), -1)
    out = jnp.einsum("bghts,bsgk->btghk", w, v).reshape(2, 10, 4, 8)
    x = x + jnp.einsum("bthk,hkd->btd", out, a["o"])
    a, b = jnp.einsum("btd,nfd->nbtf", x, p["gating"])
    return loss_of((x + (jax.nn.gelu(a) * b) @ p["linear"]) @ p["emb"].T)


@family(
    emb="vd:looked up", head="dv:d>v output head", q_a="dr:d>r", q_norm="r:elementwise",
    attn__q_b="rhm:r>hm", kv_a="du:d>u", kv_norm="r:elementwise", attn__kv_b="rhu:r>hu",
    attn__o="hkd:hk>d",
    sites={"": (4, 4, 12, 1)},
)  # fmt: skip
def latent(p, tokens, tap=no_tap):
    """Latent attention: columns with a key of their own, and a rotary key that heads share."""
    x = p["emb"][tokens]
    q = jnp.einsum("btr,rhm->bthm", norm(x @ p["q_a"], p["q_norm"]), p["attn"]["q_b"])
    c = x @ p["kv_a"]
    latent, k_rope = norm(c[..., :12], p["kv_norm"]), c[..., None, 12:]
    k, v = jnp.split(jnp.einsum("btr,rhu->bthu", latent, p["attn"]["kv_b"]), 2, -1)
    q_rope, k_rope = (rope(u, jnp.arange(10)) for u in (q[..., 8:], k_rope))
    q = jnp.concatenate([q[..., :8], q_rope], -1)
    k = jnp.concatenate([k, jnp.broadcast_to(k_rope, (2, 10, 4, 4))], -1)
    w = jax.nn.softmax(hidden(jnp.einsum("bthm,bshm->bhts", q, k) * 0.3, tap, ""), -1)
    x = x + jnp.einsum("bhts,bshk,hkd->btd", w, v, p["attn"]["o"])
    return loss_of(x @ p["head"])


@family(
    emb="vd:looked up", head="dv:d>v output head", qkv="dzhk:d>hk", o="hkd:hk>d",
    sink="h:elementwise", sites={"": (4, 4, 8, 1, "sink")},
)  # fmt: skip
def fused_with_sink(p, tokens, tap=no_tap):
    """Queries, keys and values in one kernel; a learned sink as one more column."""
    x = p["emb"][tokens]
    y = jnp.einsum("btd,dzhk->btzhk", norm(x), p["qkv"])
    q, k, v = y[:, :, 0], y[:, :, 1], y[:, :, 2]
    logits = hidden(jnp.einsum("bthk,bshk->bhts", q, k) * 0.3, tap, "")
    sink = jnp.broadcast_to(p["sink"][None, :, None, None] + 50.0, (2, 4, 10, 1))
    w = jax.nn.softmax(jnp.concatenate([logits, sink], -1), -1)[..., :-1]
    x = x + jnp.einsum("bhts,bshk,hkd->btd", w, v, p["o"])
    return loss_of(x @ p["head"])


@family(
    emb="vd:looked up", head="dv:d>v output head", attn__q="dhk:d>hk", attn__k="dhk:d>hk",
    attn__v="dhk:d>hk", attn__o="hkd:hk>d", attn__qn="k:elementwise", attn__kn="k:elementwise",
    sites={"attn": (4, 4, 8, 1, "qk_norm")},
)  # fmt: skip
def qk_norm(p, tokens, tap=no_tap):
    """Queries and keys are normalized after their projection."""
    x, a = p["emb"][tokens], p["attn"]
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, a[n]) for n in "qkv")
    q, k = (rope(u, jnp.arange(10)) for u in (norm(q, a["qn"]), norm(k, a["kn"])))
    logits = jnp.einsum("bthk,bshk->bhts", q, k)
    w = jax.nn.softmax(hidden(logits, tap, "attn"), -1)
    x = x + jnp.einsum("bhts,bshk,hkd->btd", w, v, a["o"])
    return loss_of(x @ p["head"])


@family(
    args=(TOKENS, MEMORY), emb="vd:looked up", head="dv:d>v output head",
    enc__q="dhk:d>hk", enc__k="dhk:d>hk", enc__v="dhk:d>hk", enc__o="hkd:hk>d",
    dec__q="dhk:d>hk", dec__k="dhk:d>hk", dec__v="dhk:d>hk", dec__o="hkd:hk>d",
    cross__q="dhk:d>hk", cross__k="dhk:d>hk", cross__v="dhk:d>hk", cross__o="hkd:hk>d",
    sites={"enc": (*HEADS, 1), "dec": (*HEADS, 1), "cross": (*HEADS, 1)},
)  # fmt: skip
def encoder_decoder(p, tokens, memory, tap=no_tap):
    """An encoder, and a decoder that attends to it."""
    y = memory + mha(memory, p["enc"], tap, "enc", causal=False)
    x = p["emb"][tokens]
    x = x + mha(x, p["dec"], tap, "dec")
    x = x + mha(x, p["cross"], tap, "cross", memory=y, causal=False)
    return loss_of(x @ p["head"])


@family(
    args=(MEMORY,), probe="od:elementwise", pos="sd:elementwise", head="dv:d>v output head",
    attn__q="dhk:d>hk", attn__k="dhk:d>hk", attn__v="dhk:d>hk", attn__o="hkd:hk>d",
    map__q="dhk:d>hk", map__k="dhk:d>hk", map__v="dhk:d>hk", map__o="hkd:hk>d",
    sites={"attn": (*HEADS, 1), "map": (*HEADS, 1)},
)  # fmt: skip
def vit(p, patches, tap=no_tap):
    """Pooling by the attention of a learned probe."""
    x = patches + p["pos"]
    x = x + mha(x, p["attn"], tap, "attn", causal=False)
    probe = jnp.tile(p["probe"][None], (2, 1, 1))
    x = mha(probe, p["map"], tap, "map", memory=x, causal=False)
    return loss_of(x[:, 0] @ p["head"])


@family(
    emb="vd:looked up", head="dv:d>v output head", bias="zh:looked up", attn__q="dhk:d>hk",
    attn__k="dhk:d>hk", attn__v="dhk:d>hk", attn__o="hkd:hk>d", sites={"attn": (*HEADS, 1)},
)  # fmt: skip
def position_bias(p, tokens, tap=no_tap):
    """A table of position biases, added to the logits."""
    x, a = p["emb"][tokens], p["attn"]
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, a[n]) for n in "qkv")
    distance = jnp.clip(jnp.arange(10)[:, None] - jnp.arange(10), 0, 2)
    bias = p["bias"][distance].transpose(2, 0, 1)[None]
    logits = hidden(jnp.einsum("bthk,bshk->bhts", q, k) * 0.3 + bias, tap, "attn")
    x = x + jnp.einsum("bhts,bshk,hkd->btd", jax.nn.softmax(logits, -1), v, a["o"])
    return loss_of(x @ p["head"])


@family(
    emb="vd:looked up", head="dv:d>v output head", attn__q="dhk:d>hk", attn__k="dhk:d>hk",
    attn__v="dhk:d>hk", attn__o="hkd:hk>d", sites={"attn": (*HEADS, 1)},
)  # fmt: skip
def online_softmax(p, tokens, tap=no_tap):
    """Keys in blocks, with a running maximum."""
    x, a = p["emb"][tokens], p["attn"]
    q, k, v = (jnp.einsum("btd,dhk->bhtk", x, a[n]) for n in "qkv")
    tap("attn", jnp.einsum("bhtk,bhsk->bhts", q, k) * 0.3)

    def block(state, kv):
        top, total, out = state
        logits = jnp.einsum("bhtk,bhsk->bhts", q, kv[0]) * 0.3
        new = jnp.maximum(top, logits.max(-1))
        w, old = jnp.exp(logits - new[..., None]), jnp.exp(top - new)
        out = out * old[..., None] + jnp.einsum("bhts,bhsk->bhtk", w, kv[1])
        return (new, total * old + w.sum(-1), out), None

    blocks = [u.reshape(2, 4, 2, 5, 8).transpose(2, 0, 1, 3, 4) for u in (k, v)]
    start = (
        jnp.full((2, 4, 10), -jnp.inf, q.dtype),
        jnp.zeros((2, 4, 10), q.dtype),
        jnp.zeros_like(q),
    )
    (_, total, out), _ = jax.lax.scan(block, start, tuple(blocks))
    x = x + jnp.einsum("bhtk,hkd->btd", out / total[..., None], a["o"])
    return loss_of(x @ p["head"])
