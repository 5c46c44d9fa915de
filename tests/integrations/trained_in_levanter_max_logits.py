"""Max logits leave Levanter's step as gradients, and the clip scales what they belong to."""

import dataclasses

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from haliax.state_dict import to_torch_compatible_state_dict
from levanter.layers.attention import AttentionConfig, AttentionMask
from levanter.optim.model_averaging import EmaModelAveragingConfig
from levanter.trainer import Trainer

from muonclip_jax.integrations.levanter import attention as clip_of_attention
from tests.integrations.levanter_models import build
from tests.integrations.levanter_trainer import (
    BATCH,
    OPTIMIZER,
    SMALL_RATE,
    batches,
    equal,
    gradients,
    loud,
    masked_maximum,
    max_logits_by_hand,
    train,
    trainer_of,
)

pytestmark = pytest.mark.usefixtures("rank_promotion")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    with jax.numpy_rank_promotion("allow"):
        return gradients(trainer_of(tmp_path_factory.mktemp("whole")))


def test_micro_batches_equal_one_batch(whole, tmp_path):
    """Eight devices multiply parts of other sizes, so that products differ in the last bit."""
    trainer = trainer_of(tmp_path, per_device_parallelism=1)
    assert trainer.config.microbatch_size * 4 == BATCH
    _, _, metrics = gradients(trainer)
    (slot,), (expected,) = metrics["qk_clip_slots"], whole[2]["qk_clip_slots"]
    np.testing.assert_allclose(slot.value.array, expected.value.array, rtol=1e-6)
    assert (slot.count.array == 1).all()
    by_hand = max_logits_by_hand(loud(build("llama")), next(batches()))
    np.testing.assert_allclose(slot.value.array[0], by_hand, rtol=1e-5)


def test_layers_without_a_scan_have_slots_of_their_own(tmp_path):
    _, _, metrics = gradients(trainer_of(tmp_path), "llama_unscanned")
    first, second = metrics["qk_clip_slots"]
    by_hand = max_logits_by_hand(loud(build("llama_unscanned")), next(batches()))
    np.testing.assert_allclose(first.value.array, by_hand, rtol=1e-5)
    assert (first.count.array == 1).all()
    assert (second.count.array == 1).all()


def test_slots_stay_out_of_gradients_and_the_optimizer(whole, tmp_path):
    plain = dataclasses.replace(OPTIMIZER, qk_clip_threshold=None)
    _, grads, _ = gradients(trainer_of(tmp_path, plain, Trainer))
    assert jax.tree.structure(grads) == jax.tree.structure(whole[1])
    assert equal(grads, whole[1])
    # max_grad_norm is in front of Muon: with slots in the gradient, its norm would differ.
    watching = dataclasses.replace(OPTIMIZER, qk_clip_threshold=float("inf"))
    clipped, *_ = train(trainer_of(tmp_path / "a", watching), stop=2)
    expected, *_ = train(trainer_of(tmp_path / "b", plain, Trainer), stop=2)
    assert equal(clipped.model, expected.model)
    assert equal(clipped.opt_state, expected.opt_state)
    names = [to_torch_compatible_state_dict(state.model).keys() for state in (clipped, expected)]
    assert names[0] == names[1]


def test_bfloat16_does_not_round_the_statistic(tmp_path):
    import jmp

    policy = jmp.get_policy("params=float32,compute=bfloat16,output=float32")
    _, _, metrics = gradients(trainer_of(tmp_path, mp=policy))
    s = metrics["qk_clip_slots"][0].value.array
    assert s.dtype == jnp.float32
    assert not np.array_equal(s, s.astype(jnp.bfloat16).astype(jnp.float32))


def masks():
    Batch, Pos = hax.Axis("batch", 2), hax.Axis("position", 16)
    Key = Pos.alias("key_position")
    rng = np.random.default_rng(1)
    ids = hax.named(np.sort(rng.integers(3, size=(2, 16)), axis=1), (Batch, Pos))
    pairs = hax.named((rng.random((16, 16)) < 0.3) | np.eye(16, dtype=bool), (Pos, Key))
    causal = AttentionMask.causal()
    return {
        "none": None,
        "causal": causal,
        "offset": AttentionMask.causal(offset=2),
        "window": AttentionMask.causal(sliding_window=3),
        "both ways": AttentionMask.bidirectional_sliding_window(2),
        "segments": causal.with_segment_ids(ids),
        "segments of keys": causal.with_segment_ids(ids, ids.rename({"position": "key_position"})),
        "explicit": AttentionMask.explicit(pairs),
        "array": pairs,
        "array of the batch": pairs.broadcast_axis(Batch),
        "causal and explicit": causal & AttentionMask.explicit(pairs),
    }


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("name", masks())
def test_max_logits_see_the_pairs_of_the_mask(name, window):
    mask = masks()[name]
    config = AttentionConfig(hax.Axis("embed", 32), 4, 2, sliding_window=window)
    axes = (hax.Axis("batch", 2), hax.Axis("position", 16), config.KVHeads)
    of_queries, of_keys = (config.QHeadsPerGroup, config.HeadSize), (config.HeadSize,)
    query = hax.random.normal(jax.random.PRNGKey(0), (*axes, *of_queries))
    key = hax.random.normal(jax.random.PRNGKey(1), (*axes, *of_keys))
    found = clip_of_attention._max_logits(query, key, mask, config)
    if window is not None and isinstance(mask, AttentionMask):  # as Attention does
        mask = mask.with_sliding_window(window)
    np.testing.assert_allclose(found, masked_maximum(query, key, mask), rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen"])
def test_a_clip_scales_weights_and_biases(name):
    model = build(name)
    layer = lambda m: m.transformer.layers.stacked.self_attn  # noqa: E731
    attention = layer(model)
    if attention.q_proj.bias is not None:  # biases start as zeros
        where = lambda a: (a.q_proj.bias, a.k_proj.bias)  # noqa: E731
        attention = eqx.tree_at(where, attention, tuple(x + 1 for x in where(attention)))
        model = eqx.tree_at(layer, model, attention)
    s = hax.named(np.array([[[2, 1], [8, 0.5]]] * 2, np.float32), attention.q_proj.weight.axes[:3])
    slot = clip_of_attention.MaxLogits(s, s * 0 + 1)
    new, metrics, counts = clip_of_attention.clipped(model, model, [slot], 2.0)
    factor = np.array([[[1, 1], [0.25, 1]]] * 2)
    assert metrics["qk_clip/clipped_heads"] == 2
    assert counts == {"transformer/layers/stacked/self_attn": pytest.approx([1, 1])}
    for leaf in ("weight", "bias"):
        old = getattr(attention.q_proj, leaf)
        if old is not None:
            scaled = getattr(layer(new).q_proj, leaf)
            assert scaled.axes == old.axes
            by = factor.reshape(*factor.shape, *(1,) * (old.array.ndim - 3))
            np.testing.assert_allclose(scaled.array, old.array * by, rtol=1e-6)
    assert equal(layer(new).k_proj, attention.k_proj)  # its queries share the key
    assert equal(layer(new).v_proj, attention.v_proj)


def test_the_average_of_the_model_is_of_clipped_weights(tmp_path):
    settings = EmaModelAveragingConfig(beta=0.5)
    trainer = trainer_of(tmp_path, SMALL_RATE, model_averaging=settings)
    state, *_ = train(trainer, stop=1)
    attention = lambda m: m.transformer.layers.stacked.self_attn.q_proj.weight.array  # noqa: E731
    before, after = attention(loud(build("llama"))), attention(state.model)
    average = attention(state.model_averaging.model_params)
    np.testing.assert_allclose(average, 0.5 * before + 0.5 * after, rtol=1e-5)
    assert np.abs(after - before).max() > 0.1
