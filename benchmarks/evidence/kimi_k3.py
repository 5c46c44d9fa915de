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
    SEEDS,
    largest_logits,
    loss_of,
    mean_sd,
    over_seeds,
    paired_difference,
    seeds_of,
)
from benchmarks.evidence.training import Run
from benchmarks.report import markdown
from examples.language_model.config import Config
from examples.language_model.training.loop import make_model
from examples.language_model.training.optimizer import make_schedule

TITLE = "The recipe of Kimi K3"
CLAIM = "Muon with one matrix per head, QK-clip and a cosine schedule train a mixture of experts."
SOURCE = "Kimi K3, arXiv 2607.24653, sections 2.5 and 3.3"
PUBLISHED = "no figure known to us"
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
        settings = {"steps": self.steps, "learning_rate": self.learning_rate}
        return make_schedule(dataclasses.replace(DEMO, **settings))


LINES = {
    "Kimi K2, full kernels": Demo(),
    "Kimi K3, one matrix per head": Demo(per_head=True),
}
K2, K3 = LINES
REACHED = 1.1  # times τ: what one update can add


def study(measure: Measure) -> dict[str, Any]:
    """Trains with both recipes at equal seeds."""
    measure([one for run in LINES.values() for one in seeds_of(run)])
    records = {name: measure(seeds_of(run)) for name, run in LINES.items()}
    return {
        name: {
            "loss": loss_of(of_seeds),
            "minus_k2": paired_difference(of_seeds, records[K2]),
            "clipped": over_seeds(float(np.mean(record["clipped"])) for record in of_seeds),
            "ever_clipped": over_seeds(record["ever_clipped"] for record in of_seeds),
            "max_logit": over_seeds(max(largest_logits(record)) for record in of_seeds),
            "last_logit": over_seeds(largest_logits(record)[-1] for record in of_seeds),
        }
        for name, of_seeds in records.items()
    }


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: a loss below Kimi K2's, and at the end no logit far above the threshold."""
    gain, logit = ours[K3]["minus_k2"], ours[K3]["last_logit"]["mean"]
    return plotting.judge(gain["mean"] + 2 * gain["sd"] < 0, logit <= REACHED * DEMO.threshold)


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    line = ours[K3]
    return (
        f"loss {mean_sd(line['loss'])}, {mean_sd(line['minus_k2'])} against full kernels;"
        f" largest logit {mean_sd(line['max_logit'], 0)}"
    )


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    columns = (
        "",
        "loss",
        "minus Kimi K2, same seed",
        "heads clipped per step",
        "heads ever clipped",
        "largest logit",
        "at the end",
    )
    rows = [
        [
            name,
            mean_sd(line["loss"]),
            "" if name == K2 else mean_sd(line["minus_k2"]),
            mean_sd(line["clipped"], 1),
            f"{line['ever_clipped']['mean']:.0%}",
            mean_sd(line["max_logit"], 0),
            mean_sd(line["last_logit"], 0),
        ]
        for name, line in ours.items()
    ]
    model = make_model(DEMO)
    return f"""\
Kimi K3's recipe changes the loss of Kimi K2's by {mean_sd(ours[K3]["minus_k2"])} at the same seed.
The model is the mixture of experts of `python -m examples.language_model --model moe`:
{1 + model.moe_layers} layers of latent attention, {model.attention.heads} heads each, width
{model.width}, {model.routed.experts} experts. It trains for {STEPS} steps, a sixth of the demo's,
at the rate {DEMO.peak:g} with the demo's threshold {DEMO.threshold:g} and decay 0.1. Both have Kimi
K3's schedule, a warmup of 1 % and a cosine, and differ in the split of the up-projections into
heads. Kimi Delta Attention and Quantile Balancing, which Kimi K3 has too, are not part of it.

{markdown(columns, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws the training loss and the largest logit."""
    figure, (left, right) = plotting.panels(2)
    for name, run in LINES.items():
        records = [x for x in result["runs"] if x["settings"]["per_head"] == run.per_head]
        steps = records[0]["logged"]
        left.plot(steps, np.mean([record["losses"] for record in records], axis=0), label=name)
        right.plot(steps, np.max([largest_logits(record) for record in records], axis=0))
    right.axhline(DEMO.threshold, color=plotting.LIMIT, linewidth=1)
    left.set(xlabel="step", title="training loss, nats per byte", ylim=(None, 3.5))
    right.set(xlabel="step", title=f"largest logit of {len(SEEDS)} seeds")
    left.legend(frameon=False)
    return figure
