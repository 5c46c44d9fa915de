"""Levanter's trainer on tiny models, whose batches count up, and max logits in float64."""

import dataclasses
import itertools

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from levanter.checkpoint import CheckpointerConfig
from levanter.layers.attention import Attention, materialize_mask
from levanter.models.lm_model import LmExample
from levanter.tracker import NoopConfig, Tracker
from levanter.trainer import TrainerConfig

from muonclip_jax.integrations.levanter import MuonClipConfig, MuonClipTrainer
from tests.integrations.levanter_models import LENGTH, VOCAB, build

BATCH, STEPS, TAU = 32, 20, 1.5
OPTIMIZER = MuonClipConfig(learning_rate=0.01, qk_clip_threshold=TAU)
SMALL_RATE = dataclasses.replace(
    OPTIMIZER, learning_rate=1e-9, weight_decay=0.0, warmup=0, lr_schedule="constant"
)


class Log(Tracker):
    """Keeps what the trainer logs, by step."""

    name = "log"

    def __init__(self):
        self.steps = {}

    def log(self, metrics, *, step, commit=None):
        if step is not None:
            self.steps.setdefault(int(step), {}).update(metrics)

    def log_hyperparameters(self, hparams):
        pass

    def log_summary(self, metrics):
        pass

    def log_artifact(self, artifact_path, *, name=None, type=None):
        pass

    def finish(self):
        pass

    def series(self, name):
        return [float(np.asarray(m[name])) for _, m in sorted(self.steps.items()) if name in m]


def batches(skip=0, constant=False):
    """Sequences that count up by 1, 2 or 3."""
    Batch, Pos = hax.Axis("batch", BATCH), hax.Axis("position", LENGTH)
    for index in itertools.count(skip):
        rng = np.random.default_rng(0 if constant else index)
        start, by = rng.integers(VOCAB, size=(BATCH, 1)), rng.integers(1, 4, size=(BATCH, 1))
        tokens = jnp.asarray((start + by * np.arange(LENGTH)) % VOCAB, jnp.int32)
        yield hax.vmap(LmExample.causal, Batch)(hax.named(tokens, (Batch, Pos)))


def next_token_loss(model, example, *, key=None):
    return model.compute_next_token_loss(example, key=key)


def trainer_of(folder, optimizer=OPTIMIZER, cls=MuonClipTrainer, loss=next_token_loss, **config):
    if not isinstance(optimizer, optax.GradientTransformation):
        optimizer = optimizer.build(STEPS)
    settings = TrainerConfig(
        id="run",
        num_train_steps=STEPS,
        train_batch_size=BATCH,
        tracker=NoopConfig(),
        require_accelerator=False,
        log_jaxprs=False,
        log_xla_hlo=False,
        log_dir=folder / "logs",
        checkpointer=CheckpointerConfig(base_path=str(folder / "steps"), keep=[dict(every=10)]),
        **config,
    )
    settings.initialize()
    trainer = cls(settings, optimizer, loss)
    trainer.tracker = Log()
    return trainer


def loud(model, by=4.0):
    """Multiplies queries and keys, so that there is something to clip."""

    def louder(x):
        if not isinstance(x, Attention):
            return x
        where = lambda a: (a.q_proj.weight, a.k_proj.weight)  # noqa: E731
        return eqx.tree_at(where, x, tuple(w * by for w in where(x)))

    return jax.tree.map(louder, model, is_leaf=lambda x: isinstance(x, Attention))


def state_of(trainer, model="llama", **arguments):
    init = (lambda: loud(build(model))) if isinstance(model, str) else (lambda: model)
    return trainer.initial_state(jax.random.PRNGKey(1), model_init=init, **arguments)


def train(trainer, model="llama", stop=STEPS, constant=False, **arguments):
    """Trains to the step `stop`; returns the state, the losses and the log."""
    with trainer:
        state, losses = state_of(trainer, model, **arguments), []
        data = batches(int(state.step), constant)
        while int(state.step) < stop:
            info = trainer.train_step(state, next(data))
            state = info.state
            losses.append(info.loss)
    return state, losses, trainer.tracker


def gradients(trainer, model="llama"):
    """Computes the gradients of one step, and the metrics with the slots."""
    with trainer:
        state = state_of(trainer, model)
        compute = eqx.filter_jit(trainer._compute_gradients_microbatched)
        return compute(trainer.loss_fn, state.model, next(batches()), key=jax.random.PRNGKey(0))


def equal(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def max_logits_by_hand(model, example):
    """The max logits of the first layer of a Llama, in float64."""
    first = model.transformer.layers.get_layer(0)
    x = model.embeddings.embed(example.tokens)
    query, key, _ = first.self_attn._compute_qkv(first.input_layernorm(x), key=None)
    return masked_maximum(query, key, example.attn_mask)


def masked_maximum(query, key, mask):
    """Largest logit of each head, [key_heads, groups], of all logits in NumPy."""
    key = key.rename({"position": "key_position"})
    axes = [*query.axes[:1], "kv_head", "q_heads_per_group", "position", "head_size"]
    q = np.asarray(query.rearrange(axes).array, np.float64)
    k = np.asarray(key.rearrange([axes[0], "kv_head", "key_position", "head_size"]).array)
    logits = np.einsum("bkgth,bksh->bkgts", q, k.astype(np.float64)) / np.sqrt(q.shape[-1])
    position, key_position = query.resolve_axis("position"), key.resolve_axis("key_position")
    seen = materialize_mask(mask, position, key_position)
    if seen is not None:
        pairs = (*query.resolve_axis(tuple(axes[:1])), position, key_position)
        seen = np.asarray(seen.broadcast_to(pairs).rearrange(pairs).array)[:, None, None]
        logits = np.where(seen, logits, -np.inf)
    return logits.max(axis=(0, 3, 4))
