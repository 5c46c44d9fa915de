"""The cost of max logits beside the cost of their attention.

    python -m benchmarks.max_logit_cost

Writes results/max_logit_cost.json. For each sequence length:

    ..._flops_...           FLOPs of all matrix products of attention, forward and backward, with
                            max logits, divided by the same without
    exact_temporary_bytes   temporary memory of the exact max logits alone
    by_all_logits           the same divided by the size of all logits in float32

All are read from compiled programs, and nothing is timed. `lse_bound` needs no matrix product, so
its ratio is 1. Width 128, 4 heads, batch 1, bfloat16.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

import muonclip_jax as mc
from benchmarks import report
from benchmarks.compiled import Cost, compiled_cost

LENGTHS = (1024, 2048, 4096, 8192)
HEADS, WIDTH = 4, 128


def loss(max_logit: str | None, is_causal: bool) -> Any:
    """Builds a loss of attention that also returns its max logits, if there are any."""

    def function(query, key, value):
        if max_logit is None:
            out = jax.nn.dot_product_attention(query, key, value, is_causal=is_causal)
            return jnp.sum(out.astype(jnp.float32)), None
        out, max_logits = mc.dot_product_attention(
            query, key, value, is_causal=is_causal, max_logit=max_logit
        )
        return jnp.sum(out.astype(jnp.float32)), max_logits

    return function


def cost(function: Any, *arguments: jax.ShapeDtypeStruct) -> Cost:
    """Compiles a function and reads its cost."""
    return compiled_cost(jax.jit(function).lower(*arguments).compile())


def flops(max_logit: str | None, is_causal: bool, x: jax.ShapeDtypeStruct) -> float:
    """Counts the FLOPs of loss and gradient."""
    gradient = jax.value_and_grad(loss(max_logit, is_causal), argnums=(0, 1, 2), has_aux=True)
    return cost(gradient, x, x, x).flops


def measure(length: int) -> dict[str, Any]:
    """Measures one sequence length."""
    x = jax.ShapeDtypeStruct((1, length, HEADS, WIDTH), jnp.bfloat16)
    row: dict[str, Any] = {"length": length}
    for is_causal in (False, True):
        plain = flops(None, is_causal, x)
        for name in ("exact", "lse_bound"):
            kind = "causal" if is_causal else "full"
            row[f"{name}_flops_{kind}"] = round(flops(name, is_causal, x) / plain, 3)
    exact = cost(functools.partial(mc.max_attention_logit, is_causal=True), x, x)
    row["exact_temporary_bytes"] = exact.temporary_bytes
    row["by_all_logits"] = round((exact.temporary_bytes or 0) / (4 * HEADS * length**2), 4)
    return row


def main(arguments: list[str] | None = None) -> None:
    """Measures every length and writes the results."""
    parser = report.parser("max_logit_cost", "The cost of max logits beside attention.")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS, help="positions")
    options = parser.parse_args(arguments)
    rows = [measure(length) for length in options.lengths]
    results = report.provenance("max_logit_cost") | {"lengths": rows}
    report.write_json(options.out / "max_logit_cost.json", results)
    print(report.columns([rows[0], *(row.values() for row in rows)]))


if __name__ == "__main__":
    main()
