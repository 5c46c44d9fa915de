"""The rules for keys that several query heads share, and exact max logits or their bound."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence import plotting
from benchmarks.evidence.runner import Measure
from benchmarks.evidence.summaries import (
    joined,
    largest_logits,
    loss_of,
    mean_sd,
    over_seeds,
    paired_difference,
    seeds_of,
)
from benchmarks.evidence.training import HEADS, LAYERS, Run
from benchmarks.report import markdown
from muonclip_jax._common.settings import SHARED_KEY_RULES

TITLE = "Rules for shared keys, and the bound"
CLAIM = (
    "The rule for shared keys has little effect, and so has a bound in place of exact max logits."
)
SOURCE = "Kimi K2, arXiv 2507.20534, has no shared keys; Megatron-LM clips them by `group`"
PUBLISHED = "no comparison known to us"
STEPS = 800
LARGE_RATE = Run(0.05, 0, steps=STEPS, weight_decay=0.0, threshold=30.0)  # clips until the end
BEST_RATE = Run(0.016, 0, steps=STEPS, threshold=12.0)  # clips most heads for a while
DEFAULT, BOUND = "query", "query, by the bound"
SETTINGS = {
    name: {rule: dataclasses.replace(run, shared_key=rule) for rule in SHARED_KEY_RULES}
    | {BOUND: dataclasses.replace(run, max_logit="lse_bound")}
    for name, run in {"large rate": LARGE_RATE, "best rate": BEST_RATE}.items()
}


def study(measure: Measure) -> dict[str, Any]:
    """Trains under each rule in both settings, and compares with the default at equal seeds."""
    measure(
        [run for lines in SETTINGS.values() for line in lines.values() for run in seeds_of(line)]
    )
    return {
        name: {
            rule: compare(measure(seeds_of(line)), measure(seeds_of(lines[DEFAULT])))
            for rule, line in lines.items()
        }
        for name, lines in SETTINGS.items()
    }


def compare(records: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """Summarizes the trainings under one rule."""
    return {
        "loss": loss_of(records),
        "minus_default": paired_difference(records, reference),
        "max_logit": over_seeds(max(largest_logits(record)) for record in records),
        "clips_a_step": over_seeds(float(np.mean(record["clipped"])) for record in records),
    }


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: the rules, and the bound, differ from the default by seed noise only."""

    def equal(line: Mapping[str, Any]) -> bool:
        minus = line["minus_default"]
        return abs(minus["mean"]) <= 2 * minus["sd"]

    rules = [
        equal(line) for lines in ours.values() for rule, line in lines.items() if rule != BOUND
    ]
    return plotting.judge(all(rules), all(equal(lines[BOUND]) for lines in ours.values()))


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    large, best = (
        min(lines[rule]["minus_default"]["mean"] for rule in SHARED_KEY_RULES)
        for lines in ours.values()
    )
    bound = mean_sd(ours["large rate"][BOUND]["minus_default"])
    rules = f"best other rule {large:.3f} (large rate), {best:.3f} (best rate)"
    return f"loss minus the default rule: {rules}; bound {bound}"


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    columns = (
        "",
        "loss",
        f"minus `{DEFAULT}`, same seed",
        "largest logit",
        "heads clipped per step",
    )
    rows = [
        [
            f"{name}, {rule}",
            mean_sd(line["loss"]),
            "" if rule == DEFAULT else mean_sd(line["minus_default"]),
            mean_sd(line["max_logit"], 0),
            mean_sd(line["clips_a_step"], 1),
        ]
        for name, lines in ours.items()
        for rule, line in lines.items()
    ]
    others = [rule for rule in SHARED_KEY_RULES if rule != DEFAULT]
    large, best = ([lines[rule] for rule in others] for lines in ours.values())
    logits = [line["max_logit"]["mean"] for line in large]
    gains = [
        f"{mean_sd(ours['large rate'][rule]['minus_default'])} with `{rule}`" for rule in others
    ]
    clips = [line["clips_a_step"]["mean"] for line in large]
    default = ours["large rate"][DEFAULT]
    exact = ours["large rate"]["exact"]["clips_a_step"]["mean"]
    spread = max(abs(line["minus_default"]["mean"]) for line in best)
    bounds = [mean_sd(lines[BOUND]["minus_default"]) for lines in ours.values()]
    return f"""\
At the best learning rate no rule changes the loss, and neither does the bound. At a large rate,
the loss minus the default rule's is {joined(gains)}.

The trainings have {STEPS} steps. "Large rate" is {LARGE_RATE.learning_rate:g} without weight decay
at τ = {LARGE_RATE.threshold:g}: the default rule clips {default["clips_a_step"]["mean"]:.1f} of
{LAYERS * HEADS} heads at a step, on average. "Best rate" is
{BEST_RATE.learning_rate:g} with decay at τ = {BEST_RATE.threshold:g}, which most
heads exceed for a while. Each key head serves two query heads.

At the large rate the rules `group` and `exact` keep the largest logit at {min(logits):.0f} to
{max(logits):.0f}, instead of {default["max_logit"]["mean"]:.0f} with the default `{DEFAULT}`. They
clip {min(clips):.1f} to {max(clips):.1f} heads per step instead of
{default["clips_a_step"]["mean"]:.1f}. At the best rate no rule differs from the default by more
than its spread (at most {spread:.3f}). The bound in place of exact max logits changes the loss by
{bounds[0]} and {bounds[1]}.

Why "partly": the bound passes, and the rules differ at the large rate only, three times the best.
Right after a clip `exact` gives each logit the value that `{DEFAULT}` gives it; its key is smaller
and its queries are larger. That it clips fewer heads, {exact:.1f} instead of
{default["clips_a_step"]["mean"]:.1f} a step, comes from the key: with a smaller key an update of a
query moves the logit less. `group` also lowers the other heads of the key, and clips fewest.

{markdown(columns, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws loss and clipping under each rule."""
    figure, axes = plotting.panels(2, 2)
    for row, (name, lines) in zip(axes, result["ours"].items(), strict=True):
        others = {rule: line for rule, line in lines.items() if rule != DEFAULT}
        plotting.bars(row[0], {rule: line["minus_default"] for rule, line in others.items()})
        row[0].axvline(0, color="black", linewidth=0.8)
        row[0].set_title(f"{name}: loss minus {DEFAULT}, same seed")
        plotting.bars(row[1], {rule: line["clips_a_step"] for rule, line in lines.items()})
        row[1].set_title(f"{name}: heads clipped per step")
    return figure
