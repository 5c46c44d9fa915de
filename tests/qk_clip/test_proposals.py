"""Head layouts that errors propose for fused kernels, MLA and mixed layers run as they are."""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from muonclip_jax._head_layouts.module_names import names_fused_bias

pytestmark = pytest.mark.usefixtures("no_typecheck")
D, N, K, H, L = 32, 8, 2, 4, 3
FLAT = "inputs (heads head_dim)"
UNKNOWN = (
    "If you do not know, pass layout=mc.analyze(loss_fn, params, batch), which reads all of it "
    "from the program."
)


def tree(leaf="kernel", **shapes):
    return {name: {leaf: np.ones(shape, np.float32)} for name, shape in shapes.items()}


SEPARATE = tree(query=(D, N, H), key=(D, K, H), value=(D, K, H), out=(N, H, D))
FUSED = tree(qkv=(D, (N + 2 * K) * H), out=(N * H, D))
LATENT = tree(q_a=(D, 12), q_b=(12, N, 6), kv_a=(D, 10), kv_b=(8, N, 8), out=(N, 4, D))
MLA = mc.MLALayout(nope_dim=4, rope_dim=2, value_dim=4)
DEFAULT = mc.MultiHeadLayout()
GROUPED = mc.FusedQKVLayout(head_dim=H, num_kv_heads=K)


def clip(modules, layout: Any = DEFAULT, stat=(N,)):
    """Traces the clip, which checks the layout; nothing is compiled."""
    stats = {name: {"max_logits": jnp.zeros(stat)} for name in modules}
    return jax.eval_shape(lambda: mc.qk_clip(modules, stats, layout))


def error_of(modules, layout: Any = DEFAULT, stat=(N,)):
    with pytest.raises(ValueError, match="qk_clip: ") as error:
        clip(modules, layout, stat)
    return str(error.value)


def proposed_in(text):
    """The one layout argument that an error proposes, evaluated as a user would paste it."""
    ((argument),) = re.findall(r"^Pass layout=(.*)\.$", text, re.MULTILINE)
    return eval(argument, {"mc": mc})


CASES = {
    "grouped": (FUSED, (N,), GROUPED),
    "one head for each": (tree(qkv=(D, 3 * N * H), out=(N * H, D)), (N,), {"head_dim": H}),
    "one key head": (tree(qkv=(D, (N + 2) * H), out=(N * H, D)), (N,), {"num_kv_heads": 1}),
    "GPT-2": (tree(c_attn=(D, 3 * D), c_proj=(D, D)), (N,), {"qkv": "c_attn"}),
    "names of torch": (
        tree("weight", in_proj=(3 * D, D), out_proj=(D, D)),
        (N,),
        {
            "qkv": "in_proj",
            "kernel": "(heads head_dim) inputs",
            "scaled_leaves": ("weight", "bias", "lora_b"),
        },
    ),
    "Wqkv": (
        tree(Wqkv=(D, (N + 2 * K) * H), out_proj=(D, D)),
        (N,),
        {"qkv": "Wqkv", "num_kv_heads": K},
    ),
    "heads wider than the model": (
        tree(qkv=(D, (N + 2 * K) * 16), out=(N * 16, D)),
        (N,),
        {"head_dim": 16, "num_kv_heads": K},
    ),
    "an axis of heads": (
        tree(qkv=(D, N + 2 * K, H), out=(N, H, D)),
        (N,),
        {"kernel": "inputs heads head_dim", "num_kv_heads": K},
    ),
    "an axis of three": (
        tree(qkv=(D, 3, N, H), out=(N, H, D)),
        (N,),
        {"kernel": "inputs 3 heads head_dim"},
    ),
    "three in a head": (
        tree(qkv=(D, N, 3 * H), out=(N, H, D)),
        (N,),
        {"kernel": "inputs heads (3 head_dim)"},
    ),
    "stacked": (jax.tree.map(lambda x: np.stack([x] * L), FUSED), (L, 5, N), GROUPED),
    "MLA": (LATENT, (N,), MLA),
    "MLA of DeepSeek-V3": (
        tree(
            q_a_proj=(D, 12),
            q_b_proj=(12, N * 6),
            kv_a_proj_with_mqa=(D, 10),
            kv_b_proj=(8, N * 8),
            o_proj=(N * 4, D),
        ),
        (N,),
        mc.MLALayout(
            query="q_b_proj",
            key_value="kv_b_proj",
            kernel=FLAT,
            nope_dim=4,
            rope_dim=2,
            value_dim=4,
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_shapes_and_max_logits_fill_in_the_proposal(case):
    params, stat, expected = CASES[case]
    text = error_of({"attn": params}, stat=stat)
    found = proposed_in(text)
    if isinstance(expected, dict):
        expected = mc.FusedQKVLayout(**{"head_dim": H, **expected})
    assert found == expected
    _, info = clip({"attn": params}, found, stat)
    assert info.gamma["attn"].shape == (stat[:-2] + stat[-1:])
    assert (UNKNOWN in text) == (case != "an axis of three")


def test_error_of_mixed_layers_proposes_all_layouts():
    text = error_of({"a": SEPARATE, "b": FUSED, "c": LATENT, "d": FUSED})
    assert text == (
        "qk_clip: 3 modules do not fit the layout MultiHeadLayout(query='query', key='key').\n"
        "  b: no module 'query' and no 'key'; there are 'out', 'qkv'.\n"
        "  c: no module 'query' and no 'key'; there are 'kv_a', 'kv_b', 'out', 'q_a', 'q_b'.\n"
        "  d: no module 'query' and no 'key'; there are 'out', 'qkv'.\n"
        "Pass layout=(mc.MultiHeadLayout(query='query', key='key'), "
        "mc.FusedQKVLayout(qkv='qkv', head_dim=4, num_kv_heads=2), "
        "mc.MLALayout(query='q_b', key_value='kv_b', nope_dim=4, rope_dim=2, value_dim=4)).\n"
        "No shape shows the columns of a fused kernel: order='sectioned', the default, is all "
        "queries, all keys, all values, of one width and nothing else. Pass order='interleaved' if "
        "the queries, the key and the value of each key head are side by side.\n"
        "No shape shows the order of the columns of latent attention: each head of an MLALayout "
        "is its key, then its value; and in the queries the rotary columns last, or first with "
        f"rope_first=True.\n{UNKNOWN}"
    )


@pytest.mark.parametrize("layout", [GROUPED, MLA])
def test_separate_kernels_get_a_proposal_beside_layouts_of_another_kind(layout):
    modules = {"a": FUSED, "b": LATENT, "c": SEPARATE}
    layouts = proposed_in(error_of(modules, layout))
    assert {*layouts} == {GROUPED, MLA, mc.MultiHeadLayout()}
    assert clip(modules, layouts)[1].gamma.keys() == modules.keys()


def test_a_proposal_keeps_the_settings_of_a_fused_layout():
    layout = mc.FusedQKVLayout(head_dim=H, order="interleaved", split_values=False)
    text = error_of({"attn": FUSED}, layout)
    assert proposed_in(text) == mc.FusedQKVLayout(
        head_dim=H, num_kv_heads=K, order="interleaved", split_values=False
    )
    assert "No shape" not in text


def test_fused_kernels_without_an_output_projection_keep_the_given_width():
    alone = {"attn": {"qkv": FUSED["qkv"]}}
    assert proposed_in(error_of(alone, mc.FusedQKVLayout(head_dim=H))) == GROUPED
    assert "head_dim, num_kv_heads and order, which the shapes do not show" in error_of(alone)


def test_error_lists_the_fields_that_no_shape_shows():
    text = error_of({"attn": tree(qkv=(D, 49), out=(D, D)), "mlp": SEPARATE})
    assert text.endswith(
        "'qkv' holds queries, keys and values: pass a FusedQKVLayout with qkv='qkv' and its "
        f"kernel, head_dim, num_kv_heads and order, which the shapes do not show.\n{UNKNOWN}"
    )


@pytest.mark.parametrize("names", ["in_proj_weight in_proj_bias", "wqkv bqkv", "b_qkv w_qkv"])
def test_a_bias_beside_a_fused_kernel_is_named(names):
    kernel, bias = sorted(names.split(), key=names_fused_bias)
    shapes = {kernel: (D, 3 * N * H), bias: (3 * N * H,)}
    params = {"attn": {n: np.ones(shape) for n, shape in shapes.items()} | tree(out=(N * H, D))}
    layout = proposed_in(error_of(params))
    assert (layout.qkv, layout.scaled_leaves[-1]) == (kernel, bias)
    without = mc.FusedQKVLayout(qkv=kernel, head_dim=H)
    assert f"{bias!r} looks like a bias of queries or keys" in error_of(params, without)


@pytest.mark.nightly
def test_a_bias_beside_a_fused_kernel_is_scaled_with_it():
    draw = np.random.default_rng(0).normal
    kernel, bias = jnp.float32(draw(size=(D, 3 * N * H))), jnp.float32(draw(size=3 * N * H))
    beside = {"in_proj_weight": kernel, "in_proj_bias": bias} | tree(out_proj=(N * H, D))
    inside = {"qkv": {"kernel": kernel, "bias": bias}}
    stats = {"attn": {"max_logits": jnp.full(N, 400.0)}}
    found = mc.qk_clip({"attn": beside}, stats, proposed_in(error_of({"attn": beside})))[0]["attn"]
    layout = mc.FusedQKVLayout(head_dim=H)
    expected = mc.qk_clip({"attn": inside}, stats, layout)[0]["attn"]["qkv"]
    np.testing.assert_array_equal(found["in_proj_weight"], expected["kernel"])
    np.testing.assert_array_equal(found["in_proj_bias"], expected["bias"])


def test_norms_of_another_kind_of_module_are_not_declared_by_the_user():
    norms = tree("scale", q_norm=(H,), k_norm=(H,))
    modules = {"a": SEPARATE | tree("scale", norm=(D,)), "b": FUSED | norms}
    text = error_of(modules, mc.MultiHeadLayout(qk_norm=()))
    assert "Layout(" not in text.partition("\n")[2]
    assert "'q_norm' normalizes queries or keys." in text


OTHER_COLUMNS = {
    "keys and values beside queries": tree(c_attn=(D, 2 * D), q_attn=(D, D), c_proj=(D, D)),
    "a gate": tree(qkv_gate=(D, 24 * H), out=(N * H, D)),
    "a feed-forward layer": tree(qkv_mlp=(D, 7 * D)),
    "without an output projection": tree(qkv=(64, 4 * 64), mlp=(64, 64)),
}


@pytest.mark.parametrize("case", OTHER_COLUMNS)
def test_other_columns_than_queries_keys_and_values_get_no_proposal(case):
    assert "Layout(" not in error_of({"attn": OTHER_COLUMNS[case]}).partition("\n")[2]


def test_a_norm_of_latent_vectors_is_no_projection():
    norms = tree("scale", q_norm=(12,), kv_norm=(8,))
    assert proposed_in(error_of({"attn": LATENT | norms})) == MLA


def test_layouts_that_fit_the_modules_of_each_other_are_not_joined():
    same = tree(qkv=(24, 48))  # 16 heads of 3 columns, or 12 of 4; b/out has a side of 8 x 3 too
    modules = {"a": {**same, **tree(out=(24, 24))}, "b": {**same, **tree(out=(N, 4, 24))}}
    text = error_of(modules)
    assert "Pass layout=" not in text
    assert "b fits mc.FusedQKVLayout(qkv='qkv', head_dim=4, num_kv_heads=2)." in text
    assert "so that no tuple is right here: pass layout=mc.analyze(loss_fn, params, batch)." in text


def test_each_option_describes_the_module_that_has_a_choice():
    modules = {"a": tree(qkv=(D, D), out=(4, 4, D)), "b": FUSED}
    stats = {"a": {"max_logits": jnp.zeros(4)}, "b": {"max_logits": jnp.zeros(N)}}
    with pytest.raises(ValueError, match="By the shapes, pass ") as error:
        mc.qk_clip(modules, stats)
    (line,) = re.findall(r"By the shapes, pass (.*)\.$", str(error.value), re.MULTILINE)
    one, two = [eval(f"dict({x})", {"mc": mc})["layout"] for x in line.split(" or ")]
    assert (one, two[0].kernel, two[1]) == (GROUPED, "(heads head_dim) inputs", GROUPED)


@pytest.mark.parametrize("odd", [{"kv_a": (D, 11)}, {"out": (N, 3, D)}])
def test_latent_kernels_that_do_not_fit_each_other_get_no_proposal(odd):
    text = error_of({"attn": {**LATENT, **tree(**odd)}})
    assert "Layout(" not in text.partition("\n")[2]
    assert "pass an MLALayout with these names and its nope_dim, rope_dim, value_dim" in text
    assert text.endswith(UNKNOWN)


def test_norms_are_named_where_they_are_the_reason():
    text = error_of({"attn": {**FUSED, **tree("scale", q_norm=(H,), k_norm=(H,))}})
    assert "'q_norm' normalizes queries or keys. A norm between projection and logits" in text
    assert "Layout(" not in text.partition("\n")[2]


def test_layers_of_unequal_widths_share_a_pattern():
    modules = {
        "a": tree(q_proj=(D, D), k_proj=(D, D), v_proj=(D, D), o_proj=(D, D)),
        "b": tree(q_proj=(D, 64), k_proj=(D, 64), v_proj=(D, 64), o_proj=(64, D)),
    }
    text = error_of(modules)
    (both,) = re.findall(r"^Pass layout=(.*)\.$|By the shapes, pass (.*)\.$", text, re.MULTILINE)
    options = [eval(f"dict({one})", {"mc": mc})["layout"] for one in "".join(both).split(" or ")]
    assert len(options) == 2
    for layout in options:
        assert clip(modules, layout)[1].gamma.keys() == modules.keys()


class Attention(nn.Module):
    """Grouped-query attention, with one projection or three."""

    is_fused: bool

    @nn.compact
    def __call__(self, x):
        if self.is_fused:
            columns = nn.Dense((N + 2 * K) * H, name="c_attn")(x)
            query, key, value = jnp.split(columns, (N * H, (N + K) * H), axis=-1)
        else:
            query, key, value = (
                nn.Dense(n * H, name=f"{name}_proj")(x)
                for name, n in (("q", N), ("k", K), ("v", K))
            )
        query, key, value = (a.reshape(*a.shape[:-1], -1, H) for a in (query, key, value))
        mc.linen.sow_max_logits(self, mc.max_attention_logit(query, key))
        out = jax.nn.dot_product_attention(query, key, value).reshape(*x.shape[:-1], N * H)
        return nn.Dense(D, name="c_proj" if self.is_fused else "o_proj")(out)


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + Attention(is_fused=bool(i), name=f"layers_{i}")(x)
        return x


def test_proposal_for_a_mixed_linen_model_clips_as_its_analysis(rank_promotion):
    x, draw = jnp.ones((2, 5, D)), np.random.default_rng(0).normal
    init = jax.eval_shape(Model().init, jax.random.key(1), x)["params"]
    params = jax.tree.map(lambda leaf: draw(size=leaf.shape).astype(np.float32), init)
    run = lambda p, x: Model().apply({"params": p}, x, mutable=["intermediates"])  # noqa: E731
    stats = jax.tree.map(lambda s: np.full(s.shape, 400.0), jax.eval_shape(run, params, x)[1])
    with pytest.raises(ValueError, match="2 modules do not fit") as error:
        mc.qk_clip(params, stats)
    layout = proposed_in(str(error.value))
    assert layout == (
        mc.MultiHeadLayout(query="q_proj", key="k_proj", kernel=FLAT, head_dim=H),
        mc.FusedQKVLayout(qkv="c_attn", head_dim=H, num_kv_heads=K),
    )
    analysis = mc.analyze(lambda p, x: run(p, x)[0], params, x)
    clips = jax.jit(lambda p: [mc.qk_clip(p, stats, one) for one in (layout, analysis)])
    (found, info), (expected, _) = clips(params)
    assert info.clipped_heads == 2 * N
    jax.tree.map(lambda a, b: np.testing.assert_array_max_ulp(a, b, maxulp=1), found, expected)
