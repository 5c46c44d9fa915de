"""Settings of ahead-of-time compilation for clusters of NVIDIA GPUs that are not attached.

Needs JAX's CUDA plugin, but no GPU and no CUDA driver: `pip install "muonclip-jax[cuda]"`.
"""

import dataclasses
import importlib.util
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

PLUGIN = importlib.util.find_spec("jax_cuda13_plugin") is not None
INSTALL = 'the CUDA plugin of JAX is not installed: pip install "muonclip-jax[cuda]"'


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, as the compiler has to know it, and the rates of its products and links.

    Attributes:
      device_kind: Name that the driver reports.
      compute_capability: Its first number; the second is 0 for all of them.
      multiprocessors: Number of streaming multiprocessors.
      clock_ghz: Highest clock of these.
      memory_bytes: Memory that the driver reports.
      memory_bandwidth: Bytes of it in a second.
      l2_bytes: Second-level cache.
      rates: FLOP/s of dense products by dtype: `"bf16"` and `"f16"`; `"tf32"` for float32 at the
        default precision, and `"f32"` for float32 at higher ones.
      nvlink: Bytes that it sends in a second to the GPUs of its host.
      network: Bytes that it sends in a second to other hosts.
    """

    device_kind: str
    compute_capability: int
    multiprocessors: int
    clock_ghz: float
    memory_bytes: int
    memory_bandwidth: int
    l2_bytes: int
    rates: Mapping[str, float]
    nvlink: float
    network: float = 50e9  # a ConnectX-7 of 400 Gbit/s for each GPU: NVIDIA, DGX H100, H200, B200


# Rates and NVLink: NVIDIA, data sheets of H100 SXM and H200 SXM; for B200, the table of HGX B200 in
# the Blackwell Architecture Technical Brief. They print rates with sparsity, which are twice the
# dense ones, and NVLink in both directions. The others: openxla/xla,
# xla/backends/gpu/target_config/specs, h100_sxm.txtpb, h200.txtpb and b200.txtpb.
_HOPPER: dict[str, Any] = {
    "compute_capability": 9,
    "multiprocessors": 132,
    "clock_ghz": 1.98,
    "l2_bytes": 52_428_800,
    "rates": {"bf16": 989e12, "f16": 989e12, "tf32": 494e12, "f32": 67e12},
    "nvlink": 450e9,
}
GPUS = {
    "h100": Gpu(
        device_kind="NVIDIA H100 80GB HBM3",
        memory_bytes=84_942_979_072,
        memory_bandwidth=3_352_320_000_000,
        **_HOPPER,
    ),
    "h200": Gpu(
        device_kind="NVIDIA H200",
        memory_bytes=151_397_597_184,
        memory_bandwidth=4_800_000_000_000,
        **_HOPPER,
    ),
    "b200": Gpu(
        device_kind="NVIDIA B200",
        compute_capability=10,
        multiprocessors=148,
        clock_ghz=1.965,
        memory_bytes=191_514_411_008,
        memory_bandwidth=7_672_320_000_000,
        l2_bytes=132_644_864,
        rates={"bf16": 2250e12, "f16": 2250e12, "tf32": 1100e12, "f32": 80e12},
        nvlink=900e9,
    ),
}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Hosts with equal numbers of GPUs.

    Attributes:
      gpu: The GPU.
      hosts: Number of hosts.
      gpus_per_host: Number of GPUs of each, which NVLink connects.
    """

    gpu: Gpu
    hosts: int
    gpus_per_host: int

    def devices(self) -> list[Any]:
        """Returns the devices, the GPUs of a host one after the other.

        Call it before JAX is first used: JAX then runs on the CPU and looks for no GPU.
        """
        if not jax.config.values["jax_platforms"]:
            jax.config.update("jax_platforms", "cpu")
        from jax.experimental import topologies  # loads the plugin

        return list(
            topologies.get_topology_desc(
                self.gpu.device_kind,
                "cuda",
                target_config=target_config(self.gpu),
                topology=f"1x{self.hosts}x{self.gpus_per_host}",
            ).devices
        )

    def mesh(self, shape: Sequence[int], names: Sequence[str]) -> Mesh:
        """Makes a mesh of all GPUs, with Auto axes.

        Args:
          shape: Size of each mesh axis.
          names: Names of the mesh axes.
        """
        return Mesh(np.array(self.devices()).reshape(shape), names)


def kind_of(mesh: Mesh) -> Gpu | None:
    """Returns the GPU of which a mesh consists; None if it is not one of `GPUS`."""
    kind = mesh.devices.flat[0].device_kind
    return next((gpu for gpu in GPUS.values() if gpu.device_kind == kind), None)


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """Returns the options with which to compile a program for the devices of a mesh."""
    if mesh.devices.flat[0].platform != "gpu":
        return None
    return {"xla_gpu_autotune_level": 0}  # time no kernels: there is no GPU, or another one


def cluster(topology: str) -> Cluster | None:
    """Reads a topology such as `"h100:8x8"`: GPU, hosts x GPUs of each.

    Returns:
      The cluster; None if the name before the colon is not a key of `GPUS`.

    Raises:
      ValueError: if two positive numbers do not follow the name of a GPU.
    """
    name, _, sizes = topology.partition(":")
    if name not in GPUS:
        return None
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", sizes)
    if found is None:
        raise ValueError(
            f"{topology}: expected the number of hosts and of the GPUs of each, such as {name}:8x8"
        )
    return Cluster(GPUS[name], int(found[1]), int(found[2]))


def target_config(gpu: Gpu) -> str:
    """Writes what XLA has to know of a GPU, a `GpuTargetConfigProto` as text.

    Limits that are equal on all of `GPUS`: NVIDIA, CUDA C++ Programming Guide, table of technical
    specifications per compute capability.
    """
    return f"""
gpu_device_info {{
  cuda_compute_capability {{
    major: {gpu.compute_capability}
    feature_extension: ACCELERATED_FEATURES
  }}
  core_count: {gpu.multiprocessors}
  fpus_per_core: 128
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {gpu.memory_bytes}
  memory_bandwidth: {gpu.memory_bandwidth}
  l2_cache_size: {gpu.l2_bytes}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_block_optin: {227 * 1024}
  shared_memory_per_core: {228 * 1024}
  registers_per_block_limit: {64 * 1024}
  registers_per_core_limit: {64 * 1024}
}}
platform_name: "CUDA"
runtime_version {{ major: 13 }}
dnn_version_info {{ major: 9 minor: 7 }}
device_description_str: "{gpu.device_kind}"
"""
