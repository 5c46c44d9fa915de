"""Kimi K2, figure 2 and appendix D, with a model of ten million parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence import plotting
from benchmarks.evidence.runner import Measure, lookup
from benchmarks.evidence.summaries import (
    largest_logits,
    last_clip,
    loss_of,
    mean_sd,
    over_seeds,
    paired_difference,
    seeds_of,
)
from benchmarks.evidence.training import LOGGED, SEQ_LEN, Run, finite
from benchmarks.report import markdown
from examples.language_model.models import gqa, mla
from examples.language_model.models.presets import Latent

TITLE = "Ten million parameters"
CLAIM = (
    "With plain Muon attention logits explode; QK-clip keeps them near τ, acts mainly in the first"
    " 30 % of training, and does not harm the loss."
)
SOURCE = "Kimi K2, arXiv 2507.20534, section 2.1, figure 2 and appendix D"
PUBLISHED = "above 1000 without QK-clip; at most τ = 100 with it, falling after 30 % of training"

LAYERS, WIDTH, HIDDEN, HEADS, HEAD_DIM = 8, 256, 1280, 8, 32
MODELS = {
    "gqa": lambda: gqa.GQA(LAYERS, WIDTH, HEADS, HEADS // 2, HEAD_DIM, HIDDEN),
    "mla": lambda: mla.MLA(LAYERS, WIDTH, Latent(HEADS, 192, 128, 32, 16, 32), HIDDEN),
}
SEEDS = (0, 1)
RATE, THRESHOLD, STEPS = 0.03, 100.0, 2000
ADAMW_RATES, TRIAL = (0.001, 0.002, 0.004), 100
KEPT = 1.1  # times τ, as in exploding-logits
EARLY, LATE_CLIPS = 0.3, 0.1  # of the training; of the clips, at most, after it


@dataclasses.dataclass(frozen=True)
class Large(Run):
    """A training of a model of ten million parameters."""

    steps: int = STEPS

    batch_size: ClassVar[int] = 2
    resumable: ClassVar[bool] = True

    def model(self) -> nn.Module:
        """Builds the model."""
        return MODELS[self.attention]()


def trial(rate: float) -> Large:
    """Returns a short training with AdamW."""
    return Large(rate, 0, optimizer="adamw", steps=TRIAL)


def runs(name: str, adamw_rate: float) -> list[list[Run]]:
    """Returns the trainings of one model: without and with QK-clip, and with AdamW."""
    plain = Large(RATE, 0, attention=name)
    clipped = dataclasses.replace(plain, threshold=THRESHOLD)
    with_adamw = dataclasses.replace(plain, learning_rate=adamw_rate, optimizer="adamw")
    return [seeds_of(run, SEEDS) for run in (plain, clipped, with_adamw)]


def study(measure: Measure) -> dict[str, Any]:
    """Trains each model."""
    trials = measure([trial(rate) for rate in ADAMW_RATES])
    losses = [record["validation_loss"] for record in trials]
    rate = ADAMW_RATES[int(np.argmin(losses))]
    trained = {name: runs(name, rate) for name in MODELS}
    measure([run for lines in trained.values() for line in lines for run in line])  # in parallel
    lines = {name: compare(*map(measure, lines)) for name, lines in trained.items()}
    return {"adamw": {"rate": rate, "trials": losses}, "models": lines}


def compare(
    plain: list[dict[str, Any]], clipped: list[dict[str, Any]], adamw: list[dict[str, Any]]
) -> dict[str, Any]:
    """Summarizes the trainings of one model."""
    return {
        "plain_max_logit": over_seeds(max(largest_logits(record)) for record in plain),
        "plain_heads_above": over_seeds(
            float(np.mean(np.max(record["max_logits"], axis=0) > THRESHOLD)) for record in plain
        ),
        "plain_last_logit": over_seeds(largest_logits(record)[-1] for record in plain),
        "adamw_max_logit": over_seeds(max(largest_logits(record)) for record in adamw),
        "clipped_max_logit": over_seeds(max(largest_logits(record)) for record in clipped),
        "clipped_median_of_clipped_heads": over_seeds(map(median_while_clipped, clipped)),
        "clipped_last_logit": over_seeds(largest_logits(record)[-1] for record in clipped),
        "ever_clipped": over_seeds(record["ever_clipped"] for record in clipped),
        "last_clip": over_seeds(map(last_clip, clipped)),
        "clips_by_tenth": np.mean([clips_by_tenth(record) for record in clipped], axis=0).tolist(),
        "late_clips": over_seeds(map(late_clips, clipped)),
        "plain_loss": loss_of(plain),
        "clipped_loss": loss_of(clipped),
        "adamw_loss": over_seeds(record["validation_loss"] for record in adamw),
        "clipped_minus_plain_loss": paired_difference(clipped, plain),
    }


def median_while_clipped(record: Mapping[str, Any]) -> float | None:
    """Returns the median of the largest logits of heads, between the first and last time above τ.

    Later values are left out: decay lowers them, not QK-clip.
    """
    heads = np.reshape(record["max_logits"], (len(record["logged"]), -1)).T
    parts = [head[above[0] : above[-1] + 1] for head in heads if len(above := _above(head))]
    return finite(np.median(np.concatenate(parts))) if parts else None


def _above(head: np.ndarray) -> np.ndarray:
    return np.flatnonzero(head > THRESHOLD)


def clips_by_tenth(record: Mapping[str, Any]) -> list[float]:
    """Returns the clipped heads of a step on average, for each tenth of the training."""
    return [float(np.mean(part)) for part in np.array_split(record["clipped"], 10)]


def late_clips(record: Mapping[str, Any]) -> float | None:
    """Returns the fraction of all clips that come after `EARLY` of the training."""
    clipped = np.array(record["clipped"])
    return finite(clipped[round(EARLY * len(clipped)) :].sum() / max(1, clipped.sum()))


def verdict(ours: Mapping[str, Any]) -> str:
    """Judges both models.

    Reproduced: ten times τ without QK-clip; with it at most `KEPT` times τ, at most `LATE_CLIPS` of
    the clips after `EARLY` of the training, and no higher loss.
    """
    lines = ours["models"].values()
    medians = [line["clipped_median_of_clipped_heads"]["mean"] for line in lines]
    return plotting.judge(
        all(line["plain_max_logit"]["mean"] > 10 * THRESHOLD for line in lines),
        all(median is not None and median < KEPT * THRESHOLD for median in medians),
        all(line["late_clips"]["mean"] <= LATE_CLIPS for line in lines),
        all(line["clipped_loss"]["mean"] <= line["plain_loss"]["mean"] for line in lines),
    )


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    texts = (
        f"{name}: {line['plain_max_logit']['mean']:,.0f} without QK-clip; with it a median of"
        f" {median(line)} over clipped heads, and"
        f" {line['late_clips']['mean']:.0%} of the clips after {EARLY:.0%} of training"
        for name, line in ours["models"].items()
    )
    return "; ".join(texts)


COLUMNS = (
    "",
    "largest logit, no clip",
    "largest logit, with clip",
    "median of clipped heads",
    "largest logit, AdamW",
    "heads ever clipped",
    "last clip at step",
    "loss, no clip",
    "loss, with clip",
    "loss, AdamW",
)


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    models, adamw = ours["models"], ours["adamw"]
    rates = ", ".join(f"{rate:g}" for rate in ADAMW_RATES)
    return "\n\n".join(
        [
            answer(models),
            *(finding(name, line) for name, line in models.items()),
            f"""\
The models have {LAYERS} layers, width {WIDTH}, {HEADS} heads and {HIDDEN:,} hidden units. They
train for {STEPS:,} steps of {Large.batch_size} x {SEQ_LEN} bytes, with {len(SEEDS)} seeds. The
decay is 0.1, which also lowers logits. The learning rate of Muon, {RATE:g}, is high by intention.
It is not tuned for the loss, so the losses do not rank the optimizers. AdamW has the rate
{adamw["rate"]:g}, the best of {rates} in {TRIAL} steps.

Each logit is the largest of {STEPS // LOGGED} steps. The median is over the heads that exceed τ,
between the first and the last time that they do.""",
            markdown(COLUMNS, [row(name, line) for name, line in models.items()]),
        ]
    )


def answer(lines: Mapping[str, Mapping[str, Any]]) -> str:
    """States the result in one paragraph."""
    free = " and ".join(f"{x['plain_max_logit']['mean']:,.0f} ({n})" for n, x in lines.items())
    kept = " and ".join(f"{median(x)} ({n})" for n, x in lines.items())
    return (
        f"Without QK-clip the largest logit reaches {free}. With QK-clip and τ = {THRESHOLD:g} the"
        f" median over clipped heads is {kept}."
    )


def finding(name: str, line: Mapping[str, Any]) -> str:
    """States the result for one model, as the figures have it."""
    free, change = line["plain_max_logit"]["mean"], line["clipped_minus_plain_loss"]["mean"]
    tenths = line["clips_by_tenth"]
    return (
        f"**{name}.** The largest logit without"
        f" QK-clip is {free / THRESHOLD:.1f} times τ, and"
        f" {line['plain_heads_above']['mean']:.0%} of the heads exceed τ. At the end it is"
        f" {line['plain_last_logit']['mean']:.0f}. With QK-clip the loss at the same seed is"
        f" {mean_sd(line['clipped_minus_plain_loss']).lstrip('-')}"
        f" {'lower' if change < 0 else 'higher'}. {line['late_clips']['mean']:.0%} of all clips"
        f" come after {EARLY:.0%} of training. Of {LAYERS * HEADS} heads a step clips"
        f" {tenths[0]:.1f} on average in the first tenth, {max(tenths):.1f} in the busiest tenth,"
        f" and {tenths[-1]:.1f} in the last."
    )


def median(line: Mapping[str, Any]) -> str:
    """Formats the median over clipped heads, which needs a clip in each training."""
    value = line["clipped_median_of_clipped_heads"]
    return "unknown, without a clip," if value["mean"] is None else mean_sd(value, 0)


def row(name: str, line: Mapping[str, Any]) -> list[str]:
    """Formats the row of a model."""
    return [
        name,
        mean_sd(line["plain_max_logit"], 0),
        mean_sd(line["clipped_max_logit"], 0),
        median(line),
        mean_sd(line["adamw_max_logit"], 0),
        f"{line['ever_clipped']['mean']:.0%}",
        mean_sd(line["last_clip"], 0),
        mean_sd(line["plain_loss"]),
        mean_sd(line["clipped_loss"]),
        mean_sd(line["adamw_loss"]),
    ]


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws the largest logit of each head for seed 0, and the clipped heads, for each model."""
    ours, measure = result["ours"], lookup(result["runs"])
    names = list(ours["models"])
    figure, axes = plotting.panels(3, len(names), (4.2, 3.2), sharex=True, squeeze=False)
    for (plain, clipped, clips), name in zip(axes, names, strict=True):
        lines = runs(name, ours["adamw"]["rate"])
        titles = f"{name}: no clip", f"{name}: τ = {THRESHOLD:g}"
        for one, line, title, color in zip(
            (plain, clipped), lines, titles, plotting.COLORS, strict=False
        ):
            (record,) = measure(line[:1])
            heads = np.reshape(record["max_logits"], (len(record["logged"]), -1))
            one.plot(record["logged"], np.maximum(heads, 1), color=color, linewidth=1, alpha=0.5)
            one.axhline(THRESHOLD, color=plotting.LIMIT, linestyle="dashed", linewidth=1)
            one.set(title=f"largest logits, {title}", yscale="log", ylim=(1, 2000), xlabel="step")
        for record in measure(lines[1]):
            label = f"seed {record['settings']['seed']}"
            clips.plot(plotting.smooth([record["clipped"]]), label=label)
        clips.axvline(EARLY * STEPS, color="black", linestyle="dotted", linewidth=1)
        clips.set(title="heads clipped, mean of 20 steps", xlabel="step")
        clips.legend(frameon=False)
    return figure
