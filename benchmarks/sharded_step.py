"""One step of `muon` against `optax.contrib.muon` on sharded parameters, compiled for TPU or GPU.

    pip install "muonclip-jax[tpu]"
    python -m benchmarks.sharded_step

    pip install "muonclip-jax[cuda]"
    python -m benchmarks.sharded_step --gpu

Writes results/sharded_step.json, and for GPUs sharded_step_gpu.json. The layers have the shapes of
Llama 2 7B and are sharded over 64 chips or GPUs, stacked in one leaf each or as separate leaves; a
few are compiled for other generations. No TPU and no GPU is needed. A step accepts gradients and
returns the new parameters, and donates the old ones. All figures are read from the compiled
programs. Nothing is executed and only the compiler is timed. The estimates of time leave out the
links between chips, over which optax's step sends far more. For GPUs the compiler has no estimate:
`roofline` is the time at the rates of the data sheet.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from optax import contrib

import muonclip_jax as mc
from benchmarks import aot, gpu, report, tpu

SETTINGS: dict[str, Any] = {"weight_decay": 0.1, "consistent_rms": 0.2}

# Largest ratio ours / optax that is accepted, in the first two cases.
GOALS = {
    "stacks": {"seconds": 0.40, "flops": 0.60, "sent_bytes": 0.03, "temporary_bytes": 0.50},
    "layers": {"compile_seconds": 0.30, "compile_cpu_seconds": 0.30},
}
GPU_GOALS = {
    name: {"flops": 0.60, "sent_bytes": 0.02, "temporary_bytes": 0.10}
    for name in ("stacks", "layers")
}
SHOWN = ("seconds", "cycles", "flops", "sent_bytes", "temporary_bytes", "compile_seconds")


@dataclasses.dataclass(frozen=True)
class Case:
    """Parameters and the chips that they are sharded over.

    Attributes:
      topology: Generation and chips of a TPU slice, or GPU and hosts x GPUs; empty for the
        attached devices.
      mesh: Sizes of the axes fsdp and tp.
      layers: Number of layers.
      stacked: Whether layers are the first axis of each leaf.
      side: Width of the residual stream.
      hidden: Units of the MLP.
    """

    topology: str
    mesh: tuple[int, int]
    layers: int
    stacked: bool
    # meta-llama/Llama-2-7b-hf, config.json: hidden_size, intermediate_size, 32 layers.
    side: int = 4096
    hidden: int = 11008

    def parameters(self) -> Any:
        """Returns the shapes of the parameters, with their shardings."""
        names = ("fsdp", "tp")
        if cluster := gpu.cluster(self.topology):
            mesh = cluster.mesh(self.mesh, names)
        elif self.topology:
            mesh = tpu.topology_mesh(self.topology, self.mesh, names)
        else:
            mesh = Mesh(np.array(jax.devices()).reshape(self.mesh), names)

        def leaf(inputs: int, outputs: int, spec: P) -> jax.ShapeDtypeStruct:
            stack = (self.layers,) if self.stacked else ()
            sharding = NamedSharding(mesh, P(*(None for _ in stack), *spec))
            return jax.ShapeDtypeStruct((*stack, inputs, outputs), jnp.float32, sharding=sharding)

        d, hidden, first, second = self.side, self.hidden, P("fsdp", "tp"), P("tp", "fsdp")
        layer = {name: leaf(d, d, first) for name in "qkv"} | {"o": leaf(d, d, second)}
        layer |= {name: leaf(d, hidden, first) for name in ("gate_proj", "up_proj")}
        layer |= {"down_proj": leaf(hidden, d, second)}
        return layer if self.stacked else {f"layer_{i}": layer for i in range(self.layers)}


QUICK = {
    "stacks": Case("", (4, 2), 8, True, side=32, hidden=64),
    "layers": Case("", (4, 2), 2, False, side=32, hidden=64),
}
CASES = {
    "stacks": Case("v5p:4x4x4", (16, 4), 32, True),
    "layers": Case("v5p:4x4x4", (16, 4), 32, False),
    "few_layers": Case("v5p:4x4x4", (16, 4), 8, False),
    "v5e": Case("v5e:4x4", (8, 2), 16, True),
    "v6e": Case("v6e:4x4", (8, 2), 16, True),
    "7x": Case("tpu7x:2x2x2", (8, 2), 16, True),
}
GPU_CASES = {
    "stacks": Case("h100:8x8", (16, 4), 32, True),
    "layers": Case("h100:8x8", (16, 4), 32, False),
    "h200": Case("h200:8x8", (16, 4), 32, True),
    "b200": Case("b200:8x8", (16, 4), 32, True),
}


def optimizers(params: Any) -> dict[str, optax.GradientTransformation]:
    """Builds both. TPUs also round the factors of optax's products to bfloat16, GPUs to TF32."""
    shardings = jax.tree.map(lambda x: x.sharding, params)
    # By default optax's Muon accepts two-axis leaves only.
    numbers = jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), params)
    return {
        "ours": mc.muon(2e-4, shardings=shardings, ns_dtype=jnp.bfloat16, **SETTINGS),
        "optax": contrib.muon(2e-4, muon_weight_dimension_numbers=lambda _: numbers, **SETTINGS),
    }


def measure(
    case: Case, compilations: int, names: Sequence[str] = ("ours", "optax")
) -> dict[str, Any]:
    """Compiles the optimizers, interleaved."""
    params = case.parameters()
    mesh = jax.tree.leaves(params)[0].sharding.mesh
    runs: dict[str, list[aot.Compilation]] = {name: [] for name in names}
    for _ in range(compilations):
        for name, run in runs.items():
            jax.clear_caches()
            run.append(aot.compile_traced(aot.trace_step(optimizers(params)[name], params), mesh))
    figures = {name: summary(run) for name, run in runs.items()}
    if "optax" not in figures:
        return dataclasses.asdict(case) | figures
    ratios = {
        key: figures["ours"][key] / figures["optax"][key]
        for key in (*SHOWN, "compile_cpu_seconds")
        if figures["ours"][key] and figures["optax"][key]
    }
    return dataclasses.asdict(case) | {"ours_by_optax": ratios} | figures


def summary(compilations: Sequence[aot.Compilation]) -> dict[str, Any]:
    """Returns the figures of one program."""
    first = compilations[0]
    least = {"roofline": dataclasses.asdict(first.roofline)} if first.roofline else {}
    return {
        **dataclasses.asdict(first.cost),
        "sent_bytes": first.cost.sent_bytes,
        "rematerializations": first.rematerializations,
        "compile_seconds": statistics.median(c.seconds for c in compilations),
        "compile_cpu_seconds": statistics.median(c.cpu_seconds for c in compilations),
        **least,
    }


def table(results: dict[str, Any]) -> str:
    """Formats the ratios, a line for each case, and then the goals."""
    lines = ["ours / optax: lower is better. " + results["note"]]
    for name, case in results["cases"].items():
        by = case["ours_by_optax"]
        cells = (f"{key} {by[key]:.3f}" for key in SHOWN if key in by)
        lines.append(f"{name:10} {case['topology'] or 'attached devices'}: {', '.join(cells)}")
    for name, goals in results["goals"].items():
        for key, most in goals.items():
            got = results["cases"].get(name, {}).get("ours_by_optax", {}).get(key)
            if got is not None:
                verdict = "met" if got <= most else "MISSED"
                lines.append(f"{name} {key}: {got:.3f}, at most {most:.2f}: {verdict}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Compiles, prints a table and writes the results."""
    parser = report.parser("sharded_step", "A sharded step of muon against optax's.")
    parser.add_argument("--gpu", action="store_true", help="for H100, H200 and B200")
    parser.add_argument("--case", choices={**CASES, **GPU_CASES}, nargs="*", help="only these")
    parser.add_argument("--compilations", type=int, default=1, help="of each program")
    parser.add_argument("--quick", action="store_true", help="small, on the attached devices")
    options = parser.parse_args(arguments)
    if options.gpu:
        name, flag, goals, cases = "sharded_step_gpu", " --gpu", GPU_GOALS, GPU_CASES
        installed, install = gpu.PLUGIN, gpu.INSTALL
    else:
        name, flag, goals, cases = "sharded_step", "", GOALS, CASES
        installed, install = tpu.LIBTPU, tpu.INSTALL
    if not (installed or options.quick):
        parser.error(install)
    cases = QUICK if options.quick else cases
    if unknown := set(options.case or ()) - set(cases):
        parser.error(f"--case: got {', '.join(sorted(unknown))}, expected {', '.join(cases)}")
    path = options.out / f"{name}.json"
    results = aot.head(f"sharded_step{flag}", on_gpu=options.gpu) | {"goals": goals, "cases": {}}
    if options.case and path.exists():  # the other cases are kept
        results["cases"] = json.loads(path.read_text())["cases"]
    for name in options.case or cases:
        results["cases"][name] = report.rounded(measure(cases[name], options.compilations))
        report.write_json(path, results)
    print(table(results))


if __name__ == "__main__":
    main()
