"""The share of the optimizer in a training step, counted in compiled programs.

    pip install "muonclip-jax[tpu]"
    python -m benchmarks.optimizer_share

Writes results/optimizer_share.json: FLOPs and bytes accessed of a training step, from GPT-2 small
to Kimi K2, and of three optimizers. The programs are compiled for one TPU v5p and not executed.
Each part of `model_parts.py` is compiled once, forward and backward for one micro-batch, and with
each optimizer. A part counts as often as the model has it, and its passes as often as a step has
micro-batches. The products of queries with keys, and of weights with values, are left out, and so
are collectives, so that shares are upper bounds.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import muonclip_jax as mc
from benchmarks.compiled import compiled_cost, instruction_counts
from benchmarks.model_parts import Part

TOPOLOGY = "v5p:2x2x1"  # the smallest; programs use one of its chips
RATE = 2e-4
OPTIMIZERS = ("adamw", "optax.muon", "muonclip")
FIGURES = ("flops", "bytes")


def transformation(name: str, params: Any) -> optax.GradientTransformation:
    """Builds an optimizer with its defaults; `muonclip` multiplies in bfloat16, as Kimi K2."""
    rows = mc.routing_table(params).rows
    numbers = [row.dimension_numbers for row in rows]
    if name == "adamw" or not any(numbers):
        return optax.adamw(RATE, weight_decay=0.1)
    if name == "optax.muon":
        numbers = jax.tree.structure(params).unflatten(numbers)
        return contrib.muon(RATE, muon_weight_dimension_numbers=numbers)
    return mc.muonclip(RATE, threshold=None, ns_dtype=jnp.bfloat16)


def optimizer_step(name: str, part: Part, params: Any) -> tuple[Any, tuple[Any, ...]]:
    """Returns a step of an optimizer, with QK-clip for `muonclip`, and the shapes it gets."""
    tx = transformation(name, params)
    clips = name == "muonclip" and part.heads

    def step(params, state, gradients, max_logits):
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        if clips:
            params, info = mc.qk_clip(params, max_logits, part.layout, threshold=100.0)
            return params, state, mc.qk_clip_metrics(info)
        return params, state, {}

    max_logits = {"attn": {"max_logits": (jax.ShapeDtypeStruct((1, part.heads), jnp.float32),)}}
    shapes = (params, jax.eval_shape(tx.init, params), params, max_logits if clips else {})
    return step, shapes


def passes(part: Part) -> tuple[Any, tuple[Any, ...]]:
    """Returns the forward and backward pass of a part, and the shapes it gets."""
    dtype = jnp.int32 if len(part.inputs) == 1 else jnp.bfloat16
    x = jax.ShapeDtypeStruct(part.inputs, dtype)

    def both(params, x, cotangent):
        if dtype == jnp.int32:
            _, pull = jax.vjp(lambda params: part.forward(params, x), params)
        else:
            _, pull = jax.vjp(part.forward, params, x)
        return pull(cotangent)

    return both, (part.params, x, jax.eval_shape(part.forward, part.params, x))


def count(f: Any, shapes: tuple[Any, ...], sharding: Any, donated: tuple[int, ...]) -> np.ndarray:
    """Compiles a program, and returns its FLOPs and bytes accessed.

    Raises:
      RuntimeError: if the program has a loop, whose contents the compiler counts once.
    """
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    compiled = jax.jit(f, donate_argnums=donated).lower(*placed).compile()
    if loops := instruction_counts(compiled)["while"]:
        raise RuntimeError(f"optimizer_share: the program has {loops} loops; expected none")
    analysis = compiled.cost_analysis()
    print(compiled_cost(compiled).flops, analysis["flops"], analysis["bytes accessed"])
    return np.array([analysis["flops"], analysis["bytes accessed"]])
