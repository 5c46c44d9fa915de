"""The matrices of three language models, and the least work that Newton–Schulz does on them.

GPT-2 small and the layers of Llama 3.2 1B have one leaf for each matrix. The experts of Kimi K2 are
stacked: the first axis of a leaf counts experts.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

import muonclip_jax as mc

Params = dict[str, dict[str, jax.ShapeDtypeStruct]]

_SMALLER = 16  # factor between the sides of a workload and of its `quick` version


@dataclasses.dataclass(frozen=True)
class Workload:
    """Equal layers of one model.

    Attributes:
      shapes: The matrices of a layer, (inputs, outputs).
      stacked: Whether layers, here experts, are the first axis of one leaf.
      counted: Number of layers that are compiled.
      timed: Number of layers whose step is timed.
      steps: Timed steps.
    """

    shapes: Mapping[str, tuple[int, int]]
    stacked: bool
    counted: int
    timed: int
    steps: int

    def params(self, layers: int) -> Params:
        """Returns the shapes of a number of layers, float32."""
        if self.stacked:
            return {"experts": {name: _leaf(layers, *side) for name, side in self.shapes.items()}}
        layer = {name: _leaf(*sides) for name, sides in self.shapes.items()}
        return {f"layer_{i}": layer for i in range(layers)}

    def quick(self) -> "Workload":
        """Returns a small workload of the same structure, for a smoke run."""
        shapes = {name: (r // _SMALLER, c // _SMALLER) for name, (r, c) in self.shapes.items()}
        return dataclasses.replace(self, shapes=shapes, counted=2, timed=1, steps=2)


WORKLOADS = {
    # Radford et al. 2019; openai/gpt-2: n_embd 768, n_layer 12.
    "gpt2_small": Workload(
        dict.fromkeys("qkvo", (768, 768)) | {"up": (768, 3072), "down": (3072, 768)},
        stacked=False,
        counted=12,
        timed=4,
        steps=9,
    ),
    # meta-llama/Llama-3.2-1B, config.json: hidden_size 2048, 32 heads of 64, 8 of them for keys and
    # values, intermediate_size 8192, 16 layers.
    "llama_1b": Workload(
        dict.fromkeys("qo", (2048, 2048))
        | dict.fromkeys("kv", (2048, 512))
        | {"gate": (2048, 8192), "up": (2048, 8192), "down": (8192, 2048)},
        stacked=False,
        counted=16,
        timed=2,
        steps=5,
    ),
    # moonshotai/Kimi-K2-Base, config.json: hidden_size 7168, moe_intermediate_size 2048.
    "kimi_k2_experts": Workload(
        {"gate": (7168, 2048), "up": (7168, 2048), "down": (2048, 7168)},
        stacked=True,
        counted=8,
        timed=1,
        steps=5,
    ),
}

# Batches of matrices, n x m with n <= m.
BATCHES = ((4, 128, 128), (4, 128, 384), (48, 256, 256), (24, 768, 768), (12, 768, 3072))


def gaussian(params: Params) -> dict[str, dict[str, np.ndarray]]:
    """Draws a gradient for each leaf."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), params)


def matrices(params: Params) -> list[tuple[int, int, int]]:
    """Lists (num_matrices, n_in, n_out) of each leaf, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: if a leaf is not assigned to Muon, so that the benchmark would miss its work.
    """
    table = mc.routing_table(params)
    if any(row.optimizer != "muon" for row in table.rows):
        raise ValueError(f"every leaf of a benchmark must be assigned to Muon:\n{table}")
    return [(row.num_matrices, row.n_in, row.n_out) for row in table.rows]


def minimum_flops(params: Params, steps: int = 5) -> float:
    """Counts the FLOPs of the cheaper method if every symmetric product costs half.

    With n the short side, a the long side divided by n, and T the steps: T (3a + 1) n³ by the
    standard method, (3a + 4T - 3) n³ by the Gram method without restarts.

    Args:
      params: Shapes of the matrices.
      steps: T, each a quintic polynomial.

    Returns:
      The sum over all matrices; a multiply-add counts as two.
    """
    total = 0.0
    for batch, rows, cols in matrices(params):
        n, m = sorted((rows, cols))
        a = m / n
        total += batch * n**3 * min(steps * (3 * a + 1), 3 * a + 4 * steps - 3)
    return total


def _leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
