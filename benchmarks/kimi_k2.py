"""One optimizer step of Kimi K2 on 1024 TPU chips, compiled ahead of time: no TPU is needed.

    pip install "muonclip-jax[tpu]"
    python benchmarks/kimi_k2.py

Writes results/kimi_k2.json: what Algorithm 1, Muon and then QK-clip, costs each chip of a v5p slice
of 8 x 8 x 16, from the program that the TPU compiler makes. Nothing is run and nothing is timed
but the compiler; its estimate of the step leaves out the time of the links.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from compiled_cost import REMATERIALISATION, captured_stderr, compiled_cost, tpu_mesh
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from sharded_step import placed_like

import muonclip_jax as mc
from muonclip_jax._placements import placements, shardings_by_path
from muonclip_jax._sharded import plan_for

TOPOLOGY, MESH = "v5p:8x8x16", (16, 64)  # expert x fsdp
# FLOPs of bfloat16 products and bytes over all links of a chip, each second: Google, "TPU v5p",
# cloud.google.com/tpu/docs/v5p; cycles: 459e12 / (2 cores x 4 units x 128 x 128 x 2 FLOPs).
PEAK, LINKS, CLOCK = 459e12, 600e9, 1.75e9
# Kimi K2, arXiv 2507.20534: 32 B active parameters (table 2), 67 M tokens a step (section 2.5).
ACTIVE, TOKENS = 32.6e9, 67e6
UTILISATION = 0.4  # of PEAK by the model's own FLOPs, an assumption


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of Kimi K2: moonshotai/Kimi-K2-Base, config.json.

    Attributes:
      hidden: Width of the residual stream.
      layers: Transformer layers; the first has a dense MLP, the others experts.
      dense: Hidden units of the dense MLP.
      experts: Routed experts of a layer; one more is shared.
      expert: Hidden units of each.
      heads: Attention heads.
      q_rank: Width of the latent query.
      kv_rank: Width of the latent keys and values.
      nope: Columns of a head that are not rotated.
      rope: Columns of a head that are rotated.
      value: Columns of a value head.
      vocabulary: Tokens.
      batch: Sequences of a step: 67 M tokens by 4096.
    """

    hidden: int = 7168
    layers: int = 61
    dense: int = 18432
    experts: int = 384
    expert: int = 2048
    heads: int = 64
    q_rank: int = 1536
    kv_rank: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128
    vocabulary: int = 163840
    batch: int = 16384

    def quick(self) -> "Model":
        """Gives a small model of the same make, for a smoke run."""
        small = {f.name: getattr(self, f.name) // 16 for f in dataclasses.fields(self)}
        return Model(**small | {"layers": 3, "heads": 8, "nope": 4, "rope": 4, "value": 4})

    def layout(self) -> mc.MLALayout:
        """Tells QK-clip what the columns of the attention kernels are."""
        return mc.MLALayout(
            nope_dim=self.nope, rope_dim=self.rope, value_dim=self.value, kernel_ndim=2
        )

    def parameters(self, mesh: Mesh) -> Any:
        """Gives the parameters: every large one is divided by all chips."""

        def leaf(*sizes: int, spec: P = P()) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=NamedSharding(mesh, spec))

        def layer(*stack: int) -> dict[str, Any]:
            none = (None,) * len(stack)
            wide, tall = P(*none, "fsdp", "expert"), P(*none, "expert", "fsdp")

            def mlp(hidden: int) -> dict[str, Any]:
                side = {"kernel": leaf(*stack, self.hidden, hidden, spec=wide)}
                down = {"kernel": leaf(*stack, hidden, self.hidden, spec=tall)}
                return {"gate_proj": side, "up_proj": side, "down_proj": down}

            d, q, kv = self.hidden, self.q_rank, self.kv_rank
            attention = {
                "q_a": leaf(*stack, d, q, spec=wide),
                "q_b": leaf(*stack, q, self.heads * (self.nope + self.rope), spec=wide),
                "kv_a": leaf(*stack, d, kv + self.rope, spec=wide),
                "kv_b": leaf(*stack, kv, self.heads * (self.nope + self.value), spec=wide),
                "out": leaf(*stack, self.heads * self.value, d, spec=tall),
            }
            norms = {"attn_norm": d, "mlp_norm": d, "q_norm": q, "kv_norm": kv}
            found: dict[str, Any] = {n: {"scale": leaf(*stack, s)} for n, s in norms.items()}
            found["attn"] = {name: {"kernel": x} for name, x in attention.items()}
            if not stack:
                return found | {"mlp": mlp(self.dense)}
            spec, back = P(None, "expert", "fsdp", None), P(None, "expert", None, "fsdp")
            side = leaf(*stack, self.experts, d, self.expert, spec=spec)
            down = leaf(*stack, self.experts, self.expert, d, spec=back)
            kernel = leaf(*stack, d, self.experts, spec=P(None, "fsdp", None))
            router = {"kernel": kernel, "bias": leaf(*stack, self.experts)}
            experts = {"gate_proj": side, "up_proj": side, "down_proj": down}
            return found | {"router": router, "experts": experts, "shared": mlp(self.expert)}

        return {
            "embed": leaf(self.vocabulary, self.hidden, spec=P("expert", "fsdp")),
            "dense_layer": layer(),
            "layers": layer(self.layers - 1),
            "norm": {"scale": leaf(self.hidden)},
            "lm_head": leaf(self.hidden, self.vocabulary, spec=P("fsdp", "expert")),
        }

    def statistics(self, mesh: Mesh) -> Any:
        """Gives the largest logits as the forward pass leaves them, for each sequence."""

        def leaf(*stack: int) -> dict[str, Any]:
            where = NamedSharding(mesh, P(*(None,) * len(stack), mesh.axis_names, None))
            shape = (*stack, self.batch, self.heads)
            return {"attn": {"max_logits": (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where),)}}

        return {"dense_layer": leaf(), "layers": leaf(self.layers - 1)}


def optimizer(params: Any) -> optax.GradientTransformationExtraArgs:
    """Builds Algorithm 1 without its last lines, which `mc.qk_clip` is."""
    shardings = jax.tree.map(lambda x: x.sharding, params)
    return mc.muonclip(2e-4, threshold=None, shardings=shardings, ns_dtype=jnp.bfloat16)


def trace(model: Model, mesh: Mesh) -> Any:
    """Traces a step that may overwrite the state and the parameters."""
    params, tx = model.parameters(mesh), optimizer(model.parameters(mesh))

    def step(gradients, state, params, statistics):
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        params, seen = mc.qk_clip(params, statistics, model.layout(), threshold=100.0)
        return params, state, mc.qk_clip_metrics(seen)

    state = placed_like(params, jax.eval_shape(tx.init, params))
    step = jax.jit(step, donate_argnums=(1, 2))
    return step.trace(params, state, params, model.statistics(mesh))
