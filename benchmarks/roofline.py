"""The roofline of a step on a cluster of GPUs: FLOPs over rates, and bytes over links.

The compiler estimates no time for GPUs. A roofline is no estimate either: products reach the rate
of the data sheet at best, links count bytes as `Cost.sent` does, and all other kernels are left
out.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from benchmarks.compiled import bytes_sent, product_flops
from benchmarks.gpu import Gpu, kind_of
from benchmarks.hlo import Program, collective_kind
from benchmarks.replica_groups import replica_groups


@dataclasses.dataclass(frozen=True)
class Roofline:
    """The work of one GPU in one step, and its seconds at the rates of the data sheet.

    Attributes:
      flops: FLOPs of products, by the dtype that sets their rate: a key of `Gpu.rates`.
      nvlink_bytes: Bytes of collectives within a host, as `Cost.sent` counts them.
      network_bytes: Bytes of the other collectives, including those between GPUs of one host.
      product_seconds: FLOPs over the rates.
      nvlink_seconds: Bytes over the rate of NVLink.
      network_seconds: Bytes over the rate of the network.
    """

    flops: Mapping[str, float]
    nvlink_bytes: float
    network_bytes: float
    product_seconds: float
    nvlink_seconds: float
    network_seconds: float


def roofline(compiled: Any, gpu: Gpu, hosts: Sequence[int]) -> Roofline:
    """Reads the roofline of a `jax.stages.Compiled`, or of its text.

    Args:
      compiled: The program.
      gpu: The GPU.
      hosts: The host of each device of the mesh, in the order of the mesh.

    Returns:
      The roofline; contents of a loop without a known trip count count once.

    Raises:
      ValueError: if `gpu` has no rate for the dtype of a product.
    """
    program = Program(compiled if isinstance(compiled, str) else compiled.as_text())
    flops: dict[str, float] = {}
    sent = {"nvlink": 0.0, "network": 0.0}
    for inside, i, times in program.walk(program.entry, 1):
        if collective_kind(i):
            link = "nvlink" if _within_hosts(replica_groups(i.attributes), hosts) else "network"
            sent[link] += bytes_sent(inside, i) * (times or 1)
        elif count := product_flops(inside, i):
            rate = _rate(inside[i.operands[0]].shape, i.attributes)
            flops[rate] = flops.get(rate, 0.0) + count * (times or 1)
    if unknown := flops.keys() - gpu.rates.keys():
        raise ValueError(
            f"roofline: {gpu.device_kind} has rates for {', '.join(gpu.rates)}, but the program"
            f" has products of {', '.join(sorted(unknown))}; add their rate to benchmarks/gpu.py."
        )
    return Roofline(
        flops,
        sent["nvlink"],
        sent["network"],
        sum(count / gpu.rates[rate] for rate, count in flops.items()),
        sent["nvlink"] / gpu.nvlink,
        sent["network"] / gpu.network,
    )


def roofline_on(compiled: Any, mesh: Mesh) -> Roofline | None:
    """Reads the roofline of a program for a mesh; None if it does not consist of known GPUs."""
    gpu = kind_of(mesh)
    return gpu and roofline(compiled, gpu, [device.process_index for device in mesh.devices.flat])


def _within_hosts(groups: Sequence[Sequence[int]], hosts: Sequence[int]) -> bool:
    """Whether all devices of each group have the same host; without groups, all devices at all."""
    return all(len({hosts[i] for i in group}) == 1 for group in groups or [range(len(hosts))])


def _rate(operand: str, attributes: str) -> str:
    """Returns the dtype that sets the rate of a product: tf32 for float32 of default precision."""
    dtype = operand.removeprefix("(").partition("[")[0]
    # Of a dot operand_precision={highest,highest}, of cuBLAS "operand_precision":["HIGHEST", ...].
    exact = "operand_precision={high" in attributes or '"operand_precision":["HIGH' in attributes
    return "tf32" if dtype == "f32" and not exact else dtype
