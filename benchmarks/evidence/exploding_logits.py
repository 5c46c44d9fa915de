"""Kimi K2, figure 2: attention logits without and with QK-clip, for MHA, GQA and MLA."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence import drawing
from benchmarks.evidence.measures import last_clip, loss_of, over_seeds, paired, peaks, seeds_of
from benchmarks.evidence.runner import Ask, lookup
from benchmarks.evidence.tasks import Run

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


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws every head of seed 0 without and with the clip, a column for each line."""
    ask = lookup(result["runs"])
    figure, axes = drawing.panels(len(LINES), 2, sharex=True)
    for column, name in zip(axes.T, LINES, strict=True):
        for one, half, colour in zip(column, runs(name), drawing.COLOURS, strict=False):
            (record,) = ask(half[:1])
            heads = np.reshape(record["max_logits"], (len(record["logged"]), -1))
            one.plot(record["logged"], np.maximum(heads, 1), color=colour, linewidth=1, alpha=0.7)
            one.axhline(THRESHOLD, color=drawing.LIMIT, linestyle="dashed", linewidth=1)
            one.set(yscale="log", ylim=(1, 1e4))
            loss = f"{record['validation_loss']:.3f} nats per byte"
            one.set_title(
                f"{name}, {'no clip' if colour is drawing.COLOURS[0] else 'clip'}: {loss}"
            )
        column[-1].set_xlabel("step")
    axes[0, 0].set_ylabel("largest logit of each head")
    axes[1, 0].set_ylabel("largest logit of each head")
    return figure
