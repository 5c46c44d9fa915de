"""`qk_clip` and `muonclip` with an analysis instead of a head layout."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.support.program_models import FAMILIES, SIZES

HEADS, WIDTH = SIZES["h"], SIZES["k"]
LAYOUTS = {
    "gpt_scanned": mc.MultiHeadLayout(query="q", key="k", value="v"),
    "llama": mc.MultiHeadLayout(query="q", key="k", value="v"),
    "latent": mc.MLALayout(nope_dim=8, rope_dim=4, value_dim=8, query="q_b", key_value="kv_b"),
}


@pytest.fixture(scope="module", params=sorted(LAYOUTS))
def case(request):
    family = FAMILIES[request.param]
    params = family.params()
    with jax.numpy_rank_promotion("allow"):
        analysis = mc.analyze(family.fn, params, *family.args)
    ((path, (heads, *_, layers)),) = ((p, s[:4]) for p, s in family.sites.items())
    module = "attn" if request.param == "latent" else path
    shape = (layers, 2, heads) if layers > 1 else (2, heads)
    x = np.random.default_rng(5).uniform(0.5, 4.0, shape).astype(np.float32)
    return params, analysis, LAYOUTS[request.param], (path, module), jnp.asarray(x)


def nested(path, x):
    tree = {"max_logits": x}
    for part in reversed(path.split("/") if path else ()):
        tree = {part: tree}
    return tree


@pytest.mark.parametrize(
    "settings",
    [{}, {"alpha": 0.3}, {"shared_key": "group"}, {"shared_key": "exact", "alpha": 0.7}],
    ids=str,
)
def test_clip_equals_a_clip_with_the_right_layout(case, settings):
    params, analysis, layout, (path, module), x = case
    by_analysis = jax.jit(lambda p, s: mc.qk_clip(p, s, analysis, threshold=1.0, **settings))
    by_layout = jax.jit(lambda p, s: mc.qk_clip(p, s, layout, threshold=1.0, **settings))
    found, info = by_analysis(params, nested(path, x))
    expected, expected_info = by_layout(params, nested(module, x))
    for (name, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        # "exact" divides by the factor of a group, for which XLA has two ways: the measured factors
        # differ by 1 ulp, and the weights by 2.
        most = 2 if settings.get("shared_key") == "exact" else 0
        np.testing.assert_array_max_ulp(a, b, maxulp=most)
        assert a.dtype == b.dtype, name
    assert info.clipped_heads == expected_info.clipped_heads > 0
    np.testing.assert_array_equal(info.gamma[path], expected_info.gamma[module])
    changed = [
        jax.tree_util.keystr(name, simple=True, separator="/")
        for (name, a), b in zip(
            jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(params), strict=True
        )
        if (a != b).any()
    ]
    assert 0 < len(changed) <= 2
    assert {*changed} <= {*analysis.attention[0].query, *analysis.attention[0].key}


@pytest.mark.parametrize("name", ["tied_flat", "llama", "gemma", "latent", "fused_with_sink"])
def test_clip_brings_logits_to_the_threshold(name):
    family = FAMILIES[name]
    params = family.params()
    analysis = mc.analyze(family.fn, params, *family.args)
    fn = jax.jit(mc.with_max_logits(family.fn, expect=1))
    _, stats = fn(params, *family.args)
    before = _tops(stats)
    threshold = float(np.median(before)) * 0.7
    clipped, info = mc.qk_clip(params, stats, analysis, threshold=threshold)
    after = _tops(fn(clipped, *family.args)[1])
    over = before > threshold
    np.testing.assert_allclose(after[over], threshold, rtol=1e-5)
    # Without a shared key, calm heads keep every bit.
    np.testing.assert_allclose(after[~over], before[~over], rtol=1e-5)
    assert info.clipped_heads == over.sum() > 0


def _tops(stats):
    (x,) = jax.tree.leaves(stats)
    return np.asarray(x).reshape(-1, x.shape[-1]).max(0)


def test_stored_analysis_clips_equally(case):
    params, analysis, _, (path, _), x = case
    stored = mc.Analysis.from_json(analysis.to_json())
    found, _ = mc.qk_clip(params, nested(path, x), stored, threshold=1.0)
    expected, _ = mc.qk_clip(params, nested(path, x), analysis, threshold=1.0)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_other_parameters_keep_every_bit():
    family = FAMILIES["gemma"]
    params = family.params()
    analysis = mc.analyze(family.fn, params, *family.args)
    x = jnp.full((2, 4), 400.0)
    clipped, _ = mc.qk_clip(params, nested("attn", x), analysis)
    kv = np.asarray(clipped["attn"]["kv"] / params["attn"]["kv"])
    assert (kv == 1).all()  # shared_key="query": keys stay, and so do the values beside them
    clipped, _ = mc.qk_clip(params, nested("attn", x), analysis, shared_key="group")
    kv = np.asarray(clipped["attn"]["kv"] / params["attn"]["kv"])
    np.testing.assert_allclose(kv[0], 0.5, rtol=1e-6)
    assert (kv[1] == 1).all()


def test_training_equals_training_with_recorded_max_logits():
    """Thirty steps with clips: by an analysis, and by a layout with max logits from a tap."""
    family = FAMILIES["llama"]
    params = family.params(1.5)
    analysis = mc.analyze(family.fn, params, *family.args)
    numbers = analysis.dimension_numbers

    def recorded(params, *args):
        found = {}

        def tap(path, logits):
            found[path] = {"max_logits": jnp.max(logits, (-2, -1))}

        family.fn(params, *args, tap=tap)
        return found

    loss_fn, recorded = jax.jit(jax.value_and_grad(family.fn)), jax.jit(recorded)
    tx = mc.muonclip(0.01, threshold=None, muon_weight_dimension_numbers=numbers)
    update = jax.jit(tx.update)

    def plain(params, *args):
        """Max logits of a forward pass of its own, beside the loss of the plain function."""
        loss, grads = loss_fn(params, *args)
        return (loss, recorded(params, *args)), grads

    def trained(value_and_grad, layout):
        # A program of its own: beside other sums, XLA would round products once.
        clip = jax.jit(lambda params, stats: mc.qk_clip(params, stats, layout, threshold=3.0)[0])
        state, seen, now = tx.init(params), [], params
        for _ in range(30):
            (loss, stats), grads = value_and_grad(now, *family.args)
            seen.append((loss, stats))
            updates, state = update(grads, state, now)
            now = clip(optax.apply_updates(now, updates), stats)
        return now, seen

    fn = mc.with_max_logits(family.fn, expect=1)
    new, seen = trained(jax.jit(jax.value_and_grad(fn, has_aux=True)), analysis)
    old, before = trained(plain, LAYOUTS["llama"])
    jax.tree.map(np.testing.assert_array_equal, (new, seen), (old, before))
    tops = np.array([_tops(stats) for _, stats in seen])
    assert (tops > 3.0).sum() > 10


def test_errors_name_what_does_not_fit(case):
    params, analysis, _, (path, _), x = case
    with pytest.raises(ValueError, match="no max logits"):
        mc.qk_clip(params, {"other": {"max_logits": x}}, analysis)
    with pytest.raises(ValueError, match=r"max logits \(.*\), expected"):
        mc.qk_clip(params, nested(path, x[..., :-1]), analysis)
    with pytest.raises(ValueError, match="is no max logits"):
        mc.qk_clip(params, {"sum": x}, analysis)
    with pytest.raises(ValueError, match="matches no attention"):
        mc.qk_clip(params, nested(path, x), analysis, ignore="nothing/*")
    fewer = {k: v for k, v in params.items() if k not in ("attn", "h")}
    with pytest.raises(ValueError, match="no such parameter"):
        mc.qk_clip(fewer, nested(path, x), analysis)


def test_skipped_sites_are_counted(case):
    params, analysis, *_ = case
    with pytest.warns(UserWarning, match="skipped because of strict=False"):
        _, info = mc.qk_clip(params, {}, analysis, strict=False)
    assert info.skipped_modules == 1


def test_normalized_queries_are_an_error_unless_watched():
    family = FAMILIES["qk_norm"]
    params = family.params()
    analysis = mc.analyze(family.fn, params, *family.args)
    stats = {"attn": {"max_logits": jnp.full((2, 4), 400.0)}}
    with pytest.raises(ValueError, match="normalized after their projection"):
        mc.qk_clip(params, stats, analysis)
    same, info = mc.qk_clip(params, stats, analysis, threshold=float("inf"))
    assert info.max_logit == 400.0
    jax.tree.map(np.testing.assert_array_equal, same, params)
    ignored, _ = mc.qk_clip(params, stats, analysis, ignore="attn")
    jax.tree.map(np.testing.assert_array_equal, ignored, params)


def test_muonclip_accepts_an_analysis():
    family = FAMILIES["llama"]
    params = family.params()
    analysis = mc.analyze(family.fn, params, *family.args)
    stats = {"attn": {"max_logits": jnp.full((2, 4), 160.0)}}
    tx = mc.muonclip(0.0, layout=analysis, muon_weight_dimension_numbers=analysis.dimension_numbers)
    updates, _ = tx.update(params, tx.init(params), params, max_logits=stats)
    new = optax.apply_updates(params, updates)
    expected, _ = mc.qk_clip(params, stats, analysis)
    jax.tree.map(np.testing.assert_array_equal, new, expected)
