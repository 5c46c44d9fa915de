"""The trainer of tunix on a tiny Llama 3, whose sequences count up."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft import peft_trainer

import muonclip_jax as mc
from muonclip_jax.integrations.tunix import add_qk_clip

jax.config.update("jax_numpy_rank_promotion", "allow")  # the models need it
LAYERS, VOCAB, LENGTH, BATCH, TAU = 2, 96, 32, 16, 2.0
SIZES = {
    "num_layers": LAYERS,
    "embed_dim": 64,
    "hidden_dim": 128,
    "num_heads": 4,
    "head_dim": 16,
    "num_kv_heads": 2,
}
QWEN = {"vocab_size": VOCAB, "rope_theta": 10_000, "norm_eps": 1e-5}


def tiny_model(loud=True, **settings):
    """A Llama 3; its max logits begin above the threshold if its queries and keys are loud."""
    config = llama3.ModelConfig(**SIZES, **QWEN, **settings)
    model = llama3.Llama3(config, rngs=nnx.Rngs(0))
    for layer in model.layers if loud else []:
        for weights in (layer.attn.q_proj.w, layer.attn.k_proj.w):
            weights[...] = weights[...] * 10
    return model


def rows(count, seed=0, length=LENGTH):
    """Counts in steps of 1 to 3."""
    rng = np.random.default_rng(seed)
    first, by = rng.integers(VOCAB, size=(count, 1)), rng.integers(1, 4, size=(count, 1))
    return ((first + by * np.arange(length)) % VOCAB).astype(np.int32)


def batches(count, size=BATCH, length=LENGTH):
    for tokens in rows(count * size, length=length).reshape(count, size, length):
        yield peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens, bool))


def inputs(example):
    size, length = example.input_tokens.shape
    return {
        "input_tokens": example.input_tokens,
        "input_mask": example.input_mask,
        "positions": jnp.broadcast_to(jnp.arange(length), (size, length)),
        "attention_mask": jnp.broadcast_to(jnp.tri(length, dtype=bool), (size, length, length)),
    }


def make(model, tx=None, *, clip=True, steps=20, threshold=TAU, **settings):
    tx = tx or mc.muon(0.01, consistent_rms=0.2)
    config = peft_trainer.TrainingConfig(max_steps=steps, eval_every_n_steps=1000, **settings)
    trainer = peft_trainer.PeftTrainer(model, tx, config).with_gen_model_input_fn(inputs)
    return add_qk_clip(trainer, threshold=threshold) if clip else trainer


def logged(trainer, name="loss"):
    return trainer.metrics_logger.get_metric_history("", name, "train")


@contextlib.contextmanager
def mesh_of_all():
    auto = jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8, 1), ("fsdp", "tp"), axis_types=(auto, auto))
    with mesh:
        yield mesh
