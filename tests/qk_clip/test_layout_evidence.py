"""Layouts that would scale the wrong columns raise, and every proposed layout fits."""

import re
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc

pytestmark = pytest.mark.usefixtures("no_typecheck")
D, N, K, H, L = 10, 4, 2, 3, 5
FLAT = "inputs (heads head_dim)"


def tree(**shapes):
    """Parameters by name: a shape is a kernel, a pair of leaf name and shape is that leaf."""
    named = {n: s if isinstance(s[0], str) else ("kernel", s) for n, s in shapes.items()}
    return {name: {leaf: jnp.ones(shape)} for name, (leaf, shape) in named.items()}


def error_of(params, layout, *stat):
    with pytest.raises(ValueError, match="qk_clip: ") as error:
        mc.qk_clip(params, {"max_logits": jnp.full(stat or (N,), 400.0)}, layout)
    return str(error.value)


def layouts_in(text):
    """Every layout that the last lines of an error propose."""
    fixes = "\n".join(line for line in text.splitlines()[1:] if not line.startswith("  "))
    calls = re.findall(r"\w+Layout\((?:[^()']|'[^']*'|\((?:[^()']|'[^']*')*\))*\)", fixes)
    return [eval(f"mc.{call}", {"mc": mc}) for call in calls]


DEFAULT = mc.MultiHeadLayout()
PROPOSALS = {
    "flat, as in Llama": (tree(q_proj=(D, 12), k_proj=(D, 6), v_proj=(D, 6)), DEFAULT, (N,), 1),
    "outputs first": (tree(query=(12, D), key=(6, D), value=(6, D)), DEFAULT, (N,), 1),
    "square": (tree(query=(12, 12), key=(12, 12)), DEFAULT, (N,), 2),
    "Equinox": (
        tree(query_proj=("weight", (12, D)), key_proj=("weight", (12, D))),
        DEFAULT,
        (N,),
        1,
    ),
    "heads first": (tree(q_einsum=("w", (N, D, H)), k=("w", (N, D, H))), DEFAULT, (N,), 1),
    "Gemma": (tree(q_einsum=("w", (N, D, H)), kv_einsum=("w", (2, K, D, H))), DEFAULT, (N,), 1),
    "fused keys and values": (tree(to_q=(D, 12), to_kv=(D, 12)), DEFAULT, (N,), 2),
    "fused keys and values, three axes": (tree(q=(D, N, H), kv=(D, 2, N, H)), DEFAULT, (N,), 1),
    "Levanter": (
        tree(q_proj=("weight", (K, 2, H, D)), k_proj=("weight", (K, H, D))),
        DEFAULT,
        (N,),
        1,
    ),
    "stacked and flat": (tree(query=(L, D, 12), key=(L, D, 6)), DEFAULT, (L, N), 1),
    "an axis of layers elsewhere": (
        tree(query=(D, L, N, H), key=(D, L, K, H)),
        DEFAULT,
        (L, N),
        1,
    ),
    "names alone": (tree(wq=(D, N, H), wk=(D, K, H), wv=(D, K, H)), DEFAULT, (7, N), 1),
    "another flat order": (
        tree(query=(12, D), key=(6, D)),
        mc.MultiHeadLayout(kernel=FLAT, head_dim=H),
        (N,),
        1,
    ),
    "latent, flat": (
        tree(q_b_proj=(D, N * 5), kv_b_proj=(D, N * 7)),
        mc.MLALayout(nope_dim=3, rope_dim=2, value_dim=4),
        (N,),
        1,
    ),
    "latent, outputs first": (
        tree(q_b=(N * 5, D), kv_b=(N * 7, D)),
        mc.MLALayout(nope_dim=3, rope_dim=2, value_dim=4),
        (N,),
        1,
    ),
    "fused, Gemma": (
        tree(qkv_einsum=("w", (3, N, D, H))),
        mc.FusedQKVLayout(head_dim=H),
        (N,),
        1,
    ),
    "fused, outputs first": (
        tree(qkv=(12 * H, D)),
        mc.FusedQKVLayout(head_dim=H),
        (N,),
        1,
    ),
}


@pytest.mark.parametrize("case", PROPOSALS)
def test_each_proposed_layout_fits(case):
    params, layout, stat, count = PROPOSALS[case]
    found = layouts_in(error_of(params, layout, *stat))
    assert len(found) == count
    for proposed in found:
        mc.qk_clip(params, {"max_logits": jnp.full(stat, 400.0)}, proposed)


NO_PROPOSAL = {
    "widths that no pattern explains": (tree(query=(D, 13), key=(D, 7)), DEFAULT, (N,)),
    "max logits of rows": (tree(query=(D, N, H), key=(D, K, H)), DEFAULT, (N, 1)),
    "keys that are queries": (tree(q_proj=(D, N, H), v_proj=(D, K, H)), DEFAULT, (N,)),
    "a norm of queries": (
        tree(q_proj=(D, N, H), k_proj=(D, K, H), q_norm=("scale", (H,))),
        DEFAULT,
        (N,),
    ),
}


@pytest.mark.parametrize("case", NO_PROPOSAL)
def test_no_layout_is_proposed_where_none_fits(case):
    params, layout, stat = NO_PROPOSAL[case]
    assert layouts_in(error_of(params, layout, *stat)) == []


def test_proposals_for_two_kinds_of_modules_fit_together():
    params = {
        "a": tree(query=(D, N, H), key=(D, K, H)),
        "b": tree(q_proj=(D, 12), k_proj=(D, 6)),
        "c": tree(q_b=(D, N * 5), kv_b=(D, N * 7)),
    }
    stats = {name: {"max_logits": jnp.full(N, 400.0)} for name in params}
    layouts = (DEFAULT, mc.MLALayout(nope_dim=3, rope_dim=2, value_dim=4))
    with pytest.raises(ValueError, match="Pass layout=") as error:
        mc.qk_clip(params, stats, layouts)
    text = str(error.value).partition("Pass layout=")[2].removesuffix(".")
    _, info = mc.qk_clip(params, stats, eval(text, {"mc": mc}))
    assert info.clipped_heads == 3 * N


def test_the_layout_that_fits_is_used_among_equal_names():
    params = {"local": tree(q=(D, 12), k=(D, 6)), "global": tree(q=(D, 24), k=(D, 12))}
    stats = {name: {"max_logits": jnp.full(N, 400.0)} for name in params}
    named: dict[str, Any] = {"query": "q", "key": "k", "kernel": FLAT}
    layouts = tuple(mc.MultiHeadLayout(**named, head_dim=width) for width in (H, 2 * H))
    _, info = mc.qk_clip(params, stats, layouts)
    assert info.clipped_heads == 2 * N


# Kernels that the layout does not describe.

NAMES = {"query": "q", "key": "k"}
WRONG = {
    "rows for heads": (tree(q=(D, 12), k=(D, 6)), {}, (N, 1), "has 4 heads of head_dim 3, but"),
    "gates": (tree(q=(D, 24), k=(D, 6)), {}, (N,), "that hold a gate too need query_dim="),
    "a wrong width": (
        tree(q=(D, 12), k=(D, 6)),
        {"head_dim": 4},
        (N,),
        "has 3 heads of head_dim 4",
    ),
    "a key of another width": (tree(q=(D, 12), k=(D, 8)), {}, (N,), "does not divide into"),
    "too many key heads": (tree(q=(D, 12), k=(D, 24)), {}, (N,), "8 key heads, which do not fit"),
    "keys and values by name": (
        tree(q=(D, 12), to_kv=(D, 12)),
        {"key": "to_kv"},
        (N,),
        "seems to hold keys and values, so its key heads do not fit",
    ),
    "keys and values by siblings": (
        tree(q=(D, 12), k=(D, 12), to_out=(12, D)),
        {},
        (N,),
        "no value module beside 'k', 'q', 'to_out'",
    ),
    "inputs and outputs swapped": (
        tree(q=(12, 12), k=(6, 12)),
        {},
        (N,),
        "equal ones under '(heads head_dim) inputs'",
    ),
    "a value module that is not there": (
        tree(q=(D, 12), k=(D, 6)),
        {"value": "v"},
        (N,),
        "no child 'v', which is value; there are 'k', 'q'",
    ),
    "groups that are not flattened": (
        tree(q=(K, 2, H, D), k=(K, H, D)),
        {"kernel": "kv_heads groups head_dim inputs"},
        (7, K, 2),
        "flatten its last two axes (kv_heads, groups)",
    ),
    "groups of another number of key heads": (
        tree(q=(K, 2, H, D), k=(1, H, D)),
        {"kernel": "kv_heads groups head_dim inputs"},
        (N,),
        "has 1 key heads, which do not fit the 4 heads",
    ),
    "a bias beside its projection": (
        tree(q=(D, 12), k=(D, 6)) | {"q_bias": jnp.ones(12)},
        {},
        (N,),
        "'q_bias' looks like a bias of queries or keys",
    ),
    "a 2 that is not there": (
        tree(q=(D, N, H), k=(3, K, D, H)),
        {"kernel": "inputs heads head_dim", "key_kernel": "2 heads inputs head_dim"},
        (N,),
        "does not divide into '2 heads inputs head_dim'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_layout_that_does_not_describe_the_kernels_raises(case):
    params, fields, stat, message = WRONG[case]
    layout = mc.MultiHeadLayout(**{**NAMES, "kernel": FLAT, "head_dim": H, **fields})
    assert message in error_of(params, layout, *stat)


DECLARED = {
    "keys by key_kernel": (tree(q=(D, 12), to_kv=(D, 12)), {"key": "to_kv", "key_kernel": FLAT}),
    "keys by value": (tree(q=(D, 12), kv=(D, 12), v=(D, 12)), {"key": "kv", "value": "v"}),
    "keys that are values": (tree(q=(D, 12), k=(D, 12), out=(12, D)), {"key_kernel": FLAT}),
    "cross attention": (tree(q=(12, 12), k=(6, 12)), {"key_kernel": FLAT}),
    "gates": (tree(q=(D, 24), k=(D, 6)), {"query_dim": H}),
    "a bias": (
        tree(q=(D, 12), k=(D, 6)) | {"q_bias": jnp.ones(12)},
        {"kept_leaves": ("q_bias",)},
    ),
}


@pytest.mark.parametrize("case", DECLARED)
def test_declared_layouts_are_accepted(case):
    params, fields = DECLARED[case]
    layout = mc.MultiHeadLayout(**{**NAMES, "kernel": FLAT, "head_dim": H, **fields})
    _, info = mc.qk_clip(params, {"max_logits": jnp.full(N, 400.0)}, layout)
    assert info.clipped_heads == N


def test_equal_layers_share_a_line():
    layers = {f"layers_{i}": {"attn": tree(query=(D, N, H), key=(D, 3, H))} for i in range(40)}
    stats = {name: {"attn": {"max_logits": jnp.ones(N)}} for name in layers}
    with pytest.raises(ValueError, match="40 modules do not fit") as error:
        mc.qk_clip(layers, stats)
    lines = str(error.value).splitlines()
    assert lines[1].startswith("  layers_0/attn and 39 more layers: key/kernel (10, 3, 3)")
    assert len(lines) == 2
    with pytest.raises(ValueError, match="layers_0/attn and 39 more layers: has no max_logits"):
        mc.qk_clip(layers, {})


def test_max_logits_of_a_parent_module_are_explained():
    params = {"block": {"attn": tree(query=(D, N, H), key=(D, K, H)), "mlp": tree(up=(D, D))}}
    for stats, where in (
        ({"max_logits": jnp.ones(N)}, "the root above it has"),
        ({"block": {"max_logits": jnp.ones(N)}}, "block above it has"),
    ):
        with pytest.raises(
            ValueError, match=re.escape(f"block/attn: has no max_logits, but {where}")
        ) as error:
            mc.qk_clip(params, stats)
        assert "queries and keys are in 'block/attn'" in str(error.value)
        assert "Sow in the attention module itself" in str(error.value)
        assert "nearest" not in str(error.value)


def test_the_whole_output_of_apply_can_be_passed():
    params = {"params": {"attn": tree(query=(D, N, H), key=(D, K, H))}}
    sown = {"intermediates": {"attn": {"max_logits": (jnp.full((7, N), 400.0),)}}, "cache": {}}
    assert mc.qk_clip(params, sown)[1].clipped_heads == N
    with pytest.raises(ValueError, match="attn: has no max_logits"):
        mc.qk_clip(params, {})


def test_weights_are_not_printed():
    params = tree(query=(D, N, H), key=(D, K, H))
    with pytest.raises(
        TypeError, match="layout must be a head layout or a tuple of head layouts, got "
    ):
        mc.qk_clip({"max_logits": jnp.ones(N)}, np.ones(3), cast(Any, params))


def attention_of(**shapes):
    return {"attn": {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}}


GATED = {"q_proj": (32, 64), "k_proj": (32, 8), "v_proj": (32, 8), "o_proj": (32, 32)}


def test_gates_in_flat_query_heads_raise():
    params, stats = attention_of(**GATED), {"attn": {"max_logits": jnp.full(8, 400.0)}}
    with pytest.raises(ValueError, match="query_dim") as error:
        mc.qk_clip(params, stats)
    assert "head_dim=8" not in str(error.value)
    flat: Any = {"query": "q_proj", "key": "k_proj", "kernel": "inputs (heads head_dim)"}
    with pytest.raises(ValueError, match=r"no side of 64; .* query_dim="):
        mc.qk_clip(params, stats, mc.MultiHeadLayout(**flat, head_dim=8))
    new, _ = mc.qk_clip(params, stats, mc.MultiHeadLayout(**flat, head_dim=4, query_dim=4))
    queries = np.asarray(new["attn"]["q_proj"]["kernel"]).reshape(32, 8, 2, 4)
    np.testing.assert_array_equal(queries[:, :, 1], 1)
    np.testing.assert_allclose(queries[:, :, 0], 0.25, rtol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [
        ({"c_attn": (8, 25), "c_proj": (8, 8)}, "FusedQKVLayout"),
        ({"q_b_proj": (4, 12), "kv_b_proj": (4, 16), "o_proj": (8, 8)}, "MLALayout"),
        (GATED, "MultiHeadLayout"),
    ],
)
def test_error_names_the_kind_of_layout_without_a_proposal(shapes, kind):
    stats = {"attn": {"max_logits": jnp.full(8, 400.0)}}
    with pytest.raises(ValueError, match=f"pass an? {kind} with"):
        mc.qk_clip(attention_of(**shapes), stats)


def test_queries_with_an_axis_of_groups_get_a_proposal():
    params = attention_of(query=(12, 2, 3, 4), key=(12, 2, 4), value=(12, 2, 4))
    stats = {"attn": {"max_logits": jnp.full(6, 400.0)}}
    with pytest.raises(ValueError, match="kernel='inputs kv_heads groups head_dim'"):
        mc.qk_clip(params, stats)
