"""The four rules for keys that several query heads share; the exact statistic against its bound."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence import drawing
from benchmarks.evidence.measures import loss_of, over_seeds, paired, peaks, seeds_of
from benchmarks.evidence.runner import Ask
from benchmarks.evidence.tasks import Run
from muonclip_jax._shared_key import SHARED_KEY_RULES

CLAIM = (
    "How a shared key is clipped, and whether the statistic is exact or a bound, hardly matters."
)
SOURCE = "Kimi K2, arXiv 2507.20534, has no shared keys; Megatron-LM clips them by `group`"
PUBLISHED = "no comparison that we know"
RATE, THRESHOLD, STEPS = 0.05, 30.0, 800  # all heads pass it, without weight decay
BASE = Run(RATE, 0, steps=STEPS, weight_decay=0.0, threshold=THRESHOLD)
LINES = {
    **{rule: dataclasses.replace(BASE, shared_key=rule) for rule in SHARED_KEY_RULES},
    "query, by the bound": dataclasses.replace(BASE, max_logit="lse_bound"),
    "no clip": dataclasses.replace(BASE, threshold=None),
}
DEFAULT = "query"


def study(ask: Ask) -> dict[str, Any]:
    """Trains under each rule, and compares seed by seed with the default."""
    ask([run for line in LINES.values() for run in seeds_of(line)])
    reference = ask(seeds_of(LINES[DEFAULT]))
    return {name: compare(ask(seeds_of(line)), reference) for name, line in LINES.items()}


def compare(records: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """Reads off the trainings under one rule."""
    return {
        "loss": loss_of(records),
        "minus_default": paired(records, reference),
        "max_logit": over_seeds(max(peaks(record)) for record in records),
        "clips_a_step": over_seeds(float(np.mean(record["clipped"])) for record in records),
        "ever_clipped": over_seeds(record["ever_clipped"] for record in records),
        "median_logit_at_the_end": over_seeds(
            float(np.median(record["max_logits"][-1])) for record in records
        ),
    }


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: the rules, and then the bound, differ from the default by seed noise alone."""

    def alike(name: str) -> bool:
        minus = ours[name]["minus_default"]
        return abs(minus["mean"]) <= 2 * minus["sd"]

    rules = all(alike(name) for name in SHARED_KEY_RULES if name != DEFAULT)
    return drawing.judge(rules, alike("query, by the bound"))


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws loss and clipping under each rule."""
    ours = result["ours"]
    figure, (left, right) = drawing.panels(2)
    drawing.bars(left, {name: line["loss"] for name, line in ours.items()})
    left.set_title("validation loss, nats per byte")
    drawing.bars(right, {n: line["clips_a_step"] for n, line in ours.items() if n != "no clip"})
    right.set_title("heads clipped a step")
    return figure
