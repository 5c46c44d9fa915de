"""The sizes of the models as data, by name; imports no JAX.

`tiny` is for tests, `small` the default, which trains in minutes on two CPU cores, `medium` for one
or a few accelerators, and `kimi-k2` Kimi K2 itself, for ahead-of-time compilation.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

DEFAULT = "small"
ROTARY_BASE = 10_000.0  # Su et al. 2021, arXiv 2104.09864, section 3.2.2: theta_i = 10000^(-2i/d)


class Latent(NamedTuple):
    """Sizes of multi-head latent attention.

    Attributes:
      heads: Query heads, N.
      q_rank: Width of the latent query.
      kv_rank: Width of the latent keys and values.
      nope: Columns of a head that are not rotated.
      rope: Columns of a head that are rotated; even. All heads share their key.
      value: Columns of a value head.
      rotary_base: Base of the frequencies of the rotation.
    """

    heads: int
    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int
    rotary_base: float = ROTARY_BASE


class Routed(NamedTuple):
    """Sizes of a mixture of experts.

    Attributes:
      experts: Routed experts, E.
      hidden: Hidden units of each, and of each shared expert, F.
      chosen: Experts of a token, K.
      shared: Experts of every token.
      scale: Factor on the gates, which sum to one without it.
      capacity: Tokens of a sequence that an expert accepts, in units of the mean. Later tokens skip
        the expert.
    """

    experts: int
    hidden: int
    chosen: int
    shared: int = 1
    scale: float = 2.5  # DeepSeek-V3, arXiv 2412.19437: config.json, routed_scaling_factor
    capacity: float = 2.0


# moonshotai/Kimi-K2-Instruct, config.json; the capacity is ours, as Kimi K2 drops no tokens.
_KIMI_K2 = {
    "dense_layers": 1,
    "moe_layers": 60,
    "width": 7168,
    "attention": Latent(
        heads=64, q_rank=1536, kv_rank=512, nope=128, rope=64, value=128, rotary_base=50_000.0
    ),
    "hidden": 18432,
    "routed": Routed(experts=384, hidden=2048, chosen=8, shared=1, scale=2.827, capacity=1.5),
    "vocabulary": 163840,
    "keep_products": False,
}

# By --model, then by --preset: the fields of the model.
PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "gqa": {
        "tiny": dict(layers=2, width=16, heads=4, kv_heads=2, head_dim=8, hidden=24),
        "small": dict(layers=4, width=128, heads=4, kv_heads=2, head_dim=32, hidden=384),
        "medium": dict(layers=24, width=1024, heads=16, kv_heads=4, head_dim=64, hidden=2816),
    },
    "mla": {
        "tiny": dict(layers=2, width=16, attention=Latent(4, 12, 8, 6, 4, 6), hidden=24),
        "small": dict(layers=4, width=128, attention=Latent(4, 96, 64, 32, 16, 32), hidden=384),
        "medium": dict(
            layers=24, width=1024, attention=Latent(16, 384, 256, 64, 32, 64), hidden=2816
        ),
    },
    "moe": {
        "tiny": dict(
            dense_layers=1,
            moe_layers=2,
            width=16,
            attention=Latent(4, 12, 8, 6, 4, 6),
            hidden=24,
            routed=Routed(experts=4, hidden=8, chosen=2),
        ),
        "small": dict(
            dense_layers=1,
            moe_layers=3,
            width=128,
            attention=Latent(4, 96, 64, 32, 16, 32),
            hidden=384,
            routed=Routed(experts=8, hidden=128, chosen=2),
        ),
        "medium": dict(
            dense_layers=1,
            moe_layers=11,
            width=768,
            attention=Latent(12, 384, 256, 64, 32, 64),
            hidden=3072,
            routed=Routed(experts=32, hidden=384, chosen=4),
        ),
        "kimi-k2": _KIMI_K2,
    },
}
