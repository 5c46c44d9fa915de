"""Language models cut into parts that compile alone: attention, MLP, experts, embedding and head.

A part has the shapes of its parameters in float32, and a forward pass in bfloat16. Norms, biases
of GPT-2 and rotations are left out where they are no matrix product: they change no figure.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import muonclip_jax as mc
from benchmarks import kimi_k2_step

Shapes = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Part:
    """Equal parts of a model.

    Attributes:
      count: How many the model has.
      params: Shapes of the parameters of one.
      forward: Maps (params, x) to an array; `x` is bfloat16, or whole numbers for the embedding.
      inputs: Shape of `x` in one micro-batch.
      passes: Micro-batches of a step, each once forward and backward.
      heads: Heads whose max logits QK-clip reads; 0 without attention.
      layout: Head layout of QK-clip; None without attention.
    """

    count: int
    params: Shapes
    forward: Callable[[Any, jax.Array], jax.Array]
    inputs: tuple[int, ...]
    passes: float
    heads: int = 0
    layout: Any = None


@dataclasses.dataclass(frozen=True)
class Dense:
    """Sizes of a dense model, and of its batch.

    Attributes:
      layers: Transformer layers.
      width: Of the residual stream.
      heads: Query heads.
      kv_heads: Key and value heads.
      hidden: Hidden units of the MLP.
      vocabulary: Number of tokens.
      gated: Whether the MLP is SwiGLU; otherwise it has two matrices.
      tied: Whether the output head is the embedding.
      tokens: Of an optimizer step.
      micro: Of a micro-batch.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    gated: bool
    tied: bool
    tokens: float
    micro: int

    def parts(self) -> dict[str, Part]:
        """Returns the parts by name."""
        d, h = self.width, self.width // self.heads
        kernels = {"query": self.heads, "key": self.kv_heads, "value": self.kv_heads}
        attn = {name: {"kernel": _leaf(d, n, h)} for name, n in kernels.items()}
        attn["out"] = {"kernel": _leaf(self.heads, h, d)}
        passes = self.tokens / self.micro
        x = (self.micro, d)
        layout = mc.MultiHeadLayout(value="value")
        return {
            "attention": Part(
                self.layers, {"attn": attn}, _attention, x, passes, self.heads, layout
            ),
            "mlp": Part(
                self.layers, {"mlp": _mlp_shapes(d, self.hidden, self.gated)}, _mlp, x, passes
            ),
            "ends": _ends(d, self.vocabulary, self.tied, self.micro, passes),
        }


@dataclasses.dataclass(frozen=True)
class KimiK2:
    """Kimi K2, and its batch.

    Attributes:
      tokens: Of an optimizer step.
      micro: Of a micro-batch, over the devices that share the experts.
      groups: Devices that share the experts of a layer.
      chosen: Routed experts of a token.
    """

    tokens: float
    micro: int
    groups: int = 16
    chosen: int = 8

    def parts(self) -> dict[str, Part]:
        """Returns the parts by name; the experts of one device are a part."""
        k = kimi_k2_step.Model()
        tree = k.parameters(Mesh(np.array(jax.devices("cpu")[:1]).reshape(1, 1), kimi_k2_step.AXES))
        layer = jax.tree.map(lambda x: _leaf(*x.shape[1:]), tree["layers"])
        dense = jax.tree.map(lambda x: _leaf(*x.shape), tree["dense_layer"])
        many = k.experts // self.groups
        experts = {"experts": jax.tree.map(lambda x: _leaf(many, *x.shape[1:]), layer["experts"])}
        passes = self.tokens / self.micro
        capacity = self.micro * self.chosen // k.experts
        x = (self.micro // self.groups, k.hidden)  # of one device
        on_all = passes * self.groups
        attention = functools.partial(_latent_attention, k)
        shared = {"router": layer["router"], "shared": layer["shared"]}
        return {
            "attention": Part(
                k.layers, {"attn": layer["attn"]}, attention, x, on_all, k.heads, k.layout()
            ),
            "dense mlp": Part(1, {"mlp": dense["mlp"]}, _mlp, x, on_all),
            "shared expert": Part(k.layers - 1, shared, _shared_expert, x, on_all),
            "experts": Part(
                (k.layers - 1) * self.groups,
                experts,
                _experts,
                (many, capacity, k.hidden),
                passes * (self.micro * self.chosen / k.experts) / capacity,
            ),
            "ends": _ends(k.hidden, k.vocabulary, False, x[0], on_all),
        }


def _leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _mlp_shapes(width: int, hidden: int, gated: bool) -> Shapes:
    inner = dict.fromkeys(("gate_proj", "up_proj") if gated else ("up_proj",), (width, hidden))
    return {k: {"kernel": _leaf(*s)} for k, s in (inner | {"down_proj": (hidden, width)}).items()}


def _linear(params: Any, x: jax.Array, equation: str = "...d,df->...f") -> jax.Array:
    kernel = params["kernel"] if isinstance(params, dict) else params
    return jnp.einsum(equation, x, kernel.astype(x.dtype))


def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Reads queries, keys and values [T, N, H] and writes as much, like flash attention.

    It multiplies element by element and counts as no product. The barriers keep the compiler from
    fusing it with the projections.
    """
    query, key, value = jax.lax.optimization_barrier((query, key, value))
    copies = query.shape[1] // key.shape[1]
    key, value = (jnp.repeat(x, copies, axis=1) for x in (key, value))
    return jax.lax.optimization_barrier(
        query[..., : value.shape[-1]] * key[..., : value.shape[-1]] * value
    )


def _attention(params: Any, x: jax.Array) -> jax.Array:
    p = params["attn"]
    q, k, v = (_linear(p[name], x, "td,dnh->tnh") for name in ("query", "key", "value"))
    return x + _linear(p["out"], _attend(q, k, v), "tnh,nhd->td")


def _latent_attention(k: kimi_k2_step.Model, params: Any, x: jax.Array) -> jax.Array:
    p = params["attn"]
    heads = lambda y: y.reshape(len(x), k.heads, -1)  # noqa: E731
    query = heads(_linear(p["q_b"], _linear(p["q_a"], x)))
    latent, rope = jnp.split(_linear(p["kv_a"], x), [k.kv_rank], -1)
    nope, value = jnp.split(heads(_linear(p["kv_b"], latent)), [k.nope], -1)
    rope = jnp.broadcast_to(rope[:, None], (len(x), k.heads, k.rope))
    # All columns of queries and keys are read: the last ones are added to the first.
    fold = lambda y: y[..., : k.nope].at[..., : k.rope].add(y[..., k.nope :])  # noqa: E731
    mixed = _attend(fold(query), fold(jnp.concatenate([nope, rope], -1)), value)
    return x + _linear(p["out"], mixed.reshape(len(x), -1))


def _gated(p: Any, x: jax.Array, first: str, second: str) -> jax.Array:
    hidden = _linear(p["up_proj"], x, first)
    if "gate_proj" in p:
        hidden = jax.nn.silu(_linear(p["gate_proj"], x, first)) * hidden
    else:
        hidden = jax.nn.gelu(hidden)
    return _linear(p["down_proj"], hidden, second)


def _mlp(params: Any, x: jax.Array) -> jax.Array:
    return x + _gated(params["mlp"], x, "td,df->tf", "tf,fd->td")


def _experts(params: Any, x: jax.Array) -> jax.Array:
    return _gated(params["experts"], x, "ecd,edf->ecf", "ecf,efd->ecd")


def _shared_expert(params: Any, x: jax.Array) -> jax.Array:
    gates = jax.nn.sigmoid(_linear(params["router"], x) + params["router"]["bias"].astype(x.dtype))
    return x * gates.mean(-1, keepdims=True) + _gated(params["shared"], x, "td,df->tf", "tf,fd->td")


def _ends(width: int, vocabulary: int, tied: bool, micro: int, passes: float) -> Part:
    params = {"embed": {"embedding": _leaf(vocabulary, width)}}
    if not tied:
        params["lm_head"] = {"kernel": _leaf(width, vocabulary)}

    def forward(params: Any, text: jax.Array) -> jax.Array:
        table = params["embed"]["embedding"]
        kernel = table.T if tied else params["lm_head"]["kernel"]
        logits = _linear(kernel, table[text].astype(jnp.bfloat16)).astype(jnp.float32)
        # Cross-entropy with the same tokens: no second input is needed.
        picked = jnp.take_along_axis(logits, text[:, None], -1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    return Part(1, params, forward, (micro,), passes)


MODELS: dict[str, Dense | KimiK2] = {
    # openai/gpt-2, hparams.json. Batch: karpathy/nanoGPT, config/train_gpt2.py: 40 x 12 x 1024.
    "GPT-2 small": Dense(12, 768, 12, 12, 3072, 50257, False, True, 491520, 12 * 1024),
    # Llama 2, arXiv 2307.09288, section 2.2: 4 M tokens; meta-llama/Llama-2-7b, params.json.
    "Llama 2 7B": Dense(32, 4096, 32, 32, 11008, 32000, True, False, 4e6, 4096),
    # Llama 3, arXiv 2407.21783, table 3 and section 3.4.1: 16 M tokens in sequences of 8192.
    "Llama 3.1 405B": Dense(126, 16384, 128, 8, 53248, 128256, True, False, 16e6, 8192),
    # Kimi K2, arXiv 2507.20534, section 2.5: 67 M tokens, sequences of 4096, 16-way experts.
    "Kimi K2": KimiK2(67e6, 16 * 4096),
}
