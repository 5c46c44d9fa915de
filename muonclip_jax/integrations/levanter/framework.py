"""The names of Levanter, haliax and Equinox that the integration needs."""

from typing import Any

from muonclip_jax.integrations.levanter.required import required

hooks: Any = required(
    "marin-levanter",
    {
        "equinox": ["tree_at"],
        "haliax": ["named", "shard", "zeros"],
        "haliax.nn": ["Linear"],
        "haliax.quantization": ["CustomGradientAccumulation"],
        "levanter.config": ["main"],
        "levanter.layers.attention": [
            "Attention.__call__",
            "Attention._compute_qkv",
            "AttentionMask",
            "materialize_mask",
        ],
        "levanter.optim.config": [
            "OptimizerConfig.register_subclass",
            "OptimizerConfig.lr_scheduler",
            "OptimizerConfig.build_weight_decay_mask",
        ],
        "levanter.trainer": [
            "Trainer._train_step",
            "Trainer._compute_gradients_microbatched",
            "Trainer._maybe_save_jaxpr",
            "WrappedLossFunction",
        ],
        "levanter.trainer_state": ["trainables_only"],
    },
)
