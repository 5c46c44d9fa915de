"""The experiments on the order of clip and update, and on 20,000 steps."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.evidence import clip_order, longer, runner
from benchmarks.evidence.clip_order import Ordered
from benchmarks.evidence.summaries import seeds_of
from examples.language_model.models import gqa
from examples.language_model.training.step import initial_state, make_train_step


def steps_of(logits, tau):
    """Metrics of the train step for largest logits [steps, layers, heads]."""
    logits = np.asarray(logits, np.float32)
    ever = np.maximum.accumulate(logits > tau, axis=0)
    return [
        {
            "loss": 1.0,
            "max_logits": {"attn": each},
            "qk_clip/clipped_heads": int((each > tau).sum()),
            "qk_clip/ever_clipped_fraction": float(seen.mean()),
        }
        for each, seen in zip(logits, ever, strict=True)
    ]


def test_excess_is_of_heads_that_the_step_before_clipped(monkeypatch):
    logits = [[[120.0, 50.0]], [[105.0, 130.0]], [[90.0, 110.0]], [[99.0, 80.0]]]
    run = Ordered(steps=4)
    monkeypatch.setattr(Ordered, "train", lambda self, saved: (steps_of(logits, 100.0), 1.5))
    record = run.measure()
    # Clipped: head 0 at step 0 and 1, head 1 at step 1 and 2; their next logits in units of τ.
    expected = np.quantile([1.05, 0.9, 1.1, 0.8], (0.5, 0.9, 1.0))
    assert record["excess_of_all"] == pytest.approx(expected.tolist())
    assert record["excess"][0] == pytest.approx([1.05] * 3)
    assert record["clipped"] == 1.0
    assert record["validation_loss"] == 1.5


def test_thresholds_leave_room_for_one_step():
    assert Ordered().tau(0.05) == 100.0
    assert Ordered(margin=1.1).tau(0.05) == pytest.approx(100 / 1.1)
    assert Ordered(growth=True).tau(0.05) == pytest.approx(100 / 1.064)
    assert Ordered(growth=True).tau(0.0) == 100.0
    assert Ordered(threshold=None).tau(0.05) == math.inf


def test_growth_bounds_what_an_update_adds_to_a_logit():
    """The largest logit of a head at τ, after an update of queries and keys along each other."""
    tau, rate, width, dim = 100.0, 0.05, 64, 16
    rng = np.random.default_rng(0)
    x = rng.normal(size=width)
    x *= math.sqrt(width) / np.linalg.norm(x)  # root mean square 1
    size = math.sqrt(tau * math.sqrt(dim))  # of q and k, parallel
    q = np.eye(dim)[0] * size
    moved = rate * 0.2 * math.sqrt(width) * math.sqrt(width)  # spectral norm, times the norm of x
    step = moved * np.eye(dim)[0]
    exact = (q + step) @ (q + step) / math.sqrt(dim) / tau - 1
    bound = clip_order.growth_of_a_step(rate, tau)
    assert exact == pytest.approx(bound + (bound / 2) ** 2)


@pytest.mark.nightly
def test_clip_before_the_update_leaves_the_update_as_it_is():
    """Before: γ W + Δ; after: γ (W + Δ). They differ by (1 - γ) Δ."""
    model, tx = gqa.GQA(1, 16, 2, 2, 8, 16), optax.sgd(0.1)
    state = initial_state(model, tx, 0)
    text = jnp.asarray(np.random.default_rng(0).integers(256, size=(1, 4, 17)), jnp.int32)
    after, before = (
        jax.jit(step)(state, text, jnp.float32(tau))
        for tau in (0.5,)
        for step in (make_train_step(model, tx), clip_order.clip_first(model, tx))
    )
    free = jax.jit(make_train_step(model, tx))(state, text, jnp.float32(math.inf))
    name = ("blocks", "attn", "query", "kernel")

    def kernel(state):
        found = nn.unbox(state.params)
        for part in name:
            found = found[part]
        return np.asarray(found, np.float64)

    old, new = kernel(state), kernel(free[0])
    (logits,) = after[1]["max_logits"].values()
    root = np.sqrt(np.minimum(1, 0.5 / np.asarray(logits, np.float64)))[:, None, :, None]
    assert np.all(root < 1)
    np.testing.assert_allclose(kernel(after[0]), root * new, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(kernel(before[0]), root * old + (new - old), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(before[1]["max_logits"]["blocks/attn"], logits)


def test_long_training_has_the_schedule_of_kimi_k2():
    run = longer.Long(0.016, 0)
    rates = np.asarray(run.schedule()(np.arange(run.steps)))
    assert rates[0] == pytest.approx(0.016 / 500, rel=1e-4)
    np.testing.assert_allclose(rates[500:12_903], 0.016, rtol=1e-6)
    assert np.all(np.diff(rates[12_903:]) < 0)
    assert rates[-1] == pytest.approx(0.0016, rel=1e-3)


def test_long_training_records_the_fraction_of_heads(monkeypatch):
    logits = np.full((100, 1, 4), 10.0)
    logits[3, 0, 1] = logits[4, 0, :2] = 40.0
    run = longer.Long(0.016, 0, threshold=30.0, steps=100)
    monkeypatch.setattr(longer.Long, "train", lambda self, saved: (steps_of(logits, 30.0), 1.5))
    record = run.measure()
    assert record["last_clip"] == 5
    assert record["logged"][:3] == [2, 4, 6]
    assert record["clipped"][:4] == [0.0, 0.125, 0.25, 0.0]
    assert record["ever_clipped"][:4] == [0.0, 0.25, 0.5, 0.5]


def long_record(clipped, above_20=5, loss=1.5):
    """A record of 20,000 steps: one head of 16 is above 20 at first, four are above 15 longer."""
    logits = np.full((50, 4, 4), 10.0)
    logits[:above_20, 0, 0] = 40.0
    logits[:30, 1] = 17.0
    fractions = np.zeros(50)
    fractions[: len(clipped)] = clipped
    steps = list(range(400, 20_001, 400))
    return {
        "max_logits": logits.tolist(),
        "logged": steps,
        "clipped": fractions.tolist(),
        "ever_clipped": np.maximum.accumulate(fractions).tolist(),
        "last_clip": steps[len(clipped) - 1] if len(clipped) else 0,
        "validation_loss": loss,
    }


def long_study(first, lower):
    """The study of trainings whose seeds have equal records."""
    records = [
        record | {"settings": runner.described(run)}
        for task, record in ((longer.RUN, first), (longer.LOWER, lower))
        for run in seeds_of(task)
    ]
    return longer.study(runner.lookup(records)), records


def test_long_training_counts_heads_above_lower_thresholds():
    lower = long_record([0.5] * 5)
    ours, _ = long_study(long_record([0.0625] * 5), lower)
    means = {level: [one["mean"] for one in line] for level, line in ours["above"].items()}
    assert means["20"] == [0.0625, *[0.0] * 9]
    assert means["15"] == [0.3125, *[0.25] * 5, *[0.0] * 4]
    assert ours["ever"]["15"]["mean"] == 0.3125
    assert [one["mean"] for one in ours["largest"]] == [40.0, *[17.0] * 5, *[10.0] * 4]
    assert ours["clipped"][0]["mean"] == 0.0625
    assert not longer.fades(ours["above"]["15"])
    assert longer.verdict(ours) == "reproduced"
    never, _ = long_study(long_record([]), lower)
    assert longer.verdict(never) == "partly"
    assert "never acts" in longer.section(never)


@pytest.mark.parametrize(
    ("clipped", "fades", "verdict"),
    [([0.5] * 20, True, "partly"), ([0.5] * 40, False, "not reproduced")],
)
def test_long_training_shows_the_clips_at_a_lower_threshold(clipped, fades, verdict):
    first, lower = long_record([], above_20=50), long_record(clipped, loss=1.25)
    ours, records = long_study(first, lower)
    assert [one["mean"] for one in ours["lower"]["clipped"]][:4] == [0.5] * 4
    assert longer.fades(ours["lower"]["clipped"]) is fades
    assert longer.verdict(ours) == verdict
    assert ours["lower"]["minus_first"]["mean"] == -0.25
    text = longer.section(ours)
    assert f"The last clip is at step {400 * len(clipped):,}, on average." in text
    assert "at the same seed it\nis -0.250 ± 0.000." in text
    assert ("it acts, and has faded" in text) is fades
    assert f"has faded before the rate falls ({'yes' if fades else 'no'})" in text
    assert "| clipped at a step, τ = 15 | 50% | 50% | 50% |" in text
    assert "τ = 15: 50% of the heads" in longer.one_line(ours)
    assert len(longer.draw({"runs": records, "ours": ours}).axes) == 3
