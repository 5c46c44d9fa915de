"""Steps to a fixed loss: the search, its statistics, and the full size on tokens of a file."""

import dataclasses
import json
import math
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.evidence import (
    __main__ as program,
    gpt2_tokens,
    optimizer_search,
    steps_to_target,
)
from benchmarks.evidence.optimizer_search import ADAMW, CLIPPED, MUON, NORMUON, VARIANTS

BYTES = steps_to_target.BYTES
# Steps to the target, before the noise of a seed, and the best rate.
TRUTH = {name: (120.0, 0.032) for name in VARIANTS} | {
    ADAMW: (300.0, 0.008),
    NORMUON: (110.0, 0.1),
    CLIPPED: (5000.0, 0.016),  # more than the largest budget
}


def noise(run):
    return 1 + 0.02 * math.sin(7 * run.seed + sum(map(ord, run.variant)))


def measure(runs):
    def loss(run):
        steps, best = TRUTH[run.variant]
        if run.learning_rate > 0.15:
            return None
        away = math.log2(run.learning_rate / best)
        return BYTES.target + 0.3 * math.log(steps * noise(run) / run.steps) + 0.01 * away**2

    return [{"validation_loss": loss(run)} for run in runs]


@pytest.fixture(scope="module")
def ours():
    return steps_to_target.study(measure)


def test_study_finds_the_steps_of_each_seed(ours):
    for name, line in ours["lines"].items():
        if name == CLIPPED:
            continue
        steps, best = TRUTH[name]
        away = math.log2(line["learning_rate"] / best)
        expected = [
            steps * noise(optimizer_search.Target(0.0, seed, variant=name)) for seed in BYTES.seeds
        ]
        np.testing.assert_allclose(
            line["each"], np.array(expected) * math.exp(0.01 / 0.3 * away**2), rtol=1e-4
        )
        assert abs(away) <= 0.25 + 1e-2, name  # the grid was extended to the best rate
        rates = [float(rate) for rate in line["tuning"]]
        assert rates[0] < line["learning_rate"] < rates[-1]


def test_study_lists_the_seeds_that_never_reach_the_target(ours):
    line = ours["lines"][CLIPPED]
    assert line["unreached"] == list(BYTES.seeds)
    assert (line["steps"]["mean"], line["passes"], line["p_adamw"]) == (None, None, None)
    row = next(x for x in steps_to_target.table(ours).splitlines() if f"| {CLIPPED} |" in x)
    assert "| see runs that failed |" in row
    assert "seed 4 never reaches it" in row


def test_study_lists_the_seeds_that_need_fewer_steps_than_the_fewest_tried():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRUTH, MUON, (30.0, 0.032))
        line = optimizer_search.line(measure, BYTES, MUON)
    assert (line["unreached"], line["at_once"]) == ([], list(BYTES.seeds))
    assert "seed 0 reaches it with the fewest steps tried" in steps_to_target.failures(line)


def test_study_lists_diverged_trainings():
    best = TRUTH | {MUON: (120.0, 0.13)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TRUTH, MUON, best[MUON])
        line = optimizer_search.line(measure, BYTES, MUON)
    assert line["diverged"] == ["rate 0.181"]
    assert line["learning_rate"] == 0.128


def test_verdict_needs_both_differences(ours):
    assert steps_to_target.verdict(ours) == "reproduced"
    assert steps_to_target.fewer(ours["lines"][MUON], "adamw") == "fewer"
    assert steps_to_target.fewer(ours["lines"][ADAMW], "muon") == "more"
    equal = {**ours["lines"], NORMUON: ours["lines"][NORMUON] | {"p_muon": 0.5}}
    assert steps_to_target.verdict({**ours, "lines": equal}) == "partly"


def test_p_is_of_a_paired_t_test_of_the_logarithm():
    first, second = [101.0, 118.0, 95.0, 130.0], [104.0, 130.0, 99.0, 131.0]
    ratio, p = steps_to_target.compared(first, second)
    d = np.log(first) - np.log(second)
    t = abs(d.mean()) / (d.std(ddof=1) / math.sqrt(len(d)))
    # Student's t with 3 degrees of freedom has a cumulative distribution in closed form.
    x = t / math.sqrt(3)
    cumulative = 0.5 + (x / (1 + x**2) + math.atan(x)) / math.pi
    assert p == pytest.approx(2 * (1 - cumulative), rel=0.05)
    assert ratio["mean"] == pytest.approx(np.exp(d).mean(), rel=1e-4)
    assert steps_to_target.compared(first, first)[1] is None
    assert steps_to_target.compared([*first[:3], None], second)[1] is None


@pytest.mark.parametrize(
    ("mean", "seeds", "passes"),
    [
        (3.2759, 1, True),
        (3.2761, 1, False),
        (3.2779, 4, True),
        (3.2781, 4, False),
        (None, 4, False),
    ],
)
def test_a_budget_passes_by_the_rule_of_modded_nanogpt(mean, seeds, passes):
    assert gpt2_tokens.protocol("tokens.npy").passes({"mean": mean, "n": seeds}) is passes


def test_no_budget_passes_that_a_seed_does_not_reach():
    losses = [2.2] * 4 + [2.31]
    assert BYTES.passes({"mean": np.mean(losses), "n": 5})
    assert not optimizer_search.passed(losses, BYTES)


def test_the_assumed_deviation_is_the_measured_one():
    result = json.loads((program.RESULTS / "steps-to-target.json").read_text())
    assert result["ours"]["spread"] == pytest.approx(BYTES.spread, rel=0.05)


@pytest.mark.nightly
def test_every_optimizer_is_another_one():
    run = BYTES.run
    shapes = shapes_of(run)
    grads = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), shapes)
    lowered = {}
    for name in VARIANTS:
        tx = dataclasses.replace(run, variant=name).transformation(shapes, 0.1)
        state = jax.eval_shape(tx.init, shapes)
        lowered[name] = str(jax.make_jaxpr(tx.update)(grads, state, grads))
    assert len(set(lowered.values())) == len(VARIANTS)


def shapes_of(run):
    text = jnp.zeros((1, 2), jnp.int32)
    return nn.unbox(jax.eval_shape(run.model().init, jax.random.key(0), text))["params"]


# Tokens of a file


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(50_257, size=20_000).astype(np.uint16)


def written(tmp_path, tokens, kind):
    path = tmp_path / ("tokens.npy" if kind == "npy" else "tokens.bin")
    if kind == "npy":
        np.save(path, tokens)
    else:
        header = np.zeros(256, np.int32)
        header[:3] = gpt2_tokens.MAGIC, 1, len(tokens)
        path.write_bytes((header.tobytes() if kind == "header" else b"") + tokens.tobytes())
    return str(path)


@pytest.mark.parametrize("kind", ["npy", "bin", "header"])
def test_tokens_are_read_and_split(tmp_path, tokens, kind):
    text = gpt2_tokens.load(written(tmp_path, tokens, kind), 50_304, 64)
    np.testing.assert_array_equal(np.concatenate([text.train, text.validation]), tokens)
    assert len(text.validation) == 2000


@pytest.mark.parametrize(
    ("tokens", "fault"),
    [
        (np.zeros(20_000, np.int32), r"got int32 \[20000\], expected uint16 \[n\]"),
        (np.zeros((200, 100), np.uint16), r"got uint16 \[200, 100\], expected uint16 \[n\]"),
        (np.zeros(100, np.uint16), "got 100 tokens, expected 650 at least"),
        (np.full(20_000, 50_304, np.uint16), "got token 50304, expected less than 50304"),
    ],
)
def test_unfit_tokens_raise(tmp_path, tokens, fault):
    with pytest.raises(ValueError, match=f"--tokens .*tokens.npy: {fault}"):
        gpt2_tokens.load(written(tmp_path, tokens, "npy"), 50_304, 64)


def test_full_size_is_gpt2_small_with_the_batch_of_modded_nanogpt():
    run = gpt2_tokens.protocol("tokens.npy").run
    sizes = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes_of(run)))
    block = 4 * 768 * 768 + 3 * 768 * 2048 + 2 * 768
    assert sizes == 12 * block + 2 * 50_304 * 768 + 768
    assert run.batch_size * run.seq_len == 524_288
    assert run.batch_size % run.micro_batches == 0
    assert run.alone  # in the process that owns the accelerator


def test_tokens_are_for_one_experiment(capsys):
    with pytest.raises(SystemExit):
        program.main(["longer", "--tokens", "tokens.npy"])
    assert "--tokens is for steps-to-target alone" in capsys.readouterr().err


class Tiny(gpt2_tokens.Tokens):
    """The full-size training in small."""

    batch_size: ClassVar[int] = 4
    micro_batches: ClassVar[int] = 2
    seq_len: ClassVar[int] = 16
    validation_bytes: ClassVar[int] = 512
    sizes: ClassVar[tuple[int, ...]] = (2, 16, 2, 2, 8, 16)
    vocabulary: ClassVar[int] = 64


@pytest.mark.nightly
def test_one_flag_trains_on_tokens(tmp_path, tokens, monkeypatch, capsys):
    path = written(tmp_path, np.arange(len(tokens)).astype(np.uint16) % 8, "npy")
    tiny = dataclasses.replace(
        gpt2_tokens.protocol(path, Tiny), target=3.9, budgets=(3, 24), seeds=(0, 1)
    )
    first = {name: (0, rate) for name, (_, rate) in tiny.first.items()}
    monkeypatch.setattr(
        gpt2_tokens, "protocol", lambda path: dataclasses.replace(tiny, first=first)
    )
    monkeypatch.setattr(
        steps_to_target, "VARIANTS", {name: VARIANTS[name] for name in (ADAMW, MUON, NORMUON)}
    )
    monkeypatch.setattr(program, "MEMORY", tmp_path / "done")
    program.main(["steps-to-target", "--tokens", path, "--out", str(tmp_path)])
    result = json.loads((tmp_path / "steps-to-target-tokens.json").read_text())
    assert result["command"].endswith(f"--tokens {path}")
    assert {run["settings"]["task"] for run in result["runs"]} == {"Tiny"}
    losses = [run["validation_loss"] for run in result["runs"]]
    assert losses[0] == pytest.approx(math.log(64), rel=0.02)  # three steps at a small rate
    assert min(losses) < 3.9  # every eighth token is the same
    assert (tmp_path / "steps-to-target-tokens.png").exists()
    assert f"| {ADAMW} |" in capsys.readouterr().out
