"""Arguments, states and parameters of another model: one short error with paths and the fix."""

import jax
import jax.numpy as jnp
import optax
import pytest

import muonclip_jax as mc

W = jnp.ones((4, 4))


def model(layers):
    layer = {"attn": {"query": W, "key": W}, "up": {"kernel": W}}
    return {"first": {"kernel": W}, **{f"layers_{i}": layer for i in range(layers)}}


SMALL, BIG = model(2), model(42)
NUMBERS = mc.MuonDimensionNumbers(-2, -1)


def numbers_of(params):
    return jax.tree.map(lambda _: NUMBERS, params)


def run(tx, init=SMALL, updates=SMALL, params=SMALL):
    """Traces one update; nothing is compiled."""
    state = jax.eval_shape(tx.init, init)
    jax.eval_shape(tx.update, updates, state, params)


BY_NAME = (
    "Build it from these parameters; or leave it out, so that roles are found by names and "
    "shapes, and change single parameters with overrides=. mc.routing_table(params) shows them."
)
ARGUMENTS = {
    "muon: muon_weight_dimension_numbers": (
        lambda tree: mc.muon(0.1, muon_weight_dimension_numbers=numbers_of(tree)),
        BY_NAME,
    ),
    "muonclip: muon_weight_dimension_numbers": (
        lambda tree: mc.muonclip(
            0.1, muon_weight_dimension_numbers=lambda _: numbers_of(tree), threshold=None
        ),
        BY_NAME,
    ),
    "scale_by_muon: weight_dimension_numbers": (
        lambda tree: mc.scale_by_muon(weight_dimension_numbers=numbers_of(tree)),
        "weight_dimension_numbers=jax.tree.map(lambda p: mc.MuonDimensionNumbers(-2, -1), params)",
    ),
    "muon: weight_decay_mask": (
        lambda tree: mc.muon(0.1, weight_decay_mask=jax.tree.map(lambda _: True, tree)),
        "weight_decay_mask=jax.tree.map(lambda p: p.ndim > 1, params)",
    ),
    "add_cautious_weight_decay: mask": (
        lambda tree: mc.add_cautious_weight_decay(0.1, mask=jax.tree.map(lambda _: True, tree)),
        "mask=jax.tree.map(lambda p: p.ndim > 1, params)",
    ),
    "scale_by_sinkhorn: token_axis": (
        lambda tree: mc.scale_by_sinkhorn(token_axis=jax.tree.map(lambda _: -2, tree)),
        "token_axis=jax.tree.map(lambda p: -2, params)",
    ),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_another_model_raises_with_the_fix(name):
    build, fix = ARGUMENTS[name]
    for other, line in (
        (BIG, "got 3 entries, expected no entry."),
        (model(0), "got no entry, expected 3 entries."),
    ):
        with pytest.raises(ValueError, match="does not match the parameters") as error:
            run(build(other))
        first, second, third = str(error.value).splitlines()
        start = "layers_2 and 39 more layers" if other is BIG else "layers_0 and 1 more layer"
        assert (first, second) == (f"{name} does not match the parameters.", f"  {start}: {line}")
        assert fix in third
    if "tree.map" in fix:
        call, (argument, _, value) = getattr(mc, name.split(":")[0]), fix.partition("=")
        value = eval(value, {"jax": jax, "mc": mc, "params": SMALL})
        run(call(*[0.1] * name.startswith("muon:"), **{argument: value}))


@pytest.mark.parametrize("is_root_given", [True, False])
def test_a_root_key_on_one_side_gets_its_own_fix(is_root_given):
    given = {"params": numbers_of(SMALL)} if is_root_given else numbers_of(SMALL)
    params = SMALL if is_root_given else {"params": SMALL}
    with pytest.raises(ValueError, match="does not match the parameters") as error:
        jax.eval_shape(mc.muon(0.1, muon_weight_dimension_numbers=given).init, params)
    fix = str(error.value).rpartition("muon_weight_dimension_numbers=")[2].removesuffix(".")
    value = eval(fix, {"muon_weight_dimension_numbers": given})
    jax.eval_shape(mc.muon(0.1, muon_weight_dimension_numbers=value).init, params)


TRANSFORMS = {
    "muon": lambda: mc.muon(0.1),
    "scale_by_muon": mc.scale_by_muon,
    "scale_by_sinkhorn": mc.scale_by_sinkhorn,
    "normalize_neurons": mc.normalize_neurons,
    "add_cautious_weight_decay": lambda: mc.add_cautious_weight_decay(0.1),
}


@pytest.mark.parametrize("name", [n for n in TRANSFORMS if "decay" not in n])
def test_a_state_of_another_model_raises_with_the_fix(name):
    with pytest.raises(ValueError, match="do not match the state") as error:
        run(TRANSFORMS[name](), init=BIG)
    assert str(error.value) == (
        f"{name}: the gradients do not match the state.\n"
        "  layers_2 and 39 more layers: got no leaf, expected 3 leaves.\n"
        "Call init with the parameters of these gradients."
    )


def test_a_state_of_a_smaller_model_is_no_other_assignment():
    with pytest.raises(ValueError, match="do not match the state") as error:
        run(mc.muon(0.1), updates=BIG, params=BIG)
    assert "  layers_2 and 39 more layers: got 3 leaves, expected no leaf." in str(error.value)


ADAMW = "(ScaleByAdamState, EmptyState, EmptyState)"
MUON = (
    "PartitionState(adam: MaskedState((ScaleByAdamState, EmptyState, EmptyState)), "
    "muon: MaskedState((ScaleByMuonState, EmptyState, EmptyState, EmptyState)))"
)
EXPECTED = {
    "muon": (lambda: mc.muon(0.1), MUON),
    "muonclip": (lambda: mc.muonclip(0.1, threshold=lambda step: 100.0), MUON),
    "scale_by_muon": (mc.scale_by_muon, "ScaleByMuonState"),
    "scale_by_sinkhorn": (mc.scale_by_sinkhorn, "ScaleBySinkhornState"),
    "normalize_neurons": (mc.normalize_neurons, "NormalizeNeuronsState"),
    "add_cautious_weight_decay": (
        lambda: mc.add_cautious_weight_decay(lambda step: 0.1),
        "WeightDecaySchedule",
    ),
}
SCHEDULE = MUON.replace("EmptyState)", "ScaleByScheduleState)")
OTHERS = {
    "adamw": (lambda: optax.adamw(0.1), ADAMW),
    "one transform": (lambda: optax.scale_by_adam(), "ScaleByAdamState"),
    "a chain around it": (lambda: optax.chain(mc.muon(0.1)), f"({MUON})"),
    "Muon of optax": (lambda: optax.contrib.scale_by_muon(), "MuonState"),
    "another partition": (
        lambda: optax.partition({"all": optax.sgd(0.1)}, "all"),
        "PartitionState(all: MaskedState((EmptyState, EmptyState)))",
    ),
}


def error_with_state(name, state):
    optimizer = EXPECTED[name][0]()
    with pytest.raises(ValueError, match=f"^{name}: the state is from another") as error:
        jax.eval_shape(lambda s: optimizer.update(SMALL, s, SMALL, max_logits={}), state)
    return str(error.value)


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("name", EXPECTED)
def test_a_state_of_another_optimizer_raises_with_the_fix(name, other):
    build, got = OTHERS[other]
    assert error_with_state(name, jax.eval_shape(build().init, SMALL)) == (
        f"{name}: the state is from another optimizer.\n  got {got}, expected "
        f"{EXPECTED[name][1]}.\n"
        "Pass the state of this optimizer: state = optimizer.init(params)."
    )


def test_a_state_that_is_no_state_raises_with_the_fix():
    assert f"got NoneType, expected {MUON}." in error_with_state("muon", None)
    assert f"got dict, expected {MUON}." in error_with_state("muon", SMALL)


def test_a_state_without_the_step_of_a_schedule_raises_with_the_fix():
    state = jax.eval_shape(mc.muon(0.1).init, SMALL)
    with pytest.raises(ValueError, match="another optimizer") as error:
        jax.eval_shape(mc.muon(lambda step: 0.1).update, SMALL, state, SMALL)
    assert f"got {MUON}, expected {SCHEDULE}." in str(error.value)


@pytest.mark.parametrize("name", [n for n in TRANSFORMS if "neurons" not in n])
def test_parameters_of_another_model_raise_with_the_fix(name):
    with pytest.raises(ValueError, match="do not match the gradients") as error:
        run(TRANSFORMS[name](), params=BIG)
    assert str(error.value) == (
        f"{name}: the parameters do not match the gradients.\n"
        "  layers_2 and 39 more layers: got 3 leaves, expected no leaf.\n"
        "Pass the parameters of these gradients: tx.update(grads, state, params)."
    )


def test_adamw_parameters_of_another_shape_are_named():
    params, other = ({"embed": jnp.ones((n, 4)), "up": W} for n in (50, 60))
    with pytest.raises(ValueError, match=r"embed: got \(50, 4\), expected \(60, 4\)"):
        run(mc.muon(0.1), init=other, updates=params, params=params)


def test_other_errors_of_an_update_stay():
    tx = mc.muon(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="params") as error:
        tx.update(SMALL, tx.init(SMALL), None)
    assert "do not match" not in str(error.value)
