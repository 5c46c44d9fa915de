"""The experiments by name, in the order of docs/evidence.md.

Each module has `TITLE`, `CLAIM`, `SOURCE` and `PUBLISHED`: the claim and its published figures;
`study(measure)`, which calls `measure` with trainings and returns `ours`; `verdict(ours)`;
`draw(result)`; `one_line(ours)` for the table of claims, and `section(ours)` for the page.
"""

from types import ModuleType

from benchmarks.evidence import (
    clip_order,
    exploding_logits,
    family,
    kimi_k3,
    longer,
    low_threshold,
    optax_comparison,
    orthogonalization_accuracy,
    per_head,
    shared_key_rules,
    steps_to_target,
    ten_million,
    token_efficiency,
    width_transfer,
    zipf_embedding,
)

EXPERIMENTS: dict[str, ModuleType] = {
    "exploding-logits": exploding_logits,
    "clip-order": clip_order,
    "low-threshold": low_threshold,
    "longer": longer,
    "ten-million": ten_million,
    "token-efficiency": token_efficiency,
    "steps-to-target": steps_to_target,
    "per-head": per_head,
    "orthogonalization-accuracy": orthogonalization_accuracy,
    "shared-key-rules": shared_key_rules,
    "optax-comparison": optax_comparison,
    "zipf-embedding": zipf_embedding,
    "family": family,
    "width-transfer": width_transfer,
    "kimi-k3": kimi_k3,
}
