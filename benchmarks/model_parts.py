"""Language models cut into parts that compile alone: attention, MLP, experts, embedding and head.

A part has the shapes of its parameters in float32, and a forward pass in bfloat16. Norms, biases
of GPT-2 and rotations are left out where they are no matrix product: they change no figure.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

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
      layout: Head layout of QK-clip; None without attention.
      heads: Heads whose max logits QK-clip reads; 0 without attention.
    """

    count: int
    params: Shapes
    forward: Callable[[Any, jax.Array], jax.Array]
    inputs: tuple[int, ...]
    passes: float
    layout: Any = None
    heads: int = 0


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
        d, keys = self.width, self.kv_heads * self.width // self.heads
        attn = {"query": (d, d), "key": (d, keys), "value": (d, keys), "out": (d, d)}
        mlp = {"up_proj": (d, self.hidden), "down_proj": (self.hidden, d)}
        mlp |= {"gate_proj": (d, self.hidden)} if self.gated else {}
        passes, x = self.tokens / self.micro, (self.micro, d)
        layout = mc.MultiHeadLayout(
            value="value", kernel="inputs (heads head_dim)", head_dim=d // self.heads
        )
        attention = functools.partial(_attention, self)
        return {
            "attention": Part(
                self.layers, {"attn": _kernels(attn)}, attention, x, passes, layout, self.heads
            ),
            "mlp": Part(self.layers, {"mlp": _kernels(mlp)}, _mlp, x, passes),
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

    width: ClassVar[int] = kimi_k2_step.Model.hidden

    def parts(self) -> dict[str, Part]:
        """Returns the parts by name; the experts of one device are a part."""
        k = kimi_k2_step.Model()
        one_device = Mesh(np.array(jax.devices("cpu")[:1]).reshape(1, 1), kimi_k2_step.AXES)
        tree = k.parameters(one_device)
        layer = jax.tree.map(lambda x: _leaf(*x.shape[1:]), tree["layers"])
        dense = jax.tree.map(lambda x: _leaf(*x.shape), tree["dense_layer"])
        many = k.experts // self.groups
        experts = jax.tree.map(lambda x: _leaf(many, *x.shape[1:]), layer["experts"])
        tokens = self.micro * self.chosen / k.experts  # of an expert in a micro-batch
        passes = self.tokens / self.micro * self.groups
        x = (self.micro // self.groups, k.hidden)  # of one device
        attention = functools.partial(_latent_attention, k)
        kernels = {name: x for name, x in layer["attn"].items() if "norm" not in name}
        shared = {"router": {"kernel": layer["router"]["kernel"]}, "mlp": layer["shared"]}
        return {
            "attention": Part(
                k.layers, {"attn": kernels}, attention, x, passes, k.layout(), k.heads
            ),
            "dense mlp": Part(1, {"mlp": dense["mlp"]}, _mlp, x, passes),
            "shared expert": Part(k.layers - 1, shared, _shared_expert, x, passes),
            "experts": Part(
                (k.layers - 1) * self.groups,
                {"experts": experts},
                _experts,
                (many, int(tokens), k.hidden),
                self.tokens / self.micro * tokens / int(tokens),
            ),
            "ends": _ends(k.hidden, k.vocabulary, False, x[0], passes),
        }


def _leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _kernels(shapes: dict[str, tuple[int, int]]) -> Shapes:
    return {name: {"kernel": _leaf(*shape)} for name, shape in shapes.items()}


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
    return jax.lax.optimization_barrier(query * key * value)


def _attention(model: Dense, params: Any, x: jax.Array) -> jax.Array:
    p = params["attn"]
    split = lambda y: y.reshape(len(x), -1, model.width // model.heads)  # noqa: E731
    q, k, v = (split(_linear(p[name], x)) for name in ("query", "key", "value"))
    return x + _linear(p["out"], _attend(q, k, v).reshape(len(x), -1))


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
    gated = "gate_proj" in p
    hidden = (
        jax.nn.silu(_linear(p["gate_proj"], x, first)) * hidden if gated else jax.nn.gelu(hidden)
    )
    return _linear(p["down_proj"], hidden, second)


def _mlp(params: Any, x: jax.Array) -> jax.Array:
    return x + _gated(params["mlp"], x, "td,df->tf", "tf,fd->td")


def _experts(params: Any, x: jax.Array) -> jax.Array:
    return _gated(params["experts"], x, "ecd,edf->ecf", "ecf,efd->ecd")


def _shared_expert(params: Any, x: jax.Array) -> jax.Array:
    gates = jax.nn.sigmoid(_linear(params["router"], x))
    return _mlp(params, x) * gates.mean(-1, keepdims=True)


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


Model = Dense | KimiK2

MODELS: dict[str, Model] = {
    # openai/gpt-2, hparams.json. Batch: karpathy/nanoGPT, config/train_gpt2.py: 40 x 12 x 1024.
    "GPT-2 small": Dense(12, 768, 12, 12, 3072, 50257, False, True, 491520, 12 * 1024),
    # Llama 2, arXiv 2307.09288, table 1: 4 M tokens; meta-llama/Llama-2-7b, params.json.
    "Llama 2 7B": Dense(32, 4096, 32, 32, 11008, 32000, True, False, 4e6, 4096),
    # Llama 3, arXiv 2407.21783, table 3 and section 3.4.1: 16 M tokens in sequences of 8192.
    "Llama 3.1 405B": Dense(126, 16384, 128, 8, 53248, 128256, True, False, 16e6, 8192),
    # Kimi K2, arXiv 2507.20534, section 2.5: 67 M tokens, sequences of 4096, 16-way experts.
    "Kimi K2": KimiK2(67e6, 16 * 4096),
}
