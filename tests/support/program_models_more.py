"""More small models: mixtures of experts, convolutions, recurrences, adapters."""

import jax
import jax.numpy as jnp

from tests.support.program_models import IMAGES, MEMORY, family, hidden, loss_of, no_tap, norm


@family(
    emb="vd:looked up", head="dv:d>v output head", router="de:d>e router",
    up="edf:d>f", down="efd:f>d",
)  # fmt: skip
def experts_dense(p, tokens, **_):
    """Every expert sees every token; gates of the chosen ones are not zero."""
    x = p["emb"][tokens]
    gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    weights = (jax.nn.one_hot(chosen, 4) * gates[..., None]).sum(-2)
    h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, p["up"]))
    x = x + jnp.einsum("btef,efd,bte->btd", h, p["down"], weights)
    return loss_of(x @ p["head"])


@family(
    emb="vd:looked up", head="dv:d>v output head", router="de:d>e router",
    up="edf:d>f", down="efd:f>d",
)  # fmt: skip
def experts_sorted(p, tokens, **_):
    """Tokens sorted by expert, with `ragged_dot`."""
    x = p["emb"][tokens].reshape(-1, 16)
    gates, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
    order = jnp.argsort(chosen.reshape(-1))
    rows = x[order // 2]
    sizes = jnp.bincount(chosen.reshape(-1), length=4)
    h = jax.nn.silu(jax.lax.ragged_dot(rows, p["up"], sizes))
    y = jax.lax.ragged_dot(h, p["down"], sizes) * gates.reshape(-1)[order][:, None]
    x = x + jnp.zeros_like(x).at[order // 2].add(y)
    return loss_of(x @ p["head"])


@family(
    emb="vd:looked up", head="dv:d>v output head", router="de:d>e router",
    up="edf:d>f", down="efd:f>d",
)  # fmt: skip
def experts_dispatched(p, tokens, **_):
    """One-hot dispatch into a buffer for each expert."""
    x = p["emb"][tokens].reshape(-1, 16)
    gate, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 1)
    one_hot = jax.nn.one_hot(chosen[:, 0], 4)
    place = (jnp.cumsum(one_hot, 0) * one_hot).sum(-1) - 1
    dispatch = one_hot[..., None] * jax.nn.one_hot(place.astype(int), 20)[:, None]
    rows = jnp.einsum("nd,nec->ecd", x, dispatch)
    h = jax.nn.gelu(jnp.einsum("ecd,edf->ecf", rows, p["up"]))
    y = jnp.einsum("ecf,efd->ecd", h, p["down"])
    x = x + jnp.einsum("ecd,nec->nd", y, dispatch * gate[..., None])
    return loss_of(x @ p["head"])


@family(
    emb="vd:looked up", head="dv:d>v output head", router="de:d>e router",
    up="edf:d>f", down="efd:f>d",
)  # fmt: skip
def experts_gathered(p, tokens, **_):
    """The kernels of each token's expert are gathered."""
    x = p["emb"][tokens].reshape(-1, 16)
    chosen = jnp.argmax(x @ p["router"], -1)
    h = jax.nn.relu(jnp.einsum("nd,ndf->nf", x, p["up"][chosen]))
    x = x + jnp.einsum("nf,nfd->nd", h, p["down"][chosen])
    return loss_of(x @ p["head"])


def conv(x, w, stride=1, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, w, (stride, stride), "SAME", dimension_numbers=numbers, feature_group_count=groups
    )


@family(
    args=(IMAGES,), stem="zzzd:zzz>d", depthwise="zzod:depthwise", point="oodf:d>f",
    bn__g="f:elementwise", bn__b="f:elementwise", head="fv:f>v output head",
)  # fmt: skip
def convolutions(p, images, **_):
    x = jax.nn.relu(conv(images, p["stem"]))
    x = conv(x, p["depthwise"], groups=16)
    x = conv(x, p["point"], stride=2)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    x = (x - mean) * jax.lax.rsqrt(var + 1e-5) * p["bn"]["g"] + p["bn"]["b"]
    return loss_of(jax.nn.relu(x).mean((1, 2)) @ p["head"])


@family(
    args=(MEMORY,), h0="r:elementwise", wx="dr:d>r", wh="rr:r>r", head="rv:r>v output head",
    b="r:elementwise",
)  # fmt: skip
def recurrent(p, x, **_):
    """A recurrence over the sequence, with a learned start."""

    def step(h, x):
        h = jnp.tanh(x @ p["wx"] + h @ p["wh"] + p["b"])
        return h, h

    start = jnp.broadcast_to(p["h0"], (2, 12))
    return loss_of(jax.lax.scan(step, start, x.swapaxes(0, 1))[1] @ p["head"])


@family(
    args=(MEMORY,), mix_in="sf:s>f", mix_out="fs:f>s", up="df:d>f", down="fd:f>d",
    head="dv:d>v output head",
)  # fmt: skip
def mixer(p, x, **_):
    """Products along tokens, then along channels."""
    y = jnp.einsum("bsd,sf->bfd", norm(x), p["mix_in"])
    x = x + jnp.einsum("bfd,fs->bsd", jax.nn.gelu(y), p["mix_out"])
    x = x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]
    return loss_of(x.mean(1) @ p["head"])


@family(
    args=(MEMORY,), base="df:d>f", a="dr:d>r", b="rf:r>f", merged="fd:f>d", ma="fr:f>r",
    mb="rd:r>d", head="dv:d>v output head",
)  # fmt: skip
def low_rank(p, x, **_):
    """Adapters beside a kernel, and adapters that are added to it."""
    y = x @ p["base"] + (x @ p["a"]) @ p["b"] * 0.5
    x = x + jax.nn.relu(y) @ (p["merged"] + p["ma"] @ p["mb"])
    return loss_of(x @ p["head"])


@family(
    args=(MEMORY,), in_proj="dx:d>x", conv="yz:elementwise", a_log="yr:elementwise",
    bcd="yu:y>u", skip="y:elementwise", out="yd:y>d", head="dv:d>v output head",
)  # fmt: skip
def state_space(p, x, **_):
    """A selective state space: a short convolution by hand, and a recurrence."""
    u, gate = jnp.split(x @ p["in_proj"], 2, -1)
    padded = jnp.pad(u, ((0, 0), (2, 0), (0, 0)))
    u = jax.nn.silu(sum(padded[:, i : i + 6] * p["conv"][:, i] for i in range(3)))
    bcd = u @ p["bcd"]
    delta, b = jax.nn.softplus(bcd[..., :1]), bcd[..., 1:13]
    decay = jnp.exp(delta[..., None] * -jnp.exp(p["a_log"]))

    def step(h, xs):
        a, bx = xs
        h = h * a + bx
        return h, h.sum(-1)

    inner = (delta * u)[..., None] * b[..., None, :]
    start = jnp.zeros((2, 32, 12))
    _, y = jax.lax.scan(step, start, (decay.swapaxes(0, 1), inner.swapaxes(0, 1)))
    y = (y.swapaxes(0, 1) + u * p["skip"]) * jax.nn.silu(gate)
    return loss_of((x + y @ p["out"]) @ p["head"])


@family(
    args=(MEMORY,), v="df:d>f", g="f:elementwise", w="fd:f>d", head="dv:d>v output head",
)  # fmt: skip
def weight_norm(p, x, **_):
    """A kernel divided by the norms of its outputs, and one rounded to eight bits."""
    kernel = p["v"] / jnp.linalg.norm(p["v"], axis=0) * p["g"]
    scale = jnp.abs(p["w"]).max() / 127
    rounded = jnp.round(p["w"] / scale) * scale
    quantized = p["w"] + jax.lax.stop_gradient(rounded - p["w"])
    x = x + jax.nn.relu(x @ kernel) @ quantized
    return loss_of(x @ p["head"]) + 1e-3 * sum(jnp.sum(u**2) for u in (p["v"], p["w"]))


@family(
    args=(MEMORY,), wx="dy:d>y", wh="ky:k>y", b="y:elementwise", head="kv:k>v output head",
)  # fmt: skip
def gated_recurrence(p, x, **_):
    """Four gates in one product, as in an LSTM."""

    def step(state, x):
        h, c = state
        i, f, g, o = jnp.split(x @ p["wx"] + h @ p["wh"] + p["b"], 4, -1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    start = jnp.zeros((2, 8), x.dtype)
    return loss_of(jax.lax.scan(step, (start, start), x.swapaxes(0, 1))[1] @ p["head"])


@family(args=(MEMORY,), w="ldd:d>d", head="dv:d>v output head")
def loop_counter(p, x, **_):
    """Stacked layers, chosen by the counter of a loop."""
    x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)
    return loss_of(x @ p["head"])


@family(args=(MEMORY,), w="dd:?its inputs in one place", head="dv:d>v output head")
def tied_transposed(p, x, **_):
    """A matrix and its transpose."""
    return loss_of(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"].T) @ p["head"])


@family(
    args=(MEMORY,), q="dhk:d>hk", k="dhk:d>hk", v="dhk:d>hk", r="dhk:d>hk",
    u="hk:elementwise", w="hk:elementwise", head="yv:y>v output head",
    sites={"": (4, 4, 16, 1)},
)  # fmt: skip
def relative_positions(p, x, tap=no_tap):
    """Keys of relative positions beside the keys of tokens, as in Transformer-XL."""
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[n]) for n in "qkv")
    positions = jnp.sin(jnp.arange(6)[:, None] * jnp.arange(16) / 3.0).astype(x.dtype)
    r = jnp.einsum("sd,dhk->shk", positions, p["r"])
    logits = jnp.einsum("bthk,bshk->bhts", q + p["u"], k)
    logits = logits + jnp.einsum("bthk,shk->bhts", q + p["w"], r)
    tap("", logits)
    out = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits), v)
    return loss_of(out.reshape(2, 6, 32) @ p["head"])


@family(
    args=(MEMORY,), kv_a="dr:d>r", q="dhk:d>hk", uk="rhk:k>r", uv="rhk:r>k",
    head="yv:y>v output head", sites={"": (4, 1, 12, 1)},
)  # fmt: skip
def absorbed_latent(p, x, tap=no_tap):
    """Latent attention with the up-projection of the keys on the side of the queries."""
    c = x @ p["kv_a"]
    q = jnp.einsum("bthk,rhk->bthr", jnp.einsum("btd,dhk->bthk", x, p["q"]), p["uk"])
    logits = jnp.einsum("bthr,bsr->bhts", q, c)
    tap("", logits)
    out = jnp.einsum("bhts,bsr->bthr", jax.nn.softmax(logits), c)
    return loss_of(jnp.einsum("bthr,rhk->bthk", out, p["uv"]).reshape(2, 6, 32) @ p["head"])


@family(
    args=(MEMORY,), gate="de:d>e", up="edf:d>f", down="efd:f>d", head="dv:d>v output head",
)  # fmt: skip
def experts_soft(p, x, **_):
    """Every expert, weighed by a softmax; the sum over experts is one product."""
    h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, p["up"]))
    y = jnp.einsum("btef,efd,bte->btd", h, p["down"], jax.nn.softmax(x @ p["gate"]))
    return loss_of((x + y) @ p["head"])


@family(
    args=(MEMORY,), up="edf:d>f", down="efd:f>d", head="dv:d>v output head",
)  # fmt: skip
def ensemble(p, x, **_):
    """The mean of several networks, by `vmap`."""
    y = jax.vmap(lambda up, down: jax.nn.silu(x @ up) @ down)(p["up"], p["down"])
    return loss_of((x + y.mean(0)) @ p["head"])


@family(
    args=(MEMORY,), q="hdk:d>hk", c="dr:d>r", k="hrk:k>r", v="hdk:d>hk", mix="hkk:k>k",
    o="hkd:hk>d", head="dv:d>v output head", sites={"": (4, 1, 12, 1)},
)  # fmt: skip
def heads_with_kernels_of_their_own(p, x, tap=no_tap):
    """Absorbed keys, and values with one more kernel for each head: heads are no ensemble."""
    q, v = (jnp.einsum("btd,hdk->bthk", x, p[n]) for n in "qv")
    q, c = jnp.einsum("bthk,hrk->bthr", q, p["k"]), x @ p["c"]
    w = jax.nn.softmax(hidden(jnp.einsum("bthr,bsr->bhts", q, c), tap, ""))
    v = jnp.einsum("bthk,hkj->bthj", v, p["mix"])
    return loss_of((x + jnp.einsum("bhts,bshk,hkd->btd", w, v, p["o"])) @ p["head"])
