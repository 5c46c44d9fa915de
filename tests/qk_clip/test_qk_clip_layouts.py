"""Every way to store queries and keys: right factors, and logits at the threshold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support import reference_attention as reference
from tests.support.attention_cases import draw, same_bits

D, H = 6, 8
THREE_AXES = mc.MultiHeadLayout()


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to store queries and keys, and the layout that describes it."""

    heads: int = 4
    key_heads: int = 4
    flat: bool = False
    head_axis: int = -2
    bias: bool = False
    gate: int = 0  # columns after the query in each query head
    layout: mc.MultiHeadLayout = THREE_AXES

    def module(self, seed, heads, width):
        kernel = 30 * draw(seed, D, heads, width)
        bias = 10 * draw(seed + 1, heads, width)
        if self.head_axis == -3:
            kernel = kernel.swapaxes(0, 1)
        if self.flat:
            kernel, bias = kernel.reshape(D, -1), bias.reshape(-1)
        return {"kernel": kernel, "bias": bias} if self.bias else {"kernel": kernel}

    def params(self, seed=0):
        query, key = self.layout.query, self.layout.key
        return {
            query: self.module(seed, self.heads, H + self.gate),
            key: self.module(seed + 2, self.key_heads, H),
            "v_proj": self.module(seed + 4, self.key_heads, H),
            "out": {"kernel": draw(seed + 6, self.heads, H, D)},
        }

    def logits(self, params, x):
        """Recomputes the largest logits in float64."""
        projected = [
            reference.project(
                x, module["kernel"], heads, module.get("bias"), head_axis=self.head_axis
            )
            for module, heads in (
                (params[self.layout.query], self.heads),
                (params[self.layout.key], self.key_heads),
            )
        ]
        return reference.max_logits(projected[0][..., :H], projected[1], is_causal=True)


FLAT = mc.MultiHeadLayout(
    query="q_proj", key="k_proj", kernel="inputs (heads head_dim)", head_dim=H
)
FORMS = {
    "three axes": Form(),
    "three axes, biases": Form(bias=True),
    "grouped": Form(key_heads=2, bias=True),
    "one key head": Form(key_heads=1),
    "flat": Form(flat=True, layout=FLAT),
    "flat, grouped, biases": Form(flat=True, key_heads=2, bias=True, layout=FLAT),
    "heads first": Form(
        head_axis=-3, bias=True, layout=mc.MultiHeadLayout(kernel="heads inputs head_dim")
    ),
    "gated": Form(gate=3, bias=True, layout=mc.MultiHeadLayout(query_dim=H)),
    "gated, flat, grouped": Form(
        gate=3,
        flat=True,
        bias=True,
        key_heads=2,
        layout=dataclasses.replace(FLAT, query_dim=H),
    ),
    "heads equal to columns": Form(heads=8, key_heads=8, bias=True),
}
RULES = ["query", "group", "exact"]
X = draw(99, 2, 7, D)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_no_head_exceeds_the_threshold_after_a_clip(form, rule):
    form = FORMS[form]
    params = form.params()
    before = form.logits(params, X)
    # Half of the heads below: the mean of two neighbors as threshold.
    tau = float(np.sort(before.max(0))[form.heads // 2 - 1 : form.heads // 2 + 1].mean())
    stats = {"max_logits": jnp.asarray(before, jnp.float32)}
    new, info = mc.qk_clip(params, stats, form.layout, threshold=tau, shared_key=rule)
    after = form.logits(new, X).max(0)
    assert after.max() <= tau * (1 + 1e-5)
    assert info.clipped_heads == form.heads // 2
    if rule in ("query", "exact") or form.heads == form.key_heads:
        np.testing.assert_allclose(after, np.minimum(before.max(0), tau), rtol=1e-5)
    else:
        assert np.all(after <= before.max(0) * (1 + 1e-5))
    for name in ("v_proj", "out"):
        assert all(map(same_bits, jax.tree.leaves(new[name]), jax.tree.leaves(params[name])))


@pytest.mark.parametrize("form", [name for name in FORMS if "gated" in name])
def test_gate_columns_keep_their_bits(form):
    form = FORMS[form]
    params = form.params()
    stats = {"max_logits": jnp.full(form.heads, 1e4)}
    new, _ = mc.qk_clip(params, stats, form.layout)
    for leaf in ("kernel", "bias"):
        old, scaled = (
            np.asarray(tree[form.layout.query][leaf]).reshape(-1, form.heads, H + form.gate)
            for tree in (params, new)
        )
        assert same_bits(old[..., H:], scaled[..., H:])
        assert np.all(old[..., :H] != scaled[..., :H])


# Stacks of layers. All sizes are equal, so that no axis can be told by its size.

SIZE = 2


def stack_trees(trees, axis):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis), *trees)


# A flat bias has no axis 2.
AXES = [
    (axis, flat) for axis in (0, 1, 2, -1) for flat in (False, True) if not (flat and axis == 2)
]


@pytest.mark.parametrize("stat_axis", [0, 1, -1])
@pytest.mark.parametrize(("axis", "flat"), AXES)
def test_stacked_layers_are_clipped_separately(axis, stat_axis, flat):
    layout = mc.MultiHeadLayout(
        stack_axis=axis,
        stat_stack_axis=stat_axis,
        kernel="inputs (heads head_dim)" if flat else "inputs heads head_dim",
        head_dim=SIZE,
    )
    shape = (SIZE, SIZE * SIZE) if flat else (SIZE, SIZE, SIZE)
    layers = [
        {n: {"kernel": draw(s, *shape), "bias": draw(s, *shape[1:])} for n in ("query", "key")}
        for s in range(SIZE)
    ]
    maxima = [jnp.asarray([[200.0, 50.0], [50.0, 50.0]]), jnp.asarray([[50.0, 50.0], [7.0, 400.0]])]
    stats = {"max_logits": (jnp.stack(maxima, stat_axis),)}
    new, info = mc.qk_clip(stack_trees(layers, axis), stats, layout)
    single = dataclasses.replace(layout, stack_axis=0, stat_stack_axis=0)
    alone = [
        mc.qk_clip(layer, {"max_logits": s}, single)[0]
        for layer, s in zip(layers, maxima, strict=True)
    ]
    assert all(map(same_bits, jax.tree.leaves(new), jax.tree.leaves(stack_trees(alone, axis))))
    np.testing.assert_array_equal(info.gamma[""], [[0.5, 1], [1, 0.25]])


@pytest.mark.parametrize("stat_axis", [0, -1])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scan_of_a_scan_is_clipped_layer_by_layer(axis, stat_axis):
    layout = mc.MultiHeadLayout(stack_axis=axis, stat_stack_axis=stat_axis)
    layers = [
        [
            {
                n: {"kernel": draw(3 * i + j, 2, 2, 2), "bias": draw(9, 2, 2)}
                for n in ("query", "key")
            }
            for j in range(2)
        ]
        for i in range(3)
    ]
    maxima = 100 + 300 * jnp.abs(draw(50, 3, 2, 2, 2))  # outer, inner, batch, heads
    stacked = stack_trees([stack_trees(inner, axis) for inner in layers], axis)
    stat = stack_trees([stack_trees(list(inner), stat_axis) for inner in maxima], stat_axis)
    new, info = mc.qk_clip(stacked, {"max_logits": stat}, layout)
    alone = [
        [mc.qk_clip(layers[i][j], {"max_logits": maxima[i, j]})[0] for j in range(2)]
        for i in range(3)
    ]
    expected = stack_trees([stack_trees(inner, axis) for inner in alone], axis)
    assert all(map(same_bits, jax.tree.leaves(new), jax.tree.leaves(expected)))
    np.testing.assert_allclose(info.gamma[""], 100 / np.max(maxima, axis=2), rtol=2e-7)


@pytest.mark.parametrize("shared_key", RULES)
def test_stacked_grouped_queries_equal_single_layers(shared_key):
    layers = [FORMS["gated, flat, grouped"].params(seed) for seed in (0, 10, 20)]
    layout = FORMS["gated, flat, grouped"].layout
    maxima = jnp.asarray([[400.0, 1, 1, 1], [1, 1, 1, 200], [1, 2, 3, 4]])
    stacked, _ = mc.qk_clip(
        stack_trees(layers, 0), {"max_logits": maxima}, layout, shared_key=shared_key
    )
    alone = [
        mc.qk_clip(layer, {"max_logits": s}, layout, shared_key=shared_key)[0]
        for layer, s in zip(layers, maxima, strict=True)
    ]
    assert all(map(same_bits, jax.tree.leaves(stacked), jax.tree.leaves(stack_trees(alone, 0))))


# Adapters, several layouts, bare arrays.


@pytest.mark.parametrize("flat", [False, True])
def test_adapters_are_scaled_with_the_kernel(flat):
    layout = mc.MultiHeadLayout(
        kernel="inputs (heads head_dim)" if flat else "inputs heads head_dim", head_dim=4
    )
    columns = (8,) if flat else (2, 4)

    def module(seed):
        lora = {"lora_a": draw(seed, D, 2), "lora_b": draw(seed + 1, 2, *columns)}
        return {"kernel": draw(seed + 2, D, *columns), "lora": lora}

    def effective(module):
        lora = module["lora"]
        update = np.einsum("dr,r...->d...", lora["lora_a"], lora["lora_b"])
        return (np.asarray(module["kernel"]) + update).reshape(D, 2, 4)

    params = {"query": module(0), "key": module(5)}
    new, _ = mc.qk_clip(params, {"max_logits": jnp.asarray([400.0, 1.0])}, layout)
    for name in params:
        half = np.asarray([0.5, 1.0], np.float32)[:, None]
        np.testing.assert_allclose(effective(new[name]), effective(params[name]) * half, rtol=1e-6)
        assert same_bits(new[name]["lora"]["lora_a"], params[name]["lora"]["lora_a"])


def test_the_first_layout_that_fits_describes_a_module():
    flat, three = FORMS["flat"], FORMS["grouped"]
    params = {"a": flat.params(), "b": three.params()}
    stats = {name: {"max_logits": jnp.full(4, 400.0)} for name in params}
    new, _ = mc.qk_clip(params, stats, (flat.layout, three.layout))
    for name, form in (("a", flat), ("b", three)):
        alone, _ = mc.qk_clip(params[name], stats[name], form.layout)
        assert all(map(same_bits, jax.tree.leaves(new[name]), jax.tree.leaves(alone)))


def test_arrays_without_a_module_around_them_are_kernels():
    params = {"attn": {"wq": draw(0, D, 2, 4), "wk": draw(1, D, 1, 4), "wv": draw(2, D, 1, 4)}}
    layout = mc.MultiHeadLayout(query="wq", key="wk")
    new, _ = mc.qk_clip(params, {"attn": {"max_logits": jnp.asarray([400.0, 1.0])}}, layout)
    np.testing.assert_array_equal(new["attn"]["wq"][:, 0], params["attn"]["wq"][:, 0] / 4)
    assert same_bits(new["attn"]["wk"], params["attn"]["wk"])


def test_leaf_names_of_other_libraries_are_settings():
    layout = mc.MultiHeadLayout(scaled_leaves=("w", "b"), kept_leaves=("step",), stat="s_max")
    params = {
        n: {"w": draw(0, D, 2, 4), "b": draw(1, 2, 4), "step": jnp.ones(())}
        for n in ("query", "key")
    }
    new, _ = mc.qk_clip(params, {"s_max": jnp.asarray([400.0, 400.0])}, layout)
    for leaf in ("w", "b"):
        np.testing.assert_array_equal(new["key"][leaf], params["key"][leaf] / 2)


def test_layouts_are_hashable_and_compare_by_value():
    assert {mc.MultiHeadLayout(): 1}[mc.MultiHeadLayout(query="query")] == 1
    assert mc.MultiHeadLayout() != mc.MultiHeadLayout(kernel="heads inputs head_dim")
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(mc.MultiHeadLayout(), "query", "q")  # noqa: B010  # pyright would refuse the plain form


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": "inputs head head_dim"}, "has 'head'; allowed are 'inputs', 'heads'"),
        ({"kernel": "inputs (heads head_dim"}, "has a parenthesis that is not closed"),
        ({"kernel": "inputs (heads (head_dim))"}, "has parentheses that are nested"),
        ({"kernel": "inputs () heads head_dim"}, "has parentheses that are nested, empty"),
        ({"kernel": "(inputs heads) head_dim"}, "needs 'inputs' as an axis of its own"),
        ({"kernel": "inputs heads"}, "needs 'head_dim'"),
        ({"kernel": "inputs head_dim"}, "needs 'heads', or 'kv_heads' and 'groups'"),
        ({"kernel": "inputs heads heads head_dim"}, "names 'heads' more than once"),
        ({"kernel": "inputs kv_heads head_dim"}, "needs 'groups' beside 'kv_heads'"),
        ({"kernel": "2 heads inputs head_dim"}, "has '2'; allowed are"),
        ({"key_kernel": "3 heads inputs head_dim"}, "key_kernel='3 heads inputs head_dim' has '3'"),
        (
            {"kernel": "inputs (heads head_dim)"},
            "kernel has a flattened head axis and needs head_dim",
        ),
        ({"key_kernel": "inputs (heads head_dim)"}, "key_kernel has a flattened head axis"),
        ({"head_dim": 4, "query_dim": 3}, "query_dim must be equal to head_dim"),
        ({"head_dim": 0}, "head_dim must be at least 1"),
        ({"value": "key"}, "value must be a module of its own"),
        ({"scaled_leaves": ()}, "scaled_leaves must be a tuple, the kernel's name first"),
        ({"scaled_leaves": "kernel"}, "scaled_leaves must be a tuple"),
        ({"qk_norm": "q_norm"}, "qk_norm must be a tuple of names"),
        ({"query": "qk", "key": "qk"}, "query and key must be two modules"),
        ({"query_dim": 0}, "query_dim must be at least 1"),
    ],
)
@pytest.mark.usefixtures("no_typecheck")
def test_impossible_layouts_raise(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        mc.MultiHeadLayout(**settings)
    assert str(error.value).startswith("MultiHeadLayout(query=")
