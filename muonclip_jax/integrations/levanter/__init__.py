"""MuonClip in Levanter: an optimizer for its YAML, and a trainer that clips.

    from muonclip_jax.integrations.levanter import MuonClipConfig, MuonClipTrainer

`MuonClipTrainer` takes the place of Levanter's `Trainer`. For Levanter's own programs:

    python -m muonclip_jax.integrations.levanter train_lm --config_path config.yaml

Levanter is imported when one of its classes is first used.
"""

from typing import TYPE_CHECKING, Any

from muonclip_jax.integrations.levanter.named_axes import dimension_numbers as dimension_numbers

if TYPE_CHECKING:
    from muonclip_jax.integrations.levanter.optimizer import (
        MuonClipConfig as MuonClipConfig,
        MuonClipTransformation as MuonClipTransformation,
    )
    from muonclip_jax.integrations.levanter.trainer import MuonClipTrainer as MuonClipTrainer

__all__ = ["MuonClipConfig", "MuonClipTrainer", "MuonClipTransformation", "dimension_numbers"]


def __getattr__(name: str) -> Any:
    """Imports the classes that need Levanter on first use."""
    if name == "MuonClipTrainer":
        from muonclip_jax.integrations.levanter import trainer as module
    elif name in ("MuonClipConfig", "MuonClipTransformation"):
        from muonclip_jax.integrations.levanter import optimizer as module
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(module, name)
