"""Graphs, proteins, physics, and kernels that are made of others."""

from typing import Any

import jax
import jax.numpy as jnp

from tests.support.program_families import (
    LABELS,
    RECEIVERS,
    SENDERS,
    attend,
    floats,
    group,
    layer_norm,
    split_heads,
)
from tests.support.program_models import MEMORY, TOKENS, loss_of, no_tap

HEADS = (4, 4, 8, 1)
graphs, proteins, physics = group("graph network"), group("protein"), group("operator learning")
made = group("reparametrization")
NODES, EDGES = MEMORY[0], (SENDERS, RECEIVERS)


@graphs(
    args=(NODES, EDGES, floats(20, 5)), edge1="Hf:H>f", edge2="fr:f>r", node1="Gf:G>f",
    node2="fd:f>d", ln="d:elementwise", head="dv:d>v output head", sizes=dict(H=37, G=28),
)  # fmt: skip
def message_passing(p, nodes, edges, features, **_):
    """Messages of edges, summed at their receivers."""
    senders, receivers = edges
    m = jnp.concatenate([nodes[senders], nodes[receivers], features], axis=-1)
    m = jax.nn.relu(m @ p["edge1"]) @ p["edge2"]
    total = jax.ops.segment_sum(m, receivers, 6)
    h = jax.nn.relu(jnp.concatenate([nodes, total], axis=-1) @ p["node1"]) @ p["node2"]
    return loss_of(layer_norm(nodes + h, p["ln"]).mean(0) @ p["head"])


@graphs(
    args=(NODES, EDGES), w="dhk:d>hk", source="hk:contracted", target="hk:contracted",
    bias="y:elementwise", w2="yd:y>d", head="dv:d>v output head",
)  # fmt: skip
def graph_attention(p, nodes, edges, **_):
    """Additive logits, normalized by receiver."""
    senders, receivers = edges
    h = jnp.einsum("nd,dhk->nhk", nodes, p["w"])
    a, b = (jnp.einsum("nhk,hk->nh", h, p[n]) for n in ("source", "target"))
    logits = jax.nn.leaky_relu(a[senders] + b[receivers], 0.2)
    top = jax.ops.segment_max(logits, receivers, 6)
    weights = jnp.exp(logits - top[receivers])
    weights = weights / jax.ops.segment_sum(weights, receivers, 6)[receivers]
    h = jax.ops.segment_sum(weights[..., None] * h[senders], receivers, 6)
    h = jax.nn.elu(h.reshape(6, 32) + p["bias"])
    adjacency = jnp.zeros((6, 6), h.dtype).at[receivers, senders].set(1.0)
    return loss_of(adjacency @ (h @ p["w2"]) @ p["head"])


@graphs(
    args=(floats(6, 3), LABELS[jnp.arange(6) % 2]), emb="vd:looked up", filter1="jf:j>f",
    filter2="fd:f>d", inner="dd:d>d", out="dd:d>d", energy="do:output head",
)  # fmt: skip
def continuous_filters(p, positions, kinds, **_):
    """Filters of distances, multiplied with the features of neighbors."""
    x = p["emb"][kinds]
    delta = positions[:, None] - positions
    far = jnp.sqrt(jnp.square(delta).sum(-1) + 1e-6)
    basis = jnp.exp(-jnp.square(far[..., None] - jnp.linspace(0, 3, 20, dtype=far.dtype)))
    filters = jax.nn.softplus(basis @ p["filter1"]) @ p["filter2"]
    x = x + jax.nn.softplus(jnp.einsum("ijd,jd->id", filters, x @ p["inner"])) @ p["out"]
    return jnp.sum(x @ p["energy"])


def _gated(prefix):
    rows = dict.fromkeys("qkv", "dhk:d>hk") | {"gate": "dhk:d>hk", "b": "ch:c>h", "o": "hkd:hk>d"}
    return {f"{prefix}__{name}": text for name, text in rows.items()}


@proteins(
    args=(floats(3, 6, 16), floats(6, 6, 12)), **_gated("row"), column__q="dhk:d>hk",
    column__k="dhk:d>hk", column__v="dhk:d>hk", column__o="hkd:hk>d", outer__a="da:d>a",
    outer__b="da:d>a", outer__o="aac:aa>c", triangle__a="cr:c>r", triangle__b="cr:c>r",
    triangle__g="cr:c>r", triangle__o="rc:r>c", start__q="chk:c>hk", start__k="chk:c>hk",
    start__v="chk:c>hk", start__b="ch:c>h", start__o="hkc:hk>c", msa_g="d:elementwise",
    pair_g="c:elementwise", head="cv:c>v output head", masked="dv:d>v output head",
    sites={"row": HEADS, "column": HEADS, "start": HEADS}, sizes=dict(c=12, r=10),
)  # fmt: skip
def evoformer(p, msa, pair, tap=no_tap):
    """Rows with a bias of pairs and gates, columns, outer products, triangles."""

    def mha(x, w, path, bias: Any = 0.0):
        q, k, v = (jnp.einsum("...td,dhk->...htk", x, w[n]) for n in "qkv")
        logits = jnp.einsum("...htk,...hsk->...hts", q * 8**-0.5, k) + bias
        tap(path, logits)
        y = jnp.einsum("...hts,...hsk->...thk", jax.nn.softmax(logits, axis=-1), v)
        if "gate" in w:
            y = y * jax.nn.sigmoid(jnp.einsum("...td,dhk->...thk", x, w["gate"]))
        return jnp.einsum("...thk,hkd->...td", y, w["o"])

    m, z = layer_norm(msa, p["msa_g"]), layer_norm(pair, p["pair_g"])
    bias = jnp.einsum("ijc,ch->hij", z, p["row"]["b"])
    m = m + mha(m, p["row"], "row", bias)
    m = m + mha(m.swapaxes(0, 1), p["column"], "column").swapaxes(0, 1)
    o = p["outer"]
    left, right = m @ o["a"], m @ o["b"]
    outer = jnp.einsum("sia,sjb->ijab", left, right)
    z = z + jnp.einsum("ijab,abc->ijc", outer, o["o"]) / 3
    t = p["triangle"]
    left, right = z @ t["a"] * jax.nn.sigmoid(z @ t["g"]), z @ t["b"]
    z = z + layer_norm(jnp.einsum("ikr,jkr->ijr", left, right)) @ t["o"]
    bias = jnp.einsum("jkc,ch->hjk", layer_norm(z), p["start"]["b"])
    z = z + mha(layer_norm(z), p["start"], "start", bias)
    return loss_of((z + z.swapaxes(0, 1)) @ p["head"]) + loss_of(m @ p["masked"])


@physics(
    args=(floats(2, 8, 16),), lift="du:d>u", re="uuh:u>u", im="uuh:u>u", local="uu:u>u",
    out="uf:u>f", last="fo:output head",
)  # fmt: skip
def fourier_operator(p, x, **_):
    """Modes are mixed by a matrix each, of real and imaginary parts."""
    x = x @ p["lift"]
    modes = jnp.fft.rfft(x, axis=1)[:, :4]
    mixed = jnp.einsum("bmi,iom->bmo", modes, p["re"] + 1j * p["im"])
    y = jnp.fft.irfft(jnp.pad(mixed, ((0, 0), (0, 1), (0, 0))), n=8, axis=1)
    x = jax.nn.gelu(y + x @ p["local"])
    return jnp.square(jax.nn.gelu(x @ p["out"]) @ p["last"] - 1.0).mean()


@physics(
    args=(MEMORY[:, 0], floats(9, 3)), b1="df:d>f", b2="fr:f>r output head", t1="zu:z>u",
    t2="ur:u>r output head", bias=":elementwise",
)  # fmt: skip
def branch_and_trunk(p, inputs, points, **_):
    """The output is a product of the outputs of two networks, with derivatives in the loss."""

    def field(branch, point):
        return branch @ (jnp.tanh(point @ p["t1"]) @ p["t2"]) + p["bias"]

    branch = jnp.tanh(inputs @ p["b1"]) @ p["b2"]
    values = jax.vmap(lambda b: jax.vmap(lambda point: field(b, point))(points))(branch)
    return jnp.square(values - 1.0).mean()


@physics(args=(MEMORY,), w1="Gf:G>f", w2="fd:f>d", head="dv:d>v output head", sizes=dict(G=17))
def continuous_depth(p, x, **_):
    """Four steps of Runge and Kutta; the time is one more input."""

    def rate(t, x):
        t = jnp.full((*x.shape[:-1], 1), t, x.dtype)
        return jnp.tanh(jnp.concatenate([x, t], axis=-1) @ p["w1"]) @ p["w2"]

    def step(x, t):
        a = rate(t, x)
        b = rate(t + 0.1, x + 0.1 * a)
        return x + 0.1 * (a + 2 * b), None

    x, _ = jax.lax.scan(step, x, jnp.arange(4.0).astype(x.dtype))
    return loss_of(x @ p["head"])


@made(
    args=(MEMORY,), q="dy:d>y", qa="dr:d>r", qb="ry:r>y", k="dy:d>y", v="dy:d>y", va="dr:d>r",
    vb="ry:r>y", o="yd:y>d", head="dv:d>v output head", sites={"": HEADS},
)  # fmt: skip
def adapters(p, x, tap=no_tap):
    """Low-rank adapters of queries and values, beside trained kernels."""
    q = x @ p["q"] + 2.0 * ((x @ p["qa"]) @ p["qb"])
    v = x @ p["v"] + 2.0 * ((x @ p["va"]) @ p["vb"])
    q, k, v = (split_heads(u, 4) for u in (q, x @ p["k"], v))
    out = attend(q, k, v, tap, "", causal=False).swapaxes(1, 2).reshape(2, 6, 32)
    return loss_of((x + out @ p["o"]) @ p["head"])


@made(
    args=(MEMORY,), w="df:d>f", a="dr:d>r", b="rf:r>f", m="f:elementwise", out="fd:f>d",
    head="dv:d>v output head",
)  # fmt: skip
def magnitude_and_direction(p, x, **_):
    """A kernel plus an adapter, divided by the norms of its outputs."""
    v = p["w"] + p["a"] @ p["b"]
    kernel = p["m"] * v / jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0, keepdims=True))
    return loss_of((x + jax.nn.relu(x @ kernel) @ p["out"]) @ p["head"])


@made(
    args=(MEMORY, floats(24)), w="df:?its inputs", out="fd:f>d", ws="ddzz:dzz>d",
    head="dv:d>v output head", sizes=dict(z=3),
)  # fmt: skip
def spectral_norm(p, x, u, **_):
    """A kernel over its largest singular value by a power iteration; a standardized convolution."""
    v = p["w"] @ u
    v = v / jnp.linalg.norm(v)
    sigma = jax.lax.stop_gradient(v) @ p["w"] @ jax.lax.stop_gradient(u)
    x = x + jax.nn.relu(x @ (p["w"] / sigma)) @ p["out"]
    ws = p["ws"] - p["ws"].mean((1, 2, 3), keepdims=True)
    ws = ws / (ws.std((1, 2, 3), keepdims=True) + 1e-5)
    image = jnp.broadcast_to(x.swapaxes(1, 2)[..., None], (2, 16, 6, 6))
    y = jax.lax.conv_general_dilated(image, ws, (1, 1), "SAME")
    return loss_of(y.mean((2, 3)) @ p["head"])


@jax.custom_vjp
def _round(x):
    return jnp.round(x)


_round.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@made(
    args=(MEMORY,), w="df:d>f", ternary="fd:f>d", step="f:elementwise", head="dv:d>v output head",
)  # fmt: skip
def quantized(p, x, **_):
    """An eight-bit product with learned steps, and a kernel of three values."""
    scale = jnp.abs(x).max(-1, keepdims=True) / 127
    xq = jnp.clip(_round(x / scale), -127, 127)
    wq = jnp.clip(_round(p["w"] / p["step"]), -127, 127) * p["step"]
    h = jax.nn.relu((xq @ wq) * scale)
    size = jnp.abs(p["ternary"]).mean()
    three = jnp.clip(jnp.round(p["ternary"] / (size + 1e-5)), -1, 1) * size
    three = p["ternary"] + jax.lax.stop_gradient(three - p["ternary"])
    return loss_of((x + h @ three) @ p["head"])


@made(
    args=(MEMORY, TOKENS[:, 0]), task="vr:looked up", hyper="rdf:r>df", left="huu:u>u",
    right="uhh:h>h", core1="hhr:?", core2="rhh:?", head="dv:d>v output head", sizes=dict(u=4),
)  # fmt: skip
def structured(p, x, task, **_):
    """A kernel that a network puts out, block-diagonal kernels, a chain of small ones."""
    z = p["task"][task]
    kernel = jnp.einsum("br,rdf->bdf", z, p["hyper"])
    h = jax.nn.relu(jnp.einsum("bsd,bdf->bsf", x, kernel))[..., :16]
    blocks = jnp.einsum("bshu,huw->bshw", h.reshape(2, 6, 4, 4), p["left"])
    h = jnp.einsum("bshu,uhg->bsgu", blocks, p["right"]).reshape(2, 6, 16)
    chain = jnp.einsum("air,rbj->abij", p["core1"], p["core2"]).reshape(16, 16)
    return loss_of((x + h @ chain) @ p["head"])
