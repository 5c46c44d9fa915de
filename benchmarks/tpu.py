"""Settings of ahead-of-time compilation for TPU slices that are not attached.

Needs libtpu: `pip install "muonclip-jax[tpu]"`.
"""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

LIBTPU = importlib.util.find_spec("libtpu") is not None
INSTALL = 'libtpu is not installed: pip install "muonclip-jax[tpu]"'

# Environment variables that libtpu reads when it is loaded.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # do not ask the network for the type of this machine
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at the same time
    # Without these two libtpu writes to stderr that this machine is no TPU. The topology names the
    # slice that programs are compiled for.
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

# HBM of a chip in GiB by `device_kind`. Google, cloud.google.com/tpu/docs/v5e, v5p and v6e,
# "Key chip specifications", HBM capacity.
HBM_GIB = {"TPU v5 lite": 16, "TPU v5": 95, "TPU v6 lite": 32}


def topology_devices(topology: str) -> list[Any]:
    """Returns the devices of a slice that need not be attached.

    Call it before JAX is first used: JAX then runs on the CPU and looks for no attached TPU.

    Args:
      topology: Generation and chips along each axis of the torus, such as `"v5p:4x4x4"`.

    Raises:
      Exception: if libtpu does not know the topology; libtpu chooses the type.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not jax.config.values["jax_platforms"]:
        jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies  # loads libtpu

    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)


def topology_mesh(topology: str, shape: Sequence[int], names: Sequence[str]) -> Mesh:
    """Makes a mesh of a slice that need not be attached, with Auto axes.

    Args:
      topology: See `topology_devices`.
      shape: Size of each mesh axis.
      names: Names of the mesh axes.
    """
    return Mesh(np.array(topology_devices(topology)).reshape(shape), names)
