"""Compiles steps for H100 GPUs that are not attached, and prints their costs as JSON.

`python -m tests.support.gpu_steps NAME...` needs the extra `cuda`. It is a process of its own, as
the plugin must be loaded before JAX is first used.
"""

import dataclasses
import functools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec as P

import muonclip_jax as mc
from benchmarks import aot, gpu, sharded_step
from benchmarks.compiled import compiled_cost
from muonclip_jax._orthogonalize.newton_schulz import orthogonalizer

RESULTS = "RESULTS "  # before the last line that is printed
LAYERS, BATCH, HEADS = 32, 64, 32  # of the clip
SIDE, WIDTH = 1160, 2000  # of the two matrices of `kernels`, whose last tiles are partial
# Targets of calls: cuDNN's attention, its gradient with a suffix; and Triton kernels of Pallas.
TARGETS = {"cudnn_calls": "__cudnn$fmhaSoftmax", "pallas_calls": "__gpu$xla.gpu.triton"}


def _cost(f: Any, mesh: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> dict[str, Any]:
    """Compiles a function, and returns its cost and its calls of `TARGETS`."""
    lowered = jax.jit(f, donate_argnums=donate).lower(*arguments)
    compiled = lowered.compile(compiler_options=gpu.compiler_options(mesh))
    text = str(compiled.as_text())
    calls = {name: text.count(f'custom_call_target="{start}') for name, start in TARGETS.items()}
    return dataclasses.asdict(compiled_cost(compiled)) | calls


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


def _kernels(products: str) -> dict[str, Any]:
    """Compiles Newton-Schulz of two matrices, for one GPU."""
    h100 = gpu.GPUS["h100"]
    mesh = gpu.Cluster(h100, 1, 1).mesh((1,), ("x",))
    x = jax.ShapeDtypeStruct((2, SIDE, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P()))
    # Pallas looks for the device here; the mesh of the arguments is not known while it traces.
    kind = AbstractDevice(
        device_kind=h100.device_kind, num_cores=h100.multiprocessors, platform="gpu"
    )
    abstract = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=kind)
    made = orthogonalizer("jordan", None, "gram", jnp.bfloat16, "frobenius", products)
    newton_schulz = functools.partial(made.on("gpu", h100.device_kind), eps=1e-8)
    with jax.sharding.use_abstract_mesh(abstract):
        return _cost(newton_schulz, mesh, x)


def _sharded_kernels() -> dict[str, Any]:
    """Compiles a step on four GPUs: a full matrix for each, and one that all four share."""
    mesh = gpu.Cluster(gpu.GPUS["h100"], 1, 4).mesh((4,), ("x",))
    sharding = NamedSharding(mesh, P(None, "x", None))
    shapes = {"full": (4, 1024, 2048), "shared": (1, 4096, 8192)}
    params = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        for name, shape in shapes.items()
    }
    settings: dict[str, Any] = {"ns_dtype": jnp.bfloat16, "ns_products": "pallas"}
    tx = mc.scale_by_muon(shardings=dict.fromkeys(params, sharding), **settings)
    state = aot.sharded_like(params, jax.eval_shape(tx.init, params))
    return _cost(tx.update, mesh, params, state)


STEPS = {
    "stacks": lambda: sharded_step.measure(sharded_step.GPU_CASES["stacks"], compilations=1),
    "layers": lambda: sharded_step.measure(sharded_step.GPU_CASES["layers"], 1, ["ours"]),
    "qk_clip": _qk_clip,
    "kernels": lambda: _kernels("pallas"),
    "products": lambda: _kernels("xla"),
    "sharded_kernels": _sharded_kernels,
    "cudnn": lambda: _attention("lse_bound", "cudnn"),
    "xla": lambda: _attention("lse_bound", "xla"),
}


if __name__ == "__main__":
    print(RESULTS + json.dumps({name: STEPS[name]() for name in sys.argv[1:]}))
