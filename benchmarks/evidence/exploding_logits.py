"""Kimi K2, figure 2: attention logits without and with QK-clip, for MHA, GQA and MLA."""

import dataclasses
from collections.abc import Mapping
from typing import Any

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
from benchmarks.evidence.training import LOGGED, Run
from benchmarks.report import markdown

TITLE = "Exploding logits, and QK-clip"
CLAIM = "With plain Muon attention logits grow without bound; QK-clip keeps heads at or below τ."
SOURCE = "Kimi K2, arXiv 2507.20534, section 2.1 and figure 2"
PUBLISHED = "above 1000 without QK-clip; at most τ = 100 with it, falling after 30 % of training"
RATE, THRESHOLD, STEPS = 0.05, 100.0, 800  # three times the best rate
UNDECAYED = "gqa", "mha", "mla"
# The models, each trained without and with QK-clip.
LINES = {name: Run(RATE, 0, attention=name, steps=STEPS, weight_decay=0.0) for name in UNDECAYED}
LINES["gqa, weight decay 0.1"] = Run(RATE, 0, steps=STEPS)
KEPT = 1.1  # times τ: QK-clip acts after a step, and the next step may exceed τ again


def runs(name: str) -> tuple[list[Run], list[Run]]:
    """Returns the trainings of one model, without and with QK-clip."""
    run = LINES[name]
    clipped = dataclasses.replace(run, threshold=THRESHOLD)
    return seeds_of(run), seeds_of(clipped)


def study(measure: Measure) -> dict[str, Any]:
    """Trains each model with and without QK-clip."""
    measure([run for name in LINES for half in runs(name) for run in half])
    return {name: compare(*map(measure, runs(name))) for name in LINES}


def compare(plain: list[dict[str, Any]], clipped: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarizes the trainings of one model."""
    middle = len(plain[0]["logged"]) // 2
    return {
        "plain_max_logit": over_seeds(max(largest_logits(record)) for record in plain),
        "plain_second_half_by_first": over_seeds(
            max(largest_logits(record)[middle:]) / max(largest_logits(record)[:middle])
            for record in plain
        ),
        "plain_heads_above": over_seeds(
            float(np.mean(np.max(record["max_logits"], axis=0) > THRESHOLD)) for record in plain
        ),
        "clipped_max_logit": over_seeds(max(largest_logits(record)) for record in clipped),
        "clipped_median_of_clipped_heads": over_seeds(map(median_where_clipped, clipped)),
        "ever_clipped": over_seeds(record["ever_clipped"] for record in clipped),
        "last_clip": over_seeds(map(last_clip, clipped)),
        "plain_loss": loss_of(plain),
        "clipped_loss": loss_of(clipped),
        "clipped_minus_plain_loss": paired_difference(clipped, plain),
    }


def median_where_clipped(record: dict[str, Any]) -> float:
    """Returns the median of the largest logits of heads above τ, from the first time on."""
    heads = np.reshape(record["max_logits"], (len(record["logged"]), -1)).T
    clipped = [head[np.argmax(head > THRESHOLD) :] for head in heads if head.max() > THRESHOLD]
    return float(np.median(np.concatenate(clipped))) if clipped else float("nan")


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: ten times τ and rising without QK-clip, at most `KEPT` times τ with it."""
    free = [ours[name] for name in UNDECAYED]
    explode = all(line["plain_max_logit"]["mean"] > 10 * THRESHOLD for line in free)
    rise = all(line["plain_second_half_by_first"]["mean"] > 1 for line in free)
    kept = all(line["clipped_median_of_clipped_heads"]["mean"] < KEPT * THRESHOLD for line in free)
    return plotting.judge(explode, rise, kept)


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    free = max(ours[name]["plain_max_logit"]["mean"] for name in UNDECAYED)
    kept = max(ours[name]["clipped_max_logit"]["mean"] for name in UNDECAYED)
    return f"{free:,.0f} without QK-clip; at most {kept:.0f} with τ = {THRESHOLD:g}"


COLUMNS = (
    "",
    "largest logit, no clip",
    "heads above τ",
    "largest logit, with clip",
    "median from the first clip on",
    "loss, no clip",
    "loss, with clip",
    "difference, same seed",
)


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    rise = [ours[name]["plain_second_half_by_first"]["mean"] for name in UNDECAYED]
    kept = [ours[name]["clipped_median_of_clipped_heads"]["mean"] for name in UNDECAYED]
    above = ", ".join(n for n, x in zip(UNDECAYED, kept, strict=True) if x >= KEPT * THRESHOLD)
    gains = [-ours[name]["clipped_minus_plain_loss"]["mean"] for name in UNDECAYED]
    capped = [ours[name]["clipped_max_logit"]["mean"] for name in UNDECAYED]
    peaks = [ours[name]["plain_max_logit"]["mean"] for name in UNDECAYED]
    decayed = mean_sd(ours["gqa, weight decay 0.1"]["plain_max_logit"], 0)
    rows = [
        [
            name,
            mean_sd(line["plain_max_logit"], 0),
            f"{line['plain_heads_above']['mean']:.0%}",
            mean_sd(line["clipped_max_logit"], 0),
            mean_sd(line["clipped_median_of_clipped_heads"], 0),
            mean_sd(line["plain_loss"]),
            mean_sd(line["clipped_loss"]),
            mean_sd(line["clipped_minus_plain_loss"]),
        ]
        for name, line in ours.items()
    ]
    return f"""\
Without QK-clip the largest logit reaches {min(peaks):,.0f} to {max(peaks):,.0f}. With QK-clip and
τ = {THRESHOLD:g} it reaches {min(capped):.0f} to {max(capped):.0f}, and the median of clipped heads
is {min(kept):.0f} to {max(kept):.0f}. The loss is {min(gains):.2f} to {max(gains):.2f} lower.

The learning rate is {RATE:g}, three times the best, without weight decay. With plain Muon the
largest logit still rises while the rate falls to 0: in the second half of {STEPS} steps it is
{min(rise):.1f} to {max(rise):.1f} times the largest of the first half.

The median is over the heads that exceed τ, from their first clip on. For each head we record the
largest logit of every {STEPS // LOGGED} steps, so the median describes the highest batches. Our
rule allows {KEPT - 1:.0%} above τ.

With the weight decay of Kimi K2, 0.1, the largest logit is {decayed}, and it falls without QK-clip.
Decay limits logits too, and QK-clip rarely acts at this scale.

Why "partly": the median exceeds τ by more than {KEPT - 1:.0%} with {above}, and by less with the
others. [A clipped head, one step later](#a-clipped-head-one-step-later) measures each step, both
orders of clip and update, and lower thresholds.

{markdown(COLUMNS, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws every head of seed 0 without and with QK-clip, a column for each model."""
    measure = lookup(result["runs"])
    figure, axes = plotting.panels(len(LINES), 2, (3.2, 2.9), sharex=True, sharey=True)
    for column, name in zip(axes.T, LINES, strict=True):
        for one, half, color in zip(column, runs(name), plotting.COLORS, strict=False):
            (record,) = measure(half[:1])
            heads = np.reshape(record["max_logits"], (len(record["logged"]), -1))
            one.plot(record["logged"], np.maximum(heads, 1), color=color, linewidth=1, alpha=0.7)
            one.axhline(THRESHOLD, color=plotting.LIMIT, linestyle="dashed", linewidth=1)
            one.set_title(f"{name}\nloss {record['validation_loss']:.3f}")
        column[-1].set_xlabel("step")
    axes[0, 0].set(ylabel="largest logit, no clip", yscale="log", ylim=(1, 1e4))
    axes[1, 0].set_ylabel(f"largest logit, τ = {THRESHOLD:g}")
    return figure
