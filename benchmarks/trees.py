"""The matrices of three language models, as an optimizer meets them, and the work on them.

GPT-2 small and the layers of Llama 3.2 1B are separate two-axis leaves; the experts of Kimi K2 are
stacks, whose first axis counts experts.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

import muonclip_jax as mc

Leaves = dict[str, dict[str, jax.ShapeDtypeStruct]]

_SMALLER = 16  # what `quick` divides each side by


@dataclasses.dataclass(frozen=True)
class Tree:
    """One layer many times.

    Attributes:
      shapes: The matrices of a layer, (rows, columns) = (inputs, outputs).
      stacked: Whether layers, here experts, are the first axis of one leaf.
      counted: Layers for what the compiler and the trace are asked.
      timed: Layers for wall times.
      steps: Timed steps.
    """

    shapes: Mapping[str, tuple[int, int]]
    stacked: bool
    counted: int
    timed: int
    steps: int

    def leaves(self, layers: int) -> Leaves:
        """Gives the shapes of so many layers, float32."""
        if self.stacked:
            return {"experts": {name: _leaf(layers, *side) for name, side in self.shapes.items()}}
        layer = {name: _leaf(*sides) for name, sides in self.shapes.items()}
        return {f"layer_{i}": layer for i in range(layers)}

    def quick(self) -> "Tree":
        """Gives a small tree of the same make, for a smoke run."""
        shapes = {name: (r // _SMALLER, c // _SMALLER) for name, (r, c) in self.shapes.items()}
        return dataclasses.replace(self, shapes=shapes, counted=2, timed=1, steps=2)


TREES = {
    # Radford et al. 2019; openai/gpt-2: n_embd 768, n_layer 12.
    "gpt2_small": Tree(
        dict.fromkeys("qkvo", (768, 768)) | {"up": (768, 3072), "down": (3072, 768)},
        stacked=False,
        counted=12,
        timed=4,
        steps=9,
    ),
    # meta-llama/Llama-3.2-1B, config.json: hidden_size 2048, 32 heads of 64, 8 of them for keys and
    # values, intermediate_size 8192, 16 layers.
    "llama_1b": Tree(
        dict.fromkeys("qo", (2048, 2048))
        | dict.fromkeys("kv", (2048, 512))
        | {"gate": (2048, 8192), "up": (2048, 8192), "down": (8192, 2048)},
        stacked=False,
        counted=16,
        timed=2,
        steps=5,
    ),
    # moonshotai/Kimi-K2-Base, config.json: hidden_size 7168, moe_intermediate_size 2048.
    "kimi_k2_experts": Tree(
        {"gate": (7168, 2048), "up": (7168, 2048), "down": (2048, 7168)},
        stacked=True,
        counted=8,
        timed=1,
        steps=5,
    ),
}


def gaussian(leaves: Leaves) -> dict[str, dict[str, np.ndarray]]:
    """Draws a gradient for each leaf."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), leaves)


def matrices(leaves: Leaves) -> list[tuple[int, int, int]]:
    """Lists (num_matrices, n_in, n_out) of each leaf, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: if a leaf would not go to Muon, so that the benchmark would miss its work.
    """
    routes = mc.routing_table(leaves)
    if any(route.optimizer != "muon" for route in routes.rows):
        raise ValueError(f"every leaf of a benchmark must go to Muon:\n{routes}")
    return [(route.num_matrices, route.n_in, route.n_out) for route in routes.rows]


def floor(leaves: Leaves, steps: int = 5) -> float:
    """Counts the FLOPs of the cheaper form if every product known to be Hermitian costs half.

    With n the short side, a the long side by n and T the steps: T (3a + 1) n³ in the standard form,
    (3a + 4T - 3) n³ in the Gram form without restarts.

    Args:
      leaves: Shapes of the matrices.
      steps: T, of a quintic polynomial each.

    Returns:
      The sum over all matrices; a multiply-add is two.
    """
    total = 0.0
    for batch, rows, columns in matrices(leaves):
        n, m = sorted((rows, columns))
        a = m / n
        total += batch * n**3 * min(steps * (3 * a + 1), 3 * a + 4 * steps - 3)
    return total


def dot_flops(jaxpr: Jaxpr) -> int:
    """Counts the FLOPs of all matrix products, those in a loop as often as it runs.

    Args:
      jaxpr: A traced function.

    Returns:
      The count; a multiply-add is two.

    Raises:
      ValueError: for a product in a `while` or a `cond`, which may run any number of times.
    """
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2 * eqn.outvars[0].aval.size * int(np.prod([shape[a] for a in contracted]))
        inner = sum(map(dot_flops, _inner_jaxprs(eqn.params)))
        if inner and eqn.primitive.name in ("while", "cond"):
            raise ValueError(f"dot_flops: a product in {eqn.primitive.name} has no fixed count.")
        total += eqn.params.get("length", 1) * inner if eqn.primitive.name == "scan" else inner
    return total


def _inner_jaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """Yields the functions that an equation calls."""
    for value in params.values():
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Jaxpr | ClosedJaxpr):
                yield item.jaxpr if isinstance(item, ClosedJaxpr) else item


def _leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
