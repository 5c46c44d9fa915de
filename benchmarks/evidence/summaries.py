"""Summaries of trainings: means over seeds, tuned learning rates, differences at equal seeds."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.evidence.runner import Measure
from benchmarks.evidence.training import Run, finite

SEEDS = (0, 1, 2)
RATES = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064)  # one grid for all optimizers


def over_seeds(values: Iterable[float | None]) -> dict[str, Any]:
    """Returns mean, sample standard deviation and number; no mean if one of them diverged."""
    known = list(values)
    if None in known:
        return {"mean": None, "sd": None, "n": len(known)}
    numbers = [float(x) for x in known if x is not None]
    sd = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return {"mean": finite(statistics.mean(numbers)), "sd": finite(sd), "n": len(numbers)}


def seeds_of(run: Run, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """Returns a training for each seed."""
    return [dataclasses.replace(run, seed=seed) for seed in seeds]


def loss_of(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Returns the validation loss over trainings that differ only in their seed."""
    return over_seeds(record["validation_loss"] for record in records)


def grid(run: Run, rates: Sequence[float] = RATES) -> list[Run]:
    """Returns a training for each learning rate and seed, rate by rate."""
    by_rate = [dataclasses.replace(run, learning_rate=rate) for rate in rates]
    return [one for run in by_rate for one in seeds_of(run)]


def tune(measure: Measure, run: Run, rates: Sequence[float] = RATES) -> dict[str, Any]:
    """Trains at each learning rate with each seed.

    Returns:
      `learning_rate` with the lowest mean validation loss; `loss`, the loss at this rate;
      `losses`, by rate; `inside`, whether the best rate is inside the grid, not at its end.
    """
    records = iter(measure(grid(run, rates)))
    losses = {rate: loss_of([next(records) for _ in SEEDS]) for rate in rates}
    best = min(losses, key=lambda rate: mean_or_infinity(losses[rate]))
    return {
        "learning_rate": best,
        "loss": losses[best],
        "losses": {str(rate): loss for rate, loss in losses.items()},
        "inside": best not in (rates[0], rates[-1]),
    }


def mean_or_infinity(loss: dict[str, Any]) -> float:
    """Orders losses: a training that diverged is the worst."""
    return math.inf if loss["mean"] is None else loss["mean"]


def paired_difference(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the loss of first - second over trainings with equal seeds, weights and batches."""
    pairs = zip(first, second, strict=True)
    return over_seeds(a["validation_loss"] - b["validation_loss"] for a, b in pairs)


def largest_logits(record: dict[str, Any]) -> list[float]:
    """Returns the largest logit over all heads at each logged step."""
    return [max(max(layer) for layer in layers) for layers in record["max_logits"]]


def last_clip(record: dict[str, Any]) -> int:
    """Returns the last step after which a head was clipped; 0 if none was."""
    return max((step for step, heads in enumerate(record["clipped"], start=1) if heads), default=0)


def mean_sd(value: dict[str, Any], digits: int = 3) -> str:
    """Formats a mean and its standard deviation, such as 1.234 ± 0.005."""
    if value["mean"] is None:
        return "diverged"
    return f"{value['mean']:.{digits}f} ± {value['sd']:.{digits}f}"


def joined(names: Sequence[str]) -> str:
    """Joins names in a sentence.

    Example:
      >>> joined(["a", "b", "c"]), joined(["a"])
      ('a, b and c', 'a')
    """
    return " and ".join([", ".join(names[:-1]), names[-1]]) if names[1:] else "".join(names)
