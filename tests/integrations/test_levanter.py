"""Our side of Levanter, without Levanter: roles by axis names, and max logits as gradients."""

import importlib.util
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from muonclip_jax.integrations import levanter
from muonclip_jax.integrations.levanter import dimension_numbers
from muonclip_jax.integrations.levanter.gradient_slot import arrived_once, attach, joined
from muonclip_jax.integrations.levanter.required import required
from tests.integrations.levanter_cases import GOLDEN, Axis, Named, Stacked, lines, stand_in

PER_MODEL: dict[str, list[str]] = {}
for line in GOLDEN.read_text().splitlines():
    PER_MODEL.setdefault(line.split(" | ")[0], []).append(line)


def roles(params, numbers):
    return {row.path: str(row.parts[0]) for row in mc.routing_table(params, numbers).rows if row[3]}


@pytest.fixture(scope="module")
def llama():
    return stand_in(PER_MODEL["llama"])


# Each line of the golden file is one parameter of a model of Levanter;
# `trained_in_levanter_optimizer.py` compares the file with the models.
def test_roles_follow_from_axis_names():
    for model, golden in PER_MODEL.items():
        found = lines(model, stand_in(golden), muon_weight_dimension_numbers=dimension_numbers)
        found = [line.replace(" | blocks/", " | ") for line in found]
        assert found == sorted(golden), model


def test_per_head_splits_queries_keys_and_values(llama):
    found = roles(llama, lambda params: dimension_numbers(params, per_head=True))
    layer = "blocks/transformer/layers/stacked/self_attn"
    assert {name: found[f"{layer}/{name}_proj/weight/array"] for name in "qkvo"} == {
        "q": "8 x 32 x 8",  # layers x key heads x groups
        "k": "4 x 32 x 8",
        "v": "4 x 32 x 8",
        "o": "2 x 32 x 32",
    }


def test_per_head_needs_heads(llama):
    heads = ("q_proj", "k_proj", "v_proj")
    rest = {path: x for path, x in llama.blocks.items() if not path.endswith(heads)}
    with pytest.raises(ValueError, match="per_head: no layer has the output axes"):
        dimension_numbers(Stacked(rest, llama.Block), per_head=True)


def test_parameters_without_a_layer_are_listed_in_one_warning():
    vector = Named(np.ones((2, 4), np.float32), (Axis("layers", 2), Axis("embed", 4)))
    tree = {"plain": {"kernel": np.ones((2, 3, 4), np.float32)}, "gain": vector}
    with pytest.warns(UserWarning, match=r"plain/kernel \(2, 3, 4\): muon") as caught:
        numbers = dimension_numbers(Stacked(tree, Axis("layers", 2)))
    assert len(caught) == 1
    assert "gain" not in str(caught[0].message)
    assert numbers.blocks["plain"]["kernel"] == mc.MuonDimensionNumbers(-2, -1)
    assert numbers.blocks["gain"].array is None


def test_a_step_keeps_the_structure_of_the_model(llama):
    few = ("k_proj", "lm_head", "transformer/norm")
    model = {path: x for path, x in llama.blocks.items() if path.endswith(few)}

    def make(learning_rate):
        return mc.muonclip(
            learning_rate, threshold=None, muon_weight_dimension_numbers=dimension_numbers
        )

    tx = optax.inject_hyperparams(make)(learning_rate=optax.constant_schedule(1e-3))
    grads = jax.tree.map(lambda x: np.full_like(x, 0.5), model)
    updates, _ = jax.eval_shape(tx.update, grads, tx.init(model), model)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, model)


# --- max logits as gradients ----------------------------------------------------------------------


def zeros(*shape):
    return jnp.zeros(shape), jnp.zeros(shape)


def slot_of(loss, *shape):
    return jax.grad(loss)(zeros(*shape))


def test_the_gradient_of_a_slot_is_the_statistic():
    s = jnp.array([3.25, -jnp.inf])

    def loss(slot, scale=1.0):
        return scale * attach(jnp.ones(2, jnp.bfloat16), slot, s).sum()

    chex.assert_trees_all_equal(slot_of(loss, 2), (s, jnp.ones(2)))
    chex.assert_trees_all_equal(slot_of(lambda slot: loss(slot, scale=1024.0), 2), (s, jnp.ones(2)))


def test_slots_leave_scanned_and_rematerialized_layers():
    @jax.checkpoint
    def layer(x, inputs):
        slot, s = inputs
        return attach(jnp.sin(x), slot, s * jax.lax.stop_gradient(x)), None

    def loss(slots):
        return jax.lax.scan(layer, jnp.float32(0.5), (slots, jnp.array([1.0, 10.0])))[0]

    expected = np.array([0.5, 10.0 * np.sin(0.5)])
    s, count = jax.jit(jax.grad(loss))(zeros(2))
    np.testing.assert_allclose(s, expected, rtol=1e-6)
    np.testing.assert_array_equal(count, [1, 1])


def test_micro_batches_are_joined_by_their_maximum():
    parts = [(jnp.array([s]), jnp.ones(1)) for s in (-4.0, -3.0, -7.0)]
    total = zeros(1)  # the trainer starts with zeros
    for part in parts:
        total = joined(total, part)
    np.testing.assert_array_equal(arrived_once(total), [-3.0])
    chex.assert_trees_all_equal(joined(total, zeros(1)), total)
    assert np.isnan(arrived_once(joined(total, (jnp.array([jnp.nan]), jnp.ones(1))))).all()


@pytest.mark.parametrize(
    ("loss", "count"),
    [
        (lambda slot: jax.lax.stop_gradient(attach(jnp.ones(()), slot, jnp.ones(()))), 0),
        (lambda slot: sum(attach(jnp.ones(()), slot, jnp.ones(())) for _ in range(3)), 3),
        (lambda slot: jax.vmap(lambda q: attach(q, slot, q))(jnp.ones(4)).sum(), 4),
    ],
    ids=["no gradient", "three calls", "vmap"],
)
def test_a_statistic_that_does_not_arrive_once_is_nan(loss, count):
    slot = slot_of(loss)
    assert slot[1] == count
    assert np.isnan(arrived_once(slot))


# --- without Levanter -----------------------------------------------------------------------------


def test_all_missing_names_are_in_one_error():
    names = {"math": ["pi", "tau.real", "nonsense", "pi.other"], "no_such_module": ["x"]}
    with pytest.raises(ImportError) as error:
        required("a-framework", names)
    for text in ("math.nonsense", "math.pi.other", "no_such_module", "a-framework (not installed)"):
        assert text in str(error.value)
    assert "math.pi\n" not in str(error.value)


@pytest.mark.skipif(
    importlib.util.find_spec("levanter") is not None, reason="Levanter is installed"
)
@pytest.mark.parametrize("name", ["MuonClipConfig", "MuonClipTrainer"])
def test_classes_name_what_is_missing(name):
    with pytest.raises(ImportError, match=r"marin-levanter \(not installed\)(.|\n)*haliax"):
        getattr(levanter, name)


def test_an_unknown_name_is_an_attribute_error():
    with warnings.catch_warnings(), pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        levanter.nonsense  # noqa: B018
