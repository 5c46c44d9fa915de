"""Moonlight and Kimi K2: Muon needs fewer tokens than AdamW, at the learning rate of AdamW."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.evidence import plotting
from benchmarks.evidence.runner import Measure
from benchmarks.evidence.summaries import RATES, SEEDS, grid, mean_sd, over_seeds, seeds_of, tune
from benchmarks.evidence.training import Run, finite
from benchmarks.report import markdown

TITLE = "Fewer tokens than AdamW"
CLAIM = "Muon reaches the loss of AdamW with half the tokens, at a learning rate tuned for AdamW."
SOURCE = "Moonlight, arXiv 2502.16982, figure 1 and section 2.2; Kimi K2, arXiv 2507.20534"
PUBLISHED = "52 % of the training FLOPs of AdamW (Moonlight, scaling law)"
THRESHOLD = 30.0
STEPS = Run(0.0, 0).steps
LONG = 2 * STEPS  # a second comparison, after a longer training with AdamW
LONG_RATES = (0.004, 0.008, 0.016)
BUDGETS = (
    80,
    120,
    160,
    200,
    240,
    280,
    320,
    400,
    560,
    800,
)  # steps, each a full schedule
OPTIMIZERS = {
    "adamw": Run(0.0, 0, optimizer="adamw"),
    "muon": Run(0.0, 0),
    "muonclip": Run(0.0, 0, threshold=THRESHOLD),
    "muon, unmatched": Run(0.0, 0, consistent_rms=None),
}


def study(measure: Measure) -> dict[str, Any]:
    """Tunes each optimizer on one grid, then finds the steps that reach the loss of AdamW."""
    measure([one for run in OPTIMIZERS.values() for one in grid(run, RATES)])
    tuned = {name: tune(measure, run) for name, run in OPTIMIZERS.items()}
    short = {name: shares(measure, name, tuned, tuned["adamw"]) for name in ("muon", "muonclip")}
    longer = dataclasses.replace(OPTIMIZERS["adamw"], steps=LONG)
    adamw = tune(measure, longer, LONG_RATES)
    rate = tuned["adamw"]["learning_rate"]
    return {
        "tuned": tuned,
        "steps_to_adamw_loss": short,
        "adamw_twice_as_long": adamw,
        "steps_to_that_loss": shares(measure, "muonclip", tuned, adamw, LONG),
        "at_adamw_rate": {n: carry_over(tuned[n], rate) for n in OPTIMIZERS if n != "adamw"},
    }


def shares(
    measure: Measure,
    name: str,
    tuned: Mapping[str, Any],
    adamw: Mapping[str, Any],
    full: int = STEPS,
) -> dict[str, Any]:
    """Finds the fraction of the steps of AdamW that reach its loss, at equal seeds.

    Each budget is a separate training, whose learning rate falls to 0. Between two budgets the loss
    is linear in the logarithm of the steps. The learning rate was tuned at `STEPS`, which can only
    favor AdamW.
    """
    rate = {"steps": full, "learning_rate": adamw["learning_rate"]}
    target = measure(seeds_of(dataclasses.replace(OPTIMIZERS["adamw"], **rate)))
    run = dataclasses.replace(OPTIMIZERS[name], learning_rate=tuned[name]["learning_rate"])
    budgets = [steps for steps in BUDGETS if steps <= full]
    lines = [seeds_of(dataclasses.replace(run, steps=steps)) for steps in budgets]
    records = iter(measure([one for seeds in lines for one in seeds]))
    losses = np.array([[next(records)["validation_loss"] for _ in SEEDS] for _ in budgets])
    crossings = [
        crossing(budgets, losses[:, i].tolist(), record["validation_loss"])
        for i, record in enumerate(target)
    ]
    return {
        "share": over_seeds(finite(steps / full) for steps in crossings),
        "losses": {str(steps): over_seeds(row) for steps, row in zip(budgets, losses, strict=True)},
    }


def crossing(steps: Sequence[int], losses: Sequence[float], target: float) -> float:
    """Returns the steps at which a falling loss reaches the target; NaN outside the budgets.

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
    """Returns the loss that another optimizer gives up at the learning rate of AdamW."""
    own, carried = tuned["loss"]["mean"], tuned["losses"][str(rate)]["mean"]
    excess = None if carried is None else finite(carried - own)
    return {"rate_by_adamw_rate": finite(tuned["learning_rate"] / rate), "excess_loss": excess}


def verdict(ours: Mapping[str, Any]) -> str:
    """Reproduced: fewer steps, and best rates that are at most one grid point apart."""
    share, carried = ours["steps_to_adamw_loss"]["muonclip"]["share"], ours["at_adamw_rate"]
    fewer = share["mean"] is not None and share["mean"] + 2 * share["sd"] < 1
    matched = 0.5 <= carried["muonclip"]["rate_by_adamw_rate"] <= 2
    return plotting.judge(fewer, matched)


def one_line(ours: Mapping[str, Any]) -> str:
    """Summarizes the result in one line."""
    first = ours["steps_to_adamw_loss"]["muonclip"]["share"]
    second = ours["steps_to_that_loss"]["share"]
    shares = f"{percent(first)} of {STEPS} steps; {percent(second)} of {LONG}"
    return f"with Algorithm 1 of Kimi K2: {shares}"


def percent(share: Mapping[str, Any]) -> str:
    """Formats a fraction and its standard deviation."""
    return f"{share['mean']:.0%} ± {share['sd']:.0%}"


def section(ours: Mapping[str, Any]) -> str:
    """Describes the result in a paragraph and a table."""
    tuned, carried = ours["tuned"], ours["at_adamw_rate"]
    columns = ("optimizer", "best rate", "/ AdamW's", "loss", "increase at AdamW's rate")
    rows = [
        ["adamw", f"{tuned['adamw']['learning_rate']:g}", "", mean_sd(tuned["adamw"]["loss"]), ""]
    ]
    rows += [
        [
            name,
            f"{tuned[name]['learning_rate']:g}",
            f"{line['rate_by_adamw_rate']:g}",
            mean_sd(tuned[name]["loss"]),
            f"{line['excess_loss']:.3f}",
        ]
        for name, line in carried.items()
    ]
    first, second = (
        percent(one["share"])
        for one in (ours["steps_to_adamw_loss"]["muonclip"], ours["steps_to_that_loss"])
    )
    longer = ours["adamw_twice_as_long"]
    unmatched = carried["muon, unmatched"]
    return f"""\
MuonClip (τ = {THRESHOLD:g}) reaches the loss of AdamW in {first} of the steps.

AdamW trains for {STEPS} steps. If AdamW trains for {LONG} steps, to {mean_sd(longer["loss"])} at
the rate {longer["learning_rate"]:g}, the fraction is {second}. Each number of steps is a separate
training with a full schedule. Short trainings on small batches are no fair test of AdamW.
[Steps to a fixed loss](#steps-to-a-fixed-loss) also has the defaults of `optax.contrib.muon`.

With updates matched to the size of AdamW's, the best rate is
{carried["muon"]["rate_by_adamw_rate"]:g} times the rate of AdamW, one grid point away. The verdict
accepts a best rate within a factor of 2 of AdamW's. At the rate of AdamW the loss is
{carried["muon"]["excess_loss"]:.3f} higher. Without matching, which is Keller Jordan's scale
√max(1, n_out / n_in), the factor is {unmatched["rate_by_adamw_rate"]:g} and the increase
{unmatched["excess_loss"]:.3f}. At its own best rate the unmatched scale trains better here.
Matching saves the search for a rate, and does not lower the loss.

{markdown(columns, rows)}"""


def draw(result: Mapping[str, Any]) -> Figure:
    """Draws the loss over the learning rate, and over the steps of the schedule."""
    ours = result["ours"]
    figure, (left, right) = plotting.panels(2)
    for name, tuned in ours["tuned"].items():
        plotting.band(left, RATES, [tuned["losses"][str(rate)] for rate in RATES], name)
    plotting.by_rate(left, RATES)
    left.set(ylabel="validation loss, nats per byte", title="one grid for all optimizers")
    targets = {STEPS: ours["tuned"]["adamw"], LONG: ours["adamw_twice_as_long"]}
    line = ours["steps_to_that_loss"]["losses"]
    plotting.band(right, [int(steps) for steps in line], list(line.values()), "muonclip")
    plotting.band(right, list(targets), [one["loss"] for one in targets.values()], "adamw")
    for one in targets.values():
        right.axhline(one["loss"]["mean"], color=plotting.color("adamw"), linestyle="dashed")
    right.set(xlabel="steps of the schedule", title="steps to the loss of AdamW (dashed)")
    left.legend(frameon=False)
    return figure
