"""The plots of a run: the loss, and the largest attention logit of every head as curves and map."""

import io
import pathlib
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from examples.language_model.config import Config
from examples.language_model.run_folder import files

LOSS, MAX_LOGITS, HEADS = "loss.png", "max_logits.png", "heads.png"
PLOTS = HEADS, LOSS, MAX_LOGITS

_SIZE = (8.0, 4.5)  # inches
_DPI = 150
_HALF_WINDOW = 20  # logged steps on each side, in the smoothed loss
_COLUMNS = 800  # of the heat map; if there are more steps, a column shows the maximum of several
_TRAIN, _VALIDATION, _THRESHOLD, _GRID = "#2a6f97", "#e36414", "#c1121f", "#e5e7eb"


def draw(
    config: Config,
    metrics: list[dict[str, Any]],
    validation: list[tuple[int, float]],
    path: pathlib.Path,
) -> None:
    """Draws all of `PLOTS`.

    Args:
      config: Settings.
      metrics: Logged steps, in order.
      validation: Step and validation loss in nats per byte; the last pair is the last step.
      path: Run folder.
    """
    _save(_loss(config, metrics, validation), path / LOSS)
    _save(_max_logits(config, metrics), path / MAX_LOGITS)
    _save(_heads(config, metrics), path / HEADS)


def _save(figure: Figure, path: pathlib.Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=_DPI)
    files.write_atomically(path, image.getvalue())


def _style(axes: Axes, ylabel: str) -> None:
    axes.set_ylabel(ylabel)
    axes.grid(axis="y", color=_GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.01)
    _style_steps(axes)


def _style_steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _loss(
    config: Config, metrics: list[dict[str, Any]], validation: list[tuple[int, float]]
) -> Figure:
    steps, losses = [m["step"] for m in metrics], [m["loss"] for m in metrics]
    final = f"{validation[-1][1]:.3f}"
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot(xlabel="step")
    _style(axes, "cross-entropy, nats per byte")
    axes.set_title(f"{config.optimizer}: {final} nats per byte on held-out text", loc="left")
    axes.plot(steps, losses, color=_TRAIN, alpha=0.25, linewidth=1, label="training, each batch")
    axes.plot(steps, _smooth(steps, losses), color=_TRAIN, linewidth=2, label="training, smoothed")
    axes.plot(*zip(*validation, strict=True), "o", color=_VALIDATION, label="validation")
    axes.annotate(
        final, validation[-1], (-4, 10), textcoords="offset points", ha="center", color=_VALIDATION
    )
    axes.legend(frameon=False)
    return figure


def _smooth(steps: ArrayLike, values: ArrayLike) -> list[float]:
    """Evaluates at each step a line fitted to the values around it.

    A straight line is returned unchanged, so the curve does not lag behind a falling loss. The
    window is symmetric, narrower in the first steps, where the loss falls fast, and one-sided in
    the last ones.
    """
    x, y = np.asarray(steps, float), np.asarray(values, float)

    def fit(i: int) -> float:
        half = min(i // 4, _HALF_WINDOW)
        part = slice(i - half, i + half + 1)
        dx, dy = x[part] - x[part].mean(), y[part] - y[part].mean()
        slope = (dx @ dy) / max(dx @ dx, 1.0)  # a single step has no slope
        return float(y[part].mean() + slope * (x[i] - x[part].mean()))

    return [fit(i) for i in range(len(x))]


def _max_logits(config: Config, metrics: list[dict[str, Any]]) -> Figure:
    steps = [m["step"] for m in metrics]
    heads = np.array([m["max_logits"] for m in metrics])  # [step L N]
    clips = config.optimizer == "muonclip"
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes, below = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    _style(axes, "largest attention logit")
    axes.set_title(_title(config, heads, metrics[-1]["heads_ever_clipped"]), loc="left")
    colors = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.88, heads.shape[1]))
    for layer, color in enumerate(colors):
        each, largest = heads[:, layer], heads[:, layer].max(axis=-1)
        axes.plot(steps, each, color=color, alpha=0.2, linewidth=0.6)
        axes.plot(steps, largest, color=color, linewidth=1.3, label=f"layer {layer + 1}")
    label = f"threshold {config.threshold:g}" + ("" if clips else ", not applied")
    style = "solid" if clips else "dashed"
    axes.axhline(config.threshold, color=_THRESHOLD, linewidth=1.2, linestyle=style, label=label)
    axes.set_ylim(bottom=0)  # a head below 0 is harmless: only the largest logits matter
    figure.legend(frameon=False, loc="outside lower center", ncols=heads.shape[1] + 1)
    _style(below, "heads\nclipped")
    below.fill_between(steps, [m["heads_clipped"] for m in metrics], step="mid", color=_THRESHOLD)
    below.set_ylim(0, max(1, *(m["heads_clipped"] for m in metrics)))
    below.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    below.set_xlabel("step")
    return figure


def _heads(config: Config, metrics: list[dict[str, Any]]) -> Figure:
    """Draws a heat map, one row per head, layer by layer; red is above the threshold."""
    steps, logits = _columns(metrics)
    layers, heads = logits.shape[1:]
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="layer (heads from the top)")
    axes.set_title("largest attention logit of every head", loc="left")
    cells = axes.pcolormesh(
        [*steps, metrics[-1]["step"] + 1],
        np.arange(layers * heads + 1),
        logits.reshape(len(steps), -1).T,
        **_colors(config.threshold, logits),
    )
    axes.invert_yaxis()
    axes.set_yticks(heads * (np.arange(layers) + 0.5), [str(n + 1) for n in range(layers)])
    for layer in range(1, layers):
        axes.axhline(heads * layer, color="black", linewidth=0.8)
    _style_steps(axes)
    exceeds = logits.max() > config.threshold
    label = f"{'white' if exceeds else 'all below'}: threshold {config.threshold:g}"
    bar = figure.colorbar(cells, ax=axes, label=f"largest attention logit ({label})")
    if exceeds:
        bar.ax.axhline(config.threshold, color=_THRESHOLD, linewidth=1.5)
    return figure


def _colors(threshold: float, logits: np.ndarray) -> dict[str, Any]:
    low, high = min(0.0, float(logits.min())), float(logits.max())
    if high > threshold:
        return {"cmap": "RdBu_r", "norm": TwoSlopeNorm(threshold, low, high)}
    return {"cmap": "Blues_r", "norm": Normalize(low, max(high, low + 1.0))}


def _columns(metrics: list[dict[str, Any]]) -> tuple[list[int], np.ndarray]:
    """Returns the first step and the max logits [column L N] of at most `_COLUMNS` columns."""
    logits = np.array([m["max_logits"] for m in metrics])  # [step L N]
    starts = np.unique(np.linspace(0, len(logits), _COLUMNS, endpoint=False).astype(int))
    return [metrics[i]["step"] for i in starts], np.maximum.reduceat(logits, starts)


def _title(config: Config, heads: np.ndarray, ever_clipped: int) -> str:
    """Returns the number of heads that were clipped, or that exceeded the threshold."""
    count, tau, largest = heads[0].size, config.threshold, heads.max()
    if config.optimizer == "muonclip":
        return (
            f"muonclip: {ever_clipped} of {count} heads clipped at least once; "
            f"largest logit {largest:.1f}, threshold {tau:g}"
        )
    exceeding = int((heads > config.threshold).any(axis=0).sum())
    return (
        f"{config.optimizer}: {exceeding} of {count} heads above {tau:g};"
        f" largest logit {largest:.1f}"
    )
