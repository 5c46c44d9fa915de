"""The training program on eight devices: the numbers of one device, and what it sends."""

import math

import chex
import jax
import numpy as np
import pytest

from benchmarks.compiled import compiled_cost
from examples.language_model.run_folder import files
from examples.language_model.training.step import make_loss
from tests.support.interruption_cases import after
from tests.support.tiny_run import drawn, trainer
from tests.support.training_meshes import EIGHT, EXPERT, trainer_on


def advance(made, steps):
    """Trains from weights without zeros; weights, losses and largest logits."""
    with jax.set_mesh(made.shardings.mesh):
        state = made._initialize()
        params = drawn(made.model, 0.3)["params"]
        state = state._replace(params=jax.device_put(params, made.shardings.params))
        step, results = made._jit_train_step(), []
        for n in range(1, steps + 1):
            state, metrics = step(state, made._text(made._draw(n)), made.config.tau)
            results.append(jax.device_get((state.params, metrics)))
    return results


def assert_same(ours, reference, rtol):
    """Largest relative error of a leaf, in the Frobenius norm; loss, and what the clip saw."""
    (params, metrics), (expected, seen) = ours, reference
    errors = jax.tree.map(lambda x, y: np.linalg.norm(x - y) / np.linalg.norm(y), params, expected)
    assert max(jax.tree.leaves(errors)) < rtol, errors
    assert metrics["qk_clip/clipped_heads"] == seen["qk_clip/clipped_heads"]
    names = ("loss", "max_logits")
    chex.assert_trees_all_close(*({n: m[n] for n in names} for m in (metrics, seen)), rtol=rtol)


@pytest.fixture(scope="module")
def on_one_device():
    """Twenty steps under MuonClip, each batch in one piece, with a threshold in reach."""
    return advance(trainer_on(None, 1, threshold=0.8), 20)


MESHES = [
    pytest.param(EIGHT, 2, id="data, fsdp, tensor, in two micro-batches"),
    pytest.param(None, 1, id="fsdp"),
    pytest.param({"data": 8}, 1, id="data"),
    pytest.param({"tensor": 8}, 1, id="tensor, heads do not divide"),
    pytest.param({"fsdp": 2, "tensor": -1}, 4, id="fsdp, tensor"),
]


@pytest.mark.nightly
@pytest.mark.parametrize(("sizes", "micro"), MESHES)
def test_eight_devices_train_as_one(on_one_device, sizes, micro):
    results = advance(trainer_on(sizes, threshold=0.8, accumulate=micro), 20)
    assert results[0][1]["qk_clip/clipped_heads"] > 0
    assert_same(results[0], on_one_device[0], rtol=1e-5)  # measured 7e-7
    assert_same(results[-1], on_one_device[-1], rtol=1e-4)  # measured 2e-6


def seen(made):
    """Loss, largest logits and loads of the experts on the first batch, with weights as above."""
    weights = drawn(made.model, 0.3)
    params = jax.device_put(weights["params"], made.shardings.params)
    balance = jax.device_put(weights["balance"], made.shardings.replicated)
    with jax.set_mesh(made.shardings.mesh):
        text = made._text(made._draw(1))[0]
        return jax.device_get(jax.jit(make_loss(made.model))(params, text, balance))


@pytest.mark.nightly
def test_experts_see_the_same_tokens_on_every_mesh():
    chex.assert_trees_all_close(
        seen(trainer_on(EXPERT, model="moe")), seen(trainer_on(None, 1, model="moe")), rtol=1e-5
    )


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("moe", EXPERT),
        ("moe", {"expert": 4, "fsdp": 2}),
        ("mla", {"fsdp": 4, "tensor": 2}),
    ],
)
def test_latent_heads_and_experts_train_as_on_one_device(model, sizes):
    ours = advance(trainer_on(sizes, model=model), 20)
    reference = advance(trainer_on(None, 1, model=model), 20)
    assert_same(ours[0], reference[0], rtol=1e-5)  # measured 2e-6
    assert_same(ours[-1], reference[-1], rtol=1e-4)  # measured 2e-6


@pytest.mark.nightly
def test_run_resumes_on_another_mesh(tmp_path):
    for devices in (8, 4, 1):
        part = trainer(
            tmp_path / "moved",
            optimizer="adamw",
            batch_size=8,
            resume=True,
            should_stop=after(2, lambda: True),
            devices=jax.devices()[:devices],
        )
        assert part.train() in (2, 4, 6)
    still = trainer(
        tmp_path / "still", optimizer="adamw", batch_size=8, should_stop=after(6, lambda: True)
    )
    assert still.train() == 6
    moved, still = (files.read_metrics(tmp_path / name) for name in ("moved", "still"))
    assert [line["step"] for line in moved] == [1, 2, 3, 4, 5, 6]
    for ours, reference in zip(moved, still, strict=True):
        np.testing.assert_allclose(ours["loss"], reference["loss"], rtol=1e-5)
        np.testing.assert_allclose(ours["max_logits"], reference["max_logits"], rtol=1e-5)


# Costs


def test_eight_devices_send_weights_and_gradients_and_not_activations():
    made = trainer_on(None, optimizer="adamw")
    text = made._text(made._draw(1))
    with jax.set_mesh(made.shardings.mesh):
        cost = compiled_cost(
            made._jit_train_step().lower(made.target, text, made.config.tau).compile()
        )
    size = 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(made.target.params))
    assert sum(cost.sent.values()) < 3 * size  # measured 1.8; 8.5 without `logical_axes.constrain`
