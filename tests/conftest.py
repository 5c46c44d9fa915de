"""Eight CPU devices, no network, strict ranks: the conditions under which every test runs."""

import gc
import os
import pathlib
import socket

from tests.support.by_day import mark_combinations
from tests.support.strict import HAS_CAPTURE, NEEDS_CAPTURE, installed

# The references are small: threads of NumPy's BLAS only wait for those of XLA.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# In the environment, so that programs that tests start have them too: XLA compiles quickly rather
# than well, and each program once for all runs of the suite.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Tests expect an empty stderr. jaxlib before 0.10.2 writes a line there whenever it loads a program
# that it compiled on the same machine before.
if installed("jaxlib") < (0, 10, 2):
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import hypothesis
import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("tests")

_connect = socket.socket.connect
_LOOPBACK = ("127.", "::1", "localhost")


def _connect_to_loopback_only(self, address):
    if isinstance(address, tuple) and not str(address[0]).startswith(_LOOPBACK):
        raise OSError(f"tests use no network; a connection to {address} was attempted")
    return _connect(self, address)


# A compiled program holds some memory maps, and Linux gives a process 65,530: after as many of them
# as all tests need, XLA crashes.
_MAPS, _MOST_MAPS = pathlib.Path("/proc/self/maps"), 20_000


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marks
def pytest_collection_modifyitems(items):
    """Chooses what runs by day; skips the examples of `nnx` where Flax has no `nnx.capture`."""
    mark_combinations(items)
    for item in items:
        if not HAS_CAPTURE and isinstance(item, pytest.DoctestItem) and item.path.stem == "nnx":
            item.add_marker(pytest.mark.skip(reason=NEEDS_CAPTURE))


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    yield
    if _MAPS.exists() and _MAPS.read_bytes().count(b"\n") > _MOST_MAPS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def optimized(request):
    """Compiles the programs of a test marked `optimized` as users do."""
    if request.node.get_closest_marker("optimized") is None:
        yield
        return
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", _connect_to_loopback_only)


@pytest.fixture
def strict_promotion():
    """Strict dtype promotion; not global, as `optax.adamw` computes float ** int32."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def no_typecheck():
    """Turns the run-time shape check off, so that our own error text is what raises."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
