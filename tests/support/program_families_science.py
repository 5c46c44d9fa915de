"""Graphs, proteins, physics, agents, recommendation, and kernels that are made of others."""

import jax
import jax.numpy as jnp

from tests.support.program_families import (
    LABELS,
    RECEIVERS,
    SENDERS,
    attend,
    cross_entropy,
    flat_attention,
    flat_specs,
    floats,
    group,
    layer_norm,
    split_heads,
)
from tests.support.program_models import MEMORY, TOKENS, loss_of, no_tap, norm

HEADS = (4, 4, 8, 1)
graphs, proteins, physics = group("graph network"), group("protein"), group("operator learning")
agents, items, made = group("agent"), group("recommendation"), group("reparametrization")
NODES, EDGES = MEMORY[0], (SENDERS, RECEIVERS)


@graphs(
    args=(NODES, EDGES, floats(20, 5)), edge1="Hf:H>f", edge2="fr:f>r", node1="Gf:G>f", node2="fd:f>d",
    ln="d:elementwise", head="dv:d>v output head", sizes=dict(H=37, G=28),
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
    args=(NODES, EDGES), w="dhk:d>hk", source="hk:contracted", target="hk:contracted", bias="y:elementwise",
    w2="yd:y>d", head="dv:d>v output head",
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
    args=(floats(6, 3), LABELS[jnp.arange(6) % 2]), emb="vd:looked up", filter1="jf:j>f", filter2="fd:f>d",
    inner="dd:d>d", out="dd:d>d", energy="do:?one of its axes",
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
    args=(floats(3, 6, 16), floats(6, 6, 12)), **_gated("row"), column__q="dhk:d>hk", column__k="dhk:d>hk",
    column__v="dhk:d>hk", column__o="hkd:hk>d", outer__a="da:d>a", outer__b="da:d>a", outer__o="aac:aa>c",
    triangle__a="cr:c>r", triangle__b="cr:c>r", triangle__g="cr:c>r", triangle__o="rc:r>c",
    start__q="chk:c>hk", start__k="chk:c>hk", start__v="chk:c>hk", start__b="ch:c>h", start__o="hkc:hk>c",
    msa_g="d:elementwise", pair_g="c:elementwise", head="cv:c>v output head", masked="dv:d>v output head",
    sites={"row": HEADS, "column": HEADS, "start": HEADS}, sizes=dict(c=12, r=10),
)  # fmt: skip
def evoformer(p, msa, pair, tap=no_tap):
    """Rows with a bias of pairs and gates, columns, outer products, triangles."""

    def mha(x, w, path, bias=0.0):
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
    z = z + jnp.einsum("sia,sjb,abc->ijc", left, right, o["o"]) / 3
    t = p["triangle"]
    left, right = z @ t["a"] * jax.nn.sigmoid(z @ t["g"]), z @ t["b"]
    z = z + layer_norm(jnp.einsum("ikr,jkr->ijr", left, right)) @ t["o"]
    bias = jnp.einsum("jkc,ch->hjk", layer_norm(z), p["start"]["b"])
    z = z + mha(layer_norm(z), p["start"], "start", bias)
    return loss_of((z + z.swapaxes(0, 1)) @ p["head"]) + loss_of(m @ p["masked"])


@physics(
    args=(floats(2, 8, 16),), lift="du:d>u", re="uuh:u>u", im="uuh:u>u", local="uu:u>u", out="uf:u>f",
    last="fo:?one of its axes",
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
    args=(MEMORY[:, 0], floats(9, 3)), b1="df:d>f", b2="fr:f>r output head", t1="zu:z>u", t2="ur:u>r output head",
    bias=":elementwise",
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


@agents(
    args=(MEMORY, TOKENS[:, :6]), torso1="df:d>f", torso2="ff:f>f", b1="f:elementwise",
    policy="fe:f>e output head", value="fo:?one of its axes", log_std="e:elementwise",
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
    return actor + jnp.square(value - 1).mean() + (jnp.exp(logp) * logp).sum(-1).mean() + mean.mean()


@agents(
    args=(MEMORY, TOKENS[:, :6]), online__w1="df:d>f", online__adv="fe:f>e", online__val="fo:?one of its axes",
    target__w1="df:d>f", target__adv="fe:f>e", target__val="fo:?one of its axes",
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
    q2="nfo:?one of its axes", b1="nf:elementwise",
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
    reward="od:?one of its axes", step="wd:looked up", head="dv:d>v output head", **flat_specs("attn"),
    sites={"attn": HEADS},
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
    args=(MEMORY[:, 0], TOKENS[:, :3]), repr="du:d>u", dyn="jf:j>f", dyn2="fu:f>u", one_hot="eu:looked up",
    policy="ue:u>e output head", value="uc:u>c output head",
)  # fmt: skip
def learned_dynamics(p, state, actions, **_):
    """Steps of a learned model; an action is one-hot, beside the state or in a product of its own."""
    h, loss = jnp.tanh(state @ p["repr"]), 0.0
    for t in range(3):
        action = jax.nn.one_hot(actions[:, t] % 4, 4, dtype=h.dtype)
        loss += loss_of(h @ p["policy"]) + loss_of(h @ p["value"])
        h = jax.nn.relu(jnp.concatenate([h, action], axis=-1) @ p["dyn"]) @ p["dyn2"]
        h = jnp.tanh(h + action @ p["one_hot"])
    return loss + loss_of(h @ p["policy"]) + loss_of(h @ p["value"])


@items(
    args=(MEMORY[:, 0], TOKENS[:, :3]), table__0="vk:looked up", table__1="vk:looked up", table__2="vk:looked up",
    bottom1="df:d>f", bottom2="fk:f>k", top1="qf:q>f", top2="fo:?one of its axes",
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
    args=(TOKENS, TOKENS[::-1]), item="vd:looked up", pos="td:elementwise", up="df:d>f", down="fd:f>d",
    **flat_specs("attn"), sites={"attn": HEADS},
)  # fmt: skip
def next_item(p, items, negatives, tap=no_tap):
    """A transformer over items; scores are products with rows of the table."""
    x = p["item"][items] * 4.0 + p["pos"]
    x = x + flat_attention(norm(x), p["attn"], tap, "attn")
    x = norm(x + jax.nn.relu(x @ p["up"]) @ p["down"])[:, :-1]
    good, bad = ((x * p["item"][u[:, 1:]]).sum(-1) for u in (items, negatives))
    return (jax.nn.softplus(-good) + jax.nn.softplus(bad)).mean()


@items(
    args=(TOKENS[:, 0], TOKENS), user="vd:looked up", item="vk:looked up", u1="df:d>f", u2="fr:f>r output head",
    i1="kf:k>f", i2="fr:f>r output head", bag="vk:looked up",
)  # fmt: skip
def retrieval(p, user, history, **_):
    """Users and items meet in a batch; a bag of items is a product with counts."""
    u = jax.nn.relu(p["user"][user] @ p["u1"]) @ p["u2"]
    bag = jax.nn.one_hot(history, 40, dtype=u.dtype) @ p["bag"]
    i = jax.nn.relu((p["item"][history[:, 0]] + bag.mean(1)) @ p["i1"]) @ p["i2"]
    u, i = norm(u), norm(i)
    return cross_entropy(u @ i.T * 20.0, jnp.arange(2))


@items(
    args=(TOKENS, TOKENS[:, 0]), item="vd:looked up", w1="xf:x>f", w2="fo:?one of its axes", top="yr:y>r",
    out="ro:?one of its axes",
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


@made(
    args=(MEMORY,), q="dy:d>y", qa="dr:d>r", qb="ry:r>y", k="dy:d>y", v="dy:d>y", va="dr:d>r", vb="ry:r>y",
    o="yd:y>d", head="dv:d>v output head", sites={"": HEADS},
)  # fmt: skip
def adapters(p, x, tap=no_tap):
    """Low-rank adapters of queries and values, beside trained kernels."""
    q = x @ p["q"] + 2.0 * ((x @ p["qa"]) @ p["qb"])
    v = x @ p["v"] + 2.0 * ((x @ p["va"]) @ p["vb"])
    q, k, v = (split_heads(u, 4) for u in (q, x @ p["k"], v))
    out = attend(q, k, v, tap, "", causal=False).swapaxes(1, 2).reshape(2, 6, 32)
    return loss_of((x + out @ p["o"]) @ p["head"])


@made(
    args=(MEMORY,), w="df:d>f", a="dr:d>r", b="rf:r>f", m="f:elementwise", out="fd:f>d", head="dv:d>v output head",
)  # fmt: skip
def magnitude_and_direction(p, x, **_):
    """A kernel plus an adapter, divided by the norms of its outputs."""
    v = p["w"] + p["a"] @ p["b"]
    kernel = p["m"] * v / jax.lax.stop_gradient(jnp.linalg.norm(v, axis=0, keepdims=True))
    return loss_of((x + jax.nn.relu(x @ kernel) @ p["out"]) @ p["head"])


@made(
    args=(MEMORY, floats(24)), w="df:d>f", out="fd:f>d", ws="ddzz:dzz>d", head="dv:d>v output head",
    sizes=dict(z=3),
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
    args=(MEMORY, TOKENS[:, 0]), task="vr:looked up", hyper="rdf:r>df", left="huu:u>u", right="uhh:h>h",
    core1="hhr:?", core2="rhh:?", head="dv:d>v output head", sizes=dict(u=4),
)  # fmt: skip
def structured(p, x, task, **_):
    """A kernel that a network puts out, a product of block-diagonal kernels, a chain of small ones."""
    z = p["task"][task]
    kernel = jnp.einsum("br,rdf->bdf", z, p["hyper"])
    h = jax.nn.relu(jnp.einsum("bsd,bdf->bsf", x, kernel))[..., :16]
    blocks = jnp.einsum("bshu,huw->bshw", h.reshape(2, 6, 4, 4), p["left"])
    h = jnp.einsum("bshu,uhg->bsgu", blocks, p["right"]).reshape(2, 6, 16)
    chain = jnp.einsum("air,rbj->abij", p["core1"], p["core2"]).reshape(16, 16)
    return loss_of((x + h @ chain) @ p["head"])


