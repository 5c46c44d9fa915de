"""One of the processes of `test_processes.py`: `process_worker.py PORT COUNT RANK FILE`."""

import sys

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from device_cases import batch_of, init, named_leaves, train


def main(port: str, count: int, rank: int, file: str) -> None:
    """Trains with the others on its part of the batch, and saves what it then has."""
    jax.config.update("jax_num_cpu_devices", 8 // count)
    jax.distributed.initialize(
        f"127.0.0.1:{port}",
        count,
        rank,
        coordinator_bind_address=f"127.0.0.1:{port}",
        initialization_timeout=60,
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))

    def share(leaf, spec, shape):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), shape)

    batch = batch_of(8)
    rows = np.split(batch, count)[rank]
    params = jax.tree.map(lambda leaf: share(leaf, P(), leaf.shape), init(batch))
    with jax.set_mesh(mesh):
        result = train(optax.adamw(0.01), params, share(rows, P("data"), batch.shape), steps=2)
    np.savez(file, allow_pickle=False, **named_leaves(result))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
