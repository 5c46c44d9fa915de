"""One step of Algorithm 1 for Kimi K2 on thousands of TPU chips, compiled ahead of time.

    pip install "muonclip-jax[tpu]"
    python -m benchmarks.kimi_k2_step

Writes results/kimi_k2_step.json: the cost of Algorithm 1, Muon and then QK-clip, for each chip of
two v5p slices, read from the compiled program. No TPU is needed, nothing is executed, and only the
compiler is timed. Its estimate of the step leaves out the time of the links.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks import aot, report, tpu
from benchmarks.compiled import Cost

AXES = ("expert", "fsdp")
MESHES = {"v5p:8x8x16": (16, 64), "v5p:16x16x16": (32, 128)}
# FLOPs of bfloat16 products and bytes over all links of a chip, each second: Google, "TPU v5p",
# cloud.google.com/tpu/docs/v5p; cycles: 459e12 / (2 cores x 4 units x 128 x 128 x 2 FLOPs).
PEAK, LINKS, CLOCK = 459e12, 600e9, 1.75e9
MEMORY = 95e9  # bytes of HBM of a chip; same page
# Kimi K2, arXiv 2507.20534: 32 B active parameters (table 2), 67 M tokens a step (section 2.5).
ACTIVE, TOKENS = 32.6e9, 67e6
UTILIZATION = 0.4  # model FLOPs utilization, an assumption


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of Kimi K2: moonshotai/Kimi-K2-Base, config.json.

    Attributes:
      hidden: Width of the residual stream.
      layers: Transformer layers; the first has a dense MLP, the others experts.
      dense: Hidden units of the dense MLP.
      experts: Routed experts of a layer; one more is shared.
      expert: Hidden units of an expert.
      heads: Attention heads.
      q_rank: Width of the latent query.
      kv_rank: Width of the latent keys and values.
      nope: Width of a head without rotary embedding.
      rope: Width of a head with rotary embedding.
      value: Width of a value head.
      vocabulary: Number of tokens.
      batch: Sequences in a step: 67 M tokens / 4096.
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
        """Returns a small model of the same structure, for a smoke run."""
        small = {f.name: getattr(self, f.name) // 16 for f in dataclasses.fields(self)}
        return Model(**small | {"layers": 3, "heads": 8, "nope": 4, "rope": 4, "value": 4})

    def layout(self) -> mc.MLALayout:
        """Returns the head layout of the attention kernels."""
        return mc.MLALayout(
            nope_dim=self.nope,
            rope_dim=self.rope,
            value_dim=self.value,
            kernel="inputs (heads head_dim)",
        )

    def parameters(self, mesh: Mesh) -> Any:
        """Returns the shapes of the parameters; every large one is sharded over all chips."""
        embedding = (self.vocabulary, self.hidden)
        tree = {
            "embed": (embedding, ("expert", "fsdp")),
            "dense_layer": self._layer((), {"mlp": self._mlp((), self.dense)}),
            "layers": self._layer((self.layers - 1,), self._experts((self.layers - 1,))),
            "norm": {"scale": ((self.hidden,), ())},
            "lm_head": (embedding[::-1], ("fsdp", "expert")),
        }
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf[0], jnp.float32, sharding=NamedSharding(mesh, P(*leaf[1]))
            ),
            tree,
            is_leaf=lambda x: isinstance(x, tuple),
        )

    def _layer(self, stack: tuple[int, ...], mlp: dict[str, Any]) -> dict[str, Any]:
        """Returns the leaves of a layer, or of a stack of layers, as (shape, mesh axes)."""
        d, q, kv, heads = self.hidden, self.q_rank, self.kv_rank, self.heads
        attention = {
            "q_a": _in_kernel(stack, d, q),
            "q_b": _in_kernel(stack, q, heads * (self.nope + self.rope)),
            "kv_a": _in_kernel(stack, d, kv + self.rope),
            "kv_b": _in_kernel(stack, kv, heads * (self.nope + self.value)),
            "out": _out_kernel(stack, heads * self.value, d),
        }
        norms = {"attn_norm": d, "mlp_norm": d, "q_norm": q, "kv_norm": kv}
        scales = {name: {"scale": ((*stack, size), ())} for name, size in norms.items()}
        return {"attn": {name: {"kernel": x} for name, x in attention.items()}, **scales, **mlp}

    def _mlp(self, stack: tuple[int, ...], units: int) -> dict[str, Any]:
        side = {"kernel": _in_kernel(stack, self.hidden, units)}
        down = {"kernel": _out_kernel(stack, units, self.hidden)}
        return {"gate_proj": side, "up_proj": side, "down_proj": down}

    def _experts(self, stack: tuple[int, ...]) -> dict[str, Any]:
        d, units, many = self.hidden, self.expert, (*stack, self.experts)
        side = ((*many, d, units), (None, "expert", "fsdp", None))
        down = ((*many, units, d), (None, "expert", None, "fsdp"))
        router = {"kernel": ((*stack, d, self.experts), (None, "fsdp")), "bias": (many, ())}
        return {
            "router": router,
            "experts": {"gate_proj": side, "up_proj": side, "down_proj": down},
            "shared": self._mlp(stack, units),
        }

    def max_logits(self, mesh: Mesh) -> Any:
        """Returns the shapes of the max logits that the forward pass sows, for each sequence."""

        def leaf(*stack: int) -> dict[str, Any]:
            sharding = NamedSharding(mesh, P(*(None for _ in stack), mesh.axis_names, None))
            shape = (*stack, self.batch, self.heads)
            x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
            return {"attn": {"max_logits": (x,)}}

        return {"dense_layer": leaf(), "layers": leaf(self.layers - 1)}


def _in_kernel(stack: tuple[int, ...], inputs: int, outputs: int) -> tuple[Any, Any]:
    return (*stack, inputs, outputs), (*(None for _ in stack), "fsdp", "expert")


def _out_kernel(stack: tuple[int, ...], inputs: int, outputs: int) -> tuple[Any, Any]:
    return (*stack, inputs, outputs), (*(None for _ in stack), "expert", "fsdp")


def trace(model: Model, mesh: Mesh, products: str = "auto") -> Any:
    """Traces a step of Algorithm 1 that donates the parameters and the state.

    Args:
      model: The model.
      mesh: The mesh.
      products: See `ns_products` of `muonclip`.
    """
    params = model.parameters(mesh)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    settings = {"shardings": shardings, "ns_dtype": jnp.bfloat16, "ns_products": products}
    tx = mc.muonclip(2e-4, threshold=None, **settings)

    # Results in the order of the arguments: see `aot.trace_step`.
    def step(params, state, gradients, max_logits):
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        params, info = mc.qk_clip(params, max_logits, model.layout(), threshold=100.0)
        return params, state, mc.qk_clip_metrics(info)

    state = aot.sharded_like(params, jax.eval_shape(tx.init, params))
    max_logits = model.max_logits(mesh)
    return jax.jit(step, donate_argnums=(0, 1)).trace(params, state, params, max_logits)


def muon_leaves(params: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the leaves that are assigned to Muon, by path."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in flat}
    rows = mc.routing_table(params).rows
    return {row.path: leaves[row.path] for row in rows if row.optimizer == "muon"}


def standard_flops(params: Any, steps: int = 5) -> float:
    """Counts the FLOPs of five standard steps on each matrix: T (4 n/m + 2) m³, m <= n."""
    total = 0.0
    for x in muon_leaves(params).values():
        m, n = sorted(x.shape[-2:])
        total += math.prod(x.shape[:-2]) * steps * (4 * n / m + 2) * m**3
    return total


def measure(model: Model, mesh: Mesh) -> dict[str, Any]:
    """Compiles the step, and compares its cost with standard Newton–Schulz and a training step."""
    params = model.parameters(mesh)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    compilation = aot.compile_traced(trace(model, mesh))
    cost, floor = compilation.cost, standard_flops(params) / mesh.size
    return {
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(params)),
        "mesh": dict(mesh.shape),
        "plan": str(
            mc.sharding_plan(params, shardings=shardings, ns_dtype=jnp.bfloat16)
        ).splitlines(),
        **dataclasses.asdict(cost),
        "sent_bytes": cost.sent_bytes,
        "rematerializations": compilation.rematerializations,
        "compile_seconds": compilation.seconds,
        "compile_cpu_seconds": compilation.cpu_seconds,
        # By the sum of all allocations, and by the largest memory in use at any time.
        "temporaries_by_arguments": (cost.temporary_bytes or 0) / (cost.argument_bytes or 1),
        "peak_by_arguments": (cost.peak_bytes or 0) / (cost.argument_bytes or 1),
        "standard_flops": floor,
        "flops_by_standard": cost.flops / floor,
        "training_step": training_step(cost, mesh.size),
    }


def training_step(cost: Cost, chips: int) -> dict[str, float]:
    """Estimates the optimizer's share of a training step.

    The model needs 6 FLOPs for each token and active parameter, attention logits excluded, at a
    utilization of `UTILIZATION`. The optimizer needs the larger of the compiler's two estimates,
    plus the time of its collectives without any overlap.
    """
    model = 6 * ACTIVE * TOKENS / (chips * PEAK * UTILIZATION)
    kernels = max(cost.seconds or 0.0, cost.cycles / CLOCK)
    links = cost.sent_bytes / LINKS
    return {
        "model_seconds": model,
        "optimizer_seconds": kernels + links,
        "of_these_links": links,
        "optimizer_share": (kernels + links) / (model + kernels + links),
    }


def table(results: dict[str, Any]) -> str:
    """Formats the figures of one slice."""
    step = results["training_step"]
    memory = (results["argument_bytes"] or 0, results["temporary_bytes"] or 0)
    sent = ", ".join(f"{kind} {size / 1e9:.2f}" for kind, size in results["sent"].items())
    lines = [
        *results["plan"],
        f"{results['parameters'] / 1e12:.3f}e12 parameters",
        f"compiled in {results['compile_seconds']:.0f} s, "
        f"{results['compile_cpu_seconds']:.0f} s of processor time",
        f"each chip: arguments {memory[0] / 1e9:.2f} GB, temporaries {memory[1] / 1e9:.2f} GB, "
        f"{results['temporaries_by_arguments']:.1%} of the arguments; peak "
        f"{(results['peak_bytes'] or 0) / 1e9:.2f} GB, {results['peak_by_arguments']:.3f} of them",
        f"FLOPs {results['flops']:.3g}, {results['flops_by_standard']:.3f} of five standard steps",
        f"GB of collectives: {sent}",
        f"loops without trip count {results['unknown_loops']}, "
        f"rematerializations {results['rematerializations']}",
        f"optimizer {step['optimizer_seconds']:.3f} s, model {step['model_seconds']:.1f} s at "
        f"{UTILIZATION:.0%} utilization: {step['optimizer_share']:.2%} of a training step",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Compiles, prints the figures and writes them."""
    parser = report.parser("kimi_k2_step", "A step of Algorithm 1 for Kimi K2 on TPU slices.")
    parser.add_argument("--quick", action="store_true", help="small, on the attached devices")
    options = parser.parse_args(arguments)
    if not (tpu.LIBTPU or options.quick):
        parser.error(tpu.INSTALL)
    model, results = Model(), aot.head("kimi_k2_step")
    if options.quick:
        model = model.quick()
        slices = {"attached": Mesh(np.array(jax.devices()).reshape(2, -1), AXES)}
    else:
        slices = {name: tpu.topology_mesh(name, shape, AXES) for name, shape in MESHES.items()}
    results |= {"model": dataclasses.asdict(model), "slices": {}}
    for name, mesh in slices.items():
        jax.clear_caches()
        results["slices"][name] = report.rounded(measure(model, mesh))
        print(f"{name}: {results['note']}\n{table(results['slices'][name])}")
    report.write_json(options.out / "kimi_k2_step.json", results)


if __name__ == "__main__":
    main()
