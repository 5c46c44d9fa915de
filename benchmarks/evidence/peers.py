"""Beside optax's Muon: the same training, in less time. And what any optimizer costs of a step."""

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

from benchmarks.evidence import drawing
from benchmarks.evidence.measures import SEEDS, paired, seeds_of, table, text
from benchmarks.evidence.runner import Ask, lookup
from benchmarks.evidence.tasks import LOGGED, SEQ_LEN, Run, corpus, finite, optimizer
from examples.language_model import data
from examples.language_model.models import gqa
from examples.language_model.training.step import make_loss
from muonclip_jax._orthogonalize.newton_schulz import _SMALLEST_IN_BLOCKS

TITLE = "Beside optax, and beside AdamW"
CLAIM = "At equal settings the loss curve is that of optax.contrib.muon, and the step is faster."
SOURCE = "optax.contrib.muon (optax 0.2.8); Moonlight, arXiv 2502.16982, section 2.3, on overhead"
PUBLISHED = "an overhead of Muon over AdamW of 1 to 3 % of the step, at scale"
RATE = 0.016
OURS = Run(RATE, 0, optimizer="mc.muon")
PEER = dataclasses.replace(OURS, optimizer="optax.muon")
EARLY = 5  # logged points, 40 steps, over which rounding has not yet grown
CLOSE = 1e-4  # of the loss of those; measured: see the result

TURNS = 31
OPTIMIZERS = ("mc.muon", "optax.muon", "adamw")
# One grows, the other stays at its first.
SIZES = {"width": (64, 128, 256, 512), "batch": (8, 16, 32)}
ENDS = "width 64, batch 8", "width 512, batch 8", "width 64, batch 32"


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Times of the parts of a step, each once a turn; the text is [batch, 128].

    Attributes:
      width: Of the residual stream of a GQA model with 4 layers.
      batch: Sequences.
    """

    width: int
    batch: int
    alone = True  # nothing else runs beside it

    @property
    def program(self) -> "StepTime":
        """Each compiles programs of its own."""
        return self

    def measure(self) -> dict[str, Any]:
        """Times forward and backward pass, and each optimizer.

        Returns:
          `gradients`, median milliseconds of both passes; by optimizer `milliseconds`, median of
          its update, and `share`, median over turns of what it takes of a step; `by_optax`,
          quartiles over turns of our update's time by that of optax.
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
        for turn in range(TURNS + 2):
            for name in order.permutation(list(parts)):  # each comes after each of the others
                start = time.perf_counter()
                jax.block_until_ready(parts[name]())
                if turn >= 2:  # the first compiles
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
    """Gives the sizes, each once."""
    smallest = {name: values[0] for name, values in SIZES.items()}
    grown = [smallest | {name: value} for name, values in SIZES.items() for value in values]
    return list(dict.fromkeys(StepTime(**size) for size in grown))


def study(ask: Ask) -> dict[str, Any]:
    """Trains with both, and takes the times."""
    ask([*seeds_of(OURS), *seeds_of(PEER)])
    ours, peer = ask(seeds_of(OURS)), ask(seeds_of(PEER))
    times = {f"width {s.width}, batch {s.batch}": ask([s])[0] for s in sizes()}
    return {
        "largest_early_difference": largest_difference(ours, peer, EARLY),
        "largest_difference": largest_difference(ours, peer),
        "loss_minus_optax": paired(ours, peer),
        "update_time_by_optax": {name: line["by_optax"] for name, line in times.items()},
        "share_of_step": {name: line["share"] for name, line in times.items()},
    }


def largest_difference(
    ours: list[dict[str, Any]], peer: list[dict[str, Any]], points: int | None = None
) -> float | None:
    """Gives the largest relative difference of training losses, over the first logged points."""
    a, b = (np.array([record["losses"][:points] for record in part]) for part in (ours, peer))
    return finite(np.max(np.abs(a - b) / b))


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: the same loss early, the final one within seed noise, and every median faster."""
    minus = ours["loss_minus_optax"]
    same = ours["largest_early_difference"] < CLOSE
    alike = abs(minus["mean"]) <= 2 * max(minus["sd"], 1e-3)
    return drawing.judge(same and alike, max(medians(ours).values()) < 1)


def medians(ours: Mapping[str, Any]) -> dict[str, float]:
    """Gives the time of our update by that of optax, at each size."""
    return {name: median for name, (_, median, _) in ours["update_time_by_optax"].items()}


def short(ours: Mapping[str, Any]) -> str:
    """Says it in a line."""
    times, gap = medians(ours).values(), text(ours["loss_minus_optax"])
    return f"{gap} of loss; {min(times):.2f} to {max(times):.2f} of the time of optax's update"


def tell(ours: Mapping[str, Any]) -> str:
    """Says it in three sentences, and a table."""
    shares = [f"{name}, of a step" for name in OPTIMIZERS]
    columns = ("model and text", "by optax's time (quartiles)", *shares)
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
    widest = times.pop(ENDS[1])
    return f"""\
With the defaults that both have, the training losses differ by at most
{ours["largest_early_difference"]:.3%} in the first {EARLY * OURS.steps // LOGGED} steps and by
{ours["largest_difference"]:.3%} in all {OURS.steps}, and the validation losses by
{text(ours["loss_minus_optax"], 4)}: it is the same optimizer. Faster it is where products are
formed by blocks, from a side of {_SMALLEST_IN_BLOCKS["cpu"]}: {widest:.2f} of optax's time at
{ENDS[1].split(",")[0]}, and less on the matrices of
[GPT-2 and larger models](../README.md#beside-the-others); {min(times.values()):.2f} to
{max(times.values()):.2f} below that, which is not every time faster. The share of Muon in a step
grows with the width, {first:.0%} to {wide:.0%}, as its products grow with the cube and those of
both passes with the square, and falls with the batch, {first:.0%} to {batch:.0%}, on which it does
not depend; AdamW takes {min(adamw):.1%} to {max(adamw):.1%}.

{table(columns, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws both loss curves, and the share of a step as batch and model grow."""
    ask = lookup(result["runs"])
    figure, (curves, *shares) = drawing.panels(3)
    for run, name, style in ((OURS, "muonclip_jax", "solid"), (PEER, "optax", "dotted")):
        for seed, record in enumerate(ask(seeds_of(run))):
            label = name if seed == 0 else None
            color = drawing.COLOURS[seed]
            curves.plot(record["logged"], record["losses"], color=color, ls=style, label=label)
    curves.set(xlabel="step", ylabel="training loss, nats per byte")
    curves.set_title(f"mc.muon and optax.contrib.muon, {len(SEEDS)} seeds")
    curves.legend(frameon=False)
    for axes, (name, values) in zip(shares, SIZES.items(), strict=True):
        smallest = {other: rest[0] for other, rest in SIZES.items()}
        for optimizer_, color in zip(OPTIMIZERS, drawing.COLOURS, strict=False):
            records = ask([StepTime(**smallest | {name: value}) for value in values])
            y = [100 * record["share"][optimizer_] for record in records]
            axes.plot(values, y, marker="o", color=color, label=optimizer_)
        axes.set(xlabel=name, ylabel="% of a step", ylim=(0, None))
        axes.legend(frameon=False)
    return figure
