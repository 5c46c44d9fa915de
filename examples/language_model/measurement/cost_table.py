"""The printed cost of a compiled train step on one TPU chip or GPU."""

from typing import Any

import jax
from jax.sharding import Mesh

from benchmarks import gpu
from benchmarks.compiled import Cost, compiled_cost
from benchmarks.roofline import Roofline, roofline_on
from benchmarks.tpu import HBM_GIB


def compile_and_format(lowered: Any, mesh: Mesh) -> list[str]:
    """Compiles a step and formats its cost, or the reason why it does not fit.

    Args:
      lowered: `jax.stages.Lowered`.
      mesh: Its devices.

    Returns:
      Lines to print.
    """
    try:
        compiled = lowered.compile(compiler_options=gpu.compiler_options(mesh))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0].removeprefix("RESOURCE_EXHAUSTED: ")
        return [f"  does not fit; use more devices, or a larger --accumulate: {reason}"]
    cost, device, kind = compiled_cost(compiled), mesh.devices.flat[0], gpu.kind_of(mesh)
    memory = round(kind.memory_bytes / 2**30) if kind else HBM_GIB.get(device.device_kind)
    lines = cost_table(cost, memory, device_name(mesh))
    if kind and (least := roofline_on(compiled, mesh)):
        lines += roofline_table(least, kind)
    return lines


def device_name(mesh: Mesh) -> str:
    """Returns what the devices of a mesh are called."""
    return "GPU" if mesh.devices.flat[0].platform == "gpu" else "chip"


def cost_table(cost: Cost, memory: int | None, name: str = "chip") -> list[str]:
    """Formats the cost of one step on one device.

    Args:
      cost: From `benchmarks.compiled.compiled_cost`.
      memory: Of a device in GiB; None if unknown.
      name: The name of a device.

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
        rows.insert(2, ("total memory", f"{used:.1f} of the {memory} GiB of a {name}: {fits}"))
    if cost.seconds is not None:
        rows.append(("compiler's estimate", f"{1e3 * cost.seconds:.3g} ms, without communication"))
    rows += [(kind, f"{n} with {cost.sent[kind] / 1e6:,.2f} MB") for kind, n in cost.counts.items()]
    return [f"  {name:20}{value}" for name, value in rows]


def roofline_table(least: Roofline, kind: gpu.Gpu) -> list[str]:
    """Formats the roofline of one step on one GPU.

    Args:
      least: From `benchmarks.roofline.roofline`.
      kind: The GPU.

    Returns:
      Lines to print.
    """
    rates = ", ".join(f"{dtype} {kind.rates[dtype] / 1e12:.0f}" for dtype in sorted(least.flops))
    rows = [
        ("roofline", "at the rates of the data sheet; nothing was executed"),
        ("  products", f"{1e3 * least.product_seconds:.3g} ms at {rates} TFLOP/s"),
    ]
    links = {
        "  within hosts": (least.nvlink_seconds, least.nvlink_bytes, kind.nvlink),
        "  between hosts": (least.network_seconds, least.network_bytes, kind.network),
    }
    rows += [
        (name, f"{1e3 * seconds:.3g} ms for {sent / 1e6:,.2f} MB at {rate / 1e9:.0f} GB/s of a GPU")
        for name, (seconds, sent, rate) in links.items()
        if sent
    ]
    return [f"  {name:20}{value}" for name, value in rows]
