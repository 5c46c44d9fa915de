"""Every pattern of kernel axes: each weight gets its factor of a loop over heads."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support import reference_layouts as reference
from tests.support.attention_cases import same_bits

D, N, H, TAU = 5, 4, 3, 100.0
MAXIMA = [[400.0, 10.0, 150.0, -3.0], [90.0, 101.0, 7.0, 900.0]]
RULES = ["query", "group", "exact"]
QUERY = {
    "inputs heads head_dim": None,
    "inputs (heads head_dim)": None,
    "inputs (head_dim heads)": None,
    "(heads head_dim) inputs": None,
    "heads inputs head_dim": None,
    "heads head_dim inputs": None,
    "head_dim heads inputs": None,
    "kv_heads groups head_dim inputs": None,
    "inputs groups kv_heads head_dim": None,
    "(kv_heads groups head_dim) inputs": None,
}
KEY = [
    "inputs heads head_dim",
    "2 heads inputs head_dim",
    "inputs 2 heads head_dim",
    "inputs heads 2 head_dim",
    "inputs (2 heads head_dim)",
    "inputs (heads 2 head_dim)",
    "inputs (heads head_dim 2)",
    "(2 heads head_dim) inputs",
    "(heads 2 head_dim) inputs",
    "2 kv_heads head_dim inputs",
    "(2 heads) inputs head_dim",
]
FUSED = [
    "inputs (heads head_dim)",
    "(heads head_dim) inputs",
    "inputs heads head_dim",
    "heads inputs head_dim",
    "inputs 3 heads head_dim",
    "inputs heads 3 head_dim",
    "3 heads inputs head_dim",
    "inputs (3 heads head_dim)",
    "inputs (heads 3 head_dim)",
    "inputs (heads head_dim 3)",
    "(3 heads head_dim) inputs",
    "heads 3 head_dim inputs",
]
LATENT = [
    "inputs heads head_dim",
    "inputs (heads head_dim)",
    "(heads head_dim) inputs",
    "heads inputs head_dim",
    "heads head_dim inputs",
]
STACKS = [(), (2,), (2,)]  # one layer, and stacks of two


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def named(pattern, heads, key_heads, is_bias):
    """Names the axes of `[inputs, heads, width]` as a pattern does, and splits groups."""
    inputs = () if is_bias else ("inputs",)
    if "groups" in pattern:
        shape = (*heads.shape[:-2], key_heads, -1, heads.shape[-1])
        return heads.reshape(shape), (*inputs, "kv_heads", "groups", "head_dim")
    name = "kv_heads" if "kv_heads" in pattern else "heads"
    return heads, (*inputs, name, "head_dim")


def leaves(make, stack, axis):
    """Makes kernel and bias of one layer, or stacks them."""
    layers = [make(i) for i in range(*stack or (1,))]
    if not stack:
        return layers[0]
    return {name: np.stack([layer[name] for layer in layers], axis) for name in layers[0]}


def check(layout, before, after, stack, rule, alpha):
    """Clips `before`, and compares every module with `after`."""
    maxima = np.asarray(MAXIMA, np.float32) if stack else np.asarray(MAXIMA[0], np.float32)
    params = {
        name: {k: jnp.asarray(v) for k, v in module.items()} for name, module in before.items()
    }
    stats = {"max_logits": jnp.asarray(maxima)}
    settings = {"threshold": TAU, "alpha": alpha, "shared_key": rule}
    new, _ = jax.jit(lambda p, s: mc.qk_clip(p, s, layout, **settings))(params, stats)
    changed = 0
    for name, module in before.items():
        for leaf, old in module.items():
            expected, actual = after[name][leaf], np.asarray(new[name][leaf])
            assert not np.isnan(expected).any()
            np.testing.assert_allclose(actual, expected, rtol=5e-7, err_msg=f"{name}/{leaf}")
            kept = expected == old
            np.testing.assert_array_equal(actual[kept].view(np.int32), old[kept].view(np.int32))
            changed += np.sum(~kept)
    assert changed > 0


def multi_head(layout, key_heads, stack, rule, alpha, width=H, seed=0):
    """Parameters before and after, of a module for queries and one for keys."""
    query, key = (str(pattern) for pattern in (layout.kernel, layout.key_kernel or layout.kernel))

    def make(is_after, which, layer):
        factors = reference.factors(MAXIMA[layer], key_heads, TAU, alpha, rule)[which == "key"]
        module = {}
        for leaf, inputs in (("kernel", (D,)), ("bias", ())):
            count, columns = (N, width) if which == "query" else (key_heads, H)
            heads = draw(seed + 7 * layer + len(which), *inputs, count, columns)
            values = draw(seed + 3, *inputs, count, columns)
            if is_after:
                heads = reference.scaled(heads, factors, H)
            if which == "key" and "2" in key:
                name = "kv_heads" if "kv_heads" in key else "heads"
                both = np.stack([heads, values])
                names = ("2", *(("inputs",) * (leaf == "kernel")), name, "head_dim")
                module[leaf] = reference.place(key, both, names)
            else:
                pattern = query if which == "query" else key.replace("groups ", "")
                module[leaf] = reference.place(
                    pattern, *named(pattern, heads, key_heads, leaf == "bias")
                )
        return module

    axis = layout.stack_axis
    return [
        {
            name: leaves(lambda i, a=is_after, n=name: make(a, n, i), stack, axis)
            for name in ("query", "key")
        }
        for is_after in (False, True)
    ]


@pytest.mark.parametrize(
    ("pattern", "rule", "stack", "key_heads"),
    [
        (
            pattern,
            RULES[i // 3 % 3],
            STACKS[i % 3],
            (4, 2, 1)[i % 3 if "groups" not in pattern else 1],
        )
        for i, pattern in enumerate(QUERY)
    ],
)
def test_queries_and_keys_get_their_factors(pattern, rule, stack, key_heads):
    layout = mc.MultiHeadLayout(kernel=pattern, head_dim=H, stack_axis=-1 if stack else 0)
    before, after = multi_head(layout, key_heads, stack, rule, 0.3)
    check(layout, before, after, stack, rule, 0.3)


@pytest.mark.parametrize(
    ("key_kernel", "rule", "stack"),
    [(pattern, RULES[1:][i % 2], STACKS[i % 3]) for i, pattern in enumerate(KEY)],
)
def test_values_beside_keys_keep_their_bits(key_kernel, rule, stack):
    layout = mc.MultiHeadLayout(key_kernel=key_kernel, head_dim=H, stack_axis=1 if stack else 0)
    before, after = multi_head(layout, 2, stack, rule, 0.5)
    check(layout, before, after, stack, rule, 0.5)


@pytest.mark.parametrize("pattern", ["inputs heads head_dim", "(heads head_dim) inputs"])
def test_gates_beside_queries_keep_their_bits(pattern):
    layout = mc.MultiHeadLayout(kernel=pattern, head_dim=H, query_dim=H)
    before, after = multi_head(layout, 2, (), "group", 0.5, width=H + 2)
    check(layout, before, after, (), "group", 0.5)


@pytest.mark.parametrize(
    ("pattern", "order", "rule", "stack"),
    [
        (pattern, order, RULES[i // 3 % 3], STACKS[i % 3])
        for i, (pattern, order) in enumerate(itertools.product(FUSED, ("sectioned", "interleaved")))
        if "3" not in pattern or order == "sectioned"
    ],
)
def test_fused_kernels_get_their_factors(pattern, order, rule, stack):
    each = "3" in pattern
    key_heads = N if each else 2
    layout = mc.FusedQKVLayout(
        head_dim=H, num_kv_heads=key_heads, kernel=pattern, order=order, stack_axis=len(stack)
    )

    def make(is_after, layer):
        module = {}
        query, key = reference.factors(MAXIMA[layer], key_heads, TAU, 0.5, rule)
        for leaf, inputs in (("kernel", (D,)), ("bias", ())):
            q, k, v = (draw(layer + c, *inputs, c, H) for c in (N, key_heads, key_heads))
            if is_after:
                q, k = reference.scaled(q, query), reference.scaled(k, key)
            names = (*(("inputs",) * (leaf == "kernel")), "heads", "head_dim")
            if each:
                module[leaf] = reference.place(pattern, np.stack([q, k, v]), ("3", *names))
                continue
            heads = (
                [q[..., h, :] for h in range(N)],
                *([x[..., g, :] for g in range(key_heads)] for x in (k, v)),
            )
            ordered = [*heads[0], *heads[1], *heads[2]]
            if order == "interleaved":
                group = N // key_heads
                ordered = [
                    head
                    for g in range(key_heads)
                    for head in (*heads[0][g * group : (g + 1) * group], heads[1][g], heads[2][g])
                ]
            module[leaf] = reference.place(pattern, np.stack(ordered, axis=-2), names)
        return module

    before, after = (
        {"qkv": leaves(lambda i, a=is_after: make(a, i), stack, layout.stack_axis)}
        for is_after in (False, True)
    )
    check(layout, before, after, stack, rule, 0.5)


@pytest.mark.parametrize(
    ("pattern", "stack", "rope_first"),
    [(pattern, STACKS[i % 3], i % 2 == 1) for i, pattern in enumerate(LATENT)],
)
def test_latent_attention_gets_its_factors(pattern, stack, rope_first):
    nope, rope, value = 3, 2, 4
    layout = mc.MLALayout(
        nope_dim=nope, rope_dim=rope, value_dim=value, kernel=pattern, rope_first=rope_first
    )

    def make(is_after, which, layer):
        module = {}
        gammas, _ = reference.factors(MAXIMA[layer], 1, TAU, 0.5, "query")
        roots = reference.factors(MAXIMA[layer], N, TAU, 0.5, "query")[0]
        for leaf, inputs in (("kernel", (D,)), ("bias", ())):
            first = draw(layer, *inputs, N, nope)
            second = draw(layer + 1, *inputs, N, rope if which == "q_b" else value)
            if is_after:
                first = reference.scaled(first, roots)
                second = reference.scaled(second, gammas) if which == "q_b" else second
            parts = (second, first) if which == "q_b" and rope_first else (first, second)
            names = (*(("inputs",) * (leaf == "kernel")), "heads", "head_dim")
            module[leaf] = reference.place(pattern, np.concatenate(parts, axis=-1), names)
        return module

    before, after = (
        {n: leaves(lambda i, a=a, n=n: make(a, n, i), stack, 0) for n in ("q_b", "kv_b")}
        for a in (False, True)
    )
    check(layout, before, after, stack, "query", 0.5)


def test_a_scan_of_a_scan_is_clipped_layer_by_layer():
    layout = mc.MultiHeadLayout(kernel="(heads head_dim) inputs", head_dim=H)
    layers = [multi_head(layout, N, (), "query", 0.5, seed=s)[0]["query"] for s in range(6)]
    kernels = np.stack([layer["kernel"] for layer in layers]).reshape(3, 2, N * H, D)
    params = {name: {"kernel": jnp.asarray(kernels)} for name in ("query", "key")}
    maxima = np.full((3, 2, N), 7.0)
    maxima[2, 0, 1] = 400.0
    new, _ = mc.qk_clip(params, {"max_logits": jnp.asarray(maxima)}, layout)
    expected = kernels.copy()
    expected[2, 0, H : 2 * H] /= 2
    for name in params:
        assert same_bits(new[name]["kernel"], expected)
