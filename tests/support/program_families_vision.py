"""Vision, diffusion, several modalities, and queries that are learned."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.support.program_families import (
    LABELS,
    TIMES,
    attend,
    conv,
    cross_entropy,
    flat_attention,
    flat_specs,
    floats,
    group,
    layer_norm,
    merge_heads,
    split_heads,
)
from tests.support.program_models import IMAGES, MEMORY, TOKENS, loss_of, no_tap, norm

HEADS = (4, 4, 8, 1)
vision, diffusion, towers = group("vision transformer"), group("diffusion"), group("two towers")
convnet, latents, fields = group("convnet"), group("learned queries"), group("fields and flows")


@vision(
    args=(IMAGES,), patch="hhzd:hhz>d", patch_b="d:elementwise", cls="ood:elementwise",
    pos="oad:elementwise", head="dv:d>v output head", head_b="v:elementwise", up="df:d>f",
    down="fd:f>d", q="dhk:d>hk", q_b="hk:elementwise", k="dhk:d>hk", k_b="hk:elementwise",
    v="dhk:d>hk", o="hkd:hk>d", sites={"": HEADS},
)  # fmt: skip
def vit_with_a_class_token(p, images, tap=no_tap):
    """Patches by a convolution, a class token in front."""
    x = conv(images, p["patch"], 4, "VALID") + p["patch_b"]
    x = x.reshape(2, -1, 16)
    x = jnp.concatenate([jnp.broadcast_to(p["cls"], (2, 1, 16)), x], axis=1) + p["pos"]
    q, k = (jnp.einsum("btd,dhk->bhtk", norm(x), p[n]) + p[f"{n}_b"][:, None] for n in "qk")
    v = jnp.einsum("btd,dhk->bhtk", norm(x), p["v"])
    x = x + jnp.einsum("bhtk,hkd->btd", attend(q, k, v, tap, "", causal=False), p["o"])
    x = x + jax.nn.gelu(x @ p["up"]) @ p["down"]
    return loss_of(layer_norm(x)[:, 0] @ p["head"] + p["head_b"])


_SWIN = dict(qkv="dp:d>p", qkv_b="p:elementwise", table="ih:looked up", proj="ud:u>d")


@vision(
    args=(IMAGES,), patch="nnzd:nnz>d", merge="xy:x>y", head="yv:y>v output head",
    sites={"blocks/0": (4, 4, 4, 1), "blocks/1": (4, 4, 4, 1)},
    **{f"blocks__{i}__{name}": text for i in (0, 1) for name, text in _SWIN.items()},
)  # fmt: skip
def swin(p, images, tap=no_tap):
    """Shifted windows, a table of relative positions, merged patches."""
    x = conv(images, p["patch"], 2, "VALID")
    where = np.stack(np.meshgrid(*2 * [np.arange(2)], indexing="ij")).reshape(2, -1)
    index = (where[:, :, None] - where[:, None] + 1).transpose(1, 2, 0) @ np.array([3, 1])
    for i, w in p["blocks"].items():
        shift = int(i)
        h = jnp.roll(norm(x), (-shift, -shift), axis=(1, 2))
        h = h.reshape(2, 2, 2, 2, 2, 16).transpose(0, 1, 3, 2, 4, 5).reshape(8, 4, 16)
        qkv = (h @ w["qkv"] + w["qkv_b"]).reshape(8, 4, 3, 4, 4).transpose(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        bias = w["table"][index.reshape(-1)].reshape(4, 4, 4).transpose(2, 0, 1)
        logits = q * 0.5 @ k.swapaxes(-1, -2) + bias[None]
        tap(f"blocks/{i}", logits)
        h = (jax.nn.softmax(logits, axis=-1) @ v).transpose(0, 2, 1, 3).reshape(8, 4, 16) @ w[
            "proj"
        ]
        h = h.reshape(2, 2, 2, 2, 2, 16).transpose(0, 1, 3, 2, 4, 5).reshape(2, 4, 4, 16)
        x = x + jnp.roll(h, (shift, shift), axis=(1, 2))
    x = jnp.concatenate([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], axis=-1)
    return loss_of(jax.nn.relu(x @ p["merge"]).mean((1, 2)) @ p["head"])


@vision(
    args=(MEMORY, floats(2, 6)), mask="ood:elementwise", pos="sd:elementwise", to_decoder="du:d>u",
    head="uv:u>v output head", **flat_specs("enc"), **flat_specs("dec", "u"),
    sites={"enc": HEADS, "dec": HEADS},
)  # fmt: skip
def masked_autoencoder(p, patches, noise, tap=no_tap):
    """The encoder sees some patches; the decoder gets a learned token for each of the others."""
    order = jnp.argsort(noise, axis=1)
    x = jnp.take_along_axis(patches + p["pos"], order[:, :4, None], axis=1)
    x = x + flat_attention(norm(x), p["enc"], tap, "enc", causal=False)
    x = x @ p["to_decoder"]
    x = jnp.concatenate([x, jnp.tile(p["mask"], (2, 2, 1))], axis=1)
    x = jnp.take_along_axis(x, jnp.argsort(order, axis=1)[..., None], axis=1)
    x = x + flat_attention(norm(x), p["dec"], tap, "dec", causal=False)
    return jnp.mean(jnp.square(x @ p["head"] - 1.0))


@convnet(
    args=(IMAGES,), stem="nnzd:nnz>d", dw="bbod:depthwise", dw_b="d:elementwise",
    ln="d:elementwise", pw1="df:d>f", grn_g="f:elementwise", grn_b="f:elementwise", pw2="fd:f>d",
    scale="d:elementwise", down="nndy:nnd>y", head="yv:y>v output head",
)  # fmt: skip
def convnext(p, images, **_):
    """Depthwise kernels of 7 x 7, global response normalization, layer scale."""
    x = conv(images, p["stem"], 2, "VALID")
    h = layer_norm(conv(x, p["dw"], groups=16) + p["dw_b"], p["ln"])
    h = jax.nn.gelu(h @ p["pw1"])
    size = jnp.sqrt(jnp.sum(jnp.square(h), axis=(1, 2), keepdims=True) + 1e-6)
    h = p["grn_g"] * (h * size / (size.mean(-1, keepdims=True) + 1e-6)) + p["grn_b"] + h
    x = conv(x + p["scale"] * (h @ p["pw2"]), p["down"], 2, "VALID")
    return loss_of(x.mean((1, 2)) @ p["head"])


@convnet(
    args=(IMAGES.transpose(0, 3, 1, 2),), stem="dzzz:zzz>d", c1="rdoo:d>r", c2="rzzz:zzz>r",
    c3="droo:r>d", short="ddoo:d>d", g="d:elementwise", b="d:elementwise", fc="vd:d>v output head",
)  # fmt: skip
def resnext_channels_first(p, images, **_):
    """Outputs-first kernels of convolutions with groups, and a strided shortcut."""
    numbers = ("NCHW", "OIHW", "NCHW")
    x = jax.nn.relu(conv(images, p["stem"], numbers=numbers))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    h = jax.nn.relu(conv(x, p["c1"], numbers=numbers))
    h = jax.nn.relu(conv(h, p["c2"], 2, groups=4, numbers=numbers))
    h = conv(h, p["c3"], numbers=numbers)
    mean, var = h.mean((0, 2, 3), keepdims=True), h.var((0, 2, 3), keepdims=True)
    h = (h - mean) / jnp.sqrt(var + 1e-5)
    h = h * p["g"][None, :, None, None] + p["b"][None, :, None, None]
    x = jax.nn.relu(h + conv(x, p["short"], 2, numbers=numbers))
    return loss_of(x.mean((2, 3)) @ p["fc"].T)


def sinusoid(t):
    angle = t[:, None] * 10.0 ** -jnp.arange(8)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1).astype(t.dtype)


@diffusion(
    args=(IMAGES, TIMES), time1="df:d>f", time2="fy:f>y", inp="zzzd:zzz>d", down="zzdy:zzd>y",
    mid__q="ooyy:y>y", mid__k="ooyy:y>y", mid__v="ooyy:y>y", mid__o="ooyy:y>y", up="zzyd:zzy>d",
    out="zzyz:zzy>z output head", g="y:elementwise", sites={"mid": (1, 1, 32, 1)},
)  # fmt: skip
def unet(p, images, t, tap=no_tap):
    """Attention among pixels by convolutions of 1 x 1, a transposed convolution, a skip."""
    emb = jax.nn.silu(sinusoid(t) @ p["time1"]) @ p["time2"]
    first = conv(images, p["inp"])
    x = conv(jax.nn.silu(first), p["down"], 2) + emb[:, None, None]
    h = norm(x, p["g"])
    q, k, v = (conv(h, p["mid"][n]).reshape(2, 16, 32) for n in "qkv")
    logits = jnp.einsum("btc,bsc->bts", q, k) * 0.2
    tap("mid", logits[:, None])
    h = jnp.einsum("bts,bsc->btc", jax.nn.softmax(logits, axis=-1), v).reshape(2, 4, 4, 32)
    x = x + conv(h, p["mid"]["o"])
    x = jax.lax.conv_transpose(x, p["up"], (2, 2), "SAME")
    x = jnp.concatenate([x, first], axis=-1)
    return jnp.mean(jnp.square(conv(x, p["out"]) - images))


@diffusion(
    args=(MEMORY, TIMES, LABELS), x_emb="du:d>u", pos="su:elementwise", t1="df:d>f", t2="fu:f>u",
    label="vu:looked up", ada="uB:u>B", ada_b="B:elementwise", up="uf:u>f", down="fu:f>u",
    last_ada="uy:u>y", last="uv:u>v output head", **flat_specs("attn", "u"), sites={"attn": HEADS},
)  # fmt: skip
def dit(p, x, t, labels, tap=no_tap):
    """Shift, scale and gate of each branch from the time and the class."""
    x = x @ p["x_emb"] + p["pos"]
    c = jax.nn.silu(sinusoid(t) @ p["t1"]) @ p["t2"] + p["label"][labels]
    mods = (jax.nn.silu(c) @ p["ada"] + p["ada_b"])[:, None]
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(mods, 6, axis=-1)
    h = layer_norm(x) * (1 + scale1) + shift1
    x = x + gate1 * flat_attention(h, p["attn"], tap, "attn", causal=False)
    h = layer_norm(x) * (1 + scale2) + shift2
    x = x + gate2 * (jax.nn.gelu(h @ p["up"]) @ p["down"])
    shift, scale = jnp.split((jax.nn.silu(c) @ p["last_ada"])[:, None], 2, axis=-1)
    return jnp.mean(jnp.square((layer_norm(x) * (1 + scale) + shift) @ p["last"] - 1.0))


@diffusion(
    args=(MEMORY, TOKENS), emb="vd:looked up", img__qkv="dzhk:d>hk", txt__qkv="dzhk:d>hk",
    img__o="hkd:hk>d", txt__o="hkd:hk>d", img__up="df:d>f", img__down="fd:f>d",
    out="dv:d>v output head", txt__out="dv:d>v output head", sites={"": HEADS},
)  # fmt: skip
def two_streams(p, image, tokens, tap=no_tap):
    """Image and text have kernels of their own and attend to each other."""

    def project(x, w):
        return jnp.unstack(jnp.einsum("btd,dzhk->zbthk", norm(x), w["qkv"]))

    x, y = image, p["emb"][tokens]
    pairs = zip(project(y, p["txt"]), project(x, p["img"]), strict=True)
    q, k, v = (jnp.concatenate(pair, axis=1) for pair in pairs)
    logits = jnp.einsum("bthk,bshk->bhts", q, k) * 0.3
    tap("", logits)
    out = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits, axis=-1), v)
    y = y + jnp.einsum("bthk,hkd->btd", out[:, :10], p["txt"]["o"])
    x = x + jnp.einsum("bthk,hkd->btd", out[:, 10:], p["img"]["o"])
    x = x + jax.nn.gelu(x @ p["img"]["up"]) @ p["img"]["down"]
    return loss_of(x @ p["out"]) + loss_of(y @ p["txt"]["out"])


@diffusion(
    args=(IMAGES,), enc="hhzd:hhz>d", code="vd:looked up", dec="hhdz:hhd>z output head",
)  # fmt: skip
def vector_quantization(p, images, **_):
    """Rows of a table, the nearest to what an encoder puts out."""
    z = conv(images, p["enc"], 4, "VALID")
    flat = z.reshape(-1, 16)
    far = (flat**2).sum(1)[:, None] - 2 * flat @ p["code"].T + (p["code"] ** 2).sum(1)
    near = p["code"][jnp.argmin(far, axis=1)].reshape(z.shape)
    loss = jnp.mean((jax.lax.stop_gradient(near) - z) ** 2) + jnp.mean((near - z) ** 2)
    near = z + jax.lax.stop_gradient(near - z)
    out = jax.lax.conv_transpose(near, p["dec"], (4, 4), "VALID")
    return loss + jnp.mean((out - images) ** 2)


@towers(
    args=(IMAGES, TOKENS), image__patch="hhzd:hhz>d", image__cls="d:elementwise",
    image__pos="ad:elementwise", text__emb="vd:looked up", text__pos="td:elementwise",
    image__proj="dr:d>r output head", text__proj="dr:d>r output head", scale=":elementwise",
    **flat_specs("image__attn"), **flat_specs("text__attn"),
    sites={"image/attn": HEADS, "text/attn": HEADS},
)  # fmt: skip
def clip(p, images, tokens, tap=no_tap):
    """Normalized outputs of both towers, and a softmax over the pairs of a batch."""
    i, t = p["image"], p["text"]
    x = conv(images, i["patch"], 4, "VALID").reshape(2, -1, 16)
    x = jnp.concatenate([jnp.zeros((2, 1, 16), x.dtype) + i["cls"], x], axis=1) + i["pos"]
    x = x + flat_attention(norm(x), i["attn"], tap, "image/attn", causal=False)
    y = t["emb"][tokens] + t["pos"]
    y = y + flat_attention(norm(y), t["attn"], tap, "text/attn")
    x, y = x[:, 0] @ i["proj"], y[jnp.arange(2), jnp.argmax(tokens, axis=-1)] @ t["proj"]
    x, y = (u / jnp.linalg.norm(u, axis=-1, keepdims=True) for u in (x, y))
    logits = jnp.exp(p["scale"]) * x @ y.T
    pairs = jnp.arange(2)
    return cross_entropy(logits, pairs) + cross_entropy(logits.T, pairs)


@latents(
    args=(MEMORY,), latents="ad:elementwise", head="dv:d>v output head", up="df:d>f", down="fd:f>d",
    **flat_specs("cross"), **flat_specs("attn"), sites={"cross": HEADS, "attn": HEADS},
)  # fmt: skip
def perceiver(p, x, tap=no_tap):
    """Latents attend to inputs, then to each other."""
    z = jnp.broadcast_to(p["latents"], (2, 5, 16))
    z = z + flat_attention(norm(z), p["cross"], tap, "cross", memory=norm(x), causal=False)
    z = z + jax.nn.gelu(z @ p["up"]) @ p["down"]
    z = z + flat_attention(norm(z), p["attn"], tap, "attn", causal=False)
    return loss_of(z.mean(1) @ p["head"])


@latents(
    args=(MEMORY,), queries="ad:?multiplied", wq="dy:?its axes", wk="dy:d>y", wv="dy:d>y",
    wo="yd:y>d", head="dv:d>v output head", sites={"": (1, 1, 8, 1, "faults")},
)  # fmt: skip
def pooling_one_example_at_a_time(p, x, tap=no_tap):
    """A product of learned queries and their kernel: no data in it, so their roles are open."""

    def one(x):
        q = split_heads(p["queries"] @ p["wq"], 4)
        k, v = split_heads(x @ p["wk"], 4), split_heads(x @ p["wv"], 4)
        logits = jnp.matmul(q, k.swapaxes(-1, -2)) * 0.3
        return logits, jnp.matmul(jax.nn.softmax(logits), v)

    logits, out = jax.vmap(one)(x)
    tap("", logits)
    return loss_of(merge_heads(out) @ p["wo"] @ p["head"])


@latents(
    args=(IMAGES,), backbone="hhzd:hhz>d", row="nc:elementwise", queries="ad:elementwise",
    cls="dv:d>v output head", box1="df:d>f", box2="fe:f>e output head",
    sites={"enc": HEADS, "dec/self": HEADS, "dec/cross": HEADS}, sizes=dict(c=16),
    **flat_specs("enc"), **flat_specs("dec__self"), **flat_specs("dec__cross"),
)  # fmt: skip
def detection(p, images, tap=no_tap):
    """Learned queries are added to queries and keys in each layer; they begin at zero."""

    def mha(q, k, v, w, path):
        q, k, v = (split_heads(u @ w[n], 4) for u, n in ((q, "wq"), (k, "wk"), (v, "wv")))
        return merge_heads(attend(q, k, v, tap, path, causal=False)) @ w["wo"]

    x = conv(images, p["backbone"], 4, "VALID")
    pos = (p["row"][:, None] + p["row"][None]).reshape(4, 16)
    x = x.reshape(2, 4, 16)
    x = x + mha(x + pos, x + pos, x, p["enc"], "enc")
    y = jnp.zeros((2, 5, 16), x.dtype)
    y = y + mha(y + p["queries"], y + p["queries"], y + 0.1, p["dec"]["self"], "dec/self")
    y = y + mha(y + p["queries"], x + pos, x, p["dec"]["cross"], "dec/cross")
    box = jax.nn.sigmoid(jax.nn.relu(y @ p["box1"]) @ p["box2"])
    return loss_of(y @ p["cls"]) + jnp.abs(box - 0.5).mean()


@fields(
    args=(floats(2, 6, 3), floats(2, 3)), w0="Cf:C>f", b0="f:elementwise", w1="Df:D>f",
    feat="fr:f>r", sigma="fo:output head", rgb="Cz:C>z output head",
)  # fmt: skip
def radiance_field(p, points, views, **_):
    """Frequencies of positions, a skip by concatenation, and a rendered sum."""
    waves = [points, *(f(points * k) for f in (jnp.sin, jnp.cos) for k in (1.0, 2.0))]
    code = jnp.concatenate(waves, axis=-1)
    h = jax.nn.relu(code @ p["w0"] + p["b0"])
    h = jax.nn.relu(jnp.concatenate([h, code], axis=-1) @ p["w1"])
    sigma = jax.nn.softplus((h @ p["sigma"])[..., 0])
    views = jnp.broadcast_to(views[:, None], points.shape)
    rgb = jax.nn.sigmoid(jnp.concatenate([h @ p["feat"], views], axis=-1) @ p["rgb"])
    alpha = 1 - jnp.exp(-sigma * 0.1)
    weights = alpha * jnp.cumprod(1 - alpha + 1e-6, axis=-1)
    return jnp.mean(jnp.square((weights[..., None] * rgb).sum(1) - 0.5))


@fields(
    args=(MEMORY,), mix="dd:?used by lu", lower="dd:d>d output head", up="Fy:F>y", shift="yF:y>F",
    scale="yF:y>F",
)  # fmt: skip
def flow(p, x, **_):
    """A product with a square matrix, whose determinant is in the loss, and a coupling layer."""
    y = x @ p["mix"]
    volume = jnp.linalg.slogdet(p["mix"])[1]
    a, b = jnp.split(y, 2, axis=-1)
    h = jnp.tanh(a @ p["up"])
    log_scale = jnp.tanh(h @ p["scale"])
    b = b * jnp.exp(log_scale) + h @ p["shift"]
    y = jnp.concatenate([a, b], axis=-1) @ (jnp.tril(p["lower"], -1) + jnp.eye(16, dtype=x.dtype))
    return jnp.square(y).mean() - volume - log_scale.mean()
