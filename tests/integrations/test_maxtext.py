"""`install` replaces the step, the optimizer and the attention of MaxText, here a stand-in."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from muonclip_jax.integrations import maxtext
from tests.support.maxtext_stand_in import (
    TRAINER,
    D,
    F,
    H,
    Model,
    N,
    config,
    replace_maxtext,
    trained,
)


@pytest.fixture
def stand_in(monkeypatch):
    yield replace_maxtext(monkeypatch)
    maxtext.uninstall()


INPUTS = [[50, 400, -1, 99], [200, 50, -2, 0], [-3, 50, 100, 7], [1, 2, 3, 4]]
FACTORS = [0.5, 0.25, 1, 1]


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_a_step_clips_and_returns_its_metrics(stand_in, micro_batches):
    maxtext.install()
    steps = {"gradient_accumulation_steps": micro_batches}
    factors, metrics = trained(stand_in, INPUTS, **steps)
    np.testing.assert_array_equal(factors, FACTORS)
    assert metrics["qk_clip/max_logit"] == 400
    assert metrics["qk_clip/clipped_heads"] == 2
    assert metrics["loss"] == np.sum(INPUTS)


def test_nan_of_a_micro_batch_stays_in_its_head(stand_in):
    maxtext.install()
    inputs = np.array(INPUTS, np.float32)
    inputs[1, 3] = np.nan
    factors, metrics = trained(stand_in, inputs, gradient_accumulation_steps=2)
    np.testing.assert_array_equal(factors, FACTORS)
    assert metrics["qk_clip/nonfinite_heads"] == 1


def test_arguments_of_install_reach_the_clip(stand_in):
    maxtext.install(threshold=200.0)
    np.testing.assert_array_equal(trained(stand_in, INPUTS)[0], [1, 0.5, 1, 1])
    maxtext.install(shared_key="group", alpha=1)
    np.testing.assert_array_equal(trained(stand_in, INPUTS)[0], [0.25, 0.25, 1, 1])
    with pytest.raises(TypeError, match="'thresold'"):
        maxtext.install(thresold=1.0)


@pytest.mark.parametrize("is_skipped", [True, False])
def test_a_skipped_step_is_not_clipped(stand_in, is_skipped):
    maxtext.install()
    factors, metrics = trained(stand_in, INPUTS, is_skipped, skip_step_on_spikes=True)
    np.testing.assert_array_equal(factors, np.ones(N) if is_skipped else FACTORS)
    assert metrics["qk_clip/clipped_heads"] == (0 if is_skipped else 2)


def test_without_the_clip_the_step_is_that_of_maxtext(stand_in):
    maxtext.install(qk_clip=False)
    factors, metrics = trained(stand_in, INPUTS, attn_logits_soft_cap=50.0)
    np.testing.assert_array_equal(factors, np.ones(N))
    assert set(metrics) == {"loss"}


def test_a_step_that_does_not_clip_raises(stand_in):
    source = TRAINER.replace("if config.use_qk_clip:", "if False and qk_clip_utils:")
    exec(source, stand_in.train.__dict__)
    maxtext.install()
    with pytest.raises(RuntimeError, match="clipped 0 times, not once"):
        trained(stand_in, INPUTS)


def test_the_error_of_a_model_that_does_not_fit_names_the_way_out(stand_in):
    model = Model()
    model.self_attention.query_norm = nnx.RMSNorm(H, rngs=nnx.Rngs(0))
    maxtext.install()
    with pytest.raises(ValueError, match="'query_norm' normalizes queries or keys") as error:
        trained(stand_in, INPUTS, model=model)
    assert "--no-qk-clip" in error.value.__notes__[0]


def test_attention_records_in_training_or_raises(stand_in):
    attend = stand_in.attention_op.AttentionOp()
    maxtext.install()
    assert attend("supported", "train") is True
    assert attend("unsupported", "prefill") is False
    with pytest.raises(ValueError, match=r"\(no such kernel\)\. Set attention=dot_product"):
        attend("unsupported", model_mode="train")
    with pytest.raises(ValueError, match=r"attention='flash' records no max logits here\. Set"):
        stand_in.attention_op.AttentionOp()("silent", "train")


# --- The optimizer --------------------------------------------------------------------------------


class Layer(nnx.Module):
    """An abstract model, sharded over a mesh of one axis."""

    def __init__(self, mesh):
        def param(*shape, spec=("fsdp",)):
            sharding = jax.NamedSharding(mesh, jax.P(*spec))
            return nnx.Param(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding))

        self.gate, self.up = param(D, 2), param(D, F)


def mesh():
    return jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))


def rows(stand_in):
    (text,) = stand_in.max_logging.lines
    stand_in.max_logging.lines.clear()
    return {line.split()[0]: line.split()[2:] for line in text.splitlines()[2:4]}


def test_the_optimizer_is_ours_with_routers_of_adamw(stand_in):
    maxtext.install()
    tx = stand_in.optimizers.get_optimizer(config(), 0.1, Layer(mesh()))
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    assert [row[1] for row in rows(stand_in).values()] == ["adamw", "muon"]
    maxtext.install(include_routers=True, overrides={"up": None})
    stand_in.optimizers.get_optimizer(config(), 0.1, Layer(mesh()))
    assert [row[1] for row in rows(stand_in).values()] == ["muon", "adamw"]


def test_on_an_auto_mesh_matrices_move_by_our_plan(stand_in):
    maxtext.install()
    layer, devices = Layer(mesh()), mesh()
    tx = stand_in.optimizers.get_optimizer(config(), 0.1, layer)
    params = nnx.State(nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    with jax.set_mesh(devices):
        text = str(jax.make_jaxpr(lambda p: tx.update(p, tx.init(p), p))(params))
    assert "shard_map" in text


def test_another_muon_raises(stand_in):
    maxtext.install()
    with pytest.raises(ValueError, match="'maxtext_muon' is not the Muon of muonclip_jax: set"):
        stand_in.optimizers.get_optimizer(config(muon_type="maxtext_muon"), 0.1)
    adamw = config(opt_type="adamw", muon_type="maxtext_muon")
    assert stand_in.optimizers.get_optimizer(adamw, 0.1) == "another"


# --- Installing -----------------------------------------------------------------------------------


def replaced(stand_in):
    attend = stand_in.attention_op.AttentionOp.__call__
    return stand_in.optimizers.get_optimizer, attend, stand_in.train.train_step


def test_installing_twice_is_installing_once(stand_in):
    stock = replaced(stand_in)
    maxtext.install()
    uninstall = maxtext.install()
    assert tuple(new.__wrapped__ for new in replaced(stand_in)) == stock
    np.testing.assert_array_equal(trained(stand_in, INPUTS)[0], FACTORS)
    uninstall()
    uninstall()
    assert replaced(stand_in) == stock


def test_an_unknown_maxtext_raises_and_lists_what_it_lacks(stand_in, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    stock = replaced(stand_in)
    monkeypatch.delattr(stand_in.train, "gradient_accumulation_loss_and_grad")
    monkeypatch.setattr(stand_in.qk_clip_utils, "apply_qk_clip_nnx", lambda state: state)
    exec("def train_loop(): ...", stand_in.train.__dict__)
    monkeypatch.delitem(sys.modules, "maxtext.layers.attention_op")
    with pytest.raises(ImportError, match=r"does not fit MaxText 9\.9") as error:
        maxtext.install()
    assert str(error.value).splitlines()[1:-1] == [
        "  maxtext.layers.attention_op: no such module",
        "  maxtext.trainers.pre_train.train.train_step: train_loop does not use it",
        "  maxtext.trainers.pre_train.train.gradient_accumulation_loss_and_grad: no such name",
        "  maxtext.utils.qk_clip_utils.apply_qk_clip_nnx: no argument intermediate_outputs",
        "  maxtext.utils.qk_clip_utils.apply_qk_clip_nnx: no argument config",
    ]
    assert replaced(stand_in) == stock


def test_without_maxtext_the_error_is_how_to_install_it():
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        maxtext.install()


def test_main_installs_and_hands_its_arguments_on(stand_in, monkeypatch):
    ran = []
    app = types.ModuleType("absl.app")
    app.__dict__["run"] = lambda main, argv: ran.append((main, argv))
    monkeypatch.setitem(sys.modules, "absl.app", app)
    step = stand_in.train.train_step
    maxtext.main(["program", "--no-qk-clip", "base.yml"])
    assert ran == [(stand_in.train.main, ["program", "base.yml"])]
    assert stand_in.train.train_step is step
    maxtext.main(["program", "base.yml"])
    assert stand_in.train.train_step is not step
