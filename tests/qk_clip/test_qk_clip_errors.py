"""One error lists every mismatch, with its path and a fix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc

pytestmark = pytest.mark.usefixtures("no_typecheck")
LAYOUT = "MultiHeadLayout(query='query', key='key')"
CAUSES = (
    "Max logits are missing when your own attention module does not call "
    '`mc.linen.sow_max_logits` or `mc.nnx.sow_max_logits`; when "intermediates" is not in '
    "`mutable` of `apply`, or not in `variable_axes` of `nn.scan` or `nn.vmap`; when "
    "attention with `attention_fn` is called without `sow_weights=True`; in NNX, when no "
    "`nnx.capture(..., MaxLogits)` is around the call.\n"
    "Leave out modules that are not clipped, such as frozen ones, with `ignore=`."
)


def attention(q="query", k="key", /, **children):
    kernel = {"kernel": np.ones((4, 2, 3))}
    return {
        q: kernel,
        k: kernel,
        "value": kernel,
        "out": {"kernel": np.ones((2, 3, 4))},
        **children,
    }


def kernels(query, key, **query_leaves):
    return attention(query={"kernel": np.ones(query), **query_leaves}, key={"kernel": np.ones(key)})


def sown(*shape):
    return {"max_logits": (jnp.ones(shape or (5, 2)),)}


def text_of(params, stats, *args, **settings):
    """The message of the one error that is raised, under `jit` as well as without."""
    with pytest.raises(ValueError, match="qk_clip: ") as plain:
        mc.qk_clip(params, stats, *args, **settings)
    with pytest.raises(ValueError, match="qk_clip: ") as traced:
        jax.jit(lambda p, s: mc.qk_clip(p, s, *args, **settings))(params, stats)
    assert str(plain.value) == str(traced.value)
    return str(plain.value)


def one_fault(path, fault, *fixes, layout: object = LAYOUT):
    head = f"qk_clip: 1 module does not fit the layout {layout}."
    return "\n".join([head, f"  {path}: {fault}", *fixes])


def test_all_faults_come_in_one_error_with_paths_and_fixes():
    params = {
        "blocks_3": {"attn": attention()},
        "blocks_5": {"attn": attention()},
        "blocks_7": {"attn": attention("q_proj", "k_proj")},
    }
    stats = {
        "blocks_3": {"attn": sown(16)},
        "blocks_5": {"atn": sown()},
        "blocks_7": {"attn": sown()},
    }
    assert text_of(params, stats) == (
        f"qk_clip: 4 modules do not fit the layout {LAYOUT}.\n"
        "  blocks_5/attn: has no max_logits; nearest is 'blocks_5/atn/max_logits'.\n"
        "  blocks_5/atn: has max_logits, but the parameters have no such module; nearest is "
        "'blocks_5/attn'.\n"
        "  blocks_7/attn: no module 'query' and no 'key'; there are 'k_proj', 'out', 'q_proj', "
        "'value'.\n"
        "  blocks_3/attn: query/kernel (4, 2, 3) has 2 heads, but its max_logits has 16.\n"
        f"{CAUSES}\n"
        f"Pass layout=(mc.{LAYOUT}, mc.MultiHeadLayout(query='q_proj', key='k_proj'))."
    )


@pytest.mark.parametrize(
    "stats", [None, {}, {"intermediates": {}}, {"attn": {"other": jnp.ones(2)}}]
)
def test_missing_max_logits_raise_with_the_causes(stats):
    expected = one_fault("attn", "has no max_logits.", CAUSES)
    assert text_of({"params": {"attn": attention()}}, stats) == expected


def test_nothing_to_clip_raises_with_the_names():
    nothing = (
        "nothing to clip: no module has 'query' and 'key', and no max logits are named "
        "'max_logits'."
    )
    assert text_of({"mlp": {"kernel": jnp.ones((3, 3))}}, {}) == one_fault("(root)", nothing)
    fix = "Pass layout=mc.MultiHeadLayout(query='q_proj', key='k_proj')."
    params = {"attn": attention("q_proj", "k_proj")}
    assert text_of(params, None) == one_fault("(root)", nothing, fix)
    params["attn"]["q_norm"] = {"scale": jnp.ones(3)}
    assert text_of(params, None).startswith(
        one_fault("(root)", nothing, "'q_norm' normalizes queries or keys. A norm")
    )


def test_a_proposed_layout_keeps_other_settings():
    layout = mc.MultiHeadLayout(query_dim=2, kept_leaves=("step",))
    params = attention("q_proj", "k_proj", k_proj={"kernel": np.ones((4, 2, 2))})
    text = text_of({"attn": params}, {"attn": sown()}, layout)
    proposed = "query='q_proj', key='k_proj', kept_leaves=('step',), query_dim=2"
    assert f"Pass layout=mc.MultiHeadLayout({proposed})." in text


def test_layer_names_with_a_common_prefix_differ():
    text = text_of({"layers_1": attention()}, {"layers_10": sown()})
    assert "layers_1: has no max_logits" in text
    assert "layers_10: has max_logits, but the parameters have no such module" in text


def test_unknown_leaf_raises_until_declared():
    params = kernels((4, 2, 3), (4, 2, 3), magnitude=jnp.ones(3))
    fix = (
        "List a leaf with the columns of the heads in `scaled_leaves` of the head layout, any "
        "other leaf in `kept_leaves`."
    )
    fault = "query/magnitude is in neither scaled_leaves nor kept_leaves."
    assert text_of(params, sown()) == one_fault("(root)", fault, fix)
    mc.qk_clip(params, sown(), mc.MultiHeadLayout(kept_leaves=("magnitude",)))


def test_adapters_without_kernels_raise():
    adapter = {"lora_a": jnp.ones((4, 1)), "lora_b": jnp.ones((1, 2, 3))}
    head = one_fault("attn", "query has lora_a, lora_b, not one 'kernel'.")
    text = text_of({"attn": {"query": adapter, "key": adapter}}, {"attn": sown()})
    assert text.startswith(head)
    assert text.endswith(
        "Pass all parameters: a clip of adapters alone cannot keep the logits down."
    )


def test_max_logits_of_another_layout_raise():
    layouts = mc.MultiHeadLayout(), mc.MultiHeadLayout(query="q", key="k", stat="s_max")
    text = text_of(attention(), {"s_max": jnp.ones(2), **sown()}, layouts)
    assert f"(root): has s_max, but its layout {LAYOUT} reads max_logits." in text


def test_leaves_of_another_library_are_not_called_adapters():
    leaves = {"w": np.ones((4, 2, 3)), "b": np.ones((2, 3))}
    text = text_of({"query": leaves, "key": leaves}, sown())
    assert "query has b, w, not one 'kernel'." in text
    assert "query/w is in neither scaled_leaves nor kept_leaves." in text
    assert "adapters" not in text


def test_two_kernels_in_one_module_raise():
    params = attention(
        query={"Dense_0": {"kernel": jnp.ones((4, 4))}, "kernel": jnp.ones((4, 2, 3))}
    )
    assert text_of(params, sown()) == one_fault(
        "(root)", "query has kernel, kernel, not one 'kernel'."
    )


def test_quantized_kernels_raise():
    params = attention(query={"kernel": jnp.ones((4, 2, 3), jnp.int8)})
    fault = "query/kernel is int8, which cannot be scaled."
    assert text_of(params, sown()) == one_fault("(root)", fault)


FLAT = mc.MultiHeadLayout(kernel="inputs (heads head_dim)", head_dim=3)
SHAPE_FAULTS = [
    (
        "query/kernel (4, 2, 3) has 2 heads, but its max_logits has 1.",
        kernels((4, 2, 3), (4, 2, 3)),
        (2, 1),  # max logits transposed
    ),
    (
        "key/kernel (4, 3, 3) has 3 key heads, which do not fit the 4 heads of query/kernel "
        "(4, 4, 3).",
        kernels((4, 4, 3), (4, 3, 3)),
        (5, 4),
    ),
    (
        "key/kernel (4, 2, 3) has heads of 3 columns, query/kernel (4, 2, 5) has 5; query heads "
        "that hold a gate too need query_dim=.",
        kernels((4, 2, 5), (4, 2, 3)),
        (5, 2),
    ),
    (
        "query/kernel (4, 6) has fewer axes than 'inputs heads head_dim'.",
        kernels((4, 6), (4, 6)),
        (5, 2),
    ),
    (
        "query/kernel (7, 4, 2, 3) stacks (7,) layers, key/kernel (6, 4, 2, 3) stacks (6,).",
        kernels((7, 4, 2, 3), (6, 4, 2, 3)),
        (7, 5, 2),
    ),
    (
        "key/kernel (4, 2, 3) and query/kernel (7, 4, 2, 3) have unequal numbers of stack axes "
        "under 'inputs heads head_dim' and 'inputs heads head_dim'.",
        kernels((7, 4, 2, 3), (4, 2, 3)),
        (7, 5, 2),
    ),
    (
        "query/kernel (7, 4, 2, 3) stacks (7,) layers, its max_logits (6, 5, 2) stacks (6,).",
        kernels((7, 4, 2, 3), (7, 4, 2, 3)),
        (6, 5, 2),
    ),
    (
        "max_logits (2,) has too few axes for query/kernel (7, 4, 2, 3): expected "
        "[layers, batch, heads].",
        kernels((7, 4, 2, 3), (7, 4, 2, 3)),
        (2,),
    ),
    (
        "query/bias (3, 2) does not have the columns of query/kernel (4, 2, 3).",
        kernels((4, 2, 3), (4, 2, 3), bias=np.ones((3, 2))),
        (5, 2),
    ),
    (
        "query/bias (6,) has no rank that fits query/kernel (4, 2, 3) and stack_axis=0.",
        kernels((4, 2, 3), (4, 2, 3), bias=np.ones(6)),
        (5, 2),
    ),
    (
        "query/lora_b (2, 6) does not have the columns of query/kernel (4, 2, 3).",
        kernels((4, 2, 3), (4, 2, 3), lora_b=np.ones((2, 6))),  # rank 2 of the adapter, 2 heads
        (5, 2),
    ),
]
FLAT_FAULTS = [
    (
        "query/kernel (4, 13) does not divide into 'inputs (heads head_dim)' with head_dim=3.",
        kernels((4, 13), (4, 12)),
        (5, 4),
    ),
    (
        "query/kernel (4, 12) has 4 heads of head_dim 3, but its max_logits has 2; query heads "
        "that hold a gate too need query_dim=.",
        kernels((4, 12), (4, 6)),
        (5, 2),
    ),
    (
        "key/kernel (4, 7) does not divide into 'inputs (heads head_dim)' with head_dim=3.",
        kernels((4, 12), (4, 7)),
        (5, 4),
    ),
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("fault", "params", "stat"), SHAPE_FAULTS)
def test_wrong_shapes_raise_even_if_not_strict(fault, params, stat, strict):
    lines = text_of(params, sown(*stat), strict=strict).splitlines()
    assert "\n".join(lines[:2]) == one_fault("(root)", fault)


@pytest.mark.parametrize(("fault", "params", "stat"), FLAT_FAULTS)
def test_flat_kernels_that_do_not_divide_raise(fault, params, stat):
    lines = text_of(params, sown(*stat), FLAT).splitlines()
    assert "\n".join(lines[:2]) == one_fault("(root)", fault, layout=FLAT)


def test_query_dim_wider_than_the_head_raises():
    layout = mc.MultiHeadLayout(query_dim=5)
    text = text_of(attention(), sown(), layout)
    assert "query/kernel (4, 2, 3) has heads of 3 columns, fewer than query_dim=5." in text


def test_calls_with_unequal_heads_raise():
    text = text_of(attention(), {"max_logits": (jnp.ones(2), jnp.ones((5, 4)))})
    assert text == one_fault("(root)", "calls have max_logits of 2 and of 4 heads.")


def test_error_lists_several_layouts():
    text = text_of({}, {}, (mc.MultiHeadLayout(), FLAT))
    assert text.startswith(f"qk_clip: 1 module does not fit the layouts {LAYOUT}, {FLAT}.")


def test_not_strict_warns_once_and_counts():
    params = {"a": attention(), "b": attention()}
    stats = {"a": sown(), "c": sown()}
    with pytest.warns(UserWarning, match="qk_clip: ") as warned:
        _, info = mc.qk_clip(params, stats, strict=False)
    (warning,) = warned
    assert str(warning.message) == (
        "qk_clip: 2 modules skipped because of strict=False.\n"
        "  b: has no max_logits; nearest is 'c/max_logits'.\n"
        "  c: has max_logits, but the parameters have no such module."
    )
    assert info.skipped_modules == 2
    assert list(info.gamma) == ["a"]


def test_not_strict_without_anything_to_clip_warns():
    params = {"mlp": {"kernel": jnp.ones((3, 3))}}
    with pytest.warns(UserWarning, match="nothing to clip"):
        new, info = mc.qk_clip(params, {}, strict=False)
    assert new["mlp"]["kernel"] is params["mlp"]["kernel"]
    assert (info.max_logit, info.min_gamma, info.clipped_fraction) == (-jnp.inf, 1, 0)
