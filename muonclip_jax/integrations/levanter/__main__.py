"""Runs a program of Levanter with MuonClip: `train_lm`, `train_dpo`, or a module path."""

import importlib
import sys
from collections.abc import Sequence
from typing import Any


def main(arguments: Sequence[str]) -> None:
    """Runs a program of Levanter with `MuonClipTrainer` in the place of its `Trainer`.

    Args:
      arguments: Name of the program, then its own arguments:
        `["train_lm", "--config_path", "config.yaml"]`.

    Raises:
      ImportError: if there is no such program.
    """
    from muonclip_jax.integrations.levanter.framework import hooks
    from muonclip_jax.integrations.levanter.trainer import MuonClipTrainer

    name, *rest = arguments
    program: Any = importlib.import_module(name if "." in name else f"levanter.main.{name}")
    missing = [f"{program.__name__}.{x}" for x in ("Trainer", "main") if not hasattr(program, x)]
    if missing:
        raise ImportError(f"muonclip_jax.integrations.levanter: no {' and no '.join(missing)}.")
    program.Trainer = MuonClipTrainer
    hooks.main(program.main, args=rest)()


if __name__ == "__main__":
    main(sys.argv[1:])
