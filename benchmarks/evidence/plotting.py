"""The style of the figures, and the plots that several experiments share."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLORS = ("#2a6f97", "#e36414", "#588157", "#8d5a97", "#8d99ae", "#c1121f", "#d4a373", "#1d3557")
LIMIT = "#c1121f"  # the threshold
_NAMED = {"adamw": "#8d99ae", "muon": "#2a6f97", "muonclip": "#e36414"}
_GRID = "#e5e7eb"


def color(name: str) -> str:
    """Returns the color of an optimizer, the same in all figures."""
    return _NAMED.get(name, "#588157")


def panels(
    columns: int, rows: int = 1, size: tuple[float, float] = (4.6, 3.6), **options: Any
) -> tuple[Figure, Any]:
    """Makes a figure of several axes, each of a size in inches."""
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained", dpi=100)
    axes = figure.subplots(rows, columns, **options)
    for one in np.ravel(axes):
        one.grid(color=_GRID)
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def band(axes: Axes, x: Sequence[float], over: Sequence[Mapping[str, Any]], name: str) -> None:
    """Draws means over seeds with bars of one standard deviation, without diverged trainings."""
    kept = [(at, one["mean"], one["sd"]) for at, one in zip(x, over, strict=True) if one["mean"]]
    if kept:
        at, means, sds = zip(*kept, strict=True)
        axes.errorbar(at, means, sds, color=color(name), label=name, marker="o", ms=3, capsize=2)


def by_rate(axes: Axes, rates: Sequence[float]) -> None:
    """Labels the horizontal axis with a grid of learning rates."""
    axes.set(xscale="log", xlabel="peak learning rate")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set_xticks([], minor=True)


def bars(axes: Axes, lines: Mapping[str, Mapping[str, Any]]) -> None:
    """Draws a mean over seeds for each name, with bars of one standard deviation."""
    names = list(lines)[::-1]
    means = [lines[name]["mean"] for name in names]
    axes.errorbar(
        means, range(len(names)), xerr=[lines[name]["sd"] for name in names], fmt="o", capsize=3
    )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.5, len(names) - 0.5)


def smooth(each: Sequence[Sequence[float]], steps: int = 20) -> np.ndarray:
    """Averages over trainings and over a window of steps."""
    mean = np.mean(each, axis=0)
    return np.convolve(mean, np.ones(steps) / steps, mode="valid")


def judge(*conditions: bool) -> str:
    """Returns the verdict: whether all, some or none of the conditions are met."""
    met = sum(conditions)
    return "reproduced" if met == len(conditions) else "partly" if met else "not reproduced"
