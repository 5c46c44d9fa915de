"""Steps are compiled ahead of time from shapes, and states are sharded like the parameters."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

from benchmarks import aot, kimi_k2_step, optimizer_share, sharded_step, tpu, tpu_train_step


@pytest.fixture
def params():
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    sharding = NamedSharding(mesh, P("a", "b"))
    return {"w": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=sharding)}


def test_state_is_sharded_like_the_parameters(params):
    state = {"mu": {"w": jnp.zeros((8, 16), jnp.bfloat16)}, "count": jnp.zeros((), jnp.int32)}
    placed = aot.sharded_like(params, state)
    assert placed["mu"]["w"].sharding == params["w"].sharding
    assert placed["mu"]["w"].dtype == jnp.bfloat16
    assert placed["count"].sharding.spec == P()


def test_elementwise_step_sends_nothing_and_donates_its_buffers(params):
    compilation = aot.compile_traced(aot.trace_step(optax.sgd(0.1, momentum=0.9), params))
    assert compilation.cost.counts == {}
    shard = 2 * 8 * 4  # bytes
    assert compilation.cost.argument_bytes == 3 * shard  # parameters, momentum, gradients
    assert compilation.rematerializations == 0
    assert compilation.seconds > 0
    assert compilation.cpu_seconds > 0


def test_stderr_of_other_languages_is_captured():
    with aot.captured_stderr() as log:
        os.write(2, b"Involuntary full rematerialization")
    assert log == [aot.REMATERIALIZATION]


def test_head_has_command_versions_and_note():
    head = aot.head("sharded_step")
    assert set(head) == {"command", "date", "versions", "machine", "load_before", "note"}
    assert head["command"] == "python -m benchmarks.sharded_step"
    assert {"python", "muonclip-jax", "jax", "optax"} <= set(head["versions"])
    assert "leave out the links" in head["note"]


@pytest.mark.parametrize(
    "benchmark_", [sharded_step, kimi_k2_step, tpu_train_step, optimizer_share]
)
def test_missing_libtpu_is_reported_with_the_command_that_installs_it(
    benchmark_, monkeypatch, capsys
):
    monkeypatch.setattr(tpu, "LIBTPU", False)
    with pytest.raises(SystemExit):
        benchmark_.main([])
    assert 'pip install "muonclip-jax[tpu]"' in capsys.readouterr().err
