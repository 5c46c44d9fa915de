"""Kimi K2, figure 2: attention logits without and with QK-clip, for MHA, GQA and MLA."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence import drawing
from benchmarks.evidence.measures import (
    last_clip,
    loss_of,
    over_seeds,
    paired,
    peaks,
    seeds_of,
    table,
    text,
)
from benchmarks.evidence.runner import Ask, lookup
from benchmarks.evidence.tasks import Run

TITLE = "Exploding logits, and the clip"
CLAIM = "Under plain Muon attention logits pass every bound; QK-clip holds each head at τ."
SOURCE = "Kimi K2, arXiv 2507.20534, section 2.1 and figure 2"
PUBLISHED = "above 1000 without the clip; held at τ = 100 with it, falling after 30 % of training"
RATE, THRESHOLD, STEPS = 0.05, 100.0, 800  # three times the rate that is best
UNDECAYED = "gqa", "mha", "mla"
# By name, what is trained without and with the clip.
LINES = {name: Run(RATE, 0, attention=name, steps=STEPS, weight_decay=0.0) for name in UNDECAYED}
LINES["gqa, weight decay 0.1"] = Run(RATE, 0, steps=STEPS)
HELD = 1.1  # times τ: a step is clipped after it, and moves the next by as much as it can


def runs(name: str) -> tuple[list[Run], list[Run]]:
    """Gives the trainings of one line, without and with the clip."""
    run = LINES[name]
    clipped = dataclasses.replace(run, threshold=THRESHOLD)
    return seeds_of(run), seeds_of(clipped)


def study(ask: Ask) -> dict[str, Any]:
    """Trains each line with and without the clip."""
    ask([run for name in LINES for half in runs(name) for run in half])
    return {name: compare(*map(ask, runs(name))) for name in LINES}


def compare(plain: list[dict[str, Any]], clipped: list[dict[str, Any]]) -> dict[str, Any]:
    """Reads off the trainings of one line."""
    middle = len(plain[0]["logged"]) // 2
    return {
        "plain_max_logit": over_seeds(max(peaks(record)) for record in plain),
        "plain_second_half_by_first": over_seeds(
            max(peaks(record)[middle:]) / max(peaks(record)[:middle]) for record in plain
        ),
        "plain_heads_above": over_seeds(
            float(np.mean(np.max(record["max_logits"], axis=0) > THRESHOLD)) for record in plain
        ),
        "clipped_max_logit": over_seeds(max(peaks(record)) for record in clipped),
        "clipped_median_of_clipped_heads": over_seeds(map(median_where_clipped, clipped)),
        "ever_clipped": over_seeds(record["ever_clipped"] for record in clipped),
        "last_clip": over_seeds(map(last_clip, clipped)),
        "plain_loss": loss_of(plain),
        "clipped_loss": loss_of(clipped),
        "clipped_minus_plain_loss": paired(clipped, plain),
    }


def median_where_clipped(record: dict[str, Any]) -> float:
    """Gives the median largest logit of the heads that passed τ, from the first time on."""
    heads = np.reshape(record["max_logits"], (len(record["logged"]), -1)).T
    kept = [head[np.argmax(head > THRESHOLD) :] for head in heads if head.max() > THRESHOLD]
    return float(np.median(np.concatenate(kept))) if kept else float("nan")


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: ten times τ without the clip, more in the second half than before; held with."""
    free = [ours[name] for name in UNDECAYED]
    explode = all(line["plain_max_logit"]["mean"] > 10 * THRESHOLD for line in free)
    rise = all(line["plain_second_half_by_first"]["mean"] > 1 for line in free)
    held = all(line["clipped_median_of_clipped_heads"]["mean"] < HELD * THRESHOLD for line in free)
    return drawing.judge(explode, rise, held)


def short(ours: Mapping[str, Any]) -> str:
    """Says it in a line."""
    free = max(ours[name]["plain_max_logit"]["mean"] for name in UNDECAYED)
    held = max(ours[name]["clipped_max_logit"]["mean"] for name in UNDECAYED)
    return f"{free:,.0f} without the clip; {held:.0f} at most with τ = {THRESHOLD:g}"


COLUMNS = (
    "",
    "largest logit, no clip",
    "heads above τ",
    "with clip",
    "median of clipped heads",
    "loss, no clip",
    "with clip",
    "difference, same seed",
)


def tell(ours: Mapping[str, Any]) -> str:
    """Says it in three sentences, and a table."""
    rise = [ours[name]["plain_second_half_by_first"]["mean"] for name in UNDECAYED]
    held = [ours[name]["clipped_median_of_clipped_heads"]["mean"] for name in UNDECAYED]
    gains = [-ours[name]["clipped_minus_plain_loss"]["mean"] for name in UNDECAYED]
    decayed = text(ours["gqa, weight decay 0.1"]["plain_max_logit"], 0)
    rows = [
        [
            name,
            text(line["plain_max_logit"], 0),
            f"{line['plain_heads_above']['mean']:.0%}",
            text(line["clipped_max_logit"], 0),
            text(line["clipped_median_of_clipped_heads"], 0),
            text(line["plain_loss"]),
            text(line["clipped_loss"]),
            text(line["clipped_minus_plain_loss"]),
        ]
        for name, line in ours.items()
    ]
    return f"""\
At a learning rate of {RATE:g}, three times the best, and without weight decay, the largest logit
of plain Muon goes on rising: in the second half of {STEPS} steps, while the rate falls to 0, it is
still {min(rise):.1f} to {max(rise):.1f} times that of the first. With the clip at τ = {THRESHOLD:g}
each head stays near it, and the loss is {min(gains):.2f} to {max(gains):.2f} better; the median of
the heads that are clipped is {min(held):.0f} to {max(held):.0f}, as one update at this rate adds
that much before the next clip, and that is more than the {HELD - 1:.0%} that we had allowed. Kimi
K2's weight decay of 0.1 bends the curves down without any clip, after {decayed}: decay is a brake
on logits too, and leaves the clip little to do at this scale.

{table(COLUMNS, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws every head of seed 0 without and with the clip, a column for each line."""
    ask = lookup(result["runs"])
    figure, axes = drawing.panels(len(LINES), 2, (3.2, 2.9), sharex=True, sharey=True)
    for column, name in zip(axes.T, LINES, strict=True):
        for one, half, color in zip(column, runs(name), drawing.COLOURS, strict=False):
            (record,) = ask(half[:1])
            heads = np.reshape(record["max_logits"], (len(record["logged"]), -1))
            one.plot(record["logged"], np.maximum(heads, 1), color=color, linewidth=1, alpha=0.7)
            one.axhline(THRESHOLD, color=drawing.LIMIT, linestyle="dashed", linewidth=1)
            one.set_title(f"{name}\nloss {record['validation_loss']:.3f}")
        column[-1].set_xlabel("step")
    axes[0, 0].set(ylabel="largest logit, no clip", yscale="log", ylim=(1, 1e4))
    axes[1, 0].set_ylabel(f"largest logit, τ = {THRESHOLD:g}")
    return figure
