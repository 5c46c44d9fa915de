"""The share of the optimizer in a training step, counted in compiled programs.

    pip install "muonclip-jax[tpu]"
    python -m benchmarks.optimizer_share

Writes results/optimizer_share.json: FLOPs and bytes accessed in a training step of four models, by
the model and by three optimizers. The programs are compiled for one TPU v5p, and not executed.

The rule: each part of `model_parts.py` is compiled forward and backward for one micro-batch, and
counts for each equal part and micro-batch. An optimizer is compiled for one matrix of each shape,
and counts for each such matrix; QK-clip for the kernels of one attention module. FLOPs and bytes
are the compiler's (`cost_analysis`). The products of queries with keys and of weights with values
are left out, and so are collectives and activations that are computed again: all of them would make
the shares smaller.
"""

import argparse
import collections
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from optax import contrib

import muonclip_jax as mc
from benchmarks import aot, report, tpu
from benchmarks.compiled import instruction_counts
from benchmarks.model_parts import MODELS, Model, Part

TOPOLOGY = "v5p:2x2x1"  # the smallest slice; programs are for one of its chips
RATE, DECAY, NEWTON_SCHULZ_STEPS = 2e-4, 0.1, 5
OPTIMIZERS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    "adamw": lambda numbers: optax.adamw(RATE, weight_decay=DECAY),
    "optax": lambda numbers: contrib.muon(
        RATE, weight_decay=DECAY, muon_weight_dimension_numbers=numbers
    ),
    # Products in bfloat16, as in Kimi K2.
    "ours": lambda numbers: mc.muonclip(
        RATE, threshold=None, ns_dtype=jnp.bfloat16, muon_weight_dimension_numbers=numbers
    ),
}


@dataclasses.dataclass(frozen=True)
class Compiler:
    """Counts FLOPs and bytes of programs that it compiles for one device.

    Attributes:
      device: The device, which need not be attached.
    """

    device: Any

    def count(self, f: Callable[..., Any], *shapes: Any, donated: tuple[int, ...] = ()) -> Any:
        """Returns FLOPs and bytes accessed, as an array of two numbers.

        Raises:
          RuntimeError: if the program has a loop, whose contents the compiler counts once.
        """
        place = NamedSharding(Mesh(np.array([self.device]), ("x",)), P())
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
        )
        compiled = jax.jit(f, donate_argnums=donated).lower(*shapes).compile()
        if loops := instruction_counts(compiled)["while"]:
            raise RuntimeError(
                f"optimizer_share: got a program with {loops} loops, expected none; compile smaller"
                " parts, and one matrix at a time."
            )
        analysis = compiled.cost_analysis() or {}
        return np.array([analysis["flops"], analysis["bytes accessed"]])

    def passes(self, part: Part) -> Any:
        """Counts the forward and the backward pass of a part, for one micro-batch."""
        text = len(part.inputs) == 1
        x = jax.ShapeDtypeStruct(part.inputs, jnp.int32 if text else jnp.bfloat16)

        def both(params: Any, x: Any, cotangent: Any) -> Any:
            if text:
                y, pull = jax.vjp(lambda params: part.forward(params, x), params)
            else:
                y, pull = jax.vjp(part.forward, params, x)
            return y, pull(cotangent)

        return self.count(both, part.params, x, jax.eval_shape(part.forward, part.params, x))

    @functools.cache  # noqa: B019 - lives as long as the program
    def update(self, optimizer: str, shape: tuple[int, ...], numbers: Any) -> Any:
        """Counts the update of one parameter, whose dimension numbers are None without Muon."""
        name = optimizer if numbers else "adamw"
        params = {"layer": {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}}
        tx = OPTIMIZERS[name]({"layer": {"kernel": numbers}})

        def step(params: Any, state: Any, gradients: Any) -> Any:
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(tx.init, params)
        # For a full matrix, Newton–Schulz chooses by the platform of the host.
        with mock.patch.object(jax, "default_backend", return_value=self.device.platform):
            return self.count(step, params, state, params, donated=(0, 1))

    def clip(self, part: Part) -> Any:
        """Counts QK-clip of a part with attention."""
        stat = jax.ShapeDtypeStruct((1, part.heads), jnp.float32)

        def clip(params: Any, max_logits: Any) -> Any:
            params, info = mc.qk_clip(params, max_logits, part.layout, threshold=100.0)
            return params, mc.qk_clip_metrics(info)

        return self.count(clip, part.params, {"attn": {"max_logits": (stat,)}}, donated=(0,))


def parameters(part: Part) -> collections.Counter[tuple[tuple[int, ...], Any]]:
    """Counts the matrices and the other parameters of a part, by shape and dimension numbers."""
    found: collections.Counter[tuple[tuple[int, ...], Any]] = collections.Counter()
    rows = mc.routing_table(part.params).rows
    for row, leaf in zip(rows, jax.tree.leaves(part.params), strict=True):
        if row.optimizer == "muon":
            sides = leaf.shape[-2:]
            found[sides, contrib.MuonDimensionNumbers(0, 1)] += leaf.size // np.prod(sides)
        else:
            found[leaf.shape, None] += 1
    return found


def measure(model: Model, compiler: Compiler) -> dict[str, Any]:
    """Counts a training step of a model without optimizer, and each optimizer."""
    parts = model.parts().values()
    own = sum(part.count * part.passes * compiler.passes(part) for part in parts)
    by_optimizer = {}
    for name in OPTIMIZERS:
        cost = np.zeros(2)
        for part in parts:
            for (shape, numbers), many in parameters(part).items():
                cost += part.count * many * compiler.update(name, shape, numbers)
            if name == "ours" and part.heads:
                cost += part.count * compiler.clip(part)
        by_optimizer[name] = figures(cost)
    held = [part.count * x.size for part in parts for x in jax.tree.leaves(part.params)]
    return {
        "parameters": sum(held),
        "tokens": model.tokens,
        "micro_batch": model.micro,
        "model": figures(own),
        # Keller Jordan, kellerjordan.github.io/posts/muon, runtime analysis: T m / B.
        "bound": NEWTON_SCHULZ_STEPS * model.width / model.tokens,
        "optimizers": by_optimizer,
    }


def figures(cost: Any) -> dict[str, float]:
    """Names FLOPs and bytes."""
    return dict(zip(("flops", "bytes"), map(float, cost), strict=True))


HEAD = ("model", "tokens of a step", "T m / B", *(f"FLOPs, {x}" for x in OPTIMIZERS))
HEAD += tuple(f"bytes, {x}" for x in OPTIMIZERS)


def row(name: str, model: Mapping[str, Any]) -> list[str]:
    """Formats the row of a model."""
    costs = model["optimizers"].values()
    return [
        name,
        f"{model['tokens'] / 1e6:.2g} M",
        percent(model["bound"]),
        *(
            percent(cost[figure] / (model["model"][figure] + cost[figure]))
            for figure in ("flops", "bytes")
            for cost in costs
        ),
    ]


def percent(share: float) -> str:
    """Formats a fraction with two digits."""
    return f"{100 * share:.2g} %" if share >= 1e-6 else "below 0.0001 %"


def table(results: Mapping[str, Any]) -> str:
    """Formats the table of docs/benchmarks.md."""
    return report.markdown(HEAD, [row(*item) for item in results["models"].items()])


def main(arguments: list[str] | None = None) -> None:
    """Compiles the models one after the other, and writes the results."""
    parser = report.parser("optimizer_share", "The share of the optimizer in a training step.")
    parser.add_argument("--model", choices=MODELS, nargs="*", help="only these; others are kept")
    options: argparse.Namespace = parser.parse_args(arguments)
    if not tpu.LIBTPU:
        parser.error(tpu.INSTALL)
    device = tpu.topology_devices(TOPOLOGY)[0]
    path = options.out / "optimizer_share.json"
    results = aot.head("optimizer_share") | {"device": device.device_kind, "models": {}}
    if options.model and path.exists():
        results["models"] = json.loads(path.read_text())["models"]
    for name in options.model or MODELS:
        models = results["models"]
        models[name] = report.rounded(measure(MODELS[name], Compiler(device)))
        results["models"] = {key: models[key] for key in MODELS if key in models}
        report.write_json(path, results)
    print(table(results))


if __name__ == "__main__":
    main()
