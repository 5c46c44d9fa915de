"""Training with the Muon of optax at equal settings, and the time of each optimizer in a step."""

import dataclasses
import functools
import time
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence import plotting
from benchmarks.evidence.runner import Measure, lookup
from benchmarks.evidence.summaries import SEEDS, mean_sd, paired_difference, seeds_of
from benchmarks.evidence.training import LOGGED, SEQ_LEN, Run, corpus, finite, optimizer
from benchmarks.report import markdown
from examples.language_model import data
from examples.language_model.models import gqa
from examples.language_model.training.step import make_loss
from muonclip_jax._orthogonalize.choices import _SMALLEST_MIRRORED

TITLE = "Compared with optax, and with AdamW"
CLAIM = "At equal settings the loss curve equals optax.contrib.muon, and the step is faster."
SOURCE = "optax.contrib.muon (optax 0.2.8); Moonlight, arXiv 2502.16982, section 2.3, on overhead"
PUBLISHED = "an overhead of Muon over AdamW of 1 to 3 % of the step, at scale"
RATE = 0.016
OURS = Run(RATE, 0, optimizer="mc.muon")
PEER = dataclasses.replace(OURS, optimizer="optax.muon")
EARLY = 5  # logged points, 40 steps, before rounding errors grow
CLOSE = 1e-4  # relative difference of their losses; measured: see the result

ROUNDS = 31
OPTIMIZERS = ("mc.muon", "optax.muon", "adamw")
# One grows, the other keeps its first value.
SIZES = {"width": (64, 128, 256, 512), "batch": (8, 16, 32)}
ENDS = "width 64, batch 8", "width 512, batch 8", "width 64, batch 32"


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Times of the parts of a step, interleaved; the text is [batch, 128].

    Attributes:
      width: Width of the residual stream of a GQA model with 4 layers.
      batch: Number of sequences.
    """

    width: int
    batch: int
    alone = True  # nothing else runs at the same time

    @property
    def program(self) -> "StepTime":
        """No other task shares its compiled programs."""
        return self

    def measure(self) -> dict[str, Any]:
        """Times forward and backward pass, and each optimizer.

        Returns:
          `gradients`, median milliseconds of both passes; by optimizer `milliseconds`, median of
          its update, and `share`, median fraction of a step; `by_optax`, quartiles of the time of
          our update / the time of optax's.
        """
        model = gqa.GQA(4, self.width, self.width // 16, self.width // 32, 16, 3 * self.width)
        text = data.batch(corpus().train, 0, 1, self.batch, SEQ_LEN)
        params = nn.unbox(model.init(jax.random.key(0), jnp.int32(text[:1, :2])))["params"]
        gradients = jax.jit(jax.grad(lambda p: make_loss(model)(p, text, {})[0]))
        parts = {"gradients": functools.partial(gradients, params)}
        for name in OPTIMIZERS:
            tx = optimizer(Run(RATE, 0, optimizer=name), params, RATE)
            update = jax.jit(tx.update)
            parts[name] = functools.partial(update, gradients(params), tx.init(params), params)
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        order = np.random.default_rng(0)
        for round_ in range(ROUNDS + 2):
            for name in order.permutation(list(parts)):  # a new order in every round
                start = time.perf_counter()
                jax.block_until_ready(parts[name]())
                if round_ >= 2:  # the first compiles
                    seconds[name].append(time.perf_counter() - start)
        took = {name: np.array(x) for name, x in seconds.items()}
        passes = took.pop("gradients")
        by_optax = np.quantile(took["mc.muon"] / took["optax.muon"], [0.25, 0.5, 0.75])
        return {
            "gradients": finite(1e3 * np.median(passes)),
            "milliseconds": {name: finite(1e3 * np.median(x)) for name, x in took.items()},
            "share": {name: finite(np.median(x / (x + passes))) for name, x in took.items()},
            "by_optax": [*map(finite, by_optax)],
        }


def sizes() -> list[StepTime]:
    """Returns the sizes, each once."""
    smallest = {name: values[0] for name, values in SIZES.items()}
    grown = [smallest | {name: value} for name, values in SIZES.items() for value in values]
    return list(dict.fromkeys(StepTime(**size) for size in grown))


def study(measure: Measure) -> dict[str, Any]:
    """Trains with both, and times both."""
    measure([*seeds_of(OURS), *seeds_of(PEER)])
    ours, peer = measure(seeds_of(OURS)), measure(seeds_of(PEER))
    times = {f"width {s.width}, batch {s.batch}": measure([s])[0] for s in sizes()}
    return {
        "largest_early_difference": largest_difference(ours, peer, EARLY),
        "largest_difference": largest_difference(ours, peer),
        "loss_minus_optax": paired_difference(ours, peer),
        "update_time_by_optax": {name: line["by_optax"] for name, line in times.items()},
        "share_of_step": {name: line["share"] for name, line in times.items()},
    }


def largest_difference(
    ours: list[dict[str, Any]], peer: list[dict[str, Any]], points: int | None = None
) -> float | None:
    """Returns the largest relative difference of training losses over the first points."""
    a, b = (np.array([record["losses"][:points] for record in part]) for part in (ours, peer))
    return finite(np.max(np.abs(a - b) / b))


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: equal early losses, final losses within seed noise, and faster at every size."""
    minus = ours["loss_minus_optax"]
    same = ours["largest_early_difference"] < CLOSE
    equal = abs(minus["mean"]) <= 2 * max(minus["sd"], 1e-3)
    return plotting.judge(same and equal, max(medians(ours).values()) < 1)


def medians(ours: Mapping[str, Any]) -> dict[str, float]:
    """Returns the median time of our update / optax's at each size."""
    return {name: median for name, (_, median, _) in ours["update_time_by_optax"].items()}


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    times, gap = medians(ours).values(), mean_sd(ours["loss_minus_optax"])
    return f"loss differs by {gap}; {min(times):.2f} to {max(times):.2f} of optax's update time"


def at_most(difference: float) -> str:
    """Formats a relative difference; one below the last digit is not shown as zero."""
    return "less than 0.001 %" if difference < 1e-5 else f"at most {100 * difference:.3f} %"


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    shares = [f"{name}, share of a step" for name in OPTIMIZERS]
    columns = ("model and text", "time / optax's (quartiles)", *shares)
    rows = [
        [
            name,
            "{1:.2f} ({0:.2f} to {2:.2f})".format(*ours["update_time_by_optax"][name]),
            *(f"{share[optimizer_]:.1%}" for optimizer_ in OPTIMIZERS),
        ]
        for name, share in ours["share_of_step"].items()
    ]
    first, wide, batch = (ours["share_of_step"][end]["mc.muon"] for end in ENDS)
    adamw = [share["adamw"] for share in ours["share_of_step"].values()]
    times = medians(ours)
    slowest, fastest = max(times, key=times.__getitem__), min(times, key=times.__getitem__)
    early = EARLY * OURS.steps // LOGGED
    return f"""\
`mc.muon` trains like `optax.contrib.muon`, and its update takes {min(times.values()):.2f} to
{max(times.values()):.2f} of the time.

With common defaults the training losses differ by {at_most(ours["largest_early_difference"])} in
the first {early} steps and by {at_most(ours["largest_difference"])} in all {OURS.steps}. The
validation losses differ by {mean_sd(ours["loss_minus_optax"], 4)}.

Why "partly": the verdict needs equal losses, and a faster update at every size. The slowest is
{times[slowest]:.2f} of the time, at {slowest}.

The ratio is smallest at {fastest}, and smaller still on the matrices of
[GPT-2 and larger models](benchmarks.md). From a side of {_SMALLEST_MIRRORED["cpu"]} on, symmetric
products are mirrored. Wide matrices use the Gram method at every width.

The share of Muon in a step grows with the width, from {first:.0%} to {wide:.0%}: its FLOPs grow
with the cube of the width, and the FLOPs of the model with the square. The share falls with the
batch, from {first:.0%} to {batch:.0%}, because the update does not depend on the batch. AdamW takes
{min(adamw):.1%} to {max(adamw):.1%}.

{markdown(columns, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws both loss curves, and the share of a step over batch and width."""
    measure = lookup(result["runs"])
    figure, (curves, *shares) = plotting.panels(3)
    for run, name, style in ((OURS, "muonclip_jax", "solid"), (PEER, "optax", "dotted")):
        for seed, record in enumerate(measure(seeds_of(run))):
            label = name if seed == 0 else None
            color = plotting.COLORS[seed]
            curves.plot(record["logged"], record["losses"], color=color, ls=style, label=label)
    curves.set(xlabel="step", ylabel="training loss, nats per byte")
    curves.set_title(f"mc.muon and optax.contrib.muon, {len(SEEDS)} seeds")
    curves.legend(frameon=False)
    for axes, (name, values) in zip(shares, SIZES.items(), strict=True):
        smallest = {other: rest[0] for other, rest in SIZES.items()}
        for optimizer_, color in zip(OPTIMIZERS, plotting.COLORS, strict=False):
            records = measure([StepTime(**smallest | {name: value}) for value in values])
            y = [100 * record["share"][optimizer_] for record in records]
            axes.plot(values, y, marker="o", color=color, label=optimizer_)
        axes.set(xlabel=name, ylabel="% of a step", ylim=(0, None))
        axes.legend(frameon=False)
    return figure
