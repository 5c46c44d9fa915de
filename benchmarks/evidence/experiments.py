"""The experiments by name, in the order in which docs/evidence.md tells them.

Each module has `CLAIM`, `SOURCE` and `PUBLISHED`, what was said elsewhere; `study(ask)`, which asks
for trainings and gives `ours`; `verdict(ours)`; `draw(result)`; and `TITLE`, `short(ours)` and
`tell(ours)`, what the pages say.
"""

from types import ModuleType

from benchmarks.evidence import (
    clip_rules,
    exactness,
    exploding_logits,
    no_harm,
    peers,
    per_head,
    token_efficiency,
)

EXPERIMENTS: dict[str, ModuleType] = {
    "exploding-logits": exploding_logits,
    "no-harm": no_harm,
    "token-efficiency": token_efficiency,
    "per-head": per_head,
    "exactness": exactness,
    "clip-rules": clip_rules,
    "peers": peers,
}
