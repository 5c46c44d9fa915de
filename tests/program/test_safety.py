"""The rules of safety: what cannot be read is an error or a warning, never a guess."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from tests.support.program_attention import PARAMS, X, array, attend, found
from tests.support.program_models import FAMILIES, TOKENS, loss_of

# Attention that is not found, or not understood


@pytest.mark.parametrize("expect", [0, 2, 24])
def test_another_number_of_attentions_is_an_error_with_the_table(expect):
    with pytest.raises(ValueError, match=f"found 1 attention, expected expect={expect}") as error:
        found(attend, PARAMS, X, expect=expect)
    assert "4 heads of 8 columns; queries q; keys k" in str(error.value)


def test_nothing_found_is_an_error():
    with pytest.raises(ValueError, match="found 0 attentions, expected expect=1"):
        found(lambda p, x: (x @ p["w"]).sum(), {"w": array(16, 4)}, X)


@pytest.mark.parametrize("expect", [True, 1.0, "1", None])
def test_expect_must_be_an_integer(expect, no_typecheck):
    with pytest.raises(TypeError, match="expect must be an integer"):
        mc.with_max_logits(attend, expect=expect)


def test_a_softmax_without_a_row_maximum_is_an_error():
    def soft(logits):
        weights = jnp.exp(logits)
        return weights / weights.sum(-1, keepdims=True)

    fn = functools.partial(attend, soft=soft)
    with pytest.raises(ValueError, match="softmax over a product of activations"):
        found(fn, PARAMS, X)
    assert any("is not understood" in text for text in mc.analyze(fn, PARAMS, X).warnings)


@pytest.mark.parametrize("as_product", [False, True], ids=["sum", "product"])
def test_a_softmax_over_edges_of_a_graph_is_an_error(as_product):
    edges = np.random.default_rng(0).integers(0, 6, (2, 20))

    def fn(p, x):
        senders, receivers = edges
        q, k, v = (jnp.einsum("nd,dhk->nhk", x[0], p[n]) for n in "qkv")
        pairs = q[receivers], k[senders]
        logits = jnp.einsum("ehk,ehk->eh", *pairs) if as_product else (pairs[0] * pairs[1]).sum(-1)
        top = jax.ops.segment_max(logits, receivers, 6)
        weights = jnp.exp(logits - top[receivers])
        total = jax.ops.segment_sum(weights, receivers, 6)
        out = jax.ops.segment_sum(weights[..., None] * v[senders], receivers, 6)
        return (out / total[..., None]).sum()

    with pytest.raises(ValueError, match="not understood: scatter"):
        found(fn, {n: PARAMS[n] for n in "qkv"}, X, expect=0)


# Attention whose heads no clip can scale


def test_queries_without_a_parameter_are_an_error():
    def fn(p, x):
        logits = jnp.einsum("btd,bsd->bts", x, x @ p["k"])
        return jnp.einsum("bts,bsd->btd", jax.nn.softmax(logits), x).sum()

    with pytest.raises(ValueError, match="its queries come from no parameter"):
        found(fn, {"k": array(16, 16)}, X)


def test_talking_heads_are_an_error():
    params = PARAMS | {"mix": array(4, 4)}

    def mix(logits, p):
        return jnp.einsum("bhts,hg->bgts", logits, p["mix"])

    def fn(p, x):
        return attend(p, x, lambda logits: mix(logits, p))

    with pytest.raises(ValueError, match="talking heads"):
        found(fn, params, X)

    def masked(p, x):
        return attend(p, x, lambda u: jnp.where(jnp.tri(6, dtype=bool), mix(u, p), -1e9))

    with pytest.raises(ValueError, match="talking heads"):
        found(masked, params, X)


def test_a_frozen_base_beside_an_adapter_is_an_error():
    base = array(16, 4, 8)

    def fn(p, x, base):
        q = jnp.einsum("btd,dhk->bthk", x, base)
        q = q + jnp.einsum("btr,rhk->bthk", x @ p["a"], p["b"])
        k = jnp.einsum("btd,dhk->bthk", x, p["k"])
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        return jnp.einsum("bhts,bshk->bthk", weights, k).sum()

    params = {"a": array(16, 3), "b": array(3, 4, 8), "k": PARAMS["k"]}
    with pytest.raises(ValueError, match="an array that is no parameter is on the way"):
        found(fn, params, X, base)
    with pytest.raises(ValueError, match="an array that is no parameter is on the way"):
        found(lambda p, x: fn(p, x, base), params, X)


def test_layers_chosen_by_a_loop_counter_are_an_error():
    stacked = jax.tree.map(lambda w: jnp.stack([w, w]), PARAMS)

    def fn(p, x):
        def body(i, total):
            return total + attend(jax.tree.map(lambda w: w[i], p), x)

        return jax.lax.fori_loop(0, 2, body, 0.0)

    with pytest.raises(ValueError, match="its layer is chosen by a loop counter"):
        found(fn, stacked, X)


def test_heads_split_by_shard_map_are_an_error():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",))
    spec = jax.sharding.PartitionSpec

    def fn(p, x):
        specs = {n: spec(None, "model") for n in "qkv"} | {"o": spec("model")}

        def local(p, x):
            return jax.lax.psum(attend(p, x), "model")

        return jax.shard_map(local, mesh=mesh, in_specs=(specs, spec()), out_specs=spec())(p, x)

    with pytest.raises(ValueError, match="its heads are split by shard_map"):
        found(fn, PARAMS, X)


# Roles that the program does not decide, or decides against names


def test_undecided_parameters_go_by_name_with_one_warning():
    params = {"a": array(16, 3), "b": array(3, 16), "router": array(16, 16), "up": array(16, 16)}

    def fn(p, x):
        x = jnp.tanh(x @ (p["a"] @ p["b"]))
        return loss_of(jnp.tanh(jnp.tanh(x @ p["router"]) @ p["up"]) @ p["up"].T)

    analysis = mc.analyze(fn, params, X)
    assert {p: r.optimizer for p, r in analysis.roles.items()} == {
        "a": "unknown", "b": "unknown", "router": "muon", "up": "unknown"
    }  # fmt: skip
    (warning,) = analysis.warnings
    assert all(text in warning for text in ("a (16, 3)", "alone", "up (16, 16)", "in another"))
    assert analysis.decision("a").optimizer == analysis.names["a"].optimizer
    assert analysis.dimension_numbers["router"] is None
    assert "router (16, 16): Muon -2 -> -1 by the program" in str(analysis)


def test_the_program_wins_over_the_name():
    params = {"embedding": array(16, 24), "weird": array(24, 16)}

    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["weird"].T) @ p["embedding"].T).sum()

    analysis = mc.analyze(fn, params, X)
    assert analysis.roles["weird"].optimizer == "muon"
    assert analysis.roles["weird"].dimension_numbers == (-1, -2)
    assert "name that suggests another role" in str(analysis)


def test_the_program_wins_over_a_guess_from_shapes():
    """Both have a side of the size of the vocabulary, outside of any block."""
    params = {"embed": array(64, 16), "first": array(16, 64), "second": array(64, 16)}
    params |= {"head": array(16, 64)}

    def fn(p, tokens):
        x = p["embed"][tokens]
        return loss_of((x + jax.nn.relu(x @ p["first"]) @ p["second"]) @ p["head"])

    analysis = mc.analyze(fn, params, TOKENS)
    assert analysis.names["first"].reason.startswith("a guess: output head")
    assert {p: analysis.decision(p).optimizer for p in params} == {
        "embed": "adamw", "first": "muon", "second": "muon", "head": "adamw"
    }  # fmt: skip


# Gradients, and parameters without a use


@pytest.mark.parametrize("transform", [jax.grad, jax.value_and_grad])
def test_a_gradient_function_is_an_error(transform):
    family = FAMILIES["gpt_scanned"]
    with pytest.raises(ValueError, match="fn computes gradients"):
        mc.analyze(transform(family.fn), family.params(), *family.args)


def test_a_train_step_has_the_max_logits_of_its_forward_pass():
    family = FAMILIES["gpt_scanned"]
    params = family.params()

    def step(params, tokens):
        loss, grads = jax.value_and_grad(family.fn)(params, tokens)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    (new, loss), stats = jax.jit(mc.with_max_logits(step, expect=3))(params, TOKENS)
    plain, plain_loss = jax.jit(step)(params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, (new, loss), (plain, plain_loss))
    _, expected = jax.jit(mc.with_max_logits(family.fn, expect=3))(params, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, stats, expected)


def test_unused_parameters_are_reported():
    analysis = mc.analyze(attend, PARAMS | {"unused": array(4, 4)}, X)
    assert analysis.roles["unused"].reason == "not used"
    assert "unused (4, 4) (not used)" in analysis.warnings[0]


# Primitives without a rule


def test_a_primitive_without_a_rule_loses_axes_and_is_counted():
    params = PARAMS | {"up": array(16, 16)}

    def fn(p, x):
        return attend(p, jnp.linalg.qr(x)[0] @ p["up"])

    analysis = mc.analyze(fn, params, array(2, 16, 16))
    assert "primitives without a rule" in analysis.warnings[-1]

    def mixed(p, x):
        return jnp.tanh(x @ jnp.linalg.qr(p["up"])[0]).sum()

    assert mc.analyze(mixed, {"up": array(16, 16)}, X).roles["up"].optimizer == "unknown"


# Tables and arguments


def test_routing_table_without_a_program_goes_by_name():
    table = mc.routing_table(PARAMS)
    assert {row.path for row in table.rows} == set(PARAMS)


def test_has_aux():
    fn = mc.with_max_logits(lambda p, x: (attend(p, x), {"n": 3}), expect=1, has_aux=True)
    out, (aux, stats) = fn(PARAMS, X)
    assert (out.shape, aux["n"], stats["max_logits"].shape) == ((), 3, (2, 4))
    with pytest.raises(ValueError, match="no pair"):
        found(attend, PARAMS, X, has_aux=True)


def test_parameters_must_have_arrays():
    with pytest.raises(ValueError, match="has no arrays"):
        mc.analyze(lambda p, x: x.sum(), {}, X)
