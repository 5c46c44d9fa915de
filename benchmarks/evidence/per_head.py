"""GLM-5's Muon Split and Kimi K3's per-head Muon: a head as a matrix, against the whole kernel."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from benchmarks.evidence import drawing
from benchmarks.evidence.measures import (
    grid,
    over_seeds,
    paired,
    peaks,
    seeds_of,
    table,
    text,
    tune,
)
from benchmarks.evidence.runner import Ask
from benchmarks.evidence.tasks import Run

TITLE = "A head as a matrix"
CLAIM = (
    "Under Muon latent attention trains worse than grouped queries; one matrix for each head closes"
    " the gap, and keeps the logits calm without a clip."
)
SOURCE = "GLM-5, arXiv 2602.15763, Muon Split; Kimi K3, arXiv 2607.24653, section 2.5"
PUBLISHED = "MLA with Muon Split matches GQA-8; attention logits stay stable without clipping"
THRESHOLD = 30.0
RATES = (0.008, 0.016, 0.032)
ATTENTIONS = ("gqa", "mla")
LINES = {
    "whole": Run(0.0, 0),
    "per head": Run(0.0, 0, per_head=True),
    "whole, clipped": Run(0.0, 0, threshold=THRESHOLD),
    "per head, clipped": Run(0.0, 0, per_head=True, threshold=THRESHOLD),
}


def study(ask: Ask) -> dict[str, Any]:
    """Tunes each of the four for each attention, and compares seed by seed with the whole."""
    lines = [line_of(name, attention) for name in LINES for attention in ATTENTIONS]
    ask([one for run in lines for one in grid(run, RATES)])
    return {attention: compare(ask, attention) for attention in ATTENTIONS}


def line_of(name: str, attention: str) -> Run:
    """Gives one of the four for a kind of attention."""
    return dataclasses.replace(LINES[name], attention=attention)


def compare(ask: Ask, attention: str) -> dict[str, Any]:
    """Reads off the trainings of one kind of attention, each at its own best learning rate."""
    found, best = {}, {}
    for name in LINES:
        run = line_of(name, attention)
        tuned = tune(ask, run, RATES)
        best[name] = ask(seeds_of(dataclasses.replace(run, learning_rate=tuned["learning_rate"])))
        hottest = ask(seeds_of(dataclasses.replace(run, learning_rate=RATES[-1])))
        found[name] = {
            **tuned,
            "max_logit": over_seeds(max(peaks(record)) for record in best[name]),
            "max_logit_at_largest_rate": over_seeds(max(peaks(record)) for record in hottest),
            "minus_whole": paired(best[name], best["whole"]),
        }
    return found


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: a better loss per head under MLA, at all seeds, and calmer logits."""
    line = ours["mla"]["per head"]
    gain, whole = line["minus_whole"], ours["mla"]["whole"]
    better = gain["mean"] + 2 * gain["sd"] < 0
    hot, whole_hot = line["max_logit_at_largest_rate"], whole["max_logit_at_largest_rate"]
    calmer = hot["mean"] + hot["sd"] < whole_hot["mean"] - whole_hot["sd"]
    return drawing.judge(better, calmer)


def short(ours: Mapping[str, Any]) -> str:
    """Says it in a line."""
    gains = [f"{text(ours[name]['per head']['minus_whole'])} ({name})" for name in ATTENTIONS]
    return f"{', '.join(gains)} of loss, without a clip"


def tell(ours: Mapping[str, Any]) -> str:
    """Says it in three sentences, and a table."""
    columns = (
        "",
        "best rate",
        "loss",
        "minus whole, same seed",
        "largest logit",
        "at the largest rate",
    )
    rows = [
        [
            f"{attention}, {name}",
            f"{line['learning_rate']:g}",
            text(line["loss"]),
            "" if name == "whole" else text(line["minus_whole"]),
            text(line["max_logit"], 0),
            text(line["max_logit_at_largest_rate"], 0),
        ]
        for attention in ATTENTIONS
        for name, line in ours[attention].items()
    ]
    loss = {name: ours[name]["whole"]["loss"]["mean"] for name in ATTENTIONS}
    gap = loss["mla"] - loss["gqa"]
    closed = (loss["mla"] - ours["mla"]["per head"]["loss"]["mean"]) / gap
    return f"""\
One matrix for each head trains better than the whole kernel under both, by
{text(ours["gqa"]["per head"]["minus_whole"])} and {text(ours["mla"]["per head"]["minus_whole"])} at
the same seed, and the clip changes nothing of that. It closes {closed:.0%} of the gap of latent
attention to grouped queries, {gap:.3f} with whole kernels. That it calms the logits we could not
reproduce: at the largest rate they are as large as those of whole kernels, or larger, and it is the
clip that holds them.

{table(columns, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws loss and largest logit of the four, for both kinds of attention."""
    figure, axes = drawing.panels(2, 2)
    for row, attention in zip(axes, ATTENTIONS, strict=True):
        ours = result["ours"][attention]
        drawing.bars(row[0], {name: line["loss"] for name, line in ours.items()})
        row[0].set_title(f"{attention}: validation loss, nats per byte")
        drawing.bars(row[1], {n: line["max_logit_at_largest_rate"] for n, line in ours.items()})
        row[1].set_title(f"{attention}: largest logit at rate {RATES[-1]:g}")
        row[1].axvline(THRESHOLD, color=drawing.LIMIT, linewidth=1)
    return figure
