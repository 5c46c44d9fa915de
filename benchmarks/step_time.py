"""One optimizer step on CPU: `muon` against `optax.contrib.muon` and `torch.optim.Muon`.

    python -m benchmarks.step_time

Writes results/step_time.json and results/step_time.png. A step maps gradients to the new
parameters. JAX donates the memory of the old ones, torch works in place. FLOPs are counted for all
matrix products of the compiled step, and temporary memory is the compiler's figure. Wall times are
interleaved with each other and with a plain square product, which shows the speed of the machine at
that moment. Without torch its entries are absent. The program stops if the optimizers do not
compute the same update.
"""

import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from optax import contrib

import muonclip_jax as mc
from benchmarks import report
from benchmarks.compiled import compiled_cost
from benchmarks.workloads import WORKLOADS, Params, Workload, gaussian, matrices, minimum_flops

LEARNING_RATE = 0.02
COMPILATIONS = 3
SQUARE, SMALL_SQUARE = 2048, 256  # side of the plain product, in full and quick runs
# Relative Frobenius distance from our update at which a run stops. optax: the Gram method rounds
# differently, measured 4e-6; torch: its products are bfloat16, measured 2e-2.
LARGEST_DISTANCE = {"optax": 1e-4, "torch": 1e-1}

TORCH = importlib.util.find_spec("torch") is not None


def last_two_axes(params: Any) -> Any:
    """Assigns stacks to optax's Muon, which by default accepts two-axis leaves only."""
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), params)


OPTIMIZERS = {
    "ours": mc.muon(LEARNING_RATE),
    "optax": contrib.muon(LEARNING_RATE, muon_weight_dimension_numbers=last_two_axes),
}


def trace(tx: optax.GradientTransformation, params: Params) -> Any:
    """Traces a step (gradients, state, params) -> (params, state) that donates the latter two."""

    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    return jax.jit(step, donate_argnums=(1, 2)).trace(params, state, params)


def compile_counted(workload: Workload, compilations: int) -> dict[str, dict[str, float]]:
    """Compiles a step of the counted layers, optimizers in turn, and reads its cost."""
    params = workload.params(workload.counted)
    figures: dict[str, dict[str, float]] = {name: {} for name in OPTIMIZERS}
    seconds: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for _ in range(compilations):
        for name, tx in OPTIMIZERS.items():
            jax.clear_caches()
            lowered = trace(tx, params).lower()
            start = time.perf_counter()
            compiled = lowered.compile()
            seconds[name].append(time.perf_counter() - start)
            cost = compiled_cost(compiled)
            figures[name] = {"flops": cost.flops, "temporary_bytes": cost.temporary_bytes or 0}
    for name, taken in seconds.items():
        figures[name]["compile_seconds"] = statistics.median(taken)
    if TORCH:
        figures["torch"] = {"flops": torch_flops(params)}
    for figure in figures.values():
        figure["flops_by_floor"] = figure["flops"] / minimum_flops(params)
    return figures


class JaxRun:
    """An optax optimizer on parameters that start at zero: after one step they are its update."""

    def __init__(self, tx: optax.GradientTransformation, gradients: dict) -> None:
        self.gradients = jax.tree.map(jnp.asarray, gradients)
        self.params = jax.tree.map(jnp.zeros_like, self.gradients)
        self.state = tx.init(self.params)
        shapes = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape, g.dtype), gradients)
        self.step = trace(tx, shapes).lower().compile()

    def __call__(self) -> None:
        """Executes a step and waits for it."""
        self.params, self.state = self.step(self.gradients, self.state, self.params)
        jax.block_until_ready(self.params)

    def leaves(self) -> list[np.ndarray]:
        """Returns the current parameters."""
        return [np.array(leaf) for leaf in jax.tree.leaves(self.params)]


class TorchRun:
    """`torch.optim.Muon` on the same matrices, one parameter each, outputs first as in torch."""

    def __init__(self, gradients: list[np.ndarray] | None, sides: list[tuple[int, int, int]]):
        import torch  # pyright: ignore[reportMissingImports]

        torch.set_num_threads(os.cpu_count() or 1)
        device = "cpu" if gradients else "meta"  # meta: shapes without data
        self.sides, self.params = sides, []
        for i, (batch, rows, columns) in enumerate(sides):
            for j in range(batch):
                param = torch.zeros(columns, rows, device=device, requires_grad=True)
                param.grad = torch.zeros(columns, rows, device=device)
                if gradients:
                    param.grad.copy_(torch.from_numpy(gradients[i].reshape(-1, rows, columns)[j].T))
                self.params.append(param)
        self.optimizer = torch.optim.Muon(self.params, lr=LEARNING_RATE, weight_decay=0.0)

    def __call__(self) -> None:
        """Executes a step."""
        self.optimizer.step()

    def leaves(self) -> list[np.ndarray]:
        """Returns the current parameters, inputs first."""
        flat = iter(param.detach().numpy().T for param in self.params)
        return [np.stack([next(flat) for _ in range(batch)]) for batch, _, _ in self.sides]


def torch_flops(params: Params) -> float:
    """Counts the FLOPs of torch's step with torch's own counter."""
    from torch.utils.flop_counter import (  # pyright: ignore[reportMissingImports]
        FlopCounterMode,
    )

    run = TorchRun(None, matrices(params))
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def square_products(side: int) -> dict[str, Callable[[], Any]]:
    """Makes a plain product for each array library: the best speed of the machine."""
    x = np.random.default_rng(0).standard_normal((side, side), np.float32)
    ours = jnp.asarray(x)
    matmul = jax.jit(jnp.matmul)
    products: dict[str, Callable[[], Any]] = {
        "jax_float32": lambda: matmul(ours, ours).block_until_ready()
    }
    if TORCH:
        import torch  # pyright: ignore[reportMissingImports]

        theirs = torch.from_numpy(x).bfloat16()
        products["torch_bfloat16"] = lambda: theirs @ theirs
    return products


def distance(theirs: list[np.ndarray], ours: list[np.ndarray]) -> float:
    """Returns the largest relative Frobenius distance over the leaves."""
    return max(
        float(np.linalg.norm(a.reshape(b.shape) - b) / np.linalg.norm(b))
        for a, b in zip(theirs, ours, strict=True)
    )


def time_interleaved(
    workload: Workload, side: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Times steps of the timed layers; the first step is compared instead of timed."""
    params = workload.params(workload.timed)
    gradients = gaussian(params)
    runs: dict[str, Any] = {name: JaxRun(tx, gradients) for name, tx in OPTIMIZERS.items()}
    if TORCH:
        runs["torch"] = TorchRun(jax.tree.leaves(gradients), matrices(params))
    calls = runs | square_products(side)
    for call in calls.values():
        call()
    ours = runs["ours"].leaves()
    distances = {name: distance(run.leaves(), ours) for name, run in runs.items() if name != "ours"}
    for name, largest in LARGEST_DISTANCE.items():
        if not distances.get(name, 0.0) <= largest:
            raise RuntimeError(
                f"{name} computes a different update: relative distance {distances[name]:.1e}, "
                f"expected at most {largest:.0e}."
            )
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(workload.steps):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds, distances


def ratios(ours: dict, theirs: dict, our_times: list[float], their_times: list[float]) -> dict:
    """Divides our figures by theirs; wall times pair by pair."""
    pairs = [a / b for a, b in zip(our_times, their_times, strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
    found = {"flops": ours["flops"] / theirs["flops"]}
    if "temporary_bytes" in theirs:
        found["temporary_bytes"] = ours["temporary_bytes"] / theirs["temporary_bytes"]
        found["compile_time"] = ours["compile_seconds"] / theirs["compile_seconds"]
    return found | {"wall_time": middle, "wall_time_quartiles": [low, high]}


def measure(workload: Workload, compilations: int, side: int) -> dict:
    """Compiles and times one workload."""
    figures = compile_counted(workload, compilations)
    seconds, distances = time_interleaved(workload, side)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    rates = {name: 2 * side**3 / median[name] for name in seconds if name not in figures}
    least = minimum_flops(workload.params(workload.timed)) / rates["jax_float32"]
    for name, figure in figures.items():
        flops = figure["flops"] * workload.timed / workload.counted
        rate = rates["torch_bfloat16" if name == "torch" else "jax_float32"]
        figure["wall_seconds"] = median[name]
        figure["rate_by_square_product"] = flops / median[name] / rate
        figure["time_by_floor"] = median[name] / least
    versus = functools.partial(ratios, figures["ours"], our_times=seconds["ours"])
    return {
        "layers": {"counted": workload.counted, "timed": workload.timed},
        "timed_steps": workload.steps,
        "floor_flops": minimum_flops(workload.params(workload.counted)),
        "square_product_gflops": {name: rate / 1e9 for name, rate in rates.items()},
        "distance_from_ours": distances,
        **{
            f"ours_by_{name}": versus(figures[name], their_times=seconds[name])
            for name in figures
            if name != "ours"
        },
        **figures,
    }


def head() -> dict:
    """Returns the head of the results."""
    torch = "torch.optim.Muon, eager; its products are bfloat16" if TORCH else "not installed"
    return report.provenance("step_time", "optax", *(["torch"] if TORCH else [])) | {
        "optimizers": {
            "ours": "muonclip_jax.muon, float32",
            "optax": "optax.contrib.muon, float32, with dimension numbers for stacks",
            "torch": torch,
        },
        "trees": {},
    }


def table(results: dict) -> str:
    """Formats the ratios of every workload: a line for each peer and one for ours alone."""
    lines = [f"load before: {results['load_before']:.2f}, for wall times it should be 0"]
    for name, workload in results["trees"].items():
        own = workload["ours"]
        lines.append(
            f"{name}: ours / least work: FLOPs {own['flops_by_floor']:.3f}, "
            f"time {own['time_by_floor']:.3f}; "
            f"rate / rate of a square product {own['rate_by_square_product']:.3f}"
        )
        for peer in ("optax", "torch"):
            ratio = workload.get(f"ours_by_{peer}", {})
            cells = [f"{k} {v:.3f}" for k, v in ratio.items() if isinstance(v, float | int)]
            if cells:
                lines.append(f"  ours / {peer}: " + ", ".join(cells).replace("_", " "))
    return "\n".join(lines)


def draw(results: dict) -> Figure:
    """Draws ours / optax: a group of bars for each workload."""
    bars = {
        "flops": ("FLOPs of products", "#2a6f97"),
        "wall_time": ("wall time", "#e36414"),
        "compile_time": ("compile time", "#8d99ae"),
        "temporary_bytes": ("temporary memory", "#7b9e4b"),
    }
    workloads = results["trees"]
    width = 0.8 / len(bars)
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = figure.add_subplot(ylabel="ours / optax")
    for i, (key, (label, color)) in enumerate(bars.items()):
        heights = [one["ours_by_optax"][key] for one in workloads.values()]
        positions = [j + (i - (len(bars) - 1) / 2) * width for j in range(len(heights))]
        drawn = axes.bar(positions, heights, 0.92 * width, color=color, label=label)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(drawn, fmt="%.2f", fontsize=8, padding=3, bbox=box)
    axes.axhline(1, color="#444444", linewidth=1, zorder=0.9)
    axes.annotate("optax", (0, 1), (2, 3), ("axes fraction", "data"), "offset points", fontsize=8)
    axes.set_xticks(range(len(workloads)), [name.replace("_", " ") for name in workloads])
    axes.tick_params(length=0)
    axes.set_ylim(0, max(1.15, 1.1 * axes.get_ylim()[1]))
    axes.grid(axis="y", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(
        "One step of muonclip_jax.muon / optax.contrib.muon: lower is better", loc="left"
    )
    figure.legend(frameon=False, loc="outside lower center", ncols=len(bars))
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints a table and writes the results."""
    parser = report.parser("step_time", "One step of muon against optax's and torch's.")
    parser.add_argument("--workload", choices=WORKLOADS, help="measure only this one")
    parser.add_argument("--quick", action="store_true", help="small matrices: a smoke run")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = head()
    for name in [options.workload] if options.workload else WORKLOADS:
        workload = WORKLOADS[name].quick() if options.quick else WORKLOADS[name]
        compilations, side = (1, SMALL_SQUARE) if options.quick else (COMPILATIONS, SQUARE)
        results["trees"][name] = report.rounded(measure(workload, compilations, side))
    print(table(results))
    report.write_json(options.out / "step_time.json", results)
    draw(results).savefig(options.out / "step_time.png", format="png", dpi=120)


if __name__ == "__main__":
    main()
