"""Kimi K3's recipe on the demo's mixture of experts: Muon per head, QK-clip, cosine schedule."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
import optax
from matplotlib.figure import Figure

from benchmarks.evidence import plotting
from benchmarks.evidence.runner import Measure
from benchmarks.evidence.summaries import (
    largest_logits,
    loss_of,
    mean_sd,
    over_seeds,
    seeds_of,
)
from benchmarks.evidence.training import Run
from benchmarks.report import markdown
from examples.language_model.config import Config
from examples.language_model.models.presets import PRESETS
from examples.language_model.training.loop import make_model
from examples.language_model.training.optimizer import make_schedule

TITLE = "The recipe of Kimi K3"
CLAIM = (
    "Muon with one matrix per head, QK-clip and a cosine schedule train a mixture of experts"
    " without a divergence, and keep logits near the threshold."
)
SOURCE = "Kimi K3, arXiv 2607.24653, sections 2.5 and 3.3"
PUBLISHED = "more stable training at larger scales, without a figure; we do not compare stability"
RATE = 0.016  # the best of both with latent attention in per-head
STEPS = 100  # a sixth of the demo's
DEMO = Config(model="moe", schedule="cosine", steps=STEPS, learning_rate=RATE)


@dataclasses.dataclass(frozen=True)
class Demo(Run):
    """`python -m examples.language_model --model moe --schedule cosine` with `RATE` and `STEPS`."""

    learning_rate: float = DEMO.peak
    seed: int = 0
    attention: str = "moe"
    threshold: float | None = DEMO.threshold
    steps: int = STEPS

    def model(self) -> nn.Module:
        """Builds the model."""
        return make_model(DEMO)

    def schedule(self) -> optax.Schedule:
        """Builds the learning rates of the steps."""
        config = dataclasses.replace(DEMO, steps=self.steps, learning_rate=self.learning_rate)
        return make_schedule(config)


RECIPE = Demo(per_head=True)
REACHED = 1.1  # times τ: what one update can add


def study(measure: Measure) -> dict[str, Any]:
    """Trains with each seed."""
    records = measure(seeds_of(RECIPE))
    return {
        "loss": loss_of(records),
        "clipped": over_seeds(float(np.mean(record["clipped"])) for record in records),
        "steps_with_a_clip": over_seeds(float(np.count_nonzero(r["clipped"])) for r in records),
        "ever_clipped": over_seeds(record["ever_clipped"] for record in records),
        "max_logit": over_seeds(max(largest_logits(record)) for record in records),
        "last_logit": over_seeds(largest_logits(record)[-1] for record in records),
    }


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: no seed diverges, the clip acts, and at the end no logit is far above τ."""
    if ours["loss"]["mean"] is None:
        return "not reproduced"
    acts = ours["ever_clipped"]["mean"] > 0
    return plotting.judge(True, acts, ours["last_logit"]["mean"] <= REACHED * DEMO.threshold)


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    return (
        f"loss {mean_sd(ours['loss'])}; {ours['ever_clipped']['mean']:.0%} of the heads ever"
        f" clipped; largest logit {mean_sd(ours['max_logit'], 1)} with τ = {DEMO.threshold:g}"
    )


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    columns = (
        "",
        "loss",
        "steps with a clip",
        "heads clipped per step",
        "heads ever clipped",
        "largest logit",
        "largest logit at the end",
    )
    row = [
        "one matrix per head, clipped",
        mean_sd(ours["loss"]),
        f"{mean_sd(ours['steps_with_a_clip'], 0)} of {STEPS}",
        mean_sd(ours["clipped"], 1),
        f"{ours['ever_clipped']['mean']:.0%}",
        mean_sd(ours["max_logit"], 1),
        mean_sd(ours["last_logit"], 1),
    ]
    moe = PRESETS[DEMO.model][DEMO.preset]
    layers = moe["dense_layers"] + moe["moe_layers"]
    return f"""\
The recipe trains without a divergence, and the largest logit is {mean_sd(ours["max_logit"], 1)}
with τ = {DEMO.threshold:g}.

The model is the mixture of experts of `python -m examples.language_model --model moe --per-head
--schedule cosine`: {layers} layers of latent attention, {moe["attention"].heads} heads each, width
{moe["width"]}, {moe["routed"].experts} experts. It trains for {STEPS} steps, a sixth of the demo's,
at the rate {DEMO.peak:g}, with the threshold and the decay of the demo. The schedule is Kimi K3's:
a warmup of 1 % and a cosine. The heads of the up-projections are matrices. Kimi Delta Attention and
Quantile Balancing, which are part of Kimi K3, are not used here.

This only tests that the recipe trains, and that logits stay near τ. There is no comparison of
stability with another recipe. [One matrix per head](#one-matrix-per-head) compares with full
kernels.

{markdown(columns, [row])}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws the training loss and the largest logit of each seed."""
    figure, (left, right) = plotting.panels(2)
    for record in result["runs"]:
        label = f"seed {record['settings']['seed']}"
        left.plot(record["logged"], record["losses"], label=label)
        right.plot(record["logged"], largest_logits(record))
    right.axhline(DEMO.threshold, color=plotting.LIMIT, linewidth=1)
    left.set(xlabel="step", title="training loss, nats per byte")
    right.set(xlabel="step", title="largest logit; the line is the threshold")
    left.legend(frameon=False)
    return figure
