"""`add_qk_clip` on a trainer with the methods that the trainers of tunix have."""

import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from muonclip_jax.integrations.tunix import add_qk_clip
from tests.support.golden_tables import read

D, N, K, H, F, V, LENGTH = 8, 4, 2, 4, 12, 20, 6


class Weights(nnx.Module):
    """One array under the name that tunix gives it."""

    def __init__(self, shape, name="w"):
        size = sum(shape) + len(name)
        x = np.random.default_rng(size).normal(size=shape).astype(np.float32)
        setattr(self, name, nnx.Param(jnp.asarray(x)))


class Layer(nnx.Module):
    def __init__(self):
        self.input_layernorm = Weights((D,))
        self.attn = nnx.Module()
        self.attn.q_proj, self.attn.k_proj = Weights((D, N, H)), Weights((D, K, H))
        self.attn.v_proj, self.attn.o_proj = Weights((D, K, H)), Weights((N, H, D))
        self.post_attention_layernorm = Weights((D,))
        self.mlp = nnx.Module()
        self.mlp.gate_proj = Weights((D, F), "kernel")
        self.mlp.up_proj = Weights((D, F), "kernel")
        self.mlp.down_proj = Weights((F, D), "kernel")


class Llama(nnx.Module):
    """The parameters of tunix's Llama 3 and an attention of our own."""

    def __init__(self, layers=1, qk_norm=False):
        self.config = types.SimpleNamespace(num_layers=layers, qk_norm=qk_norm)
        self.embedder = Weights((V, D), "input_embedding")
        self.layers = nnx.List([Layer() for _ in range(layers)])
        self.final_norm = Weights((D,))
        self.lm_head = Weights((D, V))
        self.calls = nnx.BatchStat(jnp.zeros(()))

    def __call__(self, tokens):
        self.calls[...] = self.calls[...] + 1
        x = self.embedder.input_embedding[...][tokens]
        for layer in self.layers:
            y, p = x * layer.input_layernorm.w[None, None], layer.attn
            q = jnp.einsum("btd,dnh->btnh", y, p.q_proj.w[...])
            k = jnp.einsum("bsd,dkh->bskh", y, p.k_proj.w[...])
            v = jnp.einsum("bsd,dkh->bskh", y, p.v_proj.w[...])
            q = q / jnp.linalg.norm(q, axis=-1, keepdims=True) if self.config.qk_norm else q
            attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + jnp.einsum("btnh,nhd->btd", attended, p.o_proj.w[...])
            y, p = x * layer.post_attention_layernorm.w[None, None], layer.mlp
            up = jax.nn.silu(y @ p.gate_proj.kernel[...]) * (y @ p.up_proj.kernel[...])
            x = x + up @ p.down_proj.kernel[...]
        return (x * self.final_norm.w[None, None]) @ self.lm_head.w[...]


class Trainer:
    """The part of a trainer that the clip uses, for losses that return `(loss, aux)`."""

    def __init__(self, model, tx, micro_batches=None, lora=False):
        self.model = model
        self.config = types.SimpleNamespace(gradient_accumulation_steps=micro_batches)
        steps: Any = optax.MultiSteps(tx, micro_batches) if micro_batches else tx
        self.optimizer = nnx.Optimizer(model, steps, wrt=nnx.Param)
        self.loss_fn, self._has_aux, self._lora_enabled = loss_fn, True, lora
        self._iter_steps, self._buffered_train_metrics, self.aux = 0, None, []

    def clear_jit_cache(self):
        self.step = None

    def create_train_step_fn(self):
        def step(model, optimizer, inputs):
            gradient = nnx.value_and_grad(self.loss_fn, has_aux=self._has_aux)
            (loss, aux), grads = gradient(model, **inputs)
            optimizer.update(model, grads)
            return loss, aux, optax.tree.norm(grads)

        return step

    def _post_process_train_step(self, aux):
        self.aux.append(aux)

    def train(self, tokens):
        self.step = self.step or nnx.jit(
            self.create_train_step_fn(), donate_argnames=("optimizer",)
        )
        _, aux, _ = self.step(self.model, self.optimizer, {"tokens": tokens})
        self._buffered_train_metrics = types.SimpleNamespace(additional_metrics={"grad_norm": 1})
        self._post_process_train_step(aux)
        self._iter_steps += 1
        return self._buffered_train_metrics.additional_metrics


def loss_fn(model, tokens):
    logits = model(tokens)
    return jnp.mean(logits**2), {"largest": jnp.max(logits)}


def max_logits(model, tokens):
    """The max logits of the first layer, [batch, heads] in float64."""
    layer = model.layers[0]
    x = np.asarray(model.embedder.input_embedding[...], np.float64)[tokens]
    x = x * np.asarray(layer.input_layernorm.w[...], np.float64)
    q = np.einsum("btd,dnh->btnh", x, np.asarray(layer.attn.q_proj.w[...], np.float64))
    k = np.einsum("bsd,dkh->bskh", x, np.asarray(layer.attn.k_proj.w[...], np.float64))
    logits = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, N // K, 2)) / math.sqrt(H)
    return np.where(np.tri(LENGTH, dtype=bool), logits, -np.inf).max((2, 3))


def weights(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def logged(metrics, name):
    values, reduce = metrics[f"qk_clip/{name}"]
    return reduce(values)


TOKENS = np.random.default_rng(0).integers(V, size=(2, 2, LENGTH))  # micro-batch, batch, length


def test_the_tree_is_that_of_tunix():
    golden = [row for row in read("tunix_llama3").rows if "layers/1" not in row.path]
    found = nnx.to_flat_state(nnx.state(Llama(), nnx.Param))
    ndims = {"/".join(map(str, path)): x.ndim for path, x in found}
    assert ndims == {row.path: len(row.shape) for row in golden}


def test_micro_batches_are_clipped_once_by_the_largest_logit():
    model = Llama()
    trainer = Trainer(model, optax.sgd(0.0), micro_batches=2)
    S = max_logits(model, TOKENS.reshape(4, LENGTH)).max(0)
    tau = float(np.sort(S)[1:3].mean())  # two heads are above
    assert add_qk_clip(trainer, threshold=tau) is trainer
    before = weights(model)
    metrics = trainer.train(TOKENS[0])
    assert metrics == {"grad_norm": 1}
    jax.tree.map(np.testing.assert_array_equal, weights(model), before)
    metrics = trainer.train(TOKENS[1])
    np.testing.assert_allclose(logged(metrics, "max_logit"), S.max(), rtol=1e-5)
    assert logged(metrics, "clipped_heads") == 2
    after = max_logits(model, TOKENS.reshape(4, LENGTH)).max(0)
    np.testing.assert_allclose(after, np.minimum(S, tau), rtol=1e-5)
    metrics = [trainer.train(tokens) for tokens in TOKENS][1]
    np.testing.assert_allclose(logged(metrics, "max_logit"), tau, rtol=1e-5)
    assert [set(aux) for aux in trainer.aux] == [{"largest"}] * 4
    assert model.calls[...] == 4  # a variable that the loss changes


def test_what_cannot_be_clipped_raises_before_an_update():
    model = Llama(qk_norm=True)
    trainer, before = add_qk_clip(Trainer(model, optax.sgd(1.0))), weights(model)
    with pytest.raises(ValueError, match=r"layers/0/attn: its queries or keys are normalized"):
        trainer.train(TOKENS[0])
    jax.tree.map(np.testing.assert_array_equal, weights(model), before)


def test_a_trainer_of_another_version_raises():
    trainer = Trainer(Llama(), optax.sgd(0.0))
    del trainer._iter_steps
    with pytest.raises(TypeError, match=r"Trainer has no _iter_steps\. Expected a trainer like"):
        add_qk_clip(trainer)
    trainer = Trainer(Llama(), optax.sgd(0.0))
    trainer.create_train_step_fn = lambda: lambda state, batch: None
    with pytest.raises(TypeError, match="no a train step of model, optimizer, inputs"):
        add_qk_clip(trainer)


def test_a_train_step_of_another_kind_raises():
    class Other(Trainer):
        def create_train_step_fn(self):
            def step(model, optimizer, inputs):
                loss, _ = self.loss_fn(model, **inputs)
                return loss, None, jnp.zeros(())

            return step

    trainer = add_qk_clip(Other(Llama(), optax.sgd(0.0)))
    with pytest.raises(TypeError, match=r"train step of Other returned no aux of its loss_fn"):
        trainer.train(TOKENS[0])
    with pytest.raises(ValueError, match="has a clip already"):
        add_qk_clip(trainer)


def test_lora_raises_unless_nothing_is_clipped():
    trainer = Trainer(Llama(), optax.sgd(0.0), lora=True)
    with pytest.raises(ValueError, match=r"LoRA parameters.*or pass threshold=math.inf"):
        add_qk_clip(trainer)
    add_qk_clip(trainer, threshold=math.inf)


def test_the_number_of_attentions_is_needed_and_checked():
    model = Llama()
    model.config.num_layers = 2
    trainer = add_qk_clip(Trainer(model, optax.sgd(0.0)))
    with pytest.raises(ValueError, match="found 1 attention, expected expect=2"):
        trainer.train(TOKENS[0])
    del model.config
    with pytest.raises(ValueError, match=r"Llama has no config\.num_layers\. Pass expect="):
        add_qk_clip(Trainer(model, optax.sgd(0.0)))
