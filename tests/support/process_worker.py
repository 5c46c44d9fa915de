"""One of the processes of `test_processes.py`: `process_worker.py PORT COUNT RANK DEVICES FILE`."""

import sys

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from tests.support.device_cases import batch_of, divided, init, muon_of, named_leaves, train


def main(port: str, count: int, rank: int, devices: int, file: str) -> None:
    """Trains with the others on its part of the batch, and saves what it then has."""
    jax.config.update("jax_num_cpu_devices", devices)
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        count,
        rank,
        coordinator_bind_address=f"127.0.0.1:{port}",
        initialization_timeout=60,
    )
    mesh = jax.make_mesh((count * devices,), ("data",), axis_types=(AxisType.Auto,))
    replicated = NamedSharding(mesh, P())
    batch = batch_of(8)
    rows = jax.make_array_from_process_local_data(
        NamedSharding(mesh, P("data")), np.split(batch, count)[rank], batch.shape
    )

    def share(leaf, sharding):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    weights = init(batch)
    with jax.set_mesh(mesh):
        params = jax.tree.map(lambda leaf: share(leaf, replicated), weights)
        results = {"adamw": train(optax.adamw(0.01), params, rows, steps=2)}
        shardings = divided(weights, mesh)
        params = jax.tree.map(share, weights, shardings)
        results["muon"] = train(muon_of(shardings), params, rows, steps=4)
        results = jax.jit(lambda tree: tree, out_shardings=replicated)(results)
    np.savez(file, allow_pickle=False, **named_leaves(results))


if __name__ == "__main__":
    own_port, *numbers, own_file = sys.argv[1:]
    count, rank, devices = map(int, numbers)
    main(own_port, count, rank, devices, own_file)
