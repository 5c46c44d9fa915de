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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ahead import LIBTPU, about, compile_ahead, placed_like, rounded, tpu_mesh
from compiled_cost import Cost
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax._layout import matrix_axes
from muonclip_jax._newton_schulz import Orthogonaliser
from muonclip_jax._placements import placements
from muonclip_jax._sharded import plan_for
from muonclip_jax._sharding_plan import Plan

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


def trace(model: Model, mesh: Mesh) -> Any:
    """Traces Algorithm 1: a step that may overwrite the state and the parameters."""
    params = model.parameters(mesh)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    tx = mc.muonclip(2e-4, threshold=None, shardings=shardings, ns_dtype=jnp.bfloat16)

    # Results in the order of the arguments: see `ahead.trace`.
    def step(params, state, gradients, statistics):
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        params, seen = mc.qk_clip(params, statistics, model.layout(), threshold=100.0)
        return params, state, mc.qk_clip_metrics(seen)

    state = placed_like(params, jax.eval_shape(tx.init, params))
    statistics = model.statistics(mesh)
    return jax.jit(step, donate_argnums=(0, 1)).trace(params, state, params, statistics)


def muon_leaves(params: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Lists the leaves that Muon takes, by path."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat}
    routes = mc.routing_table(params).rows
    return {route.path: leaves[route.path] for route in routes if route.optimizer == "muon"}


def plan(params: Any) -> Plan:
    """Plans the step as `muonclip` does while it is traced."""
    leaves = muon_leaves(params)
    shardings = {path: x.sharding for path, x in leaves.items()}
    orthogonaliser = Orthogonaliser(
        mc.ns_coefficients("jordan"), "auto", jnp.bfloat16, "frobenius", 1e-8
    )
    plans = []

    def planned(tree: dict[str, jax.Array]) -> None:
        where = placements("kimi_k2", tree, matrix_axes("kimi_k2", tree, None), shardings)
        assert where is not None
        plans.append(plan_for(where, orthogonaliser._replace(platform=where.platform)))

    jax.eval_shape(planned, leaves)
    return plans[0]


def standard_flops(params: Any, steps: int = 5) -> float:
    """Counts five standard steps on every matrix once: T (4 n/m + 2) m³ each, m <= n."""
    total = 0.0
    for x in muon_leaves(params).values():
        m, n = sorted(x.shape[-2:])
        total += math.prod(x.shape[:-2]) * steps * (4 * n / m + 2) * m**3
    return total


def measure(model: Model, mesh: Mesh) -> dict[str, Any]:
    """Compiles the step and lays its figures beside the floor and the step of the whole model."""
    params = model.parameters(mesh)
    compilation = compile_ahead(trace(model, mesh))
    cost, floor = compilation.cost, standard_flops(params) / mesh.size
    return {
        "model": dataclasses.asdict(model),
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
        "mesh": dict(mesh.shape),
        "plan": str(plan(params)).splitlines(),
        **dataclasses.asdict(cost),
        "sent_bytes": cost.sent_bytes,
        "rematerialisations": compilation.rematerialisations,
        "compile_seconds": compilation.seconds,
        "compile_cpu_seconds": compilation.cpu_seconds,
        "temporaries_by_arguments": (cost.temporary_bytes or 0) / (cost.argument_bytes or 1),
        "standard_flops": floor,
        "flops_by_standard": cost.flops / floor,
        "training_step": training_step(cost, mesh.size),
    }


def training_step(cost: Cost, chips: int) -> dict[str, float]:
    """Extrapolates the optimizer's part of a training step.

    The model needs 6 FLOPs a token and active parameter, without those of attention, and reaches
    `UTILISATION`. The optimizer takes the larger of the compiler's two estimates, and its
    collectives come on top as if nothing were done meanwhile.
    """
    model = 6 * ACTIVE * TOKENS / (chips * PEAK * UTILISATION)
    kernels = max(cost.seconds or 0.0, cost.cycles / CLOCK)
    links = cost.sent_bytes / LINKS
    return {
        "model_seconds": model,
        "optimizer_seconds": kernels + links,
        "of_these_links": links,
        "optimizer_share": (kernels + links) / (model + kernels + links),
    }


def table(results: dict[str, Any]) -> str:
    """Lays out what was found."""
    step = results["training_step"]
    memory = (results["argument_bytes"] or 0, results["temporary_bytes"] or 0)
    sent = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in results["sent"].items())
    lines = [
        *results["plan"],
        f"{results['parameters'] / 1e12:.3f}e12 parameters; {results['note']}",
        f"compiled in {results['compile_seconds']:.0f} s, {results['compile_cpu_seconds']:.0f} s of "
        f"processors; load before {results['load_before']:.1f}",
        f"each chip: arguments {memory[0] / 1e9:.2f} GB, temporaries {memory[1] / 1e9:.2f} GB, "
        f"{results['temporaries_by_arguments']:.1%} of them",
        f"FLOPs {results['flops']:.3g}, by standard steps {results['flops_by_standard']:.3f}",
        f"GB of collectives: {sent}",
        f"unknown loops {results['unknown_loops']}, "
        f"whole arrays gathered {results['rematerialisations']}",
        f"optimizer {step['optimizer_seconds']:.3f} s by {step['model_seconds']:.1f} s of the model "
        f"at {UTILISATION:.0%} utilisation: {step['optimizer_share']:.2%} of a training step",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Compiles, prints what was found and writes it."""
    parser = argparse.ArgumentParser(description="An optimizer step of Kimi K2 on 1024 chips.")
    parser.add_argument("--quick", action="store_true", help="tiny, on the devices that are here")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parent / "results",
        help="folder of kimi_k2.json",
    )
    options = parser.parse_args(arguments)
    if not (LIBTPU or options.quick):
        parser.error('libtpu is not installed: pip install "muonclip-jax[tpu]"')
    names = ("expert", "fsdp")
    if options.quick:
        model, mesh = Model().quick(), Mesh(np.array(jax.devices()).reshape(2, -1), names)
    else:
        model, mesh = Model(), tpu_mesh(TOPOLOGY, MESH, names)
    results = about("python benchmarks/kimi_k2.py") | {"topology": TOPOLOGY}
    results |= rounded(measure(model, mesh))
    print(table(results))
    (options.out / "kimi_k2.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
