"""`overrides=` and the warnings that it silences."""

import ast
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.support.role_checks import roles_of, warnings_of

W = jnp.asarray(np.random.default_rng(0).normal(size=(8, 24)), jnp.float32)
LAYER = {"up": {"kernel": W, "bias": W[0]}, "norm": {"scale": W[0]}}
PARAMS = {"layers": [LAYER, LAYER], "probe_in": {"kernel": jnp.ones((3, 96))}}
TRANSFORMS = [mc.muon, lambda lr, **k: mc.muonclip(lr, threshold=None, **k)]


def optimizers(params, **arguments):
    return {row.path: row.optimizer for row in mc.routing_table(params, **arguments).rows}


def test_other_parameters_keep_their_role_and_reason():
    before = mc.routing_table(PARAMS).rows
    numbers = mc.MuonDimensionNumbers(-1, -2)
    after = mc.routing_table(PARAMS, overrides={"layers/*/up/kernel": numbers}).rows
    for old, new in zip(before, after, strict=True):
        if old.path.endswith("up/kernel"):
            assert (new.n_in, new.n_out) == (24, 8)
            assert new.reason == "override 'layers/*/up/kernel'"
        else:
            assert new == old


def test_none_is_adamw_and_numbers_are_muon():
    changed = optimizers(PARAMS, overrides={"*/kernel": None, "layers/0/up/kernel": None})
    assert set(changed.values()) == {"adamw"}
    head = {"lm_head": {"kernel": W}}
    assert optimizers(head, overrides={"lm_head/*": mc.MuonDimensionNumbers()}) == {
        "lm_head/kernel": "muon"
    }


def test_the_last_pattern_that_matches_counts():
    numbers = mc.MuonDimensionNumbers()
    overrides = {"*": None, "layers/1/up/kernel": numbers}
    found = optimizers(PARAMS, overrides=overrides)
    assert [path for path, optimizer in found.items() if optimizer == "muon"] == [
        "layers/1/up/kernel"
    ]
    reverse = dict(reversed(overrides.items()))
    assert set(optimizers(PARAMS, overrides=reverse).values()) == {"adamw"}


def test_overrides_come_after_dimension_numbers():
    found = optimizers({"a": W, "b": W}, muon_weight_dimension_numbers=mc.MuonDimensionNumbers())
    assert set(found.values()) == {"muon"}
    table = mc.routing_table(
        {"a": W, "b": W}, mc.MuonDimensionNumbers(), overrides={"b": None}
    ).rows
    assert [(row.optimizer, row.reason) for row in table] == [
        ("muon", "given"),
        ("adamw", "override 'b'"),
    ]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_updates_follow_the_override(transform):
    params = {"a": {"kernel": W}, "b": {"kernel": W}}
    tx = transform(0.1, overrides={"b/*": None}, weight_decay=0.0)
    plain = transform(0.1, weight_decay=0.0)
    got, _ = tx.update(params, tx.init(params), params)
    expected, _ = plain.update(params, plain.init(params), params)
    np.testing.assert_array_equal(got["a"]["kernel"], expected["a"]["kernel"])
    # The first step of Adam has one magnitude.
    magnitudes = np.abs(got["b"]["kernel"])
    np.testing.assert_allclose(magnitudes, magnitudes[0, 0], rtol=1e-4)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_pattern_that_matches_nothing_raises_with_the_nearest_path(transform):
    tx = transform(0.1, overrides={"layers/0/up/kernle": None, "*/bias": None})
    with pytest.raises(ValueError, match="1 of 2 overrides match no parameter") as error:
        tx.init(PARAMS)
    assert "'layers/0/up/kernle': nearest is 'layers/0/up/kernel'." in str(error.value)


@pytest.mark.parametrize("overrides", [["up"], "up", {"up": True}, {"up": (0, 1)}, {3: None}])
@pytest.mark.parametrize("transform", [*TRANSFORMS, lambda lr, **k: mc.routing_table(PARAMS, **k)])
def test_other_types_raise_when_built(transform, overrides):
    with pytest.raises(TypeError, match="overrides"):
        transform(0.1, overrides=overrides)


def test_numbers_that_do_not_fit_name_the_path():
    for numbers in (mc.MuonDimensionNumbers(-3, -1), mc.MuonDimensionNumbers(0, 0)):
        with pytest.raises(ValueError, match="norm/0/up"):
            mc.muon(0.1, overrides={"norm/0/up": numbers}).init({"norm": [{"up": W}]})
        with pytest.raises(ValueError, match="norm/0/up"):
            mc.routing_table({"norm": [{"up": W}]}, overrides={"norm/0/up": numbers})


def test_a_pattern_may_match_what_a_partition_hides():
    for labels in (
        {"layers": "muon", "probe_in": "frozen"},
        {"layers": "muon", "probe_in": {"kernel": "frozen"}},
    ):
        for pattern in ("probe_in/*", "*/kernel", "probe_in/kernel"):
            muon = mc.muon(0.1, overrides={pattern: None})
            tx = optax.partition({"muon": muon, "frozen": optax.set_to_zero()}, labels)
            tx.update(PARAMS, tx.init(PARAMS), PARAMS)
        muon = mc.muon(0.1, overrides={"prob/*": None})
        tx = optax.partition({"muon": muon, "frozen": optax.set_to_zero()}, labels)
        with pytest.raises(ValueError, match="match no parameter"):
            tx.init(PARAMS)


# Warnings


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_init_issues_one_warning_and_update_none(transform):
    params = {**PARAMS, "other": {"kernel": jnp.ones((4, 200))}}
    tx = transform(0.1)
    with pytest.warns(UserWarning, match="check the optimizer") as record:
        state = tx.init(params)
    (warning,) = record
    text = str(warning.message)
    assert "probe_in/kernel (3, 96): Muon on 1 x 3 x 96" in text
    assert "other/kernel (4, 200)" in text
    tx.update(params, state, params)  # warnings are errors in the tests


def test_an_override_silences_its_warning_alone():
    params = {"a": {"kernel": jnp.ones((3, 96))}, "b": {"kernel": jnp.ones((3, 96))}}
    assert len(mc.routing_table(params).warnings) == 2
    for value in (None, mc.MuonDimensionNumbers()):
        (text,) = mc.routing_table(params, overrides={"a/*": value}).warnings
        assert text.startswith("b/kernel")
    mc.muon(0.1, overrides={"*/kernel": None}).init(params)


def test_the_fix_in_a_warning_works():
    params = {"layers": [{"in": jnp.ones((3, 96))} for _ in range(3)]}
    (text,) = mc.routing_table(params).warnings
    assert text.startswith("layers/{0…2}/in (3, 96) (3 parameters)")
    for fix in text.split("overrides=")[1:]:
        overrides = eval(fix[: fix.index("}") + 1], {"mc": mc})
        table = mc.routing_table(params, overrides=overrides)
        assert not table.warnings
        assert {row.optimizer for row in table.rows} == (
            {"adamw"} if overrides["layers/*/in"] is None else {"muon"}
        )


def test_given_dimension_numbers_are_not_doubted():
    params = {"a": jnp.ones((3, 96))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mc.muon(0.1, muon_weight_dimension_numbers=mc.MuonDimensionNumbers()).init(params)
    assert not mc.routing_table(params, mc.MuonDimensionNumbers()).warnings


def test_shapes_are_enough():
    shapes = jax.eval_shape(lambda: PARAMS)
    assert str(mc.routing_table(shapes)) == str(mc.routing_table(PARAMS))


@pytest.mark.parametrize("make", [mc.routing_table, lambda p, **o: mc.muon(0.1, **o).init(p)])
def test_axes_that_a_parameter_does_not_have_name_the_override(make):
    params = {"up": {"kernel": jnp.ones((4, 8))}}
    wrong = {"up/*": mc.MuonDimensionNumbers(0, 5)}
    with pytest.raises(ValueError, match=r"override 'up/\*': up/kernel \(4, 8\)"):
        make(params, overrides=wrong)


def test_a_proposed_override_matches_only_the_parameters_of_its_warning():
    layers = [(3, 96), (96, 96), (3, 96), (96, 96)]
    params = {f"up_{i}": {"kernel": jnp.ones(shape)} for i, shape in enumerate(layers)}
    (text,) = mc.routing_table(params).warnings
    assert "up_{0,2}/kernel" in text
    assert 'overrides={"up_0/kernel": None, "up_2/kernel": None}' in text
    params.pop("up_1")
    params.pop("up_3")
    assert 'overrides={"up_*/kernel": None}' in mc.routing_table(params).warnings[0]


def test_a_warning_about_a_convolution_proposes_its_axes():
    tree = {"Conv_0": {"kernel": jnp.ones((3, 3, 1, 32))}}
    (text,) = mc.routing_table(tree).warnings
    assert "mc.MuonDimensionNumbers((-4, -3, -2), -1)" in text


def test_printed_overrides_quote_the_names_of_parameters():
    name = 'a"b\nc\\d'
    tree = {name: {"weight": (32, 8)}}
    (text,) = warnings_of(tree)
    printed = text.partition("For AdamW: overrides=")[2].partition(". To keep")[0]
    override = ast.literal_eval(printed)
    assert override == {f"{name}/weight": None}
    assert roles_of(tree, overrides=override) == {f"{name}/weight": "adamw"}
