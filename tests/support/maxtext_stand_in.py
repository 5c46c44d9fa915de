"""A small stand-in for MaxText: its config, and modules with the names that `install` replaces."""

import importlib.machinery
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import muonclip_jax as mc

D, F, N, K, H = 16, 24, 4, 2, 8  # width, MLP, heads, key heads, columns of a head
NOPE, ROPE, VALUE, Q_RANK = 6, 4, 5, 12
TAU = 100.0


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


def replace_maxtext(monkeypatch):
    """Puts the modules in the place of MaxText; returns them by the last part of their names."""
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
    modules["optimizers"].NUMBERS = mc.MuonDimensionNumbers(0, 1)
    return types.SimpleNamespace(**modules)


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
