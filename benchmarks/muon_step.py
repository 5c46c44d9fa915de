"""One optimizer step on CPU: `muon` against `optax.contrib.muon` and `torch.optim.Muon`.

    python benchmarks/muon_step.py

Writes results/muon_step.json and results/muon_step.png. A step takes gradients and gives the new
parameters; JAX may reuse the memory of the old ones (donation), torch works in place. FLOPs are
those of all matrix products of the traced step; temporary memory is the compiler's figure. Every
wall time is taken in turn with those of the others and with a plain square product, which tells
what the machine gives at that moment. Without torch its entries are absent. The program stops if
the optimizers do not give the same update.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
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
from trees import TREES, Leaves, Tree, dot_flops, floor, gaussian, matrices

import muonclip_jax as mc

LEARNING_RATE = 0.02
COMPILATIONS = 3
SQUARE, SMALL_SQUARE = 2048, 256  # side of the plain product, and that of a quick run
# Relative Frobenius distance from our update at which a run stops. optax: the Gram form rounds
# otherwise, measured 4e-6; torch: its products are bfloat16, measured 2e-2.
FARTHEST = {"optax": 1e-4, "torch": 1e-1}

TORCH = importlib.util.find_spec("torch") is not None


def last_two_axes(params: Any) -> Any:
    """Sends stacks to optax's Muon too, which without this would leave them to Adam."""
    return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), params)


OPTIMIZERS = {
    "ours": mc.muon(LEARNING_RATE),
    "optax": contrib.muon(LEARNING_RATE, muon_weight_dimension_numbers=last_two_axes),
}


def trace(tx: optax.GradientTransformation, leaves: Leaves) -> Any:
    """Traces a step (gradients, state, params) -> (params, state) that may overwrite the latter."""

    def step(gradients, state, params):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, leaves)
    return jax.jit(step, donate_argnums=(1, 2)).trace(leaves, state, leaves)


def count(tree: Tree, compilations: int) -> dict[str, dict[str, float]]:
    """Asks trace and compiler about the counted layers, compiling in turn."""
    leaves = tree.leaves(tree.counted)
    figures: dict[str, dict[str, float]] = {name: {} for name in OPTIMIZERS}
    seconds: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for _ in range(compilations):
        for name, tx in OPTIMIZERS.items():
            jax.clear_caches()
            traced = trace(tx, leaves)
            lowered = traced.lower()
            start = time.perf_counter()
            compiled = lowered.compile()
            seconds[name].append(time.perf_counter() - start)
            figures[name] = {
                "flops": dot_flops(traced.jaxpr.jaxpr),
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            }
    for name, taken in seconds.items():
        figures[name]["compile_seconds"] = statistics.median(taken)
    if TORCH:
        figures["torch"] = {"flops": torch_flops(leaves)}
    for figure in figures.values():
        figure["flops_by_floor"] = figure["flops"] / floor(leaves)
    return figures


class JaxRun:
    """An optax optimizer on parameters that start at zero, so that the first step is its update."""

    def __init__(self, tx: optax.GradientTransformation, gradients: dict) -> None:
        self.gradients = jax.tree.map(jnp.asarray, gradients)
        self.params = jax.tree.map(jnp.zeros_like, self.gradients)
        self.state = tx.init(self.params)
        shapes = jax.tree.map(lambda g: jax.ShapeDtypeStruct(g.shape, g.dtype), gradients)
        self.step = trace(tx, shapes).lower().compile()

    def __call__(self) -> None:
        """Takes a step and waits for it."""
        self.params, self.state = self.step(self.gradients, self.state, self.params)
        jax.block_until_ready(self.params)

    def leaves(self) -> list[np.ndarray]:
        """Gives the parameters as they now are."""
        return [np.array(leaf) for leaf in jax.tree.leaves(self.params)]


class TorchRun:
    """`torch.optim.Muon` on the same matrices, one by one and as torch lays them: outputs first."""

    def __init__(self, gradients: list[np.ndarray] | None, sides: list[tuple[int, int, int]]):
        import torch

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
        """Takes a step."""
        self.optimizer.step()

    def leaves(self) -> list[np.ndarray]:
        """Gives the parameters as they now are, laid as ours."""
        flat = iter(param.detach().numpy().T for param in self.params)
        return [np.stack([next(flat) for _ in range(batch)]) for batch, _, _ in self.sides]


def torch_flops(leaves: Leaves) -> float:
    """Counts the products of torch's step by torch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    run = TorchRun(None, matrices(leaves))
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def square_products(side: int) -> dict[str, Callable[[], Any]]:
    """Makes a plain product for each array library: what the machine gives at its best."""
    x = np.random.default_rng(0).standard_normal((side, side), np.float32)
    ours = jnp.asarray(x)
    matmul = jax.jit(jnp.matmul)
    products: dict[str, Callable[[], Any]] = {
        "jax_float32": lambda: matmul(ours, ours).block_until_ready()
    }
    if TORCH:
        import torch

        theirs = torch.from_numpy(x).bfloat16()
        products["torch_bfloat16"] = lambda: theirs @ theirs
    return products


def distance(theirs: list[np.ndarray], ours: list[np.ndarray]) -> float:
    """Gives the largest relative Frobenius distance of any two leaves."""
    return max(
        float(np.linalg.norm(a.reshape(b.shape) - b) / np.linalg.norm(b))
        for a, b in zip(theirs, ours, strict=True)
    )


def time_in_turn(tree: Tree, side: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Times steps of the timed layers; the first step is not timed but compared."""
    leaves = tree.leaves(tree.timed)
    gradients = gaussian(leaves)
    runs: dict[str, Any] = {name: JaxRun(tx, gradients) for name, tx in OPTIMIZERS.items()}
    if TORCH:
        runs["torch"] = TorchRun(jax.tree.leaves(gradients), matrices(leaves))
    calls = runs | square_products(side)
    for call in calls.values():
        call()
    ours = runs["ours"].leaves()
    distances = {name: distance(run.leaves(), ours) for name, run in runs.items() if name != "ours"}
    for name, farthest in FARTHEST.items():
        if not distances.get(name, 0.0) <= farthest:
            raise RuntimeError(f"{name} does other work: its update is {distances[name]:.1e} away.")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(tree.steps):
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


def measure(tree: Tree, compilations: int, side: int) -> dict:
    """Counts and times one tree."""
    figures = count(tree, compilations)
    seconds, distances = time_in_turn(tree, side)
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    rates = {name: 2 * side**3 / median[name] for name in seconds if name not in figures}
    least = floor(tree.leaves(tree.timed)) / rates["jax_float32"]
    for name, figure in figures.items():
        flops = figure["flops"] * tree.timed / tree.counted
        rate = rates["torch_bfloat16" if name == "torch" else "jax_float32"]
        figure["wall_seconds"] = median[name]
        figure["rate_by_square_product"] = flops / median[name] / rate
        figure["time_by_floor"] = median[name] / least
    versus = functools.partial(ratios, figures["ours"], our_times=seconds["ours"])
    return {
        "layers": {"counted": tree.counted, "timed": tree.timed},
        "timed_steps": tree.steps,
        "floor_flops": floor(tree.leaves(tree.counted)),
        "square_product_gflops": {name: rate / 1e9 for name, rate in rates.items()},
        "distance_from_ours": distances,
        **{
            f"ours_by_{name}": versus(figures[name], their_times=seconds[name])
            for name in figures
            if name != "ours"
        },
        **figures,
    }


def about() -> dict:
    """Tells what was measured, where and when."""
    names = ("muonclip-jax", "jax", "jaxlib", "optax", *(["torch"] if TORCH else []))
    return {
        "command": "python benchmarks/muon_step.py",
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in names},
        "machine": f"{os.cpu_count()} {platform.machine()} cores, {jax.default_backend()}",
        "load_before": os.getloadavg()[0],  # programs that ran in the last minute; best 0
        "optimizers": {
            "ours": "muonclip_jax.muon, float32",
            "optax": "optax.contrib.muon, float32, told to take stacks as matrices",
            "torch": "torch.optim.Muon, eager; its products are bfloat16"
            if TORCH
            else "not installed",
        },
    }


def rounded(value: Any) -> Any:
    """Keeps four digits of every number that is not whole."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.4g}")
    return value


def table(results: dict) -> str:
    """Lays the ratios of every tree out, a line for each opponent and one for ours alone."""
    lines = [f"load before: {results['load_before']:.2f}, for wall times it should be 0"]
    for name, tree in results["trees"].items():
        own = tree["ours"]
        lines.append(
            f"{name}: ours by the floor: FLOPs {own['flops_by_floor']:.3f}, "
            f"time {own['time_by_floor']:.3f}; "
            f"rate by that of a square product {own['rate_by_square_product']:.3f}"
        )
        for other in ("optax", "torch"):
            ratio = tree.get(f"ours_by_{other}", {})
            cells = [f"{k} {v:.3f}" for k, v in ratio.items() if isinstance(v, float | int)]
            if cells:
                lines.append(f"  ours by {other}: " + ", ".join(cells).replace("_", " "))
    return "\n".join(lines)


def draw(results: dict) -> Figure:
    """Draws ours by optax: a group of bars for each tree."""
    bars = {
        "flops": ("FLOPs of products", "#2a6f97"),
        "wall_time": ("wall time", "#e36414"),
        "compile_time": ("compile time", "#8d99ae"),
        "temporary_bytes": ("temporary memory", "#7b9e4b"),
    }
    trees = results["trees"]
    width = 0.8 / len(bars)
    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    axes = figure.add_subplot(ylabel="ours by optax")
    for i, (key, (label, color)) in enumerate(bars.items()):
        heights = [tree["ours_by_optax"][key] for tree in trees.values()]
        where = [j + (i - (len(bars) - 1) / 2) * width for j in range(len(heights))]
        drawn = axes.bar(where, heights, 0.92 * width, color=color, label=label)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
        axes.bar_label(drawn, fmt="%.2f", fontsize=8, padding=3, bbox=box)
    axes.axhline(1, color="#444444", linewidth=1, zorder=0.9)
    axes.annotate("optax", (0, 1), (2, 3), ("axes fraction", "data"), "offset points", fontsize=8)
    axes.set_xticks(range(len(trees)), [name.replace("_", " ") for name in trees])
    axes.tick_params(length=0)
    axes.set_ylim(0, max(1.15, 1.1 * axes.get_ylim()[1]))
    axes.grid(axis="y", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(
        "One step of muonclip_jax.muon by one of optax.contrib.muon: lower is better", loc="left"
    )
    figure.legend(frameon=False, loc="outside lower center", ncols=len(bars))
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints a table and writes the results."""
    parser = argparse.ArgumentParser(description="One step of muon against optax's and torch's.")
    parser.add_argument("--tree", choices=TREES, help="measure this one alone")
    parser.add_argument("--quick", action="store_true", help="tiny matrices: a test of the program")
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parent / "results",
        help="folder of muon_step.json and muon_step.png",
    )
    options = parser.parse_args(arguments)
    results: dict[str, Any] = about() | {"trees": {}}
    for name in [options.tree] if options.tree else TREES:
        tree = TREES[name].quick() if options.quick else TREES[name]
        compilations, side = (1, SMALL_SQUARE) if options.quick else (COMPILATIONS, SQUARE)
        results["trees"][name] = rounded(measure(tree, compilations, side))
    print(table(results))
    (options.out / "muon_step.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(results).savefig(options.out / "muon_step.png", format="png", dpi=120)


if __name__ == "__main__":
    main()
