"""Queries, keys and values in one kernel: scaled columns, unchanged columns, and new logits."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support import reference_attention as reference
from tests.support.attention_cases import draw, same_bits

D, N, H = 6, 4, 3
X = draw(99, 2, 7, D)


@dataclasses.dataclass(frozen=True)
class Form:
    """One order of heads and one shape of kernel."""

    order: str = "sectioned"
    key_heads: int = N
    kernel: str = "inputs (heads head_dim)"
    bias: bool = True
    columns: tuple[int, ...] = (-1,)  # sizes of the output axes

    @property
    def layout(self):
        return mc.FusedQKVLayout(
            head_dim=H,
            num_kv_heads=None if self.key_heads == N else self.key_heads,
            order=self.order,
            kernel=self.kernel,
        )

    def fuse(self, query, key, value):
        """Joins `[..., heads, H]` arrays along the heads, head by head."""
        parts = {"q": query, "k": key, "v": value}
        names = self.heads()
        return np.stack([parts[kind][..., i, :] for kind, i in names], axis=-2)

    def heads(self):
        """Names the heads in their order."""
        group, keys = N // self.key_heads, range(self.key_heads)
        if self.order == "sectioned":
            return [
                *(("q", h) for h in range(N)),
                *(("k", j) for j in keys),
                *(("v", j) for j in keys),
            ]
        return [
            head
            for j in keys
            for head in [*(("q", j * group + g) for g in range(group)), ("k", j), ("v", j)]
        ]

    def shaped(self, x):
        """Gives `[..., heads, H]` the output axes of the layout."""
        return x.reshape(*x.shape[:-2], *self.columns)

    def params(self, seed=0):
        k = self.key_heads
        kernel = self.fuse(*(5 * draw(seed + i, D, heads, H) for i, heads in enumerate((N, k, k))))
        bias = self.fuse(*(draw(seed + 5 + i, heads, H) for i, heads in enumerate((N, k, k))))
        kernel, bias = jnp.asarray(self.shaped(kernel)), jnp.asarray(self.shaped(bias))
        kernel = jnp.moveaxis(kernel, 0, self.kernel.split().index("inputs"))
        module: Any = {"kernel": kernel, "bias": bias} if self.bias else {"kernel": kernel}
        return {"qkv": module, "out": {"kernel": draw(seed + 9, N, H, D)}}

    def split(self, leaf, is_kernel):
        """The `[..., H]` columns of each head, by its name."""
        leaf = np.asarray(leaf)
        leaf = np.moveaxis(leaf, self.kernel.split().index("inputs"), 0) if is_kernel else leaf
        leaf = leaf.reshape(*leaf.shape[:1] * is_kernel, len(self.heads()), H)
        return {head: leaf[..., i, :] for i, head in enumerate(self.heads())}

    def logits(self, params):
        kernel = self.split(params["qkv"]["kernel"], True)
        bias = self.split(params["qkv"]["bias"], False) if self.bias else None

        def project(kind, count):
            w = np.stack([kernel[kind, i] for i in range(count)], axis=1)
            b = None if bias is None else np.stack([bias[kind, i] for i in range(count)])
            return reference.project(X, w, count, b)

        return reference.max_logits(project("q", N), project("k", self.key_heads), is_causal=True)


THREE = {"sectioned": "3 heads", "interleaved": "heads 3"}
SIZES = {"sectioned": (3, N), "interleaved": (N, 3)}
FORMS = {
    f"{order}, {name}": dataclasses.replace(form, order=order)
    for order in ("sectioned", "interleaved")
    for name, form in {
        "flat": Form(),
        "flat, no bias": Form(bias=False),
        "flat, grouped": Form(key_heads=2),
        "flat, one key head": Form(key_heads=1),
        "heads": Form(kernel="inputs heads head_dim", columns=(-1, H)),
        "heads, grouped": Form(kernel="inputs heads head_dim", columns=(-1, H), key_heads=2),
        "heads first": Form(kernel="heads inputs head_dim", columns=(-1, H), key_heads=2),
        "outputs first": Form(kernel="heads head_dim inputs", columns=(-1, H), key_heads=2),
        "four axes": Form(
            kernel=f"inputs {THREE[order]} head_dim", columns=(*SIZES[order], H), bias=False
        ),
        "four axes, inputs third": Form(
            kernel=f"{THREE[order]} inputs head_dim", columns=(*SIZES[order], H)
        ),
    }.items()
} | {
    "three sections": Form(kernel="inputs 3 (heads head_dim)", columns=(3, N * H)),
}
RULES = ["query", "group", "exact"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_no_head_exceeds_the_threshold_after_a_clip(form, rule):
    form = FORMS[form]
    params = form.params()
    before = form.logits(params)
    tau = float(np.sort(before.max(0))[1:3].mean())
    stats = {"max_logits": jnp.asarray(before, jnp.float32)}
    new, info = mc.qk_clip(params, stats, form.layout, threshold=tau, shared_key=rule)
    after = form.logits(new).max(0)
    assert info.clipped_heads == 2
    assert after.max() <= tau * (1 + 1e-5)
    if rule in ("query", "exact") or form.key_heads == N:
        np.testing.assert_allclose(after, np.minimum(before.max(0), tau), rtol=1e-5)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", FORMS)
def test_heads_get_their_factors_and_values_keep_their_bits(form, rule):
    form = FORMS[form]
    params, maxima = form.params(), [400.0, 10.0, 150.0, -3.0]
    new, _ = mc.qk_clip(
        params, {"max_logits": jnp.asarray(maxima)}, form.layout, alpha=0.3, shared_key=rule
    )
    gammas = [reference.gamma(s, 100.0) for s in maxima]
    query, key = reference.query_and_key_factors(gammas, form.key_heads, 0.3, rule)
    factors = {"q": query, "k": key, "v": [1.0] * N}
    for leaf in params["qkv"]:
        old, scaled = (form.split(t["qkv"][leaf], leaf == "kernel") for t in (params, new))
        for (kind, i), columns in old.items():
            if factors[kind][i] == 1:
                assert same_bits(scaled[kind, i], columns)
            np.testing.assert_allclose(scaled[kind, i], columns * factors[kind][i], rtol=5e-7)
    assert new["out"]["kernel"] is params["out"]["kernel"]


@pytest.mark.parametrize("stat_axis", [0, -1])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize(
    "form", ["interleaved, flat, grouped", "sectioned, four axes, inputs third"]
)
def test_stacked_layers_equal_single_layers(form, axis, stat_axis):
    form = FORMS[form]
    layers = [form.params(seed)["qkv"] for seed in (0, 20, 40)]
    maxima = [100 + 300 * draw(seed, 2, N) for seed in (1, 2, 3)]
    layout = dataclasses.replace(form.layout, stack_axis=axis, stat_stack_axis=stat_axis)
    stacked = jax.tree.map(lambda *x: jnp.stack(x, axis), *layers)
    stats = {"max_logits": jnp.stack(maxima, stat_axis)}
    new, _ = mc.qk_clip({"qkv": stacked}, stats, layout)
    for i, (layer, s) in enumerate(zip(layers, maxima, strict=True)):
        alone, _ = mc.qk_clip({"qkv": layer}, {"max_logits": s}, form.layout)
        for leaf in layer:
            assert same_bits(jnp.take(new["qkv"][leaf], i, axis=axis), alone["qkv"][leaf])


def test_adapters_are_scaled_with_the_kernel():
    form = FORMS["interleaved, flat, grouped"]
    params = form.params()
    a, b = draw(1, D, 2), jnp.asarray(params["qkv"]["kernel"][:2])
    params["qkv"]["lora"] = {"lora_a": a, "lora_b": b}
    new, _ = mc.qk_clip(params, {"max_logits": jnp.asarray([400.0, 10, 150, 3])}, form.layout)
    assert same_bits(new["qkv"]["lora"]["lora_a"], a)
    assert same_bits(new["qkv"]["lora"]["lora_b"], new["qkv"]["kernel"][:2])


# Errors.


def text_of(layout, columns, heads=N):
    params = {"attn": {"qkv": {"kernel": np.ones((D, *columns))}}}
    with pytest.raises(ValueError, match="qk_clip: 1 module does not fit the layout") as error:
        mc.qk_clip(params, {"attn": {"max_logits": jnp.ones(heads)}}, layout)
    return str(error.value).partition("\n  attn: ")[2]


def test_columns_that_do_not_fit_raise():
    fused = mc.FusedQKVLayout(head_dim=H, num_kv_heads=2)
    assert text_of(fused, (36,)).startswith(
        "qkv/kernel (6, 36) has 12 heads of head_dim 3, not 8: 4 of queries and 2 x 2 others, by "
        "its max_logits.\nPass layout=mc.FusedQKVLayout(qkv='qkv', head_dim=3).\n"
    )


def test_key_heads_that_do_not_divide_query_heads_raise():
    fused = mc.FusedQKVLayout(head_dim=H, num_kv_heads=3)
    assert text_of(fused, (30,)) == (
        "qkv/kernel (6, 30): num_kv_heads=3 does not divide the 4 of max_logits."
    )


def test_the_other_order_of_heads_raises_if_sizes_show_it():
    fused = mc.FusedQKVLayout(head_dim=H, kernel="inputs 3 heads head_dim")
    assert text_of(fused, (N, 3, H)) == (
        "qkv/kernel (6, 4, 3, 3) does not divide into 'inputs 3 heads head_dim' with head_dim=3.\n"
        "Pass layout=mc.FusedQKVLayout(qkv='qkv', kernel='inputs heads 3 head_dim', head_dim=3)."
    )
    interleaved = dataclasses.replace(fused, kernel="inputs heads 3 head_dim")
    assert "does not divide into 'inputs heads 3 head_dim'" in text_of(interleaved, (3, N, H))


def test_no_fused_layout_is_proposed_for_separate_projections():
    layout = mc.FusedQKVLayout(head_dim=H)
    stats = {"attn": {"max_logits": jnp.ones(N)}}
    kernel = {"kernel": np.ones((D, 36))}
    with pytest.raises(ValueError, match="no module 'qkv'; there are 'k_proj', 'q_proj'") as error:
        mc.qk_clip({"attn": {"q_proj": kernel, "k_proj": kernel}}, stats, layout)
    assert "FusedQKVLayout" not in str(error.value).partition("\n")[2]
    with pytest.raises(
        ValueError, match=r"Pass layout=mc\.FusedQKVLayout\(qkv='query_key_value', head_dim=3"
    ):
        mc.qk_clip({"attn": {"query_key_value": kernel}}, stats, layout)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head_dim": 0}, "head_dim must be at least 1"),
        ({"num_kv_heads": 0}, "num_kv_heads must be at least 1"),
        ({"order": "mixed"}, "order must be one of 'sectioned', 'interleaved'"),
        ({"kernel": "inputs 2 heads head_dim"}, "has '2'; allowed are"),
        (
            {"kernel": "inputs 3 heads head_dim", "order": "interleaved"},
            "a 3 before the heads is not interleaved",
        ),
    ],
)
def test_impossible_layouts_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        mc.FusedQKVLayout(**{"head_dim": H, **settings})
