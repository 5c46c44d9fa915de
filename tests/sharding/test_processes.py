"""Two processes train and clip as one does, with replicated and with divided weights."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.device_cases import TAU, apply, batch_of, init, muon_of, named_leaves, train
from tests.support.processes import free_port, run_together

# By day `tests/examples/test_training_processes.py` trains in two processes.
pytestmark = pytest.mark.nightly
WORKER = pathlib.Path(__file__).parents[1] / "support" / "process_worker.py"
LIMIT = 180  # seconds; 15 s on two idle cores


@pytest.fixture(scope="module", params=[2, 4], ids=["2 x 2", "2 x 4"])
def results(request, tmp_path_factory):
    """The parameters of two processes with several devices each, after training together."""
    folder, port = tmp_path_factory.mktemp("processes"), free_port()
    files = [folder / f"{rank}.npz" for rank in range(2)]
    arguments = [(str(port), "2", str(rank), str(request.param)) for rank in range(2)]
    commands = [[WORKER, *own, file] for own, file in zip(arguments, files, strict=True)]
    run_together(commands, folder, LIMIT)
    return [dict(np.load(file)) for file in files]


def test_worst_heads_are_in_the_rows_of_the_second_process_alone():
    # Without this, the next test would not see a maximum that is not joined.
    x = jnp.asarray(batch_of(8))
    _, stats = jax.jit(apply)(init(x), x)
    for layer in ("grouped", "plain", "stack"):
        (maxima,) = stats[layer]["max_logits"]
        first, second = (np.max(maxima[..., rows, :], axis=-2) for rows in (slice(4), slice(4, 8)))
        assert np.any((first < TAU) & (second > TAU))


@pytest.fixture(scope="module")
def expected():
    """The same in one process, on one device."""
    x = jnp.asarray(batch_of(8))
    runs = {
        "adamw": train(optax.adamw(0.01), init(x), x, steps=2),
        "muon": train(muon_of(), init(x), x, steps=4),
    }
    return named_leaves(runs)


def test_two_processes_train_and_clip_as_one(results, expected):
    assert list(results[1]) == list(expected)
    for name, leaf in expected.items():
        # Sums run in another order: measured 3e-7 of 1 + the size of a number.
        np.testing.assert_allclose(results[1][name], leaf, rtol=1e-5, atol=1e-5, err_msg=name)


def test_both_processes_have_the_same_bits(results):
    for name, leaf in results[0].items():
        assert leaf.tobytes() == results[1][name].tobytes(), name


def test_a_process_that_hangs_is_ended_and_what_it_printed_is_shown(tmp_path):
    waiting = ["-c", "import time; print('still waiting', flush=True); time.sleep(60)"]
    with pytest.raises(AssertionError, match="still waiting"):
        run_together([waiting], tmp_path, limit=1)


def test_a_process_that_fails_ends_the_others(tmp_path):
    with pytest.raises(AssertionError, match=r"exit codes \[None, 3\]"):
        run_together([["-c", "import time; time.sleep(60)"], ["-c", "exit(3)"]], tmp_path, limit=50)
