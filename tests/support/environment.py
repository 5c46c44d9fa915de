"""The environment of the tests; import it before JAX. Programs that tests start inherit it."""

import os
import pathlib

from tests.support.strict import installed

ROOT = pathlib.Path(__file__).parents[2]

# XLA compiles quickly rather than well, and each program once for all runs of the suite.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Nor does XLA generate loops through MLIR, or split a program among threads: a third of the time to
# compile. jaxlib 0.12 has no other generator. `make test-all` compiles as users do.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and installed("jaxlib") < (0, 11):
    _QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{_QUICK} {os.environ.get('XLA_FLAGS', '')}"

# The references are small: threads of NumPy's BLAS only wait for threads of XLA.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# Tests expect an empty stderr. jaxlib before 0.10.2 writes a line there whenever it loads a program
# that it compiled on the same machine before.
if installed("jaxlib") < (0, 10, 2):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
