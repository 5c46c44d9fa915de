"""float64 NumPy oracle for the models with latent attention, written from the papers with loops.

DeepSeek-V2, arXiv 2405.04434, equations 9 to 19; DeepSeek-V3, arXiv 2412.19437, equations 12 to 16.
Imports nothing of the package, nor of the training program.
"""

import numpy as np

from tests.support import reference_attention


def rms_norm(x, module):
    """x / √(mean x² + 1e-6) · scale."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * module["scale"]


def rotate(x, base):
    """RoPE on [B T N H] as a product of complex numbers, x[h] + i x[h + H / 2]."""
    half = x.shape[-1] // 2
    angle = np.arange(x.shape[1])[:, None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[None, :, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def latent_attention(x, params, sizes):
    """Output [B T D] and largest logits [B N]."""
    c_q = rms_norm(x @ params["q_a"]["kernel"], params["q_norm"])
    c_kv = rms_norm(x @ params["kv_a"]["kernel"], params["kv_norm"])
    queries = reference_attention.project(c_q, params["q_b"]["kernel"], sizes.heads)
    keys_values = reference_attention.project(c_kv, params["kv_b"]["kernel"], sizes.heads)
    k_rope = rotate((x @ params["k_rope"]["kernel"])[:, :, None], sizes.rotary_base)
    q_rope = rotate(queries[..., sizes.nope :], sizes.rotary_base)
    out, largest = [], []
    for h in range(sizes.heads):
        query = np.concatenate([queries[:, :, h, : sizes.nope], q_rope[:, :, h]], axis=-1)
        key = np.concatenate([keys_values[:, :, h, : sizes.nope], k_rope[:, :, 0]], axis=-1)
        value = keys_values[:, :, h, sizes.nope :]
        one = [part[:, :, None] for part in (query, key, value)]
        out.append(reference_attention.attention(*one, is_causal=True)[:, :, 0])
        largest.append(reference_attention.max_logits(*one[:2], is_causal=True)[:, 0])
    return np.concatenate(out, axis=-1) @ params["out"]["kernel"], np.stack(largest, axis=1)


def mlp(x, gate, up, down):
    """SwiGLU: down(silu(gate(x)) · up(x))."""
    hidden = x @ gate
    return (hidden / (1 + np.exp(-hidden)) * (x @ up)) @ down


def dense(x, params):
    """The same from its modules."""
    return mlp(x, *(params[name]["kernel"] for name in ("gate", "up", "down")))


def mixture(x, params, bias, sizes):
    """Output [B T D], and the numbers of tokens routed to each expert and dropped by it, [2 E].

    Token by token: an expert accepts the first `capacity` tokens of each sequence.
    """
    (batch, length, _), experts = x.shape, params["experts"]
    capacity = min(length, np.ceil(sizes.capacity * length * sizes.chosen / sizes.experts))
    out, loads = dense(x, params["shared"]), np.zeros((2, sizes.experts))
    for b in range(batch):
        taken = np.zeros(sizes.experts)
        for t in range(length):
            scores = 1 / (1 + np.exp(-x[b, t] @ params["router"]["kernel"]))
            chosen = np.argsort(-(scores + bias))[: sizes.chosen]
            for e in chosen:
                loads[0, e] += 1
                if taken[e] == capacity:
                    loads[1, e] += 1
                    continue
                taken[e] += 1
                y = mlp(x[b, t], *(experts[name][e] for name in ("gate", "up", "down")))
                out[b, t] += sizes.scale * scores[e] / scores[chosen].sum() * y
    return out, loads


def forward(text, variables, model):
    """Logits [B T V]; largest attention logits [L B N] and loads [2 E] of the layers in order."""
    params, largest, loads = variables["params"], [], []
    x = params["embed"]["embedding"][text]
    for name in ("blocks", "dense_blocks", "moe_blocks"):
        stack = params.get(name, {"attn_norm": {"scale": ()}})
        for i in range(len(stack["attn_norm"]["scale"])):
            layer = layer_of(stack, i)
            normed = rms_norm(x, layer["attn_norm"])
            out, logits = latent_attention(normed, layer["attn"], model.attention)
            x = x + out
            largest.append(logits)
            if "mlp" in layer:
                x = x + dense(rms_norm(x, layer["mlp_norm"]), layer["mlp"])
            else:
                bias = variables["balance"][name]["moe"]["routed"][i]
                normed = rms_norm(x, layer["moe_norm"])
                out, load = mixture(normed, layer["moe"], bias, model.routed)
                x = x + out
                loads.append(load)
    return rms_norm(x, params["final_norm"]) @ params["lm_head"]["kernel"], largest, loads


def layer_of(tree, i):
    """One layer of a stack."""
    if isinstance(tree, dict):
        return {name: layer_of(child, i) for name, child in tree.items()}
    return tree[i]
