"""What the experiments read off their trainings: means over seeds, tuned learning rates."""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.evidence.runner import Ask
from benchmarks.evidence.tasks import Run, finite

SEEDS = (0, 1, 2)
RATES = (0.002, 0.004, 0.008, 0.016, 0.032, 0.064)  # one grid for all optimizers


def over_seeds(values: Iterable[float | None]) -> dict[str, Any]:
    """Gives mean, sample standard deviation and number; no mean if one of them diverged."""
    known = list(values)
    if None in known:
        return {"mean": None, "sd": None, "n": len(known)}
    numbers = [float(x) for x in known if x is not None]
    sd = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return {"mean": finite(statistics.mean(numbers)), "sd": finite(sd), "n": len(numbers)}


def seeds_of(run: Run, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """Gives a training for each seed."""
    return [dataclasses.replace(run, seed=seed) for seed in seeds]


def loss_of(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Gives the validation loss of trainings that differ by their seed."""
    return over_seeds(record["validation_loss"] for record in records)


def grid(run: Run, rates: Sequence[float] = RATES) -> list[Run]:
    """Gives a training for each learning rate and seed, rate by rate."""
    lines = [dataclasses.replace(run, learning_rate=rate) for rate in rates]
    return [one for line in lines for one in seeds_of(line)]


def tune(ask: Ask, run: Run, rates: Sequence[float] = RATES) -> dict[str, Any]:
    """Trains at each learning rate with each seed.

    Returns:
      `learning_rate`, the best by mean validation loss; `loss`, that at the best; `losses`, by
      rate; `inside`, whether the best is not at an end of the grid.
    """
    records = iter(ask(grid(run, rates)))
    losses = {rate: loss_of([next(records) for _ in SEEDS]) for rate in rates}
    best = min(losses, key=lambda rate: mean_or_infinity(losses[rate]))
    return {
        "learning_rate": best,
        "loss": losses[best],
        "losses": {str(rate): loss for rate, loss in losses.items()},
        "inside": best not in (rates[0], rates[-1]),
    }


def mean_or_infinity(loss: dict[str, Any]) -> float:
    """Orders losses: that of a training that diverged is the worst."""
    return math.inf if loss["mean"] is None else loss["mean"]


def difference(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Compares means over seeds: `mean` of first - second, and its standard error `se`."""
    variance = first["sd"] ** 2 / first["n"] + second["sd"] ** 2 / second["n"]
    return {"mean": finite(first["mean"] - second["mean"]), "se": finite(math.sqrt(variance))}


def paired(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Any]:
    """Compares trainings of equal seeds, weights and batches: the loss of first - second."""
    pairs = zip(first, second, strict=True)
    return over_seeds(a["validation_loss"] - b["validation_loss"] for a, b in pairs)


def peaks(record: dict[str, Any]) -> list[float]:
    """Gives the largest logit over all heads at each logged step."""
    return [max(max(layer) for layer in layers) for layers in record["max_logits"]]


def last_clip(record: dict[str, Any]) -> int:
    """Gives the last step after which a head was clipped; 0 if none was."""
    return max((step for step, heads in enumerate(record["clipped"], start=1) if heads), default=0)


def text(value: dict[str, Any], digits: int = 3) -> str:
    """Writes a mean and its spread, such as 1.234 ± 0.005."""
    if value["mean"] is None:
        return "diverged"
    return f"{value['mean']:.{digits}f} ± {value['sd']:.{digits}f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Writes a table of Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
