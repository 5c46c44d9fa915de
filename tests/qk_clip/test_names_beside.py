"""Names beside the modules of a layout: values scaled as keys, and second pairs."""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc

FLAT = {"kernel": "inputs (heads head_dim)", "head_dim": 8}
STATS = {"attn": {"max_logits": np.full((2, 4), 400.0, np.float32)}}
LLAMA = {name: {"kernel": np.ones((32, 32))} for name in ("q_proj", "k_proj", "v_proj", "o_proj")}


def raw(*names):
    return {name: np.ones((32, 4, 8), np.float32) for name in names}


def clip(children, *layouts, **settings):
    return mc.qk_clip({"attn": children}, STATS, layouts, **settings)


def named(query, key, **settings):
    return mc.MultiHeadLayout(query=query, key=key, **settings)


@pytest.mark.parametrize(
    ("children", "layout", "field", "better"),
    [
        (LLAMA, named("q_proj", "v_proj", **FLAT), "key='v_proj'", "k_proj"),
        (LLAMA, named("o_proj", "k_proj", **FLAT), "query='o_proj'", "q_proj"),
        (raw("wq", "wk", "wv"), named("wq", "wv"), "key='wv'", "wk"),
        (
            {"c_attn": {"kernel": np.ones((32, 96))}, "qkv": {"kernel": np.ones((32, 96))}},
            mc.FusedQKVLayout(qkv="c_attn", head_dim=8),
            "qkv='c_attn'",
            "qkv",
        ),
    ],
)
def test_values_and_outputs_named_as_queries_or_keys_raise_until_confirmed(
    children, layout, field, better
):
    with pytest.raises(ValueError, match=f"attn: {field}, but '{better}' has a name of ") as error:
        clip(children, layout, threshold=float("inf"))
    confirmed = {"kept_leaves": ("lora_a", better)}
    assert f"confirm it with kept_leaves={confirmed['kept_leaves']}." in str(error.value)
    fields = {name: getattr(layout, name) for name in (*layout.module_fields, "kernel", "head_dim")}
    clip(children, type(layout)(**fields, **confirmed))


def test_keys_with_a_name_of_values_are_confirmed_by_value():
    params, _ = clip(LLAMA, named("q_proj", "v_proj", value="k_proj", **FLAT))
    np.testing.assert_array_equal(params["attn"]["k_proj"]["kernel"], 1)
    np.testing.assert_array_equal(params["attn"]["v_proj"]["kernel"], 0.5)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("wq1", "wk1"), ("wq2", "wk2")),
        (("wq", "wk"), ("cross_wq", "cross_wk")),
        (("to_q", "to_k"), ("add_q_proj", "add_k_proj")),
    ],
)
def test_a_second_pair_of_queries_and_keys_raises_until_declared(first, second):
    children = raw(*first, *second, "wv")
    pair = sorted(second)
    text = f"'{pair[0]}' and '{pair[1]}' look like a second pair of queries and keys"
    with pytest.raises(ValueError, match=text):
        clip(children, named(*first))
    with pytest.raises(ValueError, match="both describe it") as error:
        clip(children, named(*first), named(*second))
    assert str(error.value).count("Make each pair of queries and keys a module of its own") == 1
    clip(children, named(*first), threshold=float("inf"))  # nothing is scaled
    params, _ = clip(children, named(*first, kept_leaves=tuple(pair)))
    np.testing.assert_array_equal(params["attn"][first[0]], 0.5)
    np.testing.assert_array_equal(params["attn"][second[0]], 1)


def test_two_layouts_of_one_module_raise_under_any_names():
    children = raw("ask", "tell", "ask_too", "tell_too")
    layouts = named("ask", "tell"), named("ask_too", "tell_too")
    with pytest.raises(ValueError, match="both describe it"):
        clip(children, *layouts)
    clip(children, named("ask", "tell", kept_leaves=("ask_too", "tell_too")), layouts[1])


@pytest.mark.parametrize("name", ["q_a_proj", "k_lora", "q_norm_scale", "key_scale", "k_rope"])
def test_other_children_are_no_second_pair(name):
    shape = (32, 4, 8) if name.endswith(("proj", "lora", "rope")) else (8,)
    children = {**raw("wq", "wk", "wv"), name: np.ones(shape)}
    params, _ = clip(children, named("wq", "wk", qk_norm=()))
    np.testing.assert_array_equal(params["attn"][name], children[name])
    assert np.all(params["attn"]["wq"] < children["wq"])


@pytest.mark.parametrize("threshold", [None, 100.0, float("inf")])
def test_a_layout_shows_the_axes_of_queries_and_keys_with_any_threshold(threshold):
    params = {"attn": {name: jnp.eye(64, 32).reshape(64, 4, 8) for name in ("ask", "tell")}}
    layout = named("ask", "tell")
    table = mc.routing_table(params, layout=layout)
    assert [row.reason for row in table.rows] == [
        "attention 'ask' of the head layout",
        "attention 'tell' of the head layout",
    ]
    assert (table.rows[0].n_in, table.rows[0].n_out, table.warnings) == (64, 32, ())
    stats = {} if threshold is None else {"max_logits": {"attn": {"max_logits": np.ones(4)}}}
    mc.muon(1.0, layout=layout).init(params)  # no warning
    optimizer = mc.muonclip(1.0, layout=layout, threshold=threshold, weight_decay=0.0, ns_steps=1)
    updates: Any = optimizer.update(params, optimizer.init(params), params, **stats)[0]
    # All singular values of the joined 64 x 32 matrix are equal.
    values = np.linalg.svd(updates["attn"]["ask"].reshape(64, 32), compute_uv=False)
    np.testing.assert_allclose(values, values[0], rtol=1e-5)


THREE_AXES = dict.fromkeys("qkv", (8, 4, 3))
FLAT_AXES = {name: (n, heads * width) for name, (n, heads, width) in THREE_AXES.items()}


def with_biases(shapes, kernel, bias):
    """Kernels and biases as arrays side by side."""
    pairs = [(kernel, shapes), (bias, {name: shape[1:] for name, shape in shapes.items()})]
    return {p.format(name): np.ones(s) for p, named in pairs for name, s in named.items()}


@pytest.mark.parametrize("shapes", [THREE_AXES, FLAT_AXES])
@pytest.mark.parametrize(
    ("kernel", "bias", "layout"),
    [
        ("w{}", "b{}", mc.MultiHeadLayout()),
        ("w_{}", "{}_bias", mc.MultiHeadLayout()),
        # Names without biases, and another pattern: two mistakes in one error.
        ("w{}", "b{}", named("wq", "wk", kernel="heads inputs head_dim")),
    ],
)
def test_one_error_proposes_kernels_with_their_biases(shapes, kernel, bias, layout):
    params = {"attn": with_biases(shapes, kernel, bias)}
    with pytest.raises(ValueError, match="Pass layout=") as error:
        mc.qk_clip(params, STATS, layout)
    ((argument),) = re.findall(r"^Pass layout=(.*)\.$", str(error.value), re.MULTILINE)
    new: Any = mc.qk_clip(params, STATS, eval(argument, {"mc": mc}))[0]
    for name, expected in {"q": 0.5, "k": 0.5, "v": 1.0}.items():
        for pattern in (kernel, bias):
            np.testing.assert_allclose(new["attn"][pattern.format(name)], expected)


def test_biases_are_never_proposed_as_kernels():
    shapes = {"q": (8, 4, 3), "k": (9, 4, 3)}  # of cross-attention, whose kernels get no proposal
    with pytest.raises(ValueError, match="no module 'query'") as error:
        mc.qk_clip({"attn": with_biases(shapes, "w{}", "b{}")}, STATS)
    assert "query='bq'" not in str(error.value)
