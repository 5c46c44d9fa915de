"""MuonClip in MaxText: Muon behind `opt_type=muon`, and QK-clip after its train step.

Two lines before `train.main` of `maxtext.trainers.pre_train.train`:

    from muonclip_jax.integrations import maxtext
    maxtext.install()

or, without a line of code,

    python -m muonclip_jax.integrations.maxtext base.yml opt_type=muon muon_consistent_rms=0.2 ...

MaxText has no registry of optimizers, so `install` replaces three of its functions. MaxText is
imported by `install`, not by this module.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import muonclip_jax as mc
from muonclip_jax.integrations.maxtext.max_logits import recording
from muonclip_jax.integrations.maxtext.optimizer import with_our_muon
from muonclip_jax.integrations.maxtext.points import ATTENTION, OPTIMIZERS, TRAIN, import_points
from muonclip_jax.integrations.maxtext.settings import Settings
from muonclip_jax.integrations.maxtext.train_step import clipping

__all__ = ["install", "main", "uninstall"]

_originals: list[tuple[Any, str, Any]] = []


def install(
    *,
    qk_clip: bool = True,
    threshold: float | int | None = None,
    alpha: float | int = 0.5,
    shared_key: str = "query",
    include_routers: bool = False,
    **muon: Any,
) -> Callable[[], None]:
    """Makes MaxText train with the Muon and the QK-clip of this package.

    With `opt_type=muon`, MaxText's optimizer is `mc.muon` with MaxText's own settings and the
    shardings of the parameters, and MaxText's log has the routing table. After each step that is
    not skipped, `mc.qk_clip` scales the heads of MLA, GQA and MHA, with any optimizer, and its
    metrics are added to MaxText's. `use_qk_clip` need not be set. Calling this function again
    replaces the settings.

    Args:
      qk_clip: Whether to clip. With False, MaxText's `use_qk_clip` counts, and its own clip.
      threshold: See `mc.qk_clip`. None: MaxText's `qk_clip_threshold`.
      alpha: See `mc.qk_clip`.
      shared_key: See `mc.qk_clip`.
      include_routers: Whether routers are assigned to Muon. It replaces MaxText's
        `muon_include_routers`, whose default is true.
      **muon: More arguments of `mc.muon`, such as `overrides` or `ns_dtype`, which replace those
        of MaxText. `per_head=True` uses the head layout of the model.

    Returns:
      `uninstall`, which restores MaxText.

    Raises:
      ModuleNotFoundError: if MaxText is not installed.
      ImportError: if this MaxText lacks functions that are replaced or called; it lists all.
      TypeError: for an argument that `mc.muon` does not have.
      ValueError: later, when MaxText builds its optimizer or traces its step, for settings of
        MaxText under which the clip would not bound the logits.

    Example:
      >>> from muonclip_jax.integrations import maxtext
      >>> maxtext.install(threshold=100.0)  # doctest: +SKIP
      >>> train.main(["", "base.yml", "opt_type=muon"])  # doctest: +SKIP

    References:
      The functions: AI-Hypercomputer/maxtext, release 0.2.5. The clip: Kimi K2, arXiv 2507.20534.
    """
    unknown = sorted(set(muon) - set(inspect.signature(mc.muon).parameters))
    if unknown:
        raise TypeError(f"install: neither install nor mc.muon has an argument {unknown[0]!r}.")
    uninstall()
    modules = import_points()
    settings = Settings(qk_clip, threshold, alpha, shared_key, include_routers, muon)
    _replace(modules[OPTIMIZERS], "get_optimizer", with_our_muon(modules[OPTIMIZERS], settings))
    if qk_clip:
        attention_op = modules[ATTENTION].AttentionOp
        _replace(attention_op, "__call__", recording(attention_op.__call__))
        _replace(modules[TRAIN], "train_step", clipping(modules[TRAIN], settings))
    return uninstall


def uninstall() -> None:
    """Restores MaxText. If nothing is installed, it does nothing."""
    while _originals:
        setattr(*_originals.pop())


def _replace(owner: Any, name: str, new: Any) -> None:
    _originals.append((owner, name, getattr(owner, name)))
    setattr(owner, name, new)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs MaxText's `train.main` after `install`.

    Args:
      argv: Program name and arguments of MaxText. `--no-qk-clip` among them is `qk_clip=False`.
        None: the devices of the process.
    """
    argv = list(sys.argv if argv is None else argv)
    install(qk_clip="--no-qk-clip" not in argv)
    train, app = importlib.import_module(TRAIN), importlib.import_module("absl.app")
    app.run(train.main, [argument for argument in argv if argument != "--no-qk-clip"])
