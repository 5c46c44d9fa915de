"""The models of the training program: float64 oracles, routing, clip, load balance, dtypes."""

import dataclasses
import functools
import json
import math
import pathlib

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from examples.language_model import config
from examples.language_model.config import Config
from examples.language_model.models.logical_axes import AXES
from examples.language_model.models.presets import PRESETS
from examples.language_model.training import loop, optimizer, step
from tests.support import reference_models
from tests.support.by_day import by_day
from tests.support.tiny_run import CONFIG, drawn

TEXT = np.random.default_rng(0).integers(0, 256, (2, 24))
SEQUENCES = np.random.default_rng(1).integers(0, 256, (4, 17))
KIMI_K2 = pathlib.Path(__file__).parents[2] / "benchmarks" / "results" / "kimi_k2_step.json"
DEFAULT_WEIGHTS = {
    "blocks/attn/key/kernel": 2390.3765,
    "blocks/attn/out/kernel": 0,
    "blocks/attn/query/kernel": 4752.6738,
    "blocks/attn/value/kernel": 2384.4312,
    "blocks/attn_norm/scale": 512,
    "blocks/mlp/down/kernel": 0,
    "blocks/mlp/gate/kernel": 14307.436,
    "blocks/mlp/up/kernel": 14249.482,
    "blocks/mlp_norm/scale": 512,
    "embed/embedding": 26108.914,
    "final_norm/scale": 128,
    "lm_head/kernel": 0,
}


def tiny(name, **changes):
    """A model of the smallest preset."""
    return loop.MODELS[name](**PRESETS[name]["tiny"], **changes)


def crowded(capacity):
    """The smallest mixture, whose experts accept `capacity` times the mean load."""
    routed = PRESETS["moe"]["tiny"]["routed"]._replace(capacity=capacity)
    return tiny("moe").clone(routed=routed)


@functools.cache
def forward(model):
    """A jitted forward pass that returns what was sown."""
    sown = ["intermediates", "loads"]
    return jax.jit(lambda variables, text: model.apply(variables, text, mutable=sown))


def in_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


# The forward pass


@pytest.mark.parametrize(
    "model", [tiny("mla"), tiny("moe"), crowded(0.7)], ids=["mla", "moe", "moe-crowded"]
)
def test_forward_pass_matches_the_papers(model):
    """Layer by layer: so a scanned stack is a loop over its layers, too."""
    variables = drawn(model, spread=0.5)
    logits, sown = forward(model)(variables, TEXT)
    expected, largest, loads = reference_models.forward(TEXT, in_float64(variables), model)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    found = [x for stat in jax.tree.leaves(sown["intermediates"]) for x in stat]
    np.testing.assert_allclose(found, largest, rtol=1e-5)
    if loads:
        (found,) = jax.tree.leaves(sown["loads"])
        np.testing.assert_array_equal(found, loads)
        assert (found[:, 1].sum() > 0) == (model.routed.capacity < 1)


@pytest.mark.parametrize("model", [tiny("mla"), crowded(0.7)], ids=["mla", "moe-crowded"])
def test_no_position_sees_a_later_one(model):
    """Nor does a later token take an earlier one's place at an expert."""
    variables = drawn(model, spread=0.5)
    changed = TEXT.copy()
    changed[:, 12] += 1
    before, now = (forward(model)(variables, text)[0] for text in (TEXT, changed))
    chex.assert_trees_all_equal(before[:, :12], now[:, :12])
    assert (before[:, 12:] != now[:, 12:]).any(axis=-1).all()


@pytest.mark.parametrize("name", ["gqa", "moe"])
def test_bfloat16_computation_keeps_float32_parameters_and_logits(name):
    wide, narrow = tiny(name), tiny(name, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(narrow.init, jax.random.key(0), TEXT)
    assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    variables = drawn(wide, spread=0.2)
    (logits, sown), (expected, _) = (forward(m)(variables, TEXT) for m in (narrow, wide))
    assert {x.dtype for x in jax.tree.leaves((logits, sown))} == {jnp.dtype(jnp.float32)}
    error = jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)
    assert 1e-4 < error < 0.01  # measured 0.0044


# Training


@functools.cache
def gradients(model):
    """A jitted (params, text, balance) -> gradients of params and of balance, what was seen."""
    return jax.jit(jax.grad(step.make_loss(model), argnums=(0, 2), has_aux=True))


@pytest.mark.parametrize("name", by_day(["gqa", "moe"], "gqa"))
def test_gradient_reaches_every_weight_and_no_bias(name):
    variables = drawn(tiny(name), spread=0.2)
    arguments = variables["params"], SEQUENCES, variables.get("balance", {})
    (weights, biases), _ = gradients(tiny(name))(*arguments)
    dead = [path for path, x in jax.tree_util.tree_leaves_with_path(weights) if not x.any()]
    assert not dead
    assert not any(x.any() for x in jax.tree.leaves(biases))


def test_expert_bias_changes_the_choice_and_not_the_gates():
    """A bias that is the same for all experts changes nothing, however large."""
    model = tiny("moe")
    variables = drawn(model, spread=0.5)
    pushed = variables | {"balance": jax.tree.map(lambda b: b + 4.0, variables["balance"])}
    before, now = (forward(model)(v, TEXT)[0] for v in (variables, pushed))
    chex.assert_trees_all_close(before, now, rtol=1e-6)


def test_biases_move_away_from_crowded_experts():
    bias, loads = jnp.zeros((1, 4)), jnp.array([[[6.0, 2.0, 4.0, 4.0], [2.0, 0.0, 0.0, 0.0]]])
    rate = step.BALANCE_RATE
    moved = step.rebalance(bias, loads)
    np.testing.assert_array_equal(moved, np.array([[-rate, rate, 0, 0]], np.float32))


def test_biases_even_the_loads_out(monkeypatch):
    monkeypatch.setattr(step, "BALANCE_RATE", 0.02)
    model = tiny("moe")
    variables, loads = drawn(model, spread=1.0), []
    balance = jax.tree.map(jnp.zeros_like, variables["balance"])
    for _ in range(40):
        _, sown = forward(model)({"params": variables["params"], "balance": balance}, TEXT)
        balance = jax.tree.map(step.rebalance, balance, sown["loads"])
        loads.append(step.load_metrics(sown["loads"])["moe/max_load"])
    assert loads[-1] < 1.2 < 1.5 < loads[0]  # of the mean


def test_metrics_report_the_largest_load_and_the_dropped_share():
    loads = {"a": jnp.array([[[3.0, 1.0], [1.0, 0.0]], [[2.0, 2.0], [0.0, 0.0]]])}
    found = step.load_metrics(loads)
    assert (found["moe/max_load"], found["moe/dropped"]) == (1.5, 0.125)
    assert step.load_metrics({}) == {}


def test_clip_keeps_recomputed_logits_at_the_threshold():
    """Attention that adds nothing: so the clip of a layer does not change the next one's input."""
    model, threshold = tiny("moe"), 1.0
    variables = drawn(model, spread=0.5)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: x * ("out" not in jax.tree_util.keystr(path)), variables["params"]
    )
    stats = [forward(model)(variables | {"params": params}, TEXT)[1]["intermediates"]]
    clip = jax.jit(lambda p, s: mc.qk_clip(p, s, model.layout, threshold=threshold)[0])
    clipped = clip(params, stats[0])
    stats.append(forward(model)(variables | {"params": clipped}, TEXT)[1]["intermediates"])
    for before, now in zip(*map(jax.tree.leaves, stats), strict=True):
        before, now = before.max(axis=1), now.max(axis=1)  # [L N]
        assert (before > threshold).any()
        np.testing.assert_allclose(now, np.minimum(before, threshold), rtol=1e-5)


@pytest.mark.nightly
def test_train_step_moves_the_biases_by_their_rate():
    model, config = tiny("moe"), dataclasses.replace(CONFIG, optimizer="adamw")
    tx = optimizer.make_optimizer(config, model.layout)
    state = jax.jit(lambda: step.initial_state(model, tx, 0))()
    text = SEQUENCES[None].astype(np.uint8)
    now, metrics = jax.jit(step.make_train_step(model, tx))(state, text, 1.0)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, now)
    (before,), (after,) = map(jax.tree.leaves, (state.balance, now.balance))
    assert not before.any()
    np.testing.assert_array_equal(np.abs(after[after != 0]), np.float32(step.BALANCE_RATE))
    assert after.any(axis=-1).all()
    assert metrics["moe/max_load"] > 1
    assert {path: x.shape for path, x in now.ever_clipped.items()} == {
        "dense_blocks/attn": (1, 4),
        "moe_blocks/attn": (2, 4),
    }


# Sizes


@pytest.mark.nightly
def test_default_weights_are_those_of_the_published_runs():
    """The figures of the README hang on them; sums of absolute values, seed 0."""
    model = loop.make_model(Config())
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), TEXT))["params"]
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): float(jnp.abs(x).sum())
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    assert found == pytest.approx(DEFAULT_WEIGHTS, rel=1e-5)


def test_kimi_k2_has_its_size():
    """1.04 trillion, arXiv 2507.20534, table 2; less the biases, which are no parameters here."""
    model = loop.make_model(Config(model="moe", preset="kimi-k2"))
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), TEXT))["params"]
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    published = json.loads(KIMI_K2.read_text())["slices"]["v5p:8x8x16"]["parameters"]
    assert count == published - 60 * 384
    assert model.layout == mc.MLALayout(
        nope_dim=128, rope_dim=64, value_dim=128, kernel="inputs (heads head_dim)"
    )


@pytest.mark.parametrize(
    ("name", "preset"), [(name, preset) for name in PRESETS for preset in PRESETS[name]]
)
def test_every_axis_of_every_kernel_has_a_name(name, preset):
    model = loop.make_model(Config(model=name, preset=preset))
    boxed = jax.eval_shape(model.init, jax.random.key(0), TEXT)["params"]
    specs = jax.tree.leaves(nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, P))
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(boxed))
    for (path, leaf), spec in zip(leaves, specs, strict=True):
        assert set(spec) <= set(AXES)
        if path[-1].key != "scale":
            assert len(spec) == leaf.ndim


def test_unknown_preset_is_an_error_with_the_presets_of_the_model(capsys):
    with pytest.raises(SystemExit) as leave:
        config.parse(["--model", "mla", "--preset", "kimi-k2"])
    assert leave.value.code == 2
    assert capsys.readouterr().err == (
        "language_model: argument --preset: got 'kimi-k2', expected one of tiny, small, medium for"
        " --model mla\n"
    )


ROUTES = {
    "mla": {
        "blocks/attn/kv_b/kernel": ("muon", 2, 8, 48),
        "blocks/attn/k_rope/kernel": ("muon", 2, 16, 4),
        "blocks/attn/out/kernel": ("muon", 2, 24, 16),
        "blocks/attn/q_b/kernel": ("muon", 2, 12, 40),
        "blocks/attn/q_norm/scale": ("adamw", 0, 0, 0),
        "blocks/mlp/gate/kernel": ("muon", 2, 16, 24),
    },
    "moe": {
        "dense_blocks/mlp/gate/kernel": ("muon", 1, 16, 24),
        "moe_blocks/attn/kv_a/kernel": ("muon", 2, 16, 8),
        "moe_blocks/moe/experts/down": ("muon", 8, 8, 16),
        "moe_blocks/moe/experts/gate": ("muon", 8, 16, 8),
        "moe_blocks/moe/experts/up": ("muon", 8, 16, 8),
        "moe_blocks/moe/router/kernel": ("adamw", 0, 0, 0),
        "moe_blocks/moe/shared/gate/kernel": ("muon", 2, 16, 8),
    },
}


@pytest.mark.parametrize("name", ROUTES)
def test_muon_orthogonalizes_each_kernel_as_its_matrix(name):
    shapes = nn.unbox(jax.eval_shape(tiny(name).init, jax.random.key(0), TEXT))["params"]
    rows = {r.path: (r.optimizer, *r[3:6]) for r in mc.routing_table(shapes).rows}
    assert rows | ROUTES[name] == rows


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["mla", "moe"])
def test_per_head_splits_queries_keys_and_values(name):
    """Kimi K3's recipe on the program's own model: its flag, its clip, its schedule."""
    model = tiny(name)
    config = dataclasses.replace(CONFIG, per_head=True, schedule="cosine")
    tx = optimizer.make_optimizer(config, model.layout)
    state = jax.jit(lambda: step.initial_state(model, tx, 0))()
    text = SEQUENCES[None].astype(np.uint8)
    now, metrics = jax.jit(step.make_train_step(model, tx))(state, text, 1e-3)
    assert np.isfinite(metrics["loss"])
    assert metrics["qk_clip/clipped_heads"] > 0
    rows = mc.routing_table(now.params, per_head=model.layout).rows
    s = model.attention
    split = {row.path.split("/")[-2]: row.parts for row in rows if "per head" in row.reason}
    assert split.keys() == {"q_b", "kv_b"}
    assert [part.n_out for part in split["q_b"]] == [s.nope + s.rope]
    assert [part.n_out for part in split["kv_b"]] == [s.nope, s.value]
    assert all(part.num_matrices % s.heads == 0 for parts in split.values() for part in parts)


@pytest.mark.nightly
def test_per_head_changes_the_update_of_heads_alone():
    model = tiny("mla")
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)))
    params = jax.tree.map(
        lambda x: jnp.asarray(np.random.default_rng(x.size).normal(size=x.shape), jnp.float32),
        shapes["params"],
    )
    updates = []
    for per_head in (False, True):
        config = dataclasses.replace(CONFIG, per_head=per_head)
        tx = optimizer.make_optimizer(config, model.layout)
        updates.append(jax.jit(tx.update)(params, tx.init(params), params)[0])
    differ = jax.tree.map(lambda a, b: bool(jnp.any(jnp.abs(a - b) > 1e-6)), *updates)
    flat = jax.tree_util.tree_leaves_with_path(differ)
    changed = {path[-2].key for path, is_other in flat if is_other}
    assert changed == {"q_b", "kv_b"}
