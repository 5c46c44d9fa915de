"""Whole optimizer steps with the symmetric-product kernel, compiled for TPU slices.

    pip install "muonclip-jax[tpu]"
    python -m benchmarks.tpu_kernel_step

Writes results/tpu_kernel_step.json: the steps of `sharded_step` and `kimi_k2_step` with
`ns_products="pallas"`, beside those with XLA's products and beside optax's. The compiler has no
cycles for a Pallas kernel: those of `tpu_kernel_cycles` are added, to `seconds` at the clock of the
chip. No TPU is needed, nothing is executed, and only the compiler is timed.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import muonclip_jax as mc
from benchmarks import aot, kimi_k2_step, report, sharded_step, tpu
from benchmarks.kernel_cycles import cycles_of

# Cycles in a second of v5p: from its data sheet, and from the FLOPs that the compiler grants a
# chip, which is lower, to our disadvantage.
CLOCK = kimi_k2_step.CLOCK
LOW_CLOCK = 394e12 / (2 * 2 * 4 * 128**2)
CASES = ("stacks", "v5e", "v6e", "7x")
OPTIMIZERS = ("xla", "pallas", "optax")
K2 = "kimi_k2"
SHOWN = (
    *("seconds", "seconds_at_low_clock", "cycles", "flops"),
    *("sent_bytes", "temporary_bytes", "compile_cpu_seconds"),
)
# Largest ratio to optax's that is accepted, and to the compile time with XLA's products.
GOALS = {"stacks": {"seconds": 0.27, "flops": 0.43}, "v5e": {"cycles": 0.27}}
COMPILE_GOAL = 1.3


def optimizers(params: Any) -> dict[str, optax.GradientTransformation]:
    """Builds optax's Muon, and ours with either kind of products."""
    shardings = jax.tree.map(lambda x: x.sharding, params)
    settings = {"shardings": shardings, "ns_dtype": jnp.bfloat16, **sharded_step.SETTINGS}
    ours = {name: mc.muon(2e-4, ns_products=name, **settings) for name in ("xla", "pallas")}
    return ours | {"optax": sharded_step.optimizers(params)["optax"]}


def summary(compilation: aot.Compilation, kind: str) -> dict[str, Any]:
    """Returns the figures of a program, including the cycles of the kernel."""
    cost = compilation.cost
    kernel = cycles_of(cost.kernels, kind)
    return {
        **dataclasses.asdict(cost),
        "sent_bytes": cost.sent_bytes,
        "kernel_cycles": kernel,
        "cycles": cost.cycles + kernel,
        "seconds": cost.seconds and cost.seconds + kernel / CLOCK,
        "seconds_at_low_clock": cost.seconds and cost.seconds + kernel / LOW_CLOCK,
        "rematerializations": compilation.rematerializations,
        "compile_seconds": compilation.seconds,
        "compile_cpu_seconds": compilation.cpu_seconds,
    }


def ratios(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Divides the figures of one program by the figures of another."""
    return {key: one[key] / other[key] for key in SHOWN if one[key] and other[key]}


def measure(name: str, found: dict[str, Any], wanted: Sequence[str]) -> dict[str, Any]:
    """Compiles a step with each of the wanted optimizers that is not in `found`."""
    case = sharded_step.CASES[name]
    params = case.parameters()
    kind = tpu.topology_devices(case.topology)[0].device_kind
    for optimizer, tx in optimizers(params).items():
        if optimizer in found or optimizer not in wanted:
            continue
        jax.clear_caches()
        found[optimizer] = summary(aot.compile_traced(aot.trace_step(tx, params)), kind)
        print(name, optimizer, found[optimizer], flush=True)
    pairs = (("pallas", "optax"), ("xla", "optax"), ("pallas", "xla"))
    by = {
        f"{one}_by_{other}": ratios(found[one], found[other])
        for one, other in pairs
        if one in found and other in found
    }
    return dataclasses.asdict(case) | by | found


def measure_kimi_k2(found: dict[str, Any]) -> dict[str, Any]:
    """Compiles Algorithm 1 for Kimi K2 with the products that are not in `found`."""
    topology, shape = next(iter(kimi_k2_step.MESHES.items()))
    mesh = tpu.topology_mesh(topology, shape, kimi_k2_step.AXES)
    kind = mesh.devices.flat[0].device_kind
    for products in (name for name in ("xla", "pallas") if name not in found):
        jax.clear_caches()
        traced = kimi_k2_step.trace(kimi_k2_step.Model(), mesh, products)
        found[products] = summary(aot.compile_traced(traced), kind)
        print(K2, products, found[products], flush=True)
    return {"topology": topology, "pallas_by_xla": ratios(found["pallas"], found["xla"]), **found}


def table(results: dict[str, Any]) -> str:
    """Formats the ratios, a line for each pair of programs, and then the goals."""
    lines = ["lower is better. " + results["note"]]
    for name, case in results["cases"].items():
        for pair in ("pallas_by_optax", "xla_by_optax", "pallas_by_xla"):
            if pair in case:
                cells = ", ".join(f"{key} {value:.3f}" for key, value in case[pair].items())
                lines.append(f"{name} {case['topology']} {pair}: {cells}")
        goals = [("pallas_by_optax", *goal) for goal in GOALS.get(name, {}).items()]
        for pair, key, most in [*goals, ("pallas_by_xla", "compile_cpu_seconds", COMPILE_GOAL)]:
            if pair not in case:
                continue
            got = case[pair][key]
            verdict = "met" if got <= most else "MISSED"
            lines.append(f"{name} {pair} {key}: {got:.3f}, at most {most:.2f}: {verdict}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Compiles, prints a table and writes the results."""
    parser = report.parser("tpu_kernel_step", "Steps with the symmetric-product kernel.")
    parser.add_argument("--case", choices=(*CASES, K2), nargs="*", help="compile only these")
    parser.add_argument("--keep", action="store_true", help="compile only what has the kernel")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, nargs="*", default=OPTIMIZERS)
    options = parser.parse_args(arguments)
    if not tpu.LIBTPU:
        parser.error(tpu.INSTALL)
    path = options.out / "tpu_kernel_step.json"
    results = aot.head("tpu_kernel_step") | {"goals": GOALS, "cases": {}}
    if (options.case or options.keep) and path.exists():  # the other cases are kept
        results["cases"] = json.loads(path.read_text())["cases"]
    order = (*CASES, K2)
    for name in options.case or order:
        before = results["cases"].get(name, {}) if options.keep else {}
        found = {key: before[key] for key in ("xla", "optax") if key in before}
        found = measure_kimi_k2(found) if name == K2 else measure(name, found, options.optimizer)
        cases = results["cases"] | {name: report.rounded(found)}
        results["cases"] = {name: cases[name] for name in order if name in cases}
        report.write_json(path, results)
    print(table(results))


if __name__ == "__main__":
    main()
