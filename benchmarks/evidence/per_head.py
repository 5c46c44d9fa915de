"""GLM-5's Muon Split and Kimi K3's per-head Muon: one matrix per head, or the full kernel."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from benchmarks.evidence import plotting
from benchmarks.evidence.runner import Measure
from benchmarks.evidence.summaries import (
    grid,
    largest_logits,
    mean_sd,
    over_seeds,
    paired_difference,
    seeds_of,
    tune,
)
from benchmarks.evidence.training import MODELS, Run
from benchmarks.report import markdown

TITLE = "One matrix per head"
CLAIM = (
    "With Muon, latent attention trains worse than grouped queries; one matrix per head closes the"
    " gap, and keeps logits small without QK-clip."
)
SOURCE = "GLM-5, arXiv 2602.15763, Muon Split; Kimi K3, arXiv 2607.24653, section 2.5"
PUBLISHED = "MLA with Muon Split matches GQA-8; attention logits stay stable without clipping"
THRESHOLD = 30.0
RATES = (0.008, 0.016, 0.032)
ATTENTIONS = ("gqa", "mla")
LINES = {
    "full kernel": Run(0.0, 0),
    "per head": Run(0.0, 0, per_head=True),
    "full kernel, clipped": Run(0.0, 0, threshold=THRESHOLD),
    "per head, clipped": Run(0.0, 0, per_head=True, threshold=THRESHOLD),
}


def study(measure: Measure) -> dict[str, Any]:
    """Tunes each variant for each attention, and compares with the full kernel at equal seeds."""
    lines = [line_of(name, attention) for name in LINES for attention in ATTENTIONS]
    measure([one for run in lines for one in grid(run, RATES)])
    return {attention: compare(measure, attention) for attention in ATTENTIONS}


def line_of(name: str, attention: str) -> Run:
    """Returns one variant for a kind of attention."""
    return dataclasses.replace(LINES[name], attention=attention)


def compare(measure: Measure, attention: str) -> dict[str, Any]:
    """Summarizes one kind of attention, each variant at its own best learning rate."""
    found, best = {}, {}
    for name in LINES:
        run = line_of(name, attention)
        tuned = tune(measure, run, RATES)
        best[name] = measure(
            seeds_of(dataclasses.replace(run, learning_rate=tuned["learning_rate"]))
        )
        at_largest = measure(seeds_of(dataclasses.replace(run, learning_rate=RATES[-1])))
        found[name] = {
            **tuned,
            "max_logit": over_seeds(max(largest_logits(r)) for r in best[name]),
            "max_logit_at_largest_rate": over_seeds(max(largest_logits(r)) for r in at_largest),
            "minus_full_kernel": paired_difference(best[name], best["full kernel"]),
        }
    return found


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: with MLA and one matrix per head, a lower loss and smaller logits."""
    line = ours["mla"]["per head"]
    gain, full = line["minus_full_kernel"], ours["mla"]["full kernel"]
    better = gain["mean"] + 2 * gain["sd"] < 0
    logit, full_logit = line["max_logit_at_largest_rate"], full["max_logit_at_largest_rate"]
    smaller = logit["mean"] + logit["sd"] < full_logit["mean"] - full_logit["sd"]
    return plotting.judge(better, smaller)


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    gains = [
        f"{mean_sd(ours[name]['per head']['minus_full_kernel'])} ({name})" for name in ATTENTIONS
    ]
    return f"loss changes by {', '.join(gains)}, without QK-clip"


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    columns = (
        "",
        "best rate",
        "loss",
        "minus full kernel, same seed",
        "largest logit",
        "at the largest rate",
    )
    rows = [
        [
            f"{attention}, {name}",
            f"{line['learning_rate']:g}",
            mean_sd(line["loss"]),
            "" if name == "full kernel" else mean_sd(line["minus_full_kernel"]),
            mean_sd(line["max_logit"], 0),
            mean_sd(line["max_logit_at_largest_rate"], 0),
        ]
        for attention in ATTENTIONS
        for name, line in ours[attention].items()
    ]
    loss = {name: ours[name]["full kernel"]["loss"]["mean"] for name in ATTENTIONS}
    gap = loss["mla"] - loss["gqa"]
    split = {name: ours[name]["per head"]["loss"]["mean"] for name in ATTENTIONS}
    closed = (loss["mla"] - split["mla"]) / gap
    closed_both = 1 - (split["mla"] - split["gqa"]) / gap
    shapes = MODELS["mla"]("exact").attention
    wide = shapes.heads * (shapes.nope + shapes.rope) / shapes.q_rank
    gains = [mean_sd(ours[name]["per head"]["minus_full_kernel"]) for name in ATTENTIONS]
    return f"""\
One matrix per head lowers the loss a little, and does not keep logits smaller.

At the same seed the loss changes by {gains[0]} with grouped queries and by {gains[1]} with latent
attention, with and without QK-clip. With full kernels the gap between latent attention and grouped
queries is {gap:.3f}. One matrix per head for latent attention alone closes {closed:.0%} of it. But
grouped queries gain as well: with one matrix per head for both, {closed_both:.0%} is closed.

At the largest rate the logits are equal to the logits of full kernels or larger, and only QK-clip
limits them.

Why "partly": the loss is lower, the logits are not. The scale 0.2 √max(n_in, n_out) gives both
updates the same root mean square, so the update of a head is no smaller with one matrix per head.
One matrix per head only makes the updates of all heads equally large. In the square query kernels
of `gqa` a full kernel does that too: if all its outputs are orthonormal, so are the outputs of each
head. Kernels with many more outputs than
inputs differ: Kimi K2's up-projection of queries has 8 times as many, ours {wide:g}.

{markdown(columns, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws loss and largest logit of each variant, for both kinds of attention."""
    figure, axes = plotting.panels(2, 2)
    for row, attention in zip(axes, ATTENTIONS, strict=True):
        ours = result["ours"][attention]
        plotting.bars(row[0], {name: line["loss"] for name, line in ours.items()})
        row[0].set_title(f"{attention}: validation loss, nats per byte")
        plotting.bars(row[1], {n: line["max_logit_at_largest_rate"] for n, line in ours.items()})
        row[1].set_title(f"{attention}: largest logit at rate {RATES[-1]:g}")
        row[1].axvline(THRESHOLD, color=plotting.LIMIT, linewidth=1)
    return figure
