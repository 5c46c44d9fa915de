"""Common behavior of Linen and NNX: methods of attention, soft caps, and equal results."""

import contextlib

import chex
import flax.linen as nn
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import muonclip_jax as mc
from benchmarks.compiled import instruction_counts
from tests.support.attention_cases import draw, same_bits
from tests.support.flax_cases import (
    CALLS,
    X,
    capture,
    linen_attention,
    linen_call,
    nnx_attention,
    run,
    skip_without_capture,
)
from tests.support.strict import needs_capture

MASKS = {"no mask": None, "a mask": jnp.tri(7)}


def kernel(query, key, value, bias, mask, *, scale, is_causal, **others):
    """A function of the user, for output and max logits."""
    assert set(others.values()) == {None}
    pairs = {"bias": bias, "mask": mask, "scale": scale, "is_causal": is_causal}
    out = jax.nn.dot_product_attention(query, key, value, **pairs)
    return out, mc.max_attention_logit(query, key, **pairs)


# Other sources of the output, with the name under which their max logits are sown.
FORMS = {
    "lse_bound": ({"max_logit": "lse_bound"}, "max_logits_bound"),
    "xla": ({"implementation": "xla"}, "max_logits"),
    "a function": ({"max_logit": kernel}, "max_logits"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", MASKS)
def test_other_methods_equal_flax_and_sow_by_name(call, form, mask):
    options, name = FORMS[form]
    x = draw(1, 2, 3, 7, 8)  # two axes of batch
    out, stats = CALLS[call](x, MASKS[mask], options=options)
    expected, exact = CALLS[call](x, MASKS[mask])
    # Another order of the same sums; measured 2e-7.
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
    assert list(stats) == [name]
    max_logits, exact = stats[name][0], exact["max_logits"][0]
    assert max_logits.shape == (6, 2)
    if name == "max_logits":
        np.testing.assert_allclose(max_logits, exact, rtol=2e-6)
    else:
        assert np.all(max_logits >= exact)
        assert np.all(max_logits <= exact + np.log(7) + 1e-5)


@pytest.mark.parametrize("call", CALLS)
def test_a_bound_clips_and_is_counted_as_a_bound(call):
    _, stats = CALLS[call](X, options={"max_logit": "lse_bound"})
    params = nnx.to_pure_dict(nnx.state(nnx_attention(), nnx.Param))
    _, info = mc.qk_clip(params, stats, threshold=0.1)
    assert (info.bound_modules, info.clipped_heads) == (1, 2)


class LinenDirect(nn.Module):
    @nn.compact
    def __call__(self, q, options):
        return mc.linen.attention_fn(q, q, q, module=self, **options)


class NNXDirect(nnx.Module):
    def __call__(self, q, options):
        return mc.nnx.attention_fn(q, q, q, module=self, **options)


EVALUATE = {
    "linen": lambda *args: LinenDirect().apply({}, *args),
    "nnx": lambda *args: NNXDirect()(*args),
}
TRAIN = {
    "linen": lambda *args: run(LinenDirect(), {}, *args),
    "nnx": lambda *args: capture(NNXDirect(), *args),
}


def products(function, *args):
    """Counts the products that are computed: each jitted part is compiled alone."""
    count = 0
    for eqn in jax.make_jaxpr(function)(*args).eqns:
        count += eqn.primitive.name == "dot_general"
        if eqn.primitive.name in ("jit", "pjit"):
            jitted = jax.jit(jax.extend.core.jaxpr_as_fun(eqn.params["jaxpr"]))
            compiled = jitted.lower(*(x.aval for x in eqn.invars)).compile()
            count += instruction_counts(compiled)["dot"]
    return count


@pytest.mark.parametrize("flavor", EVALUATE)
@pytest.mark.parametrize(
    ("options", "extra"),
    [({}, 1), ({"implementation": "xla"}, 1), ({"max_logit": "lse_bound"}, 0)],
)
def test_evaluation_computes_no_max_logits(flavor, options, extra):
    if flavor == "nnx":
        skip_without_capture()
    q = draw(1, 3, 7, 2, 8)
    assert products(lambda q: EVALUATE[flavor](q, options), q) == 2
    assert products(lambda q: TRAIN[flavor](q, options), q) == 2 + extra


HOOKS = {
    "linen": [
        ({"dropout_rate": 0.5}, "dropout_rate=0.5"),
        ({"precision": "highest"}, "precision='highest'"),
        ({"einsum_dot_general": 1}, "einsum_dot_general=1"),
        ({"qk_attn_weights_einsum": 2}, "qk_attn_weights_einsum=2"),
        ({"attn_weights_value_einsum": 3}, "attn_weights_value_einsum=3"),
        ({"dropout_rate": 0.5, "precision": "high"}, "dropout_rate=0.5, precision='high'"),
    ],
    "nnx": [
        ({"dropout_rate": 0.5}, "dropout_rate=0.5"),
        ({"precision": "highest"}, "precision='highest'"),
        ({"input_positions": 4}, "input_positions=4"),
    ],
}


@pytest.mark.parametrize(
    ("flavor", "settings", "shown"), [(f, *case) for f, cases in HOOKS.items() for case in cases]
)
@pytest.mark.parametrize("form", ["max_logit='lse_bound'", "implementation='xla'"])
@pytest.mark.usefixtures("no_typecheck")
def test_arguments_that_only_flax_supports_raise(flavor, settings, shown, form):
    bound = form == "max_logit='lse_bound'"
    q = draw(1, 3, 7, 2, 8)
    with pytest.raises(ValueError, match="attention_fn") as error:
        getattr(mc, flavor).attention_fn(
            q,
            q,
            q,
            max_logit="lse_bound" if bound else "exact",
            implementation=None if bound else "xla",
            **settings,
        )
    used = f"{form} with implementation=None" if bound else f"max_logit='exact' with {form}"
    assert str(error.value) == (
        f"attention_fn: {used} does not support {shown}. Leave that out, or use "
        "max_logit='exact' with implementation=None, which is Flax's own attention."
    )


@pytest.mark.parametrize("call", CALLS)
def test_disabled_dropout_is_accepted(call):
    settings = {"dropout_rate": 0.5, "deterministic": True}
    out, _ = CALLS[call](X, options={"max_logit": "lse_bound"}, **settings)
    expected, _ = CALLS[call](X, **settings)
    # Measured 2e-7.
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_unknown_arguments_reach_flax():
    q = draw(1, 3, 7, 2, 8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'newer'"):
        mc.nnx.attention_fn(q, q, q, newer=1)


def sow_in_linen(x, name, cap, **settings):
    class Attention(nn.Module):
        @nn.compact
        def __call__(self, x):
            return mc.linen.sow_max_logits(self, x, **settings)

    setattr(Attention, name, cap)
    return run(Attention(), {}, x)[1]["max_logits"][0]


def sow_in_nnx(x, name, cap, **settings):
    class Attention(nnx.Module):
        def __call__(self, x):
            return mc.nnx.sow_max_logits(self, x, **settings)

    attention = Attention()
    setattr(attention, name, cap)
    return capture(attention, x)[1]["max_logits"][0]


SOW = {"linen": sow_in_linen, "nnx": sow_in_nnx}
ONES = jnp.ones((3, 2))


@pytest.mark.parametrize("flavor", SOW)
def test_sown_max_logits_have_no_gradient(flavor):
    gradient = jax.grad(lambda x: jnp.sum(SOW[flavor](x, "no_cap", None)))(ONES)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("flavor", SOW)
@pytest.mark.parametrize(
    "name",
    [
        "attn_logits_soft_cap",
        "attn_logit_softcapping",
        "logits_soft_cap",
        "atten_logit_cap",
        "attn_soft_cap",
        "logit_cap",
    ],
)
@pytest.mark.parametrize("cap", [None, 0, 0.0, -1, False, 50, 50.0, np.float32(50.0), jnp.ones(2)])
def test_sow_rejects_modules_with_soft_cap(flavor, name, cap):
    off = cap is None or (np.ndim(cap) == 0 and cap <= 0)
    raises = pytest.raises(ValueError, match=f"Attention.* has {name}=")
    with contextlib.nullcontext() if off else raises:
        SOW[flavor](ONES, name, cap)
    SOW[flavor](ONES, name, cap, before_soft_cap=True)


@needs_capture
def test_soft_cap_errors_have_path_and_fix():
    class Attention(nn.MultiHeadDotProductAttention):
        attn_logits_soft_cap: float = 50.0

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            Attention(2, attention_fn=mc.linen.attention_fn, name="attn")(x, sow_weights=True)

    with pytest.raises(ValueError, match="attention_fn") as error:
        Model().init(jax.random.key(0), X)
    assert str(error.value) == (
        "attention_fn: Attention at 'attn' has attn_logits_soft_cap=50.0, and attention_fn applies "
        "no soft cap. Leave the cap out, or compute the attention in the module and sow the logits "
        "before the cap: sow_max_logits(..., before_soft_cap=True)."
    )
    module = nnx_attention()
    module.attn_logits_soft_cap = 50.0
    with pytest.raises(ValueError, match="MultiHeadAttention has attn_logits_soft_cap=50"):
        module(X, sow_weights=True)
    with pytest.raises(ValueError, match="sow_max_logits") as error:
        sow_in_linen(ONES, "logit_cap", 30.0)
    assert str(error.value) == (
        "sow_max_logits: Attention at '(root)' has logit_cap=30.0. After a soft cap no logit is "
        "above the cap, and the clip would never act. Sow the max logits before the cap, such as "
        "max_attention_logit(query, key), and pass before_soft_cap=True."
    )


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + linen_attention(name=f"layer_{i}")(x, sow_weights=True)
        return x


class NNXModel(nnx.Module):
    def __init__(self):
        self.layer_0, self.layer_1 = nnx_attention(), nnx_attention()

    def __call__(self, x):
        for layer in (self.layer_0, self.layer_1):
            x = x + layer(x, sow_weights=True)
        return x


def plain_model(params, x):
    """The same model as a function of nested dicts."""
    stats = {}
    for name, layer in params.items():
        query, key, value = (
            jax.lax.dot_general(x, p["kernel"], (((2,), (0,)), ((), ()))) + p["bias"][None, None]
            for p in (layer["query"], layer["key"], layer["value"])
        )
        stats[name] = {"max_logits": mc.max_attention_logit(query, key)}
        out = nn.dot_product_attention(query, key, value)
        kernel = layer["out"]["kernel"]
        out = jax.lax.dot_general(out, kernel, (((2, 3), (0, 1)), ((), ())))
        x = x + out + layer["out"]["bias"][None, None]
    return x, stats


def test_linen_nnx_and_functions_clip_equally_bit_for_bit():
    params = LinenModel().init(jax.random.key(0), X)["params"]
    # Larger by layer, so that one layer is clipped and the other is not.
    params["layer_1"] = jax.tree.map(lambda x: 4 * x, params["layer_1"])
    model = NNXModel()
    nnx.update(model, params)
    state = nnx.state(model, nnx.Param)
    chex.assert_trees_all_equal(nnx.to_pure_dict(state), params)
    _, in_linen = run(LinenModel(), {"params": params}, X)
    _, in_nnx = capture(model, X)
    _, plain = plain_model(params, X)
    new, info = mc.qk_clip(params, plain, threshold=2.1)
    assert info.clipped_heads == 3
    for tree, stats in ((params, in_linen), (state, in_nnx), (params, nnx.to_pure_dict(in_nnx))):
        other, other_info = mc.qk_clip(tree, stats, threshold=2.1)
        chex.assert_trees_all_equal(other_info, info)
        other = nnx.to_pure_dict(other) if isinstance(other, nnx.State) else other
        assert jax.tree.structure(other) == jax.tree.structure(new)
        assert all(map(same_bits, jax.tree.leaves(other), jax.tree.leaves(new)))


@pytest.mark.every_combination
@pytest.mark.parametrize("options", [{}, {"max_logit": "lse_bound"}, {"implementation": "xla"}])
@pytest.mark.parametrize("masked", [False, True])
def test_is_causal_of_linen_equals_a_causal_mask(options, masked):
    padding = jnp.arange(X.shape[1])[None, None, None] < 5 if masked else None
    causal = nn.make_causal_mask(X[..., 0])
    both = nn.combine_masks(causal, padding)
    expected, stats = linen_call(X, both, options=options)
    expected = np.asarray(expected)
    actual, causal_stats = linen_call(X, padding, options={"is_causal": True, **options})
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(causal_stats, stats, rtol=1e-6)
    plain, _ = linen_call(X, padding, options=options)
    assert not np.allclose(np.asarray(plain), expected)


@needs_capture
@pytest.mark.parametrize("name", ["attention_fn", "sow_max_logits"])
def test_a_module_of_the_other_api_raises_with_the_right_function(name, no_typecheck):
    linen_module, nnx_module = nn.Dense(2), nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    x = jnp.ones((1, 3, 2, 4))

    def call(api, module):
        function = getattr(api, name)
        return function(module, x) if name == "sow_max_logits" else function(x, x, x, module=module)

    with pytest.raises(TypeError, match=f"Linear, expected a module of flax.linen.*mc.nnx.{name}"):
        call(mc.linen, nnx_module)
    with pytest.raises(TypeError, match=f"Dense, expected a module of flax.nnx.*mc.linen.{name}"):
        call(mc.nnx, linen_module)
