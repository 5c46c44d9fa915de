"""Small programs for two hosts of two H100, and what their compiled form has to contain.

`python -m tests.support.gpu_programs [FOLDER]` compiles them, by default into
tests/benchmarks/programs. It needs the extra `cuda`, but no GPU.
"""

import pathlib
import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from benchmarks import gpu

FOLDER = pathlib.Path(__file__).parents[1] / "benchmarks" / "programs"
HOSTS = [0, 0, 1, 1]
N, TIMES = 256, 5
BF16, F32 = 2, 4  # bytes


def _products(x):
    """Products in a loop, in bfloat16, in float32 of two precisions, and of a batch."""
    wide = x.astype(jnp.float32)
    looped, _ = jax.lax.scan(lambda y, _: (y @ x, None), x, length=TIMES)
    batch = jnp.einsum("bij,bjk->bik", x.reshape(4, N // 4, N), x.reshape(4, N, N // 4))
    return looped, batch, wide @ wide, jnp.matmul(wide.T, wide, precision="highest")


def _collectives(x):
    """Each within hosts, along "b", or between them: along "a", or along both axes."""
    total = jax.lax.psum(x.astype(jnp.float32), "a")
    exchanged = jax.lax.all_to_all(x, ("a", "b"), 0, 1, tiled=True)
    gathered = jax.lax.all_gather(x, "b", tiled=True)
    scattered = jax.lax.psum_scatter(x, "b", tiled=True)
    moved = jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])
    return total, exchanged, gathered, scattered, moved


def _overlapped(x):
    """A sum between hosts, in the background of a product."""
    return jax.lax.psum(x @ x, "a"), x.T @ x @ x


# The figures of each: FLOPs by the dtype of their rate; bytes of each collective, of each link.
_PRODUCT = 2 * N**3
FLOPS = {"bf16": (TIMES + 1 / 4) * _PRODUCT, "tf32": _PRODUCT, "f32": _PRODUCT}
SENT = {
    "all-reduce": N**2 * F32,
    "all-to-all": N**2 * BF16,
    "all-gather": 2 * N**2 * BF16,
    "reduce-scatter": N**2 * BF16,
    "collective-permute": N**2 * BF16,
}
NVLINK = SENT["all-gather"] + SENT["reduce-scatter"]

PROGRAMS = {
    "triton": (_products, (N, N), {}),
    "cublas": (_products, (N, N), {"xla_gpu_enable_triton_gemm": False}),
    "collectives": (_collectives, (4 * N, N), {}),
    "overlapped": (_overlapped, (4 * N, N), {}),
}


def compiled_text(name: str) -> str:
    """Compiles one of `PROGRAMS`; call it in a process that has not used JAX."""
    f, shape, options = PROGRAMS[name]
    mesh = gpu.Cluster(gpu.GPUS["h100"], 2, 2).mesh((2, 2), ("a", "b"))
    shared = P() if f is _products else P(("a", "b"))
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.NamedSharding(mesh, shared))
    mapped = jax.shard_map(f, mesh=mesh, in_specs=shared, out_specs=shared, check_vma=False)
    options = {**(gpu.compiler_options(mesh) or {}), **options}
    return str(jax.jit(mapped).lower(x).compile(compiler_options=options).as_text())


def committed_text(name: str, folder: pathlib.Path = FOLDER) -> str:
    """Reads one of `PROGRAMS` as it was compiled once."""
    return (folder / f"{name}.hlo").read_text()


def main(folder: pathlib.Path = FOLDER) -> None:
    """Compiles all programs, and leaves out what names files and lines."""
    for name in PROGRAMS:
        text = re.sub(r", metadata=\{[^}]*\}", "", compiled_text(name))
        entry = text[text.index("\n\n%") :] if "\n\n%" in text else text
        head = f"HloModule {name}, jax {jax.__version__}, H100"
        (folder / f"{name}.hlo").write_text(head + entry)


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:]))
