"""The integration with MaxText, on the parameters of its models and on a small stand-in for it."""

import importlib.machinery
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import muonclip_jax as mc
from muonclip_jax.integrations import maxtext
from muonclip_jax.integrations.maxtext.max_logits import at_attention
from muonclip_jax.integrations.maxtext.settings import check, head_layout
from tests.support import golden_tables

D, L, N, K, H, F, V, E = 16, 3, 4, 2, 8, 24, 32, 5  # width, layers, heads, key heads, ...
NOPE, ROPE, VALUE, Q_RANK, KV_RANK = 6, 4, 5, 12, 7
TAU = 100.0
Numbers = mc.MuonDimensionNumbers


def config(**settings):
    """A config of MaxText, with the settings that the integration reads."""
    defaults = {
        "attention_type": "global",
        "attn_logits_soft_cap": 0.0,
        "fused_qkv": False,
        "gradient_accumulation_steps": 1,
        "lora": types.SimpleNamespace(enable_lora=False),
        "muon_include_routers": True,
        "muon_type": "optax_muon",
        "opt_type": "muon",
        "param_scan_axis": 1,
        "q_lora_rank": Q_RANK,
        "qk_clip_threshold": TAU,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "share_kv_projections": False,
        "shard_optimizer_over_data": False,
        "skip_step_on_spikes": False,
        "trainable_parameters_mask": [],
        "use_qk_clip": False,
        "use_qk_norm": False,
        "v_head_dim": VALUE,
    }
    return types.SimpleNamespace(**defaults | settings)


# --- Parameters of its models ---------------------------------------------------------------------

# Release 0.2.5, models/deepseek.py, scanned over axis 1, and beside each parameter the dimension
# numbers of utils/muon_utils.py with muon_include_routers=false.
DEEPSEEK = {
    "token_embedder/embedding": ((V, D), None),
    "decoder/decoder_norm/scale": ((D,), None),
    "decoder/logits_dense/kernel": ((D, V), None),
    "decoder/moe_layers/pre_self_attention_layer_norm/scale": ((D, L), None),
    "decoder/moe_layers/self_attention/wq_a/kernel": ((D, L, Q_RANK), Numbers((0,), (-1,))),
    "decoder/moe_layers/self_attention/q_norm/scale": ((Q_RANK, L), None),
    "decoder/moe_layers/self_attention/wq_b/kernel": (
        (Q_RANK, L, N, NOPE + ROPE),
        Numbers((0,), (-2, -1)),
    ),
    "decoder/moe_layers/self_attention/wkv_a/kernel": (
        (D, L, KV_RANK + ROPE),
        Numbers((0,), (-1,)),
    ),
    "decoder/moe_layers/self_attention/kv_norm/scale": ((KV_RANK, L), None),
    "decoder/moe_layers/self_attention/wkv_b/kernel": (
        (KV_RANK, L, N, NOPE + VALUE),
        Numbers((0,), (-2, -1)),
    ),
    "decoder/moe_layers/self_attention/out/kernel": ((N, L, VALUE, D), Numbers((0, -2), (-1,))),
    "decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/gate/kernel": ((D, L, E), None),
    "decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wi_0": ((E, L, D, F), Numbers((-2,), (-1,))),
    "decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wo": ((E, L, F, D), Numbers((-2,), (-1,))),
}
ATTENTION = "decoder/moe_layers/self_attention"


def tree(leaves):
    return golden_tables.CONTAINERS["nested dict"](list(leaves.items()))


@pytest.fixture(scope="module")
def deepseek():
    rng = np.random.default_rng(0)
    params = {
        path: rng.normal(size=shape).astype(np.float32) for path, (shape, _) in DEEPSEEK.items()
    }
    return tree(params), tree({path: numbers for path, (_, numbers) in DEEPSEEK.items()})


def test_the_numbers_of_maxtext_keep_layers_apart(deepseek):
    params, numbers = deepseek
    found = {
        row.path: row.optimizer if row.optimizer == "adamw" else tuple(row)[3:6]
        for row in mc.routing_table(params, numbers).rows
    }
    assert found[f"{ATTENTION}/wq_b/kernel"] == (L, Q_RANK, N * (NOPE + ROPE))
    assert found[f"{ATTENTION}/wkv_b/kernel"] == (L, KV_RANK, N * (NOPE + VALUE))
    assert found[f"{ATTENTION}/out/kernel"] == (L, N * VALUE, D)
    assert found["decoder/moe_layers/DeepSeekMoeBlock_0/MoeBlock_0/wi_0"] == (E * L, D, F)
    for path, (_, given) in DEEPSEEK.items():
        assert (found[path] == "adamw") == (given is None)


def test_the_arguments_of_maxtext_are_ours(deepseek):
    params, numbers = deepseek
    tx = mc.muon(
        learning_rate=lambda step: 1e-3 / (1 + step),
        eps=1e-8,
        mu_dtype=None,
        beta=0.95,
        weight_decay=0.1,
        muon_weight_dimension_numbers=numbers,
        consistent_rms=0.2,
        ns_coeffs=(3.4445, -4.7750, 2.0315),
        ns_steps=5,
        adam_b1=0.9,
        adam_b2=0.95,
        adam_eps_root=0.0,
        adam_weight_decay=0.1,
    )
    updates, _ = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize("wrapped", [False, True], ids=["NNX", "Linen, under params"])
def test_each_layer_and_head_is_clipped_on_its_own(deepseek, wrapped):
    params, _ = deepseek
    max_logits = np.full((L, 2, N), 50.0, np.float32)
    max_logits[1, 0, 2], max_logits[2, 1, 0] = 400.0, -5.0
    stats = at_attention(tree({f"{ATTENTION}/attention_op/max_logits": max_logits}))
    layout = head_layout(config(attention_type="mla"))
    wrap = (lambda p: {"params": p}) if wrapped else (lambda p: p)
    clipped, info = jax.jit(lambda p, s: mc.qk_clip(wrap(p), s, layout))(params, stats)
    expected = np.ones((L, N))
    expected[1, 2] = 0.25
    (gamma,) = info.gamma.values()
    np.testing.assert_array_equal(gamma, expected)
    new = (clipped["params"] if wrapped else clipped)["decoder"]["moe_layers"]["self_attention"]
    old = params["decoder"]["moe_layers"]["self_attention"]
    ratio = new["wq_b"]["kernel"] / old["wq_b"]["kernel"]
    np.testing.assert_allclose(ratio[:, 1, 2, :NOPE], 0.5, rtol=1e-6)
    np.testing.assert_allclose(ratio[:, 1, 2, NOPE:], 0.25, rtol=1e-6)
    ratio = new["wkv_b"]["kernel"] / old["wkv_b"]["kernel"]
    np.testing.assert_allclose(ratio[:, 1, 2, :NOPE], 0.5, rtol=1e-6)
    np.testing.assert_array_equal(ratio[:, 1, 2, NOPE:], 1.0)


LATENT = {"attention_type": "mla", "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
LATENT |= {"v_head_dim": 128}
MODELS = [
    ("maxtext_llama3", {}, {"decoder/layers/self_attention": (3, 32)}),
    ("maxtext_llama3_unscanned", {}, {f"decoder/layers_{i}/self_attention": (32,) for i in (0, 1)}),
    ("maxtext_mixtral", {}, {"decoder/layers/self_attention": (3, 32)}),
    (
        "maxtext_gpt_oss",
        {},
        {f"decoder/layers/layers_{i}/GptOssAttention": (3, 64) for i in (0, 1)},
    ),
    (
        "maxtext_kimi_k2",
        LATENT,
        {f"decoder/{x}_layers/self_attention": (n, 64) for x, n in (("dense", 1), ("moe", 3))},
    ),
    (
        "maxtext_deepseek3",
        LATENT,
        {f"decoder/{x}_layers/self_attention": (n, 128) for x, n in (("dense", 2), ("moe", 3))},
    ),
]


@pytest.mark.parametrize(("model", "settings", "modules"), MODELS, ids=[m[0] for m in MODELS])
def test_the_layout_fits_the_model(model, settings, modules):
    params, layout = golden_tables.read(model).params(), head_layout(config(**settings))
    recorded = {
        f"{path}/attention_op/max_logits": jax.ShapeDtypeStruct((*s[:-1], 2, s[-1]), jnp.float32)
        for path, s in modules.items()
    }
    stats = at_attention(tree(recorded))
    _, info = jax.eval_shape(lambda p, s: mc.qk_clip(p, s, layout), params, stats)
    assert {path: gamma.shape for path, gamma in info.gamma.items()} == modules


def test_a_query_without_low_rank_is_recognized():
    shapes = {f"{ATTENTION}/query/kernel": (D, L, N, NOPE + ROPE)}
    shapes[f"{ATTENTION}/wkv_b/kernel"] = (KV_RANK, L, N, NOPE + VALUE)
    params = tree({path: np.ones(shape, np.float32) for path, shape in shapes.items()})
    stats = tree({f"{ATTENTION}/max_logits": np.full((L, 2, N), 200.0, np.float32)})
    layout = head_layout(config(attention_type="mla", q_lora_rank=0))
    _, info = jax.eval_shape(lambda p, s: mc.qk_clip(p, s, layout), params, stats)
    assert info.gamma[ATTENTION].shape == (L, N)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn_logits_soft_cap": 50.0}, "Set attn_logits_soft_cap=0.0"),
        ({"use_qk_norm": True}, "Set use_qk_norm=false"),
        ({"trainable_parameters_mask": ["mlp"]}, "frozen parameters"),
        ({"lora": types.SimpleNamespace(enable_lora=True)}, "frozen parameters"),
        ({"fused_qkv": True}, "Set fused_qkv=false"),
        ({"share_kv_projections": True}, r"install\(alpha=1\)"),
    ],
)
def test_settings_under_which_the_clip_is_wrong_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        check(config(**settings))
    check(config())
    check(config(use_qk_norm=True, attention_type="mla"))
    check(config(share_kv_projections=True), alpha=1)


# --- A stand-in for MaxText -----------------------------------------------------------------------

OPTIMIZERS = """
def optax_muon(learning_rate, muon_weight_dimension_numbers): ...

def get_optimizer(config, learning_rate_schedule, model=None, mesh=None):
    if config.opt_type != "muon" or config.muon_type != "optax_muon":
        return "another"
    numbers = {"gate": None if not config.muon_include_routers else NUMBERS, "up": NUMBERS}
    return optax_muon(learning_rate=learning_rate_schedule, muon_weight_dimension_numbers=numbers)
"""
ATTENTION_OP = """
class AttentionOp:
    attention_kernel = "flash"

    def __call__(self, query, model_mode, record_max_logits=False):
        if query == "unsupported" and record_max_logits:
            raise NotImplementedError("no such kernel")
        if query == "supported" and record_max_logits:
            self.max_logits = 1
        return record_max_logits
"""
TRAINER = """
def train_step(model, config, state, data):
    if config.gradient_accumulation_steps > 1:
        loss, aux, _ = gradient_accumulation_loss_and_grad(loss_fn, config, model, data)
    else:
        loss, aux = loss_fn(model, config, data)
    metrics = {"scalar": {"loss": loss}}
    if config.use_qk_clip:
        state = qk_clip_utils.apply_qk_clip_nnx(state, aux["intermediate_outputs"], config)
    return state, metrics

def train_loop(*args):
    return train_step(*args)

def main(argv): ...
"""
CLIP = "def apply_qk_clip_nnx(state, intermediate_outputs, config): raise TypeError"
LOG = "lines = []\nlog = lines.append"
SOURCES = {
    "maxtext": "",
    "maxtext.optimizers.optimizers": OPTIMIZERS,
    "maxtext.layers.attention_op": ATTENTION_OP,
    "maxtext.trainers.pre_train.train": TRAINER,
    "maxtext.utils.qk_clip_utils": CLIP,
    "maxtext.utils.max_logging": LOG,
}


def loss_fn(model, config, data):
    """Its max logits are the inputs, one row of heads for each example."""
    assert set(data) == {"inputs"}
    recorded = {"self_attention": {"attention_op": {"max_logits": data["inputs"]}}}
    return jnp.sum(data["inputs"]), {"intermediate_outputs": recorded, "sum": 1.0}


def accumulate(_loss_fn, config, model, data):
    """Adds up what the loss returns for the micro-batches, of which i has examples i, i + n, …"""
    n = config.gradient_accumulation_steps
    parts = jax.tree.map(lambda x: x.reshape(len(x) // n, n, *x.shape[1:]).swapaxes(0, 1), data)
    loss, aux = jax.lax.map(lambda part: _loss_fn(model, config, part), parts)
    return jnp.sum(loss), jax.tree.map(lambda x: jnp.sum(x, axis=0), aux), None


@pytest.fixture
def stand_in(monkeypatch):
    modules = {}
    for name, source in SOURCES.items():
        module = modules[name.split(".")[-1]] = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        monkeypatch.setitem(sys.modules, name, module)
        exec(source, module.__dict__)
    modules["train"].__dict__.update(
        loss_fn=loss_fn,
        gradient_accumulation_loss_and_grad=accumulate,
        qk_clip_utils=modules["qk_clip_utils"],
    )
    modules["optimizers"].NUMBERS = Numbers(0, 1)
    yield types.SimpleNamespace(**modules)
    maxtext.uninstall()


class Attention(nnx.Module):
    def __init__(self):
        self.query = nnx.Linear(1, 1, rngs=nnx.Rngs(0), use_bias=False)
        self.key = nnx.Linear(1, 1, rngs=nnx.Rngs(0), use_bias=False)
        self.query.kernel = nnx.Param(jnp.ones((D, N, H)))
        self.key.kernel = nnx.Param(jnp.ones((D, K, H)))


class Model(nnx.Module):
    def __init__(self):
        self.self_attention = Attention()


class Optimizer(nnx.Module):
    def __init__(self, is_skipped):
        self.is_skipped = nnx.Variable(jnp.array(is_skipped))


def trained(stand_in, inputs, is_skipped=False, model=None, **settings):
    """Takes a step; returns the factors on the query heads and the metrics."""
    state = types.SimpleNamespace(model=model or Model(), optimizer=Optimizer(is_skipped))
    data = {"inputs": jnp.asarray(inputs, jnp.float32)}
    state, metrics = stand_in.train.train_loop(None, config(**settings), state, data)
    return np.asarray(state.model.self_attention.query.kernel[0, :, 0]), metrics["scalar"]


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
