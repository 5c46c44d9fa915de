"""MuonClip, the optimizer of Kimi K2, for JAX: Muon for optax and QK-clip for Flax parameters.

The two modules that need Flax, `linen` and `nnx`, load when they are first used.
"""

from types import ModuleType
from typing import TYPE_CHECKING

from optax.contrib import MuonDimensionNumbers as MuonDimensionNumbers

from muonclip_jax._attention.attention import dot_product_attention as dot_product_attention
from muonclip_jax._attention.max_logit import max_attention_logit as max_attention_logit
from muonclip_jax._head_layouts.fused_qkv import FusedQKVLayout as FusedQKVLayout
from muonclip_jax._head_layouts.mla import MLALayout as MLALayout
from muonclip_jax._head_layouts.multi_head import MultiHeadLayout as MultiHeadLayout
from muonclip_jax._muon.analyze import analyze as analyze
from muonclip_jax._muon.family.cautious_decay import (
    add_cautious_weight_decay as add_cautious_weight_decay,
)
from muonclip_jax._muon.family.normalize import normalize_matrices as normalize_matrices
from muonclip_jax._muon.family.normuon import (
    NormalizeNeuronsState as NormalizeNeuronsState,
    normalize_neurons as normalize_neurons,
)
from muonclip_jax._muon.family.sinkhorn import (
    ScaleBySinkhornState as ScaleBySinkhornState,
    Sinkhorn as Sinkhorn,
    scale_by_sinkhorn as scale_by_sinkhorn,
)
from muonclip_jax._muon.muon import muon as muon
from muonclip_jax._muon.routing_table import (
    RoutingTable as RoutingTable,
    routing_table as routing_table,
)
from muonclip_jax._muon.scale_by_muon import (
    ScaleByMuonState as ScaleByMuonState,
    scale_by_muon as scale_by_muon,
    scale_by_shape as scale_by_shape,
)
from muonclip_jax._muon.show_plan import sharding_plan as sharding_plan
from muonclip_jax._muonclip import muonclip as muonclip
from muonclip_jax._orthogonalize.coefficients import ns_coefficients as ns_coefficients
from muonclip_jax._orthogonalize.newton_schulz import newton_schulz as newton_schulz
from muonclip_jax._orthogonalize.polar_express import (
    polar_express_coefficients as polar_express_coefficients,
)
from muonclip_jax._program.analysis import Analysis as Analysis
from muonclip_jax._program.max_logits import with_max_logits as with_max_logits
from muonclip_jax._qk_clip.clip import merge_max_logits as merge_max_logits, qk_clip as qk_clip
from muonclip_jax._qk_clip.info import (
    QKClipInfo as QKClipInfo,
    heads_ever_clipped as heads_ever_clipped,
    qk_clip_metrics as qk_clip_metrics,
)
from muonclip_jax._qk_clip.plot import plot_max_logits as plot_max_logits

if TYPE_CHECKING:
    from muonclip_jax import linen as linen, nnx as nnx

__version__ = "0.2.0"

__all__ = [  # linen and nnx are imported on first use
    "Analysis",
    "FusedQKVLayout",
    "MLALayout",
    "MultiHeadLayout",
    "MuonDimensionNumbers",
    "NormalizeNeuronsState",
    "QKClipInfo",
    "RoutingTable",
    "ScaleByMuonState",
    "ScaleBySinkhornState",
    "Sinkhorn",
    "add_cautious_weight_decay",
    "analyze",
    "dot_product_attention",
    "heads_ever_clipped",
    "linen",
    "max_attention_logit",
    "merge_max_logits",
    "muon",
    "muonclip",
    "newton_schulz",
    "nnx",
    "normalize_matrices",
    "normalize_neurons",
    "ns_coefficients",
    "plot_max_logits",
    "polar_express_coefficients",
    "qk_clip",
    "qk_clip_metrics",
    "routing_table",
    "scale_by_muon",
    "scale_by_shape",
    "scale_by_sinkhorn",
    "sharding_plan",
    "with_max_logits",
]


def __getattr__(name: str) -> ModuleType:
    """Imports `linen` or `nnx` on first use, so that importing the package does not import Flax."""
    if name == "linen":
        import muonclip_jax.linen as module
    elif name == "nnx":
        import muonclip_jax.nnx as module
    else:
        raise AttributeError(f"module 'muonclip_jax' has no attribute {name!r}")
    return module


def __dir__() -> list[str]:
    """Lists the names of the module, with `linen` and `nnx` before their first use too."""
    return sorted({*globals(), *__all__})
