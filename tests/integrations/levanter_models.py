"""Tiny models of Levanter, whose parameters are in `levanter_roles.txt`."""

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
from levanter.models.apertus import ApertusConfig
from levanter.models.gemma import Gemma2Config
from levanter.models.gpt2 import Gpt2Config
from levanter.models.gpt2_hyena import Gpt2HyenaConfig
from levanter.models.hyena import HyenaConfig
from levanter.models.llama import LlamaConfig
from levanter.models.mistral import MistralConfig
from levanter.models.mixtral import MixtralConfig
from levanter.models.olmo import Olmo2Config
from levanter.models.qwen import QwenConfig
from levanter.models.qwen3_moe import Qwen3MoeConfig
from levanter.models.whisper import WhisperConfig

VOCAB, LENGTH = 128, 32
SIZES = dict(max_seq_len=LENGTH, hidden_dim=32, num_layers=2, num_heads=4)
GROUPED = dict(SIZES, intermediate_dim=48, num_kv_heads=2)
WHISPER = [("layers", 2), ("attention_heads", 4), ("ffn_dim", 48)]
MODELS = {
    "apertus": ApertusConfig(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, head_dim=8),
    "gpt2": Gpt2Config(**SIZES),
    "gpt2_hyena": Gpt2HyenaConfig(
        num_layers=2, max_seq_len=LENGTH, hyena=HyenaConfig(hidden_dim=32, max_seq_len=LENGTH)
    ),
    "llama": LlamaConfig(**GROUPED),
    "llama_unscanned": LlamaConfig(**GROUPED, scan_layers=False),
    "mistral": MistralConfig(**GROUPED),
    "mixtral": MixtralConfig(**GROUPED, n_routed_experts=3, num_experts_per_tok=2),
    "olmo2": Olmo2Config(**GROUPED),
    "qwen": QwenConfig(**GROUPED),
    "qwen3_moe": Qwen3MoeConfig(
        **GROUPED, head_dim=8, num_experts=3, num_experts_per_tok=2, moe_intermediate_dim=24
    ),
    "whisper": WhisperConfig(
        **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in WHISPER},
        d_model=32,
        num_mel_bins=8,
        max_source_positions=16,
        max_length=16,
    ),
}


def build(name):
    return MODELS[name].build(hax.Axis("vocab", VOCAB), key=jax.random.PRNGKey(0))


def parameters(name):
    """The shapes of the trainable parameters, as the optimizer gets them."""
    shapes = eqx.filter_eval_shape(build, name)
    is_float = lambda x: hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    return eqx.filter(shapes, is_float)
