"""Moonlight and Kimi K2: Muon needs fewer tokens than AdamW, at AdamW's learning rate."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence import drawing
from benchmarks.evidence.measures import RATES, SEEDS, grid, over_seeds, seeds_of, table, text, tune
from benchmarks.evidence.runner import Ask
from benchmarks.evidence.tasks import Run, finite

TITLE = "Fewer tokens than AdamW"
CLAIM = "Muon reaches AdamW's loss in about half of its tokens, at a learning rate tuned for AdamW."
SOURCE = "Moonlight, arXiv 2502.16982, figure 1 and section 2.2; Kimi K2, arXiv 2507.20534"
PUBLISHED = "52 % of the training FLOPs of AdamW (Moonlight, scaling law)"
THRESHOLD = 30.0
STEPS = Run(0.0, 0).steps
LONG = 2 * STEPS  # AdamW is compared a second time, when it has had more of them
LONG_RATES = (0.004, 0.008, 0.016)
BUDGETS = (80, 120, 160, 200, 240, 280, 320, 400, 560, 800)  # steps, each a whole schedule
OPTIMIZERS = {
    "adamw": Run(0.0, 0, optimizer="adamw"),
    "muon": Run(0.0, 0),
    "muonclip": Run(0.0, 0, threshold=THRESHOLD),
    "muon, unmatched": Run(0.0, 0, consistent_rms=None),
}


def study(ask: Ask) -> dict[str, Any]:
    """Tunes each optimizer over the same grid, then looks how few steps reach AdamW's loss."""
    ask([one for run in OPTIMIZERS.values() for one in grid(run, RATES)])
    tuned = {name: tune(ask, run) for name, run in OPTIMIZERS.items()}
    short = {name: shares(ask, name, tuned, tuned["adamw"]) for name in ("muon", "muonclip")}
    longer = dataclasses.replace(OPTIMIZERS["adamw"], steps=LONG)
    adamw = tune(ask, longer, LONG_RATES)
    rate = tuned["adamw"]["learning_rate"]
    return {
        "tuned": tuned,
        "steps_to_adamw_loss": short,
        "adamw_twice_as_long": adamw,
        "steps_to_that_loss": shares(ask, "muonclip", tuned, adamw, LONG),
        "at_adamw_rate": {n: carry_over(tuned[n], rate) for n in OPTIMIZERS if n != "adamw"},
    }


def shares(
    ask: Ask,
    name: str,
    tuned: Mapping[str, Any],
    adamw: Mapping[str, Any],
    full: int = STEPS,
) -> dict[str, Any]:
    """Compares with AdamW seed by seed: the share of its steps after which the loss is its own.

    Each budget is a training of its own, whose learning rate falls to 0; between two budgets the
    loss is taken as a line in the logarithm of the steps. The learning rate is the one tuned at
    `STEPS`, which can only count against Muon.
    """
    rate = {"steps": full, "learning_rate": adamw["learning_rate"]}
    target = ask(seeds_of(dataclasses.replace(OPTIMIZERS["adamw"], **rate)))
    run = dataclasses.replace(OPTIMIZERS[name], learning_rate=tuned[name]["learning_rate"])
    budgets = [steps for steps in BUDGETS if steps <= full]
    lines = [seeds_of(dataclasses.replace(run, steps=steps)) for steps in budgets]
    records = iter(ask([one for seeds in lines for one in seeds]))
    losses = np.array([[next(records)["validation_loss"] for _ in SEEDS] for _ in budgets])
    crossings = [
        crossing(budgets, losses[:, i], record["validation_loss"])
        for i, record in enumerate(target)
    ]
    return {
        "share": over_seeds(finite(steps / full) for steps in crossings),
        "losses": {str(steps): over_seeds(row) for steps, row in zip(budgets, losses, strict=True)},
    }


def crossing(steps: Sequence[int], losses: Sequence[float], target: float) -> float:
    """Gives the steps at which a falling loss is the target; NaN outside of what was tried.

    Example:
      >>> round(crossing([100, 200, 400], [3.0, 2.0, 1.0], 1.5), 1)
      282.8
    """
    for i in range(len(steps) - 1):
        before, after = losses[i], losses[i + 1]
        if before >= target > after:
            share = (before - target) / (before - after)
            return math.exp((1 - share) * math.log(steps[i]) + share * math.log(steps[i + 1]))
    return math.nan


def carry_over(tuned: Mapping[str, Any], rate: float) -> dict[str, Any]:
    """Says what the learning rate of AdamW costs another optimizer."""
    own, carried = tuned["loss"]["mean"], tuned["losses"][str(rate)]["mean"]
    excess = None if carried is None else finite(carried - own)
    return {"rate_by_adamw_rate": finite(tuned["learning_rate"] / rate), "excess_loss": excess}


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: fewer steps at all seeds, and a matched rate within one place of the grid."""
    share, carried = ours["steps_to_adamw_loss"]["muonclip"]["share"], ours["at_adamw_rate"]
    fewer = share["mean"] is not None and share["mean"] + 2 * share["sd"] < 1
    matched = 0.5 <= carried["muonclip"]["rate_by_adamw_rate"] <= 2
    return drawing.judge(fewer, matched)


def short(ours: Mapping[str, Any]) -> str:
    """Says it in a line."""
    first = ours["steps_to_adamw_loss"]["muonclip"]["share"]
    return (
        f"{percent(first)} of the steps; {percent(ours['steps_to_that_loss']['share'])} of {LONG}"
    )


def percent(share: Mapping[str, Any]) -> str:
    """Writes a share and its spread."""
    return f"{share['mean']:.0%} ± {share['sd']:.0%}"


def tell(ours: Mapping[str, Any]) -> str:
    """Says it in three sentences, and a table."""
    tuned, carried = ours["tuned"], ours["at_adamw_rate"]
    columns = ("optimizer", "best rate", "by AdamW's", "loss", "more at AdamW's rate")
    rows = [["adamw", f"{tuned['adamw']['learning_rate']:g}", "", text(tuned["adamw"]["loss"]), ""]]
    rows += [
        [
            name,
            f"{tuned[name]['learning_rate']:g}",
            f"{line['rate_by_adamw_rate']:g}",
            text(tuned[name]["loss"]),
            f"{line['excess_loss']:.3f}",
        ]
        for name, line in carried.items()
    ]
    first, second = (
        percent(one["share"])
        for one in (ours["steps_to_adamw_loss"]["muonclip"], ours["steps_to_that_loss"])
    )
    longer = ours["adamw_twice_as_long"]
    return f"""\
MuonClip (τ = {THRESHOLD:g}) reaches the loss of AdamW at {STEPS} steps in {first} of them, and that
of AdamW at {LONG} steps ({text(longer["loss"])}, rate {longer["learning_rate"]:g}, tuned again) in
{second}; each share is a training with a whole schedule of its own.
Matched to AdamW's update size, Muon is best at {carried["muon"]["rate_by_adamw_rate"]:g} times
AdamW's rate, one place of the grid away, and loses {carried["muon"]["excess_loss"]:.3f} at that
rate itself; without matching it is {carried["muon, unmatched"]["rate_by_adamw_rate"]:g} times and
{carried["muon, unmatched"]["excess_loss"]:.3f}. But at its own best rate the unmatched scale,
Keller Jordan's √max(1, n_out / n_in), trains better here than the matched one: what matching buys
is a rate that one need not search for, not a lower loss. AdamW's losses say as much about so short
a training on so small a batch as about AdamW.

{table(columns, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws the loss by learning rate, and by steps of the whole schedule."""
    ours = result["ours"]
    figure, (left, right) = drawing.panels(2)
    for name, tuned in ours["tuned"].items():
        drawing.band(left, RATES, [tuned["losses"][str(rate)] for rate in RATES], name)
    drawing.by_rate(left, RATES)
    left.set(ylabel="validation loss, nats per byte", title="one grid for all")
    targets = {STEPS: ours["tuned"]["adamw"], LONG: ours["adamw_twice_as_long"]}
    line = ours["steps_to_that_loss"]["losses"]
    drawing.band(right, [int(steps) for steps in line], list(line.values()), "muonclip")
    drawing.band(right, list(targets), [one["loss"] for one in targets.values()], "adamw")
    for one in targets.values():
        right.axhline(one["loss"]["mean"], color=drawing.color("adamw"), linestyle="dashed")
    right.set(xlabel="steps of the whole schedule", title="steps to AdamW's loss (dashed)")
    left.legend(frameon=False)
    return figure
