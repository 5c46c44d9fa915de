"""The integration with EasyDeL, on a stub with the names that EasyDeL 0.3.0 has."""

import dataclasses
import functools
import inspect
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from muonclip_jax.integrations import easydel
from muonclip_jax.integrations.easydel import MuonClipConfig, optimizer

D, H, K, C, T, B = 16, 4, 2, 8, 6, 4  # width, heads, key heads, head_dim, tokens, rows
RNG = np.random.default_rng(0)
PARAMS = {
    "self_attn": {
        "q_proj": {"kernel": RNG.normal(size=(D, H * C)).astype(np.float32)},
        "k_proj": {"kernel": RNG.normal(size=(D, K * C)).astype(np.float32)},
        "v_proj": {"kernel": RNG.normal(size=(D, K * C)).astype(np.float32)},
    }
}
LARGE = np.array([1, 2, 3, 1], np.float32).reshape(B, 1, 1)  # micro-batches differ
BATCH = {"x": RNG.normal(size=(B, T, D)).astype(np.float32) * LARGE}
TAU = 250.0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["graphstate"], meta_fields=[])
@dataclasses.dataclass
class State:
    graphstate: dict

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["loss", "other_metrics"], meta_fields=[]
)
@dataclasses.dataclass
class Metrics:
    loss: jax.Array
    other_metrics: dict | None

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)


def loss_fn(params, x):
    q, k, v = (x @ params["self_attn"][f"{name}_proj"]["kernel"] for name in "qkv")
    q, k, v = (y.reshape(*x.shape[:2], -1, C) for y in (q, k, v))
    k, v = (jnp.repeat(y, H // K, axis=2) for y in (k, v))
    logits = jnp.einsum("bthk,bshk->bhts", q, k) * C**-0.5
    logits = jnp.where(jnp.tri(T, dtype=bool), logits, -1e30)
    return (jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits), v) ** 2).mean()


def training_step(state, batch, parts):
    """Means over micro-batches and a clip of the global norm, where EasyDeL has them."""

    def one(total, x):
        loss, grads = jax.value_and_grad(loss_fn)(state.graphstate, x)
        return jax.tree.map(jnp.add, total, grads), loss

    zeros = jax.tree.map(jnp.zeros_like, state.graphstate)
    total, losses = jax.lax.scan(one, zeros, batch["x"].reshape(parts, -1, T, D))
    grads = jax.tree.map(lambda g: g / parts, total)
    scale = jnp.minimum(1.0, 1.0 / optax.tree.norm(grads))
    params = jax.tree.map(lambda p, g: p - 0.1 * scale * g, state.graphstate, grads)
    return state.replace(graphstate=params), Metrics(losses.mean(), {"their": losses[0]})


def evaluation_step(state, batch, spec):
    return Metrics(loss_fn(state.graphstate, batch["x"]), None)


class Trainer:
    def __init__(self, **arguments):
        defaults = {"optimizer": "muonclip", "extra_optimizer_kwargs": None, "weight_decay": 0.1}
        self.arguments = types.SimpleNamespace(**defaults | arguments)
        mesh = jax.make_mesh((1,), ("fsdp",), (jax.sharding.AxisType.Auto,))
        config = types.SimpleNamespace(num_hidden_layers=1)
        self.model = types.SimpleNamespace(mesh=mesh, config=config)
        self.state_shardings = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self.configure_model()
        self.step = self.configure_functions().sharded_training_step_function

    _train_shared_fn_static_args = property(lambda self: (4,))
    _eval_shared_fn_static_args = property(lambda self: ("spec",))

    def configure_model(self):
        return "model"

    def configure_functions(self):
        return types.SimpleNamespace(
            sharded_training_step_function=jax.jit(training_step, static_argnums=2),
            sharded_evaluation_step_function=jax.jit(evaluation_step, static_argnums=2),
        )


@dataclasses.dataclass
class OptimizerBuilder:
    config: object


@pytest.fixture
def modules(monkeypatch):
    """EasyDeL's modules with the names that are used; `registered` has the builders."""
    registered = {}

    def register_optimizer(name):
        return lambda builder: registered.setdefault(name, builder)

    output = types.SimpleNamespace(
        sharded_training_step_function=None, sharded_evaluation_step_function=None
    )
    contents = {
        "easydel.trainers.trainer.trainer": {"Trainer": Trainer},
        "easydel.trainers.trainer_protocol": {"TrainerConfigureFunctionOutput": output},
        "easydel.infra.base_state": {"EasyDeLState": State},
        "easydel.infra.loss_utils": {"LossMetrics": Metrics},
        "eformer.optimizers": {
            "OptimizerBuilder": OptimizerBuilder,
            "register_optimizer": register_optimizer,
        },
    }
    found = {name: types.SimpleNamespace(**names) for name, names in contents.items()}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    easydel.register.cache_clear()
    yield types.SimpleNamespace(
        registered=registered, **{n.split(".")[-1]: m for n, m in found.items()}
    )
    easydel.register.cache_clear()


def max_logits64():
    attn = PARAMS["self_attn"]
    arrays = (BATCH["x"], attn["q_proj"]["kernel"], attn["k_proj"]["kernel"])
    x, q, k = (np.asarray(array, np.float64) for array in arrays)
    q, k = (x @ q).reshape(B, T, H, C), (x @ k).reshape(B, T, K, C).repeat(H // K, axis=2)
    logits = np.einsum("bthk,bshk->bhts", q, k) * C**-0.5
    return np.where(np.tri(T, dtype=bool), logits, -np.inf).max((0, 2, 3))


def test_the_step_clips_by_the_maximum_of_all_micro_batches(modules):
    state = State(jax.tree.map(jnp.asarray, PARAMS))
    plain, metrics = jax.jit(training_step, static_argnums=2)(state, BATCH, 4)
    trainer = easydel.with_qk_clip(Trainer, threshold=TAU)()
    clipped, ours = trainer.step(state, BATCH, 4)

    top = max_logits64()
    assert 0 < (top > TAU).sum() < H
    gamma = np.minimum(1, TAU / top)  # keys are shared by heads, so that queries take all of it
    factors = {"q_proj": gamma.repeat(C), "k_proj": 1.0, "v_proj": 1.0}
    for name, factor in factors.items():
        expected = np.asarray(plain.graphstate["self_attn"][name]["kernel"]) * factor
        got = clipped.graphstate["self_attn"][name]["kernel"]
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert ours.loss == metrics.loss
    assert ours.other_metrics["their"] == metrics.other_metrics["their"]
    np.testing.assert_allclose(ours.other_metrics["qk_clip/max_logit"], top.max(), rtol=1e-5)
    assert ours.other_metrics["qk_clip/clipped_heads"] == (top > TAU).sum()


def test_the_builder_is_registered_with_its_configuration_class(modules):
    easydel.register()
    easydel.register()
    (name, builder), *others = modules.registered.items()
    assert (name, others) == ("muonclip", [])
    (field,) = dataclasses.fields(builder)
    assert field.type is MuonClipConfig
    tx = builder(config=MuonClipConfig()).build(optax.constant_schedule(0.1))
    updates, _ = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), PARAMS)
    chex.assert_trees_all_equal_shapes(updates, PARAMS)


def test_settings_are_those_of_muonclip_and_no_weight_decays_by_default(monkeypatch):
    names = {field.name for field in dataclasses.fields(MuonClipConfig)}
    clip = {"layout", "threshold", "alpha", "shared_key", "ignore", "learning_rate", "weight_decay"}
    parameters = inspect.signature(mc.muonclip).parameters
    assert names == {*parameters} - clip | {"muon_weight_decay"}
    passed = []

    def recorded(*args, **settings):
        passed.append((args, settings))
        return optax.identity()

    monkeypatch.setattr(mc, "muonclip", recorded)
    optimizer(MuonClipConfig(), 0.1)
    optimizer(MuonClipConfig(muon_weight_decay=0.3, nesterov=True, ns_dtype="float32"), 0.1)
    defaults = {name: one.default for name, one in parameters.items() if name not in clip}
    none = {"threshold": None, "weight_decay": 0.0, "adam_weight_decay": 0.0}
    changed = {"weight_decay": 0.3, "nesterov": True, "ns_dtype": "float32"}
    assert passed == [((0.1,), defaults | none), ((0.1,), defaults | none | changed)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extra_optimizer_kwargs": {"consistent_rm": 0.2}}, r"no settings \['consistent_rm'\]"),
        ({"extra_optimizer_kwargs": {"threshold": 100.0}}, "clip to with_qk_clip"),
        ({"extra_optimizer_kwargs": {"muon_weight_decay": 0.1}}, "decay twice"),
        ({"extra_optimizer_kwargs": {"adam_weight_decay": 0.1}}, "adam_weight_decay: the weights"),
    ],
)
def test_settings_that_easydel_drops_and_two_decays_raise(modules, arguments, message):
    trainer = easydel.with_qk_clip(Trainer)
    with pytest.raises(ValueError, match=message):
        trainer(**arguments)


def test_settings_of_other_optimizers_are_not_checked(modules):
    easydel.with_qk_clip(Trainer)(optimizer="adamw", extra_optimizer_kwargs={"b1": 0.9})


def test_another_number_of_attentions_raises_in_the_first_step(modules):
    trainer = easydel.with_qk_clip(Trainer, expect=3)()
    with pytest.raises(ValueError, match="found 1 attention, expected expect=3"):
        trainer.step(State(PARAMS), BATCH, 2)


def test_a_model_without_a_number_of_layers_needs_expect(modules):
    class Tower(Trainer):
        def configure_model(self):
            del self.model.config.num_hidden_layers
            return super().configure_model()

    easydel.with_qk_clip(Tower, expect=1)()
    with pytest.raises(ValueError, match=r"has no num_hidden_layers\. Pass expect="):
        easydel.with_qk_clip(Tower)()


def test_trainers_with_a_step_of_their_own_raise(modules):
    class Preference(Trainer):
        def configure_functions(self):
            return super().configure_functions()

    with pytest.raises(TypeError, match="Preference has a training step of its own"):
        easydel.with_qk_clip(Preference)
    with pytest.raises(TypeError, match=r"expected easydel\.Trainer or a subclass"):
        easydel.with_qk_clip(State)
    with pytest.raises(TypeError, match=r"got \['treshold'\], expected arguments"):
        easydel.with_qk_clip(Trainer, treshold=100.0)


def test_one_error_names_everything_that_a_release_lacks(modules, monkeypatch):
    monkeypatch.delattr(modules.optimizers, "register_optimizer")
    monkeypatch.delattr(Trainer, "configure_functions")
    monkeypatch.delattr(Metrics, "replace")
    with pytest.raises(ImportError, match="does not have") as error:
        easydel.with_qk_clip(Trainer)
    for name in ("optimizers:register_optimizer", "Trainer.configure_functions", "LossMetrics.rep"):
        assert name in str(error.value)
    assert "graphstate" not in str(error.value)


def test_without_easydel_the_module_imports_and_the_functions_raise(monkeypatch):
    for name in ("easydel", "eformer"):
        monkeypatch.setitem(sys.modules, name, None)
    easydel.register.cache_clear()
    with pytest.raises(ImportError, match="Install easydel"):
        easydel.register()


@pytest.mark.parametrize(
    ("shapes", "layout"),
    [
        (
            {"q_proj": (D, H * C), "k_proj": (D, K * C)},
            mc.MultiHeadLayout(
                query="q_proj", key="k_proj", kernel="inputs (heads head_dim)", head_dim=C
            ),
        ),
        (
            {"q_b_proj": (12, H * (6 + 4)), "kv_b_proj": (7, H * (6 + 5))},
            mc.MLALayout(
                nope_dim=6,
                rope_dim=4,
                value_dim=5,
                query="q_b_proj",
                key_value="kv_b_proj",
                kernel="inputs (heads head_dim)",
            ),
        ),
    ],
    ids=["heads", "latent"],
)
def test_layouts_for_kernels_that_cannot_be_read(shapes, layout):
    params = {"attn": {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}}
    stats = {"attn": {"max_logits": jnp.full((2, H), 200.0)}}
    _, info = jax.jit(lambda p, s: mc.qk_clip(p, s, layout))(params, stats)
    assert info.clipped_heads == H
