"""The rules for keys that several query heads share; the exact statistic against its bound."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence import drawing
from benchmarks.evidence.measures import loss_of, over_seeds, paired, peaks, seeds_of, table, text
from benchmarks.evidence.runner import Ask
from benchmarks.evidence.tasks import Run
from muonclip_jax._common.settings import SHARED_KEY_RULES

TITLE = "Rules for shared keys, and the bound"
CLAIM = (
    "How a shared key is clipped, and whether the statistic is exact or a bound, hardly matters."
)
SOURCE = "Kimi K2, arXiv 2507.20534, has no shared keys; Megatron-LM clips them by `group`"
PUBLISHED = "no comparison that we know"
STEPS = 800
HOT = Run(0.05, 0, steps=STEPS, weight_decay=0.0, threshold=30.0)  # all heads pass it, for ever
CALM = Run(0.016, 0, steps=STEPS, threshold=12.0)  # the best rate; most heads pass it for a while
DEFAULT, BOUND = "query", "query, by the bound"
SETTINGS = {
    name: {rule: dataclasses.replace(run, shared_key=rule) for rule in SHARED_KEY_RULES}
    | {BOUND: dataclasses.replace(run, max_logit="lse_bound")}
    for name, run in {"hot": HOT, "calm": CALM}.items()
}


def study(ask: Ask) -> dict[str, Any]:
    """Trains under each rule in both settings, and compares seed by seed with the default."""
    ask([run for lines in SETTINGS.values() for line in lines.values() for run in seeds_of(line)])
    return {
        name: {
            rule: compare(ask(seeds_of(line)), ask(seeds_of(lines[DEFAULT])))
            for rule, line in lines.items()
        }
        for name, lines in SETTINGS.items()
    }


def compare(records: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """Reads off the trainings under one rule."""
    return {
        "loss": loss_of(records),
        "minus_default": paired(records, reference),
        "max_logit": over_seeds(max(peaks(record)) for record in records),
        "clips_a_step": over_seeds(float(np.mean(record["clipped"])) for record in records),
    }


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: the rules, and the bound, differ from the default by seed noise alone."""

    def alike(line: Mapping[str, Any]) -> bool:
        minus = line["minus_default"]
        return abs(minus["mean"]) <= 2 * minus["sd"]

    rules = [
        alike(line) for lines in ours.values() for rule, line in lines.items() if rule != BOUND
    ]
    return drawing.judge(all(rules), all(alike(lines[BOUND]) for lines in ours.values()))


def short(ours: Mapping[str, Any]) -> str:
    """Says it in a line."""
    hot, calm = (
        min(lines[rule]["minus_default"]["mean"] for rule in SHARED_KEY_RULES)
        for lines in ours.values()
    )
    bound = text(ours["hot"][BOUND]["minus_default"])
    return f"other rules down to {hot:.3f} hot, {calm:.3f} calm; the bound {bound}"


def tell(ours: Mapping[str, Any]) -> str:
    """Says it in three sentences, and a table."""
    columns = (
        "",
        "loss",
        f"minus `{DEFAULT}`, same seed",
        "largest logit",
        "heads clipped a step",
    )
    rows = [
        [
            f"{name}, {rule}",
            text(line["loss"]),
            "" if rule == DEFAULT else text(line["minus_default"]),
            text(line["max_logit"], 0),
            text(line["clips_a_step"], 1),
        ]
        for name, lines in ours.items()
        for rule, line in lines.items()
    ]
    others = [rule for rule in SHARED_KEY_RULES if rule != DEFAULT]
    hot, calm = ([lines[rule] for rule in others] for lines in ours.values())
    logits = [line["max_logit"]["mean"] for line in hot]
    gains = [-line["minus_default"]["mean"] for line in hot]
    clips = [line["clips_a_step"]["mean"] for line in hot]
    default = ours["hot"][DEFAULT]
    return f"""\
Hot is rate {HOT.learning_rate:g} without weight decay at τ = {HOT.threshold:g}, where every head
presses against τ for ever; calm is the best rate with decay at τ = {CALM.threshold:g}, which most
heads pass for a while; both have two query heads for each key head. Hot, the rules that shrink the
shared key as well hold the heads tighter, at {min(logits):.0f} to {max(logits):.0f} instead of
{default["max_logit"]["mean"]:.0f} under the default, `{DEFAULT}`, with {min(clips):.1f} to
{max(clips):.1f} clips a step instead of {default["clips_a_step"]["mean"]:.1f}, and the loss is
{min(gains):.3f} to {max(gains):.3f} lower, more than seed noise for `group`; calm, no rule
differs from another by more than its spread (at most
{max(abs(line["minus_default"]["mean"]) for line in calm):.3f}). That the bound takes the place of
the exact maximum cannot be seen in either: {text(ours["hot"][BOUND]["minus_default"])} and
{text(ours["calm"][BOUND]["minus_default"])}.

{table(columns, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws loss and clipping under each rule."""
    figure, axes = drawing.panels(2, 2)
    for row, (name, lines) in zip(axes, result["ours"].items(), strict=True):
        others = {rule: line for rule, line in lines.items() if rule != DEFAULT}
        drawing.bars(row[0], {rule: line["minus_default"] for rule, line in others.items()})
        row[0].axvline(0, color="black", linewidth=0.8)
        row[0].set_title(f"{name}: loss minus that of {DEFAULT}, same seed")
        drawing.bars(row[1], {rule: line["clips_a_step"] for rule, line in lines.items()})
        row[1].set_title(f"{name}: heads clipped a step")
    return figure
