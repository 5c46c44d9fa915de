"""Language models: decoders, encoders, encoder-decoders."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.program_families import (
    attend,
    cross_entropy,
    flat_attention,
    flat_specs,
    group,
    layer_norm,
    merge_heads,
    split_heads,
)
from tests.support.program_models import (
    TOKENS,
    hidden,
    layers,
    loss_of,
    no_tap,
    norm,
    rope,
)

HEADS = (4, 4, 8, 1)
decoder, encoder = group("decoder"), group("encoder")
translation = group("encoder-decoder")

_GPT_LAYER = dict(
    g="d:elementwise", b="d:elementwise", c_attn="dp:d>p", c_attn_b="p:elementwise",
    c_proj="ud:u>d", c_fc="df:d>f", c_fc_b="f:elementwise", out="fd:f>d",
)  # fmt: skip


@decoder(
    wte="vd:looked up", wpe="wd:elementwise", ln_f="d:elementwise",
    sites={"h/0": (4, 4, 4, 1), "h/1": (4, 4, 4, 1)},
    **{f"h__{i}__{name}": text for i in (0, 1) for name, text in _GPT_LAYER.items()},
)  # fmt: skip
def nano_gpt(p, tokens, tap=no_tap):
    """Fused flat queries, keys and values with a bias, unrolled layers, tied head."""
    x = p["wte"][tokens] + p["wpe"][: tokens.shape[1]]
    for i, w in p["h"].items():
        qkv = layer_norm(x, w["g"], w["b"]) @ w["c_attn"] + w["c_attn_b"]
        q, k, v = (split_heads(u, 4) for u in jnp.split(qkv, 3, axis=-1))
        x = x + merge_heads(attend(q, k, v, tap, f"h/{i}")) @ w["c_proj"]
        x = x + jax.nn.gelu(x @ w["c_fc"] + w["c_fc_b"]) @ w["out"]
    return cross_entropy(layer_norm(x, p["ln_f"])[:, :-1] @ p["wte"].T, tokens[:, 1:])


@decoder(
    emb="vd:looked up", gamma="d:elementwise", wi="dA:d>A", attn_out="yd:y>d", ff_out="ud:u>d",
    sites={"": (4, 1, 8, 1)},
)  # fmt: skip
def palm(p, tokens, tap=no_tap):
    """Attention and MLP side by side from one product; one key head; interleaved rotations."""

    def rotate(x):
        angle = jnp.arange(10)[:, None] / 100.0 ** (jnp.arange(4) / 4)
        angle = jnp.repeat(angle, 2, axis=-1)
        pairs = x.reshape(*x.shape[:-1], 4, 2)
        turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
        return (x * jnp.cos(angle) + turned * jnp.sin(angle)).astype(x.dtype)

    x = p["emb"][tokens]
    q, k, v, ff, gate = jnp.split(norm(x, p["gamma"]) @ p["wi"], [32, 40, 48, 64], axis=-1)
    q, k = rotate(split_heads(q, 4)) * 8**-0.5, rotate(k)
    logits = hidden(jnp.einsum("bhik,bjk->bhij", q, k), tap, "")
    out = jnp.einsum("bhij,bjk->bhik", jax.nn.softmax(logits), v)
    x = x + merge_heads(out) @ p["attn_out"] + (ff * jax.nn.silu(gate)) @ p["ff_out"]
    return loss_of(x @ p["emb"].T)


@decoder(
    emb="vd:looked up", head="vd:d>v output head", h__attn__q="lgnkd:d>gnk", h__attn__k="lgkd:d>gk",
    h__attn__v="lgkd:d>gk", h__attn__o="ldgnk:gnk>d", h__g="ld:elementwise", h__up="lfd:d>f",
    h__down="ldf:f>d", sites={"h/attn": (4, 2, 8, 3)},
)  # fmt: skip
def llama_outputs_first(p, tokens, tap=no_tap):
    """Outputs-first storage, groups of queries on an axis of their own, one example at a time."""

    def step(x, w):
        def one(x):
            h, a = norm(x, w["g"]), w["attn"]
            q = jnp.tensordot(h, a["q"], ((1,), (3,)))
            k, v = (jnp.tensordot(h, a[n], ((1,), (2,))) for n in "kv")
            q, k = (rope(u.reshape(10, -1, 8), jnp.arange(10)) for u in (q, k))
            return jnp.einsum("tgnk,sgk->gnts", q.reshape(10, 2, 2, 8), k) / 8**0.5, v

        logits, v = jax.vmap(one)(x)
        weights = jax.nn.softmax(hidden(logits, tap, "h/attn"), axis=-1)
        x = x + jnp.einsum("bgnts,bsgk,dgnk->btd", weights, v, w["attn"]["o"])
        return x + jax.nn.silu(x @ w["up"].T) @ w["down"].T

    return loss_of(layers(step, p["emb"][tokens], p["h"], tap) @ p["head"].T)


@decoder(
    emb="vd:looked up", h__q="lhdk:d>hk", h__k="lgdk:d>gk", h__v="lgdk:d>gk", h__o="lhkd:hk>d",
    h__qn="lk:elementwise", h__kn="lk:elementwise", h__g="ld:elementwise",
    sites={"h": (4, 2, 8, 3, "qk_norm")},
)  # fmt: skip
def local_and_global(p, tokens, tap=no_tap):
    """Sliding windows in some layers of a scan, by a flag; normalized queries and keys."""

    def step(x, w):
        w, is_local = w
        h = norm(x, 1 + w["g"])
        q, k, v = (jnp.einsum("btd,hdk->bthk", h, w[n]) for n in "qkv")
        q, k = norm(q, 1 + w["qn"]), norm(k, 1 + w["kn"])
        k, v = (jnp.repeat(u, 2, axis=2) for u in (k, v))
        near = jnp.arange(10)[:, None] - jnp.arange(10) < 4
        mask = jnp.tri(10, dtype=bool) & (near | ~is_local)
        logits = jnp.einsum("bthk,bshk->bhts", q, k)
        tap("h", jnp.where(mask, logits, -jnp.inf))
        weights = jax.nn.softmax(jnp.where(mask, logits, -1e30), axis=-1)
        return x + jnp.einsum("bhts,bshk,hkd->btd", weights, v, w["o"])

    x = layers(step, p["emb"][tokens] * 4.0, (p["h"], jnp.array([True, True, False])), tap)
    return loss_of(norm(x) @ p["emb"].T)


@decoder(
    emb="vd:looked up", qkv="dhzk:d>hk", bias="hzk:elementwise", dense="hkd:hk>d",
    ln="d:elementwise", ln_b="d:elementwise", sites={"": HEADS},
)  # fmt: skip
def bloom(p, tokens, tap=no_tap):
    """Slopes of positions added to logits; queries, keys and values beside each other by head."""
    x = layer_norm(p["emb"][tokens], p["ln"], p["ln_b"])
    fused = jnp.einsum("btd,dhzk->bthzk", x, p["qkv"]) + p["bias"]
    q, k, v = fused[..., 0, :], fused[..., 1, :], fused[..., 2, :]
    slopes = 2.0 ** -jnp.arange(1, 5)[:, None, None]
    alibi = slopes * jnp.arange(10.0)
    logits = jnp.einsum("bthk,bshk->bhts", q, k) / np.sqrt(8) + alibi.astype(q.dtype)
    weights = jax.nn.softmax(hidden(logits, tap, ""), axis=-1)
    x = x + jnp.einsum("bhts,bshk,hkd->btd", weights, v, p["dense"])
    return loss_of(x @ p["emb"].T)


@decoder(
    emb="vd:looked up", head="dv:d>v output head", proj="yd:y>d", attn__wq="dy:d>y",
    attn__wk="dy:d>y", attn__wv="dy:d>y", attn__wo="yd:y>d", mtp__wq="dy:d>y", mtp__wk="dy:d>y",
    mtp__wv="dy:d>y", mtp__wo="yd:y>d", sites={"attn": HEADS, "mtp": HEADS},
)  # fmt: skip
def several_tokens_ahead(p, tokens, tap=no_tap):
    """A module for the token after the next, with the same head."""
    x = p["emb"][tokens]
    x = x + flat_attention(norm(x), p["attn"], tap, "attn")
    first = loss_of(norm(x) @ p["head"])
    ahead = p["emb"][jnp.roll(tokens, -1, axis=1)]
    y = jnp.concatenate([norm(x), norm(ahead)], axis=-1) @ p["proj"]
    y = y + flat_attention(norm(y), p["mtp"], tap, "mtp")
    return first + 0.3 * loss_of(norm(y) @ p["head"])


@decoder(
    emb="vd:looked up", head="dv:d>v output head", sites={"attn": HEADS}, up="df:d>f",
    down="fd:f>d", **flat_specs("attn"),
)  # fmt: skip
def looped_layer(p, tokens, tap=no_tap):
    """One layer, applied three times in a scan over nothing."""

    def step(x, tap):
        x = x + flat_attention(norm(x), p["attn"], tap, "attn")
        return x + jax.nn.relu(x @ p["up"]) @ p["down"]

    x, seen = p["emb"][tokens], []
    if tap is no_tap:
        x, _ = jax.lax.scan(lambda x, _: (step(x, no_tap), None), x, None, length=3)
    else:
        for _ in range(3):
            x = step(x, lambda path, logits: seen.append(logits))
        tap("attn", jnp.stack(seen).max(0))
    return loss_of(x @ p["head"])


@decoder(
    emb="vd:looked up", head="dv:d>v output head", h__0__q="dhk:d>hk", h__0__k="dhk:d>hk",
    h__0__v="dhk:d>hk", h__0__o="hkd:hk>d", h__1__q="dhk:d>hk", h__1__o="hkd:hk>d",
    sites={"h/0": HEADS, "h": HEADS},
)  # fmt: skip
def shared_keys(p, tokens, tap=no_tap):
    """The second layer attends to the keys and values of the first."""
    x, kv = p["emb"][tokens], {}
    for i, w in p["h"].items():
        h = norm(x)
        kv |= {n: jnp.einsum("btd,dhk->bhtk", h, w[n]) for n in "kv" if n in w}
        q = jnp.einsum("btd,dhk->bhtk", h, w["q"])
        out = attend(q, kv["k"], kv["v"], tap, "h/0" if i == "0" else "h")
        x = x + jnp.einsum("bhtk,hkd->btd", out, w["o"])
    return loss_of(x @ p["head"])


@decoder(
    emb="vd:looked up", head="dv:d>v output head", attn__q="dhk:d>hk", attn__qr="dhc:d>hc",
    kv_a="dj:d>j", attn__k="uhk:u>hk", attn__v="uhk:u>hk", attn__o="hkd:hk>d",
    kv_norm="u:elementwise", router="de:d>e router", e_bias="e:elementwise", gate="edf:d>f",
    up="edf:d>f", down="efd:f>d", shared__up="df:d>f", shared__down="fd:f>d",
    sites={"": (4, 4, 12, 1)}, sizes=dict(c=4),
)  # fmt: skip
def deep_seek(p, tokens, tap=no_tap):
    """Logits as a sum of two products; sigmoid gates with a bias that only chooses."""
    x, a, t = p["emb"][tokens], p["attn"], jnp.arange(10)
    q, qr = (jnp.einsum("btd,dhk->bthk", norm(x), a[n]) for n in ("q", "qr"))
    c, kr = jnp.split(norm(x) @ p["kv_a"], [16], axis=-1)
    k, v = (jnp.einsum("btu,uhk->bthk", norm(c, p["kv_norm"]), a[n]) for n in "kv")
    qr, kr = rope(qr, t), rope(kr[:, :, None], t)[:, :, 0]
    logits = jnp.einsum("bthk,bshk->bhts", q, k) + jnp.einsum("bthk,bsk->bhts", qr, kr)
    weights = jax.nn.softmax(hidden(logits * 0.2, tap, ""), axis=-1)
    x = x + jnp.einsum("bhts,bshk,hkd->btd", weights, v, a["o"])

    scores = jax.nn.sigmoid(x @ p["router"])
    _, chosen = jax.lax.top_k(scores + p["e_bias"], 2)
    gates = jnp.take_along_axis(scores, chosen, axis=-1)
    gates = gates / gates.sum(-1, keepdims=True)
    combine = jnp.einsum("btce,btc->bte", jax.nn.one_hot(chosen, 4), gates)
    h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, p["gate"]))
    h = h * jnp.einsum("btd,edf->btef", x, p["up"])
    y = jnp.einsum("btef,efd->bted", h, p["down"])
    s = jax.nn.silu(x @ p["shared"]["up"]) @ p["shared"]["down"]
    return loss_of((x + s + jnp.einsum("bted,bte->btd", y, combine)) @ p["head"])


@encoder(
    word="vd:looked up", type="nd:looked up", pos="wd:looked up", ln="d:elementwise",
    mlm__w="du:d>u", mlm__b="v:elementwise", pooler="dd:d>d", nsp="dn:d>n output head",
    q__w="dy:d>y", q__b="y:elementwise", k__w="dy:d>y", k__b="y:elementwise", v__w="dy:d>y",
    o__w="yd:y>d", sites={"": HEADS},
)  # fmt: skip
def bert(p, tokens, tap=no_tap):
    """Three tables, two heads: masked tokens by the tied table, and the next sentence."""
    types = (jnp.arange(10) > 4).astype(jnp.int32)[None].repeat(2, 0)
    x = p["word"][tokens] + jnp.take(p["type"], types, axis=0) + p["pos"][jnp.arange(10)][None]
    x = layer_norm(x, p["ln"])
    q, k = (split_heads(x @ p[n]["w"] + p[n]["b"], 4) for n in "qk")
    v = split_heads(x @ p["v"]["w"], 4)
    x = layer_norm(x + merge_heads(attend(q, k, v, tap, "", causal=False)) @ p["o"]["w"])
    h = layer_norm(jax.nn.gelu(x @ p["mlm"]["w"]))
    masked = cross_entropy(h @ p["word"].T + p["mlm"]["b"], tokens)
    return masked + loss_of(jnp.tanh(x[:, 0] @ p["pooler"]) @ p["nsp"])


@encoder(
    word="vd:looked up", rel="jd:?multiplied", head="dv:d>v output head", attn__wq="dy:?its axes",
    attn__wk="dy:?its axes", attn__wv="dy:d>y", attn__wo="yd:y>d", sites={"attn": (4, 4, 16, 1)},
)  # fmt: skip
def deberta(p, tokens, tap=no_tap):
    """Content to position and back, with the kernels of the content, picked along the keys."""
    x, a = p["word"][tokens], p["attn"]
    q, k, v = (split_heads(x @ a[n], 4) for n in ("wq", "wk", "wv"))
    rq, rk = (split_heads(p["rel"] @ a[n], 4) for n in ("wq", "wk"))
    index = jnp.clip(jnp.arange(10)[:, None] - jnp.arange(10) + 10, 0, 19)
    index = jnp.broadcast_to(index, (2, 4, 10, 10))
    c2p = jnp.take_along_axis(jnp.einsum("bhtk,hrk->bhtr", q, rk), index, axis=-1)
    p2c = jnp.take_along_axis(jnp.einsum("bhtk,hrk->bhtr", k, rq), index, axis=-1).swapaxes(-1, -2)
    logits = (jnp.einsum("bhtk,bhsk->bhts", q, k) + c2p + p2c) / 24**0.5
    weights = jax.nn.softmax(hidden(logits, tap, "attn", causal=False), axis=-1)
    x = x + merge_heads(weights @ v) @ a["wo"]
    return loss_of(x @ p["head"])


_T5 = [("encoder__attn", "d", "y"), ("decoder__attn", "d", "y"), ("decoder__cross", "d", "y")]


@translation(
    args=(TOKENS, TOKENS[::-1]), shared="vd:looked up", bias="bh:looked up",
    lm_head="dv:d>v output head", encoder__wi_0="df:d>f", encoder__wi_1="df:d>f",
    encoder__wo="fd:f>d", encoder__g="d:elementwise",
    sites={"encoder/attn": HEADS, "decoder/attn": HEADS, "decoder/cross": HEADS},
    **{name: text for case in _T5 for name, text in flat_specs(*case).items()},
)  # fmt: skip
def t5(p, source, target, tap=no_tap):
    """Logits without a scale, with a table of relative positions; gated MLP."""

    def mha(x, a, path, memory, causal, bias=None):
        q, k, v = (split_heads(u, 4) for u in (x @ a["wq"], memory @ a["wk"], memory @ a["wv"]))
        logits = jnp.einsum("bhtk,bhsk->bhts", q, k)
        logits = hidden(logits if bias is None else logits + bias, tap, path, causal)
        return merge_heads(jnp.einsum("bhts,bhsk->bhtk", jax.nn.softmax(logits), v)) @ a["wo"]

    distance = jnp.clip(jnp.abs(jnp.arange(10)[:, None] - jnp.arange(10)), 0, 6)
    bias = jnp.transpose(p["bias"][distance], (2, 0, 1))[None]
    e, d = p["encoder"], p["decoder"]
    y = norm(p["shared"][source], e["g"])
    y = y + mha(y, e["attn"], "encoder/attn", y, False, bias)
    y = y + (jax.nn.gelu(y @ e["wi_0"]) * (y @ e["wi_1"])) @ e["wo"]
    x = p["shared"][target]
    x = x + mha(norm(x), d["attn"], "decoder/attn", norm(x), True, bias)
    x = x + mha(norm(x), d["cross"], "decoder/cross", norm(y), False)
    return loss_of(x @ p["lm_head"])
