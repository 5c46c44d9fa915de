"""Modules hidden by a mask or listed in `ignore=` are not clipped; no other module is skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.support.attention_cases import draw

KERNEL = draw(0, 4, 2, 8)
LAYER = {name: {"kernel": KERNEL} for name in ("query", "key", "value")}
LAYER["out"] = {"kernel": draw(1, 2, 8, 4)}
PARAMS = {f"layer_{i}": {"attn": LAYER} for i in range(3)}
STATS = {name: {"attn": {"max_logits": jnp.array([400.0, 7.0])}} for name in PARAMS}


def step(tx, params=PARAMS, stats=STATS):
    grads = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(grads, tx.init(params), params, max_logits=stats)
    return optax.apply_updates(params, updates)


def clipped(new, params=PARAMS):
    """Names of the layers whose queries have changed; all their clips must be right."""
    names = set()
    for name, layer in new.items():
        query, old = (t["attn"]["query"]["kernel"] for t in (layer, params[name]))
        if not np.array_equal(query, old):
            np.testing.assert_allclose(query[:, 0], old[:, 0] / 2, rtol=1e-6)
            np.testing.assert_array_equal(query[:, 1], old[:, 1])
            names.add(name)
    return names


def labels(frozen):
    return {name: "freeze" if name in frozen else "train" for name in PARAMS}


def full(tree):
    """A label for each leaf."""
    return {name: jax.tree.map(lambda _, n=name: tree[n], PARAMS[name]) for name in PARAMS}


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("frozen", [{"layer_0"}, {"layer_0", "layer_2"}, set(PARAMS)])
def test_muonclip_under_a_partition_clips_what_it_trains(frozen, wide):
    marks = full(labels(frozen)) if wide else labels(frozen)
    tx = optax.partition({"train": mc.muonclip(0.0), "freeze": optax.set_to_zero()}, marks)
    assert clipped(step(tx)) == PARAMS.keys() - frozen


def test_muonclip_under_a_mask_clips_what_it_trains():
    mask = {name: name != "layer_1" for name in PARAMS}
    tx = optax.masked(mc.muonclip(0.0), mask)
    assert clipped(step(tx)) == {"layer_0", "layer_2"}


def test_a_typo_raises_under_a_mask_too():
    mask = {name: name != "layer_1" for name in PARAMS}
    stats = {**STATS, "layer_x": STATS["layer_0"]}
    with pytest.raises(ValueError, match="layer_x/attn: has max_logits, but the parameters have"):
        step(optax.masked(mc.muonclip(0.0), mask), stats=stats)
    del stats["layer_x"], stats["layer_0"]
    with pytest.raises(ValueError, match="layer_0/attn: has no max_logits"):
        step(optax.masked(mc.muonclip(0.0), mask), stats=stats)


def test_queries_without_their_keys_raise():
    hidden = {"layer_0": {"attn": {**LAYER, "key": {"kernel": optax.MaskedNode()}}}}
    stats = {"layer_0": STATS["layer_0"]}
    with pytest.raises(ValueError, match="layer_0/attn: key/kernel hidden by a mask") as error:
        mc.qk_clip(hidden, stats)
    assert "call mc.qk_clip on all parameters after optax.apply_updates" in str(error.value)


def test_kernels_without_their_biases_raise():
    query = {"kernel": KERNEL, "bias": optax.MaskedNode()}
    params = {"layer_0": {"attn": {**LAYER, "query": query}}}
    with pytest.raises(ValueError, match="query/bias hidden by a mask"):
        mc.qk_clip(params, {"layer_0": STATS["layer_0"]})
    query = {"kernel": KERNEL, "lora_a": optax.MaskedNode()}
    params = {"layer_0": {"attn": {**LAYER, "query": query}}}
    _, info = mc.qk_clip(params, {"layer_0": STATS["layer_0"]})
    assert info.clipped_heads == 1


def test_hidden_norms_still_count():
    attn = {**LAYER, "q_norm": {"scale": optax.MaskedNode()}}
    with pytest.raises(ValueError, match="'q_norm' normalizes queries or keys"):
        mc.qk_clip({"layer_0": {"attn": attn}}, {"layer_0": STATS["layer_0"]})


def test_leaves_that_are_none_are_hidden_too():
    frozen = {"attn": jax.tree.map(lambda _: None, LAYER)}
    new, info = mc.qk_clip({**PARAMS, "layer_1": frozen}, STATS)
    assert list(info.gamma) == ["layer_0/attn", "layer_2/attn"]
    assert new["layer_1"] == frozen
    biased = {**PARAMS["layer_1"]["attn"], "query": {"kernel": KERNEL, "bias": None}}
    _, info = mc.qk_clip({**PARAMS, "layer_1": {"attn": biased}}, STATS)
    assert len(info.gamma) == 3


@pytest.mark.parametrize(
    ("ignore", "left"),
    [
        ("layer_0/attn", {"layer_1", "layer_2"}),
        (("layer_[01]/*",), {"layer_2"}),
        (["layer_0/*", "*_2/attn"], {"layer_1"}),
        ("*", set()),
        ((), set(PARAMS)),
    ],
)
def test_named_modules_are_left_out(ignore, left):
    new, info = mc.qk_clip(PARAMS, STATS, ignore=ignore)
    assert clipped(new) == left
    assert {path.partition("/")[0] for path in info.gamma} == left
    assert info.skipped_modules == 0
    assert clipped(step(mc.muonclip(0.0, ignore=ignore))) == left


def test_a_module_that_is_left_out_needs_no_max_logits_and_no_layout():
    stats = {name: s for name, s in STATS.items() if name != "layer_1"}
    mc.qk_clip(PARAMS, stats, ignore="layer_1/attn")
    normed = {"attn": {**LAYER, "q_norm": {"scale": jnp.ones(8)}}}
    mc.qk_clip({**PARAMS, "layer_1": normed}, STATS, ignore="layer_1/attn")
    stats = {**STATS, "pooling": {"max_logits": jnp.ones(2)}}
    mc.qk_clip(PARAMS, stats, ignore="pooling")


@pytest.mark.parametrize("ignore", ["layer_3/*", ("layer_0/*", "layer0/*"), "attn"])
def test_a_pattern_that_matches_nothing_raises(ignore):
    bad = ignore if isinstance(ignore, str) else ignore[-1]
    with pytest.raises(ValueError, match="matches no attention module; there are") as error:
        mc.qk_clip(PARAMS, STATS, ignore=ignore)
    assert f"ignore={bad!r}" in str(error.value)
