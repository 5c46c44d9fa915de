"""Beside optax's Muon: the same training, in less time. And what any optimizer costs of a step."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence import drawing
from benchmarks.evidence.measures import SEEDS, paired, seeds_of
from benchmarks.evidence.runner import Ask, lookup
from benchmarks.evidence.tasks import SEQ_LEN, Run, corpus, finite, optimizer
from lm import data, gqa
from lm.step import make_loss

CLAIM = "At equal settings the loss curve is that of optax.contrib.muon, and the step is faster."
SOURCE = "optax.contrib.muon (optax 0.2.8); Moonlight, arXiv 2502.16982, section 2.3, on overhead"
PUBLISHED = "an overhead of Muon over AdamW of 1 to 3 % of the step, at scale"
RATE = 0.016
OURS = Run(RATE, 0, optimizer="mc.muon")
PEER = dataclasses.replace(OURS, optimizer="optax.muon")
EARLY = 5  # logged points, 40 steps, over which rounding has not yet grown
CLOSE = 1e-4  # of the loss of those; measured: see the result

REPEATS = 15
OPTIMIZERS = ("mc.muon", "optax.muon", "adamw")
SIZES = {"width": (64, 128, 256), "batch": (8, 16, 32)}  # one grows, the other stays at its first


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Times of the parts of a step, taken in turn; the text is [batch, 128].

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
        """Times forward and backward pass, and each optimizer, `REPEATS` times in turn.

        Returns:
          `gradients`, median milliseconds of both passes; by optimizer `milliseconds` of its
          update, and `share`, the median of what it takes of a step, both measured side by side.
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
        for i in range(REPEATS + 2):
            for name, part in parts.items():
                start = time.perf_counter()
                jax.block_until_ready(part())
                if i >= 2:  # the first compiles
                    seconds[name].append(time.perf_counter() - start)
        passes = np.array(seconds.pop("gradients"))
        return {
            "gradients": finite(1e3 * np.median(passes)),
            "milliseconds": {name: finite(1e3 * np.median(x)) for name, x in seconds.items()},
            "share": {n: finite(np.median(x / (x + passes))) for n, x in seconds.items()},
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
    ratios = [
        t["milliseconds"]["mc.muon"] / t["milliseconds"]["optax.muon"] for t in times.values()
    ]
    return {
        "largest_early_difference": finite(max(map(early_difference, ours, peer))),
        "loss_minus_optax": paired(ours, peer),
        "update_time_by_optax": {
            "median": finite(statistics.median(ratios)),
            "all": [*map(finite, ratios)],
        },
        "share_of_step": {name: line["share"] for name, line in times.items()},
    }


def early_difference(ours: dict[str, Any], peer: dict[str, Any]) -> float:
    """Gives the largest relative difference of the training loss at the early points."""
    a, b = (np.array(record["losses"][:EARLY]) for record in (ours, peer))
    return float(np.max(np.abs(a - b) / b))


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: the same loss early, a final one within seed noise, and every update faster."""
    minus = ours["loss_minus_optax"]
    same = ours["largest_early_difference"] < CLOSE
    alike = abs(minus["mean"]) <= 2 * max(minus["sd"], 1e-3)
    return drawing.judge(same and alike, max(ours["update_time_by_optax"]["all"]) < 1)


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws both loss curves, and the share of a step as batch and model grow."""
    ask = lookup(result["runs"])
    figure, (curves, *shares) = drawing.panels(3)
    for run, name, style in ((OURS, "muonclip_jax", "solid"), (PEER, "optax", "dotted")):
        for seed, record in enumerate(ask(seeds_of(run))):
            label = name if seed == 0 else None
            colour = drawing.COLOURS[seed]
            curves.plot(record["logged"], record["losses"], color=colour, ls=style, label=label)
    curves.set(xlabel="step", ylabel="training loss, nats per byte")
    curves.set_title(f"mc.muon and optax.contrib.muon, {len(SEEDS)} seeds")
    curves.legend(frameon=False)
    for axes, (name, values) in zip(shares, SIZES.items(), strict=True):
        smallest = {other: rest[0] for other, rest in SIZES.items()}
        for optimizer_, colour in zip(OPTIMIZERS, drawing.COLOURS, strict=False):
            records = ask([StepTime(**smallest | {name: value}) for value in values])
            y = [100 * record["share"][optimizer_] for record in records]
            axes.plot(values, y, marker="o", color=colour, label=optimizer_)
        axes.set(xlabel=name, ylabel="% of a step", ylim=(0, None))
        axes.legend(frameon=False)
    return figure
