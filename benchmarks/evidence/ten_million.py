"""Kimi K2, figure 2 and appendix D, with a model of ten million parameters."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence import plotting
from benchmarks.evidence.exploding_logits import median_where_clipped
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
from benchmarks.evidence.training import SEQ_LEN, Run, finite
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
# The seeds that are trained so far; `SEEDS` are planned for each model.
SEEDS = (0, 1)
TRAINED = {"gqa": SEEDS, "mla": ()}

RATE, THRESHOLD, STEPS = 0.03, 100.0, 2000
ADAMW_RATES, TRIAL = (0.001, 0.002, 0.004), 200
KEPT = 1.1  # times τ, as in exploding-logits
EARLY, LATE_CLIPS = 0.3, 0.1  # of the training; of the clips, at most, after it


@dataclasses.dataclass(frozen=True)
class Large(Run):
    """A training of a model of ten million parameters."""

    steps: int = STEPS

    batch_size: ClassVar[int] = 4
    resumable: ClassVar[bool] = True

    def model(self) -> nn.Module:
        """Builds the model."""
        return MODELS[self.attention]()


def trial(rate: float) -> Large:
    """Returns a short training with AdamW."""
    return Large(rate, 0, optimizer="adamw", steps=TRIAL)


def runs(name: str, adamw_rate: float, seeds: Sequence[int]) -> list[list[Run]]:
    """Returns the trainings of one model: without and with QK-clip, and with AdamW."""
    plain = Large(RATE, 0, attention=name)
    clipped = dataclasses.replace(plain, threshold=THRESHOLD)
    adamw = dataclasses.replace(plain, learning_rate=adamw_rate, optimizer="adamw")
    return [seeds_of(run, seeds) for run in (plain, clipped, adamw)]


def study(measure: Measure) -> dict[str, Any]:
    """Trains each model with the seeds of `TRAINED`."""
    trials = measure([trial(rate) for rate in ADAMW_RATES])
    losses = [record["validation_loss"] for record in trials]
    rate = ADAMW_RATES[int(np.argmin(losses))]
    lines = {
        name: compare(*map(measure, runs(name, rate, seeds)))
        for name, seeds in TRAINED.items()
        if seeds
    }
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
        "clipped_median_of_clipped_heads": over_seeds(map(median_where_clipped, clipped)),
        "clipped_last_logit": over_seeds(largest_logits(record)[-1] for record in clipped),
        "ever_clipped": over_seeds(record["ever_clipped"] for record in clipped),
        "first_clip": over_seeds(float(np.argmax(r["clipped"]) + 1) for r in clipped),
        "last_clip": over_seeds(map(last_clip, clipped)),
        "clips_by_tenth": np.mean([clips_by_tenth(record) for record in clipped], axis=0).tolist(),
        "late_clips": over_seeds(map(late_clips, clipped)),
        "plain_loss": loss_of(plain),
        "clipped_loss": loss_of(clipped),
        "adamw_loss": loss_of(adamw),
        "clipped_minus_plain_loss": paired_difference(clipped, plain),
    }


def clips_by_tenth(record: Mapping[str, Any]) -> list[float]:
    """Returns the clipped heads of a step on average, for each tenth of the training."""
    return [float(np.mean(part)) for part in np.array_split(record["clipped"], 10)]


def late_clips(record: Mapping[str, Any]) -> float | None:
    """Returns the fraction of all clips that come after `EARLY` of the training."""
    clipped = np.array(record["clipped"])
    return finite(clipped[round(EARLY * len(clipped)) :].sum() / max(1, clipped.sum()))


def complete(ours: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the models whose planned seeds are all trained."""
    return [x for x in ours["models"].values() if x["plain_loss"]["n"] == len(SEEDS)]


def verdict(ours: Mapping[str, Any]) -> str:
    """Judges the models that have all seeds.

    Reproduced: ten times τ without QK-clip; with it at most `KEPT` times τ, at most `LATE_CLIPS` of
    the clips after `EARLY` of the training, and no higher loss.
    """
    lines = complete(ours)
    return plotting.judge(
        all(line["plain_max_logit"]["mean"] > 10 * THRESHOLD for line in lines),
        all(line["clipped_median_of_clipped_heads"]["mean"] < KEPT * THRESHOLD for line in lines),
        all(line["late_clips"]["mean"] <= LATE_CLIPS for line in lines),
        all(line["clipped_loss"]["mean"] <= line["plain_loss"]["mean"] for line in lines),
    )


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    lines = complete(ours)
    free = max(line["plain_max_logit"]["mean"] for line in lines)
    median = max(line["clipped_median_of_clipped_heads"]["mean"] for line in lines)
    late = max(line["late_clips"]["mean"] for line in lines)
    return (
        f"{free:,.0f} without QK-clip; with it clipped heads at {median:.0f} in the median, and"
        f" {late:.0%} of the clips after {EARLY:.0%} of training"
    )


COLUMNS = (
    "",
    "seeds",
    "largest logit, no clip",
    "with clip",
    "median of clipped heads",
    "AdamW",
    "heads ever clipped",
    "last clip at step",
    "loss, no clip",
    "with clip",
    "AdamW",
)


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    lines, models = complete(ours), ours["models"]
    late = " and ".join(f"{line['late_clips']['mean']:.0%}" for line in lines)
    tenths = " and ".join(
        f"{line['clips_by_tenth'][0]:.1f}, {max(line['clips_by_tenth']):.1f} and"
        f" {line['clips_by_tenth'][-1]:.1f}"
        for line in lines
    )
    adamw = ours["adamw"]
    return f"""\
{finding(ours)} {late} of all clips come after {EARLY:.0%} of training. In the first tenth of the
steps, in the tenth with the most clips and in the last one, a step clips {tenths} of
{LAYERS * HEADS} heads on average.

The models have {LAYERS} layers, width {WIDTH}, {HEADS} heads and {HIDDEN} hidden units, and train
for {STEPS:,} steps of {Large.batch_size} x {SEQ_LEN} bytes with decay 0.1. The learning rate of
Muon, {RATE:g}, is chosen to be hot. It is not tuned for the loss, so that the losses do not rank
the optimizers. AdamW has the best rate of {", ".join(f"{x:g}" for x in ADAMW_RATES)} in {TRIAL}
steps, {adamw["rate"]:g}. {missing(models)}

{markdown(COLUMNS, [row(name, line) for name, line in models.items()])}"""


def finding(ours: Mapping[str, Any]) -> str:
    """States the result in one sentence, as the figures have it."""
    lines = complete(ours)
    explode = all(line["plain_max_logit"]["mean"] > 10 * THRESHOLD for line in lines)
    kept = all(line["clipped_median_of_clipped_heads"]["mean"] < KEPT * THRESHOLD for line in lines)
    better = all(line["clipped_loss"]["mean"] <= line["plain_loss"]["mean"] for line in lines)
    return (
        f"Without QK-clip the largest logits {'exceed' if explode else 'stay below'} ten times τ ="
        f" {THRESHOLD:g}; with it clipped heads {'stay near τ' if kept else 'are clearly above τ'},"
        f" and the loss is {'no higher' if better else 'higher'}."
    )


def missing(models: Mapping[str, Any]) -> str:
    """Lists the planned trainings that are missing; nothing if none is."""
    done = {name: models[name]["plain_loss"]["n"] if name in models else 0 for name in MODELS}
    short = [f"{name} has {n} of {len(SEEDS)} seeds" for name, n in done.items() if n < len(SEEDS)]
    if not short:
        return ""
    return f"Not all planned trainings are done: {'; '.join(short)}, and counts for no verdict."


def row(name: str, line: Mapping[str, Any]) -> list[str]:
    """Formats the row of a model."""
    return [
        name,
        f"{line['plain_loss']['n']}",
        mean_sd(line["plain_max_logit"], 0),
        mean_sd(line["clipped_max_logit"], 0),
        mean_sd(line["clipped_median_of_clipped_heads"], 0),
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
        seeds = SEEDS[: ours["models"][name]["plain_loss"]["n"]]
        lines = runs(name, ours["adamw"]["rate"], seeds)
        titles = f"{name}: no clip", f"{name}: τ = {THRESHOLD:g}"
        for one, line, title, color in zip(
            (plain, clipped), lines, titles, plotting.COLORS, strict=False
        ):
            (record,) = measure(line[:1])
            heads = np.reshape(record["max_logits"], (len(record["logged"]), -1))
            one.plot(record["logged"], np.maximum(heads, 1), color=color, linewidth=1, alpha=0.5)
            one.axhline(THRESHOLD, color=plotting.LIMIT, linestyle="dashed", linewidth=1)
            one.set(title=f"largest logit of each head, {title}", yscale="log")
        for record in measure(lines[1]):
            label = f"seed {record['settings']['seed']}"
            clips.plot(plotting.smooth([record["clipped"]]), label=label)
        clips.axvline(EARLY * STEPS, color="black", linestyle="dotted", linewidth=1)
        clips.set(title="heads clipped, mean of 20 steps", xlabel="step")
        clips.legend(frameon=False)
    return figure
