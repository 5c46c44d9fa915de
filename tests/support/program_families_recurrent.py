"""Recurrences: state spaces, gated and delta rules, memories, and attention over a recurrence."""

import jax
import jax.numpy as jnp

from tests.support.program_families import conv, flat_attention, flat_specs, group, layer_norm
from tests.support.program_models import MEMORY, TOKENS, loss_of, no_tap, norm

HEADS = (4, 4, 8, 1)
spaces, linear, cells = group("state space"), group("gated recurrence"), group("recurrent network")


@spaces(
    args=(MEMORY,), in_proj="dx:d>x", conv="hoy:depthwise", conv_b="y:elementwise", x_proj="yj:y>j",
    dt_proj="hy:h>y", dt_b="y:elementwise", a_log="yF:elementwise", skip="y:elementwise",
    out_proj="yd:y>d", head="dv:d>v output head",
)  # fmt: skip
def mamba(p, x, **_):
    """A depthwise convolution, low-rank steps, an associative scan."""
    u, gate = jnp.split(norm(x) @ p["in_proj"], 2, axis=-1)
    pad, names = [(3, 0)], ("NWC", "WIO", "NWC")
    u = jax.nn.silu(conv(u, p["conv"], padding=pad, groups=32, numbers=names) + p["conv_b"])
    dt, b, c = jnp.split(u @ p["x_proj"], [4, 12], axis=-1)
    dt = jax.nn.softplus(dt @ p["dt_proj"] + p["dt_b"])
    decay = jnp.exp(dt[..., None] * -jnp.exp(p["a_log"]))
    inner = (dt * u)[..., None] * b[:, :, None]

    def join(one, two):
        return one[0] * two[0], one[1] * two[0] + two[1]

    _, h = jax.lax.associative_scan(join, (decay, inner), axis=1)
    y = jnp.einsum("bsyn,bsn->bsy", h, c) + u * p["skip"]
    return loss_of((x + (y * jax.nn.silu(gate)) @ p["out_proj"]) @ p["head"])


@spaces(
    args=(MEMORY,), in_proj="dI:d>I", a_log="h:elementwise", dt_b="h:elementwise",
    gain="y:elementwise", out_proj="yd:y>d", head="dv:d>v output head", sizes=dict(I=84),
)  # fmt: skip
def state_space_dual(p, x, **_):
    """Chunks as products of two activations with decays, no softmax."""
    z, u, b, c, dt = jnp.split(norm(x) @ p["in_proj"], [32, 64, 72, 80], axis=-1)
    dt = jax.nn.softplus(dt + p["dt_b"])
    u = u.reshape(2, 6, 4, 8)
    total = jnp.cumsum(dt * -jnp.exp(p["a_log"]), axis=1)
    between = total[:, :, None] - total[:, None]
    mask = jnp.tri(6, dtype=bool)[None, :, :, None]
    decay = jnp.exp(jnp.where(mask, between, -jnp.inf))
    scores = jnp.einsum("btn,bsn->bts", c, b)
    y = jnp.einsum("bts,btsh,bsh,bshk->bthk", scores, decay, dt, u).reshape(2, 6, 32)
    y = norm(y * jax.nn.silu(z), p["gain"])
    return loss_of((x + y @ p["out_proj"]) @ p["head"])


@spaces(
    args=(MEMORY,), nu="r:elementwise", theta="r:elementwise", b_re="dr:d>r", b_im="dr:d>r",
    c_re="rd:r>d", c_im="rd:r>d", skip="d:elementwise", glu="dy:d>y", head="dv:d>v output head",
)  # fmt: skip
def linear_recurrent_unit(p, x, **_):
    """Complex states: kernels are real and imaginary parts."""
    pole = jnp.exp(-jnp.exp(p["nu"]) + 1j * jnp.exp(p["theta"]))
    inner = x @ (p["b_re"] + 1j * p["b_im"])

    def step(h, u):
        h = pole * h + u
        return h, h

    start = jnp.zeros((2, 12), inner.dtype)
    h = jax.lax.scan(step, start, inner.swapaxes(0, 1))[1].swapaxes(0, 1)
    y = (h @ (p["c_re"] + 1j * p["c_im"])).real + x * p["skip"]
    a, b = jnp.split(jax.nn.gelu(y) @ p["glu"], 2, axis=-1)
    return loss_of((x + a * jax.nn.sigmoid(b)) @ p["head"])


@spaces(
    args=(MEMORY,), proj="dp:d>p", filter1="zf:z>f", filter2="fd:f>d", skip="d:elementwise",
    out="dd:d>d", head="dv:d>v output head",
)  # fmt: skip
def long_convolution(p, x, **_):
    """Filters from a small network of positions, convolved by Fourier transforms."""
    q, k, v = jnp.split(x @ p["proj"], 3, axis=-1)
    t = jnp.linspace(0, 1, 6, dtype=x.dtype)[:, None]
    code = jnp.concatenate([t, jnp.sin(t), jnp.cos(t)], axis=-1)
    filters = jnp.sin(code @ p["filter1"]) @ p["filter2"] * jnp.exp(-t)
    u = k * v
    wave = jnp.fft.rfft(u, n=12, axis=1) * jnp.fft.rfft(filters, n=12, axis=0)
    y = jnp.fft.irfft(wave, n=12, axis=1)[:, :6] + u * p["skip"]
    return loss_of((x + (q * y) @ p["out"]) @ p["head"])


@linear(
    args=(MEMORY,), qkv="dp:d>p", conv="hop:depthwise", beta="dn:d>n", alpha="dn:d>n",
    a_log="n:elementwise", dt_b="n:elementwise", gate="du:d>u", gain="k:elementwise", o="ud:u>d",
    head="dv:d>v output head",
)  # fmt: skip
def gated_delta_net(p, x, **_):
    """The delta rule with decay; keys are normalized, outputs gated."""
    h = norm(x)
    names = ("NWC", "WIO", "NWC")
    mixed = jax.nn.silu(conv(h @ p["qkv"], p["conv"], padding=[(3, 0)], groups=48, numbers=names))
    q, k, v = (u.reshape(2, 6, 2, 8) for u in jnp.split(mixed, 3, axis=-1))
    q, k = (u / jnp.sqrt(jnp.sum(u * u, axis=-1, keepdims=True) + 1e-6) for u in (q, k))
    beta = jax.nn.sigmoid(h @ p["beta"])
    decay = jnp.exp(-jnp.exp(p["a_log"]) * jax.nn.softplus(h @ p["alpha"] + p["dt_b"]))

    def step(state, xs):
        q, k, v, beta, decay = xs
        state = state * decay[..., None, None]
        delta = (v - jnp.einsum("bhkj,bhk->bhj", state, k)) * beta[..., None]
        state = state + k[..., None] * delta[..., None, :]
        return state, jnp.einsum("bhkj,bhk->bhj", state, q)

    start = jnp.zeros((2, 2, 8, 8), x.dtype)
    xs = jax.tree.map(lambda u: u.swapaxes(0, 1), (q, k, v, beta, decay))
    y = jax.lax.scan(step, start, xs)[1].swapaxes(0, 1)
    y = norm(y, p["gain"]).reshape(2, 6, 16) * jax.nn.silu(h @ p["gate"])
    return loss_of((x + y @ p["o"]) @ p["head"])


@linear(
    args=(MEMORY,), mix="zd:elementwise", r="dy:d>y", k="dy:d>y", v="dy:d>y", decay="y:elementwise",
    bonus="y:elementwise", o="yd:y>d", ck="df:d>f", cv="fd:f>d", cr="dd:d>d",
    head="dv:d>v output head",
)  # fmt: skip
def rwkv(p, x, **_):
    """A weighted mean of all before, with a running maximum of keys."""
    before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    xr, xk, xv = (x * m + before * (1 - m) for m in p["mix"])
    r, k, v = jax.nn.sigmoid(xr @ p["r"]), xk @ p["k"], xv @ p["v"]
    decay = -jnp.exp(p["decay"])

    def step(state, kv):
        top, a, b = state
        k, v = kv
        high = jnp.maximum(top, p["bonus"] + k)
        old, new = jnp.exp(top - high), jnp.exp(p["bonus"] + k - high)
        out = (old * a + new * v) / (old * b + new)
        high = jnp.maximum(top + decay, k)
        old, new = jnp.exp(top + decay - high), jnp.exp(k - high)
        return (high, old * a + new * v, old * b + new), out

    zeros = jnp.zeros((2, 32), x.dtype)
    start = (zeros - 1e30, zeros, zeros)
    _, y = jax.lax.scan(step, start, (k.swapaxes(0, 1), v.swapaxes(0, 1)))
    x = x + (r * y.swapaxes(0, 1)) @ p["o"]
    h = jnp.square(jax.nn.relu(x @ p["ck"])) @ p["cv"]
    return loss_of((x + jax.nn.sigmoid(x @ p["cr"]) * h) @ p["head"])


@linear(
    args=(MEMORY,), q="dhk:d>hk", k="dhk:d>hk", v="dhk:d>hk", i="dh:d>h", f="dh:d>h", o="hkd:hk>d",
    head="dv:d>v output head",
)  # fmt: skip
def matrix_memory(p, x, **_):
    """Exponential gates with a row maximum, beside queries times keys, as in an mLSTM."""
    q, k, v = (jnp.einsum("btd,dhk->bhtk", x, p[n]) for n in "qkv")
    i, f = (jnp.einsum("btd,dh->bht", x, p[n]) for n in "if")
    total = jnp.cumsum(jax.nn.log_sigmoid(f), axis=-1)
    gates = total[..., :, None] - total[..., None, :] + i[..., None, :]
    gates = jnp.where(jnp.tri(6, dtype=bool), gates, -jnp.inf)
    top = gates.max(-1, keepdims=True)
    scores = jnp.einsum("bhtk,bhsk->bhts", q, k) * jnp.exp(gates - top)
    size = jnp.maximum(jnp.abs(scores.sum(-1, keepdims=True)), jnp.exp(-top))
    y = jnp.einsum("bhts,bhsk->bthk", scores / size, v)
    return loss_of((x + jnp.einsum("bthk,hkd->btd", y, p["o"])) @ p["head"])


@linear(
    emb="vd:looked up", rec__x="dy:d>y", rec__y="dy:d>y", rec__conv="zy:elementwise",
    rec__a="y:elementwise", rec__gate_a="hkk:k>k", rec__gate_x="hkk:k>k", rec__out="yd:y>d",
    attn__q="dy:d>y", attn__k="dk:d>k", attn__v="dk:d>k", attn__o="yd:y>d",
    sites={"attn": (4, 1, 8, 1)},
)  # fmt: skip
def griffin(p, tokens, tap=no_tap):
    """A recurrence with gates of block-diagonal kernels, then local attention with one key head."""
    x, w, a = p["emb"][tokens], p["rec"], p["attn"]
    y = jax.nn.gelu(norm(x) @ w["y"])
    u = norm(x) @ w["x"]
    u = sum(jnp.pad(u, ((0, 0), (i, 0), (0, 0)))[:, :10] * w["conv"][i] for i in range(3))
    blocks = u.reshape(2, 10, 4, 8)
    gate_a, gate_x = (
        jax.nn.sigmoid(jnp.einsum("bthi,hij->bthj", blocks, w[n])).reshape(2, 10, 32)
        for n in ("gate_a", "gate_x")
    )
    decay = jnp.exp(-8.0 * gate_a * jax.nn.softplus(w["a"]))
    inner = jnp.sqrt(1 - decay**2 + 1e-6) * gate_x * u

    def step(h, xs):
        h = xs[0] * h + xs[1]
        return h, h

    start = jnp.zeros((2, 32), x.dtype)
    h = jax.lax.scan(step, start, (decay.swapaxes(0, 1), inner.swapaxes(0, 1)))[1].swapaxes(0, 1)
    x = x + (h * y) @ w["out"]
    q, k, v = norm(x) @ a["q"], norm(x) @ a["k"], norm(x) @ a["v"]
    near = jnp.tri(10, dtype=bool) & ~jnp.tri(10, k=-4, dtype=bool)
    logits = jnp.einsum("bthk,bsk->bhts", q.reshape(2, 10, 4, 8), k) * 0.3
    tap("attn", jnp.where(near, logits, -jnp.inf))
    weights = jax.nn.softmax(jnp.where(near, logits, -2e38), axis=-1)
    out = jnp.einsum("bhts,bsk->bthk", weights, v).reshape(2, 10, 32)
    return loss_of((x + out @ a["o"]) @ p["emb"].T)


@cells(
    args=(MEMORY,), fwd__wi="dp:d>p", fwd__wh="up:u>p", bwd__wi="dp:d>p", bwd__wh="up:u>p",
    fwd__b="p:elementwise", head="yv:y>v output head",
)  # fmt: skip
def both_directions(p, x, **_):
    """A gated recurrent unit in each direction; its gates are slices of one product."""

    def run(w, x, bias=0.0):
        def step(h, u):
            zr_x, a_x = jnp.split(u @ w["wi"] + bias, [32], axis=-1)
            zr_h = h @ w["wh"][:, :32]
            z, r = jnp.split(jax.nn.sigmoid(zr_x + zr_h), 2, axis=-1)
            a = jnp.tanh(a_x + (r * h) @ w["wh"][:, 32:])
            h = (1 - z) * h + z * a
            return h, h

        return jax.lax.scan(step, jnp.zeros((2, 16), x.dtype), x.swapaxes(0, 1))[1].swapaxes(0, 1)

    forward = run(p["fwd"], x, p["fwd"]["b"])
    backward = run(p["bwd"], x[:, ::-1])[:, ::-1]
    return loss_of(jnp.concatenate([forward, backward], axis=-1) @ p["head"])


@cells(
    args=(TOKENS, MEMORY), emb="vd:looked up", wi="dy:d>y", wh="yy:y>y", score="yd:d>y",
    out="pd:p>d", head="dv:d>v output head", sites={"": (1, 1, 32, 1, "faults")},
)  # fmt: skip
def luong(p, tokens, memory, tap=no_tap):
    """A decoder whose state attends to a memory by one product; the states carry no kernel."""
    keys = memory @ p["score"].T

    def step(h, u):
        h = jnp.tanh(u @ p["wi"] + h @ p["wh"])
        logits = jnp.einsum("by,bsy->bs", h, keys)
        context = jnp.einsum("bs,bsd->bd", jax.nn.softmax(logits, axis=-1), memory)
        return h, (logits, jnp.tanh(jnp.concatenate([h, context], axis=-1) @ p["out"]))

    start = jnp.zeros((2, 32), memory.dtype)
    _, (logits, y) = jax.lax.scan(step, start, p["emb"][tokens].swapaxes(0, 1))
    tap("", logits.transpose(1, 0, 2)[:, None])
    return loss_of(y @ p["head"])


@cells(
    args=(TOKENS, MEMORY), emb="vd:looked up", wi="dy:d>y", wh="yy:y>y", w="yr:y>r", u="dr:d>r",
    v="r:contracted", head="pv:p>v output head",
)  # fmt: skip
def bahdanau(p, tokens, memory, **_):
    """Additive attention: its logits are no product of activations."""
    keys = memory @ p["u"]

    def step(h, x):
        h = jnp.tanh(x @ p["wi"] + h @ p["wh"])
        logits = jnp.tanh((h @ p["w"])[:, None] + keys) @ p["v"]
        context = jnp.einsum("bs,bsd->bd", jax.nn.softmax(logits, axis=-1), memory)
        return h, jnp.concatenate([h, context], axis=-1)

    start = jnp.zeros((2, 32), memory.dtype)
    _, y = jax.lax.scan(step, start, p["emb"][tokens].swapaxes(0, 1))
    return loss_of(y @ p["head"])


@cells(
    emb="vd:looked up", head="dv:d>v output head", **flat_specs("attn"), cell="dd:d>d",
    inp="dd:d>d", g="d:elementwise", sites={"attn": HEADS},
)  # fmt: skip
def attention_then_recurrence(p, tokens, tap=no_tap):
    """A while loop over the sequence after attention."""
    x = p["emb"][tokens]
    x = x + flat_attention(layer_norm(x, p["g"]), p["attn"], tap, "attn")

    def step(t, h):
        return jnp.tanh(x[:, t] @ p["inp"] + h @ p["cell"])

    h = jax.lax.fori_loop(0, 10, step, jnp.zeros((2, 16), x.dtype))
    return loss_of(h @ p["head"])
