"""`QKClipTrainStep` on a train step with the methods of kauldron, which is not installed by day."""

import dataclasses
import importlib
import math
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.golden_tables import read

D, N, K, H, F, V, LENGTH = 8, 4, 2, 4, 12, 20, 6
TOKENS = np.random.default_rng(0).integers(V, size=(2, 2, LENGTH))  # micro-batch, batch, length


@dataclasses.dataclass(frozen=True)
class Record:
    """A train state, and a context too: what is known, by name."""

    step: Any = 0
    params: Any = None
    opt_state: Any = None
    collections: Any = None
    batch: Any = None
    preds: Any = None
    metric_states: Any = None

    replace = dataclasses.replace

    @classmethod
    def from_state_and_batch(cls, *, state, batch):
        return state.replace(batch=batch)


jax.tree_util.register_dataclass(Record)


class AverageState:
    from_values = staticmethod(lambda values: values)


def forward(context, *, model, rngs, is_training):
    collections = {**context.collections, "steps": context.collections["steps"] + 1}
    return context.replace(preds=model(context.params, context.batch), collections=collections)


@dataclasses.dataclass(kw_only=True, eq=False, frozen=True)
class TrainStep:
    """The part of a train step that the clip uses."""

    model: Any = None
    optimizer: Any = None
    rng_streams = types.SimpleNamespace(train_rngs=lambda step: {})

    def init(self, elem_spec):
        params = self.model.init()
        state = self.optimizer.init(params)
        return Record(params=params, opt_state=state, collections={"steps": jnp.int32(0)})

    def _step(self, state, batch):
        def loss(params):
            context = Record.from_state_and_batch(state=state.replace(params=params), batch=batch)
            context = forward(context, model=self.model, rngs={}, is_training=True)
            return jnp.mean(context.preds**2), context

        grads, context = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            collections=context.collections,
        )
        return new, context.replace(metric_states={"accuracy": jnp.float32(1)})


class Gemma:
    """The parameters of Gemma 2 and an attention of our own."""

    config = types.SimpleNamespace(num_layers=1)

    def init(self):
        shapes = {
            "embedder/input_embedding": (V, D),
            "final_norm/scale": (D,),
            "layer_0/attn/attn_vec_einsum/w": (N, H, D),
            "layer_0/attn/kv_einsum/w": (2, K, D, H),
            "layer_0/attn/q_einsum/w": (N, D, H),
            "layer_0/mlp/gating_einsum": (2, D, F),
            "layer_0/mlp/linear": (F, D),
            **{f"layer_0/{a}_{b}_norm/scale": (D,) for a in ("pre", "post") for b in NORMS[a]},
        }
        rng, tree = np.random.default_rng(0), {}
        for path, shape in shapes.items():
            *folders, name = path.split("/")
            node = tree
            for folder in folders:
                node = node.setdefault(folder, {})
            node[name] = jnp.asarray(rng.normal(size=shape), jnp.float32)
        return tree

    def __call__(self, params, tokens):
        scale = lambda x, name: x * params["layer_0"][name]["scale"][None, None]  # noqa: E731
        x = params["embedder"]["input_embedding"][tokens]
        p, y = params["layer_0"]["attn"], scale(x, "pre_attention_norm")
        q = jnp.einsum("btd,ndh->btnh", y, p["q_einsum"]["w"])
        k, v = jnp.einsum("bsd,ckdh->cbskh", y, p["kv_einsum"]["w"])
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        y = jnp.einsum("btnh,nhd->btd", y, p["attn_vec_einsum"]["w"])
        x = x + scale(y, "post_attention_norm")
        p, y = params["layer_0"]["mlp"], scale(x, "pre_ffw_norm")
        gate, up = jnp.einsum("btd,cdf->cbtf", y, p["gating_einsum"])
        x = x + scale((jax.nn.gelu(gate) * up) @ p["linear"], "post_ffw_norm")
        x = x * params["final_norm"]["scale"][None, None]
        return x @ params["embedder"]["input_embedding"].T


NORMS = {"pre": ("attention", "ffw"), "post": ("attention", "ffw")}


def max_logits(params, tokens):
    """[batch, heads] in float64."""
    f64 = lambda x: np.asarray(x, np.float64)  # noqa: E731
    layer = params["layer_0"]
    x = f64(params["embedder"]["input_embedding"])[tokens] * f64(
        layer["pre_attention_norm"]["scale"]
    )
    q = np.einsum("btd,ndh->btnh", x, f64(layer["attn"]["q_einsum"]["w"]))
    k = np.einsum("bsd,kdh->bskh", x, f64(layer["attn"]["kv_einsum"]["w"])[0])
    logits = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, N // K, 2)) / math.sqrt(H)
    return np.where(np.tri(LENGTH, dtype=bool), logits, -np.inf).max((2, 3))


def load(monkeypatch, train_step: Any = TrainStep):
    """Imports the integration with a kauldron of our own."""
    replicated = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    kd = types.SimpleNamespace(
        train=types.SimpleNamespace(TrainStep=train_step, Context=Record, forward=forward),
        metrics=types.SimpleNamespace(AverageState=AverageState),
        sharding=types.SimpleNamespace(REPLICATED=replicated),
    )
    module = types.ModuleType("kauldron")
    module.kd = kd
    monkeypatch.setitem(sys.modules, "kauldron", module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    try:
        return importlib.import_module(NAME)
    finally:
        sys.modules.pop(NAME, None)


NAME = "muonclip_jax.integrations.gemma"


@pytest.fixture
def make(monkeypatch):
    module = load(monkeypatch)

    def make(tx, model=None, **options):
        return module.QKClipTrainStep(model=model or Gemma(), optimizer=tx, **options)

    return make


def test_the_tree_is_that_of_gemma():
    golden = [row for row in read("gemma2_linen").rows if "layer_1" not in row.path]
    found = jax.tree_util.tree_leaves_with_path(Gemma().init())
    ndims = {jax.tree_util.keystr(p, simple=True, separator="/"): x.ndim for p, x in found}
    assert ndims == {row.path: len(row.shape) for row in golden}


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_micro_batches_are_clipped_once_by_the_largest_logit(make, micro_batches):
    params, tokens = Gemma().init(), TOKENS.reshape(micro_batches, -1, LENGTH)
    S = max_logits(params, TOKENS.reshape(4, LENGTH)).max(0)
    tau = float(np.sort(S)[1:3].mean())  # two heads are above
    tx = optax.sgd(0.0)
    if micro_batches > 1:
        tx = optax.MultiSteps(tx, micro_batches).gradient_transformation()
    trainstep = make(tx, threshold=tau)
    spec = jax.ShapeDtypeStruct(tokens.shape[1:], jnp.int32)
    state, step = trainstep.init(spec), jax.jit(trainstep._step)
    for batch in tokens[:-1]:
        state, context = step(state, batch)
        assert context.metric_states["qk_clip"]["clipped_heads"] == 0
        jax.tree.map(np.testing.assert_array_equal, state.params, params)
    state, context = step(state, tokens[-1])
    scalars = context.metric_states["qk_clip"]
    assert (scalars["clipped_heads"], context.metric_states["accuracy"]) == (2, 1)
    np.testing.assert_allclose(scalars["max_logit"], S.max(), rtol=1e-5)
    after = max_logits(state.params, TOKENS.reshape(4, LENGTH)).max(0)
    np.testing.assert_allclose(after, np.minimum(S, tau), rtol=1e-5)
    assert state.collections["steps"] == state.step == micro_batches
    if micro_batches > 1:  # the next update begins anew
        kept = state.collections["max_logits"]["layer_0"]["attn"]["max_logits"]
        np.testing.assert_array_equal(kept, -np.inf)


def test_lora_raises_unless_nothing_is_clipped(make):
    class Adapted(Gemma):
        def init(self):
            return super().init() | {"lora": {"a": jnp.ones((D, 1))}}

    spec = jax.ShapeDtypeStruct(TOKENS.shape[1:], jnp.int32)
    with pytest.raises(ValueError, match=r"LoRA parameters.*or pass threshold=math.inf"):
        make(optax.sgd(0.0), Adapted()).init(spec)
    make(optax.sgd(0.0), Adapted(), threshold=math.inf).init(spec)


def test_the_number_of_attentions_is_needed_and_checked(make):
    trainstep = make(optax.sgd(0.0), expect=2)
    state = trainstep.init(None)
    with pytest.raises(ValueError, match="found 1 attention, expected expect=2"):
        trainstep._step(state, TOKENS[0])
    model = types.SimpleNamespace(init=Gemma().init)
    trainstep = make(optax.sgd(0.0), model)
    with pytest.raises(ValueError, match=r"has no config\.num_layers\. Pass expect="):
        trainstep._step(trainstep.init(None), TOKENS[0])


def test_another_version_of_kauldron_raises(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    with pytest.raises(ImportError, match=r"no method _step\(state, batch\).*installed is 9.9"):
        load(monkeypatch, type("TrainStep", (), {"_step": lambda self, state: None}))
