"""Compiles steps for H100 GPUs that are not attached, and prints their costs as JSON.

`python -m tests.support.gpu_steps NAME...` needs the extra `cuda`. It is a process of its own, as
the plugin must be loaded before JAX is first used.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks import gpu, sharded_step
from benchmarks.compiled import compiled_cost

RESULTS = "RESULTS "  # before the last line that is printed
LAYERS, BATCH, HEADS = 32, 64, 32  # of the clip
FMHA = "__cudnn$fmhaSoftmax"  # the target of cuDNN's attention, and of its gradient with a suffix


def _cost(f: Any, mesh: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> dict[str, Any]:
    """Compiles a function, and returns its cost and its calls of cuDNN's attention."""
    lowered = jax.jit(f, donate_argnums=donate).lower(*arguments)
    compiled = lowered.compile(compiler_options=gpu.compiler_options(mesh))
    calls = str(compiled.as_text()).count(f'custom_call_target="{FMHA}')
    return dataclasses.asdict(compiled_cost(compiled)) | {"cudnn_calls": calls}


def _attention(max_logit: str, implementation: str) -> dict[str, Any]:
    """Compiles attention and its gradient, for 8 sequences on 8 GPUs."""
    mesh = gpu.Cluster(gpu.GPUS["h100"], 1, 8).mesh((8,), ("data",))
    sharding = NamedSharding(mesh, P("data"))
    x = jax.ShapeDtypeStruct((8, 1024, 16, 128), jnp.bfloat16, sharding=sharding)

    def loss(query, key, value):
        out, max_logits = mc.dot_product_attention(
            query, key, value, is_causal=True, max_logit=max_logit, implementation=implementation
        )
        return jnp.sum(out.astype(jnp.float32) ** 2), max_logits

    return _cost(jax.grad(loss, (0, 1, 2), has_aux=True), mesh, x, x, x)


def _qk_clip() -> dict[str, Any]:
    """Compiles the clip of the queries and keys of 32 stacked layers of Llama 2 7B."""
    mesh = gpu.Cluster(gpu.GPUS["h100"], 8, 8).mesh((16, 4), ("fsdp", "tp"))
    heads = NamedSharding(mesh, P(None, "fsdp", "tp", None))
    kernel = jax.ShapeDtypeStruct((LAYERS, 4096, HEADS, 128), jnp.float32, sharding=heads)
    params = {"blocks": {"attn": {"query": {"kernel": kernel}, "key": {"kernel": kernel}}}}
    rows = NamedSharding(mesh, P(None, "fsdp", "tp"))
    sown = jax.ShapeDtypeStruct((LAYERS, BATCH, HEADS), jnp.float32, sharding=rows)
    max_logits = {"blocks": {"attn": {"max_logits": (sown,)}}}
    return _cost(mc.qk_clip, mesh, params, max_logits, donate=(0,))


STEPS = {
    "stacks": lambda: sharded_step.measure(sharded_step.GPU_CASES["stacks"], compilations=1),
    "layers": lambda: sharded_step.measure(sharded_step.GPU_CASES["layers"], 1, ["ours"]),
    "qk_clip": _qk_clip,
    "cudnn": lambda: _attention("lse_bound", "cudnn"),
    "xla": lambda: _attention("lse_bound", "xla"),
}


if __name__ == "__main__":
    print(RESULTS + json.dumps({name: STEPS[name]() for name in sys.argv[1:]}))
