"""An analysis as dimension numbers: the optimizers use the roles that the program shows."""

import jax
import jax.numpy as jnp
import pytest

import muonclip_jax as mc

SHAPES = {"table": (32, 8), "query": (8, 2, 4), "key": (8, 2, 4), "g": (16, 8), "out": (16, 32)}


def loss(params, tokens):
    """A model whose matrix `g` is stored (outputs, inputs), and has the name of a gain."""
    x = params["table"][tokens]
    q, k = (jnp.einsum("btd,dhk->bthk", x, params[name]) for name in ("query", "key"))
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 2)
    x = jnp.einsum("bhts,bshk->bthk", weights, k).reshape(x.shape)
    return (jax.nn.relu(x @ params["g"].T) @ params["out"]).mean()


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), len(SHAPES))
    return {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, SHAPES.items(), strict=True)}


@pytest.fixture(scope="module")
def analysis(params):
    return mc.analyze(loss, params, jnp.zeros((2, 6), int))


def test_the_table_shows_the_reasons_of_the_program(params, analysis):
    rows = {row.path: row for row in mc.routing_table(params, analysis).rows}
    assert {path for path, row in rows.items() if row.optimizer == "muon"} == {"g", "key", "query"}
    assert (rows["g"].n_in, rows["g"].n_out) == (8, 16)
    assert {path: row.reason for path, row in rows.items()} == {
        path: analysis.decision(path).reason for path in SHAPES
    }


@pytest.mark.parametrize("analyzed", ["layout", "numbers"])
def test_updates_use_the_roles_of_the_program(params, analysis, analyzed):
    def update(**arguments):
        tx = mc.muonclip(0.1, threshold=float("inf"), consistent_rms="spectral", **arguments)
        stats = {"max_logits": jnp.zeros((2, 2))}
        return tx.update(params, tx.init(params), params, max_logits=stats)[0]

    expected = update(layout=analysis, muon_weight_dimension_numbers=analysis.dimension_numbers)
    numbers = {"muon_weight_dimension_numbers": analysis} if analyzed == "numbers" else {}
    got = update(layout=analysis, **numbers)
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), got, expected))


def test_another_model_raises_with_its_parameters(params, analysis):
    other = {**params, "g": jnp.ones((24, 8)), "more": jnp.ones((8, 8))}
    with pytest.raises(ValueError, match="the analysis is of another model") as error:
        mc.muon(0.1, muon_weight_dimension_numbers=analysis).init(other)
    assert "  g: got (24, 8), expected (16, 8)." in str(error.value)
    assert "  more: got (8, 8), expected no such parameter." in str(error.value)


def test_an_override_has_precedence(params, analysis):
    table = mc.routing_table(params, analysis, overrides={"g": None})
    assert {row.path for row in table.rows if row.optimizer == "muon"} == {"key", "query"}
