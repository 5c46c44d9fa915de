"""The TPU kernel compiles for every generation of TPUs, alone, in stacks and in a sharded step."""

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import tpu

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 900  # seconds
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(not tpu.LIBTPU, reason=tpu.INSTALL)]
TOPOLOGIES = {"v5e:2x2": 4, "v5p:2x2x1": 4, "v6e:2x2": 4, "tpu7x:2x2x1": 8}

# Its own process: libtpu must be loaded before JAX is first used.
WORKER = """
import functools, json, os, sys, tempfile, pathlib
from benchmarks.kernel_cycles import DUMP_FLAGS, newest_dump, read_regions
topology, count = sys.argv[1], int(sys.argv[2])
folder = tempfile.TemporaryDirectory()
os.environ["LIBTPU_INIT_ARGS"] = DUMP_FLAGS.format(folder.name)
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
import muonclip_jax as mc
from benchmarks import aot, tpu
from benchmarks.compiled import compiled_cost
from benchmarks.kernel_cycles import cycles_of

mesh = tpu.topology_mesh(topology, (count,), ("x",))
kind = mesh.devices.flat[0].device_kind
results = {"kind": kind}

def figures(compiled):
    cost = compiled_cost(compiled)
    return {"kernels": cost.kernels, "cycles": cycles_of(cost.kernels, kind)}

newton_schulz = functools.partial(mc.newton_schulz, dtype=jnp.bfloat16, products="pallas", steps=2)
for name, shape in {"odd": (1100, 1300), "stack": (2, 1024, 2048)}.items():
    one = jax.sharding.Mesh(mesh.devices[:1], ("x",))
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(one, P()))
    results[name] = figures(jax.jit(newton_schulz).lower(x).compile())
sharding = NamedSharding(mesh, P(None, "x", None))
params = {"w": jax.ShapeDtypeStruct((count + 1, 1024, 2048), jnp.float32, sharding=sharding)}
settings = {"ns_dtype": jnp.bfloat16, "ns_products": "pallas", "ns_coeffs": "you"}
tx = mc.scale_by_muon(shardings={"w": sharding}, **settings)
traced = aot.trace_step(tx, params)
compiled = traced.lower().compile()
results["sharded"] = figures(compiled)
results["regions"] = read_regions(newest_dump(pathlib.Path(folder.name), "symmetric"), 1024)
print("RESULTS" + json.dumps(results))
"""


@pytest.fixture(scope="module", params=TOPOLOGIES)
def results(request):
    topology = request.param
    worker = subprocess.run(
        [sys.executable, "-c", WORKER, topology, str(TOPOLOGIES[topology])],
        cwd=ROOT,
        timeout=LIMIT,
        capture_output=True,
        text=True,
    )
    assert worker.returncode == 0, worker.stderr
    (line,) = (x for x in worker.stdout.splitlines() if x.startswith("RESULTS"))
    return json.loads(line.removeprefix("RESULTS"))


@pytest.mark.parametrize("case", ["odd", "stack", "sharded"])
def test_both_kernels_are_in_the_program(case, results):
    names = {kernel.split()[0] for kernel in results[case]["kernels"]}
    assert names == {"symmetric_gram_matrix", "symmetric_product"}
    assert results[case]["cycles"] > 0


def test_the_dump_of_the_compiler_has_the_parts_of_the_kernel(results):
    _, *parts = results["regions"]
    assert all(50 < cycles < 20000 for cycles in parts)
