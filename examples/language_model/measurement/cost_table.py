"""The printed cost of a compiled train step on one chip."""

from typing import Any

import jax

from benchmarks.compiled import Cost, compiled_cost
from benchmarks.tpu import HBM_GIB


def compile_and_format(lowered: Any, chip: Any) -> list[str]:
    """Compiles a step and formats its cost, or the reason why it does not fit.

    Args:
      lowered: `jax.stages.Lowered`.
      chip: One of its devices.

    Returns:
      Lines to print.
    """
    try:
        cost = compiled_cost(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        return [f"  does not fit; use more chips, or a larger --accumulate: {reason}"]
    return cost_table(cost, HBM_GIB.get(chip.device_kind))


def cost_table(cost: Cost, memory: int | None) -> list[str]:
    """Formats the cost of one step on one chip.

    Args:
      cost: From `benchmarks.compiled.compiled_cost`.
      memory: Of a chip in GiB; None if unknown.

    Returns:
      Lines to print.
    """
    rows = [
        ("arguments", f"{(cost.argument_bytes or 0) / 1e6:,.1f} MB"),
        ("temporary memory", f"{(cost.temporary_bytes or 0) / 1e6:,.1f} MB"),
        ("matrix products", f"{cost.flops:.3g} FLOPs"),
    ]
    if memory is not None:
        used = ((cost.argument_bytes or 0) + (cost.temporary_bytes or 0)) / 2**30
        fits = "fits" if used <= memory else "does not fit"
        rows.insert(2, ("total memory", f"{used:.1f} of the {memory} GiB of a chip: {fits}"))
    if cost.seconds is not None:
        rows.append(("compiler's estimate", f"{1e3 * cost.seconds:.3g} ms, without communication"))
    rows += [(kind, f"{n} with {cost.sent[kind] / 1e6:,.2f} MB") for kind, n in cost.counts.items()]
    return [f"  {name:20}{value}" for name, value in rows]
