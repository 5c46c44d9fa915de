"""Eight CPU devices, no network, strict ranks: the conditions under which every test runs."""

import gc
import pathlib
import socket

from tests.support import environment  # isort: skip  # noqa: F401  (before JAX)

import hypothesis
import jax
import jaxtyping
import pytest

from tests.support.by_day import mark_combinations
from tests.support.strict import HAS_CAPTURE, NEEDS_CAPTURE

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


# A compiled program holds some memory maps. Linux gives a process 65,530. All tests need more, and
# XLA crashes.
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
def rank_promotion():
    """Ranks may differ, as JAX has it by default and models of public code need it."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def no_typecheck():
    """Turns the run-time shape check off, so that our own error text is what raises."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
