"""What the largest attention logit costs beside the attention it is taken from.

    python benchmarks/max_logits.py

Writes results/max_logits.json: for each sequence length the FLOPs of all matrix products of
attention, forward and backward, with a statistic by without; the temporary memory that the exact
statistic needs by itself, and by that of the matrix of all logits in float32. Both are counts, of
the traced and of the compiled program; nothing is timed. `lse_bound` and what it costs is the same
for every length: no product. Width 128, 4 heads, a batch of 1, bfloat16.
"""

import datetime
import functools
import json
import pathlib
import platform
from typing import Any

import jax
import jax.numpy as jnp
from trees import dot_flops

import muonclip_jax as mc

LENGTHS = (1024, 2048, 4096, 8192)
HEADS, WIDTH = 4, 128


def attention(max_logit: str | None, is_causal: bool) -> Any:
    """Builds a loss of attention, and its statistic where there is one."""

    def loss(query, key, value):
        if max_logit is None:
            out = jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)
            return jnp.sum(out.astype(jnp.float32)), None
        out, statistic = mc.dot_product_attention(
            query, key, value, is_causal=is_causal, max_logit=max_logit
        )
        return jnp.sum(out.astype(jnp.float32)), statistic

    return loss


def flops(max_logit: str | None, is_causal: bool, x: jax.ShapeDtypeStruct) -> int:
    """Counts the FLOPs of loss and gradient."""
    grad = jax.grad(attention(max_logit, is_causal), argnums=(0, 1, 2), has_aux=True)
    return dot_flops(jax.make_jaxpr(grad)(x, x, x).jaxpr)


def measure(length: int) -> dict:
    """Counts for one length."""
    x = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jnp.bfloat16)
    row: dict[str, Any] = {"length": length}
    for is_causal in (False, True):
        plain = flops(None, is_causal, x)
        for name in ("exact", "lse_bound"):
            kind = "causal" if is_causal else "full"
            row[f"{name}_flops_{kind}"] = round(flops(name, is_causal, x) / plain, 3)
    statistic = functools.partial(mc.max_attention_logit, is_causal=True)
    memory = jax.jit(statistic).lower(x, x).compile().memory_analysis()
    row["exact_temporary_bytes"] = memory.temp_size_in_bytes
    row["by_all_logits"] = round(memory.temp_size_in_bytes / (4 * HEADS * length**2), 4)
    return row


def main() -> None:
    """Measures every length and writes the results."""
    results = {
        "command": "python benchmarks/max_logits.py",
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "machine": f"2 x86 cores, {jax.default_backend()}",
        "lengths": [measure(length) for length in LENGTHS],
    }
    path = pathlib.Path(__file__).parent / "results" / "max_logits.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(*results["lengths"], sep="\n")


if __name__ == "__main__":
    main()
