"""Max logits of all heads over the steps of a training."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from muonclip_jax._qk_clip.info import QKClipInfo

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_THRESHOLD = "#c1121f"
_MOST_LABELS = 8  # a longer legend would hide the lines


def plot_max_logits(
    history: QKClipInfo | Sequence[QKClipInfo],
    *,
    threshold: float | int | None = None,
    steps: Sequence[int] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Plots the largest logit of every head over the steps of a training.

    Each module has a color, with a thin line for each head and a bold one for its largest head.
    Needs matplotlib (`pip install 'muonclip-jax[plots]'`).

    Args:
      history: Reports of `qk_clip`, one for each step in order, or one report that `jax.lax.scan`
        stacked over steps.
      threshold: τ, drawn as a horizontal line. None draws none.
      steps: The step of each report. None: 0, 1, 2, ...
      ax: Axes to draw on. None makes a new figure with pyplot.

    Returns:
      The axes.

    Raises:
      ImportError: if matplotlib is not installed.
      TypeError: if a report is no `QKClipInfo`.
      ValueError: if the reports are empty or have different modules, or there are more or fewer
        `steps` than reports.

    Example:
      >>> import jax.numpy as jnp
      >>> import muonclip_jax as mc
      >>> kernel = jnp.ones((4, 2, 8))
      >>> params = {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}
      >>> history = []
      >>> for logits in ([80.0, 9.0], [120.0, 9.5]):
      ...     params, info = mc.qk_clip(params, {"attn": {"max_logits": jnp.array(logits)}})
      ...     history.append(info)
      >>> ax = mc.plot_max_logits(history, threshold=100.0)
      >>> ax.figure.savefig("max_logits.png")  # doctest: +SKIP
    """
    heads = _stacked([history] if isinstance(history, QKClipInfo) else history)
    count = len(next(iter(heads.values())))
    if steps is not None and len(steps) != count:
        raise ValueError(
            f"plot_max_logits: steps has {len(steps)} numbers and history has {count} reports. "
            "Pass one step for each report."
        )
    axes = _new_axes() if ax is None else ax
    x = np.arange(count) if steps is None else np.asarray(steps)
    for i, (path, s) in enumerate(sorted(heads.items())):
        label = (path or "(root)") if len(heads) <= _MOST_LABELS else None
        axes.plot(x, s, color=f"C{i % 10}", alpha=0.3, linewidth=0.7)
        axes.plot(x, s.max(axis=1), color=f"C{i % 10}", linewidth=1.5, label=label)
    if threshold is not None:
        label = f"threshold {threshold:g}"
        axes.axhline(threshold, color=_THRESHOLD, linewidth=1.2, label=label)
    axes.set(xlabel="step", ylabel="largest attention logit")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return axes


def _stacked(history: Sequence[QKClipInfo]) -> dict[str, Float[np.ndarray, "steps heads"]]:
    """Joins reports: the max logits of each module over all steps."""
    if not history:
        raise ValueError("plot_max_logits: history is empty. Pass the reports of qk_clip.")
    if other := [type(info).__name__ for info in history if not isinstance(info, QKClipInfo)]:
        raise TypeError(
            f"plot_max_logits: history has a {other[0]}, expected the QKClipInfo that qk_clip "
            "returns, and not its metrics."
        )
    modules = {path: None for info in history for path in info.max_logits}
    for i, info in enumerate(history):
        if missing := modules.keys() - info.max_logits.keys():
            raise ValueError(
                f"plot_max_logits: report {i} lacks {', '.join(map(repr, sorted(missing)))}. "
                "Pass reports of one model."
            )
    if not modules:
        raise ValueError("plot_max_logits: the reports have no modules.")
    return {path: np.concatenate([_by_step(info, path) for info in history]) for path in modules}


def _by_step(info: QKClipInfo, path: str) -> Float[np.ndarray, "steps heads"]:
    """Max logits of a module, all heads of all its layers in one axis."""
    s = np.asarray(info.max_logits[path], np.float32)
    return s.reshape(np.size(info.max_logit), -1)


def _new_axes() -> "Axes":
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plot_max_logits needs matplotlib: pip install 'muonclip-jax[plots]', or pass ax=."
        ) from error
    return plt.subplots(layout="constrained")[1]
